"""Where the ranks of a kernel go under a schedule: programs, tiles, and the tiles that each loop walks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from einsumcascade.analysis.dependence import conditions
from einsumcascade.analysis.linear import Range
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    transform,
    variables,
    walk,
)
from einsumcascade.language.ops import FAR
from einsumcascade.rewrites.base_two import to_base_two
from einsumcascade.rewrites.loop_form import loop_form
from einsumcascade.schedules.intervals import ZERO, Known, Span, decide, tile_span
from einsumcascade.schedules.live import EVERYWHERE, Live, solve_all
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
        outer: those of them whose loops only repeat the one over the last.
        live: where the last of them is live, over the ends of tiles of residents and over batch ranks.
        tests: conditions that tell tile by tile whether one is live.
        conditions: what its reductions are culled by, the end of the data left out.
        everywhere: those of them that every tile tests, since no interval says where they hold.
    """

    block: Iter
    walked: tuple[str, ...]
    tile: int
    outer: tuple[str, ...] = ()
    live: Live = EVERYWHERE
    tests: tuple[Expr, ...] = ()
    conditions: tuple[Expr, ...] = ()
    everywhere: tuple[Expr, ...] = ()

    @property
    def bounding(self) -> tuple[str, ...]:
        """Residents that decide which tiles are walked, by the names of their first and last coordinates."""
        ends = [e for r in (*self.live.may, *self.live.must) for e in (r.lo, r.hi) if e is not None]
        return (*variables(*ends, *self.tests), *(r.tensor.partition("_")[2] for r in reads(*ends, *self.tests)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """Programs that walk the same tiles: the coordinates of some residents, and how many programs have them.

    Args:
        alike: how many such combinations of coordinates, one after the other, this one stands for.
    """

    ranges: Mapping[str, Range]
    programs: int
    alike: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A kernel in the form that is lowered, and where each of its ranks goes.

    Args:
        cascade: in loop form, exponentials to base 2, as the lowering has it.
        places: for variables walked by tiles, their value over the loop's index and the tile's variable.
        grid: tile of each tiled resident. batch: the other residents, one program for each value.
        axes: variables of tiles.
        sizes: elements that a program holds of each rank, by name: 1 of a batch rank or an iterative one.
        inner: variable of the tile that loops walk; "" where none is derived.
        loops: in order.
        most: corners that are looked at; of more, each stands for those around it. 0: all.
    """

    cascade: Cascade
    binding: Binding
    places: Mapping[Expr, Expr]
    grid: Mapping[str, int]
    batch: tuple[str, ...]
    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    inner: str
    loops: tuple[Loop, ...]
    most: int = 0

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
        """Every combination of the coordinates that loop bounds need, or `most` of them, each the middle of a run."""
        named, others = self._bounding()
        counts = {v: self.programs(v) for v in named}
        count = math.prod(counts.values())
        # Of an odd number of corners whose steps grow evenly the middle one has the mean.
        run = -(-count // self.most) | 1 if 0 < self.most < count else 1
        for start in range(0, count, run):
            alike = min(run, count - start)
            at, rest = {}, start + alike // 2
            for v in reversed(named):
                rest, at[v] = divmod(rest, counts[v])
            yield self._corner({v: at[v] for v in named}, others, alike)

    @property
    def later_are_longer(self) -> bool:
        """Whether the last tile of the grid has more steps than the first."""
        named, others = self._bounding()
        counts = {v: self.programs(v) for v in named}
        if not all(counts.values()):
            return False
        ends = [self._corner({v: at * (n - 1) for v, n in counts.items()}, others) for at in (0, 1)]
        first, last = [sum(self.steps(loop, corner) for loop in self.loops) for corner in ends]
        return first < last

    def _bounding(self) -> tuple[list[str], int]:
        """The residents that loop bounds need, and how many programs there are for each combination of these."""
        bounding = {v for loop in self.loops for v in loop.bounding}
        named = [v for v in self.residents if v in bounding]
        return named, math.prod(self.programs(v) for v in self.residents if v not in bounding)

    def _corner(self, at: Mapping[str, int], programs: int, alike: int = 1) -> Corner:
        spans = {}
        for v, n in at.items():
            tile = self.grid.get(v, 1)
            spans[v] = (n * tile, min((n + 1) * tile, self.binding.extent(v)))
        return Corner(ranges=spans, programs=programs, alike=alike)

    def runs(self, loop: Loop, corner: Corner) -> tuple[Range, ...]:
        """The tiles of the last rank of a loop that programs walk, as runs of elements from first tile to last."""
        extent, tile = self.binding.extent(loop.walked[-1]), loop.tile
        found: list[Range] = []
        for r in loop.live.may:
            low = 0 if r.lo is None else max(0, self._at(r.lo, corner))
            high = extent if r.hi is None else min(extent, self._at(r.hi, corner))
            if low < high:
                found.append((low // tile * tile, -(-high // tile) * tile))
        if loop.tests:
            starts = {n for low, high in found for n in range(low, high, tile)}
            found = [(n, n + tile) for n in starts if self._is_live(loop, corner, n)]
        return _joined(found)

    def full(self, loop: Loop, corner: Corner) -> int:
        """Steps of a loop over tiles whose points are all live, which need no mask."""
        if loop.everywhere:
            return 0
        extent, tile = self.binding.extent(loop.walked[-1]), loop.tile
        ends = [
            (
                0 if r.lo is None else max(0, self._at(r.lo, corner)),
                extent if r.hi is None else min(extent, self._at(r.hi, corner)),
            )
            for r in loop.live.must
        ]
        found = sum(max(0, high // tile - -(-low // tile)) for low, high in _joined(ends))
        return found * math.prod(map(self.binding.extent, loop.walked[:-1]))

    def _is_live(self, loop: Loop, corner: Corner, start: int) -> bool:
        """Whether the conditions of a loop that are no intervals leave a tile a live point."""
        variable = loop.walked[-1]
        ends = (start, min(start + loop.tile, self.binding.extent(variable)) - 1)
        tile = Corner(ranges={**corner.ranges, variable: (ends[0], ends[1] + 1)}, programs=1)
        return all(self._at(c, tile) for c in loop.tests)

    def _at(self, expr: Expr, corner: Corner) -> int:
        """The value of a bound in the programs of a corner."""
        ranges = corner.ranges

        def leaf(e: Expr) -> int | float:
            match e:
                case Var():
                    return ranges[e.name][0]
                case Read():
                    end, _, v = e.tensor.partition("_")
                    return ranges[v][0] if end == "first" else ranges[v][1] - 1
                case _:
                    return self.binding.value(e)

        return int(self.binding.value(expr, leaf))

    def span(self, variable: str, corner: Corner, loop: Loop | None, *, tail: bool, run: Range | None = None) -> Range:
        """Coordinates of a variable in the programs of a corner; with `tail`, those of its last tile beyond the end.

        Of the last rank of a loop those of `run`.
        """
        extent = self.extent(variable)
        tile = self.grid.get(variable, 1)
        low, high = corner.ranges.get(variable, (0, extent))
        if loop is not None and variable == loop.walked[-1]:
            tile = loop.tile
            low, high = run or (0, -(-extent // tile) * tile)
        return low, (-(-high // tile) * tile if tail else min(high, extent))

    def steps(self, loop: Loop, corner: Corner, *, without: Collection[str] = ()) -> int:
        """Steps of a loop in one program; those along the ranks of `without` count as one."""
        tiles = sum(high - low for low, high in self.runs(loop, corner)) // loop.tile
        turns = [*map(self.binding.extent, loop.walked[:-1]), tiles]
        return math.prod(n for v, n in zip(loop.walked, turns, strict=True) if v not in without)


def _joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ranges in order, those that overlap or touch as one; empty ones are left out."""
    out: list[Range] = []
    for low, high in sorted(r for r in ranges if r[0] < r[1]):
        if out and low <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


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
        form = loop_form(cascade, over=derived, tile=schedule.tiles[derived[-1]], added=frozenset(kernel.scattered))
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
        inner=inner,
        loops=(),
    )
    loops: list[Loop] = []

    def enter(body: tuple[Statement, ...], around: tuple[str, ...]) -> None:
        for s in body:
            if isinstance(s, Iter) and s.var == index:
                tile = schedule.tiles[derived[-1]]
                new = Loop(block=s, walked=(*around, *derived), tile=tile, outer=derived[:-1])
                loops.append(_bounded(frame, new, inner) if inner else new)
            elif isinstance(s, Iter):
                loops.append(Loop(block=s, walked=(*around, s.var), tile=1))
                enter(s.body, (*around, s.var))

    enter(cascade.body, ())
    return replace(frame, loops=tuple(loops))


def _bounded(frame: Frame, loop: Loop, inner: str) -> Loop:
    """A loop with what the constraints of all its reductions tell of its tiles, as the lowering solves them.

    What tensors hold is not known here: it bounds nothing; nor do conditions that outer loops change.
    """
    looped = [e for e in loop.block.body if isinstance(e, Einsum) and inner in e.ranks]
    if not looped:
        return loop
    cascade, v = frame.cascade, loop.walked[-1]
    common = [c for c in conditions(cascade, looped[0]) if all(c in conditions(cascade, e) for e in looped)]
    tail = apply("lt", Var(name=v), Scalar(name=rank_of(v)))
    given = {c: p for c in common if (p := frame.placed(c)) != tail and not set(loop.outer) & set(variables(p))}
    unknown = Span(Num(value=-FAR), Num(value=FAR))
    known = Known(
        spans={n: tile_span(n) for n in frame.grid} | {n: Span(Var(name=n), Var(name=n)) for n in frame.batch},
        numbers={c.name: c.expr.value for c in cascade.constants if isinstance(c.expr, Num)},
        read=lambda r: None if v in variables(r) else unknown,
        streamed=v,
    )
    solved = solve_all(given, known)
    tiled = known.with_tile(v, tile_span(v), loop.tile)
    found = [decide(given[c], tiled) for c in solved.tests]
    truths = [f[0] for f in found if f is not None]
    tests = tuple(ZERO if isinstance(t, bool) else t for t in truths if not isinstance(t, bool) or not t)
    everywhere = tuple(given[c] for c in solved.tests)
    return replace(loop, live=solved.live, tests=tests, conditions=tuple(given.values()), everywhere=everywhere)
