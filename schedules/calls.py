"""The form that a call takes by rule: packing for few queries, split-K for few programs and many keys.

It depends on lengths, which no text does. So it is one of a few: parts are of three numbers, tiles of few rows of two
sizes, and one text serves all the lengths of a form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Expr, Iter, rank_of
from einsumcascade.schedules.pack import packings
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import grid_tiles
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.schedules.shared_memory import shared_memory

# Numbers of parts of a reduced rank, and the least length of one. Shorter ranks leave a call its usual form.
PARTS = (8, 32, 128)
LEAST_PART = 128
# Keys of a part for each row of its tile: what it leaves in memory is a quarter of the keys and values that it reads.
KEYS_A_ROW = 8
# Tiles of few rows: of one instruction of a matrix unit for a warp, and for four warps together. What has more queries
# than the latter fills tiles without packing.
ROWS = (16, 64)
ROW_WARPS = 4
# A multiprocessor streams more than one tile of keys and values within the latency of its memory: two are on their way.
ROW_STAGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the lengths of a call decide.

    Args:
        pack: a variable and the tile that it joins. split: a variable and its number of parts.
        rows: of the tile of queries; 0: as usual.
    """

    pack: tuple[tuple[str, str], ...] = ()
    split: tuple[tuple[str, int], ...] = ()
    rows: int = 0

    @property
    def schedule(self) -> Schedule:
        """The form of the program, without choices for its kernels."""
        return Schedule(pack=dict(self.pack), split=dict(self.split))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What decides the form of a call, read off the program once.

    Args:
        batch: residents of one program for each value. tiled: the residents that are tiled, at most one; `tile`:
            elements of its tile.
        loop: the reduced variable. groups: variables that may join the tile, and how many values a group has.
    """

    batch: tuple[str, ...]
    tiled: tuple[str, ...]
    tile: int
    loop: str
    groups: Mapping[str, Expr]

    def form(self, binding: Binding, target: GpuTarget) -> Form:
        """The form of a call.

        Args:
            binding: of the call. target: its multiprocessors are to have programs.

        Cost: some microseconds.
        """
        extents = binding.extents
        keys, rows = extents[rank_of(self.loop)], math.prod(extents[rank_of(v)] for v in self.tiled)
        if keys < PARTS[0] * LEAST_PART or rows == 0:
            return Form()
        programs = math.prod(extents[rank_of(v)] for v in self.batch)
        pack: tuple[tuple[str, str], ...] = ()
        tile, few = self.tile, rows <= ROWS[-1]
        if few:
            sizes = {v: int(binding.value(n)) for v, n in self.groups.items()}
            inner = max(sizes, key=sizes.__getitem__, default="")
            if inner and sizes[inner] > 1:
                pack = ((inner, self.tiled[0] if self.tiled else inner),)
                extent = extents[rank_of(inner)]
                programs = programs // max(extent, 1) * -(-extent // sizes[inner])
                rows *= sizes[inner]
            tile = min(self.tile or ROWS[1], ROWS[0] if rows <= ROWS[0] else ROWS[1])
        programs *= -(-rows // tile)
        split = tuple((self.loop, n) for n in (_parts(programs, keys, tile, target),) if n > 1)
        return Form(pack=pack, split=split, rows=tile if few else 0)


def _parts(programs: int, keys: int, tile: int, target: GpuTarget) -> int:
    """Parts of a rank that give the multiprocessors programs, none shorter than is worth one; 1: leave it whole."""
    if programs == 0 or 4 * programs > 3 * target.multiprocessors:
        return 1
    possible = [n for n in PARTS if keys >= n * max(LEAST_PART, KEYS_A_ROW * tile)]
    enough = [n for n in possible if n * programs >= target.multiprocessors]
    return min(enough, default=max(possible, default=1))


def rule_of(program: Program, usual: Schedule) -> Rule | None:
    """The rule for calls of a program; None where they have one form: several kernels, or no single loop over a rank.

    Args:
        program: of the plain form. usual: the schedule that it has whatever the lengths.
    """
    if len(program.kernels) != 1:
        return None
    (k,) = program.kernels
    grid = grid_tiles(k)
    if len(k.loops) != 1 or len(grid) > 1 or any(isinstance(s, Iter) for s in k.cascade.body) or k.scattered:
        return None
    return Rule(
        batch=tuple(v for v in k.residents if v not in grid),
        tiled=grid,
        tile=usual.kernels[k.name].tiles[grid[0]] if grid else 0,
        loop=k.loops[0],
        groups=_groups(k, program.bounded),
    )


def _groups(k: Kernel, bounded: tuple[str, ...]) -> dict[str, Expr]:
    return {inner: made.packed.group for inner, _, made in packings(k, bounded) if made.packed is not None}


def with_rows(
    program: Program, schedule: Schedule, form: Form, *, extents: Mapping[str, int], dtype_bytes: int, target: GpuTarget
) -> Schedule:
    """A schedule with tiles for as many rows as a form says, in kernels that loop.

    Args:
        extents: of the bounded ranks at least. dtype_bytes, target: as for the schedule.
    """
    if not form.rows:
        return schedule
    kernels = dict(schedule.kernels)
    for k in program.kernels:
        grid = grid_tiles(k)
        own = kernels[k.name]
        if not k.loops or len(grid) != 1 or own.tiles[grid[0]] <= form.rows:
            continue
        tiles = {v: form.rows if v in grid else n for v, n in own.tiles.items()}
        own = replace(own, tiles=tiles, warps=min(own.warps, ROW_WARPS))
        deep = replace(own, stages=max(own.stages, ROW_STAGES))
        asked = shared_memory(program, k, deep, extents=extents, dtype_bytes=dtype_bytes, target=target)
        kernels[k.name] = deep if 2 * asked.predicted <= target.shared_memory_bytes else own
    return replace(schedule, kernels=kernels)
