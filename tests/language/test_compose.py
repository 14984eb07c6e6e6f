"""Cascades changed from Python: scores put in place of others, and masks joined before they constrain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.errors import CascadeError, DiagnosedError
from einsumcascade.gallery import load
from einsumcascade.language.compose import Mask, mask
from einsumcascade.language.parser import parse
from einsumcascade.reference import run

ATTENTION = load("softmax_attention")
RNG = np.random.default_rng(3)
TENSORS = {t: RNG.standard_normal((2, 3, n, 4)) for t, n in (("Q", 5), ("K", 6), ("V", 6))}
LINES = parse("in U[h,p], W[h,m]\nQK[h,p,m] = U[h,p] * W[h,m]\nG[h,p] = QK[h,p,m] :: max(m)\nout G, QK")


def refuse(code: str, action: Callable[[], object]) -> str:
    with pytest.raises(DiagnosedError) as caught:
        action()
    assert caught.value.codes == (code,)
    return str(caught.value)


# --- scores -----------------------------------------------------------------------------------------------------


def test_a_score_equals_the_text_that_someone_would_write() -> None:
    slopes = RNG.standard_normal(3)
    biased = ATTENTION.score("QK", "QK - SLOPE[h] * abs(p - m)", SLOPE=...)
    assert [i.tensor for i in biased.inputs] == ["Q", "K", "V", "SLOPE"]
    found = run(biased, {**TENSORS, "SLOPE": slopes})["AV"]
    np.testing.assert_allclose(found, run(load("alibi"), {**TENSORS, "SLOPE": slopes})["AV"], rtol=1e-12)
    capped = ATTENTION.score("QK", "cap * tanh(QK / cap)", cap=30.0)
    np.testing.assert_allclose(run(capped, TENSORS)["AV"], run(load("softcap"), TENSORS)["AV"], rtol=1e-12)
    assert parse(str(biased)) == biased and parse(str(capped)) == capped


def test_what_was_written_is_still_there_and_may_be_an_output() -> None:
    doubled = LINES.score("QK", "2 * QK")
    x, y = np.array([[1.0, 2.0]]), np.array([[3.0]])
    found = run(doubled, {"U": x, "W": y})
    assert found["G"].tolist() == [[6.0, 12.0]] and found["QK"].tolist() == [[[3.0], [6.0]]]


def test_scores_follow_one_another() -> None:
    twice = LINES.score("QK", "QK + 1").score("S", "2 * S")
    assert run(twice, {"U": np.ones((1, 1)), "W": np.ones((1, 1))})["G"].item() == 4.0
    assert [e.tensor for e in twice.einsums] == ["QK", "S", "S2", "G"]


@pytest.mark.parametrize("how", [..., "h, x", "h,x"])
def test_a_new_input_has_the_ranks_that_index_it_or_those_named(how: object) -> None:
    biased = LINES.score("QK", "QK + BIAS[h, p - m + M]", BIAS=how)  # type: ignore[arg-type]
    assert biased.inputs[-1].indices == ("h", "x")


def test_a_new_input_may_be_a_scalar() -> None:
    assert LINES.score("QK", "QK / T", T="").inputs[-1].indices == ()


def test_a_score_within_a_block_stands_within_it() -> None:
    looped = parse("in X[t]\ninit R[0] = 0\niter t:\n  Y[t] = 2 * X[t]\n  R[t+1] = R[t] + Y[t]\nend\nS = R[T]\nout S")
    changed = looped.score("Y", "Y + t")
    assert run(changed, {"X": np.ones(3)})["S"].item() == 9.0


def test_mistakes_of_a_score_are_located() -> None:
    assert "did you mean 'QK'?" in refuse("unknown-tensor", lambda: LINES.score("QQK", "QK"))
    assert "<score>:1:6" in refuse("unknown-tensor", lambda: LINES.score("QK", "QK + SLOP[h]"))
    assert "does not use 'w'" in refuse("unknown-name", lambda: LINES.score("QK", "QK", w=3))
    assert refuse("score-rank", lambda: LINES.score("G", "G + m"))
    assert refuse("score-target", lambda: load("softmax_1p").score("RD", "RD"))
    assert refuse("syntax", lambda: LINES.score("QK", "QK +"))
    assert refuse("syntax", lambda: LINES.score("QK", ""))
    assert refuse("index-count", lambda: LINES.score("QK", "QK + T[h]", T="h, p"))
    assert refuse("defined-twice", lambda: LINES.score("QK", "QK + U[h, p]", U="h, p"))
    assert refuse("number-range", lambda: LINES.score("QK", "w * QK", w=float("nan")))
    assert refuse("not-a-number", lambda: LINES.score("QK", "QK > 0"))


# --- masks ------------------------------------------------------------------------------------------------------


def live(condition: str | Mask) -> list[list[bool]]:
    """Tell where a condition holds."""
    found = run(parse("in X[p,m]\nS[p,m] = X[p,m]\nout S").constrain(condition), {"X": np.ones((7, 9))})["S"]
    return (~np.isnan(found)).tolist()


LEAVES = ["m <= p", "p - m < 3", "m < 2", "m // 2 == p // 2", "(p + m) % 3 == 0", "m == p, p > 2"]


@given(
    st.recursive(
        st.sampled_from(LEAVES).map(lambda t: (mask(t), "(" + t.replace(",", ") and (") + ")")),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda two: (two[0][0] & two[1][0], f"({two[0][1]}) and ({two[1][1]})")),
            st.tuples(inner, inner).map(lambda two: (two[0][0] | two[1][0], f"({two[0][1]}) or ({two[1][1]})")),
            inner.map(lambda one: (~one[0], f"not ({one[1]})")),
        ),
        max_leaves=5,
    )
)
def test_joined_masks_are_the_condition_written_out(pair: tuple[Mask, str]) -> None:
    joined, text = pair
    assert live(joined) == live(text)


def test_constants_of_one_name_and_two_values_get_two_names() -> None:
    joined = ATTENTION.constrain(mask("p - m < w", w=4) | mask("m < w", w=2) | mask("m == w", w=4))
    assert [str(c) for c in joined.constraints] == ["p - m < w or m < w2 or m == w"]
    assert {c.name: c.expr.value for c in joined.constants[1:]} == {"w": 4, "w2": 2}  # type: ignore[union-attr]
    again = joined.constrain(mask("m > w", w=1))
    assert str(again.constraints[-1]) == "m > w3" and parse(str(again)) == again


def test_constants_may_come_with_the_mask_or_with_the_constraint() -> None:
    assert ATTENTION.constrain(mask("p - m < w"), w=3) == ATTENTION.constrain("p - m < w", w=3)


def test_a_mask_prints_and_compares() -> None:
    one = mask("m <= p") & ~mask("m < s", s=4)
    assert str(one) == "(m <= p) and (not (m < s))" and one == mask("m <= p") & ~mask("m < s", s=4)


def test_mistakes_of_a_mask_are_located_in_the_text_that_has_them() -> None:
    both = mask("m <= p") & mask("n < 3")
    assert " 1 | n < 3" in refuse("unknown-name", lambda: ATTENTION.constrain(both))
    assert refuse("syntax", lambda: mask("m <="))
    assert refuse("empty-text", lambda: ATTENTION.constrain(mask(" ")))
    assert refuse("not-a-condition", lambda: ATTENTION.constrain(mask("m + p")))
    assert refuse("name-clash", lambda: ATTENTION.constrain(mask("m < p", p=3)))
    assert refuse("number-range", lambda: mask("m < w", w=float("nan")))
    assert refuse("mask-truth", lambda: mask("m < p") and mask("m > 3"))
    with pytest.raises(TypeError):
        mask("m < p") & "m > 3"  # type: ignore[operator]
    with pytest.raises(CascadeError):
        ATTENTION.constrain(mask("V[b,h,m] > 0"))
