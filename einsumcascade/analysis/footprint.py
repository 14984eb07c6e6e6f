"""What must outlive each boundary between the loops over a rank, and the least of it that must be kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from einsumcascade.analysis.cut import Network, Price, is_certain, least_cut, reached
from einsumcascade.analysis.dependence import axes, known_rank, partitions
from einsumcascade.analysis.passes import PassCount, count_passes, unknown_rank
from einsumcascade.analysis.plans import Boundary, Held, How, Live, Plan, Recomputed
from einsumcascade.analysis.polynomial import volume
from einsumcascade.analysis.sizes import assumed_extents
from einsumcascade.analysis.walks import Line, Step, Walk, lines
from einsumcascade.language.ir import Cascade, rank_of

_ALL: Final = 1 << 62


def boundary_footprints(
    cascade: Cascade,
    *,
    rank: str,
    extents: Mapping[str, int] | None = None,
    blocks: Mapping[str, int] | None = None,
    capacity: int | None = None,
    count: PassCount | None = None,
) -> tuple[Boundary, ...]:
    """Find what is live across each boundary between loops over a rank, and the least that must be kept.

    What is live, least and its price: Definitions F3 to F5 of docs/analysis.md.

    Args:
        cascade: a checked cascade.
        rank: name of the rank, upper case.
        extents: numbers by rank to choose by; those not given are assumed (Definition F2).
        blocks: rows that come together, by rank: `{"P": 128}` reads what 128 rows share once for all of them.
        capacity: elements that fit beside the computation, for a block of rows; what does not fit is spilled.
        count: `count_passes(cascade, rank=rank)` if it is at hand.

    Raises: UnknownRankError: `rank` is not a rank of `cascade`.
    Cost: for each boundary two maximum flows and one for each product of extents; networkx is imported.
    Source: FuseMax (MICRO 2024), sections III and V.

    >>> from einsumcascade.gallery import load
    >>> for b in boundary_footprints(load("softmax_attention"), rank="M", extents={"M": 65536, "E": 64}):
    ...     print(b.number, [h.tensor for h in b.plan.held], b.plan.price_at(b.extents))
    1 ['QK'] 65536.0
    2 ['SN'] 65536.0
    >>> found = boundary_footprints(load("softmax_attention"), rank="M", extents={"E": 64}, blocks={"P": 128})
    >>> found[0].plan.price, found[0].plan.recomputed[0].tensor, found[0].plan.price_at({"M": 65536, "E": 64})
    ('E*M/128', 'QK', 32768.0)
    """
    variable = known_rank(cascade, rank)
    if variable is None:
        raise unknown_rank(cascade, rank)
    count = count or count_passes(cascade, rank=rank)
    if count.levels < 2:
        return ()
    seen = _Seen(cascade, variable, count)
    known = assumed_extents(cascade, extents or {})
    return tuple(seen.boundary(b, known, blocks or {}, capacity) for b in range(1, seen.count.levels))


class _Seen:
    """A cascade seen along a rank: the level that each tensor is known after, and who reads it."""

    def __init__(self, cascade: Cascade, variable: str, count: PassCount) -> None:
        self.count = count
        self.part = partitions(cascade)[variable]
        self.along = (self.part.whole, *self.part.parts)
        self.inputs = tuple(i.tensor for i in cascade.inputs)
        self.shape = {t: tuple(s) for t, s in axes(cascade).items()}
        self.lines = lines(cascade)
        self.begun = {x.tensor for x in self.lines if x.is_init}
        # What is made without walking the rank is there before any loop over it.
        made = {x.tensor for x in self.lines if set(x.space) & set(self.along)}
        self.ready = {t for t in self.shape if t not in made}
        self.level = self._levels()
        self.reads = {
            t: [(x, self.level[x.tensor], walks) for x in self.lines for name, walks in x.reads if name == t]
            for t in self.shape
        }
        self.first = {t: min((at for _, at, _ in self.reads[t] if at), default=0) for t in self.inputs}

    def _levels(self) -> dict[str, int]:
        """The level that each computed tensor is known after; 0 where it waits for none."""
        level = {x.tensor: self.count.level_of.get(x.tensor, 0) for x in self.lines}
        changed = True
        while changed:
            changed = False
            for x in self.lines:
                if x.tensor not in self.count.level_of:
                    at = max((level.get(t, 0) for t, _ in x.reads), default=0)
                    if at > level[x.tensor]:
                        level[x.tensor], changed = at, True
        # What waits for nothing is computed where it is first wanted.
        for x in reversed(self.lines):
            if not level[x.tensor]:
                level[x.tensor] = min(
                    (level[y.tensor] for y in self.lines for t, _ in y.reads if t == x.tensor), default=0
                )
        return level

    def boundary(
        self, number: int, known: Mapping[str, int], blocks: Mapping[str, int], capacity: int | None
    ) -> Boundary:
        done = [b.producer for b in self.count.level_barriers if b.boundary == number]
        rows = tuple(v for v in self.shape[done[0]] if v and v not in self.along) if done else ()
        rows = tuple(v for v in rows if all(v in self.shape[t] for t in done))
        live = [x for t in self.shape if (x := self._live(t, number, rows)) is not None]
        plan = self._plan(number, rows, known, blocks, capacity)
        together = self._plan(number, rows, known, {rank_of(v): _ALL for v in rows}, None)
        return Boundary(
            rank=self.count.rank,
            number=number,
            rows=tuple(map(rank_of, rows)),
            live=tuple(live),
            plan=plan,
            together=together,
            extents=known,
        )

    def _is_before(self, tensor: str, number: int) -> bool:
        at = self.first[tensor] if tensor in self.first else self.level[tensor]
        return 0 < at <= number

    def _after(self, tensor: str, number: int) -> list[tuple[Line, tuple[Walk, ...]]]:
        return [(x, walks) for x, at, walks in self.reads[tensor] if at > number and x.tensor != tensor]

    def _live(self, tensor: str, number: int, rows: Sequence[str]) -> Live | None:
        after = self._after(tensor, number)
        if not after or not self._is_before(tensor, number):
            return None
        fiber, grows = self._fiber(tensor, rows, [walks for _, walks in after])
        return Live(
            tensor=tensor,
            is_input=tensor in self.inputs,
            readers=tuple(dict.fromkeys(x.tensor for x, _ in after)),
            is_fiber=grows,
            elements=volume(fiber),
            rows=tuple(rank_of(v) for v in rows if v in self.shape[tensor]),
            shared=tuple(map(rank_of, self._shared(tensor, rows))),
        )

    def _fiber(
        self, tensor: str, rows: Sequence[str], found: Sequence[tuple[Walk, ...]]
    ) -> tuple[tuple[str, ...], bool]:
        """Variables whose extents multiply to what one row wants of a tensor, and whether that grows with the rank."""
        out: dict[str, None] = {}
        slow = False
        for axis, v in enumerate(self.shape[tensor]):
            walked = [walks[axis] for walks in found]
            moving = dict.fromkeys(w for x in walked for w in x.variables)
            fixed = all(x.step is Step.FIXED for x in walked)
            # Along the rank a fixed place is one element; elsewhere nothing says so.
            if v is None or set(moving or (v,)) <= set(rows) or (fixed and v in self.along):
                continue
            foreign = v not in self.along and bool(set(moving) & set(self.along))
            if foreign and any(x.step is not Step.SLOW for x in walked):
                # An element for each place along the rank, wherever a table says that it is.
                out |= dict.fromkeys(w for w in moving if w not in rows)
            else:
                out[v] = None
                slow = slow or foreign
        names = tuple(out)
        if self.part.has_all(names):
            names = tuple(dict.fromkeys(self.part.whole if v in self.along else v for v in names))
        return names, slow or bool(set(names) & set(self.along))

    def _shared(self, tensor: str, rows: Sequence[str]) -> tuple[str, ...]:
        used = {v for _, _, walks in self.reads[tensor] for w in walks for v in w.variables}
        return tuple(v for v in rows if v not in self.shape[tensor] and (v not in used))

    def _plan(
        self,
        number: int,
        rows: Sequence[str],
        known: Mapping[str, int],
        blocks: Mapping[str, int],
        capacity: int | None,
    ) -> Plan:
        network = self._network(number, rows, known, blocks)
        cut = least_cut(network, known)
        held = [
            Held(
                tensor=t,
                how="read again" if t in self.inputs else "kept",
                price=network.prices[t],
                shared=tuple(map(rank_of, self._shared(t, rows))),
            )
            for t in cut
        ]
        again = reached(network.edges, network.targets, cut)
        recomputed = [
            Recomputed(
                tensor=t, sources=tuple(dict.fromkeys(s for x in self.lines if x.tensor == t for s, _ in x.reads))
            )
            for t in self.shape
            if t in again
        ]
        if capacity is not None:
            size = math.prod(min(n, known[r]) for r, n in blocks.items() if r in map(rank_of, rows))
            held = _fitted(held, size, capacity, known, self.inputs)
        return Plan(
            held=tuple(held),
            recomputed=tuple(recomputed),
            is_settled=is_certain(network, cut),
            weighed=tuple(r for r in known if any(r in p.elements.extents for p in network.prices.values())),
        )

    def _network(
        self, number: int, rows: Sequence[str], known: Mapping[str, int], blocks: Mapping[str, int]
    ) -> Network:
        """The fibers computed or read up to a boundary, who is computed from whom, and who is wanted after it."""
        fibers = {}
        for t in self.shape:
            names, grows = self._fiber(t, rows, [walks for _, _, walks in self.reads[t]])
            if self._is_before(t, number) and grows:
                shared = [rank_of(v) for v in self._shared(t, rows)]
                divisor = math.prod(max(1, min(blocks.get(r, 1), known[r])) for r in shared)
                fibers[t] = Price(elements=volume(names), divisor=divisor)
        targets = [t for t in fibers if any(not self._is_fixed(t, walks) for _, walks in self._after(t, number))]
        before = [x for x in self.lines if x.tensor in fibers]
        edges = [(t, x.tensor) for x in before for t, _ in x.reads if t in fibers and t != x.tensor]
        stuck = {t for t in targets for x, walks in self._after(t, number) if not self._in_step(t, walks, x.space)}
        for x in before:
            own = [v for w in x.written for v in w.variables]
            late = any(t in fibers and not self._in_step(t, walks, own) for t, walks in x.reads)
            late = late or bool(set(x.reduced) & set(rows))
            # A row alone does not have what other rows add to. Downwards it does not come by with the others, and a
            # step of another rank has only what it was handed.
            other = any(way < 0 if v in self.along else x.tensor in self.begun for v, way in x.ways.items())
            if late or other:
                stuck.add(x.tensor)
        return Network(
            prices=fibers,
            edges=tuple(dict.fromkeys(edges)),
            sources=tuple(t for t in fibers if t in self.ready or t in stuck),
            targets=tuple(targets),
        )

    def _is_fixed(self, tensor: str, walks: Sequence[Walk]) -> bool:
        """Whether a read takes one coordinate along the rank."""
        return all(
            w.step is Step.FIXED
            for v, w in zip(self.shape[tensor], walks, strict=True)
            if v is not None and v in self.along
        )

    def _in_step(self, tensor: str, walks: Sequence[Walk], own: Sequence[str]) -> bool:
        """Whether a statement that moves by `own` takes each element as it comes by, or where it lies ready."""
        moved = {v for v in own if v in self.along}
        if tensor in self.ready:
            return any(moved & set(w.variables) for w in walks)
        along = [w for v, w in zip(self.shape[tensor], walks, strict=True) if v is not None and v in self.along]
        walked = {v for w in along if w.step is Step.EXACT for v in w.variables}
        # A whole tile may be read at each step of the loop over tiles.
        inner = {v for way in self.part.ways for v in way[1:]}
        return (
            all(w.step in (Step.FIXED, Step.EXACT) for w in along) and bool(moved & walked) and walked <= moved | inner
        )


def _fitted(
    held: Sequence[Held], rows: int, capacity: int, known: Mapping[str, int], inputs: Sequence[str]
) -> list[Held]:
    """Buffer the smallest fibers first, for a block of rows, while there is room."""
    room = capacity
    out = {}
    for h in sorted(held, key=lambda h: h.price.at(known)):
        size = math.ceil(h.price.at(known) * rows)
        fits = size <= room
        room -= size if fits else 0
        how: How = "buffered" if fits else "read again" if h.tensor in inputs else "spilled"
        out[h.tensor] = Held(tensor=h.tensor, how=how, price=h.price, shared=h.shared)
    return [out[h.tensor] for h in held]
