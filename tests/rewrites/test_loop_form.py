"""Reductions over a rank become iterations over tiles, and the value stays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from einsumcascade.analysis.passes import count_passes
from einsumcascade.errors import LoweringError
from einsumcascade.language.ir import Init, Iter
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.base_two import to_base_two
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.loop_form import LoopForm, loop_form
from tests.codegen.found import PAIR
from tests.strategies import Case, cases, close, examples

HEAD = "in S[p,m], V[m,f]\n"
SOFTMAX = (
    HEAD
    + """\
GM[p] = S[p,m] :: max(m)
SN[p,m] = exp(S[p,m] - GM[p])
SD[p] = SN[p,m] :: sum(m)
NV[p,f] = SN[p,m] * V[m,f] :: sum(m)
O[p,f] = NV[p,f] / SD[p]
out O
"""
)


def formed(text: str, tile: int = 16, over: tuple[str, ...] = ("m",)) -> LoopForm:
    return loop_form(simplify(parse(text)).cascade, over=over, tile=tile)


def keys(case: Case) -> tuple[str, ...]:
    return tuple(v for v in ("m", "n") if any(v in e.ranks for e in case.cascade.einsums))


def same(text: str, **extents: int) -> float:
    """The largest difference between a text and its loop form on normal inputs."""
    cascade = parse(text)
    rng = np.random.default_rng(0)
    x = {i.tensor: rng.standard_normal([extents[v.upper()] for v in i.indices]) for i in cascade.inputs}
    expected, found = run(cascade, x), run(formed(text).cascade, x)
    assert all(np.isfinite(expected[n]).all() for n in expected)
    return max(float(np.abs(found[n] - expected[n]).max()) for n in expected)


def test_softmax_becomes_one_iteration_with_three_states() -> None:
    found = formed(SOFTMAX)
    assert found.loops == 1
    assert (
        str(found.cascade).strip()
        == """\
in S[p, m], V[m, f]
rank m0 = 16
rank m1 = (M + M0 - 1) // M0
constraint m1 * M0 + m0 < M
init RGM[p, 0] = -inf
init RSD[p, 0] = 0
init RNV[p, f, 0] = 0
iter m1:
  LGM[p, m1] = S[p, m1 * M0 + m0] :: max(m0)
  RGM[p, m1 + 1] = max(RGM[p, m1], LGM[p, m1])
  SN[p, m1, m0] = exp(S[p, m1 * M0 + m0] - RGM[p, m1 + 1])
  LSD[p, m1] = SN[p, m1, m0] :: sum(m0)
  CGM[p, m1] = exp(RGM[p, m1] - RGM[p, m1 + 1])
  RSD[p, m1 + 1] = CGM[p, m1] * RSD[p, m1] + LSD[p, m1]
  LNV[p, f, m1] = SN[p, m1, m0] * V[m1 * M0 + m0, f] :: sum(m0)
  RNV[p, f, m1 + 1] = CGM[p, m1] * RNV[p, f, m1] + LNV[p, f, m1]
end
O[p, f] = RNV[p, f, M1] / RSD[p, M1]
out O
""".strip()
    )


def test_every_state_has_an_initial_value() -> None:
    found = formed(SOFTMAX).cascade
    inits = {s.tensor for s in found.body if isinstance(s, Init)}
    (block,) = (s for s in found.body if isinstance(s, Iter))
    assert {e.tensor for e in block.body if e.tensor.startswith("R")} == inits  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "weight",
    [
        "relu(SN[p,m] / SD[p] - 0.01)",
        "tanh(SN[p,m] / SD[p])",
        "log(1 + SN[p,m] / SD[p])",
        "select(SN[p,m] > 0.2 * SD[p], SN[p,m], 0)",
        "lrelu(SN[p,m] / SD[p] - 0.05)",
        "elu(SN[p,m] - 0.5 * SD[p])",
    ],
)
def test_a_weight_that_no_factor_moves_takes_a_second_loop(weight: str) -> None:
    text = (
        HEAD + f"GM[p] = S[p,m] :: max(m)\nSN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = SN[p,m] :: sum(m)\n"
        f"A[p,m] = {weight}\nO[p,f] = A[p,m] * V[m,f] :: sum(m)\nout O\n"
    )
    found = formed(text)
    assert found.loops == 2
    assert any(s.rule == "not streamed" and "SD" in s.what for s in found.steps)
    assert same(text, P=5, M=37, F=3) < 1e-12


@pytest.mark.parametrize(
    "weight",
    [
        "exp(b * (S[p,m] - GM[p]))",
        "exp(T[p] * (S[p,m] - GM[p]))",
        "exp(S[p,m] - GM[p]) * T[p]",
        "exp(S[p,m] - GM[p] - 0.25 * abs(p - m))",
        "exp(2 * (S[p,m] - GM[p])) * S[p,m]",
    ],
)
def test_what_does_not_vary_along_the_rank_may_stand_in_the_exponent(weight: str) -> None:
    text = (
        f"in S[p,m], V[m,f], T[p]\nconst b = 0.7\nGM[p] = S[p,m] :: max(m)\nSN[p,m] = {weight}\n"
        "SD[p] = abs(SN[p,m]) :: sum(m)\nO[p,f] = SN[p,m] * V[m,f] / (1 + SD[p]) :: sum(m)\nout O\n"
    )
    assert formed(text).loops == 1
    assert same(text, P=5, M=37, F=3) < 1e-9


@pytest.mark.parametrize(
    ("reference", "exponent"),
    [
        ("max", "T[p] * (S[p,m] - GM[p])"),
        ("max", "b * (S[p,m] - GM[p])"),
        ("max", "GM[p] - S[p,m]"),
        ("min", "GM[p] - S[p,m]"),
        ("min", "S[p,m] - GM[p]"),
    ],
)
def test_a_state_at_its_start_survives_any_sign_of_the_exponent(reference: str, exponent: str) -> None:
    """The first reference is infinite: a factor of it that is negative or 0 must not make the empty state NaN."""
    text = (
        f"in S[p,m], V[m,f], T[p]\nconst b = 0\nGM[p] = S[p,m] :: {reference}(m)\nSN[p,m] = exp({exponent})\n"
        "SD[p] = SN[p,m] :: sum(m)\nO[p,f] = SN[p,m] * V[m,f] / SD[p] :: sum(m)\nout O\n"
    )
    assert formed(text).loops == 1
    assert same(text, P=5, M=37, F=3) < 1e-12


def test_a_sink_takes_part_in_the_reference() -> None:
    text = (
        HEAD.replace("V[m,f]", "V[m,f], SINK[p]")
        + """\
TM[p] = S[p,m] :: max(m)
GM[p] = max(TM[p], SINK[p])
SN[p,m] = exp(S[p,m] - GM[p])
SD[p] = SN[p,m] :: sum(m)
O[p,f] = SN[p,m] * V[m,f] / (SD[p] + exp(SINK[p] - GM[p])) :: sum(m)
out O
"""
    )
    assert formed(text).loops == 1
    assert same(text, P=5, M=37, F=3) < 1e-12


def test_the_state_of_a_state_takes_its_own_rescale() -> None:
    text = (
        HEAD + "GM[p] = S[p,m] :: max(m)\nSD[p] = exp(S[p,m] - GM[p]) :: sum(m)\n"
        "S2[p] = exp(2 * (S[p,m] - GM[p])) :: sum(m)\nO[p] = S2[p] / SD[p] ** 2\nZ[p] = V[p,p]\nout O\n"
    )
    found = formed(text.replace("Z[p] = V[p,p]\n", "").replace(", V[m,f]", ""))
    corrections = {s.what.split("C = ")[1] for s in found.steps if "C = " in s.what}
    assert corrections == {"exp(GM[p] - GM_next[p])", "exp(2 * GM[p] - 2 * GM_next[p])"}


def test_two_key_ranks_are_walked_by_one_iteration() -> None:
    found = loop_form(simplify(PAIR.cascade).cascade, over=("m", "n"), tile=4)
    assert found.loops == 1 and found.index == "step"
    x = PAIR.inputs()
    assert close(run(found.cascade, x)["O"], run(PAIR.cascade, x)["O"])


def test_a_shifted_read_of_a_stream_is_refused() -> None:
    text = HEAD + "T[p,m] = exp(S[p,m])\nO[p,f] = T[p,m+1] * V[m,f] :: sum(m)\nout O\n"
    with pytest.raises(LoweringError) as caught:
        formed(text)
    assert caught.value.diagnostics[0].code == "not-lowered-yet"


def test_names_that_are_taken_are_not_taken_again() -> None:
    text = (
        "in S[p,m], RGM[m,f]\nGM[p] = S[p,m] :: max(m)\nLGM[p,f] = exp(S[p,m] - GM[p]) * RGM[m,f] :: sum(m)\nout LGM\n"
    )
    assert same(text, P=3, M=20, F=2) < 1e-12


@examples(90)
@given(cases(), st.sampled_from((1, 2, 5, 16, 64)))
@example(PAIR, 16)
def test_the_loop_form_keeps_the_value_and_never_adds_a_pass(case: Case, tile: int) -> None:
    simple = simplify(case.cascade).cascade
    form = loop_form(simple, over=keys(case), tile=tile).cascade
    x = case.inputs()
    expected = run(case.cascade, x)
    for new in (form, to_base_two(form)):
        found = run(new, x)
        for name in expected:
            assert close(found[name], expected[name]), name
        assert parse(str(new), name="random.cascade") == new
    for v in keys(case):
        rank = v.upper()
        assert count_passes(form, rank=rank).passes <= count_passes(case.cascade, rank=rank).passes


def test_a_reference_that_may_be_zero_is_no_factor_of_a_state() -> None:
    text = "in X[p,m], D[p,m]\nA[p] = D[p,m] :: sum(m)\nB[p] = (A[p] + 0 * m) * X[p,m] :: sum(m)\nout B"
    # Of the first tile A is 0: nothing of its X would be left in A times their sum.
    x = {"X": np.arange(1.0, 9.0)[None], "D": np.array([[0, 0, 0, 0, 1.0, 2.0, 3.0, 4.0]])}
    found = formed(text, tile=4)
    assert found.loops == 2
    assert close(run(found.cascade, x)["B"], run(parse(text), x)["B"])
