"""Targets as data: the limits and rates of the GPUs that kernels are compiled for.

A target is a record, not a device: every one can be compiled for on a machine that has no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from einsumcascade.errors import Diagnostic, TargetError, nearest

Backend = Literal["cuda", "hip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTarget:
    """A GPU as a schedule sees it: what a kernel may use, and how fast each pipe is.

    Args:
        name: `cuda:90`, `hip:gfx942`; the key of the table.
        backend: the code generator of Triton, `cuda` or `hip`.
        arch: compute capability times ten, or the name of the AMD architecture.
        warp_size: threads that execute together.
        shared_memory_bytes: the most that one block may ask for.
        registers_per_thread: the most that one thread may hold, 32 bits each.
        registers_per_multiprocessor: shared by the threads that are resident together.
        has_descriptors: tensor descriptors become hardware copies (TMA).
        has_asynchronous_dot: a product is issued by a group of four warps and awaited later (WGMMA, tcgen05).
        multiprocessors: of the representative device of this architecture.
        clock_ghz: its boost clock.
        bandwidth_gb_s: its device memory, 1e9 bytes a second.
        tensor_flops_per_clock: bf16 products with float32 sums, per multiprocessor, two operations a product.
        fp32_per_clock: float32 additions, products or fused pairs, per multiprocessor.
        special_per_clock: exponentials, reciprocals and the like, per multiprocessor.
    """

    name: str
    backend: Backend
    arch: int | str
    warp_size: int
    shared_memory_bytes: int
    registers_per_thread: int
    registers_per_multiprocessor: int
    has_descriptors: bool
    has_asynchronous_dot: bool
    multiprocessors: int
    clock_ghz: float
    bandwidth_gb_s: float
    tensor_flops_per_clock: int
    fp32_per_clock: int
    special_per_clock: int


def _cuda(
    *,
    arch: int,
    shared_memory_kib: int,
    has_descriptors: bool,
    multiprocessors: int,
    clock_ghz: float,
    bandwidth_gb_s: float,
    tensor_flops_per_clock: int,
    fp32_per_clock: int,
) -> GpuTarget:
    """Build an NVIDIA target; the descriptor unit and the asynchronous product came together."""
    return GpuTarget(
        name=f"cuda:{arch}",
        backend="cuda",
        arch=arch,
        warp_size=32,
        shared_memory_bytes=shared_memory_kib * 1024,
        registers_per_thread=255,
        registers_per_multiprocessor=65536,
        has_descriptors=has_descriptors,
        has_asynchronous_dot=has_descriptors,
        multiprocessors=multiprocessors,
        clock_ghz=clock_ghz,
        bandwidth_gb_s=bandwidth_gb_s,
        tensor_flops_per_clock=tensor_flops_per_clock,
        fp32_per_clock=fp32_per_clock,
        special_per_clock=16,
    )


TARGETS: Final[tuple[GpuTarget, ...]] = (
    # A100 80 GB.
    _cuda(
        arch=80,
        shared_memory_kib=163,
        has_descriptors=False,
        multiprocessors=108,
        clock_ghz=1.41,
        bandwidth_gb_s=2039.0,
        tensor_flops_per_clock=2048,
        fp32_per_clock=64,
    ),
    # H200.
    _cuda(
        arch=90,
        shared_memory_kib=227,
        has_descriptors=True,
        multiprocessors=132,
        clock_ghz=1.83,
        bandwidth_gb_s=4800.0,
        tensor_flops_per_clock=4096,
        fp32_per_clock=128,
    ),
    # B200.
    _cuda(
        arch=100,
        shared_memory_kib=227,
        has_descriptors=True,
        multiprocessors=148,
        clock_ghz=1.85,
        bandwidth_gb_s=8000.0,
        tensor_flops_per_clock=8192,
        fp32_per_clock=128,
    ),
    # MI300X.
    GpuTarget(
        name="hip:gfx942",
        backend="hip",
        arch="gfx942",
        warp_size=64,
        shared_memory_bytes=64 * 1024,
        registers_per_thread=512,
        registers_per_multiprocessor=131072,
        has_descriptors=False,
        has_asynchronous_dot=False,
        multiprocessors=304,
        clock_ghz=2.1,
        bandwidth_gb_s=5300.0,
        tensor_flops_per_clock=2048,
        fp32_per_clock=128,
        special_per_clock=16,
    ),
)


def gpu_target(name: str) -> GpuTarget:
    """Return the target called `name`.

    Args:
        name: one of `cuda:80`, `cuda:90`, `cuda:100`, `hip:gfx942`.

    Raises:
        TargetError: `unknown-target`; the message names the nearest target, or all of them.

    >>> gpu_target("cuda:90").has_descriptors
    True
    >>> gpu_target("cuda:80").shared_memory_bytes
    166912
    """
    for target in TARGETS:
        if target.name == name:
            return target
    known = tuple(target.name for target in TARGETS)
    raise TargetError(
        (
            Diagnostic(
                code="unknown-target",
                headline=f"there is no target '{name}', only {', '.join(known)}",
                rule="a target is named by the backend of Triton and the architecture, as in cuda:90",
                hint=nearest(name, known),
            ),
        )
    )
