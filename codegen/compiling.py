"""Compile kernels ahead of a call, in other processes, in the very form in which a launch looks for them.

What a launch compiles depends on its arguments: which pointers, strides and lengths are multiples of 16, and which
numbers are 1. Here Triton's own launch is asked to warm up with arguments of the same kinds, under a driver that says
that the target is there. So its cache on disk has the machine code when the launch itself looks for it, and no GPU is
needed: on a machine without one this is how candidates are compiled for another.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.launch import Built, allocate, fitting, plan
from einsumcascade.language.extents import Binding

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor as a compiler sees it: its dtype by name, and whether its address is a multiple of 16 bytes."""

    dtype: str
    is_aligned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a launch says of itself: the kernel of a text, its arguments by position, its warps and stages."""

    source: str
    kernel: str
    arguments: tuple[Pointer | int, ...]
    warps: int
    stages: int


def launches_of(built: Built, inputs: Mapping[str, torch.Tensor], binding: Binding) -> tuple[Launch, ...]:
    """List the launches of a call.

    Args:
        built: the kernels.
        inputs: by name; of tensors on the device "meta", which take no memory, the layout counts.
        binding: extents of the call.

    Cost: that of `plan`; buffers and outputs are made on the device of the inputs.
    """
    tensors = allocate(built, inputs, binding)
    built = fitting(built, tensors)
    return tuple(
        Launch(
            source=built.source,
            kernel=call.kernel,
            arguments=(
                *(
                    Pointer(str(tensors[t].dtype).removeprefix("torch."), _address(tensors[t]) % 16 == 0)
                    for t in call.tensors.values()
                ),
                *call.arguments.values(),
            ),
            warps=call.warps,
            stages=call.stages,
        )
        for call in plan(built, tensors, binding)
        if call.programs
    )


def _address(t: torch.Tensor) -> int:
    return int(t.storage_offset()) * t.element_size() if t.is_meta else t.data_ptr()


def compile_all(launches: Sequence[Launch], target: GpuTarget) -> dict[str, Any]:
    """Compile the kernels of some launches; for a process of its own, whose driver this replaces.

    Returns: `registers` of a thread, `spill_bytes` and `shared_memory_bytes` of the worst kernel, and the `seconds` of
        all; and `reports`, by kernel.
    Raises: RuntimeError: a kernel does not compile, or asks for more shared memory than there is, in one line.
    """
    reports = {x.kernel: _compiled(x, target) for x in launches}
    own = list(reports.values())
    worst = {n: max((r[n] for r in own), default=0) for n in ("registers", "spill_bytes", "shared_memory_bytes")}
    return {**worst, "seconds": sum(r["seconds"] for r in own), "reports": reports}


def _compiled(launch: Launch, target: GpuTarget) -> dict[str, Any]:
    import triton

    from einsumcascade.codegen.build import CompiledKernel, load_module
    from einsumcascade.codegen.inspect import inspect_kernel

    triton.runtime.driver.set_active(PretendedDriver(target))
    function = getattr(load_module(launch.source), launch.kernel)
    begun = time.monotonic()
    compiled = function.warmup(
        *(_Tensor(a) if isinstance(a, Pointer) else a for a in launch.arguments),
        grid=(1,),
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )
    shared = int(compiled.metadata.shared)
    if shared > target.shared_memory_bytes:
        raise RuntimeError(f"asks for {shared} bytes of shared memory, {target.name} has {target.shared_memory_bytes}")
    report = inspect_kernel(
        CompiledKernel(
            kernel=launch.kernel,
            target=target,
            num_warps=launch.warps,
            num_stages=launch.stages,
            shared_memory_bytes=shared,
            triton_version=str(triton.__version__),
            assembly={stage: compiled.asm[stage] for stage in compiled.asm},
        )
    )
    return {**report.to_dict(), "seconds": time.monotonic() - begun}


class _Tensor:
    """What Triton asks of an argument that is a tensor."""

    def __init__(self, pointer: Pointer) -> None:
        # Triton goes by its name, so that this process need not load PyTorch.
        self.dtype = f"torch.{pointer.dtype}"
        self.address = 0 if pointer.is_aligned else 1

    def data_ptr(self) -> int:
        return self.address

    @staticmethod
    def ptr_range() -> int:
        return 0


class PretendedDriver:
    """A driver of a GPU that need not be there: enough of one for a launch that ends before it begins."""

    def __init__(self, target: GpuTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)
