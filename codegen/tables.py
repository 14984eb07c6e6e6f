"""The least and the most of a tensor in each block: what empty tiles of a data-dependent mask are known by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from einsumcascade.codegen.kernel_ir import Table, TileKernel

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
        return block_table(x, table.reduce, table.sizes, table.ascending)
    what = (table.reduce, table.sizes, table.ascending)
    key = (*what, x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, None if x.is_inference() else x._version)
    if key not in _KEPT[-1]:
        _KEPT[-1][key] = x, block_table(x, table.reduce, table.sizes, table.ascending)
    return _KEPT[-1][key][1]


def block_table(x: torch.Tensor, reduce: str, sizes: tuple[int, ...], ascending: int | None = None) -> torch.Tensor:
    """Reduce a tensor to the least ("min") or the most ("max") of each block of `sizes`.

    Along `ascending`, if given: whole numbers that never fall, at most what comes from a block on, or at least what
    came up to it. Written to be copied: an exported op has this function too.
    """
    import torch

    least = reduce == "min"
    for axis, size in enumerate(sizes):
        length = x.shape[axis]
        whole = length // size * size
        parts = [x.narrow(axis, 0, whole).unfold(axis, size, size).movedim(-1, axis + 1)] if whole else []
        # The last block ends with the tensor.
        parts += [x.narrow(axis, whole, length - whole).unsqueeze(axis)] if whole < length else []
        if size > 1 and parts:
            x = torch.cat([part.amin(axis + 1) if least else part.amax(axis + 1) for part in parts], axis)
    if ascending is not None:
        if x.is_floating_point():
            # Further than half precision can count; what is no number bounds nothing.
            x, far = x.to(torch.promote_types(x.dtype, torch.float32)), float(1 << 62)
            x = torch.where(x == x, x, -far if least else far)
            x = (x.floor() if least else x.ceil()).clamp(-far, far)
        x = x.to(torch.int64)
        x = x.flip(ascending).cummin(ascending).values.flip(ascending) if least else x.cummax(ascending).values
    return x.contiguous()
