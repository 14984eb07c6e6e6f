"""What is known of values: where they can be -inf, what culled points hold, what bounds what."""

from __future__ import annotations

import math

import numpy as np
import pytest

from einsumcascade.codegen.facts import Facts, FactTable
from einsumcascade.language.ir import Expr, Num, Read, Var, apply, subexpressions, transform
from einsumcascade.language.parser import parse

INF = math.inf
DEAD = apply("lt", Var(name="m"), Num(value=3))


def table(**of: Facts) -> FactTable:
    found = FactTable(parse("in X[m], Y[m]\nconst c = 2\nZ[m] = X[m] * c\nout Z"))
    found.of.update(of)
    return found


def expr(text: str) -> Expr:
    """An expression over the values X, Y and G, as kernels hold them: without indices."""
    e = parse(f"in X[m], Y[m], G[m]\nconst c = 2\nZ[m] = {text}\nout Z").einsums[0].expr
    return transform(e, lambda x: Read(tensor=x.tensor) if isinstance(x, Read) else None)


FINITE, SUNK = Facts(may_be_neg_inf=False), Facts(may_be_neg_inf=True)
MASKED = Facts(fills={DEAD: -INF}, may_be_neg_inf=True)
ZEROED = Facts(fills={DEAD: 0.0}, may_be_neg_inf=False)


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("Y", False),
        ("X", True),
        ("X - Y", True),
        ("Y - X", False),
        ("max(X, Y)", False),
        ("max(X, X)", True),
        ("exp(X)", False),
        ("tanh(X)", False),
        ("log(Y)", True),
        ("X * c", True),
        ("Y + 1", False),
        ("-inf", True),
        ("select(m < 3, Y, X)", True),
    ],
)
def test_where_a_value_can_be_minus_infinity(text: str, may: bool) -> None:
    assert table(X=SUNK, Y=FINITE).may_be_neg_inf(expr(text.replace("X", "X[m]").replace("Y", "Y[m]"))) is may


@pytest.mark.parametrize(
    ("text", "fill"),
    [
        ("X[m]", -INF),
        ("exp(X[m])", 0.0),
        ("exp(X[m]) * Y[m]", 0.0),
        ("X[m] * 2", -INF),
        ("X[m] - 1", -INF),
        ("sigmoid(X[m])", 0.0),
        ("relu(X[m])", 0.0),
        ("exp(X[m]) ** 2", None),
        ("Y[m]", None),
        ("X[m] + Y[m]", -INF),
        ("exp(X[m]) + 1", 1.0),
        ("tanh(exp(X[m]))", 0.0),
        ("X[m] * Y[m]", None),
    ],
)
def test_what_a_culled_point_holds(text: str, fill: float | None) -> None:
    assert table(X=MASKED, Y=Facts(may_be_neg_inf=False, is_input=True)).fill(expr(text), DEAD) == fill


def test_zero_times_what_may_be_infinite_is_not_known_to_be_zero() -> None:
    assert table(X=ZEROED, Y=SUNK).fill(expr("X[m] * Y[m]"), DEAD) is None
    assert table(X=ZEROED, Y=Facts(may_be_neg_inf=False, is_finite=True)).fill(expr("X[m] * Y[m]"), DEAD) == 0.0


@pytest.mark.parametrize("factor", ["exp(Y[m])", "exp(Y[m] - X[m])", "1 / Y[m]", "Y[m] / exp(Y[m])", "log(Y[m])"])
def test_zero_times_an_exponential_or_a_quotient_is_not_known_to_be_zero(factor: str) -> None:
    """A culled score has no maximum above it: its exponential may overflow."""
    finite = Facts(may_be_neg_inf=False, is_finite=True)
    assert table(X=ZEROED, Y=finite).fill(expr(f"X[m] * ({factor})"), DEAD) is None


@pytest.mark.parametrize(
    "factor", ["sigmoid(Y[m])", "relu(Y[m])", "Y[m] / 2", "Y[m] * c + 1", "select(Y[m] > 0, Y[m], 1)"]
)
def test_zero_times_what_is_finite_is_zero(factor: str) -> None:
    finite = Facts(may_be_neg_inf=False, is_finite=True)
    assert table(X=ZEROED, Y=finite).fill(expr(f"X[m] * ({factor})"), DEAD) == 0.0


def test_a_maximum_bounds_its_operands() -> None:
    t = table(X=SUNK, Y=SUNK)
    assert t.bounds(expr("max(X[m], Y[m])"), expr("X[m]"))
    assert not t.bounds(expr("X[m]"), expr("max(X[m], Y[m])"))
    assert t.bounds(expr("2 * max(X[m], Y[m])"), expr("2 * Y[m]"))
    assert not t.bounds(expr("-2 * max(X[m], Y[m])"), expr("-2 * Y[m]"))
    assert t.bounds(expr("1 + max(X[m], Y[m])"), expr("1 + Y[m]"))


def test_a_difference_of_two_that_may_sink_is_guarded_on_the_bound_alone() -> None:
    t = table(X=SUNK, Y=SUNK)
    t.of["G"] = Facts(may_be_neg_inf=True, above=t.above(Read(tensor="X")))
    found = t.guarded(expr("X[m] - G[m]"))
    assert str(found) == "X - select(G == -inf, 0.0, G)" or [
        e.op for e in subexpressions(found) if hasattr(e, "op")
    ] == ["ieee_sub", "select", "eq"]


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        ("X[m] - Y[m]", ["ieee_sub"]),
        ("Y[m] - Y[m]", ["ieee_sub"]),
        ("X[m] / 2", ["ieee_div"]),
        ("Y[m] / Y[m]", ["div"]),
        ("X[m] / log(8 / c)", ["ieee_div", "log", "ieee_div"]),
        ("X[m] / log(2 / c)", ["div", "log", "ieee_div"]),
        ("X[m] / log(M / c)", ["div", "log", "ieee_div"]),
        # An exponential underflows to 0, though no exponential is 0.
        ("Y[m] / exp(Y[m])", ["div", "exp"]),
    ],
)
def test_guards_stand_only_where_a_value_rule_can_bite(text: str, ops: list[str]) -> None:
    found = table(X=SUNK, Y=FINITE).guarded(expr(text))
    assert [e.op for e in subexpressions(found) if hasattr(e, "op")] == ops


def test_two_that_may_sink_without_a_bound_keep_the_guard() -> None:
    found = table(X=SUNK, Y=SUNK).guarded(expr("X[m] - Y[m]"))
    assert [e.op for e in subexpressions(found) if hasattr(e, "op")] == ["sub"]


def test_an_exponent_needs_no_guard_on_each_score() -> None:
    found = table(X=SUNK, Y=SUNK).guarded(expr("exp(X[m] - Y[m])"))
    assert [e.op for e in subexpressions(found) if hasattr(e, "op")] == ["exp", "ieee_sub", "max"]
    least = next(e for e in subexpressions(found) if isinstance(e, Num))
    with np.errstate(over="ignore"):
        for score, reference, wanted in ((-INF, -INF, 0.0), (0.0, -INF, INF), (-INF, 1.0, 0.0), (2.0, 1.0, math.e)):
            row = np.maximum(np.float32(reference), np.float32(least.value))
            assert np.isclose(np.exp(np.float32(score) - row), wanted)


def test_a_root_of_a_positive_sum_is_away_from_zero() -> None:
    t = FactTable(parse("in X[m,e]\nN[m] = X[m,e] * X[m,e] :: sum(e)\nR[m] = sqrt(N[m] + 0.1)\nout R"))
    root, norm = (Read(tensor=n, indices=(Var(name="m"),)) for n in ("R", "N"))
    assert t.away_from_zero(root) and not t.away_from_zero(norm)


def test_a_copy_goes_its_own_way() -> None:
    t = table(X=SUNK)
    t.copy().of["X"] = FINITE
    assert t["X"].may_be_neg_inf
