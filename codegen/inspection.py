"""What a compiler made of the kernels of a program, beside what their Einsums ask for and the time to expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from einsumcascade.codegen.inspect import KernelReport, LoopReport
from einsumcascade.schedules.demands import TENSOR, Demand, Work
from einsumcascade.schedules.model import KernelPrediction
from einsumcascade.schedules.timing import Compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The hot loop of a kernel for each element of the tile that a step computes: a score, in attention.

    Args:
        points: elements of the tile.
        pipes: instructions of a thread for each of its elements, by pipe.
        needed: operations that the Einsums ask for, products left out.
    """

    points: int
    pipes: Mapping[str, float]
    needed: float

    @property
    def instructions(self) -> float:
        """All of them but products."""
        return sum(n for pipe, n in self.pipes.items() if pipe != TENSOR)

    def to_dict(self) -> dict[str, object]:
        """A JSON value."""
        return {
            "points": self.points,
            "pipes": dict(self.pipes),
            "instructions": self.instructions,
            "needed": self.needed,
        }

    def __str__(self) -> str:
        pipes = ", ".join(f"{pipe} {n:.2f}" for pipe, n in self.pipes.items() if pipe != TENSOR)
        return (
            f"for each of {self.points:,} elements of a tile: {self.instructions:.2f} instructions, where its Einsums "
            f"ask for {self.needed:.2f}\n    {pipes}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a compiler made of each kernel of a program.

    Args:
        kernels: a report by kernel function, in order.
        target: what it was compiled for. dtype: of the inputs.
        steps: by kernel function, its hot loop for each element; where there is one and its Einsums can be counted.
        predictions: by kernel function, the time to expect; empty where lengths are not given.
        unknown: lengths that are not given.
    """

    kernels: Mapping[str, KernelReport]
    target: str
    dtype: str
    steps: Mapping[str, StepReport] = field(default_factory=dict)
    predictions: Mapping[str, KernelPrediction] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """A JSON value."""
        return {
            "target": self.target,
            "dtype": self.dtype,
            "kernels": {n: r.to_dict() for n, r in self.kernels.items()},
            "steps": {n: s.to_dict() for n, s in self.steps.items()},
            "predictions": {n: p.to_dict() for n, p in self.predictions.items()},
        }

    def __str__(self) -> str:
        return "\n\n".join(self._of(name) for name in self.kernels)

    def _of(self, name: str) -> str:
        lines = [f"{name} ({self.target}, {self.dtype})", str(self.kernels[name])]
        if name in self.steps:
            lines.append(f"  {self.steps[name]}")
        if name in self.predictions:
            found = self.predictions[name]
            lines.append("  predicted " + str(found).removeprefix(f"{found.name}: "))
            lines.append("    clocks " + ", ".join(f"{p} {n:,.0f}" for p, n in found.cycles.items()))
        elif self.unknown:
            lines.append(f"  no time is predicted without the lengths {', '.join(self.unknown)}")
        return "\n".join(lines)


def step_report(report: KernelReport, work: Work) -> StepReport | None:
    """Hold the hot loop of a kernel against what a step asks for; None where a kernel has no loop, or several."""
    loop = _full(report)
    if loop is None or len(work.loops) != 1:
        return None
    step: Demand = work.loops[0]
    threads = report.num_warps * report.target.warp_size
    return StepReport(
        points=step.points,
        pipes={p: n * threads / step.points for p, n in loop.pipes.items()},
        needed=step.operations / step.points,
    )


def compiled(report: KernelReport) -> Compiled:
    """A report as the model takes it."""
    full = _full(report)
    tested = max(report.loops, key=lambda x: x.instructions, default=None)
    return Compiled(
        registers=report.registers,
        shared_memory_bytes=report.shared_memory_bytes,
        full=full.asked(report.target) if full is not None else None,
        tested=tested.asked(report.target) if tested is not None else None,
    )


def _full(report: KernelReport) -> LoopReport | None:
    """The loop over tiles whose points are all live."""
    return report.hot_loop
