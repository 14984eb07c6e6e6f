"""What a program knows before its loops: the coordinates of its tile, and what tensors hold along them."""

from __future__ import annotations

from dataclasses import dataclass, field

from einsumcascade.codegen.body import Body
from einsumcascade.codegen.kernel_ir import Count, Load, Reduce, Stmt, Table, Value, first, last
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    variables,
)
from einsumcascade.language.ops import FAR
from einsumcascade.schedules.intervals import Known, Span, finished, tile_span


def literals(cascade: Cascade) -> dict[str, int | float]:
    """Constants that are literal numbers."""
    out: dict[str, int | float] = {}
    for c in cascade.constants:
        match c.expr:
            case Num():
                out[c.name] = c.expr.value
            case _:
                pass
    return out


@dataclass(slots=True)
class Rows:
    """The spans of a program's own coordinates and of inputs along them.

    Args:
        body: loads what is read. grid: tiled variables; batch: those of one value a program.
        statement: on whose behalf.
    """

    body: Body
    grid: tuple[str, ...]
    statement: Einsum
    made: list[Stmt] = field(default_factory=list)
    within: list[Expr] = field(default_factory=list)
    spans: dict[str, Span] = field(default_factory=dict)
    counted: dict[object, str] = field(default_factory=dict)

    def known(self) -> Known:
        """What conditions may be solved with."""
        spans = {v: tile_span(v) for v in self.grid}
        spans |= {v: Span(Var(name=v), Var(name=v)) for v in self.body.batch}
        return Known(spans=spans, numbers=literals(self.body.cascade), read=self.read, within=self.within)

    def read(self, r: Read) -> Span | None:
        """The least and the most of an input over the program's tile, if it varies along nothing else."""
        if self.body.cascade.input(r.tensor) is None:
            return None
        along: list[str] = []
        for i, d in zip(r.indices, self.body.tensors[r.tensor], strict=True):
            mine = variables(i)
            if not set(mine) <= {*self.grid, *self.body.batch} or reads(i):
                return None
            if self.body._is_within(i, rank_of(d)):
                along += [v for v in mine if v in self.grid]
                continue
            if not isinstance(i, Var):
                return None
            along += [i.name] if i.name in self.grid else []
            if i.name != d:
                end = Read(tensor=last(i.name)) if i.name in self.grid else i
                self.within.append(apply("lt", end, Scalar(name=rank_of(d))))
        masked, self.body.live = self.body.live, {}
        value = self.body._load(r, self.statement, self.made, frozenset(), None)
        self.body.live = masked
        assert isinstance(value, Read)
        if value.tensor not in self.spans:
            self.spans[value.tensor] = self._of_tile(value, tuple(dict.fromkeys(along)))
        return self.spans[value.tensor]

    def tile(self, streamed: str, start: Expr, symbol: Expr, step: int) -> Tiles:
        """Reads along a loop, in the tile that begins at `start`."""
        return Tiles(self, streamed, start, symbol, step)

    def _of_tile(self, value: Read, along: tuple[str, ...]) -> Span:
        below, above = apply("below", value), apply("above", value)
        if not along:
            return Span(below, above)
        axes = self.body._sorted(along)
        ends: list[Expr] = []
        for reduce, x, empty in (("min", below, FAR), ("max", above, -FAR)):
            name = f"{'least' if reduce == 'min' else 'most'}_{value.tensor.removeprefix('b_')}"
            for v in axes:
                x = apply("select", apply("lt", Var(name=v), Scalar(name=rank_of(v))), x, Num(value=empty))
            self.made.append(Reduce(value=Value(name=name, axes=()), reduce=reduce, expr=x, axes=axes, over=axes))
            ends.append(Read(tensor=name))
        return Span(*ends)


@dataclass(slots=True)
class Tiles:
    """The spans of inputs in the tile of a loop, from tables of their blocks.

    Args:
        streamed: the looped variable. start: first coordinate of the tile, of `step` elements, `symbol` in texts.
    """

    rows: Rows
    streamed: str
    start: Expr
    symbol: Expr
    step: int
    loads: list[Stmt] = field(default_factory=list)
    naturals: set[str] = field(default_factory=set)

    def search(self, r: Read, kind: str, limit: Expr) -> Expr | None:
        """The position of the first block from which on, or before which, an input is known to be above a limit."""
        body = self.rows.body
        if body.cascade.input(r.tensor) is None or r.indices.count(Var(name=self.streamed)) != 1:
            return None
        indices: list[Expr | None] = []
        blocks: Expr = Num(value=0)
        for i, d in zip(r.indices, body.tensors[r.tensor], strict=True):
            if not isinstance(i, Var) or i.name not in (self.streamed, *body.batch):
                return None
            indices.append(None if i.name == self.streamed else i)
            end = Scalar(name=rank_of(d))
            if i.name == self.streamed:
                blocks = apply("ieee_sub", apply("add", end, self.symbol), Num(value=1))
                blocks = apply("quotient", blocks, self.symbol)
            if i.name != d:
                # Beyond the end no point is live.
                at = apply("sub", Scalar(name=rank_of(i.name)), Num(value=1)) if i.name == self.streamed else i
                self.rows.within.append(apply("lt", at, end))
        sizes = tuple(self.step if i is None else 1 for i in indices)
        tag = f"{r.tensor}_{'x'.join(map(str, sizes))}"
        name = body._derived(f"b_rising_{kind}", tag).removeprefix("b_")
        reduce = "min" if kind == "least" else "max"
        body.tables[name] = Table(name=name, tensor=r.tensor, reduce=reduce, sizes=sizes, ascending=indices.index(None))
        value = Value(name=f"upto_{len(self.rows.counted)}_{self.streamed}", axes=())
        made = (name, tuple(indices), blocks, limit)
        if made not in self.rows.counted:
            self.rows.counted[made] = value.name
            self.rows.made.append(
                Count(value=value, tensor=name, indices=tuple(indices), length=blocks, limit=finished(limit))
            )
        self.naturals.add(self.rows.counted[made])
        return apply("mul", Read(tensor=self.rows.counted[made]), self.symbol)

    def read(self, r: Read) -> Span | None:
        """The least and the most of an input in the tile."""
        body = self.rows.body
        if Var(name=self.streamed) not in r.indices:
            return self.rows.read(r)
        if body.cascade.input(r.tensor) is None or not all(isinstance(i, Var) for i in r.indices):
            return None
        sizes: list[int] = []
        indices: list[Expr] = []
        mask: list[Expr] = []
        for i, d in zip(r.indices, body.tensors[r.tensor], strict=True):
            assert isinstance(i, Var)
            if i.name in body.batch:
                sizes, indices = [*sizes, 1], [*indices, i]
                end: Expr = Scalar(name=rank_of(d))
            elif i.name == self.streamed or i.name in self.rows.grid:
                size = self.step if i.name == self.streamed else body.axes[i.name].size
                at, by = (self.start, self.symbol) if i.name == self.streamed else (Read(tensor=first(i.name)), None)
                sizes = [*sizes, size]
                indices.append(apply("quotient", at, by or Num(value=size)))
                last_block = apply("ieee_sub", apply("add", Scalar(name=rank_of(d)), Num(value=size)), Num(value=1))
                end = apply("quotient", last_block, Num(value=size))
            else:
                return None
            if i.name != d:
                # Beyond the end no point is live, whatever is read.
                mask.append(apply("lt", indices[-1], end))
        # A name for each way in which the blocks lie: two kernels may cut one tensor differently.
        tag = f"{r.tensor}_{'x'.join(map(str, sizes))}"
        ends: list[Expr] = []
        for kind, reduce in (("least", "min"), ("most", "max")):
            name = body._derived(f"b_{kind}", tag).removeprefix("b_")
            table = Table(name=name, tensor=r.tensor, reduce=reduce, sizes=tuple(sizes))
            body.tables[table.name] = table
            axes = tuple(i.name for i in r.indices if isinstance(i, Var))
            value = Value(name=body._derived(f"b_{name}", "_".join(axes)), axes=())
            load = Load(value=value, tensor=table.name, indices=tuple(indices), mask=tuple(mask))
            if load not in self.loads:
                self.loads.append(load)
            ends.append(apply("below" if reduce == "min" else "above", Read(tensor=value.name)))
        return Span(*ends)
