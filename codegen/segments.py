"""The runs of tiles of a loop: where no tile is live, where every point is, and where constraints must be tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from einsumcascade.codegen.kernel_ir import Axis, Load, Map, Stmt, Value, last
from einsumcascade.codegen.rows import Tiles
from einsumcascade.language.ir import (
    Apply,
    Einsum,
    Expr,
    Iter,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    subexpressions,
    transform,
    variable_of,
    variables,
)
from einsumcascade.schedules.bounds import ceil_to, floor_to, linear, meet
from einsumcascade.schedules.intervals import (
    ONE,
    ZERO,
    Known,
    Span,
    Truth,
    at_least,
    both,
    collected,
    decide,
    finished,
)
from einsumcascade.schedules.live import MOST, Live, Reach, solve_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """How a loop moves along a rank.

    Args:
        index: its iterative variable. inner: the axis of its tile, or None.
        step: elements a tile covers, 1 without an inner axis.
        rank: the extent that positions run over.
        position: the linear form of the coordinate: `m1 * M0 + m0`, or the index alone.
        tail: the constraint that the coordinate is within the rank, if one says so.
    """

    index: str
    inner: str | None
    step: int
    rank: str
    position: Mapping[Expr, int]
    tail: Expr | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Tiles from position `lo` up to `hi`, throughout which the constraints of `holding` hold.

    `tile`: values of each tile that `live` names. live: what a tile with a live point fulfils; None: not known.
    """

    lo: Expr
    hi: Expr
    holding: frozenset[Expr]
    tile: tuple[Stmt, ...] = ()
    live: Expr | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The tiles that a loop visits.

    Args:
        names: bounds, computed before the loop.
        runs: in order; `parts` times, one part of the tiles after the other, if more than 1.
        heads: bounds of a part, computed before its runs.
    """

    names: tuple[Map, ...] = ()
    runs: tuple[Run, ...]
    parts: int = 1
    heads: tuple[Map, ...] = ()


def walk_of(block: Iter, einsums: list[Einsum], axes: Mapping[str, Axis], constraints: tuple[Expr, ...]) -> Walk:
    """See how a loop walks: by tiles of a rank, where its index stands in `index * TILE + inner`, else one by one."""
    index = Var(name=block.var)
    for e in (x for s in einsums for root in (s.expr, *s.where) for x in subexpressions(root)):
        form = linear(e) if isinstance(e, Apply) and e.op == "add" else None
        inner = [v for v in variables(*form) if v in axes and axes[v].role != "grid"] if form else []
        if form is None or len(inner) != 1:
            continue
        product = apply("mul", index, Scalar(name=rank_of(inner[0])))
        if form != {product: 1, Var(name=inner[0]): 1}:
            continue
        step = axes[inner[0]].extent
        for c in constraints:
            if isinstance(c, Apply) and c.op == "lt" and isinstance(c.args[1], Scalar) and linear(c.args[0]) == form:
                assert step is not None
                return Walk(index=block.var, inner=inner[0], step=step, rank=c.args[1].name, position=form, tail=c)
    return Walk(index=block.var, inner=None, step=1, rank=rank_of(block.var), position={index: 1})


def placed(condition: Expr, walk: Walk) -> Expr:
    """A constraint with one variable in place of the looped coordinate."""
    name = Var(name=variable_of(walk.rank))

    def leaf(e: Expr) -> Expr | None:
        if not isinstance(e, Apply):
            return None
        if e.op == "add" and linear(e) == walk.position:
            return name
        if e.row.condition and len(e.args) == 2 and e.op not in ("and", "or"):
            form = collected(apply("sub", *e.args))
            ratios = {form.get(k, 0) for k in walk.position}
            if len(ratios) == 1 and (n := ratios.pop()):
                out: Expr = apply("mul", Num(value=n), name)
                for k, c in form.items():
                    if k not in walk.position:
                        out = apply("add", out, apply("mul", Num(value=c), k))
                return apply(e.op, out, ZERO)
        return None

    return transform(condition, leaf)


def runs_of(
    walk: Walk,
    common: list[Expr],
    known: Known,
    *,
    tile: Callable[[str, Expr, Expr, int], Tiles],
    skips: bool,
    one_loop: bool = False,
) -> Runs:
    """Split a loop into runs by the constraints that all its reductions share.

    Args:
        walk: how the loop moves.
        common: constraints of every reduction over it.
        known: of the variables of the grid and of what is read there. tile: reads along the loop.
        skips: tiles without a live point may be left out; a user's own recurrence may move on them.
        one_loop: tiles whose points are all live have no run of their own.

    Returns: named bounds and runs; together they cover every live point once.
    """
    if walk.inner is None:
        return Runs(runs=(Run(lo=ZERO, hi=Scalar(name=walk.rank), holding=frozenset()),))
    return _Runs(walk, known, tile, skips, one_loop).of(common)


@dataclass(slots=True)
class _Runs:
    walk: Walk
    known: Known
    tile: Callable[[str, Expr, Expr, int], Tiles]
    skips: bool
    one_loop: bool
    names: list[Map] = field(default_factory=list)
    wide: set[str] = field(default_factory=set)
    sides: list[Map] = field(default_factory=list)
    sided: dict[Expr, Expr] = field(default_factory=dict)
    turn: int = 0

    def of(self, common: list[Expr]) -> Runs:
        assert self.walk.inner is not None
        moving = {self.walk.index, self.walk.inner}
        given = {c: placed(c, self.walk) for c in common if c != self.walk.tail}
        given = {c: e for c, e in given.items() if not set(variables(e)) & moving}
        self.known.streamed = v = variable_of(self.walk.rank)
        start = apply("mul", Var(name=self.walk.index), self._symbol)
        tiles = self.tile(v, start, self._symbol, self.walk.step)
        tiles.naturals = self.known.naturals
        self.known.search = tiles.search
        # A loop that skips nothing needs one run of full tiles, no more.
        solved = solve_all(given, self.known, intervals=MOST if self.skips else 1)
        holding = frozenset([*solved.holding, *([self.walk.tail] if self.walk.tail is not None else [])])
        single = len(solved.live.may) < 2 and len(solved.live.must) < 2
        done = self._single if single or not self.skips else self._parts
        out = done(solved.live, holding)
        if not self.skips:
            return out
        # What tensors hold is known block by block: exactly where they rise, else from where to where at most.
        along = [c for c in solved.holding if any(Var(name=v) in r.indices for r in reads(given[c]))]
        tile, test = self._tile_test(tiles, [given[c] for c in (*along, *solved.tests)])
        fewer_tile, fewer = self._tile_test(tiles, [given[c] for c in solved.tests]) if along else (tile, test)
        runs = [
            replace(run, tile=fewer_tile if run.holding else tile, live=fewer if run.holding else test)
            for run in out.runs
        ]
        return replace(out, names=(*out.names, *self.sides), runs=tuple(runs))

    # --- one run of live tiles, full in the middle ----------------------------------------------------------------

    @property
    def _symbol(self) -> Expr:
        assert self.walk.inner is not None
        return Scalar(name=rank_of(self.walk.inner))

    def _named(self, name: str, expr: Expr, *, within: bool = False) -> Expr:
        """A bound under a name; one `within` the rank takes 32 bits, like all coordinates."""
        if not isinstance(expr, Apply):
            return expr
        value = Value(name=f"{name}_{variable_of(self.walk.rank)}", axes=())
        if self._is_wide(expr):
            expr = apply("narrow", expr) if within else expr
            self.wide |= set() if within else {value.name}
        self.names.append(Map(value=value, expr=finished(expr)))
        if self.known.is_natural(expr):
            self.known.naturals.add(value.name)
        return Read(tensor=value.name)

    def _is_wide(self, expr: Expr) -> bool:
        """Whether a number may have 64 bits: what tensors hold, and the coordinates of a batch."""
        return any(
            isinstance(e, Var)
            or (isinstance(e, Apply) and e.op in ("below", "above"))
            or (isinstance(e, Read) and (e.tensor in self.wide or e.tensor.startswith(("least_", "most_"))))
            for e in subexpressions(expr)
        )

    def _natural(self, expr: Expr) -> Expr:
        return at_least(expr, ZERO, self.known)

    def _floor(self, expr: Expr) -> Expr:
        return floor_to(self._natural(expr), self.walk.step, self._symbol)

    def _ceil(self, expr: Expr) -> Expr:
        return ceil_to(self._natural(expr), self.walk.step, self._symbol)

    def _single(self, live: Live, holding: frozenset[Expr]) -> Runs:
        may, must = live.may[0] if live.may else Reach(hi=ZERO), live.must[0] if live.must else Reach(hi=ZERO)
        length: Expr = Scalar(name=self.walk.rank)
        lo: Expr = ZERO
        if self.skips:
            hi = meet("min", [length, *_given(may.hi)])
            hi = self._named("hi", hi if may.lo is None else self._natural(hi), within=True)
            if may.lo is not None:
                low = self._named("low", at_least(ZERO, may.lo, self.known))
                # Where nothing is live, no tile is visited.
                lo = self._named("lo", apply("select", apply("lt", low, hi), self._floor(low), hi), within=True)
        else:
            hi = self._named("hi", apply("mul", Scalar(name=rank_of(self.walk.index)), self._symbol), within=True)
        if self.one_loop:
            return Runs(names=tuple(self.names), runs=(Run(lo=lo, hi=hi, holding=frozenset()),))
        full_lo = lo
        if must.lo is not None:
            start = apply("min", self._ceil(at_least(ZERO, must.lo, self.known)), hi)
            full_lo = self._named("full_lo", apply("max", start, lo) if lo != ZERO else start, within=True)
        ends = [length, *_given(must.hi)] if self.skips else [length, hi, *_given(must.hi)]
        full = self._floor(meet("min", ends))
        full_hi = self._named("full_hi", apply("max", full, full_lo) if full_lo != ZERO else full, within=True)
        runs = [Run(lo=lo, hi=full_lo, holding=frozenset())] if full_lo != lo else []
        runs += [Run(lo=full_lo, hi=full_hi, holding=holding), Run(lo=full_hi, hi=hi, holding=frozenset())]
        return Runs(names=tuple(self.names), runs=tuple(runs))

    # --- several ---------------------------------------------------------------------------------------------------

    def _parts(self, live: Live, holding: frozenset[Expr]) -> Runs:
        """Parts of tiles: each begins at the next live tile, and ends with a run of full tiles or where live ones end.

        Whatever the order of the intervals, and wherever they overlap, each part uses up one of them.
        """
        v = variable_of(self.walk.rank)
        stop = self._named("end", self._ceil(Scalar(name=self.walk.rank)))
        spans = [self._tiles(n, r) for n, r in enumerate(live.may)]
        full = [] if self.one_loop else self._full([r for r in live.must if r != Reach(hi=ZERO)])
        done: Expr = Read(tensor=f"full_hi_{v}")
        self.known.naturals.add(f"full_hi_{v}")
        self.names.append(Map(value=Value(name=f"full_hi_{v}", axes=()), expr=apply("narrow", ZERO)))
        names, self.names = self.names, []
        later = [self._if(apply("lt", done, b), at_least(a, done, self.known), stop) for a, b in spans]
        lo = self._named("lo", meet("min", later), within=True)
        hi = self._named("hi", meet("max", [self._end(lo, a, b) for a, b in spans]), within=True)
        next_full = [self._if(apply("lt", lo, b), at_least(a, lo, self.known), hi) for a, b in full]
        full_lo = self._named("full_lo", meet("min", [hi, *next_full]), within=True)
        end = meet("max", [self._end(full_lo, a, b) for a, b in full]) if full else full_lo
        self.names.append(Map(value=Value(name=f"full_hi_{v}", axes=()), expr=finished(apply("narrow", end))))
        runs = [Run(lo=lo, hi=full_lo, holding=frozenset())]
        runs += [Run(lo=full_lo, hi=done, holding=holding)] if full else []
        return Runs(names=tuple(names), runs=tuple(runs), heads=tuple(self.names), parts=max(len(spans) + len(full), 1))

    def _if(self, condition: Expr, x: Expr, y: Expr) -> Expr:
        return apply("select", condition, x, y)

    def _end(self, at: Expr, lo: Expr, hi: Expr) -> Expr:
        """The end of an interval that a position lies in, else the position."""
        ends = self._if(apply("lt", at, hi), hi, at)
        return ends if lo == ZERO else self._if(apply("le", lo, at), ends, at)

    def _tiles(self, n: int, reach: Reach) -> tuple[Expr, Expr]:
        """The tiles that an interval touches; none where it is empty."""
        hi = meet("min", [Scalar(name=self.walk.rank), *_given(reach.hi)])
        if reach.lo is None:
            return ZERO, self._named(f"hi_{n}", self._ceil(hi), within=True)
        low = self._named(f"low_{n}", at_least(ZERO, reach.lo, self.known))
        high = self._named(f"high_{n}", hi)
        lo = self._named(f"lo_{n}", self._floor(low))
        return lo, self._named(f"hi_{n}", self._if(apply("lt", low, high), self._ceil(high), lo))

    def _full(self, reaches: list[Reach]) -> list[tuple[Expr, Expr]]:
        """The full tiles of a union: intervals that touch are joined first, since a tile may lie across both."""
        length: Expr = Scalar(name=self.walk.rank)
        ends: list[tuple[Expr, Expr]] = []
        for n, r in enumerate(reaches):
            lo = self._named(f"full_low_{n}", meet("max", [ZERO, *_given(r.lo)]) if r.lo is not None else ZERO)
            hi = at_least(meet("min", [length, *_given(r.hi)]), lo, self.known)
            ends.append((lo, self._named(f"full_high_{n}", hi)))
        # Insertion: the new one moves down until it lies after, or has been joined with, the one before.
        turn = 0
        for n in range(1, len(ends)):
            for k in range(n, 0, -1):
                turn += 1
                ends[k - 1], ends[k] = self._joined(ends[k - 1], ends[k], turn)
        out = []
        for n, (lo, hi) in enumerate(ends):
            low = self._named(f"full_lo_{n}", self._ceil(lo))
            out.append((low, self._named(f"full_hi_{n}", self._floor(hi))))
        return out

    def _joined(
        self, a: tuple[Expr, Expr], b: tuple[Expr, Expr], turn: int
    ) -> tuple[tuple[Expr, Expr], tuple[Expr, Expr]]:
        """Two intervals in order; where they touch the first is both and the second is empty."""
        low = self._named(f"second_low_{turn}", at_least(a[0], b[0], self.known))
        high = self._named(f"first_high_{turn}", meet("min", [a[1], b[1]]))
        end = self._named(f"end_{turn}", meet("max", [a[1], b[1]]))
        touch = apply("le", low, high)
        first_end = self._named(f"first_end_{turn}", self._if(touch, end, high))
        second = self._named(f"second_{turn}", self._if(touch, end, low))
        start = ZERO if ZERO in (a[0], b[0]) else self._named(f"first_{turn}", meet("min", [a[0], b[0]]))
        return (start, first_end), (second, end)

    # --- tile by tile ----------------------------------------------------------------------------------------------

    def _tile_test(self, reads: Tiles, conditions: list[Expr]) -> tuple[tuple[Stmt, ...], Expr | None]:
        """What a tile with a live point fulfils, for conditions that are no intervals."""
        assert self.walk.inner is not None
        v = variable_of(self.walk.rank)
        start = apply("mul", Var(name=self.walk.index), self._symbol)
        end = Value(name=last(v), axes=())
        reads.loads = []
        known = replace(self.known, read=reads.read).with_tile(v, Span(start, Read(tensor=end.name)), self.walk.step)
        out: Truth = True
        for c in conditions:
            found = decide(c, known)
            out = both(out, found[0]) if found is not None else out
        if isinstance(out, bool):
            return (), None if out else apply("lt", ONE, ZERO)
        reach = apply("sub", apply("min", apply("add", start, self._symbol), Scalar(name=self.walk.rank)), ONE)
        tile: list[Stmt] = [*reads.loads]
        if Read(tensor=end.name) in subexpressions(out):
            tile.append(Map(value=end, expr=finished(reach)))
        moving = {end.name, *(x.value.name for x in reads.loads if isinstance(x, Load))}
        return self._sides(out, moving, tile)

    def _sides(self, test: Expr, moving: set[str], tile: list[Stmt]) -> tuple[tuple[Stmt, ...], Expr]:
        """Name the sides of comparisons: those that are the same for all tiles before the loop."""
        made = dict(self.sided)

        def side(e: Expr) -> Expr:
            if not isinstance(e, Apply) or e in made:
                return made.get(e, e)
            parts = set(subexpressions(e))
            within = {x.tensor for x in parts if isinstance(x, Read)}
            name = Value(name=f"side_{self.turn}_{variable_of(self.walk.rank)}", axes=())
            moves = Var(name=self.walk.index) in parts or bool(within & moving)
            self.turn += 1
            (tile if moves else self.sides).append(Map(value=name, expr=finished(e)))
            made[e] = Read(tensor=name.name)
            if not moves:
                self.sided[e] = made[e]
            return made[e]

        def leaf(e: Expr) -> Expr | None:
            if isinstance(e, Apply) and e.row.condition and e.op not in ("and", "or", "not"):
                return apply(e.op, *map(side, e.args))
            return None

        out = transform(test, leaf)
        return tuple(tile), out


def _given(end: Expr | None) -> list[Expr]:
    return [end] if end is not None else []
