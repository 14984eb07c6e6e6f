"""Print a kernel as Triton text: what a careful person would have written."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.forms import powers
from einsumcascade.codegen.helpers import helpers_of
from einsumcascade.codegen.kernel_ir import (
    Count,
    Dot,
    Load,
    Loop,
    Map,
    Reduce,
    Segment,
    Stmt,
    Store,
    TileKernel,
    all_statements,
    first,
    last,
)
from einsumcascade.codegen.memory import (
    INDENT,
    Memory,
    pointer_of,
    position_of,
    position_product,
    start_name,
    stride_name,
    suffix_of,
)
from einsumcascade.codegen.names import extent_name, safe
from einsumcascade.codegen.texts import ATOM, Text
from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, apply, rank_of, variable_of
from einsumcascade.language.ops import REDUCTIONS
from einsumcascade.schedules.schedule import HEADS_INSIDE, ORDERS

HEADER = '''"""{title}

{cascade}

b_X is a block of X, p_X a pointer, o_x coordinates of a rank, i_x an index, r_x positions in a tile. A running state
begins with R, what one tile adds to it with L, and what moves a state to a new reference with C.
"""

import triton
import triton.language as tl
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelText:
    """The text of one kernel and what its caller must hand over.

    Args:
        name: the function's name.
        text: its definition, decorator included.
        tensors: tensors in parameter order. strides: (tensor, axis number) in order. lengths: extents in order.
        constexprs: compile-time parameters and their values.
        descriptors: (tensor, axes) loaded by descriptors: their last axis must be contiguous and aligned.
        unspecialised: lengths of which one machine code serves all values.
    """

    name: str
    text: str
    tensors: tuple[str, ...]
    strides: tuple[tuple[str, int], ...]
    lengths: tuple[str, ...]
    constexprs: Mapping[str, int]
    descriptors: tuple[str, ...]
    unspecialised: tuple[str, ...]


def emit(kernel: TileKernel, *, precision: str = "ieee", coarse: bool = False) -> KernelText:
    """Print one kernel.

    Args:
        kernel: statements over tiles.
        precision: of products of float32 tiles: "ieee", "tf32x3" or "tf32".
        coarse: functions may be right to 2^-11 only, by instructions of an NVIDIA GPU.

    Returns: its text; deterministic.
    Cost: linear in the statements.
    """
    return _Printer(kernel, precision, coarse).run()


def module(kernels: tuple[KernelText, ...], *, title: str, cascade: str, target: GpuTarget) -> str:
    """One importable text with several kernels, and the cascade they compute in its header."""
    body = "".join("\n\n" + k.text for k in kernels)
    indented = "\n".join("    " + line for line in cascade.splitlines())
    return HEADER.format(title=title, cascade=indented) + helpers_of(body, target) + body


@dataclass
class _Printer(Memory):
    """Statements as lines."""

    def run(self) -> KernelText:
        k = self.kernel
        self.texts.positions = {place: f"o_{v}" for v, place in k.at.items()}
        for s in all_statements(k.body):
            if isinstance(s, Load):
                self.texts.loads.add(s.value.name)
            if isinstance(s, Load | Map | Reduce | Dot):
                known = self.texts.axes_of.setdefault(s.value.name, s.value.axes)
                assert known == s.value.axes, f"{s.value.name} has axes {known} and {s.value.axes}"
        self.depth += k.walks_grid
        for s in k.body:
            self._statement(s)
        self.depth -= k.walks_grid
        body, self.lines = self.lines, []
        self._prologue("\n".join(body))
        constexprs = self._constexprs("\n".join([*self.lines, *body]))
        head = self._signature(constexprs)
        text = "\n".join([*head, *self.lines, *body]) + "\n"
        return KernelText(
            name=f"{k.name}_kernel",
            text=text,
            tensors=tuple(k.tensors),
            lengths=k.lengths,
            strides=tuple((t, n) for t, axes in k.tensors.items() for n in range(len(axes))),
            constexprs=constexprs,
            descriptors=tuple(t for t, yes in self.described.items() if yes),
            unspecialised=self._unspecialised(),
        )

    # --- the frame ----------------------------------------------------------------------------------------------

    def _constexprs(self, text: str) -> dict[str, int]:
        """Sizes of tiles, and extents that are fixed; that of a cut rank only where the text needs it."""
        k = self.kernel
        out = {
            extent_name(r, k.tensors): n
            for r, n in k.fixed.items()
            if not any(a.rank == r and a.role == "loop" for a in k.axes.values())
        }
        for v, axis in k.axes.items():
            name = extent_name(axis.rank, k.tensors)
            if axis.role == "whole" and (not axis.is_piece or _mentions(text, name)):
                out[name] = sum(a.extent or 0 for a in k.axes.values() if a.rank == axis.rank)
            out[self.texts.size(v)] = axis.size
        return out

    def _unspecialised(self) -> tuple[str, ...]:
        """Lengths that Triton shall not compile anew for where they are 1 or a multiple of 16.

        A mask over the last axis of a tensor is wider where its length is such a multiple; no other length matters.
        """
        k = self.kernel
        last = {rank_of(axes[-1]) for axes in k.tensors.values() if axes}
        return tuple(extent_name(r, k.tensors) for r in k.lengths if r not in last)

    def _signature(self, constexprs: Mapping[str, int]) -> list[str]:
        k = self.kernel
        rows = [", ".join(safe(t) for t in k.tensors)]
        rows += [", ".join(stride_name(t, v) for v in axes) for t, axes in k.tensors.items() if axes]
        if k.lengths:
            rows.append(", ".join(extent_name(r, k.tensors) for r in k.lengths))
        if constexprs:
            rows += textwrap.wrap(", ".join(f"{n}:_tl.constexpr" for n in constexprs), 110)
        tensors = [f"{t}: ({', '.join(rank_of(v) for v in axes)})" for t, axes in k.tensors.items()]
        general = ", ".join(f'"{n}"' for n in self._unspecialised())
        return [
            f"@triton.jit(do_not_specialize=[{general}])" if general else "@triton.jit",
            f"def {k.name}_kernel(",
            *(f"{INDENT}{r.rstrip(',').replace(':_', ': ')}," for r in rows),
            "):",
            f"{INDENT}# {'; '.join(tensors)}",
        ]

    def _prologue(self, body: str) -> None:
        k = self.kernel
        for c in k.constants:
            if c.name in k.values:
                self._line(
                    f"{safe(c.name)} = {self.texts.plain(Num(value=k.values[c.name]))}",
                    comment=str(c.expr) if not isinstance(c.expr, Num) else "",
                )
            else:
                self._line(f"{safe(c.name)} = {self.texts.plain(powers(_real(c.expr)))}", comment=str(c.expr))
        for name, text in self.texts.scalars.items():
            self._line(f"{safe(name)} = {text}")
        if k.walks_grid:
            self._ranges(body)
        self._grid(body)
        if not k.walks_grid:
            self._ranges(body)

    def _ranges(self, body: str) -> None:
        """Positions along the axes that have no tile on the grid."""
        for v, axis in self.kernel.axes.items():
            if axis.role != "grid":
                start = "".join(f"{self.texts.size(b)} + " for b in axis.before)
                for name in (f"o_{v}", f"r_{v}"):
                    if _mentions(body, name):
                        self._line(f"{name} = {start}tl.arange(0, {self.texts.size(v)})")

    def _grid(self, body: str) -> None:
        """Which tile of the grid this program has, or has now: the last variable of the order changes fastest."""
        k = self.kernel
        tiles = [
            (f"i_{v}", f"tl.cdiv({self.texts.extent(rank_of(v))}, {self.texts.size(v)})") for v in reversed(k.tiles)
        ]
        heads = [(f"i_{v}", self.texts.extent(rank_of(v))) for v in reversed(k.batch)]
        roles = heads + tiles if k.schedule.order == HEADS_INSIDE else tiles + heads
        if not roles:
            return
        mine = "tl.program_id(0)"
        if k.walks_grid:
            self._line(f"tiles = {' * '.join(count for _, count in roles)}")
            self._line("# programs take the tiles of the grid in turn")
            # Where no loop is inside, Triton would copy tiles ahead into shared memory that nobody has reckoned with.
            stages = "" if any(isinstance(s, Loop) for s in k.body) else ", num_stages=1"
            self._line(f"for tile in tl.range({mine}, tiles, tl.num_programs(0){stages}):")
            self.depth += 1
            mine = "tile"
        if len(roles) > 1:
            self._line(f"pid = {mine}")
        for n, (name, count) in enumerate(roles):
            is_last = n == len(roles) - 1
            own = mine if len(roles) == 1 else "pid" if is_last else f"pid % {count}"
            if name[2:] in k.batch:
                own = f"tl.cast({own}, tl.int64)" if own == "tile" else f"{own if is_last else f'({own})'}.to(tl.int64)"
            elif k.schedule.order != ORDERS[0]:
                own = f"{count} - 1 - {own}"
            self._line(f"{name} = {own}")
            if not is_last:
                self._line(f"pid = pid // {count}")
        for v in k.tiles:
            size = self.texts.size(v)
            self._line(f"o_{v} = i_{v} * {size} + tl.arange(0, {size})")
            self._shared(body)
            if v in k.firsts:
                self._line(f"{first(v)} = i_{v} * {size}")
                self._line(f"{last(v)} = tl.minimum({first(v)} + {size}, {self.texts.extent(rank_of(v))}) - 1")
        self.depth -= k.walks_grid

    def _shared(self, body: str) -> None:
        """The coordinates of residents that share an axis."""
        named, self.texts.positions = self.texts.positions, {}
        for place, name in named.items():
            if _mentions(body, name):
                self._line(f"{name} = {self.texts.plain(place)}")
        self.texts.positions = named

    # --- statements ---------------------------------------------------------------------------------------------

    def _statement(self, s: Stmt) -> None:
        match s:
            case Load():
                self._address(s, None)
                self._load(s, None)
            case Count():
                self._count(s)
            case Map():
                self._map(s)
            case Reduce():
                self._reduce(s)
            case Dot():
                self._dot(s)
            case Store():
                self._store(s)
            case Loop():
                self._loop(s)

    def _count(self, s: Count) -> None:
        name, axes = suffix_of(s), self.kernel.tensors[s.tensor]
        base = [safe(s.tensor)]
        along = ""
        for i, d in zip(s.indices, axes, strict=True):
            if i is None:
                along = stride_name(s.tensor, d)
            else:
                base.append(f"{self.texts.plain(i)} * {stride_name(s.tensor, d)}")
        self._line(f"p_{name} = {' + '.join(base)}")
        limit, length = self.texts.plain(s.limit), self.texts.plain(s.length)
        self._assign(s.value.name, f"_count(p_{name}, {along}, {length}, {limit})", (), "")

    def _map(self, s: Map) -> None:
        t = self.texts.of(s.expr)
        name = s.value.name
        if isinstance(s.expr, Num):
            shape = self.texts.shape(s.value.axes)
            self._assign(name, f"tl.full({shape}, {t.text}, tl.float32)", (), s.note)
            return
        if isinstance(s.expr, Apply) and s.expr.row.condition:
            t = Text(f"tl.cast({t.text}, tl.float32)", ATOM, t.axes)
        t = self.texts.expand(t, s.value.axes)
        text = t.text
        missing = set(s.value.axes) - set(self.texts.of(s.expr).axes)
        if missing:
            text = (
                f"tl.broadcast_to({text}, {self.texts.shape(s.value.axes)})"
                if t.axes
                else (f"tl.full({self.texts.shape(s.value.axes)}, 0.0, tl.float32) + {text}")
            )
        if isinstance(s.expr, Read) and s.expr.tensor in self.texts.loads:
            text = text if text.endswith("float32)") else f"{text}.to(tl.float32)"
        self._assign(name, text, s.value.axes, s.note)

    def _reduce(self, s: Reduce) -> None:
        t = self.texts.of(s.expr)
        if isinstance(s.expr, Apply) and s.expr.row.condition:
            t = Text(f"tl.cast({t.text}, tl.float32)", ATOM, t.axes)
        row = REDUCTIONS[s.reduce]
        if not set(s.over) <= set(t.axes):
            text = f"tl.broadcast_to({self.texts.expand(t, s.axes).text}, {self.texts.shape(s.axes)})"
            axes = s.axes
        else:
            axes = tuple(v for v in s.axes if v in t.axes)
            text = self.texts.expand(t, axes).text
        for v in sorted(s.over, key=axes.index, reverse=True):
            text = row.triton.format(text, axes.index(v))
            axes = tuple(a for a in axes if a != v)
        self._assign(s.value.name, self._grown(text, axes, s.value.axes), s.value.axes, s.note)

    def _dot(self, s: Dot) -> None:
        i, j = s.value.axes
        left, right = self._operand(s, s.left.name, (i, s.over)), self._operand(s, s.right.name, (s.over, j))
        parts = [left, right]
        if s.accumulate is not None:
            parts.append(self.texts.inside(s.accumulate, s.value.axes))
        text = f'tl.dot({", ".join(parts)}, input_precision="{self.precision}")'
        self._assign(s.value.name, text, s.value.axes, s.note)

    def _operand(self, s: Dot, name: str, axes: tuple[str, str]) -> str:
        """An operand in the dtype that tensor cores take: that of the inputs."""
        text = name
        if not self._is_main(name):
            other = s.right.name if name == s.left.name else s.left.name
            main = f"{other}.dtype" if self._is_main(other) else f"{safe(self._main())}.dtype.element_ty"
            text += f".to({main})"
        return text if self.texts.axes_of[name] == axes else f"tl.trans({text})"

    def _main(self) -> str:
        """The tensor whose dtype is that of the computation: the first input."""
        own = self._inputs()
        return next((t for t in self.kernel.tensors if t in own), next(iter(self.kernel.tensors)))

    def _is_main(self, name: str) -> bool:
        return name in self.texts.loads and self._tensor_of(name) in self._inputs()

    def _tensor_of(self, name: str) -> str:
        return next(s.tensor for s in all_statements(self.kernel.body) if isinstance(s, Load) and s.value.name == name)

    def _inputs(self) -> set[str]:
        """Tensors in the dtype of the computation: inputs, but for what a forward has saved, as rows of float32."""
        given = {i.tensor for i in self.kernel.cascade.inputs if not i.is_saved}
        return {t for t in self.kernel.tensors if t in given and t not in self.kernel.buffers}

    # --- loops --------------------------------------------------------------------------------------------------

    def _loop(self, loop: Loop) -> None:
        tiles: dict[str, Load | Store] = {}
        for g in loop.segments:
            for s in g.body:
                if isinstance(s, Load) or (isinstance(s, Store) and s.adds):
                    tiles.setdefault(suffix_of(s), s)
        around = self.texts.positions
        if loop.inner is not None:
            self.texts.positions = {
                **around,
                position_of(loop): f"o_{variable_of(loop.rank)}",
                apply("mul", *position_product(loop)): start_name(loop),
            }
            self.texts.walked = (*self.texts.walked, loop.inner)
        for s in tiles.values():
            if self._is_fixed(s, loop):
                self._address(s, loop)
        if loop.parts > 1:
            self._line(f"# the live tiles lie in at most {loop.parts} parts")
            self._line(f"for part in tl.range(0, {loop.parts}):")
            self.depth += 1
        else:
            for pointer, stride in self._moving(tiles, loop).items():
                # A stride is 32 bits wide where it fits, a tile of strides need not be.
                self._line(f"step_{pointer} = tl.cast({stride}, tl.int64) * {self.texts.step(loop.inner or '')}")
        for head in loop.heads:
            self._map(head)
        for g in loop.segments:
            self._segment(loop, g, tiles)
        self.depth -= loop.parts > 1
        self.texts.positions = around
        if loop.inner is not None:
            self.texts.walked = self.texts.walked[:-1]

    def _moving(self, tiles: Mapping[str, Load | Store], loop: Loop) -> dict[str, str]:
        """The pointers that move on with each step of a loop, and the strides along it."""
        found = {}
        for s in tiles.values():
            if self._is_fixed(s, loop) and not self._by_descriptor(s, loop):
                _, _, moves = self._dimensions(s, loop)
                if moves is not None:
                    found[pointer_of(s)] = moves
        return found

    def _segment(self, loop: Loop, g: Segment, tiles: Mapping[str, Load | Store]) -> None:
        lo, hi = self.texts.plain(g.lo), self.texts.plain(g.hi)
        step = f", {self.texts.step(loop.inner)}" if loop.inner is not None else ""
        tested = [str(c) for c in g.tested]
        if tested:
            self._line("# tiles that test " + " and ".join(_readable(c, loop) for c in tested))
        else:
            self._line("# tiles whose points are all live" if loop.inner is not None else f"# steps of {loop.index}")
        before = "-1" if lo == "0" else f"{lo} - 1"
        span = f"{hi} - 1, {before}, -1" if loop.descending else f"{lo}, {hi}{step}"
        # What a loop around another leaves as it is would be kept in registers through the inner one.
        kept = ", disable_licm=True" if any(isinstance(x, Loop) for x in g.body) else ""
        self._line(f"for {start_name(loop)} in tl.range({span}{kept}):")
        self.depth += 1
        self.pointed = ""
        mark = len(self.lines)
        for s in g.tile:
            self._statement(s)
        if g.live is not None:
            self._line(f"if {self._test(g.live)}:", comment="else no point of the tile is live")
            self.depth += 1
        for s in g.body:
            if isinstance(s, Load):
                if not self._is_fixed(s, loop):
                    self._address(s, None)
                self._load(s, loop if self._is_fixed(s, loop) else None)
            elif isinstance(s, Store) and suffix_of(s) in tiles and self._is_fixed(s, loop):
                self._store(s, loop)
            else:
                self._statement(s)
        self.depth -= g.live is not None
        if loop.inner is not None:
            name = f"o_{variable_of(loop.rank)}"
            if any(_mentions(line, name) for line in self.lines[mark:]):
                self.lines.insert(mark, INDENT * self.depth + f"{name} = {start_name(loop)} + r_{loop.inner}")
        for pointer in self._moving(tiles, loop) if loop.parts == 1 else ():
            self._line(f"p_{pointer} += step_{pointer}")
        self.depth -= 1
        self.pointed = ""

    def _test(self, condition: Expr) -> str:
        """A condition of numbers, in parts that each stand in brackets."""
        text = self.texts.plain(condition)
        for t, name in self.texts.temporaries.items():
            self._line(f"{name} = {t}")
        self.texts.temporaries.clear()
        return text


def _mentions(line: str, name: str) -> bool:
    return re.search(rf"^[^#\n]*\b{name}\b", line, re.MULTILINE) is not None


def _readable(condition: str, loop: Loop) -> str:
    if loop.inner is None:
        return condition
    v = variable_of(loop.rank)
    position = str(position_of(loop))
    return condition.replace(f"({position})", v).replace(position, v)


def _real(expr: Expr) -> Expr:
    """An arithmetic expression over extents: whole numbers become real where an operator needs real ones."""
    if not isinstance(expr, Apply):
        return expr
    args = tuple(_real(a) for a in expr.args)
    if not expr.row.symbol or expr.op in ("pow", "div"):
        args = tuple(apply("mul", a, Num(value=1.0)) if isinstance(a, Scalar) and a.is_extent else a for a in args)
    return Apply(op=expr.op, args=args)
