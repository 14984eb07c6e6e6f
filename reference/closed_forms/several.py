"""Closed forms with several softmaxes, several sources of keys, classes of keys, or heads that mix."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import (
    Closed,
    Inputs,
    Outputs,
    attention,
    causal_of,
    rms_norm,
    scores,
    softmax,
)


def diff(x: Inputs, *, li: float = 0.8) -> Outputs:
    """A sum of attentions with weights `LAM (S,)`, over its root mean square, times `1 - li`."""
    mask = causal_of(x)
    total = sum(lam * attention(q, k, x["V"], mask=mask) for lam, q, k in zip(x["LAM"], x["Q"], x["K"], strict=True))
    return {"Y": (1 - li) * rms_norm(np.asarray(total), eps=1e-5)}


def gda(x: Inputs, *, lam: float = 0.37) -> Outputs:
    """In each group, every signal head less `lam` times the one noise head."""
    mask = causal_of(x)
    out = np.empty((*x["Q"].shape[:-1], x["V"].shape[-1]))
    for g, r in np.ndindex(*x["Q"].shape[:2]):
        signal = attention(x["Q"][g, r], x["K"][g, r], x["V"][g], mask=mask)
        out[g, r] = signal - lam * attention(x["QN"][g], x["KN"][g], x["V"][g], mask=mask)
    return {"O": out}


def ebt(x: Inputs) -> Outputs:
    """Position by position: the observed past and the position's own predicted key under one softmax."""
    heads, p, e = x["QP"].shape
    out = np.empty((heads, p, x["VP"].shape[-1]))
    for h, q in np.ndindex(heads, p):
        keys = np.concatenate([x["KO"][h, : q + 1], x["KP"][h, q : q + 1]])
        values = np.concatenate([x["VO"][h, : q + 1], x["VP"][h, q : q + 1]])
        out[h, q] = softmax(keys @ x["QP"][h, q] / np.sqrt(e)) @ values
    return {"AV": out}


def moh(x: Inputs, *, k: int = 2) -> Outputs:
    """Token by token: the k most probable heads, their probabilities made to sum to k, beside all shared heads."""
    p, d = x["LG"].shape[1], x["WO"].shape[-1]
    out = np.zeros((p, d))
    shared_share, routed_share = 2 * softmax(x["LB"].T).T
    for token in range(p):
        shared = softmax(x["LS"][:, token])
        for s, weight in enumerate(shared * len(shared)):
            out[token] += shared_share[token] * weight * (x["AVS"][s, token] @ x["WOS"][s])
        chance = softmax(x["LG"][:, token])
        best = sorted(range(len(chance)), key=lambda h: (-chance[h], h))[:k]
        for h in best:
            weight = k * chance[h] / sum(chance[b] for b in best)
            out[token] += routed_share[token] * weight * (x["AV"][h, token] @ x["WO"][h])
    return {"Y": out}


def var(x: Inputs, *, pk: float = 0.6, rho: float = 0.5, tot: float = 0.2) -> Outputs:
    """Weights changed row by row: where a row looks at the image and not mainly at its sinks, sinks keep `pk`.

    What the sinks lose, the other visual keys gain in proportion to their weights.
    """
    weights = softmax(scores(x), mask=causal_of(x))
    kind = x["CLS"]
    for row in np.ndindex(weights.shape[:-1]):
        w = weights[row]
        text_sink, visual_sink, visual = (w[kind == c].sum() for c in (1, 2, 3))
        image = visual_sink + visual
        if visual > 0 and visual_sink <= rho * image and image >= tot:
            w[kind == 3] *= 1 + (1 - pk) * (text_sink + visual_sink) / visual
            w[(kind == 1) | (kind == 2)] *= pk
    return {"AV": weights @ x["V"]}


def vhd(x: Inputs, *, alpha: float = 2.0) -> Outputs:
    """Distance of each head's output from the one without image keys; the heads that move most gain `alpha`.

    Heads beyond the mean by more than a standard deviation count as not moving at all.
    """
    full = attention(x["Q"][:, None], x["K"], x["V"])[:, 0]
    text = x["IMG"] == 0
    blind = attention(x["Q"][:, None], x["K"][:, text], x["V"][:, text])[:, 0]
    moved = np.sqrt(np.square(full - blind).sum(axis=-1))
    kept = np.where(moved > moved.mean() + moved.std(), 0.0, moved)
    heads = len(kept)
    gain = [alpha if sum(other > own for other in kept) < heads // 2 else 1.0 for own in kept]
    return {"Y": np.array(gain)[:, None] * full, "VHD": moved}


def parallax(x: Inputs) -> Outputs:
    """The mean of the values under the softmax less their covariance with a second score `R K'`."""
    weights = softmax(scores(x), mask=causal_of(x))
    mean = weights @ x["V"]
    second = x["R"] @ np.swapaxes(x["K"], -1, -2)
    centred = second - np.sum(weights * second, axis=-1, keepdims=True)
    return {"AV": mean - (weights * centred) @ x["V"]}


def pave(x: Inputs) -> Outputs:
    """Query by query: the sampled rows of all frames in one list, averaged under one softmax."""
    p, frames, samples = x["W"].shape
    out = np.empty((p, x["VAL"].shape[-1]))
    for q in range(p):
        rows = np.array([x["VAL"][t, int(x["IDX"][q, t, n])] for t, n in np.ndindex(frames, samples)])
        out[q] = softmax(x["W"][q].ravel()) @ rows
    return {"AV": out}


CLOSED_FORMS: dict[str, Closed] = {
    "diff": diff,
    "gda": gda,
    "ebt": ebt,
    "moh": moh,
    "var": var,
    "vhd": vhd,
    "parallax": parallax,
    "pave": pave,
}
