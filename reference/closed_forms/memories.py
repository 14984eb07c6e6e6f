"""Closed forms of memories that learn while they read.

A linear memory is the sum of what was written, moved by products of its transitions. For the others, gradients are
taken by a complex step, exact to the last digits, so no derivative written by hand is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from einsumcascade.reference.closed_forms.parts import Array, Closed, Inputs, Outputs


def scan(transitions: Array, added: Array, *, start: Array | None = None) -> Array:
    """States of a linear recurrence, each a sum over earlier tokens of products of the transitions since.

    Args:
        transitions: `(T, N, N)`. added: `(T, N, F)`. start: `(N, F)`; None: zeros.

    Returns: `(T, N, F)`, the states after each token.
    """
    states = np.zeros_like(added)
    for t in range(len(added)):
        through = np.eye(transitions.shape[1])
        for s in reversed(range(t + 1)):
            states[t] += through @ added[s]
            through = through @ transitions[s]
        if start is not None:
            states[t] += through @ start
    return states


def gradient(loss: Callable[[NDArray[Any]], Any], at: Array) -> Array:
    """Derivative of an analytic function of a matrix in each of its elements, by an imaginary step."""
    out = np.empty_like(at)
    for place in np.ndindex(*at.shape):
        moved = at.astype(np.complex128)
        moved[place] += 1e-30j
        out[place] = np.imag(loss(moved)) / 1e-30
    return out


def titans(x: Inputs) -> Outputs:
    """Memory and momentum as one state of a linear recurrence, by products of its transitions."""
    t, e = x["K"].shape
    transitions, added = np.zeros((t, 2 * e, 2 * e)), np.zeros((t, 2 * e, x["V"].shape[1]))
    for n, k in enumerate(x["K"]):
        erased, momentum = -2 * x["THETA"][n] * np.outer(k, k), x["ETA"][n] * np.eye(e)
        transitions[n] = np.block([[(1 - x["ALPHA"][n]) * np.eye(e) + erased, momentum], [erased, momentum]])
        added[n] = np.tile(2 * x["THETA"][n] * np.outer(k, x["V"][n]), (2, 1))
    memories = scan(transitions, added)[:, :e]
    return {"O": (x["Q"][:, None, :] @ memories)[:, 0]}


def titans_chunk(x: Inputs, *, c0: int = 6) -> Outputs:
    """Token by token, with the gradient of each token's squared error at the memory that its chunk began with."""
    memory = np.zeros((x["K"].shape[1], x["V"].shape[1]))
    momentum, first = memory, memory
    out = []
    for t, (k, v) in enumerate(zip(x["K"], x["V"], strict=True)):
        first = memory if t % c0 == 0 else first
        step = gradient(lambda m, k=k, v=v: np.sum((k @ m - v) ** 2), first)  # type: ignore[misc]
        momentum = np.exp(x["LE"][t]) * momentum - x["THETA"][t] * step
        memory = np.exp(x["LA"][t]) * memory + momentum
        out.append(x["Q"][t] @ memory)
    return {"O": np.stack(out).reshape(-1, c0, x["V"].shape[1])}


def _cube(error: NDArray[Any]) -> Any:
    """The sum of the cubes of the sizes."""
    return np.sum(np.sign(error.real) * error**3)


def moneta(x: Inputs) -> Outputs:
    """Steps on the cubed error of the memory, which is the accumulator over its squared 4-norm."""

    def memory(accumulator: Array) -> Array:
        return np.asarray(accumulator / np.sqrt(np.sum(accumulator**4) + 1e-12))

    accumulator, out = x["AC0"], []
    for t, (k, v) in enumerate(zip(x["K"], x["V"], strict=True)):
        step = gradient(lambda w, k=k, v=v: _cube(w @ k - v), memory(accumulator))  # type: ignore[misc]
        accumulator = x["ALPHA"][t] * accumulator - x["ETA"][t] * step
        out.append(memory(accumulator) @ x["Q"][t])
    return {"O": np.stack(out)}


def _huber(error: NDArray[Any], threshold: float) -> Any:
    """Half the square of the error's length, beyond the threshold its tangent."""
    square = np.sum(error**2)
    return square / 2 if square.real <= threshold**2 else threshold * np.sqrt(square) - threshold**2 / 2


def yaad(x: Inputs) -> Outputs:
    """Steps on the Huber loss of each token."""
    memory, out = np.zeros((x["V"].shape[1], x["K"].shape[1])), []
    for t, (k, v, d) in enumerate(zip(x["K"], x["V"], x["DELTA"], strict=True)):
        step = gradient(lambda w, k=k, v=v, d=d: _huber(w @ k - v, d), memory)  # type: ignore[misc]
        memory = x["ALPHA"][t] * memory - x["ETA"][t] * step
        out.append(memory @ x["Q"][t])
    return {"O": np.stack(out)}


def memora(x: Inputs) -> Outputs:
    """Rows to the power of what is kept, times the exponential of the step, made to sum to 1."""
    memory, out = x["W0"], []
    for t, (k, v) in enumerate(zip(x["K"], x["V"], strict=True)):
        step = gradient(lambda w, k=k, v=v: np.sum((w @ k - v) ** 2), memory)  # type: ignore[misc]
        memory = memory ** x["ALPHA"][t] * np.exp(-x["ETA"][t] * step)
        memory = memory / memory.sum(axis=1, keepdims=True)
        out.append(memory @ x["Q"][t])
    return {"O": np.stack(out)}


def ttt_linear(x: Inputs) -> Outputs:
    """Steps on half the squared distance between x + LN(x W) of the key and the value, then the query through it."""

    def model(token: Array, w: NDArray[Any]) -> NDArray[Any]:
        z = token @ w
        z = z - np.mean(z)
        return np.asarray(token + x["GA"] * z / np.sqrt(np.mean(z**2) + 1e-6) + x["BE"])

    memory, out = x["W0"], []
    for t, (k, v) in enumerate(zip(x["K"], x["V"], strict=True)):
        step = gradient(lambda w, k=k, v=v: np.sum((model(k, w) - v) ** 2) / 2, memory)  # type: ignore[misc]
        memory = memory - x["ETA"][t] * step
        out.append(model(x["Q"][t], memory))
    return {"O": np.stack(out)}


CLOSED_FORMS: dict[str, Closed] = {
    "titans": titans,
    "titans_chunk": titans_chunk,
    "moneta": moneta,
    "yaad": yaad,
    "memora": memora,
    "ttt_linear": ttt_linear,
}
