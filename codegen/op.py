"""The op: a callable on tensors that PyTorch treats as its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch.autograd import forward_ad

from einsumcascade.analysis.targets import GpuTarget, gpu_target
from einsumcascade.codegen.arguments import cast_by_autocast, in_order, refuse_tangents, wants_gradient
from einsumcascade.codegen.autograd import Pair, library, reached, recorded
from einsumcascade.codegen.checks import PLAIN, check_kinds, check_tensors
from einsumcascade.codegen.defaults import build_call, call_form
from einsumcascade.codegen.dtypes import KERNEL_DTYPES
from einsumcascade.codegen.export import Exported, exported
from einsumcascade.codegen.kernel import Kernel
from einsumcascade.codegen.launch import Built, build, require_inputs
from einsumcascade.codegen.modules import Module
from einsumcascade.codegen.ops import registered
from einsumcascade.codegen.programs import with_constants
from einsumcascade.codegen.runner import Runner, allowed_precision, present_target
from einsumcascade.errors import InputError, LoweringError, ScheduleError, nearest
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.rewrites.derive import Derivation, derive
from einsumcascade.rewrites.differentiate import differentiable
from einsumcascade.schedules.autotune import GradientTuning, Tuning
from einsumcascade.schedules.calls import Form
from einsumcascade.schedules.parts import parts_of
from einsumcascade.schedules.schedule import PRECISIONS, Schedule

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
        schedule: choices for the kernels, those of the gradient too; None: those that `Op.tune` or `einsumcascade tune`
            found for such a call on this GPU, else by rule, from shapes and target.
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
        raise InputError.of(
            "wrong-type",
            f"a {type(cascade).__name__} cannot be compiled",
            rule="compile takes a cascade, the name of a gallery text, or the path of a file",
            hint="ec.compile(ec.parse(text))",
        )
    if precision is not None and precision not in PRECISIONS:
        raise ScheduleError.of(
            "unknown-precision",
            f"there is no precision '{precision}'",
            rule="precision is that of float32 products",
            hint=nearest(precision, PRECISIONS),
        )
    given = dict(constants or {})
    if given:
        bind(cascade, constants=given, extents={rank_of(v): 1 for i in cascade.inputs for v in i.indices})
    require_inputs(cascade)
    return Op(cascade=with_constants(cascade, given), fixed_schedule=schedule, precision=precision)


@dataclass(eq=False, kw_only=True)
class Op:
    """A compiled cascade. Call it with tensors in the order of `in`, or by name.

    It is differentiable in every input that a gradient reaches; copies and pickles are ops of the same cascade.

    Args:
        cascade: what it computes.
        fixed_schedule: used for every call, or None for the default by rule.
        precision: see `compile`.
    """

    cascade: Cascade
    fixed_schedule: Schedule | None = None
    precision: str | None = None
    _derivation: Derivation | None = field(default=None, repr=False)
    _pairs: dict[tuple[str, ...], Pair] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.__name__ = self.cascade.name
        self._names = [i.tensor for i in self.cascade.inputs]
        self._count = len(self._names)
        plain = parts_of(self.fixed_schedule, self.cascade.name).plain
        self._runner = Runner(cascade=self.cascade, schedule=plain, precision=self.precision)
        self._ran = self._runner
        self._library = registered(self.cascade, precision=self.precision, schedule=plain)
        text = self.fixed_schedule.to_json() if self.fixed_schedule is not None else ""
        self._recording = library(
            self.cascade,
            precision=self.precision,
            schedule=self.fixed_schedule,
            pair=partial(_hidden_pair, self.cascade, self.cascade.name, self.precision, text),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle what makes the op; what it has built is built anew, or found."""
        return _again, (self.cascade, self.fixed_schedule, self.precision)

    def __call__(self, *tensors: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Compute the outputs, in the order of `out`: one tensor, or a tuple.

        Where gradients are recorded and a tensor requires one, the forward saves what the gradient needs. In a region
        of `torch.autocast`, inputs of two or more axes are cast to its dtype.

        Raises: InputError: a tensor is missing, unknown, of a wrong kind, rank, extent, dtype or device;
            LoweringError: a gradient is wanted of a construct that has none yet.
        """
        ordered = in_order(self.cascade, tensors, named) if named or len(tensors) != self._count else tensors
        plain = True
        for t in ordered:
            if type(t) not in PLAIN:
                check_kinds(dict(zip(self._names, ordered, strict=True)))
                plain = False
        kind = ordered[0].device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            ordered = cast_by_autocast(ordered, torch.get_autocast_dtype(kind))
        if torch.compiler.is_compiling():
            return self._traced(ordered)
        if forward_ad._current_level >= 0:
            refuse_tangents(self.cascade, ordered)
        if torch._C._are_functorch_transforms_active():
            return self._transformed(ordered)
        if not plain or torch._C._len_torch_dispatch_stack():
            return self._traced(ordered)
        # Kernels read memory as it lies, where a tensor that is negated when it is read has the other sign.
        if any(t.is_neg() for t in ordered):
            ordered = [t.resolve_neg() for t in ordered]
        if torch.is_grad_enabled():
            for t in ordered:
                if t.requires_grad:
                    return self._record(ordered)
        self._ran = self._runner
        outputs = self._runner(ordered)
        return outputs[0] if len(outputs) == 1 else outputs

    def _record(self, ordered: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Call in eager mode and record the gradient."""
        pair = self._pair(self._wrt([t.requires_grad for t in ordered]))
        self._ran = pair.forward
        return recorded(pair, ordered)

    def _traced(self, ordered: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Call the library op: what a tracer, an exporter or a dispatch mode is to see."""
        wrt = self._wrt([t.requires_grad for t in ordered]) if torch.is_grad_enabled() else ()
        if wrt:
            found = self._recording(*ordered, ",".join(wrt))
            count = len(self.cascade.outputs)
            return found[0] if count == 1 else tuple(found[:count])
        result: torch.Tensor | tuple[torch.Tensor, ...] = self._library(*ordered)
        return result

    def _transformed(self, ordered: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Call under transforms of torch.func; a gradient may be wanted at any level of them."""
        wrt = self._wrt([wants_gradient(t) for t in ordered]) if torch.is_grad_enabled() else ()
        if wrt:
            return recorded(self._pair(wrt), ordered)
        result: torch.Tensor | tuple[torch.Tensor, ...] = self._library(*ordered)
        return result

    def _wrt(self, wanted: list[bool]) -> tuple[str, ...]:
        return tuple([n for n, yes in zip(self._names, wanted, strict=True) if yes])

    def _pair(self, wrt: tuple[str, ...]) -> Pair:
        """What is behind calls that record gradients in some inputs."""
        if wrt not in self._pairs:
            self._pairs[wrt] = Pair.of(self.cascade, wrt, self.precision, self.fixed_schedule)
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
        gradient: bool = False,
    ) -> Kernel:
        """The kernel text for a dtype and a target, which need not be there.

        Args:
            extents: of feature ranks, by rank name; 64 where missing. Lengths do not enter a text; where all are given
                and no schedule is, the text has the form that a call of these extents takes.
            dtype: "float16", "bfloat16" or "float32".
            target: "cuda:80", "cuda:90", "cuda:100" or "hip:gfx942"; None: the device present, else cuda:90.
            schedule: choices to use instead of the op's.
            gradient: the kernels of the backward, for gradients in all inputs that have one.

        Raises: InputError, ScheduleError, TargetError; LoweringError: a construct has no lowering, or no gradient, yet.
        """
        return self._text(
            extents=dict(extents or {}),
            dtype=dtype,
            target=target,
            schedule=schedule,
            gradient=gradient,
            by_lengths=True,
        )

    def _text(
        self,
        *,
        extents: dict[str, int],
        dtype: str,
        target: str | None,
        schedule: Schedule | None = None,
        gradient: bool = False,
        by_lengths: bool = False,
    ) -> Kernel:
        """The kernel text; `by_lengths`: of the form that a call of these extents takes."""
        where = gpu_target(target) if target is not None else present_target()
        if dtype not in KERNEL_DTYPES:
            raise InputError.of(
                "wrong-dtype",
                f"kernels take no inputs of '{dtype}'",
                rule="inputs are " + ", ".join(KERNEL_DTYPES),
                hint=nearest(dtype, KERNEL_DTYPES),
            )
        if gradient:
            pair = Pair.of(self.cascade, reached(self.cascade), self.precision, schedule or self.fixed_schedule)
            runner = pair.backward
        else:
            plain = parts_of(schedule or self.fixed_schedule, self.cascade.name).plain
            runner = Runner(cascade=self.cascade, schedule=plain)
        if by_lengths and not gradient and runner.schedule is None:
            form = call_form(self.cascade, extents, dtype, where)
            if form != Form():
                precision = self.precision or allowed_precision()
                options: dict[str, Any] = {"dtype": dtype, "target": where, "precision": precision}
                return Kernel(built=build_call(self.cascade, form=form, extents=extents, **options), target=where)
        return self._kernel(runner, extents=extents, dtype=dtype, target=where)

    def _kernel(self, runner: Runner, *, extents: dict[str, int], dtype: str, target: GpuTarget) -> Kernel:
        built = build(
            runner.cascade,
            extents=extents,
            dtype=dtype,
            target=target,
            schedule=runner.schedule,
            precision=self.precision or allowed_precision(),
        )
        return Kernel(built=built, target=target)

    @overload
    def tune(self, *tensors: torch.Tensor, gradient: Literal[False] = False, **options: Any) -> Tuning: ...
    @overload
    def tune(self, *tensors: torch.Tensor, gradient: Literal[True], **options: Any) -> GradientTuning: ...
    def tune(self, *tensors: torch.Tensor, gradient: bool = False, **options: Any) -> Tuning | GradientTuning:
        """Find the fastest schedule for calls on tensors like these; later calls of any such op use it.

        Args:
            tensors: as a call takes them. Where they are on a CPU and a GPU is there, it is that GPU's tuning.
            gradient: tune what a call runs that records a gradient, the forward that saves and the backward: for the
                gradient in those tensors that require one, or in all that have one if none does.
            options: `candidates`, `budget_s`, `jobs`, `keep`, `progress`, as `einsumcascade.tune` takes them.

        Returns: what became of each candidate.
        Raises: InputError: as a call; LoweringError: a gradient is wanted of a construct that has none yet.
        Cost: at most about `budget_s` seconds, 90 unless told; twice that for a gradient.
        """
        inputs = dict(zip(self._names, in_order(self.cascade, tensors, {}), strict=True))
        check_tensors(self.cascade, inputs, frozenset())
        # The face of the package comes after this layer, and is there whenever this is.
        tuning: Tuning | GradientTuning = sys.modules["einsumcascade"].tune(
            self.cascade, inputs=inputs, precision=self.precision, gradient=gradient, **options
        )
        return tuning

    def module(self, **held: torch.Tensor) -> Module:
        """A torch.nn.Module that holds some of the inputs; its `forward` takes the others.

        Args:
            held: by name: a torch.nn.Parameter is trained, a plain tensor becomes a buffer.

        Raises: InputError: a name is no input, or one that every module has.

        >>> layer = compile("sink").module(SINK=torch.nn.Parameter(torch.zeros(4)))
        >>> list(layer.state_dict())
        ['SINK']
        """
        return Module(self, held)

    def export(
        self,
        path: str | Path | None = None,
        *,
        extents: Mapping[str, int] | None = None,
        dtype: str = DEFAULT_DTYPE,
        target: str | None = None,
    ) -> str:
        """Write the op as one file that needs torch and triton only, kernels, launches and gradient.

        The file holds for the extents of feature ranks that it is made for and for all lengths; its header has the
        cascades, the versions and the choices. It defines a function by the name of the cascade.

        Args:
            path: of the file; None writes none.
            extents, dtype, target: see `kernel`.

        Returns: the text of the file.
        Raises: InputError, ScheduleError, TargetError; LoweringError: a construct has no lowering yet; where only the
            gradient has none, the file says so when one is wanted; OSError: the file cannot be written.
        """
        text = exported(self._parts(dict(extents or {}), dtype, target))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _parts(self, extents: dict[str, int], dtype: str, target: str | None) -> Exported:
        import triton

        options: dict[str, Any] = {"extents": extents, "dtype": dtype, "target": target}
        versions = {
            # The face of the package comes after this layer, and is there whenever this is.
            "einsumcascade": sys.modules["einsumcascade"].__version__,
            "torch": torch.__version__.split("+")[0],
            "triton": str(triton.__version__),
        }
        plain = self._text(**options)
        options["target"] = plain.target
        wrt = differentiable(self.cascade)
        made: dict[str, Any] = {"original": self.cascade, "versions": versions}
        try:
            if wrt:
                pair = self._pair(wrt)
                forward, backward = (self._kernel(r, **options).built for r in (pair.forward, pair.backward))
                return Exported(**made, gradient=pair.gradient, forward=forward, backward=backward)
        except LoweringError as error:
            made["missing"] = error.diagnostics[0].headline
        return Exported(**made, gradient=None, forward=plain.built, backward=None)

    def _shown(self) -> Built:
        return self._ran.last() if self._ran.last is not None else self.kernel().built


def _again(cascade: Cascade, schedule: Schedule | None, precision: str | None) -> Op:
    return Op(cascade=cascade, fixed_schedule=schedule, precision=precision)


@lru_cache(maxsize=256)
def _hidden_pair(cascade: Cascade, name: str, precision: str | None, schedule: str, wrt: tuple[str, ...]) -> Pair:
    """The pair that library calls use, apart from those that users hold: a traced call changes no `source`."""
    assert name == cascade.name
    return Pair.of(cascade, wrt, precision, Schedule.from_json(schedule) if schedule else None)
