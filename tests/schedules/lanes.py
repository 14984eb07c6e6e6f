"""Lowered kernels run on coordinates alone, one lane at a time: what they load, store and compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from einsumcascade.codegen.kernel_ir import Dot, Load, Loop, Map, Reduce, Stmt, Store, TileKernel
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var, rank_of, reads, subexpressions


@dataclass
class Walked:
    """What the programs of one kernel did, counted one lane at a time.

    Args:
        loads, stores: elements by tensor.
        products, exponentials: of tiles, lane by lane.
        programs, steps: how many.
    """

    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    products: int = 0
    exponentials: int = 0
    programs: int = 0
    steps: int = 0
    # Lanes of a statement at the coordinates that enter its masks: programs of one batch differ in no lane.
    known: dict[tuple[object, ...], int] = field(default_factory=dict)


def walk(kernel: TileKernel, binding: Binding) -> Walked:
    """Run every program of a kernel on coordinates alone."""
    inputs = [t for t in kernel.tensors if t not in kernel.outputs]
    out = Walked(loads=dict.fromkeys(inputs, 0), stores=dict.fromkeys(kernel.outputs, 0))
    batch = [range(binding.extents[rank_of(v)]) for v in kernel.batch]
    tiles = [range(0, binding.extents[rank_of(v)], kernel.axes[v].size) for v in kernel.tiles]
    for at in itertools.product(*batch, *tiles):
        program = _Program(kernel=kernel, binding=binding, out=out)
        for v, n in zip((*kernel.batch, *kernel.tiles), at, strict=True):
            program.scalars[v] = n
            if v in kernel.tiles:
                last = min(n + kernel.axes[v].size, binding.extents[rank_of(v)]) - 1
                program.scalars |= {f"first_{v}": n, f"last_{v}": last}
        out.programs += 1
        program.run(kernel.body)
    return out


@dataclass
class _Program:
    kernel: TileKernel
    binding: Binding
    out: Walked
    scalars: dict[str, float] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def run(self, body: tuple[Stmt, ...]) -> None:
        for s in body:
            if isinstance(s, Load | Map | Reduce | Dot):
                self.axes[s.value.name] = s.value.axes
            match s:
                case Load():
                    self.out.loads[s.tensor] += self.lanes(s, s.value.axes)
                    if not s.value.axes:
                        # What tensors hold is not known: the longest of all sequences.
                        self.scalars[s.value.name] = 1 << 30
                case Store():
                    self.out.stores[s.tensor] += self.lanes(s, s.axes)
                case Map() if not s.value.axes and self.known(s.expr):
                    self.scalars[s.value.name] = self.value(s.expr, {})
                case Dot():
                    self.out.products += math.prod(self.kernel.axes[v].size for v in (*s.value.axes, s.over))
                case Loop():
                    for _ in range(s.parts):
                        self.run(s.heads)
                        for g in s.segments:
                            for start in range(int(self.value(g.lo, {})), int(self.value(g.hi, {})), s.step):
                                self.scalars[s.index] = start // s.step
                                self.run(g.tile)
                                if g.live is None or self.value(g.live, {}):
                                    # A loop that only repeats another has no steps of its own.
                                    repeats = any(isinstance(x, Loop) for x in g.body)
                                    self.out.steps += not (repeats and all(isinstance(x, Load | Loop) for x in g.body))
                                    self.run(g.body)
                    self.scalars.pop(s.index, None)
                case _:
                    pass
            if isinstance(s, Map | Reduce | Store):
                self.count_exponentials(s.expr)

    def count_exponentials(self, expr: Expr) -> None:
        for e in subexpressions(expr):
            if isinstance(e, Apply) and e.row.cost == "exp":
                over = {v for r in reads(e) for v in self.axes.get(r.tensor, ())}
                over |= {x.name for x in subexpressions(e) if isinstance(x, Var) and x.name in self.kernel.axes}
                self.out.exponentials += math.prod(self.kernel.axes[v].size for v in over)

    def lanes(self, s: Load | Store, axes: tuple[str, ...]) -> int:
        """How many lanes a load or store touches; a mask over data passes."""
        tested = [c for c in s.mask if self.known(c, axes)]
        first = [int(self.scalars[v]) if self.kernel.axes[v].role == "grid" else 0 for v in axes]
        entering = {x.name if isinstance(x, Var) else x.tensor for c in tested for x in leaves(c)} - set(axes)
        key = (id(s), *first, *(self.scalars[n] for n in sorted(entering)))
        if key not in self.out.known:
            spans = [range(n, n + self.kernel.axes[v].size) for n, v in zip(first, axes, strict=True)]
            points = (dict(zip(axes, lane, strict=True)) for lane in itertools.product(*spans))
            self.out.known[key] = sum(all(self.value(c, at) for c in tested) for at in points)
        return self.out.known[key]

    def known(self, expr: Expr, axes: tuple[str, ...] = ()) -> bool:
        """Whether an expression is one of coordinates and named bounds alone."""
        inside = list(subexpressions(expr))
        return all(r.tensor in self.scalars for r in inside if isinstance(r, Read)) and all(
            x.name in self.scalars or x.name in axes for x in inside if isinstance(x, Var)
        )

    def value(self, expr: Expr, at: Mapping[str, int]) -> float:
        match expr:
            case Num(value=value):
                return value
            case Var(name=name):
                return at[name] if name in at else self.scalars[name]
            case Read(tensor=name):
                return self.scalars[name]
            case Scalar(name=name):
                own = {a.rank: a.size for a in self.kernel.axes.values() if a.role == "loop"}
                if name in own:
                    return own[name]
                if name in self.binding.extents:
                    return self.binding.extents[name]
                if name in self.binding.constants:
                    return self.binding.constants[name]
                definition = next(d for d in self.kernel.cascade.ranks if rank_of(d.name) == name)
                return self.value(definition.expr, {})
            case Apply(op=op, args=args):
                numbers = tuple(Num(value=self.value(a, at)) for a in args)
                if op in ("below", "above"):
                    return int(numbers[0].value)
                return Binding(extents={}, constants={}).value(Apply(op=op, args=numbers))


def leaves(expr: Expr) -> Iterator[Var | Read]:
    return (x for x in subexpressions(expr) if isinstance(x, Var | Read))
