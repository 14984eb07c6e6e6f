"""Where cases are measured: in this process, or in one of its own, so that nothing a kernel does can end the run.

A process serves many cases. One that hangs in native code, dies, or has a device error that stays is ended; the next
measures the case again without the candidate that was under way, which failed. What was told before is kept.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from os import cpu_count
from typing import Any, Protocol, cast

import torch

from einsumcascade.benchmarks.cases import Case, named
from einsumcascade.benchmarks.clock import Clock, CudaClock, HostClock, device_state, interleaved
from einsumcascade.benchmarks.files import FAILED
from einsumcascade.benchmarks.measure import (
    ROUNDS,
    Candidate,
    Lost,
    Row,
    Settings,
    TimeUp,
    Told,
    check,
    first_line,
    measure,
)
from einsumcascade.benchmarks.rivals import RIVALS, Rival, raise_limits
from einsumcascade.codegen.workers import Worker, WorkError, tell

# Seconds beyond those that something may take before its process is ended: until then it ends itself.
GRACE = 15.0
# Seconds for which beginning a case again is worth while.
AGAIN = 5.0
# A process creates its context and measures what the device can do.
FACTS_S = 120.0

SayRow = Callable[[Row], None]


class Skipped(Exception):
    """Why a case was not measured to its end."""


class Bench(Protocol):
    """What measures cases."""

    def facts(self) -> dict[str, Any]:
        """Say what the device is, and what it does at best."""

    def measure(
        self, case: Case, rivals: Sequence[Rival], settings: Settings, *, left: Callable[[], float], row: SayRow
    ) -> dict[str, str]:
        """Measure a case; `row` is told what is known of a candidate whenever that grows.

        Returns: the state of the device after it. Raises: Skipped.
        """

    def close(self) -> None:
        """End what was begun."""


class Here:
    """In this process."""

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.device = device
        self.clock = clock or (CudaClock(device) if device.type == "cuda" else HostClock())

    def facts(self) -> dict[str, Any]:
        """Say what the device is, and what it does at best."""
        device, cudnn = self.device, cast(Any, torch.backends.cudnn)
        if device.type != "cuda":
            return {"device": f"CPU, {platform.machine()}, {cpu_count()} cores", "state": {}}
        return {
            "device": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
            "cudnn": cudnn.version(),
            "state": device_state(device),
            "ceilings": ceilings(device, self.clock),
        }

    def measure(
        self,
        case: Case,
        rivals: Sequence[Rival],
        settings: Settings,
        *,
        left: Callable[[], float],
        row: SayRow,
        began: Callable[[str, float], None] = lambda name, seconds: None,
        also: Sequence[Candidate] = (),
        without: Sequence[str] = (),
        awaited: bool = False,
    ) -> dict[str, str]:
        """Measure a case. Raises: Skipped; Lost."""
        told = Told(began=began, row=row)
        try:
            measure(
                case,
                self.device,
                self.clock,
                rivals,
                settings,
                left=left,
                told=told,
                also=also,
                without=without,
                awaited=awaited,
            )
        except TimeUp:
            raise Skipped("the time was up before it was known what is right") from None
        except Exception as error:
            # Memory that runs out in one case is no reason to lose the others.
            check(self.clock)
            raise Skipped(first_line(error)) from error
        if self.device.type != "cuda":
            return {}
        torch.cuda.empty_cache()
        return device_state(self.device)

    def close(self) -> None:
        """Nothing was begun."""


class Apart:
    """In a process of its own.

    Args:
        device: "cuda" or "cpu".
        also: further candidates, `module:function` of functions from a case to a candidate.
    """

    def __init__(self, device: str, also: Sequence[str] = ()) -> None:
        self.device, self.also = device, tuple(also)
        self.worker = Worker((__name__,), told=self._told)
        self.current, self.row = "", cast(SayRow, lambda row: None)
        self.failed: set[str] = set()

    def facts(self) -> dict[str, Any]:
        """Say what the device is, and what it does at best. Raises: WorkError: there is no process that can."""
        return cast(dict[str, Any], self.worker.ask(f"{__name__}:_facts", self.device, timeout_s=FACTS_S))

    def measure(
        self, case: Case, rivals: Sequence[Rival], settings: Settings, *, left: Callable[[], float], row: SayRow
    ) -> dict[str, str]:
        """Measure a case, again and again while a candidate takes the process down. Raises: Skipped."""
        self.row = row
        without: list[str] = []
        awaited = False
        keys = [r.key for r in rivals]
        while True:
            self.current, self.failed = "", set()
            options = {"without": tuple(without), "awaited": awaited, "also": self.also}
            asked = (self.device, str(case), keys, settings, left(), options)
            try:
                ended, found = self.worker.ask(f"{__name__}:_measured", *asked, timeout_s=max(left(), 0.0) + GRACE)
            except WorkError as error:
                ended, found = "died", str(error)
            except BaseException:
                self.close()
                raise
            if ended == "done":
                return cast(dict[str, str], found)
            if ended == "skipped":
                raise Skipped(found)
            self.close()
            if self.current == ROUNDS:
                if awaited:
                    raise Skipped(f"while all were timed in turns: {found}")
                awaited = True
            elif not self.current:
                raise Skipped(found)
            else:
                if self.current not in self.failed:
                    row(Row(name=self.current, state=FAILED, note=found))
                without.append(self.current)
            if left() < AGAIN:
                raise Skipped("the time was up before it could be measured again")

    def close(self) -> None:
        """End the process."""
        self.worker.close()

    def _told(self, value: tuple[str, Any, float]) -> None:
        kind, what, seconds = value
        if kind == "began":
            self.current = what
            self.worker.timeout_s = seconds
            self.worker.deadline = time.monotonic() + max(seconds, 0.0) + GRACE
            return
        if what.state == FAILED:
            self.failed.add(what.name)
        self.row(what)


# --- in the process of a worker ---------------------------------------------------------------------------------------


@cache
def _here(device: str) -> Here:
    raise_limits()
    return Here(torch.device(device))


def _facts(device: str) -> dict[str, Any]:
    return _here(device).facts()


def _measured(
    device: str, case: str, rivals: Sequence[str], settings: Settings, seconds: float, options: dict[str, Any]
) -> tuple[str, Any]:
    end = time.monotonic() + seconds
    one = named(case)
    also = [_found(name)(one) for name in options.pop("also")]
    try:
        state = _here(device).measure(
            one,
            [RIVALS[key] for key in rivals],
            settings,
            left=lambda: end - time.monotonic(),
            row=lambda row: tell(("row", row, 0.0)),
            began=lambda name, limit: tell(("began", name, limit)),
            also=also,
            **options,
        )
    except Skipped as why:
        return "skipped", str(why)
    except Lost as error:
        return "lost", str(error)
    return "done", state


def _found(name: str) -> Callable[[Case], Candidate]:
    module, _, function = name.partition(":")
    return cast(Callable[[Case], Candidate], getattr(import_module(module), function))


def ceilings(device: torch.device, clock: Clock) -> dict[str, float]:
    """Measure what this device can do at best: a large product, and a copy."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    big = torch.empty(1 << 30, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    product, copy = interleaved(clock, [lambda: a @ a, lambda: other.copy_(big)], seconds=0.5)
    return {"matmul_bf16_tflops": 2 * 8192**3 / product.ms * 1e-9, "copy_gb_s": 2 * big.numel() / copy.ms * 1e-6}
