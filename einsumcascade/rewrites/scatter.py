"""The transpose of a read: over which points an element of a tensor collects what its readers hand back.

    K[h // R, m, e]   ->   h = g * R + r, a sum over r and the other variables
    X[p - 1]          ->   p = a + 1
    T[p - m]          ->   a sum where p - m == j

A read that is solved for one variable is an ordinary reduction, deterministic in any order of programs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from einsumcascade.analysis.dependence import conditions
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Einsum,
    Expr,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    substitute,
    variables,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """Where what a read receives is collected.

    Args:
        indices: the left side of the collecting Einsum.
        space: the variables it walks.
        solved: values of variables of the reader that are walked no more.
        where: its conditions, beyond the constraints of the cascade.
        ranks: ranks that it needs and the cascade has not.
    """

    indices: tuple[Var, ...]
    space: tuple[str, ...]
    solved: Mapping[str, Expr]
    where: tuple[Expr, ...]
    ranks: tuple[Definition, ...]


def landing(read: Read, axes: tuple[Var, ...], s: Einsum, cascade: Cascade, taken: set[str]) -> Landing:
    """Find where what a read of the Einsum `s` receives is collected.

    Args:
        axes: the variables that walk the axes of what is read. taken: names; those of new ranks are added.
    """
    indices: list[Var] = []
    solved: dict[str, Expr] = {}
    where: list[Expr] = []
    ranks: list[Definition] = []
    left = list(s.space)
    straight = [i.name for i in read.indices if isinstance(i, Var)]

    def walker(axis: Var) -> Var:
        """A variable for an axis: its own, unless the reader or a constraint means something else by it."""
        meant = {v for c in cascade.constraints for v in variables(c)} | set(s.space) | {i.name for i in indices}
        if axis.name not in meant:
            return axis
        n = 2
        while f"{axis.name}{n}" in taken or rank_of(f"{axis.name}{n}") in taken:
            n += 1
        name = f"{axis.name}{n}"
        taken.update((name, rank_of(name)))
        ranks.append(Definition(name=name, expr=Scalar(name=rank_of(axis.name))))
        return Var(name=name)

    for index, axis in zip(read.indices, axes, strict=True):
        if isinstance(index, Var) and index not in indices:
            indices.append(index)
            continue
        own = walker(axis)
        indices.append(own)
        free = [v for v in variables(index) if v in left and v not in straight and v not in solved]
        found = _solved(index, own, free, taken, ranks) if not reads(index) else None
        if found is None:
            where.append(apply("eq", index, own))
            continue
        v, value, bounds = found
        solved[v] = value
        where += bounds
        left.remove(v)
        left += [x for x in variables(value) if x not in left and x != own.name]
    # Constraints hold where the reader has points; a variable that is gone takes its constraints along.
    held = conditions(cascade, s) if solved else s.where
    own_where = tuple(
        substitute(c, solved) for c in held if not solved or c in s.where or set(variables(c)) & set(solved)
    )
    space = tuple(dict.fromkeys((*(i.name for i in indices), *(v for v in left))))
    return Landing(indices=tuple(indices), space=space, solved=solved, where=(*own_where, *where), ranks=tuple(ranks))


def _solved(
    index: Expr, own: Var, free: list[str], taken: set[str], ranks: list[Definition]
) -> tuple[str, Expr, list[Expr]] | None:
    """Solve `index == own` for a variable: its name, its value, and what must hold for it to be within its rank."""
    if len(variables(index)) != 1 or len(free) != 1:
        return None
    (v,) = free
    extent = Scalar(name=rank_of(v))

    def inner(size: Expr) -> Var:
        n = 0
        while f"{v}{n}" in taken or rank_of(f"{v}{n}") in taken:
            n += 1
        name = f"{v}{n}"
        taken.update((name, rank_of(name)))
        ranks.append(Definition(name=name, expr=size))
        return Var(name=name)

    match index:
        case Apply(op="floordiv", args=(Var(), (Num() | Scalar()) as by)):
            value = apply("add", apply("mul", own, by), inner(by))
            return v, value, [apply("lt", value, extent)]
        case Apply(op="mod", args=(Var(), (Num() | Scalar()) as by)):
            last = apply("sub", apply("add", extent, by), Num(value=1))
            value = apply("add", apply("mul", inner(apply("floordiv", last, by)), by), own)
            return v, value, [apply("lt", value, extent)]
        case (
            Apply(op="add", args=(Var(), (Num() | Scalar()) as by))
            | Apply(op="add", args=((Num() | Scalar()) as by, Var()))
        ):
            value = apply("sub", own, by)
        case Apply(op="sub", args=(Var(), (Num() | Scalar()) as by)):
            value = apply("add", own, by)
        case Apply(op="sub", args=((Num() | Scalar()) as by, Var())):
            value = apply("sub", by, own)
        case _:
            return None
    return v, value, [apply("le", Num(value=0), value), apply("lt", value, extent)]


def within(s: Einsum, read: Read, axes_of: Callable[[str], tuple[Var, ...]]) -> list[Expr]:
    """What must hold for the other reads of an Einsum to be within their tensors: beyond, it has no point."""
    out: list[Expr] = []
    for r in reads(s.expr):
        for i, axis in zip(r.indices, axes_of(r.tensor), strict=True):
            if isinstance(i, Var) or r == read or (isinstance(i, Num) and i.value == 0):
                continue
            out += [apply("le", Num(value=0), i), apply("lt", i, Scalar(name=rank_of(axis.name)))]
    return list(dict.fromkeys(out))
