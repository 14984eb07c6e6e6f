"""Where the state of each reduction in a loop begins: at the identity, or at a seed, which moves as the state does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from einsumcascade.analysis.dependence import ancestors
from einsumcascade.language.ir import Expr, Num, Read, Var, apply, reads, substitute, transform
from einsumcascade.rewrites.algebra import equal
from einsumcascade.rewrites.loops import State
from einsumcascade.rewrites.moves import number
from einsumcascade.rewrites.proofs import PRIME
from einsumcascade.rewrites.seeds import Seed, cancelled
from einsumcascade.rewrites.step import Step
from einsumcascade.rewrites.tiles import Tiles


@dataclass
class Beginnings(Tiles):
    """First generations of states.

    Args:
        seeds: values that reductions may begin at, by tensor.
    """

    seeds: Mapping[str, Seed] = field(default_factory=dict)

    def unmoved(self) -> set[str]:
        """Seeds that are not moved as the states they begin, not known when their loop begins, or of no use.

        A sum that nothing moves and that is no reference of another may as well be joined at the end.
        """
        moved = [s for s in self.states.values() if s.how.form != "none"]
        used = {t for s in moved for a in s.anchors for t in (a.tensor, *ancestors(self.cascade, a.tensor))}
        used |= {s.einsum.tensor for s in moved}
        right = {t for t, x in self.seeds.items() if t in used and self._moves_along(self.states[t], x.value)}
        return set(self.seeds) - right

    def _moves_along(self, state: State, seed: Expr) -> bool:
        late = {r for r in reads(seed) if self.finished(r) > state.loop}
        shared = any(
            other is not state and Read(tensor=state.einsum.tensor, indices=state.einsum.indices) in other.basis
            for other in self.states.values()
        )
        if shared or not late <= set(state.anchors):
            return False
        if state.how.form == "none" or not late:
            return not late and state.how.form == "none"
        if len(state.how.matrix) != 1:
            return False
        moved = transform(seed, lambda e: Read(tensor=e.tensor + PRIME, indices=e.indices) if e in late else None)
        (c,) = state.how.matrix[0]
        return equal(moved, apply("add" if state.how.form == "shift" else "mul", c, seed), leaves=True)

    def beginning(self, state: State) -> Expr:
        """The first generation of a state: its seed at the first reference, or the identity."""
        s = state.einsum
        assert s.reduction is not None
        if s.tensor not in self.seeds:
            return number(s.reduction.empty)

        def leaf(e: Expr) -> Expr | None:
            if not isinstance(e, Read):
                return None
            if e in state.anchors:
                found = self.anchor_expr(e, state.loop, "first")
                assert found is not None
                return transform(found, begun)
            return self.generation(e, "last") if e.tensor in self.states else None

        def begun(e: Expr) -> Expr | None:
            if not (isinstance(e, Read) and e.indices and e.indices[-1] == Num(value=0)):
                return None
            other = next((o for t, o in self.states.items() if e.tensor == self.running(t)), None)
            if other is None:
                return None
            names = {i.name: x for i, x in zip(other.einsum.indices, e.indices, strict=False) if isinstance(i, Var)}
            return substitute(self.beginning(other), names)

        return cancelled(transform(self.seeds[s.tensor].value, leaf))

    def tell_seeds(self) -> None:
        """Add a step for each seed, with what proves it."""
        for t, seed in self.seeds.items():
            x, state = seed.value, self.states[t]
            proof: tuple[str, ...] = ()
            if state.how.form != "none":
                sign = "+" if state.how.form == "shift" else "*"
                proof = (f"x(d) = {x}", f"x(d') = C(d, d') {sign} x(d) identically, so it moves with the state")
            self.steps.append(
                Step(
                    rule="seed",
                    kind=state.how.kind if proof else "law",
                    what=f"{t} begins at {self.beginning(state)}, which every row has once",
                    proof=proof,
                )
            )
