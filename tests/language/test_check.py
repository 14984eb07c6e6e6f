"""The checks of a whole cascade: each rule, broken once and kept once."""

from __future__ import annotations

import pytest

from einsumcascade.errors import CascadeError
from einsumcascade.language.check import check, extents_known
from einsumcascade.language.parser import parse


def codes(text: str) -> tuple[str, ...]:
    """List the codes of the mistakes of a text, none for a right one."""
    try:
        parse(text)
    except CascadeError as error:
        return error.codes
    return ()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("in X[m]\nS = X[m]", "no-output"),
        ("in X[m]\nS = X[m]\nout T", "unknown-tensor"),
        ("in X[m]\nS = T[m]\nout S", "unknown-tensor"),
        ("in X[m]\nS = X[m]\nout S: int4", "unknown-dtype"),
        ("in X[m], X[m]\nS = X[m]\nout S", "defined-twice"),
        ("in X[m]\nconst c = 1\nconst c = 2\nS = c * X[m]\nout S", "defined-twice"),
        ("in X[m]\nS = X[m]\nS = X[m]\nout S", "defined-twice"),
        ("in X[m]\nX[m] = 2 * X[m]\nout X", "defined-twice"),
        ("in X[M]\nS = X[0]\nout S", "rank-variable-case"),
        ("in X[m, m]\nS = X[0, 0]\nout S", "rank-repeated"),
        ("in X[m], M\nconst c = M\nS = c * X[m]\nout S", "name-clash"),
        ("in X[m]\nS = T\nT = X[m]\nout S", "read-before-write"),
        ("in X[m]\nS = X[m, m]\nout S", "index-count"),
        ("in X[m]\nS = X\nout S", "index-count"),
        ("in X[m]\ninit S[0, 0] = 0\niter m:\nS[m+1] = X[m]\nend\nout S", "index-count"),
        ("in X[m]\nS[q] = X[q]\nout S", "unbound-rank"),
        ("in X[m]\nS[m] = X[m]\niter q:\nT[m] = X[m]\nend\nout S", "unbound-rank"),
        ("in X[m]\nconstraint m + 1\nS = X[m]\nout S", "not-a-condition"),
        ("in X[m]\nS = X[m] where X[m]\nout S", "not-a-condition"),
    ],
)
def test_a_broken_rule_is_reported_by_its_code(text: str, code: str) -> None:
    assert code in codes(text)


@pytest.mark.parametrize(
    "text",
    [
        "in X[m]\nS = X[m]\nT = S * 2\nout T, S",
        "in X[m]\nS[m] = X[m] where X[m] > 0\nout S",
        "in X[m], D[m]\nconstraint D[m] == 1\nS = X[m]\nout S",
        "in X[m]\nrank k = M // 2\nS[k] = X[2*k]\nout S",
        "in X[m], TEMPERATURE\nS = TEMPERATURE * X[m]\nout S",
        "in X[m]\ninit S[0] = 0\niter m:\nS[m+1] = S[m] + X[m]\nend\nL = S[M]\nout L",
        "in X[m], I[j]\nS[j] = X[I[j]]\nout S",
    ],
)
def test_a_right_text_breaks_no_rule(text: str) -> None:
    assert codes(text) == ()


def test_a_tensor_of_a_block_is_written_for_what_follows() -> None:
    text = "in X[m]\ninit S[0] = 0\niter m:\nT[m] = 2 * X[m]\nS[m+1] = S[m] + T[m]\nend\nL = T[0]\nout L"
    assert codes(text) == ()


def test_a_tensor_without_an_init_may_not_be_read_before_it_is_written_in_a_block() -> None:
    assert codes("in X[m]\niter m:\nS[m+1] = T[m]\nT[m] = X[m]\nend\nout S") == ("read-before-write",)


def test_mistakes_come_in_the_order_of_the_text() -> None:
    text = "in X[m]\nA = X[m, 0]\nB[q] = X[q]\nC[m] = D[m]\nout A, E"
    assert codes(text) == ("index-count", "unbound-rank", "unknown-tensor", "unknown-tensor")


@pytest.mark.parametrize(
    "text",
    [
        "in X[m], M\nS = M * X[m]\nout S",
        "in X[m]\nconst m = 4\nS[m] = X[m]\nout S",
        "in X[m]\nconst M = 4\nS[m] = M * X[m]\nout S",
        "in X[m]\nconst S = 4\nS[m] = X[m]\nout S",
    ],
)
def test_a_name_with_two_meanings_is_refused(text: str) -> None:
    assert {"name-clash", "defined-twice"} & set(codes(text))


@pytest.mark.parametrize("word", ["inf", "and", "or", "not"])
def test_a_word_of_the_notation_is_no_name(word: str) -> None:
    assert codes(f"in X[m]\nconst {word} = 3\nS[m] = X[m]\nout S")
    assert codes(f"in X[{word}]\nS[{word}] = X[{word}]\nout S")


@pytest.mark.parametrize(
    "text",
    [
        "in X[m], D[n]\nS[m] = X[m] where D[n] > 0\nout S",
        "in X[m]\nS = X[m] :: sum(m, m)\nout S",
        "in X[m]\nS = X[m]\nout S, S",
        "in X[m]\ninit S[0] = 0\niter m:\nS[m+1] = X[m]\nS[m+1] = 2 * X[m]\nend\nout S",
        "in X[m]\niter m:\niter m:\nS[m] = X[m]\nend\nend\nout S",
    ],
)
def test_a_rank_or_tensor_used_twice_or_nowhere_is_refused(text: str) -> None:
    assert codes(text)


def test_a_right_cascade_yields_no_diagnostic_and_knows_its_ranks() -> None:
    cascade = parse("in X[p, m]\nrank m0 = 4\nS[p] = X[p, m] :: sum(m)\nout S")
    assert list(check(cascade)) == []
    assert extents_known(cascade) == ("p", "m", "m0")
