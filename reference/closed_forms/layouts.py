"""Closed forms of softmax attention over more axes, more keys, relative places, or keys and values in few bits."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import (
    Closed,
    Inputs,
    Outputs,
    attention,
    causal,
    causal_of,
    distance,
    scores,
    sigmoid,
    softmax,
)


def persistent(x: Inputs) -> Outputs:
    """Persistent and ordinary keys in one list; the mask hides later ones of the second kind alone."""
    n = x["KP"].shape[1]
    seen = np.hstack([np.ones((x["Q"].shape[1], n), dtype=bool), causal_of(x)])
    keys, values = (np.concatenate([x[f"{name}P"], x[name]], axis=1) for name in ("K", "V"))
    return {"AV": attention(x["Q"], keys, values, mask=seen)}


def t5bias(x: Inputs) -> Outputs:
    """The bias of the bucket of the distance: one each up to 15, then 16 that widen by a factor 8 ** (1/16)."""
    edges = 16 * 8 ** (np.arange(1, 16) / 16)
    lag = np.maximum(distance(x), 0)
    bucket = np.where(lag < 16, lag, 16 + np.searchsorted(edges, lag, side="right"))
    s = scores(x) * np.sqrt(x["Q"].shape[-1]) + x["BIAS"][:, bucket]
    return {"AV": softmax(s, mask=causal_of(x)) @ x["V"]}


def swinbias(x: Inputs) -> Outputs:
    """All pixels of a window in one list, with a matrix of biases looked up pair by pair."""
    w, h, rows, columns, e = x["Q"].shape
    i, j = x["K"].shape[2:4]
    bias = np.zeros((h, rows, columns, i, j))
    for y, c, k, n in np.ndindex(rows, columns, i, j):
        bias[:, y, c, k, n] = x["BIAS"][:, y - k + i - 1, c - n + j - 1]
    s = x["Q"].reshape(w, h, -1, e) @ np.swapaxes(x["K"].reshape(w, h, -1, e), -1, -2) / np.sqrt(e)
    out = softmax(s + bias.reshape(h, rows * columns, i * j)) @ x["V"].reshape(w, h, i * j, -1)
    return {"AV": out.reshape(w, h, rows, columns, -1)}


def quantised_kv(x: Inputs) -> Outputs:
    """Scores and sums of the whole numbers, scale and zero point applied to them afterwards."""
    q, e = x["Q"], x["Q"].shape[-1]
    raw = np.einsum("grpe,gme->grpm", q, x["KI"]) - q.sum(axis=-1)[..., None] * x["KZ"][:, None, None, :]
    s = raw * x["KS"][:, None, None, :] / np.sqrt(e)
    weights = softmax(s, mask=causal(s.shape[-2], s.shape[-1])) * x["VS"][:, None, None, :]
    out = np.einsum("grpm,gmf->grpf", weights, x["VI"])
    return {"AV": out - np.sum(weights * x["VZ"][:, None, None, :], axis=-1)[..., None]}


def khop(x: Inputs, *, w: int = 6, steps: int = 4) -> Outputs:
    """Ring by ring: the weight of the keys on it, averaged over the queries."""
    weights = softmax(scores(x))
    heads, p, m = weights.shape
    out = np.zeros((heads, steps))
    for q, k in np.ndindex(p, m):
        (y, c), (i, j) = divmod(q, w), divmod(k, w)
        ring = max(abs(y - i), abs(c - j))
        if ring < steps:
            out[:, ring] += weights[:, q, k] / p
    return {"ST": out}


def mptsnet(x: Inputs) -> Outputs:
    """Period by period: the sequence filled up with zeros, folded, attended row to row, unfolded and cut."""
    t, c = x["Q"].shape
    out = np.zeros((t, c))
    for period, share in zip(x["PER"].astype(int), softmax(x["AMP"]), strict=True):
        full = -(-t // period) * period
        q, k, v = (np.vstack([x[n], np.zeros((full - t, c))]).reshape(-1, period * c) for n in ("Q", "K", "V"))
        out += share * attention(q, k, v).reshape(full, c)[:t]
    return {"O": out}


def axial(x: Inputs) -> Outputs:
    """Attention over the nodes of each moment, causal attention over the moments of each node, mixed by a gate."""
    over_nodes = attention(x["QS"], x["KS"], x["VS"])
    q, k, v = (np.swapaxes(x[name], 1, 2) for name in ("QT", "KT", "VT"))
    over_time = np.swapaxes(attention(q, k, v, mask=causal(q.shape[2], q.shape[2])), 1, 2)
    gate = sigmoid(x["Z"])
    return {"O": gate * over_nodes + (1 - gate) * over_time}


def sahp(x: Inputs) -> Outputs:
    """A causal softmax of exp(q . k) over the root of E."""
    root = np.sqrt(x["Q"].shape[-1])
    return {"AV": softmax(np.exp(scores(x) * root) / root, mask=causal_of(x)) @ x["V"]}


def pooling(x: Inputs) -> Outputs:
    """The mean over time under the softmax of `K W`."""
    return {"AV": (softmax(x["K"] @ x["W"])[:, None, :] @ x["V"])[:, 0]}


def feedback(x: Inputs) -> Outputs:
    """Attention to the same keys, round after round, added to the query."""
    state = x["Q"]
    for _ in x["NIT"]:
        state = state + attention(state, x["K"], x["V"])
    return {"O": state}


CLOSED_FORMS: dict[str, Closed] = {
    "persistent": persistent,
    "t5bias": t5bias,
    "swinbias": swinbias,
    "quantised_kv": quantised_kv,
    "khop": khop,
    "mptsnet": mptsnet,
    "axial": axial,
    "sahp": sahp,
    "pooling": pooling,
    "feedback": feedback,
}
