"""Measure a case: compare every candidate with float64, then time those that passed, round by round."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from einsumcascade.benchmarks.cases import Case
from einsumcascade.benchmarks.clock import Call, Clock, Rounds, Times, host_us
from einsumcascade.benchmarks.files import FAILED, LEFT_OUT, OURS, PASSED, TUNED, WRONG
from einsumcascade.benchmarks.rivals import Function, NotHere, Rival
from einsumcascade.benchmarks.truth import OUT, Truth, Verdict, truth_of
from einsumcascade.benchmarks.variants import Tensors, draw
from einsumcascade.codegen.op import Op
from einsumcascade.codegen.op import compile as compile_cascade
from einsumcascade.schedules.autotune import GradientTuning, Tuning

# In place of the name of a candidate, while all of them are timed in turns.
ROUNDS = "rounds"


class TimeUp(BaseException):
    """A candidate took longer than it may. No Exception, so that compilers that recover from those do not keep it."""


class Lost(BaseException):
    """An error of the device stays, as that of an illegal address does: nothing more can be run in this process."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How cases are measured.

    Args:
        seconds: of timed rounds a candidate. patience: seconds that a candidate may take to be built and compared.
        draws: roundings of the inputs that make a bound.
        tuning: seconds for which ours is tuned to each case; 0: it is not. keep: what was found, for later calls.
    """

    seconds: float = 0.25
    patience: float = 75.0
    draws: int = 4
    tuning: float = 0.0
    keep: bool = False


NOT_TIMED = "not timed"


@dataclass(kw_only=True)
class Row:
    """One candidate on one case: its verdicts, and its times if it passed.

    Args:
        state: "passed"; "wrong": an error is outside its bound, so nothing was timed; "failed": it did not run;
            "left out": it cannot compute this case.
        share: the largest error as a share of its bound.
        host_us: of the host in a call. hidden_us: as much of it as the clock hides; of more, a part is in the times.
        note: why there are no times.
    """

    name: str
    state: str = FAILED
    share: float | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    times: Times | None = None
    rate: float | None = None
    host_us: float | None = None
    hidden_us: float | None = None
    schedule: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is measured: a name, what makes its function, and the order in which it wants axes.

    Args:
        extra_s: seconds that making it may take beside those of every candidate.
    """

    name: str
    make: Callable[[], Function]
    layout: Callable[[str], str] = str
    schedule: Callable[[], str] = str
    extra_s: float = 0.0


def ours(case: Case) -> Candidate:
    """Our op on a case, as a user has it who has not tuned it."""
    return _own(OURS, lambda: compile_cascade(case.variant.cascade()))


def tuned(case: Case, x: Tensors, seconds: float, *, keep: bool = False) -> Candidate:
    """Our op on a case after it was tuned there.

    Args:
        x: the inputs. seconds: for the search; of a gradient, for both of its programs. keep: what was found, for later
            calls of the user.
    """

    def make() -> Op:
        cascade, gradient = case.variant.cascade(), case.direction != "forward"
        given = [t.detach().requires_grad_(gradient and n in case.variant.wrt) for n, t in x.items()]
        tune: Callable[..., Tuning | GradientTuning] = compile_cascade(cascade).tune
        # A gradient has two programs.
        found = tune(*given, gradient=gradient, budget_s=seconds / (2 if gradient else 1), keep=keep)
        if not found.device or found.is_fruitless:
            raise NotHere("tuning timed no candidate")
        return compile_cascade(cascade, schedule=found.schedule)

    return _own(TUNED, make, extra_s=2 * seconds)


def _own(name: str, op_of: Callable[[], Op], *, extra_s: float = 0.0) -> Candidate:
    made: list[Op] = []

    def make() -> Function:
        made.append(op_of())
        function: Any = made[-1]
        return function  # type: ignore[no-any-return]

    def schedule() -> str:
        # With gradients there is a pair of programs, and one without.
        op = made[-1]
        ran = [op.schedule, *(p.backward.last().schedule for p in op._pairs.values() if p.backward.last)]
        return " | ".join(str(s).replace("\n", " | ").replace("; loads by pointers", "") for s in ran)

    return Candidate(name=name, make=make, schedule=schedule, extra_s=extra_s)


def of_rivals(case: Case, x: Tensors, rivals: Sequence[Rival]) -> list[Candidate]:
    """The rivals as candidates."""
    return [Candidate(name=r.title, make=partial(r.make, case, x), layout=r.layout) for r in rivals]


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


@dataclass(frozen=True, kw_only=True)
class Told:
    """Who is told how far a case is, while it is measured.

    Args:
        began: that a candidate began, or `ROUNDS`, or the truth (empty), and the seconds that it may take.
        row: what is known of a candidate, whenever that grows.
    """

    began: Callable[[str, float], None] = lambda name, seconds: None
    row: Callable[[Row], None] = lambda row: None


def measure(
    case: Case,
    device: torch.device,
    clock: Clock,
    rivals: Sequence[Rival],
    settings: Settings,
    *,
    left: Callable[[], float],
    told: Told | None = None,
    also: Sequence[Candidate] = (),
    without: Collection[str] = (),
    awaited: bool = False,
) -> list[Row]:
    """Compare the candidates of a case with float64, then time those that passed.

    Args:
        left: the seconds that are left of the whole budget.
        also: further candidates. without: names of those that take no part.
        awaited: each timed call is done before the next begins, see `Rounds`.

    Returns: a row a candidate, ours first. What one of them does costs its own row only.
    Raises: TimeUp: the truth was not known in time; Lost.
    """
    told = told or Told()
    told.began("", left())
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
    own = [ours(case)]
    if settings.tuning:
        own.append(tuned(case, x, settings.tuning, keep=settings.keep))
    for candidate in [*own, *of_rivals(case, x, rivals), *also]:
        if candidate.name in without:
            continue
        seconds = min(settings.patience + candidate.extra_s, left())
        told.began(candidate.name, seconds)
        row, attempt = _compared(case, candidate, x, received, truth, seconds)
        rows.append(row)
        told.row(row)
        if attempt is not None:
            passed.append((row, attempt))
        check(clock)
    del truth
    _time(case, passed, clock, settings, left, told, awaited=awaited)
    return rows


def check(clock: Clock) -> None:
    """See that the device still works. Raises: Lost."""
    try:
        clock.wait()
    except Exception as error:
        raise Lost(first_line(error)) from None


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
        row.state, row.note = LEFT_OUT, str(why)
        return row, None
    except (Exception, TimeUp) as error:
        # Triton and the compilers behind it raise classes of their own, and none of them may end the run.
        row.note = first_line(error)
        return row, None
    row.share = max((v.share for v in row.verdicts.values()), key=lambda s: (s != s, s))
    row.state = PASSED if all(v.passed for v in row.verdicts.values()) else WRONG
    row.note = NOT_TIMED
    if row.state == PASSED:
        return row, attempt
    worst = max(row.verdicts, key=lambda n: (row.verdicts[n].share != row.verdicts[n].share, row.verdicts[n].share))
    row.note = f"{worst} is outside its bound: not timed"
    return row, None


def _time(
    case: Case,
    passed: list[tuple[Row, Attempt]],
    clock: Clock,
    settings: Settings,
    left: Callable[[], float],
    told: Told,
    *,
    awaited: bool,
) -> None:
    calls: list[tuple[Row, Call]] = []
    for row, attempt in passed:
        seconds = min(settings.patience, left())
        told.began(row.name, seconds)
        try:
            with limited(seconds):
                call = attempt.call()
                call()
                clock.wait()
            calls.append((row, call))
        except (Exception, TimeUp) as error:
            _fail(row, error, told)
        check(clock)
    if not calls:
        return

    def failed(place: int, error: Exception) -> None:
        # Where an error stays, whose it is can be said only of calls that are awaited.
        try:
            check(clock)
        except Lost:
            if awaited:
                _fail(calls[place][0], error, told)
            raise
        _fail(calls[place][0], error, told)

    def before(place: int) -> None:
        if awaited:
            told.began(calls[place][0].name, settings.patience)

    rounds = Rounds(clock, [c for _, c in calls], failed=failed, before=before, awaited=awaited)
    seconds = max(left(), 5.0)
    told.began(ROUNDS, seconds)
    late = ""
    try:
        with limited(seconds):
            rounds.run(min(settings.seconds * len(calls), max(left(), 0.0)))
            told.began(ROUNDS, seconds)
            hidden = clock.hidden_us()
            for (row, call), times in zip(calls, rounds.times(), strict=True):
                if times is not None:
                    row.host_us, row.hidden_us = _host_us(row, call, clock, told), hidden
    except TimeUp as error:
        late = first_line(error)
    for (row, _), times in zip(calls, rounds.times(), strict=True):
        if row.state != PASSED:
            continue
        row.times, row.note = times, "" if times is not None else f"{NOT_TIMED}: {late}"
        if times is not None:
            row.rate = (case.kv_bytes * 1e-6 if case.decodes else case.flop * 1e-9) / times.ms if times.ms else None
        told.row(row)


def _host_us(row: Row, call: Call, clock: Clock, told: Told) -> float | None:
    try:
        return host_us(call, clock.wait)
    except Exception as error:
        _fail(row, error, told)
        check(clock)
        return None


def _fail(row: Row, error: BaseException, told: Told) -> None:
    row.state, row.note = FAILED, f"when timed: {first_line(error)}"
    told.row(row)


def first_line(error: BaseException) -> str:
    """The class and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
