"""Random callables: what is traced computes what the callable does on whole tensors of scores and indices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from einsumcascade.codegen.flex import traced
from einsumcascade.codegen.tracing_ops import rows
from einsumcascade.language.ir import Output
from einsumcascade.language.ops import OPS
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from tests.codegen.calls import qkv

B, H, P, M = 2, 4, 5, 7
GENERATOR = torch.Generator().manual_seed(11)
TABLES = {
    "HEADS": torch.randn(H, generator=GENERATOR, dtype=torch.float64),
    "PAIRS": torch.randn(P + 2, M, generator=GENERATOR, dtype=torch.float64),
    "GROUPS": torch.randint(-2, 3, (M,), generator=GENERATOR),
    "SEEN": torch.randn(B, M, generator=GENERATOR) > 0,
    "DEEP": torch.randn(H, 6, generator=GENERATOR, dtype=torch.float64),
}

WHOLE = st.recursive(
    st.sampled_from(["b", "h", "q", "kv", "2", "-3", "GROUPS[kv]", "GROUPS[q]"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, st.sampled_from(["//", "%"]), st.sampled_from(["2", "3"])).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        inner.map(lambda x: f"abs({x})"),
        inner.map(lambda x: f"(-{x})"),
        st.tuples(inner, inner).map(lambda t: f"torch.maximum(tensor({t[0]}), tensor({t[1]}))"),
        inner.map(lambda x: f"torch.div(tensor({x}), 3, rounding_mode='trunc')"),
        inner.map(lambda x: f"tensor(0.7 * ({x})).to(torch.long)"),
    ),
    max_leaves=4,
)
CONDITION = st.recursive(
    st.one_of(
        st.tuples(WHOLE, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), WHOLE).map(
            lambda t: f"(tensor({t[0]}) {t[1]} {t[2]})"
        ),
        st.just("SEEN[b, kv]"),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&", "|", "^", "=="]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda x: f"(~{x})"),
    ),
    max_leaves=3,
)
NUMBER = st.recursive(
    st.one_of(
        st.sampled_from(["s", "s", "0.5", "HEADS[h]", "PAIRS[q, kv]", "PAIRS[q][kv]", "HEADS[-1]", "DEEP[h, 2]"]),
        WHOLE.map(lambda x: f"DEEP[h, torch.clamp(tensor({x}), -6, 5)]"),
        WHOLE,
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"({t[0]} / (1.5 + tensor({t[1]}) ** 2))"),
        inner.map(lambda x: f"torch.tanh(tensor({x}))"),
        inner.map(lambda x: f"tensor({x}).sigmoid()"),
        inner.map(lambda x: f"tensor({x}).clamp(min=-1.0, max=2)"),
        st.tuples(CONDITION, inner, inner).map(lambda t: f"torch.where({t[0]}, {t[1]}, {t[2]})"),
        st.tuples(inner, CONDITION).map(lambda t: f"tensor({t[0]}).masked_fill({t[1]}, 0.25)"),
        st.tuples(inner, CONDITION).map(lambda t: f"(tensor({t[0]}) * {t[1]})"),
    ),
    max_leaves=6,
)


def tensor(x: Any) -> Any:
    return torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None) if isinstance(x, int | float) else x


@contextmanager
def real_numbers_of_whole_ones_in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def function(text: str) -> Callable[..., Any]:
    names = {**TABLES, "torch": torch, "tensor": tensor}
    return eval(f"lambda s, b, h, q, kv: s * 0 + {text}", names)  # type: ignore[no-any-return]


@given(NUMBER)
@example("DEEP[h, torch.clamp(tensor(GROUPS[kv]), -6, 5)]")
@example("torch.where((SEEN[b, kv] == SEEN[b, kv]), s, 0.5)")
@example("(GROUPS[kv] * DEEP[h, torch.clamp(tensor(GROUPS[kv]), -6, 5)])")
@example("tensor(tensor(b).masked_fill(SEEN[b, kv], 0.25)).sigmoid()")
def test_a_random_callable_is_traced_to_what_it_computes(text: str) -> None:
    mod = function(text)
    q, k, v = qkv(P, M, b=B, h=H, dtype=torch.float64)
    op, tensors = traced(q, k, v, mod)
    assert parse(str(op.cascade)) == op.cascade
    written = {e.tensor for e in op.cascade.einsums}
    shown = replace(op.cascade, outputs=tuple(Output(tensor=t) for t in ("QK", "S") if t in written))
    found = run(shown, {i.tensor: t.numpy() for i, t in zip(op.cascade.inputs, tensors, strict=True)})
    score = torch.from_numpy(found["QK"])
    points = list(itertools.product(*map(range, score.shape)))
    with real_numbers_of_whole_ones_in_float64():
        expected = [torch.as_tensor(mod(score[p], *map(torch.tensor, p)), dtype=torch.float64) for p in points]
    got = torch.from_numpy(found.get("S", found["QK"])).flatten()
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_the_rows_that_pytorch_spells_are_found_by_that_name() -> None:
    table = rows()
    assert {
        "maximum": "max",
        "remainder": "mod",
        "floor_divide": "floordiv",
        "where": "select",
    }.items() <= table.items()
    assert {"exp": "exp", "tanh": "tanh", "sigmoid": "sigmoid", "rsqrt": "rsqrt", "logical_not": "not"}.items() <= (
        table.items()
    )
    assert set(table.values()) == {o.name for o in OPS.values() if not (o.internal or o.fiberwise or o.counts)}
