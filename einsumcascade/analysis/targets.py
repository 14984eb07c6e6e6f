"""Targets as data: the limits and rates of the GPUs that kernels are compiled for.

A target is a record, not a device: every one can be compiled for on a machine that has no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from einsumcascade.errors import TargetError, nearest

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
        tf32_flops_per_clock: the same of float32 operands that are rounded to tf32.
        fp32_per_clock: float32 additions, products or fused pairs, per multiprocessor.
        special_per_clock: exponentials, reciprocals and the like, per multiprocessor.
        alu_per_clock: comparisons, maxima, selections, whole numbers and conversions, per multiprocessor.
        shuffle_per_clock: numbers handed from thread to thread of a warp, per multiprocessor.
        issued_per_clock: instructions of a warp that the schedulers of a multiprocessor issue; for AMD vector ones,
            since scalars and accesses are issued beside them.
        special_turns: those that a special function keeps from other instructions: 1 where it has a unit of its own.
        shared_bytes_per_clock: between shared memory and the rest of a multiprocessor.
        l2_bytes_per_clock: read from the second-level cache, all multiprocessors together.
        shared_memory_per_multiprocessor: for the blocks that are resident together, in bytes.
        shared_memory_reserved: bytes of it that each block takes for the system.
        warps_per_multiprocessor, blocks_per_multiprocessor: the most that are resident together.
        product_rows: rows of a tile below which a matrix unit idles: 16 a warp, 64 a group of four, 128 a block.
        sources: where the figures stand: by document, what was taken from it.
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
    tf32_flops_per_clock: int
    fp32_per_clock: int
    special_per_clock: int
    alu_per_clock: int
    shuffle_per_clock: int
    issued_per_clock: int
    special_turns: int
    shared_bytes_per_clock: int
    l2_bytes_per_clock: int
    shared_memory_per_multiprocessor: int
    shared_memory_reserved: int
    warps_per_multiprocessor: int
    blocks_per_multiprocessor: int
    product_rows: int
    sources: Mapping[str, str] = field(hash=False, repr=False)

    def product_flops_per_clock(self, *, element: int, precision: str) -> float:
        """Operations a clock of the products of a multiprocessor's matrix unit; 0 where it takes none.

        Args:
            element: bytes of an operand's element. precision: of float32 products: exact ones ("ieee") are no work of
                this unit, "tf32x3" is three of "tf32".
        """
        if element < 4:
            return self.tensor_flops_per_clock
        return {"tf32": self.tf32_flops_per_clock, "tf32x3": self.tf32_flops_per_clock / 3}.get(precision, 0.0)


def _cuda(
    *,
    arch: int,
    shared_memory_kib: int,
    has_descriptors: bool,
    multiprocessors: int,
    clock_ghz: float,
    bandwidth_gb_s: float,
    tensor_flops_per_clock: int,
    tf32_flops_per_clock: int,
    fp32_per_clock: int,
    l2_bytes_per_clock: int,
    product_rows: int,
    sources: Mapping[str, str],
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
        tf32_flops_per_clock=tf32_flops_per_clock,
        fp32_per_clock=fp32_per_clock,
        special_per_clock=16,
        alu_per_clock=64,
        shuffle_per_clock=32,
        issued_per_clock=4,
        special_turns=1,
        shared_bytes_per_clock=128,
        l2_bytes_per_clock=l2_bytes_per_clock,
        # What a block cannot have of it is reserved: 1 KiB a block.
        shared_memory_per_multiprocessor=(shared_memory_kib + 1) * 1024,
        shared_memory_reserved=1024,
        warps_per_multiprocessor=64,
        blocks_per_multiprocessor=32,
        product_rows=product_rows,
        sources={**_CUDA_SOURCES, **sources},
    )


_CUDA_SOURCES: Final = {
    "CUDA C++ Programming Guide, compute capabilities": "shared memory, registers, warps and blocks of a "
    "multiprocessor; four schedulers that issue one instruction a clock each",
    "CUDA C++ Programming Guide, throughput of native arithmetic instructions": "float32 operations, special functions "
    "(16), comparisons, maxima and conversions (64), shuffles (32) of a multiprocessor and clock",
    "CUDA C++ Programming Guide, shared memory": "32 banks of 4 bytes a clock",
}

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
        tf32_flops_per_clock=1024,
        fp32_per_clock=64,
        l2_bytes_per_clock=5120,
        product_rows=16,
        sources={
            "NVIDIA A100 architecture whitepaper": "multiprocessors, boost clock, tensor rates of bf16 and tf32, L2 "
            "bytes a clock",
            "NVIDIA A100 80GB datasheet": "bandwidth",
        },
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
        tf32_flops_per_clock=2048,
        fp32_per_clock=128,
        l2_bytes_per_clock=5120,
        product_rows=64,
        sources={
            "NVIDIA H100 architecture whitepaper": "multiprocessors, tensor rates of bf16 and tf32 and their clock; L2 "
            "bytes a clock are those of the A100, since it names none",
            "NVIDIA H200 datasheet": "bandwidth",
            "PTX ISA, wgmma": "64 rows a group of four warps",
        },
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
        tf32_flops_per_clock=4096,
        fp32_per_clock=128,
        l2_bytes_per_clock=10240,
        product_rows=128,
        sources={
            "NVIDIA Blackwell architecture brief, DGX B200 datasheet": "multiprocessors, bandwidth, tensor rates of "
            "bf16 and tf32; L2 bytes a clock are those of the A100 on each of two dies, since neither names any",
            "PTX ISA, tcgen05.mma": "128 rows a block",
        },
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
        tf32_flops_per_clock=1024,
        fp32_per_clock=128,
        special_per_clock=16,
        alu_per_clock=64,
        shuffle_per_clock=32,
        issued_per_clock=1,
        special_turns=4,
        shared_bytes_per_clock=128,
        l2_bytes_per_clock=8 * 2048,
        shared_memory_per_multiprocessor=64 * 1024,
        shared_memory_reserved=0,
        warps_per_multiprocessor=32,
        blocks_per_multiprocessor=32,
        product_rows=16,
        sources={
            "AMD CDNA 3 architecture whitepaper": "compute units, matrix rates (bf16 and tf32), float32 rates (of "
            "packed pairs), 2048 bytes a clock from the L2 of each of eight dies, LDS of 64 KiB with 128 bytes a clock "
            "(shuffles too)",
            "ROCm Compute Profiler, pipeline descriptions": "four vector units of 16 lanes; one vector instruction is "
            "issued in a clock, products among them, beside one each for scalars, LDS and memory; 32 wave slots; "
            "registers of 512 KiB",
            "AMD Instinct MI300X datasheet": "clock, bandwidth",
            "AMD CDNA 3 instruction set reference": "512 vector registers a lane, 16 rows a matrix instruction, a "
            "quarter of the vector rate for transcendentals",
        },
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
    raise TargetError.of(
        "unknown-target",
        f"there is no target '{name}', only {', '.join(known)}",
        rule="a target is named by the backend of Triton and the architecture, as in cuda:90",
        hint=nearest(name, known),
    )
