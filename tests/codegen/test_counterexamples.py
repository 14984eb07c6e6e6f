"""Cascades that once came out wrong: each way of running them agrees with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.codegen.op import compile
from einsumcascade.errors import LoweringError
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.derive import derive
from tests.codegen.judging import assert_within_bounds

EXTENTS = {"P": 37, "M": 75, "E": 16, "F": 16, "N": 33, "A": 5, "C": 7, "H": 6, "G": 3}
SCORES = "in Q[p,e], K[m,e], V[m,f]\nQK[p,m] = Q[p,e] * K[m,e]\n"
SOFTMAX = "GM[p] = QK[p,m] :: max(m)\nSN[p,m] = exp(QK[p,m] - GM[p])\nSD[p] = SN[p,m]\n"
WEIGHTED = SOFTMAX + "O[p,f] = SN[p,m] * V[m,f] / SD[p] :: sum(m)\n"
TURNED = "in Q[e,p], K[e,m], V[f,m]\nQK[m,p] = Q[e,p] * K[e,m]\n" + WEIGHTED.replace("[p,m]", "[m,p]").replace(
    "[p,f]", "[f,p]"
).replace("V[m,f]", "V[f,m]")
CASES = {
    "two conditions on one tensor": "in X[p,m]\nA[p] = X[p,m] :: sum(m) where m <= p\n"
    "B[p] = X[p,m] :: sum(m) where m > p\nD[p] = X[p,m] :: max(m)\nout A, B, D",
    "a condition on one of two maxima": SCORES + "A[p] = QK[p,m] :: max(m) where m <= p\nB[p] = QK[p,m] :: max(m)\n"
    "D[p] = QK[p,m] :: sum(m)\nout A, B, D",
    "a maximum and a sum of one input": "in X[p,m]\nconstraint m < 70\nA[p] = X[p,m] :: max(m)\n"
    "S[p] = X[p,m]\nout A, S",
    "a weighted sum of the score": "in X[p,m]\nconstraint m < 70\nA[p] = X[p,m] :: max(m)\n"
    "D[p] = exp(X[p,m] - A[p]) * X[p,m] :: sum(m)\nout D",
    "a condition on a maximum": "in X[p,m]\nG[p] = X[p,m] :: max(m)\nS[p] = exp(X[p,m] - G[p]) :: sum(m)\n"
    "B[p] = X[p,m] :: sum(m) where X[p,m] > G[p] - 1\nout S, B",
    "three axes": "in X[m,a,c]\nG[a,c] = X[m,a,c] :: max(m)\nout G",
    "every tensor turned": TURNED + "out O, GM",
    "the remainder of a negative number": "in X[p,m]\nconstraint (m - p) % 3 == 1\nG[p] = X[p,m]\nout G",
    "the quotient of a negative number": "in X[p,m]\nconstraint (p - m) // 8 >= 0\n" + "G[p] = X[p,m]\nout G",
    "a remainder of reals": "in X[p,m], Y[p,m]\nG[p] = X[p,m] % (1 + abs(Y[p,m])) :: sum(m)\nout G",
    "any of numbers": "in X[p,m]\nS[p] = relu(X[p,m] - 2.5) :: any(m)\n"
    "T[p] = X[p,m] > 2 :: any(m) where m <= p\nout S, T",
    "names that a kernel makes": "in X[p,m], p_X[m], BLOCK_P[m], b_X[m], o_m[m]\nconst i_p = 0.5\n"
    "G[p] = X[p,m] :: max(m)\nO[p] = exp(i_p * X[p,m] - i_p * G[p]) * p_X[m] * BLOCK_P[m] * b_X[m] * o_m[m]\nout O",
    "words of the languages": "in tl[p,m], triton[m], pid[p]\nO[p] = tl[p,m] * triton[m] * pid[p]\nout O",
    "a tensor called as a rank": "in P[p,m], M[m]\nX[p] = P[p,m] * M[m] * 0.5\nout X",
    "positions that grow": "in X[p,m]\nG[p] = X[p,m] + m * m * m * m * m * m :: sum(m)\nout G",
    "functions of positions": "in X[p,m]\nconst half = 0.5\nG[p] = X[p,m] * cos(p - m) * 100 ** (-m / M)\n"
    "D[p] = X[p,m] * log(1 + m) * half * (p - m)\nout G, D",
    "a constraint over queries alone": "in X[p,m]\nconstraint p >= 7\nG[p] = X[p,m] :: max(m)\n"
    "Z[p] = exp(X[p,m] - G[p])\nO[p] = exp(X[p,m] - G[p]) / Z[p] * X[p,m] :: sum(m)\nout O",
    "a constraint over extents alone": SCORES + "constraint M > 5000\n" + WEIGHTED + "out O",
    "two ranks under one maximum": "in A[p,m], B[p,n]\nGA[p] = A[p,m] :: max(m)\nGB[p] = B[p,n] :: max(n)\n"
    "G[p] = max(GA[p], GB[p])\nZ[p] = exp(A[p,m] - G[p]) :: sum(m)\nY[p] = exp(B[p,n] - G[p]) :: sum(n)\n"
    "O[p] = Z[p] + Y[p]\nout O",
    "weights and their column sums": SCORES + SOFTMAX + "A[p,m] = SN[p,m] / SD[p]\nC[m] = A[p,m] :: sum(p)\nout A, C",
    "a shift below zero": SCORES + "const w = -3\nconstraint m - p < w\n" + WEIGHTED + "out O",
    "a mask wider than its value": "in V[m,f], X[p]\nconstraint m <= p\nMV[p,f] = V[m,f] :: max(m)\n"
    "O[p,f] = MV[p,f] * X[p]\nout O",
    "powers in a constraint": SCORES + "constraint m ** 2 <= p\n" + WEIGHTED + "out O",
    "an offset above the rank": SCORES + "constraint m > p + 60\n" + WEIGHTED + "out O",
    "a mean of no points": "in X[p,m]\nC[p] = X[p,m] :: mean(m) where m < p - 5\nout C",
    "the entropy of large scores": "in X[p,m]\nG[p] = 300 * X[p,m] :: max(m)\nZ[p] = exp(300 * X[p,m] - G[p])\n"
    "S[p] = exp(300 * X[p,m] - G[p]) * (300 * X[p,m] - G[p]) :: sum(m)\nH[p] = log(Z[p]) - S[p] / Z[p]\nout H",
}
REFUSED = {
    "every generation": "in X[m]\ninit R[0] = 0\niter m:\n R[m+1] = R[m] + X[m]\nend\nout R",
    "generations after the loop": "in X[p,m]\ninit R[p,0] = 0\niter m:\n R[p,m+1] = R[p,m] + X[p,m]\nend\n"
    "O[p,m] = R[p,m]\nout O",
    "a rank that an iteration walks": "in X[p,m]\ninit R[p,0] = 0\niter m:\n R[p,m+1] = R[p,m] + X[p,m]\nend\n"
    "D[p] = X[p,m] * R[p,M] :: sum(m)\nout D",
    "a reduction across programs": "in X[p,m]\nrank k = 3\ninit U[p,0] = 0\niter k:\n"
    " SM[m,k] = exp(X[p,m] + U[p,k]) :: sum(p)\n SP[p,k] = exp(X[p,m]) / SM[m,k] :: sum(m)\n"
    " U[p,k+1] = -log(SP[p,k])\nend\nO[p] = U[p,K]\nout O",
}


def inputs_of(cascade: Cascade, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {i.tensor: [EXTENTS[rank_of(v)] for v in i.indices] for i in cascade.inputs}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_op_agrees_in_double_precision(name: str) -> None:
    cascade = parse(CASES[name])
    inputs = inputs_of(cascade, torch.float64)
    got = compile(cascade)(**inputs)
    expected = run(cascade, {n: t.numpy() for n, t in inputs.items()})
    for want, out in zip(expected.values(), (got,) if isinstance(got, torch.Tensor) else got, strict=True):
        live = ~np.isnan(want)
        np.testing.assert_allclose(out.numpy()[live], want[live], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_the_derived_cascade_agrees(name: str) -> None:
    cascade = parse(CASES[name])
    inputs = {n: t.numpy() for n, t in inputs_of(cascade, torch.float64).items()}
    expected, got = run(cascade, inputs), run(derive(cascade, tile=16).cascade, inputs)
    for output, want in expected.items():
        np.testing.assert_allclose(got[output], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_text_agrees(name: str) -> None:
    cascade = parse(CASES[name])
    inputs = inputs_of(cascade, torch.float32)
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    built = build(cascade, extents=binding.extents, dtype="float32", target=gpu_target("cuda:90"))
    outputs = run_interpreted(built, inputs, binding)
    assert_within_bounds(cascade, inputs, tuple(outputs.values()))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_lowering_is_refused_by_name(name: str) -> None:
    cascade = parse(REFUSED[name])
    inputs = inputs_of(cascade, torch.float32)
    with pytest.raises(LoweringError, match="not-lowered-yet"):
        compile(cascade)(**inputs)
    derive(cascade)
