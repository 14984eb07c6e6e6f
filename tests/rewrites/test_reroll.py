"""Iterations brought back to the reductions that they are the running state of."""

from __future__ import annotations

import numpy as np
import pytest

from einsumcascade.gallery import load
from einsumcascade.language.ir import Init, Iter
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.join import join
from einsumcascade.rewrites.reroll import reroll
from tests.codegen.calls import variant_inputs

SHAPES = {"X": (3, 10), "Y": (3, 10), "V": (10, 2)}
HEAD = "in X[p,m], Y[p,m], V[m,f]\nrank m0 = 4\nrank m1 = (M + M0 - 1) // M0\nconstraint m1*M0 + m0 < M\n"
# A first value, the statements of a step with a state R, and whether it is a running state.
UPDATES = [
    ("0", "L[m1,p] = X[p,m1*M0+m0] :: sum(m0)\n R[m1+1,p] = R[m1,p] + L[m1,p]", True),
    ("0", "L[m1,p] = X[p,m1*M0+m0] :: sum(m0)\n R[m1+1,p] = L[m1,p] + R[m1,p]", True),
    ("-inf", "L[m1,p] = X[p,m1*M0+m0] :: max(m0)\n R[m1+1,p] = max(R[m1,p], L[m1,p])", True),
    ("inf", "L[m1,p] = X[p,m1*M0+m0] :: min(m0)\n R[m1+1,p] = min(L[m1,p], R[m1,p])", True),
    # Begins elsewhere than at the identity.
    ("1", "L[m1,p] = X[p,m1*M0+m0] :: sum(m0)\n R[m1+1,p] = R[m1,p] + L[m1,p]", False),
    ("0", "L[m1,p] = X[p,m1*M0+m0] :: max(m0)\n R[m1+1,p] = max(R[m1,p], L[m1,p])", False),
    # No cocycle: halved at every step, or by what a step computes.
    ("0", "L[m1,p] = X[p,m1*M0+m0] :: sum(m0)\n R[m1+1,p] = 0.5 * R[m1,p] + L[m1,p]", False),
    ("0", "L[m1,p] = X[p,m1*M0+m0] :: sum(m0)\n R[m1+1,p] = L[m1,p] * R[m1,p] + L[m1,p]", False),
    # Subtracted, squared, or with what a step adds depending on the state.
    ("0", "L[m1,p] = X[p,m1*M0+m0] :: sum(m0)\n R[m1+1,p] = L[m1,p] - R[m1,p]", False),
    ("0", "L[m1,p] = X[p,m1*M0+m0] :: sum(m0)\n R[m1+1,p] = R[m1,p] * R[m1,p] + L[m1,p]", False),
    ("0", "L[m1,p] = X[p,m1*M0+m0] * R[m1,p] :: sum(m0)\n R[m1+1,p] = R[m1,p] + L[m1,p]", False),
]


def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {k: rng.normal(size=s) for k, s in SHAPES.items()}


@pytest.mark.parametrize(("first", "step", "rolls"), UPDATES)
@pytest.mark.parametrize("descending", [False, True])
def test_what_is_a_running_state_becomes_a_reduction_of_equal_value(
    first: str, step: str, rolls: bool, descending: bool
) -> None:
    init, end, order = "0", "M1", ""
    if descending:
        step = step.replace("m1+1,", "#").replace("R[m1,", "R[m1+1,").replace("#", "m1,")
        init, end, order = "M1", "0", " desc"
    text = f"{HEAD}init R[{init},p] = {first}\niter m1{order}:\n {step}\nend\nO[p] = R[{end},p]\nout O"
    cascade = parse(text)
    found = reroll(cascade)
    assert bool(found.steps) == rolls
    if rolls:
        assert not any(isinstance(s, Iter | Init) for s in found.cascade.body)
        assert "m1" not in str(found.cascade), "the partition is joined"
        x = drawn()
        np.testing.assert_allclose(run(found.cascade, x)["O"], run(cascade, x)["O"], rtol=1e-13)
    else:
        assert found.cascade == cascade


@pytest.mark.parametrize("name", ["softmax_1p", "flash_attention_1"])
def test_flash_attention_is_the_formula(name: str) -> None:
    found = reroll(load(name))
    text = str(found.cascade)
    assert "iter" not in text and "m1" not in text
    assert "C(a, b) * C(b, c) = C(a, c)" in str(found.steps[0])
    x = {k: v.numpy() for k, v in variant_inputs(name, "float64").items()}
    np.testing.assert_allclose(run(found.cascade, x)["AV"], run(load(name), x)["AV"], rtol=1e-12)
    assert "RD[b, h, p] = exp(QK[b, h, m, p] - RM[b, h, p]) :: sum(m)" in text


MOVED = "exp(RM[b, h, m1, p] - RM[b, h, m1 + 1, p])"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (MOVED, "exp(RM[b, h, m1 + 1, p] - RM[b, h, m1, p])"),
        (MOVED, "exp(2 * RM[b, h, m1, p] - RM[b, h, m1 + 1, p])"),
        (MOVED, "(RM[b, h, m1, p] - RM[b, h, m1 + 1, p])"),
        ("exp(QK[b, h, m1, m0, p] - RM[b, h, m1 + 1, p])", "exp(QK[b, h, m1, m0, p] - RM[b, h, m1, p])"),
        ("PRM[b, h, m1, p] * RD[b, h, m1, p] + SLD", "RD[b, h, m1, p] + SLD"),
    ],
)
def test_a_wrong_correction_is_no_running_state(old: str, new: str) -> None:
    text = str(load("softmax_1p"))
    assert old in text
    assert not reroll(parse(text.replace(old, new))).steps


def test_generations_that_are_read_elsewhere_stay() -> None:
    for read in ("R[m1+1,p] :: sum(m1)", "R[0,p]"):
        text = (
            f"{HEAD}init R[0,p] = 0\niter m1:\n L[m1,p] = X[p,m1*M0+m0] :: sum(m0)\n"
            f" R[m1+1,p] = R[m1,p] + L[m1,p]\nend\nO[p] = {read}\nout O"
        )
        assert not reroll(parse(text)).steps


def test_tiles_that_do_not_cover_a_rank_once_are_not_joined() -> None:
    whole = (
        "in X[m]\nrank m0 = 4\nrank m1 = {}\nconstraint {}\nO[p] = X[m1*M0+m0] * p :: sum(m1, m0)\nrank p = 2\nout O"
    )
    tiles, inside = "(M + M0 - 1) // M0", "m1*M0 + m0 < M"
    assert join(parse(whole.format(tiles, inside)), "m1").steps
    assert not join(parse(whole.format("M // M0", inside)), "m1").steps
    assert not join(parse(whole.format(tiles, "m1*M0 + m0 <= M")), "m1").steps
    other = parse(whole.format(tiles, inside).replace("X[m1*M0+m0] * p", "X[m1*M0+m0] * m0 * p"))
    assert not join(other, "m1").steps
