"""Shared memory predicted and compiled, for every kernel of the gallery.

`python -m tests.schedules.shared_sweep TARGET` counts the kernels that are off. They are compiled as far as the
compiler lays out shared memory, in this process, whose driver is only pretended. It remembers kernels by their text, so
that a process is for one target.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from einsumcascade.analysis.targets import GpuTarget, gpu_target
from einsumcascade.codegen.compiling import Launch, compile_all, launches_of
from einsumcascade.codegen.dtypes import selectors
from einsumcascade.codegen.launch import Built, build
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.errors import LoweringError
from einsumcascade.gallery import load
from einsumcascade.gallery.draws import recipe
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from einsumcascade.schedules.shared_memory import shared_memory
from tests.codegen.calls import VARIANTS

# Tile of residents, tile of the loop, warps, stages, descriptors.
KINDS = {
    "default": None,
    "descriptors": (64, 64, 4, 3, True),
    "one stage": (128, 64, 4, 1, False),
    "wide": (64, 128, 8, 2, False),
}
# What the page counts: target, dtype, direction, schedules.
CASES = [
    ("cuda:90", "bfloat16", "forward", "default"),
    ("cuda:90", "bfloat16", "forward", "descriptors"),
    ("cuda:90", "bfloat16", "forward", "one stage"),
    ("cuda:90", "bfloat16", "forward", "wide"),
    ("cuda:90", "bfloat16", "backward", "default"),
    ("cuda:90", "float32", "forward", "default"),
    ("cuda:80", "bfloat16", "forward", "default"),
    ("cuda:100", "bfloat16", "forward", "default"),
]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kernel under a schedule: bytes predicted, those of them rearranged, certain, and compiled."""

    case: tuple[str, str, str, str]
    kernel: str
    schedule: str
    predicted: int
    rearranged: int
    certain: int
    compiled: int

    @property
    def is_near(self) -> bool:
        """Within 1 KiB or a twentieth of a figure between what stays and that with all that is rearranged."""
        near = max(1024, self.compiled / 20)
        return self.predicted - self.rearranged - near <= self.compiled <= self.predicted + near


class _LaidOut(Exception):
    """The compiler has laid out shared memory: its bytes."""


def _stop(*given: Any) -> tuple[str, str] | None:
    """What Triton asks for the stages of a compilation: those up to the layout of the memory."""
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.nvidia.compiler import get_ptx_version_from_options

    if not given:
        return "shared memory", "shared memory"
    backend, stages, options, _, capability = given

    def lay_out(module: Any, metadata: dict[str, Any]) -> None:
        # The first passes of what comes next, which spends minutes on machine code that nobody reads here.
        steps = ir.pass_manager(module.context)
        passes.ttgpuir.add_combine_tensor_select_and_if(steps)
        passes.ttgpuir.add_allocate_warp_groups(steps, False)
        passes.convert.add_scf_to_cf(steps)
        passes.gluon.add_inliner(steps)
        version = get_ptx_version_from_options(options, backend.target.arch)
        nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(steps, capability, version)
        steps.run(module, "lay_out")
        raise _LaidOut(module.get_int_attr("ttg.shared"))

    stages["llir"] = lay_out
    return None


def compiled_bytes(launch: Launch, target: GpuTarget) -> int:
    """The bytes that a block of a launch asks for."""
    from triton import knobs

    knobs.runtime.add_stages_inspection_hook = _stop
    knobs.compilation.always_compile = True
    try:
        compile_all([launch], target)
    except _LaidOut as found:
        return int(found.args[0])
    raise AssertionError(f"{launch.kernel} was compiled to its end")


def _built(cascade: Cascade, features: dict[str, int], case: tuple[str, str, str, str]) -> Built:
    target, dtype, _, kind = case
    options: dict[str, Any] = {"extents": features, "dtype": dtype, "target": gpu_target(target)}
    usual = build(cascade, **options)
    chosen = KINDS[kind]
    if chosen is None:
        return usual
    rows, columns, warps, stages, descriptors = chosen
    kernels: dict[str, KernelSchedule] = {}
    for k in usual.program.kernels:
        own = usual.schedule.kernels[k.name]
        tiles = {v: 1 if n == 1 else rows if v in k.residents else columns for v, n in own.tiles.items()}
        kernels[k.name] = replace(own, tiles=tiles, warps=warps, stages=stages, descriptors=descriptors)
    return build(cascade, **options, schedule=Schedule(kernels=kernels))


def rows(name: str, case: tuple[str, str, str, str]) -> Iterator[Row]:
    """The kernels of a text; those that Triton refuses, since a value has too many elements, are left out."""
    import triton

    target, dtype, direction, _ = case
    cascade, saved = load(name), {}
    if direction == "backward":
        try:
            gradient = differentiate(cascade)
        except LoweringError:
            return
        cascade, saved = gradient.backward, {o.tensor: o.dtype for o in gradient.forward.outputs}
    fixed = recipe(name).fixed
    built = _built(cascade, {r: fixed.get(r, 64) for r in feature_ranks(cascade)}, case)
    ranks = {rank_of(v) for i in cascade.inputs for v in i.indices}
    binding = bind(cascade, extents={r: built.extents.get(r, fixed.get(r, 512)) for r in ranks})
    whole = selectors(cascade)
    tensors = {
        i.tensor: torch.empty(
            [binding.extents[rank_of(v)] for v in i.indices],
            dtype=torch.int32 if i.tensor in whole else getattr(torch, saved.get(i.tensor) or dtype),
            device="meta",
        )
        for i in cascade.inputs
    }
    launches = {x.kernel: x for x in launches_of(built, tensors, binding)}
    for k in built.program.kernels:
        try:
            compiled = compiled_bytes(launches[f"{k.name}_kernel"], gpu_target(target))
        except (triton.CompilationError, RuntimeError):
            continue
        own = built.schedule.kernels[k.name]
        size = 4 if dtype == "float32" else 2
        asked = shared_memory(
            built.program, k, own, extents=binding.extents, dtype_bytes=size, target=gpu_target(target)
        )
        yield Row(
            case=case,
            kernel=k.name,
            schedule=str(own),
            predicted=asked.predicted,
            rearranged=asked.rearranged,
            certain=asked.certain,
            compiled=compiled,
        )


def sweep(target: str) -> list[Row]:
    """Every case of a target; some minutes."""
    found: list[Row] = []
    for case in (c for c in CASES if c[0] == target):
        for name in VARIANTS:
            try:
                found += rows(name, case)
            except LoweringError:
                continue
    return found


def counted(found: list[Row]) -> list[list[object]]:
    """By case: kernels, and how many of them are off."""
    out: list[list[object]] = []
    for case in dict.fromkeys(r.case for r in found):
        own = [r for r in found if r.case == case]
        out.append([*case, len(own), sum(not r.is_near for r in own)])
    return out


if __name__ == "__main__":
    every = sweep(sys.argv[1])
    for r in every:
        if not r.is_near or r.certain > r.compiled:
            print(*r.case, r.kernel, r.schedule, r.predicted, r.rearranged, r.certain, r.compiled, file=sys.stderr)
    print(json.dumps({"counts": counted(every), "wrong": [r.kernel for r in every if r.certain > r.compiled]}))
