"""Passes and levels by brute force: every element on tiny extents, and when it can be read at the earliest.

What is counted, for a rank R of a cascade:

* A *point* is one point of the iteration space of an Einsum (or `init`), one step of an iterative block at a time. It
  is live unless an index is out of range or a condition on rank variables fails; a condition on data may hold
  anywhere, and an index that data decide may be any coordinate. An element needs all live points that write it, a
  point needs all elements it reads, those in its conditions and indices included.
* The *place* of a coordinate along R is the coordinate itself, or the number of its tile where the cascade partitions
  R: what happens inside a tile is no traversal. An Einsum moves along R by the variable of R or by the outer variable
  of a partition, and *iterates* R if it has the variable of R or all those of a partition.
* The *family* of a tensor T with rank R: T itself, and what an Einsum that iterates R writes with all of R on its
  left from a member that it reads where it stands. "Where it stands" is an index that differs from the Einsum's own
  coordinate by something that does not grow along R (`m`, `m - 1`, `m1*M0 + m0`). Each element of a member comes from
  some fibers of T. A generation that one step of an iteration over *another* rank takes over from the step before is
  no member there.
* A *visit* of a fiber of T: a point that reads a member element which comes from the fiber. It is made at the place
  where the Einsum stands along R, if the Einsum iterates R and reads a member there. Else it is made at the element's
  place, if the element is read through the variable of another rank (`B[j]`, with `rank j = M`). Else, at a fixed,
  reversed or gathered index, it is made where the Einsum stands, if it iterates R; if it does not, a few elements are
  looked up, and that is no traversal.
* A *walk* is one traversal of the fiber, up or down. All visits that an Einsum makes to a fiber in one step of the
  iterations over other ranks belong to one walk, the first in which none has to wait: not for a visit in a later
  walk, nor for one in the same walk farther on than where it is made itself (constant distances, like the 1 of
  `m - 1`, do not count: a few elements can be held). This is the paper's sentence: a read that must wait for every
  read of an earlier traversal, whichever way that goes, belongs to the next one.
* A read through a *free* variable of another rank gives its element to that rank: it is a visit for the count, yet
  others wait for it only once an element needs such reads at every place (queries and keys made of one tensor do not
  wait for each other, a mean over the queries does).
* The *passes* of T are the most walks any of its fibers needs, with the ways of the walks chosen to need fewest; at
  least one if T is read or given out at all.
* The *levels* of R: likewise the fewest loops over R, where a visit is any point of an Einsum that iterates R and
  reads something along it, made where the Einsum stands.

An operation on whole fibers needs what its definition says: a top-k its fiber, a `solve` the whole matrix and
right side, a `trisolve` the rows up to its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from einsumcascade.language.ir import Einsum, Iter, Statement, walk
from tests.analysis.element_points import Expansion, Points
from tests.analysis.tiny_extents import Array

# A walk and a place in one number, walk * _WALK + place; walks beyond the last are as good as never.
_WALK = 64
MOST = 15
# The ways of the walks of a run; the one called BOTH waits only where either way would: a lower bound.
UP, DOWN, BOTH = 1, -1, 0


@dataclass(slots=True)
class _Known:
    """What elements wait for, in each run: their latest visits and, apart from them, reads through free variables.

    Args:
        far: last walk and the highest place in it; last walk and the lowest place, counted down from the top.
        seen: walk of the latest reads through free variables of other ranks, and their places, a bit each; None where
            the cascade has no such reads.
    """

    far: Array
    seen: tuple[Array, Array] | None

    def copy(self) -> _Known:
        return _Known(self.far.copy(), None if self.seen is None else (self.seen[0].copy(), self.seen[1].copy()))

    def at(self, elements: Array) -> _Known:
        """What all elements of a row together wait for, row by row."""
        first, *more = elements.T
        out = self._rows(first)
        for column in more:
            out = out.joined(self._rows(column))
        return out

    def _rows(self, rows: Array) -> _Known:
        return _Known(self.far[:, rows], None if self.seen is None else (self.seen[0][rows], self.seen[1][rows]))

    def joined(self, other: _Known) -> _Known:
        """What both together wait for."""
        seen = None
        if self.seen is not None and other.seen is not None:
            walks = np.maximum(self.seen[0], other.seen[0])
            bits = (np.where(k[0] == walks, k[1], 0) for k in (self.seen, other.seen))
            seen = walks, np.bitwise_or(*bits)
        return _Known(np.maximum(self.far, other.far), seen)

    def reduced(self, firsts: Array) -> _Known:
        """What each group of rows waits for; `firsts` are the first rows of the groups."""
        seen = None
        if self.seen is not None:
            walks = np.maximum.reduceat(self.seen[0], firsts)
            rows = np.repeat(np.arange(len(firsts)), np.diff([*firsts, len(self.seen[0])]))
            seen = walks, np.bitwise_or.reduceat(np.where(self.seen[0] == walks[rows], self.seen[1], 0), firsts)
        return _Known(np.maximum.reduceat(self.far, firsts, axis=1), seen)

    def put(self, elements: Array, new: _Known) -> None:
        """Set what elements wait for."""
        self.far[:, elements] = new.far
        if self.seen is not None and new.seen is not None:
            self.seen[0][elements], self.seen[1][elements] = new.seen


class _Run:
    """Walks the fibers of one family, or makes the loops of all Einsums, for several choices of ways at once."""

    def __init__(self, expansion: Expansion, tensor: str | None, ways: list[tuple[int, ...]]) -> None:
        self.x, self.tensor = expansion, tensor
        self.sizes = {t: int(np.prod(s)) for t, s in expansion.shapes.items()}
        fibers = np.zeros((1, 1), bool) if tensor is None else self._fibers(tensor)
        self.fibers = fibers.shape[1]
        self.ways = np.asarray([w + w[-1:] * (MOST + 2 - len(w)) for w in ways]).repeat(self.fibers, axis=0)
        self.runs = len(self.ways)
        self.root = np.tile(fibers, (1, len(ways)))
        self.through = tensor is not None and any(a.through for p in expansion.points.values() for a in p.accesses)
        # The places that reads through variables of other ranks see at all.
        self.every = np.full(self.runs, (1 << (expansion.last + 1)) - 1, np.int64)
        self._begin()

    def _fibers(self, tensor: str) -> Array:
        """Which elements of a tensor are of which fiber."""
        shape = self.x.shapes[tensor]
        kept = [n if v not in self.x.own else 1 for v, n in zip(self.x.axes[tensor], shape, strict=True)]
        at = np.indices(shape).reshape(len(kept), -1)
        number = np.zeros(at.shape[1], int)
        for n, i in zip(kept, at, strict=True):
            number = number * n + (i if n > 1 else 0)
        return number[:, None] == np.arange(int(np.prod(kept)))

    def _begin(self) -> None:
        self.known: dict[str, _Known] = {}
        self.roots: dict[str, Array] = {} if self.tensor is None else {self.tensor: self.root.copy()}
        self.ever = np.zeros(self.runs, np.int64)
        self.walks: dict[tuple[tuple[str, int], tuple[int, ...]], Array] = {}

    def zeros(self, elements: int) -> _Known:
        """Nothing to wait for."""
        seen = tuple(np.zeros((elements, self.runs), np.int64) for _ in range(2)) if self.through else None
        return _Known(np.zeros((2, elements, self.runs), np.int64), seen)  # type: ignore[arg-type]

    def count(self) -> Array:
        """The last walk, for each choice of ways and each fiber."""
        self.block(self.x.text.cascade.body, ())
        if ((self.ever > 0) & (self.ever != self.every)).any():
            # A condition keeps some places from ever being read: the others are all there are.
            self.every = np.where(self.ever > 0, self.ever, self.every)
            self._begin()
            self.block(self.x.text.cascade.body, ())
        found = np.zeros(self.runs, np.int64)
        for walk_of in self.walks.values():
            found = np.maximum(found, walk_of)
        return found.reshape(-1, self.fibers)

    def block(self, body: tuple[Statement, ...], at: tuple[tuple[str, int], ...]) -> None:
        """Go through statements in order."""
        for s in body:
            if not isinstance(s, Iter):
                self.statement(self.x.points[id(s)], at)
                continue
            order = range(self.x.extent(s.var))
            steps = order[::-1] if s.descending else order
            if s.var in self.x.own:
                self.along(s, at, steps)
            else:
                self.across(s, at, steps)

    def along(self, s: Iter, at: tuple[tuple[str, int], ...], steps: range) -> None:
        """Repeat a block along the rank until every Einsum of it has its walk: the same in all steps."""
        written = {e.tensor for e in walk(s.body) if isinstance(e, Einsum)}
        before = {t: self.known[t].copy() for t in written & self.known.keys()}
        while True:
            first: dict[tuple[tuple[str, int], tuple[int, ...]], Array] | None = None
            for step in steps:
                self.block(s.body, (*at, (s.var, step)))
                first = dict(self.walks) if first is None else first
            if first is None or all(k in first and np.array_equal(first[k], w) for k, w in self.walks.items()):
                return
            for t in written:
                self.known.pop(t, None)
                if t in before:
                    self.known[t] = before[t].copy()

    def across(self, s: Iter, at: tuple[tuple[str, int], ...], steps: range) -> None:
        """Go through the steps of an iteration over another rank."""
        carried = {e.tensor for e in walk(s.body) if isinstance(e, Einsum)} & self.x.text.iterative
        afresh = self.tensor is None and not self.x.returns(s)
        start = {t: self.spread(t, s.var) for t in carried & self.known.keys()} if afresh else {}
        left: dict[str, _Known] = {}
        hidden: dict[str, Array] = {}
        for step in steps:
            for t in carried if step != steps[0] else ():
                if afresh and t in self.known:
                    # Loops over fibers of the step's own are those of the step before, once more.
                    left[t] = left[t].joined(self.known[t]) if t in left else self.known[t]
                    self.known[t] = start[t].copy() if t in start else self.zeros(self.sizes[t])
                if t in self.roots:
                    hidden[t] = hidden.get(t, False) | self.roots.pop(t)
                    if t == self.tensor:
                        self.roots[t] = self.root.copy()
            self.block(s.body, (*at, (s.var, step)))
        for t, known in left.items():
            self.known[t] = self.known[t].joined(known)
        for t, roots in hidden.items():
            self.roots[t] = self.roots.get(t, False) | roots

    def spread(self, tensor: str, variable: str) -> _Known:
        """What is known of the first generation of a tensor, given to every generation."""
        shape, axis = self.x.shapes[tensor], self.x.axes[tensor].index(variable)
        far = self.known[tensor].far
        wide = far.reshape(2, *shape, -1)
        return _Known(
            np.broadcast_to(wide.max(axis=axis + 1, keepdims=True), wide.shape).reshape(far.shape).copy(), None
        )

    def statement(self, p: Points, at: tuple[tuple[str, int], ...]) -> None:
        """Find the walk of a statement's visits, and what its elements wait for."""
        step = tuple(v for _, v in at)
        if step not in p.steps:
            return
        if self.tensor is not None and not any(a.tensor in self.known or a.tensor in self.roots for a in p.accesses):
            return
        rows, firsts, elements = p.steps[step]
        known = None
        for a in p.accesses:
            if a.tensor in self.known:
                found = self.known[a.tensor].at(a.elements[rows])
                known = found if known is None else known.joined(found)
        known = known or self.zeros(rows.stop - rows.start)
        found = self.visits(p, rows)
        # Steps along the rank share one walk, steps of another iteration have their own.
        key = (p.key, tuple(v for name, v in at if name not in self.x.own))
        for kind, place, touched in found:
            walk_of = self.visit(known, place[:, None], np.broadcast_to(touched, known.far.shape[1:]), kind, key)
            for a in p.accesses:
                if a.through and a.tensor in self.roots and (a.through == "free" or kind == "own"):
                    assert a.place is not None
                    read = self.roots[a.tensor][a.elements[rows]].any(axis=1) & touched.any(axis=0)
                    self.cover(known, a.place[rows][:, None], read, walk_of)
        new = known.reduced(firsts)
        self.complete(new)
        if p.key[0] not in self.known:
            self.known[p.key[0]] = self.zeros(self.sizes[p.key[0]])
        self.known[p.key[0]].put(elements, new)
        if p.carries and self.tensor is not None and any(kind == "own" for kind, _, _ in found):
            self.inherit(p, rows, firsts, elements)

    def visits(self, p: Points, rows: slice) -> list[tuple[str, Array, Array]]:
        """How points visit fibers ("own", "reduced", "free"), where they stand then, and which fibers that is."""
        if self.tensor is None:
            whole = np.ones((rows.stop - rows.start, 1), bool)
            return [("own", p.place[rows], whole)] if p.traverses and p.place is not None else []
        out: list[tuple[str, Array, Array]] = []
        reads = [(a, self.roots[a.tensor][a.elements[rows]].any(axis=1)) for a in p.accesses if a.tensor in self.roots]
        touched = np.logical_or.reduce([t for _, t in reads]) if reads else np.zeros((1, self.runs), bool)
        # Each fiber is visited in the first of these ways that some read of it allows.
        left = touched.any(axis=0)
        for kind in ("own", "reduced", "free", "elsewhere"):
            here = left & False
            place = p.place if kind in ("own", "elsewhere") else None
            for a, t in reads:
                if kind == "elsewhere" or (a.aligned if kind == "own" else a.through == kind):
                    here |= left & t.any(axis=0)
                    place = a.place if place is None else place
            if here.any() and place is not None and (p.iterates or kind in ("reduced", "free")):
                out.append((kind if kind != "elsewhere" else "own", place[rows], touched & here))
                left = left & ~here
        return out

    def visit(self, known: _Known, place: Array, touched: Array, kind: str, key: Any) -> Array:
        """Put the visits of a statement into one walk, and its points behind them."""
        top, reach = self.x.last, self.x.reach
        high, low = known.far
        number = high // _WALK
        latest = np.where(touched, number, 0).max(axis=0)
        behind = touched & (number == latest)
        above = (behind & (high % _WALK > place + reach)).any(axis=0)
        below = (behind & (top - low % _WALK < place - reach)).any(axis=0)
        way = self.ways[np.arange(self.runs), latest]
        waits = np.where(way == UP, above, np.where(way == DOWN, below, above & below))
        walk_of = np.where(touched.any(axis=0), np.maximum(latest + waits, 1), 0)
        walk_of = np.minimum(np.maximum(walk_of, self.walks.get(key, 0)), MOST)
        self.walks[key] = np.maximum(walk_of, self.walks.get(key, 0))
        if kind != "free":
            here = walk_of * _WALK + np.stack([place, top - place])
            known.far = np.where(touched, np.maximum(known.far, here), known.far)
        return walk_of

    def cover(self, known: _Known, place: Array, touched: Array, walk_of: Array) -> None:
        """Note reads through variables of other ranks."""
        assert known.seen is not None
        walks, seen = known.seen
        bits = np.where(touched, np.int64(1) << place, 0)
        self.ever |= np.bitwise_or.reduce(bits, axis=0)
        later = touched & (walk_of > walks)
        here = touched & (walk_of >= walks)
        seen = np.where(here, np.where(later, 0, seen) | bits, seen)
        known.seen = np.where(touched, np.maximum(walks, walk_of), walks), seen

    def complete(self, known: _Known) -> None:
        """An element that needs reads through free variables at every place waits for a whole walk."""
        if known.seen is not None:
            walks, seen = known.seen
            # A shift leaves some places at the ends out.
            ends = (1 << self.x.reach) - 1
            ends |= ends << (self.x.last + 1 - self.x.reach)
            whole = (((seen | ends) & self.every) == self.every) & (walks > 0)
            some = np.maximum(seen, 1)
            high, low = (np.log2(x).astype(np.int64) for x in (some, some & -some))
            known.far = np.where(whole, np.maximum(known.far, walks * _WALK + [high, self.x.last - low]), known.far)

    def inherit(self, p: Points, rows: slice, firsts: Array, elements: Array) -> None:
        """Note from which fibers new elements come."""
        members = [a for a in p.accesses if a.aligned and a.tensor in self.roots]
        if members:
            found = np.zeros((rows.stop - rows.start, self.runs), bool)
            for a in members:
                found |= self.roots[a.tensor][a.elements[rows]].any(axis=1)
            if p.key[0] not in self.roots:
                self.roots[p.key[0]] = np.zeros((self.sizes[p.key[0]], self.runs), bool)
            self.roots[p.key[0]][elements] |= np.logical_or.reduceat(found, firsts)


def fewest(expansion: Expansion, tensor: str | None) -> int:
    """The fewest walks for the fiber that needs most; `MOST` where there is no end to them."""
    bound, up = _Run(expansion, tensor, [(BOTH,), (UP,)]).count()
    if (up == bound).all():
        return int(up.max())
    (down,) = _Run(expansion, tensor, [(DOWN,)]).count()
    best = np.minimum(up, down)
    if (best == bound).all():
        return int(best.max())
    size = min(int(best.max()), 6)
    tried = _Run(expansion, tensor, list(product((UP, DOWN), repeat=size))).count()
    return int(np.minimum(tried.min(axis=0), best).max())


def passes_by_definition(expansion: Expansion) -> dict[str, int]:
    """The passes of each tensor that has all of the rank."""
    read = expansion.text.used
    return {t: max(fewest(expansion, t), int(t in read)) for t in expansion.axes if expansion.is_full(t)}


def levels_by_definition(expansion: Expansion) -> int:
    """The levels of the rank; at least one if a tensor has it."""
    return max(fewest(expansion, None), int(any(expansion.is_full(t) for t in expansion.axes)))


def level_of_by_definition(expansion: Expansion) -> dict[str, int]:
    """The level of each Einsum along the rank, in its first step, with loops that go up."""
    run = _Run(expansion, None, [(UP,)])
    run.count()
    out: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    for (statement, _), walk_of in run.walks.items():
        if statement not in seen:
            seen.add(statement)
            out[statement[0]] = max(int(walk_of.max()), out.get(statement[0], 0))
    return out
