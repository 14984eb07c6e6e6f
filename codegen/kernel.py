"""A kernel text someone can read, keep and inspect without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.dtypes import selectors
from einsumcascade.codegen.emit_triton import KernelText
from einsumcascade.codegen.inspection import Inspection, compiled, step_report
from einsumcascade.codegen.kernel_ir import TileKernel
from einsumcascade.codegen.launch import Built
from einsumcascade.codegen.memory import stride_name
from einsumcascade.codegen.names import extent_name, safe
from einsumcascade.codegen.programs import feature_ranks, text_binding
from einsumcascade.errors import LoweringError
from einsumcascade.language.check import extents_known
from einsumcascade.language.ir import rank_of
from einsumcascade.schedules.model import KernelPrediction, predict, works
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from einsumcascade.codegen.build import CompiledKernel
    from einsumcascade.codegen.tiles import TileMap

TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64"}


def parameter_types(built: Built, kernel: TileKernel, text: KernelText) -> dict[str, str]:
    """The type of every run-time parameter of a kernel, in Triton's words: strides and lengths of 32 bits."""
    outputs = {o.tensor: o.dtype for o in built.cascade.outputs}
    inputs = {i.tensor for i in built.cascade.inputs}
    index_only = selectors(built.cascade)
    whole = {*index_only, *(x.name for x in kernel.tables if x.tensor in index_only)}
    out: dict[str, str] = {}
    for t in text.tensors:
        own = outputs.get(t, "float32") or built.dtype
        out[safe(t)] = "*i32" if t in whole else TYPES[built.dtype if t in inputs else own]
    out |= {stride_name(t, kernel.tensors[t][n]): "i32" for t, n in text.strides}
    return out | {extent_name(r, text.tensors): "i32" for r in text.lengths}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The text of a cascade's kernels for one dtype and target."""

    built: Built
    target: GpuTarget

    @property
    def source(self) -> str:
        """One importable text."""
        return self.built.source

    @property
    def schedule(self) -> Schedule:
        """The choices that made it."""
        return self.built.schedule

    @property
    def program(self) -> Program:
        """Its kernels as cascades, and the buffers between them."""
        return self.built.program

    def tiles(self, *, extents: Mapping[str, int], **tensors: torch.Tensor) -> tuple[TileMap, ...]:
        """Say which tiles each loop of the kernels skips, tests, and takes as full.

        Args:
            extents: of all ranks that no given tensor shows.
            tensors: those that conditions read, on a CPU.

        Returns: a map for each loop over tiles, in the order of the text.
        Raises: InputError: an extent is missing or contradicts a tensor, or a tensor that a bound reads is not given.
        Cost: one step of Python a tile; nothing is computed.
        """
        from einsumcascade.codegen.tiles import tile_maps

        return tile_maps(self.built, tensors, extents)

    def inspect(self, *, extents: Mapping[str, int] | None = None) -> Inspection:
        """Compile every kernel for the target and report registers, spills, shared memory, hot loops and time.

        The common case is compiled: contiguous tensors, aligned to 16 bytes, lengths that are
        multiples of 16; tensors that only index or compare hold int32.

        Args:
            extents: of the lengths; those that the kernel was asked for count too. With all of them the time is
                predicted, from what was compiled and the rates of the target.

        Raises: LoweringError, TargetError: the compiler refuses the text, or a block needs more than the target has.
        Cost: seconds a kernel. No GPU is needed.
        """
        from einsumcascade.codegen.inspect import inspect_kernel

        built = self.built
        reports = {
            text.name: inspect_kernel(self._compiled(tile, text))
            for tile, text in zip(built.kernels, built.texts, strict=True)
        }
        given = {**built.extents, **(extents or {})}
        binding = text_binding(built.cascade, given)
        features = feature_ranks(built.cascade)
        lengths = {rank_of(v) for i in built.cascade.inputs for v in i.indices} - set(features)
        names = {k.name: f"{k.name}_kernel" for k in built.program.kernels}
        left = {rank_of(v) for v in extents_known(built.program.cascade)}

        def walked(numbers: Mapping[str, int]) -> dict[str, int]:
            """Extents without those of ranks that the program has written out."""
            return {r: n for r, n in numbers.items() if r in left}

        try:
            found = works(built.program, built.schedule, extents=walked(binding.extents), dtype=built.dtype)
        except LoweringError:
            # The model knows no form for what the lowering moves by itself.
            return Inspection(kernels=reports, target=self.target.name, dtype=built.dtype)
        steps = {names[n]: s for n, w in found.items() if (s := step_report(reports[names[n]], w)) is not None}
        unknown = tuple(r for r in binding.extents if r in lengths and r not in given)
        predictions: dict[str, KernelPrediction] = {}
        if not unknown:
            numbers = {**{r: binding.extents[r] for r in features}, **given}
            prediction = predict(
                built.program,
                built.schedule,
                extents=walked(numbers),
                dtype=built.dtype,
                target=self.target,
                precision=built.precision,
                compiled={n: compiled(reports[names[n]]) for n in names},
            )
            predictions = {names[k.name]: k for k in prediction.kernels}
        return Inspection(
            kernels=reports,
            target=self.target.name,
            dtype=built.dtype,
            steps=steps,
            predictions=predictions,
            unknown=unknown,
        )

    def _compiled(self, tile: TileKernel, text: KernelText) -> CompiledKernel:
        from einsumcascade.codegen.build import compile_kernel

        signature = parameter_types(self.built, tile, text)
        constexprs: dict[str, object] = dict(text.constexprs)
        for t, axes in tile.tensors.items():
            for v in axes[-1:]:
                constexprs[stride_name(t, v)] = 1
                signature.pop(stride_name(t, v), None)
        return compile_kernel(
            self.source,
            kernel=text.name,
            signature=signature,
            constexprs=constexprs,
            target=self.target,
            divisible=[p for p in signature if p not in text.unspecialised],
            num_warps=tile.schedule.warps,
            num_stages=tile.schedule.stages,
        )
