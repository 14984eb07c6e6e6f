"""What is measured: each variant as a cascade, as a formula in plain PyTorch, and as an amount of work.

The formula shares nothing with the kernels. In float64 it is the truth, in the dtype of a case the yardstick of errors,
and compiled it is what a user without a kernel would run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse

WINDOW = 1024
DOCUMENT = 700
CAP = 30.0
LAMBDA = 0.8
# Lengths of the sequences of a ragged batch, over and over.
RAGGED = (2900, 700, 4096, 130, 1800, 512, 77, 1024)

Tensors = Mapping[str, Tensor]
# Values of the inputs, rows and columns of the scores -> output rows. Axes of batches and heads may stand in front.
Formula = Callable[[Tensors, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The extents of a case by axis: batch, heads, groups, queries, keys, elements of a key and of a value."""

    b: int = 1
    h: int = 1
    g: int = 0
    p: int = 1
    m: int = 1
    e: int = 64
    f: int = 64

    def extent(self, axis: str) -> int:
        """The extent of an axis by its letter; `r` is the heads of a group, `t` a token, `n` an entry of a table."""
        known = {"r": self.h // (self.g or self.h), "s": 2, "t": self.p, "n": self.p, "g": self.g or self.h}
        return known[axis] if axis in known else int(getattr(self, axis))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kind of attention.

    Args:
        about: what it is, in a line.
        inputs: axes of each input by name, in the order of the cascade; a letter an axis, see `Shape`.
        out: axes of the output.
        wrt: the inputs whose gradient is taken.
        cascade: what is compiled.
        formula: what it computes.
        live: scores that no mask removes, of one head and batch.
        values: how inputs are drawn that are not normal numbers.
        scores: score matrices of a head; products_v: products with V of a head.
    """

    name: str
    about: str
    inputs: Mapping[str, str]
    out: str = "bhpf"
    wrt: tuple[str, ...] = ("Q", "K", "V")
    cascade: Callable[[], Cascade]
    formula: Formula
    live: Callable[[int, int], int]
    values: Mapping[str, Callable[[Shape], Tensor]]
    scores: int = 1

    def flop(self, shape: Shape, direction: str) -> float:
        """The operations of the products at live scores; a backward computes the scores again.

        Forward QK and PV; backward QK, dO V, dV, dQ and dK: 2.5 times the forward where e = f.
        """
        heads = math.prod(shape.extent(a) for a in self.out if a not in "pf")
        live = self.live(shape.p, shape.m) * heads
        forward = 2.0 * live * (self.scores * shape.e + shape.f)
        backward = 2.0 * live * (3 * self.scores * shape.e + 2 * shape.f)
        return {"forward": forward, "backward": backward, "step": forward + backward}[direction]


# --- masks ------------------------------------------------------------------------------------------------------------

Mask = Callable[[Tensors, Tensor, Tensor], Tensor]


def past(x: Tensors, p: Tensor, m: Tensor) -> Tensor:
    return m <= p


def _count_past(p: int, m: int) -> int:
    k = min(p, m)
    return k * (k + 1) // 2 + max(p - m, 0) * m


def near(x: Tensors, p: Tensor, m: Tensor) -> Tensor:
    return (m <= p) & (p - m < WINDOW)


def _count_near(p: int, m: int) -> int:
    return sum(min(r, m - 1) - max(0, r - WINDOW + 1) + 1 for r in range(p) if r - WINDOW + 1 < m)


def same_document(x: Tensors, p: Tensor, m: Tensor) -> Tensor:
    ids = x["DOC"]
    return (m <= p) & (ids[p] == ids[m])


def _count_documents(p: int, m: int) -> int:
    full, rest = divmod(p, DOCUMENT)
    return full * DOCUMENT * (DOCUMENT + 1) // 2 + rest * (rest + 1) // 2


def own_sequence(x: Tensors, p: Tensor, m: Tensor) -> Tensor:
    low, high, first = (x[name][:, None] for name in ("LO", "HI", "FIRST"))
    return (low <= m) & (m < high) & (m + first <= p + low)


def sequences(tokens: int) -> list[int]:
    """Lengths of sequences that fill a ragged batch of so many tokens."""
    found: list[int] = []
    while (left := tokens - sum(found)) > 0:
        found.append(min(RAGGED[len(found) % len(RAGGED)], left))
    return found


def offsets(tokens: int) -> Tensor:
    """Where each sequence of a ragged batch begins, and where the last one ends."""
    return torch.tensor([0, *sequences(tokens)]).cumsum(0).int()


def _count_ragged(p: int, m: int) -> int:
    return sum(n * (n + 1) // 2 for n in sequences(p))


# --- formulas ---------------------------------------------------------------------------------------------------------


def softmax(
    mask: Mask | None = None, change: Callable[[Tensor, Tensors, Tensor, Tensor], Tensor] | None = None
) -> Formula:
    """Softmax attention with changed scores, each step rounded to the dtype of its inputs."""

    def formula(x: Tensors, p: Tensor, m: Tensor) -> Tensor:
        score = (x["Q"] @ x["K"].mT) * x["Q"].shape[-1] ** -0.5
        if change is not None:
            score = change(score, x, p[:, None], m)
        if mask is not None:
            score = score.masked_fill(~mask(x, p[:, None], m), -math.inf)
        return torch.softmax(score, -1) @ x["V"]

    return formula


def weighted(weight: Callable[[Tensor, int], Tensor]) -> Formula:
    """Causal attention whose weights need no other score."""

    def formula(x: Tensors, p: Tensor, m: Tensor) -> Tensor:
        score = (x["Q"] @ x["K"].mT) * x["Q"].shape[-1] ** -0.5
        return weight(score, x["K"].shape[-2]).masked_fill(m > p[:, None], 0.0) @ x["V"]

    return formula


def _with_sink(x: Tensors, p: Tensor, m: Tensor) -> Tensor:
    score = (x["Q"] @ x["K"].mT) * x["Q"].shape[-1] ** -0.5
    score = score.masked_fill(m > p[:, None], -math.inf)
    sink = _per_head(x["SINK"]).to(score.dtype).expand(*score.shape[:-1], 1)
    return torch.softmax(torch.cat((score, sink), -1), -1)[..., :-1] @ x["V"]


def _differential(x: Tensors, p: Tensor, m: Tensor) -> Tensor:
    attend = softmax(past)
    one, two = (attend({"Q": x["Q"][s], "K": x["K"][s], "V": x["V"]}, p, m) for s in (0, 1))
    return x["LAM"][0] * one + x["LAM"][1] * two


def _per_head(t: Tensor) -> Tensor:
    return t[..., None, None]


# --- cascades ---------------------------------------------------------------------------------------------------------

_SQUARED = """
in Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f]
const scale = E ** -0.5
constraint m <= p
QK[b,h,p,m] = scale * Q[b,h,p,e] * K[b,h,m,e]  :: sum(e)
AV[b,h,p,f] = relu(QK[b,h,p,m]) * relu(QK[b,h,p,m]) * V[b,h,m,f] / M  :: sum(m)
out AV
"""
_TWO_SOFTMAXES = """
in Q[s,b,h,p,e], K[s,b,h,m,e], V[b,h,m,f], LAM[s]
rank s = 2
const scale = E ** -0.5
constraint m <= p
QK[s,b,h,p,m] = scale * Q[s,b,h,p,e] * K[s,b,h,m,e]  :: sum(e)
GM[s,b,h,p]   = QK[s,b,h,p,m]  :: max(m)
SN[s,b,h,p,m] = exp(QK[s,b,h,p,m] - GM[s,b,h,p])
SD[s,b,h,p]   = SN[s,b,h,p,m]  :: sum(m)
NV[s,b,h,p,f] = SN[s,b,h,p,m] * V[b,h,m,f]  :: sum(m)
AV[b,h,p,f]   = LAM[s] * NV[s,b,h,p,f] / SD[s,b,h,p]  :: sum(s)
out AV
"""


def _causal(name: str = "softmax_attention", **changes: str) -> Cascade:
    cascade = load(name)
    for tensor, text in changes.items():
        new: dict[str, Any] = {"SLOPE": ...} if "SLOPE" in text else {"BIAS": "h, n"}
        cascade = cascade.score(tensor, text, **new)
    return cascade.constrain("m <= p")


def _documents() -> Cascade:
    text = f"{load('softmax_attention')}\nin DOC[t]\nconstraint DOC[m] == DOC[p], m <= p"
    return parse(text, name="document_attention")


# --- the table --------------------------------------------------------------------------------------------------------

QKV = {"Q": "bhpe", "K": "bhme", "V": "bhmf"}


def slopes(shape: Shape) -> Tensor:
    """The slopes of ALiBi."""
    return 2.0 ** (-8.0 * torch.arange(1, shape.h + 1) / shape.h)


def _bound(shape: Shape, side: int) -> Tensor:
    ends = offsets(shape.p)
    return ends[side : len(ends) - 1 + side].repeat_interleave(ends.diff())


def _variant(name: str, about: str, cascade: Callable[[], Cascade], formula: Formula, **options: Any) -> Variant:
    given = {"inputs": QKV, "live": _count_past, "values": {}, **options}
    return Variant(name=name, about=about, cascade=cascade, formula=formula, **given)


VARIANTS = {
    v.name: v
    for v in (
        _variant(
            "full", "softmax over all keys", lambda: load("softmax_attention"), softmax(), live=lambda p, m: p * m
        ),
        _variant("causal", "softmax over the past", _causal, softmax(past)),
        _variant(
            "alibi",
            "causal, a penalty for each step of distance",
            lambda: _causal(QK="QK + SLOPE[h] * (m - p)"),
            softmax(past, lambda s, x, p, m: (s + _per_head(x["SLOPE"]) * (m - p)).to(s.dtype)),
            inputs={**QKV, "SLOPE": "h"},
            values={"SLOPE": slopes},
        ),
        _variant(
            "window",
            f"the last {WINDOW} keys",
            lambda: load("softmax_attention").constrain("m <= p and p - m < w", w=WINDOW),
            softmax(near),
            live=_count_near,
        ),
        _variant(
            "document",
            f"causal inside documents of {DOCUMENT} tokens, told by ids",
            _documents,
            softmax(same_document),
            inputs={**QKV, "DOC": "t"},
            live=_count_documents,
            values={"DOC": lambda shape: (torch.arange(shape.p) // DOCUMENT).int()},
        ),
        _variant(
            "softcap",
            f"causal, scores within {CAP:.0f} of 0 by a tanh",
            lambda: _causal("softcap"),
            softmax(past, lambda s, x, p, m: CAP * torch.tanh(s / CAP)),
        ),
        _variant(
            "bias",
            "causal, a learned bias for each head and distance",
            lambda: _causal(QK="QK + BIAS[h, p - m]"),
            softmax(past, lambda s, x, p, m: s + x["BIAS"][..., (p - m).clamp(min=0)]),
            inputs={**QKV, "BIAS": "hn"},
            wrt=("Q", "K", "V", "BIAS"),
        ),
        _variant(
            "sink",
            "causal, a learned sink logit in every head",
            lambda: _causal("sink"),
            _with_sink,
            inputs={**QKV, "SINK": "h"},
            wrt=("Q", "K", "V", "SINK"),
        ),
        _variant(
            "sigmoid",
            "causal, each weight the sigmoid of its score",
            lambda: _causal("sigmoid"),
            weighted(lambda s, m: torch.sigmoid(s - math.log(m))),
        ),
        _variant(
            "relu2",
            "causal, each weight the square of its positive score",
            lambda: parse(_SQUARED, name="relu_squared"),
            weighted(lambda s, m: torch.relu(s) ** 2 / m),
        ),
        _variant(
            "diff",
            "causal, a weighted difference of two softmaxes",
            lambda: parse(_TWO_SOFTMAXES, name="differential"),
            _differential,
            inputs={"Q": "sbhpe", "K": "sbhme", "V": "bhmf", "LAM": "s"},
            values={"LAM": lambda shape: torch.tensor([1.0, -LAMBDA])},
            scores=2,
        ),
        _variant("mla", "causal, keys longer than values", _causal, softmax(past)),
        _variant(
            "gqa",
            "causal, several query heads to one of the keys",
            lambda: _causal("gqa"),
            softmax(past),
            inputs={"Q": "bgrpe", "K": "bgme", "V": "bgmf"},
            out="bgrpf",
        ),
        _variant(
            "varlen",
            "causal, sequences of many lengths packed behind one another",
            lambda: load("varlen_causal"),
            softmax(own_sequence),
            inputs={"Q": "phe", "K": "mhe", "V": "mhf", "LO": "p", "HI": "p", "FIRST": "p"},
            out="phf",
            live=_count_ragged,
            values={
                "LO": lambda shape: _bound(shape, 0),
                "HI": lambda shape: _bound(shape, 1),
                "FIRST": lambda shape: _bound(shape, 0),
            },
        ),
        _variant(
            "decode",
            "one query of each head over all keys, several query heads to one of the keys",
            lambda: load("gqa"),
            softmax(),
            inputs={"Q": "bgrpe", "K": "bgme", "V": "bgmf"},
            out="bgrpf",
            live=lambda p, m: p * m,
        ),
    )
}


def draw(
    variant: Variant, shape: Shape, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> dict[str, Tensor]:
    """Draw the inputs of a case: normal numbers in the dtype, but what the variant says otherwise."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, axes in variant.inputs.items():
        if name in variant.values:
            found[name] = variant.values[name](shape).to(device)
            continue
        size = [shape.extent(a) for a in axes]
        found[name] = torch.randn(size, generator=generator, device=device).to(dtype)
    return found
