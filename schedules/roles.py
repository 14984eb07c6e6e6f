"""What each rank variable of a kernel becomes, and which contractions are products of two tiles."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from einsumcascade.language.ir import Apply, Cascade, Einsum, Expr, Iter, reads, subexpressions, variables, walk
from einsumcascade.rewrites.algebra import Factor, factors, product
from einsumcascade.schedules.program import Kernel

# The least extent over which a matrix unit multiplies 16-bit tiles.
MINIMUM_DOT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Contraction:
    """`sum_r A[i, r] * B[r, j]`: the two operands, the rank contracted and the result's axes."""

    left: Expr
    right: Expr
    over: str
    axes: tuple[str, str]


def contraction(
    einsum: Einsum,
    tiled: Collection[str],
    order: tuple[str, ...],
    positive: Callable[[Expr], bool] = lambda factor: False,
) -> Contraction | None:
    """See a sum as one product of two 2-D tiles, or None where it is not one.

    Args:
        einsum: a reduction.
        tiled: variables that are axes of tiles in this kernel; others are scalars here.
        order: the axis order of computed tiles.
        positive: whether a factor is above 0 wherever it counts.
    """
    over = [v for v in einsum.ranks if v in tiled]
    left = sorted((v for v in einsum.free if v in tiled), key=order.index)
    if einsum.reduce != "sum" or len(over) != 1 or len(left) != 2:
        return None
    r = over[0]
    sides: tuple[list[Factor], list[Factor]] = ([], [])
    loose: list[Factor] = []
    for f, n in factors(einsum.expr):
        axes = {v for v in variables(f) if v in tiled}
        if r in axes and axes <= {left[0], r} and left[0] in axes:
            sides[0].append((f, n))
        elif r in axes and axes <= {left[1], r} and left[1] in axes:
            sides[1].append((f, n))
        elif axes <= {r}:
            loose.append((f, n))
        elif axes in ({left[0]}, {left[1]}):
            sides[left.index(next(iter(axes)))].append((f, n))
        else:
            return None
    if not all(any(r in variables(f) for f, _ in side) for side in sides):
        return None
    # A factor along r alone joins the side that is computed anyway, else the left one.
    host = 1 if len(sides[1]) > 1 and len(sides[0]) == 1 else 0
    whole = [all(positive(f) for f, _ in side) for side in sides]
    if any(n < 0 for _, n in loose) and any(whole):
        # 0/0 is 0: a divisor stays with what may be 0 where it is, not with weights, which would then be infinite.
        host = 0 if whole[1] and not whole[0] else 1
    sides[host].extend(loose)
    return Contraction(left=product(tuple(sides[0])), right=product(tuple(sides[1])), over=r, axes=(left[0], left[1]))


def padded(extent: int) -> int:
    """The least power of two, of at least 16, that holds an extent: products of tiles take it."""
    return max(MINIMUM_DOT, 1 << (max(extent, 1) - 1).bit_length())


def pieces(extent: int) -> tuple[int, ...]:
    """The tiles that hold a whole rank: powers of two of at least 16, largest first; the last one may be padded.

    >>> pieces(80), pieces(72), pieces(576), pieces(24)
    ((64, 16), (64, 16), (512, 64), (32,))
    """
    left = max(extent + -extent % MINIMUM_DOT, MINIMUM_DOT)
    if left == padded(extent):
        return (left,)
    return tuple(1 << n for n in reversed(range(left.bit_length())) if left >> n & 1)


def held(extent: int) -> int:
    """Elements of the tiles that hold a whole rank: less than 16 beyond its extent."""
    return sum(pieces(extent))


def steps_of_tiles(cascade: Cascade) -> frozenset[str]:
    """Variables that stand in a sum with an iterative one, as `m0` in `m1 * M0 + m0`: a loop walks them in one tile."""
    iterated = {s.var for s in walk(cascade.body) if isinstance(s, Iter)}
    roots = [e.expr for e in cascade.einsums] + [c for e in cascade.einsums for c in e.where]
    found: set[str] = set()
    for e in (x for root in (*roots, *cascade.constraints) for x in subexpressions(root)):
        if isinstance(e, Apply) and e.op == "add" and iterated & set(variables(e)) and not reads(e):
            found |= set(variables(e)) - iterated
    return frozenset(found)


def grid_tiles(kernel: Kernel) -> tuple[str, ...]:
    """The residents that are tiled; the other residents are one program each.

    A resident is tiled where some product of two operands has it on one side only: the free axis of a
    matrix product. One such axis a side; an axis that both operands carry is a batch, and so is one that would be a
    third axis of what is a product of two tiles without it.
    """
    free: dict[str, None] = {}
    shared: set[str] = set()
    for e in kernel.cascade.einsums:
        operands = [set(variables(*r.indices)) for r in dict.fromkeys(reads(e.expr)) if r.indices]
        if not e.ranks or len(operands) < 2:
            continue
        for v in e.free:
            if v in kernel.residents:
                having = [o for o in operands if v in o]
                if len(having) < len(operands):
                    free[v] = None
                summed = [o for o in having if o & set(e.ranks)]
                if len(summed) > 1 and set.union(*summed) != set.intersection(*summed):
                    shared.add(v)
    chosen: list[str] = []
    for e in kernel.cascade.einsums:
        ordered = [variables(*r.indices) for r in dict.fromkeys(reads(e.expr)) if r.indices]
        if not e.ranks or len(ordered) < 2:
            continue
        for o in ordered:
            mine = [v for v in o if v in free and v not in shared]
            if mine and not set(mine) & set(chosen):
                chosen.append(mine[-1])
    if not chosen:
        rest = [v for v in kernel.residents if v not in shared]
        chosen = rest[-1:]
    tiled = tuple(v for v in kernel.residents if v in chosen[:2])
    for v in tiled:
        fewer = tuple(x for x in tiled if x != v)
        if products(kernel, tiled) < products(kernel, fewer):
            tiled = fewer
    return tiled


def tile_axes(kernel: Kernel, tiled: tuple[str, ...]) -> tuple[str, ...]:
    """The variables that are axes of tiles: of residents those that are tiled, and of loops the last."""
    space = dict.fromkeys(v for e in kernel.cascade.einsums for v in e.space)
    scalars = {
        *kernel.residents,
        *kernel.loops[:-1],
        *(s.var for s in walk(kernel.cascade.body) if isinstance(s, Iter)),
    }
    return (*tiled, *(v for v in space if v not in scalars))


def products(kernel: Kernel, tiled: tuple[str, ...]) -> frozenset[str]:
    """The sums that are products of two tiles."""
    axes = tile_axes(kernel, tiled)
    return frozenset(e.tensor for e in kernel.cascade.einsums if contraction(e, axes, axes) is not None)
