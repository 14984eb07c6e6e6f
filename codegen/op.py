"""The op: a callable on tensors. CUDA tensors run the kernel, CPU tensors the same program in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from einsumcascade.analysis.targets import TARGETS, GpuTarget, gpu_target
from einsumcascade.codegen.autograd import Pair, library, recorded
from einsumcascade.codegen.kernel import Kernel
from einsumcascade.codegen.launch import (
    KERNEL_DTYPES,
    WHOLE_DTYPES,
    Built,
    build,
    feature_ranks,
    program_of,
    require_inputs,
    run_on_gpu,
    selectors,
    value_dtype,
    with_constants,
)
from einsumcascade.codegen.ops import registered
from einsumcascade.errors import Diagnostic, InputError, ScheduleError, nearest
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.rewrites.derive import Derivation, derive
from einsumcascade.rewrites.differentiate import differentiable, differentiate
from einsumcascade.schedules.schedule import PRECISIONS, Schedule

DEFAULT_TARGET = "cuda:90"
DEFAULT_DTYPE = "bfloat16"


def compile(
    cascade: Cascade | str,
    *,
    schedule: Schedule | None = None,
    precision: str | None = None,
    constants: Mapping[str, float] | None = None,
) -> Op:
    """Compile a cascade into a PyTorch op.

    Args:
        cascade: a cascade, or the name of a gallery text or the path of a file.
        schedule: choices for every kernel; None: by rule, from shapes and target.
        precision: of float32 products on tensor cores: "ieee" (exact), "tf32x3" or "tf32"; None follows
            `torch.get_float32_matmul_precision()`: "highest" is ieee, "high" tf32x3, "medium" tf32.
        constants: values in place of those the text declares.

    Returns: a callable; kernels are built at the first call of each dtype and feature extents.
    Raises: CascadeError, InputError, ScheduleError; LoweringError: the cascade has no inputs.

    >>> op = compile("softmax_attention")
    >>> q = torch.ones(1, 1, 3, 8)
    >>> op(q, q, q).shape
    torch.Size([1, 1, 3, 8])
    """
    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    if not isinstance(cascade, Cascade):
        raise _wrong(
            "wrong-type",
            f"a {type(cascade).__name__} cannot be compiled",
            rule="compile takes a cascade, the name of a gallery text, or the path of a file",
            hint="ec.compile(ec.parse(text))",
        )
    if precision is not None and precision not in PRECISIONS:
        raise ScheduleError(
            diagnostics=(
                Diagnostic(
                    code="unknown-precision",
                    headline=f"there is no precision '{precision}'",
                    rule="precision is that of float32 products",
                    hint=nearest(precision, PRECISIONS),
                ),
            )
        )
    given = dict(constants or {})
    if given:
        bind(cascade, constants=given, extents={rank_of(v): 1 for i in cascade.inputs for v in i.indices})
    require_inputs(cascade)
    return Op(cascade=with_constants(cascade, given), fixed_schedule=schedule, precision=precision)


@dataclass(eq=False, kw_only=True)
class Op:
    """A compiled cascade. Call it with tensors in the order of `in`, or by name.

    Args:
        cascade: what it computes.
        fixed_schedule: used for every call, or None for the default by rule.
        precision: see `compile`.
        wide: inputs that may be float32 whatever their axes: what a forward saves for its gradient.
    """

    cascade: Cascade
    fixed_schedule: Schedule | None = None
    precision: str | None = None
    wide: frozenset[str] = frozenset()
    _built: dict[object, Built] = field(default_factory=dict, repr=False)
    _last: Callable[[], Built] | None = field(default=None, repr=False)
    _derivation: Derivation | None = field(default=None, repr=False)
    _pairs: dict[tuple[str, ...], Pair] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.__name__ = self.cascade.name
        choices = f"{self.precision}\n{self.fixed_schedule.to_json() if self.fixed_schedule else ''}"
        run = partial(_run_hidden, self.cascade, self.precision, self.fixed_schedule)
        self._library = registered(self.cascade, choices=choices, run=run)
        pair = partial(_hidden_pair, self.cascade, self.precision, self.fixed_schedule)
        self._recording = library(self.cascade, choices=choices, pair=pair)

    def __call__(self, *tensors: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Compute the outputs, in the order of `out`: one tensor, or a tuple.

        Where gradients are recorded and a tensor requires one, the forward saves what the gradient needs.

        Raises: InputError: a tensor is missing, unknown, of a wrong rank, extent, dtype or device; LoweringError: a
            gradient is wanted of a construct that has none yet.
        """
        ordered = self._ordered(tensors, named)
        wrt = self._recorded(ordered)
        if torch.compiler.is_compiling():
            if wrt:
                found = self._recording(*ordered, ",".join(wrt))
                count = len(self.cascade.outputs)
                return found[0] if count == 1 else tuple(found[:count])
            result: torch.Tensor | tuple[torch.Tensor, ...] = self._library(*ordered)
            return result
        if wrt:
            return recorded(self._pair(wrt), ordered)
        outputs = self._run(ordered)
        return outputs[0] if len(outputs) == 1 else outputs

    def _recorded(self, ordered: list[torch.Tensor]) -> tuple[str, ...]:
        """The inputs whose gradient this call records."""
        if not torch.is_grad_enabled():
            return ()
        return tuple(
            i.tensor
            for i, t in zip(self.cascade.inputs, ordered, strict=True)
            if isinstance(t, torch.Tensor) and t.requires_grad
        )

    def _pair(self, wrt: tuple[str, ...]) -> Pair:
        """The ops behind calls that record gradients in some inputs."""
        if wrt not in self._pairs:
            reached = set(differentiable(self.cascade))
            gradient = differentiate(self.cascade, wrt=tuple(t for t in wrt if t in reached))
            given = frozenset(gradient.received.values()) | set(gradient.saved)

            def op(cascade: Cascade, wide: frozenset[str] = frozenset()) -> Op:
                return Op(cascade=cascade, precision=self.precision, wide=wide)

            self._pairs[wrt] = Pair(
                gradient=gradient, forward=op(gradient.forward), backward=op(gradient.backward, given)
            )
        return self._pairs[wrt]

    @property
    def derivation(self) -> Derivation:
        """How the cascade was rewritten, with the proofs."""
        if self._derivation is None:
            self._derivation = derive(self.cascade)
        return self._derivation

    @property
    def source(self) -> str:
        """The kernel text of the last call, else of the defaults: feature ranks of 64, bfloat16.

        After a call on CPU tensors: the text for the same extents and dtype on the GPU present, or cuda:90.
        """
        return self._shown().source

    @property
    def schedule(self) -> Schedule:
        """The schedule of the last call, else of the defaults."""
        return self._shown().schedule

    def kernel(
        self,
        *,
        extents: Mapping[str, int] | None = None,
        dtype: str = DEFAULT_DTYPE,
        target: str | None = None,
        schedule: Schedule | None = None,
    ) -> Kernel:
        """The kernel text for a dtype and a target, which need not be there.

        Args:
            extents: of feature ranks, by rank name; 64 where missing. Lengths do not enter a text.
            dtype: "float16", "bfloat16" or "float32".
            target: "cuda:80", "cuda:90", "cuda:100" or "hip:gfx942"; None: the device present, else cuda:90.
            schedule: choices to use instead of the op's.

        Raises: InputError, ScheduleError, TargetError, LoweringError.
        """
        where = gpu_target(target) if target is not None else present_target()
        if dtype not in KERNEL_DTYPES:
            raise _wrong(
                "wrong-dtype",
                f"kernels take no inputs of '{dtype}'",
                rule="inputs are " + ", ".join(KERNEL_DTYPES),
                hint=nearest(dtype, KERNEL_DTYPES),
            )
        built = build(
            self.cascade,
            extents=dict(extents or {}),
            dtype=dtype,
            target=where,
            schedule=schedule or self.fixed_schedule,
            precision=self._precision(),
        )
        return Kernel(built=built, target=where)

    def _shown(self) -> Built:
        return self._last() if self._last is not None else self.kernel().built

    def _text_for(self, extents: Mapping[str, int], dtype: str) -> Built:
        """The text that a GPU would run for a call on a CPU; float64 has none, so its extents alone count."""
        return self.kernel(extents=extents, dtype=dtype if dtype in KERNEL_DTYPES else DEFAULT_DTYPE).built

    def _precision(self) -> str:
        if self.precision is not None:
            return self.precision
        return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]

    # --- one call -----------------------------------------------------------------------------------------------

    def _ordered(self, tensors: tuple[torch.Tensor, ...], named: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        names = [i.tensor for i in self.cascade.inputs]
        signature = f"({', '.join(names)})"
        if len(tensors) > len(names):
            raise _wrong(
                "too-many-inputs", f"{len(tensors)} tensors for {len(names)} inputs", rule=f"the inputs are {signature}"
            )
        out: dict[str, torch.Tensor] = dict(zip(names, tensors, strict=False))
        for name, t in named.items():
            if name not in names:
                raise _wrong(
                    "unknown-input",
                    f"the cascade has no input '{name}'",
                    rule=f"the inputs are {signature}",
                    hint=nearest(name, names),
                )
            if name in out:
                raise _wrong(
                    "repeated-input", f"{name} is given by position and by name", rule=f"the inputs are {signature}"
                )
            out[name] = t
        missing = [n for n in names if n not in out]
        if missing:
            raise _wrong("missing-input", f"{', '.join(missing)} not given", rule=f"the inputs are {signature}")
        return [out[n] for n in names]

    def _run(self, ordered: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        inputs = {i.tensor: t for i, t in zip(self.cascade.inputs, ordered, strict=True)}
        self._check(inputs)
        binding = bind(self.cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
        device = ordered[0].device
        features = {r: binding.extents[r] for r in feature_ranks(self.cascade)}
        dtype = str(value_dtype(ordered)).removeprefix("torch.")
        key = (device.type, device.index, dtype, self._precision(), tuple(features.items()))
        built = self._built.get(key)
        if built is None:
            built = self._built[key] = self._build(device, dtype, features)
        if device.type == "cuda":
            self._last = lambda: built
            outputs = run_on_gpu(built, inputs, binding)
        else:
            self._last = partial(self._text_for, features, dtype)
            from einsumcascade.codegen.run_torch import run_on_cpu

            outputs = run_on_cpu(built, inputs, binding)
        # An output that is an input is a tensor of its own all the same.
        return tuple(
            outputs[o.tensor].to(getattr(torch, o.dtype or dtype), copy=True, memory_format=torch.contiguous_format)
            if o.tensor in inputs
            else outputs[o.tensor]
            for o in self.cascade.outputs
        )

    def _build(self, device: torch.device, dtype: str, features: Mapping[str, int]) -> Built:
        if device.type == "cuda":
            return build(
                self.cascade,
                extents=features,
                dtype=dtype,
                target=_target_of(device),
                schedule=self.fixed_schedule,
                precision=self._precision(),
            )
        from einsumcascade.codegen.run_torch import cpu_schedule

        form = self.fixed_schedule or Schedule()
        kernels = cpu_schedule(program_of(self.cascade, features, form), features).kernels
        return build(
            self.cascade,
            extents=features,
            dtype=dtype,
            target=gpu_target(DEFAULT_TARGET),
            schedule=replace(form, kernels=kernels),
        )

    def _check(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Types, devices and dtypes; ranks and extents are checked as they are bound."""
        for name, t in inputs.items():
            if not isinstance(t, torch.Tensor):
                raise _wrong(
                    "wrong-type", f"{name} is a {type(t).__name__}, not a torch.Tensor", rule="an op takes tensors"
                )
        index_only = selectors(self.cascade)
        first_name, first = next(iter(inputs.items()))
        if first.device.type not in ("cpu", "cuda"):
            raise _wrong("wrong-device", f"{first_name} is on {first.device}", rule="tensors are on a GPU or a CPU")
        for name, t in inputs.items():
            if t.device != first.device:
                raise _wrong(
                    "wrong-device",
                    f"{name} is on {t.device}, but {first_name} on {first.device}",
                    rule="all inputs are on one device",
                    hint=f"{name}.to({str(first.device)!r})",
                )
        whole = {getattr(torch, n) for n in WHOLE_DTYPES}
        values = {n: t for n, t in inputs.items() if n not in index_only or t.dtype not in whole}
        known = {getattr(torch, n) for n in KERNEL_DTYPES} | ({torch.float64} if first.device.type == "cpu" else set())
        for name, t in values.items():
            if t.dtype not in known:
                raise _wrong(
                    "wrong-dtype",
                    f"{name} is {t.dtype}",
                    rule="inputs are float16, bfloat16 or float32; float64 on a CPU only; a tensor that only "
                    "indexes or compares may hold whole numbers",
                )
        if not values:
            raise _wrong(
                "input-dtype",
                "no input holds floating-point numbers",
                rule="outputs have the dtype of the first input that does",
            )
        main_name, main = next(iter(values.items()))
        for name, t in values.items():
            if t.dtype != main.dtype and not (t.dtype == torch.float32 and (t.dim() < 2 or name in self.wide)):
                raise _wrong(
                    "wrong-dtype",
                    f"{name} is {t.dtype}, but {main_name} is {main.dtype}",
                    rule="inputs share the dtype of the first; one of fewer than two axes may be float32",
                    hint=f"{name}.to({main.dtype})",
                )


def _wrong(code: str, headline: str, *, rule: str = "", hint: str = "") -> InputError:
    return InputError(diagnostics=(Diagnostic(code=code, headline=headline, rule=rule, hint=hint),))


def _target_of(device: torch.device) -> GpuTarget:
    """The target of a GPU that is there: its own, or the newest of its kind that is not newer."""
    if torch.version.hip is not None:
        return gpu_target("hip:gfx942")
    major, minor = torch.cuda.get_device_capability(device)
    known = [t for t in TARGETS if t.backend == "cuda" and int(t.arch) <= major * 10 + minor]
    return max(known, key=lambda t: int(t.arch), default=gpu_target("cuda:80"))


def present_target() -> GpuTarget:
    """The target of the GPU that is there, else cuda:90."""
    return _target_of(torch.device("cuda")) if torch.cuda.is_available() else gpu_target(DEFAULT_TARGET)


# Ops that library calls run, apart from those that users hold: a traced call changes no `source`.
_HIDDEN: dict[tuple[Cascade, str | None, str], Op] = {}


def _run_hidden(
    cascade: Cascade, precision: str | None, schedule: Schedule | None, tensors: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Run a library call: gradients are the library's business."""
    with torch.no_grad():
        return _hidden(cascade, precision, schedule)._run(tensors)


def _hidden(cascade: Cascade, precision: str | None, schedule: Schedule | None) -> Op:
    key = (cascade, precision, schedule.to_json() if schedule else "")
    if key not in _HIDDEN:
        _HIDDEN[key] = Op(cascade=cascade, precision=precision, fixed_schedule=schedule)
    return _HIDDEN[key]


def _hidden_pair(cascade: Cascade, precision: str | None, schedule: Schedule | None, wrt: tuple[str, ...]) -> Pair:
    return _hidden(cascade, precision, schedule)._pair(wrt)
