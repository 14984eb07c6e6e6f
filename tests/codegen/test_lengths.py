"""One text and one machine code for many lengths."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import einsumcascade as ec
from einsumcascade.codegen.build import load_module
from einsumcascade.codegen.launch import allocate, plan
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse

# 1, primes, multiples of 16 and their neighbours.
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 127, 128, 129, *range(160, 160 + 88 * 41, 41))
SCORES = parse("in S[p,m], V[m,f]\nO[p,f] = sigmoid(S[p,m]) * V[m,f] :: sum(m)\nout O", name="scores.cascade")


def machine_codes(
    cascade: Cascade, calls: Iterable[dict[str, tuple[int, ...]]], *, dtype: str = "bfloat16", by_lengths: bool = False
) -> int:
    """Count what Triton would compile for calls with inputs of the given shapes, by the key of its own cache.

    `by_lengths`: of the form that each call takes, not of the text that is the same for all.
    """
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = set()
    for shapes in calls:
        inputs = {n: torch.empty(s, dtype=getattr(torch, dtype)) for n, s in shapes.items()}
        binding = bind(cascade, shapes=shapes)
        features = {r: binding.extents[r] for r in ("E", "F") if r in binding.extents}
        extents = {r: binding.extents[r] for r in (rank_of(v) for i in cascade.inputs for v in i.indices)}
        named = extents if by_lengths else features
        built = ec.compile(cascade).kernel(extents=named, dtype=dtype, target="cuda:90").built
        tensors = allocate(built, inputs, binding)
        for call in plan(built, tensors, binding):
            function = getattr(load_module(built.source), call.kernel)
            binder = create_function_from_signature(function.signature, function.params, backend)
            arguments = {p: tensors[t] for p, t in call.tensors.items()} | call.arguments
            _, specialisation, _ = binder(**arguments)
            found.add((built.digest, call.kernel, str(specialisation)))
    return len(found)


def attention(p: int, m: int, *, e: int = 64, f: int = 64, b: int = 2, h: int = 3) -> dict[str, tuple[int, ...]]:
    return {"Q": (b, h, p, e), "K": (b, h, m, e), "V": (b, h, m, f)}


def test_100_lengths_share_one_machine_code() -> None:
    assert len(set(LENGTHS)) == 100
    cascade = load("softmax_attention")
    assert machine_codes(cascade, (attention(n, n) for n in LENGTHS)) == 1
    assert machine_codes(cascade, (attention(1, n) for n in LENGTHS)) == 1
    assert machine_codes(cascade, (attention(n, 7) for n in LENGTHS)) == 1


def test_batches_and_heads_share_it_too() -> None:
    cascade = load("softmax_attention")
    assert machine_codes(cascade, (attention(33, 65, b=b, h=h) for b in (1, 2, 16, 17) for h in (1, 3, 16))) == 1


@pytest.mark.parametrize(("e", "f", "codes"), [(80, 96, 1), (72, 40, 4), (8, 3, 8)])
def test_strides_of_odd_heads_tell_what_is_aligned(e: int, f: int, codes: int) -> None:
    """Where a head is no multiple of 16 elements, strides are one for some lengths: at most twice as many a tensor."""
    assert machine_codes(load("softmax_attention"), (attention(n, n, e=e, f=f) for n in LENGTHS)) <= codes


def test_a_length_along_a_last_axis_is_compiled_for_its_alignment() -> None:
    """1, a multiple of 16, any other: the keys of a matrix of scores that is given."""
    calls = ({"S": (n, n), "V": (n, 64)} for n in LENGTHS)
    assert machine_codes(SCORES, calls) == 3


def test_one_text_serves_every_length() -> None:
    op = ec.compile("softmax_attention")
    for n in LENGTHS[:12]:
        q = torch.randn(1, 1, n, 16)
        assert torch.isfinite(op(q, q, q)).all()
    assert len(op._runner.built) == 1
