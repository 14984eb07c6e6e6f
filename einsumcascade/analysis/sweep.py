"""The sweep behind the pass count: one walk over a cascade that follows how far each tensor is known.

A tensor is at (pass, summary), and either *streaming*, its element known as soon as the traversal has come by, or
*complete*, known once that traversal has ended. A statement that needs something complete starts the next pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from einsumcascade.analysis.dependence import Access, Partition, access, axes, reads_of
from einsumcascade.language.ir import Cascade, Einsum, Init, Iter, Read, Statement, rank_of, variables, walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """Why pass `boundary + 1` cannot begin before pass `boundary` has ended.

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
        level_of: the pass of each statement that traverses the rank, in cascade order.
        barriers: what begins each pass after the first, in cascade order.
        summary_traversals: loops over an outer partition alone that cannot join another loop.
        summaries: the Einsums in those loops.
        per_step: (rank, passes) of each iterative rank whose every step traverses the same fibers anew.
    """

    count: int
    level_of: Mapping[str, int] = field(hash=False)
    barriers: tuple[Barrier, ...]
    summary_traversals: int
    summaries: tuple[str, ...]
    per_step: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """How far a tensor is known; `origin` is the Einsum that made it wait for the whole fiber."""

    at: tuple[int, int] = (0, 0)
    streaming: bool = False
    direction: int = 0
    origin: str = ""


_GIVEN = _State()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """A read with the state of its tensor."""

    read: Read
    state: _State
    access: Access
    member: bool

    def waits(self, at: tuple[int, int], direction: int, *, of_family: bool) -> bool:
        """Tell whether this read keeps a statement that is otherwise at `at` from joining that traversal.

        A family's element may be read into a whole fiber of results as the traversal comes by; a loop shared with
        others (the levels) writes one result at a time, and needs the tensor complete for it.
        """
        if self.state.at != at:
            return False
        opposed = self.state.direction * direction < 0
        as_it_comes = self.access.streaming or (of_family and self.member and self.access.sweeps)
        return opposed or not (self.state.streaming and as_it_comes)


def sweep(cascade: Cascade, *, part: Partition, family: str | None) -> Sweep:
    """Sweep a cascade once for a rank.

    Args:
        cascade: a checked cascade.
        part: the rank and its parts.
        family: the tensor whose traversals count, with all that is computed from it while the rank stays aligned;
            None counts the traversals of any tensor, which gives the levels.

    Guaranteed: with a family, the count of an element-by-element expansion of the definition of a pass.
    Cost: O(Einsums + accesses).   Source: FuseMax (MICRO 2024), section III-A.
    """
    run = _Run(cascade, part, family)
    run.block(cascade.body, 0)
    order = [s.tensor for s in walk(cascade.body) if isinstance(s, Einsum | Init)]
    names = list(dict.fromkeys(order))
    per_pass: dict[int, int] = {}
    for p, q in run.summary_at.values():
        per_pass[p] = max(per_pass.get(p, 0), q)
    return Sweep(
        count=max(run.pass_of.values(), default=0),
        level_of={t: run.pass_of[t] for t in names if t in run.pass_of},
        barriers=tuple(dict.fromkeys(b for t in names for b in run.barriers.get(t, ()))),
        summary_traversals=sum(per_pass.values()),
        summaries=tuple(t for t in names if t in run.summary_at),
        per_step=tuple(run.per_step.items()),
    )


class _Run:
    """The mutable state of one sweep; it lives inside `sweep` only."""

    def __init__(self, cascade: Cascade, part: Partition, family: str | None) -> None:
        self.cascade, self.part, self.family = cascade, part, family
        self.shape = axes(cascade)
        self.iterative = {s.tensor for s in walk(cascade.body) if isinstance(s, Init)}
        self.members = {family} if family is not None else set()
        self.state: dict[str, _State] = {}
        self.pass_of: dict[str, int] = {}
        self.summary_at: dict[str, tuple[int, int]] = {}
        self.barriers: dict[str, tuple[Barrier, ...]] = {}
        self.per_step: dict[str, int] = {}

    def block(self, body: tuple[Statement, ...], direction: int) -> None:
        """Sweep statements in order; `direction` is that of the iterative block around them, along this rank."""
        for s in body:
            if isinstance(s, Iter):
                self.iterate(s, direction)
            else:
                self.statement(s, direction)

    def iterate(self, block: Iter, direction: int) -> None:
        """Sweep a block twice: the second sweep reads the generation that the first one wrote."""
        if self.part.has_outer((block.var,)):
            direction = -1 if block.descending else 1
        self.block(block.body, direction)
        once = (dict(self.state), dict(self.pass_of), dict(self.summary_at), dict(self.barriers), dict(self.per_step))
        before = max(self.pass_of.values(), default=0)
        self.block(block.body, direction)
        if block.var in (self.part.whole, *self.part.parts):
            return
        # What grows from step to step is counted by the step; on fibers of its own each step starts afresh.
        grown = max(self.pass_of.values(), default=0) - before
        again = any(
            self._traverses_same(s, block.var)
            for s in walk(block.body)
            if isinstance(s, Einsum) and self.pass_of.get(s.tensor, 0) > once[1].get(s.tensor, 0)
        )
        self.state, self.pass_of, self.summary_at, self.barriers, self.per_step = once
        if grown > 0 and again:
            rank = rank_of(block.var)
            self.per_step[rank] = self.per_step.get(rank, 0) + grown

    def _traverses_same(self, statement: Einsum, variable: str) -> bool:
        return any(u.member and variable not in variables(*u.read.indices) for u in self.uses(statement))

    def uses(self, statement: Einsum | Init) -> list[_Use]:
        out = []
        for r in reads_of(self.cascade, statement):
            shape = self.shape[r.tensor]
            how = access(self.cascade, statement, r, part=self.part, shape=shape)
            full = self.part.has_all(tuple(v for v in shape if v))
            if self.family is None:
                member = full or self.part.has_all(variables(*r.indices))
            else:
                member = full and r.tensor in self.members
            out.append(_Use(read=r, state=self.state.get(r.tensor, _GIVEN), access=how, member=member))
        return out

    def statement(self, s: Einsum | Init, block_direction: int) -> None:
        space = s.space if isinstance(s, Einsum) else s.free
        left = variables(*s.indices)
        uses = self.uses(s)
        members = [u for u in uses if u.member]
        sweeps = any(u.access.sweeps for u in members)
        iterates = self.part.has_all(space)
        counted = bool(members) and (iterates or sweeps)
        at = max((u.state.at for u in uses), default=(0, 0))
        recurs = s.tensor in self.iterative or any(u.read.tensor in self.iterative for u in uses)
        direction = block_direction if recurs else 0
        for u in uses:
            direction = direction or u.access.direction or (u.state.direction if u.state.at[0] == at[0] else 0)
        waiting = [u for u in uses if u.waits(at, direction, of_family=self.family is not None)]
        moves = self.part.has_outer(left)
        self.barriers.pop(s.tensor, None)
        if counted:
            late = waiting or at[1] > 0
            number = at[0] + 1 if late or at[0] == 0 else at[0]
            blamed = waiting or [u for u in uses if u.state.at == at]
            if late and at[0] > 0:
                self.barriers[s.tensor] = tuple(self._barrier(s, u, at[0]) for u in blamed)
            self.pass_of[s.tensor] = max(self.pass_of.get(s.tensor, 0), number)
            # An element that reads a whole fiber of the family has made the traversal by itself.
            streaming = moves and not (sweeps and self.family is not None)
            new = _State(at=(number, 0), streaming=streaming, direction=direction if streaming else 0, origin=s.tensor)
            aligned = any(u.access.streaming for u in members)
            if self.family is not None and aligned and self.part.has_all(left):
                self.members.add(s.tensor)
        elif at[0] == 0:
            new = _GIVEN
        elif not iterates and self.part.has_outer(space):
            q = at[1] + 1 if waiting else at[1]
            if q:
                self.summary_at[s.tensor] = (at[0], q)
            new = _State(
                at=(at[0], q), streaming=moves, direction=direction if moves else 0, origin=self._origin(s, waiting)
            )
        else:
            streaming = moves and not waiting
            new = _State(
                at=at, streaming=streaming, direction=direction if streaming else 0, origin=self._origin(s, waiting)
            )
        self.state[s.tensor] = self._joined(s, new)

    def _joined(self, s: Einsum | Init, new: _State) -> _State:
        """An iterative tensor is known no sooner than its first generation."""
        old = self.state.get(s.tensor)
        if old is None or s.tensor not in self.iterative or old.at <= new.at:
            return new
        return old

    def _origin(self, s: Einsum | Init, waiting: list[_Use]) -> str:
        """The Einsum behind the wait that a statement takes over from what it reads, else the statement."""
        return next((u.state.origin for u in waiting if not u.state.streaming), "") or s.tensor

    def _barrier(self, s: Einsum | Init, use: _Use, boundary: int) -> Barrier:
        # A streaming tensor that is waited for is itself what must be complete, read as it is at a fixed coordinate.
        itself = use.state.streaming and use.state.at[1] == 0
        producer = use.read.tensor if itself else use.state.origin
        return Barrier(
            boundary=boundary, producer=producer, reader=s.tensor, read=str(use.read), rank=rank_of(self.part.whole)
        )
