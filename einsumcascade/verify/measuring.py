"""Candidates of the tuner on a device, in processes of their own: compiled, compared with the reference, timed.

A candidate may crash its compiler, hang, fault on the GPU (which no process survives that shares it) or be wrong. Each
of these ends one process, and one candidate.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.compiling import Launch, launches_of
from einsumcascade.codegen.launch import Built, run_interpreted, run_on_gpu
from einsumcascade.codegen.runner import launcher
from einsumcascade.codegen.workers import Worker, WorkError, ask_all
from einsumcascade.errors import EinsumCascadeWarning
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade
from einsumcascade.schedules.autotune import Compiled, Failure
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.verify.judging import Yardstick, yardstick

# Seconds that one candidate may take to compile, to run and be judged, and to be timed.
COMPILE_S, COMPARE_S, TIME_S = 60.0, 60.0, 30.0
# And what comes before: a process, the inputs, the reference.
PREPARE_S = 120.0
# Written between calls, so that none finds its inputs in the cache.
_FLUSHED_BYTES = 256 << 20
_COMPILE = "einsumcascade.codegen.compiling:compile_all"


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
    _runner: Worker = field(default_factory=lambda: Worker((__name__,)))
    _folder: Any = None

    def __enter__(self) -> Processes:
        if self.name:
            self._folder = tempfile.TemporaryDirectory(prefix="einsumcascade-tune-")
            self._path.write_bytes(pickle.dumps(self.job))
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()
        if self._folder is not None:
            with suppress(OSError):
                self._folder.cleanup()

    @property
    def _path(self) -> Path:
        return Path(self._folder.name) / "job"

    def compile(self, schedules: Sequence[Schedule], *, deadline: float) -> Iterator[tuple[int, Compiled | Failure]]:
        """Compile schedules in parallel; yield each by its place as it ends."""
        requests: list[tuple[tuple[Launch, ...], GpuTarget]] = []
        places = []
        layout = {n: _without_memory(t) for n, t in self.job.inputs.items()}
        binding = bind(self.job.cascade, shapes={n: tuple(t.shape) for n, t in layout.items()})
        for n, schedule in enumerate(schedules):
            try:
                built = self.build(schedule)
                with warnings.catch_warnings():
                    warnings.simplefilter("error", EinsumCascadeWarning)
                    requests.append((launches_of(built, layout, binding), self.target))
            # What is no message of ours is a defect of one schedule's lowering, and must not end the others.
            except Exception as error:
                yield n, Failure(_headline(error))
            else:
                places.append(n)
                self._built[schedule.to_json()] = built
        workers = [Worker(("triton", _COMPILE.partition(":")[0])) for _ in range(min(self.jobs, len(requests)))]
        try:
            for n, found in ask_all(workers, _COMPILE, requests, timeout_s=self.compile_s, deadline=deadline):
                if isinstance(found, WorkError):
                    yield places[n], Failure(f"compiling: {found}")
                    continue
                figures = {k: found[k] for k in ("registers", "spill_bytes", "shared_memory_bytes", "seconds")}
                yield places[n], Compiled(**figures)
        finally:
            for worker in workers:
                worker.close()

    def compare(self, schedule: Schedule) -> Failure | None:
        """Run a schedule on the small inputs and judge its results by the error rule; None if they are right."""
        try:
            wrong = self._ask("compare", schedule, timeout_s=self.compare_s)
        except WorkError as error:
            return Failure(f"comparing: {error}")
        return Failure(wrong) if wrong else None

    def time(self, schedule: Schedule, calls: int) -> float | Failure:
        """The median seconds of some calls."""
        try:
            return float(self._ask("timed", schedule, calls, timeout_s=self.time_s))
        except WorkError as error:
            return Failure(f"timing: {error}")

    def _ask(self, function: str, schedule: Schedule, *rest: Any, timeout_s: float) -> Any:
        if not self._runner.is_alive:
            self._runner.ask(f"{__name__}:prepare", str(self._path), timeout_s=PREPARE_S)
        name = f"{__name__}:{function}"
        return self._runner.ask(name, str(self._path), self._built[schedule.to_json()], *rest, timeout_s=timeout_s)


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
    small: dict[str, torch.Tensor]
    small_binding: Binding
    yardstick: Yardstick


@lru_cache(maxsize=1)
def _bench(path: str) -> _Bench:
    with Path(path).open("rb") as stream:
        # Written by the process that started this one, in a folder of its own.
        job: Job = pickle.load(stream)
    return _Bench(
        job=job,
        inputs=_inputs(job),
        binding=_bound(job, job.inputs),
        small={n: t.to(job.device) for n, t in job.small.items()},
        small_binding=_bound(job, job.small),
        yardstick=yardstick(job.cascade, job.small, job.dtype, seed=job.seed, counts=job.counts),
    )


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


def prepare(path: str) -> None:
    """Load a job: tensors go to the device, and the reference is computed."""
    _bench(path)


def compare(path: str, built: Built) -> str:
    """Run a candidate on the small inputs; returns what is wrong with its results, or an empty text."""
    bench = _bench(path)
    found = _run(bench.job, built, bench.small, bench.small_binding, multiprocessors=1)
    actual = {n: t.cpu() for n, t in found.items()}
    bad = [f"{r.output} {r.verdict}" for r in bench.yardstick.rows(actual) if not r.verdict.passed]
    return f"wrong: {bad[0]}" if bad else ""


def timed(path: str, built: Built, calls: int) -> float:
    """The median seconds of some calls of a candidate that was found right."""
    bench = _bench(path)
    if bench.job.device == "cpu":
        begun = time.perf_counter()
        _run(bench.job, built, bench.small, bench.small_binding)
        return time.perf_counter() - begun
    with torch.cuda.device(bench.job.device):
        return _median(bench, built, calls)


def _median(bench: _Bench, built: Built, calls: int) -> float:
    given = list(bench.inputs.values())
    call = launcher(built, bench.inputs, bench.binding)
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]  # type: ignore[no-untyped-call]
    for _ in range(2):
        call(given)
    for begin, end in marks:
        flushed.zero_()
        begin.record()
        call(given)
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in marks)) / 1e3
