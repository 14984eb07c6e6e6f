"""Closed forms of recurrences, as sums over the past instead of steps."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import Array, Closed, Inputs, Outputs, sigmoid, softmax


def _decayed(q: Array, k: Array, v: Array, log_gate: Array) -> Array:
    """Row t: the sum over s <= t of (q[t] * exp(G[t] - G[s])) . k[s] times v[s], G the running sum of `log_gate`."""
    total = np.cumsum(log_gate, axis=0)
    out = np.zeros((len(q), v.shape[1]))
    for t in range(len(q)):
        weight = (q[t] * np.exp(total[t] - total[: t + 1]) * k[: t + 1]).sum(axis=1)
        out[t] = weight @ v[: t + 1]
    return out


def gla(x: Inputs) -> Outputs:
    """Products of gates between a key and the query that reads it."""
    return {"O": _decayed(x["Q"], x["K"], x["V"], np.log(x["G"]))}


def gla_chunk(x: Inputs, *, c0: int = 6) -> Outputs:
    """As `gla`, one log gate for all of E; chunks change the shape alone."""
    gates = np.broadcast_to(x["LG"][:, None], x["K"].shape)
    return {"O": _decayed(x["Q"], x["K"], x["V"], gates).reshape(-1, c0, x["V"].shape[1])}


def retention(x: Inputs) -> Outputs:
    """Head by head: inner products times the head's constant to the power of the distance."""
    tokens = np.arange(x["Q"].shape[1])
    lag = tokens[:, None] - tokens
    out = []
    for q, k, v, gamma in zip(x["Q"], x["K"], x["V"], x["GAM"], strict=True):
        out.append((q @ k.T * np.where(lag >= 0, gamma ** np.maximum(lag, 0), 0.0)) @ v)
    return {"O": np.stack(out)}


def dsfnorm(x: Inputs) -> Outputs:
    """Causal linear attention, each row divided by its own normaliser."""
    lower = np.tril(x["Q"] @ x["K"].T)
    return {"O": lower @ x["V"] / np.exp(x["X"])[:, None]}


def _prefix_softmax(scores: Array, values: Array) -> Array:
    return np.stack([softmax(scores[: t + 1]) @ values[: t + 1] for t in range(len(scores))])


def aaren(x: Inputs) -> Outputs:
    """Softmax over each prefix, the query the same for all."""
    return {"O": _prefix_softmax(x["K"] @ x["QA"] / np.sqrt(len(x["QA"])), x["V"])}


def selfgate(x: Inputs) -> Outputs:
    """Softmax over each prefix, the score of a position its own."""
    own = (x["Q"] * sigmoid(x["Q"]) * x["K"]).sum(axis=1) / np.sqrt(x["Q"].shape[1])
    return {"O": _prefix_softmax(own, x["V"])}


def ctmsync(x: Inputs) -> Outputs:
    """Pair products weighted by their age, over the root of the weights; then attention."""
    pairs = x["Z"][:, x["IL"]] * x["Z"][:, x["IR"]]
    out = np.zeros((len(pairs), x["VX"].shape[1]))
    for t in range(len(pairs)):
        age = np.exp(-x["DEC"][None, :] * (t - np.arange(t + 1))[:, None])
        query = x["W"] @ ((age * pairs[: t + 1]).sum(axis=0) / np.sqrt(age.sum(axis=0)))
        out[t] = softmax(x["KX"] @ query / np.sqrt(len(query))) @ x["VX"]
    return {"O": out}


def s6(x: Inputs) -> Outputs:
    """Each input times the product of the decays after it."""
    steps = len(x["U"])
    out = np.zeros(steps)
    for t in range(steps):
        for s in range(t + 1):
            out[t] += (x["C"][t] * np.prod(x["A"][s + 1 : t + 1], axis=0) * x["B"][s]).sum() * x["U"][s]
    return {"Y": out}


def fox(x: Inputs) -> Outputs:
    """Causal attention, each score less the log gates that closed between key and query."""
    p, m = len(x["Q"]), len(x["K"])
    bias = np.array([[x["LF"][j + 1 : i + 1].sum() if j <= i else -np.inf for j in range(m)] for i in range(p)])
    score = x["Q"] @ x["K"].T / np.sqrt(x["Q"].shape[1]) + bias
    return {"AV": softmax(score, mask=np.isfinite(bias)) @ x["V"]}


def stickbreak(x: Inputs) -> Outputs:
    """A key's share is sigmoid(score) of what the keys between it and the query left over."""
    p, m = len(x["Q"]), len(x["K"])
    score = x["Q"] @ x["K"].T / np.sqrt(x["Q"].shape[1])
    weight = np.zeros((p, m))
    for i in range(p):
        left = np.ones(())
        for j in range(min(i, m - 1), -1, -1):
            weight[i, j] = left * sigmoid(score[i, j])
            left *= sigmoid(-score[i, j])
    return {"AV": weight @ x["V"]}


def flow_causal(x: Inputs) -> Outputs:
    """Flows of each prefix, each sum over the past written out."""
    eps, q, k = 1e-6, sigmoid(x["Q"]), sigmoid(x["K"])
    n = np.arange(1, len(q) + 1)
    incoming = ((q + eps) * (np.cumsum(k, axis=0) + eps)).sum(axis=1)
    outgoing = ((k + eps) * (np.cumsum(q, axis=0) + eps)).sum(axis=1)
    key_flow = np.cumsum(k * (n / outgoing)[:, None], axis=0)
    query_flow = np.cumsum(q * (n / incoming)[:, None], axis=0)
    conserved_in = ((q + eps) * (key_flow + eps)).sum(axis=1) / n
    conserved_out = ((k + eps) * (query_flow + eps)).sum(axis=1) / n
    weight = np.exp(np.clip(conserved_out, -1, 1))
    share = weight / np.cumsum(weight) * n
    mixed = np.tril((q / incoming[:, None]) @ (k * share[:, None]).T) @ x["V"]
    return {"O": mixed * sigmoid(conserved_in)[:, None]}


def abc_causal(x: Inputs) -> Outputs:
    """Slots of each prefix by a softmax over it, then a softmax over the slots."""
    out = np.zeros((len(x["Q"]), x["V"].shape[1]))
    for t in range(len(out)):
        keys = softmax(x["AK"][: t + 1].T) @ x["K"][: t + 1]
        values = softmax(x["AVS"][: t + 1].T) @ x["V"][: t + 1]
        out[t] = softmax(keys @ x["Q"][t] / np.sqrt(x["Q"].shape[1])) @ values
    return {"O": out}


CLOSED_FORMS: dict[str, Closed] = {
    "gla": gla,
    "gla_chunk": gla_chunk,
    "retention": retention,
    "dsfnorm": dsfnorm,
    "aaren": aaren,
    "selfgate": selfgate,
    "ctmsync": ctmsync,
    "s6": s6,
    "fox": fox,
    "stickbreak": stickbreak,
    "flow_causal": flow_causal,
    "abc_causal": abc_causal,
}
