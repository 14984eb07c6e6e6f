"""Closed forms of measures of causal attention weights."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import Array, Closed, Inputs, Outputs, causal_of, scores, softmax


def _weights(x: Inputs) -> Array:
    """Causal softmax weights `(H, P, M)`."""
    return softmax(scores(x), mask=causal_of(x))


def waad(x: Inputs, *, w: int = 4) -> Outputs:
    """Query by query: the mean distance under the weights, cut at `w`, averaged over the heads."""
    weights = _weights(x)
    _, p, m = weights.shape
    capped = np.array([[min(q - key, w) for key in range(m)] for q in range(p)])
    return {"WA": np.mean(np.sum(weights * capped, axis=-1), axis=0)}


def fai(x: Inputs, *, lo: int = 2, hi: int = 6) -> Outputs:
    """Key by key: the mean weight, over heads and the queries `lo` to `hi` positions later that exist; else 0."""
    weights = np.mean(_weights(x), axis=0)
    p, m = weights.shape
    out = np.zeros(m)
    for key in range(m):
        later = weights[key + lo : min(key + hi + 1, p), key]
        out[key] = later.mean() if later.size else 0.0
    return {"FA": out}


def entropy(x: Inputs) -> Outputs:
    """The entropy of each row of weights, and the sum of its squares."""
    weights = _weights(x)
    logs = np.log(np.where(weights > 0, weights, 1.0))
    return {"EN": -np.sum(weights * logs, axis=-1), "CO": np.sum(np.square(weights), axis=-1)}


def sinkscore(x: Inputs, *, epsk: float = 0.3) -> Outputs:
    """The mean weight of each key over the queries that see it, and the share of heads where it exceeds `epsk`."""
    weights = _weights(x)
    heads, _, m = weights.shape
    score = np.zeros((heads, m))
    for h, key in np.ndindex(heads, m):
        seen = weights[h, key:, key]
        score[h, key] = seen.mean() if seen.size else 0.0
    return {"SC": score, "RT": np.mean(score > epsk, axis=0)}


def gaze(x: Inputs) -> Outputs:
    """For each image key, how much weight it gains from one text query to the next, over all heads on average."""
    weights = _weights(x)
    heads, p, m = weights.shape
    out = np.zeros(m)
    for q in range(1, p):
        if x["TXT"][q] > 0 and x["TXT"][q - 1] > 0:
            for h, key in np.ndindex(heads, m):
                if x["IMG"][key] > 0:
                    out[key] += max(weights[h, q, key] - weights[h, q - 1, key], 0.0) / heads
    return {"SA": out}


CLOSED_FORMS: dict[str, Closed] = {
    "waad": waad,
    "fai": fai,
    "entropy": entropy,
    "sinkscore": sinkscore,
    "gaze": gaze,
}
