"""Print expressions over tiles as Triton text, broadcasting along named axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from einsumcascade.codegen.forms import is_integer, is_whole
from einsumcascade.codegen.kernel_ir import TileKernel
from einsumcascade.codegen.names import extent_name, safe
from einsumcascade.codegen.values import is_natural
from einsumcascade.language.ir import (
    Apply,
    Expr,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    scalars,
    transform,
    variables,
)
from einsumcascade.rewrites.base_two import LOG2E
from einsumcascade.schedules.bounds import linear
from einsumcascade.schedules.intervals import summed

ATOM = 20


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of kernel text: how tightly it binds and the axes its value has."""

    text: str
    precedence: int
    axes: tuple[str, ...]


@dataclass(slots=True)
class Texts:
    """Expressions of one kernel as text.

    Args:
        kernel: the kernel.
        coarse: functions may be right to 2^-11 only.
        loads: names of values that come straight from memory, so are of their tensor's dtype.
        axes_of: axes of every value.
    """

    kernel: TileKernel
    coarse: bool = False
    loads: set[str] = field(default_factory=set)
    axes_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scalars: dict[str, str] = field(default_factory=dict)  # text of a hoisted scalar by its name
    positions: Mapping[Expr, str] = field(default_factory=dict)  # coordinates of loops, by expression
    walked: tuple[str, ...] = ()  # variables of the tiles that loops walk
    temporaries: dict[str, str] = field(default_factory=dict)  # name by text, of values that a line uses twice
    numbered: dict[str, str] = field(default_factory=dict)  # the same of every line so far
    mask_axes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by name

    # --- sizes --------------------------------------------------------------------------------------------------

    def size(self, var: str) -> str:
        """The name of a tile's size: BLOCK_P, or the extent itself where the tile is exactly it."""
        axis = self.kernel.axes[var]
        if axis.role == "loop":
            return "BLOCK_" + rank_of(var).rstrip("_")[:-1]
        if axis.role == "grid" or axis.is_padded or axis.is_piece:
            return f"BLOCK_{rank_of(var)}"
        return self._extent_name(axis.rank)

    def step(self, var: str) -> str:
        """What a loop over tiles of an axis advances by: the elements that count, not their padding."""
        axis = self.kernel.axes[var]
        return self._extent_name(axis.rank) if axis.is_padded else self.size(var)

    def shape(self, axes: tuple[str, ...]) -> str:
        """The shape of a value: `[BLOCK_P, E]`."""
        return "[" + ", ".join(self.size(v) for v in axes) + "]"

    def extent(self, rank: str) -> str:
        """An extent: an argument, a fixed size, or the expression that defines it."""
        for v, axis in self.kernel.axes.items():
            if axis.role == "loop" and axis.rank == rank:
                return self.size(v)
            if axis.role == "whole" and axis.rank == rank:
                return self._extent_name(rank)
        if rank in self.kernel.lengths or rank in self.kernel.fixed:
            return self._extent_name(rank)
        definition = next((d for d in self.kernel.cascade.ranks if rank_of(d.name) == rank), None)
        assert definition is not None, rank
        text = self.plain(definition.expr)
        return f"({text})" if isinstance(definition.expr, Apply) else text

    def _extent_name(self, rank: str) -> str:
        return extent_name(rank, self.kernel.tensors)

    # --- expressions --------------------------------------------------------------------------------------------

    def plain(self, expr: Expr) -> str:
        """A scalar expression."""
        return self.of(expr).text

    def inside(self, expr: Expr, axes: tuple[str, ...]) -> str:
        """An expression expanded to given axes, ready to stand beside others of those axes."""
        return self.expand(self.of(expr), axes).text

    def of(self, expr: Expr, *, raw: bool = False) -> Text:
        """The text of an expression; `raw` leaves loaded values in their own dtype."""
        if expr in self.positions:
            return Text(self.positions[expr], ATOM, tuple(v for v in variables(expr) if v in self.kernel.axes))
        match expr:
            case Num():
                return self._number(expr.value)
            case Var():
                if expr.name in self.kernel.axes:
                    return Text(f"o_{expr.name}", ATOM, (expr.name,))
                return Text(f"i_{expr.name}", ATOM, ())
            case Scalar():
                name = self.extent(expr.name) if expr.is_extent else safe(expr.name)
                return Text(name, ATOM, ())
            case Read():
                axes = self.axes_of.get(expr.tensor, ())
                text = expr.tensor
                if expr.tensor in self.loads and not raw:
                    text += ".to(tl.float32)"
                return Text(text, ATOM, axes)
            case Apply():
                return self._apply(expr, raw)

    def _number(self, value: float) -> Text:
        if math.isinf(value):
            return Text(f'float("{"-" if value < 0 else ""}inf")', ATOM, ())
        return Text(repr(value), ATOM if value >= 0 else 14, ())

    def _apply(self, expr: Apply, raw: bool) -> Text:
        if scalars(expr) and not reads(expr) and not variables(expr) and not any(s[0].isupper() for s in scalars(expr)):
            return self._hoisted(expr)
        rounded_up = _rounded_up(expr)
        if rounded_up is not None:
            return Text(f"tl.cdiv({', '.join(self.plain(e) for e in rounded_up)})", ATOM, ())
        compares = (expr.row.condition and expr.op not in ("and", "or", "not")) or expr.op in ("below", "above")
        kept = raw or compares or expr.row.counts
        parts = [self.of(a, raw=kept) for a in expr.args]
        parts = [self._as_number(expr, n, t, raw=kept) for n, t in enumerate(parts)]
        axes = self._union(parts)
        if expr.op == "uniform" and (numbers := self._numbers(expr, parts)) is not None:
            return numbers
        if expr.op in ("floordiv", "mod") and not all(map(is_natural, expr.args)):
            return self._floored(expr, [self.expand(t, axes) for t in parts], axes)
        if expr.op in ("and", "or"):
            left, right = (self._bracketed(self.expand(p, axes), ATOM) for p in parts)
            return Text(f"{left} {'&' if expr.op == 'and' else '|'} {right}", 8, axes)
        template = expr.row.ieee if expr.op in ("sub", "div") and is_integer(expr) else expr.row.triton
        if self.coarse and expr.row.coarse:
            template = expr.row.coarse
        match expr:
            case Apply(op="ieee_div", args=(Num(value=1), Apply(op="add", args=(Num(value=1), _)))) if axes:
                return Text(f"_reciprocal({self.expand(parts[1], axes).text})", ATOM, axes)
        assert template is not None, expr.op
        plain = {
            "add": 11,
            "sub": 11,
            "ieee_sub": 11,
            "mul": 12,
            "ieee_div": 12,
            "div": 12,
            "floordiv": 12,
            "mod": 12,
            "quotient": 12,
        }
        if expr.op in plain and "tl." not in template:
            p = plain[expr.op]
            left, right = (
                self._bracketed(self.expand(parts[0], axes), p),
                self._bracketed(self.expand(parts[1], axes), p + 1),
            )
            return Text(template.format(left, right), p, axes)
        if compares and expr.row.condition:
            left, right = (self._bracketed(self.expand(p, axes), 11) for p in parts)
            return Text(template.format(left, right), 6, axes)
        if expr.op == "select" and isinstance(expr.args[0], Apply) and expr.args[0].op in ("and", "or"):
            parts[0] = self._mask(parts[0])
        expanded = [self.expand(p, axes) for p in parts]
        repeated = any(template.count(f"{{{n}}}") > 1 for n in range(len(parts)))
        calls = template.startswith(("tl.", "libdevice.", "_")) and template.count("(") == 1 and not repeated
        texts = [e.text if calls else self._bracketed(self._once(e) if repeated else e, 13) for e in expanded]
        text = template.format(*texts)
        return Text(text, ATOM if calls else 1, axes)

    def _as_number(self, expr: Apply, n: int, t: Text, *, raw: bool) -> Text:
        """An operand as the operator wants it: truth values as 0 and 1, coordinates as real numbers where they grow."""
        arg = expr.args[n]
        if not raw and is_whole(arg) and not is_whole(expr) and not expr.row.condition:
            t = self._distance(arg) or t
        truth = isinstance(arg, Apply) and arg.row.condition
        if truth and not expr.row.condition and not (expr.op == "select" and n == 0):
            return Text(f"tl.cast({t.text}, tl.float32)", ATOM, t.axes)
        function = (
            not expr.row.symbol
            and not expr.row.counts
            and expr.op
            not in (
                "select",
                "max",
                "min",
                "abs",
                "ieee_sub",
                "ieee_div",
                "quotient",
                "narrow",
                "below",
                "above",
            )
        )
        product = expr.op == "mul" and not raw and all(is_whole(a) and variables(a) for a in expr.args)
        if is_whole(arg) and (product or function or expr.op == "pow"):
            return Text(f"tl.cast({t.text}, tl.float32)", ATOM, t.axes)
        return t

    def _distance(self, expr: Expr) -> Text | None:
        """A whole number over two axes of a tile, as p - m, in floating point from the start.

        What is common to a row is added up as a whole number and converted once a row, so that each element costs one
        subtraction: exact as far as whole numbers are (2^24), and rounded beyond as a conversion would.
        """
        if isinstance(expr, Apply) and expr.op in ("abs", "neg"):
            inner = self._distance(expr.args[0])
            if inner is None:
                return None
            return (
                Text(f"tl.abs({inner.text})", ATOM, inner.axes)
                if expr.op == "abs"
                else Text(f"-{self._bracketed(inner, 13)}", 13, inner.axes)
            )
        form = linear(transform(expr, _plain_difference))
        own = [v for v in self.walked if form is not None and abs(form.get(Var(name=v), 0)) == 1]
        if form is None or len(own) != 1:
            return None
        sign = form.pop(Var(name=own[0]))
        rows = self.of(summed(form))
        if len(rows.axes) != 1 or own[0] in rows.axes:
            return None
        axes = self._union([rows, Text("", ATOM, (own[0],))])
        row = self.expand(Text(f"{self._bracketed(rows, ATOM)}.to(tl.float32)", ATOM, rows.axes), axes).text
        column = self.expand(Text(f"r_{own[0]}.to(tl.float32)", ATOM, (own[0],)), axes).text
        return Text(f"{row} {'-' if sign < 0 else '+'} {column}", 11, axes)

    def _numbers(self, expr: Apply, parts: list[Text]) -> Text | None:
        """Random numbers of a tile, four from each block of words, where the last coordinate alone walks its columns.

        Tiles begin at multiples of their size, so that no block lies in two of them.
        """
        place, rows = expr.args[-1], self._union(parts[:-1])
        columns = tuple(v for v in variables(place) if v in self.kernel.axes)
        if len(columns) != 1 or len(rows) != 1 or columns == rows:
            return None
        axis, size = self.kernel.axes[columns[0]], self.size(columns[0])
        if axis.size % 4 or axis.is_padded:
            return None
        match place:
            case Var() if axis.role == "grid":
                start = f"i_{place.name} * ({size} // 4)"
            case Apply(op="add", args=(begun, Var())) if place in self.positions and begun in self.positions:
                start = f"{self.positions[begun]} // 4"
            case _:
                return None
        axes = (*rows, *columns)
        blocks = Text(f"({start} + tl.arange(0, {size} // 4))", ATOM, columns)
        texts = [self.expand(t, axes).text for t in (*parts[:-1], blocks)]
        return Text(f"_uniforms({', '.join(texts)})", ATOM, axes)

    def _floored(self, expr: Apply, parts: list[Text], axes: tuple[str, ...]) -> Text:
        """Floor division and its remainder where an operand may be negative: the hardware's round towards zero."""
        x, y = (self._bracketed(t, ATOM) for t in parts)
        if all(map(is_whole, expr.args)):
            rest = f"(({x} % {y} + {y}) % {y})"
            return Text(rest, ATOM, axes) if expr.op == "mod" else Text(f"({x} - {rest}) // {y}", 12, axes)
        quotient = f"tl.floor({x} / {y})"
        return Text(quotient, ATOM, axes) if expr.op == "floordiv" else Text(f"{x} - {y} * {quotient}", 11, axes)

    def _once(self, t: Text) -> Text:
        """Name a text that a template uses more than once."""
        if t.precedence == ATOM and t.text.isidentifier():
            return t
        # Another text, another name: Triton lets no loop assign a name that had another type before it.
        name = self.numbered.setdefault(t.text, f"tmp_{len(self.numbered)}")
        return Text(self.temporaries.setdefault(t.text, name), ATOM, t.axes)

    def _mask(self, t: Text) -> Text:
        """Name a condition of several parts; one name has the same axes everywhere."""
        name = first = f"m_{len(self.temporaries)}" if self.temporaries else "m_live"
        n = 2
        while self.mask_axes.setdefault(name, t.axes) != t.axes:
            name, n = f"{first}{n}", n + 1
        return Text(self.temporaries.setdefault(t.text, name), ATOM, t.axes)

    def _hoisted(self, expr: Apply) -> Text:
        """A product of constants gets a name, computed once at the top."""
        body = []

        def go(e: Expr) -> Text:
            if isinstance(e, Apply):
                args = [go(a) for a in e.args]
                template = e.row.ieee or e.row.triton or ""
                body.append(e)
                return Text(template.format(*(self._bracketed(a, 13) for a in args)), 1, ())
            return self.of(e)

        text = go(expr).text
        names = "_".join(scalars(expr))
        name = (
            f"{names}_log2e"
            if expr == apply("mul", expr.args[0], Num(value=LOG2E)) and len(body) == 1
            else (f"{names}_c")
        )
        candidate, n = name, 2
        while self.scalars.get(candidate, text) != text or candidate in self._constant_names():
            candidate, n = f"{name}{n}", n + 1
        self.scalars[candidate] = text
        return Text(safe(candidate), ATOM, ())

    def _constant_names(self) -> set[str]:
        return {c.name for c in self.kernel.constants} | set(self.kernel.lengths) | set(self.kernel.fixed)

    def _bracketed(self, t: Text, minimum: int) -> str:
        return t.text if t.precedence >= minimum else f"({t.text})"

    def _union(self, parts: list[Text]) -> tuple[str, ...]:
        if len({p.axes for p in parts if p.axes}) == 1:
            return next(p.axes for p in parts if p.axes)
        wanted = {v for p in parts for v in p.axes}
        return tuple(v for v in self.kernel.axes if v in wanted)

    def expand(self, t: Text, axes: tuple[str, ...]) -> Text:
        """Insert axes of length 1 so that a value broadcasts against the given axes."""
        if not t.axes or t.axes == axes:
            return t
        if tuple(v for v in axes if v in t.axes) != t.axes:
            here = tuple(v for v in axes if v in t.axes)
            turn = (
                "tl.trans({})"
                if len(here) == 2
                else (f"tl.permute({{}}, ({', '.join(str(t.axes.index(v)) for v in here)}))")
            )
            t = Text(turn.format(t.text), ATOM, here)
            if t.axes == axes:
                return t
        index = ", ".join(":" if v in t.axes else "None" for v in axes)
        return Text(f"{self._bracketed(t, ATOM)}[{index}]", ATOM, axes)


def _plain_difference(e: Expr) -> Expr | None:
    """A difference of whole numbers, which are never infinite, as forms know it."""
    if isinstance(e, Apply) and e.op == "ieee_sub":
        return apply("sub", *(transform(a, _plain_difference) for a in e.args))
    return None


def _rounded_up(expr: Apply) -> tuple[Expr, Expr] | None:
    """`(x + y - 1) // y` over scalars: x and y."""
    match expr:
        case Apply(op="floordiv", args=(Apply(op="sub", args=(Apply(op="add", args=(x, y)), Num(value=1))), z)) if (
            y == z and not variables(expr) and not reads(expr)
        ):
            return x, y
        case _:
            return None
