"""Which tiles a kernel visits, and which of them it tests: its own loop bounds, executed without the work inside."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from einsumcascade.codegen.kernel_ir import Load, Loop, Map, Reduce, Segment, Stmt, all_statements, bounding
from einsumcascade.codegen.launch import Built, program_binding
from einsumcascade.codegen.run_torch import Run
from einsumcascade.language.extents import Binding
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


def tile_maps(built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding) -> tuple[TileMap, ...]:
    """Classify every tile of every loop that is walked by tiles.

    Args:
        built: kernels with their schedule.
        inputs: tensors that conditions read, on a CPU; no other is looked at.
        binding: extents and constants.

    Returns: a map for each such loop, in the order of the kernels' texts.
    Cost: one step of Python a tile.
    """
    binding = program_binding(built.program, binding)
    out: list[TileMap] = []
    for kernel in built.kernels:
        loops = [s for s in all_statements(kernel.body) if isinstance(s, Loop) and s.inner is not None]
        axes = (*kernel.batch, *kernel.tiles)
        sizes = tuple(kernel.axes[v].size if v in kernel.tiles else 1 for v in axes)
        shape = [-(-binding.extents[rank_of(v)] // n) for v, n in zip(axes, sizes, strict=True)]
        states = [torch.zeros([*shape, -(-binding.extents[s.rank] // s.step)], dtype=torch.int8) for s in loops]
        _Tracer(kernel, dict(inputs), binding, maps=dict(zip(map(id, loops), states, strict=True)), sizes=sizes).run()
        out += [
            TileMap(kernel=kernel.name, rank=s.rank, step=s.step, axes=axes, sizes=sizes, states=x)
            for s, x in zip(loops, states, strict=True)
        ]
    return tuple(out)


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
            if isinstance(s, Loop) or (isinstance(s, Load | Map | Reduce) and s.value.name in self.needed):
                super(_Tracer, self)._block((s,))

    def _visit(self, loop: Loop, segment: Segment, start: int) -> None:
        if id(loop) in self.maps:
            at = [
                self.spans[v][0] // n for v, n in zip((*self.kernel.batch, *self.kernel.tiles), self.sizes, strict=True)
            ]
            self.maps[id(loop)][(*at, start // loop.step)] = TESTED if segment.tested else FULL
