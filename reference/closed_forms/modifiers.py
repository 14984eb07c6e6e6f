"""Closed forms of softmax attention with changed scores, relations between tokens, or the weights as output."""

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
    rms_norm,
    rotate,
    scores,
    softmax,
)


def alibi(x: Inputs) -> Outputs:
    """A penalty `SLOPE (H,)` for each step of distance, whichever way."""
    return {"AV": softmax(scores(x) - x["SLOPE"][:, None, None] * np.abs(distance(x))) @ x["V"]}


def causal_alibi(x: Inputs) -> Outputs:
    """The same under a causal mask."""
    penalty = x["SLOPE"][:, None, None] * distance(x)
    return {"AV": softmax(scores(x) - penalty, mask=causal_of(x)) @ x["V"]}


def dropout(x: Inputs, *, rate: float = 0.1) -> Outputs:
    """Weights dropped after a causal softmax: those whose number, of seed and place, is below the rate."""
    numbers = [philox(int(x["SEED"]), b, h, p, m // 4)[m % 4] for b, h, p, m in np.ndindex(scores(x).shape)]
    words = np.array(numbers, dtype=np.float64).reshape(scores(x).shape)
    kept = np.floor(words / 256) / 2**24 >= rate
    return {"AV": (softmax(scores(x), mask=causal_of(x)) * kept / (1 - rate)) @ x["V"]}


def philox(seed: int, *counter: int) -> tuple[int, ...]:
    """A block of Philox 4x32-10 (Salmon et al., SC 2011) in Python's own whole numbers."""
    word = 2**32
    (a, b, c, d), key, other = counter, seed % word, seed // word % word
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right // word ^ b ^ key, right % word, left // word ^ d ^ other, left % word
        key, other = (key + 0x9E3779B9) % word, (other + 0xBB67AE85) % word
    return a, b, c, d


def softcap(x: Inputs, *, cap: float = 30.0) -> Outputs:
    """Scores squeezed into `(-cap, cap)`."""
    return {"AV": softmax(cap * np.tanh(scores(x) / cap)) @ x["V"]}


def causal_softcap(x: Inputs, *, cap: float = 3.0) -> Outputs:
    """The same under a causal mask."""
    return {"AV": softmax(cap * np.tanh(scores(x) / cap), mask=causal_of(x)) @ x["V"]}


def qknorm(x: Inputs) -> Outputs:
    """Queries and keys over their root mean squares, with gains `GQ`, `GK` of shape `(E,)`."""
    q, k = (rms_norm(x[name], eps=1e-6, gain=x[f"G{name}"]) for name in ("Q", "K"))
    return {"AV": attention(q, k, x["V"], mask=causal_of(x))}


def rope(x: Inputs) -> Outputs:
    """Pairs `(0, j)`, `(1, j)` of `Q (H, P, 2, J)` turned by `position * FREQ[j]` and an angle of the token."""
    h, p, _, j = x["Q"].shape
    m = x["K"].shape[1]
    q = rotate(x["Q"].reshape(h, p, 2 * j), np.outer(np.arange(p), x["FREQ"]) + x["PSI"][:, None])
    k = rotate(x["K"].reshape(h, m, 2 * j), np.outer(np.arange(m), x["FREQ"]) + x["PHI"][:, None])
    return {"AV": attention(q, k, x["V"], mask=causal(p, m))}


def gatv2(x: Inputs) -> Outputs:
    """Node by node: an additive score for each neighbour, normalised over the neighbours."""
    heads, p, _ = x["L"].shape
    out = np.zeros((heads, p, x["V"].shape[-1]))
    for h, node in np.ndindex(heads, p):
        neighbours = np.flatnonzero(x["ADJ"][node] > 0)
        both = x["L"][h, node] + x["R"][h, neighbours]
        out[h, node] = softmax(np.where(both < 0, 0.2 * both, both) @ x["AW"][h]) @ x["V"][h, neighbours]
    return {"AV": out}


def hpnet(x: Inputs, *, w: int = 3) -> Outputs:
    """Query by query: the `w` positions before it, each with its own addition to key and value."""
    heads, p, e = x["Q"].shape
    m = x["K"].shape[1]
    out = np.zeros((heads, p, x["V"].shape[-1]))
    for h, q in np.ndindex(heads, p):
        past = np.arange(max(q - w, 0), min(q, m))
        keys, values = x["K"][h, past] + x["EK"][h, q, past], x["V"][h, past] + x["EV"][h, q, past]
        out[h, q] = softmax(keys @ x["Q"][h, q] / np.sqrt(e)) @ values
    return {"AV": out}


def paint(x: Inputs) -> Outputs:
    """Scores of key m moved by `COEF[m]` times their size: positive ones by 1 + COEF, negative ones by 1 - COEF."""
    s = scores(x)
    return {"AV": softmax(np.where(s > 0, (1 + x["COEF"]) * s, (1 - x["COEF"]) * s), mask=causal_of(x)) @ x["V"]}


def tin(x: Inputs) -> Outputs:
    """One target for each batch, elementwise with the mean of the first `LEN[b]` keys under its softmax."""
    target = x["XT"] + x["PT"]
    out = np.zeros_like(target)
    for b, length in enumerate(x["LEN"].astype(int)):
        history = (x["XH"] + x["PH"])[b, : max(length, 0)]
        out[b] = target[b] * (softmax(history @ target[b] / np.sqrt(target.shape[-1])) @ history)
    return {"U": out}


def pointer(x: Inputs) -> Outputs:
    """The weights themselves, `A (P, M)`."""
    return {"A": softmax(scores(x))}


CLOSED_FORMS: dict[str, Closed] = {
    "alibi": alibi,
    "causal_alibi": causal_alibi,
    "dropout": dropout,
    "softcap": softcap,
    "causal_softcap": causal_softcap,
    "qknorm": qknorm,
    "rope": rope,
    "gatv2": gatv2,
    "hpnet": hpnet,
    "paint": paint,
    "tin": tin,
    "pointer": pointer,
}
