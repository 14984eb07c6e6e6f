"""Loop bounds against brute force: every live point is visited once, and a full tile is live throughout."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsumcascade.codegen.kernel_ir import Loop, Map, Stmt, TileKernel, first, last
from einsumcascade.codegen.place import lower
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var, subexpressions
from einsumcascade.language.parser import parse
from einsumcascade.rewrites.derive import simplify
from einsumcascade.schedules.bounds import linear
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.schedule import KernelSchedule

TEXT = """\
in S[p,m], V[m,f]
const w = {w}
{constraints}
O[p,f] = S[p,m] * V[m,f] :: sum(m)
out O
"""
MASKS = (
    ("m <= p",),
    ("m < p",),
    ("p >= m",),
    ("p > m",),
    ("m == p",),
    ("m >= p",),
    ("p - m < w",),
    ("m <= p", "p - m < w"),
    ("p - m < w", "m - p < w"),
    ("m <= p + 3",),
    ("m + 2 <= p",),
    ("m < 5",),
    ("m >= 4",),
    ("m >= p - w",),
    ("m < w",),
    ("m // 4 == p // 4",),
    ("m % 3 == 0",),
    ("m <= p or m < 4",),
    ("2 * m <= p",),
    ("m <= 2 * p",),
    ("m != p",),
    ("m < 0",),
    ("m - M < p - P + 1",),
    ("M - m > p",),
    ("m <= p", "m >= 3", "m < 9"),
    ("p < 4",),
    ("m < M - 2",),
)


def value(expr: Expr, at: Mapping[str, int]) -> int:
    """Evaluate whole-number arithmetic, written apart from the package's own evaluators."""
    match expr:
        case Num():
            return int(expr.value)
        case Var() | Scalar():
            return at[expr.name]
        case Read():
            return at[expr.tensor]
        case Apply():
            x = [value(a, at) for a in expr.args]
            match expr.op:
                case "add":
                    return x[0] + x[1]
                case "sub" | "ieee_sub":
                    return x[0] - x[1]
                case "mul":
                    return x[0] * x[1]
                case "neg":
                    return -x[0]
                case "floordiv" | "quotient":
                    return x[0] // x[1]
                case "mod":
                    return x[0] % x[1]
                case "max" | "min":
                    return max(x) if expr.op == "max" else min(x)
                case "lt" | "le" | "gt" | "ge" | "eq" | "ne":
                    return {
                        "lt": x[0] < x[1],
                        "le": x[0] <= x[1],
                        "gt": x[0] > x[1],
                        "ge": x[0] >= x[1],
                        "eq": x[0] == x[1],
                        "ne": x[0] != x[1],
                    }[expr.op]
                case "and" | "or":
                    return bool(x[0]) and bool(x[1]) if expr.op == "and" else bool(x[0]) or bool(x[1])
                case "not":
                    return not x[0]
                case "select":
                    return x[1] if x[0] else x[2]
                case "narrow":
                    assert abs(x[0]) < 2**31
                    return x[0]
    raise AssertionError(expr)


def lowered(constraints: tuple[str, ...], p: int, m: int, tile: tuple[int, int], w: int) -> tuple[TileKernel, Binding]:
    text = TEXT.format(w=w, constraints="\n".join(f"constraint {c}" for c in constraints))
    cascade = simplify(parse(text)).cascade
    binding = bind(cascade, extents={"P": p, "M": m, "F": 3})
    program = partition(cascade, bounded=("f",))
    (kernel,) = program.kernels
    return lower(kernel, program, KernelSchedule(tiles={"p": tile[0], "m": tile[1]}), binding), binding


def visits(kernel: TileKernel, binding: Binding, corner: int) -> list[tuple[int, tuple[Expr, ...]]]:
    """Start of every tile that the loop visits for one tile of queries, and what is still tested there."""
    extents, size = dict(binding.extents), kernel.axes["p"].size
    at = {**extents, **{k: int(v) for k, v in binding.constants.items()}, **kernel.fixed}
    at |= {first("p"): corner, last("p"): min(corner + size, extents["P"]) - 1}
    at |= {a.rank: a.size for a in kernel.axes.values() if a.role == "loop"}
    out = []
    for s in kernel.body:
        if (
            isinstance(s, Map)
            and not s.value.axes
            and all(not isinstance(e, Read) or e.tensor in at for e in subexpressions(s.expr))
        ):
            at[s.value.name] = value(s.expr, at)
        for _ in range(s.parts if isinstance(s, Loop) else 0):
            assert isinstance(s, Loop)
            note(s.heads, at)
            for g in s.segments:
                for start in range(value(g.lo, at), value(g.hi, at), s.step):
                    at[s.index] = start // s.step
                    note(g.tile, at)
                    if g.live is None or value(g.live, at):
                        out.append((start, g.tested))
    return out


def note(statements: tuple[Stmt, ...], at: dict[str, int]) -> None:
    for s in statements:
        assert isinstance(s, Map)
        at[s.value.name] = value(s.expr, at)


def check(constraints: tuple[str, ...], p: int, m: int, tile: tuple[int, int], w: int) -> None:
    kernel, binding = lowered(constraints, p, m, tile, w)
    (loop,) = (s for s in kernel.body if isinstance(s, Loop))
    cascade = parse(TEXT.format(w=w, constraints="\n".join(f"constraint {c}" for c in constraints)))
    for corner in range(0, p, tile[0]):
        found = visits(kernel, binding, corner)
        starts = [s for s, _ in found]
        assert starts == sorted(set(starts)), "a tile is visited twice or out of order"
        assert all(s >= 0 and s % loop.step == 0 for s in starts), "a tile starts between tiles"
        rows = range(corner, min(corner + tile[0], p))
        seen = {s + k for s in starts for k in range(loop.step)}
        for q, k in itertools.product(rows, range(m)):
            alive = all(value(c, {"p": q, "m": k, "P": p, "M": m, "w": w}) for c in cascade.constraints)
            assert not alive or k in seen, f"the live point p={q}, m={k} is never visited"
        for s, tested in found:
            if not tested:
                for q, k in itertools.product(rows, range(s, s + loop.step)):
                    assert k < m, f"a full tile holds m={k} beyond M={m}"
                    assert all(value(c, {"p": q, "m": k, "P": p, "M": m, "w": w}) for c in cascade.constraints), (
                        f"a full tile holds the culled point p={q}, m={k}"
                    )


@pytest.mark.parametrize("constraints", [(), *MASKS], ids=" and ".join)
def test_tiles_cover_the_live_points_and_full_tiles_are_live(constraints: tuple[str, ...]) -> None:
    for p, m, tile in (
        (1, 1, (4, 4)),
        (7, 9, (4, 2)),
        (16, 16, (4, 4)),
        (5, 23, (8, 4)),
        (23, 5, (2, 8)),
        (9, 40, (4, 16)),
    ):
        for w in (0, 1, 5, 100):
            check(constraints, p, m, tile, w)


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(sorted({c for cs in MASKS for c in cs})), max_size=3, unique=True),
    st.integers(1, 24),
    st.integers(1, 24),
    st.sampled_from((2, 4, 8)),
    st.sampled_from((2, 4, 8)),
    st.integers(0, 12),
)
def test_any_conjunction_of_masks(masks: list[str], p: int, m: int, rows: int, columns: int, w: int) -> None:
    check(tuple(masks), p, m, (rows, columns), w)


@pytest.mark.parametrize(
    "constraints", [("m <= p",), ("m <= p", "p - m < w"), ("m < 5",), ("m >= p",), ("m == p",)], ids=" and ".join
)
def test_dead_tiles_are_not_visited(constraints: tuple[str, ...]) -> None:
    """For one comparison a side the bounds are exact: every tile visited has a live point."""
    kernel, binding = lowered(constraints, 32, 64, (4, 4), 5)
    cascade = parse(TEXT.format(w=5, constraints="\n".join(f"constraint {c}" for c in constraints)))
    for corner in range(0, 32, 4):
        for start, _ in visits(kernel, binding, corner):
            assert any(
                all(value(c, {"p": q, "m": k, "w": 5}) for c in cascade.constraints)
                for q in range(corner, corner + 4)
                for k in range(start, start + 4)
            )


def test_most_tiles_of_a_causal_mask_are_full() -> None:
    kernel, binding = lowered(("m <= p",), 64, 64, (4, 4), 0)
    found = [tested for corner in range(0, 64, 4) for _, tested in visits(kernel, binding, corner)]
    assert sum(bool(t) for t in found) == 16 and len(found) == 16 * 17 // 2


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("p - m", {"p": 1, "m": -1}),
        ("2 * p + 3 - p", {"p": 1, 1: 3}),
        ("m - m", {}),
        ("-(p)", {"p": -1}),
    ],
)
def test_linear_forms_collect_terms(text: str, form: dict[object, int]) -> None:
    expr = parse(f"in X[p,m]\nY[p,m] = X[p,m] * ({text})\nout Y").einsums[0].expr
    assert isinstance(expr, Apply)
    found = linear(expr.args[1])
    assert found is not None
    assert {k.name if isinstance(k, Var) else k.value if isinstance(k, Num) else k: n for k, n in found.items()} == form
