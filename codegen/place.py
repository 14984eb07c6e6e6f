"""Lower a kernel: place the Einsums of its loop form as statements over tiles.

The input is an ordinary cascade whose reductions over looped ranks are iterations; nothing here knows what it
computes. Axes come from roles, masks from constraints, loop bounds from the same constraints by arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from einsumcascade.codegen.body import Body
from einsumcascade.codegen.kernel_ir import Axis, Loop, Segment, Stmt, TileKernel, Value, first, last
from einsumcascade.codegen.nests import Nest, nested
from einsumcascade.codegen.parameters import constants_used, extents_used, names_used
from einsumcascade.codegen.rows import Rows
from einsumcascade.codegen.segments import runs_of, walk_of
from einsumcascade.codegen.values import not_lowered
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Scalar,
    Var,
    rank_of,
    scalars,
    variables,
    walk,
)
from einsumcascade.rewrites.base_two import to_base_two
from einsumcascade.rewrites.loop_form import loop_form
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import grid_tiles, held, padded, steps_of_tiles
from einsumcascade.schedules.schedule import KernelSchedule


def lower(
    kernel: Kernel, program: Program, schedule: KernelSchedule, binding: Binding, *, exact: bool = False
) -> TileKernel:
    """Lower one kernel of a program to statements over tiles.

    Args:
        kernel: one of `program.kernels`.
        schedule: its tiles; legal for it.
        binding: extents of the bounded ranks, and constants.
        exact: leave exponentials as they are. A score and its reference are then subtracted before anything is
            multiplied: where they are large, two rounded products would differ by more than the score's own error.

    Returns: the kernel's statements, with masks and loop bounds.
    Raises: LoweringError: a construct has no lowering yet; the message names it.
    Cost: linear in the Einsums; the corrections' proofs are cached.
    """
    iterated = {s.var for s in kernel.cascade.body if isinstance(s, Iter)}
    derived = tuple(v for v in kernel.loops if v not in iterated)
    if not derived:
        cascade = kernel.cascade if exact else to_base_two(kernel.cascade)
        return _Placer(kernel, program, cascade, schedule, binding, None).run()
    added = frozenset(kernel.scattered)
    form = loop_form(kernel.cascade, over=derived, tile=schedule.tiles[derived[-1]], added=added)
    nest = nested(form.cascade if exact else to_base_two(form.cascade), form, derived)
    return _Placer(kernel, program, nest.cascade, schedule, binding, nest).run()


@dataclass(slots=True)
class _Placer:
    kernel: Kernel
    program: Program
    cascade: Cascade
    schedule: KernelSchedule
    binding: Binding
    nest: Nest | None  # the loops that loop form made, if it made any

    def run(self) -> TileKernel:
        grid = grid_tiles(self.kernel)
        axes = self._axes(grid)
        batch = tuple(v for v in self.kernel.residents if v not in grid)
        packed = self.kernel.packed
        body = Body(
            cascade=self.cascade,
            axes=axes,
            tensors=self._tensors(),
            outputs=self.cascade.output_names,
            batch=batch,
            in_range={**(self.nest.within if self.nest else {}), **(packed.within if packed else {})},
            scattered=frozenset(self.kernel.scattered),
            packed=packed,
        )
        statements: list[Stmt] = []
        pending = list(self.cascade.body)
        inits = {s.tensor: s for s in pending if isinstance(s, Init)}
        for s in pending:
            match s:
                case Einsum():
                    statements += body.place(s, tested=self._always(s))
                case Iter():
                    statements += self._iterate(s, inits, body, grid)
                case Init():
                    pass
        whole = (*body.prologue, *statements)
        used, fixed = names_used(whole), self._fixed()
        constants, values = constants_used(self.cascade, used, fixed, self.binding)
        used |= set(scalars(*(c.expr for c in constants if c.name not in values)))
        extents = extents_used(self.cascade, used, axes, batch, self.binding)
        return TileKernel(
            name=self.kernel.name,
            cascade=self.cascade,
            axes=axes,
            batch=batch,
            tiles=grid,
            lengths=tuple(r for r in extents if r not in fixed),
            fixed={r: n for r, n in fixed.items() if r in extents},
            constants=constants,
            values=values,
            body=whole,
            schedule=self.schedule,
            tensors=self._tensors() | {t: self._tensors()[x.tensor] for t, x in body.tables.items()},
            outputs=self.cascade.output_names,
            tables=tuple(body.tables.values()),
            buffers=tuple(t for t in self.program.buffers if t in self._tensors()),
            firsts=tuple(v for v in grid if {first(v), last(v)} & used),
            scattered=tuple(self.kernel.scattered),
            at=packed.at if packed else {},
        )

    # --- axes and names -----------------------------------------------------------------------------------------

    def _fixed(self) -> dict[str, int]:
        return {rank_of(v): self.binding.extents[rank_of(v)] for v in self.program.bounded} | {
            rank_of(v): n for v, n in self._inner().items()
        }

    def _inner(self) -> dict[str, int]:
        """The tile variable that loop form added, and its extent."""
        if self.nest is None:
            return {}
        own = {d.name for d in self.kernel.cascade.ranks}
        return {
            d.name: d.expr.value
            for d in self.cascade.ranks
            if d.name not in own and isinstance(d.expr, Num) and isinstance(d.expr.value, int)
        }

    def _axes(self, grid: tuple[str, ...]) -> dict[str, Axis]:
        out: dict[str, Axis] = {}
        for v in grid:
            out[v] = Axis(var=v, rank=rank_of(v), size=self.schedule.tiles[v], extent=None, role="grid")
        space = dict.fromkeys(
            v
            for s in walk(self.cascade.body)
            if isinstance(s, Einsum | Init)
            for v in (s.space if isinstance(s, Einsum) else s.free)
        )
        for v, n in self._inner().items():
            out[v] = Axis(var=v, rank=rank_of(v), size=n, extent=n, role="loop")
        iterated = {s.var for s in walk(self.cascade.body) if isinstance(s, Iter)}
        walked = steps_of_tiles(self.cascade)
        inner = [v for v in self.program.bounded if v in {d.name for d in self.cascade.ranks}]
        for v in (*inner, *space):
            if v in out or v in iterated or v not in self.program.bounded or v not in space:
                continue
            n = self.binding.extents[rank_of(v)]
            size = padded(n) if v in walked else held(n)
            out[v] = Axis(var=v, rank=rank_of(v), size=size, extent=n, role="whole")
        for e in self.cascade.body:
            if isinstance(e, Einsum) and set(e.space) & iterated:
                raise not_lowered(e, f"an Einsum over '{next(iter(set(e.space) & iterated))}' beside its iteration")
        unknown = [v for v in space if v not in out and v not in iterated and v not in self.kernel.residents]
        # A sum over a rank that a loop walks is a state of the loop; else it would have to end before it is read.
        unknown += [v for e in self.cascade.einsums for v in e.ranks if v in iterated]
        if unknown:
            writer = next(e for e in self.cascade.einsums if unknown[0] in e.space)
            raise not_lowered(writer, f"a rank that is neither looped nor whole ('{unknown[0]}')")
        return out

    def _tensors(self) -> dict[str, tuple[str, ...]]:
        out = {i.tensor: i.indices for i in self.cascade.inputs}
        if self.kernel.packed is not None:
            return out | dict(self.kernel.packed.stored)
        for e in self.cascade.einsums:
            if e.tensor in self.cascade.output_names:
                own = tuple(i.name for i in e.indices if isinstance(i, Var))
                out[e.tensor] = self.kernel.scattered.get(e.tensor, own)
        return out

    def _always(self, s: Einsum) -> tuple[Expr, ...]:
        """Conditions that an Einsum outside loops must test: every constraint over its space, and its own."""
        space = set(s.space)
        if self.nest is not None and s.tensor in self.kernel.scattered:
            # What is added as it passes is summed over loops that its indices do not show.
            (made,) = (e for e in self.kernel.cascade.einsums if e.tensor == s.tensor)
            space |= {loop for v, loop in self.nest.walks.items() if v in made.space}
        return (*(c for c in self.cascade.constraints if set(variables(c)) <= space), *s.where)

    # --- loops --------------------------------------------------------------------------------------------------

    def _iterate(self, block: Iter, inits: Mapping[str, Init], body: Body, grid: tuple[str, ...]) -> list[Stmt]:
        repeating: list[str] = []
        while self.nest is not None and block.var in self.nest.outer:
            repeating.append(block.var)
            body.repeat(block.var)
            (repeated,) = block.body
            assert isinstance(repeated, Iter)
            block = repeated
        mine = [s.tensor for s in block.body if isinstance(s, Einsum) and s.tensor in inits]
        end: Expr = Num(value=0) if block.descending else Scalar(name=rank_of(block.var))
        if repeating and self.nest is not None:
            end = self.nest.end
        inner_einsums = [s for s in block.body if isinstance(s, Einsum)]
        before: list[Stmt] = []
        body.enter(block.var, frozenset(mine), descending=block.descending)
        for t in dict.fromkeys(mine):
            before += body.seed(inits[t], next(e for e in inner_einsums if e.tensor == t))
        moves_by = walk_of(block, inner_einsums, body.axes, self.cascade.constraints)
        walked = set(variables(*moves_by.position))
        looped = [e for e in inner_einsums if walked & set(e.ranks) or e.tensor in self.kernel.scattered]
        every = tuple(dict.fromkeys(c for e in looped for c in self._always(e)))
        shared = [c for c in every if all(c in self._always(e) for e in looped)]
        common = [c for c in shared if not set(repeating) & set(variables(c))]
        rows = Rows(body, grid, inner_einsums[0])
        found = runs_of(
            moves_by, common, rows.known(), tile=rows.tile, skips=self.nest is not None, one_loop=self.schedule.one_loop
        )
        before += [*rows.made, *found.names]
        outside = body.snapshot()
        built = []
        for run in found.runs:
            body.restore(outside)
            inside: list[Stmt] = []
            for n, e in enumerate(block.body):
                later = tuple(x for x in walk(block.body[n + 1 :]) if isinstance(x, Einsum))
                match e:
                    case Iter():
                        inside += self._iterate(e, inits, body, grid)
                    case Einsum():
                        tested = tuple(c for c in self._always(e) if c not in run.holding)
                        inside += body.place(e, tested=tested, later=later, free_of=run.holding)
            carries, moves = body.close()
            built.append(
                Segment(
                    lo=run.lo,
                    hi=run.hi,
                    tested=tuple(c for c in every if c not in run.holding),
                    body=(*inside, *moves),
                    carries=carries,
                    tile=run.tile,
                    live=run.live,
                )
            )
        body.leave(outside, end)
        if block.descending and (found.parts > 1 or moves_by.inner is not None):
            raise not_lowered(block, "a descending iteration over tiles of a rank")
        done: list[Stmt] = [
            Loop(
                index=moves_by.index,
                inner=moves_by.inner,
                step=moves_by.step,
                rank=moves_by.rank,
                segments=tuple(reversed(built) if block.descending else built),
                parts=found.parts,
                heads=found.heads,
                descending=block.descending,
            ),
        ]
        for v in reversed(repeating):
            done = [_repeated(v, (*body.repeated(), *done), built[0].carries)]
        return [*before, *done]


def _repeated(index: str, body: tuple[Stmt, ...], carries: tuple[Value, ...]) -> Loop:
    """A loop that does nothing but repeat others, which carry their states through it."""
    every = Segment(lo=Num(value=0), hi=Scalar(name=rank_of(index)), tested=(), body=body, carries=carries)
    return Loop(index=index, inner=None, step=1, rank=rank_of(index), segments=(every,))
