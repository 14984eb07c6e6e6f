"""A default schedule by rule, from the shapes of a kernel's tiles and the limits of the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.errors import LoweringError
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import rank_of, variables
from einsumcascade.schedules.frame import frame_of
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import contraction, grid_tiles, held, products, tile_axes
from einsumcascade.schedules.schedule import ORDERS, KernelSchedule, Schedule, tiled_variables

# Elements of a 3-D temporary that a thread can hold in registers without spilling.
ELEMENTS_A_THREAD = 128
# Of a program of 128 rows: with half as many, scores and accumulators of 128 columns spill in the hot loop.
THREADS = 256
# Rows of a product that a warp holds, and the warps that multiply together.
WARP_ROWS = 16
LEAST_WARPS = 4
# Heads up to this width take the tiles of a head of 128.
WIDE = 128
# Elements of keys and values that one step streams; beyond it accumulators of 512 columns spill in the hot loop.
STREAMED = 24 * 1024
# A length at which a mask shows its shape: the text that a rule chooses serves every length.
LENGTH = 1 << 14


def default_schedule(program: Program, *, extents: Mapping[str, int], dtype_bytes: int, target: GpuTarget) -> Schedule:
    """Choose tiles, warps and stages for every kernel by rule.

    Args:
        program: the kernels.
        extents: of the bounded ranks at least, by rank name.
        dtype_bytes: bytes of an input element: 4 keeps tiles small, since exact float32 products use no tensor core.
        target: its shared memory bounds tiles times stages.

    Returns: a schedule that `check_schedule` accepts.
    """
    chosen = {k.name: _kernel(program, k, extents, dtype_bytes, target) for k in program.kernels}
    binding = _long(program, extents)
    orders = {k.name: _order(program, k, chosen[k.name], binding) for k in program.kernels}
    return Schedule(kernels={n: replace(k, order=orders[n]) for n, k in chosen.items()})


def _long(program: Program, extents: Mapping[str, int]) -> Binding:
    """Extents of a long call."""
    bounded = {rank_of(v) for v in program.bounded}
    named = {rank_of(v) for i in program.cascade.inputs for v in i.indices}
    return bind(program.cascade, extents={r: extents.get(r, 64) if r in bounded else LENGTH for r in named})


def _order(program: Program, k: Kernel, schedule: KernelSchedule, binding: Binding) -> str:
    """The longest programs first, so that none is left to begin late; the tiles of one head after the other.

    Heads inside each tile would balance as well or better, but then as many heads as there are programs are streamed
    together, each for few tiles: their keys leave the L2 cache between two tiles of a head.
    """
    if not k.loops or not grid_tiles(k):
        return ORDERS[0]
    try:
        return ORDERS[1] if frame_of(program, k, schedule, binding).later_are_longer else ORDERS[0]
    except LoweringError:
        # What the lowering cannot take, or moves to another form first, it says itself.
        return ORDERS[0]


def _kernel(
    program: Program, k: Kernel, extents: Mapping[str, int], dtype_bytes: int, target: GpuTarget
) -> KernelSchedule:
    tiled = tiled_variables(program, k.name)
    grid = grid_tiles(k)
    bounded = {v: held(extents.get(rank_of(v), 64)) for v in program.bounded}
    features = {v: n for v, n in bounded.items() if any(v in e.space for e in k.cascade.einsums)}
    widest = max(features.values(), default=1)
    if dtype_bytes >= 4:
        sizes = dict.fromkeys(tiled, 32 if widest <= 64 else 16)
    else:
        sizes = {v: (128 if v in grid else 64) for v in tiled}
        if len(grid) > 1:
            sizes = {v: (128 if v == grid[0] else 64) for v in tiled}
    if k.loops and k.loops[-1] in sizes and (_carries_three(program, k) or _is_better_alone(k)):
        sizes[k.loops[-1]] = 1
    # What a step adds up in memory stands in registers beside the sums that the kernel keeps.
    if dtype_bytes < 4 and 2 * widest > WIDE and any(set(k.loops[-1:]) & set(axes) for axes in k.scattered.values()):
        sizes = {v: max(min(n, 64), n // 2) for v, n in sizes.items()}
    looped, own = set(k.loops[-1:]), {d.name for d in k.cascade.ranks}
    # Keys and values, or as many rows of features as the loop reads.
    streamed = _widths(k, looped, bounded)
    width = sum(streamed) if len(streamed) > 1 else max(*streamed, 2 * widest, 0)
    resident = sum(_widths(k, set(grid), bounded))
    if widest > WIDE:
        sizes = _narrowed(k, sizes, features, width)
        room = target.shared_memory_bytes // dtype_bytes
        while resident * _rows(sizes, grid) + width * _columns(sizes, grid) > room and _rows(sizes, grid) > 16:
            sizes = {v: n // 2 if n == _rows(sizes, grid) and v in grid else n for v, n in sizes.items()}
    warps = 4 if dtype_bytes >= 4 and widest <= 64 else THREADS // target.warp_size
    if not grid and dtype_bytes < 4:
        # Warps beyond the rows of a product hold, and compute, its operands again.
        while warps > LEAST_WARPS and warps * WARP_ROWS > widest:
            warps //= 2
    cube = _cube(program, k, extents, sizes)
    while cube > ELEMENTS_A_THREAD * target.warp_size * warps:
        largest = max(sizes.values(), default=1)
        if largest <= 16 and warps < 8:
            warps *= 2
            continue
        if largest <= 16:
            walked = k.loops[-1] if k.loops else ""
            if sizes.get(walked, 1) <= 2 or products(k, grid):
                break
            sizes[walked] //= 2
            cube = _cube(program, k, extents, sizes)
            continue
        sizes = {v: (n // 2 if n == largest else n) for v, n in sizes.items()}
        cube = _cube(program, k, extents, sizes)
    # With a third stage of pointer loads ptxas awaits each asynchronous product before it issues the next.
    stages = 2 if dtype_bytes >= 4 or target.has_asynchronous_dot else 3
    # A user's own loop streams tiles of a rank that the text defines.
    steps = [n for v, n in sizes.items() if v not in grid]
    steps += [n for v, n in features.items() if v in own and k.loops]
    stage = width * dtype_bytes * max(steps, default=0)
    # Beside narrow heads a second block finds room; wide ones take all registers, so all of the memory too.
    share = target.shared_memory_bytes // 2
    if widest > WIDE and dtype_bytes < 4:
        share = target.shared_memory_bytes - resident * _rows(sizes, grid) * dtype_bytes
    while stages > 1 and stages * stage > share:
        stages -= 1
    return KernelSchedule(tiles=sizes, warps=warps, stages=stages)


def _widths(k: Kernel, variables: set[str], features: Mapping[str, int]) -> list[int]:
    """Features of a row of each input that has some of the variables."""
    rows = [[features[v] for v in i.indices if v in features] for i in k.cascade.inputs if variables & set(i.indices)]
    return [math.prod(row) for row in rows if row]


def _rows(sizes: Mapping[str, int], grid: tuple[str, ...]) -> int:
    return max((n for v, n in sizes.items() if v in grid), default=1)


def _columns(sizes: Mapping[str, int], grid: tuple[str, ...]) -> int:
    return max((n for v, n in sizes.items() if v not in grid), default=1)


def _narrowed(k: Kernel, sizes: Mapping[str, int], features: Mapping[str, int], width: int) -> dict[str, int]:
    """Smaller tiles for wide heads: accumulators and streamed rows that registers and shared memory hold."""
    kept = max((n for v, n in features.items() if any(v in e.free and e.reduce for e in k.cascade.einsums)), default=0)
    halvings = 2 if kept > 4 * WIDE else 1 if kept > WIDE else 0
    out = {}
    for v, n in sizes.items():
        if v in k.residents:
            out[v] = max(min(n, 16), n >> halvings)
        else:
            out[v] = n
            while out[v] > 16 and out[v] * max(width, 2 * kept) > STREAMED:
                out[v] //= 2
    return out


def _carries_three(program: Program, k: Kernel) -> bool:
    """Whether a computed tile would have the looped axis and two more: then it is walked one by one."""
    axes = {*grid_tiles(k), *k.loops[-1:], *program.bounded}
    outputs = set(k.cascade.output_names)
    return any(
        k.loops[-1] in e.free and len(axes & set(e.free)) > 2 and e.tensor not in outputs for e in k.cascade.einsums
    )


def _is_better_alone(k: Kernel) -> bool:
    """Whether the looped axis is a third one of some sum and of no product: its elements are walked one by one.

    What is summed has two axes then, and may be a product itself. Not where a condition has the axis: it bounds a loop
    over tiles, but is tested in each step of one by one.
    """
    tiled, v = grid_tiles(k), k.loops[-1]
    axes = set(tile_axes(k, tiled))
    inside = [e for e in k.cascade.einsums if v in e.space]
    if any(v in variables(c) for c in (*k.cascade.constraints, *(c for e in inside for c in e.where))):
        return False
    if {e.tensor for e in inside} & products(k, tiled) or any(v in e.free for e in inside):
        return False
    return any(v in e.ranks and len(axes & set(e.space)) > 2 for e in inside)


def _cube(program: Program, k: Kernel, extents: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Elements of the largest temporary of three axes that a reduction of this kernel needs."""
    axes = tuple(v for v in (*sizes, *program.bounded) if sizes.get(v) != 1)
    worst = 0
    for e in k.cascade.einsums:
        space = [v for v in e.space if v in axes]
        own = replace(e, ranks=tuple(v for v in e.ranks if v in axes))
        if len(space) < 3 or e.reduce is None or contraction(own, space, axes) is not None:
            continue
        n = 1
        for v in space:
            n *= sizes.get(v, held(extents.get(rank_of(v), 64)))
        worst = max(worst, n)
    return worst
