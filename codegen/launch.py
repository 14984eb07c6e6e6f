"""From a cascade to launchable kernels: build the text once, then hand it tensors."""

from __future__ import annotations

import contextvars
import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from einsumcascade.analysis.counts import index_tensors
from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.emit_triton import KernelText, emit, module
from einsumcascade.codegen.kernel_ir import TileKernel
from einsumcascade.codegen.names import extent_name, safe
from einsumcascade.codegen.pieces import cut
from einsumcascade.codegen.place import lower
from einsumcascade.codegen.tables import tables_of
from einsumcascade.errors import Diagnostic, EinsumCascadeWarning, LoweringError, ScheduleError, nearest
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade, Definition, Num, Output, Scalar, rank_of, variable_of
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.distribute import distribute
from einsumcascade.rewrites.shifted import recompute_shifted
from einsumcascade.rewrites.split_form import features_last, split_form
from einsumcascade.rewrites.unroll import unroll
from einsumcascade.schedules.heuristic import default_schedule
from einsumcascade.schedules.pack import pack_program
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.program import Program, bounded_variables, identifier
from einsumcascade.schedules.schedule import SCATTERS, SUMS, Schedule, check_schedule

if TYPE_CHECKING:
    import torch

# A length in the text of a kernel: longer than any rank that a tile holds whole.
LENGTH = 1 << 20
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Those that kernels take; float64 is for tensors on a CPU.
KERNEL_DTYPES = ("float16", "bfloat16", "float32")
# What a tensor that only indexes, compares or counts may hold besides.
WHOLE_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64")


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


def with_constants(cascade: Cascade, constants: Mapping[str, float]) -> Cascade:
    """Put values in place of declared constants, so that facts such as signs are those of the values."""
    if not constants:
        return cascade
    return replace(
        cascade,
        constants=tuple(
            Definition(name=c.name, expr=Num(value=constants[c.name]), span=c.span) if c.name in constants else c
            for c in cascade.constants
        ),
    )


def with_extents(cascade: Cascade, extents: Mapping[str, int]) -> Cascade:
    """Put extents in place of the definitions of the ranks that they name."""
    return replace(
        cascade,
        ranks=tuple(
            Definition(name=d.name, expr=Num(value=extents[rank_of(d.name)]), span=d.span)
            if rank_of(d.name) in extents
            else d
            for d in cascade.ranks
        ),
    )


def value_dtype(inputs: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype of a computation: that of the first input that holds real numbers, float32 if none does."""
    import torch

    return next((t.dtype for t in inputs if t.is_floating_point()), torch.float32)


def output_dtype(output: Output, main: torch.dtype) -> torch.dtype:
    """The dtype of an output of a computation in dtype `main`."""
    import torch

    if output.dtype is None or (output.is_saved and main == torch.float64):
        return main
    named: torch.dtype = getattr(torch, output.dtype)
    return named


def selectors(cascade: Cascade) -> frozenset[str]:
    """Inputs that stand only in index expressions and conditions, so may hold whole numbers."""
    return frozenset(index_tensors(cascade))


def text_binding(cascade: Cascade, extents: Mapping[str, int]) -> Binding:
    """Bind what may enter a text: extents of feature ranks, 64 where nothing says; every length counts as unbounded.

    Raises: InputError: an extent names no rank of the cascade, or is not a whole number >= 0.
    """
    features = feature_ranks(cascade)
    named = [rank_of(v) for i in cascade.inputs for v in i.indices]
    told = {rank_of(d.name): int(d.expr.value) for d in cascade.ranks if isinstance(d.expr, Num)}
    given = {r: extents.get(r, told.get(r, 64)) if r in features else LENGTH for r in named}
    return bind(cascade, extents={**{r: n for r, n in extents.items() if r not in given}, **given})


@lru_cache(maxsize=256)
def feature_ranks(cascade: Cascade) -> tuple[str, ...]:
    """Ranks whose extent a text may fix, by the layout of the inputs: see `bounded_variables`."""
    return tuple(
        rank_of(v)
        for v in bounded_variables(cascade, {rank_of(v): 1 for i in cascade.inputs for v in i.indices})
        if cascade_has(cascade, v)
    )


def cascade_has(cascade: Cascade, v: str) -> bool:
    """Whether an input has a rank variable."""
    return any(v in i.indices for i in cascade.inputs)


def require_inputs(cascade: Cascade) -> None:
    """Refuse a cascade without inputs: the tensors of a call decide its device and its dtype."""
    if not cascade.inputs:
        raise LoweringError(
            diagnostics=(
                Diagnostic(
                    code="not-lowered-yet",
                    headline="a cascade without inputs has no lowering yet",
                    rule="the tensors of a call decide its device and its dtype",
                    hint="reference, analysis and derivation work all the same",
                ),
            )
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
        raise ScheduleError(
            diagnostics=(
                Diagnostic(
                    code="schedule-illegal",
                    headline=f"a bound in place of a running maximum is not for {dtype} inputs",
                    rule="weights far below 1 underflow in float16, and exponents far below 0 cost float32 its digits",
                    hint="bfloat16 inputs, or the running maximum",
                ),
            )
        )
    if form.sums == SUMS[1] and form.scatter != SCATTERS[0]:
        raise ScheduleError(
            diagnostics=(
                Diagnostic(
                    code="schedule-illegal",
                    headline="sums that are accumulated have no fixed order",
                    rule="programs add to them as they come",
                    hint=f"sums {SUMS[0]}, or a scatter in {SCATTERS[0]}",
                ),
            )
        )
    program = program_of(cascade, extents, form)
    if any(k.name not in form.kernels for k in program.kernels):
        sizes = program_binding(program, binding)
        chosen = default_schedule(program, extents=sizes.extents, dtype_bytes=DTYPE_BYTES[dtype], target=target)
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


def program_of(cascade: Cascade, extents: Mapping[str, int], form: Schedule | None = None) -> Program:
    """The kernels of a cascade, of the form that a schedule asks for; cached by the extents that matter."""
    form = form or Schedule()
    known = {v for e in cascade.einsums for v in e.ranks}
    for v in form.split:
        if v not in known:
            raise ScheduleError(
                diagnostics=(
                    Diagnostic(
                        code="schedule-illegal",
                        headline=f"the schedule splits '{v}', which no Einsum reduces",
                        rule="split names variables of ranks that are reduced",
                        hint=nearest(v, sorted(known)),
                    ),
                )
            )
    sizes = tuple(sorted(text_binding(cascade, extents).extents.items()))
    options = (form.reference, tuple(form.split.items()), form.scatter, form.sums)
    program = _program(cascade, cascade.name, sizes, *options)
    return pack_program(program, form.pack)


def program_binding(program: Program, binding: Binding) -> Binding:
    """The binding of a cascade with the ranks that a split adds to it: their numbers of parts, and their lengths."""
    for d in program.cascade.ranks:
        if rank_of(d.name) not in binding.extents:
            size = {rank_of(d.name): int(binding.value(d.expr))}
            binding = Binding(extents={**binding.extents, **size}, constants=binding.constants)
    return binding


@lru_cache(maxsize=256)
def _program(
    cascade: Cascade,
    name: str,
    extents: tuple[tuple[str, int], ...],
    reference: str,
    split: tuple[tuple[str, int], ...],
    scatter: str,
    sums: str,
) -> Program:
    # Cascades are equal whatever they are called, but their kernels are not: the name is part of the key.
    assert name == cascade.name
    # An output that is an input needs no kernel.
    given = {i.tensor for i in cascade.inputs}
    written = tuple(o for o in cascade.outputs if o.tensor not in given)
    bound = dict(extents) if reference == "bound" else None
    whole = bounded_variables(cascade, dict(extents))
    simple = simplify(replace(cascade, outputs=written), bound=bound, whole=whole).cascade
    simple = unroll(simple, extents=dict(extents)).cascade
    for v, parts in split:
        simple = split_form(simple, variable=v, parts=parts).cascade
    if split:
        # Programs that write and read states of parts walk their features in one run.
        simple = features_last(simple, whole)
    bounded = bounded_variables(simple, dict(extents))
    simple = distribute(simple, bounded=bounded).cascade
    known = {d.name for d in simple.ranks}
    simple = recompute_shifted(simple, kept=lambda e: bool(set(e.ranks) - set(bounded))).cascade
    # A rank of its own that a definition written again walks is bounded where that of its size is.
    own = {d.name: d.expr for d in simple.ranks if d.name not in known}
    bounded += tuple(v for v, size in own.items() if isinstance(size, Scalar) and variable_of(size.name) in bounded)
    return partition(simple, bounded=bounded, scatters=scatter == SCATTERS[0], accumulates=sums == SUMS[1])


def plan(
    built: Built, tensors: Mapping[str, torch.Tensor], binding: Binding, *, multiprocessors: int = 1
) -> list[Call]:
    """The launches of a call, in order.

    Args:
        tensors: inputs, buffers and outputs by name. binding: extents of the call.
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
            scalars[f"stride_{t}_{kernel.tensors[t][n]}"] = tensors[t].stride(n)
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
