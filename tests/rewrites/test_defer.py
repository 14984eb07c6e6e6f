"""What does not vary along a rank leaves its reduction, and the value stays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from einsumcascade.analysis.passes import count_passes
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.defer import defer, expand_means
from einsumcascade.rewrites.derive import derive
from tests.strategies import Case, cases, close, examples


def deferred(text: str) -> Cascade:
    return defer(parse(text)).cascade


def lines(cascade: Cascade) -> list[str]:
    return [str(e) for e in cascade.einsums]


def test_a_division_leaves_the_sum() -> None:
    found = deferred("in SN[p,m], SD[p], V[m,f]\nA[p,m] = SN[p,m] / SD[p]\nO[p,f] = A[p,m] * V[m,f] :: sum(m)\nout O")
    assert lines(found) == ["ON[p, f] = SN[p, m] * V[m, f] :: sum(m)", "O[p, f] = ON[p, f] / SD[p]"]


def test_a_constant_leaves_the_sum() -> None:
    found = deferred("in Q[p,e], K[m,e]\nconst scale = E ** -0.5\nS[p,m] = scale * Q[p,e] * K[m,e] :: sum(e)\nout S")
    assert lines(found) == ["SN[p, m] = Q[p, e] * K[m, e] :: sum(e)", "S[p, m] = scale * SN[p, m]"]


def test_a_condition_of_the_row_leaves_the_sum() -> None:
    found = deferred("in X[p], Y[p,m]\nS[p] = select(X[p] > 0, Y[p,m], 0) :: sum(m)\nout S")
    assert lines(found) == ["SN[p] = Y[p, m] :: sum(m)", "S[p] = select(X[p] > 0, SN[p], 0)"]


@pytest.mark.parametrize(
    "expr",
    [
        "select(X[m] > 0, Y[p,m], 0)",
        "select(X[p] > 0, Y[p,m], 1)",
        # Read without its condition it would be outside the tensor.
        "select(p > 0, Y[p - 1, m], 0)",
        # Some rank would have no extent, or no count.
        "select(X[p] > 0, X[m], 0)",
    ],
)
def test_another_condition_stays_in_the_sum(expr: str) -> None:
    text = f"in X[p], Y[p,m]\nrank m = P\nS[p] = {expr} :: sum(m)\nout S"
    text = text.replace("rank m = P\n", "") if "Y[" in expr else text
    assert deferred(text) == parse(text)


def test_a_positive_factor_leaves_a_maximum() -> None:
    found = deferred("in S[p,m]\nG[p] = 2 * S[p,m] :: max(m)\nout G")
    assert lines(found) == ["GN[p] = S[p, m] :: max(m)", "G[p] = 2 * GN[p]"]


@pytest.mark.parametrize("factor", ["-2", "c", "X[p]"])
def test_a_factor_that_may_be_negative_stays_in_a_maximum(factor: str) -> None:
    text = f"in S[p,m], X[p]\nconst c = -1\nG[p] = {factor} * S[p,m] :: max(m)\nout G"
    assert deferred(text) == parse(text)


def test_a_term_leaves_a_maximum_but_not_a_sum() -> None:
    added = "in S[p,m], X[p]\nG[p] = S[p,m] + X[p] :: {}(m)\nout G"
    assert lines(deferred(added.format("max"))) == ["GN[p] = S[p, m] :: max(m)", "G[p] = X[p] + GN[p]"]
    assert deferred(added.format("sum")) == parse(added.format("sum"))


def test_a_reference_that_cancels_one_of_several_terms_stays_in_a_maximum() -> None:
    text = "in S[p,m], V[m,f]\nG[p] = S[p,m] :: max(m)\nO[p,f] = S[p,m] - G[p] + V[m,f] :: max(m)\nout O"
    assert deferred(text) == parse(text)
    one = "in S[p,m], V[m,f]\nG[p] = S[p,m] :: max(m)\nO[p] = S[p,m] - G[p] :: max(m)\nout O"
    assert lines(deferred(one))[1:] == ["ON[p] = S[p, m] :: max(m)", "O[p] = ON[p] - G[p]"]


def test_a_shifted_maximum_keeps_the_digits_that_its_terms_lose_together() -> None:
    text = "in S[p,m], V[m,f]\nG[p] = S[p,m] :: max(m)\nO[p,f] = V[m,f] + S[p,m] - G[p] :: max(m)\nout O"
    found = derive(parse(text))
    assert found.passes == {"M": (2, 1)}
    assert any("CG[p, m1] = RG[p, m1] - RG[p, m1 + 1]" in str(e) for e in found.cascade.einsums)


def test_a_factor_does_not_leave_a_product() -> None:
    text = "in S[p,m], X[p]\nG[p] = S[p,m] * X[p] :: prod(m)\nout G"
    assert deferred(text) == parse(text)


def test_a_factor_that_a_constraint_restricts_stays() -> None:
    text = "in S[p,m], X[p], V[m,f]\nconstraint m <= p\nO[p,f] = S[p,m] * X[p] * V[m,f] :: sum(m)\nout O"
    x = {"S": np.ones((3, 4)), "X": np.arange(3.0), "V": np.ones((4, 2))}
    assert close(run(deferred(text), x)["O"], run(parse(text), x)["O"])


def test_a_mean_is_a_sum_over_its_live_points() -> None:
    text = "in S[p,m]\nconstraint m < p\nG[p] = S[p,m] :: mean(m)\nout G"
    x = {"S": np.arange(12.0).reshape(3, 4)}
    found = expand_means(parse(text)).cascade
    assert not any(e.reduce == "mean" for e in found.einsums)
    assert run(found, x)["G"].tolist() == run(parse(text), x)["G"].tolist() == [0.0, 4.0, 8.5]


def test_each_rewrite_is_a_step_with_its_before_and_after() -> None:
    steps = defer(parse("in S[p,m], X[p]\nG[p] = S[p,m] * X[p] :: sum(m)\nout G")).steps
    assert [s.rule for s in steps] == ["R1 defer"]
    assert steps[0].before == ("G[p] = S[p, m] * X[p] :: sum(m)",)
    assert steps[0].after == ("GN[p] = S[p, m] :: sum(m)", "G[p] = X[p] * GN[p]")


@examples(100)
@given(cases())
def test_deferral_keeps_the_value_and_never_adds_a_pass(case: Case) -> None:
    new = defer(expand_means(case.cascade).cascade).cascade
    x = case.inputs()
    expected, found = run(case.cascade, x), run(new, x)
    for name in expected:
        assert close(found[name], expected[name]), name
    for rank in ("M", "E", "N"):
        if any(rank.lower() in e.ranks for e in case.cascade.einsums):
            assert count_passes(new, rank=rank).passes <= count_passes(case.cascade, rank=rank).passes
    assert parse(str(new), name="random.cascade") == new


def test_a_factor_that_is_infinite_of_no_key_does_not_meet_an_empty_sum() -> None:
    text = (
        "in S[p,m] V[m]\nconstraint m < p\nE[p] = abs(S[p,m]) :: max(m)\nO[p] = S[p,m] * E[p] * V[m] :: sum(m)\nout O"
    )
    x = {"S": np.arange(6.0).reshape(2, 3) + 1, "V": np.ones(3)}
    assert np.array_equal(run(defer(parse(text)).cascade, x)["O"], run(parse(text), x)["O"])
    assert run(defer(parse(text)).cascade, x)["O"][0] == 0
