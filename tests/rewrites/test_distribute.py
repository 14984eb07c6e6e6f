"""What programs of an iteration would share leaves it, and the values stay."""

from __future__ import annotations

import numpy as np
import pytest

from einsumcascade.language.ir import Einsum, Iter, walk
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.rewrites.distribute import distribute
from einsumcascade.verify.verify import verify

SIZES = {"b": 5, "t": 6, "e": 16, "g": 16}
LEAVES = {
    "outputs of steps that heads share": (
        "in X[b,t,e]\ninit R[b,0,e] = 0\niter t:\n R[b,t+1,e] = R[b,t,e] * 0.5 + X[b,t,e]\n"
        " Y[t,e] = R[b,t+1,e] * X[b,t,e] :: sum(b)\nend\nout Y",
        {"Y"},
    ),
    "a sum over steps and batch": (
        "in X[b,t,e]\ninit R[b,T,e] = X[b,0,e]\ninit G[T,e] = 0\niter t desc:\n"
        " D[t,e] = R[b,t+1,e] * X[b,t,e] :: sum(b)\n G[t,e] = G[t+1,e] + D[t,e]\n"
        " R[b,t,e] = tanh(R[b,t+1,e] + X[b,t,e])\nend\nO[e] = G[0,e] * 2\nP[b,e] = R[b,0,e]\nout O, P",
        {"D", "G"},
    ),
    "a map of such a sum, and what it needs again": (
        "in X[b,t,e], W[t,e]\ninit R[b,0,e] = 0\niter t:\n A[b,t,e] = exp(R[b,t,e]) * W[t,e]\n"
        " N[b,t] = A[b,t,e] * X[b,t,e] :: sum(e)\n S[t,e] = A[b,t,e] * N[b,t] :: sum(b)\n Y[t,e] = S[t,e] + W[t,e]\n"
        " R[b,t+1,e] = tanh(R[b,t,e] + X[b,t,e])\nend\nout Y",
        {"S", "Y"},
    ),
    "both generations of a state": (
        "in X[b,t,e]\ninit R[b,0,e] = 1\ninit G[0] = 0\niter t:\n R[b,t+1,e] = R[b,t,e] * cos(X[b,t,e])\n"
        " D[t] = R[b,t,e] * R[b,t+1,e] :: max(b,e)\n G[t+1] = D[t] * D[t] + G[t]\nend\nO = G[T]\nout O",
        {"D", "G"},
    ),
}
STAYS = {
    "a recurrence over the axis": (
        "in X[b,t,e]\ninit R[b,0,e] = 0\niter t:\n S[t,e] = R[b,t,e] :: max(b)\n R[b,t+1,e] = S[t,e] + X[b,t,e]\nend\n"
        "O[b,e] = R[b,T,e]\nout O"
    ),
    "a sum that is no state's axis": (
        "in X[b,t,e]\ninit R[b,0] = 0\niter t:\n S[b,t] = X[b,t,e] :: sum(e)\n R[b,t+1] = R[b,t] * 0.5 + S[b,t]\nend\n"
        "O[b] = R[b,T]\nout O"
    ),
}


def inputs_of(text: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {i.tensor: rng.standard_normal([SIZES[v] for v in i.indices]) for i in parse(text).inputs}


@pytest.mark.parametrize("name", LEAVES)
def test_what_programs_share_leaves_and_values_stay(name: str) -> None:
    text, left = LEAVES[name]
    cascade, inputs = parse(text), inputs_of(text)
    found = distribute(cascade, bounded=("e", "g"))
    assert parse(str(found.cascade)) == found.cascade and len(found.steps) == 1
    inside = {
        s.tensor for b in found.cascade.body if isinstance(b, Iter) for s in walk(b.body) if isinstance(s, Einsum)
    }
    assert not inside & left and left & {s.tensor for s in found.cascade.body if isinstance(s, Einsum)}
    for tensor, value in run(cascade, inputs).items():
        np.testing.assert_allclose(run(found.cascade, inputs)[tensor], value, rtol=1e-12)


@pytest.mark.parametrize("name", STAYS)
def test_what_a_state_depends_on_stays(name: str) -> None:
    cascade = parse(STAYS[name])
    found = distribute(cascade, bounded=("e", "g"))
    assert found.cascade == cascade and not found.steps


@pytest.mark.parametrize("read", ["G[1,e]", "G[T,e] + G[T-1,e]"])
def test_a_sum_whose_generations_are_read_is_no_sum_of_all_steps(read: str) -> None:
    text = (
        "in X[b,t,e]\ninit R[b,0,e] = 0\ninit G[0,e] = 0\niter t:\n D[t,e] = R[b,t,e] :: sum(b)\n"
        f" G[t+1,e] = G[t,e] + D[t,e]\n R[b,t+1,e] = R[b,t,e] + X[b,t,e]\nend\nO[e] = {read}\nout O"
    )
    assert not distribute(parse(text), bounded=("e",)).steps


@pytest.mark.parametrize("name", LEAVES)
def test_kernels_are_right(name: str) -> None:
    found = verify(parse(LEAVES[name][0]), extents={"B": 5, "T": 6, "E": 16}, dtypes=("float32",))
    assert found.passed, found


LAST = {
    "a sum over a batch": (
        "in X[b,t,e]\ninit R[b,0,e] = 0\niter t:\n R[b,t+1,e] = R[b,t,e] * 0.5 + X[b,t,e]\nend\n"
        "O[e] = R[b,T,e] * X[b,0,e] :: sum(b)\nP[b,e] = R[b,T,e]\nout O, P"
    ),
    "another iteration": (
        "in X[b,t,e]\ninit R[b,0,e] = 0\niter t:\n R[b,t+1,e] = tanh(R[b,t,e] + X[b,t,e])\nend\n"
        "init U[b,T,e] = R[b,T,e]\niter t desc:\n U[b,t,e] = tanh(U[b,t+1,e] * X[b,t,e])\nend\nO[b,e] = U[b,0,e]\nout O"
    ),
    "a first state that a batch shares": (
        "in X[b,t,e], W[e]\ninit R[b,0,e] = W[e]\niter t:\n R[b,t+1,e] = R[b,t,e] * 0.5 + X[b,t,e]\nend\n"
        "O[b,e] = R[b,T,e] * X[b,0,e]\nout O"
    ),
}


@pytest.mark.parametrize("name", LAST)
def test_another_kernel_may_read_a_last_generation(name: str) -> None:
    found = verify(parse(LAST[name]), extents={"B": 3, "T": 4, "E": 16}, dtypes=("float32", "bfloat16"))
    assert found.passed and not found.without, found


def test_weights_that_a_batch_of_recurrences_shares_have_kernels_for_their_gradient() -> None:
    text = (
        "in X[b,t,e], W[u,e]\ninit R[b,0,e] = 0\niter t:\n"
        " R[b,t+1,e] = tanh(W[0,e] * R[b,t,e] + W[1,e] * X[b,t,e])\nend\nO[b,e] = R[b,T,e]\nout O"
    )
    found = verify(parse(text), extents={"B": 3, "T": 4, "E": 16, "U": 2}, dtypes=("float32",))
    assert found.passed and not found.without, found
