"""Cut ranks that tiles hold whole into pieces: a tile has a power of two of elements, a head of 80 has not.

A value over a cut axis becomes one value a piece. What is computed element by element is computed piece by piece; a
product over a cut axis is a chain of products into one accumulator, a reduction over it is combined from its pieces,
and a cut axis of a result is one result a piece. Executors that need no powers of two run the tree before the cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from einsumcascade.codegen.kernel_ir import (
    Axis,
    Count,
    Dot,
    Load,
    Loop,
    Map,
    Reduce,
    Stmt,
    Store,
    TileKernel,
    Value,
    all_statements,
)
from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var, apply, rank_of, transform
from einsumcascade.language.ops import REDUCTIONS
from einsumcascade.schedules.roles import pieces

TRUE = Num(value=1)
# The piece that each cut variable is at.
At = Mapping[str, Axis]


def cut(kernel: TileKernel) -> TileKernel:
    """Cut the whole ranks of a kernel whose extent is not one power of two.

    Args:
        kernel: as placed.

    Returns: the same kernel where every tile is a power of two; the kernel itself if nothing is cut.
    Cost: linear in the statements times the pieces of their axes.
    """
    axes: dict[str, tuple[Axis, ...]] = {}
    taken = {*kernel.axes, *kernel.batch}
    for v, axis in kernel.axes.items():
        if axis.role != "whole" or axis.extent is None or len(pieces(axis.size)) == 1:
            continue
        made: list[Axis] = []
        for n, size in enumerate(pieces(axis.size)):
            start = sum(a.size for a in made)
            name = _free(f"{v}_{n}", taken)
            extent = min(size, axis.extent - start)
            before = tuple(a.var for a in made)
            made.append(Axis(var=name, rank=axis.rank, size=size, extent=extent, role="whole", before=before))
        axes[v] = tuple(made)
    if not axes:
        return kernel
    return _Cut(kernel, axes).run()


@dataclass(slots=True)
class _Cut:
    kernel: TileKernel
    pieces: Mapping[str, tuple[Axis, ...]]
    names: dict[tuple[str, tuple[str, ...]], str] = field(default_factory=dict)  # of a value at pieces
    taken: set[str] = field(default_factory=set)
    axes_of: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def run(self) -> TileKernel:
        k = self.kernel
        self.axes_of = {s.value.name: s.value.axes for s in all_statements(k.body) if not isinstance(s, Store | Loop)}
        self.taken = {*self.axes_of, *(f"b_{t}" for t in k.tensors)}
        axes = {a.var: a for v, axis in k.axes.items() for a in self.pieces.get(v, (axis,))}
        return replace(k, axes=axes, body=self._body(k.body))

    def _body(self, body: tuple[Stmt, ...]) -> tuple[Stmt, ...]:
        return tuple(new for s in body for new in self._statement(s))

    def _statement(self, s: Stmt) -> Iterator[Stmt]:
        match s:
            case Load():
                for at in self._places(s.value.axes):
                    value = self._value(s.value, at)
                    yield replace(
                        s,
                        value=value,
                        indices=tuple(self._at(i, at) for i in s.indices),
                        mask=self._mask(s.mask, at),
                        piece=value.name.removeprefix(s.value.name),
                    )
            case Count():
                # A number: no axis of it is cut.
                yield s
            case Map():
                for at in self._places(s.value.axes):
                    yield replace(s, value=self._value(s.value, at), expr=self._at(s.expr, at))
            case Reduce():
                for at in self._places(s.value.axes):
                    yield from self._reduce(s, at)
            case Dot():
                for at in self._places(s.value.axes):
                    yield from self._dot(s, at)
            case Store():
                for at in self._places(s.axes):
                    yield replace(
                        s,
                        indices=tuple(self._at(i, at) for i in s.indices),
                        expr=self._at(s.expr, at),
                        axes=self._axes(s.axes, at),
                        mask=self._mask(s.mask, at),
                        piece="".join(f"_{self.pieces[v].index(a)}" for v, a in at.items()),
                    )
            case Loop():
                yield replace(
                    s,
                    segments=tuple(
                        replace(
                            g,
                            body=self._body(g.body),
                            carries=tuple(self._value(c, at) for c in g.carries for at in self._places(c.axes)),
                        )
                        for g in s.segments
                    ),
                )

    def _reduce(self, s: Reduce, at: At) -> Iterator[Stmt]:
        """A reduction at one place of its result: of each piece, then of the pieces."""
        value = self._value(s.value, at)
        each = [{**at, **over} for over in self._places(s.over)]
        parts = []
        for n, place in enumerate(each):
            part = value if len(each) == 1 else Value(name=self._named(f"{value.name}_{n}"), axes=value.axes)
            parts.append(Read(tensor=part.name))
            over = self._axes(s.over, place)
            yield replace(s, value=part, expr=self._at(s.expr, place), axes=self._axes(s.axes, place), over=over)
        if len(parts) > 1:
            # Truth values are numbers here: any of them is the largest.
            op = "max" if s.reduce == "any" else REDUCTIONS[s.reduce].op.name
            whole: Expr = parts[0]
            for p in parts[1:]:
                whole = apply(op, whole, p)
            yield Map(value=value, expr=whole, note=s.note)

    def _dot(self, s: Dot, at: At) -> Iterator[Dot]:
        """A product at one place of its result: one after the other over the pieces of the contracted axis."""
        value = self._value(s.value, at)
        accumulate = None if s.accumulate is None else self._at(s.accumulate, at)
        for over in self._places((s.over,)):
            place = {**at, **over}
            left, right = self._value(s.left, place), self._value(s.right, place)
            r = self._axes((s.over,), place)[0]
            yield replace(s, value=value, left=left, right=right, over=r, accumulate=accumulate)
            accumulate = Read(tensor=value.name)

    # --- places -------------------------------------------------------------------------------------------------

    def _places(self, axes: tuple[str, ...]) -> list[At]:
        """Every combination of the pieces of some axes."""
        mine = [v for v in axes if v in self.pieces]
        return [dict(zip(mine, at, strict=True)) for at in itertools.product(*(self.pieces[v] for v in mine))]

    def _axes(self, axes: tuple[str, ...], at: At) -> tuple[str, ...]:
        return tuple(at[v].var if v in at else v for v in axes)

    def _value(self, value: Value, at: At) -> Value:
        return Value(name=self._name(value.name, at), axes=self._axes(value.axes, at))

    def _name(self, name: str, at: At) -> str:
        mine = tuple(v for v in self.axes_of.get(name, ()) if v in self.pieces)
        if not mine:
            return name
        key = (name, tuple(at[v].var for v in mine))
        if key not in self.names:
            self.names[key] = self._named(name + "".join(f"_{self.pieces[v].index(at[v])}" for v in mine))
        return self.names[key]

    def _named(self, name: str) -> str:
        return _free(name, self.taken)

    def _at(self, expr: Expr, at: At) -> Expr:
        """An expression at given pieces."""

        def leaf(x: Expr) -> Expr | None:
            match x:
                case Read() if not x.indices:
                    return Read(tensor=self._name(x.tensor, at))
                case Var() if x.name in at:
                    return Var(name=at[x.name].var)
                case Apply(op="lt", args=(Var() as v, Scalar() as n)) if v.name in at and n.name == rank_of(v.name):
                    return TRUE if not at[v.name].is_padded else None
                case _:
                    return None

        return _simple(transform(expr, leaf))

    def _mask(self, mask: tuple[Expr, ...], at: At) -> tuple[Expr, ...]:
        return tuple(m for m in (self._at(c, at) for c in mask) if m != TRUE)


def _simple(expr: Expr) -> Expr:
    """Leave out conditions that are known to hold."""
    if not isinstance(expr, Apply):
        return expr
    args = tuple(map(_simple, expr.args))
    match expr.op:
        case "and" if TRUE in args:
            return args[1] if args[0] == TRUE else args[0]
        case "select" if args[0] == TRUE:
            return args[1]
        case _:
            return Apply(op=expr.op, args=args)


def _free(name: str, taken: set[str]) -> str:
    """A name that is not taken yet, and is from now on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
