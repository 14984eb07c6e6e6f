"""The tuner: compile, compare, then time; in rounds that drop the slower half.

What a device is, how a candidate is compiled, judged and timed, and that none of this can take the tuner down, is the
matter of a `Device`; verify/measuring.py has the real one. Nothing is timed that was not found right first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from einsumcascade.schedules.ranking import Ranked
from einsumcascade.schedules.schedule import Schedule

# Calls in the first round; each round makes twice as many.
FIRST_CALLS = 5
# The share of the budget after which nothing more is compiled, and that after which nothing more is compared.
COMPILING, COMPARED = 0.5, 0.75
# Of so many measurements a rank correlation says something.
ENOUGH = 10
# What may end a search before its time.
INTERRUPTION, BUDGET = "an interruption", "the budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What compiling told, the worst of all kernels: registers of a thread, spilled bytes, shared bytes, seconds."""

    registers: int
    spill_bytes: int
    shared_memory_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a candidate is out, in one line; whether time ran out, which says nothing of it."""

    why: str
    is_late: bool = False


class Device(Protocol):
    """What compiles, judges and times schedules. A candidate that fails at any of it costs itself only.

    Work ends by the monotonic time of the deadline; what is not done then has failed, and is late.
    """

    @property
    def name(self) -> str:
        """The device as it calls itself; empty where nothing can be run."""

    def compile(self, schedules: Sequence[Schedule], *, deadline: float) -> Iterator[tuple[int, Compiled | Failure]]:
        """Compile schedules in parallel; yield each by its place as it ends."""

    def compare(self, schedule: Schedule, *, deadline: float) -> Failure | None:
        """Run a schedule and judge its results against the reference by the error rule; None if they are right."""

    def time(self, schedule: Schedule, calls: int, *, deadline: float) -> float | Failure:
        """The median seconds of at most so many calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of one candidate.

    Args:
        schedule: the candidate. predicted_s: what the model expected.
        compiled: what compiling told, if it ended well. why: why it is out, empty if it is not.
        is_right: compared with the reference and within the bound.
        seconds: of a call, the median of the last round it took part in. rounds: how many these were.
    """

    schedule: Schedule
    predicted_s: float
    compiled: Compiled | None = None
    why: str = ""
    is_right: bool = False
    seconds: float | None = None
    rounds: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        compiled = (
            {}
            if self.compiled is None
            else {
                "registers": self.compiled.registers,
                "spill_bytes": self.compiled.spill_bytes,
                "shared_memory_bytes": self.compiled.shared_memory_bytes,
                "compile_s": self.compiled.seconds,
            }
        )
        return {
            "schedule": self.schedule.to_dict(),
            "predicted_s": self.predicted_s if math.isfinite(self.predicted_s) else None,
            "measured_s": self.seconds,
            # Of one that was not compared nothing is known.
            "is_right": self.is_right if self.is_right or self.why else None,
            **compiled,
            **({"why": self.why} if self.why else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """The candidates and what became of them, in the order of the model.

    Args:
        device: what they were timed on; empty if nothing was timed.
        target: what they were compiled for. dtype, extents: of the inputs.
        trials: the default schedule is the first.
        cut_by: what ended it early, an interruption or the budget; empty if nothing did.
        seconds: how long it took.
    """

    device: str
    target: str
    dtype: str
    extents: Mapping[str, int] = field(hash=False)
    trials: tuple[Trial, ...]
    cut_by: str = ""
    seconds: float = 0.0
    name: str = ""

    @property
    def was_cut(self) -> bool:
        """Whether something ended it early."""
        return bool(self.cut_by)

    @property
    def timed(self) -> tuple[Trial, ...]:
        """Those that were timed, the fastest of the last round first."""
        found = [t for t in self.trials if t.seconds is not None]
        return tuple(sorted(found, key=lambda t: (-t.rounds, t.seconds)))

    @property
    def best(self) -> Trial | None:
        """The fastest that was timed."""
        return next(iter(self.timed), None)

    @property
    def default(self) -> Trial:
        """The schedule that a call has without tuning."""
        return self.trials[0]

    @property
    def expected(self) -> Trial:
        """The one that the model expects to be fastest, of those that compiled."""
        return min((t for t in self.trials if t.compiled), key=lambda t: t.predicted_s, default=self.default)

    @property
    def schedule(self) -> Schedule:
        """The fastest schedule; where none was timed, the one that is expected to be."""
        return (self.best or self.expected).schedule

    @property
    def is_fruitless(self) -> bool:
        """Whether there was a device and no candidate was timed on it."""
        return bool(self.device) and self.best is None

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation of prediction and measurement; None of fewer than 10 measurements."""
        pairs = [(t.predicted_s, t.seconds) for t in self.trials if t.seconds is not None]
        return spearman(pairs) if len(pairs) >= ENOUGH else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        best = self.best
        return {
            "name": self.name,
            "device": self.device,
            "target": self.target,
            "dtype": self.dtype,
            "extents": dict(self.extents),
            "best": None if best is None else best.to_dict(),
            "correlation": self.correlation,
            "was_cut": self.was_cut,
            "seconds": self.seconds,
            "trials": [t.to_dict() for t in self.trials],
        }

    def __str__(self) -> str:
        extents = " ".join(f"{r}={n}" for r, n in self.extents.items())
        where = self.device or f"{self.target}, not timed"
        lines = [f"{self.name} in {self.dtype} at {extents}: {where}", ""]
        lines.append(f"{'measured':>11} {'predicted':>11} {'registers':>9} {'spilled':>7} {'shared':>7}  schedule")
        rest = sorted((t for t in self.trials if t.seconds is None), key=lambda t: (bool(t.why), t.predicted_s))
        lines += [_row(t) for t in (*self.timed, *rest)]
        lines.append("")
        best = self.best
        if not self.device:
            lines.append("nothing was timed: there is no GPU here; the order is the model's")
        elif best is None:
            lines.append("nothing was timed: no candidate was compiled and found right")
        elif best.schedule == self.default.schedule:
            lines.append("the default schedule is the fastest")
        elif self.default.seconds is not None and best.seconds is not None:
            lines.append(f"{self.default.seconds / best.seconds:.2f} times as fast as the default schedule")
        if self.correlation is not None:
            count = len(self.timed)
            lines.append(
                f"rank correlation of prediction and measurement {self.correlation:.2f}, of {count} candidates"
            )
        if self.was_cut:
            lines.append(f"ended early by {self.cut_by}: what is here is what is known")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientTuning:
    """The tunings of the two programs of a call that records a gradient.

    Args:
        forward: of the forward that saves. backward: of the gradient; None where an interruption came first.
        schedule: the best of both, as one schedule of the op.
    """

    forward: Tuning
    backward: Tuning | None
    schedule: Schedule

    @property
    def tunings(self) -> tuple[Tuning, ...]:
        """Those there are, in the order of the work."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def device(self) -> str:
        """What candidates were timed on; empty if nothing was timed."""
        return self.forward.device

    @property
    def was_cut(self) -> bool:
        """Whether something ended it early."""
        return self.backward is None or any(t.was_cut for t in self.tunings)

    @property
    def is_fruitless(self) -> bool:
        """Whether there was a device, and of a program no candidate was timed on it."""
        return any(t.is_fruitless for t in self.tunings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "forward": self.forward.to_dict(),
            "backward": None if self.backward is None else self.backward.to_dict(),
            "schedule": self.schedule.to_dict(),
        }

    def __str__(self) -> str:
        missing = [] if self.backward is not None else ["the backward was not tuned: an interruption came first"]
        return "\n\n".join([*map(str, self.tunings), *missing])


def _row(t: Trial) -> str:
    measured = f"{t.seconds * 1e6:.1f} us" if t.seconds is not None else "-"
    c = t.compiled
    figures = (str(c.registers), str(c.spill_bytes), str(c.shared_memory_bytes)) if c else ("-", "-", "-")
    row = f"{measured:>11} {t.predicted_s * 1e6:>8.1f} us {figures[0]:>9} {figures[1]:>7} {figures[2]:>7}  "
    # A kernel a line, each below the first.
    schedule = str(t.schedule).replace("\n", "\n" + " " * len(row))
    return row + schedule + (f"  ({t.why})" if t.why else "")


def tune(
    candidates: Sequence[Ranked],
    device: Device,
    *,
    budget_s: float,
    progress: Callable[[str, int, int, Trial | None], None] = lambda *_: None,
) -> tuple[tuple[Trial, ...], str]:
    """Find the fastest of some candidates on a device.

    Args:
        candidates: the default schedule first, then in the order of a model.
        device: compiles, judges, times.
        budget_s: seconds for all of it. At most half goes to compiling, and after three quarters nothing more is
            compared. The first that is compiled is compared and timed however late it is.
        progress: called with the stage, steps done and planned, and the best so far.

    Returns: what became of each candidate, and what cut it short: an interruption, the budget, or nothing, an empty
        text. KeyboardInterrupt is such an interruption, no error.
    Cost: that of the device.
    """
    begun = time.monotonic()
    trials = [Trial(schedule=c.schedule, predicted_s=c.seconds) for c in candidates]
    cut_by, rounds = "", 0

    def by(share: float) -> float:
        return begun + share * budget_s

    def all_timed(living: Sequence[int]) -> bool:
        """Time some once more; whether there was time for all of them, as there is for the first in any case."""
        for done, n in enumerate(living):
            deadline = by(1.0) if rounds or done else math.inf
            took = device.time(trials[n].schedule, FIRST_CALLS << rounds, deadline=deadline)
            if _is_late(took):
                return False
            trials[n] = _timed(trials[n], took, rounds + 1)
            progress(f"timing, round {rounds + 1}", done + 1, len(living), _fastest(trials))
        return True

    try:
        # Where nothing is run all of the time is for compiling.
        compiling = device.compile([t.schedule for t in trials], deadline=by(COMPILING if device.name else 1.0))
        for done, (n, found) in enumerate(compiling):
            trials[n] = _told(trials[n], found)
            cut_by = BUDGET if _is_late(found) else cut_by
            progress("compiling", done + 1, len(trials), None)
        living = [n for n, t in enumerate(trials) if t.compiled is not None and device.name]
        for done, n in enumerate(living):
            wrong = device.compare(trials[n].schedule, deadline=by(COMPARED) if done else math.inf)
            if _is_late(wrong):
                cut_by = BUDGET
                break
            trials[n] = replace(trials[n], why=wrong.why) if wrong else replace(trials[n], is_right=True)
            progress("comparing", done + 1, len(living), None)
        living = [n for n in living if trials[n].is_right]
        while living:
            if not all_timed(living):
                cut_by = BUDGET
                break
            rounds += 1
            kept = sorted((n for n in living if trials[n].rounds == rounds), key=lambda n: trials[n].seconds or 0.0)
            living = kept[: -(-len(kept) // 2)] if len(kept) > 1 else []
            living = living if len(living) > 1 else []
    except KeyboardInterrupt:
        cut_by = INTERRUPTION
    # Of a round that was not ended no candidate has the advantage.
    return tuple(replace(t, rounds=min(t.rounds, rounds)) for t in trials), cut_by


def _is_late(found: object) -> bool:
    return isinstance(found, Failure) and found.is_late


def _fastest(trials: Sequence[Trial]) -> Trial | None:
    timed = [t for t in trials if t.seconds is not None]
    return min(timed, key=lambda t: t.seconds or 0.0, default=None)


def _told(trial: Trial, found: Compiled | Failure) -> Trial:
    return replace(trial, why=found.why) if isinstance(found, Failure) else replace(trial, compiled=found)


def _timed(trial: Trial, found: float | Failure, rounds: int) -> Trial:
    if isinstance(found, Failure):
        # What fails when it is run again is not to be trusted, whatever it took before.
        return replace(trial, why=found.why, is_right=False, seconds=None, rounds=0)
    return replace(trial, seconds=found, rounds=rounds)


def spearman(pairs: Sequence[tuple[float, float | None]]) -> float | None:
    """Spearman's rank correlation; equal values share their mean rank. None where one side is constant.

    >>> spearman([(1.0, 10.0), (2.0, 20.0), (3.0, 15.0)])
    0.5
    """
    xs, ys = (_ranks([p[n] or 0.0 for p in pairs]) for n in (0, 1))
    mean = (len(pairs) - 1) / 2
    over = sum((x - mean) * (y - mean) for x, y in zip(xs, ys, strict=True))
    under = math.sqrt(sum((x - mean) ** 2 for x in xs) * sum((y - mean) ** 2 for y in ys))
    return over / under if under else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
