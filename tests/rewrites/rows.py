"""The tables of what streams and what does not, as cascades over M with the summand as plain formulas beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_MEAN = "in X[p,m]\nMU[p] = X[p,m] :: mean(m)\n"
_SOFTMAX = "GM[p] = S[p,m] :: max(m)\nSN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = SN[p,m] :: sum(m)\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A cascade that streams.

    Args:
        text: the cascade; S is a score, X any value.
        tensor: the reduction whose state is of dimension `n`; 0 where nothing moves it.
        f: its summand F(x, d) as a plain function of positional x and d, each a tuple.
        x, d: how many numbers each has.
        positive: places in d that hold positive numbers.
        yardstick: the row whose plain formula has the same value and is finite where that of this one is not.
        scores: inputs that enter only through exp(score - reference), so may be -inf.
    """

    text: str
    tensor: str
    n: int
    f: Callable[..., float]
    x: int = 1
    d: int = 1
    positive: tuple[int, ...] = ()
    scores: tuple[str, ...] = ()
    yardstick: str = ""


def relu(x: float) -> float:
    return max(x, 0.0)


ACCEPTED = {
    "denominator": Accepted(
        text=f"in S[p,m]\n{_SOFTMAX}L[p] = GM[p] + log(SD[p])\nout SD, L",
        tensor="SD",
        n=1,
        f=lambda s, m: math.exp(s - m),
        scores=("S",),
    ),
    "division inside": Accepted(
        text=f"in S[p,m], V[m,f]\n{_SOFTMAX}O[p,f] = SN[p,m] / SD[p] * V[m,f] :: sum(m)\nout O",
        tensor="ON",
        n=1,
        f=lambda s, v, m: math.exp(s - m) * v,
        x=2,
        scores=("S",),
    ),
    "square of the weight": Accepted(
        text=f"in S[p,m]\n{_SOFTMAX}O[p] = (SN[p,m] / SD[p]) ** 2 :: sum(m)\nout O",
        tensor="O0",
        n=1,
        f=lambda s, m: math.exp(s - m) ** 2,
        scores=("S",),
    ),
    "softcap": Accepted(
        text=f"in X[p,m], V[m,f]\nS[p,m] = 20 * tanh(X[p,m] / 20)\n{_SOFTMAX}O[p,f] = SN[p,m] * V[m,f] / SD[p]\nout O",
        tensor="ON",
        n=1,
        f=lambda x, v, m: math.exp(20 * (math.tanh(x / 20) - m)) * v,
        x=2,
    ),
    "relu of the weight": Accepted(
        text=f"in S[p,m], V[m,f]\n{_SOFTMAX}A[p,m] = SN[p,m] / SD[p]\nO[p,f] = relu(A[p,m]) * V[m,f]\nout O",
        tensor="O0",
        n=1,
        f=lambda s, v, m: relu(math.exp(s - m)) * v,
        x=2,
        scores=("S",),
    ),
    "sigmoid": Accepted(
        text="in X[p,m], V[m,f]\nO[p,f] = sigmoid(X[p,m]) * V[m,f]\nout O",
        tensor="O",
        n=0,
        f=lambda x, v: v / (1 + math.exp(-x)),
        x=2,
        d=0,
    ),
    "KL term": Accepted(
        text=f"in S[p,m], T[p,m]\n{_SOFTMAX}O[p] = SN[p,m] * T[p,m] :: sum(m)\nK[p] = O[p] / SD[p]\nout K",
        tensor="O",
        n=1,
        f=lambda s, t, m: math.exp(s - m) * t,
        x=2,
        scores=("S",),
    ),
    "weights over a scale": Accepted(
        text="in X[p,m], W[m,f]\nR[p] = X[p,m] * X[p,m] :: mean(m)\n"
        "O[p,f] = X[p,m] * W[m,f] / sqrt(R[p] + 1e-6)\nout O",
        tensor="ON",
        n=0,
        f=lambda x, w: x * w,
        x=2,
        d=0,
    ),
    "absolute maximum": Accepted(
        text="in X[p,m], W[m,f]\nA[p] = abs(X[p,m]) :: max(m)\nO[p,f] = 127 * X[p,m] * W[m,f] / A[p]\nout O",
        tensor="ON",
        n=0,
        f=lambda x, w: 127 * x * w,
        x=2,
        d=0,
    ),
    "relu over a scale": Accepted(
        text="in X[p,m], W[m,f]\nR[p] = X[p,m] * X[p,m] :: mean(m)\n"
        "O[p,f] = relu(X[p,m] / sqrt(R[p] + 1)) * W[m,f] :: sum(m)\nout O",
        tensor="O0",
        n=0,
        f=lambda x, w: relu(x) * w,
        x=2,
        d=0,
    ),
    "variance": Accepted(
        text=f"{_MEAN}VA[p] = (X[p,m] - MU[p]) ** 2 :: mean(m)\nout VA",
        tensor="VAS",
        n=3,
        f=lambda x, mu: (x - mu) ** 2,
    ),
    "third moment": Accepted(
        text=f"{_MEAN}T[p] = (X[p,m] - MU[p]) ** 3 :: mean(m)\nout T",
        tensor="TS",
        n=4,
        f=lambda x, mu: (x - mu) ** 3,
    ),
    "softmax-weighted variance": Accepted(
        text=f"in S[p,m], V[m,f]\n{_SOFTMAX}NV[p,f] = SN[p,m] * V[m,f]\nMU[p,f] = NV[p,f] / SD[p]\n"
        "W[p,f] = SN[p,m] * (V[m,f] - MU[p,f]) ** 2 :: sum(m)\nVA[p,f] = W[p,f] / SD[p]\nout VA, MU",
        tensor="W",
        n=3,
        f=lambda s, v, m, mu: math.exp(s - m) * (v - mu) ** 2,
        x=2,
        d=2,
        scores=("S",),
    ),
    "entropy": Accepted(
        text=f"in S[p,m]\n{_SOFTMAX}SS[p] = SN[p,m] * (S[p,m] - GM[p]) :: sum(m)\n"
        "EN[p] = log(SD[p]) - SS[p] / SD[p]\nout EN",
        tensor="SS",
        n=2,
        f=lambda s, m: math.exp(s - m) * (s - m),
    ),
    "p log p": Accepted(
        text=f"in S[p,m]\n{_SOFTMAX}A[p,m] = SN[p,m] / SD[p]\nEN[p] = -A[p,m] * log(A[p,m]) :: sum(m)\nout EN",
        tensor="ENN0",
        yardstick="entropy",
        n=2,
        f=lambda s, m: math.exp(s - m) * (s - m),
    ),
    "min-max normalisation": Accepted(
        text="in X[p,m], V[m,f]\nLO[p] = X[p,m] :: min(m)\nHI[p] = X[p,m] :: max(m)\n"
        "O[p,f] = (X[p,m] - LO[p]) / (HI[p] - LO[p]) * V[m,f] :: sum(m)\nout O",
        tensor="ON",
        n=2,
        f=lambda x, v, lo: (x - lo) * v,
        x=2,
    ),
    "polynomial": Accepted(
        text="in X[p,m]\nS[p] = abs(X[p,m]) :: max(m)\nO[p] = (1 + X[p,m] / S[p]) ** 2 :: sum(m)\nout O",
        tensor="O",
        n=3,
        f=lambda x, s: (1 + x / s) ** 2,
        positive=(0,),
    ),
    "cosine": Accepted(
        text=f"{_MEAN}O[p] = cos(X[p,m] - MU[p]) :: sum(m)\nout O",
        tensor="O",
        n=2,
        f=lambda x, mu: math.cos(x - mu),
    ),
}

# Maxima of a monotone map of a value that waits for nothing: no correction at all.
MONOTONE = {
    "maximum of the weights": f"in S[p,m]\n{_SOFTMAX}O[p] = S[p,m] - GM[p] - log(SD[p]) :: max(m)\nout O",
    "maximum over a scale": "in X[p,m]\nR[p] = X[p,m] * X[p,m] :: mean(m)\n"
    "O[p] = X[p,m] / sqrt(R[p] + 1e-6) :: max(m)\nout O",
    "maximum of a hinge": f"{_MEAN}O[p] = relu(X[p,m] - MU[p]) :: max(m)\nout O",
    "maximum of an exponential": f"{_MEAN}O[p] = exp(X[p,m] - MU[p]) :: max(m)\nout O",
    "minimum of a falling map": f"{_MEAN}O[p] = exp(MU[p] - X[p,m]) :: min(m)\nout O",
}

# What does not stream: the cascade, and the part of it that the reason names.
REJECTED = {
    "hinge": (f"{_MEAN}O[p] = relu(X[p,m] - MU[p]) :: sum(m)\nout O", "relu(X[p, m] - MU[p])"),
    "hard threshold": (
        f"{_MEAN}O[p] = select(X[p,m] > MU[p], X[p,m], 0) :: sum(m)\nout O",
        "select(X[p, m] > MU[p], X[p, m], 0)",
    ),
    "tanh of the weight": (
        f"in S[p,m], V[m,f]\n{_SOFTMAX}A[p,m] = SN[p,m] / SD[p]\nO[p,f] = tanh(A[p,m]) * V[m,f]\nout O",
        "tanh(exp(S[p, m] - GM[p]) / SD[p])",
    ),
    "logarithm of one and the weight": (
        f"in S[p,m]\n{_SOFTMAX}A[p,m] = SN[p,m] / SD[p]\nO[p] = log(1 + A[p,m]) :: sum(m)\nout O",
        "log(1 + exp(S[p, m] - GM[p]) / SD[p])",
    ),
    "clipped softmax": (
        f"in S[p,m], V[m,f]\n{_SOFTMAX}A[p,m] = SN[p,m] / SD[p]\n"
        "O[p,f] = clamp(1.2 * A[p,m] - 0.1, 0, 1) * V[m,f]\nout O",
        "clamp(1.2 * (exp(S[p, m] - GM[p]) / SD[p]) - 0.1, 0, 1)",
    ),
    "data-dependent temperature": (
        "in X[p,m]\nR[p] = X[p,m] * X[p,m] :: mean(m)\nO[p] = exp(X[p,m] / sqrt(R[p] + 1)) :: sum(m)\nout O",
        "exp(X[p, m] / sqrt(R[p] + 1))",
    ),
    "logistic of a centred score": (
        f"{_MEAN}O[p] = sigmoid(X[p,m] - MU[p]) :: sum(m)\nout O",
        "sigmoid(X[p, m] - MU[p])",
    ),
    "absolute deviation": (f"{_MEAN}O[p] = abs(X[p,m] - MU[p]) :: sum(m)\nout O", "abs(X[p, m] - MU[p])"),
    "rounding after scaling": (
        "in X[p,m], V[m,f]\nA[p] = abs(X[p,m]) :: max(m)\nO[p,f] = floor(127 * X[p,m] / A[p] + 0.5) * V[m,f]\nout O",
        "floor(127 * X[p, m] / A[p] + 0.5)",
    ),
}
