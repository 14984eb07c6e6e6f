"""Closed forms of the gallery in plain NumPy: textbook formulas, no streaming, no code of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Inputs = Mapping[str, Array]
Closed = Callable[[Inputs], dict[str, Array]]


def scores(x: Inputs) -> Array:
    """Scale and contract: `(B, H, P, M)`."""
    q = x["Q"]
    return q @ np.swapaxes(x["K"], -1, -2) / np.sqrt(q.shape[-1])


def softmax(s: Array) -> Array:
    """Normalise over the last axis; a row of -inf gives zeros."""
    top = np.max(s, axis=-1, keepdims=True)
    weights = np.exp(s - np.where(np.isfinite(top), top, 0.0))
    total = np.sum(weights, axis=-1, keepdims=True)
    return weights / np.where(total == 0.0, 1.0, total)


def distance(x: Inputs) -> Array:
    """Query position less key position, `(P, M)`."""
    return np.arange(x["Q"].shape[-2])[:, None] - np.arange(x["K"].shape[-2])[None, :]


def attention(x: Inputs) -> dict[str, Array]:
    """Softmax attention."""
    return {"AV": softmax(scores(x)) @ x["V"]}


def softmax_lse(x: Inputs) -> dict[str, Array]:
    """Softmax attention and the logarithm of its denominator."""
    return {**attention(x), "LSE": np.logaddexp.reduce(scores(x), axis=-1)}


def gqa(x: Inputs) -> dict[str, Array]:
    """Every head of the queries with its own copy of the shared keys and values."""
    heads = x["Q"].shape[2]
    shared = {name: np.repeat(x[name][:, :, None], heads, axis=2) for name in ("K", "V")}
    return attention({"Q": x["Q"], **shared})


def sliding_window(x: Inputs) -> dict[str, Array]:
    """Softmax over the 256 keys that end at the query's own."""
    d = distance(x)
    return {"AV": softmax(np.where((d >= 0) & (d < 256), scores(x), -np.inf)) @ x["V"]}


def alibi(x: Inputs) -> dict[str, Array]:
    """A bias that falls with the distance, of either sign."""
    return {"AV": softmax(scores(x) - x["SLOPE"][:, None, None] * np.abs(distance(x))) @ x["V"]}


def softcap(x: Inputs) -> dict[str, Array]:
    """Scores squeezed into (-30, 30)."""
    return {"AV": softmax(30.0 * np.tanh(scores(x) / 30.0)) @ x["V"]}


def sink(x: Inputs) -> dict[str, Array]:
    """One more key, whose score is the head's and whose value is zero."""
    s = scores(x)
    extra = np.broadcast_to(x["SINK"][:, None, None], (*s.shape[:-1], 1))
    return {"AV": softmax(np.concatenate([s, extra], axis=-1))[..., :-1] @ x["V"]}


def gated(x: Inputs) -> dict[str, Array]:
    """The output times a sigmoid."""
    return {"AV": attention(x)["AV"] * (0.5 + 0.5 * np.tanh(x["GT"] / 2))}


def sigmoid(x: Inputs) -> dict[str, Array]:
    """Sigmoids of the scores less log M."""
    s = scores(x) - np.log(x["K"].shape[-2])
    return {"AV": (0.5 + 0.5 * np.tanh(s / 2)) @ x["V"]}


def relu(x: Inputs) -> dict[str, Array]:
    """Positive scores over M."""
    return {"AV": np.clip(scores(x), 0.0, None) @ x["V"] / x["K"].shape[-2]}


def linear(x: Inputs) -> dict[str, Array]:
    """The quadratic form: weights phi(q) . phi(k), normalised."""
    q, k = (np.where(t > 0, t + 1, np.exp(np.minimum(t, 0))) for t in (x["Q"], x["K"]))
    weights = q @ np.swapaxes(k, -1, -2)
    return {"AV": weights / weights.sum(axis=-1, keepdims=True) @ x["V"]}


CLOSED_FORMS: dict[str, Closed] = {
    "alibi": alibi,
    "cross_attention": attention,
    "gated": gated,
    "gqa": gqa,
    "linear": linear,
    "relu": relu,
    "sigmoid": sigmoid,
    "sink": sink,
    "sliding_window": sliding_window,
    "softcap": softcap,
    "softmax_1p": attention,
    "softmax_2p": attention,
    "softmax_attention": attention,
    "softmax_lse": softmax_lse,
}
