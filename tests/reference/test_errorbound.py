"""The error rule: what it lets pass and what it stops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from einsumcascade.errors import InputError
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.reference.errorbound import EPS, Condition, conditioning, judge

NONE = Condition(maximum=0.0, rms=0.0)
SOFTMAX = parse(
    "in S[p, m] V[m, f]\nGM[p] = S[p, m] :: max(m)\nSN[p, m] = exp(S[p, m] - GM[p])\nSD[p] = SN[p, m] :: sum(m)\n"
    "NV[p, f] = SN[p, m] * V[m, f] :: sum(m)\nAV[p, f] = NV[p, f] / SD[p]\nout AV"
)


def test_eps_is_half_the_distance_to_the_next_number() -> None:
    for dtype in ("float16", "float32", "float64"):
        assert EPS[dtype] == np.finfo(dtype).eps / 2


def test_both_errors_are_measured_and_bounded() -> None:
    verdict = judge([1.0, 2.0, 3.0], [1.0, 2.5, 3.0], [1.0, 2.25, 3.0], Condition(maximum=0.25, rms=0.125))
    assert verdict.max_error == 0.5
    assert verdict.max_bound == 2 * 0.25 + 4 * 0.25
    assert verdict.rms_error == math.sqrt(0.25 / 3)
    assert verdict.rms_bound == 2 * math.sqrt(0.0625 / 3) + 4 * 0.125
    assert verdict.passed
    assert "passed" in str(verdict)


def test_the_largest_element_alone_can_fail() -> None:
    assert not judge([1.0, 2.0], [1.0, 1.0], [1.25, 1.25], Condition(maximum=0.0, rms=1.0)).passed


def test_the_rms_alone_can_fail() -> None:
    expected, plain = np.zeros(100), np.zeros(100)
    plain[0] = 1.0
    verdict = judge(np.full(100, 0.5), expected, plain, NONE)
    assert verdict.max_error <= verdict.max_bound
    assert not verdict.passed


@pytest.mark.parametrize("wrong", [[math.inf, 1.0], [-math.inf, 1.0], [0.0, 1.0], [math.nan, math.nan]])
def test_non_finite_values_must_stand_where_they_are_expected(wrong: list[float]) -> None:
    expected = [math.nan, 1.0]
    verdict = judge(wrong, expected, expected, Condition(maximum=9.0, rms=9.0))
    assert not verdict.passed
    assert verdict.misplaced >= 1


def test_an_infinity_of_the_other_sign_fails() -> None:
    assert judge([-math.inf], [-math.inf], [-math.inf], NONE).passed
    assert not judge([math.inf], [-math.inf], [-math.inf], NONE).passed


def test_nothing_to_judge_passes() -> None:
    assert judge(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3)), NONE).passed


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"shape \(1,\), the reference \(2,\)"):
        judge([1.0], [1.0, 2.0], [1.0, 2.0], NONE)


def test_a_linear_map_moves_by_eps() -> None:
    cascade = parse("in X[m] I[m]\nY[m] = 3 * X[m] + I[m]\nout Y")
    found = conditioning(cascade, {"X": [1.0, -2.0], "I": [5, 6]}, 0.25)["Y"]
    assert found.maximum == 3 * 2.0 * 0.25
    assert found.rms == pytest.approx(3 * 0.25 * math.sqrt((1 + 4) / 2))


def test_conditioning_grows_with_the_scores_and_repeats() -> None:
    rng = np.random.default_rng(0)
    s, v = rng.normal(size=(8, 16)), rng.normal(size=(16, 4))
    small = conditioning(SOFTMAX, {"S": s, "V": v}, EPS["bfloat16"])["AV"]
    large = conditioning(SOFTMAX, {"S": 30 * s, "V": v}, EPS["bfloat16"])["AV"]
    assert large.maximum > 3 * small.maximum
    assert small == conditioning(SOFTMAX, {"S": s, "V": v}, EPS["bfloat16"])["AV"]
    assert small != conditioning(SOFTMAX, {"S": s, "V": v}, EPS["bfloat16"], seed=1)["AV"]


def test_elements_without_a_finite_value_are_left_out() -> None:
    found = conditioning(parse("in X[m]\nY[m] = log(X[m])\nout Y"), {"X": [0.0, 1.0]}, 2.0**-8)["Y"]
    assert 0 < found.maximum < 0.01


def test_a_missing_rescale_is_caught_and_a_rounded_formula_passes() -> None:
    rng = np.random.default_rng(1)
    s, v = 4 * rng.normal(size=(32, 64)), rng.normal(size=(64, 8))
    inputs = {"S": s.astype(np.float32), "V": v.astype(np.float32)}
    expected = run(SOFTMAX, inputs)["AV"]
    cond = conditioning(SOFTMAX, inputs, EPS["float32"])["AV"]
    x = inputs["S"]
    weight = np.exp(x - x.max(-1, keepdims=True))
    plain = (weight @ inputs["V"]) / weight.sum(-1, keepdims=True)
    low, high = x[:, :32], x[:, 32:]
    top, new = low.max(-1, keepdims=True), x.max(-1, keepdims=True)

    def streamed(rescale: np.ndarray) -> np.ndarray:
        a, b = np.exp(low - top), np.exp(high - new)
        total = a.sum(-1, keepdims=True) * rescale + b.sum(-1, keepdims=True)
        return np.asarray(((a @ inputs["V"][:32]) * rescale + b @ inputs["V"][32:]) / total)

    assert judge(streamed(np.exp(top - new)), expected, plain, cond).passed
    assert not judge(streamed(np.ones_like(top)), expected, plain, cond).passed
