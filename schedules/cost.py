"""What a schedule costs: bytes, operations, programs and bounds in time of each kernel, without running one.

The traffic is that of the loads and stores of all programs. Caches are not modelled: `bounds_us` has the time of memory
if each element moves once, `uncached_us` that of every load and store; memory takes a time between the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from einsumcascade.analysis.counts import (
    CLASSES,
    CONTRACTION,
    FUNCTION,
    INDEX_DTYPE,
    KINDS,
    SPECIAL,
    dtype_bytes,
    element_bytes,
    index_tensors,
    operations_of,
)
from einsumcascade.analysis.dependence import conditions
from einsumcascade.analysis.points import count_points, with_numbers
from einsumcascade.analysis.roofline import DTYPES, MEMORY, pipe_rates, pipe_work
from einsumcascade.analysis.targets import GpuTarget, gpu_target
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Init,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    variables,
)
from einsumcascade.schedules.frame import Corner, Frame, Loop, frame_of
from einsumcascade.schedules.heuristic import default_schedule
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import MINIMUM_DOT, contraction
from einsumcascade.schedules.schedule import Schedule, check_schedule

BUFFER_DTYPE = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCost:
    """A tensor as one kernel reads or writes it.

    Args:
        tensor: its name.
        is_written: stored, not loaded.
        elements: of the whole tensor.
        moved: elements loaded or stored by all programs together.
        element_bytes: bytes of an element.
    """

    tensor: str
    is_written: bool
    elements: int
    moved: int
    element_bytes: int

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "tensor": self.tensor,
            "is_written": self.is_written,
            "elements": self.elements,
            "moved": self.moved,
            "element_bytes": self.element_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCost:
    """One kernel under its schedule.

    Args:
        name: of the kernel.
        programs: on the grid.
        waves: programs that a multiprocessor runs one after the other, if it holds one at a time.
        steps: of all loops of all programs.
        tensors: traffic, loads first.
        operations: by class, with `contraction` a part of `multiply_add`; tiles count whole, tails too.
        bounds_us: least time of memory and of each pipe, in microseconds.
        uncached_us: time of the bandwidth if no load is served by a cache.
    """

    name: str
    programs: int
    waves: int
    steps: int
    tensors: tuple[TensorCost, ...]
    operations: Mapping[str, int] = field(hash=False)
    bounds_us: Mapping[str, float] = field(hash=False)
    uncached_us: float

    @property
    def read_bytes(self) -> int:
        """Bytes that all loads of all programs ask for."""
        return sum(t.moved * t.element_bytes for t in self.tensors if not t.is_written)

    @property
    def written_bytes(self) -> int:
        """Bytes that all stores write."""
        return sum(t.moved * t.element_bytes for t in self.tensors if t.is_written)

    @property
    def binding(self) -> str:
        """What takes longest: `memory`, `tensor`, `fp32` or `special`."""
        return max(self.bounds_us, key=lambda k: self.bounds_us[k])

    @property
    def bound_us(self) -> float:
        """The largest bound."""
        return max(self.bounds_us.values())

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "programs": self.programs,
            "waves": self.waves,
            "steps": self.steps,
            "tensors": [t.to_dict() for t in self.tensors],
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "operations": dict(self.operations),
            "bounds_us": dict(self.bounds_us),
            "uncached_us": self.uncached_us,
            "binding": self.binding,
        }

    def __str__(self) -> str:
        times = ", ".join(f"{k} {t:.4g}" for k, t in self.bounds_us.items())
        lines = [
            f"{self.name}: {self.programs:,} programs in {self.waves:,} wave{'s' * (self.waves != 1)}, "
            f"{self.steps:,} steps",
            f"  at least {self.bound_us:.4g} us, bound by {self.binding} ({times}; uncached {self.uncached_us:.4g})",
        ]
        for t in self.tensors:
            verb = "stores" if t.is_written else "loads"
            again = f", {t.moved / t.elements:.4g} times each" if t.elements and t.moved != t.elements else ""
            lines.append(f"  {verb} {t.tensor}: {t.moved * t.element_bytes:,} bytes{again}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleCost:
    """Every kernel of a program under a schedule.

    Args:
        kernels: in order.
        target: its name. dtype: of the inputs. extents: of all ranks.
    """

    kernels: tuple[KernelCost, ...]
    target: str
    dtype: str
    extents: Mapping[str, int] = field(hash=False)

    @property
    def bytes(self) -> int:
        """Bytes that all loads and stores move, the buffers between kernels among them."""
        return sum(k.read_bytes + k.written_bytes for k in self.kernels)

    @property
    def bound_us(self) -> float:
        """The least time: kernels run one after the other."""
        return sum(k.bound_us for k in self.kernels)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "target": self.target,
            "dtype": self.dtype,
            "extents": dict(self.extents),
            "bytes": self.bytes,
            "bound_us": self.bound_us,
            "kernels": [k.to_dict() for k in self.kernels],
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.kernels))


def cost(
    program: Program,
    schedule: Schedule,
    *,
    extents: Mapping[str, int],
    dtype: str = "bfloat16",
    target: str | GpuTarget = "cuda:90",
) -> ScheduleCost:
    """Cost the kernels of a program under a schedule.

    Definitions T7 to T11 of docs/analysis.md say what is counted: loads (T7), steps of loops (T8), stores (T9),
    operations (T10) and the bounds made of them (T11).

    Args:
        program: the kernels.
        schedule: tiles for each of them; one without kernels gets the default choices.
        extents: numbers by rank, upper case.
        dtype: of the inputs: float16, bfloat16 or float32.
        target: a target or its name.

    Raises:
        ScheduleError: the schedule does not fit the program.
        InputError: `unknown-dtype`; or an extent is missing, unknown or no whole number.
        TargetError: `unknown-target`.

    Cost: linear in Einsums and in the tiles of constrained residents; the proofs of the loop form are cached.

    >>> from einsumcascade.gallery import load
    >>> from einsumcascade.schedules.partition import partition
    >>> from einsumcascade.schedules.schedule import KernelSchedule
    >>> program = partition(load("softmax_2p"), bounded=("e", "f"))
    >>> tiles = Schedule(kernels={"softmax_2p": KernelSchedule(tiles={"p": 128, "m": 64})})
    >>> extents = {"B": 1, "H": 16, "P": 1024, "M": 4096, "E": 64, "F": 64}
    >>> (found,) = cost(program, tiles, extents=extents).kernels
    >>> found.programs, found.steps, found.binding
    (128, 8192, 'special')
    """
    dtype_bytes(dtype, known=DTYPES)
    device = gpu_target(target) if isinstance(target, str) else target
    binding = bind(program.cascade, extents=extents)
    if not schedule.kernels:
        schedule = default_schedule(program, extents=binding.extents, dtype_bytes=dtype_bytes(dtype), target=device)
    check_schedule(program, schedule)
    frames = {k.name: frame_of(program, k, schedule.kernels[k.name], binding) for k in program.kernels}
    return ScheduleCost(
        kernels=tuple(kernel_cost(program, k, frames[k.name], dtype=dtype, device=device) for k in program.kernels),
        target=device.name,
        dtype=dtype,
        extents=dict(binding.extents),
    )


def kernel_cost(program: Program, kernel: Kernel, frame: Frame, *, dtype: str, device: GpuTarget) -> KernelCost:
    """Cost one kernel of a program, brought to the form that is lowered."""
    tensors = tuple(_tensors(program, kernel, frame, dtype))
    once, each = _operations(frame, None), [_operations(frame, loop) for loop in frame.loops]
    # How many programs there are of each kind, and the operations of one.
    kinds: list[tuple[int, dict[str, int]]] = []
    steps = 0
    for corner in frame.corners():
        turns = [frame.steps(loop, corner) for loop in frame.loops]
        programs = corner.programs * corner.alike
        steps += programs * sum(turns)
        kinds.append((programs, {c: once[c] + sum(n * x[c] for n, x in zip(turns, each, strict=True)) for c in once}))
    programs = sum(n for n, _ in kinds)
    waves = -(-programs // device.multiprocessors)
    bytes_us = device.bandwidth_gb_s * 1e3
    bounds = {MEMORY: sum(min(t.elements, t.moved) * t.element_bytes for t in tensors) / bytes_us}
    work = [(n, pipe_work(operations, dtype=dtype)) for n, operations in kinds if n]
    for pipe, rate in pipe_rates(device).items():
        share = sum(n * w[pipe] for n, w in work) / device.multiprocessors
        least, most = min((w[pipe] for _, w in work), default=0), max((w[pipe] for _, w in work), default=0)
        bounds[pipe] = max(share, most, waves * least) / rate
    return KernelCost(
        name=kernel.name,
        programs=programs,
        waves=waves,
        steps=steps,
        tensors=tensors,
        operations={c: sum(n * operations[c] for n, operations in kinds) for c in once},
        bounds_us=bounds,
        uncached_us=sum(t.moved * t.element_bytes for t in tensors) / bytes_us,
    )


def statements(frame: Frame, loop: Loop | None) -> tuple[Einsum | Init, ...]:
    """The statements of a loop, or those outside all loops."""
    body = frame.cascade.body if loop is None else loop.block.body
    return tuple(s for s in body if isinstance(s, Einsum | Init))


# --- traffic ----------------------------------------------------------------------------------------------------------


def _tensors(program: Program, kernel: Kernel, frame: Frame, dtype: str) -> Iterator[TensorCost]:
    positions = index_tensors(program.cascade)
    shape = {i.tensor: i.indices for i in frame.cascade.inputs}
    dtypes = {o.tensor: o.dtype or dtype for o in kernel.cascade.outputs}
    outside: dict[Read, None] = {}
    moved = dict.fromkeys(shape, 0)
    stored = dict.fromkeys(dtypes, 0)
    axes: dict[str, tuple[str, ...]] = {}
    for loop in (None, *frame.loops):
        inside: dict[Read, None] = {}
        for s in statements(frame, loop):
            for r in loaded(frame.cascade, s):
                (inside if loop is not None and moves(frame.cascade, r, loop) else outside)[r] = None
            if isinstance(s, Einsum) and s.tensor in dtypes:
                axes[s.tensor] = kernel.scattered.get(s.tensor, s.free)
                place = Read(tensor=s.tensor, indices=s.indices)
                stored[s.tensor] = _elements(frame, place, axes[s.tensor], loop)
        for r in inside:
            moved[r.tensor] += _elements(frame, r, shape[r.tensor], loop)
    for r in outside:
        moved[r.tensor] += _elements(frame, r, shape[r.tensor], None)
    for t, n in moved.items():
        own = BUFFER_DTYPE if t in program.buffers else INDEX_DTYPE if t in positions else dtype
        yield _tensor(frame, t, shape[t], n, own, is_written=False)
    for t, n in stored.items():
        yield _tensor(frame, t, axes[t], n, dtypes[t], is_written=True)


def _tensor(frame: Frame, tensor: str, axes: Sequence[str], moved: int, dtype: str, *, is_written: bool) -> TensorCost:
    return TensorCost(
        tensor=tensor,
        is_written=is_written,
        elements=math.prod(frame.binding.extent(v) for v in axes),
        moved=moved,
        element_bytes=element_bytes(dtype),
    )


def loaded(cascade: Cascade, s: Einsum | Init) -> Iterator[Read]:
    """The reads of inputs that a statement makes; a map leaves its conditions to what reads it."""
    tests = conditions(cascade, s) if isinstance(s, Einsum) and (s.ranks or s.tensor in cascade.output_names) else ()
    for r in reads(s.expr, *tests):
        if cascade.input(r.tensor) is not None:
            yield r


def moves(cascade: Cascade, read: Read, loop: Loop) -> bool:
    """Whether an address is another in each step of a loop: by its index, or by a computed position."""
    inside = reads(*read.indices)
    return loop.block.var in variables(*read.indices) or any(cascade.input(r.tensor) is None for r in inside)


def _elements(frame: Frame, access: Read, axes: Sequence[str], loop: Loop | None) -> int:
    """Elements within the tensor that all programs load or store at one place of the text."""
    at = [frame.placed(i) for i in access.indices]
    mine = variables(*at)
    plain = [v for i, v in zip(at, axes, strict=True) if i == Var(name=v)]
    within = [
        with_numbers(c, frame.binding)
        for i, v in zip(at, axes, strict=True)
        if i != Var(name=v) and not reads(i)
        for c in (apply("ge", i, Num(value=0)), apply("lt", i, Scalar(name=rank_of(v))))
    ]
    total = 0
    for corner in frame.corners() if loop is not None and loop.bounding else (Corner(ranges={}, programs=1),):
        times = math.prod(frame.programs(v) for v in frame.residents if v not in mine and v not in corner.ranges)
        times *= corner.alike
        if loop is not None:
            # What only outer loops change is loaded before the inner one begins.
            waits = set(mine) & set(loop.outer) and loop.walked[-1] not in mine and not reads(*access.indices)
            times *= frame.steps(loop, corner, without=(*mine, loop.walked[-1]) if waits else mine)
        walked = frame.runs(loop, corner) if loop is not None and loop.walked[-1] in mine else (None,)
        for run in walked:
            ranges = {v: frame.span(v, corner, loop, tail=v not in plain, run=run) for v in mine}
            found = count_points(ranges, within)
            # Conditions whose points cannot be counted cull nothing.
            total += times * (found if found is not None else math.prod(hi - lo for lo, hi in ranges.values()))
    return total


# --- operations -------------------------------------------------------------------------------------------------------


def _operations(frame: Frame, loop: Loop | None) -> dict[str, int]:
    """Operations of a program outside loops, or of one step of a loop."""
    out = dict.fromkeys(KINDS, 0)
    for s in statements(frame, loop):
        found = operations_of(s)
        for kind in (*CLASSES, FUNCTION, SPECIAL):
            out[kind] += found.of(kind).at(frame.sizes)
        if isinstance(s, Einsum):
            product = contraction(s, frame.axes, frame.axes)
            if product is not None and frame.sizes[rank_of(product.over)] >= MINIMUM_DOT:
                out[CONTRACTION] += math.prod(frame.sizes[rank_of(v)] for v in s.space)
    return out
