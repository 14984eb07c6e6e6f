"""Closed forms with a linear system, a fit by least squares, or a threshold to be found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from einsumcascade.reference.closed_forms.parts import Array, Closed, Inputs, Outputs, causal, scores, softmax


def _delta(x: Inputs, gate: Array) -> Array:
    """The gated delta rule as one triangular system over all steps."""
    total = np.cumsum(np.log(gate))
    decay = np.tril(np.exp(np.minimum(total[:, None] - total[None, :], 0.0)))
    lower = np.tril(x["BETA"][:, None] * (x["K"] @ x["K"].T) * decay, -1)
    update = np.linalg.solve(np.eye(len(gate)) + lower, x["BETA"][:, None] * x["V"])
    return np.asarray((x["Q"] @ x["K"].T * decay) @ update)


def deltanet(x: Inputs) -> Outputs:
    """Every new value is what its key did not hold yet."""
    return {"O": _delta(x, np.asarray(x["G"]))}


def deltanet_chunk(x: Inputs, *, c0: int = 6) -> Outputs:
    """As `deltanet`; chunks change the shape alone."""
    return {"O": _delta(x, np.exp(x["LG"])).reshape(-1, c0, x["V"].shape[1])}


def rwkv7(x: Inputs) -> Outputs:
    """The state as a sum of outer products, each moved by the later transitions."""
    steps, e = x["K"].shape
    out = np.zeros((steps, x["V"].shape[1]))
    for t in range(steps):
        row = x["R"][t]
        for s in range(t, -1, -1):
            out[t] += (row @ x["K"][s]) * x["V"][s]
            row = row @ (np.diag(x["W"][s]) - np.outer(x["KK"][s] * x["A"][s], x["KK"][s]))
    assert e == len(row)
    return {"O": out}


def sessa(x: Inputs) -> Outputs:
    """y = f + gamma * weights y, solved densely."""
    p = x["Q"].shape[1]
    score = x["Q"] @ np.swapaxes(x["K"], 1, 2) / np.sqrt(x["Q"].shape[2])
    mixed = np.einsum("hpf,hfd->pd", softmax(score, mask=causal(p, p)) @ x["V"], x["WO"])
    back = softmax(x["QB"] @ x["KB"].T / np.sqrt(x["QB"].shape[1]), mask=causal(p, p, strict=True))
    return {"Y": np.linalg.solve(np.eye(p) - x["GAM"][:, None] * back, mixed)}


def deltaformer(x: Inputs) -> Outputs:
    """u = v - beta * weights u, solved densely; then causal attention to u."""
    p = len(x["Q"])
    score = x["Q"] @ x["K"].T / np.sqrt(x["Q"].shape[1])
    earlier = softmax(score, mask=causal(p, p, strict=True))
    u = np.linalg.solve(np.eye(p) + x["BETA"][:, None] * earlier, x["V"])
    return {"O": softmax(score, mask=causal(p, p)) @ u}


def path(x: Inputs) -> Outputs:
    """Pair by pair: the key through every factor I - beta w w' after it up to the query, then a causal softmax."""
    p, e = x["Q"].shape
    s = np.full((p, p), -np.inf)
    for m in range(p):
        key = x["K"][m]
        for q in range(m, p):
            if q > m:
                key = key - x["BETA"][q] * x["W"][q] * (x["W"][q] @ key)
            s[q, m] = x["Q"][q] @ key / np.sqrt(e)
    return {"AV": softmax(s) @ x["V"]}


def _intercepts(x: Inputs, features: Callable[[Array], Array]) -> Outputs:
    """For each query, the constant of a fit of the past values by least squares.

    The weight of a key is its softmax weight with that of the best key as 1; `features` takes the offsets of the keys
    `(M, E)`; their coefficients, not the constant, cost `LAM[p]` times their squares.
    """
    out = []
    for p, row in enumerate(scores(x)):
        past = slice(p + 1)
        weight = np.exp(row[past] - row[past].max())
        basis = features(x["K"][past] - x["Q"][p])
        n = basis.shape[1]
        root = np.sqrt(weight)[:, None]
        rows = np.hstack([root, root * basis])
        ridge = np.hstack([np.zeros((n, 1)), np.sqrt(x["LAM"][p]) * np.eye(n)])
        values = np.vstack([root * x["V"][past], np.zeros((n, x["V"].shape[1]))])
        out.append(np.linalg.lstsq(np.vstack([rows, ridge]), values, rcond=None)[0][0])
    return {"O": np.stack(out)}


def lla(x: Inputs) -> Outputs:
    """Local linear attention: the features are the offsets themselves."""
    return _intercepts(x, lambda offset: offset)


def local_quadratic(x: Inputs) -> Outputs:
    """Offsets and the products of all pairs of their coordinates."""
    return _intercepts(x, lambda d: np.hstack([d, (d[:, :, None] * d[:, None, :]).reshape(len(d), -1)]))


def mesa(x: Inputs) -> Outputs:
    """At each step, the query solved against the decayed covariance of the keys so far."""
    steps, e = x["K"].shape
    total = np.cumsum(np.log(x["G"]))
    out = np.zeros((steps, x["V"].shape[1]))
    for t in range(steps):
        weight = x["BETA"][: t + 1] * np.exp(total[t] - total[: t + 1])
        past = x["K"][: t + 1]
        matrix = past.T @ (weight[:, None] * past) + np.diag(x["LAM"])
        out[t] = np.linalg.inv(matrix) @ x["Q"][t] @ (past.T @ (weight[:, None] * x["V"][: t + 1]))
    assert e == len(x["LAM"])
    return {"O": out}


def _beyond(x: Inputs, threshold: Callable[[Array], float], *, scale: float, power: int) -> Outputs:
    """Weights that are powers of what scaled scores of the past exceed a threshold by; it sees them sorted."""
    out = np.zeros((len(x["Q"]), x["V"].shape[1]))
    for p, row in enumerate(scores(x) * scale):
        past = row[: p + 1]
        weight = np.maximum(past - threshold(np.sort(past)[::-1]), 0.0) ** power
        out[p] = weight @ x["V"][: p + 1] / weight.sum()
    return {"O": out}


def sparsemax(x: Inputs) -> Outputs:
    """The nearest point of the simplex to the scores: as many as stay positive share what is beyond 1."""

    def threshold(high: Array) -> float:
        sums = np.cumsum(high)
        support = int((1 + np.arange(1, len(high) + 1) * high > sums).sum())
        return float((sums[support - 1] - 1) / support)

    return _beyond(x, threshold, scale=1.0, power=1)


def entmax15(x: Inputs) -> Outputs:
    """Squares of half the scores less a threshold: the root of a quadratic for the number of scores above it."""

    def threshold(high: Array) -> float:
        for k in range(1, len(high) + 1):
            # The k largest alone: their mean less what makes the squares sum to 1.
            spare = 1 / k - float(np.var(high[:k]))
            found = float(high[:k].mean() - np.sqrt(max(spare, 0.0)))
            if spare >= 0 and (k == len(high) or high[k] <= found):
                return found
        raise AssertionError("some number of scores lies above its threshold, and the next below")

    return _beyond(x, threshold, scale=0.5, power=2)


CLOSED_FORMS: dict[str, Closed] = {
    "deltanet": deltanet,
    "deltanet_chunk": deltanet_chunk,
    "rwkv7": rwkv7,
    "sessa": sessa,
    "deltaformer": deltaformer,
    "path": path,
    "lla_1p": lla,
    "lla_cg": lla,
    "local_quadratic": local_quadratic,
    "mesa": mesa,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
}
