"""Products of tiles, and what any expression needs before it is a statement: a name, guards, whole powers."""

from __future__ import annotations

from dataclasses import dataclass, field

from einsumcascade.codegen.facts import Facts
from einsumcascade.codegen.forms import conjunction, powers
from einsumcascade.codegen.kernel_ir import Dot, Map, Stmt, Value
from einsumcascade.codegen.values import Values, not_lowered
from einsumcascade.language.ir import (
    Apply,
    Einsum,
    Expr,
    Num,
    Read,
    Var,
    apply,
    reads,
    transform,
    variables,
)
from einsumcascade.rewrites.algebra import Factor, factors, is_positive, product
from einsumcascade.schedules.roles import MINIMUM_DOT, contraction


@dataclass
class Products(Values):
    """Values, their generations, and the products among them that may join an accumulator."""

    pending: dict[str, tuple[Dot, Expr]] = field(default_factory=dict)  # products held back for an accumulation
    renamed: dict[str, str] = field(default_factory=dict)  # states whose new generation has a name of its own
    summands: dict[str, tuple[Expr, str]] = field(default_factory=dict)  # operand and reduction of each reduction
    scattered: frozenset[str] = frozenset()  # outputs that programs add to

    # --- products of tiles --------------------------------------------------------------------------------------

    def _product(self, e: Einsum, expr: Expr, over: tuple[str, ...]) -> tuple[Expr, Expr, str, tuple[str, str]] | None:
        """The two operands of a sum over one axis, seen through the values' axes."""
        if len(over) != 1 or e.reduce != "sum" or self.axes[over[0]].size < MINIMUM_DOT:
            return None

        def show(x: Expr) -> Expr | None:
            if isinstance(x, Apply) and x.op == "ieee_div":
                return apply("div", *(transform(a, show) for a in x.args))
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
            hidden = transform(x, lambda y: Read(tensor=y.tensor) if isinstance(y, Read) else None)
            return self._quotients(self.facts.guarded(hidden))

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
        culled: list[Expr] = []  # elements of the result
        for c in failing:
            sides = [set(self._vars(c)) <= {axes[0], r}, set(self._vars(c)) <= {axes[1], r}]
            if not any(sides):
                if r in self._vars(c):
                    return None
                culled.append(c)
                continue
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
        target = Read(tensor=e.tensor, indices=e.indices)
        fused = tag == "cur" and any(
            x.expr.op == "add" and x.expr.args[1] == target
            for x in later
            if isinstance(x.expr, Apply) and x.reduce is None and self._tag(x) == "new" and not culled
        )
        scale: tuple[Factor, ...] = ()
        if not fused and tag != "new":
            # An operand of 16 bits would be rounded once more with its scale.
            (left, own), (right, others) = _unscaled(left), _unscaled(right)
            scale = (*own, *others)
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
        self._bind(e, value, tag)
        both = apply("mul", left, right)
        fills = {c: 0.0 for c in self._conditions() if self.facts.fill(both, c) == 0 and r not in self._vars(c)}
        fills |= dict.fromkeys(culled, 0.0)
        finite = self.facts.is_finite(both)
        self.facts.of[value.name] = Facts(may_be_neg_inf=False, fills=fills, is_finite=finite)
        if fused:
            self.pending[value.name] = (dot, both)
            return out
        if tag == "new":
            value = self._target(e, axes, tag, later)
            dot = Dot(value=value, left=operands[0], right=operands[1], over=r, note=str(e))
            self._bind(e, value, tag)
        whole: Expr = product(((Read(tensor=value.name), 1), *scale))
        if culled:
            whole = apply("select", conjunction(tuple(culled)), whole, Num(value=0.0))
        return [*out, dot, Map(value=value, expr=whole)] if scale or culled else [*out, dot]

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
        if self.index is None or e.tensor in self.scattered:
            return "cur"
        for i in e.indices:
            if self._step(i, e.tensor)[1]:
                return "new"
            if not isinstance(i, Var):
                raise not_lowered(e, f"writing {e.tensor} at {i}")
        return "cur"

    def _target(self, e: Einsum, axes: tuple[str, ...], tag: str, later: tuple[Einsum, ...]) -> Value:
        name = f"b_{e.tensor}"
        if tag == "new" and e.tensor in self.states:
            assert self.index is not None
            old_is_read = any(
                r.tensor == e.tensor and (self.index, False) in [self._step(i, e.tensor) for i in r.indices]
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

    def _state_name(self, tensor: str) -> str:
        return f"b_{tensor}"

    def _local(self, state: str) -> Einsum | None:
        """The Einsum that gives a state what a tile adds: L of `R[i+1] = moved + L[i]`."""
        for e in self.cascade.einsums:
            if e.tensor == state and isinstance(e.expr, Apply) and isinstance(e.expr.args[-1], Read):
                return next((x for x in self.cascade.einsums if x.tensor == e.expr.args[-1].tensor), None)
        return None

    # --- expressions --------------------------------------------------------------------------------------------

    def _finished(self, expr: Expr) -> Expr:
        """Whole powers as products, and guards where they are needed."""
        return self._quotients(self.facts.guarded(powers(expr, self._literals())))

    def _literals(self) -> dict[str, Num]:
        """Constants that are literal numbers."""
        return {c.name: c.expr for c in self.cascade.constants if isinstance(c.expr, Num)}

    def _quotients(self, expr: Expr) -> Expr:
        """`x / y` with y > 0, or a sum of terms >= 0 that are factors of the terms of x: both are 0 together.

        A row that is away from 0 is divided by once: its elements are multiplied by the reciprocal.
        """
        if not isinstance(expr, Apply):
            return expr
        args = tuple(self._quotients(a) for a in expr.args)
        if (
            expr.op in ("div", "ieee_div")
            and reads(args[1])
            and set(self._vars(args[1])) < set(self._vars(args[0]))
            and self.facts.away_from_zero(self._named_as_written(args[1]))
        ):
            return apply("mul", args[0], apply("ieee_div", Num(value=1.0), args[1]))
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


def _unscaled(operand: Expr) -> tuple[Expr, tuple[Factor, ...]]:
    """An operand without the numbers that scale it, and these."""
    parts = factors(operand)
    numbers = tuple(f for f in parts if not reads(f[0]) and not variables(f[0]))
    rest = tuple(f for f in parts if f not in numbers)
    return (product(rest), numbers) if numbers and rest else (operand, ())
