"""Every point of a cascade on tiny extents, and which elements it reads where along one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from einsumcascade.language.ir import Einsum, Init, Iter, Read, Statement, rank_of, variables, walk
from tests.analysis.tiny_extents import Array, Coordinates, Text, evaluate, grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """One read of a statement at all of its live points.

    Args:
        tensor: what is read.
        elements: flat element numbers, a column for each coordinate that an index decided by data may be.
        place: where the element is along the rank, for each point; None where nothing tells.
        aligned: it is read where the Einsum stands.
        along: it is of a tensor with all of the rank, or at an index with the rank's own variable.
        through: "free" or "reduced" where a variable of another rank walks the axis, else "".
        distance: the most places between the element and where the Einsum stands, of an aligned or a fixed index.
        stretched: the element and the place where the Einsum stands drift apart along the rank.
    """

    tensor: str
    elements: Array
    place: Array | None
    aligned: bool
    along: bool
    through: str
    distance: int
    stretched: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """All live points of a statement, sorted by step and by the element they write.

    Args:
        key: the tensor and its position in the cascade.
        iterates: whether the statement iterates the rank.
        carries: whether its left side has all of the rank.
        traverses: whether it iterates the rank and reads something along it.
        place: where each point stands along the rank, or None.
        accesses: what it reads.
        steps: for each step of the blocks around it, the slice of points, the first point and the number of each
            element.
    """

    key: tuple[str, int]
    iterates: bool
    carries: bool
    traverses: bool
    place: Array | None
    accesses: tuple[Access, ...]
    steps: Mapping[tuple[int, ...], tuple[slice, Array, Array]]


class Expansion:
    """A cascade with every extent a small number, for one rank.

    Args:
        text: the cascade.
        rank: the variable of the rank.
        steps: steps of iterations over other ranks.
    """

    def __init__(self, text: Text, rank: str, *, steps: int = 2) -> None:
        self.text, self.rank, self.axes = text, text.along[rank], text.axes
        self.own = (rank, *sum(self.rank.ways, ()))
        self.reach, places = 0, 4
        while True:
            self.numbers = text.extents(self.rank, places, steps)
            self._expand()
            accesses = [a for p in self.points.values() for a in p.accesses]
            # A shift goes that far at each Einsum it goes through.
            self.reach = sum(a.distance for a in accesses)
            # Room for what drifts apart, like 2*m and m, to come to be out of reach.
            room = (2 * self.reach + 4) * (2 if any(a.stretched for a in accesses) else 1)
            # And for every statement to have a point.
            if any(not p.steps for p in self.points.values()) and places < 12:
                room = max(room, places + 4)
            if places >= room:
                break
            places = room

    def extent(self, variable: str) -> int:
        """The extent of a rank."""
        return self.numbers[rank_of(variable)]

    @property
    def tile(self) -> int:
        """Elements of a tile."""
        return int(np.prod([self.extent(v) for v in self.rank.ways[0][1:]])) if self.rank.ways else 1

    @property
    def last(self) -> int:
        """The last place."""
        return (self.extent(self.rank.whole) - 1) // self.tile

    def is_full(self, tensor: str) -> bool:
        """Whether a tensor has all of the rank."""
        return self.rank.has_all(tuple(v for v in self.axes[tensor] if v))

    def returns(self, block: Iter) -> bool:
        """Whether two steps of a block walk the same elements of what another part of the cascade wrote."""
        written = {s.tensor for s in walk(block.body) if isinstance(s, Einsum)}
        first: set[tuple[str, int]] = set()
        second: set[tuple[str, int]] = set()
        for p in (self.points[id(s)] for s in walk(block.body) if not isinstance(s, Iter)):
            for a in p.accesses if p.traverses else ():
                for (step, *_), (rows, *_) in p.steps.items() if a.along and a.tensor not in written else ():
                    found = {(a.tensor, int(n)) for n in a.elements[rows].ravel()}
                    (first if step == 0 else second).update(found)
        return bool(first & second)

    def _expand(self) -> None:
        self.shapes = {i.tensor: tuple(self.extent(v) for v in i.indices) for i in self.text.cascade.inputs}
        found = list(_placed(self.text.cascade.body, ()))
        for s, around in found:
            box = grid({v: self.extent(v) for v in dict.fromkeys((*around, *s.free))})
            written = [evaluate(i, box, self.numbers) for i in s.indices]
            shape = tuple(int(w.max(initial=-1)) + 1 if w is not None else 2 for w in written)
            old = self.shapes.get(s.tensor, shape)
            self.shapes[s.tensor] = tuple(max(x, y) for x, y in zip(old, shape, strict=True))
        self.points = {id(s): self._points(n, s, around) for n, (s, around) in enumerate(found)}

    def _points(self, number: int, s: Einsum | Init, around: tuple[str, ...]) -> Points:
        ranks = s.ranks if isinstance(s, Einsum) else ()
        found = self.text.reads[id(s)]
        free = tuple(v for v in s.free if v not in around)
        sizes = {v: self.extent(v) for v in dict.fromkeys((*around, *free, *ranks))}
        size = int(np.prod(list(sizes.values())))
        at = grid(sizes)
        live = np.ones(size, bool)
        for c in self.text.conditions[id(s)]:
            holds = evaluate(c, at, self.numbers)
            if holds is not None:
                live &= holds
        indices = [[evaluate(i, at, self.numbers) for i in r.indices] for r in found]
        left = [evaluate(i, at, self.numbers) for i in s.indices]
        for tensor, ids in [(s.tensor, left), *((r.tensor, i) for r, i in zip(found, indices, strict=True))]:
            for extent, index in zip(self.shapes[tensor], ids, strict=True):
                if index is not None:
                    live &= (index >= 0) & (index < extent)
        at = {v: x[live] for v, x in at.items()}
        points = int(live.sum())
        own = self.rank.moves_by((*s.free, *ranks))
        place = None if own is None else at[own] // self.tile if own == self.rank.whole else at[own]
        accesses = tuple(
            self._access(r, [_kept(i, live) for i in ids], at, own, place, ranks, points)
            for r, ids in zip(found, indices, strict=True)
        )
        iterates = self.rank.has_all((*s.free, *ranks))
        return Points(
            key=(s.tensor, number),
            iterates=iterates,
            carries=self.rank.has_all(s.free),
            traverses=iterates and any(a.along for a in accesses),
            place=place,
            accesses=accesses,
            steps=_steps(
                [at[v] for v in around], self._elements(s.tensor, [_kept(i, live) for i in left], points)[:, 0]
            ),
        )

    def _elements(self, tensor: str, ids: list[Array | None], points: int) -> Array:
        """Flat numbers of elements; an index that data decide makes a column of every coordinate."""
        out = np.zeros((points, 1), np.int64)
        for extent, index in zip(self.shapes[tensor], ids, strict=True):
            if index is None:
                out = (out[:, :, None] * extent + np.arange(extent)).reshape(points, -1)
            else:
                out = out * extent + index[:, None]
        return out

    def _access(
        self,
        r: Read,
        ids: list[Array | None],
        at: Coordinates,
        own: str | None,
        place: Array | None,
        reduced: tuple[str, ...],
        points: int,
    ) -> Access:
        axis = self.rank.moves_by(tuple(v or "" for v in self.axes[r.tensor]))
        k = self.axes[r.tensor].index(axis) if axis is not None else 0
        index = ids[k] if axis is not None and points else None
        unit = self.tile if axis == self.rank.whole else 1
        where = None if index is None else index // unit
        aligned, through, distance = False, "", 0
        if index is not None and where is not None:
            names = variables(r.indices[k])
            others = [v for v in names if v not in self.own]
            if place is not None:
                # In elements where the Einsum stands at one, else in places.
                fine = unit > 1 and own == self.rank.whole
                apart = index - at[own or ""] if fine else where - place
                aligned = _depends_only_on(apart, [at[v] for v in others if v in at]) and own in names
                if aligned:
                    distance = -(-int(np.abs(apart).max()) // (unit if fine else 1))
                    # A generation is one coordinate away from the step that makes it.
                    distance = max(distance - ((r.tensor, k) in self.text.generations), 0)
            if not aligned and len(names) == 1 and others and _constant(index - at[others[0]]):
                through = "reduced" if others[0] in reduced else "free"
                distance = -(-int(abs(index[0] - at[others[0]][0])) // unit)
            if not names:
                ends = min(int(where[0]), max(self.last - int(where[0]), 0))
                distance = ends if ends <= 2 else 0
        return Access(
            tensor=r.tensor,
            elements=self._elements(r.tensor, ids, points),
            place=where,
            aligned=aligned,
            along=self.rank.whole in variables(*r.indices) or self.is_full(r.tensor),
            through=through,
            distance=distance,
            stretched=where is not None and place is not None and not aligned and own in variables(*r.indices),
        )


def _placed(body: tuple[Statement, ...], around: tuple[str, ...]) -> Iterator[tuple[Einsum | Init, tuple[str, ...]]]:
    for s in body:
        if isinstance(s, Iter):
            yield from _placed(s.body, (*around, s.var))
        else:
            yield s, around


def _kept(index: Array | None, live: Array) -> Array | None:
    return None if index is None else np.broadcast_to(index, live.shape)[live]


def _constant(x: Array) -> bool:
    return bool(x.size) and bool((x == x.flat[0]).all())


def _depends_only_on(x: Array, others: list[Array]) -> bool:
    """Whether `x` is the same wherever all `others` are."""
    groups: dict[tuple[int, ...], int] = {}
    if not others:
        return _constant(x)
    for key, value in zip(zip(*(o.tolist() for o in others), strict=True), x.tolist(), strict=True):
        if groups.setdefault(key, value) != value:
            return False
    return True


def _steps(around: list[Array], written: Array) -> dict[tuple[int, ...], tuple[slice, Array, Array]]:
    """Cut points, sorted by step, into steps and these into elements."""
    out: dict[tuple[int, ...], tuple[slice, Array, Array]] = {}
    if not len(written):
        return out
    columns = [*around, written]
    changed = np.zeros(len(written), bool)
    changed[0] = True
    step = changed.copy()
    for n, c in enumerate(columns):
        new = np.concatenate([[True], c[1:] != c[:-1]])
        changed |= new
        if n < len(around):
            step |= new
    bounds = [*np.flatnonzero(step).tolist(), len(written)]
    for start, stop in pairwise(bounds):
        firsts = np.flatnonzero(changed[start:stop])
        out[tuple(int(a[start]) for a in around)] = (slice(start, stop), firsts, written[start:stop][firsts])
    return out
