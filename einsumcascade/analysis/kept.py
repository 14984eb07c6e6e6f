"""What one tensor of a fused loop nest keeps from step to step, from which loop on, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from einsumcascade.analysis.nest import Nest
from einsumcascade.analysis.polynomial import Count, number, volume
from einsumcascade.analysis.walks import Line, Step, Walk
from einsumcascade.language.ir import rank_of

Cause = Literal["reduced", "between loops", "shared", "carried"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A tensor that a nest keeps from one step to a later one.

    From which loop on, and for which of four causes: Definition F7 of docs/analysis.md.

    Args:
        tensor: its name.
        is_input: whether it is an input, which could be read again instead.
        since: name of the rank of that loop.
        cause: which of the four.
        elements: kept at once: all of its ranks from that loop on, of what is carried one generation.
        rows: names of the ranks of the loops outside; as much is kept for each of their iterations.
    """

    tensor: str
    is_input: bool
    since: str
    cause: Cause
    elements: Count
    rows: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "tensor": self.tensor,
            "is_input": self.is_input,
            "since": self.since,
            "cause": self.cause,
            "elements": str(self.elements),
            "rows": list(self.rows),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Touch:
    """One access to a tensor: the number of the statement, whether it writes, and how it walks each axis."""

    line: int
    writes: bool
    walks: tuple[Walk, ...]


class Tensor:
    """A tensor as some statements touch it: who does, and how each of its axes is walked. No order of loops enters.

    Args:
        name: of the tensor.
        lines: the statements.
        shape: rank variable of each axis.
    """

    def __init__(self, name: str, lines: Sequence[Line], shape: tuple[str | None, ...]) -> None:
        self.name, self.lines, self.shape = name, lines, shape
        written = [Touch(line=k, writes=True, walks=x.written) for k, x in enumerate(lines) if x.tensor == name]
        read = [Touch(line=k, writes=False, walks=w) for k, x in enumerate(lines) for t, w in x.reads if t == name]
        self.touches = written + read
        self.is_input = not written
        self.reduced = {v for t in written for v in lines[t.line].reduced}
        self.begun = [t.walks for t in written if lines[t.line].is_init]
        self.walks = tuple(self._walk(axis) for axis in range(len(shape))) if self.touches else ()

    def _walk(self, axis: int) -> Walk:
        """How an axis is walked: as it is written, an input as it is first read; `init` writes one coordinate."""
        found = [t.walks[axis] for t in self.touches if t.writes and not self.lines[t.line].is_init]
        found = found or [t.walks[axis] for t in self.touches]
        moving = [w for w in found if w.step is Step.EXACT] or found
        if moving[0].step is Step.SLOW and any(w != moving[0] for w in found):
            return Walk(step=Step.ANY, variables=moving[0].variables, index=moving[0].index)
        return moving[0]

    def axis(self, variable: str) -> int | None:
        """The axis that a loop walks."""
        return next((n for n, w in enumerate(self.walks) if w.step is Step.EXACT and variable in w.variables), None)

    def in_step(self, touch: Touch, axis: int) -> bool:
        """Whether an access walks an axis as the axis is walked, a shift aside."""
        walk = touch.walks[axis]
        return walk.step is Step.EXACT and walk.variables == self.walks[axis].variables


def kept_by(nest: Nest, tensor: Tensor) -> Kept | None:
    """Find what a nest keeps of a tensor (Definition F7); None where every step is done with what it touches.

    Args:
        nest: the nest.
        tensor: a tensor as the nest's statements touch it.

    Cost: O(loops * accesses).
    """
    return _InNest(nest, tensor).kept()


class _InNest:
    """A tensor in a nest."""

    def __init__(self, nest: Nest, tensor: Tensor) -> None:
        self.nest, self.tensor = nest, tensor

    def kept(self) -> Kept | None:
        """From which loop on it is kept, and how much of it."""
        rows: list[str] = []
        for depth, variable in enumerate(self.nest.order):
            found = self._cause(depth, self.tensor.touches)
            if found is not None:
                count = self._coordinates(depth)
                return self._kept(depth, found if count is None else "carried", rows, count)
            if any(self._stage(t, depth) % 2 for t in self.tensor.touches):
                rows.append(rank_of(variable))
        return None

    def _stage(self, touch: Touch, depth: int) -> int:
        return self.nest.stages[touch.line][depth]

    def _inside(self, touch: Touch, depth: int) -> tuple[int, ...]:
        """Where an access stands in the body of a loop."""
        return self.nest.stages[touch.line][depth + 1 :]

    def _cause(self, depth: int, touches: Sequence[Touch]) -> Cause | None:
        """Why some accesses keep it from a loop on, or None."""
        variable = self.nest.order[depth]
        stages = {self._stage(t, depth) for t in touches}
        axis = self.tensor.axis(variable)
        if len(stages) > 1:
            return "between loops"
        if not any(s % 2 for s in stages):
            return None
        if variable in self.tensor.reduced:
            return "reduced"
        if axis is None or any(not t.writes and not self.tensor.in_step(t, axis) for t in touches):
            return "shared"
        shifts = {t.walks[axis].shift for t in touches if self.tensor.in_step(t, axis)}
        return "carried" if len(shifts) > 1 else None

    def _coordinates(self, depth: int) -> int | None:
        """How many coordinates along a loop are wanted at once; None where that is not a number.

        It is one where one loop touches all that moves with it, and what stands outside touches fixed coordinates.
        """
        variable = self.nest.order[depth]
        axis = self.tensor.axis(variable)
        if axis is None or variable in self.tensor.reduced:
            return None
        moving = [t for t in self.tensor.touches if self.tensor.in_step(t, axis)]
        others = [t for t in self.tensor.touches if not self.tensor.in_step(t, axis)]
        loops = {self._stage(t, depth) for t in moving}
        apart = all(t.walks[axis].step is Step.FIXED and self._stage(t, depth) not in loops for t in others)
        if len(loops) != 1 or not apart:
            return None
        way = self.nest.way(moving[0].line, depth)
        # An element is touched so many iterations after the one with its coordinate, at that place in the body.
        touched = sorted((-t.walks[axis].shift * way, self._inside(t, depth)) for t in moving)
        (first, begin), (last, end) = touched[0], touched[-1]
        # A loop inside that touches it again in each iteration keeps the first and the last side by side.
        ends = [t for t in moving if self._inside(t, depth) in (begin, end)]
        common = next((n for n, (x, y) in enumerate(zip(begin, end, strict=True)) if x != y), len(begin))
        again = any(self._cause(depth + 1 + n, ends) for n in range(common))
        window = last - first + int(end > begin or again)
        fixed = {t.walks[axis].index for t in others if not t.writes}
        if self.tensor.begun:
            # The last generation is the one that the loop leaves behind.
            fixed.discard("0" if way < 0 else rank_of(variable))
            window = max(window, 1)
        return window + len(fixed)

    def _kept(self, depth: int, cause: Cause, rows: Sequence[str], count: int | None) -> Kept:
        """All ranks from a loop on; along what the loop itself walks `count` coordinates, if that is a number."""
        axis = self.tensor.axis(self.nest.order[depth]) if count is not None else None
        elements = number(1 if count is None else count)
        for n in range(len(self.tensor.shape)):
            if n == axis:
                outer = self.nest.order[: depth + 1]
                elements = elements * volume(tuple(v for v in self.tensor.walks[n].variables if v not in outer))
            else:
                elements = elements * self._along(n, depth, cause)
        return Kept(
            tensor=self.tensor.name,
            is_input=self.tensor.is_input,
            since=rank_of(self.nest.order[depth]),
            cause=cause,
            elements=elements,
            rows=tuple(rows),
        )

    def _along(self, axis: int, depth: int, cause: Cause) -> Count:
        """Elements along an axis that are kept from a loop on."""
        walk, outer = self.tensor.walks[axis], self.nest.order[:depth]
        if walk.step is Step.SLOW and cause == "shared":
            outer = self.nest.order[: depth + 1]
        if walk.step in (Step.EXACT, Step.SLOW) and set(walk.variables) & set(outer):
            return volume(tuple(v for v in walk.variables if v not in outer))
        if not self.tensor.is_input and walk.step is Step.EXACT:
            # Along an iterative rank there is the generation that `init` writes as well.
            more = any(walks[axis].step is Step.FIXED for walks in self.tensor.begun)
            return volume(walk.variables) + number(max(walk.shift, int(more)))
        whole = self.tensor.shape[axis]
        return volume((whole,)) if whole else number(1)
