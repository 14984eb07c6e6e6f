"""Closed forms that select keys, queries or blocks by what the data say."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import Array, Closed, Inputs, Outputs, attention, scores, softmax


def largest(row: Array, count: int) -> list[int]:
    """Positions of the largest entries, ties to the lower position."""
    return sorted(range(len(row)), key=lambda j: (-row[j], j))[:count]


def sparsifiner(x: Inputs, *, i: int = 3, j: int = 4) -> Outputs:
    """Row by row: the best basis vectors, the keys they predict to matter, attention to those."""
    root = np.sqrt(x["Q"].shape[1])
    low = x["PN"].T @ (x["K"] @ x["WK"])
    basis = np.where(np.abs(x["BS"]) > 0.02, np.abs(x["BS"]), 0.0)
    out = np.zeros((len(x["Q"]), x["V"].shape[1]))
    for p, query in enumerate(x["Q"]):
        coefficients = softmax(low @ (query @ x["WQ"]) / root)
        best = largest(coefficients, i)
        keys = largest(basis[:, best] @ coefficients[best], j)
        out[p] = softmax(x["K"][keys] @ query / root) @ x["V"][keys]
    return {"O": out}


def routing(x: Inputs, *, a: int = 6, b: int = 6) -> Outputs:
    """Cluster by cluster; a query in several clusters gets the mean of what it got."""
    root = np.sqrt(x["Q"].shape[1])
    total, count = np.zeros((len(x["Q"]), x["V"].shape[1])), np.zeros(len(x["Q"]))
    for c, centre in enumerate(x["MUQ"]):
        keys = largest(x["K"] @ centre, b)
        for p in largest(x["Q"] @ centre, a):
            seen = [m for m in keys if m <= p]
            rows = np.concatenate([x["K"][seen], x["KM"][c : c + 1]])
            values = np.concatenate([x["V"][seen], x["VM"][c : c + 1]])
            total[p] += softmax(rows @ x["Q"][p] / root) @ values
            count[p] += 1
    return {"O": total / (count + 1e-5)[:, None]}


def moba(x: Inputs, *, m0: int = 4, j: int = 2) -> Outputs:
    """Row by row: the own block and the best earlier ones by mean key, attention to what is not ahead."""
    root = np.sqrt(x["Q"].shape[1])
    means = np.stack([x["K"][s : s + m0].mean(axis=0) for s in range(0, len(x["K"]), m0)])
    out = np.zeros((len(x["Q"]), x["V"].shape[1]))
    for p, query in enumerate(x["Q"]):
        own = p // m0
        gate = [np.inf if n == own else means[n] @ query if n < own else -np.inf for n in range(len(means))]
        seen = [n * m0 + k for n in largest(np.array(gate), j) for k in range(m0) if n * m0 + k <= p]
        out[p] = softmax(x["K"][seen] @ query / root) @ x["V"][seen]
    return {"O": out}


def halo(x: Inputs, *, hb: int = 4, hl: int = 2) -> Outputs:
    """Pixel by pixel: the pixels of its block and of the rim around it that exist."""
    height, width, e = x["Q"].shape
    out = np.zeros((height, width, x["V"].shape[2]))
    for row, column in np.ndindex(height, width):
        top, left = row // hb * hb - hl, column // hb * hb - hl
        logits, values = [], []
        for i in range(max(top, 0), min(top + hb + 2 * hl, x["K"].shape[0])):
            for j in range(max(left, 0), min(left + hb + 2 * hl, x["K"].shape[1])):
                key = x["K"][i, j] / np.sqrt(e)
                down, across = x["RH"][i - top - row % hb + hb - 1], x["RW"][j - left - column % hb + hb - 1]
                logits.append(x["Q"][row, column] @ (key + down + across))
                values.append(x["V"][i, j])
        out[row, column] = softmax(np.array(logits)) @ np.array(values)
    return {"O": out}


def probsparse(x: Inputs, *, u: int = 4) -> Outputs:
    """The queries whose sampled scores stand out attend; the others take the mean."""
    sampled = np.stack([x["K"][x["SMP"][p]] @ query for p, query in enumerate(x["Q"])])
    out = np.tile(x["V"].mean(axis=0), (len(x["Q"]), 1))
    for p in largest(sampled.max(axis=1) - sampled.sum(axis=1) / len(x["K"]), u):
        out[p] = softmax(x["K"] @ x["Q"][p] / np.sqrt(x["Q"].shape[1])) @ x["V"]
    return {"O": out}


def _attend(q: Array, keys: Array, values: Array) -> Array:
    """Attention of one query `(E,)`; 0 where there is no key."""
    return np.asarray(attention(q[None], keys, values)[0])


def nsa(x: Inputs, *, m0: int = 4, j: int = 2, w: int = 6) -> Outputs:
    """Query by query: finished blocks by their means, the blocks of `moba`, and the last w keys, under three gates."""
    chosen = moba(x, m0=m0, j=j)["O"]
    keys, values = (
        x[name][: len(x[name]) // m0 * m0].reshape(-1, m0, x[name].shape[1]).mean(axis=1) for name in ("K", "V")
    )
    out = []
    for q, query in enumerate(x["Q"]):
        done = (q + 1) // m0
        near = slice(max(q - w + 1, 0), q + 1)
        branches = (
            _attend(query, keys[:done], values[:done]) if done else np.zeros(values.shape[1]),
            chosen[q],
            _attend(query, x["K"][near], x["V"][near]),
        )
        out.append(sum((gate * branch for gate, branch in zip(x["G"][:, q], branches, strict=True)), np.zeros(1)))
    return {"O": np.stack(out)}


def tcpa(x: Inputs, *, j: int = 2) -> Outputs:
    """The softmax over all keys, then zeros for the prompts whose indicators are not among a token's j nearest."""
    weights = softmax(scores(x))
    cosines = x["X"] @ (x["PI"] / np.linalg.norm(x["PI"], axis=1, keepdims=True)).T
    for q, row in enumerate(cosines):
        dropped = [r for r in range(len(row)) if r not in largest(row, j)]
        weights[:, q, dropped] = 0.0
    return {"AV": weights @ x["V"]}


def ttf(x: Inputs, *, j: int = 4, thr: float = 0.03) -> Outputs:
    """Patch by patch: the new token if text attends to it or its pixels changed, else the old one."""
    attended = largest(softmax(scores(x)).mean(axis=(0, 1)), j)
    rows = [x["NEW" if m in attended or change > thr else "OLD"][m] for m, change in enumerate(x["DIFF"])]
    return {"X": np.stack(rows)}


def heavy_hitters(x: Inputs, *, j: int = 8, recent: int = 3) -> Outputs:
    """Head by head: the last keys and those with the largest summed weight stay, then one query attends to them."""
    heads, m, _ = x["K"].shape
    weights = softmax(scores(x), mask=np.tri(x["Q"].shape[1], m, dtype=bool)).sum(axis=1)
    out = []
    for h in range(heads):
        kept = [*range(m - recent, m), *largest(weights[h, : m - recent], j - recent)]
        out.append(_attend(x["QN"][h], x["K"][h, kept], x["V"][h, kept]))
    return {"AV": np.stack(out)}


def bottleneck(x: Inputs, *, j: int = 4) -> Outputs:
    """A softmax over the j best elements alone."""
    kept = largest(x["K"] @ x["C"], j)
    return {"O": _attend(x["C"], x["K"][kept], x["V"][kept])}


def neighbour_cache(x: Inputs) -> Outputs:
    """Node by node: an additive score for each filled slot of its cache."""
    out = np.zeros((len(x["L"]), x["V"].shape[1]))
    for node, length in enumerate(x["LEN"].astype(int)):
        rows = x["NB"][node, : max(length, 0)].astype(int)
        both = x["L"][node] + x["R"][rows]
        out[node] = softmax(np.where(both < 0, 0.2 * both, both) @ x["AW"]) @ x["V"][rows]
    return {"AV": out}


def sparse_causal(x: Inputs) -> Outputs:
    """Frame by frame: the keys of the first frame and of the one before in one list."""
    out = np.empty((*x["Q"].shape[:-1], x["V"].shape[-1]))
    for h, t in np.ndindex(*x["Q"].shape[:2]):
        frames = [0, max(t - 1, 0)]
        out[h, t] = attention(x["Q"][h, t], *(np.concatenate([*x[name][h, frames]]) for name in ("K", "V")))
    return {"AV": out}


CLOSED_FORMS: dict[str, Closed] = {
    "sparsifiner": sparsifiner,
    "routing": routing,
    "moba": moba,
    "halo": halo,
    "probsparse": probsparse,
    "nsa": nsa,
    "tcpa": tcpa,
    "ttf": ttf,
    "heavy_hitters": heavy_hitters,
    "bottleneck": bottleneck,
    "neighbour_cache": neighbour_cache,
    "sparse_causal": sparse_causal,
}
