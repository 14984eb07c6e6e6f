"""Live points and the operations at them, against the points one by one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsumcascade.analysis.counts import CLASSES, count_operations
from einsumcascade.analysis.live import LivePoints, live_operations, live_points
from einsumcascade.analysis.points import count_points
from einsumcascade.errors import InputError
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade, Expr, rank_of
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run

CONDITIONS = (
    "m <= p",
    "p - m < 5",
    "m < p or m < 4",
    "not m <= p",
    "m != p",
    "m == p",
    "abs(p - m) <= 2",
    "abs(p - m) > 2",
    "2 <= abs(p - m)",
    "m // 4 <= p // 4",
    "m // 4 == p // 4",
    "m // 2 // 3 <= p",
    "(m + 1) // 3 < p - 2",
    "(2 * m + p) // 5 <= n",
    "2 * m <= 3 * p + 1",
    "(p - m) % 3 == 0",
    "m % 4 == p % 4",
    "p % 4 == 1",
    "n <= p",
    "m >= n",
    "m + n <= p",
    "m * n <= p",
    "m * m <= p",
    "m * 4 + n < 17",
    "m * 4 + n <= p",
    "m <= 3.5",
    "m <= 0.5 * p",
    "max(m, n) < p",
)


def conditions(texts: tuple[str, ...]) -> tuple[Expr, ...]:
    return parse(
        f"in X[m], Y[n], Z[p]\nconstraint {', '.join(texts)}\nO[m,n,p] = X[m] * Y[n] * Z[p]\nout O"
    ).constraints


def by_hand(texts: tuple[str, ...], ranges: Mapping[str, tuple[int, int]]) -> int:
    """Count with Python's own arithmetic on the texts."""
    code = compile(" and ".join(f"({t})" for t in texts), "<conditions>", "eval")
    points = itertools.product(*(range(lo, hi) for lo, hi in ranges.values()))
    return sum(bool(eval(code, {}, dict(zip(ranges, at, strict=True)))) for at in points)


span = st.tuples(st.integers(0, 6), st.integers(0, 13)).map(lambda t: (t[0], t[0] + t[1]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(CONDITIONS), min_size=1, max_size=3).map(tuple), span, span, span)
def test_points_are_those_counted_by_hand(
    texts: tuple[str, ...], m: tuple[int, int], n: tuple[int, int], p: tuple[int, int]
) -> None:
    ranges = {"m": m, "n": n, "p": p}
    assert count_points(ranges, conditions(texts)) == by_hand(texts, ranges)


@pytest.mark.parametrize("text", CONDITIONS)
def test_each_condition_alone_is_counted_by_hand(text: str) -> None:
    for m, n, p in ((16, 4, 23), (7, 4, 5), (1, 1, 1), (5, 13, 3)):
        ranges = {"m": (0, m), "n": (0, n), "p": (0, p)}
        assert count_points(ranges, conditions((text,))) == by_hand((text,), ranges)


N = 1000000


@pytest.mark.parametrize(
    ("texts", "points"),
    [
        (("m <= p",), N * (N + 1) // 2),
        (("m <= p", "p - m < 4096"), 4096 * N - 4096 * 4095 // 2),
        (("m // 64 <= p // 64",), 64 * 64 * (N // 64) * (N // 64 + 1) // 2),
        (("m // 64 == p // 64", "m <= p"), (N // 64) * 64 * 65 // 2),
        (("(p - m) % 4 == 0", "m <= p"), sum(range(N, 0, -4))),
        (("m <= p or m < 100",), N * (N + 1) // 2 + 99 * 100 // 2),
        (("2 * m <= p",), sum(p // 2 + 1 for p in range(N))),
    ],
)
def test_a_million_squared_is_counted_at_once(texts: tuple[str, ...], points: int) -> None:
    start = time.perf_counter()
    found = count_points({"m": (0, N), "p": (0, N)}, conditions(texts))
    assert found == points
    assert time.perf_counter() - start < 1


def test_two_keys_before_a_query_are_counted_at_once() -> None:
    ranges = dict.fromkeys("mnp", (0, N))
    assert count_points(ranges, conditions(("m <= p", "n <= p"))) == N * (N + 1) * (2 * N + 1) // 6


def test_too_many_points_to_visit_are_not_counted() -> None:
    assert count_points(dict.fromkeys("mnp", (0, N)), conditions(("m * n <= p",))) is None


COUNTED = (
    ("in X[p,m]\nconstraint m <= p\nC = X[p,m] :: sum(p,m)\nout C", {"P": 9, "M": 14}),
    ("in X[p,m]\nconst w = 3\nC = X[p,m] :: sum(p,m) where m <= p, p - m < w\nout C", {"P": 9, "M": 7}),
    ("in X[m]\nrank j = 4\nC = X[2 * m + j - 3] :: sum(m,j)\nout C", {"M": 11}),
    ("in X[m]\nrank m0 = 4\nrank m1 = (M + M0 - 1) // M0\nC = X[m1 * M0 + m0] :: sum(m0,m1)\nout C", {"M": 11}),
    ("in X[m], Y[n]\nC = X[n] * Y[n] :: sum(n)\nout C", {"M": 5, "N": 8}),
    ("in X[g,m]\nrank h = 2 * G\nC = X[h // 2,m] :: sum(h,m) where m % 3 == h % 3\nout C", {"G": 3, "M": 10}),
    ("in X[p,m]\nC = X[p,m] :: sum(p,m) where m * m <= p or p == m + 2\nout C", {"P": 12, "M": 9}),
)


@pytest.mark.parametrize(("text", "extents"), COUNTED)
def test_the_reference_sums_as_many_ones(text: str, extents: dict[str, int]) -> None:
    cascade = parse(text)
    ones = {i.tensor: np.ones([extents[rank_of(v)] for v in i.indices]) for i in cascade.inputs}
    (found,) = live_points(cascade, extents)
    assert found.live == run(cascade, ones)["C"]


def test_a_partition_has_the_live_points_of_the_rank() -> None:
    extents = {"B": 1, "H": 2, "P": 100000, "M": 100000, "E": 4, "F": 4}
    causal = load("softmax_1p").constrain("m1*M0 + m0 <= p")
    live = {x.tensor: x.live for x in live_points(causal, extents)}
    assert live["SLN"] == 2 * 100000 * 100001 // 2
    assert live["QK"] == 4 * 2 * 100000 * 100001 // 2
    # What has no point of a tile is not culled.
    assert live["RM"] == 2 * 100000 * ((100000 + 63) // 64)


def test_points_that_depend_on_data_are_unknown() -> None:
    found = live_points(load("gatv2"), {"P": 3, "M": 4, "H": 1, "E": 2, "F": 2})
    unknown = next(x for x in found if x.tensor == "GM")
    assert (unknown.live, unknown.unknown) == (None, ("ADJ[p, m] > 0",))
    assert unknown.to_dict()["unknown"] == ["ADJ[p, m] > 0"]


def test_a_gathered_index_is_taken_to_be_within_its_rank() -> None:
    text = "in X[x,f], T[p]\nY[f] = X[T[p],f] :: sum(p)\nout Y"
    assert live_points(parse(text), {"X": 3, "F": 4, "P": 5}) == (LivePoints(tensor="Y", points=20, live=20),)


def test_operations_are_those_at_live_points() -> None:
    extents = {"B": 2, "H": 3, "P": 50, "M": 70, "E": 8, "F": 16}
    cascade = load("softmax_attention").constrain("m <= p")
    rows = 2 * 3
    live = rows * sum(min(p + 1, 70) for p in range(50))
    found = live_operations(cascade, extents)
    # Products, the scale, the subtraction and the sum of the denominator; E and F products a live point.
    assert found == {
        "multiply_add": live * (8 + 1 + 1 + 1 + 16),
        "exp": live,
        "divide": live,
        "max": live,
        "other": 0,
        "contraction": live * (8 + 16),
        "function": 2 * live,
        "special": 2 * live,
    }


@pytest.mark.parametrize("name", ["softmax_attention", "softmax_1p", "gqa", "diff", "linattn"])
def test_without_conditions_every_point_is_live(name: str) -> None:
    cascade = without_conditions(load(name))
    ranks = dict.fromkeys(rank_of(v) for i in cascade.inputs for v in i.indices)
    extents = {r: 64 + 64 * n for n, r in enumerate(ranks)}
    found = live_operations(cascade, extents)
    counts = count_operations(cascade)
    at = extents | {"M0": 64, "M1": extents.get("M", 0) // 64, "S": extents.get("S", 2)}
    assert found is not None
    assert {c: found[c] for c in CLASSES} == {c: counts.total(c).at(at) for c in CLASSES}


def without_conditions(cascade: Cascade) -> Cascade:
    lines = [line.split(" where ")[0] for line in str(cascade).splitlines() if not line.startswith("constraint")]
    return parse("\n".join(lines))


def test_operations_that_depend_on_data_are_unknown() -> None:
    assert live_operations(load("gatv2"), {"P": 3, "M": 4, "H": 1, "E": 2, "F": 2}) is None


def test_a_system_counts_alike_with_and_without_culling() -> None:
    cascade = parse("in A[i,j], B[i,c]\nX[j,c] = solve(A[i,j], B[i,c])\nout X")
    extents = {"I": 7, "J": 7, "C": 3}
    found = live_operations(cascade, extents)
    assert found is not None
    assert found["multiply_add"] == count_operations(cascade).total("multiply_add").at(extents)


def test_a_missing_extent_is_said() -> None:
    with pytest.raises(InputError, match="missing-extent"):
        live_points(load("softmax_attention"), {"P": 3})
