"""Shared memory that a block of a kernel asks for, from its tiles: what decides whether a schedule fits a target.

What an asynchronous product reads lies in shared memory: a resident operand once, a streamed one once for each stage of
the pipeline. A streamed tile that passes through registers first is used up a stage earlier, so it has one buffer less;
so have operands of tiles that are too short for an asynchronous product. An operand that is computed of a product's
result stays in registers, but where warps lie along its columns they exchange it. When the loop has ended its memory is
free, and the results pass through it on their way out.

This restates what Triton's pipeliner and allocator do, so the tests hold it against compiled kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.language.ir import Einsum, Expr, Iter, Read, rank_of, reads, variables, walk
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import MINIMUM_DOT, contraction, held
from einsumcascade.schedules.schedule import KernelSchedule

# Where descriptors fill buffers, these begin at multiples of so many bytes, with a barrier beside each.
DESCRIPTOR_BYTES = 1024
# Tables, buffers and states that are no operands.
WORD_BYTES = 4
# Exact products of wider elements use no matrix unit.
MATRIX_BYTES = 2
# The least that an asynchronous copy moves for a thread.
COPY_BYTES = 4
# Warps that issue an asynchronous product together, and what its rows and columns are multiples of (PTX ISA, wgmma).
GROUP_WARPS, GROUP_ROWS, GROUP_COLUMNS = 4, 64, 8


@dataclass(frozen=True, slots=True)
class _Tile:
    """A tile in shared memory: of what, its bytes, whether a loop streams it.

    It is `direct` if what was loaded is read there by the product, `awaited` if that is an asynchronous one, `stored`
    if it is computed and must go there.
    """

    key: Read | Expr
    size: int
    streamed: bool
    direct: bool
    awaited: bool = False
    stored: bool = False


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


def shared_memory(
    program: Program,
    kernel: Kernel,
    schedule: KernelSchedule,
    *,
    extents: Mapping[str, int],
    dtype_bytes: int,
    target: GpuTarget,
) -> SharedMemory:
    """Predict the bytes of shared memory that one block of a kernel asks for.

    Args:
        program: the kernel's. extents: of the bounded ranks at least, by rank name.
        schedule: legal for the kernel.
        dtype_bytes: of an input element.
        target: with an asynchronous product (WGMMA) operands are read from shared memory; without one they pass
            through registers.

    Returns: bytes. For cuda:90, 16-bit inputs and a pipelined loop over products the compiled figure is that predicted,
        or up to `rearranged` less, within 5 % or 1 KiB.
    Cost: linear in the Einsums of the kernel.
    """
    # The axes of computed tiles have this order: grid, loop, what is held whole.
    sizes = {**schedule.tiles, **{v: held(extents.get(rank_of(v), 64)) for v in program.bounded}}
    steps = list(_products(program, kernel, sizes, dtype_bytes, target, schedule.warps))
    # One that some asynchronous product reads is there for all.
    tiles = {t.key: t for step in sorted(steps, key=lambda step: any(t.awaited for t in step)) for t in step}
    direct = {t.key for t in tiles.values() if t.direct}
    # A loop without a product of tiles is not pipelined.
    loaded = (
        {} if not steps else {r: n for r, n in _loaded(program, kernel, sizes, dtype_bytes).items() if r not in direct}
    )
    described, looped = schedule.descriptors and target.has_descriptors, _loops(kernel)
    stays = bool(kernel.loops)
    # A loop reads an operand from shared memory, computed or not; without a loop it need not stay there, and a left one
    # that descriptors bring, or that is computed of what they bring, goes on into registers, on AMD any.
    onward = described or target.backend == "hip"
    still = [t for t in tiles.values() if not t.streamed]
    kept = [t for t in still if t.direct or (stays and (t.stored or not onward))]
    resident = sum(t.size for t in kept)
    ahead = loaded if schedule.stages > 1 else {}
    # What passes on its way into registers or out of them: in a loop both operands of a product, else one at a time.
    passing = [0]
    for step in steps:
        own = [
            t.size
            for t in dict.fromkeys(step)
            if not t.direct and (t.streamed or not stays) and not (ahead and t.streamed and not t.stored)
        ]
        passing += [sum(own)] if stays else own
    moved = [0]
    apart = [0, *(t.size for t in still if t not in kept)]
    for r, n in _rearranged(program, kernel, sizes, dtype_bytes, described=described):
        if r not in direct and r not in ahead and (steps or described):
            whole = described or r.tensor not in program.buffers
            is_inside = not kernel.loops or looped & set(variables(*r.indices))
            (moved if is_inside else apart).append(n if whole else n // WORD_BYTES * dtype_bytes)
    # Without an asynchronous product a tile is used up as soon as it has been read.
    copied = sum(t.size * (schedule.stages - (not t.awaited)) for t in tiles.values() if t.direct and t.streamed)
    barriers = 0
    if schedule.stages > 1:
        buffers = copied + sum(n * (schedule.stages - 1) for n in ahead.values())
        alive, changed = buffers + max(passing), buffers + max(moved)
        barriers = DESCRIPTOR_BYTES if described and max(alive, changed) else 0
    else:
        own = [_live(steps, n) for n in range(len(steps))] if stays else passing
        alive, changed = max(own, default=0), max(moved)
    others = max(*apart, _leaving(kernel, sizes, dtype_bytes) if steps else 0)
    predicted = max(resident + max(alive, changed) + barriers, others)
    # What products read where it was loaded must be there whatever else is.
    certain = copied + sum(t.size for t in tiles.values() if t.direct and not t.streamed)
    return SharedMemory(
        predicted=predicted,
        certain=certain if schedule.stages > 1 else 0,
        rearranged=predicted - max(resident + alive + barriers, others),
    )


def _loops(kernel: Kernel) -> set[str]:
    return {*kernel.loops, *(s.var for s in walk(kernel.cascade.body) if isinstance(s, Iter))}


def _bytes(read: Read, sizes: Mapping[str, int], element: int) -> int:
    return element * math.prod(sizes.get(v, 1) for v in dict.fromkeys(variables(*read.indices)))


def _products(
    program: Program, kernel: Kernel, sizes: Mapping[str, int], dtype_bytes: int, target: GpuTarget, warps: int
) -> Iterator[tuple[_Tile, ...]]:
    """What each product of two tiles has in shared memory, in order."""
    cascade = kernel.cascade
    axes = tuple(sizes)
    given = {i.tensor for i in cascade.inputs}
    looped = _loops(kernel)
    # Computed tensors that hang on the result of a product lie in registers as a product takes them.
    multiplied = dtype_bytes <= MATRIX_BYTES
    of_product: set[str] = set()
    streamed: set[str] = set()
    order = _in_order(kernel)
    # Products that hang together have their warps alike, and the last one decides: along the longer side.
    seen = [product for e in order if (product := contraction(e, axes, axes)) is not None]
    # What registers read besides is used up as soon as they have it, and the product reads it in time.
    besides: set[Expr] = set()
    for e in order:
        product = contraction(e, axes, axes)
        besides |= set(reads(e.expr)) - ({product.left, product.right} if product is not None else set())
    along_rows = all(sizes.get(x.axes[0], 1) >= sizes.get(x.axes[1], 1) for x in seen[-1:])
    for e in order:
        own = reads(e.expr)
        if any(r.tensor in of_product for r in own):
            of_product.add(e.tensor)
        if any(looped & set(variables(*r.indices)) or r.tensor in streamed for r in own) and looped & set(e.free):
            streamed.add(e.tensor)
        product = contraction(e, axes, axes)
        if product is None or sizes.get(product.over, 0) < MINIMUM_DOT:
            continue
        of_product.add(e.tensor)
        rows, columns = (sizes.get(v, 1) for v in product.axes)
        fits = warps % GROUP_WARPS == 0 and rows % GROUP_ROWS == 0 and columns % GROUP_COLUMNS == 0
        awaited = target.has_asynchronous_dot and multiplied and fits
        exchanged = not (awaited or along_rows)
        found = []
        for operand, is_right in ((product.left, False), (product.right, True)):
            plain = reads(operand)
            moving = any(looped & set(variables(*r.indices)) or r.tensor in streamed for r in plain)
            if isinstance(operand, Read) and operand.tensor in given and operand.tensor not in program.buffers:
                size = _bytes(operand, sizes, dtype_bytes)
                is_alone = awaited and operand not in besides
                found.append(_Tile(operand, size, moving, direct=awaited or not multiplied, awaited=is_alone))
            elif is_right or exchanged or not multiplied or not any(r.tensor in of_product for r in plain):
                # Computed tiles are rounded to the dtype of the inputs.
                shape = {product.over, product.axes[1] if is_right else product.axes[0]}
                size = dtype_bytes * math.prod(sizes.get(v, 1) for v in shape)
                is_stored = is_right or not multiplied or any(r.tensor in of_product for r in plain)
                found.append(_Tile(operand, size, moving, direct=False, stored=is_stored))
        yield tuple(found)


def _in_order(kernel: Kernel) -> list[Einsum]:
    """The Einsums as the text has them: each where it is first needed."""
    known = {e.tensor: e for e in kernel.cascade.einsums}
    out: dict[str, Einsum] = {}
    begun: set[str] = set()

    def visit(e: Einsum) -> None:
        begun.add(e.tensor)
        for r in reads(e.expr):
            if r.tensor in known and r.tensor not in begun:
                visit(known[r.tensor])
        out[e.tensor] = e

    for name in kernel.cascade.output_names:
        if name in known:
            visit(known[name])
    return list(out.values())


def _loaded(program: Program, kernel: Kernel, sizes: Mapping[str, int], dtype_bytes: int) -> dict[Read, int]:
    """Bytes of the tiles that a loop copies ahead, by place: all but those that meet the scores."""
    looped, elements = _loops(kernel), _elements(program, kernel, dtype_bytes)
    scores = _meeting_scores(kernel, tuple(sizes))
    found: dict[Read, int] = {}
    for r in _inputs(kernel):
        axes = [v for v in variables(*r.indices) if v in sizes]
        if not looped & set(variables(*r.indices)) or (set(axes) & set(kernel.residents) and r in scores):
            continue
        # Of one axis each thread copies one element.
        if len(axes) > 1 or elements[r.tensor] >= COPY_BYTES:
            found[r] = _bytes(r, sizes, elements[r.tensor])
    return found


def _inputs(kernel: Kernel) -> Iterator[Read]:
    given = {i.tensor for i in kernel.cascade.inputs}
    yield from dict.fromkeys(r for e in kernel.cascade.einsums for r in reads(e.expr) if r.tensor in given)


def _elements(program: Program, kernel: Kernel, dtype_bytes: int) -> dict[str, int]:
    """Bytes of an element of each input: statistics of a row that a forward saves are float32, as buffers are."""
    bounded = set(program.bounded)
    return {
        i.tensor: WORD_BYTES
        if i.tensor in program.buffers or (i.is_saved and not bounded & set(i.indices))
        else dtype_bytes
        for i in kernel.cascade.inputs
    }


def _meeting_scores(kernel: Kernel, axes: tuple[str, ...]) -> set[Read]:
    """The reads that stand in one expression with what hangs on the result of a product."""
    of_product: set[str] = set()
    found: set[Read] = set()
    for e in _in_order(kernel):
        own = reads(e.expr)
        if any(r.tensor in of_product for r in own):
            of_product.add(e.tensor)
            found |= set(own)
        if contraction(e, axes, axes) is not None:
            of_product.add(e.tensor)
            found -= set(own)
    return found


def _rearranged(
    program: Program, kernel: Kernel, sizes: Mapping[str, int], dtype_bytes: int, *, described: bool
) -> Iterator[tuple[Read, int]]:
    """Loaded tiles that pass through to get the layout of scores, and those that descriptors bring to registers."""
    looped, elements = _loops(kernel), _elements(program, kernel, dtype_bytes)
    for r in _inputs(kernel):
        axes = {v for v in variables(*r.indices) if v in sizes}
        # A descriptor is of a tile of two axes.
        if (described and len(axes) == 2) or (len(axes) > 1 and looped & axes and axes & set(kernel.residents)):
            yield r, _bytes(r, sizes, elements[r.tensor])


def _live(steps: list[tuple[_Tile, ...]], n: int) -> int:
    """Bytes of the tiles that are alive at a product of a loop without a pipeline, from its first use to its last."""
    alive = {}
    for t in {t.key: t for step in steps for t in step}.values():
        uses = [i for i, step in enumerate(steps) if any(x.key == t.key for x in step)]
        if uses[0] <= n <= uses[-1] and t.streamed:
            alive[t.key] = t.size
    return sum(alive.values())


def _leaving(kernel: Kernel, sizes: Mapping[str, int], dtype_bytes: int) -> int:
    """Bytes of the largest result, which is laid out anew before it is stored."""
    largest = 0
    dtypes = {o.tensor: WORD_BYTES if o.dtype == "float32" else dtype_bytes for o in kernel.cascade.outputs}
    for e in kernel.cascade.einsums:
        axes = [sizes[v] for v in e.free if v in sizes]
        if e.tensor in dtypes and axes:
            largest = max(largest, dtypes[e.tensor] * math.prod(axes))
    return largest
