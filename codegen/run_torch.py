"""Execute a kernel's statements in PyTorch, tile by tile: what a tensor on a CPU runs.

The same tree that the Triton printer prints. Axes are clipped to their extents instead of padded, batch variables
are leading dimensions, and memory does not grow with the product of two lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    bounding,
    first,
    last,
)
from einsumcascade.codegen.launch import Built, allocate, finished, program_binding
from einsumcascade.codegen.torch_tiles import Axes, Place, Tile
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Num, Scalar, Var, apply, rank_of
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.roles import grid_tiles
from einsumcascade.schedules.schedule import KernelSchedule, Schedule, tiled_variables

TILE = 512
ELEMENTS = 1 << 21


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
        inputs: by name, any strides. binding: extents of the call.

    Returns: the outputs by name.
    Cost: the arithmetic of the streamed form; temporaries of some 2^21 elements, whatever the lengths.
    """
    tensors = allocate(built, inputs, binding)
    binding = program_binding(built.program, binding)
    with torch.no_grad():
        for kernel in built.kernels:
            Run(kernel, tensors, binding).run()
    return finished(built, inputs, tensors)


@dataclass(slots=True)
class Run(Place):
    """One kernel on given tensors, tile by tile."""

    def run(self) -> None:
        """Execute every program of the grid."""
        k = self.kernel
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
