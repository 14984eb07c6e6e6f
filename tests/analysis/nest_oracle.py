"""Footprints by brute force: every point of every Einsum on tiny extents, when it runs, and what is live meanwhile.

* A *point* of a statement reads elements and writes (or adds to) one. Points that an index or a condition on rank
  variables removes do not exist; a condition on data may hold anywhere, and an index that data decide may be any
  coordinate.
* A nest with a given order of loops runs points by *keys*: for each loop from the outside in, the stage of the
  statement and, where it walks the loop's rank, the coordinate. Stages are found here from elements alone: at each loop
  the points of one iteration of the loops outside are compared, a statement gets the smallest stage such that nothing
  is read before it is written, odd where it walks the rank, even where it does not.
* A *step* is the set of points with one key. An element lives from the first step that touches it to the last one that
  does. What is live between two steps is counted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Scalar,
    Statement,
    Var,
    rank_of,
    reads,
    variables,
)

Element = tuple[str, tuple[int, ...]]
_OPERATORS: Mapping[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs,
    "floordiv": operator.floordiv, "mod": operator.mod, "min": min, "max": max,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "not": operator.not_,
}  # fmt: skip


def evaluate(expr: Expr, at: Mapping[str, int]) -> int | None:
    """The value of an index or a condition; None where data decide. `at` has rank variables, extents and constants."""
    match expr:
        case Num(value=value) if int(value) == value:
            return int(value)
        case Var(name=name) | Scalar(name=name):
            return at.get(name)
        case Apply(op="and", args=(x, y)):
            found = [evaluate(a, at) for a in (x, y)]
            return 0 if 0 in found else None if None in found else 1
        case Apply(op="or", args=(x, y)):
            found = [evaluate(a, at) for a in (x, y)]
            return None if None in found else int(any(found))
        case Apply(op=op, args=args) if op in _OPERATORS:
            values = [evaluate(a, at) for a in args]
            return None if None in values else int(_OPERATORS[op](*values))
        case _:
            return None


def numbers_of(cascade: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """Every extent and whole constant as a number; `extents` by variable."""
    numbers = {rank_of(v): n for v, n in extents.items()}
    for d in (*cascade.constants, *cascade.ranks):
        name = d.name if d in cascade.constants else rank_of(d.name)
        value = evaluate(d.expr, numbers)
        if name not in numbers and value is not None:
            numbers[name] = value
    return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a statement.

    Args:
        line: number of the statement, in order.
        at: coordinates by variable.
        writes: the element written.
        reads: the elements read.
    """

    line: int
    at: Mapping[str, int]
    writes: Element
    reads: tuple[Element, ...]


class Expansion:
    """A cascade with every extent a small number."""

    def __init__(self, cascade: Cascade, numbers: Mapping[str, int]) -> None:
        self.cascade, self.numbers = cascade, numbers
        self.statements = list(_flat(cascade.body, ()))
        self.walked = [_walked(s) for s, _ in self.statements]
        self.ways = [dict(ways) for _, ways in self.statements]
        self.shapes = {i.tensor: tuple(self.extent(v) for v in i.indices) for i in cascade.inputs}
        for k in range(len(self.statements)):
            self._shape(k)
        self.written: dict[Element, list[Point]] = {}
        self.points: list[Point] = []
        for k in range(len(self.statements)):
            for p in self._points(k):
                self.points.append(p)
                self.written.setdefault(p.writes, []).append(p)
        # (writer, reader, pairs of points), for each pair of statements
        self.needs: dict[tuple[int, int], list[tuple[Point, Point]]] = {}
        for p in self.points:
            for e in p.reads:
                for w in self.written.get(e, ()):
                    self.needs.setdefault((w.line, p.line), []).append((w, p))

    def extent(self, variable: str) -> int:
        """The extent of a rank."""
        return self.numbers[rank_of(variable)]

    def _shape(self, k: int) -> None:
        s, _ = self.statements[k]
        ends = product(*((0, self.extent(v) - 1) for v in s.free))
        boxes = [dict(zip(s.free, at, strict=True)) for at in ends]
        # Indices on a left side grow with their variables.
        shape = tuple(max(self._value(i, box) or 0 for box in boxes) + 1 for i in s.indices)
        self.shapes[s.tensor] = tuple(map(max, self.shapes.get(s.tensor, shape), shape))

    def _points(self, k: int) -> Iterator[Point]:
        s, _ = self.statements[k]
        conditions = _conditions(self.cascade, s)
        found = reads(s.expr, *conditions)
        names = self.walked[k]
        for at in product(*(range(self.extent(v)) for v in names)):
            here = dict(zip(names, at, strict=True))
            if any(self._value(c, here) == 0 for c in conditions):
                continue
            places = []
            for r in found:
                axes = [self._coordinates(r.tensor, n, i, here) for n, i in enumerate(r.indices)]
                places.append([(r.tensor, c) for c in product(*axes)])
            if any(not p for p in places):
                continue
            index = tuple(i for i in (self._value(i, here) for i in s.indices) if i is not None)
            assert len(index) == len(s.indices)
            yield Point(
                line=k,
                at=here,
                writes=(s.tensor, index),
                reads=tuple(dict.fromkeys(e for p in places for e in p)),
            )

    def _coordinates(self, tensor: str, axis: int, index: Expr, here: Mapping[str, int]) -> Sequence[int]:
        value, extent = self._value(index, here), self.shapes[tensor][axis]
        if value is None:
            return range(extent)
        return (value,) if 0 <= value < extent else ()

    def _value(self, expr: Expr, here: Mapping[str, int]) -> int | None:
        return evaluate(expr, {**self.numbers, **here})

    def stages(self, order: Sequence[str]) -> list[tuple[int, ...]] | None:
        """The smallest stages of all statements at each loop of an order; None if there are none."""
        out: list[list[int]] = [[] for _ in self.statements]
        groups, needs = [list(range(len(out)))], self.needs
        for v in order:
            following = []
            kept: dict[tuple[int, int], list[tuple[Point, Point]]] = {}
            for group in groups:
                stage = self._stages(group, needs, v)
                if stage is None:
                    return None
                for k in group:
                    out[k].append(stage[k])
                for n in sorted(set(stage.values())):
                    following.append([k for k in group if stage[k] == n])
                for (a, b), pairs in needs.items():
                    if a in stage and b in stage and stage[a] == stage[b]:
                        # What other iterations of this loop have written is there for the loops inside.
                        same = [(x, y) for x, y in pairs if not stage[a] % 2 or x.at[v] == y.at[v]]
                        if same:
                            kept[a, b] = same
            groups, needs = following, kept
        return [tuple(x) for x in out]

    def _stages(
        self, group: Sequence[int], needs: Mapping[tuple[int, int], list[tuple[Point, Point]]], v: str
    ) -> dict[int, int] | None:
        stage = {k: int(v in self.walked[k]) for k in group}
        for _ in range(4 * len(group) + 4):
            changed = False
            for (a, b), pairs in needs.items():
                if a not in stage or b not in stage:
                    continue
                walk = stage[a] % 2, stage[b] % 2
                if walk == (1, 1):
                    way = self.ways[a].get(v) or self.ways[b].get(v) or 1
                    wait = 0 if all((y.at[v] - x.at[v]) * way >= 0 for x, y in pairs) else 2
                else:
                    wait = max(walk)
                if stage[b] < stage[a] + wait:
                    stage[b], changed = stage[a] + wait, True
            if not changed:
                return stage
        return None

    def keys(self, order: Sequence[str], stages: Sequence[tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        """When each point runs, by its place in `points`."""
        out = {}
        for n, p in enumerate(self.points):
            key: list[int] = []
            for depth, v in enumerate(order):
                s = stages[p.line][depth]
                # The loop goes the way of any statement in it that has one.
                here = [k for k, x in enumerate(stages) if x[: depth + 1] == stages[p.line][: depth + 1]]
                downwards = any(self.ways[k].get(v) == -1 for k in here)
                key += [s, (-p.at[v] if downwards else p.at[v]) if s % 2 else 0]
            out[n] = tuple(key)
        return out

    def is_legal(self, order: Sequence[str], stages: Sequence[tuple[int, ...]]) -> bool:
        """Whether nothing is read before the step in which it is written."""
        when = {id(self.points[n]): key for n, key in self.keys(order, stages).items()}
        return all(when[id(w)] <= when[id(r)] for pairs in self.needs.values() for w, r in pairs)

    def most_live(self, order: Sequence[str], stages: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """For each tensor the most elements that are live between two steps, at one time."""
        keys = self.keys(order, stages)
        number = {key: n for n, key in enumerate(sorted(set(keys.values())))}
        span: dict[Element, tuple[int, int]] = {}
        for n, p in enumerate(self.points):
            step = number[keys[n]]
            for e in (p.writes, *p.reads):
                first, last = span.get(e, (step, step))
                span[e] = (min(first, step), max(last, step))
        out: dict[str, int] = {}
        for t in {t for t, _ in span}:
            found = [s for (name, _), s in span.items() if name == t]
            out[t] = max(sum(a <= step < b for a, b in found) for step in range(len(number)))
        return out


def _flat(body: tuple[Statement, ...], ways: tuple[tuple[str, int], ...]) -> Iterator[tuple[Einsum | Init, tuple]]:
    for s in body:
        if isinstance(s, Iter):
            yield from _flat(s.body, (*ways, (s.var, -1 if s.descending else 1)))
        else:
            yield s, ways


def _walked(s: Einsum | Init) -> tuple[str, ...]:
    ranks = s.ranks if isinstance(s, Einsum) else ()
    return tuple(dict.fromkeys((*variables(*s.indices), *ranks)))


def _conditions(cascade: Cascade, s: Einsum | Init) -> tuple[Expr, ...]:
    if isinstance(s, Init):
        return ()
    space = {*s.free, *s.ranks}
    return (*s.where, *(c for c in cascade.constraints if set(variables(c)) <= space))
