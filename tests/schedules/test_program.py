"""A cascade becomes kernels in order, each a cascade of its own, with buffers between them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.language.ir import Iter, rank_of, reads
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.derive import simplify
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.program import Program, bounded_variables
from tests.strategies import Case, cases, close, examples

SOFTMAX = """\
in Q[p,e], K[m,e], V[m,f]
S[p,m] = Q[p,e] * K[m,e] :: sum(e)
GM[p] = S[p,m] :: max(m)
SN[p,m] = exp(S[p,m] - GM[p])
SD[p] = SN[p,m] :: sum(m)
O[p,f] = SN[p,m] * V[m,f] / SD[p] :: sum(m)
out O
"""
COLUMN_MEAN = SOFTMAX.replace("O[p,f] = SN[p,m] * V[m,f] / SD[p] :: sum(m)", "C[m] = SN[p,m] / SD[p] / P :: sum(p)")
TEXTS = {
    "softmax": SOFTMAX,
    "weights": SOFTMAX.replace("out O", "A[p,m] = SN[p,m] / SD[p]\nout O, A"),
    "column mean": COLUMN_MEAN.replace("out O", "out C").replace(", V[m,f]", ""),
    "linear": "in Q[p,e], K[m,e], V[m,f]\nKV[e,f] = K[m,e] * V[m,f] :: sum(m)\n"
    "O[p,f] = Q[p,e] * KV[e,f] :: sum(e)\nout O\n",
    "product": "in A[i,k], B[k,j]\nC[i,j] = A[i,k] * B[k,j] :: sum(k)\nout C\n",
    "map": "in X[p,f], W[f]\nY[p,f] = relu(X[p,f]) * W[f]\nout Y\n",
    "both sides": "in Q[p,e], K[m,e]\nS[p,m] = Q[p,e] * K[m,e] :: sum(e)\nR[p] = S[p,m] :: sum(m)\n"
    "C[m] = S[p,m] * R[p] :: sum(p)\nout R, C\n",
}


def program(text: str, **extents: int) -> Program:
    simple = simplify(parse(text, name="t.cascade")).cascade
    sizes = {rank_of(v): 5000 for i in simple.inputs for v in i.indices} | {"E": 8, "F": 8} | extents
    return partition(simple, bounded=bounded_variables(simple, sizes))


def signatures(p: Program) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(k.residents, k.loops) for k in p.kernels]


def by_kernels(p: Program, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the kernels in order with the reference, handing on nothing but inputs and what kernels wrote."""
    known = dict(x)
    for k in p.kernels:
        needed = {i.tensor for i in k.cascade.inputs}
        assert needed <= known.keys(), f"{k.name} reads {needed - known.keys()} before it is written"
        known |= run(
            k.cascade,
            {t: known[t] for t in needed},
            extents={r: n for r, n in extents_of(p, x).items() if r in ranks_of(k.cascade)},
        )
    return known


def extents_of(p: Program, x: dict[str, np.ndarray]) -> dict[str, int]:
    return {rank_of(v): n for i in p.cascade.inputs for v, n in zip(i.indices, x[i.tensor].shape, strict=True)}


def ranks_of(cascade: object) -> set[str]:
    from einsumcascade.language.check import extents_known

    return set(extents_known(cascade)) | {rank_of(v) for v in extents_known(cascade)}  # type: ignore[arg-type]


def test_softmax_is_one_kernel() -> None:
    assert signatures(program(SOFTMAX)) == [(("p",), ("m",))]
    assert program(SOFTMAX).buffers == {}


def test_weights_that_leave_are_a_kernel_after_their_statistics() -> None:
    found = program(TEXTS["weights"])
    assert len(found.kernels) == 2
    assert found.kernels[-1].cascade.output_names == ("A",)
    assert set(found.buffers) == {"GM", "SD"}


def test_resident_and_loop_swap_between_the_kernels_of_a_column_mean() -> None:
    found = program(TEXTS["column mean"])
    assert signatures(found) == [(("p",), ("m",)), (("m",), ("p",))]
    assert found.buffers == {"GM": ("p",), "SD": ("p",)}


def test_a_finished_reduction_of_another_signature_is_a_kernel_boundary() -> None:
    found = program(TEXTS["linear"])
    assert signatures(found) == [((), ("m",)), (("p",), ())]
    assert found.buffers == {"KV": ("e", "f")}


def test_a_rank_that_is_innermost_in_one_input_only_is_a_length() -> None:
    assert signatures(program(TEXTS["product"])) == [(("i", "j"), ("k",))]


def test_an_iteration_stays_in_one_kernel() -> None:
    text = (
        "in X[p,m]\nrank m1 = M\ninit R[p,0] = 0\niter m1:\n  R[p,m1+1] = R[p,m1] + X[p,m1]\nend\n"
        "Y[p] = R[p,M1] * 2\nout Y\n"
    )
    (kernel,) = program(text).kernels
    assert any(isinstance(s, Iter) for s in kernel.cascade.body)


@pytest.mark.parametrize("name", TEXTS)
def test_running_the_kernels_in_order_gives_the_cascade(name: str) -> None:
    found = program(TEXTS[name])
    sizes = {"P": 7, "M": 11, "E": 8, "F": 8, "I": 3, "J": 5, "K": 6}
    rng = np.random.default_rng(0)
    x = {i.tensor: rng.standard_normal([sizes[rank_of(v)] for v in i.indices]) for i in found.cascade.inputs}
    expected, values = run(parse(TEXTS[name]), x), by_kernels(found, x)
    for output in expected:
        assert close(values[output], expected[output]), output


@examples(100)
@given(cases(), st.booleans())
def test_random_cascades_are_what_their_kernels_compute(case: Case, accumulates: bool) -> None:
    simple = simplify(case.cascade).cascade
    bounded = bounded_variables(simple, {**case.extents, "M": 5000, "P": 5000, "N": 5000})
    found = partition(simple, bounded=bounded, accumulates=accumulates)
    x = case.inputs()
    expected, values = run(case.cascade, x), by_kernels(found, x)
    for output in expected:
        assert close(values[output], expected[output]), output


@examples(100)
@given(cases())
def test_every_tensor_is_written_by_one_kernel_and_every_buffer_before_it_is_read(case: Case) -> None:
    simple = simplify(case.cascade).cascade
    found = partition(simple, bounded=bounded_variables(simple, case.extents))
    written: list[str] = []
    given_inputs = {i.tensor for i in simple.inputs}
    for k in found.kernels:
        for i in k.cascade.inputs:
            assert i.tensor in given_inputs or i.tensor in written
        read = {r.tensor for e in k.cascade.einsums for r in reads(e.expr, *e.where)}
        assert read <= {i.tensor for i in k.cascade.inputs} | {e.tensor for e in k.cascade.einsums}
        written += k.cascade.output_names
        for o in k.cascade.outputs:
            (e,) = (e for e in k.cascade.einsums if e.tensor == o.tensor)
            assert set(e.free) - set(found.bounded) <= set(k.residents) | set(k.loops)
    assert len(written) == len(set(written))
    assert set(simple.output_names) <= set(written)
    assert set(found.buffers) <= set(written)


@examples(50)
@given(cases())
def test_each_kernel_prints_and_parses(case: Case) -> None:
    simple = simplify(case.cascade).cascade
    for k in partition(simple, bounded=bounded_variables(simple, case.extents)).kernels:
        assert parse(str(k.cascade), name=k.cascade.name + ".cascade") == k.cascade


def test_bounded_are_feature_ranks_that_fit_and_ranks_defined_by_them() -> None:
    cascade = parse(
        "in Q[p,e], K[m,e], V[m,f]\nrank c = E // 2\nS[p,m] = Q[p,e] * K[m,e] :: sum(e)\n"
        "O[p,f] = S[p,m] * V[m,f] :: sum(m)\nZ[p,c] = Q[p,c]\nout O, Z\n"
    )
    sizes = {"P": 10, "M": 10, "E": 64, "F": 64, "C": 32}
    assert bounded_variables(cascade, sizes) == ("e", "f", "c")
    assert bounded_variables(cascade, {**sizes, "F": 600}) == ("e", "c")
