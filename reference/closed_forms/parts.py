"""What closed forms are made of: masks, softmax, attention, norms.

Arrays have any leading axes that broadcast; queries are `(..., P, E)`, keys `(..., M, E)`, values `(..., M, F)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Inputs = Mapping[str, NDArray[Any]]
Outputs = dict[str, Array]
# Inputs by name, then constants of the text as keywords.
Closed = Callable[..., Outputs]


def causal(p: int, m: int, *, window: int | None = None, strict: bool = False) -> NDArray[np.bool_]:
    """Which keys a query sees.

    Args:
        p, m: numbers of queries and keys.
        window: how many keys back, the query's own position included; None: all.
        strict: whether the query's own position is hidden; a window then counts from the position before.

    Returns: truth values of shape `(P, M)`.
    """
    distance = np.arange(p)[:, None] - np.arange(m)[None, :]
    seen = distance >= (1 if strict else 0)
    if window is not None:
        seen = seen & (distance < window + (1 if strict else 0))
    return np.asarray(seen)


def scores(x: Inputs) -> Array:
    """Inner products of `Q` and `K` over the root of E, `(..., P, M)`."""
    return np.asarray(x["Q"] @ np.swapaxes(x["K"], -1, -2) * x["Q"].shape[-1] ** -0.5)


def distance(x: Inputs) -> Array:
    """Position in `Q` less position in `K`, `(P, M)`."""
    return np.asarray(np.arange(x["Q"].shape[-2])[:, None] - np.arange(x["K"].shape[-2])[None, :])


def causal_of(x: Inputs, *, window: int | None = None) -> NDArray[np.bool_]:
    """Which rows of `K` each row of `Q` sees: those up to its own position, or the last `window` of them."""
    return causal(x["Q"].shape[-2], x["K"].shape[-2], window=window)


def sigmoid(x: ArrayLike) -> Array:
    """`1 / (1 + exp(-x))`, exact for numbers of any size."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=np.float64))))


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> Array:
    """A quotient that is 0 where both are 0."""
    n, d = np.broadcast_arrays(np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64))
    none = (n == 0) & (d == 0)
    return np.asarray(np.where(none, 0.0, n / np.where(none, 1.0, d)))


def softmax(scores: ArrayLike, *, mask: ArrayLike | None = None, extra: ArrayLike | None = None) -> Array:
    """Softmax over the last axis; a row with nothing to weigh gives zeros.

    Args:
        scores: `(..., M)`.
        mask: where a score counts, broadcast to the scores.
        extra: one more score a row `(...)`, which takes weight and gives none (a sink).

    Returns: weights of the shape of the scores.
    """
    s = np.asarray(scores, dtype=np.float64)
    if mask is not None:
        s = np.where(mask, s, -np.inf)
    if s.shape[-1] == 0:
        return s
    top = s.max(axis=-1, keepdims=True)
    if extra is not None:
        more = np.asarray(extra, dtype=np.float64)[..., None]
        top = np.maximum(top, more)
    top = np.where(np.isfinite(top), top, 0.0)
    weight = np.exp(s - top)
    total = weight.sum(axis=-1, keepdims=True)
    if extra is not None:
        total = total + np.exp(more - top)
    return np.asarray(np.divide(weight, total, out=np.zeros_like(weight), where=total != 0))


def logsumexp(scores: ArrayLike) -> Array:
    """Log of the sum of exponentials over the last axis; -inf where all are -inf."""
    s = np.asarray(scores, dtype=np.float64)
    top = s.max(axis=-1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(s - safe[..., None]).sum(axis=-1)) + safe)


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float | None = None,
    mask: ArrayLike | None = None,
    sink: ArrayLike | None = None,
) -> Array:
    """Softmax attention.

    Args:
        q, k, v: queries, keys and values.
        scale: of the scores; None: `E ** -0.5`.
        mask: `(..., P, M)`, where a query sees a key; a query that sees none gives zeros.
        sink: `(..., P)` or broadcast to it: one more score that takes weight and gives no value.

    Returns: `(..., P, F)`.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    s = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    extra = None if sink is None else np.broadcast_to(np.asarray(sink, dtype=np.float64), s.shape[:-1])
    return softmax(s, mask=mask, extra=extra) @ v


def map_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, weight: Callable[[Array], Any], *, mask: ArrayLike | None = None
) -> Array:
    """Attention without a normaliser: `weight(q k / sqrt(E)) v`, masked weights zero. Returns `(..., P, F)`."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    w = np.asarray(weight(q @ np.swapaxes(k, -1, -2) * q.shape[-1] ** -0.5))
    return np.asarray((w if mask is None else np.where(mask, w, 0.0)) @ v)


def linear_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, mask: ArrayLike | None = None) -> Array:
    """Attention whose weights are the inner products themselves, `(q k) v`. Returns `(..., P, F)`."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    w = q @ np.swapaxes(k, -1, -2)
    return np.asarray((w if mask is None else np.where(mask, w, 0.0)) @ v)


def rotate(x: ArrayLike, angle: ArrayLike) -> Array:
    """Rotate the halves of the last axis of `(..., N, 2 J)` by angles `(N, J)`, pair `(j, j + J)` by angle j."""
    x, angle = np.asarray(x, dtype=np.float64), np.asarray(angle, dtype=np.float64)
    j = x.shape[-1] // 2
    z = (x[..., :j] + 1j * x[..., j:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def rms_norm(x: ArrayLike, *, eps: float, gain: ArrayLike = 1.0) -> Array:
    """Divide the last axis by its root mean square, `eps` inside the root."""
    x = np.asarray(x, dtype=np.float64)
    return np.asarray(x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * np.asarray(gain))
