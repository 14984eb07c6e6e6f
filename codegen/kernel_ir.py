"""The kernel IR: statements over tiles whose values carry rank variables as axes.

One tree serves every printer and executor. Expressions are those of the language: a `Read` without indices names a
value of the kernel, a `Var` is the coordinate of an axis or a scalar index, a `Scalar` a constant or an extent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from einsumcascade.language.ir import Cascade, Definition, Expr, Scalar, rank_of, reads, variables
from einsumcascade.schedules.schedule import KernelSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis of tiles.

    Args:
        var: its rank variable.
        rank: the extent's name.
        size: elements of the tile: a power of two, or of a whole rank before it is cut the sum of its pieces.
        extent: elements that count, where the text fixes it; None for a length.
        role: "grid", "loop" or "whole".
        before: the pieces of the same rank that come before this one; its coordinates follow theirs.
    """

    var: str
    rank: str
    size: int
    extent: int | None
    role: str
    before: tuple[str, ...] = ()

    @property
    def is_piece(self) -> bool:
        """Whether this is one of several pieces of its rank."""
        return self.rank != rank_of(self.var)

    @property
    def is_padded(self) -> bool:
        """Whether the tile is larger than what it holds."""
        return self.extent is not None and self.size != self.extent


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tile, row or scalar: its name and the variables of its axes, in order."""

    name: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Read a tile of a tensor; where a condition of `mask` fails the element is 0.

    `piece` ends the name of a value that is one of several pieces of a tile.
    """

    value: Value
    tensor: str
    indices: tuple[Expr, ...]
    mask: tuple[Expr, ...] = ()
    piece: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """Compute a value element by element. `note` is the Einsum it comes from."""

    value: Value
    expr: Expr
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Reduce a mapped expression over axes of its tile."""

    value: Value
    reduce: str
    expr: Expr
    axes: tuple[str, ...]
    over: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many of the first `length` elements of a row of a table in ascending order are at most `limit`.

    `indices`: of the row; None stands for the axis along which it lies.
    """

    value: Value
    tensor: str
    indices: tuple[Expr | None, ...]
    length: Expr
    limit: Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """Multiply two tiles over one axis, added to `accumulate` if given."""

    value: Value
    left: Value
    right: Value
    over: str
    accumulate: Expr | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Write a tile, or a piece of one, to a tensor where every condition of `mask` holds; `adds`: add it instead.

    What is added goes to elements that several programs may share, so it is added one program after the other.
    """

    tensor: str
    indices: tuple[Expr, ...]
    expr: Expr
    axes: tuple[str, ...]
    mask: tuple[Expr, ...] = ()
    note: str = ""
    piece: str = ""
    adds: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tiles: positions from `lo` up to `hi`, with the conditions still tested inside (none: full tiles).

    `carries` are the states: each holds its old generation when the body begins and its new one when it ends. Where
    `live` fails, given the values of `tile`, a tile has no live point and the body is skipped.
    """

    lo: Expr
    hi: Expr
    tested: tuple[Expr, ...]
    body: tuple[Stmt, ...]
    carries: tuple[Value, ...]
    tile: tuple[Stmt, ...] = ()
    live: Expr | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Segments one after the other over an iterative variable.

    Args:
        index: the iterative variable. inner: the axis of its tile, if it has one.
        step: elements a tile covers where positions are counted in elements, else 1: positions count tiles.
        rank: name of the extent that positions run over.
        parts: how often the segments are walked, each time over another part of the tiles.
        heads: bounds of a part; the last one tells the next part where this one ends.
        descending: the steps go down from the last one.
    """

    index: str
    inner: str | None
    step: int
    rank: str
    segments: tuple[Segment, ...]
    parts: int = 1
    heads: tuple[Map, ...] = ()
    descending: bool = False


Stmt: TypeAlias = Load | Count | Map | Reduce | Dot | Store | Loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The least ("min") or the most ("max") of a tensor in each block; `sizes`: of a block along each axis.

    Along `ascending`, if given, whole numbers: at most ("min") or at least ("max") those of a block, that never fall.
    """

    name: str
    tensor: str
    reduce: str
    sizes: tuple[int, ...]
    ascending: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TileKernel:
    """A kernel as statements over tiles.

    Args:
        name: its name.
        cascade: in loop form, what it computes.
        axes: every axis by variable, in the order computed tiles have them.
        batch: scalar variables of the grid, one program for each value; tiles: axes of the grid.
        lengths: names of the extents that are arguments, in order.
        fixed: extents that the text fixes.
        constants: definitions used, and `values`: those known when the text is made.
        body: statements.
        schedule: the choices that made it.
        tensors: variables of each tensor it reads or writes, in the order of its parameters.
        outputs: the tensors it writes. buffers: tensors between kernels, float32.
        firsts: grid variables whose first and last coordinate a loop bound needs.
        tables: what is computed of inputs before the kernel runs, and is read like them.
        at: coordinates of residents that share an axis, by variable.
    """

    name: str
    cascade: Cascade
    axes: Mapping[str, Axis]
    batch: tuple[str, ...]
    tiles: tuple[str, ...]
    lengths: tuple[str, ...]
    fixed: Mapping[str, int]
    constants: tuple[Definition, ...]
    values: Mapping[str, float]
    body: tuple[Stmt, ...]
    schedule: KernelSchedule
    tensors: Mapping[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    buffers: tuple[str, ...] = field(default=())
    firsts: tuple[str, ...] = field(default=())
    tables: tuple[Table, ...] = field(default=())
    scattered: tuple[str, ...] = field(default=())
    at: Mapping[str, Expr] = field(default_factory=dict)

    @property
    def walks_grid(self) -> bool:
        """Whether a program walks over tiles of the grid, in place of having one."""
        return self.schedule.persistent > 0

    def programs(self, tiles: int, multiprocessors: int) -> int:
        """The programs of a launch over so many tiles of the grid."""
        return min(tiles, self.schedule.persistent * multiprocessors) if self.walks_grid else tiles


def expressions(body: tuple[Stmt, ...]) -> Iterator[Expr]:
    """Every expression of some statements, loops included."""
    for s in body:
        match s:
            case Load():
                yield from s.indices
                yield from s.mask
            case Count():
                yield from (i for i in s.indices if i is not None)
                yield s.length
                yield s.limit
            case Map():
                yield s.expr
            case Reduce():
                yield s.expr
            case Dot():
                if s.accumulate is not None:
                    yield s.accumulate
            case Store():
                yield s.expr
                yield from s.indices
                yield from s.mask
            case Loop():
                yield Scalar(name=s.rank)
                yield from expressions(s.heads)
                for g in s.segments:
                    yield g.lo
                    yield g.hi
                    yield from expressions(g.tile)
                    if g.live is not None:
                        yield g.live
                    yield from expressions(g.body)


def all_statements(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """Every statement, those of loops included."""
    for s in body:
        yield s
        if isinstance(s, Loop):
            yield from s.heads
            for g in s.segments:
                yield from g.tile
                yield from all_statements(g.body)


def bounding(body: tuple[Stmt, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """The values that bounds of loops are made of, and the variables, by name."""
    statements = list(all_statements(body))
    names: set[str] = set()
    found: set[str] = set()
    exprs: list[Expr] = []
    for loop in (s for s in statements if isinstance(s, Loop)):
        own = (*loop.heads, *(x for g in loop.segments for x in g.tile))
        names |= {x.value.name for x in own if isinstance(x, Load | Count | Map | Reduce)}
        exprs += expressions(own)
        for g in loop.segments:
            exprs += [g.lo, g.hi, *([] if g.live is None else [g.live])]
    made: dict[str, list[Stmt]] = {}
    for s in statements:
        if isinstance(s, Load | Count | Map | Reduce):
            made.setdefault(s.value.name, []).append(s)
    while exprs:
        found |= set(variables(*exprs))
        new = {r.tensor for r in reads(*exprs)} - names
        names |= new
        exprs = [e for n in new for s in made.get(n, ()) for e in expressions((s,))]
    return frozenset(names), frozenset(found)


def first(var: str) -> str:
    """Name of the first coordinate of a grid tile."""
    return f"first_{var}"


def last(var: str) -> str:
    """Name of the last live coordinate of a grid tile."""
    return f"last_{var}"
