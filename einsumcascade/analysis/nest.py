"""Fused loop nests: one order of loops for several Einsums, and what such a nest keeps from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from einsumcascade.analysis.walks import Line, Step, Walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One statement reads what another writes.

    Args:
        writer, reader: numbers of the two statements.
        written, read: how they walk each axis.
    """

    writer: int
    reader: int
    written: tuple[Walk, ...]
    read: tuple[Walk, ...]

    def distance(self, variable: str) -> int | None:
        """How far from where it is written it is read along a loop; None where the two do not walk in step."""
        for w, r in zip(self.written, self.read, strict=True):
            if w.step is r.step is Step.EXACT and variable in w.variables and w.variables == r.variables:
                return r.shift - w.shift
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nest:
    """A fused loop nest.

    Which Einsums share a loop: Definition F6 of docs/analysis.md.

    Args:
        order: the loop variables, outermost first; all other ranks are whole inside a step.
        lines: the statements.
        stages: for each statement its stage at each depth; odd stages are loops.
    """

    order: tuple[str, ...]
    lines: tuple[Line, ...]
    stages: tuple[tuple[int, ...], ...]

    def way(self, line: int, depth: int) -> int:
        """Which way the loop at a depth around a statement goes: -1 if a block in it descends, else 1."""
        loop = self.stages[line][: depth + 1]
        variable = self.order[depth]
        inside = (x for x, s in zip(self.lines, self.stages, strict=True) if s[: depth + 1] == loop)
        return -1 if any(x.ways.get(variable) == -1 for x in inside) else 1

    def __str__(self) -> str:
        return "\n".join(self._text(tuple(range(len(self.lines))), 0, ""))

    def _text(self, body: tuple[int, ...], depth: int, indent: str) -> Iterator[str]:
        if depth == len(self.order):
            yield indent + ", ".join(dict.fromkeys(self.lines[k].tensor for k in body))
            return
        for stage in sorted({self.stages[k][depth] for k in body}):
            part = tuple(k for k in body if self.stages[k][depth] == stage)
            if stage % 2:
                yield f"{indent}for {self.order[depth]}:"
            yield from self._text(part, depth + 1, indent + "  " * (stage % 2))


def edges_between(lines: Sequence[Line]) -> tuple[Edge, ...]:
    """List who reads what whom has written."""
    writers: dict[str, list[int]] = {}
    for k, line in enumerate(lines):
        writers.setdefault(line.tensor, []).append(k)
    return tuple(
        Edge(writer=w, reader=k, written=lines[w].written, read=read)
        for k, line in enumerate(lines)
        for tensor, read in line.reads
        for w in writers.get(tensor, ())
    )


def fuse(lines: tuple[Line, ...], edges: Sequence[Edge], order: tuple[str, ...]) -> Nest | None:
    """Fuse statements into one nest with a given order of loops; None if a recurrence forbids the order.

    Args:
        lines: the statements.
        edges: `edges_between(lines)`.
        order: loop variables, outermost first.

    Cost: O(loops * statements * accesses); a recurrence through several loops multiplies it.
    """
    stages: list[list[int]] = [[] for _ in lines]

    def divide(body: tuple[int, ...], found: Sequence[Edge], depth: int) -> bool:
        if depth == len(order):
            return True
        variable = order[depth]
        placed = _stages(lines, body, found, variable)
        if placed is None:
            return False
        for k in body:
            stages[k].append(placed[k])
        for stage in sorted(set(placed.values())):
            part = tuple(k for k in body if placed[k] == stage)
            # What an earlier iteration has written is there for all loops inside.
            inside = [
                e
                for e in found
                if placed.get(e.writer) == placed.get(e.reader) == stage
                and not (stage % 2 and e.distance(variable) not in (0, None))
            ]
            if not divide(part, inside, depth + 1):
                return False
        return True

    if not divide(tuple(range(len(lines))), edges, 0):
        return None
    return Nest(order=order, lines=lines, stages=tuple(map(tuple, stages)))


def _stages(
    lines: Sequence[Line], body: tuple[int, ...], edges: Sequence[Edge], variable: str
) -> dict[int, int] | None:
    """Give each statement of a body the earliest stage it can have."""
    stage = {k: int(variable in lines[k].space) for k in body}
    ways = {k: _way(lines[k], variable, [e for e in edges if e.reader == k]) for k in body}
    last = 2 * len(body) + 1
    changed = True
    while changed:
        changed = False
        for e in edges:
            needed = stage[e.writer] + _wait(e, stage, ways, variable)
            if stage[e.reader] < needed:
                stage[e.reader], changed = needed, True
        if not changed:
            for k in body:
                # Two ways through one rank are two loops.
                opposed = any(stage[j] == stage[k] and ways[j] * ways[k] < 0 for j in body if j < k)
                if stage[k] % 2 and opposed:
                    stage[k], changed = stage[k] + 2, True
        if max(stage.values(), default=0) > last:
            return None
    return stage


def _wait(e: Edge, stage: Mapping[int, int], ways: Mapping[int, int], variable: str) -> int:
    """How many stages a reader stands after the writer at least."""
    writes, reads = stage[e.writer] % 2, stage[e.reader] % 2
    if not (writes and reads):
        return writes | reads
    distance = e.distance(variable)
    way = ways[e.writer] or ways[e.reader] or 1
    return 0 if distance is not None and distance * way <= 0 else 2


def _way(line: Line, variable: str, edges: Sequence[Edge]) -> int:
    """Which way a statement takes a loop: that of its iterative block, else upwards if it looks to a side, else any."""
    if variable in line.ways:
        return line.ways[variable]
    return int(any(e.distance(variable) for e in edges))
