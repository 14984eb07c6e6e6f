"""Where the ranks of a kernel go under a schedule: programs, tiles, and the tiles that each loop walks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from einsumcascade.analysis.dependence import conditions
from einsumcascade.analysis.linear import Bound, Range, bounds_of
from einsumcascade.analysis.points import with_numbers
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Iter,
    Num,
    Statement,
    Var,
    rank_of,
    reads,
    scalars,
    transform,
    walk,
)
from einsumcascade.rewrites.base_two import to_base_two
from einsumcascade.rewrites.loop_form import loop_form
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import grid_tiles, held, padded, steps_of_tiles
from einsumcascade.schedules.schedule import KernelSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop of a kernel.

    Args:
        block: its statements.
        walked: the iterative variables of the text's own loops around it, then the rank variables it reduces, outermost
            first, or its own iterative variable.
        tile: elements of the last of them that a step covers.
        bounds: on the last of them, from constraints, over tiled residents and batch ranks.
    """

    block: Iter
    walked: tuple[str, ...]
    tile: int
    bounds: tuple[Bound, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """Programs that walk the same tiles: the coordinates of some residents, and how many programs have them."""

    ranges: Mapping[str, Range]
    programs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A kernel in the form that is lowered, and where each of its ranks goes.

    Args:
        cascade: in loop form, exponentials to base 2, as the lowering has it.
        places: for variables walked by tiles, their value over the loop's index and the tile's variable.
        grid: tile of each tiled resident. batch: the other residents, one program for each value.
        axes: variables of tiles.
        sizes: elements that a program holds of each rank, by name: 1 of a batch rank or an iterative one.
        loops: in order.
    """

    cascade: Cascade
    binding: Binding
    places: Mapping[Expr, Expr]
    grid: Mapping[str, int]
    batch: tuple[str, ...]
    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    loops: tuple[Loop, ...]

    @property
    def residents(self) -> tuple[str, ...]:
        """Variables of the programs."""
        return (*self.grid, *self.batch)

    def extent(self, variable: str) -> int:
        """The extent of a rank of the loop form."""
        return self.binding.extents.get(rank_of(variable), self.sizes.get(rank_of(variable), 1))

    def placed(self, expr: Expr) -> Expr:
        """An expression over rank variables in place of loop indices and tile variables."""
        return transform(expr, self.places.get)

    def programs(self, variable: str) -> int:
        """Programs along a resident."""
        return -(-self.binding.extent(variable) // self.grid.get(variable, 1))

    def corners(self) -> Iterator[Corner]:
        """Every combination of the coordinates that loop bounds need."""
        bounding = {v for loop in self.loops for b in loop.bounds for v in b.variables}
        named = [v for v in self.residents if v in bounding]
        others = math.prod(self.programs(v) for v in self.residents if v not in bounding)
        for at in itertools.product(*(range(self.programs(v)) for v in named)):
            spans = {}
            for v, n in zip(named, at, strict=True):
                tile = self.grid.get(v, 1)
                spans[v] = (n * tile, min((n + 1) * tile, self.binding.extent(v)))
            yield Corner(ranges=spans, programs=others)

    def walk(self, loop: Loop, corner: Corner) -> Range:
        """Elements of the last rank of a loop from its first tile to its last, whole tiles."""
        last = loop.walked[-1]
        low, high = 0, self.binding.extent(last)
        for b in loop.bounds:
            n = b.form[Var(name=last)]
            # Over the tile, the largest value of what bounds `n * last` from above.
            room = b.limit
            for atom, k in b.form.items():
                if isinstance(atom, Var) and atom.name != last:
                    first, end = corner.ranges[atom.name]
                    room -= min(k * first, k * (end - 1))
            if n > 0:
                high = min(high, room + 1)
            else:
                low = max(low, -room)
        low = low // loop.tile * loop.tile
        return low, max(low, -(-high // loop.tile) * loop.tile)

    def span(self, variable: str, corner: Corner, loop: Loop | None, *, tail: bool) -> Range:
        """Coordinates of a variable in the programs of a corner; with `tail`, those of its last tile beyond the end."""
        extent = self.extent(variable)
        tile = self.grid.get(variable, 1)
        low, high = corner.ranges.get(variable, (0, extent))
        if loop is not None and variable == loop.walked[-1]:
            tile = loop.tile
            low, high = self.walk(loop, corner)
        return low, (-(-high // tile) * tile if tail else min(high, extent))

    def steps(self, loop: Loop, corner: Corner, *, without: Collection[str] = ()) -> int:
        """Steps of a loop in one program; those along the ranks of `without` count as one."""
        low, high = self.walk(loop, corner)
        turns = [*map(self.binding.extent, loop.walked[:-1]), (high - low) // loop.tile]
        return math.prod(n for v, n in zip(loop.walked, turns, strict=True) if v not in without)


def frame_of(program: Program, kernel: Kernel, schedule: KernelSchedule, binding: Binding) -> Frame:
    """Bring a kernel to the form that is lowered, and see where its ranks go and how its loops walk.

    Args:
        schedule: legal for the kernel.
        binding: extents of all ranks of the program.

    Raises: LoweringError: a tensor that varies along a looped rank is read at an offset of it.
    Cost: one SymPy derivation a reduction, cached.
    """
    own = {s.var for s in kernel.cascade.body if isinstance(s, Iter)}
    derived = tuple(v for v in kernel.loops if v not in own)
    cascade, inner, index = kernel.cascade, "", ""
    places: dict[Expr, Expr] = {}
    if derived:
        form = loop_form(cascade, over=derived, tile=schedule.tiles[derived[-1]])
        cascade, inner, index = form.cascade, form.inner, form.index
        places = {place: Var(name=v) for v, place in form.points.items()}
    cascade = to_base_two(cascade)
    grid = {v: schedule.tiles[v] for v in grid_tiles(kernel)}
    indices = [s.var for s in walk(cascade.body) if isinstance(s, Iter)]
    batch = tuple(v for v in kernel.residents if v not in grid)
    sizes = {r: held(n) for r, n in binding.extents.items()}
    sizes |= {rank_of(v): padded(binding.extent(v)) for v in program.bounded if v in steps_of_tiles(cascade)}
    sizes |= {rank_of(v): n for v, n in grid.items()} | {rank_of(v): 1 for v in (*batch, *indices)}
    sizes |= {rank_of(inner): schedule.tiles[derived[-1]]} if inner else {}
    whole = tuple(v for v in program.bounded if v not in indices)
    frame = Frame(
        cascade=cascade,
        binding=binding,
        places=places,
        grid=grid,
        batch=batch,
        axes=(*grid, *((inner,) if inner else ()), *whole),
        sizes=sizes,
        loops=(),
    )
    loops: list[Loop] = []

    def enter(body: tuple[Statement, ...], around: tuple[str, ...]) -> None:
        for s in body:
            if isinstance(s, Iter) and s.var == index:
                bounds = _bounds(frame, s, derived[-1], inner) if len(derived) == 1 and inner else ()
                tile = schedule.tiles[derived[-1]]
                loops.append(Loop(block=s, walked=(*around, *derived), tile=tile, bounds=bounds))
            elif isinstance(s, Iter):
                loops.append(Loop(block=s, walked=(*around, s.var), tile=1))
                enter(s.body, (*around, s.var))

    enter(cascade.body, ())
    return replace(frame, loops=tuple(loops))


def _bounds(frame: Frame, block: Iter, variable: str, inner: str) -> tuple[Bound, ...]:
    """The constraints of all reductions of a loop that tell its first and last tile, as the lowering solves them."""
    looped = [e for e in block.body if isinstance(e, Einsum) and inner in e.ranks]
    if not looped:
        return ()
    cascade = frame.cascade
    common = [c for c in conditions(cascade, looped[0]) if all(c in conditions(cascade, e) for e in looped)]
    whole = {c.name for c in cascade.constants if isinstance(c.expr, Num) and float(c.expr.value).is_integer()}
    out: list[Bound] = []
    for c in common:
        names = {n for n in scalars(c) if not n[0].isupper()}
        if reads(c) or not names <= whole:
            continue
        found = bounds_of(with_numbers(frame.placed(c), frame.binding)) or []
        plain = all(
            isinstance(a, Var) and (a.name in (variable, *frame.batch, *frame.grid)) for b in found for a in b.form
        )
        tiled = {v for b in found for v in b.variables if v in frame.grid}
        if plain and len(tiled) < 2 and all(abs(b.form.get(Var(name=variable), 0)) == 1 for b in found):
            out += found
    return tuple(out)
