"""Run a cascade on tensors: CUDA tensors run the kernels, CPU tensors the same program in PyTorch.

What a call needs beside its tensors, checks, extents, kernels, grids, is worked out once for each signature: shapes,
strides, dtypes, device.
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch

from einsumcascade.analysis.targets import TARGETS, GpuTarget, gpu_target
from einsumcascade.codegen.checks import check_tensors
from einsumcascade.codegen.defaults import build_call, call_rule, form_of
from einsumcascade.codegen.dtypes import output_dtype, value_dtype
from einsumcascade.codegen.launch import Built, allocate, build, fitting, multiprocessors_of, plan, run_on_gpu
from einsumcascade.codegen.programs import feature_ranks, program_of
from einsumcascade.codegen.tables import tables_of
from einsumcascade.errors import EinsumCascadeError, EinsumCascadeWarning
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade
from einsumcascade.schedules.cache import find, key_of
from einsumcascade.schedules.calls import Form, Rule
from einsumcascade.schedules.parts import in_fixed_order
from einsumcascade.schedules.schedule import SCATTERS, Schedule, check_schedule, fitting_choices, renamed

DEFAULT_TARGET = "cuda:90"
Tensors = tuple[torch.Tensor, ...]
# Signatures that a runner remembers.
REMEMBERED = 1024
# Those that are alive, of ops, of library calls and of gradients: what is tuned is for all of them.
_RUNNERS: WeakSet[Runner] = WeakSet()


@dataclass(eq=False, kw_only=True)
class Runner:
    """A cascade that runs on plain tensors; it records no gradients and no tracer sees it.

    Args:
        cascade: what it computes; constants put in.
        schedule: used for every call, or None for the default by rule.
        precision: of float32 products; None follows `torch.get_float32_matmul_precision()`.
        alike: another cascade whose tuned schedules serve this one: a forward that saves no more.
        wide: inputs that may be float32 whatever their axes: what a forward saves for its gradient.
        last: where kernels are shown from: gives those of the last call.
    """

    cascade: Cascade
    schedule: Schedule | None = None
    precision: str | None = None
    alike: Cascade | None = None
    wide: frozenset[str] = frozenset()
    last: Callable[[], Built] | None = field(default=None, repr=False)
    built: dict[object, Built] = field(default_factory=dict, repr=False)
    calls: dict[object, _Call] = field(default_factory=dict, repr=False)
    rules: dict[object, Rule | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _RUNNERS.add(self)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Tensors:
        """Compute the outputs, in order, from plain tensors in the order of `in`.

        Raises: InputError: a tensor is of a wrong kind, rank, extent, dtype or device; LoweringError, ScheduleError.
        """
        precision = self.precision or allowed_precision()
        try:
            key = (
                precision,
                torch.are_deterministic_algorithms_enabled(),
                *[(t.shape, t.stride(), t.dtype, t.device) for t in tensors],
            )
            call = self.calls.get(key)
        except (AttributeError, RuntimeError):
            # What is no plain tensor has none of these; `_prepared` says what it is.
            key, call = (), None
        if call is None:
            call = self._prepared(tensors, precision)
            if len(self.calls) >= REMEMBERED:
                self.calls.clear()
            self.calls[key] = call
        self.last = call.shown
        return call.run(tensors)

    def _prepared(self, tensors: Sequence[torch.Tensor], precision: str) -> _Call:
        inputs = {i.tensor: t for i, t in zip(self.cascade.inputs, tensors, strict=True)}
        check_tensors(self.cascade, inputs, self.wide)
        binding = bind(self.cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
        device = tensors[0].device
        features = {r: binding.extents[r] for r in feature_ranks(self.cascade)}
        dtype = str(value_dtype(tensors)).removeprefix("torch.")
        ordered = torch.are_deterministic_algorithms_enabled()
        tuned = self._tuned(device, dtype, binding, precision) if device.type == "cuda" else None
        found = tuned.to_json() if tuned is not None else ""
        form = Form()
        if device.type == "cuda" and tuned is None:
            form = self._form_of_call(target_of(device), dtype, features, binding)
        key = (device.type, device.index, dtype, precision, ordered, tuple(features.items()), found, form)
        if key not in self.built:
            self.built[key] = (
                self._built_for(target_of(device), dtype, features, precision, tuned, form)
                if device.type == "cuda"
                else self._build_for_cpu(dtype, features)
            )
        built = self.built[key]
        names = [i.tensor for i in self.cascade.inputs]
        if device.type == "cpu":
            from einsumcascade.codegen.run_torch import run_on_cpu

            def run(given: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
                # The dtype of a product here is decided, whatever the caller's region of code casts.
                with torch.autocast("cpu", enabled=False):
                    return run_on_cpu(built, dict(zip(names, given, strict=True)), binding)

            return _Call(partial(self._text_for, features, binding, dtype, precision), run, self._outputs(names, dtype))
        return self.launched(built, inputs, binding, dtype)

    def launched(self, built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding, dtype: str) -> _Call:
        """What calls share whose tensors are like these, launched on their device."""
        launches = _Launches(built, inputs, binding)
        return _Call(lambda: built, launches.run, self._outputs(list(inputs), dtype))

    def _outputs(self, inputs: list[str], dtype: str) -> tuple[tuple[str, torch.dtype | None], ...]:
        """Names of the outputs; an output that is an input is a tensor of its own all the same, of the dtype given."""
        return tuple(
            (o.tensor, getattr(torch, o.dtype or dtype) if o.tensor in inputs else None) for o in self.cascade.outputs
        )

    def _form_of_call(self, target: GpuTarget, dtype: str, features: Mapping[str, int], binding: Binding) -> Form:
        """The form that the lengths of a call ask for, where no schedule decides it."""
        if self.schedule is not None:
            return Form()
        key = (target.name, dtype, tuple(features.items()))
        if key not in self.rules:
            self.rules[key] = call_rule(self.cascade, features, dtype, target)
        return form_of(self.rules[key], binding, target)

    def _form(self, features: Mapping[str, int]) -> Schedule | None:
        """The schedule, and every sum in one order where the caller wants the same result at every run."""
        given = self.schedule
        if not torch.are_deterministic_algorithms_enabled():
            return given
        fixed = in_fixed_order(given)
        if given is None or not given.kernels or fixed == given:
            return fixed
        # The kernels of the two forms share names and may have other tiles.
        known = {k.name for k in program_of(self.cascade, features, given).kernels}
        fitting = fitting_choices(program_of(self.cascade, features, fixed), given.kernels)
        return replace(fixed, kernels={n: k for n, k in given.kernels.items() if n in fitting or n not in known})

    def _text_for(self, features: Mapping[str, int], binding: Binding, dtype: str, precision: str) -> Built:
        """The text that a GPU would run for a call on a CPU; float64 has none, so its extents alone count."""
        target, dtype = present_target(), dtype if dtype != "float64" else "bfloat16"
        form = self._form_of_call(target, dtype, features, binding)
        return self._built_for(target, dtype, features, precision, None, form)

    def _tuned(self, device: torch.device, dtype: str, binding: Binding, precision: str) -> Schedule | None:
        """The schedule that was tuned for such a call, or the nearest; a fixed one goes before it."""
        if self.schedule is not None and self.schedule != Schedule(scatter=self.schedule.scatter):
            return None
        return tuned_schedule(
            self.cascade,
            binding=binding,
            dtype=dtype,
            precision=precision,
            ordered=torch.are_deterministic_algorithms_enabled()
            or (self.schedule or Schedule()).scatter != SCATTERS[0],
            device=torch.cuda.get_device_name(device),
            alike=self.alike,
        )

    def _built_for(
        self,
        target: GpuTarget,
        dtype: str,
        features: Mapping[str, int],
        precision: str,
        tuned: Schedule | None,
        form: Form,
    ) -> Built:
        options: dict[str, Any] = {"extents": features, "dtype": dtype, "target": target, "precision": precision}
        if form != Form():
            return build_call(self.cascade, form=form, **options)
        if tuned is not None:
            try:
                return build(self.cascade, schedule=tuned, **options)
            except EinsumCascadeError as error:
                _warn_unfit(self.cascade, "what was tuned for it", error)
        return build(self.cascade, schedule=self._form(features), **options)

    def _build_for_cpu(self, dtype: str, features: Mapping[str, int]) -> Built:
        from einsumcascade.codegen.run_torch import cpu_schedule

        chosen = self._form(features) or Schedule()
        program = program_of(self.cascade, features, chosen)
        # Its tiles are not used here, but what it names has to be there.
        check_schedule(program, replace(chosen, kernels={**cpu_schedule(program, features).kernels, **chosen.kernels}))
        # Heads are a dimension of PyTorch's products: they need not share a tile.
        plain = replace(chosen, pack={})
        kernels = cpu_schedule(program_of(self.cascade, features, plain), features).kernels
        return build(
            self.cascade,
            extents=features,
            dtype=dtype,
            target=gpu_target(DEFAULT_TARGET),
            schedule=replace(plain, kernels=kernels),
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """What calls of one signature share."""

    shown: Callable[[], Built]
    compute: Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]
    outputs: tuple[tuple[str, torch.dtype | None], ...]

    def run(self, given: Sequence[torch.Tensor]) -> Tensors:
        found = self.compute(given)
        return tuple(
            [
                found[o] if own is None else found[o].to(own, copy=True, memory_format=torch.contiguous_format)
                for o, own in self.outputs
            ]
        )


def tuned_schedule(
    cascade: Cascade,
    *,
    binding: Binding,
    dtype: str,
    precision: str,
    ordered: bool,
    device: str,
    alike: Cascade | None = None,
) -> Schedule | None:
    """The schedule that was tuned for a call or, if none was, for the nearest extents; None if there is none.

    Args:
        binding: extents of the call. ordered: whether all sums have one order.
        device: as it calls itself.
        alike: a cascade whose schedules serve this one too.

    Returns: a schedule that fits the program. One that does not, as after a change of the compiler, is passed over.
    Cost: a file is read for each bucket that was tuned.
    """
    import triton

    features = {r: binding.extents[r] for r in feature_ranks(cascade)}
    options: dict[str, Any] = {"dtype": dtype, "precision": precision, "ordered": ordered, "device": device}
    for source in (cascade, *((alike,) if alike is not None else ())):
        key = key_of(source, extents=binding.extents, features=features, triton=str(triton.__version__), **options)
        entry = find(key)
        if entry is None:
            continue
        try:
            program = program_of(cascade, features, entry.schedule)
            schedule = renamed(entry.schedule, [k.name for k in program.kernels])
            check_schedule(program, schedule)
        except EinsumCascadeError as error:
            _warn_unfit(cascade, str(entry.path), error)
            continue
        return schedule
    return None


def _warn_unfit(cascade: Cascade, what: str, error: EinsumCascadeError) -> None:
    warnings.warn(
        f"[tuned-schedule] {what} does not fit {cascade.name} any more; the default is used: "
        f"{str(error).splitlines()[0]}",
        EinsumCascadeWarning,
        stacklevel=3,
    )


def launcher(
    built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding
) -> Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]:
    """What runs the kernels on CUDA tensors like these, given in order; all that their layout decides is done here."""
    return _Launches(built, inputs, binding).run


class _Launches:
    """The launches of calls of one signature on a GPU: buffers to make, kernels, grids and arguments.

    A call makes its buffers and launches: nothing waits for the device, and nothing is read from it.
    """

    def __init__(self, built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding) -> None:
        from einsumcascade.codegen.build import load_module

        self.built, self.binding = built, binding
        tensors = allocate(built, inputs, binding)
        built = fitting(built, tensors)
        self.names = list(inputs)
        # Strides are those of the signature, but an address is a call's own. What is made here is aligned.
        described = dict.fromkeys(t for text in built.texts for t in text.descriptors)
        self.described = [n for n in described if n in inputs]
        self.launch = self._described if described else self._launch
        self.tabled = [k for k in built.kernels if k.tables]
        made = {t for k in built.kernels for t in k.outputs}
        self.new = [(n, tuple(t.shape), t.dtype) for n, t in tensors.items() if n in made]
        self.outputs = built.cascade.output_names
        # What programs add to begins at 0, in float32.
        self.added = {t for k in built.kernels for t in k.scattered}
        main = value_dtype(inputs.values())
        self.rounded = [(o.tensor, output_dtype(o, main)) for o in built.cascade.outputs if o.tensor in self.added]
        self.device = next(iter(inputs.values())).device
        text = load_module(built.source)
        self.launches = []
        for c in plan(built, tensors, binding, multiprocessors=multiprocessors_of(self.device)):
            kernel = getattr(text, c.kernel)
            # By position, which Triton binds faster than by name.
            assert list(kernel.arg_names) == [*c.tensors, *c.arguments]
            options = {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True}
            if c.programs:
                names, scalars = list(c.tensors.values()), list(c.arguments.values())
                self.launches.append((kernel[(c.programs,)], names, scalars, options))

    def run(self, given: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in self.described:
            if given[self.names.index(name)].data_ptr() % 16:
                return run_on_gpu(self.built, dict(zip(self.names, given, strict=True)), self.binding)
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._run(given)
        return self._run(given)

    def _run(self, given: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = dict(zip(self.names, given, strict=True))
        for name, shape, dtype in self.new:
            make = torch.zeros if name in self.added else torch.empty
            tensors[name] = make(shape, dtype=dtype, device=self.device)
        for kernel in self.tabled:
            tensors |= tables_of(kernel, tensors)
        self.launch(tensors)
        for name, dtype in self.rounded:
            tensors[name] = tensors[name].to(dtype)
        return tensors

    def _launch(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for launch, names, scalars, options in self.launches:
            launch(*[tensors[n] for n in names], *scalars, **options)

    def _described(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Launch with descriptors, which the device makes in memory that the host provides for these launches alone."""

        def launch() -> None:
            set_allocator(self._memory)
            self._launch(tensors)

        from triton import set_allocator

        contextvars.copy_context().run(launch)

    def _memory(self, size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=self.device)


def allowed_precision() -> str:
    """The precision of float32 products that the caller allows."""
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def target_of(device: torch.device) -> GpuTarget:
    """The target of a GPU that is there: its own, or the newest of its kind that is not newer."""
    if torch.version.hip is not None:
        return gpu_target("hip:gfx942")
    major, minor = torch.cuda.get_device_capability(device)
    known = [t for t in TARGETS if t.backend == "cuda" and int(t.arch) <= major * 10 + minor]
    return max(known, key=lambda t: int(t.arch), default=gpu_target("cuda:80"))


def present_target() -> GpuTarget:
    """The target of the GPU that is there, else cuda:90."""
    return target_of(torch.device("cuda")) if torch.cuda.is_available() else gpu_target(DEFAULT_TARGET)


# Runners that library calls use, apart from those that users hold: a traced call changes no `source`.
_SHARED: dict[object, Runner] = {}


def shared(cascade: Cascade, precision: str | None, schedule: Schedule | None, wide: frozenset[str]) -> Runner:
    """The runner that every library call of a cascade uses."""
    key = (cascade, cascade.name, precision, schedule.to_json() if schedule else "", wide)
    if key not in _SHARED:
        _SHARED[key] = Runner(cascade=cascade, precision=precision, schedule=schedule, wide=wide)
    return _SHARED[key]


def forget_calls() -> None:
    """Let every call be worked out anew: schedules have been tuned."""
    for runner in list(_RUNNERS):
        runner.calls.clear()
