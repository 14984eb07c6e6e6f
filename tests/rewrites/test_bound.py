"""A bound stands in for a running maximum where the reference cancels and the score is bounded, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.rewrites.bound import bound_references
from einsumcascade.rewrites.defer import expand_means
from einsumcascade.rewrites.derive import derive

SOFTMAX = "GM[p] = S[p,m] :: max(m)\nSN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = SN[p,m] :: sum(m)\n"
VALUES = "NV[p,f] = SN[p,m] * V[m,f] :: sum(m)\nO[p,f] = NV[p,f] / SD[p]\n"
CAP = "in X[p,m], V[m,f]\nconst cap = {}\nS[p,m] = cap * tanh(X[p,m] / cap)\n" + SOFTMAX
COSINE = (
    "in Q[p,e], K[m,e], V[m,f]\nconst tau = 10\nNQ[p] = Q[p,e] * Q[p,e] :: {0}(e)\nNK[m] = K[m,e] * K[m,e] :: {0}(e)\n"
    "QH[p,e] = Q[p,e] / sqrt(NQ[p] + 1e-6)\nKH[m,e] = K[m,e] / sqrt(NK[m])\nS[p,m] = tau * QH[p,e] * KH[m,e]\n"
) + SOFTMAX


def outcome(text: str, **extents: int) -> tuple[str, Cascade]:
    found = bound_references(expand_means(parse(text)).cascade, variable="m", extents=extents)
    (step,) = found.steps
    return step.what, found.cascade


def equal(text: str, new: Cascade) -> None:
    cascade = parse(text)
    rng = np.random.default_rng(3)
    sizes = {"p": 4, "m": 9, "e": 5, "f": 2}
    inputs = {i.tensor: 3 * rng.standard_normal([sizes[v] for v in i.indices]) for i in cascade.inputs}
    for o, want in run(cascade, inputs).items():
        np.testing.assert_allclose(run(new, inputs)[o], want, rtol=1e-10)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        (CAP.format(20.0) + VALUES + "out O", "GM[p] = cap"),
        (COSINE.format("sum") + VALUES + "out O", "GM[p] = tau"),
        (COSINE.format("mean").replace("10", "E ** -0.5") + VALUES + "out O", "GM[p] = max(E, 1) * tau"),
        (CAP.format(20.0) + "L[p] = GM[p] + log(SD[p])\nout L", "GM[p] = cap"),
        (CAP.format(20.0) + VALUES + "out O, SD", ""),
    ],
)
def test_a_bounded_score_takes_its_bound_where_the_reference_cancels(text: str, bound: str) -> None:
    what, new = outcome(text, E=5)
    if not bound:
        # The denominator itself leaves: it is another number for another reference.
        assert what.endswith("an output depends on it beyond the weights it scales")
        return
    assert bound in map(str, new.einsums)
    equal(text, new)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CAP.format(50.0) + VALUES + "out O", "weights could be as small as exp(-100), which underflows"),
        ("in S[p,m], V[m,f]\n" + SOFTMAX + VALUES + "out O", "nothing bounds S[p, m]"),
        (CAP.format(20.0) + VALUES.replace("/ SD", "/ (SD").replace("SD[p]", "SD[p] + 1)") + "out O", "beyond"),
        (CAP.format(20.0) + VALUES + "out O, GM", "an output depends on it"),
        (
            "in Y[p], "
            + CAP.format(2.0).removeprefix("in ").replace("S[p,m] - GM[p]", "Y[p] * (S[p,m] - GM[p])")
            + VALUES
            + "out O",
            "what Y[p] makes of its interval has no bound",
        ),
        (
            "in Y[p], "
            + CAP.format(2.0)
            .removeprefix("in ")
            .replace("exp(S[p,m] - GM[p])", "exp(S[p,m] - R[p])")
            .replace("SN[", "R[p] = max(GM[p], Y[p])\nSN[", 1)
            + VALUES
            + "out O",
            "what Y[p] makes of its interval has no bound",
        ),
        (CAP.format(20.0) + VALUES.replace(" / SD[p]", "") + "out O", "beyond"),
        (CAP.format(20.0) + VALUES.replace("out O", "") + "B[f] = NV[p,f] :: sum(p)\nout B", "beyond"),
    ],
)
def test_elsewhere_the_maximum_stays_and_the_step_says_why(text: str, reason: str) -> None:
    what, new = outcome(text)
    assert what.startswith("GM stays a running maximum: ") and reason in what
    assert new == expand_means(parse(text)).cascade


def test_a_bound_that_extents_are_part_of_needs_them() -> None:
    text = COSINE.format("mean").replace("10", "E ** -0.5") + VALUES + "out O"
    assert "needs extents" in outcome(text)[0]


def test_a_derivation_with_bounds_corrects_nothing() -> None:
    text = CAP.format(20.0) + VALUES + "out O"
    found = derive(parse(text), reference="bound")
    assert found.considered[0].corrections == 0 and found.passes["M"] == (2, 1)
    equal(text, found.cascade)
