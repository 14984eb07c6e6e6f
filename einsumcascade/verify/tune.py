"""Tune a cascade: search the schedules of its kernels on the GPU that is there, or rank them for one that is not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, Unpack, overload

import torch
import triton

from einsumcascade.analysis.targets import GpuTarget, gpu_target
from einsumcascade.codegen.autograd import Pair, reached
from einsumcascade.codegen.checks import check_kinds, check_tensors
from einsumcascade.codegen.dtypes import KERNEL_DTYPES, value_dtype
from einsumcascade.codegen.launch import Built, build, require_inputs
from einsumcascade.codegen.programs import feature_ranks, program_of, with_extents
from einsumcascade.codegen.runner import DEFAULT_TARGET, allowed_precision, forget_calls, target_of
from einsumcascade.errors import Diagnostic, InputError, nearest
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.rewrites.differentiate import Gradient
from einsumcascade.schedules import autotune, cache
from einsumcascade.schedules.autotune import INTERRUPTION, Device, GradientTuning, Trial, Tuning
from einsumcascade.schedules.parts import joined, parts_of
from einsumcascade.schedules.ranking import shortlist
from einsumcascade.schedules.schedule import Schedule, fitting_choices
from einsumcascade.schedules.space import Space
from einsumcascade.verify.forms import spaces_of
from einsumcascade.verify.gradients import backward_inputs
from einsumcascade.verify.measuring import Job, Processes, Saving, laid
from einsumcascade.verify.samples import cut_down, drawn, of_backward
from einsumcascade.verify.verify import filled_extents

# Candidates that are compiled, and seconds for all.
CANDIDATES, BUDGET_S = 24, 90.0

Progress = Callable[[str, int, int, Trial | None], None]
Opened = AbstractContextManager[Device]
Opener = Callable[[Job, Callable[[Schedule], Built], GpuTarget, int], Opened]


class Options(TypedDict, total=False):
    """The options of `tune`, which says what each is, but `gradient`."""

    extents: Mapping[str, int] | None
    inputs: Mapping[str, torch.Tensor] | None
    dtype: str
    target: str | None
    precision: str | None
    candidates: int
    budget_s: float
    jobs: int | None
    seed: int
    keep: bool
    progress: Progress | None
    device: Opener | None


@overload
def tune(cascade: Cascade | str, *, gradient: Literal[False] = False, **options: Unpack[Options]) -> Tuning: ...
@overload
def tune(cascade: Cascade | str, *, gradient: Literal[True], **options: Unpack[Options]) -> GradientTuning: ...
@overload
def tune(cascade: Cascade | str, *, gradient: bool, **options: Unpack[Options]) -> Tuning | GradientTuning: ...
def tune(
    cascade: Cascade | str,
    *,
    gradient: bool = False,
    extents: Mapping[str, int] | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    dtype: str = "bfloat16",
    target: str | None = None,
    precision: str | None = None,
    candidates: int = CANDIDATES,
    budget_s: float = BUDGET_S,
    jobs: int | None = None,
    seed: int = 0,
    keep: bool = True,
    progress: Progress | None = None,
    device: Opener | None = None,
) -> Tuning | GradientTuning:
    """Find the fastest schedule of a cascade for some extents.

    A model ranks the legal schedules; the best of them are compiled in parallel, compared with the float64 reference
    by the error rule, and timed in rounds that drop the slower half. The fastest is kept for later calls. On a machine
    without a GPU nothing is timed and nothing is kept: the candidates are ranked, compiled for `target`, and returned
    with registers, spills and shared memory.

    Args:
        cascade: constants put in; or the name of a gallery text or the path of a file.
        gradient: tune what a call runs that records a gradient: the forward that saves, then the backward.
        extents: by rank; lengths that are missing count 77, feature ranks 64, other ranks 2.
        inputs: tensors to tune on, by name, whose shapes are the extents; on a GPU they are timed as they lie. The
            gradient is that in those which require one, or in all that have one if none does.
        dtype: of the inputs, where none are given.
        target: what to compile for where there is no GPU; cuda:90 unless told.
        precision: of float32 products; None follows PyTorch.
        candidates: how many schedules of a program to compile at most, the default one among them.
        budget_s: seconds for a program.
        jobs: processes that compile; None: one a core.
        seed: of random inputs. keep: the result for later calls.
        progress: called with the stage, steps done and planned, and the best so far.
        device: opens the device, for tests.

    Returns: what became of each candidate. After an interruption (KeyboardInterrupt), what is known.
    Raises: CascadeError, InputError, TargetError; LoweringError: a construct has no lowering, or no gradient.
    Cost: at most about `budget_s` seconds, twice that for a gradient.
    """
    begun = time.monotonic()
    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    require_inputs(cascade)
    cascade = with_extents(cascade, extents or {})
    for what, n in (("candidates", candidates), ("budget_s", budget_s), ("jobs", 1 if jobs is None else jobs)):
        if not n > 0:
            raise _refused(
                "option-budget",
                f"{what} is {n:g}, which is not above 0",
                rule="the tuner needs a candidate, time and a process",
            )
    where = _device_of(inputs)
    dtype = dtype if inputs is None else _dtype(inputs)
    if dtype not in KERNEL_DTYPES:
        hint = nearest(dtype, KERNEL_DTYPES)
        raise _refused("wrong-dtype", f"kernels take no inputs of '{dtype}'", rule=_DTYPES, hint=hint)
    if inputs is None:
        binding = bind(cascade, extents=filled_extents(cascade, extents or {}))
        try:
            given = drawn(cascade, binding, dtype, seed, real=bool(where or device))
        except RuntimeError as error:
            raise _refused(
                "tuning-inputs",
                f"inputs of these extents cannot be made: {next(iter(str(error).splitlines()), '')}",
                rule="candidates are run on inputs in memory",
                hint="give smaller extents",
            ) from None
    else:
        check_kinds(inputs)
        binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()}, extents=extents)
        check_tensors(cascade, {i.tensor: inputs[i.tensor] for i in cascade.inputs}, frozenset())
        given = {i.tensor: laid(inputs[i.tensor].detach(), "cpu") for i in cascade.inputs}
    search = _Search(
        where=where,
        target=target_of(torch.device(where)) if where else gpu_target(target or DEFAULT_TARGET),
        precision=precision or allowed_precision(),
        candidates=candidates,
        budget_s=budget_s,
        jobs=jobs or os.cpu_count() or 1,
        seed=seed,
        keep=keep,
        progress=progress or (lambda *_: None),
        open=device or _real,
    )

    def small() -> dict[str, torch.Tensor]:
        return cut_down(cascade, given, binding) if where or device else {}

    if not gradient:
        search.text(cascade, given, Schedule())
        return search.of(cascade, given, small, begun=begun)
    wrt = tuple(n for n in reached(cascade) if given[n].is_floating_point())
    required = tuple(n for n in wrt if inputs is not None and inputs[n].requires_grad)
    return _gradient_tuned(search, Pair.of(cascade, required or wrt, precision).gradient, given, small)


def _gradient_tuned(
    search: _Search, gradient: Gradient, given: Mapping[str, torch.Tensor], small: Callable[[], dict[str, torch.Tensor]]
) -> GradientTuning:
    """Tune the forward that saves, then the backward on what the best of it saves."""
    received = of_backward(gradient, given, search.seed)
    for cascade, inputs in ((gradient.forward, given), (gradient.backward, received)):
        # What has no lowering is refused before any work is done.
        search.text(cascade, inputs, Schedule())
    forward = search.named("forward").of(gradient.forward, given, small)
    backward = None
    if forward.cut_by != INTERRUPTION:
        saving = Saving(built=search.text(gradient.forward, given, forward.schedule), inputs=given)

        def small_received() -> dict[str, torch.Tensor]:
            own = small()
            return backward_inputs(gradient, own, _dtype(own), seed=search.seed) if own else {}

        # One that comes before a candidate is tried: the forward is known and kept all the same.
        with suppress(KeyboardInterrupt):
            backward = search.named("backward").of(
                gradient.backward, received, small_received, saving=saving, is_backward=True
            )
    features = _features(gradient.forward, given)
    chosen = forward.schedule if backward is None else of_op(gradient, features, forward.schedule, backward.schedule)
    return GradientTuning(forward=forward, backward=backward, schedule=chosen)


def of_op(gradient: Gradient, features: Mapping[str, int], forward: Schedule, backward: Schedule) -> Schedule:
    """One schedule of an op for both programs of a call that records a gradient.

    How sums are added up is one choice of an op, the backward's. Where that gives the forward other kernels than it was
    tuned with, these get the default.
    """
    chosen = joined(forward, backward)
    program = program_of(gradient.forward, features, parts_of(chosen, gradient.original.name).forward)
    fitting = fitting_choices(program, forward.kernels)
    kernels = {n: k for n, k in chosen.kernels.items() if n in fitting or n not in forward.kernels}
    return replace(chosen, kernels=kernels)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """What the programs of one call of `tune` share; see there."""

    where: str
    target: GpuTarget
    precision: str
    candidates: int
    budget_s: float
    jobs: int
    seed: int
    keep: bool
    progress: Progress
    open: Opener

    def named(self, name: str) -> _Search:
        """The same, which names a program when it tells how far it is."""
        return replace(self, progress=lambda stage, *rest: self.progress(f"{name}: {stage}", *rest))

    def text(self, cascade: Cascade, inputs: Mapping[str, torch.Tensor], schedule: Schedule) -> Built:
        """The kernels of a cascade for a schedule."""
        return build(
            cascade,
            extents=_features(cascade, inputs),
            dtype=_dtype(inputs),
            target=self.target,
            schedule=schedule,
            precision=self.precision,
        )

    def of(
        self,
        cascade: Cascade,
        inputs: Mapping[str, torch.Tensor],
        small: Callable[[], Mapping[str, torch.Tensor]],
        *,
        begun: float | None = None,
        saving: Saving | None = None,
        is_backward: bool = False,
    ) -> Tuning:
        """Tune one cascade.

        Args:
            inputs: what is timed. small: what is compared. begun: when the budget began.
            saving: computes those inputs that have no memory.
            is_backward: whether it is one whose `reference` and `split` a schedule of the op cannot say.
        """
        begun = time.monotonic() if begun is None else begun
        binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
        dtype, features = _dtype(inputs), _features(cascade, inputs)
        named = {r: binding.extents[r] for r in dict.fromkeys(rank_of(v) for i in cascade.inputs for v in i.indices)}
        spaces: list[Space] = spaces_of(
            cascade, named, features, dtype, self.target, is_backward=is_backward, precision=self.precision
        )
        chosen = shortlist(
            spaces, extents=named, target=self.target, dtype=dtype, limit=self.candidates, precision=self.precision
        )
        job = Job(
            cascade=cascade,
            dtype=dtype,
            seed=self.seed,
            inputs=inputs,
            small=small(),
            counts=tuple(n for n, t in inputs.items() if not t.is_floating_point() and t.dtype != torch.bool),
            device=self.where,
            saving=saving,
        )
        with self.open(job, lambda s: self.text(cascade, inputs, s), self.target, self.jobs) as device:
            # A ranking that took long, as on a slow machine, must not leave nothing.
            left = self.budget_s - (time.monotonic() - begun)
            trials, cut_by = autotune.tune(
                chosen, device, budget_s=max(left, self.budget_s / 3), progress=self.progress
            )
            name = device.name
        tuning = Tuning(
            name=cascade.name,
            device=name,
            target=self.target.name,
            dtype=dtype,
            extents=named,
            trials=trials,
            cut_by=cut_by,
            seconds=time.monotonic() - begun,
        )
        if self.keep and tuning.best is not None:
            key = cache.key_of(
                cascade,
                extents=named,
                features=features,
                dtype=dtype,
                precision=self.precision,
                ordered=torch.are_deterministic_algorithms_enabled(),
                device=name,
                triton=str(triton.__version__),
            )
            # What ended early takes no place from what was searched to the end.
            before = cache.at(key) if tuning.was_cut else None
            if before is None or before.record.get("was_cut") is not False:
                cache.keep(key, cascade.name, tuning.best.schedule, tuning.to_dict())
                forget_calls()
        return tuning


_DTYPES = "inputs are " + ", ".join(KERNEL_DTYPES)


def _refused(code: str, headline: str, *, rule: str, hint: str = "") -> InputError:
    return InputError(diagnostics=(Diagnostic(code=code, headline=headline, rule=rule, hint=hint),))


def _dtype(inputs: Mapping[str, torch.Tensor]) -> str:
    return str(value_dtype(inputs.values())).removeprefix("torch.")


def _features(cascade: Cascade, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    extents = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()}).extents
    return {r: extents[r] for r in feature_ranks(cascade)}


def _device_of(inputs: Mapping[str, torch.Tensor] | None) -> str:
    """The GPU to tune on: that of the inputs, else the one present; empty: none."""
    own = next((t.device for t in (inputs or {}).values()), None)
    if own is not None and own.type == "cuda":
        return str(own)
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else ""


def _real(job: Job, text: Callable[[Schedule], Built], target: GpuTarget, jobs: int) -> Opened:
    name = torch.cuda.get_device_name(job.device) if job.device else ""
    return Processes(job=job, build=text, target=target, name=name, jobs=jobs)
