"""Closed forms with a linear system, an inner solver, or a memory that is not linear in itself."""

from __future__ import annotations

import numpy as np

from einsumcascade.reference.closed_forms.parts import Array, Closed, Inputs, Outputs, causal, softmax


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


def lla(x: Inputs) -> Outputs:
    """The value at the query of a weighted ridge regression of the values on the keys, slopes alone penalised."""
    out = np.zeros((len(x["Q"]), x["V"].shape[1]))
    for p, query in enumerate(x["Q"]):
        keys, values = x["K"][: p + 1] - query, x["V"][: p + 1]
        score = x["K"][: p + 1] @ query / np.sqrt(len(query))
        root = np.sqrt(np.exp(score - score.max(initial=-np.inf)))[:, None]
        design = np.concatenate([root, root * keys], axis=1)
        ridge = np.concatenate([np.zeros((len(query), 1)), np.sqrt(x["LAM"][p]) * np.eye(len(query))], axis=1)
        rows = np.concatenate([design, ridge])
        wanted = np.concatenate([root * values, np.zeros((len(query), values.shape[1]))])
        out[p] = np.linalg.lstsq(rows, wanted, rcond=None)[0][0]
    return {"O": out}


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


def titans(x: Inputs) -> Outputs:
    """Gradient steps with momentum on |k M - v|**2, M shrinking by ALPHA."""
    memory = np.zeros((x["K"].shape[1], x["V"].shape[1]))
    momentum = np.zeros_like(memory)
    out = np.zeros_like(x["V"])
    for t, (key, value) in enumerate(zip(x["K"], x["V"], strict=True)):
        gradient = 2 * np.outer(key, key @ memory - value)
        momentum = x["ETA"][t] * momentum - x["THETA"][t] * gradient
        memory = (1 - x["ALPHA"][t]) * memory + momentum
        out[t] = x["Q"][t] @ memory
    return {"O": out}


def titans_chunk(x: Inputs, *, c0: int = 6) -> Outputs:
    """As `titans`, step by step, but with gradients at the memory that began the chunk; decays are given as logs."""
    memory = np.zeros((x["K"].shape[1], x["V"].shape[1]))
    momentum, start = np.zeros_like(memory), memory
    out = np.zeros_like(x["V"])
    for t, (key, value) in enumerate(zip(x["K"], x["V"], strict=True)):
        if t % c0 == 0:
            start = memory
        gradient = 2 * np.outer(key, key @ start - value)
        momentum = np.exp(x["LE"][t]) * momentum - x["THETA"][t] * gradient
        memory = np.exp(x["LA"][t]) * memory + momentum
        out[t] = x["Q"][t] @ memory
    return {"O": out.reshape(-1, c0, out.shape[1])}


def moneta(x: Inputs, *, ee: float = 1e-12) -> Outputs:
    """Gradient steps on the sum of |W k - v|**3, W the memory over the root of the sum of its fourth powers."""
    memory = np.array(x["AC0"], dtype=np.float64)
    out = np.zeros_like(x["V"])
    for t, (key, value) in enumerate(zip(x["K"], x["V"], strict=True)):
        error = memory / np.sqrt((memory**4).sum() + ee) @ key - value
        memory = x["ALPHA"][t] * memory - x["ETA"][t] * np.outer(3 * np.abs(error) * error, key)
        out[t] = memory / np.sqrt((memory**4).sum() + ee) @ x["Q"][t]
    return {"O": out}


def yaad(x: Inputs) -> Outputs:
    """Gradient steps on half the squared error, which grows linearly beyond DELTA."""
    memory = np.zeros((x["V"].shape[1], x["K"].shape[1]))
    out = np.zeros_like(x["V"])
    for t, (key, value) in enumerate(zip(x["K"], x["V"], strict=True)):
        error = memory @ key - value
        size = np.linalg.norm(error)
        step = error if size <= x["DELTA"][t] else error * (x["DELTA"][t] / size)
        memory = x["ALPHA"][t] * memory - x["ETA"][t] * np.outer(step, key)
        out[t] = memory @ x["Q"][t]
    return {"O": out}


def memora(x: Inputs) -> Outputs:
    """Multiplicative steps on |W k - v|**2, rows of W normalised after each."""
    memory = np.array(x["W0"], dtype=np.float64)
    out = np.zeros_like(x["V"])
    for t, (key, value) in enumerate(zip(x["K"], x["V"], strict=True)):
        error = memory @ key - value
        memory = softmax(x["ALPHA"][t] * np.log(memory) - 2 * x["ETA"][t] * np.outer(error, key))
        out[t] = memory @ x["Q"][t]
    return {"O": out}


def sparsemax(x: Inputs) -> Outputs:
    """The threshold by sorting: the nearest point of the simplex to the scores."""
    score = x["Q"] @ x["K"].T / np.sqrt(x["Q"].shape[1])
    out = np.zeros((len(x["Q"]), x["V"].shape[1]))
    for p in range(len(out)):
        row = score[p, : p + 1]
        high = np.sort(row)[::-1]
        sums = np.cumsum(high)
        ranks = np.arange(1, len(row) + 1)
        support = int((1 + ranks * high > sums).sum())
        weight = np.maximum(row - (sums[support - 1] - 1) / support, 0.0)
        out[p] = weight @ x["V"][: p + 1] / weight.sum()
    return {"O": out}


CLOSED_FORMS: dict[str, Closed] = {
    "deltanet": deltanet,
    "deltanet_chunk": deltanet_chunk,
    "rwkv7": rwkv7,
    "sessa": sessa,
    "deltaformer": deltaformer,
    "lla_1p": lla,
    "lla_cg": lla,
    "mesa": mesa,
    "titans": titans,
    "titans_chunk": titans_chunk,
    "moneta": moneta,
    "yaad": yaad,
    "memora": memora,
    "sparsemax": sparsemax,
}
