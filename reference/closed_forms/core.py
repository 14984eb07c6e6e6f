"""Closed forms of softmax attention and of layouts of its heads and keys."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import (
    Closed,
    Inputs,
    Outputs,
    attention,
    causal_of,
    logsumexp,
    scores,
    sigmoid,
)


def softmax_attention(x: Inputs) -> Outputs:
    """Softmax attention: `Q (..., P, E)`, `K (..., M, E)`, `V (..., M, F)` to `AV (..., P, F)`."""
    return {"AV": attention(x["Q"], x["K"], x["V"])}


def causal_attention(x: Inputs) -> Outputs:
    """Softmax attention over the keys up to the query's own position."""
    return {"AV": attention(x["Q"], x["K"], x["V"], mask=causal_of(x))}


def softmax_lse(x: Inputs) -> Outputs:
    """Softmax attention and the logarithm of its denominator, `LSE (..., P)`."""
    return {**softmax_attention(x), "LSE": logsumexp(scores(x))}


def sliding_window(x: Inputs, *, w: int = 256) -> Outputs:
    """Softmax attention over the `w` keys that end at the query's own."""
    return {"AV": attention(x["Q"], x["K"], x["V"], mask=causal_of(x, window=w))}


def gqa(x: Inputs) -> Outputs:
    """Every query head `Q (..., G, R, P, E)` with its own copy of the keys and values of its group."""
    heads = x["Q"].shape[-3]
    return softmax_attention({"Q": x["Q"], **{n: np.stack([x[n]] * heads, axis=-3) for n in ("K", "V")}})


def causal_gqa(x: Inputs) -> Outputs:
    """The same under a causal mask."""
    heads = x["Q"].shape[-3]
    return causal_attention({"Q": x["Q"], **{n: np.stack([x[n]] * heads, axis=-3) for n in ("K", "V")}})


def mla(x: Inputs) -> Outputs:
    """Latent attention, expanded: every head has full keys and values made from `C (M, C)`.

    A key is its part without position beside the rotary part that all heads share.
    """
    heads, m = x["Q"].shape[0], x["C"].shape[0]
    keys = np.stack([np.concatenate([x["C"] @ x["WUK"][h], x["KR"]], axis=1) for h in range(heads)])
    values = np.stack([x["C"] @ x["WUV"][h] for h in range(heads)])
    queries = np.concatenate([x["Q"], x["QR"]], axis=-1)
    seen = np.tri(queries.shape[-2], m, dtype=bool)
    return {"AV": attention(queries, keys, values, scale=x["Q"].shape[-1] ** -0.5, mask=seen)}


def mla_absorbed(x: Inputs) -> Outputs:
    """The same in the latent space: keys of all heads are `C (M, C)` beside `KR (M, R)`, values are `C`."""
    queries = np.concatenate([x["QC"], x["QR"]], axis=-1).swapaxes(0, 1)
    keys = np.concatenate([x["C"], x["KR"]], axis=-1)
    seen = np.tri(queries.shape[-2], len(keys), dtype=bool)
    latent = attention(queries, *(np.stack([y] * len(queries)) for y in (keys, x["C"])), scale=192**-0.5, mask=seen)
    return {"AC": latent.swapaxes(0, 1)}


def varlen(x: Inputs) -> Outputs:
    """Each query `Q (P, H, E)` alone, over the slice of keys `K (M, H, E)` from `LO[p]` to `HI[p]`."""
    return _sliced(x, x["HI"])


def varlen_causal(x: Inputs) -> Outputs:
    """The same where the slice ends with the key at the query's own place in its sequence."""
    place = np.arange(len(x["Q"])) - x["FIRST"]
    return _sliced(x, np.minimum(x["HI"], x["LO"] + place + 1))


def _sliced(x: Inputs, ends: np.ndarray) -> Outputs:
    rows = []
    for query, low, high in zip(x["Q"], x["LO"].astype(int), ends.astype(int), strict=True):
        keys, values = (x[n][low : max(low, high)].swapaxes(0, 1) for n in ("K", "V"))
        rows.append(attention(query[:, None], keys, values)[:, 0])
    return {"AV": np.stack(rows)}


def splitkv(x: Inputs) -> Outputs:
    """Attention of one query `Q (H, E)` over all keys, however they are split."""
    return {"AV": attention(x["Q"][:, None], x["K"], x["V"])[:, 0]}


def paged(x: Inputs, *, page: int = 4) -> Outputs:
    """Attention of one query over the first `LEN[b]` tokens of the pages that `TAB (B, T)` names, page by page."""
    out = []
    for table, length in zip(x["TAB"].astype(int), x["LEN"].astype(int), strict=True):
        slots = np.concatenate([np.arange(page) + page * number for number in table])[:length]
        keys, values = (np.moveaxis(x[n][slots], 0, 1) for n in ("KP", "VP"))
        out.append(attention(x["Q"][:, None], keys, values)[:, 0])
    return {"AV": np.stack(out)}


def gated(x: Inputs) -> Outputs:
    """Softmax attention times the sigmoid of `GT (..., P, F)`."""
    return {"AV": softmax_attention(x)["AV"] * sigmoid(x["GT"])}


def causal_gated(x: Inputs) -> Outputs:
    """The same under a causal mask."""
    return {"O": causal_attention(x)["AV"] * sigmoid(x["GT"])}


def sink(x: Inputs) -> Outputs:
    """One more key for each head, whose score is `SINK (H,)` and whose value is zero."""
    return {"AV": attention(x["Q"], x["K"], x["V"], sink=x["SINK"][:, None])}


def sinklogit(x: Inputs) -> Outputs:
    """The same under a causal mask."""
    return {"AV": attention(x["Q"], x["K"], x["V"], sink=x["SINK"][:, None], mask=causal_of(x))}


def kronecker(x: Inputs) -> Outputs:
    """All pairs of keys in one list: products of the keys, products of the values; both keys lie in the past."""
    p, m, n = (len(x[name]) for name in ("Q", "K1", "K2"))
    keys = np.stack([x["K1"][i] * x["K2"][j] for i, j in np.ndindex(m, n)])
    values = np.stack([x["V1"][i] * x["V2"][j] for i, j in np.ndindex(m, n)])
    seen = np.array([[max(i, j) <= q for i, j in np.ndindex(m, n)] for q in range(p)])
    return {"AV": attention(x["Q"], keys, values, mask=seen)}


CLOSED_FORMS: dict[str, Closed] = {
    "softmax_attention": softmax_attention,
    "softmax_1p": softmax_attention,
    "softmax_2p": softmax_attention,
    "flash_attention_1": softmax_attention,
    "rabe_staats": softmax_attention,
    "softmax_lse": softmax_lse,
    "cross_attention": softmax_attention,
    "sliding_window": sliding_window,
    "softmax_3p": causal_attention,
    "softmax_2p_part": causal_attention,
    "causal_softmax_1p": causal_attention,
    "causal_softmax_2p": causal_attention,
    "gqa": gqa,
    "causal_gqa": causal_gqa,
    "mla": mla,
    "mla_absorbed": mla_absorbed,
    "varlen": varlen,
    "varlen_causal": varlen_causal,
    "splitkv": splitkv,
    "paged": paged,
    "gated": gated,
    "causal_gated": causal_gated,
    "sink": sink,
    "sinklogit": sinklogit,
    "kronecker": kronecker,
}
