"""The least and the most of a tensor in each block: what empty tiles of a data-dependent mask are known by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from einsumcascade.codegen.kernel_ir import Table, TileKernel
from einsumcascade.language.ops import OPS

if TYPE_CHECKING:
    import torch


# Tables kept by those who promised that masks stay as they are: innermost promise last, for all threads, as gradients
# run in one of their own. A table keeps its tensor, so that no other can come to lie where it was.
_KEPT: list[dict[object, tuple[torch.Tensor, torch.Tensor]]] = []


@contextmanager
def unchanged_masks() -> Iterator[None]:
    """Compute what loop bounds read of masks once, not once a call, until the end of the `with` block.

    It is a promise that ids, lengths and other tensors of conditions keep their values inside the block. A change that
    PyTorch counts is noticed all the same; one by a kernel of another library is not.

    >>> import einsumcascade as ec
    >>> with ec.unchanged_masks():
    ...     pass  # for layer in layers: x = layer(x, documents)
    """
    _KEPT.append({})
    try:
        yield
    finally:
        _KEPT.pop()


def tables_of(kernel: TileKernel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute the tables that a kernel's loop bounds read, on the device of their tensors.

    Returns: by name; as many elements as blocks.
    Cost: reads each tensor once a table, copies nothing, waits for nothing, so a CUDA graph may hold it.
    """
    return {t.name: _known(t, tensors[t.tensor]) for t in kernel.tables}


def _known(table: Table, x: torch.Tensor) -> torch.Tensor:
    if not _KEPT:
        return _table(table, x)
    what = (table.reduce, table.sizes, table.ascending)
    key = (*what, x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, None if x.is_inference() else x._version)
    if key not in _KEPT[-1]:
        _KEPT[-1][key] = x, _table(table, x)
    return _KEPT[-1][key][1]


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
        # Further than half precision can count.
        x = x.float() if x.is_floating_point() and x.element_size() < 4 else x
        x = OPS["below" if table.reduce == "min" else "above"].array(torch, x)
        axis = table.ascending
        x = x.flip(axis).cummin(axis).values.flip(axis) if table.reduce == "min" else x.cummax(axis).values
    return x.contiguous()


def _blocks(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A view with an axis of blocks and one within them in place of one."""
    return x.unfold(axis, size, size).movedim(-1, axis + 1)
