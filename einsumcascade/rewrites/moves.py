"""How running states move: the entries of a correction as Einsums, and C applied to old states."""

from __future__ import annotations

from dataclasses import dataclass, field

from einsumcascade.language.ir import (
    Apply,
    Einsum,
    Expr,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    reads,
    transform,
    variables,
)
from einsumcascade.rewrites.algebra import factors, fresh, product
from einsumcascade.rewrites.loops import Loops, State
from einsumcascade.rewrites.proofs import PRIME


@dataclass
class Moves(Loops):
    """States moved between two references, which `generation` names: "old" and "new" in a loop.

    Args:
        anchored: references that are values of their own where the tile is absorbed.
    """

    anchored: dict[Read, Read] = field(default_factory=dict)

    def moved(self, state: State, body: list[Statement], *, source: str, target: str) -> Expr:
        """The row of C that belongs to a state, applied to the states at `source`.

        Appends to `body` the Einsums of the entries, each computed once and shared by all that it moves.
        """
        how, loop = state.how, state.loop
        own = self.generation(Read(tensor=state.einsum.tensor, indices=state.einsum.indices), source)
        if how.form == "none":
            return own

        def leaf(e: Expr) -> Expr | None:
            if not isinstance(e, Read):
                return None
            if e.tensor.endswith(PRIME):
                base = Read(tensor=e.tensor.removesuffix(PRIME), indices=e.indices)
                return self.reference(base, loop, body, target)
            if any(e == a for a in state.anchors):
                return self.reference(e, loop, body, source)
            return None

        row = how.matrix[state.row]
        if how.form == "shift":
            return apply("add", own, self._entry(transform(row[0], leaf), loop, state, body))
        assert state.einsum.reduction is not None
        empty = number(state.einsum.reduction.empty)
        total: Expr | None = None
        for c, read, sinks in zip(row, state.basis, how.sinks[state.row], strict=True):
            if c == Num(value=0):
                continue
            was = self.generation(read, source)
            term: Expr = was
            if c != Num(value=1):
                term = apply("mul", self._entry(transform(c, leaf), loop, state, body), was)
                if not (sinks and self._begins_low(state, source)):
                    # What has no point yet is the identity, whatever C is.
                    term = apply("select", apply("eq", was, empty), empty, term)
            total = term if total is None else apply("add", total, term)
        assert total is not None
        return total

    def _begins_low(self, state: State, source: str) -> bool:
        """Whether the references of a state begin at -inf; a minimum begins at +inf, where an exponential overflows."""
        lowest = {t for t, other in self.states.items() if other.einsum.reduce != "min"}
        low = {self.generation(Read(tensor=t, indices=self.states[t].einsum.indices), source).tensor for t in lowest}
        begun = {
            self.generation(Read(tensor=t, indices=s.einsum.indices), source).tensor for t, s in self.states.items()
        }
        started = [self.anchor_expr(a, state.loop, source) for a in state.anchors]
        return all(r.tensor in low or r.tensor not in begun for e in started if e is not None for r in reads(e))

    def _entry(self, c: Expr, loop: int, state: State, body: list[Statement]) -> Expr:
        """An entry of C, its factors as tensors of their own; what is divided by a new reference is one ratio.

        With one rounded ratio q = d / d', an error of q is that of a slightly different reference, not of the state.
        """
        above = [e for e, n in factors(c) if n > 0]
        parts: list[Expr] = []
        for below in (e for e, n in factors(c) if n < 0):
            over = next((e for e in above if _alike(e, below)), None) or next((e for e in above if _differs(e)), None)
            if over is not None:
                above.remove(over)
            parts.append(self._factor(apply("div", over or Num(value=1), below), loop, state, body))
        return product(tuple((e, 1) for e in (*(self._factor(e, loop, state, body) for e in above), *parts)))

    def _factor(self, c: Expr, loop: int, state: State, body: list[Statement]) -> Expr:
        if not isinstance(c, Apply):
            return c
        key = (c, loop)
        if key not in self.corrections:
            name = fresh("C" + state.anchors[0].tensor, self.taken)
            self.corrections[key] = Read(tensor=name, indices=self.along(c))
            body.append(Einsum(tensor=name, indices=self.corrections[key].indices, expr=c))
        return self.corrections[key]

    def along(self, value: Expr) -> tuple[Expr, ...]:
        """The left side of a value computed once a tile: its ranks, the tile's last."""
        free = tuple(Var(name=v) for v in variables(value) if v != self.index)
        return (*free, Var(name=self.index)) if self.index in variables(value) else free

    def reference(self, read: Read, loop: int, body: list[Statement], when: str) -> Expr:
        """A reference at a generation: a state, or a value computed from states once a tile."""
        expr = self.anchor_expr(read, loop, when)
        assert expr is not None
        if when == "new":
            return self._absorbing(read, expr, body, loop)
        if not (isinstance(expr, Apply) and expr.op in ("add", "sub")):
            return expr
        # A sum is a value of its own, so that C is exactly 1 where nothing changed.
        key = (expr, loop)
        if key not in self.corrections:
            at = self.along(expr)
            self.corrections[key] = Read(tensor=fresh("P" + read.tensor, self.taken), indices=at)
            body.append(Einsum(tensor=self.corrections[key].tensor, indices=at, expr=expr))
        return self.corrections[key]

    def _absorbing(self, read: Read, expr: Expr, body: list[Statement], loop: int) -> Expr:
        """The reference that the tile being absorbed is reduced with."""
        if read.tensor in self.states or _is_scaled_state(expr):
            return expr
        d = self.defs[read.tensor]
        canonical = Read(tensor=read.tensor, indices=d.indices)
        if canonical not in self.anchored:
            name = fresh("R" + read.tensor, self.taken)
            value = self.anchor_expr(canonical, loop, "new")
            assert value is not None
            at = self.absorbed_at()
            body.append(Einsum(tensor=name, indices=(*d.indices, *at), expr=value))
            self.anchored[canonical] = Read(tensor=name, indices=(*d.indices, *at))
        made = self.anchored[canonical]
        return Read(tensor=made.tensor, indices=(*read.indices, *self.absorbed_at()))

    def absorbed_at(self) -> tuple[Expr, ...]:
        """The index of a value at the generation that holds the tile."""
        return (apply("add", Var(name=self.index), Num(value=1)),)


def _alike(e: Expr, other: Expr) -> bool:
    """Whether two expressions read the same tensors, at whatever generations."""
    return {r.tensor for r in reads(e)} == {r.tensor for r in reads(other)} and not _differs(e)


def _differs(e: Expr) -> bool:
    return isinstance(e, Apply) and e.op in ("add", "sub")


def _is_scaled_state(expr: Expr) -> bool:
    """A state times constants: cheap enough to stand wherever it is read."""
    return (
        isinstance(expr, Apply)
        and expr.op in ("mul", "div")
        and all(isinstance(a, Scalar | Num | Read) for a in expr.args)
        and sum(isinstance(a, Read) for a in expr.args) == 1
    )


def number(value: float) -> Num:
    """A literal; 0 and 1 as whole numbers."""
    return Num(value=int(value) if value in (0.0, 1.0) else value)
