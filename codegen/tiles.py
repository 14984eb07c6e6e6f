"""Which tiles a kernel visits, and which of them it tests: its own loop bounds, executed without the work inside."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from einsumcascade.codegen.kernel_ir import (
    Count,
    Load,
    Loop,
    Map,
    Reduce,
    Segment,
    Stmt,
    TileKernel,
    all_statements,
    bounding,
)
from einsumcascade.codegen.launch import Built, program_binding
from einsumcascade.codegen.run_torch import Run
from einsumcascade.codegen.tables import tables_of
from einsumcascade.errors import Diagnostic, InputError
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import rank_of

SKIPPED, TESTED, FULL = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TileMap:
    """How one loop of a kernel treats each tile.

    Args:
        kernel: its name. rank: the rank that the loop walks, and `step`: elements of a tile of it.
        axes: variables of the programs: batch variables, then tiled ones; `sizes`: elements of a tile of each.
        states: one axis for each of `axes`, then tiles of the rank: 0 skipped, 1 visited with a test, 2 as full.
    """

    kernel: str
    rank: str
    step: int
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    states: torch.Tensor

    @property
    def visited(self) -> int:
        """Tiles visited by all programs."""
        return int((self.states > SKIPPED).sum())

    @property
    def full(self) -> int:
        """Tiles visited without a test."""
        return int((self.states == FULL).sum())


def tile_maps(built: Built, tensors: Mapping[str, torch.Tensor], extents: Mapping[str, int]) -> tuple[TileMap, ...]:
    """Classify every tile of every loop that is walked by tiles.

    Args:
        built: kernels with their schedule.
        tensors: inputs that conditions read, on a CPU; others need not be given.
        extents: of all ranks that no given tensor shows.

    Returns: a map for each such loop, in the order of the kernels' texts.
    Raises: InputError: an extent is missing or contradicts a tensor, or a tensor that a bound reads is not given.
    Cost: one step of Python a tile.
    """
    binding = program_binding(built.program, _bound(built, tensors, extents))
    out: list[TileMap] = []
    for kernel in built.kernels:
        loops = [s for s in all_statements(kernel.body) if isinstance(s, Loop) and s.inner is not None]
        axes = (*kernel.batch, *kernel.tiles)
        sizes = tuple(kernel.axes[v].size if v in kernel.tiles else 1 for v in axes)
        shape = [-(-binding.extents[rank_of(v)] // n) for v, n in zip(axes, sizes, strict=True)]
        states = [torch.zeros([*shape, -(-binding.extents[s.rank] // s.step)], dtype=torch.int8) for s in loops]
        _require(kernel, tensors)
        _Tracer(
            kernel,
            {**tensors, **tables_of(kernel, tensors)},
            binding,
            maps=dict(zip(map(id, loops), states, strict=True)),
            sizes=sizes,
        ).run()
        out += [
            TileMap(kernel=kernel.name, rank=s.rank, step=s.step, axes=axes, sizes=sizes, states=x)
            for s, x in zip(loops, states, strict=True)
        ]
    return tuple(out)


def _bound(built: Built, tensors: Mapping[str, torch.Tensor], extents: Mapping[str, int]) -> Binding:
    """Bind extents to those given and to the shapes of some of the inputs."""
    known = dict(extents)
    for i in built.cascade.inputs:
        if i.tensor in tensors:
            partly = replace(built.cascade, inputs=(i,), ranks=())
            shown = bind(partly, shapes={i.tensor: tuple(tensors[i.tensor].shape)}).extents
            for rank, n in shown.items():
                if known.setdefault(rank, n) != n:
                    bind(built.cascade, extents={rank: known[rank]}, shapes={i.tensor: tuple(tensors[i.tensor].shape)})
            known |= shown
    return bind(built.cascade, extents=known)


def _require(kernel: TileKernel, tensors: Mapping[str, torch.Tensor]) -> None:
    needed, _ = bounding(kernel.body)
    made = {t.name: t.tensor for t in kernel.tables}
    for s in all_statements(kernel.body):
        if isinstance(s, Load | Count) and s.value.name in needed and made.get(s.tensor, s.tensor) not in tensors:
            raise InputError(
                diagnostics=(
                    Diagnostic(
                        code="missing-input",
                        headline=f"{made.get(s.tensor, s.tensor)} not given",
                        rule="tensors that bounds of loops read decide which tiles are visited",
                    ),
                )
            )


@dataclass(slots=True)
class _Tracer(Run):
    """A run that executes what bounds need, and notes each tile instead of computing it."""

    maps: Mapping[int, torch.Tensor] = field(kw_only=True)
    sizes: tuple[int, ...] = field(kw_only=True)
    needed: frozenset[str] = field(init=False, default=frozenset())

    def run(self) -> None:
        self.needed, _ = bounding(self.kernel.body)
        super(_Tracer, self).run()

    def _batches(self) -> list[dict[str, tuple[int, int]]]:
        each = [[(i, i + 1) for i in range(self.binding.extents[rank_of(v)])] for v in self.kernel.batch]
        return [dict(zip(self.kernel.batch, spans, strict=True)) for spans in itertools.product(*each)]

    def _block(self, body: tuple[Stmt, ...]) -> None:
        for s in body:
            if isinstance(s, Loop) or (isinstance(s, Load | Count | Map | Reduce) and s.value.name in self.needed):
                super(_Tracer, self)._block((s,))

    def _visit(self, loop: Loop, segment: Segment, start: int) -> None:
        if id(loop) in self.maps:
            at = [
                self.spans[v][0] // n for v, n in zip((*self.kernel.batch, *self.kernel.tiles), self.sizes, strict=True)
            ]
            self.maps[id(loop)][(*at, start // loop.step)] = TESTED if segment.tested else FULL
