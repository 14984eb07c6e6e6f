"""Place single Einsums: masks, maps, reductions and products of tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from einsumcascade.codegen.facts import Facts, FactTable
from einsumcascade.codegen.forms import conjunction, is_scaled, number, powers
from einsumcascade.codegen.kernel_ir import Dot, Map, Reduce, Stmt, Store, Table, Value
from einsumcascade.codegen.values import Values, not_lowered
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
    transform,
    variables,
)
from einsumcascade.rewrites.algebra import factors, is_positive
from einsumcascade.schedules.roles import MINIMUM_DOT, contraction


@dataclass(slots=True)
class Snapshot:
    """What a segment may change and the next one must not see."""

    env: dict[tuple[str, str], Expr]
    loads: dict[object, Value]
    facts: FactTable


@dataclass
class Body(Values):
    """The state of a kernel while its Einsums are placed one by one."""

    pending: dict[str, tuple[Dot, Expr]] = field(default_factory=dict)  # products held back for an accumulation
    renamed: dict[str, str] = field(default_factory=dict)  # states whose new generation has a name of its own
    shared: set[Expr] = field(default_factory=set)  # constraints of the whole cascade, over values
    summands: dict[str, tuple[Expr, str]] = field(default_factory=dict)  # operand and reduction of each reduction
    tables: dict[str, Table] = field(default_factory=dict)  # what bounds of loops read of inputs
    outer: list[tuple[str | None, frozenset[str], dict[str, str]]] = field(default_factory=list)  # loops around

    # --- loops --------------------------------------------------------------------------------------------------

    def enter(self, index: str, states: frozenset[str]) -> None:
        """Begin a loop over `index` that keeps `states`."""
        self.outer.append((self.index, self.states, self.renamed))
        if self.index is not None:
            self.around[self.index] = self.states
        self.index, self.states = index, states
        self.renamed = {}

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

    def _local(self, state: str) -> Einsum | None:
        """The Einsum that gives a state what a tile adds: L of `R[i+1] = moved + L[i]`."""
        for e in self.cascade.einsums:
            if e.tensor == state and isinstance(e.expr, Apply) and isinstance(e.expr.args[-1], Read):
                return next((x for x in self.cascade.einsums if x.tensor == e.expr.args[-1].tensor), None)
        return None

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

    def leave(self, s: Snapshot) -> None:
        """End a loop: its states are final."""
        self.restore(s)
        for t in self.states:
            self.env[t, "last"] = Read(tensor=self._state_name(t))
        self.index, self.states, self.renamed = self.outer.pop()
        if self.index is not None:
            del self.around[self.index]

    def _state_name(self, tensor: str) -> str:
        return f"b_{tensor}"

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
            if any(self.axes[v].role == "grid" for v in over):
                raise not_lowered(e, "a reduction over a rank that the programs of its kernel share")
            conditions += [self._inside(v) for v in over if self.axes[v].is_padded]
            conditions = self._tested(conditions, e, out, free_of)
            out += self._reduction(e, expr, axes, over, tuple(conditions), tag, later)
        if e.tensor in self.outputs and tag == "cur":
            out.append(self._store(e, axes, tuple(tested), out, free_of))
        return out

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

    # --- products of tiles --------------------------------------------------------------------------------------

    def _product(self, e: Einsum, expr: Expr, over: tuple[str, ...]) -> tuple[Expr, Expr, str, tuple[str, str]] | None:
        """The two operands of a sum over one axis, seen through the values' axes."""
        if len(over) != 1 or e.reduce != "sum" or self.axes[over[0]].size < MINIMUM_DOT:
            return None

        def show(x: Expr) -> Expr | None:
            if isinstance(x, Read) and not x.indices and x.tensor in self.values:
                return Read(tensor=x.tensor, indices=tuple(Var(name=v) for v in self.values[x.tensor]))
            return None

        shown = transform(expr, show)
        c = contraction(
            Einsum(tensor=e.tensor, indices=e.indices, expr=shown, reduce="sum", ranks=over),
            tuple(self.axes),
            tuple(self.axes),
            lambda f: is_positive(f, self.cascade) or self._from_exp(f),
        )
        if c is None:
            return None

        def hide(x: Expr) -> Expr:
            return transform(x, lambda y: Read(tensor=y.tensor) if isinstance(y, Read) else None)

        return hide(c.left), hide(c.right), c.over, c.axes

    def _dot(
        self,
        e: Einsum,
        parts: tuple[Expr, Expr, str, tuple[str, str]],
        failing: tuple[Expr, ...],
        tag: str,
        later: tuple[Einsum, ...],
    ) -> list[Stmt] | None:
        left, right, r, axes = parts
        masks: tuple[list[Expr], list[Expr]] = ([], [])
        for c in failing:
            sides = [set(self._vars(c)) <= {axes[0], r}, set(self._vars(c)) <= {axes[1], r}]
            if not any(sides):
                return None
            computed = [not self._is_input(left), not self._is_input(right)]
            chosen = 0 if sides[0] and (computed[0] or not (sides[1] and computed[1])) else 1
            masks[chosen].append(c)
            other = 1 - chosen
            if (
                sides[other]
                and not self.facts.is_finite((left, right)[other])
                and self.facts.fill((left, right)[other], c) != 0
            ):
                masks[other].append(c)
        out: list[Stmt] = []
        operands = []
        for side, expr, pair, wanted in (("a", left, masks[0], (axes[0], r)), ("b", right, masks[1], (r, axes[1]))):
            if pair:
                expr = apply("select", conjunction(tuple(pair)), expr, Num(value=0.0))
            if isinstance(expr, Read) and set(self.values[expr.tensor]) == set(wanted):
                operands.append(Value(name=expr.tensor, axes=self.values[expr.tensor]))
            else:
                value = self._named(self._derived(f"b_{e.tensor}", side), self._sorted(wanted))
                out.append(Map(value=value, expr=expr))
                self.facts.of[value.name] = Facts(may_be_neg_inf=False)
                operands.append(value)
        value = Value(name=f"b_{e.tensor}", axes=axes)
        self.values[value.name] = axes
        dot = Dot(value=value, left=operands[0], right=operands[1], over=r, note=str(e))
        target = Read(tensor=e.tensor, indices=e.indices)
        fused = tag == "cur" and any(
            x.expr.op == "add" and x.expr.args[1] == target
            for x in later
            if isinstance(x.expr, Apply) and x.reduce is None and self._tag(x) == "new"
        )
        self._bind(e, value, tag)
        both = apply("mul", left, right)
        fills = {c: 0.0 for c in self._conditions() if self.facts.fill(both, c) == 0 and r not in self._vars(c)}
        finite = self.facts.is_finite(both)
        self.facts.of[value.name] = Facts(may_be_neg_inf=False, fills=fills, is_finite=finite)
        if fused:
            self.pending[value.name] = (dot, both)
            return out
        if tag == "new":
            value = self._target(e, axes, tag, later)
            dot = Dot(value=value, left=operands[0], right=operands[1], over=r, note=str(e))
            self._bind(e, value, tag)
        return [*out, dot]

    def _accumulate(self, e: Einsum, moved: Expr, name: str, later: tuple[Einsum, ...]) -> list[Stmt]:
        """`new = moved + dot`: the product is added to the moved state."""
        dot, _ = self.pending.pop(name)
        value = self._target(e, dot.value.axes, "new", later)
        self.facts.of[value.name] = Facts(may_be_neg_inf=False)
        self._bind(e, value, "new")
        out: list[Stmt] = []
        moved = self._finished(moved)
        if not isinstance(moved, Read):
            out.append(Map(value=value, expr=moved, note=str(e)))
            moved = Read(tensor=value.name)
        return [*out, Dot(value=value, left=dot.left, right=dot.right, over=dot.over, accumulate=moved, note=dot.note)]

    def _flush(self, expr: Expr) -> list[Stmt]:
        """Emit products that were held back for an accumulation that does not come."""
        out: list[Stmt] = []
        for r in reads(expr):
            if r.tensor in self.pending:
                out.append(self.pending.pop(r.tensor)[0])
        return out

    # --- names and values ---------------------------------------------------------------------------------------

    def _tag(self, e: Einsum) -> str:
        """Which generation an Einsum writes: "new" at i + 1, else "cur"."""
        if self.index is None:
            return "cur"
        for i in e.indices:
            if self._step(i)[1]:
                return "new"
            if not isinstance(i, Var):
                raise not_lowered(e, f"writing {e.tensor} at {i}")
        return "cur"

    def _target(self, e: Einsum, axes: tuple[str, ...], tag: str, later: tuple[Einsum, ...]) -> Value:
        name = f"b_{e.tensor}"
        if tag == "new" and e.tensor in self.states:
            assert self.index is not None
            old_is_read = any(
                r.tensor == e.tensor and Var(name=self.index) in r.indices
                for x in later
                for r in reads(x.expr, *x.where)
            )
            if old_is_read:
                name = self._derived(name, "new")
                self.renamed[e.tensor] = name
        self.values[name] = axes
        return Value(name=name, axes=axes)

    def _bind(self, e: Einsum, value: Value, tag: str) -> None:
        self.env[e.tensor, tag] = Read(tensor=value.name)
        if tag == "new" and e.tensor in self.states and value.name == self._state_name(e.tensor):
            self.env[e.tensor, "old"] = Read(tensor=value.name)

    # --- expressions --------------------------------------------------------------------------------------------

    def _finished(self, expr: Expr) -> Expr:
        """Whole powers as products, and guards where they are needed."""
        return self._quotients(self.facts.guarded(powers(expr, self._literals())))

    def _literals(self) -> dict[str, Num]:
        """Constants that are literal numbers."""
        return {c.name: c.expr for c in self.cascade.constants if isinstance(c.expr, Num)}

    def _quotients(self, expr: Expr) -> Expr:
        """`x / y` with y > 0, or a sum of terms >= 0 that are factors of the terms of x: both are 0 together."""
        if not isinstance(expr, Apply):
            return expr
        args = tuple(self._quotients(a) for a in expr.args)
        if expr.op == "div" and reads(args[1]) and is_positive(self._named_as_written(args[1]), self.cascade):
            return apply("ieee_div", *args)
        if expr.op == "div" and isinstance(args[1], Read):
            below = self._summand(args[1])
            above = next(
                (
                    s
                    for f, n in factors(args[0])
                    if n > 0 and isinstance(f, Read) and (s := self._summand(f)) is not None
                ),
                None,
            )
            if below is not None and above is not None:
                small = set(factors(below))
                if small <= set(factors(above)) and all(
                    is_positive(f, self.cascade, strict=False) or self._from_exp(f) for f, _ in small
                ):
                    y = apply("select", apply("eq", args[1], Num(value=0.0)), Num(value=1.0), args[1])
                    return apply("ieee_div", args[0], y)
        return Apply(op=expr.op, args=args)

    def _summand(self, read: Expr) -> Expr | None:
        """The mapped expression whose sum a final state is."""
        if not isinstance(read, Read):
            return None
        local = self._local(read.tensor.removeprefix("b_"))
        found = self.summands.get(local.tensor) if local is not None else None
        return found[0] if found is not None and found[1] == "sum" else None

    def _named_as_written(self, expr: Expr) -> Expr:
        """An expression over values as one over the tensors that they are of."""
        written = {f"b_{e.tensor}": Read(tensor=e.tensor, indices=e.indices) for e in self.cascade.einsums}
        return transform(expr, lambda x: written.get(x.tensor) if isinstance(x, Read) else None)

    def _from_exp(self, f: Expr) -> bool:
        if not isinstance(f, Read):
            return False
        name = f.tensor.removeprefix("b_")
        e = next((s for s in self.cascade.einsums if s.tensor == name), None)
        return e is not None and isinstance(e.expr, Apply) and e.expr.row.positive

    def _store(
        self, e: Einsum, axes: tuple[str, ...], tested: tuple[Expr, ...], out: list[Stmt], free_of: frozenset[Expr]
    ) -> Store:
        mask = [
            apply("lt", Var(name=v), Scalar(name=rank_of(v)))
            for v in axes
            if self.axes[v].role == "grid" or self.axes[v].is_padded
        ]
        expr = self.env[e.tensor, "cur"]
        live = self._tested(list(tested), e, out, free_of) if e.reduce is None else []
        if live:
            expr = apply("select", conjunction(tuple(live)), expr, Num(value=0.0))
        return Store(tensor=e.tensor, indices=e.indices, expr=expr, axes=axes, mask=tuple(mask), note=str(e))
