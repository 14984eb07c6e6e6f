"""Cascades as operators of torch.library, which traces and exported programs call."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from einsumcascade.codegen.dtypes import output_dtype, value_dtype
from einsumcascade.codegen.runner import shared
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.rewrites.algebra import names_taken
from einsumcascade.schedules.schedule import Schedule

NAMESPACE = "einsumcascade"
_OPS: dict[str, Callable[..., Any]] = {}
_REGISTERING = threading.Lock()


def registered(
    cascade: Cascade,
    *,
    precision: str | None = None,
    schedule: Schedule | None = None,
    wide: frozenset[str] = frozenset(),
) -> Callable[..., Any]:
    """Return the library op of a cascade; it is registered once, whole or not at all.

    It records no gradient. Under `torch.func.vmap` it is the op of the cascade with one more batch rank.

    Args:
        cascade: what it computes.
        precision, schedule, wide: see `Runner`; the op is named by the digest of all.
    """
    choices = choices_of(precision, schedule, wide)
    name = _name(cascade, choices)
    if name in _OPS:
        return _OPS[name]
    count = len(cascade.outputs)
    arguments = ", ".join(f"Tensor t{n}" for n in range(len(cascade.inputs)))
    result = "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"

    def real(*tensors: torch.Tensor) -> Any:
        with torch.no_grad():
            outputs = shared(cascade, precision, schedule, wide)(tensors)
        return outputs[0] if count == 1 else outputs

    def fake(*tensors: torch.Tensor) -> Any:
        outputs = outputs_like(cascade, tensors)
        return outputs[0] if count == 1 else tuple(outputs)

    def batched(info: Any, axes: tuple[int | None, ...], *tensors: torch.Tensor) -> Any:
        more, given, out = with_batch(cascade, axes, tensors)
        outputs = registered(more, precision=precision, schedule=schedule, wide=wide)(*given)
        return outputs, out[0] if count == 1 else out

    op: Callable[..., Any] = define(cascade, choices, f"({arguments}) -> {result}", real, fake, batched)
    return op


def with_batch(
    cascade: Cascade, axes: tuple[int | None, ...], tensors: tuple[torch.Tensor, ...]
) -> tuple[Cascade, list[torch.Tensor], tuple[int | None, ...]]:
    """A cascade over one more batch rank, its tensors, and the axis of each output that walks that rank.

    Args:
        cascade: one example. axes: of each input, the axis of the batch, None where it has none. tensors: the inputs.
    """
    names = [i.tensor for i, axis in zip(cascade.inputs, axes, strict=True) if axis is not None]
    taken = set(names_taken(cascade))
    variable = next(v for n in itertools.count() if not {v := f"n{n}", rank_of(v)} & taken)
    more = replace(cascade.over(variable, *names), name=cascade.name)
    given = [t if axis is None else t.movedim(axis, 0) for t, axis in zip(tensors, axes, strict=True)]
    ranks = {i.tensor: i.indices for i in more.inputs} | {e.tensor: e.free for e in more.einsums}
    return more, given, tuple(0 if ranks[o][:1] == (variable,) else None for o in more.output_names)


def choices_of(precision: str | None, schedule: Schedule | None, wide: frozenset[str] = frozenset()) -> str:
    """Text of what tells two ops of a cascade apart."""
    return f"{precision}\n{schedule.to_json() if schedule else ''}\n{','.join(sorted(wide))}"


def define(
    cascade: Cascade,
    choices: str,
    schema: str,
    real: Callable[..., Any],
    fake: Callable[..., Any],
    batched: Callable[..., Any],
) -> Any:
    """Define an operator once, whole or not at all; it is named by the digest of the cascade and the choices."""
    name = _name(cascade, choices)
    with _REGISTERING:
        # A definition that failed half-way is replaced by the next, so only a whole one may be remembered.
        if name not in _OPS:
            op = torch.library.custom_op(f"{NAMESPACE}::{name}", real, mutates_args=(), schema=schema)
            op.register_fake(fake)
            op.register_vmap(batched)
            _OPS[name] = op
        return _OPS[name]


def _name(cascade: Cascade, choices: str) -> str:
    digest = hashlib.sha256(f"{cascade}\n{choices}".encode()).hexdigest()[:16]
    return f"{_clean(cascade.name)}_{digest}"


def outputs_like(cascade: Cascade, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Empty tensors of the shapes and dtypes of the outputs."""
    main = value_dtype(tensors)
    return [
        tensors[0].new_empty(shape, dtype=output_dtype(o, main))
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
