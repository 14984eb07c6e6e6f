"""The default schedule of a call: that of the rule, which float32 inputs share with 16-bit ones on a matrix unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.schedules.heuristic import default_schedule
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from einsumcascade.schedules.shared_memory import shared_memory

# Operands of a product of float32 numbers have as many registers again; cut in two they have that twice.
HALVINGS = {"tf32": 0, "tf32x3": 1}
LEAST_TILE = 16


def usual_schedule(
    program: Program, *, extents: Mapping[str, int], dtype_bytes: int, target: GpuTarget, precision: str = "ieee"
) -> Schedule:
    """Choose tiles, warps and stages for every kernel: see `default_schedule`.

    Args:
        precision: of float32 products. Exact ones use no matrix unit and have small tiles; others have those of 16-bit
            inputs, with as few elements in a step as shared memory asks for.
    """
    if dtype_bytes < 4 or not target.product_flops_per_clock(element=dtype_bytes, precision=precision):
        return default_schedule(program, extents=extents, dtype_bytes=dtype_bytes, target=target)
    chosen = default_schedule(program, extents=extents, dtype_bytes=dtype_bytes // 2, target=target)
    kernels = {
        k.name: _fitted(program, k, chosen.kernels[k.name], extents, dtype_bytes, target, precision)
        for k in program.kernels
    }
    return replace(chosen, kernels=kernels)


def _fitted(
    program: Program,
    k: Kernel,
    own: KernelSchedule,
    extents: Mapping[str, int],
    dtype_bytes: int,
    target: GpuTarget,
    precision: str,
) -> KernelSchedule:
    for _ in range(HALVINGS[precision]):
        own = _halved(k, own) or own

    def is_large(s: KernelSchedule) -> bool:
        options = {"extents": extents, "dtype_bytes": dtype_bytes, "target": target, "precision": precision}
        return shared_memory(program, k, s, **options).predicted > target.shared_memory_bytes  # type: ignore[arg-type]

    while is_large(own):
        smaller = _halved(k, own) or (replace(own, stages=own.stages - 1) if own.stages > 1 else None)
        if smaller is None:
            break
        own = smaller
    return own


def _halved(k: Kernel, own: KernelSchedule) -> KernelSchedule | None:
    """Half of the tile of the loop; of the grid, where that is as small as it may be."""
    loop = [v for v in k.loops[-1:] if own.tiles.get(v, 0) > LEAST_TILE]
    rest = [v for v, n in own.tiles.items() if n > LEAST_TILE and v not in k.loops]
    chosen = loop or sorted(rest, key=lambda v: -own.tiles[v])
    if not chosen:
        return None
    return replace(own, tiles={v: n // 2 if v == chosen[0] else n for v, n in own.tiles.items()})
