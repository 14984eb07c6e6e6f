"""Iterative blocks: a generation is read only where it exists, and every cascade has an order."""

from __future__ import annotations

import pytest

from einsumcascade.errors import CascadeError
from einsumcascade.language.parser import parse
from einsumcascade.reference import run


def codes(text: str) -> tuple[str, ...]:
    with pytest.raises(CascadeError) as caught:
        parse(text)
    assert all(d.span is not None for d in caught.value.diagnostics)
    return caught.value.codes


@pytest.mark.parametrize(
    "block",
    [
        "iter m:\n R[m+1] = R[m] + X[m]\nend\nout R",
        "iter m desc:\n R[m] = R[m+1] + X[m]\nend\nout R",
        "iter m:\n T[m] = R[m]\n R[m+1] = T[m] + X[m]\nend\nout R",
    ],
)
def test_a_block_that_carries_a_value_needs_a_first_generation(block: str) -> None:
    assert codes(f"in X[m]\n{block}") == ("missing-init",)


def test_the_hint_of_a_missing_first_generation_is_the_statement_itself() -> None:
    text = "in X[m, f]\n{}iter m:\n R[f, m+1] = R[f, m] + X[m, f]\nend\nout R"
    with pytest.raises(CascadeError, match=r"before the block: init R\[f, 0\] = 0"):
        parse(text.format(""))
    assert parse(text.format("init R[f, 0] = 0\n")).output_names == ("R",)


@pytest.mark.parametrize(
    ("order", "lines"),
    [
        ("", "R[m+1] = R[m+1] + X[m]"),
        ("", "T[m] = R[m+1]\nR[m+1] = R[m] + X[m]"),
        ("", "R[m+1] = R[m] + X[m]\nT[m] = R[m+2]"),
        ("", "R[m+1] = R[m] + X[m]\nT[m] = R[M]"),
        (" desc", "R[m+1] = R[m] + X[m]"),
        (" desc", "R[m] = R[m+1] + X[m]\nT[m] = R[0]"),
        (" desc", "T[m] = R[m]\nR[m] = R[m+1] + X[m]"),
    ],
)
def test_a_generation_that_no_step_has_written_cannot_be_read(order: str, lines: str) -> None:
    first = "M" if order and "R[m] =" in lines else "0"
    assert codes(f"in X[m]\ninit R[{first}] = 0\niter m{order}:\n{lines}\nend\nout R") == ("future-generation",)


@pytest.mark.parametrize(
    "text",
    [
        "init R[0] = 0\niter m:\nR[m+1] = R[m] + X[m]\nT[m] = R[m+1] + R[0]\nend\nS = R[M]\nout T, S",
        "init R[M] = 0\niter m desc:\nR[m] = R[m+1] + X[m]\nT[m] = R[m] + R[M]\nend\nS = R[0]\nout T, S",
        "iter m:\nR[m] = 2 * X[m]\nT[m] = select(m > 0, R[m-1], 0)\nend\nout T",
        "rank k = 2\ninit R[0, 0] = 0\niter m:\niter k:\nR[m, k+1] = R[m, k] + X[m]\nend\nend\nout R",
    ],
)
def test_earlier_generations_and_first_ones_can_be_read(text: str) -> None:
    assert parse(f"in X[m]\n{text}").body


def test_each_step_may_look_back_at_what_an_earlier_statement_wrote() -> None:
    text = "in X[m]\niter m:\nR[m] = 2 * X[m]\nT[m] = select(m > 0, R[m-1], 0)\nend\nout T"
    assert run(parse(text), {"X": [1.0, 2.0, 3.0]})["T"].tolist() == [0.0, 2.0, 4.0]


def test_einsums_that_depend_on_each_other_are_shown_as_a_circle() -> None:
    with pytest.raises(CascadeError, match="A depends on itself: A <- B <- C <- A") as caught:
        parse("in X[m]\nA[m] = B[m] + X[m]\nB[m] = C[m]\nC[m] = A[m]\nout A")
    assert caught.value.codes[0] == "cyclic-cascade"
    assert codes("in X[m]\nA[m] = A[m] + X[m]\nout A") == ("cyclic-cascade",)
    assert codes("in X[m]\nA[m] = B[m]\nB[m] = X[m]\nout A") == ("read-before-write",)


@pytest.mark.parametrize(
    "text",
    [
        "init R[0] = 0\nS = R[M] + 1\niter m:\nR[m+1] = R[m] + X[m]\nend\nout S",
        "init R[0] = 0\nT[m] = R[m] + X[m]\niter m:\nR[m+1] = R[m] + X[m]\nend\nS = R[M]\nout S, T",
        "init R[0] = 0\niter m:\nR[m+2] = R[m] + X[m]\nend\nS = R[M]\nout S",
        "init R[1] = 0\niter m:\nR[m+1] = R[m] + X[m]\nend\nS = R[M]\nout S",
        "init R[0] = 0\niter m desc:\nR[m] = R[m+1] + X[m]\nend\nS = R[0]\nout S",
    ],
)
def test_a_generation_that_no_step_makes_is_an_error(text: str) -> None:
    """Ahead of the block, beside its steps, or with a first one that no step follows."""
    assert codes("in X[m]\n" + text) == ("future-generation",)


def test_the_first_generation_may_be_read_ahead_of_its_block() -> None:
    parse("in X[m]\ninit R[0] = 0\nT = R[0] + 1\niter m:\nR[m+1] = R[m] + X[m] * T\nend\nout R")


@pytest.mark.parametrize("text", ["const a = b + 1\nconst b = a + 1", "rank j = K\nrank k = J", "rank j = 2 * J"])
def test_definitions_in_a_circle_are_an_error(text: str) -> None:
    assert codes(f"in X[m]\n{text}\nY[m] = X[m] + 1\nout Y") == ("cyclic-cascade",)
