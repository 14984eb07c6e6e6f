"""Count the points of a box that conditions leave, exactly and, where it can be, without visiting them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from einsumcascade.analysis.linear import Bound, Range, bounds_of, closed
from einsumcascade.errors import InputError
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Expr, Num, Scalar, Var, apply, reads, subexpressions, transform, variables

# Residue classes, values of one variable, and points that are treated one by one, at most.
CLASSES_LIMIT = 1 << 12
VISITS_LIMIT = 1 << 16


def with_numbers(condition: Expr, binding: Binding) -> Expr:
    """Put numbers in place of the extents and constants of a condition."""

    def leaf(e: Expr) -> Expr | None:
        return Num(value=binding.value(e)) if isinstance(e, Scalar) else None

    return transform(condition, leaf)


def count_points(ranges: Mapping[str, Range], conditions: Sequence[Expr]) -> int | None:
    """Count the whole-numbered points of a box where every condition holds.

    Guaranteed: exact. Comparisons of sums of variables, multiples, floor quotients and remainders by numbers, joined
    by `and`, `or` and `not`, are counted in closed form as long as one variable links all others (m <= p, windows,
    chunks, n <= p beside m <= p) and the numbers divided by are small; what is left is visited point by point.

    Args:
        ranges: first value and the one after the last of each variable.
        conditions: over these variables, with numbers in place of extents.

    Returns: the number; None where a condition reads a tensor or there are too many points to visit.
    Cost: milliseconds for affine conditions, whatever the extents; at worst some 10**5 evaluations.

    >>> m_before_p = apply("le", Var(name="m"), Var(name="p"))
    >>> count_points({"m": (0, 1000000), "p": (0, 1000000)}, [m_before_p])
    500000500000
    """
    if any(lo >= hi for lo, hi in ranges.values()):
        return 0
    if any(reads(c) for c in conditions):
        return None
    for n, c in enumerate(conditions):
        rest = [*conditions[:n], *conditions[n + 1 :]]
        cases = _cases(c)
        if cases is not None:
            found = [(sign, count_points(ranges, [*rest, *more])) for sign, more in cases]
            return None if any(k is None for _, k in found) else sum(sign * (k or 0) for sign, k in found)
    total = 1
    for names, mine in _components(ranges, conditions):
        found_here = _count({v: ranges[v] for v in names}, mine)
        if found_here is None:
            return None
        total *= found_here
    return total


def _cases(condition: Expr) -> list[tuple[int, list[Expr]]] | None:
    """A condition as signed sums over conjunctions of comparisons; None if it is a comparison already."""
    match condition:
        case Apply(op="and", args=args):
            return [(1, list(args))]
        case Apply(op="or", args=(x, y)):
            return [(1, [x]), (1, [y]), (-1, [x, y])]
        case Apply(op="not", args=(x,)):
            return [(1, []), (-1, [x])]
        case Apply(op="ne", args=args):
            return [(1, []), (-1, [apply("eq", *args)])]
        case (
            Apply(op="le" | "lt" as op, args=(Apply(op="abs", args=(x,)), y))
            | Apply(op="ge" | "gt" as op, args=(y, Apply(op="abs", args=(x,))))
        ):
            below = "le" if op in ("le", "ge") else "lt"
            return [(1, [apply(below, x, y), apply(below, apply("neg", x), y)])]
        case (
            Apply(op="le" | "lt" as op, args=(y, Apply(op="abs")))
            | Apply(op="ge" | "gt" as op, args=(Apply(op="abs"), y))
        ):
            outside = condition.args[0] if op in ("ge", "gt") else condition.args[1]
            return [(1, []), (-1, [apply("lt" if op in ("le", "ge") else "le", outside, y)])]
        case _:
            return None


def _components(ranges: Mapping[str, Range], conditions: Sequence[Expr]) -> Iterator[tuple[list[str], list[Expr]]]:
    """Variables that conditions link, with these conditions; a condition without variables goes with the first."""
    group = {v: {v} for v in ranges}
    for c in conditions:
        linked = set[str]().union(*(group[v] for v in variables(c)))
        for v in linked:
            group[v] = linked
    done: set[str] = set()
    loose = [c for c in conditions if not variables(c)]
    for v in ranges:
        if v not in done:
            done |= group[v]
            own = [c for c in conditions if set(variables(c)) & group[v]]
            yield [x for x in ranges if x in group[v]], own + loose
            loose = []
    if loose:
        yield [], loose


def _count(ranges: Mapping[str, Range], conditions: Sequence[Expr]) -> int | None:
    names = list(ranges)
    found = _counted(ranges, [bounds_of(c) for c in conditions])
    if found is not None:
        return found
    stride = _modulus(conditions)
    if stride > 1 and stride ** len(names) <= CLASSES_LIMIT:
        found = _by_classes(ranges, conditions, stride)
        if found is not None:
            return found
    if math.prod(hi - lo for lo, hi in ranges.values()) <= VISITS_LIMIT:
        return _visited(ranges, conditions)
    shortest = min(names, key=lambda v: ranges[v][1] - ranges[v][0])
    lo, hi = ranges[shortest]
    if len(names) < 2 or hi - lo > CLASSES_LIMIT:
        return None
    rest = {v: r for v, r in ranges.items() if v != shortest}
    total = 0
    for value in range(lo, hi):
        found = count_points(rest, [_at(c, {shortest: Num(value=value)}) for c in conditions])
        if found is None:
            return None
        total += found
    return total


def _counted(ranges: Mapping[str, Range], bounds: Sequence[list[Bound] | None]) -> int | None:
    if any(lo >= hi for lo, hi in ranges.values()):
        return 0
    if any(b is None for b in bounds):
        return None
    return closed(ranges, [x for b in bounds for x in b or ()])


def _at(condition: Expr, values: Mapping[str, Expr]) -> Expr:
    return transform(condition, lambda e: values.get(e.name) if isinstance(e, Var) else None)


def _visited(ranges: Mapping[str, Range], conditions: Sequence[Expr]) -> int | None:
    named = [transform(c, lambda e: Scalar(name=e.name) if isinstance(e, Var) else None) for c in conditions]
    total = 0
    try:
        for point in product(*(range(lo, hi) for lo, hi in ranges.values())):
            here = Binding(extents={}, constants=dict(zip(ranges, point, strict=True)))
            total += all(here.value(c) for c in named)
    except InputError:
        # A quotient by zero: the condition has no value somewhere.
        return None
    return total


def _by_classes(ranges: Mapping[str, Range], conditions: Sequence[Expr], stride: int) -> int | None:
    """Sum over the residues of all variables: quotients and remainders by divisors of `stride` become linear."""
    total = 0
    for residues in product(range(stride), repeat=len(ranges)):
        at = dict(zip(ranges, residues, strict=True))
        inner = {v: (-(-(lo - at[v]) // stride), -(-(hi - at[v]) // stride)) for v, (lo, hi) in ranges.items()}
        values: dict[str, Expr] = {
            v: apply("add", apply("mul", Num(value=stride), Var(name=v)), Num(value=r)) for v, r in at.items()
        }
        found = _counted(inner, [bounds_of(_at(c, values)) for c in conditions])
        if found is None:
            return None
        total += found
    return total


def _modulus(conditions: Sequence[Expr]) -> int:
    """The least common multiple of all divisors."""
    out = 1
    for e in (x for c in conditions for x in subexpressions(c)):
        if isinstance(e, Apply) and e.op in ("floordiv", "mod"):
            d = e.args[1]
            out = math.lcm(out, d.value if isinstance(d, Num) and isinstance(d.value, int) else 0)
    return out
