"""What the products of a kernel read, in the order of its text: from registers, from memory, or computed on the way.

Nothing here depends on the sizes of tiles, on warps or on stages, so it is worked out once for all schedules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from einsumcascade.analysis.dependence import conditions
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Iter,
    Read,
    reads,
    subexpressions,
    transform,
    variables,
    walk,
)
from einsumcascade.rewrites.algebra import factors, product
from einsumcascade.schedules.program import Kernel
from einsumcascade.schedules.roles import contraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """An operand of a product.

    Args:
        key: what it is; equal ones are one tile. read: the input that it is, if it is one as it was loaded.
        axes: of its tile.
        is_right: multiplied from the right.
        moves: a loop brings another in each step.
        of_product: computed of the result of a product, whose registers it stays in.
        sources: the loads of tiles that it is computed of, element by element.
    """

    key: Expr
    read: Read | None
    axes: tuple[str, str]
    is_right: bool
    moves: bool
    of_product: bool
    sources: frozenset[Read]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A product of two tiles.

    Args:
        at, until: places in the text where its operands are read first, and where it is done: a product that is only
            added to something is added by the matrix unit, once that is there.
        over: the axis that is summed. axes: of its result.
        inside: a loop repeats it.
        is_sure: neither a condition nor a loop around can make it anything but a product of what was loaded.
    """

    at: int
    until: int
    over: str
    axes: tuple[str, str]
    left: Operand
    right: Operand
    inside: bool
    is_sure: bool

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """Both operands."""
        return self.left, self.right


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """The products of a kernel, and its loads.

    Args:
        order: Einsums as the text has them.
        looped: variables of its innermost loop, and of a user's own.
        inside: whether such a loop repeats an Einsum, by its place.
        steps: its products.
        besides: loads that something else than a product reads too.
        ahead: loads in loops that operands of products depend on, which a pipeline may fetch before they are needed.
        loads: all loads, with the place where they are read first.
        relaid: loads that meet results of products, with the place where: they are laid out as these are.
        drawn: places where random numbers are drawn, which come in a layout of their own.
        is_branched: every step of the loop tests by what tensors hold whether it has a live point.
        turned: places where a tile of two axes meets another order of them, or a third axis without a product.
    """

    order: tuple[Einsum, ...]
    looped: frozenset[str]
    inside: tuple[bool, ...]
    steps: tuple[Step, ...]
    besides: frozenset[Read]
    ahead: tuple[Read, ...]
    loads: tuple[tuple[Read, int], ...]
    relaid: tuple[tuple[Read, int], ...]
    drawn: tuple[int, ...]
    turned: tuple[int, ...]
    is_branched: bool


def operands_of(kernel: Kernel, axes: tuple[str, ...], *, wide: Collection[str]) -> Operands:
    """See what the products of a kernel read.

    Args:
        axes: variables of tiles of more than one element, in the order of the axes of computed tiles.
        wide: inputs whose elements are rounded before a product takes them.

    Cost: linear in the Einsums, some of it quadratic.
    """
    return _Reader(kernel, axes, frozenset(wide)).read()


class _Reader:
    def __init__(self, kernel: Kernel, axes: tuple[str, ...], wide: frozenset[str]) -> None:
        self.kernel, self.axes, self.wide = kernel, axes, wide
        self.cascade: Cascade = kernel.cascade
        self.order = self.cascade.einsums
        self.given = {i.tensor for i in self.cascade.inputs}
        # The innermost loop is the one that is pipelined: what another walks stays while that runs.
        self.looped = frozenset((*kernel.loops[-1:], *(s.var for s in walk(self.cascade.body) if isinstance(s, Iter))))
        self.shared = self._shared()
        self.found = [contraction(e, axes, axes) for e in self.order]
        self.moving: set[str] = set()
        self.of_product: set[str] = set()
        # A tensor of a user's own loop is read before the text writes its next generation.
        for _ in range(2 if any(isinstance(s, Iter) for s in self.cascade.body) else 1):
            for e, c in zip(self.order, self.found, strict=True):
                own = reads(e.expr)
                if c is not None or any(r.tensor in self.of_product for r in own):
                    self.of_product.add(e.tensor)
                if self.looped & set(e.free) and any(self._moves(r) for r in own):
                    self.moving.add(e.tensor)

    def read(self) -> Operands:
        inside = tuple(bool(self.looped & set(e.space)) or any(map(self._moves, reads(e.expr))) for e in self.order)
        steps = tuple(self._steps(inside))
        besides: set[Read] = set()
        for e, c in zip(self.order, self.found, strict=True):
            besides |= set(reads(e.expr)) - ({c.left, c.right} if c is not None else set())
        return Operands(
            order=self.order,
            looped=self.looped,
            inside=inside,
            steps=steps,
            besides=frozenset(besides),
            ahead=tuple(self._ahead()),
            loads=tuple(self._loads()),
            relaid=tuple(self._relaid()),
            drawn=tuple(n for n, e in enumerate(self.order) if self._draws(e)),
            is_branched=any(len(self._tiled(r)) > 1 for c in self.shared for r in reads(c)),
            turned=tuple(n for n, e in enumerate(self.order) if self.found[n] is None and self._turns(e)),
        )

    def _moves(self, read: Read) -> bool:
        return bool(self.looped & set(variables(*read.indices))) or read.tensor in self.moving

    def _tiled(self, *exprs: Expr) -> set[str]:
        return {v for v in variables(*exprs) if v in self.axes}

    def _turns(self, e: Einsum) -> bool:
        if len([v for v in e.space if v in self.axes]) > 2:
            return True
        own = [r for r in reads(e.expr) if r.tensor in self.given]
        orders = [tuple(v for v in variables(*r.indices) if v in self.axes) for r in own]
        return any(list(o) != sorted(o, key=self.axes.index) for o in orders)

    @staticmethod
    def _draws(e: Einsum) -> bool:
        return any(isinstance(x, Apply) and x.row.counts for x in subexpressions(e.expr))

    def _steps(self, inside: tuple[bool, ...]) -> Iterator[Step]:
        # A loop within a user's own may not be pipelined.
        plain = not any(isinstance(s, Iter) for s in self.cascade.body)
        for n, (e, c) in enumerate(zip(self.order, self.found, strict=True)):
            if c is None:
                continue
            left = self._operand(c.left, (c.axes[0], c.over), e, is_right=False)
            right = self._operand(c.right, (c.over, c.axes[1]), e, is_right=True)
            yield Step(
                at=n,
                until=self._until(n),
                over=c.over,
                axes=c.axes,
                left=left,
                right=right,
                inside=inside[n],
                is_sure=plain and all(x in self.shared for x in conditions(self.cascade, e)),
            )

    def _shared(self) -> set[Expr]:
        """Conditions of all reductions over the loop, which walks the tiles where they hold."""
        own = [set(conditions(self.cascade, e)) for e in self.order if self.looped & set(e.ranks)]
        return {c for c in set.intersection(*own) if self.looped & set(variables(c))} if own else set()

    def _operand(self, expr: Expr, axes: tuple[str, str], e: Einsum, *, is_right: bool) -> Operand:
        scaled = tuple((f, n) for f, n in factors(expr) if self._tiled(f))
        plain = product(scaled) if scaled else expr
        own = reads(plain)
        read = plain if isinstance(plain, Read) and self._is_plain(plain) else None
        return Operand(
            key=plain,
            read=read,
            axes=axes,
            is_right=is_right,
            moves=any(map(self._moves, own)),
            of_product=any(r.tensor in self.of_product for r in own),
            sources=frozenset(self._sources(own)),
        )

    def _sources(self, own: Iterable[Read]) -> Iterator[Read]:
        known = {e.tensor: e for e in self.order if not e.ranks}
        todo = list(own)
        while todo:
            r = todo.pop()
            if r.tensor in self.given and len(self._tiled(*r.indices)) > 1:
                yield r
            elif r.tensor in known:
                todo += reads(known.pop(r.tensor).expr)

    def _is_plain(self, read: Read) -> bool:
        return read.tensor in self.given and read.tensor not in self.wide

    def _until(self, n: int) -> int:
        """Where a product is done: at the sum that alone reads it."""
        tensor = self.order[n].tensor
        readers = [m for m, e in enumerate(self.order) if any(r.tensor == tensor for r in reads(e.expr))]
        if len(readers) == 1 and readers[0] > n and any(self._joined(self.order[readers[0]].expr, tensor)):
            return readers[0]
        return n

    def _joined(self, expr: Expr, tensor: str | None = None) -> Iterator[tuple[Expr, Expr]]:
        """Sums of a product and something else, both."""
        products = {e.tensor for e, c in zip(self.order, self.found, strict=True) if c is not None}
        for x in subexpressions(expr):
            if isinstance(x, Apply) and x.op == "add" and len(x.args) == 2:
                for a, b in (x.args, x.args[::-1]):
                    if isinstance(a, Read) and a.tensor in products and tensor in (None, a.tensor):
                        yield a, b

    def _ahead(self) -> Iterator[Read]:
        """The loads in loops that operands depend on; what a product is added to is no operand."""
        known = {e.tensor: e for e in self.order}
        todo = [e for e, c in zip(self.order, self.found, strict=True) if c is not None]
        seen = {e.tensor for e in todo}
        found: dict[Read, None] = {}
        while todo:
            e = todo.pop()
            sums: dict[Expr, Expr] = {Apply(op="add", args=(a, b)): a for a, b in self._joined(e.expr)}
            sums |= {Apply(op="add", args=(b, a)): a for a, b in self._joined(e.expr)}
            expr = transform(e.expr, sums.get) if sums else e.expr
            for r in reads(expr):
                if r.tensor in self.given and self.looped & set(variables(*r.indices)):
                    found[r] = None
                elif r.tensor in known and r.tensor not in seen:
                    seen.add(r.tensor)
                    todo.append(known[r.tensor])
        yield from (r for r, _ in self._loads() if r in found)

    def _loads(self) -> Iterator[tuple[Read, int]]:
        seen: set[Read] = set()
        for n, e in enumerate(self.order):
            for r in reads(e.expr):
                if r.tensor in self.given and r not in seen:
                    seen.add(r)
                    yield r, n

    def _relaid(self) -> Iterator[tuple[Read, int]]:
        seen: set[Read] = set()
        for n, (e, c) in enumerate(zip(self.order, self.found, strict=True)):
            own = reads(e.expr)
            if c is None and any(r.tensor in self.of_product for r in own):
                for r in own:
                    if r.tensor in self.given and r not in seen:
                        seen.add(r)
                        yield r, n
