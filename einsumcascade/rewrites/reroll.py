"""Bring an iteration back to the reductions that it is the running state of: the way to loop form, walked backwards.

    init RM[0] = -inf;  RM[i+1] = max(RM[i], LM[i])                ->   RM = LM[i] :: max(i)
    init RD[0] = 0;     RD[i+1] = C(RM[i], RM[i+1]) * RD[i] + B[i]  ->   RD = C(RM[i+1], RM) * B[i] :: sum(i)

The right side of the second is what repeated substitution gives where C is a cocycle, C(a, b) C(b, c) = C(a, c); that
law is proven by algebra, and so is it that RM[i+1] cancels. A state that is divided by another, `R[i+1] = X / D[i+1]`,
is first multiplied by it. Two ranks that walk a partition of one, `m1 * M0 + m0`, become that rank again.

One program for FlashAttention-1, FlashAttention-2 and the formula follows: an iteration whose last generation is all
that counts has the gradient of its reductions, and keeps no generation for it.
Precondition: only the last generation is read elsewhere, and each step reads none but its own states' two generations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    substitute,
    transform,
    variables,
    walk,
)
from einsumcascade.language.ops import REDUCTIONS
from einsumcascade.rewrites.algebra import (
    drop_dead,
    equal,
    factors,
    fresh,
    inline,
    names_taken,
    product,
    terms,
    total,
    without_axis,
)
from einsumcascade.rewrites.join import join
from einsumcascade.rewrites.step import Rewritten, Step

# Marks a reference of a correction: of the generation that a step makes, of the last.
_THIS, _END = "__this", "__end"


def reroll(cascade: Cascade) -> Rewritten:
    """Write every iteration that is the running state of reductions as these reductions.

    Returns: a cascade of equal value, and a step for each iteration; one that is no such state stays as it is.
    Cost: some SymPy for each state of an iteration.
    """
    steps: list[Step] = []
    for block in [s for s in cascade.body if isinstance(s, Iter)]:
        found = _Block(cascade, block).run()
        if found is not None:
            joined = join(found.cascade, block.var)
            cascade = joined.cascade
            steps += (*found.steps, *joined.steps)
    return Rewritten(cascade=cascade, steps=tuple(steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """A state of an iteration, its axis of generations, its first value and its update with maps written out."""

    tensor: str
    axis: int
    indices: tuple[Expr, ...]
    first: Expr
    update: Expr

    @property
    def final(self) -> Read:
        """The reduction in its place: the same name without the axis of generations."""
        return Read(tensor=self.tensor, indices=without_axis(self.indices, self.axis))


class _Block:
    """One iteration of one cascade."""

    def __init__(self, cascade: Cascade, block: Iter) -> None:
        self.cascade, self.block, self.var = cascade, block, block.var
        self.made = {s.tensor: s for s in block.body if isinstance(s, Einsum)}
        self.inits = {s.tensor: s for s in cascade.body if isinstance(s, Init) and s.tensor in self.made}
        here, after = Var(name=self.var), apply("add", Var(name=self.var), Num(value=1))
        self.old: Expr = after if block.descending else here
        self.new: Expr = here if block.descending else after
        self.last: Expr = Num(value=0) if block.descending else Scalar(name=rank_of(self.var))
        self.maps = {
            e.tensor: e
            for e in self.made.values()
            if e.tensor not in self.inits and e.reduce is None and not e.where and _is_plain(e)
        }
        self.axes = {t: _axis(self.made[t], self.new) for t in self.inits}
        self.done: dict[str, Einsum] = {}
        self.proof: list[str] = []

    def run(self) -> Rewritten | None:
        """The cascade without the iteration; None where it is no running state."""
        if len(self.made) < len(self.block.body) or not self._is_alone():
            return None
        states = self._states()
        self.states = {s.tensor: s for s in states}
        after: list[Einsum] = []
        names = names_taken(self.cascade)
        for s in states:
            found = self._extremum(s) or self._sum(s, s.update, (self._at(s, self.old),))
            if found is None:
                divided = self._divided(s, names)
                if divided is None:
                    return None
                found, quotient = divided
                after.append(quotient)
            self.done[s.tensor] = found
        before = tuple(e for e in self.made.values() if e.tensor not in self.inits and not self._reads_states(e.expr))
        return self._put((*before, *self.done.values(), *after))

    def _put(self, instead: tuple[Einsum, ...]) -> Rewritten:
        """The cascade with Einsums in the place of the iteration."""

        def last(e: Expr) -> Expr | None:
            if not isinstance(e, Read) or e.tensor not in self.inits:
                return None
            return replace(e, indices=tuple(transform(i, last) for i in without_axis(e.indices, self.axes[e.tensor])))

        body: list[Statement] = []
        for s in self.cascade.body:
            if s is self.block:
                body += instead
            elif isinstance(s, Einsum):
                where = tuple(transform(c, last) for c in s.where)
                body.append(replace(s, expr=transform(s.expr, last), where=where))
            elif not isinstance(s, Init) or s.tensor not in self.inits:
                body.append(s)
        cascade = drop_dead(self.cascade.with_body(tuple(body)))
        states = ", ".join(self.inits)
        step = Step(
            rule="reroll",
            kind="algebraic",
            what=f"{states}: a running state over {rank_of(self.var)}, whose last generation is all that is read",
            before=tuple(str(e) for e in self.made.values() if e.tensor in self.inits),
            after=tuple(str(e) for e in instead if e in cascade.body),
            proof=tuple(dict.fromkeys(self.proof)),
        )
        return Rewritten(cascade=cascade, steps=(step,))

    # --- what an iteration must be -------------------------------------------------------------------------------

    def _is_alone(self) -> bool:
        """Whether only last generations are read elsewhere, no step is culled whole, and states only map."""
        if set(self.made) & set(self.cascade.output_names) or -1 in self.axes.values() or not self.inits:
            return False
        for s in self.cascade.body:
            inside = walk((s,)) if s is not self.block else iter(())
            for x in inside:
                exprs = () if isinstance(x, Iter) else (x.expr, *(x.where if isinstance(x, Einsum) else ()))
                for r in reads(*exprs):
                    if r.tensor in self.inits and r.indices[self.axes[r.tensor]] != self.last:
                        return False
                    if (r.tensor in self.inits and isinstance(s, Iter)) or r.tensor in set(self.made) - set(self.inits):
                        return False
        updates = [self.made[t] for t in self.inits]
        culled = any(
            self.var in variables(c) and set(variables(c)) <= set(e.space)
            for e in updates
            for c in self.cascade.constraints
        )
        plain = all(
            isinstance(i, Var) and i.name != self.var
            for e in updates
            for i in without_axis(e.indices, self.axes[e.tensor])
        )
        return plain and not culled and all(e.reduce is None and not e.where for e in updates)

    def _states(self) -> list[_State]:
        """The states in the order of their updates."""
        out: list[_State] = []
        for e in self.made.values():
            if e.tensor not in self.inits:
                continue
            init = self.inits[e.tensor]
            at = {i.name: j for i, j in zip(init.indices, e.indices, strict=True) if isinstance(i, Var)}
            first, axis = substitute(init.expr, at), self.axes[e.tensor]
            update = self._written(e.expr)
            out.append(_State(tensor=e.tensor, axis=axis, indices=e.indices, first=first, update=update))
        return out

    def _written(self, expr: Expr) -> Expr:
        """An expression with the maps of the step written out, so that it reads states, reductions and inputs."""

        def leaf(e: Expr) -> Expr | None:
            d = self.maps.get(e.tensor) if isinstance(e, Read) else None
            return None if d is None or not isinstance(e, Read) else transform(inline(e, d), leaf)

        return transform(expr, leaf)

    def _reads_states(self, *exprs: Expr) -> bool:
        """Whether a value depends on a state, through what the step computes of it too."""
        seen: set[str] = set()
        pending = [r.tensor for r in reads(*exprs)]
        while pending:
            t = pending.pop()
            if t in self.inits:
                return True
            if t in self.made and t not in seen:
                seen.add(t)
                pending += [r.tensor for r in reads(self.made[t].expr, *self.made[t].where)]
        return False

    def _at(self, s: _State, generation: Expr) -> Read:
        return Read(tensor=s.tensor, indices=(*s.indices[: s.axis], generation, *s.indices[s.axis + 1 :]))

    # --- one state ----------------------------------------------------------------------------------------------

    def _extremum(self, s: _State) -> Einsum | None:
        """X[i+1] = max(X[i], B[i]) from its identity: the maximum of B over all steps."""
        u = s.update
        if not isinstance(u, Apply) or u.op not in ("max", "min"):
            return None
        rest = [a for a in u.args if a != self._at(s, self.old)]
        if len(rest) != 1 or self._reads_states(rest[0]) or not _is_number(s.first, REDUCTIONS[u.op].empty):
            return None
        value, ranks = self._opened(rest[0], u.op)
        return self._reduced(s, value, u.op, ranks)

    def _sum(self, s: _State, update: Expr, own: tuple[Expr, ...]) -> Einsum | None:
        """X[i+1] = C(r, r') X[i] + B[i] from 0, C a cocycle: the sum of C(r', r of the end) B[i] over all steps."""
        kept = [(rest, n) for e, n in terms(update) if (rest := _without(e, own)) is not None]
        added = [(e, n) for e, n in terms(update) if _without(e, own) is None]
        if not _is_number(s.first, 0) or len(kept) != 1 or kept[0][1] < 0 or not added:
            return None
        scale = kept[0][0]
        moved = self._moved(scale)
        if moved is None:
            return None
        values: list[tuple[Expr, int]] = []
        spaces: set[tuple[str, ...]] = set()
        for e, n in added:
            value, ranks = self._opened(e, "sum")
            value = combined(((moved, 1), (value, 1)))
            if self._reads_states(value):
                return None
            values.append((transform(value, _ended), n))
            spaces.add(ranks)
        if len(spaces) != 1:
            return None
        if moved != Num(value=1):
            self.proof.append(f"C = {scale}, C(a, b) * C(b, c) = C(a, c): a step is moved to the last state at once")
        return self._reduced(s, total(tuple(values)), "sum", spaces.pop())

    def _moved(self, scale: Expr) -> Expr | None:
        """C(r', r of the end) for a cocycle C(r, r'), the end marked as a tensor of its own; None if it is none."""
        if scale == Num(value=1):
            return scale
        used = {r.tensor for r in reads(scale)}
        bare = transform(scale, lambda e: Num(value=0) if isinstance(e, Read) else None)
        if not used or not used <= set(self.done) or variables(bare):
            return None

        def between(old: str, new: str) -> Expr:
            def leaf(e: Expr) -> Expr | None:
                if not isinstance(e, Read):
                    return None
                axis = self.axes[e.tensor]
                point = old if e.indices[axis] == self.old else new
                if point == _THIS:
                    return self._at(self.states[e.tensor], self.new)
                return Read(tensor=e.tensor + point, indices=without_axis(e.indices, axis))

            return transform(scale, leaf)

        if not equal(apply("mul", between("__a", "__b"), between("__b", "__c")), between("__a", "__c"), leaves=True):
            return None
        return between(_THIS, _END)

    def _divided(self, s: _State, names: set[str]) -> tuple[Einsum, Einsum] | None:
        """X[i+1] = U / Y[i+1] where X Y is such a sum: that sum, and what it is divided by."""
        parts = factors(s.update)
        for f, n in parts:
            y = self.states.get(f.tensor) if n == -1 and isinstance(f, Read) else None
            if y is None or y.tensor not in self.done or f != self._at(y, self.new):
                continue
            above = product(tuple(p for p in parts if p != (f, n)))
            found = self._sum(s, above, (self._at(s, self.old), self._at(y, self.old)))
            if found is not None:
                self.proof.append(f"{s.tensor} * {y.tensor} is such a sum")
                top = replace(found, tensor=fresh(f"{s.tensor}N", names))
                whole = apply("div", Read(tensor=top.tensor, indices=top.indices), y.final)
                return top, replace(found, expr=whole, reduce=None, ranks=())
        return None

    def _opened(self, e: Expr, reduce: str) -> tuple[Expr, tuple[str, ...]]:
        """A value of a step with its reduction of the same kind opened, and the ranks that this reduces."""
        parts = factors(e) if reduce == "sum" else ((e, 1),)
        for k, (f, n) in enumerate(parts):
            d = self.made.get(f.tensor) if isinstance(f, Read) and n == 1 else None
            if d is None or d.reduce != reduce or d.where or not _is_plain(d) or not isinstance(f, Read):
                continue
            if len(parts) == 1 or self._is_tile(d.ranks) or self._reads_states(d.expr):
                inner = self._written(inline(f, d))
                middle = factors(inner) if reduce == "sum" else ((inner, 1),)
                return product((*parts[:k], *middle, *parts[k + 1 :])), d.ranks
        return e, ()

    def _is_tile(self, ranks: tuple[str, ...]) -> bool:
        """Whether these ranks and that of the steps walk a partition of one rank."""
        return any(self.var in variables(c) and set(ranks) & set(variables(c)) for c in self.cascade.constraints)

    def _reduced(self, s: _State, value: Expr, reduce: str, ranks: tuple[str, ...]) -> Einsum:
        return Einsum(tensor=s.tensor, indices=s.final.indices, expr=value, reduce=reduce, ranks=(self.var, *ranks))


def combined(parts: tuple[tuple[Expr, int], ...]) -> Expr:
    """A product whose exponentials are one, terms of opposite signs in its exponent gone.

    >>> from einsumcascade.language.ir import Apply, Read
    >>> a, b = Read(tensor="A"), Read(tensor="B")
    >>> up, down = (Apply(op="exp", args=(Apply(op="sub", args=x),)) for x in ((a, b), (b, a)))
    >>> str(combined(((up, 1), (a, 1), (down, 1))))
    'A'
    """
    exponent: list[tuple[Expr, int]] = []
    rest: list[tuple[Expr, int]] = []
    for f, n in (p for e, m in parts for p in ((f, k * m) for f, k in factors(e))):
        if isinstance(f, Apply) and f.op == "exp":
            for t, k in terms(f.args[0]):
                if (t, -k * n) in exponent:
                    exponent.remove((t, -k * n))
                else:
                    exponent.append((t, k * n))
        else:
            rest.append((f, n))
    power = ((apply("exp", total(tuple(exponent))), 1),) if exponent else ()
    return product((*power, *(p for p in rest if p[0] != Num(value=1))))


def _axis(e: Einsum, generation: Expr) -> int:
    return next((n for n, i in enumerate(e.indices) if i == generation), -1)


def _without(e: Expr, own: tuple[Expr, ...]) -> Expr | None:
    """A product without some of its factors; None if it has not each of them once."""
    parts = factors(e)
    if any(parts.count((r, 1)) != 1 for r in own):
        return None
    return product(tuple(p for p in parts if p[0] not in own) or ((Num(value=1), 1),))


def _ended(e: Expr) -> Expr | None:
    if isinstance(e, Read) and e.tensor.endswith(_END):
        return replace(e, tensor=e.tensor.removesuffix(_END))
    return None


def _is_plain(e: Einsum) -> bool:
    return all(isinstance(i, Var) for i in e.indices)


def _is_number(e: Expr, value: float) -> bool:
    match e:
        case Num():
            return e.value == value
        case Apply(op="neg", args=(Num(value=x),)):
            return -x == value
        case _:
            return False
