"""Candidates of the tuner on a device, in processes of their own: compiled, compared with the reference, timed.

A candidate may crash its compiler, hang, fault on the GPU (which no process survives that shares it) or be wrong. Each
of these ends one process, and one candidate.
"""

from __future__ import annotations

import os
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.compiling import Launch, launches_of
from einsumcascade.codegen.launch import Built, run_interpreted, run_on_gpu
from einsumcascade.codegen.runner import launcher
from einsumcascade.codegen.workers import LateError, Worker, WorkError, ask_all
from einsumcascade.errors import Diagnostic, EinsumCascadeWarning, InputError
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade
from einsumcascade.schedules.autotune import Compiled, Failure
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.verify.judging import Yardstick, yardstick

# Seconds that one candidate may take to compile, to run and be judged, and to be timed.
COMPILE_S, COMPARE_S, TIME_S = 30.0, 20.0, 20.0
# Those that its calls may take together, unless one takes longer.
MEASURED_S = 5.0
# And what comes before: a process, the inputs, the reference.
PREPARE_S = 120.0
# Written between calls, so that none finds its inputs in the cache.
_FLUSHED_BYTES = 256 << 20
_COMPILE = "einsumcascade.codegen.compiling:compile_all"
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Kernels of a forward that saves, and what they are run on."""

    built: Built
    inputs: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What candidates are run on.

    Args:
        cascade: what they compute. dtype: of the inputs. seed: of the conditioning.
        inputs: what is timed. small: the same, cut down to what the reference can compute.
        counts: inputs of whole numbers, which no rounding changes.
        device: "cuda", "cuda:1" ..., or "cpu": the small inputs are run in Triton's interpreter, for tests.
        saving: computes those of the inputs that have no memory.
    """

    cascade: Cascade
    dtype: str
    seed: int
    inputs: Mapping[str, torch.Tensor]
    small: Mapping[str, torch.Tensor]
    counts: tuple[str, ...] = ()
    device: str = "cuda"
    saving: Saving | None = None


@dataclass(kw_only=True)
class Processes:
    """A `Device` of the tuner whose work is done in other processes.

    Args:
        job: what candidates are run on.
        build: makes the text of a schedule.
        target: what to compile for.
        name: of the device; empty: nothing is run.
        jobs: processes that compile.
    """

    job: Job
    build: Callable[[Schedule], Built]
    target: GpuTarget
    name: str
    jobs: int
    compile_s: float = COMPILE_S
    compare_s: float = COMPARE_S
    time_s: float = TIME_S
    _built: dict[str, Built] = field(default_factory=dict)
    _runner: Worker = field(default_factory=Worker)
    # The job, in a file without a name: it is gone with the last process that has it open, however that ends.
    _file: Any = None
    _is_preparing: bool = False

    def __enter__(self) -> Processes:
        """Start the process that runs candidates: it prepares itself while others compile them.

        Raises: InputError: `tuning-inputs`: the inputs cannot be written where it reads them.
        """
        if self.name:
            try:
                self._file = tempfile.TemporaryFile()
                pickle.dump(self.job, self._file)
                self._file.flush()
            except OSError as error:
                raise _no_room(error) from None
            self._runner = Worker((__name__,), (self._file.fileno(),))
            with suppress(WorkError):
                self._runner.begin(f"{__name__}:prepare", self._file.fileno(), timeout_s=PREPARE_S)
                self._is_preparing = True
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()
        if self._file is not None:
            self._file.close()

    def compile(self, schedules: Sequence[Schedule], *, deadline: float) -> Iterator[tuple[int, Compiled | Failure]]:
        """Compile schedules in parallel; yield each by its place as it ends."""
        places: list[int] = []
        rest: dict[int, Failure] = dict.fromkeys(range(len(schedules)), _failure("compiling", LateError()))
        layout = {n: _without_memory(t) for n, t in self.job.inputs.items()}
        binding = bind(self.job.cascade, shapes={n: tuple(t.shape) for n, t in layout.items()})

        def requests() -> Iterator[tuple[tuple[Launch, ...], GpuTarget]]:
            for n, schedule in enumerate(schedules):
                try:
                    built = self.build(schedule)
                    with warnings.catch_warnings():
                        warnings.simplefilter("error", EinsumCascadeWarning)
                        launches = launches_of(built, layout, binding)
                # What is no message of ours is a defect of one schedule's lowering, and must not end the others.
                except Exception as error:
                    rest[n] = Failure(_headline(error))
                else:
                    places.append(n)
                    self._built[schedule.to_json()] = built
                    yield launches, self.target

        workers = [Worker(("triton", _COMPILE.partition(":")[0])) for _ in range(min(self.jobs, len(schedules)))]
        try:
            for n, found in ask_all(workers, _COMPILE, requests(), timeout_s=self.compile_s, deadline=deadline):
                del rest[places[n]]
                if isinstance(found, WorkError):
                    yield places[n], _failure("compiling", found)
                    continue
                figures = {k: found[k] for k in ("registers", "spill_bytes", "shared_memory_bytes", "seconds")}
                yield places[n], Compiled(**figures)
        finally:
            for worker in workers:
                worker.close()
        yield from rest.items()

    def compare(self, schedule: Schedule, *, deadline: float) -> Failure | None:
        """Run a schedule on the small inputs and judge its results by the error rule; None if they are right."""
        try:
            wrong = self._ask("compare", schedule, timeout_s=self.compare_s, deadline=deadline)
        except WorkError as error:
            return _failure("comparing", error)
        return Failure(wrong) if wrong else None

    def time(self, schedule: Schedule, calls: int, *, deadline: float) -> float | Failure:
        """The median seconds of at most so many calls."""
        try:
            return float(self._ask("timed", schedule, calls, timeout_s=self.time_s, deadline=deadline))
        except WorkError as error:
            return _failure("timing", error)

    def _ask(self, function: str, schedule: Schedule, *rest: Any, timeout_s: float, deadline: float) -> Any:
        file = self._file.fileno()
        if self._is_preparing:
            self._is_preparing = False
            # If that has failed it is no fault of this candidate.
            with suppress(WorkError):
                self._runner.end()
        if not self._runner.is_alive:
            self._runner.ask(f"{__name__}:prepare", file, timeout_s=PREPARE_S, deadline=deadline)
        built = self._built[schedule.to_json()]
        return self._runner.ask(f"{__name__}:{function}", file, built, *rest, timeout_s=timeout_s, deadline=deadline)


def _failure(stage: str, error: WorkError) -> Failure:
    return Failure(str(error), is_late=True) if isinstance(error, LateError) else Failure(f"{stage}: {error}")


def _no_room(error: OSError) -> InputError:
    return InputError(
        diagnostics=(
            Diagnostic(
                code="tuning-inputs",
                headline=f"the inputs of candidates cannot be written to a temporary file: {error.strerror or error}",
                rule="the process that runs candidates reads their inputs from a file",
                hint="name a folder with more room by TMPDIR, or give smaller extents",
            ),
        )
    )


def _headline(error: Exception) -> str:
    diagnostics = getattr(error, "diagnostics", ())
    if diagnostics:
        return str(diagnostics[0].headline)
    said = next(iter(str(error).splitlines()), "")
    return said if isinstance(error, EinsumCascadeWarning) else f"{type(error).__name__}: {said}"


def laid(t: torch.Tensor, device: str) -> torch.Tensor:
    """Copy a tensor to a device with the strides that it has, gaps and repeats included, but nothing around it."""
    once = t[tuple(slice(0, 1) if n == 0 else slice(None) for n in t.stride())]
    copy = torch.empty_strided(once.shape, once.stride(), dtype=t.dtype, device=device).copy_(once)
    return copy.as_strided(t.shape, t.stride())


def _without_memory(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


# --- what the process does that runs candidates -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Bench:
    """A job in the process that runs it: its tensors where they are used, and what results are held against."""

    job: Job
    inputs: dict[str, torch.Tensor]
    binding: Binding
    small_binding: Binding
    yardstick: Yardstick


@lru_cache(maxsize=1)
def _job(file: int) -> Job:
    with open(file, "rb", closefd=False) as stream:
        stream.seek(0)
        # Written by the process that started this one, in a file that no other can open.
        job: Job = pickle.load(stream)
    return job


@lru_cache(maxsize=1)
def _bench(file: int) -> _Bench:
    job = _job(file)
    return _Bench(
        job=job,
        inputs=_inputs(job),
        binding=_bound(job, job.inputs),
        small_binding=_bound(job, job.small),
        yardstick=yardstick(job.cascade, job.small, job.dtype, seed=job.seed, counts=job.counts),
    )


def _alone(work: Callable[Concatenate[int, P], R]) -> Callable[Concatenate[int, P], R]:
    """End this process where an exception leaves its device in a state that fails whatever comes next."""

    @wraps(work)
    def guarded(file: int, /, *rest: P.args, **options: P.kwargs) -> R:
        try:
            return work(file, *rest, **options)
        except Exception as error:
            if _is_lost(_job(file).device):
                print(next(iter(str(error).splitlines()), type(error).__name__), file=sys.stderr, flush=True)
                os._exit(1)
            raise

    return guarded


def _is_lost(device: str) -> bool:
    """Whether a GPU serves this process no more, as after a fault."""
    try:
        if device != "cpu":
            torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def _inputs(job: Job) -> dict[str, torch.Tensor]:
    """The inputs where they are used; what a forward saves is computed there."""
    found = {n: laid(t, job.device) for n, t in job.inputs.items() if not t.is_meta}
    if job.saving is not None:
        given = {n: found[n] if n in found else laid(t, job.device) for n, t in job.saving.inputs.items()}
        binding = bind(job.saving.built.cascade, shapes={n: tuple(t.shape) for n, t in given.items()})
        found |= _run(job, job.saving.built, given, binding)
    return {n: found[n] for n in job.inputs}


def _run(
    job: Job, built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding, *, multiprocessors: int | None = None
) -> dict[str, torch.Tensor]:
    if job.device == "cpu":
        return run_interpreted(built, inputs, binding)
    return run_on_gpu(built, inputs, binding, multiprocessors=multiprocessors)


def _bound(job: Job, tensors: Mapping[str, torch.Tensor]) -> Binding:
    return bind(job.cascade, shapes={n: tuple(t.shape) for n, t in tensors.items()})


@_alone
def prepare(file: int) -> None:
    """Load a job: tensors go to the device, and the reference is computed."""
    _bench(file)


@_alone
def compare(file: int, built: Built) -> str:
    """Run a candidate on the small inputs; returns what is wrong with its results, or an empty text."""
    bench = _bench(file)
    # A candidate that writes where it must not may spoil its own inputs, and no others.
    small = {n: t.to(bench.job.device) for n, t in bench.job.small.items()}
    found = _run(bench.job, built, small, bench.small_binding, multiprocessors=1)
    actual = {n: t.cpu() for n, t in found.items()}
    bad = [f"{r.output} {r.verdict}" for r in bench.yardstick.rows(actual) if not r.verdict.passed]
    return f"wrong: {bad[0]}" if bad else ""


@_alone
def timed(file: int, built: Built, calls: int) -> float:
    """The median seconds of some calls of a candidate that was found right; of fewer where they take long."""
    bench = _bench(file)
    if bench.job.device == "cpu":
        begun = time.perf_counter()
        _run(bench.job, built, bench.job.small, bench.small_binding)
        return time.perf_counter() - begun
    with torch.cuda.device(bench.job.device):
        return _median(bench, built, calls)


def _median(bench: _Bench, built: Built, calls: int) -> float:
    given = list(bench.inputs.values())
    call = launcher(built, bench.inputs, bench.binding)
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    took = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        call(given)
        torch.cuda.synchronize()
        took = time.perf_counter() - begun
    calls = max(1, min(calls, int(MEASURED_S / took)))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]  # type: ignore[no-untyped-call]
    for begin, end in marks:
        flushed.zero_()
        begin.record()
        call(given)
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in marks)) / 1e3
