"""The search space: which schedules a program may have on a target, decided before anything is compiled.

A choice is left out for three reasons only: it changes nothing (stages without a loop, orders of equal programs, one
loop where no tile or every tile is tested, persistent programs of one tile each), a tile would hold more padding than
data, or the target cannot run it, because a block asks for more shared memory than there is or a value has more
elements than Triton takes. Registers and spills are no reason: compiling tells them, and a small spill may be fast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import rank_of
from einsumcascade.schedules.demands import Work, work_of
from einsumcascade.schedules.frame import Frame, frame_of
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import contraction, grid_tiles, held, padded
from einsumcascade.schedules.schedule import HEADS_INSIDE, ORDERS, KernelSchedule, Schedule
from einsumcascade.schedules.shared_memory import Block, SharedMemory
from einsumcascade.schedules.timing import estimated_blocks
from einsumcascade.schedules.usual import usual_schedule

TILES = (16, 32, 64, 128, 256)
STAGES = (1, 2, 3, 4)
# Of kernels with products of tiles, and of those without.
WARPS = (4, 8)
FEW_WARPS = (1, 2, 4, 8)
# The most elements of a value in Triton.
MOST_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What may be chosen for each kernel of a program.

    Args:
        program: the kernels, of the form that `form` asks for.
        form: the choices that decide which kernels there are: reference, split, pack, scatter.
        kernels: choices by kernel, the default first, then in a fixed order.
    """

    program: Program
    form: Schedule
    kernels: Mapping[str, tuple[KernelSchedule, ...]]

    @property
    def default(self) -> Schedule:
        """The schedule that a call has without tuning."""
        return replace(self.form, kernels={n: ks[0] for n, ks in self.kernels.items()})

    @property
    def size(self) -> int:
        """The number of combinations."""
        return math.prod(map(len, self.kernels.values()))

    def of(self, kernel: str) -> tuple[Schedule, ...]:
        """Every choice for one kernel, the others at their default."""
        default = self.default
        return tuple(replace(default, kernels={**default.kernels, kernel: k}) for k in self.kernels[kernel])

    def combined(self, ranked: Mapping[str, Sequence[Schedule]]) -> Iterator[Schedule]:
        """Combine the rankings of kernels: the best of each, then the second of each; a short ranking begins again."""
        for n in range(max(map(len, ranked.values()), default=0)):
            yield replace(self.form, kernels={name: own[n % len(own)].kernels[name] for name, own in ranked.items()})


def search_space(
    program: Program,
    *,
    extents: Mapping[str, int],
    dtype_bytes: int,
    target: GpuTarget,
    form: Schedule | None = None,
    precision: str = "ieee",
) -> Space:
    """List what may be chosen for each kernel.

    Args:
        program: of the form that `form` asks for.
        extents: of all ranks of the inputs.
        dtype_bytes: of an input element.
        target: its shared memory decides what fits.
        form: reference, split, pack and scatter; choices for kernels that it names are the default ones.
        precision: of float32 products.

    Returns: the space, the same at every call. Every schedule of it is legal.
    Raises: InputError: an extent is missing or unknown.
    Cost: some ms a kernel, and one derivation.
    """
    binding = bind(program.cascade, extents=extents)
    default = usual_schedule(
        program, extents=binding.extents, dtype_bytes=dtype_bytes, target=target, precision=precision
    )
    told = form.kernels if form is not None else {}
    kernels = {}
    for k in program.kernels:
        own = told.get(k.name, default.kernels[k.name])
        others = _choices(program, k, own, binding, dtype_bytes, target, precision)
        kernels[k.name] = (own, *(c for c in others if c != own))
    return Space(program=program, form=replace(form or Schedule(), kernels={}), kernels=kernels)


def fits(
    program: Program,
    kernel: Kernel,
    schedule: KernelSchedule,
    *,
    extents: Mapping[str, int],
    dtype_bytes: int,
    target: GpuTarget,
    precision: str = "ieee",
) -> bool:
    """Whether a target may run a kernel: nothing that fits is refused, and little that does not is let through."""
    block = Block(program, kernel, extents=extents, dtype_bytes=dtype_bytes, target=target, precision=precision)
    return _fits(program, kernel, schedule, extents, block.memory(schedule), target)


def _fits(
    program: Program,
    kernel: Kernel,
    schedule: KernelSchedule,
    extents: Mapping[str, int],
    asked: SharedMemory,
    target: GpuTarget,
) -> bool:
    return (
        asked.certain <= target.shared_memory_bytes and _elements(program, kernel, schedule, extents) <= MOST_ELEMENTS
    )


def _choices(
    program: Program,
    k: Kernel,
    default: KernelSchedule,
    binding: Binding,
    dtype_bytes: int,
    target: GpuTarget,
    precision: str,
) -> Iterator[KernelSchedule]:
    is_exact = not target.product_flops_per_clock(element=dtype_bytes, precision=precision)
    sizes = {v: _tiles(v, n, binding, is_exact=is_exact) for v, n in default.tiles.items()}
    multiplies = _multiplies(program, k, default, binding)
    stages = STAGES if k.loops and multiplies else (default.stages,)
    wide = any(len(i.indices) > 1 for i in k.cascade.inputs)
    loads = (False, True) if target.has_descriptors and wide else (False,)
    dtype = "float32" if dtype_bytes == 4 else "bfloat16"
    block = Block(program, k, extents=binding.extents, dtype_bytes=dtype_bytes, target=target, precision=precision)
    for tiles in itertools.product(*sizes.values()):
        size = dict(zip(sizes, tiles, strict=True))
        ways: _Ways | None = None
        for warps in WARPS if multiplies else FEW_WARPS:
            for n, descriptors in itertools.product(stages, loads):
                found = KernelSchedule(tiles=size, warps=warps, stages=n, descriptors=descriptors)
                asked = block.memory(found)
                if _fits(program, k, found, binding.extents, asked, target):
                    ways = ways or _ways(program, k, found, default.order, binding, dtype, precision)
                    yield from ways.of(found, target, asked.least)


def _tiles(variable: str, default: int, binding: Binding, *, is_exact: bool) -> tuple[int, ...]:
    """Sizes of a tile: none of more padding than data, and one at a time where the rule walks one by one."""
    if default == 1:
        return (1,)
    most = min(padded(binding.extent(variable)), TILES[-1] // (2 if is_exact else 1))
    return tuple(n for n in TILES if n <= most)


def _multiplies(program: Program, k: Kernel, schedule: KernelSchedule, binding: Binding) -> bool:
    """Whether a kernel has a product of two tiles."""
    axes = (*schedule.tiles, *program.bounded)
    return any(contraction(e, axes, axes) is not None for e in k.cascade.einsums)


def _elements(program: Program, k: Kernel, schedule: KernelSchedule, extents: Mapping[str, int]) -> int:
    """Elements of the largest value that a kernel computes."""
    sizes = {v: held(extents.get(rank_of(v), 64)) for v in program.bounded} | dict(schedule.tiles)
    return max((math.prod(sizes.get(v, 1) for v in e.free) for e in k.cascade.einsums), default=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ways:
    """How the programs of given tiles may be walked.

    Args:
        orders: in which they may begin: one, unless later tiles are longer.
        loops: whether each loop may test every tile: not unless some are tested and some need no test.
        work: what a program asks for. programs: with one tile of the grid each.
    """

    orders: tuple[str, ...]
    loops: tuple[bool, ...]
    work: Work
    programs: int

    def of(self, schedule: KernelSchedule, target: GpuTarget, shared_memory_bytes: int) -> Iterator[KernelSchedule]:
        """The choice in each of these ways, and persistent ones where there is more than one wave."""
        blocks = estimated_blocks(self.work, schedule, target, shared_memory_bytes=shared_memory_bytes)
        many = (0, blocks) if 0 < target.multiprocessors * blocks < self.programs else (0,)
        for persistent, one_loop, order in itertools.product(many, self.loops, self.orders):
            yield replace(schedule, order=order, one_loop=one_loop, persistent=persistent)


def _ways(
    program: Program, k: Kernel, schedule: KernelSchedule, order: str, binding: Binding, dtype: str, precision: str
) -> _Ways:
    frame = frame_of(program, k, schedule, binding)
    orders: tuple[str, ...] = (order,)
    if k.loops and grid_tiles(k) and frame.later_are_longer:
        orders = ORDERS if frame.batch else tuple(o for o in ORDERS if o != HEADS_INSIDE)
    return _Ways(
        orders=orders,
        loops=(False, True) if _is_mixed(frame) else (False,),
        work=work_of(program, frame, dtype=dtype, precision=precision),
        programs=math.prod(map(frame.programs, frame.residents)),
    )


def _is_mixed(frame: Frame) -> bool:
    """Whether some tiles of its loops are tested and some need no test."""
    full = tested = False
    for corner in itertools.islice(frame.corners(), 4096):
        for loop in frame.loops:
            steps, own = frame.steps(loop, corner), frame.full(loop, corner)
            full, tested = full or own > 0, tested or steps > own
        if full and tested:
            return True
    return False
