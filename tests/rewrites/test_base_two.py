"""Constants are gathered, functions named once, and exponentials are to base 2; the value stays."""

from __future__ import annotations

import numpy as np
import pytest

import einsumcascade as ec
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.rewrites.base_two import to_base_two
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.loop_form import loop_form

TEXT = """
in X[m,e], Y[e]
const a = {a}
const b = {b}
S[m] = X[m,e] * Y[e] :: sum(e)
T[m] = {formula}
O = T[m] :: sum(m)
out O, T
"""


def same(cascade: Cascade, other: Cascade, inputs: dict[str, np.ndarray]) -> bool:
    before, after = (ec.reference.run(c, inputs) for c in (cascade, other))
    return all(np.allclose(before[t], after[t], rtol=1e-12, atol=1e-12, equal_nan=True) for t in before)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("a * S[m] / b", "S[m] * (a / b)"),
        ("tanh(a * S[m] / b)", "tanh(S[m] * (a / b))"),
        ("a * S[m]", "a * S[m]"),
        ("S[m] / b + 1", "S[m] * (1 / b) + 1"),
        ("sigmoid(a * S[m])", "1 / (1 + exp2(-(S[m] * (a * 1.4426950408889634))))"),
        ("floor(S[m] / b)", "floor(S[m] / b)"),
        ("S[m] / b % 2", "S[m] / b % 2"),
        ("select(S[m] / b < 1, 1, 2)", "select(S[m] / b < 1, 1, 2)"),
        ("S[m] / (b * S[m])", "S[m] / S[m] * (1 / b)"),
    ],
)
def test_constants_are_one_factor(formula: str, expected: str) -> None:
    cascade = parse(TEXT.format(a=3, b=7, formula=formula))
    based = to_base_two(cascade)
    assert f"T[m] = {expected}" in str(based).splitlines()
    rng = np.random.default_rng(0)
    assert same(cascade, based, {"X": rng.standard_normal((5, 3)), "Y": rng.standard_normal(3)})
    assert parse(str(based)) == based


@pytest.mark.parametrize("b", ["0", "-2", "0 - a"])
def test_a_divisor_that_may_be_zero_or_negative_stays_where_it_is(b: str) -> None:
    cascade = parse(TEXT.format(a=3, b=b, formula="a * S[m] / b"))
    based = to_base_two(cascade)
    assert "T[m] = a * S[m] / b" in str(based).splitlines()
    zeros = {"X": np.zeros((5, 3)), "Y": np.zeros(3)}
    assert same(cascade, based, zeros)


@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("name", ["softcap", "sigmoid"])
def test_attention_keeps_its_value(name: str, size: float) -> None:
    cascade = ec.load(name)
    streamed = loop_form(simplify(cascade).cascade, over=("m",), tile=4).cascade
    based = to_base_two(streamed)
    rng = np.random.default_rng(0)
    inputs = {t: size * rng.standard_normal((1, 1, 9, 4)) for t in ("Q", "K", "V")}
    assert same(cascade, based, inputs)
    assert parse(str(based)) == based


def test_a_cap_is_part_of_the_scale_of_an_exponent() -> None:
    based = str(to_base_two(loop_form(simplify(ec.load("softcap")).cascade, over=("m",), tile=4).cascade))
    assert based.count("tanh(") == 1
    assert "cap * 1.4426950408889634" in based and "scale / cap" in based
