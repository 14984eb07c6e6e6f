"""Execute a kernel's statements in PyTorch, tile by tile: what a tensor on a CPU runs.

The same tree that the Triton printer prints. Axes are clipped to their extents instead of padded, batch variables
are leading dimensions, and memory does not grow with the product of two lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from einsumcascade.codegen.kernel_ir import (
    Count,
    Dot,
    Load,
    Loop,
    Map,
    Reduce,
    Segment,
    Stmt,
    Store,
    TileKernel,
    bounding,
    first,
    last,
)
from einsumcascade.codegen.launch import Built, allocate, finished, program_binding
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var, apply, rank_of
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.roles import grid_tiles
from einsumcascade.schedules.schedule import KernelSchedule, Schedule, tiled_variables

TILE = 512
ELEMENTS = 1 << 21
Axes = tuple[str, ...]
# Operators without a symbol that keep whole numbers whole.
WHOLE = ("ieee_sub", "quotient", "max", "min", "abs", "select", "narrow", "below", "above")


def cpu_schedule(program: Program, extents: Mapping[str, int]) -> Schedule:
    """Tiles for a CPU: 512 where a temporary has two axes, fewer where it has a whole rank as third."""
    kernels = {}
    for k in program.kernels:
        tiled = tiled_variables(program, k.name)
        size = TILE
        widest = 1
        for e in k.cascade.einsums:
            space = [v for v in e.space if v in tiled or v in program.bounded]
            if e.reduce and len([v for v in space if v in tiled]) == 2 and len(space) > 2:
                widest = max(widest, max(extents.get(rank_of(v), 64) for v in space if v in program.bounded))
        grid = grid_tiles(k)
        while size > 32 and size * size * widest > 8 * ELEMENTS:
            size //= 2
        kernels[k.name] = KernelSchedule(tiles=dict.fromkeys(tiled, size) if grid else dict.fromkeys(tiled, 2 * TILE))
    return Schedule(kernels=kernels)


def run_on_cpu(built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding) -> dict[str, torch.Tensor]:
    """Run every kernel of a program in PyTorch.

    Args:
        built: with `cpu_schedule`.
        inputs: by name, any strides.

    Returns: the outputs by name.
    Cost: the arithmetic of the streamed form; temporaries of some 2^21 elements, whatever the lengths.
    """
    tensors = allocate(built, inputs, binding)
    binding = program_binding(built.program, binding)
    with torch.no_grad():
        for kernel in built.kernels:
            Run(kernel, tensors, binding).run()
    return finished(built, inputs, tensors)


@dataclass(frozen=True, slots=True)
class Tile:
    """A value and the variables of its dimensions."""

    data: Any
    axes: Axes


@dataclass(slots=True)
class Run:
    """One kernel on given tensors, tile by tile."""

    kernel: TileKernel
    tensors: dict[str, torch.Tensor]
    binding: Binding
    env: dict[str, Tile] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    index: dict[str, int] = field(default_factory=dict)
    position: tuple[Expr, str] | None = None

    def run(self) -> None:
        """Execute every program of the grid."""
        k = self.kernel
        self.device = next((t.device for t in self.tensors.values()), torch.device("cpu"))
        wide = any(t.dtype == torch.float64 for t in self.tensors.values())
        self.dtype = torch.float64 if wide else torch.float32
        self.order = (*k.batch, *k.axes)
        for v, axis in k.axes.items():
            if axis.role == "whole":
                self.spans[v] = (0, axis.extent or 0)
        batches = self._batches()
        for corner in itertools.product(*(self._tiles(v) for v in k.tiles)):
            for batch in batches:
                self.spans |= dict(zip(k.tiles, corner, strict=True)) | batch
                self.env.clear()
                for v, (lo, hi) in zip(k.tiles, corner, strict=True):
                    self.env[first(v)], self.env[last(v)] = Tile(lo, ()), Tile(hi - 1, ())
                self._block(k.body)

    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)
    order: Axes = field(init=False)

    def _tiles(self, v: str) -> list[tuple[int, int]]:
        extent, size = self.binding.extents[rank_of(v)], self.kernel.axes[v].size
        return [(lo, min(lo + size, extent)) for lo in range(0, extent, size)]

    def _batches(self) -> list[dict[str, tuple[int, int]]]:
        """Spans of the batch variables: outer ones one by one until what remains fits beside a tile."""
        extents = [self.binding.extents[rank_of(v)] for v in self.kernel.batch]
        tile = 1
        for axis in self.kernel.axes.values():
            tile *= axis.size if axis.role != "whole" else 1
        rest = 1
        for n in extents:
            rest *= n
        each: list[list[tuple[int, int]]] = []
        bounding = self._bounding()
        for v, n in zip(self.kernel.batch, extents, strict=True):
            split = rest * tile > ELEMENTS or v in bounding
            each.append([(i, i + 1) for i in range(n)] if split else [(0, n)] * min(n, 1))
            rest = rest // max(n, 1) if split else rest
        return [dict(zip(self.kernel.batch, spans, strict=True)) for spans in itertools.product(*each)]

    def _bounding(self) -> set[str]:
        """Batch variables that a loop bound depends on: they cannot share a loop."""
        return set(bounding(self.kernel.body)[1]) & set(self.kernel.batch)

    # --- statements ---------------------------------------------------------------------------------------------

    def _block(self, body: tuple[Stmt, ...]) -> None:
        for s in body:
            match s:
                case Load():
                    self.env[s.value.name] = self._load(s)
                case Count():
                    self.env[s.value.name] = self._count(s)
                case Map():
                    value = self._of(s.expr)
                    self.env[s.value.name] = self._filled(value, s.value.axes) if isinstance(s.expr, Num) else value
                case Reduce():
                    self.env[s.value.name] = self._reduce(s)
                case Dot():
                    self.env[s.value.name] = self._dot(s)
                case Store():
                    self._store(s)
                case Loop():
                    self._loop(s)

    def _filled(self, value: Tile, axes: Axes) -> Tile:
        return value if not axes else Tile(torch.tensor(value.data, dtype=self.dtype, device=self.device), ())

    def _loop(self, loop: Loop) -> None:
        outer = self.position
        for _ in range(loop.parts):
            self._block(loop.heads)
            self._segments(loop)
        self.position = outer

    def _segments(self, loop: Loop) -> None:
        for g in loop.segments:
            lo, hi = int(self._of(g.lo).data), int(self._of(g.hi).data)
            steps = range(lo, min(hi, self._end(loop)), loop.step)
            for start in reversed(steps) if loop.descending else steps:
                self.index[loop.index] = start // loop.step
                if loop.inner is not None:
                    inner = Scalar(name=rank_of(loop.inner))
                    product = apply("mul", Var(name=loop.index), inner)
                    self.position = (apply("add", product, Var(name=loop.inner)), loop.inner)
                    end = min(start + loop.step, self.binding.extents[loop.rank])
                    self.spans[loop.inner] = (start, end)
                else:
                    self._unaligned()
                self._block(g.tile)
                if g.live is None or bool(self._of(g.live).data):
                    self._visit(loop, g, start)
                    self._block(g.body)

    def _visit(self, loop: Loop, segment: Segment, start: int) -> None:
        """Take note of a tile."""

    def _end(self, loop: Loop) -> int:
        """Positions that a loop can have: those within its rank."""
        return int(self._scalar(Scalar(name=loop.rank))) if loop.inner is not None else 1 << 62

    def _unaligned(self) -> None:
        """A loop whose position is not a tile of one rank: its tile variable walks its whole extent."""
        for v, axis in self.kernel.axes.items():
            if axis.role == "loop":
                self.spans[v] = (0, axis.size)

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

    def _store(self, s: Store) -> None:
        out = self.tensors[s.tensor]
        if s.adds:
            self._add(s, out)
            return
        names = tuple(i.name for i in s.indices if isinstance(i, Var))
        value = self._of(s.expr)
        data = torch.as_tensor(value.data, device=self.device)
        place = tuple(self.index[v] if v in self.index else slice(*self.spans[v]) for v in names)
        kept = tuple(v for v in names if v not in self.index)
        out[place] = self._aligned(Tile(data, value.axes), kept).to(out.dtype)

    def _add(self, s: Store, out: torch.Tensor) -> None:
        """Add a tile to elements of an output, which several of its points may share."""
        walked = [self._span_of(i) for i in s.indices]
        names = tuple(v for v in walked if v is not None)
        straight = len(names) == len(walked) == len(set(names))
        parts = [self._of(e) for e in (s.expr, *s.mask, *(() if straight else s.indices))]
        parts = [replace(t, data=torch.as_tensor(t.data, device=self.device)) for t in parts]
        axes = self._union([*parts, Tile(None, names)])
        value, *rest = (self._aligned(t, axes) for t in parts)
        for m in rest[: len(s.mask)]:
            value = torch.where(m, value, torch.zeros((), dtype=value.dtype, device=self.device))
        # Programs whose number the value does not depend on add it once each.
        for v in self.kernel.batch:
            value = value * self._length(v) if v not in axes else value
        if straight:
            over = [n for n, v in enumerate(axes) if v not in names]
            value = value.sum(dim=over) if over else value
            kept = tuple(v for v in axes if v in names)
            out[tuple(slice(*self.spans[v]) for v in names)] += self._aligned(Tile(value, kept), names).to(out.dtype)
            return
        places = rest[len(s.mask) :]
        shape = torch.broadcast_shapes(value.shape, *(t.shape for t in places))  # type: ignore[no-untyped-call]
        inside = tuple(i.expand(shape).to(torch.int64).clamp(0, n - 1) for i, n in zip(places, out.shape, strict=True))
        if out.numel():
            out.index_put_(inside, value.expand(shape).to(out.dtype), accumulate=True)

    # --- expressions --------------------------------------------------------------------------------------------

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
