"""The sweep behind the pass count: one walk over a cascade that follows how far each tensor is known.

A tensor is at (pass, summary), and its elements become known as the traversal comes by, along one of its axes, or all
of them once that traversal has ended. A statement that needs what is not known where it stands starts the next pass.
Families, visits and traversals are those of Definitions P3 to P5 of docs/analysis.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from einsumcascade.analysis.places import Fact, Place
from einsumcascade.analysis.unroll import Along, Instance, Item, Steps, Unrolled
from einsumcascade.language.ir import Read, rank_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """Why pass `boundary + 1` cannot begin before pass `boundary` has ended: Definition P7 of docs/analysis.md.

    Args:
        boundary: number of the pass that must end first.
        producer: the Einsum whose value needs the whole fiber.
        reader: the Einsum that waits for it.
        read: the read that waits, as text.
        rank: the rank of the fiber.
    """

    boundary: int
    producer: str
    reader: str
    read: str
    rank: str

    def __str__(self) -> str:
        tensor = self.read.split("[")[0]
        if tensor == self.producer:
            return f"{self.reader} waits for {tensor}: it reads {self.read}, complete only after all of {self.rank}"
        return (
            f"{self.reader} waits for {self.producer}: it reads {self.read}, which needs {self.producer}, "
            f"complete only after all of {self.rank}"
        )

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {"boundary": self.boundary, "producer": self.producer, "reader": self.reader, "read": self.read}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The outcome of one sweep.

    Args:
        count: the last pass.
        level_of: the pass of each statement that traverses the rank, in its first step, in cascade order.
        barriers: what begins each pass after the first, in cascade order.
        summary_traversals: loops over an outer partition alone that cannot join another loop (Definition P9).
        summaries: the Einsums in those loops.
        endless: (rank, passes) where each step of an iteration along the rank itself traverses the whole fiber again;
            `count` has one such step.
    """

    count: int
    level_of: Mapping[str, int] = field(hash=False)
    barriers: tuple[Barrier, ...]
    summary_traversals: int
    summaries: tuple[str, ...]
    endless: tuple[tuple[str, int], ...] = ()


_BEGUN = -1
# The way of a traversal in which what stands there is known in time.
_WANTED = {Place.BEHIND: 1, Place.FIRST: 1, Place.AHEAD: -1, Place.LAST: -1}
# More than any pass: a recurrence finds no traversal that goes its way.
_NEVER = 1 << 20
# Repetitions after which a block along the rank changes no more, but for one that never settles.
_SETTLED = 4
# Traversals whose way is chosen; those after them go the way of the last.
_CHOSEN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """How far a tensor is known.

    Args:
        at: the pass and, within what follows it, the loop over tiles alone.
        axis: the axis along which elements become known during that traversal; None: all at its end; `_BEGUN`: all of
            them soon after it has begun.
        way: the way that traversal must go for it, 0 for either.
        origin: the Einsum that made the tensor wait for the whole fiber.
        spread: axes of other ranks along which its elements have read the family, each with the pass of these reads.
    """

    at: tuple[int, int] = (0, 0)
    axis: int | None = None
    way: int = 0
    origin: str = ""
    spread: Mapping[int, int] = field(default_factory=dict, hash=False)


_GIVEN = _State()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """A read of one part of a tensor with its state; `member` tells whether that part counts, there."""

    read: Read
    state: _State
    member: bool


def sweep(cascade: Unrolled, *, family: frozenset[str]) -> Sweep:
    """Sweep a cascade for a rank.

    Args:
        cascade: a checked cascade in order, for the rank.
        family: the parts of a tensor whose traversals count, with all of its family (Definition P3 of
            docs/analysis.md); none counts the traversals of any tensor, which gives the levels (Definition P8).

    Guaranteed: with a family, the passes of Definition P6, except for what Definition P11 lists.
    Cost: O(Einsums + accesses); up to 2**5 times that where some reads call for a traversal from the end.
    Source: FuseMax (MICRO 2024), section III-A.
    """
    best = _Run(cascade, family, (1,))
    if best.opposed and best.cost > _Run(cascade, family, (0,)).cost:
        best = min(best, _Run(cascade, family, (-1,)), key=lambda run: run.cost)
        for ways in product((1, -1), repeat=min(best.count, _CHOSEN)):
            best = min(best, _Run(cascade, family, ways), key=lambda run: run.cost)
    return best.outcome()


class _Run:
    """The mutable state of one sweep, with traversals that go given ways; it lives inside `sweep` only."""

    def __init__(self, cascade: Unrolled, family: frozenset[str], ways: tuple[int, ...]) -> None:
        self.ground, self.family, self.ways = cascade.ground, family, ways
        self.members = set(family)
        self.state: dict[str, _State] = {}
        self.pass_of: dict[Instance, int] = {}
        self.summary_at: dict[Instance, tuple[int, int]] = {}
        self.barriers: dict[Instance, tuple[Barrier, ...]] = {}
        # Some read or some recurrence would have another way; one of the recurrences finds none.
        self.opposed = self.impossible = False
        # Ranks whose every step traverses the fiber anew, with the passes of a step.
        self.endless: dict[str, int] = {}
        # What more than one such step has added to the count.
        self.surplus = 0
        self.direction = 0
        self.block(cascade.items)

    @property
    def cost(self) -> tuple[int, int]:
        """What a choice of ways should make least."""
        return sum(self.endless.values()), self.count

    @property
    def count(self) -> int:
        """The last pass."""
        return max((_NEVER * self.impossible, *self.pass_of.values()))

    def outcome(self) -> Sweep:
        """Put what was found in the order of the cascade; of several steps the first one tells."""
        order = tuple(self.ground.facts.values())
        level_of: dict[str, int] = {}
        summaries: dict[str, tuple[int, int]] = {}
        for fact in order:
            for found, out in ((self.pass_of, level_of), (self.summary_at, summaries)):
                first = next((at for i, at in found.items() if i.fact is fact), None)
                if first is not None:
                    out[fact.tensor] = max(first, out.get(fact.tensor, first))  # type: ignore[assignment]
        loops: dict[int, int] = {}
        for p, q in summaries.values():
            loops[p] = max(loops.get(p, 0), q)
        barriers = (b for fact in order for i, found in self.barriers.items() if i.fact is fact for b in found)
        return Sweep(
            count=self.count - self.surplus,
            level_of=level_of,
            barriers=tuple(dict.fromkeys(barriers)),
            summary_traversals=sum(loops.values()),
            summaries=tuple(summaries),
            endless=tuple(self.endless.items()),
        )

    def way(self, number: int) -> int:
        """1 where a traversal goes up, -1 where it goes down, 0 for both at once: no choice needs fewer."""
        return self.ways[min(max(number, 1), len(self.ways)) - 1]

    def block(self, items: Iterable[Item]) -> None:
        """Sweep statements in order."""
        for item in items:
            match item:
                case Instance():
                    self.statement(item)
                case Along():
                    self.along(item)
                case Steps():
                    self.across(item)

    def along(self, block: Along) -> None:
        """Sweep a block along the rank until nothing changes: a later generation waits for what an earlier one does."""
        outside, counts = self.direction, [0]
        self.direction = block.direction or outside
        for _ in range(_SETTLED + len(block.items)):
            before = dict(self.state)
            self.block(block.items)
            counts.append(self.count)
            if self.state == before:
                break
        else:
            # Each step along the rank makes all of another traversal, through a variable of another rank.
            rank, more = rank_of(block.variable), counts[-1] - counts[-2]
            if more > 0:
                self.endless[rank] = self.endless.get(rank, 0) + more
                self.surplus += more * (len(counts) - 2)
        self.direction = outside

    def across(self, block: Steps) -> None:
        """Sweep the steps of an iteration over another rank; what a step takes over is of no family there."""
        hidden: set[str] = set()
        left: dict[str, _State] = {}
        for n, items in enumerate(block.items):
            if n:
                taken = self.members & block.carried.keys() - self.family
                self.members -= taken
                hidden |= taken
            if n and not self.family and not block.returns:
                # Loops over fibers of the step's own are those of the step before, once more.
                for part, first in block.carried.items():
                    if part in self.state:
                        left.setdefault(part, self.state[part])
                        self.state[part] = self.state.get(first, _GIVEN)
            self.block(items)
        self.members |= hidden
        self.state |= left

    def uses(self, s: Instance) -> list[_Use]:
        """What a statement reads, as far as it is known."""
        out = []
        for r, parts in s.reads:
            full = self.ground.is_full(r.tensor)
            for p in parts:
                member = full and p in self.members if self.family else self.ground.is_along(r)
                out.append(_Use(read=r, state=self.state.get(p, _GIVEN), member=member))
        return out

    def statement(self, s: Instance) -> None:
        """Put a statement into its pass, and what it writes behind it."""
        fact, uses = s.fact, self.uses(s)
        n, q = at = max((u.state.at for u in uses), default=(0, 0))
        latest = [u for u in uses if u.state.at == at and n]
        kind, stand = self._visit(fact, uses)
        if not kind:
            stand = self._standing(fact, latest, n)
        waiting = [u for u in latest if not self._streams(fact, u, stand, n)]
        self.barriers.pop(s, None)
        number = n
        if kind:
            late = bool(waiting) or q > 0
            number = self._going(fact, n + 1 if late or n == 0 else n)
            if late and n:
                self.barriers[s] = tuple(self._barrier(fact, u, n) for u in waiting or latest)
            self.pass_of[s] = max(self.pass_of.get(s, 0), number)
        if kind in ("own", "reduced"):
            axis = self._landing(fact, stand, number)
            way = self._wanted(fact, latest if number == n else [], stand)
            new = _State(at=(number, 0), axis=axis, way=way, origin=fact.tensor)
            if kind == "own" and fact.carries and any(u.member and self._aligned(fact, u.read) for u in uses):
                self.members.add(s.writes)
        elif n == 0:
            new = _GIVEN
        else:
            new = self._passed_on(s, latest, waiting, stand)
        self.state[s.writes] = self._covered(fact, uses, kind, number, new)

    def _going(self, fact: Fact, number: int) -> int:
        """The first traversal from `number` on that goes the way of a recurrence."""
        while fact.recurs and self.direction and self.way(number) not in (0, self.direction):
            self.opposed = True
            if number > len(self.ways):
                self.impossible = True
                break
            number += 1
        return number

    def _landing(self, fact: Fact, stand: str | None, number: int) -> int | None:
        """The axis along which a statement's elements become known as `stand` moves, if they do."""
        axis = self.ground.landing(fact, stand, way=self.way(number))
        self.opposed = self.opposed or (axis is None and self.ground.leaning(fact, stand) != 0)
        return axis

    def _passed_on(self, s: Instance, latest: list[_Use], waiting: list[_Use], stand: str | None) -> _State:
        """How far what a statement writes is known if it traverses nothing itself."""
        fact, (n, q) = s.fact, latest[0].state.at
        over_tiles = fact.own is not None and not fact.iterates
        axis = self._landing(fact, stand, n)
        begun = not waiting and all(self._has_begun(fact, u) for u in latest)
        opposed = not begun and fact.recurs and self.direction and self.way(n) not in (0, self.direction)
        if begun:
            axis = _BEGUN
        elif (waiting or opposed) and not over_tiles:
            axis = None
        if over_tiles:
            # A recurrence that goes against the traversal has a loop over tiles of its own.
            q = max(q + bool(waiting), int(bool(opposed)))
            if q:
                self.summary_at[s] = (n, q)
        self.opposed = self.opposed or bool(opposed)
        origin = next((u.state.origin for u in waiting if u.state.axis is None), "") or fact.tensor
        return _State(at=(n, q), axis=axis, way=self._wanted(fact, latest, stand), origin=origin)

    def _wanted(self, fact: Fact, latest: list[_Use], stand: str | None) -> int:
        """The way a traversal must go for a statement and what it reads; 0 for either."""
        found = [self.ground.leaning(fact, stand), self.direction if fact.recurs else 0]
        for u in latest:
            found.append(u.state.way)
            if u.state.axis not in (None, _BEGUN):
                found.append(_WANTED.get(self.ground.place(fact, u.read, u.state.axis or 0, stand), 0))
        return next((w for w in found if w), 0)

    def _visit(self, fact: Fact, uses: list[_Use]) -> tuple[str, str | None]:
        """How a statement traverses the family, and by which variable: along the rank, or through another one."""
        members = list(dict.fromkeys(u.read for u in uses if u.member))
        if not self.family:
            return ("own", fact.own) if fact.iterates and members else ("", None)
        if fact.iterates and any(self._aligned(fact, r) for r in members):
            return "own", fact.own
        through = [self._through(r) for r in members]
        for kind, names in (("reduced", fact.reduced), ("free", fact.free)):
            for v in through:
                if v in names:
                    return kind, v
        return ("own", fact.own) if fact.iterates and members else ("", None)

    def _aligned(self, fact: Fact, r: Read) -> bool:
        axis = self.ground.axis(r.tensor)
        return axis is not None and self.ground.place(fact, r, axis, fact.own) is Place.HERE

    def _through(self, r: Read) -> str | None:
        axis = self.ground.axis(r.tensor)
        return None if axis is None else self.ground.through(r, axis)

    def _standing(self, fact: Fact, latest: list[_Use], number: int) -> str | None:
        """The variable by which a statement that traverses nothing follows what it reads, else the rank's."""
        for v in (fact.own, *fact.space):
            if all(self._streams(fact, u, v, number) for u in latest):
                return v
        return fact.own

    def _streams(self, fact: Fact, use: _Use, stand: str | None, number: int) -> bool:
        """Whether what is read is known where the traversal stands in which the tensor becomes known."""
        axis = use.state.axis
        if axis is None or axis == _BEGUN:
            return axis == _BEGUN
        place = self.ground.place(fact, use.read, axis, stand)
        wanted, way = _WANTED.get(place, 0), self.way(number)
        self.opposed = self.opposed or wanted == -way
        if place is Place.HERE or not wanted:
            return place is Place.HERE
        return way == wanted or (way == 0 and use.state.way != -wanted)

    def _has_begun(self, fact: Fact, use: _Use) -> bool:
        axis = use.state.axis
        if axis is None or axis == _BEGUN:
            return axis == _BEGUN
        return self.ground.place(fact, use.read, axis, None) in (Place.FIRST, Place.LAST)

    def _covered(self, fact: Fact, uses: list[_Use], kind: str, number: int, new: _State) -> _State:
        """Follow reads through variables of other ranks: with all their places read, a traversal has ended."""
        spread: dict[int, int] = {}
        seen: list[tuple[str | None, int]] = []
        for u in uses:
            if self.family and kind and u.member:
                v = self._through(u.read)
                if kind != "reduced" or v not in fact.reduced:
                    seen.append((v, number))
            seen += [(self.ground.plain(u.read, axis), k) for axis, k in u.state.spread.items()]
        for v, k in seen:
            axis = self._landing(fact, v, k)
            if v in fact.free and axis is not None:
                spread[axis] = max(k, spread.get(axis, 0))
            elif v in fact.reduced and (k, 0) > new.at:
                new = replace(new, at=(k, 0), axis=axis, origin=fact.tensor)
            elif v in fact.reduced and k == new.at[0] and axis != new.axis:
                new = replace(new, axis=None, origin=fact.tensor)
        return replace(new, spread=spread) if spread else new

    def _barrier(self, fact: Fact, use: _Use, boundary: int) -> Barrier:
        # A tensor that streams and is waited for all the same must itself be complete, read as it is elsewhere.
        itself = use.state.axis is not None and use.state.at[1] == 0
        return Barrier(
            boundary=boundary,
            producer=use.read.tensor if itself else use.state.origin,
            reader=fact.tensor,
            read=str(use.read),
            rank=rank_of(self.ground.part.whole),
        )
