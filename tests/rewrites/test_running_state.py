"""C is found where one factor or shift moves a state, is proven, and is refused everywhere else."""

from __future__ import annotations

import math
import random

import pytest

from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var
from einsumcascade.language.parser import parse
from einsumcascade.rewrites.corrections import Correction, Rejection
from einsumcascade.rewrites.proofs import PRIME
from einsumcascade.rewrites.running_state import correction

D, Z = Read(tensor="D", indices=(Var(name="p"),)), Read(tensor="Z", indices=(Var(name="p"),))


def summand(text: str) -> Expr:
    """An expression over X[p,m], V[m], D[p], Z[p]."""
    return parse(f"in X[p,m], V[m], D[p], Z[p]\nconst c = 3\nT[p,m] = {text}\nout T").einsums[0].expr


def of(text: str, *, reduce: str = "sum", positive: tuple[Read, ...] = ()) -> Correction | Rejection:
    return correction(summand(text), (D, Z), reduce=reduce, positive=positive)


# Those of a state of one number that an exponential moves, which grows with the old reference.
SINKS = ((True,),)


def entry(found: Correction | Rejection) -> Expr:
    """The C of a state of one number."""
    assert isinstance(found, Correction), found
    ((c,),) = found.matrix
    return c


def value(expr: Expr, at: dict[str, float]) -> float:
    """Evaluate over plain numbers."""
    match expr:
        case Num():
            return float(expr.value)
        case Read():
            return at[expr.tensor]
        case Scalar():
            return at[expr.name]
        case Apply():
            args = [value(a, at) for a in expr.args]
            plain = {
                "add": lambda x, y: x + y,
                "sub": lambda x, y: x - y,
                "mul": lambda x, y: x * y,
                "div": lambda x, y: x / y,
                "neg": lambda x: -x,
                "exp": math.exp,
                "sqrt": math.sqrt,
                "pow": lambda x, y: x**y,
                "max": max,
                "tanh": math.tanh,
                "abs": abs,
                "relu": lambda x: max(x, 0.0),
                "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
                "log": math.log,
            }
            return plain[expr.op](*args)
    raise AssertionError(expr)


ACCEPTED = {
    "softmax": ("exp(X[p,m] - D[p])", True),
    "weighted": ("exp(X[p,m] - D[p]) * V[m]", True),
    "squared": ("exp(X[p,m] - D[p]) ** 2", True),
    "twice": ("exp(2 * (X[p,m] - D[p]))", True),
    "division": ("X[p,m] / Z[p]", False),
    "root": ("X[p,m] * V[m] / sqrt(Z[p])", False),
    "both": ("exp(X[p,m] - D[p]) / Z[p]", False),
    "softcap": ("exp(20 * tanh(X[p,m] / 20) - D[p])", True),
    "scaled": ("exp(c * X[p,m] - c * D[p])", False),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_correction_moves_the_summand(name: str) -> None:
    text, exponential = ACCEPTED[name]
    found = of(text, positive=(Z,))
    c = entry(found)
    assert isinstance(found, Correction) and found.form == "linear" and (found.sinks == SINKS) is exponential
    f = summand(text)
    rng = random.Random(3)
    for _ in range(20):
        at = {k: rng.uniform(0.2, 3.0) for k in ("X", "V", "D", "Z")} | {"c": 3.0}
        moved = at | {k: rng.uniform(0.2, 3.0) for k in ("D", "Z")}
        primes = at | {k + PRIME: moved[k] for k in ("D", "Z")}
        assert value(c, primes) * value(f, at) == pytest.approx(value(f, moved), rel=1e-12)
    # C(d, d) = 1
    same = at | {k + PRIME: at[k] for k in ("D", "Z")}
    assert value(c, same) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_correction_is_proven_algebraically(name: str) -> None:
    found = of(ACCEPTED[name][0], positive=(Z,))
    assert isinstance(found, Correction)
    assert found.kind == "algebraic"
    assert any(line.startswith("residual") for line in found.proof)


def test_exponentials_are_joined_so_that_none_overflows() -> None:
    found = of("exp(X[p,m] - D[p]) * V[m]")
    assert value(entry(found), {"D": 5000.0, "D__next": 5001.0}) == pytest.approx(math.exp(-1.0))


def test_the_factor_of_an_exponent_must_be_positive_for_an_empty_state_to_need_no_care() -> None:
    signs = {"exp(X[p,m] - D[p])": True, "exp(D[p] - X[p,m])": False, "exp(c * D[p] + V[m])": False}
    for text, positive in signs.items():
        found = of(text)
        assert isinstance(found, Correction) and (found.sinks == SINKS) is positive


@pytest.mark.parametrize(
    "text",
    [
        "lrelu(X[p,m] - D[p])",
        "elu(X[p,m] - D[p]) * V[m]",
        "exp(X[p,m] - D[p]) * select(X[p,m] < D[p], 1, 2)",
        "exp(X[p,m]) * select(D[p] > 0, V[m], 0)",
    ],
)
def test_a_reference_inside_an_operator_that_algebra_cannot_open_is_rejected(text: str) -> None:
    found = of(text)
    assert isinstance(found, Rejection)
    assert "algebra cannot see into" in found.reason


def test_what_is_fixed_along_the_rank_is_part_of_the_correction() -> None:
    row = Read(tensor="V", indices=(Var(name="m"),))
    text = "exp(V[m] * (X[p,m] - D[p]))"
    assert isinstance(of(text), Rejection)
    found = correction(summand(text), (D, Z), reduce="sum", fixed=frozenset({row}))
    assert isinstance(found, Correction) and found.sinks != SINKS
    found = correction(summand(text), (D, Z), reduce="sum", fixed=frozenset({row}), positive=(row,))
    assert isinstance(found, Correction) and found.sinks == SINKS


def test_a_summand_without_references_needs_no_correction() -> None:
    assert of("X[p,m] * V[m]") == Correction(form="none")


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_a_difference_shifts_under_a_maximum(reduce: str) -> None:
    found = of("X[p,m] - D[p] + V[m]", reduce=reduce)
    assert isinstance(found, Correction) and found.form == "shift"
    assert value(entry(found), {"D": 2.0, "D__next": 5.0}) == -3.0


def test_a_positive_divisor_scales_a_maximum_and_one_of_unknown_sign_does_not() -> None:
    assert isinstance(of("X[p,m] / Z[p]", reduce="max", positive=(Z,)), Correction)
    found = of("X[p,m] / Z[p]", reduce="max")
    assert isinstance(found, Rejection) and "positive" in found.reason


@pytest.mark.parametrize(
    "text",
    [
        "relu(X[p,m] - D[p])",
        "tanh(X[p,m] / Z[p])",
        "abs(X[p,m] - D[p])",
        "sigmoid(X[p,m] - D[p])",
        "exp(X[p,m] / Z[p])",
        "log(1 + X[p,m] / Z[p])",
        "max(X[p,m], D[p])",
    ],
)
def test_what_mixes_a_value_with_a_reference_is_rejected_with_the_part_that_does(text: str) -> None:
    found = of(text, positive=(Z,))
    assert isinstance(found, Rejection)
    assert "mixes values along the rank with" in found.reason


def test_a_factor_of_a_product_is_rejected() -> None:
    assert isinstance(of("X[p,m] / Z[p]", reduce="prod", positive=(Z,)), Rejection)
