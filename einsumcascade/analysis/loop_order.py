"""What a fused loop nest keeps, tensor by tensor, for every order of its loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

from einsumcascade.analysis.dependence import axes, known_rank, partitions
from einsumcascade.analysis.kept import Kept, Tensor, kept_by
from einsumcascade.analysis.nest import edges_between, fuse
from einsumcascade.analysis.passes import unknown_rank
from einsumcascade.analysis.polynomial import Count
from einsumcascade.analysis.sizes import assumed_extents, long_ranks, never_more
from einsumcascade.analysis.walks import Line, Step, Walk, lines
from einsumcascade.errors import InputError, nearest
from einsumcascade.language.ir import Cascade, rank_of, variable_of

MOST_LOOPS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOrder:
    """One order of the loops of a fused nest.

    Args:
        order: names of the ranks, outermost first.
        kept: what is kept from step to step, inputs first, in the order of the cascade.
        nest: the nest as text.
    """

    order: tuple[str, ...]
    kept: tuple[Kept, ...]
    nest: str

    @property
    def total(self) -> Count:
        """The sum of what is kept of each tensor, inputs read once; at no time is more than that kept."""
        return _sum(self.kept)

    @property
    def computed(self) -> Count:
        """The part of `total` that is no input: no second read can save it."""
        return _sum(tuple(k for k in self.kept if not k.is_input))

    @property
    def by_rows(self) -> Mapping[tuple[str, ...], tuple[Kept, ...]]:
        """What is kept for each iteration of the same loops, the most loops first."""
        found = sorted({k.rows for k in self.kept}, key=len, reverse=True)
        return {rows: tuple(k for k in self.kept if k.rows == rows) for rows in found}

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "order": list(self.order),
            "total": str(self.total),
            "computed": str(self.computed),
            "kept": [k.to_dict() for k in self.kept],
            "nest": self.nest,
        }

    def total_of(self, rows: tuple[str, ...]) -> Count:
        """Elements kept for each iteration of some loops."""
        return _sum(self.by_rows[rows])

    def read_again(self, rows: tuple[str, ...]) -> str:
        """The rank over whose loop what is kept for `rows` could be read again instead; empty where it could not."""
        ranks = {k.since if k.is_input and k.cause == "shared" else "" for k in self.by_rows[rows]}
        return ranks.pop() if len(ranks) == 1 else ""

    def __str__(self) -> str:
        parts = []
        for rows, kept in self.by_rows.items():
            names = ", ".join(f"{k.tensor} {k.elements}" for k in kept)
            parts.append(f"{self.total_of(rows)}{' for each ' * bool(rows)}{', '.join(rows)} ({names})")
        return f"{', '.join(self.order)}: {'; '.join(parts) or 'nothing'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOrders:
    """The orders that the loops of a nest can have, the one that keeps least first.

    What least means, and at which extents: Definition F8 of docs/analysis.md.

    Args:
        orders: the legal orders among those tried.
        whole: names of the ranks that are no loop: all of them lies inside a step.
        is_settled: whether the first is proved to keep no more of what is computed than any other tried, at all extents
            of 1 or more.
        extents: the numbers by which the orders were compared.
        tried: how many orders were tried.
    """

    orders: tuple[LoopOrder, ...]
    whole: tuple[str, ...]
    is_settled: bool
    extents: Mapping[str, int]
    tried: int

    @property
    def best(self) -> LoopOrder | None:
        """The order that keeps least; None where a recurrence forbids all."""
        return self.orders[0] if self.orders else None

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "orders": [o.to_dict() for o in self.orders],
            "whole": list(self.whole),
            "is_settled": self.is_settled,
            "extents": dict(self.extents),
            "tried": self.tried,
        }


def loop_orders(
    cascade: Cascade,
    *,
    einsums: Sequence[str] | None = None,
    loops: Sequence[str] | None = None,
    extents: Mapping[str, int] | None = None,
) -> LoopOrders:
    """Compare the orders of the loops around Einsums that share a nest.

    Guaranteed: loops over ranks that every access walks in step stand outermost; no order with them elsewhere keeps
    less. Of the others every order is tried, up to five loops; where there are more, those that the fewest statements
    walk stay whole inside a step.

    Args:
        cascade: a checked cascade.
        einsums: tensors whose Einsums share the nest; all of them if None. What they read from outside counts as input.
        loops: names of the ranks that are loops, upper case; by default the long ranks (Definition F1) and the
            iterative ones, of a rank that is split all parts but the innermost.
        extents: numbers by rank, to compare by.

    Raises:
        UnknownRankError: `loops` names a rank that the cascade does not have.
        InputError: `einsums` names a tensor that no Einsum of the cascade computes.
    Cost: O(loops! * statements * accesses).   Source: FuseMax (MICRO 2024), section V.

    >>> from einsumcascade.gallery import load
    >>> for rows, kept in loop_orders(load("softmax_1p")).best.by_rows.items():
    ...     print(rows, [f"{k.tensor} {k.elements}" for k in kept])
    ('B', 'H', 'P') ['Q E', 'RM 1', 'RD 1', 'RNV F']
    ('B', 'H') ['K E*M', 'V F*M']
    """
    _check(cascade, einsums or (), loops or ())
    own = tuple(x for x in lines(cascade) if einsums is None or x.tensor in einsums)
    known = assumed_extents(cascade, extents or {})
    wanted = [variable_of(r) for r in loops] if loops is not None else _loops(cascade, own)
    outside, inside = _split(wanted, own)
    left_whole = sorted(inside, key=lambda v: -sum(v in x.space for x in own))[MOST_LOOPS:]
    inside = [v for v in inside if v not in left_whole]
    edges, tensors = edges_between(own), _tensors(cascade, own)
    found, tried = [], 0
    for order in permutations(inside):
        tried += 1
        nest = fuse(own, edges, (*outside, *order))
        if nest is not None:
            kept = (kept_by(nest, t) for t in tensors)
            order_of = tuple(rank_of(v) for v in nest.order)
            found.append(LoopOrder(order=order_of, kept=tuple(k for k in kept if k is not None), nest=str(nest)))
    found.sort(key=lambda o: _size(o, known))
    names = {v for x in own for v in x.space} - {*outside, *inside}
    return LoopOrders(
        orders=tuple(found),
        whole=tuple(rank_of(v) for v in _variables(own) if v in names),
        is_settled=all(never_more(found[0].computed, o.computed) for o in found),
        extents=known,
        tried=tried,
    )


def _check(cascade: Cascade, einsums: Sequence[str], loops: Sequence[str]) -> None:
    computed = tuple(dict.fromkeys(e.tensor for e in cascade.einsums))
    for rank in loops:
        if known_rank(cascade, rank) is None:
            raise unknown_rank(cascade, rank)
    for tensor in einsums:
        if tensor not in computed:
            raise InputError.of(
                "unknown-tensor",
                f"no Einsum of the cascade '{cascade.name}' computes {tensor}",
                rule="an Einsum is named by the tensor that it computes",
                hint=nearest(tensor, computed),
            )


def _variables(own: Sequence[Line]) -> tuple[str, ...]:
    """Rank variables of statements in order of first appearance."""
    return tuple(dict.fromkeys(v for x in own for v in x.space))


def _loops(cascade: Cascade, own: Sequence[Line]) -> list[str]:
    """The variables of long and of iterative ranks; of what is split also the parts, but the innermost."""
    found = partitions(cascade)
    inner = {w[-1] for p in found.values() for w in p.ways}
    long = long_ranks(cascade)
    wanted = {v for p in found.values() if rank_of(p.whole) in long for v in (p.whole, *p.parts)} - inner
    wanted |= {v for x in own for v in x.ways}
    return [v for v in _variables(own) if v in wanted]


def _split(wanted: Sequence[str], own: Sequence[Line]) -> tuple[list[str], list[str]]:
    """Part the loops that every access walks in step, at no distance, from those whose place matters."""

    def in_step(v: str) -> bool:
        return all(
            v in x.space
            and v not in x.reduced
            and all(any(_is_at(w, v) for w in walks) for walks in (x.written, *(r for _, r in x.reads)))
            for x in own
        )

    outside = [v for v in wanted if in_step(v)]
    return outside, [v for v in wanted if v not in outside]


def _is_at(walk: Walk, variable: str) -> bool:
    return walk.step is Step.EXACT and walk.variables == (variable,) and not walk.shift


def _tensors(cascade: Cascade, own: Sequence[Line]) -> list[Tensor]:
    """What the statements touch: inputs of the cascade, other inputs of the nest, what they compute."""
    shape = axes(cascade)
    written = {x.tensor for x in own}
    read = {t for x in own for t, _ in x.reads}
    ordered = [t for t in shape if t in read - written] + list(dict.fromkeys(x.tensor for x in own))
    return [Tensor(t, own, shape[t]) for t in ordered]


def _size(order: LoopOrder, known: Mapping[str, int]) -> tuple[int, int]:
    """What an order keeps: computed elements, then all of them."""
    sizes = [(k.is_input, k.elements.at(known)) for k in order.kept]
    return sum(n for is_input, n in sizes if not is_input), sum(n for _, n in sizes)


def _sum(kept: Sequence[Kept]) -> Count:
    total = Count()
    for k in kept:
        total += k.elements
    return total
