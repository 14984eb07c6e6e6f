"""Callables as users of FlexAttention write them: factories, closures, partial functions, tables, modules.

Each is our own writing of a formula that the public collections of score and mask modifications hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

HEADS, LENGTH = 4, 24
_GENERATOR = torch.Generator().manual_seed(7)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR)


# --- masks ------------------------------------------------------------------------------------------------------


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def sliding_window(width: int) -> Callable[..., Any]:
    def near(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx <= width) & (q_idx >= kv_idx)

    return near


def symmetric_window(width: int) -> Callable[..., Any]:
    return lambda b, h, q_idx, kv_idx: torch.abs(q_idx - kv_idx) <= width


def prefix_lm(length: int) -> Callable[..., Any]:
    def prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < length

    return or_masks(prefix, causal)


def prefix_of_each(lengths: Tensor) -> Callable[..., Any]:
    return or_masks(lambda b, h, q_idx, kv_idx: kv_idx < lengths[b], causal)


def dilated(width: int, step: int) -> Callable[..., Any]:
    def every(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = torch.abs(q_idx - kv_idx)
        return (distance <= width) & (distance % step == 0) & (kv_idx <= q_idx)

    return every


def documents_of(offsets: Tensor) -> Tensor:
    counts = offsets[1:] - offsets[:-1]
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def within_documents(inner: Callable[..., Any], offsets: Tensor) -> Callable[..., Any]:
    """Positions count from the start of their document."""
    document_id = documents_of(offsets)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        same = document_id[q_idx] == document_id[kv_idx]
        q_local = q_idx - offsets[document_id[q_idx]]
        kv_local = kv_idx - offsets[document_id[kv_idx]]
        return same & inner(b, h, q_local, kv_local)

    return mask


def neighbourhood(width: int, kernel: int, *, clamped: bool) -> Callable[..., Any]:
    """Windows over an image of rows of `width` pixels; clamped ones stay whole at the border."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_x, q_y = q_idx // width, q_idx % width
        kv_x, kv_y = kv_idx // width, kv_idx % width
        rows = LENGTH // width
        if clamped:
            q_x = torch.clamp(q_x, kernel // 2, rows - 1 - kernel // 2)
            q_y = q_y.clamp(kernel // 2, width - 1 - kernel // 2)
        return ((q_x - kv_x).abs() <= kernel // 2) & ((q_y - kv_y).abs() <= kernel // 2)

    return mask


def images(spans: list[tuple[int, int]]) -> Callable[..., Any]:
    """Transfusion: causal, and whole within each image."""

    def inside(start: int, end: int, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= start) & (q_idx < end) & (kv_idx >= start) & (kv_idx < end)

    return or_masks(causal, *(functools.partial(inside, s, e) for s, e in spans))


def flamingo(image_of_text: Tensor, image_of_patch: Tensor) -> Callable[..., Any]:
    return lambda b, h, q_idx, kv_idx: image_of_text[b, q_idx] == image_of_patch[b, kv_idx]


def of_each_batch(masks: Tensor) -> Callable[..., Any]:
    """A table of truth values for each element of the batch."""
    return lambda b, h, q_idx, kv_idx: masks[b][q_idx, kv_idx]


def of_heads(local: Tensor, width: int) -> Callable[..., Any]:
    """Some heads see a window, the others everything before them."""

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.where(local[h], (q_idx - kv_idx < width) & (q_idx >= kv_idx), q_idx >= kv_idx)

    return mask


def blocks(size: int) -> Callable[..., Any]:
    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx // size == kv_idx // size) ^ (kv_idx == 0)

    return mask


def shifted(mask: Callable[..., Any], offset: Tensor) -> Callable[..., Any]:
    """Decoding: queries stand `offset` further on."""
    return lambda b, h, q_idx, kv_idx: mask(b, h, q_idx + offset, kv_idx)


def padded(lengths: Tensor) -> Callable[..., Any]:
    """Neither the keys nor the queries behind the end of a sequence."""
    return lambda b, h, q_idx, kv_idx: (q_idx < lengths[b]) & (kv_idx < lengths[b])


class Table:
    """A callable object with a table of its own."""

    def __init__(self) -> None:
        self.allowed = randn(LENGTH, LENGTH) > -0.5

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.allowed[q_idx, kv_idx].bool() & ~(q_idx == 3)


OFFSETS = torch.tensor([0, 5, 6, 17, LENGTH])
MASKS: dict[str, Callable[..., Any]] = {
    "causal": causal,
    "everything": noop_mask,
    "nothing": lambda b, h, q_idx, kv_idx: q_idx < 0,
    "sliding window": sliding_window(5),
    "symmetric window": symmetric_window(3),
    "prefix": prefix_lm(6),
    "prefix of each": prefix_of_each(torch.tensor([3, 9])),
    "dilated": dilated(12, 3),
    "documents": within_documents(lambda b, h, q_idx, kv_idx: torch.tensor(True), OFFSETS),
    "causal documents": within_documents(causal, OFFSETS),
    "prefix documents": within_documents(prefix_lm(2), OFFSETS),
    "natten": neighbourhood(6, 3, clamped=False),
    "natten clamped": neighbourhood(6, 3, clamped=True),
    "images": images([(2, 7), (15, 20)]),
    "flamingo": flamingo(
        torch.arange(2 * LENGTH).view(2, LENGTH) // 9, torch.arange(2 * LENGTH).flip(0).view(2, LENGTH) // 11
    ),
    "of each batch": of_each_batch(randn(2, LENGTH, LENGTH) > 0),
    "of heads": of_heads(torch.tensor([True, False, True, False]), 4),
    "blocks": blocks(7),
    "shifted": shifted(causal, torch.tensor(6)),
    "padded": padded(torch.tensor([0, 17])),
    "an object": Table(),
    "joined": and_masks(sliding_window(9), or_masks(causal, prefix_lm(2)), within_documents(causal, OFFSETS)),
    "one batch sees nothing": lambda b, h, q_idx, kv_idx: b > 0,
    "inverted": lambda b, h, q_idx, kv_idx: torch.logical_not(torch.logical_or(q_idx < kv_idx, kv_idx % 4 == 1)),
    "first block of a ragged batch": functools.partial(lambda n, b, h, q, kv: kv < torch.minimum(q + 1, n[b]), OFFSETS),
}  # fmt: skip


# --- scores -----------------------------------------------------------------------------------------------------


def alibi(heads: int) -> Callable[..., Any]:
    def bias(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        slope = torch.exp2(-((h + 1) * 8.0 / heads))
        return score + (kv_idx - q_idx) * slope

    return bias


def alibi_table(slopes: Tensor) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: score - slopes[h] * torch.abs(q_idx - kv_idx)


def softcap(cap: float) -> Callable[..., Any]:
    def capped(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        score = score / cap
        score = torch.tanh(score)
        return score * cap

    return capped


@torch.library.custom_op("approx::tanh", mutates_args=())
def approximate_tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


@approximate_tanh.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class ApproximateTanh(torch.autograd.Function):
    """What a collection wraps its approximate tanh in; on a CPU it is exact."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Any) -> Any:
        return torch.ops.approx.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (result,) = ctx.saved_tensors
        return gradient * (1 - result * result)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any) -> Any:
        return torch.tanh(x), in_dims[0]


def approximate_softcap(cap: float) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: cap * ApproximateTanh.apply(score / cap)  # type: ignore[no-untyped-call]


def relative(bias: Tensor) -> Callable[..., Any]:
    """One bias for each head and distance, counted from the most negative."""
    return lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx - kv_idx + (bias.shape[1] // 2)]


def from_the_end(bias: Tensor) -> Callable[..., Any]:
    """Distances below zero count from the end of the table, as PyTorch has it."""
    return lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx - kv_idx]


def t5(bias: Tensor, *, buckets: int = 8, far: int = 16) -> Callable[..., Any]:
    """Buckets of distances, finer near the diagonal."""
    exact = buckets // 2

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = torch.clamp(q_idx - kv_idx, min=0)
        ratio = torch.log(torch.clamp(distance, min=1).float() / exact) / math.log(far / exact)
        large = torch.minimum(exact + (ratio * (buckets - exact)).to(torch.long), torch.tensor(buckets - 1))
        return score + bias[torch.where(distance < exact, distance, large), h]

    return mod


def by_document(table: Tensor) -> Callable[..., Any]:
    document_id = documents_of(OFFSETS)
    return lambda score, b, h, q_idx, kv_idx: score + table[document_id[q_idx] - document_id[kv_idx], h]


def additive(bias: Tensor) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: score + bias[b, 0, q_idx, kv_idx]


def hidden(mask: Callable[..., Any]) -> Callable[..., Any]:
    """A mask as a score modification."""
    return lambda score, b, h, q_idx, kv_idx: torch.where(mask(b, h, q_idx, kv_idx), score, -float("inf"))


def temperature(scale: Tensor) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: score * scale.exp() + 0.5 * (q_idx % 2 == 0)


class Learned(torch.nn.Module):
    """A module that holds its bias as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(randn(HEADS, LENGTH, LENGTH), requires_grad=False)

    def score_mod(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + self.bias[h, q_idx, kv_idx]


def chained(*mods: Callable[..., Any]) -> Callable[..., Any]:
    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for one in mods:
            score = one(score, b, h, q_idx, kv_idx)
        return score

    return mod


DOCUMENT, WIDE = documents_of(OFFSETS), randn(LENGTH, LENGTH)
SCORES: dict[str, Callable[..., Any]] = {
    "unchanged": lambda score, b, h, q_idx, kv_idx: score,
    "alibi": alibi(HEADS),
    "alibi table": alibi_table(torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    "softcap": softcap(3.0),
    "approximate softcap": approximate_softcap(3.0),
    "relative": relative(randn(HEADS, 2 * LENGTH - 1)),
    "from the end": from_the_end(randn(HEADS, 2 * LENGTH)),
    "t5": t5(randn(8, HEADS)),
    "by document": by_document(randn(9, HEADS)),
    "additive": additive(randn(2, 1, LENGTH, LENGTH)),
    "causal": hidden(causal),
    "window of documents": hidden(within_documents(sliding_window(3), OFFSETS)),
    "temperature": temperature(torch.tensor(0.3)),
    "learned": Learned().score_mod,
    "chained": chained(softcap(2.0), alibi(HEADS), hidden(dilated(10, 2))),
    "gaussian": lambda score, b, h, q_idx, kv_idx: score - (q_idx - kv_idx).float().square() / (2 * (h + 1.0) ** 2),
    "sign": lambda score, b, h, q_idx, kv_idx: torch.sign(score) * torch.sqrt(torch.abs(score)),
    "negated": lambda score, b, h, q_idx, kv_idx: -score + 1 / (1 + b),
    "gate": lambda score, b, h, q_idx, kv_idx: torch.sigmoid(score) * torch.cos(0.1 * kv_idx).clamp(-0.5, 0.9),
    "relu": lambda score, b, h, q_idx, kv_idx: torch.nn.functional.relu(score) - score.masked_fill(h == 1, 0.0),
    "an element twice": lambda score, b, h, q_idx, kv_idx: score + DOCUMENT[q_idx] * WIDE[h, DOCUMENT[q_idx]],
    "a rank twice": lambda score, b, h, q_idx, kv_idx: score + WIDE[q_idx, q_idx],
    "an element of -1": lambda score, b, h, q_idx, kv_idx: score + WIDE[h, -DOCUMENT[q_idx]],
    "hidden twice": lambda score, b, h, q_idx, kv_idx: torch.where(
        q_idx < kv_idx, -float("inf"), torch.where(q_idx - kv_idx < 3, score, torch.tensor(-torch.inf))
    ),
    "quotients of negative numbers": lambda score, b, h, q_idx, kv_idx: (
        score + (kv_idx - q_idx) // 3 + (kv_idx - q_idx) % 5 + torch.div(kv_idx - q_idx, 3, rounding_mode="trunc")
    ),
    "computed beforehand": lambda score, b, h, q_idx, kv_idx: score * WIDE[0, 0].item() + WIDE.sum(0).t()[kv_idx],
}  # fmt: skip
