"""References that no output depends on: `out(d', C(d, d') S) = out(d, S)` for every output.

A running maximum that is subtracted before the exponential and divided away at the end is such a reference. Any other
value would do in its place, such as a bound; and no gradient goes through it.

What each tensor becomes when the reference does is derived in the order of the cascade. A running state moves by its C;
a map is a map of what moved; a later reduction stays if what it reduces stays, and a sum moves by a factor that all
that it adds up moves by. Whatever is not of these forms is taken to depend on the reference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from einsumcascade.analysis.dependence import dependencies
from einsumcascade.errors import LoweringError
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Num,
    Read,
    Var,
    apply,
    reads,
    substitute,
    transform,
    variables,
)
from einsumcascade.rewrites.algebra import equal, inline_reads, is_map
from einsumcascade.rewrites.loop_form import Iterations, prepared
from einsumcascade.rewrites.loops import Loops, State
from einsumcascade.rewrites.proofs import PRIME


def invariant(form: Loops, reference: str, *, proven: Collection[str] = ()) -> bool:
    """Whether every output has the same value whatever a reference is, the states moved with it.

    Args:
        form: the cascade with its reductions over a rank placed in loops. reference: a tensor of it.
        proven: other references that no output depends on: any number will do for one, so also the one it has now.

    Cost: SymPy compares an expression for each output and each later reduction that depends on the reference.
    """
    if reference not in form.states or reference in form.cascade.output_names:
        return False
    depends = _dependents(form.cascade, reference, proven)
    if any(r.tensor in depends for c in form.cascade.constraints for r in reads(c)):
        return False
    moved = _Moved(form=form, reference=reference, depends=depends)
    return all(moved.stays(o) for o in form.cascade.output_names)


def references(cascade: Cascade) -> tuple[str, ...]:
    """Name the maxima and minima that no output depends on, and what joins one with its seed.

    Args:
        cascade: simplified.

    Cost: as `invariant` for each of them, again where others have been proven since.
    """
    variables = dict.fromkeys(v for s in cascade.einsums if s.reduce in ("max", "min") for v in s.ranks)
    forms = [form for v in variables if (form := _placed(cascade, v)) is not None]
    out: dict[str, None] = {}
    before = -1
    while before < len(out):
        before = len(out)
        for form in forms:
            for name, state in form.states.items():
                if name in out or state.einsum.reduce not in ("max", "min") or not invariant(form, name, proven=out):
                    continue
                joins = form.seeds[name].joins if name in form.seeds else {}
                joined = (e.tensor for e in cascade.einsums if is_map(e) and e.expr in joins)
                out |= dict.fromkeys((name, *joined))
    return tuple(out)


def _placed(cascade: Cascade, variable: str) -> Iterations | None:
    try:
        return prepared(cascade, (variable,), 1)
    except LoweringError:
        return None


def _dependents(cascade: Cascade, reference: str, proven: Collection[str]) -> frozenset[str]:
    """The reference and all that is computed from it, other than through a reference that has been proven one."""
    out, before = {reference}, 0
    edges = dependencies(cascade)
    while before < len(out):
        before = len(out)
        out |= {t for t, read in edges.items() if out & set(read) and t not in proven}
    return frozenset(out)


def _same(x: Expr, y: Expr) -> bool:
    """Whether two expressions are equal, or operations that algebra cannot see into on operands that are."""
    if equal(x, y, leaves=True):
        return True
    if not (isinstance(x, Apply) and isinstance(y, Apply)) or (x.op, len(x.args)) != (y.op, len(y.args)):
        return False
    return all(map(_same, x.args, y.args))


@dataclass(kw_only=True)
class _Moved:
    """What tensors become when one reference becomes another.

    Args:
        form: the cascade, its reductions placed. reference: what becomes its twin. depends: what is computed from it.
        known: for each tensor asked for, its expression, over states and others as they were; None: unknown.
    """

    form: Loops
    reference: str
    depends: frozenset[str]
    known: dict[str, Expr | None] = field(default_factory=dict)

    def stays(self, tensor: str) -> bool:
        if tensor not in self.depends:
            return True
        d = self.form.defs.get(tensor)
        if d is None:
            return False
        before = self._opened(Read(tensor=tensor, indices=d.indices))
        after = self._moved(before)
        return after is not None and _same(after, before)

    def _opened(self, expr: Expr) -> Expr:
        """An expression without the maps of the reference; a state keeps its name even where it is a map."""
        return inline_reads(expr, self.form.defs, lambda r, _: r.tensor in self.depends)

    def _moved(self, expr: Expr) -> Expr | None:
        """An expression after the move, over tensors before it."""
        complete = True

        def leaf(e: Expr) -> Expr | None:
            nonlocal complete
            if not isinstance(e, Read) or e.tensor not in self.depends:
                return None
            if any(self.depends & {r.tensor for r in reads(i)} for i in e.indices):
                complete = False
                return e
            if e.tensor not in self.known:
                self.known[e.tensor] = self._becomes(e.tensor)
            value, d = self.known[e.tensor], self.form.defs.get(e.tensor)
            if value is None or d is None:
                complete = False
                return e
            at: Mapping[str, Expr] = {
                i.name: x for i, x in zip(d.indices, e.indices, strict=True) if isinstance(i, Var)
            }
            return substitute(value, at)

        out = transform(self._opened(expr), leaf)
        return out if complete else None

    def _becomes(self, tensor: str) -> Expr | None:
        d = self.form.defs.get(tensor)
        if d is None or not all(isinstance(i, Var) for i in d.indices):
            return None
        own = Read(tensor=tensor, indices=d.indices)
        if tensor == self.reference:
            return replace(own, tensor=tensor + PRIME)
        state = self.form.states.get(tensor)
        if state is not None and state.how.form != "none" and self._moves_by_anchors(state):
            return self._state(own, state)
        return self._reduced(own, d)

    def _moves_by_anchors(self, state: State) -> bool:
        """Whether a state depends on the reference through what C is a function of, and not otherwise."""
        return all(r in state.anchors for r in reads(state.summand) if r.tensor in self.depends)

    def _state(self, own: Read, state: State) -> Expr | None:
        """A state moved by C, whose references are those before the move and after it."""

        def entry(c: Expr) -> Expr | None:
            complete = True

            def leaf(e: Expr) -> Expr | None:
                nonlocal complete
                if isinstance(e, Read) and e.tensor.endswith(PRIME):
                    was = replace(e, tensor=e.tensor.removesuffix(PRIME))
                    value = self._moved(was)
                    complete = complete and value is not None
                    return value or was
                return self._opened(e) if isinstance(e, Read) else None

            out = transform(c, leaf)
            return out if complete else None

        if state.how.form == "shift":
            amount = entry(state.how.matrix[0][0])
            return None if amount is None else apply("add", own, amount)
        total: Expr = Num(value=0)
        for c, part in zip(state.how.matrix[state.row], state.basis, strict=True):
            factor = entry(c)
            if factor is None:
                return None
            total = apply("add", total, apply("mul", factor, part))
        return total

    def _reduced(self, own: Read, d: Einsum) -> Expr | None:
        """A reduction of what moved: the same if that is the same, and a sum by a factor of all that it adds up."""
        if any(self.depends & {r.tensor for r in reads(c)} for c in d.where):
            return None
        before = self._opened(d.expr)
        after = self._moved(before)
        if after is None:
            return None
        if _same(after, before):
            return own
        if d.reduce != "sum":
            return None
        for r in reads(before):
            state = self.form.states.get(r.tensor)
            if r.tensor not in self.depends or state is None or state.how.dimension != 1 or state.how.form != "linear":
                continue
            value = self._moved(r)
            factor = _without(value, r) if value is not None else None
            if factor is None or set(variables(factor)) & set(d.ranks):
                continue
            if equal(after, apply("mul", factor, before), leaves=True):
                return apply("mul", factor, own)
        return None


def _without(value: Expr, r: Read) -> Expr | None:
    """The factor of a product that has a read once, and nowhere else."""
    factor = transform(value, lambda e: Num(value=1) if e == r else None)
    return factor if r not in reads(factor) and equal(apply("mul", factor, r), value, leaves=True) else None
