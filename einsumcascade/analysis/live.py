"""Count the points of each Einsum that constraints leave alive, and the operations at them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from einsumcascade.analysis.counts import KINDS, operations_of
from einsumcascade.analysis.dependence import axes, conditions
from einsumcascade.analysis.points import count_points, with_numbers
from einsumcascade.analysis.polynomial import Count
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Init,
    Num,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    variable_of,
    variables,
    walk,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePoints:
    """The iteration space of an Einsum.

    Args:
        tensor: what it writes.
        points: all of the space.
        live: those that no condition culls; None where `unknown` says why they cannot be counted.
        unknown: the conditions that depend on data, or whose points are too many to visit; empty if `live` is known.
    """

    tensor: str
    points: int
    live: int | None
    unknown: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        known: dict[str, object] = {"tensor": self.tensor, "points": self.points, "live": self.live}
        return {**known, "unknown": list(self.unknown)} if self.unknown else known


def live_points(
    cascade: Cascade, extents: Mapping[str, int], *, constants: Mapping[str, float] | None = None
) -> tuple[LivePoints, ...]:
    """Count the live points of each Einsum, exactly.

    What a live point is: Definition O9 of docs/analysis.md.

    Args:
        cascade: a checked cascade.
        extents: numbers by rank, upper case; `rank` statements define the others.
        constants: values in place of those the text declares.

    Returns: one entry an Einsum, in cascade order.
    Raises: InputError: as `bind` does: an extent is missing, unknown or no whole number.
    Cost: milliseconds a constraint that is affine, whatever the extents; see `count_points`.

    >>> from einsumcascade.language.parser import parse
    >>> text = "in X[p, m]\\nconstraint m <= p\\nY[p] = X[p, m] :: sum(m)\\nout Y"
    >>> live_points(parse(text), {"P": 1000000, "M": 1000000})[0].live
    500000500000
    """
    binding = bind(cascade, extents=extents, constants=constants)
    out = []
    for e in cascade.einsums:
        culled = _culls(cascade, e)
        live = _live(e.space, [with_numbers(c, binding) for c in culled], binding)
        unknown = tuple(str(c) for c in culled if reads(c)) or tuple(map(str, culled))
        points = prod(binding.extent(v) for v in e.space)
        out.append(LivePoints(tensor=e.tensor, points=points, live=live, unknown=() if live is not None else unknown))
    return tuple(out)


def live_operations(
    cascade: Cascade, extents: Mapping[str, int], *, constants: Mapping[str, float] | None = None
) -> dict[str, int] | None:
    """Count the operations of a cascade at live points, by `KINDS`; None where a count depends on data.

    How live points enter a count: Definition O10 of docs/analysis.md.

    Args: as for `live_points`.
    Raises: InputError: as `bind` does.
    Cost: as `live_points`.

    >>> from einsumcascade.language.parser import parse
    >>> text = "in X[p, m]\\nconstraint m <= p\\nY[p] = exp(X[p, m]) :: sum(m)\\nout Y"
    >>> live_operations(parse(text), {"P": 100, "M": 100})["exp"]
    5050
    """
    binding = bind(cascade, extents=extents, constants=constants)
    totals = dict.fromkeys(KINDS, 0)
    known: set[Expr] = set()
    for s in walk(cascade.body):
        if not isinstance(s, Einsum | Init):
            continue
        culls = [with_numbers(c, binding) for c in _culls(cascade, s)] if isinstance(s, Einsum) else []
        found = operations_of(s, known)
        for kind in totals:
            n = _at_live(found.of(kind), culls, binding)
            if n is None:
                return None
            totals[kind] += n
    return totals


def _at_live(count: Count, culls: Sequence[Expr], binding: Binding) -> int | None:
    """A count with the live points of some ranks in place of the product of their extents."""
    total = Fraction(0)
    for names, n in count.terms:
        vs = tuple(map(variable_of, names))
        points = _live(vs, culls, binding) if len(set(vs)) == len(vs) else prod(map(binding.extent, vs))
        if points is None:
            return None
        total += n * points
    # Single terms of a linear system, N**3/3, may be no whole numbers; a count is one.
    assert total.denominator == 1
    return int(total)


def _live(names: Sequence[str], culls: Sequence[Expr], binding: Binding) -> int | None:
    ranges = {v: (0, binding.extent(v)) for v in names}
    return count_points(ranges, [c for c in culls if set(variables(c)) <= set(names)])


def _culls(cascade: Cascade, e: Einsum) -> list[Expr]:
    """What must hold at a live point: conditions, and that indices of inputs are within their ranks."""
    return [*conditions(cascade, e), *_within(cascade, e)]


def _within(cascade: Cascade, e: Einsum) -> Iterator[Expr]:
    shape = axes(cascade)
    for r in reads(e.expr):
        if cascade.input(r.tensor) is None:
            continue
        for v, index in zip(shape[r.tensor], r.indices, strict=True):
            if v is None or index == Var(name=v) or reads(index):
                continue
            yield apply("ge", index, Num(value=0))
            yield apply("lt", index, Scalar(name=rank_of(v)))
