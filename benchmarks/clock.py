"""Time calls in interleaved rounds: whatever slows the device for a while slows all of them alike."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
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


class CudaClock:
    """Events of the GPU around a call; the L2 cache holds nothing of it before, as in `triton.testing.do_bench`.

    Writing the cache takes longer than a host takes to launch a kernel, so a launch alone is not what is timed.
    """

    def __init__(self, device: torch.device) -> None:
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


class HostClock:
    """The clock of the host, where a call returns when its work is done."""

    def run(self, call: Call) -> Any:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def read(self, mark: Any) -> float:
        return float(mark)


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


def interleaved(clock: Clock, calls: Sequence[Call], *, seconds: float) -> list[Times]:
    """Time calls round by round, each round in another order.

    Args:
        seconds: to spend on the rounds; there are at least `LEAST_ROUNDS` and at most `MOST_ROUNDS` of them.
    """
    if not calls:
        return []
    # The first run of all warms up; the second says how long one takes.
    for _ in range(2):
        began = time.perf_counter()
        for mark in [clock.run(c) for c in calls]:
            clock.read(mark)
        spent = time.perf_counter() - began
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(spent, 1e-9))))
    found: list[list[float]] = [[] for _ in calls]
    for n in range(rounds):
        order = [(n + k) % len(calls) for k in range(len(calls))]
        for k, mark in [(k, clock.run(calls[k])) for k in order]:
            found[k].append(clock.read(mark))
    return [Times.of(f) for f in found]


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


def device_state() -> dict[str, str]:
    """Clocks, temperature and power of the GPU as its driver tells them; empty where there is none to ask."""
    asked = (
        "driver_version",
        "clocks.sm",
        "clocks.mem",
        "temperature.gpu",
        "power.draw",
        "clocks_event_reasons.active",
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [v.strip() for v in done.stdout.strip().splitlines()[0].split(",")]
    return dict(zip(asked, values, strict=False))
