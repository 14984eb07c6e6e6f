"""The warning for reads of culled elements."""

from __future__ import annotations

import warnings

import pytest

from einsumcascade.errors import EinsumCascadeWarning
from einsumcascade.gallery import load, names
from einsumcascade.language.culling import culled_reads
from einsumcascade.language.parser import parse

HEAD = "in X[p, m]\nconst lo = 2\nrank j = 4\nrank i = M // J\n"
SCORES = "S[p, m] = X[p, m] where {}\n"


def warned(writer: str, reader: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cascade = parse(f"{HEAD}{SCORES.format(writer)}{reader}\nout T")
    return any(d.span is not None for d in culled_reads(cascade))


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("m <= p", "T[p] = S[p, m] :: max(m) where m <= p"),
        ("m <= p", "T[p] = S[p, m] :: max(m) where m < p"),
        ("m <= p", "T[p] = S[p, m] :: max(m) where p > m"),
        ("m <= p", "T[p] = S[p, m] :: max(m) where p - m >= lo"),
        ("p - m >= lo", "T[p] = S[p, m] :: max(m) where m + 2 <= p"),
        ("m <= p", "T[p] = S[p, m] :: max(m) where m <= p, X[p, m] > 0"),
        ("m <= p or m < lo", "T[p] = S[p, m] :: max(m) where m < lo"),
        ("m <= p", "T[p, m] = select(m <= p, S[p, m], 0)"),
        ("m <= p", "T[p, m] = select(m > p, 0, S[p, m])"),
        ("m < M", "T[p] = S[p, m] :: max(m)"),
        ("m >= 0", "T[p] = S[p, m] :: max(m)"),
        ("m <= p", "T[p, i] = S[p, i*J + J - 1] where i < p // J"),
        ("X[p, m] > 0", "T[p] = S[p, m] :: max(m) where X[p, m] > 0"),
        ("X[p, m] > 0", "T[p] = S[p, m] :: max(m) where X[p, m] >= 0.5"),
        ("X[p, m] >= 0", "T[p] = S[p, m] :: max(m) where X[p, m] > 0"),
    ],
)
def test_a_reader_whose_conditions_imply_those_of_the_writer_is_fine(writer: str, reader: str) -> None:
    assert not warned(writer, reader)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("m <= p", "T[p] = S[p, m] :: max(m)"),
        ("m < p", "T[p] = S[p, m] :: max(m) where m <= p"),
        ("p - m >= lo", "T[p] = S[p, m] :: max(m) where m + 1 <= p"),
        ("m <= p", "T[p, m] = select(m <= p, 0, S[p, m])"),
        ("m <= p", "T[p, i] = S[p, i*J + J - 1] where i <= p // J"),
        ("m <= p or m < lo", "T[p] = S[p, m] :: max(m) where m < lo + 1"),
        ("m <= p", "T[p] = S[p, 3]"),
        ("X[p, m] > 0", "T[p] = S[p, m] :: max(m) where X[p, m] >= 0"),
        ("X[p, m] >= 1", "T[p] = S[p, m] :: max(m) where X[p, m] > 0"),
    ],
)
def test_a_reader_that_goes_further_than_the_writer_is_warned_of(writer: str, reader: str) -> None:
    assert warned(writer, reader)


def test_a_sum_whose_whole_fiber_is_culled_is_warned_of_and_one_that_culls_inside_is_not() -> None:
    text = "in Q[p, e], K[m, e]\nS[p, m] = Q[p, e] * K[m, e] :: sum(e) where {}\nT[p] = S[p, m] :: max(m)\nout T"
    with pytest.warns(EinsumCascadeWarning, match=r"\[culled-read\]: T reads S\[p, m\] also where"):
        parse(text.format("m <= p"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(text.format("e < 2"))


def test_a_constraint_holds_for_writer_and_reader_alike() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse("in X[p, m]\nconstraint m <= p\nS[p, m] = 2 * X[p, m]\nT[p] = S[p, m] :: max(m)\nout T")


@pytest.mark.parametrize("name", names())
def test_no_text_of_the_gallery_reads_what_is_culled(name: str) -> None:
    assert not list(culled_reads(load(name)))
