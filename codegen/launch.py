"""From a cascade to launchable kernels: build the text once, then hand it tensors."""

from __future__ import annotations

import contextvars
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.dtypes import DTYPE_BYTES, output_dtype, value_dtype
from einsumcascade.codegen.emit_triton import KernelText, emit, module
from einsumcascade.codegen.kernel_ir import TileKernel
from einsumcascade.codegen.memory import stride_name
from einsumcascade.codegen.names import extent_name, safe
from einsumcascade.codegen.pieces import cut
from einsumcascade.codegen.place import lower
from einsumcascade.codegen.programs import program_of, text_binding, with_extents
from einsumcascade.codegen.tables import tables_of
from einsumcascade.errors import EinsumCascadeWarning, LoweringError, ScheduleError
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.schedules.program import Program, identifier
from einsumcascade.schedules.schedule import SCATTERS, SUMS, Schedule, check_schedule
from einsumcascade.schedules.usual import usual_schedule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Kernels of a cascade for given feature extents and dtype.

    Args:
        cascade: as written, constants put in.
        program, schedule, kernels, texts: the stages, kernel by kernel.
        source: one importable text.
        dtype: of the inputs, by name. extents, target, precision: as asked for.
        digest: of the source and the schedule.
    """

    cascade: Cascade
    program: Program
    schedule: Schedule
    kernels: tuple[TileKernel, ...]
    texts: tuple[KernelText, ...]
    source: str
    dtype: str
    extents: Mapping[str, int]
    target: GpuTarget
    precision: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One launch: kernel, grid, and its arguments by name; a tensor's argument is the name of the tensor."""

    kernel: str
    programs: int
    tensors: Mapping[str, str]
    scalars: Mapping[str, int]
    constexprs: Mapping[str, int]
    warps: int
    stages: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Scalars and compile-time values by parameter."""
        return {**self.scalars, **self.constexprs}


def require_inputs(cascade: Cascade) -> None:
    """Refuse a cascade without inputs: the tensors of a call decide its device and its dtype."""
    if not cascade.inputs:
        raise LoweringError.of(
            "not-lowered-yet",
            "a cascade without inputs has no lowering yet",
            rule="the tensors of a call decide its device and its dtype",
            hint="reference, analysis and derivation work all the same",
        )


def build(
    cascade: Cascade,
    *,
    extents: Mapping[str, int],
    dtype: str,
    target: GpuTarget,
    schedule: Schedule | None = None,
    precision: str = "ieee",
    tile_limit: int | None = None,
) -> Built:
    """Build the kernels of a cascade.

    Args:
        cascade: checked; constants already put in.
        extents: by rank name; feature ranks that are missing count 64. Lengths do not enter the text; the extent of a
            rank that the text defines replaces its definition.
        dtype: of the inputs. target: what the default schedule is for.
        schedule: choices to use instead; a kernel that they do not name gets the default ones.
        precision: of float32 products: "ieee", "tf32x3" or "tf32".
        tile_limit: largest tile of the default schedule, for runs that are interpreted.

    Returns: the kernels and their text; the same arguments give the same text.
    Raises: ScheduleError: the schedule does not fit. LoweringError: a construct has no lowering yet.
    Cost: 0.1 to 2 s, mostly proofs; cached.
    """
    require_inputs(cascade)
    cascade = with_extents(cascade, extents)
    binding = text_binding(cascade, extents)
    form = schedule or Schedule()
    if form.reference == "bound" and dtype != "bfloat16":
        raise ScheduleError.of(
            "schedule-illegal",
            f"a bound in place of a running maximum is not for {dtype} inputs",
            rule="weights far below 1 underflow in float16, and exponents far below 0 cost float32 its digits",
            hint="bfloat16 inputs, or the running maximum",
        )
    if form.sums == SUMS[1] and form.scatter != SCATTERS[0]:
        raise ScheduleError.of(
            "schedule-illegal",
            "sums that are accumulated have no fixed order",
            rule="programs add to them as they come",
            hint=f"sums {SUMS[0]}, or a scatter in {SCATTERS[0]}",
        )
    program = program_of(cascade, extents, form)
    if any(k.name not in form.kernels for k in program.kernels):
        sizes = program_binding(program, binding)
        chosen = usual_schedule(
            program, extents=sizes.extents, dtype_bytes=DTYPE_BYTES[dtype], target=target, precision=precision
        )
        kernels_of = dict(chosen.kernels)
        if tile_limit is not None:
            kernels_of = {
                n: replace(k, tiles={v: min(t, tile_limit) for v, t in k.tiles.items()}) for n, k in kernels_of.items()
            }
        form = replace(form, kernels={**kernels_of, **form.kernels})
    schedule = form
    binding = program_binding(program, binding)
    check_schedule(program, schedule)
    exact = dtype == "float32" and precision == "ieee"
    kernels = tuple(lower(k, program, schedule.kernels[k.name], binding, exact=exact) for k in program.kernels)
    coarse = target.backend == "cuda" and DTYPE_BYTES[dtype] == 2
    texts = tuple(emit(cut(k), precision=precision, coarse=coarse) for k in kernels)
    title = f"{identifier(cascade.name)}: generated from the cascade below."
    source = module(texts, title=title, cascade=str(cascade), target=target)
    digest = hashlib.sha256((source + schedule.to_json()).encode()).hexdigest()[:16]
    return Built(
        cascade=cascade,
        program=program,
        schedule=schedule,
        kernels=kernels,
        texts=texts,
        source=source,
        dtype=dtype,
        extents=dict(extents),
        target=target,
        precision=precision,
        digest=digest,
    )


def program_binding(program: Program, binding: Binding) -> Binding:
    """The binding of a cascade with the ranks that a split adds to it: their numbers of parts, and their lengths."""
    for d in program.cascade.ranks:
        if rank_of(d.name) not in binding.extents:
            size = {rank_of(d.name): int(binding.value(d.expr))}
            binding = Binding(extents={**binding.extents, **size}, constants=binding.constants)
    return binding


def plan(
    built: Built, tensors: Mapping[str, torch.Tensor], binding: Binding, *, multiprocessors: int = 1
) -> list[Call]:
    """The launches of a call, in order.

    Args:
        built: the kernels. tensors: inputs, buffers and outputs by name. binding: extents of the call.
        multiprocessors: of the device, which decides how many programs walk over the grid of a persistent kernel.
    """
    calls = []
    binding = program_binding(built.program, binding)
    for kernel, text in zip(built.kernels, built.texts, strict=True):
        tiles = 1
        for v in kernel.batch:
            tiles *= binding.extents[rank_of(v)]
        for v in kernel.tiles:
            tiles *= -(-binding.extents[rank_of(v)] // kernel.axes[v].size)
        scalars: dict[str, int] = {}
        for t, n in text.strides:
            scalars[stride_name(t, kernel.tensors[t][n])] = tensors[t].stride(n)
        for r in text.lengths:
            scalars[extent_name(r, text.tensors)] = binding.extents[r]
        calls.append(
            Call(
                kernel=text.name,
                programs=kernel.programs(tiles, multiprocessors),
                tensors={safe(t): t for t in text.tensors},
                scalars=scalars,
                constexprs=text.constexprs,
                warps=kernel.schedule.warps,
                stages=kernel.schedule.stages,
            )
        )
    return calls


def allocate(
    built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding, *, poison: bool = False
) -> dict[str, torch.Tensor]:
    """Inputs and tables of them beside fresh buffers and outputs, uninitialised, or NaN where `poison`."""
    import torch

    binding = program_binding(built.program, binding)
    device, default = next(iter(inputs.values())).device, value_dtype(inputs.values())
    out = dict(inputs)
    declared = {o.tensor: output_dtype(o, default) for o in built.cascade.outputs}
    wide = torch.float64 if default == torch.float64 else torch.float32
    for kernel in built.kernels:
        for t in kernel.outputs:
            shape = [binding.extents[rank_of(v)] for v in kernel.tensors[t]]
            if t in kernel.scattered:
                out[t] = torch.zeros(shape, dtype=wide, device=device)
                continue
            new = torch.empty(shape, dtype=declared.get(t, wide), device=device)
            out[t] = new.fill_(float("nan")) if poison else new
        out |= tables_of(kernel, inputs)
    return out


def finished(
    built: Built, inputs: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The outputs by name; what programs added up in float32 is rounded now."""
    main = value_dtype(inputs.values())
    return {
        o.tensor: tensors[o.tensor] if o.tensor in inputs else tensors[o.tensor].to(output_dtype(o, main))
        for o in built.cascade.outputs
    }


def fitting(built: Built, tensors: Mapping[str, torch.Tensor]) -> Built:
    """The kernels themselves, or those with pointers where a tensor's layout is not one that descriptors take.

    A descriptor wants its last axis contiguous, its other strides and its address multiples of 16 bytes.
    """
    for text, kernel in zip(built.texts, built.kernels, strict=True):
        for name in text.descriptors:
            t = tensors[name]
            aligned = t.data_ptr() % 16 == 0 and all(n * t.element_size() % 16 == 0 for n in t.stride()[:-1])
            if t.stride(-1) == 1 and aligned:
                continue
            warnings.warn(
                f"[descriptor-layout] {kernel.name} loads {name} by pointers: strides {tuple(t.stride())} of "
                f"{t.element_size()}-byte elements are not multiples of 16 bytes with a contiguous last axis",
                EinsumCascadeWarning,
                stacklevel=4,
            )
            return _with_pointers(built)
    return built


def _with_pointers(built: Built) -> Built:
    kernels = {n: replace(k, descriptors=False) for n, k in built.schedule.kernels.items()}
    schedule = replace(built.schedule, kernels=kernels)
    return build(
        built.cascade,
        extents=built.extents,
        dtype=built.dtype,
        target=built.target,
        schedule=schedule,
        precision=built.precision,
    )


def multiprocessors_of(device: torch.device) -> int:
    """The multiprocessors of a GPU; 1 of a device that has none."""
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def run_on_gpu(
    built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding, *, multiprocessors: int | None = None
) -> dict[str, torch.Tensor]:
    """Launch every kernel on the device of the inputs; returns the outputs by name.

    Args:
        multiprocessors: what programs that walk over a grid are counted by, the device's own unless given. With 1 they
            walk over small inputs as others do over large ones, so that small ones say whether they are right.

    Cost: the kernels, and some 10 us of Python a launch.
    """
    import torch
    import triton

    from einsumcascade.codegen.build import load_module

    tensors = allocate(built, inputs, binding)
    built = fitting(built, tensors)
    text = load_module(built.source)
    device = next(iter(inputs.values())).device

    def launch() -> None:
        if any(t.descriptors for t in built.texts):
            # Descriptors made on the device live in memory that the host provides; set for these launches alone.
            triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        for call in plan(built, tensors, binding, multiprocessors=multiprocessors or multiprocessors_of(device)):
            if call.programs:
                arguments = {p: tensors[t] for p, t in call.tensors.items()}
                getattr(text, call.kernel)[(call.programs,)](
                    **arguments, **call.arguments, num_warps=call.warps, num_stages=call.stages, enable_fp_fusion=True
                )

    with torch.cuda.device(device):
        contextvars.copy_context().run(launch)
    return finished(built, inputs, tensors)


def run_interpreted(
    built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding, **options: Any
) -> dict[str, torch.Tensor]:
    """Run the kernels' text on a CPU in Triton's interpreter; outputs start as NaN, so that a gap shows."""
    from einsumcascade.codegen.interpreter import Launch, TensorRef, run_interpreted

    tensors = allocate(built, inputs, binding, poison=True)
    built = fitting(built, tensors)
    if any(".atomic_add([" in t.text for t in built.texts):
        # The interpreter has no addition by descriptors.
        built = _with_pointers(built)
    launches = [
        Launch(
            kernel=c.kernel,
            grid=(c.programs,),
            num_warps=c.warps,
            num_stages=c.stages,
            arguments={**{p: TensorRef(t) for p, t in c.tensors.items()}, **c.arguments},
        )
        for c in plan(built, tensors, binding)
        if c.programs
    ]
    done = run_interpreted(built.source, launches, tensors, **options)
    return finished(built, inputs, done)
