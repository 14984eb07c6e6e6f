"""A cascade prepared for expansion: its partitions, and extents as small as its reads and conditions allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from einsumcascade.language.fiberwise import solve_form
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    rank_of,
    reads,
    subexpressions,
    substitute,
    variables,
    walk,
)

Array = NDArray[Any]
Coordinates = Mapping[str, Array]
_OPERATORS: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide, "mod": np.mod,
    "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum, "select": np.where,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.logical_and, "or": np.logical_or, "not": np.logical_not,
}  # fmt: skip


def evaluate(expr: Expr, at: Coordinates, numbers: Mapping[str, int]) -> Array | None:
    """The values of an index or a condition at all points; None where data decide."""
    match expr:
        case Num():
            return np.asarray(expr.value)
        case Var():
            return at[expr.name]
        case Scalar():
            return np.asarray(numbers[expr.name]) if expr.name in numbers else None
        case Apply(op="and" | "or", args=(x, y)):
            left, right = evaluate(x, at, numbers), evaluate(y, at, numbers)
            if left is None or right is None:
                # `or` with data may hold anywhere.
                return None if expr.op == "or" else left if right is None else right
            found: Array = _OPERATORS[expr.op](left, right)
            return found
        case Apply() if expr.op in _OPERATORS:
            args = [evaluate(a, at, numbers) for a in expr.args]
            return None if any(a is None for a in args) else _OPERATORS[expr.op](*args)
        case _:
            return None


def grid(sizes: Mapping[str, int]) -> dict[str, Array]:
    """All points of a box, the first variable slowest."""
    axes = np.indices(tuple(sizes.values())).reshape(len(sizes), -1) if sizes else ()
    return dict(zip(sizes, axes, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Along:
    """A rank: its own variable and, for each partition that reads show, the variables from the outside in."""

    whole: str
    ways: tuple[tuple[str, ...], ...] = ()

    def moves_by(self, names: tuple[str, ...]) -> str | None:
        """The variable by which `names` move along the rank."""
        return next((v for v in (self.whole, *(w[0] for w in self.ways)) if v in names), None)

    def has_all(self, names: tuple[str, ...]) -> bool:
        """Whether `names` walk every coordinate of the rank."""
        return self.whole in names or any(set(w) <= set(names) for w in self.ways)


class Text:
    """A cascade without solves, with what every rank's expansion needs to know of it.

    Args:
        cascade: a checked cascade.
    """

    def __init__(self, cascade: Cascade) -> None:
        self.cascade = without_solves(cascade)
        self.ranks = rank_names(self.cascade)
        self.defined = {r.name: r.expr for r in self.cascade.ranks}
        self.axes = tensor_axes(self.cascade)
        self.statements = [s for s in walk(self.cascade.body) if not isinstance(s, Iter)]
        self.conditions = {id(s): self._conditions(s) for s in self.statements}
        self.reads = {id(s): reads(s.expr, *self.conditions[id(s)]) for s in self.statements}
        # Every index, with the variable of its axis.
        self.indices = tuple(
            dict.fromkeys(
                (axis, index)
                for found in self.reads.values()
                for r in found
                for axis, index in zip(self.axes[r.tensor], r.indices, strict=True)
            )
        )
        self.along = {v: Along(whole=v, ways=self._ways(v)) for v in self.ranks}
        inits = [s for s in self.statements if isinstance(s, Init)]
        # The axes along which generations lie.
        self.generations = {(s.tensor, k) for s in inits for k, i in enumerate(s.indices) if not variables(i)}
        self.iterative = {s.tensor for s in inits}
        self.used = {r.tensor for found in self.reads.values() for r in found} | set(self.cascade.output_names)

    def _conditions(self, s: Einsum | Init) -> tuple[Expr, ...]:
        if isinstance(s, Init):
            return ()
        space = {*s.free, *s.ranks}
        return (*s.where, *(c for c in self.cascade.constraints if set(variables(c)) <= space))

    def numbers(self, given: Mapping[str, int]) -> dict[str, int]:
        """Every extent and every whole constant; `given` are extents by variable, before any definition."""
        numbers = {rank_of(v): n for v, n in given.items()}
        named = [(c.name, c.expr) for c in self.cascade.constants]
        for name, expr in (*named, *((rank_of(v), e) for v, e in self.defined.items())):
            value = evaluate(expr, {}, numbers)
            if name not in numbers and value is not None and float(value) == int(value):
                numbers[name] = int(value)
        return numbers

    def _ways(self, whole: str) -> tuple[tuple[str, ...], ...]:
        """Partitions of a rank: indices that run over 0, 1, 2, .. once each while two or more variables move."""
        ways: dict[tuple[str, ...], None] = {}
        # Odd extents of more than any literal's, so that no window tiles a rank by accident.
        inputs = sorted(v for v in self.ranks if v not in self.defined)
        numbers = self.numbers({v: 35 + 2 * k for k, v in enumerate(inputs)})
        for axis, index in self.indices:
            names = variables(index)
            if axis != whole or len(names) < 2 or whole in names or any(rank_of(v) not in numbers for v in names):
                continue
            box = {v: numbers[rank_of(v)] for v in names}
            found = evaluate(index, grid(box), numbers) if np.prod(list(box.values())) < 1 << 16 else None
            if found is None or not np.array_equal(np.sort(found), np.arange(found.size)):
                continue
            strides = {v: evaluate(index, {w: np.asarray(w == v, int) for w in names}, numbers) for v in names}
            ways[tuple(sorted(names, key=lambda v: int(strides[v]), reverse=True))] = None  # type: ignore[arg-type]
        return tuple(ways)

    def linked(self, rank: Along) -> set[str]:
        """Variables whose extents go along with the rank's: compared with it, or walking the same axes."""
        own = {rank.whole, *sum(rank.ways, ())}
        definition = self.defined.get(rank.whole, Num(value=0))
        sizes = {e.name for e in subexpressions(definition) if isinstance(e, Scalar)}
        out = own | {w for w in self.ranks if rank_of(w) in sizes}
        for axis, index in self.indices:
            if axis in own and isinstance(index, Var):
                out.add(index.name)
            elif axis is not None and own & set(variables(index)) and not reads(index):
                out.add(axis)
        conditions = [c for found in self.conditions.values() for c in found]
        parts = {v: w for w, a in self.along.items() for way in a.ways for v in way}
        more = out
        while more:
            # A condition on a tile is one on what is tiled.
            wholes = (parts.get(v, v) for c in conditions if more & set(_compared(c)) for v in variables(c))
            more = {v for v in wholes if v not in out}
            out |= more
        return out | {w for w, a in self.along.items() for way in a.ways if out & set(way)}

    def extents(self, rank: Along, places: int, steps: int) -> dict[str, int]:
        """Small extents: `places` places along the rank, tiles of two, `steps` steps of iterations over other ranks."""
        tied, own = self.linked(rank), {rank.whole, *sum(rank.ways, ())}
        ways = {w: a.ways for w, a in self.along.items()}
        outer = {way[0] for found in ways.values() for way in found}
        inner = {v for found in ways.values() for way in found for v in way[1:]}
        tile = max((2 ** (len(way) - 1) for w in tied for way in ways[w]), default=1)
        # Ranks that conditions compare are as long as each other; none is too short for its shifts.
        compared = {v for found in self.conditions.values() for c in found for v in _compared(c)}
        short = {v: steps + 1 if v in compared else 2 for v in self.ranks}
        for axis, index in self.indices:
            shifts = [e.value for e in subexpressions(index) if isinstance(e, Num) and isinstance(e.value, int)]
            if axis is not None:
                short[axis] = max(short[axis], *(2 + k for k in shifts if k < 4), 2)
        given: dict[str, int] = {}
        for v in self.ranks:
            literal = isinstance(self.defined.get(v), Num)
            if v not in self.defined:
                given[v] = places * tile if v in tied else short[v] * (2 if ways[v] else 1)
            elif literal and v in inner and (v in own or v not in tied):
                given[v] = 2
            elif literal and (v in tied or v in outer):
                given[v] = places if v in tied else 2
        for s in walk(self.cascade.body):
            if isinstance(s, Iter) and s.var not in tied:
                # Either the extent itself, or that of the input it is a part of.
                definition = self.defined.get(s.var, Num(value=0))
                sizes = {e.name for e in subexpressions(definition) if isinstance(e, Scalar)}
                for v in self.ranks:
                    if v not in tied and v not in inner and (rank_of(v) in sizes or (v == s.var and not sizes)):
                        given[v] = max(steps, short[v]) if v == s.var else 2 * steps
        return self.numbers(given)


def rank_names(cascade: Cascade) -> tuple[str, ...]:
    """The variables of all ranks."""
    return tuple(dict.fromkeys((*(v for i in cascade.inputs for v in i.indices), *(r.name for r in cascade.ranks))))


def tensor_axes(cascade: Cascade) -> dict[str, tuple[str | None, ...]]:
    """The variable of each axis of each tensor, as it is written; an Einsum decides where an `init` writes too."""
    out: dict[str, tuple[str | None, ...]] = {i.tensor: i.indices for i in cascade.inputs}
    for s in (*(s for s in walk(cascade.body) if isinstance(s, Init)), *cascade.einsums):
        out[s.tensor] = tuple(next(iter(variables(i)), None) for i in s.indices)
    return out


def _compared(c: Expr) -> tuple[str, ...]:
    """The rank variables that a condition compares with each other."""
    return () if reads(c) or len(variables(c)) < 2 else variables(c)


def without_solves(cascade: Cascade) -> Cascade:
    """Replace each solve by sums of what its elements need: all of both sides, or the rows up to its own."""
    fresh = (f"x{n}" for n in count() if f"x{n}" not in rank_names(cascade))
    ranks = list(cascade.ranks)

    def statements(body: tuple[Statement, ...]) -> Iterator[Statement]:
        for s in body:
            form = solve_form(s) if isinstance(s, Einsum) else None
            if isinstance(s, Iter):
                yield replace(s, body=tuple(statements(s.body)))
            elif form is None or not isinstance(s, Einsum):
                yield s
            else:
                assert isinstance(s.expr, Apply)
                matrix, right = s.expr.args
                row, column, result = Var(name=next(fresh)), Var(name=next(fresh)), Var(name=form.result)
                ranks.extend(Definition(name=v.name, expr=Scalar(name=rank_of(form.row))) for v in (row, column))
                triangle = s.reduce == "trisolve"
                below = (Apply(op="le", args=(column, row)), Apply(op="le", args=(row, result))) if triangle else ()
                parts = [
                    (substitute(matrix, {form.row: row, form.column: column}), (row, column), below),
                    (substitute(right, {form.right: row}), (row,), below[1:]),
                ]
                if triangle:
                    named = next(v for v in (form.row, form.column) if v in s.ranks)
                    other = {form.row: result, form.column: Var(name=named)} if named != form.row else {}
                    parts.append(
                        (
                            substitute(matrix, other),
                            (Var(name=named),),
                            (Apply(op="le", args=(Var(name=named), result)),),
                        )
                    )
                for n, (expr, over, where) in enumerate(parts):
                    names = tuple(v.name for v in over)
                    yield replace(
                        s, tensor=f"{s.tensor}{n}'", expr=expr, reduce="sum", ranks=names, where=s.where + where
                    )
                total: Expr = Read(tensor=f"{s.tensor}0'", indices=s.indices)
                for n in range(1, len(parts)):
                    total = Apply(op="add", args=(total, Read(tensor=f"{s.tensor}{n}'", indices=s.indices)))
                yield replace(s, expr=total, reduce=None, ranks=())

    body = tuple(statements(cascade.body))
    return replace(cascade, body=body, ranks=tuple(ranks))
