"""Place single Einsums: masks, maps, reductions and products of tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from einsumcascade.codegen.facts import Facts, FactTable
from einsumcascade.codegen.forms import conjunction, is_scaled, number, powers
from einsumcascade.codegen.kernel_ir import Map, Reduce, Stmt, Store, Table, Value
from einsumcascade.codegen.products import Products
from einsumcascade.codegen.values import LoadKey, Once, is_natural, not_lowered
from einsumcascade.language.ir import (
    Apply,
    Einsum,
    Expr,
    Init,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    variables,
)


@dataclass(slots=True)
class Snapshot:
    """What a segment may change and the next one must not see."""

    env: dict[tuple[str, str], Expr]
    loads: dict[LoadKey, Value]
    facts: FactTable


@dataclass
class Body(Products):
    """The state of a kernel while its Einsums are placed one by one."""

    shared: set[Expr] = field(default_factory=set)  # constraints of the whole cascade, over values
    tables: dict[str, Table] = field(default_factory=dict)  # what bounds of loops read of inputs
    outer: list[tuple[str | None, frozenset[str], dict[str, str]]] = field(default_factory=list)  # loops around

    # --- loops --------------------------------------------------------------------------------------------------

    def enter(self, index: str, states: frozenset[str], *, descending: bool = False) -> None:
        """Begin a loop over `index` that keeps `states`."""
        if descending:
            self.falling.add(index)
        self.outer.append((self.index, self.states, self.renamed))
        if self.index is not None:
            self.around[self.index] = self.states
        self.index, self.states = index, states
        self.renamed = {}

    def repeat(self, index: str) -> None:
        """Begin a loop over `index` that only repeats the one inside."""
        self.enter(index, frozenset())
        self.once.append(Once(index))

    def repeated(self) -> list[Stmt]:
        """End it, after the one inside: what it loads before that one in each of its steps."""
        ended = self.once.pop()
        for key in ended.keys:
            del self.hoisted[key]
        self._exit()
        return ended.made

    def seed(self, init: Init, update: Einsum) -> list[Stmt]:
        """The initial value of a state, of the shape of its updates."""
        axes = self._sorted(v for v in init.free if v in self.axes)
        out: list[Stmt] = []
        expr = self._values(init.expr, init, out, ())
        value = self._value(init.tensor, axes)
        out.append(Map(value=value, expr=expr, note=str(init)))
        self.facts.of[value.name] = Facts(may_be_neg_inf=self.facts.may_be_neg_inf(expr))
        self.env[init.tensor, "old"] = Read(tensor=value.name)
        return out

    def snapshot(self) -> Snapshot:
        """Remember names and facts as they are before the segments of a loop."""
        for t in self.states:
            name = self._state_name(t)
            if self.facts[name].may_be_neg_inf is False and self._may_sink(t):
                self.facts.of[name] = Facts(may_be_neg_inf=True)
        return Snapshot(dict(self.env), dict(self.loads), self.facts.copy())

    def _may_sink(self, tensor: str) -> bool:
        """Whether an update could make a state -inf that did not start there: anything but a sum of finite terms."""
        local = self._local(tensor)
        return local is None or local.reduce != "sum"

    def restore(self, s: Snapshot) -> None:
        """Forget what a segment computed."""
        self.env, self.loads, self.facts = dict(s.env), dict(s.loads), s.facts.copy()
        self.renamed, self.live = {}, {}

    def close(self) -> tuple[tuple[Value, ...], list[Stmt]]:
        """The states of a loop, and the moves of new generations into them at the end of its body."""
        values, moves = [], []
        for t in sorted(self.states):
            name = self._state_name(t)
            values.append(Value(name=name, axes=self.values[name]))
            if t in self.renamed:
                moves.append(Map(value=values[-1], expr=Read(tensor=self.renamed[t])))
        return tuple(values), list(moves)

    def leave(self, s: Snapshot, end: Expr) -> None:
        """End a loop: its states are final, generation `end` of each."""
        self.restore(s)
        for t in self.states:
            self.ends[t] = end
            self.env[t, "last"] = Read(tensor=self._state_name(t))
        self._exit()

    def _exit(self) -> None:
        self.index, self.states, self.renamed = self.outer.pop()
        if self.index is not None:
            del self.around[self.index]

    # --- one Einsum ---------------------------------------------------------------------------------------------

    def place(
        self,
        e: Einsum,
        *,
        tested: tuple[Expr, ...],
        later: tuple[Einsum, ...] = (),
        free_of: frozenset[Expr] = frozenset(),
    ) -> list[Stmt]:
        """Place an Einsum.

        Args:
            e: the Einsum.
            tested: conditions that may fail here and that its reduction must mask.
            later: Einsums of the same loop body that follow.
            free_of: conditions that hold throughout this segment.
        """
        out: list[Stmt] = []
        conditions = list(tested)
        expr = self._values(e.expr, e, out, free_of, conditions)
        axes = self._sorted(v for v in e.free if v in self.axes)
        tag = self._tag(e)
        if e.reduce is None:
            out += self._map(e, expr, axes, tag, later, conditions)
        else:
            over = tuple(v for v in e.ranks if v in self.axes)
            shared = [v for v in over if self.axes[v].role == "grid"]
            if shared and not self._is_added(e.tensor):
                raise not_lowered(e, "a reduction over a rank that the programs of its kernel share")
            conditions += [self._inside(v) for v in over if v in shared or self.axes[v].is_padded]
            conditions = self._tested(conditions, e, out, free_of)
            out += self._reduction(e, expr, axes, over, tuple(conditions), tag, later)
        if e.tensor in self.outputs and tag == "cur":
            out.append(self._store(e, axes, tuple(tested), out, free_of))
        return out

    def _is_added(self, tensor: str) -> bool:
        """Whether programs add up a tensor in memory, or the state whose last generation they add."""
        if tensor in self.scattered:
            return True
        states = [s.tensor for s in self.cascade.einsums if self._reads_of(s) >= {tensor} and self._tag(s) == "new"]
        finals = [s.tensor for s in self.cascade.einsums if self._reads_of(s) & set(states)]
        return any(t in self.scattered for t in finals)

    def _reads_of(self, e: Einsum) -> set[str]:
        return {r.tensor for r in reads(e.expr)}

    def _tested(self, conditions: list[Expr], e: Einsum, out: list[Stmt], free_of: frozenset[Expr]) -> list[Expr]:
        """The conditions left to test, over values; an index out of range in one is a condition itself."""
        left = [c for c in dict.fromkeys(conditions) if c not in free_of and not self._left_to_readers(c, e)]
        found: list[Expr] = []
        tested = [powers(self._values(c, e, out, free_of, found), self._literals()) for c in left]
        self.shared |= {t for c, t in zip(left, tested, strict=True) if c in self.cascade.constraints}
        return list(dict.fromkeys([*found, *tested]))

    def _left_to_readers(self, c: Expr, e: Einsum) -> bool:
        """Whether a condition culls whole fibers of `e`, and every reader of it is culled at the same points."""
        if c in e.where or set(variables(c)) & set(e.ranks) or e.tensor in self.outputs:
            return False
        readers = [s for s in self.cascade.einsums if any(r.tensor == e.tensor for r in reads(s.expr, *s.where))]
        return bool(readers) and all(set(variables(c)) <= set(s.space) for s in readers)

    def _map(
        self, e: Einsum, expr: Expr, axes: tuple[str, ...], tag: str, later: tuple[Einsum, ...], conditions: list[Expr]
    ) -> list[Stmt]:
        if tag == "new" and isinstance(expr, Apply) and expr.op == "add":
            last = expr.args[1]
            if isinstance(last, Read) and last.tensor in self.pending:
                return self._accumulate(e, expr.args[0], last.tensor, later)
        out = self._flush(expr)
        stands_for_itself = isinstance(expr, Read) and not self._is_input(expr)
        if tag == "cur" and (stands_for_itself or (is_scaled(expr) and e.tensor not in self.outputs)):
            self.env[e.tensor, "cur"] = expr
            return out
        expr = self._finished(expr)
        value = self._target(e, axes if tag == "new" and e.tensor in self.states else self._axes_of(expr), tag, later)
        out.append(Map(value=value, expr=expr, note=str(e)))
        fills = {c: f for c in self._conditions() if (f := self.facts.fill(expr, c)) is not None}
        self.facts.of[value.name] = Facts(
            fills=fills,
            may_be_neg_inf=self.facts.may_be_neg_inf(expr),
            is_finite=self.facts.is_finite(expr),
            above=self.facts.above(expr),
        )
        self._bind(e, value, tag)
        return out

    def _reduction(
        self,
        e: Einsum,
        expr: Expr,
        axes: tuple[str, ...],
        over: tuple[str, ...],
        conditions: tuple[Expr, ...],
        tag: str,
        later: tuple[Einsum, ...],
    ) -> list[Stmt]:
        assert e.reduction is not None
        out = self._flush(expr)
        expr = self._finished(expr)
        self._conditions(*conditions)
        self.summands[e.tensor] = (expr, e.reduce or "")
        identity = e.reduction.empty
        failing = tuple(c for c in conditions if self.facts.fill(expr, c) != identity)
        product_of_tiles = self._product(e, expr, over)
        if product_of_tiles is not None:
            done = self._dot(e, product_of_tiles, failing, tag, later)
            if done is not None:
                return out + done
        if failing and isinstance(expr, Read) and self._for_every_reader(expr, failing):
            out.append(self._masked(expr, failing, identity))
            expr = Read(tensor=self.live.get(expr.tensor, expr.tensor))
        elif failing:
            expr = apply("select", conjunction(failing), expr, number(identity))
        value = self._target(e, axes, tag, later)
        space = self._sorted({*axes, *over})
        out.append(Reduce(value=value, reduce=e.reduce or "", expr=expr, axes=space, over=over, note=str(e)))
        sinks = e.reduce == "max" and (self.facts.may_be_neg_inf(expr) or bool(failing))
        below = self.facts.above(expr)
        self.facts.of[value.name] = Facts(
            may_be_neg_inf=sinks,
            is_finite=e.reduce in ("sum", "prod") and self.facts.is_finite(expr),
            above=below if e.reduce == "max" else frozenset(),
        )
        self._bind(e, value, tag)
        return out

    def _for_every_reader(self, read: Read, failing: tuple[Expr, ...]) -> bool:
        """Whether all readers of a value are culled where these conditions fail, so that it may be masked once."""
        shared = {*self.shared, *(self._inside(v) for v in self.axes)}
        return set(failing) <= shared and set(self._vars(*failing)) <= set(self.values[read.tensor])

    def _masked(self, read: Read, failing: tuple[Expr, ...], identity: float) -> Map:
        """Put the identity at culled points of a value, once for every reader."""
        old = self.facts[read.tensor]
        axes = self._sorted(self.values[read.tensor])
        name = read.tensor
        if old.is_input or axes != self.values[name]:
            name = self._derived(name, "live")
            self.live[read.tensor] = name
        value = self._named(name, axes)
        self.facts.of[name] = Facts(
            fills={**old.fills, **dict.fromkeys(failing, identity)},
            above=old.above,
            may_be_neg_inf=old.may_be_neg_inf or identity == -math.inf,
            is_input=old.is_input and math.isfinite(identity),
            is_finite=old.is_finite and math.isfinite(identity),
        )
        return Map(
            value=value,
            expr=apply("select", conjunction(failing), read, number(identity)),
            note="culled points hold the identity of the reduction that follows",
        )

    # --- stores ---------------------------------------------------------------------------------------------------

    def _store(
        self, e: Einsum, axes: tuple[str, ...], tested: tuple[Expr, ...], out: list[Stmt], free_of: frozenset[Expr]
    ) -> Store:
        bounded = (v for v in axes if self.axes[v].role == "grid" or self.axes[v].is_padded)
        mask = list(dict.fromkeys([*map(self._inside, bounded), *self._live_rows(axes)]))
        expr = self.env[e.tensor, "cur"]
        live = self._tested(list(tested), e, out, free_of) if e.reduce is None else []
        if e.tensor in self.scattered:
            return self._scatter(e, expr, axes, [*mask, *live], out, free_of)
        if live:
            expr = apply("select", conjunction(tuple(live)), expr, Num(value=0.0))
        indices = self.packed.place(e.tensor) if self.packed is not None else e.indices
        return Store(tensor=e.tensor, indices=indices, expr=expr, axes=axes, mask=tuple(mask), note=str(e))

    def _scatter(
        self,
        e: Einsum,
        expr: Expr,
        axes: tuple[str, ...],
        mask: list[Expr],
        out: list[Stmt],
        free_of: frozenset[Expr],
    ) -> Store:
        """Add a tile to the elements that its index expressions name, where they name one."""
        indices = []
        for i, d in zip(e.indices, self.tensors[e.tensor], strict=True):
            while isinstance(i, Apply) and i.op == "add" and Num(value=0) in getattr(i.args[1], "args", ()):
                # Walked, but not where it goes.
                i = i.args[0]
            at = self._values(i, e, out, free_of)
            indices.append(at)
            end = apply("lt", at, Scalar(name=rank_of(d)))
            if isinstance(i, Var) or self._is_within(at, rank_of(d)) or (end in free_of and is_natural(at)):
                continue
            mask += (end,) if end in self.cascade.constraints and is_natural(at) else self._range_checks(at, d)
        note = f"{Read(tensor=e.tensor, indices=e.indices)} += {e.expr}"
        return Store(
            tensor=e.tensor,
            indices=tuple(indices),
            expr=expr,
            axes=axes,
            mask=tuple(dict.fromkeys(mask)),
            note=note,
            adds=True,
        )
