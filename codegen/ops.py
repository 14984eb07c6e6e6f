"""Cascades as operators of torch.library, which traces and exported programs call."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from einsumcascade.codegen.launch import value_dtype
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of

NAMESPACE = "einsumcascade"
_OPS: dict[str, Callable[..., Any]] = {}
_REGISTERING = threading.Lock()


def registered(
    cascade: Cascade, *, choices: str, run: Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]
) -> Callable[..., Any]:
    """Return the library op of a cascade; it is registered once, whole or not at all.

    Args:
        cascade: what it computes.
        choices: text of what else tells two ops apart; the op is named by the digest of both.
        run: computes all outputs from the tensors in the order of `in`; none may share memory with an input.
    """
    text = f"{cascade}\n{choices}"
    name = f"{_clean(cascade.name)}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with _REGISTERING:
        # A definition that failed half-way is replaced by the next, so only a whole one may be remembered.
        if name not in _OPS:
            _OPS[name] = _register(name, cascade, run)
        return _OPS[name]


def _register(
    name: str, cascade: Cascade, run: Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]
) -> Callable[..., Any]:
    count = len(cascade.outputs)
    arguments = ", ".join(f"Tensor t{n}" for n in range(len(cascade.inputs)))
    result = "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"

    def real(*tensors: torch.Tensor) -> Any:
        outputs = run(list(tensors))
        return outputs[0] if count == 1 else outputs

    def fake(*tensors: torch.Tensor) -> Any:
        shapes = _output_shapes(cascade, tensors)
        main = value_dtype(tensors)
        outputs = tuple(
            tensors[0].new_empty(shape, dtype=getattr(torch, o.dtype) if o.dtype else main)
            for shape, o in zip(shapes, cascade.outputs, strict=True)
        )
        return outputs[0] if count == 1 else outputs

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", real, mutates_args=(), schema=f"({arguments}) -> {result}")
    op.register_fake(fake)
    return op


def _output_shapes(cascade: Cascade, tensors: tuple[torch.Tensor, ...]) -> list[list[Any]]:
    """Shapes of the outputs over the shapes of the inputs, which may be symbolic."""
    if any(len(i.indices) != t.dim() for i, t in zip(cascade.inputs, tensors, strict=True)):
        bind(cascade, shapes={i.tensor: tuple(t.shape) for i, t in zip(cascade.inputs, tensors, strict=True)})
    extents: dict[str, Any] = {}
    for i, t in zip(cascade.inputs, tensors, strict=True):
        for v, n in zip(i.indices, t.shape, strict=True):
            extents.setdefault(rank_of(v), n)
    einsums = {e.tensor: e for e in cascade.einsums}
    inputs = {i.tensor: i for i in cascade.inputs}
    out = []
    for o in cascade.outputs:
        free = einsums[o.tensor].free if o.tensor in einsums else inputs[o.tensor].indices
        if any(rank_of(v) not in extents for v in free):
            extents = {**bind(cascade, extents={r: int(n) for r, n in extents.items()}).extents, **extents}
        out.append([extents[rank_of(v)] for v in free])
    return out


def _clean(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
