"""Measure a case: compare every candidate with float64, then time those that passed, round by round."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from einsumcascade.benchmarks.cases import Case
from einsumcascade.benchmarks.clock import Call, Clock, Times, host_us, interleaved
from einsumcascade.benchmarks.rivals import Function, NotHere, Rival
from einsumcascade.benchmarks.truth import OUT, Truth, Verdict, truth_of
from einsumcascade.benchmarks.variants import Tensors, draw
from einsumcascade.codegen.op import compile as compile_cascade

OURS = "ours"


class TimeUp(BaseException):
    """A candidate took longer than it may. No Exception, so that compilers that recover from those do not keep it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How cases are measured.

    Args:
        seconds: of timed rounds a candidate. patience: seconds that a candidate may take to be built and compared.
        draws: roundings of the inputs that make a bound.
    """

    seconds: float = 0.25
    patience: float = 75.0
    draws: int = 4


@dataclass(kw_only=True)
class Row:
    """One candidate on one case: its verdicts, and its times if it passed.

    Args:
        state: "passed"; "wrong": an error is outside its bound, so nothing was timed; "failed": it did not run;
            "left out": it cannot compute this case.
        share: the largest error as a share of its bound.
        note: why there are no times.
    """

    name: str
    state: str = "failed"
    share: float | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    times: Times | None = None
    rate: float | None = None
    host_us: float | None = None
    schedule: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is measured: a name, what makes its function, and the order in which it wants axes."""

    name: str
    make: Callable[[], Function]
    layout: Callable[[str], str] = str
    schedule: Callable[[], str] = str


def ours(case: Case) -> Candidate:
    """Our op on a case."""
    made: list[Any] = []

    def make() -> Function:
        cascade = case.variant.cascade()
        op = compile_cascade(cascade)
        made.append(op)
        function: Any = op
        return function  # type: ignore[no-any-return]

    def schedule() -> str:
        # With gradients there is a pair of programs, and one without.
        ran = [made[0].schedule, *(p.backward.last().schedule for p in made[0]._pairs.values() if p.backward.last)]
        return " | ".join(str(s).replace("\n", " | ").replace("; loads by pointers", "") for s in ran)

    return Candidate(name=OURS, make=make, schedule=schedule)


def candidates(case: Case, x: Tensors, rivals: Sequence[Rival]) -> list[Candidate]:
    """Ours, then the rivals."""
    others = [Candidate(name=r.title, make=partial(r.make, case, x), layout=r.layout) for r in rivals]
    return [ours(case), *others]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the main thread once so many seconds are over; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeUp(f"took more than {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Attempt:
    """A candidate with its own tensors: it runs, hands its results over in our layout, and gives what is timed."""

    def __init__(self, case: Case, candidate: Candidate, x: Tensors, received: Tensor | None) -> None:
        self.case, self.candidate, self.variant = case, candidate, case.variant
        self.function = candidate.make()
        self.inputs = {n: self._theirs(t, self.variant.inputs[n]).detach() for n, t in x.items()}
        self.wrt = self.variant.wrt if received is not None else ()
        for n in self.wrt:
            self.inputs[n] = self.inputs[n].clone().requires_grad_()
        self.received = None if received is None else self._theirs(received, self.variant.out)

    def _theirs(self, t: Tensor, axes: str) -> Tensor:
        return t.permute([axes.index(a) for a in self.candidate.layout(axes)]).contiguous()

    def _ours(self, t: Tensor, axes: str) -> Tensor:
        return t.permute([self.candidate.layout(axes).index(a) for a in axes])

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(bool(self.wrt)):
            return self.function(*self.inputs.values())

    def _back(self, out: Tensor, *, keep: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [self.inputs[n] for n in self.wrt], self.received, retain_graph=keep)

    def results(self) -> dict[str, Tensor]:
        """Run once; outputs and gradients in our layout."""
        # The blocks that results will get from the allocator are filled with NaN, so an element nobody writes is seen.
        for axes in (self.variant.out, *(self.variant.inputs[n] for n in self.wrt)):
            size = [self.case.shape.extent(a) for a in axes]
            torch.full(size, float("nan"), dtype=self.inputs["Q"].dtype, device=self.inputs["Q"].device)
        out = self.forward()
        found = {OUT: self._ours(out.detach(), self.variant.out)}
        if self.wrt:
            for n, g in zip(self.wrt, self._back(out, keep=False), strict=True):
                found[n] = self._ours(g, self.variant.inputs[n])
        return found

    def call(self) -> Call:
        """What is timed."""
        if self.case.direction == "forward":
            return self.forward
        if self.case.direction == "step":
            return lambda: self._back(self.forward(), keep=False)
        out = self.forward()
        return lambda: self._back(out, keep=True)


def measure(
    case: Case,
    device: torch.device,
    clock: Clock,
    rivals: Sequence[Rival],
    settings: Settings,
    *,
    left: Callable[[], float],
    say: Callable[[Row], None] = lambda row: None,
    also: Sequence[Candidate] = (),
) -> list[Row]:
    """Compare the candidates of a case with float64, then time those that passed.

    Args:
        left: the seconds that are left of the whole budget.
        say: told each row when it is known whether it passed, and again when it was timed.
        also: further candidates, made from the inputs elsewhere.

    Returns: a row a candidate, ours first.
    """
    with limited(left()):
        x = draw(case.variant, case.shape, getattr(torch, case.dtype), device)
        received = None
        if case.direction != "forward":
            size = [case.shape.extent(a) for a in case.variant.out]
            generator = torch.Generator(device).manual_seed(2)
            received = torch.randn(size, generator=generator, device=device).to(x["Q"].dtype)
        truth = truth_of(case.variant, case.shape, x, received, draws=settings.draws)
    rows: list[Row] = []
    passed: list[tuple[Row, Attempt]] = []
    for candidate in [*candidates(case, x, rivals), *also]:
        row, attempt = _compared(case, candidate, x, received, truth, min(settings.patience, left()))
        rows.append(row)
        if attempt is not None:
            passed.append((row, attempt))
        else:
            say(row)
    del truth
    _time(case, passed, clock, settings, device, left, say)
    return rows


def _compared(
    case: Case, candidate: Candidate, x: Tensors, received: Tensor | None, truth: Truth, seconds: float
) -> tuple[Row, Attempt | None]:
    row = Row(name=candidate.name)
    try:
        with limited(seconds):
            attempt = Attempt(case, candidate, x, received)
            row.verdicts = truth.judge(attempt.results())
            row.schedule = candidate.schedule()
    except NotHere as why:
        row.state, row.note = "left out", str(why)
        return row, None
    except (Exception, TimeUp) as error:
        # Triton and the compilers behind it raise classes of their own, and none of them may end the run.
        row.note = first_line(error)
        return row, None
    row.share = max((v.share for v in row.verdicts.values()), key=lambda s: (s != s, s))
    row.state = "passed" if all(v.passed for v in row.verdicts.values()) else "wrong"
    if row.state == "passed":
        return row, attempt
    worst = max(row.verdicts, key=lambda n: (row.verdicts[n].share != row.verdicts[n].share, row.verdicts[n].share))
    row.note = f"{worst} is outside its bound: not timed"
    return row, None


def _time(
    case: Case,
    passed: list[tuple[Row, Attempt]],
    clock: Clock,
    settings: Settings,
    device: torch.device,
    left: Callable[[], float],
    say: Callable[[Row], None],
) -> None:
    calls: list[tuple[Row, Call]] = []
    for row, attempt in passed:
        try:
            with limited(min(settings.patience, left())):
                call = attempt.call()
                call()
            calls.append((row, call))
        except (Exception, TimeUp) as error:
            row.state, row.note = "failed", f"when timed: {first_line(error)}"
            say(row)
    seconds = min(settings.seconds * len(calls), max(left(), 0.0))
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    with limited(max(left(), 5.0)):
        found = interleaved(clock, [c for _, c in calls], seconds=seconds)
        for (row, call), times in zip(calls, found, strict=True):
            row.times = times
            row.rate = (case.kv_bytes * 1e-6 if case.decodes else case.flop * 1e-9) / times.ms if times.ms else None
            row.host_us = host_us(call, wait)
            say(row)


def first_line(error: BaseException) -> str:
    """The class and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
