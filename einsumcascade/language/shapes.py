"""Shapes of the tensors that a cascade writes, from the ranges of the indices it writes at."""

from __future__ import annotations

import math
from itertools import product

from einsumcascade.errors import InputError
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    reads,
    variables,
    walk,
)


def tensor_shapes(cascade: Cascade, binding: Binding) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a cascade, inputs first, the others in the order of their first write.

    The extent of an axis is the largest index that any `init` or Einsum writes, plus one; so a tensor with a
    generation `m1 + 1` has one slice more than its rank. An index of two or more variables (`m1 * M0 + m0`) takes the
    extent of the rank that a read of that axis names by a plain variable, if there is one; else the largest index,
    held below what a condition `index < bound` of the Einsum says. Indices beyond the extent are not written.

    Raises: InputError: an axis is written at an index that data decide, and no read tells its extent
        (`missing-extent`).
    Cost: linear in the accesses.
    """
    shapes = {i.tensor: tuple(binding.extent(v) for v in i.indices) for i in cascade.inputs}
    writes: dict[str, list[Einsum | Init]] = {}
    readers: dict[str, list[Read]] = {}
    for s in walk(cascade.body):
        if not isinstance(s, Iter):
            writes.setdefault(s.tensor, []).append(s)
            for r in reads(s.expr, *(s.where if isinstance(s, Einsum) else ())):
                readers.setdefault(r.tensor, []).append(r)
    for tensor, by in writes.items():
        shapes[tensor] = tuple(
            _axis(cascade, binding, tensor, axis, by, readers.get(tensor, [])) for axis in range(len(by[0].indices))
        )
    return shapes


def _axis(
    cascade: Cascade, binding: Binding, tensor: str, axis: int, by: list[Einsum | Init], readers: list[Read]
) -> int:
    indices = [s.indices[axis] for s in by]
    if all(len(variables(i)) > 1 or reads(i) for i in indices):
        told = [r.indices[axis] for r in readers if axis < len(r.indices)]
        plain = [binding.extent(i.name) for i in told if isinstance(i, Var)]
        if plain:
            return max(plain)
    extent = 0
    for s, i in zip(by, indices, strict=True):
        span = index_range(i, binding)
        if span is None:
            raise InputError.of(
                "missing-extent",
                f"axis {axis} of {tensor} has no extent",
                span=s.span,
                label=f"written at {i}",
                rule="an index that data decide needs a read of that axis by a rank variable",
                source=cascade.source,
            )
        top = span[1]
        if len(variables(i)) > 1:
            top = min([top, *_limits(cascade, s, i, binding)])
        extent = max(extent, top + 1)
    return extent


def _limits(cascade: Cascade, s: Einsum | Init, index: Expr, binding: Binding) -> list[int]:
    """Largest values that conditions of the form `index < bound` leave to an index."""
    if isinstance(s, Init):
        return []
    conditions = [c for c in cascade.constraints if set(variables(c)) <= set(s.space)]
    out: list[int] = []
    for c in (*conditions, *s.where):
        match c:
            case Apply(op="lt" | "le" as op, args=(left, bound)) if left == index:
                pass
            case Apply(op="gt" | "ge" as op, args=(bound, right)) if right == index:
                pass
            case _:
                continue
        if not variables(bound) and not reads(bound):
            value = binding.value(bound)
            if math.isfinite(value):
                out.append(math.ceil(value) - 1 if op in ("lt", "gt") else math.floor(value))
    return out


def index_range(expr: Expr, binding: Binding) -> tuple[int, int] | None:
    """Least and largest value of an index expression over its ranks; (0, -1) if a rank is empty, None if unknown.

    Exact for affine expressions whose variables are distinct; an enclosure otherwise.
    """
    if any(binding.extent(v) == 0 for v in variables(expr)):
        return (0, -1)
    match expr:
        case Var():
            return 0, binding.extent(expr.name) - 1
        case Num() | Scalar():
            value = binding.value(expr)
            return (int(value), int(value)) if math.isfinite(value) and value == int(value) else None
        case Apply(op="mod", args=(x, y)):
            inner, divisor = index_range(x, binding), index_range(y, binding)
            if divisor is None or divisor[0] <= 0:
                return None
            if inner is not None and inner[0] >= 0 and inner[1] < divisor[0]:
                return inner
            return 0, divisor[1] - 1
        case Apply(op="add" | "sub" | "mul" | "neg" | "floordiv" | "min" | "max"):
            ranges = [index_range(a, binding) for a in expr.args]
            if any(r is None for r in ranges):
                return None
            spans = [r for r in ranges if r is not None]
            # A range of divisors that holds 0 has no corners to go by.
            if expr.op == "floordiv" and spans[1][0] <= 0:
                return None
            corners = [int(binding.value(apply(expr.op, *(Num(value=v) for v in c)))) for c in product(*spans)]
            return min(corners), max(corners)
        case _:
            return None
