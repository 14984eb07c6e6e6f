"""Tiles as PyTorch tensors: what loads, reductions, products and expressions give where a program stands."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from einsumcascade.codegen.kernel_ir import Count, Dot, Load, Reduce, TileKernel
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var, rank_of

Axes = tuple[str, ...]
# Operators without a symbol that keep whole numbers whole.
WHOLE = ("ieee_sub", "quotient", "max", "min", "abs", "select", "narrow", "below", "above")


@dataclass(frozen=True, slots=True)
class Tile:
    """A value and the variables of its dimensions."""

    data: Any
    axes: Axes


@dataclass(slots=True)
class Place:
    """Where a program of a kernel stands, and the values there.

    Args:
        kernel: what runs. tensors: inputs, tables, buffers and outputs by name. binding: extents of the call.
        env: values computed so far, by name.
        spans: first position and end of each variable that a dimension walks.
        index: the step of each loop entered.
        position: of a loop over tiles of one rank: the expression for a position in it, and the tile's variable.
        device, dtype: of what is computed. order: variables in the order of dimensions.
    """

    kernel: TileKernel
    tensors: dict[str, torch.Tensor]
    binding: Binding
    env: dict[str, Tile] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    index: dict[str, int] = field(default_factory=dict)
    position: tuple[Expr, str] | None = None
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    order: Axes = field(init=False)

    def __post_init__(self) -> None:
        self.device = next((t.device for t in self.tensors.values()), torch.device("cpu"))
        wide = any(t.dtype == torch.float64 for t in self.tensors.values())
        self.dtype = torch.float64 if wide else torch.float32
        self.order = (*self.kernel.batch, *self.kernel.axes)

    def _load(self, s: Load) -> Tile:
        tensor = self.tensors[s.tensor]
        slices: list[Any] = []
        axes: list[str] = []
        for i in s.indices:
            v = self._span_of(i)
            if v is None or v in axes:
                return self._gather(s, tensor)
            lo, hi = self.spans[v]
            if hi > tensor.shape[len(slices)]:
                return self._gather(s, tensor)
            slices.append(slice(lo, hi))
            axes.append(v)
        return self._sorted(Tile(tensor[tuple(slices)], tuple(axes)))

    def _count(self, s: Count) -> Tile:
        row = self.tensors[s.tensor][tuple(slice(None) if i is None else int(self._of(i).data) for i in s.indices)]
        limit = torch.as_tensor(self._of(s.limit).data, device=self.device).reshape(())
        return Tile(int((row[: int(self._of(s.length).data)] <= limit).sum()), ())

    def _span_of(self, i: Expr) -> str | None:
        """The axis that an index walks one by one, if it does."""
        if self.position is not None and i == self.position[0]:
            return self.position[1]
        walks = isinstance(i, Var) and i.name in self.spans and not (self.position and i.name == self.position[1])
        return i.name if walks and isinstance(i, Var) else None

    def _gather(self, s: Load, tensor: torch.Tensor) -> Tile:
        parts = [self._of(i) for i in s.indices]
        axes = self._union(parts)
        index = []
        for n, p in enumerate(parts):
            at = torch.as_tensor(p.data, device=self.device)
            index.append(self._aligned(Tile(at, p.axes), axes).to(torch.int64).clamp(0, max(tensor.shape[n] - 1, 0)))
        data = tensor[tuple(index)] if index else tensor
        if s.mask:
            live = self._condition(s.mask, axes)
            data = torch.where(live, data, torch.zeros((), dtype=data.dtype, device=self.device))
        return Tile(data, axes)

    def _condition(self, conditions: tuple[Expr, ...], axes: Axes) -> torch.Tensor:
        out = torch.ones((), dtype=torch.bool, device=self.device)
        for c in conditions:
            value = self._of(c)
            out = out & self._aligned(Tile(torch.as_tensor(value.data, device=self.device), value.axes), axes)
        return out

    def _reduce(self, s: Reduce) -> Tile:
        value = self._of(s.expr)
        data = torch.as_tensor(value.data, device=self.device)
        axes = self._union([value, Tile(None, s.over)])
        data = self._aligned(Tile(data, value.axes), axes)
        shape = [self._length(v) if v in s.over else data.shape[n] for n, v in enumerate(axes)]
        data = data.expand(shape)
        over = [axes.index(v) for v in s.over]
        match s.reduce:
            case "sum":
                data = data.sum(dim=over)
            case "max" | "any":
                data = data.amax(dim=over)
            case "min":
                data = data.amin(dim=over)
            case "prod":
                for d in sorted(over, reverse=True):
                    data = data.prod(dim=d)
            case _:
                raise AssertionError(s.reduce)
        return Tile(data, tuple(v for v in axes if v not in s.over))

    def _length(self, v: str) -> int:
        lo, hi = self.spans[v]
        return hi - lo

    def _dot(self, s: Dot) -> Tile:
        i, j = s.value.axes
        left, right = self._wide(self.env[s.left.name]), self._wide(self.env[s.right.name])
        batch = tuple(v for v in self.kernel.batch if v in (*left.axes, *right.axes))
        a, b = self._aligned(left, (*batch, i, s.over)), self._aligned(right, (*batch, s.over, j))
        data = torch.matmul(a, b)
        axes = (*batch, i, j)
        if s.accumulate is not None:
            start = self._of(s.accumulate)
            if start.axes == axes and isinstance(start.data, torch.Tensor) and isinstance(s.accumulate, Read):
                data += start.data
            else:
                axes = self._union([start, Tile(None, axes)])
                data = self._aligned(Tile(data, (*batch, i, j)), axes) + self._aligned(start, axes)
        return Tile(data, axes)

    def _of(self, expr: Expr) -> Tile:
        if self.position is not None and expr == self.position[0]:
            lo, hi = self.spans[self.position[1]]
            return Tile(torch.arange(lo, hi, device=self.device), (self.position[1],))
        match expr:
            case Num():
                return Tile(expr.value, ())
            case Var():
                return self._variable(expr.name)
            case Scalar():
                return Tile(self._scalar(expr), ())
            case Read():
                return self.env[expr.tensor]
            case Apply():
                return self._apply(expr)

    def _scalar(self, expr: Scalar) -> float:
        if not expr.is_extent:
            return self.binding.constants[expr.name]
        for axis in self.kernel.axes.values():
            if axis.rank == expr.name and axis.role == "loop":
                return axis.size
        if expr.name in self.binding.extents:
            return self.binding.extents[expr.name]
        definition = next(d for d in self.kernel.cascade.ranks if rank_of(d.name) == expr.name)
        return float(self._of(definition.expr).data)

    def _variable(self, name: str) -> Tile:
        if name in self.index:
            return Tile(self.index[name], ())
        lo, hi = self.spans[name]
        return Tile(torch.arange(lo, hi, device=self.device), (name,))

    def _apply(self, expr: Apply) -> Tile:
        parts = [self._of(a) for a in expr.args]
        if not any(isinstance(p.data, torch.Tensor) for p in parts):
            return Tile(self._plain(expr, parts), ())
        whole = not any(
            p.data.is_floating_point() if isinstance(p.data, torch.Tensor) else isinstance(p.data, float) for p in parts
        )
        exact = expr.row.symbol not in ("", "/", "**") or expr.op in WHOLE
        counts = whole and exact
        parts = [p if counts or expr.row.counts else self._wide(p) for p in parts]
        if not expr.row.condition:
            parts = [p if expr.op == "select" and n == 0 else self._counted(p) for n, p in enumerate(parts)]
        axes = self._union(parts)
        args = [self._aligned(p, axes) for p in parts]
        # Of two Python numbers PyTorch's `where` makes float32; a quotient chooses its divisor by one.
        if expr.row.counts:
            return Tile(expr.row.array(torch, *args).to(self.dtype), axes)
        if expr.op == "div" or (not expr.row.symbol and not expr.op.startswith("ieee")):
            args = [
                a
                if isinstance(a, torch.Tensor)
                else torch.tensor(a, dtype=self._dtype_of(a, counts=counts), device=self.device)
                for a in args
            ]
        return Tile(expr.row.array(torch, *args), axes)

    def _dtype_of(self, number: float, *, counts: bool) -> torch.dtype:
        if isinstance(number, bool):
            return torch.bool
        return torch.int64 if counts and isinstance(number, int) else self.dtype

    def _counted(self, t: Tile) -> Tile:
        """Truth values as numbers."""
        if isinstance(t.data, torch.Tensor) and t.data.dtype == torch.bool:
            return replace(t, data=t.data.to(self.dtype))
        return t

    def _plain(self, expr: Apply, parts: list[Tile]) -> float:
        value = Apply(op=expr.op, args=tuple(Num(value=p.data) for p in parts))
        return self.binding.value(value)

    def _wide(self, t: Tile) -> Tile:
        if isinstance(t.data, torch.Tensor) and t.data.dtype not in (self.dtype, torch.bool):
            return replace(t, data=t.data.to(self.dtype))
        return t

    def _union(self, parts: list[Tile]) -> Axes:
        wanted = {v for p in parts for v in p.axes}
        return tuple(v for v in self.order if v in wanted)

    def _sorted(self, t: Tile) -> Tile:
        axes = self._union([t])
        return t if axes == t.axes else Tile(t.data.permute([t.axes.index(v) for v in axes]), axes)

    def _aligned(self, t: Tile, axes: Axes) -> Any:
        """The data with one dimension for each of `axes`, of length 1 where the value lacks it."""
        if t.axes == axes or not isinstance(t.data, torch.Tensor) or not t.axes:
            return t.data
        here = tuple(v for v in axes if v in t.axes)
        data = t.data if here == t.axes else t.data.permute([t.axes.index(v) for v in here])
        if len(here) == len(axes):
            return data
        return data[tuple(slice(None) if v in here else None for v in axes)]
