"""A batch rank added to a cascade: at each of its values the cascade computes what it did before."""

from __future__ import annotations

import numpy as np
import pytest

from einsumcascade.errors import InputError
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse
from einsumcascade.reference import run

TEXTS = {
    "attention": "in Q[p,e], K[m,e], V[m,f]\nconstraint m <= p\nS[p,m] = Q[p,e] * K[m,e]\nG[p] = S[p,m] :: max(m)\n"
    "N[p,m] = exp(S[p,m] - G[p])\nO[p,f] = N[p,m] * V[m,f]\nout O, G",
    "iteration": "in X[t], D[t]\ninit R[0] = 1\niter t:\n R[t+1] = D[t] * R[t] + X[t]\nend\nS = R[T]\nout S, R",
    "gather": "in K[x,e], TAB[t]\nO[t,e] = K[TAB[t],e]\nout O",
    "constraint": "in X[p,m], LEN[p], W[m]\nconstraint m < LEN[p]\nA[p,m] = 2 * W[m] + p\nS[p] = A[p,m]\nout S",
    "scalar": "in X[m], T\nS = T * X[m] :: sum(m)\nout S",
    "selection": "in X[p,m], V[m]\nrank j = 2\nI[p,j] = X[p,m] :: topk(m)\nO[p] = V[I[p,j]]\nout O",
    "system": "in A[i,j], B[j]\nX[i] = solve(A[i,j], B[j])\nY = X[i] :: max(i)\nout Y",
}
WHOLE = {"TAB", "LEN"}
EXTENTS = {"P": 3, "M": 4, "E": 2, "F": 2, "T": 3, "X": 4, "I": 3, "J": 3}


def draw(cascade: Cascade, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {i.tensor: tuple(batch if v == "b" else EXTENTS[rank_of(v)] for v in i.indices) for i in cascade.inputs}
    return {t: rng.integers(0, 4, s) if t in WHOLE else rng.standard_normal(s) for t, s in shapes.items()}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("which", range(4))
def test_each_slice_is_the_cascade_on_the_slices_of_its_inputs(name: str, which: int) -> None:
    cascade = parse(TEXTS[name])
    tensors = [i.tensor for i in cascade.inputs]
    some = tuple(tensors[:which]) if which < len(tensors) else ()
    batched = cascade.over("b", *some)
    assert parse(str(batched)) == batched
    inputs = draw(batched, 3)
    found = run(batched, inputs)
    carrying = {i.tensor for i in batched.inputs if "b" in i.indices}
    assert carrying == set(some or tensors)
    for b in range(3):
        want = run(cascade, {t: x[b] if t in carrying else x for t, x in inputs.items()})
        for o, x in want.items():
            np.testing.assert_allclose(found[o][b] if np.ndim(found[o]) > np.ndim(x) else found[o], x, rtol=1e-12)


def test_what_does_not_depend_on_the_inputs_named_keeps_its_ranks() -> None:
    batched = parse(TEXTS["attention"]).over("b", "V")
    assert [e.free[0] for e in batched.einsums] == ["p", "p", "p", "b"]


def test_a_gallery_text_takes_one_more_batch_rank() -> None:
    assert load("softmax_attention").over("n").inputs[0].indices == ("n", "b", "h", "p", "e")


@pytest.mark.parametrize(
    ("variable", "tensors", "code"),
    [
        ("b", ("W",), "unknown-input"),
        ("B", (), "rank-variable-case"),
        ("1b", (), "rank-variable-case"),
        ("p", (), "name-clash"),
    ],
)
def test_a_name_that_does_not_fit_is_one_error(variable: str, tensors: tuple[str, ...], code: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(TEXTS["attention"]).over(variable, *tensors)
    assert caught.value.codes == (code,)
