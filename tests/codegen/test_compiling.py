"""What is compiled ahead is what a launch looks for in Triton's cache."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
import torch

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.compiling import Pointer, launches_of
from einsumcascade.codegen.launch import build
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from tests.codegen.tritons import run_with

# The launch itself, with tensors, on a driver that ends it where the compiler would begin.
COMPARED = """
import json, torch, triton.compiler
from tests.codegen.test_compiling import hashes
print(json.dumps(hashes()))
"""


class _Stop(Exception):
    pass


def built_of(extents: dict[str, int]) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """Softmax attention with a saved row, and tensors for it."""
    cascade = load("softmax_lse")
    binding = bind(cascade, extents=extents)
    features = {r: binding.extents[r] for r in feature_ranks(cascade)}
    built = build(cascade, extents=features, dtype="bfloat16", target=gpu_target("cuda:90"))
    inputs = {
        i.tensor: torch.zeros([binding.extents[v.upper()] for v in i.indices], dtype=torch.bfloat16)
        for i in cascade.inputs
    }
    return built, inputs, binding


def hashes() -> list[tuple[str, str]]:
    """The digest of what a launch compiles, and of what is compiled ahead of it."""
    import triton.compiler

    from einsumcascade.codegen import compiling
    from einsumcascade.codegen.build import load_module
    from einsumcascade.codegen.launch import allocate, plan

    seen: list[str] = []

    def noted(source: Any, target: Any = None, options: Any = None, **_: Any) -> None:
        backend = triton.compiler.make_backend(target)
        seen.append(source.hash() + backend.parse_options(dict(options)).hash())
        raise _Stop

    triton.compiler.compile = noted
    found = []
    for extents in (
        {"B": 2, "H": 3, "P": 128, "M": 77, "E": 64, "F": 64},
        {"B": 1, "H": 1, "P": 1, "M": 4096, "E": 80, "F": 72},
    ):
        built, inputs, binding = built_of(extents)
        (ahead,) = launches_of(built, {n: t.to("meta") for n, t in inputs.items()}, binding)
        target = gpu_target("cuda:90")
        with suppress(_Stop):
            compiling._compiled(ahead, target)
        (call,) = plan(built, allocate(built, inputs, binding), binding)
        tensors = allocate(built, inputs, binding)
        function = getattr(load_module(built.source), call.kernel)
        function.device_caches.clear()
        options = {"num_warps": call.warps, "num_stages": call.stages, "enable_fp_fusion": True}
        with suppress(_Stop):
            function.warmup(
                *[tensors[t] for t in call.tensors.values()], *call.arguments.values(), grid=(1,), **options
            )
        found.append((seen[-2], seen[-1]))
    return found


@pytest.mark.parametrize("triton", ["installed", "oldest"])
def test_what_is_compiled_ahead_is_what_a_launch_looks_for(triton: str) -> None:
    found = json.loads(run_with(triton, COMPARED))
    assert len(found) == 2
    assert all(ahead == launched for ahead, launched in found)


def test_a_launch_says_which_tensors_are_aligned() -> None:
    built, inputs, binding = built_of({"B": 1, "H": 1, "P": 5, "M": 7, "E": 16, "F": 16})
    base = torch.zeros(1 + inputs["K"].numel(), dtype=torch.bfloat16)
    inputs["K"] = base[1:].view(inputs["K"].shape)
    (launch,) = launches_of(built, inputs, binding)
    pointers = [a for a in launch.arguments if isinstance(a, Pointer)]
    assert [p.is_aligned for p in pointers] == [True, False, True, True, True]
    assert [p.dtype for p in pointers] == ["bfloat16"] * 4 + ["float32"]
    (on_meta,) = launches_of(built, {n: t.to("meta") for n, t in inputs.items()}, binding)
    assert on_meta.arguments[5:] == launch.arguments[5:]
