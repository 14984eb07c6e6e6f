"""Shared memory that a block of a kernel asks for, from its tiles: what decides whether a schedule fits a target.

What an asynchronous product reads lies in shared memory: a resident operand once, a streamed one once for each stage of
the pipeline. A streamed tile that passes through registers first is used up a stage earlier, so it has one buffer less;
so have operands of tiles that are too short for an asynchronous product. An operand that is computed on the way lies
there from its first product to its last; one that is computed of a product's result stays in registers, but where warps
lie along its columns they exchange it. When the loop has ended its memory is free, and the results pass through it on
their way out.

This restates what Triton's pipeliner and allocator do, so the tests hold it against compiled kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.language.ir import Expr, Iter, Read, rank_of, reads, variables
from einsumcascade.schedules.operands import Operand, Operands, Step, operands_of
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import MINIMUM_DOT, held
from einsumcascade.schedules.schedule import KernelSchedule

# Where descriptors fill buffers, these begin at multiples of so many bytes, with a barrier beside each.
DESCRIPTOR_BYTES = 1024
# Buffers between kernels, and statistics that a forward saves.
BUFFER_DTYPE = "float32"
WORD_BYTES = 4
# Exact products of wider elements use no matrix unit.
MATRIX_BYTES = 2
# The least that an asynchronous copy moves for a thread.
COPY_BYTES = 4
# Places in the text beside that of an Einsum.
BEFORE, AFTER = 0.25, 0.5
# Rows of a product that a warp holds at a time.
WARP_ROWS = 16
# Warps that issue an asynchronous product together, and what its rows and columns are multiples of (PTX ISA, wgmma).
GROUP_WARPS, GROUP_ROWS, GROUP_COLUMNS = 4, 64, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """Bytes of one block.

    Args:
        predicted: as the compiler lays them out.
        certain: those of them that are sure to be asked for.
        rearranged: those of them for tiles that pass only to change their layout, of which the compiler may take a part
            at a time.
    """

    predicted: int
    certain: int
    rearranged: int = 0

    @property
    def least(self) -> int:
        """Those that stay if the compiler changes layouts in no memory at all: what decides how many blocks fit."""
        return self.predicted - self.rearranged


class _Tile:
    """A tile of an operand in shared memory, from the first place of the text that needs it to the last.

    It is `direct` if what was loaded is read there by the product, `awaited` if that is an asynchronous one, `stored`
    if it is computed and must go there.
    """

    def __init__(
        self,
        operand: Operand,
        step: Step,
        size: int,
        *,
        direct: bool = False,
        awaited: bool = False,
        stored: bool = False,
        is_sure: bool = False,
    ) -> None:
        self.key, self.moves, self.size = operand.key, operand.moves, size
        self.direct, self.awaited, self.stored, self.is_sure = direct, awaited, stored, is_sure
        self.first, self.last, self.inside = step.at, step.until, step.inside

    def joined(self, other: _Tile) -> _Tile:
        """This tile, which another product reads as well."""
        if other.awaited and not self.awaited:
            self.direct, self.awaited, self.stored = other.direct, other.awaited, other.stored
        self.is_sure |= other.is_sure
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.inside |= other.inside
        return self


def shared_memory(
    program: Program,
    kernel: Kernel,
    schedule: KernelSchedule,
    *,
    extents: Mapping[str, int],
    dtype_bytes: int,
    target: GpuTarget,
    precision: str = "ieee",
) -> SharedMemory:
    """Predict the bytes of shared memory that one block of a kernel asks for.

    Args:
        program: the kernel's. extents: of the bounded ranks at least, by rank name.
        schedule: legal for the kernel.
        dtype_bytes: of an input element.
        target: with an asynchronous product (WGMMA) operands are read from shared memory; without one they pass
            through registers.
        precision: of float32 products; exact ones use no matrix unit.

    Returns: bytes. The compiled figure is between that predicted and `rearranged` less, within 5 % or 1 KiB, for all
        but few kernels (docs/schedules.md).
    Cost: that of a `Block`, and of asking it once.
    """
    block = Block(program, kernel, extents=extents, dtype_bytes=dtype_bytes, target=target, precision=precision)
    return block.memory(schedule)


class Block:
    """The blocks of a kernel, asked for their shared memory under one schedule after the other.

    Cost: linear in the Einsums of the kernel, once; some 0.1 ms a schedule.
    """

    def __init__(
        self,
        program: Program,
        kernel: Kernel,
        *,
        extents: Mapping[str, int],
        dtype_bytes: int,
        target: GpuTarget,
        precision: str = "ieee",
    ) -> None:
        self.program, self.kernel, self.target, self.element = program, kernel, target, dtype_bytes
        self.multiplied = dtype_bytes <= MATRIX_BYTES or precision != "ieee"
        # Cut in two numbers, a tile that stays is kept as both.
        self.kept = 2 if precision == "tf32x3" and dtype_bytes > MATRIX_BYTES else 1
        own = {s.var for s in kernel.cascade.body if isinstance(s, Iter)}
        self.whole = {v: held(extents.get(rank_of(v), 64)) for v in program.bounded if v not in own}
        self.elements = {
            i.tensor: WORD_BYTES if i.tensor in program.buffers or i.dtype == BUFFER_DTYPE else dtype_bytes
            for i in kernel.cascade.inputs
        }
        self.wide = {t for t, n in self.elements.items() if n > dtype_bytes}
        self.seen: dict[tuple[str, ...], Operands] = {}

    def memory(self, schedule: KernelSchedule) -> SharedMemory:
        """Predict the bytes under a schedule; order, loops and programs do not enter."""
        # The axes of computed tiles have this order: grid, loop, what is held whole.
        sizes = {v: n for v, n in {**schedule.tiles, **self.whole}.items() if n > 1}
        axes = tuple(sizes)
        if axes not in self.seen:
            self.seen[axes] = operands_of(self.kernel, axes, wide=self.wide)
        return _Layout(self, self.seen[axes], schedule, sizes).memory()


class _Layout:
    def __init__(self, block: Block, operands: Operands, schedule: KernelSchedule, sizes: Mapping[str, int]) -> None:
        self.block, self.operands, self.schedule, self.sizes = block, operands, schedule, sizes
        self.target, self.element = block.target, block.element
        self.described = schedule.descriptors and block.target.has_descriptors
        self.loops = bool(operands.looped)
        self.steps = [s for s in operands.steps if sizes.get(s.over, 0) >= MINIMUM_DOT]
        self.stages = 1 if operands.is_branched else schedule.stages
        self.passed: list[tuple[int, int]] = []
        copied = self._copied() if self.steps and self.stages > 1 else {}
        self.tiles = self._tiles(copied)
        self.direct = {t.key for t in self.tiles if t.direct}
        self.ahead = {r: n for r, n in copied.items() if r not in self.direct}

    def memory(self) -> SharedMemory:
        stages, operands = self.stages, self.operands
        piped = stages > 1 and any(s.inside for s in self.steps)
        # A loop reads an operand from shared memory, computed or not; without a loop it need not stay there, and a left
        # one that descriptors bring, or that is computed of what they bring, goes on into registers, on AMD any.
        onward = self.described or self.target.backend == "hip"
        kept, passing, alone = [], [], [0]
        for t in self.tiles:
            if t.moves:
                if not (piped and t.direct) and (t.stored or t.key not in self.ahead):
                    passing.append(t)
            elif t.direct or (self.loops and (t.stored or not onward)):
                kept.append(t)
            elif t.stored or (isinstance(t.key, Read) and t.key.tensor in self.block.elements and not onward):
                passing.append(t)
            else:
                alone.append(t.size)
        buffers = 0
        if piped:
            # Without an asynchronous product a tile is used up as soon as it has been read.
            buffers = sum(t.size * (stages - (not t.awaited)) for t in self.tiles if t.direct and t.moves)
            buffers += sum(n * (stages - 1) for n in self.ahead.values())
        last = max((n for n, inside in enumerate(operands.inside) if inside), default=-1)
        scratch = self._scratch()
        sure, most = max(alone), max(alone)
        for n in sorted({*scratch, *(s.at for s in self.steps), *(s.until for s in self.steps)}):
            place = math.floor(n + BEFORE)
            inside = place in range(len(operands.order)) and operands.inside[place]
            # What is loaded before a loop stays to its end; without loops everything is loaded first.
            alive = sum(
                t.size
                for t in kept
                if n <= (last if t.inside else t.last) and (t.inside or not self.loops or n >= t.first)
            )
            alive += sum(t.size for t in passing if t.first <= n <= t.last and t.inside == inside)
            alive += buffers if inside else 0
            part, whole = scratch.get(n, (0, 0))
            sure, most = max(sure, alive + part), max(most, alive + whole)
        barriers = DESCRIPTOR_BYTES if self.described and stages > 1 and self.loops and most else 0
        certain = sum(t.size * (stages - (not t.awaited) if t.moves else 1) for t in self.tiles if t.is_sure)
        return SharedMemory(predicted=most + barriers, certain=certain if piped else 0, rearranged=most - sure)

    def _size(self, axes: Iterable[str], element: int) -> int:
        return element * math.prod(self.sizes.get(v, 1) for v in dict.fromkeys(axes))

    def _tiles(self, copied: Mapping[Read, int]) -> list[_Tile]:
        """The operands in shared memory, each once; one that some asynchronous product reads is there for all."""
        found: dict[Expr, _Tile] = {}
        # Products that hang together have their warps alike, and the last one decides: along the longer side.
        along_rows = all(self.sizes.get(s.axes[0], 1) >= self.sizes.get(s.axes[1], 1) for s in self.steps[-1:])
        multiplied = self.block.multiplied
        for s in self.steps:
            rows, columns = (self.sizes.get(v, 1) for v in s.axes)
            fits = self.schedule.warps % GROUP_WARPS == 0 and rows % GROUP_ROWS == 0 and columns % GROUP_COLUMNS == 0
            awaited = self.target.has_asynchronous_dot and multiplied and fits
            exchanged = not (awaited or along_rows)
            for o in s.operands:
                size = self._size(o.axes, self.element)
                if o.read is not None:
                    size *= 1 if o.moves else self.block.kept
                    is_direct = awaited or not multiplied
                    # What registers read besides is used up as soon as they have it.
                    is_alone = awaited and o.read not in self.operands.besides
                    new = _Tile(o, s, size, direct=is_direct, awaited=is_alone, is_sure=is_direct and s.is_sure)
                elif o.moves and not o.is_right and multiplied and not exchanged and not o.of_product:
                    # Through shared memory into registers; of what was copied ahead it is computed where it is needed.
                    if not any(r in copied for r in o.sources):
                        self.passed.append((s.at, size))
                    continue
                elif o.moves and multiplied and not awaited and any(r in copied for r in o.sources):
                    # It is computed where the product takes it, of what was copied ahead.
                    continue
                elif o.is_right or exchanged or not multiplied or not o.of_product:
                    if isinstance(o.key, Read) and not awaited:
                        # It is rounded on its way into registers.
                        size = self._size(o.axes, self.block.elements.get(o.key.tensor, self.element))
                    new = _Tile(o, s, size, stored=o.is_right or not multiplied or o.of_product)
                else:
                    continue
                old = found.get(o.key)
                found[o.key] = new if old is None else old.joined(new)
        return list(found.values())

    def _copied(self) -> dict[Read, int]:
        """Bytes of the tiles that a loop copies ahead."""
        found = {}
        for r in self.operands.ahead:
            axes = [v for v in variables(*r.indices) if v in self.sizes]
            element = self.block.elements[r.tensor]
            # What one instruction copies lies side by side; of one axis each thread copies one element.
            if self._is_described(r) or element >= COPY_BYTES or (len(axes) > 1 and self._is_whole(r)):
                found[r] = self._size(axes, element)
        return found

    def _is_described(self, read: Read) -> bool:
        """Whether a descriptor brings a load: a tile of two axes at places that are no computed ones."""
        axes = [v for v in variables(*read.indices) if v in self.sizes]
        return self.described and len(axes) == 2 and not reads(*read.indices)

    def _is_whole(self, read: Read) -> bool:
        """Whether no mask cuts the last axis of a load: a feature rank, or the looped one within full tiles."""
        last = variables(read.indices[-1])
        if reads(read.indices[-1]):
            return False
        return all(v in self.block.whole or v in self.operands.looped for v in last)

    def _rows(self, n: int) -> int:
        """Rows of a result of products: the first axis of its tile."""
        axes = [v for v in self.sizes if v in self.operands.order[n].free]
        return self.sizes[axes[0]] if axes and self.steps else 1

    def _scratch(self) -> dict[float, tuple[int, int]]:
        """By place of the text, bytes that are sure and all that may be needed to change a layout there."""
        found: dict[float, tuple[int, int]] = {}

        def need(n: float, part: int, whole: int) -> None:
            before = found.get(n, (0, 0))
            found[n] = (max(before[0], part), max(before[1], whole))

        operands, block = self.operands, self.block
        # What a descriptor brings to registers passes, whatever reads it; what no loop moves does so before all else.
        for r, n in operands.loads:
            if self._is_described(r) and r not in self.direct and r not in self.ahead:
                size = self._size(variables(*r.indices), block.elements[r.tensor])
                need(n - BEFORE if operands.looped & set(variables(*r.indices)) else -1, size, size)
        if self.steps:
            for r, n in operands.relaid:
                axes = [v for v in variables(*r.indices) if v in self.sizes]
                if len(axes) > 1 and r not in self.direct and r not in self.ahead:
                    # Of four bytes a half of a row's elements at a time, where all warps lie along rows.
                    wide = block.elements[r.tensor] == WORD_BYTES and self.schedule.warps * WARP_ROWS <= self._rows(n)
                    need(n, 0, self._size(axes, block.elements[r.tensor]) // (1 + wide))
            for n, size in self.passed:
                need(n, size, size)
            for n in operands.drawn:
                size = self._size(operands.order[n].free, WORD_BYTES)
                need(n, size, size)
        # A tile that no product holds is laid out anew where it is turned, or spread over a third axis.
        for n in operands.turned:
            for place in (operands.order[n].free, *(variables(*r.indices) for r in reads(operands.order[n].expr))):
                if len([v for v in place if v in self.sizes]) == 2:
                    need(n, 0, self._size(place, WORD_BYTES))
        dtypes = {
            o.tensor: WORD_BYTES if o.dtype == BUFFER_DTYPE else self.element for o in block.kernel.cascade.outputs
        }
        for n, e in enumerate(operands.order):
            if e.tensor in dtypes and any(v in self.sizes for v in e.free):
                # Results of products are laid out anew on their way out, after all loops: what all warps hold of them
                # in one round of rows at a time.
                size = self._size(e.free, dtypes[e.tensor])
                size //= max(1, self._rows(n) // (WARP_ROWS * self.schedule.warps))
                plain = self.steps and len([v for v in e.free if v in self.sizes]) < 3
                until = max((s.until for s in self.steps if s.at == n), default=n)
                need(len(operands.order) if self.loops else until + AFTER, size if plain else 0, size)
        return found
