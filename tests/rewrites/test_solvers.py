"""Iterations each of whose steps reduces over the rank: loops within a loop, as a cascade and as one kernel."""

from __future__ import annotations

import numpy as np
import pytest

import einsumcascade as ec
from einsumcascade.gallery import load
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.derive import derive, simplify
from einsumcascade.rewrites.loop_form import loop_form
from einsumcascade.verify.verify import verify

# Two reductions a step, one of which refers to the other; the steps move what the next ones refer to.
CHAIN = """in X[p,m] Y[m,f] NIT[n]
init T[0,p] = 1
iter n:
 Z[n,p,m] = X[p,m] * T[n,p]
 G[n,p] = Z[n,p,m] :: max(m)
 D[n,p] = exp(Z[n,p,m] - G[n,p]) :: sum(m)
 T[n+1,p] = T[n,p] / 2 + D[n,p] / 16
end
W[p,m] = X[p,m] * T[N,p]
H[p] = W[p,m] :: max(m)
O[p,f] = exp(W[p,m] - H[p]) * Y[m,f] :: sum(m)
out O, H"""


def inputs_of(text: str, rng: np.random.Generator, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    cascade = load(text) if "\n" not in text else parse(text)
    return {i.tensor: rng.standard_normal([sizes[v] for v in i.indices]) for i in cascade.inputs}


@pytest.mark.parametrize("tile", [1, 3, 128])
@pytest.mark.parametrize("text", ["sparsemax", "entmax15", "feedback", CHAIN])
def test_the_loop_form_has_the_value_of_the_text(text: str, tile: int) -> None:
    cascade = load(text) if "\n" not in text else parse(text)
    inputs = inputs_of(text, np.random.default_rng(0), {"p": 5, "m": 7, "e": 3, "f": 2, "n": 6})
    found = loop_form(simplify(cascade).cascade, over=("m",), tile=tile).cascade
    for name, want in run(cascade, inputs).items():
        np.testing.assert_allclose(run(found, inputs)[name], want, rtol=1e-10, atol=1e-12)


def test_a_step_has_one_loop_over_the_rank_where_its_reductions_stream() -> None:
    text = str(loop_form(simplify(parse(CHAIN)).cascade, over=("m",), tile=8).cascade)
    step = text.split("iter n:")[1].split("\nend")[0]
    assert step.count("iter m1:") == 1 and "exp(RG[n, p, m1] - RG[n, p, m1 + 1])" in step
    assert text.count("iter m1:") == 2


def test_the_text_of_the_loop_form_parses_again() -> None:
    found = loop_form(simplify(load("sparsemax")).cascade, over=("m",), tile=8).cascade
    assert parse(str(found), name=found.name) == found


def test_a_solver_is_one_kernel_with_the_loops_before_and_after_it() -> None:
    kernel = ec.compile("sparsemax").kernel(extents={"E": 64, "F": 64}, dtype="bfloat16", target="cuda:90")
    assert len(kernel.program.kernels) == 1
    lines = [line for line in kernel.source.splitlines() if line.strip().startswith("for ")]
    assert [len(line) - len(line.lstrip()) for line in lines] == [4, 4, 4, 8, 8, 4, 4]


@pytest.mark.parametrize("extents", [{"P": 1, "M": 1, "N": 1}, {"P": 65, "M": 130, "N": 9}, {"P": 7, "M": 5, "N": 0}])
def test_a_solver_verifies_as_a_kernel(extents: dict[str, int]) -> None:
    found = verify("sparsemax", extents={**extents, "E": 16, "F": 16})
    assert found.passed, str(found)


def test_a_chain_inside_a_step_verifies_as_a_kernel() -> None:
    found = verify(parse(CHAIN), extents={"P": 33, "M": 70, "F": 16, "N": 4})
    assert found.passed, str(found)


def test_derivation_and_costs_know_the_steps() -> None:
    assert derive("sparsemax").passes["M"][0] == derive("sparsemax").passes["M"][1]
    from einsumcascade.schedules.cost import cost

    bytes_of = {}
    for n in (1, 31):
        sizes = {"P": 256, "M": 256, "E": 64, "F": 64, "N": n}
        kernel = ec.compile("sparsemax").kernel(extents=sizes, dtype="bfloat16", target="cuda:90")
        found = cost(kernel.program, kernel.schedule, extents=sizes, dtype="bfloat16", target="cuda:90")
        bytes_of[n] = {t.tensor: t.moved for t in found.kernels[0].tensors}
    # Keys are read once before the steps, once in each, and once after them.
    assert bytes_of[31]["K"] * 3 == bytes_of[1]["K"] * 33
    assert bytes_of[31]["V"] == bytes_of[1]["V"]


def test_a_reduction_of_every_step_may_be_an_output() -> None:
    found = verify(parse(CHAIN + ", D"), extents={"P": 33, "M": 70, "F": 16, "N": 4})
    assert found.passed, str(found)


OUTER = """in S[p,m] R[m] NIT[n]
constraint m <= p
T = R[m] :: max(m)
Z = exp(R[m] - T) :: sum(m)
init X[0,p] = Z
iter n{order}:
 A[n,p] = relu(S[p,m] - X[{old},p]) :: sum(m)
 X[{new},p] = X[{old},p] / 2 + A[n,p]
end
O[p] = X[{last},p]
Y[p] = A[N-1,p]
out O, A, Y"""


@pytest.mark.parametrize("tile", [1, 3, 128])
def test_constraints_cull_no_update_and_values_of_every_step_may_be_read(tile: int) -> None:
    text = OUTER.format(order="", old="n", new="n+1", last="N")
    rng = np.random.default_rng(4)
    inputs = {"S": rng.standard_normal((3, 5)), "R": rng.standard_normal(5), "NIT": np.zeros(3)}
    found = derive(parse(text), tile=tile).cascade
    for name, want in run(parse(text), inputs).items():
        np.testing.assert_allclose(run(found, inputs)[name], want, rtol=1e-12)


def test_a_solver_that_descends_is_streamed() -> None:
    text = OUTER.format(order=" desc", old="n+1", new="n", last="0").replace("init X[0,p]", "init X[N,p]")
    cascade = parse(text.replace("Y[p] = A[N-1,p]\n", "").replace(", A, Y", ""))
    found = derive(cascade, tile=3)
    assert not any(s.rule == "not streamed" for s in found.steps)
    inputs = {
        i.tensor: np.random.default_rng(1).standard_normal([{"p": 4, "m": 7, "n": 3}[v] for v in i.indices])
        for i in cascade.inputs
    }
    for name, want in run(cascade, inputs).items():
        np.testing.assert_allclose(run(found.cascade, inputs)[name], want, rtol=1e-12)


def test_an_iteration_around_all_reductions_is_derived() -> None:
    assert derive("feedback").passes["M"] == (2, 1)


def test_what_every_step_of_a_solver_puts_out_is_stored_step_by_step() -> None:
    text = (
        str(load("feedback"))
        .replace("X[n + 1,", "U[n, p] = GM[n, p] + SD[n, p]\n  X[n + 1,")
        .replace("out O", "out O, U")
    )
    found = verify(parse(text), extents={"P": 33, "M": 70, "E": 16, "N": 3})
    assert found.passed, str(found)
