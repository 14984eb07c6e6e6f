"""Split a rank into parts with a running state each, and merge the states (R3'): split-K, FlashDecoding."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from einsumcascade.language.ir import (
    Cascade,
    Definition,
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
    transform,
    walk,
)
from einsumcascade.rewrites.algebra import fresh
from einsumcascade.rewrites.loop_form import Iterations, LoopForm


def split_form(cascade: Cascade, *, variable: str, parts: int) -> LoopForm:
    """Partition a rank into parts, reduce each over a reference of its own, and merge the states (R3').

        GM = S :: max(m); SD = exp(S - GM) :: sum(m)   ->   LGM = S :: max(m0);  LSD = exp(S - LGM) :: sum(m0)
                                                             GM = LGM :: max(m1); SD = exp(LGM - GM) * LSD :: sum(m1)

    Returns: a cascade of equal value without iteration; M1 is the number of parts, M0 their length.
    Raises: LoweringError: as `loop_form`.
    """
    assert parts > 0
    return _Split(cascade, (variable,), parts + 1).run()


def features_last(cascade: Cascade, features: Collection[str]) -> Cascade:
    """Write computed tensors with their feature ranks last: what lies in memory is then contiguous along them.

        LNV[b,h,p,f,m1]  ->  LNV[b,h,p,m1,f]

    Outputs, and states of iterations, keep their order. The values are the same.
    """
    steps = {s.tensor for s in cascade.einsums if not all(isinstance(i, Var) for i in s.indices)}
    kept = {*cascade.output_names, *steps, *(s.tensor for s in walk(cascade.body) if isinstance(s, Init))}
    order: dict[str, list[int]] = {}
    for e in cascade.einsums:
        if e.tensor not in kept:
            last = [isinstance(i, Var) and i.name in features for i in e.indices]
            order[e.tensor] = sorted(range(len(last)), key=last.__getitem__)

    def placed(tensor: str, indices: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(indices[n] for n in order[tensor]) if tensor in order else indices

    def moved(expr: Expr) -> Expr:
        def leaf(x: Expr) -> Expr | None:
            return replace(x, indices=placed(x.tensor, tuple(map(moved, x.indices)))) if isinstance(x, Read) else None

        return transform(expr, leaf)

    def statement(s: Statement) -> Statement:
        match s:
            case Einsum():
                own = placed(s.tensor, tuple(map(moved, s.indices)))
                return replace(s, indices=own, expr=moved(s.expr), where=tuple(map(moved, s.where)))
            case Init():
                return replace(s, expr=moved(s.expr))
            case Iter():
                return replace(s, body=tuple(map(statement, s.body)))

    return cascade.with_body(tuple(map(statement, cascade.body)))


@dataclass
class _Split(Iterations):
    """A state for each part of the rank, and their merge; `tile` is one more than the number of parts."""

    def ranks(self) -> tuple[Definition, ...]:
        parts = Scalar(name=rank_of(self.index))
        extent = Scalar(name=rank_of(self.over[-1]))
        length = apply("floordiv", apply("sub", apply("add", extent, parts), Num(value=1)), parts)
        return Definition(name=self.index, expr=Num(value=self.tile - 1)), Definition(name=self.inner, expr=length)

    def generation(self, read: Read, when: str) -> Read:
        if when != "new":
            return read
        return Read(tensor=self.local(read.tensor), indices=(*read.indices, *self.tile_at()))

    def local(self, tensor: str) -> str:
        """The name of the state of one part."""
        if (tensor, -1) not in self.memo:
            self.memo[(tensor, -1)] = fresh("L" + tensor, self.taken)
        return self.memo[(tensor, -1)]

    def absorbed_at(self) -> tuple[Expr, ...]:
        return self.tile_at()

    def finished_state(self, s: Einsum) -> list[Statement]:
        return []

    def traverse(self, loop: int) -> list[Statement]:
        body: list[Statement] = []
        placed: dict[str, str] = {}
        self.anchored = {}
        for state in self.states.values():
            if state.loop == loop:
                s = state.einsum
                self.tile_of(s, self.local(s.tensor), loop, body, placed)
                merged = self.moved(state, body, source="new", target="last")
                body.append(replace(s, expr=merged, ranks=(self.index,), where=()))
        return body
