"""What is read at another place than it was written is computed there again, with the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.codegen.runner import present_target
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Einsum
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.rewrites.shifted import recompute_shifted

CASES = {
    "an offset": "in X[m,e]\nD[m] = X[m,e] * X[m,e] :: sum(e)\nO[m] = D[m] + D[m - 1]\nout O",
    "another variable": (
        "in X[h,e]\nrank g = H\nN[h] = X[h,e] * X[h,e] :: sum(e)\nR[h] = select(N[g] > N[h], 1, 0) :: sum(g)\n"
        "O[h] = R[h] + N[h]\nout O"
    ),
    "a chain": "in X[m]\nA[m] = exp(X[m])\nB[m] = A[m] * A[m - 1] where m >= 1\nO[m] = B[m + 1] * A[m]\nout O",
    "reversed": "in X[m,e]\nD[m] = X[m,e] :: max(e)\nO[m] = D[M - 1 - m] - D[m]\nout O",
    "a gather": "in X[m,e], I[p]\nD[m] = X[m,e] :: sum(e)\nO[p] = D[I[p]] * 2\nout O",
    "a quotient": "in X[m,e]\nD[m] = X[m,e] :: sum(e)\nO[m] = D[m // 3] + D[m % 4]\nout O",
    "masked softmax before": (
        "in S[p,m]\nG[p] = S[p,m] :: max(m) where m <= p\nE[p,m] = exp(S[p,m] - G[p]) where m <= p\n"
        "Z[p] = E[p,m] :: sum(m) where m <= p\nA[p,m] = select(m <= p, E[p,m] / Z[p], 0)\n"
        "D[p,m] = relu(A[p,m] - A[p-1,m]) where p >= 1\nO[m] = D[p,m] :: sum(p) where p >= 1\nout O"
    ),
    "a sum read at what it sums over": (
        "in X[g,e]\nrank g = 3\nrank k = G\nW[g,k] = X[g,e] * X[k,e] * X[k,e] :: sum(e)\nD[k] = W[g,k] :: sum(g)\n"
        "O[g] = D[g] * X[g,e] :: sum(e)\nout O"
    ),
    "a branch in range": (
        "in X[m,e]\nA[m] = X[m,e] * X[m,e] :: sum(e)\nO[m] = select(0 <= m + 1, select(m + 1 < M, A[m + 1], 0), 0)\n"
        "out O"
    ),
    "branches of a shorter rank": (
        "in X[m,e]\nrank j = M - 2\nA[m] = X[m,e] :: max(e)\nB[j] = A[j] * A[j]\n"
        "O[m] = select(m < J, B[m], 3) + select(m - 1 >= 0 and m - 1 < J, B[m - 1] - A[m], 1)\nout O"
    ),
    "a condition that reads elsewhere": (
        "in X[m,e]\nA[m] = X[m,e] :: sum(e)\nB[m] = select(A[m - 1] > A[m], A[m], 0) where m >= 1\n"
        "O = B[m] :: sum(m) where m >= 1\nout O"
    ),
    "a window of sums": "in X[m,e]\nrank w = 3\nD[m] = X[m,e] :: sum(e)\nO[m] = D[m + w - 1] :: sum(w)\nout O",
}
KEPT = {
    "a branch that may be out of range": "in X[m]\nA[m] = exp(X[m])\nO[m] = select(m >= 1, A[m - 1], 0)\nout O",
    "the other branch": "in X[m]\nA[m] = exp(X[m])\nO[m] = select(m - 1 < 0, A[m - 1], A[m])\nout O",
    "a place that is computed": "in X[m]\nA[m] = exp(X[m])\nJ[m] = floor(X[m])\nO[m] = A[J[m]]\nout O",
}


def inputs_of(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    out = {}
    for i in parse({**CASES, **KEPT}[name]).inputs:
        shape = [{"e": 16, "p": 9, "m": 9, "h": 7, "g": 3}[v] for v in i.indices]
        out[i.tensor] = rng.integers(0, 9, shape) if i.tensor == "I" else rng.standard_normal(shape)
    return out


@pytest.mark.parametrize("name", CASES)
def test_values_stay_and_every_map_is_read_where_it_is_written(name: str) -> None:
    cascade, inputs = parse(CASES[name]), inputs_of(name)
    found = recompute_shifted(cascade, kept=lambda e: "m" in e.ranks or "p" in e.ranks).cascade
    assert found != cascade
    written = {s.tensor: s for s in found.body if isinstance(s, Einsum)}
    assert parse(str(found)) == found
    (one,), (two,) = (run(c, inputs).values() for c in (cascade, found))
    np.testing.assert_allclose(one, two, rtol=1e-13)
    assert written


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_computed_again_stays(name: str) -> None:
    cascade = parse(KEPT[name])
    assert recompute_shifted(cascade, kept=lambda e: False).cascade == cascade


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree(name: str) -> None:
    cascade, arrays = parse(CASES[name]), inputs_of(name)
    inputs = {n: torch.from_numpy(x) if n == "I" else torch.from_numpy(x).float() for n, x in arrays.items()}
    wanted = run(cascade, {n: t.double().numpy() if n != "I" else t.numpy() for n, t in inputs.items()})["O"]
    built = build(cascade, extents={"E": 16} if "e]" in CASES[name] else {}, dtype="float32", target=present_target())
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    live = ~np.isnan(wanted)
    for found in (run_interpreted(built, inputs, binding)["O"], ec.compile(cascade)(**inputs)):
        np.testing.assert_allclose(found.numpy()[live], wanted[live], rtol=2e-5, atol=2e-5)
