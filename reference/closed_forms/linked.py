"""Closed forms with a softmax over another rank, or several that feed each other."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import Closed, Inputs, Outputs, logsumexp, sigmoid, softmax


def flow(x: Inputs) -> Outputs:
    """Flow in and out of every token, normalised by the other side's."""
    eps, q, k = 1e-6, sigmoid(x["Q"]), sigmoid(x["K"])
    incoming = (q + eps) @ (k.sum(axis=0) + eps)
    outgoing = (k + eps) @ (q.sum(axis=0) + eps)
    conserved_in = (q + eps) @ ((k / outgoing[:, None]).sum(axis=0) + eps) * len(q) / len(k)
    conserved_out = (k + eps) @ ((q / incoming[:, None]).sum(axis=0) + eps)
    share = softmax(np.clip(conserved_out, -1, 1)) * len(k)
    out = (q / incoming[:, None]) @ (k.T @ (x["V"] * share[:, None]))
    return {"O": out * sigmoid(conserved_in)[:, None]}


def landmark(x: Inputs, *, m0: int = 4) -> Outputs:
    """Query by query: weights within each block from its other tokens, weights of blocks from their last tokens."""
    score = x["Q"] @ x["K"].T / np.sqrt(x["Q"].shape[1])
    out = np.zeros((len(x["Q"]), x["V"].shape[1]))
    for p in range(len(out)):
        own, groups, logits = p // m0, [], []
        for b in range(own):
            inner = slice(b * m0, b * m0 + m0 - 1)
            groups.append(softmax(score[p, inner]) @ x["V"][inner])
            logits.append(score[p, b * m0 + m0 - 1])
        # The tokens of the own block stand beside the landmarks; its own landmark does not.
        for j in range(own * m0, min(own * m0 + m0 - 1, p + 1)):
            groups.append(x["V"][j])
            logits.append(score[p, j])
        out[p] = softmax(np.array(logits)) @ np.array(groups)
    return {"O": out}


def slot(x: Inputs) -> Outputs:
    """Every key divides itself among the slots; a slot is the mean of what it got."""
    share = softmax((x["K"] @ x["Q"].T) / np.sqrt(x["Q"].shape[1])).T + 1e-8
    return {"U": share @ x["V"] / share.sum(axis=1, keepdims=True)}


def abc(x: Inputs) -> Outputs:
    """Slots by a softmax over the keys, then a softmax over the slots."""
    keys, values = softmax(x["AK"].T) @ x["K"], softmax(x["AW"].T) @ x["V"]
    return {"O": softmax(x["Q"] @ keys.T / np.sqrt(x["Q"].shape[1])) @ values}


def nystrom(x: Inputs, *, g: int = 4) -> Outputs:
    """softmax(Q Kl) inverse(softmax(Ql Kl)) softmax(Ql K) V, with means of segments for Ql and Kl."""
    e = x["Q"].shape[1]
    ql, kl = (np.stack([s.mean(axis=0) for s in np.split(x[n][: len(x["Q"])], g)]) for n in ("Q", "K"))
    first, middle, last = (softmax(a @ b.T / np.sqrt(e)) for a, b in ((x["Q"], kl), (ql, kl), (ql, x["K"])))
    return {"O": first @ np.linalg.inv(middle) @ (last @ x["V"])}


def lara(x: Inputs) -> Outputs:
    """Values by landmark; landmarks weighted by how well they and the query explain each other."""
    e = x["Q"].shape[1]
    norm = {n: (x[n] ** 2).sum(axis=1) / (2 * np.sqrt(e)) for n in ("Q", "K", "MU")}
    keys = x["MU"] @ x["K"].T / np.sqrt(e) - norm["K"]
    queries = x["MU"] @ x["Q"].T / np.sqrt(e)
    weight = softmax((2 * queries - norm["Q"] + (logsumexp(keys) - norm["MU"])[:, None]).T)
    return {"O": weight @ (softmax(keys) @ x["V"])}


def longshort(x: Inputs, *, w: int = 3) -> Outputs:
    """Compressed keys beside those of the window, under one softmax."""
    share = softmax(x["CP"].T)
    keys, values = np.concatenate([share @ x["K"], x["K"]]), np.concatenate([share @ x["V"], x["V"]])
    near = np.abs(np.arange(len(x["Q"]))[:, None] - np.arange(len(x["K"]))[None, :]) <= w
    seen = np.concatenate([np.ones((len(x["Q"]), len(share)), dtype=bool), near], axis=1)
    return {"O": softmax(x["Q"] @ keys.T / np.sqrt(x["Q"].shape[1]), mask=seen) @ values}


def gman(x: Inputs, *, g: int = 3) -> Outputs:
    """Self attention within each group, and among the groups' maxima."""
    root = np.sqrt(x["X"].shape[1])
    local = np.stack([softmax(s @ s.T / root) @ s for s in np.split(x["X"], g)])
    pooled = local.max(axis=1)
    return {"O": local + (softmax(pooled @ pooled.T / root) @ pooled)[:, None, :]}


CLOSED_FORMS: dict[str, Closed] = {
    "flow": flow,
    "landmark": landmark,
    "slot": slot,
    "abc": abc,
    "nystrom": nystrom,
    "lara": lara,
    "longshort": longshort,
    "gman": gman,
}
