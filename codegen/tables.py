"""The least and the most of a tensor in each block: what empty tiles of a data-dependent mask are known by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from einsumcascade.codegen.kernel_ir import Table, TileKernel
from einsumcascade.language.ops import OPS

if TYPE_CHECKING:
    import torch


def tables_of(kernel: TileKernel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute the tables that a kernel's loop bounds read, on the device of their tensors.

    Returns: by name; as many elements as blocks.
    Cost: reads each tensor once a table, copies nothing, waits for nothing, so a CUDA graph may hold it.
    """
    return {t.name: _table(t, tensors[t.tensor]) for t in kernel.tables}


def _table(table: Table, x: torch.Tensor) -> torch.Tensor:
    import torch

    for axis, size in enumerate(table.sizes):
        length = x.shape[axis]
        whole = length // size * size
        parts = [_blocks(x.narrow(axis, 0, whole), axis, size)] if whole else []
        # The last block ends with the tensor.
        parts += [x.narrow(axis, whole, length - whole).unsqueeze(axis)] if whole < length else []
        if size > 1:
            ends = [p.amin(axis + 1) if table.reduce == "min" else p.amax(axis + 1) for p in parts]
            x = torch.cat(ends, axis) if ends else x
    if table.ascending is not None:
        # From the end on nothing is less than the "min", up to here nothing is more than the "max".
        x = OPS["below" if table.reduce == "min" else "above"].array(torch, x)
        axis = table.ascending
        x = x.flip(axis).cummin(axis).values.flip(axis) if table.reduce == "min" else x.cummax(axis).values
    return x.contiguous()


def _blocks(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A view with an axis of blocks and one within them in place of one."""
    return x.unfold(axis, size, size).movedim(-1, axis + 1)
