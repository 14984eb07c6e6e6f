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
    count = len(cascade.outputs)
    arguments = ", ".join(f"Tensor t{n}" for n in range(len(cascade.inputs)))
    result = "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"

    def real(*tensors: torch.Tensor) -> Any:
        outputs = run(list(tensors))
        return outputs[0] if count == 1 else outputs

    def fake(*tensors: torch.Tensor) -> Any:
        outputs = outputs_like(cascade, tensors)
        return outputs[0] if count == 1 else tuple(outputs)

    op: Callable[..., Any] = define(cascade, choices, f"({arguments}) -> {result}", real, fake)
    return op


def define(cascade: Cascade, choices: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator once, whole or not at all; it is named by the digest of the cascade and the choices."""
    digest = hashlib.sha256(f"{cascade}\n{choices}".encode()).hexdigest()[:16]
    name = f"{_clean(cascade.name)}_{digest}"
    with _REGISTERING:
        # A definition that failed half-way is replaced by the next, so only a whole one may be remembered.
        if name not in _OPS:
            op = torch.library.custom_op(f"{NAMESPACE}::{name}", real, mutates_args=(), schema=schema)
            op.register_fake(fake)
            _OPS[name] = op
        return _OPS[name]


def outputs_like(cascade: Cascade, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Empty tensors of the shapes and dtypes of the outputs."""
    main = value_dtype(tensors)
    return [
        tensors[0].new_empty(shape, dtype=getattr(torch, o.dtype) if o.dtype else main)
        for shape, o in zip(_output_shapes(cascade, tensors), cascade.outputs, strict=True)
    ]


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
