"""The values of a kernel: what a read of the cascade becomes, and the loads that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from einsumcascade.codegen.facts import Facts, FactTable
from einsumcascade.codegen.kernel_ir import Axis, Load, Stmt, Value
from einsumcascade.errors import Diagnostic, LoweringError
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    transform,
    variable_of,
    variables,
)
from einsumcascade.schedules.program import Packing


def not_lowered(s: Statement, what: str) -> LoweringError:
    """The error for a construct that no lowering covers."""
    return LoweringError(
        diagnostics=(
            Diagnostic(
                code="not-lowered-yet",
                headline=f"{what} has no lowering yet",
                span=s.span,
                rule="reference, analysis and derivation work all the same",
                hint=str(s).splitlines()[0],
            ),
        )
    )


LoadKey: TypeAlias = tuple[str, tuple[Expr, ...], tuple[Expr, ...]]


@dataclass(slots=True)
class Once:
    """A loop that only repeats the one inside, and what it loads before that one in each of its steps."""

    index: str
    made: list[Stmt] = field(default_factory=list)
    keys: list[LoadKey] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


@dataclass
class Values:
    """Values by name, with their axes and what is known of them, while a kernel is placed."""

    cascade: Cascade
    axes: Mapping[str, Axis]
    tensors: Mapping[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    batch: tuple[str, ...] = ()
    packed: Packing | None = None  # residents that share an axis
    in_range: Mapping[Expr, str] = field(default_factory=dict)  # index expressions that are always within a rank
    env: dict[tuple[str, str], Expr] = field(default_factory=dict)  # value of a tensor's generation
    loads: dict[LoadKey, Value] = field(default_factory=dict)
    hoisted: dict[LoadKey, Value] = field(default_factory=dict)  # loads before every loop
    once: list[Once] = field(default_factory=list)  # loops around that only repeat the one inside
    prologue: list[Stmt] = field(default_factory=list)
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)  # axes of every value by name
    names: dict[tuple[str, tuple[Expr, ...]], str] = field(default_factory=dict)
    seen: dict[Expr, None] = field(default_factory=dict)
    live: dict[str, str] = field(default_factory=dict)  # the masked twin of an input's value
    moving: set[str] = field(default_factory=set)  # values loaded anew in each step of the loop
    index: str | None = None
    states: frozenset[str] = frozenset()
    falling: set[str] = field(default_factory=set)  # indices of loops whose steps go down
    ends: dict[str, Expr] = field(default_factory=dict)  # the generation of a state that a loop leaves
    around: dict[str, frozenset[str]] = field(default_factory=dict)  # states of each loop around, by its index
    facts: FactTable = field(init=False)

    def __post_init__(self) -> None:
        self.facts = FactTable(self.cascade)

    def _is_input(self, expr: Expr) -> bool:
        return isinstance(expr, Read) and self.facts[expr.tensor].is_input

    def _value(self, tensor: str, axes: tuple[str, ...]) -> Value:
        return self._named(f"b_{tensor}", axes)

    def _derived(self, name: str, suffix: str) -> str:
        """A name made from another, `b_X_new`, that no tensor's value has."""
        taken = {f"b_{t}" for t in (*self.tensors, *(e.tensor for e in self.cascade.einsums))}
        candidate = f"{name}_{suffix}"
        while candidate in taken:
            candidate += "_"
        return candidate

    def _named(self, name: str, axes: tuple[str, ...]) -> Value:
        self.values[name] = axes
        return Value(name=name, axes=axes)

    def _conditions(self, *more: Expr) -> tuple[Expr, ...]:
        """Every condition whose fill is worth knowing."""
        known = tuple(self.cascade.constraints) + tuple(self._inside(v) for v in self.axes if self.axes[v].is_padded)
        self.seen = dict.fromkeys((*self.seen, *known, *more))
        return tuple(self.seen)

    def _inside(self, v: str) -> Expr:
        return apply("lt", Var(name=v), Scalar(name=rank_of(v)))

    def _live_rows(self, axes: Iterable[str]) -> tuple[Expr, ...]:
        """Where the elements of grid axes stand for something: within the rank, and within a group cut short."""
        grid = [v for v in axes if self.axes[v].role == "grid"]
        shared = self.packed.live if self.packed is not None and self.packed.variable in grid else ()
        return (*map(self._inside, grid), *shared)

    def _sorted(self, names: Iterable[str]) -> tuple[str, ...]:
        wanted = set(names)
        return tuple(v for v in self.axes if v in wanted)

    def _vars(self, *exprs: Expr) -> tuple[str, ...]:
        """Axes that expressions over values and coordinates have."""
        found: set[str] = set()
        for e in exprs:
            found |= {v for v in variables(e) if v in self.axes}
            for r in reads(e):
                found |= set(self.values.get(r.tensor, ()))
        return self._sorted(found)

    def _axes_of(self, expr: Expr) -> tuple[str, ...]:
        return self._vars(expr)

    def _values(
        self, expr: Expr, e: Einsum | Init, out: list[Stmt], free_of: object, conditions: list[Expr] | None = None
    ) -> Expr:
        """Replace reads of tensors by reads of values, loading inputs where they are first needed."""
        assert isinstance(free_of, frozenset | tuple)

        def leaf(x: Expr) -> Expr | None:
            if not isinstance(x, Read):
                return None
            if x.tensor in self.values and not x.indices and x.tensor.startswith(("b_", "first_", "last_")):
                return x
            if self.cascade.input(x.tensor) is not None:
                return self._load(x, e, out, frozenset(free_of), conditions)
            return self._computed(x, e)

        return transform(expr, leaf)

    def _computed(self, x: Read, e: Einsum | Init) -> Expr:
        tag = "cur"
        own: list[Expr] = []
        for i in x.indices:
            at, follows = self._step(i, x.tensor)
            if at is not None and follows:
                tag = "new"
            elif at is not None:
                tag = "old" if x.tensor in self._states(at) else tag
            elif (x.tensor, "last") in self.env and i == self.ends.get(x.tensor):
                tag = "last"
            else:
                own.append(i)
        if not all(isinstance(i, Var) for i in own):
            raise not_lowered(e, f"reading the computed tile {x}")
        for key in (tag,) if tag == "last" else (tag, "cur"):
            if (x.tensor, key) in self.env:
                made = self._written(x.tensor)
                here = [i.name for i in own if isinstance(i, Var)]
                there = list(made.free)
                if [v for v in here if v in self.axes] != [v for v in there if v in self.axes]:
                    raise not_lowered(e, f"reading the computed tile {x} along other variables")
                return self.env[x.tensor, key]
        raise not_lowered(e, f"reading {x}, which no loop of this kernel has finished,")

    def _step(self, i: Expr, tensor: str = "") -> tuple[str | None, bool]:
        """The loop whose index an index is, and whether it names what the step makes of a state, not what it finds."""
        for v in (*self.around, *((self.index,) if self.index is not None else ())):
            falls = v in self.falling and tensor in self._states(v)
            if i == Var(name=v):
                return v, falls
            if isinstance(i, Apply) and i.op == "add" and i.args[0] == Var(name=v):
                return v, not falls
        return None, False

    def _states(self, index: str) -> frozenset[str]:
        return self.states if index == self.index else self.around[index]

    def _written(self, tensor: str) -> Einsum:
        return next(s for s in self.cascade.einsums if s.tensor == tensor)

    def _load(
        self, x: Read, e: Einsum | Init, out: list[Stmt], free_of: frozenset[Expr], conditions: list[Expr] | None
    ) -> Expr:
        declared = self.tensors[x.tensor]
        mask: list[Expr] = []
        indices = []
        for i, d in zip(x.indices, declared, strict=True):
            i = self._values(i, e, out, free_of)
            indices.append(i)
            bound = self._bound(i, rank_of(d))
            axes = self._vars(i)
            mask += [c for v in axes if self.axes[v].is_padded and (c := self._inside(v)) != bound]
            if i == Var(name=d):
                if d in self.axes and (self.axes[d].role == "grid" or self.axes[d].is_padded):
                    mask.append(bound)
            elif self._is_within(i, rank_of(d)):
                mask += self._live_rows(axes)
            elif bound in self.cascade.constraints and is_natural(i):
                # Where bounds promise it, they do so for the live rows of a tile: the others are beyond their rank.
                padded = (self._inside(v) for v in axes if self.axes[v].role == "grid")
                mask += padded if bound in free_of else (bound,)
            else:
                checks = self._range_checks(i, d)
                mask += checks
                if conditions is not None:
                    conditions += [c for c in checks if c not in conditions]
        mask = list(dict.fromkeys(mask))
        key = (x.tensor, tuple(indices), tuple(mask))
        known = self.hoisted.get(key) or self.loads.get(key)
        if known is None:
            known = self._new_load(x.tensor, tuple(indices), tuple(mask), out)
            self.facts.of[known.name] = Facts(fills=dict.fromkeys(mask, 0.0), is_input=True)
            self.live.pop(known.name, None)
            self._place_load(key, known, out)
        elif known.name not in self.facts.of:
            self.facts.of[known.name] = Facts(fills=dict.fromkeys(mask, 0.0), is_input=True)
        return Read(tensor=self.live.get(known.name, known.name))

    def _bound(self, i: Expr, rank: str) -> Expr:
        """That an index is below an extent; where that is another's by definition, as a constraint says it."""
        equal = {r.expr.name for r in self.cascade.ranks if r.name == variable_of(rank) and isinstance(r.expr, Scalar)}
        equal |= {rank_of(r.name) for r in self.cascade.ranks if r.expr == Scalar(name=rank)}
        bounds = [apply("lt", i, Scalar(name=n)) for n in (rank, *sorted(equal))]
        return next((b for b in bounds if b in self.cascade.constraints), bounds[0])

    def _place_load(self, key: LoadKey, value: Value, out: list[Stmt]) -> None:
        """Leave a load, the last statement, where it is needed, or move it before loops that it does not hang on."""
        _, indices, mask = key
        loops = {at for v in variables(*indices, *mask) if (at := self._step(Var(name=v))[0]) is not None}
        loops |= {level.index for level in self.once if level.names & {r.tensor for r in reads(*indices, *mask)}}
        hangs = any(not self.facts[r.tensor].is_input or r.tensor in self.moving for r in reads(*indices, *mask))
        if hangs or loops - {level.index for level in self.once}:
            self.moving.add(value.name)
            self.loads[key] = value
            return
        self.hoisted[key] = value
        if not loops:
            self.prologue.append(out.pop())
            return
        level = next(level for level in reversed(self.once) if level.index in loops)
        level.made.append(out.pop())
        level.keys.append(key)
        level.names.add(value.name)

    def _is_within(self, i: Expr, rank: str) -> bool:
        """Whether an index is always within a rank: 0, a place of loop form, `h // R` in G where `rank r = H / G`."""
        if self.in_range.get(i) == rank:
            return True
        match i:
            case Apply(op="floordiv", args=(Var() as v, Scalar() as n)):
                quotient = apply("div", Scalar(name=rank_of(v.name)), Scalar(name=rank))
                return any(rank_of(d.name) == n.name and d.expr == quotient for d in self.cascade.ranks)
            case Num():
                return i.value == 0
            case _:
                return False

    def _range_checks(self, index: Expr, axis: str) -> tuple[Expr, ...]:
        """The conditions for an index to be one of an axis; of two numbers the answer is known."""
        low, high = apply("ge", index, Num(value=0)), apply("lt", index, Scalar(name=rank_of(axis)))
        extent = next((d.expr for d in self.cascade.ranks if d.name == axis), None)
        if isinstance(index, Num) and index.value >= 0:
            return () if isinstance(extent, Num) and index.value < extent.value else (high,)
        return (high,) if is_natural(index) else (low, high)

    def _new_load(self, tensor: str, indices: tuple[Expr, ...], mask: tuple[Expr, ...], out: list[Stmt]) -> Value:
        """A load under a name that the same elements always have, whatever their mask."""
        name = self.names.get((tensor, indices))
        if name is None:
            name, n = f"b_{tensor}", 2
            others = {f"b_{t}" for t in (*self.tensors, *(e.tensor for e in self.cascade.einsums)) if t != tensor}
            while name in self.values or name in others:
                name, n = f"b_{tensor}{n}", n + 1
            self.names[tensor, indices] = name
        value = self._named(name, self._load_axes(indices))
        out.append(Load(value=value, tensor=tensor, indices=indices, mask=mask))
        return value

    def _load_axes(self, indices: tuple[Expr, ...]) -> tuple[str, ...]:
        """Axes in memory order, where each index has at most one; else in the order of computed tiles."""
        each = [self._vars(i) for i in indices]
        flat = [v for vs in each for v in vs]
        if all(len(vs) <= 1 for vs in each) and len(set(flat)) == len(flat):
            return tuple(flat)
        return self._sorted(flat)


def is_natural(index: Expr) -> bool:
    """Whether an index is a sum of products of coordinates and whole numbers, so never negative."""
    match index:
        case Var():
            return True
        case Scalar():
            return index.is_extent
        case Num():
            return index.value >= 0
        case Read():
            return not index.indices and index.tensor.startswith(("first_", "last_"))
        case Apply(op="add" | "mul" | "floordiv" | "mod"):
            return all(map(is_natural, index.args))
        case _:
            return False
