"""Closed forms of attention without a softmax over the keys."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import (
    Array,
    Closed,
    Inputs,
    Outputs,
    attention,
    causal_of,
    linear_attention,
    map_attention,
    ratio,
    scores,
    sigmoid,
    softmax,
)


def _weighted(weights: Array, values: Array) -> Outputs:
    """Weights over their sum, times the values."""
    return {"AV": ratio(weights @ values, weights.sum(axis=-1, keepdims=True))}


def relu(x: Inputs) -> Outputs:
    """Positive scores over the number of keys."""
    return {"AV": map_attention(x["Q"], x["K"], x["V"], lambda s: np.clip(s, 0.0, None) / x["K"].shape[-2])}


def reluattn(x: Inputs) -> Outputs:
    """The same under a causal mask, still over the number of all keys."""
    mean = x["V"] / x["K"].shape[-2]
    return {"AV": map_attention(x["Q"], x["K"], mean, lambda s: np.clip(s, 0.0, None), mask=causal_of(x))}


def sigmoid_attention(x: Inputs) -> Outputs:
    """Sigmoids of the scores less log M."""
    return {"AV": map_attention(x["Q"], x["K"], x["V"], lambda s: sigmoid(s - np.log(x["K"].shape[-2])))}


def sigmoidattn(x: Inputs, *, bsig: float = -2.0) -> Outputs:
    """Sigmoids of the scores and a bias, under a causal mask."""
    return {"AV": map_attention(x["Q"], x["K"], x["V"], lambda s: sigmoid(s + bsig), mask=causal_of(x))}


def linear(x: Inputs) -> Outputs:
    """Weights phi(q) . phi(k) with phi = elu + 1, normalised, pair by pair."""
    q, k = (np.where(t > 0, t + 1, np.exp(np.minimum(t, 0))) for t in (x["Q"], x["K"]))
    return _weighted(q @ np.swapaxes(k, -1, -2), x["V"])


def hebbian(x: Inputs) -> Outputs:
    """Inner products as weights, pair by pair."""
    return {"AV": linear_attention(x["Q"], x["K"], x["V"])}


def linattn(x: Inputs) -> Outputs:
    """The same under a causal mask, for one head `Q (T, E)`, `K (T, E)`, `V (T, F)`."""
    return {"O": linear_attention(x["Q"], x["K"], x["V"], mask=causal_of(x))}


def kernelattn(x: Inputs) -> Outputs:
    """Inner products of the features `FQ (H, P, D)`, `FK (H, M, D)` as weights, normalised."""
    return _weighted(x["FQ"] @ np.swapaxes(x["FK"], -1, -2), x["V"])


def cosformer_quad(x: Inputs) -> Outputs:
    """The sum of the two linear terms: cos(a - b) = cos a cos b + sin a sin b with a = pi p / 2M, b = pi m / 2M."""
    p, m = x["Q"].shape[-2], x["K"].shape[-2]
    q, k = (np.clip(x[n], 0.0, None) for n in ("Q", "K"))
    a, b = (np.pi / 2 * np.arange(n)[:, None] / m for n in (p, m))
    top = np.zeros((*q.shape[:-1], x["V"].shape[-1]))
    bottom = np.zeros((*q.shape[:-1], 1))
    for wave in (np.cos, np.sin):
        fq, fk = q * wave(a), k * wave(b)
        top += fq @ (np.swapaxes(fk, -1, -2) @ x["V"])
        bottom += fq @ fk.sum(axis=-2)[..., None]
    return {"AV": ratio(top, bottom)}


def taylor2(x: Inputs) -> Outputs:
    """Weights ((s + 1)^2 + 1) / 2, the exponential cut after its square, under a causal mask."""
    return _weighted(np.where(causal_of(x), (np.square(scores(x) + 1) + 1) / 2, 0.0), x["V"])


def ista(x: Inputs) -> Outputs:
    """Matrix by matrix: `tanh(Q' K / CTV)`, scaled and moved by a learned map, applied to the raw tokens."""
    n, h, c, t, v, u = x["Q"].shape
    w, k = x["K"].shape[-1], x["X"].shape[1]
    out = np.empty((n, h, k, t, v, w))
    for i, head in np.ndindex(n, h):
        products = x["Q"][i, head].reshape(c * t * v, u).T @ x["K"][i, head].reshape(c * t * v, w)
        weights = x["ALPHA"][head] * np.tanh(products / (c * t * v)) + x["MAP"][head]
        out[i, head] = x["X"][i] @ weights
    return {"Y": out}


def rfattn(x: Inputs) -> Outputs:
    """Head by head: the mean over the tokens of relu(x0' W token) times the head's linear function of the token."""
    out = np.zeros(x["X0"].shape[0])
    for w, v in zip(x["W"], x["VH"], strict=True):
        for b, tokens in enumerate(x["X"]):
            out[b] += np.mean(np.clip(tokens @ (x["X0"][b] @ w), 0.0, None) * (tokens @ v))
    return {"Y": out}


def gatedconv(x: Inputs) -> Outputs:
    """The image shifted under each element of the window, zeros beyond its edge, summed and gated by silu."""
    rows, columns, channels = x["X"].shape
    height, width, _ = x["W"].shape
    padded = np.zeros((rows + 2 * height, columns + 2 * width, channels))
    padded[height : height + rows, width : width + columns] = x["X"]
    out = np.zeros_like(padded[:rows, :columns])
    for dy, dx in np.ndindex(height, width):
        top, left = height + dy - 1, width + dx - 1
        out += padded[top : top + rows, left : left + columns] * x["W"][dy, dx]
    return {"O": x["G"] * sigmoid(x["G"]) * out}


def gaam(x: Inputs) -> Outputs:
    """Feature by feature: the product of the densities of G Gaussians at each position, normalised over positions."""
    values = x["X"]
    n = values.shape[0]
    spread = np.var(values, axis=0) * n / max(n - 1, 1) + 1e-8
    centred = values - np.mean(values, axis=0)
    logs = np.zeros_like(values)
    for delta, width in zip(x["DELTA"], x["CW"], strict=True):
        logs += -np.square(centred - delta) / (2 * spread * width**2)
    return {"Y": values * softmax(logs.T).T}


def staticmap(x: Inputs) -> Outputs:
    """Softmax attention whose queries and keys are the same for the whole batch."""
    return {"AV": attention(x["J1"][None], x["J2"][None], x["V"])}


CLOSED_FORMS: dict[str, Closed] = {
    "relu": relu,
    "reluattn": reluattn,
    "sigmoid": sigmoid_attention,
    "sigmoidattn": sigmoidattn,
    "linear": linear,
    "hebbian": hebbian,
    "linattn": linattn,
    "kernelattn": kernelattn,
    "cosformer_quad": cosformer_quad,
    "taylor2": taylor2,
    "ista": ista,
    "rfattn": rfattn,
    "gatedconv": gatedconv,
    "gaam": gaam,
    "staticmap": staticmap,
}
