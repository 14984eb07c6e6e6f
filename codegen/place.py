"""Lower a kernel: place the Einsums of its loop form as statements over tiles.

The input is an ordinary cascade whose reductions over looped ranks are iterations; nothing here knows what it
computes. Axes come from roles, masks from constraints, loop bounds from the same constraints by arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from einsumcascade.codegen.body import Body, not_lowered
from einsumcascade.codegen.bounds import Interval, ceil_to, floor_to, interval, linear, meet
from einsumcascade.codegen.kernel_ir import Axis, Loop, Map, Segment, Stmt, TileKernel, Value, first, last
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    scalars,
    subexpressions,
    variable_of,
    variables,
    walk,
)
from einsumcascade.rewrites.base_two import to_base_two
from einsumcascade.rewrites.loop_form import loop_form
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import grid_tiles
from einsumcascade.schedules.schedule import KernelSchedule


def lower(kernel: Kernel, program: Program, schedule: KernelSchedule, binding: Binding) -> TileKernel:
    """Lower one kernel of a program to statements over tiles.

    Args:
        kernel: one of `program.kernels`.
        schedule: its tiles; legal for it.
        binding: extents of the bounded ranks, and constants.

    Returns: the kernel's statements, with masks and loop bounds.
    Raises: LoweringError: a construct has no lowering yet; the message names it.
    Cost: linear in the Einsums; the corrections' proofs are cached.
    """
    iterated = {s.var for s in kernel.cascade.body if isinstance(s, Iter)}
    derived = tuple(v for v in kernel.loops if v not in iterated)
    cascade = kernel.cascade
    in_range: dict[Expr, str] = {}
    if derived:
        form = loop_form(cascade, over=derived, tile=schedule.tiles[derived[-1]])
        cascade = form.cascade
        in_range = {form.points[v]: rank_of(v) for v in derived if v != derived[-1] or not form.inner}
    cascade = to_base_two(cascade)
    return _Placer(kernel, program, cascade, schedule, binding, bool(derived), in_range).run()


def padded(extent: int) -> int:
    """The tile that holds a whole rank: a power of two of at least 16, so that products take it."""
    return max(16, 1 << (max(extent, 1) - 1).bit_length())


@dataclass(slots=True)
class _Placer:
    kernel: Kernel
    program: Program
    cascade: Cascade
    schedule: KernelSchedule
    binding: Binding
    derived: bool
    in_range: Mapping[Expr, str]

    def run(self) -> TileKernel:
        grid = grid_tiles(self.kernel)
        axes = self._axes(grid)
        batch = tuple(v for v in self.kernel.residents if v not in grid)
        body = Body(cascade=self.cascade, axes=axes, tensors=self._tensors(), outputs=self.cascade.output_names,
                    in_range=self.in_range)
        statements: list[Stmt] = []
        pending = list(self.cascade.body)
        inits = {s.tensor: s for s in pending if isinstance(s, Init)}
        for s in pending:
            match s:
                case Einsum():
                    statements += body.place(s, tested=self._always(s), masked=True)
                case Iter():
                    statements += self._iterate(s, inits, body, grid)
                case Init():
                    pass
        used = self._names([*body.prologue, *statements])
        constants, values = self._constants(used)
        extents = self._extents(used | set(scalars(*(c.expr for c in constants if c.name not in values))), axes, batch)
        return TileKernel(
            name=self.kernel.name, cascade=self.cascade, axes=axes, batch=batch, tiles=grid,
            lengths=tuple(r for r in extents if r not in self._fixed()),
            fixed={r: n for r, n in self._fixed().items() if r in extents},
            constants=constants, values=values, body=(*body.prologue, *statements), schedule=self.schedule,
            tensors=self._tensors(), outputs=self.cascade.output_names,
            buffers=tuple(t for t in self.program.buffers if t in self._tensors()),
            firsts=tuple(v for v in grid if {first(v), last(v)} & used),
        )

    # --- axes and names -----------------------------------------------------------------------------------------

    def _fixed(self) -> dict[str, int]:
        return {rank_of(v): self.binding.extents[rank_of(v)] for v in self.program.bounded} | {
            rank_of(v): n for v, n in self._inner().items()}

    def _inner(self) -> dict[str, int]:
        """The tile variable that loop form added, and its extent."""
        if not self.derived:
            return {}
        own = {d.name for d in self.kernel.cascade.ranks}
        return {d.name: d.expr.value for d in self.cascade.ranks if d.name not in own and isinstance(d.expr, Num)
                and isinstance(d.expr.value, int)}

    def _axes(self, grid: tuple[str, ...]) -> dict[str, Axis]:
        out: dict[str, Axis] = {}
        for v in grid:
            out[v] = Axis(var=v, rank=rank_of(v), size=self.schedule.tiles[v], extent=None, role="grid")
        space = dict.fromkeys(v for s in walk(self.cascade.body) if isinstance(s, Einsum | Init)
                              for v in (s.space if isinstance(s, Einsum) else s.free))
        for v, n in self._inner().items():
            out[v] = Axis(var=v, rank=rank_of(v), size=n, extent=n, role="loop")
        iterated = {s.var for s in self.cascade.body if isinstance(s, Iter)}
        inner = [v for v in self.program.bounded if v in {d.name for d in self.cascade.ranks}]
        for v in (*inner, *space):
            if v in out or v in iterated or v not in self.program.bounded or v not in space:
                continue
            n = self.binding.extents[rank_of(v)]
            out[v] = Axis(var=v, rank=rank_of(v), size=padded(n), extent=n, role="whole")
        unknown = [v for v in space if v not in out and v not in iterated and v not in self.kernel.residents]
        if unknown:
            writer = next(e for e in self.cascade.einsums if unknown[0] in e.space)
            raise not_lowered(writer, f"a rank that is neither looped nor whole ('{unknown[0]}')")
        return out

    def _tensors(self) -> dict[str, tuple[str, ...]]:
        out = {i.tensor: i.indices for i in self.cascade.inputs}
        for e in self.cascade.einsums:
            if e.tensor in self.cascade.output_names:
                out[e.tensor] = tuple(i.name for i in e.indices if isinstance(i, Var))
        return out

    def _names(self, statements: list[Stmt]) -> set[str]:
        from einsumcascade.codegen.body import expressions

        names: set[str] = set()
        for e in expressions(tuple(statements)):
            for x in subexpressions(e):
                if isinstance(x, Scalar):
                    names.add(x.name)
                elif hasattr(x, "tensor"):
                    names.add(x.tensor)
        return names

    def _constants(self, used: set[str]) -> tuple[tuple, dict[str, float]]:  # type: ignore[type-arg]
        """Constants used, in order, with the value of those that no length enters."""
        fixed = set(self._fixed())
        kept, values, wanted = [], {}, set(used)
        for c in reversed(self.cascade.constants):
            if c.name in wanted:
                wanted |= set(scalars(c.expr))
        known = set(fixed)
        for c in self.cascade.constants:
            if c.name in wanted:
                kept.append(c)
                if set(scalars(c.expr)) <= known or c.name in self._overridden():
                    known.add(c.name)
                    values[c.name] = self.binding.constants[c.name]
        return tuple(kept), values

    def _overridden(self) -> set[str]:
        return set(getattr(self.binding, "given_constants", ()))

    def _extents(self, used: set[str], axes: Mapping[str, Axis], batch: tuple[str, ...]) -> tuple[str, ...]:
        """Extents that the kernel names: lengths become arguments."""
        ranks = {rank_of(d.name): d for d in self.cascade.ranks}
        wanted: dict[str, None] = {rank_of(v): None for v in (*batch, *(a for a in axes if axes[a].role == "grid"))}
        wanted |= {n: None for n in sorted(used) if n[0].isupper()}
        for d in (*self.cascade.ranks, *self.cascade.ranks):
            if rank_of(d.name) in wanted:
                wanted |= {n: None for n in scalars(d.expr) if n[0].isupper()}
        known = {rank_of(v) for i in self.cascade.inputs for v in i.indices} | set(self.binding.extents)
        return tuple(n for n in wanted if n in known and (n not in ranks or n in self._fixed() or True))

    def _always(self, s: Einsum) -> tuple[Expr, ...]:
        """Conditions that an Einsum outside loops must test: every constraint over its space, and its own."""
        return (*(c for c in self.cascade.constraints if set(variables(c)) <= set(s.space)), *s.where)

    # --- loops --------------------------------------------------------------------------------------------------

    def _iterate(self, block: Iter, inits: Mapping[str, Init], body: Body, grid: tuple[str, ...]) -> list[Stmt]:
        inner_einsums = [s for s in block.body if isinstance(s, Einsum)]
        if len(inner_einsums) < len(block.body):
            raise not_lowered(block, "a nested iteration")
        mine = [e.tensor for e in inner_einsums if e.tensor in inits]
        before: list[Stmt] = []
        body.enter(block.var, frozenset(mine))
        for t in dict.fromkeys(mine):
            before += body.seed(inits[t], next(e for e in inner_einsums if e.tensor == t))
        inner, step, rank, position = self._geometry(block, inner_einsums, body)
        names, segments, all_conditions = self._segments(block.var, inner_einsums, position, step, rank, grid)
        before += names
        outside = body.snapshot()
        built = []
        for lo, hi, must in segments:
            body.restore(outside)
            inside: list[Stmt] = []
            for n, e in enumerate(inner_einsums):
                conditions = tuple(c for c in self._always(e) if c not in must)
                later = tuple(inner_einsums[n + 1:])
                inside += body.place(e, tested=conditions, masked=True, later=later,
                                     free_of=frozenset(must))
            carries, moves = body.close()
            built.append(Segment(lo=lo, hi=hi, tested=tuple(c for c in all_conditions if c not in must),
                                 body=(*inside, *moves), carries=carries))
        body.leave(outside)
        return [*before, Loop(index=block.var, inner=inner, step=step, rank=rank, segments=tuple(built))]

    def _geometry(self, block: Iter, einsums: list[Einsum], body: Body) -> tuple[str | None, int, str, dict[Expr, int]]:
        """The axis of the tile, elements a step covers, the extent positions run over, and the position's form."""
        index = Var(name=block.var)
        for c in (e for s in einsums for x in (s.expr, *s.where) for e in subexpressions(x)):
            form = linear(c) if isinstance(c, type(apply("add", index, index))) and c.op == "add" else None
            if form is None:
                continue
            for k, n in form.items():
                inner = [v for v in variables(*form) if v in body.axes and body.axes[v].role != "grid"]
                if n == 1 and len(inner) == 1 and form.get(Var(name=inner[0])) == 1 and len(form) == 2 and (
                        k == apply("mul", index, Scalar(name=rank_of(inner[0])))):
                    step = body.axes[inner[0]].extent
                    assert step is not None
                    length = self._length(form)
                    if length is not None:
                        return inner[0], step, length, form
        return None, 1, rank_of(block.var), {index: 1}

    def _length(self, form: dict[Expr, int]) -> str | None:
        """The extent that bounds the position: `m1 * M0 + m0 < M` says M."""
        for c in self.cascade.constraints:
            if getattr(c, "op", "") == "lt" and linear(c.args[0]) == form and isinstance(c.args[1], Scalar):  # type: ignore[union-attr]
                return c.args[1].name  # type: ignore[union-attr]
        return None

    def _segments(self, index: str, einsums: list[Einsum], position: dict[Expr, int], step: int, rank: str,
                  grid: tuple[str, ...],
                  ) -> tuple[list[Stmt], list[tuple[Expr, Expr, frozenset[Expr]]], tuple[Expr, ...]]:
        """Named bounds, the segments between them with what holds throughout each, and every condition."""
        over = set(variables(*position))
        looped = [e for e in einsums if e.ranks and over & set(e.ranks)]
        every = tuple(dict.fromkeys(c for e in looped for c in self._always(e)))
        common = [c for c in every if all(c in self._always(e) for e in looped)]
        integers = frozenset(c.name for c in self.cascade.constants
                             if isinstance(c.expr, Num) and isinstance(c.expr.value, int)
                             and float(self.binding.constants.get(c.name, 0.5)).is_integer())
        symbol: Expr = Scalar(name=rank_of(next((v for v in over if step > 1 and f"{rank_of(v)}" in
                                                 {str(s) for k in position for s in scalars(k)}), "m0")))
        solved: dict[Expr, Interval] = {}
        tail: Expr | None = None
        for c in common:
            if getattr(c, "op", "") == "lt" and linear(c.args[0]) == position and c.args[1] == Scalar(name=rank):  # type: ignore[union-attr]
                tail = c
                continue
            found = interval(c, position=position, tiled=grid, integers=integers)
            if found is not None:
                solved[c] = found
        if step == 1 and tail is None:
            return [], [(Num(value=0), Scalar(name=rank), frozenset())], every
        names: list[Stmt] = []

        def named(name: str, expr: Expr) -> Expr:
            if isinstance(expr, Num | Scalar):
                return expr
            value = Value(name=f"{name}_{variable_of(rank)}", axes=())
            names.append(Map(value=value, expr=expr))
            return Read(tensor=value.name)

        found = tuple(solved.values())
        may_lo, may_hi = [i.may_lo for i in found if i.may_lo], [i.may_hi for i in found if i.may_hi]
        must_lo, must_hi = [i.must_lo for i in found if i.must_lo], [i.must_hi for i in found if i.must_hi]
        zero, length = Num(value=0), Scalar(name=rank)
        if self.derived:
            lo = named("lo", floor_to(meet("max", [zero, *may_lo]), step, symbol)) if may_lo else zero
            hi = named("hi", meet("min", [length, *may_hi]))
        else:
            # A user's own iteration walks every tile of its rank: its recurrence may move on an empty tile too.
            lo, hi = zero, named("hi", apply("mul", Scalar(name=rank_of(index)), symbol))
        full_lo = lo
        if must_lo:
            start = apply("min", ceil_to(meet("max", [zero, *must_lo]), step, symbol), hi)
            full_lo = named("full_lo", apply("max", start, lo) if lo != zero else start)
        ends = meet("min", [length, *must_hi] if self.derived else [length, hi, *must_hi])
        full = floor_to(ends if all(map(_is_natural, must_hi)) else apply("max", ends, zero), step, symbol)
        full_hi = named("full_hi", apply("max", full, full_lo) if full_lo != zero else full)
        must = frozenset([*solved, *([tail] if tail is not None else [])])
        out: list[tuple[Expr, Expr, frozenset[Expr]]] = []
        if full_lo != lo:
            out.append((lo, full_lo, frozenset()))
        return names, [*out, (full_lo, full_hi, must), (full_hi, hi, frozenset())], every


def _is_natural(expr: Expr) -> bool:
    """Whether a bound is a sum of coordinates and whole numbers, so never negative."""
    match expr:
        case Num():
            return expr.value >= 0
        case Read() | Scalar():
            return True
        case _:
            return getattr(expr, "op", "") == "add" and all(map(_is_natural, expr.args))  # type: ignore[union-attr]
