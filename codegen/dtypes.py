"""Dtypes of a call: what kernels take, what a computation is in, and what its outputs are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from einsumcascade.analysis.counts import index_tensors
from einsumcascade.language.ir import Cascade, Output

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Those that kernels take; float64 is for tensors on a CPU.
KERNEL_DTYPES = ("float16", "bfloat16", "float32")
# What a tensor that only indexes, compares or counts may hold besides.
WHOLE_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64")


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
