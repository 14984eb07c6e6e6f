"""What a kernel moves: the tiles that it keeps in buffers, and its reads and writes of DRAM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from einsumcascade.analysis.counts import elements
from einsumcascade.analysis.spatial.facts import Facts
from einsumcascade.analysis.spatial.legality import reading_passes
from einsumcascade.analysis.spatial.mapping import Kernel, Plan
from einsumcascade.language.ir import Expr, Read, rank_of, variables


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """A kernel with numbers for its ranks and tiles.

    Args:
        facts: of the cascade.
        kernel: the Einsums that run together.
        extents: of every rank.
        tiles: elements of the tile of each loop variable.
    """

    facts: Facts
    kernel: Kernel
    extents: Mapping[str, int] = field(hash=False)
    tiles: Mapping[str, int] = field(hash=False)

    def tile(self, variable: str) -> int:
        """Elements of a rank that are on the chip at a time; all where the kernel does not loop over it."""
        extent = self.extents[rank_of(variable)]
        return min(self.tiles.get(variable, extent), extent)

    def trips(self, variable: str) -> int:
        """Tiles of a rank."""
        return math.ceil(self.extents[rank_of(variable)] / self.tile(variable))

    def turns(self, variable: str, units: int) -> int:
        """Turns that `units` processing elements take for a rank spread over them."""
        whole, rest = divmod(self.extents[rank_of(variable)], self.tile(variable))
        return whole * math.ceil(self.tile(variable) / units) + math.ceil(rest / units)

    def elements_kept(self, buffer: str) -> int:
        """Elements of the tiles kept in a buffer; of tensors that share a place, the largest."""
        groups = self.kernel.keep.get(buffer, ())
        return sum(max(self._tile_of(t) for t in group) for group in groups)

    def _tile_of(self, tensor: str) -> int:
        found = [r.indices for r in reads_in(self.facts, self.kernel, tensor)]
        found += [self.facts.einsums[tensor].indices] if tensor in self.kernel.einsums else []
        shape = self.facts.shape[tensor]
        return max(math.prod(self._along(a, i) for a, i in zip(shape, at, strict=True)) for at in found)

    def _along(self, axis: str | None, index: Expr) -> int:
        along = math.prod(self.tile(v) for v in variables(index))
        return along if axis is None else min(along, self.extents[rank_of(axis)])


def reads_in(facts: Facts, kernel: Kernel, tensor: str) -> tuple[Read, ...]:
    """Return the reads of a tensor by the Einsums of a kernel."""
    return tuple(r for e in kernel.einsums for r in facts.reads[e] if r.tensor == tensor)


def dram_elements(plan: Plan, tiling: Tiling) -> dict[str, int]:
    """Count the elements of each tensor that a kernel reads from DRAM or writes to it.

    A tensor passes by again for each step of a loop that does not move it, unless it is kept and the loop is inside all
    those that do; one that is not kept, for each level of the kernel that reads it too.

    Args:
        plan: the kernels; what one writes and another reads goes through DRAM.
        tiling: of the kernel.

    Returns: elements by tensor, reads first, in the order of the cascade.
    Cost: O(tensors * accesses).
    """
    facts, kernel = tiling.facts, tiling.kernel
    moved: dict[str, int] = {}
    for tensor in facts.shape:
        found = reads_in(facts, kernel, tensor)
        if found and tensor not in kernel.einsums:
            iterated = {v for e in kernel.einsums if tensor in facts.needs(e) for v in facts.einsums[e].space}
            moving = {v for r in found for v in variables(*r.indices)}
            passes = 1 if tensor in kernel.kept else reading_passes(facts, kernel, tensor)
            moved[tensor] = max(_size(tiling, r) for r in found) * _again(tiling, tensor, iterated, moving) * passes
    others = [k for k in plan.kernels if k is not kernel]
    for tensor, einsum in facts.einsums.items():
        if tensor not in kernel.einsums:
            continue
        size = max((_size(tiling, r) for k in others for r in reads_in(facts, k, tensor)), default=0)
        if tensor in facts.cascade.output_names:
            size = elements(facts.cascade, tensor, shape=facts.shape).at(tiling.extents)
        # What a loop adds to again is read before it is written again.
        times = 2 * _again(tiling, tensor, set(einsum.space), set(einsum.free)) - 1
        moved |= {tensor: size * times} if size else {}
    return moved


def _again(tiling: Tiling, tensor: str, iterated: set[str], moving: set[str]) -> int:
    """Return how often a tensor passes by, given the ranks that its Einsums iterate and those in its indices."""
    loops = [v for v in tiling.kernel.loops if v in iterated]
    if tensor in tiling.kernel.kept:
        inner = max((k for k, v in enumerate(loops) if v in moving and tiling.trips(v) > 1), default=-1)
        loops = loops[: inner + 1]
    return math.prod(tiling.trips(v) for v in loops if v not in moving)


def _size(tiling: Tiling, read: Read) -> int:
    """Return the elements that a read touches in all; a constant coordinate touches one."""
    pairs = zip(tiling.facts.shape[read.tensor], read.indices, strict=True)
    return math.prod(tiling.extents[rank_of(a)] for a, i in pairs if a and variables(i))
