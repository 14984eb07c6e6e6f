"""The two axes of softmaxes: the published table, every cell, and what is none."""

from __future__ import annotations

import re

import pytest

from einsumcascade.analysis.taxonomy import classify, published_systems
from einsumcascade.errors import UnknownRankError
from einsumcascade.gallery import load, names
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from tests.analysis.published import PUBLISHED, QKV

# FuseMax (MICRO 2024), Table I.
TABLE_1 = {
    3: {"PyTorch", "TensorFlow", "FLAT", "E.T."},
    2: {"TileFlow", "Choi et al."},
    1: {"FlashAttention", "FlashAttention-2", "Rabe & Staats"},
}
CELLS = {
    ("none", "immediate"): ("no max, immediate", 2, 0),
    ("none", "deferred"): ("no max, deferred", 1, 0),
    ("global", "immediate"): ("global max, immediate", 3, 0),
    ("global", "deferred"): ("global max, deferred", 2, 0),
    ("local", "immediate"): ("local max, immediate", 2, 1),
    ("local", "deferred"): ("local max, deferred", 1, 1),
    ("running", "immediate"): ("flash_attention_1", 1, 0),
    ("running", "deferred"): ("running max", 1, 0),
}


def cascade_of(name: str) -> Cascade:
    return parse(PUBLISHED[name].text, name=name) if name in PUBLISHED else load(name)


def test_the_published_table_comes_out() -> None:
    found: dict[int, set[str]] = {}
    for s in published_systems():
        found.setdefault(s.passes, set()).add(s.system)
    assert found == TABLE_1


def test_the_flash_attentions_differ_in_the_division_alone() -> None:
    cells = {s.system: (s.reference, s.division) for s in published_systems()}
    assert cells["FlashAttention"] == ("running", "immediate")
    assert cells["FlashAttention-2"] == ("running", "deferred")


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_every_cell_has_a_cascade_with_the_passes_it_should(cell: tuple[str, str]) -> None:
    name, passes, summaries = CELLS[cell]
    (entry,) = classify(cascade_of(name), rank="M").entries
    assert (entry.reference, entry.division) == cell
    assert (entry.passes, entry.summary_traversals) == ((passes,), (summaries,))
    assert entry.reasons


@pytest.mark.parametrize("name", [name for name, _, _ in CELLS.values()])
def test_names_of_tensors_do_not_matter(name: str) -> None:
    cascade = cascade_of(name)
    text = str(cascade)
    tensors = {i.tensor for i in cascade.inputs} | {e.tensor for e in cascade.einsums}
    for k, t in enumerate(sorted(tensors, key=len, reverse=True)):
        text = re.sub(rf"\b{t}\b(?=\[|,|$|\n| )", f"T{k}X", text)
    before, after = classify(cascade), classify(parse(text, name=name))
    assert [(e.ranks, e.reference, e.division, e.passes) for e in before.entries] == [
        (e.ranks, e.reference, e.division, e.passes) for e in after.entries
    ]


def test_a_logarithm_of_the_sum_in_the_exponent_divides_too() -> None:
    text = QKV + "GM[p] = S[p,m] :: max(m)\nN[p,m] = exp(S[p,m] - GM[p])\nD[p] = N[p,m] :: sum(m)\n"
    text += "L[p] = GM[p] + log(D[p])\nA[p,m] = exp(S[p,m] - L[p])\nAV[p,f] = A[p,m] * V[m,f] :: sum(m)\nout AV"
    (entry,) = classify(parse(text)).entries
    assert (entry.weights, entry.reference, entry.division) == ("N", "global", "immediate")


def test_two_softmaxes_over_two_ranks_are_two() -> None:
    found = classify("abc")
    assert [e.ranks for e in found.entries] == [("M",), ("M",), ("R",)]
    assert [e.ranks for e in classify("abc", rank="R").entries] == [("R",)]


def test_what_has_no_softmax_says_why() -> None:
    assert str(classify("sigmoid")) == "no softmax: no Einsum takes an exponential"
    assert classify("stickbreak").reason.startswith("no sum of exponentials divides")
    assert classify("softmax_attention", rank="F").entries == ()


def test_an_unknown_rank_is_an_error() -> None:
    with pytest.raises(UnknownRankError, match="no rank 'N'"):
        classify("softmax_attention", rank="N")


@pytest.mark.parametrize("name", names())
def test_every_text_is_placed_or_says_why_not(name: str) -> None:
    found = classify(name)
    assert bool(found.entries) != bool(found.reason)
    assert found.to_dict()["name"] == name
