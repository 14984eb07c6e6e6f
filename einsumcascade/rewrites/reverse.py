"""Reverse mode on the Einsums of a cascade, and on its iterations as wholes.

Each Einsum hands what it receives on to what it reads (`adjoint`), where that lands on the elements read (`scatter`). A
step of an iteration is such a cascade itself; its gradient becomes the step of an iteration in the other direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from einsumcascade.language.ir import (
    Einsum,
    Expr,
    Init,
    Input,
    Iter,
    Num,
    Output,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    substitute,
)
from einsumcascade.rewrites.adjoint import adjoints
from einsumcascade.rewrites.algebra import fresh, terms, total
from einsumcascade.rewrites.blocks import Block, Root, Steps
from einsumcascade.rewrites.transposes import ZERO, Loop, Transposes


@dataclass
class Reverse(Transposes):
    """The reverse of a cascade without iterations, and of those that were taken out of it."""

    def run(self, given: Mapping[str, Expr]) -> dict[str, str]:
        """Derive what each wanted input receives of what outputs are given. Returns: the tensor of each."""
        for name, value in given.items():
            if name in self.live:
                self.received.setdefault(name, []).append(value)
        left = list(self.blocks)
        for s in reversed(self.base.einsums):
            for n in reversed([n for n, b in enumerate(left) if self._comes_after(b, s)]):
                # An iteration is reversed once all that reads it has been, and later ones before it.
                while len(left) > n:
                    self._reverse(left.pop())
            if s.tensor in self.live and s.tensor not in self.still and s.tensor in self.received:
                self._transpose(s)
        while left:
            self._reverse(left.pop())
        return {x: self._gradient(x) for x in self.wanted}

    # --- iterations ---------------------------------------------------------------------------------------------

    def _comes_after(self, b: Block, s: Einsum) -> bool:
        if isinstance(b, Root):
            return s.tensor == b.residual.tensor
        return s.tensor in b.needs

    def _reverse(self, b: Block) -> None:
        if not any(t in self.received for t in b.kept):
            return
        self.steps.append(b.step)
        if isinstance(b, Root):
            self._reverse_root(b)
        else:
            self._reverse_steps(b)

    def _held(self, tensor: str, indices: tuple[Expr, ...]) -> Expr:
        """All that a tensor receives: a number, or a read of a tensor that says it."""
        parts = self.received.get(tensor)
        if parts is None:
            return ZERO
        value = self._tidy(total(tuple(t for e in parts for t in terms(e))))
        if isinstance(value, Read | Num):
            return value
        name = fresh(f"D{tensor}", self.taken)
        self.body.append(Einsum(tensor=name, indices=indices, expr=value))
        return Read(tensor=name, indices=indices)

    def _reverse_root(self, b: Root) -> None:
        """What a root receives, handed to what is 0 there."""
        kept = b.kept[b.tensor]
        held = self._held(b.tensor, kept.indices)
        chain = {e.tensor for e in b.chain}
        own = replace(self.base, outputs=(Output(tensor=b.residual.tensor),)).with_body(b.chain)
        own = replace(own, inputs=(*own.inputs, *self._around(b.chain, chain)))
        inner = Reverse(cascade=own, wanted=(b.tensor,), taken=self.taken)
        slope = inner.run({b.residual.tensor: Num(value=1)})[b.tensor]
        known = set(self.defs)
        self.body += [e for e in inner.forward if e.tensor not in known] + inner.body
        self.ranks += inner.ranks
        at = Read(tensor=slope, indices=self.indices(b.tensor))
        # Where the slope is 0 there is no point at all, or a root that nothing moves.
        handed = apply("select", apply("eq", at, ZERO), ZERO, apply("div", apply("neg", held), at))
        self.received.setdefault(b.residual.tensor, []).append(handed)

    def _around(self, einsums: tuple[Einsum, ...], own: set[str]) -> tuple[Input, ...]:
        """Einsums of the cascade that some others read, as inputs."""
        found = dict.fromkeys(r.tensor for e in einsums for r in reads(e.expr, *e.where))
        return tuple(Input(tensor=t, indices=self.defs[t].free) for t in found if t in self.defs and t not in own)

    def _reverse_steps(self, b: Steps) -> None:
        """An iteration in the other direction, whose step is the gradient of the step."""
        var, down = b.block.var, not b.block.descending
        here: Expr = Var(name=var)
        before, after = (here, apply("add", here, Num(value=1)))[:: 1 if down else -1]
        old = {t: b.kept[b.old[t]] for t in b.inits}
        states = {t: fresh(f"D{t}", self.taken) for t in b.inits}
        axes = {t: old[t].indices.index(here) for t in b.inits}

        def generation(t: str, g: Expr) -> Read:
            indices = old[t].indices
            return Read(tensor=states[t], indices=(*indices[: axes[t]], g, *indices[axes[t] + 1 :]))

        given: dict[str, Expr] = {b.new[t]: generation(t, after) for t in b.inits}
        for t, e in b.kept.items():
            if t not in (*b.old.values(), *b.last.values(), *b.each.values()) and t in self.received:
                given[t] = self._held(t, e.indices)
        for t, name in b.each.items():
            if name in self.received:
                given[b.new[t]] = apply("add", given[b.new[t]], self._held(name, old[t].indices))
        names = {e.tensor for e in b.einsums}
        own = replace(
            self.base,
            inputs=(
                *(i for i in self.base.inputs if i.tensor not in names),
                *(Input(tensor=e.tensor, indices=e.free, is_saved=True) for e in old.values()),
                *self._around(b.einsums, names),
            ),
            outputs=tuple(Output(tensor=t) for t in given),
        ).with_body(b.einsums)
        around = tuple(dict.fromkeys(r.tensor for r in b.reads if r.tensor in self.live))
        inner = Reverse(cascade=own, wanted=(*b.old.values(), *around), taken=self.taken)
        found = inner.run(given)
        self.ranks += inner.ranks
        self.steps += inner.steps
        inits: list[Init] = []
        body: list[Einsum] = []
        outside: list[Einsum] = []
        for t in b.inits:
            indices = (*old[t].indices[: axes[t]], *old[t].indices[axes[t] + 1 :])
            start = generation(t, Scalar(name=rank_of(var)) if down else ZERO)
            inits.append(Init(tensor=states[t], indices=start.indices, expr=self._held(b.last[t], indices)))
        ended: set[str] = set()  # what there is only after the last step
        for e in (*inner.forward, *inner.body):
            late = ended & {r.tensor for r in reads(e.expr, *e.where)}
            if var in e.free and not late:
                body.append(e)
            elif var in e.ranks and not late:
                first, added, rest = self._accumulated(e, var, before, after, down)
                inits.append(first)
                body += added
                outside.append(rest)
                ended.add(rest.tensor)
            else:
                outside.append(e)
                ended |= {e.tensor} if late else set()
        for t in b.inits:
            value = Read(tensor=found[b.old[t]], indices=old[t].indices)
            body.append(Einsum(tensor=states[t], indices=generation(t, before).indices, expr=value))
        exported = {found[t] for t in around} | {r.tensor for e in outside for r in reads(e.expr, *e.where)}
        steps = tuple(_merged(body, set(states.values()), exported))
        self.loops.append(Loop(inits=tuple(inits), block=Iter(var=var, body=steps, descending=down)))
        self.body += outside
        for t in around:
            self.received.setdefault(t, []).append(Read(tensor=found[t], indices=self.indices(t)))
        for t, begun in b.inits.items():
            start = generation(t, ZERO if down else Scalar(name=rank_of(var)))
            plain = tuple(i for i in begun.indices if isinstance(i, Var))
            at = dict(zip((i.name for i in _without(old[t].indices, axes[t])), plain, strict=True))
            handed = adjoints(begun.expr, substitute(start, at))
            self.uses |= {r.tensor: self.uses.get(r.tensor, 0) + 1 for r, _ in handed}
            pseudo = Einsum(tensor=t, indices=plain, expr=begun.expr)
            for r, part in handed:
                if r.tensor in self.live and r.tensor not in self.still:
                    self._land(r, pseudo, self._tidy(part))

    def _accumulated(
        self, e: Einsum, var: str, before: Expr, after: Expr, down: bool
    ) -> tuple[Init, tuple[Einsum, ...], Einsum]:
        """A sum over all steps as a state: its first value, a step, and the sum."""
        assert e.reduce == "sum"
        here = Var(name=var)
        name = fresh(f"{e.tensor}_sum", self.taken)
        ranks = tuple(v for v in e.ranks if v != var)
        part = replace(e, tensor=fresh(f"{e.tensor}_step", self.taken), indices=(here, *e.indices), ranks=ranks)
        if not ranks:
            # A sum over no point is 0, a map at no point has no value.
            inside = e.expr
            for c in e.where:
                inside = apply("select", c, inside, ZERO)
            part = replace(part, expr=inside, where=(), reduce=None)
        value = apply(
            "add", Read(tensor=name, indices=(after, *e.indices)), Read(tensor=part.tensor, indices=part.indices)
        )
        step = Einsum(tensor=name, indices=(before, *e.indices), expr=value)
        start: Expr = Scalar(name=rank_of(var)) if down else ZERO
        end: Expr = ZERO if down else Scalar(name=rank_of(var))
        whole = Einsum(tensor=e.tensor, indices=e.indices, expr=Read(tensor=name, indices=(end, *e.indices)))
        return Init(tensor=name, indices=(start, *e.indices), expr=ZERO), (part, step), whole


def _without(indices: tuple[Expr, ...], axis: int) -> tuple[Var, ...]:
    return tuple(i for n, i in enumerate(indices) if n != axis and isinstance(i, Var))


def _merged(body: list[Einsum], states: set[str], exported: set[str]) -> list[Einsum]:
    """Steps in which a state that is another tensor and nothing else is that tensor, unless that is read elsewhere."""
    out = list(body)
    for s in body:
        if s.tensor not in states or not isinstance(s.expr, Read):
            continue
        source = s.expr.tensor
        readers = [e for e in out if e is not s and source in {r.tensor for r in reads(e.expr, *e.where)}]
        made = next((e for e in out if e.tensor == source), None)
        if made is not None and not readers and source not in exported and made.indices == s.expr.indices:
            out = [replace(made, tensor=s.tensor, indices=s.indices) if e is made else e for e in out if e is not s]
    return out
