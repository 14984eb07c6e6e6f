"""A reference that no output depends on may have any other value: the reference runs the cascade with another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import einsumcascade as ec
from einsumcascade.gallery import names
from einsumcascade.language.ir import Cascade, Einsum, Input, Read, Statement, apply
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.reference.interpret import run_all
from einsumcascade.rewrites.algebra import fresh, names_taken
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.rewrites.invariance import references
from tests.gallery.draws import draw
from tests.rewrites.test_differentiate import assert_slopes
from tests.strategies import examples, random_case

SCORES = "in S[p,m], V[m,c], U[c,f]\n"
SOFTMAX = "GM[p] = S[p,m] :: max(m)\nSN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = SN[p,m] :: sum(m)\n"
NUMERATOR = "N[p,c] = SN[p,m] * V[m,c] :: sum(m)\n"
PARTS = (
    "in S[j,k], V[j,k]\nLM[j] = S[j,k] :: max(k)\nE[j,k] = exp(S[j,k] - LM[j])\nLD[j] = E[j,k] :: sum(k)\n"
    "LN[j] = E[j,k] * V[j,k] :: sum(k)\nGM = LM[j] :: max(j)\nW[j] = exp(LM[j] - GM)\nD = W[j] * LD[j] :: sum(j)\n"
    "N = W[j] * LN[j] :: sum(j)\nO = N / D\nout O"
)


LINEAR = NUMERATOR + "AV[p,f] = N[p,c] * U[c,f] :: sum(c)\n"


def shifted(cascade: Cascade, moved: tuple[str, ...]) -> tuple[Cascade, dict[str, str]]:
    """The cascade with a number added to each of some tensors before anything reads it, and the inputs of those."""
    taken = names_taken(cascade)
    body: list[Statement] = []
    amounts = {}
    for s in cascade.body:
        body.append(s)
        if isinstance(s, Einsum) and s.tensor in moved:
            was, amounts[s.tensor] = fresh(s.tensor + "WAS", taken), fresh(s.tensor + "BY", taken)
            value = apply("add", *(Read(tensor=t, indices=s.indices) for t in (was, amounts[s.tensor])))
            body[-1:] = [replace(s, tensor=was), Einsum(tensor=s.tensor, indices=s.indices, expr=value)]
    added = tuple(Input(tensor=amounts[s.tensor], indices=s.free) for s in cascade.einsums if s.tensor in amounts)
    return replace(cascade, inputs=cascade.inputs + added, body=tuple(body)), amounts


def assert_any_value_will_do(cascade: Cascade, inputs: Mapping[str, Any], moved: tuple[str, ...]) -> None:
    simple = simplify(cascade).cascade
    everything = run_all(simple, inputs)
    new, amounts = shifted(simple, moved)
    rng = np.random.default_rng(4)
    by = {new_name: rng.uniform(-2, 2, everything[t].shape) for t, new_name in amounts.items()}
    for o, value in run(new, {**inputs, **by}).items():
        np.testing.assert_allclose(value, everything[o], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (NUMERATOR + "O[p,c] = N[p,c] / SD[p]\nout O", ("GM",)),
        (NUMERATOR + "O[p,c] = N[p,c] / SD[p]\nout O, SD", ()),
        (NUMERATOR + "O[p,c] = N[p,c] / (SD[p] + 1)\nout O", ()),
        ("L[p] = GM[p] + log(SD[p])\nout L", ("GM",)),
        # A sum of states that move by a factor moves by it; divided at last, or not at all, or by another row's.
        (LINEAR + "O[p,f] = AV[p,f] / SD[p]\nout O", ("GM",)),
        (LINEAR + "out AV", ()),
        ("A[p,c] = SN[p,m] * V[m,c] :: sum(m)\nB[c] = A[p,c] / SD[p] :: sum(p)\nout B", ("GM",)),
        ("A[p,c] = SN[p,m] * V[m,c] :: sum(m)\nB[c] = A[p,c] :: sum(p)\nC[p,c] = B[c] / SD[p]\nout C", ()),
        # A maximum of what stays, and of what moves.
        (NUMERATOR + "B[p] = N[p,c] / SD[p] :: max(c)\nout B", ("GM",)),
        (NUMERATOR + "B[p] = N[p,c] :: max(c)\nout B", ()),
        # Weights as an output, and what later passes make of them.
        ("A[p,m] = SN[p,m] / SD[p]\nout A", ("GM",)),
        ("A[p,m] = SN[p,m] / SD[p]\nB[p,c] = A[p,m] * A[p,m] * V[m,c] :: sum(m)\nout B", ("GM",)),
        ("A[p,m] = SN[p,m] * SD[p]\nB[p,c] = A[p,m] * V[m,c] :: sum(m)\nout B", ()),
        ("A[p,m] = select(SD[p] > 2, SN[p,m], 0)\nB[p] = A[p,m] :: sum(m)\nC[p] = B[p] / SD[p]\nout C", ()),
        ("B[p] = S[p,m] :: sum(m) where S[p,m] < GM[p]\nout B", ()),
        ("B[p,c] = S[p,m] * V[m,c] :: sum(m)\nconstraint GM[p] > c\nout B", ()),
    ],
)
def test_a_reference_is_what_no_output_depends_on(text: str, found: tuple[str, ...]) -> None:
    cascade = parse(SCORES + SOFTMAX + text)
    rng = np.random.default_rng(3)
    sizes = {"p": 3, "m": 7, "c": 4, "f": 2}
    used = {i.tensor: rng.standard_normal([sizes[v] for v in i.indices]) for i in cascade.inputs}
    assert references(simplify(cascade).cascade) == found
    if found:
        assert_any_value_will_do(cascade, used, found)
    else:
        with pytest.raises(AssertionError):
            assert_any_value_will_do(cascade, used, ("GM",))


def test_a_maximum_of_parts_is_a_reference_once_that_of_all_is() -> None:
    cascade = parse(PARTS)
    rng = np.random.default_rng(3)
    assert references(simplify(cascade).cascade) == ("GM", "LM")
    assert_any_value_will_do(cascade, {t: rng.standard_normal((3, 5)) for t in "SV"}, ("GM", "LM"))


def test_the_gradient_goes_through_a_maximum_that_does_not_cancel() -> None:
    cascade = parse(SCORES + SOFTMAX + LINEAR + "out AV")
    assert any("max" in str(e) or "GM" in str(e) for e in differentiate(cascade).backward.einsums)
    rng = np.random.default_rng(3)
    assert_slopes(cascade, {"S": rng.standard_normal((3, 7)), "V": rng.standard_normal((7, 4)), "U": np.ones((4, 2))})


@pytest.mark.parametrize("name", names())
def test_any_value_will_do_for_the_references_of_the_gallery(name: str) -> None:
    cascade = ec.load(name)
    assert_any_value_will_do(cascade, draw(cascade, name), references(simplify(cascade).cascade))


@given(seed=st.integers(0, 2**32 - 1))
@examples(30)
def test_any_value_will_do_for_the_references_of_random_cascades(seed: int) -> None:
    case = random_case(seed)
    assert_any_value_will_do(case.cascade, case.inputs(), references(simplify(case.cascade).cascade))
