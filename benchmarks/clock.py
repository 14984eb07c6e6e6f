"""Time calls in interleaved rounds: whatever slows the device for a while slows all of them alike."""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], object]
# More than the L2 cache of any GPU here.
FLUSH_BYTES = 256 << 20
LEAST_ROUNDS, MOST_ROUNDS = 7, 100


class Clock(Protocol):
    """What times one call."""

    def run(self, call: Call) -> Any:
        """Run a call once and return a mark of it, without waiting for it."""

    def read(self, mark: Any) -> float:
        """The milliseconds of a marked call; waits for it."""

    def wait(self) -> None:
        """Wait until everything is done; raises what went wrong meanwhile."""

    def hidden_us(self) -> float:
        """Microseconds that the host may take for a call before they are part of what is timed."""


class CudaClock:
    """Events of the GPU around a call; the L2 cache holds nothing of it before, as in `triton.testing.do_bench`.

    While the GPU writes the cache the host launches the call: a launch alone is not what is timed, unless the host
    takes longer than that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def run(self, call: Call) -> Any:
        event: Any = torch.cuda.Event
        start, end = (event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        call()
        end.record()
        return start, end

    def read(self, mark: Any) -> float:
        start, end = mark
        end.synchronize()
        return float(start.elapsed_time(end))

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def hidden_us(self) -> float:
        event: Any = torch.cuda.Event
        spans = []
        for _ in range(LEAST_ROUNDS):
            start, end = (event(enable_timing=True) for _ in range(2))
            start.record()
            self.cache.zero_()
            end.record()
            spans.append(1e3 * self.read((start, end)))
        return statistics.median(spans)


class HostClock:
    """The clock of the host, where a call returns when its work is done."""

    def run(self, call: Call) -> Any:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def read(self, mark: Any) -> float:
        return float(mark)

    def wait(self) -> None:
        return None

    def hidden_us(self) -> float:
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Times:
    """The times of a call: median, and the quantiles at 0.2 and 0.8, in milliseconds."""

    ms: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(found: Sequence[float]) -> Times:
        """Summarise the times of all rounds."""
        ordered = sorted(found)

        def quantile(share: float) -> float:
            return ordered[round(share * (len(ordered) - 1))]

        return Times(ms=statistics.median(ordered), low=quantile(0.2), high=quantile(0.8), rounds=len(ordered))


class Rounds:
    """Calls that are timed round by round, each round in another order. One that fails takes part no more.

    Args:
        failed: told the place of a call, and its error; what it raises ends the rounds.
        before: told the place of a call that begins. awaited: each call is done before the next begins, so that an
            error that the device tells late is known to be of this call.
    """

    def __init__(
        self,
        clock: Clock,
        calls: Sequence[Call],
        *,
        failed: Callable[[int, Exception], None] | None = None,
        before: Callable[[int], None] = lambda place: None,
        awaited: bool = False,
    ) -> None:
        self.clock, self.calls = clock, calls
        self.failed, self.before, self.awaited = failed, before, awaited
        self.found: list[list[float]] = [[] for _ in calls]
        self.alive = list(range(len(calls)))

    def run(self, seconds: float) -> None:
        """Spend some seconds on rounds; there are at least `LEAST_ROUNDS` and at most `MOST_ROUNDS` of them."""
        # The first run of all warms up; the second says how long one takes.
        spent = 0.0
        for _ in range(2):
            began = time.perf_counter()
            self._round(self.alive)
            spent = time.perf_counter() - began
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(spent, 1e-9))))
        for n in range(rounds):
            if not self.alive:
                return
            turn = n % len(self.alive)
            for k, ms in self._round(self.alive[turn:] + self.alive[:turn]):
                self.found[k].append(ms)

    def times(self) -> list[Times | None]:
        """The times of each call; None of one that failed, or had too few rounds."""
        return [
            Times.of(found) if k in self.alive and len(found) >= LEAST_ROUNDS else None
            for k, found in enumerate(self.found)
        ]

    def _round(self, order: Sequence[int]) -> list[tuple[int, float]]:
        marks: list[tuple[int, Any]] = []
        found: list[tuple[int, float]] = []
        for k in order:
            with self._guarded(k):
                self.before(k)
                mark = self.clock.run(self.calls[k])
                if self.awaited:
                    found.append((k, self.clock.read(mark)))
                else:
                    marks.append((k, mark))
        for k, mark in marks:
            with self._guarded(k):
                found.append((k, self.clock.read(mark)))
        return found

    @contextmanager
    def _guarded(self, k: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.failed is None:
                raise
            self.alive = [n for n in self.alive if n != k]
            self.failed(k, error)


def interleaved(clock: Clock, calls: Sequence[Call], *, seconds: float) -> list[Times]:
    """Time calls round by round; see `Rounds`. What a call raises ends it."""
    if not calls:
        return []
    rounds = Rounds(clock, calls)
    rounds.run(seconds)
    return [t for t in rounds.times() if t is not None]


def host_us(call: Call, wait: Callable[[], object], *, times: int = 20) -> float:
    """What a call costs the host before it returns, in microseconds: the median of some."""
    spans = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        call()
        spans.append(1e6 * (time.perf_counter() - start))
    wait()
    return statistics.median(spans)


def device_state(device: torch.device) -> dict[str, str]:
    """Clocks, temperature and power of a GPU as its driver tells them; empty where there is none to ask."""
    asked = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "temperature.gpu",
        "power.draw",
        "clocks_event_reasons.active",
    )
    # PyTorch counts the GPUs that it may see, nvidia-smi all of them.
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if identity is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", f"--id=GPU-{identity}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [v.strip() for v in done.stdout.strip().partition("\n")[0].split(",")]
    return dict(zip(asked, values, strict=False))
