"""What the plain formula has written so far, and the values of expressions over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from einsumcascade.codegen.plain_ops import Value, operation
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Expr,
    Iter,
    Num,
    Read,
    Statement,
    Var,
    reads,
    substitute,
    variables,
)
from einsumcascade.language.shapes import index_range


def _steps(body: tuple[Statement, ...], around: tuple[str, ...] = ()) -> dict[str, set[int]]:
    """Axes along which a tensor is written one slice at a time, because an iterative rank indexes them."""
    out: dict[str, set[int]] = {}
    for s in body:
        inner = (
            _steps(s.body, (*around, s.var))
            if isinstance(s, Iter)
            else {s.tensor: {n for n, i in enumerate(s.indices) if set(variables(i)) & set(around)}}
        )
        for tensor, axes in inner.items():
            out.setdefault(tensor, set()).update(axes)
    return out


@dataclass(slots=True)
class Written:
    """Tensors written so far, cut along their iterative axes.

    Args:
        cascade, binding: what is evaluated, and its extents and constants. shapes: of every tensor.
        dtype: of the inputs, which what is written is rounded to. device: of the inputs.
        pieces: slices by tensor and by position along its cut axes. stacked: tensors in one piece.
        masks: conditions evaluated already, those that inputs and positions decide.
        steps: axes along which a tensor is cut.
        order: the variables of the Einsum at hand, in the order of its points.
    """

    cascade: Cascade
    binding: Binding
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    pieces: dict[str, dict[tuple[int, ...], Tensor]] = field(default_factory=dict)
    stacked: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[Expr, Value] = field(default_factory=dict)
    steps: dict[str, set[int]] = field(init=False)
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.steps = _steps(self.cascade.body)

    @property
    def compute(self) -> torch.dtype:
        """The dtype that is computed in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def store(self, tensor: str, indices: tuple[Expr, ...], free: tuple[str, ...], data: Tensor) -> None:
        """Keep what an Einsum wrote: a slice, or a new tensor where all its indices are plain."""
        self.stacked.pop(tensor, None)
        shape, cut = self.shapes[tensor], sorted(self.steps.get(tensor, ()))
        pieces = self.pieces.setdefault(tensor, {})
        # A free variable along an iterative axis: one slice for each of its values.
        loose = [v for n in cut for v in variables(indices[n])]
        for point in product(*(range(self.binding.extent(v)) for v in loose)):
            at: dict[str, Expr] = {v: Num(value=k) for v, k in zip(loose, point, strict=True)}
            key = tuple(int(self.binding.value(substitute(indices[n], at))) for n in cut)
            if any(not 0 <= k < shape[n] for k, n in zip(key, cut, strict=True)):
                continue
            part = data[tuple(point[loose.index(v)] if v in loose else slice(None) for v in free)]
            names = tuple(v for v in free if v not in loose)
            rest = tuple(i for n, i in enumerate(indices) if n not in cut)
            sizes = [n for k, n in enumerate(shape) if k not in cut]
            if [i.name if isinstance(i, Var) else "" for i in rest] == list(names) and list(part.shape) == sizes:
                pieces[key] = part
            else:
                old = pieces.get(key, torch.full(sizes, math.nan, dtype=data.dtype, device=self.device))
                pieces[key] = self.scatter(old.clone(), rest, names, part)

    def scatter(self, target: Tensor, indices: tuple[Expr, ...], names: tuple[str, ...], part: Tensor) -> Tensor:
        """Put the elements of a part where their indices say, those out of range nowhere."""
        places, keep = [], torch.ones(part.shape, dtype=torch.bool, device=self.device)
        for i, extent in zip(indices, target.shape, strict=True):
            value = self.evaluate(i)[0]
            place = Value(torch.as_tensor(value.data, device=self.device).long(), value.axes).over(names)
            keep = keep & (place >= 0) & (place < extent)
            places.append(place)
        target[tuple(p.expand(part.shape)[keep] for p in places)] = part[keep]
        return target

    def whole(self, tensor: str) -> Tensor:
        """A tensor in one piece; slices never written are NaN."""
        cut, shape = sorted(self.steps.get(tensor, ())), self.shapes[tensor]
        if not cut and () in self.pieces.get(tensor, {}):
            return self.pieces[tensor][()]
        if tensor not in self.stacked:
            pieces = self.pieces.get(tensor, {})
            sizes = [n for k, n in enumerate(shape) if k not in cut]
            blank = torch.full(sizes, math.nan, dtype=self.dtype, device=self.device)
            keys = list(product(*(range(shape[n]) for n in cut)))
            parts = [pieces.get(k, blank) for k in keys]
            flat = torch.stack(parts) if parts else blank.new_empty([0, *sizes])
            flat = flat.reshape([shape[n] for n in cut] + sizes)
            order = cut + [n for n in range(len(shape)) if n not in cut]
            self.stacked[tensor] = flat.permute([order.index(n) for n in range(len(shape))])
        return self.stacked[tensor]

    def evaluate(self, expr: Expr, *, top: bool = False) -> tuple[Value, list[Value]]:
        """Value of an expression, and truth values that say where all it reads is in range.

        At the top of a map one operation on stored tensors may be PyTorch's own in their dtype: it rounds once.
        """
        if not variables(expr) and not reads(expr):
            return Value(self.binding.value(expr)), []
        match expr:
            case Var():
                return Value(torch.arange(self.binding.extent(expr.name), device=self.device), (expr.name,)), []
            case Read():
                return self.read(expr)
            case Apply(op="select"):
                (c, c_in), (x, x_in), (y, y_in) = (self.evaluate(a) for a in expr.args)
                inside = list(c_in)
                if x_in or y_in:
                    held = [self.all(m) or self.truth(Value(True)) for m in (x_in, y_in)]
                    inside.append(self.join(torch.where, self.truth(c), *held))
                return self.join(torch.where, self.truth(c), self.single(x), self.single(y)), inside
            case Apply():
                found = [self.evaluate(a) for a in expr.args]
                inside = [m for _, masks in found for m in masks]
                args = [v for v, _ in found]
                symbol, condition = expr.row.symbol, expr.row.condition
                simple = top and len(args) == 2 and symbol in ("+", "-", "*", "/")
                if not expr.row.counts and not (
                    simple and all(isinstance(a.data, Tensor) and a.data.dtype == self.dtype for a in args)
                ):
                    args = self.widen(args, integers=condition or symbol in ("+", "-", "*", "//", "%"))
                return self.join(operation(expr), *args), inside
            case _:
                raise AssertionError(expr)

    def single(self, v: Value) -> Value:
        """A value in the dtype of computation."""
        if isinstance(v.data, Tensor):
            return v if v.data.dtype == self.compute else Value(v.data.to(self.compute), v.axes)
        return Value(torch.tensor(float(v.data), dtype=self.compute, device=self.device), ())

    def truth(self, v: Value) -> Value:
        """A value as truth values."""
        return Value(torch.as_tensor(v.data, device=self.device).bool(), v.axes)

    def widen(self, args: list[Value], *, integers: bool) -> list[Value]:
        """Operands whose operation PyTorch performs in the dtype of computation, or in integers."""
        tensors = [v.data for v in args if isinstance(v.data, Tensor)]
        whole = all(not t.is_floating_point() for t in tensors)
        if integers and whole and all(isinstance(v.data, Tensor | int) for v in args):
            return [v if isinstance(v.data, Tensor) else Value(torch.tensor(v.data, device=self.device)) for v in args]
        if len(tensors) == 2 and all(t.is_floating_point() and t.ndim for t in tensors):
            # Type promotion widens the larger operand inside the kernel, without a copy.
            small = min(range(2), key=lambda n: tensors[n].numel())
            return [self.single(v) if n == small else v for n, v in enumerate(args)]
        return [self.single(v) for v in args]

    def join(self, f: Callable[..., Any], *args: Value) -> Value:
        """Apply an operation to operands laid along the union of their variables."""
        named = {v for a in args for v in a.axes}
        axes = tuple(v for v in self.order if v in named)
        return Value(f(*(a.over(axes) for a in args)), axes)

    def all(self, masks: list[Value]) -> Value | None:
        """Where all masks hold, None for no mask."""
        out: Value | None = None
        for m in masks:
            out = m if out is None else self.join(torch.logical_and, out, m)
        return out

    def where(self, live: Value, value: Value, otherwise: float) -> Value:
        """A value where a mask holds, and a number elsewhere."""
        filled = value if isinstance(value.data, Tensor) and value.data.is_floating_point() else self.single(value)
        return self.join(lambda c, x: torch.where(c, x, otherwise), live, filled)

    def condition(self, expr: Expr) -> Value:
        """Where a condition holds and all it reads is in range."""
        if expr not in self.masks or any(self.cascade.input(r.tensor) is None for r in reads(expr)):
            value, inside = self.evaluate(expr)
            truth = self.truth(value)
            self.masks[expr] = self.all([truth, *inside]) or truth
        return self.masks[expr]

    def read(self, expr: Read) -> tuple[Value, list[Value]]:
        """The elements that a read has, and truth values that say where they are in range."""
        cut, shape = sorted(self.steps.get(expr.tensor, ())), self.shapes[expr.tensor]
        indices, data = list(expr.indices), None
        if cut and not any(variables(indices[n]) or reads(indices[n]) for n in cut):
            key = tuple(int(self.binding.value(indices[n])) for n in cut)
            data = self.pieces.get(expr.tensor, {}).get(key)
            if all(0 <= k < shape[n] for k, n in zip(key, cut, strict=True)) and data is not None:
                indices = [i for n, i in enumerate(indices) if n not in cut]
            else:
                data = None
        if data is None:
            data = self.whole(expr.tensor)
        axes: list[Any] = []
        inside: list[Value] = []
        for i in indices:
            n, extent = len(axes), data.shape[len(axes)]
            if isinstance(i, Var) and self.binding.extent(i.name) == extent and i.name not in axes:
                axes.append(i.name)
                continue
            place, masks = self.evaluate(i)
            inside += masks
            span = None if reads(i) else index_range(i, self.binding)
            safe = span is not None and span[0] >= 0 and span[1] < extent
            if not isinstance(place.data, Tensor) and safe:
                data = data.select(n, int(place.data))
                continue
            at = torch.as_tensor(place.data, device=self.device)
            if not safe:
                inside.append(Value((at >= 0) & (at < extent) & (at == at.floor()), place.axes))
                at = at.nan_to_num(0.0).clamp(0, max(extent - 1, 0))
            axes.append(Value(at.long(), place.axes))
        if data.numel() == 0 and any(isinstance(a, Value) for a in axes):
            return Value(math.nan), [Value(torch.tensor(False, device=self.device))]
        computed = [n for n, a in enumerate(axes) if isinstance(a, Value)]
        if not computed:
            return Value(data, tuple(axes)), inside
        n, plain = computed[0], [a for a in axes if isinstance(a, str)]
        if len(computed) == 1 and not set(axes[n].axes) & set(plain):
            at = axes[n].data
            data = data.index_select(n, at.reshape(-1)).reshape([*data.shape[:n], *at.shape, *data.shape[n + 1 :]])
            return Value(data, (*axes[:n], *axes[n].axes, *axes[n + 1 :])), inside
        every = tuple(dict.fromkeys(v for a in axes for v in ([a] if isinstance(a, str) else a.axes)))
        places = [
            Value(torch.arange(data.shape[k], device=self.device), (a,)) if isinstance(a, str) else a
            for k, a in enumerate(axes)
        ]
        return Value(data[tuple(p.over(every) for p in places)], every), inside
