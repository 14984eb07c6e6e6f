"""The runs of tiles of a loop: where no tile is live, where every point is, and where constraints must be tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from einsumcascade.codegen.bounds import Interval, ceil_to, floor_to, interval, linear, meet
from einsumcascade.codegen.kernel_ir import Axis, Map, Value
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Iter,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    subexpressions,
    variable_of,
    variables,
)


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
    """Tiles from position `lo` up to `hi`, throughout which the constraints of `holding` hold."""

    lo: Expr
    hi: Expr
    holding: frozenset[Expr]


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


def runs_of(
    walk: Walk, common: list[Expr], cascade: Cascade, *, grid: tuple[str, ...], batch: tuple[str, ...], skips: bool
) -> tuple[list[Map], list[Run]]:
    """Split a loop into runs by the constraints that all its reductions share.

    Args:
        walk: how the loop moves.
        common: constraints of every reduction over it.
        grid: tiled variables, whose first and last coordinates bounds may use. batch: variables of one value.
        skips: tiles without a live point may be left out; a user's own recurrence may move on them.

    Returns: named bounds, and the runs in order; together they cover every live point once.
    """
    if walk.inner is None:
        return [], [Run(lo=Num(value=0), hi=Scalar(name=walk.rank), holding=frozenset())]
    integers = frozenset(
        c.name for c in cascade.constants if isinstance(c.expr, Num) and float(c.expr.value).is_integer()
    )
    solved: dict[Expr, Interval] = {}
    for c in common:
        if c == walk.tail:
            continue
        found = interval(c, position=dict(walk.position), tiled=grid, batch=batch, integers=integers)
        if found is not None:
            solved[c] = found
    names: list[Map] = []

    def named(name: str, expr: Expr) -> Expr:
        if isinstance(expr, Num | Scalar):
            return expr
        value = Value(name=f"{name}_{variable_of(walk.rank)}", axes=())
        names.append(Map(value=value, expr=expr))
        return Read(tensor=value.name)

    symbol = Scalar(name=rank_of(walk.inner))
    zero, length = Num(value=0), Scalar(name=walk.rank)
    may_lo, may_hi = _ends(solved, "may")
    must_lo, must_hi = _ends(solved, "must")
    lo: Expr = zero
    if skips:
        if may_lo:
            lo = named("lo", floor_to(meet("max", [zero, *may_lo]), walk.step, symbol))
        hi = named("hi", meet("min", [length, *may_hi]))
    else:
        hi = named("hi", apply("mul", Scalar(name=rank_of(walk.index)), symbol))
    full_lo = lo
    if must_lo:
        start = apply("min", ceil_to(meet("max", [zero, *must_lo]), walk.step, symbol), hi)
        full_lo = named("full_lo", apply("max", start, lo) if lo != zero else start)
    end = meet("min", [length, *must_hi] if skips else [length, hi, *must_hi])
    full = floor_to(end if all(map(_is_natural, must_hi)) else apply("max", end, zero), walk.step, symbol)
    full_hi = named("full_hi", apply("max", full, full_lo) if full_lo != zero else full)
    holding = frozenset([*solved, *([walk.tail] if walk.tail is not None else [])])
    runs = [Run(lo=lo, hi=full_lo, holding=frozenset())] if full_lo != lo else []
    return names, [*runs, Run(lo=full_lo, hi=full_hi, holding=holding), Run(lo=full_hi, hi=hi, holding=frozenset())]


def _ends(solved: Mapping[Expr, Interval], kind: str) -> tuple[list[Expr], list[Expr]]:
    lows = [i.may_lo if kind == "may" else i.must_lo for i in solved.values()]
    highs = [i.may_hi if kind == "may" else i.must_hi for i in solved.values()]
    return [e for e in lows if e is not None], [e for e in highs if e is not None]


def _is_natural(expr: Expr) -> bool:
    """Whether a bound is a sum of coordinates and whole numbers, so never negative."""
    match expr:
        case Num():
            return expr.value >= 0
        case Read():
            return True
        case Scalar():
            return expr.is_extent
        case Apply(op="add"):
            return all(map(_is_natural, expr.args))
        case _:
            return False
