"""The gradient of a cascade, as a cascade: reverse mode on Einsums.

    S[p,m]  = Q[p,e] * K[m,e] :: sum(e)         DQ[p,e] = DS[p,m] * K[m,e] :: sum(m)
                                           ->   DK[m,e] = DS[p,m] * Q[p,e] :: sum(p)

What a tensor receives is the sum over its readers. The transpose of a read at the variables of a tensor is a sum over
the others; of a read `X[p - 1]`, `K[h // R]` one that is solved for the variable; of any other, `T[p - m]`,
`T[IDX[p]]`, a sum over the points `where p - m == j`. Values that the whole of a long rank tells are saved by the
forward cascade, the least of them that separates the two; all else is computed again.

No gradient goes through a reference that no output depends on (`invariance` proves it), nor through an index or a
condition. Under a maximum it goes to the elements that attain it, in equal shares, as PyTorch's `amax` has it.
Source: Griewank and Walther, reverse accumulation; FlashAttention-2 appendix B, of which this is no special case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from einsumcascade.errors import InputError, nearest
from einsumcascade.language.ir import (
    Cascade,
    Definition,
    Einsum,
    Input,
    Iter,
    Num,
    Output,
    Read,
    Statement,
    rank_of,
    reads,
    scalars,
    walk,
)
from einsumcascade.rewrites.adjoint import adjoints
from einsumcascade.rewrites.algebra import drop_dead, fresh, names_taken, producers
from einsumcascade.rewrites.blocks import Block, Steps, opened, undifferentiated
from einsumcascade.rewrites.defer import expand_means, localise
from einsumcascade.rewrites.reassociate import reassociate
from einsumcascade.rewrites.reroll import reroll
from einsumcascade.rewrites.reverse import Reverse
from einsumcascade.rewrites.saved import least_saved
from einsumcascade.rewrites.step import Step
from einsumcascade.rewrites.transposes import Loop
from einsumcascade.rewrites.weights import divided


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """A cascade and its gradient.

    Args:
        original: the cascade.
        forward: the same with what is saved put out as well, after its own outputs.
        backward: from inputs, what is saved and what each output receives, to what each input receives.
        saved: tensors that the forward cascade saves; its own outputs may be among them.
        received: for each output, the input of `backward` that says what it receives.
        gradients: for each input that a gradient reaches, the output of `backward`.
        steps: what was used and why it is right.
    """

    original: Cascade
    forward: Cascade
    backward: Cascade
    saved: tuple[str, ...]
    received: Mapping[str, str]
    gradients: Mapping[str, str]
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        blocks = [f"{n}. {s}" for n, s in enumerate(self.steps, start=1)]
        return "\n\n".join([*blocks, f"forward:\n{self.forward}", f"backward:\n{self.backward}"])

    def to_dict(self) -> dict[str, object]:
        """A JSON value."""
        return {
            "spec": self.original.name,
            "steps": [{"rule": s.rule, "kind": s.kind, "what": s.what, "proof": list(s.proof)} for s in self.steps],
            "forward": str(self.forward),
            "backward": str(self.backward),
            "saved": list(self.saved),
            "received": dict(self.received),
            "gradients": dict(self.gradients),
        }


def differentiate(
    cascade: Cascade, *, wrt: tuple[str, ...] | None = None, extents: Mapping[str, int] | None = None
) -> Gradient:
    """Derive the gradient of a cascade.

    Args:
        cascade: a checked cascade.
        wrt: inputs whose gradient is wanted; None: all that one reaches.
        extents: numbers by rank, which decide what is saved; those not given are assumed (Definition F2).

    Returns: the forward and the backward cascade; `Gradient.backward` is an ordinary cascade, which the reference runs.
    Raises:
        InputError: `no-gradient`: an input of `wrt` does not exist, or no gradient reaches it.
        LoweringError: `not-differentiated-yet`: an iteration, a top-k or a solve.
    Cost: linear in the accesses, some SymPy for each reference.

    >>> from einsumcascade.language.parser import parse
    >>> print(differentiate(parse("in X[p,m], Y[p,m]\\nZ[p] = X[p,m] * Y[p,m]\\nout Z")).backward)
    in X[p, m], Y[p, m], DZ[p]
    DX[p, m] = DZ[p] * Y[p, m]
    DY[p, m] = DZ[p] * X[p, m]
    out DX, DY
    """
    _refuse(cascade)
    wanted = _wanted(cascade, wrt)
    rolled = reroll(cascade)
    simple = expand_means(localise(rolled.cascade).cascade).cascade
    taken = names_taken(simple)
    left = opened(simple, taken)
    reverse = Reverse(cascade=left.cascade, wanted=wanted, taken=taken, blocks=left.blocks)
    inputs: list[Input] = []
    given: dict[str, str] = {}
    for name in cascade.output_names:
        if name in reverse.live:
            given[name] = fresh(f"D{name}", taken)
            inputs.append(Input(tensor=given[name], indices=tuple(i.name for i in reverse.indices(name))))
    received = {t: Read(tensor=d, indices=reverse.indices(t)) for t, d in given.items()}
    gradients = reverse.run(received)
    pair = _Pair(
        original=cascade, rolled=rolled.cascade, blocks=left.blocks, reverse=reverse, extents=dict(extents or {})
    )
    return pair.split(given, inputs, gradients, rolled.steps)


def _refuse(cascade: Cascade) -> None:
    for s in cascade.einsums:
        # The positions of a top-k are numbers that no small change changes.
        if s.is_fiberwise and s.reduce != "topk":
            raise undifferentiated(s, f"a {s.reduce}", cascade.source)


def differentiable(cascade: Cascade) -> tuple[str, ...]:
    """Name the inputs that a gradient reaches: those whose values, not their use as an index, reach an output."""
    reaching: set[str] = set(cascade.output_names)
    statements = [x for x in walk(cascade.body) if not isinstance(x, Iter)]
    before = 0
    while before < len(reaching):
        # A step of an iteration reads what an earlier one made of what follows in the text.
        before = len(reaching)
        for s in reversed(statements):
            if s.tensor in reaching and not (isinstance(s, Einsum) and s.is_fiberwise):
                reaching |= {r.tensor for r, _ in adjoints(s.expr, Num(value=1))}
    return tuple(i.tensor for i in cascade.inputs if i.tensor in reaching)


def _wanted(cascade: Cascade, wrt: tuple[str, ...] | None) -> tuple[str, ...]:
    known = differentiable(cascade)
    for name in wrt or ():
        if name not in known:
            raise InputError.of(
                "no-gradient",
                f"no gradient reaches '{name}'",
                rule="a gradient goes to inputs whose values reach an output; indices and conditions pass none",
                hint=nearest(name, known),
            )
    return known if wrt is None else wrt


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The two cascades of one differentiation; it lives inside `differentiate` only."""

    original: Cascade
    rolled: Cascade
    blocks: tuple[Block, ...]
    reverse: Reverse
    extents: Mapping[str, int]

    def split(
        self, given: dict[str, str], inputs: list[Input], gradients: dict[str, str], before: tuple[Step, ...]
    ) -> Gradient:
        """Separate what the forward does from what the backward does."""
        reverse, wanted = self.reverse, tuple(gradients.values())
        base, forward = reverse.base, reverse.forward
        needs = tuple(dict.fromkeys(t for loop in reverse.loops for t in loop.needs))
        results = {t: e for loop in reverse.loops for t, e in loop.makes.items()}
        outputs = tuple(
            Output(tensor=t)
            for t in dict.fromkeys((*self.original.output_names, *wanted, *needs))
            if t not in {i.tensor for i in (*base.inputs, *inputs)} - set(self.original.output_names)
        )
        joint = replace(
            base,
            inputs=base.inputs + tuple(inputs),
            ranks=base.ranks + tuple(reverse.ranks),
            body=(*forward, *reverse.body),
            outputs=outputs,
        )
        steps = [*before, *reverse.steps]
        own = self.original.output_names
        names = tuple(e.tensor for e in forward)

        def least(joint: Cascade) -> tuple[str, ...]:
            return least_saved(joint, base, names, wanted, own, self.extents, also=needs)

        if not reverse.loops:
            met = reassociate(joint)
            # What would have to be computed again for it costs more than the sum, which is also nearer to the truth.
            met = reassociate(joint, against=least(met.cascade)) if met.steps else met
            steps += met.steps
            joint = met.cascade
        saved = least(joint)
        backward = self._backward(joint, inputs, saved, wanted, set(results))
        kept = {t: e for b in self.blocks for t, e in b.kept.items()}
        read = {i.tensor for i in backward.inputs}
        saved = (*(t for t in kept if t in read), *saved)
        return Gradient(
            original=self.original,
            forward=self._forward(joint, saved, kept),
            backward=backward,
            saved=saved,
            received=given,
            gradients=gradients,
            steps=tuple(steps),
        )

    def _forward(self, joint: Cascade, saved: tuple[str, ...], kept: Mapping[str, Einsum]) -> Cascade:
        """The original with what else is saved, and what that needs."""
        own = {e.tensor for e in self.rolled.einsums} | {i.tensor for i in self.original.inputs}
        made = {**producers(joint), **kept}
        needed: dict[str, None] = {}
        pending = [t for t in saved if t not in own]
        for t in pending:
            if t not in needed:
                needed[t] = None
                pending += [r.tensor for r in reads(made[t].expr, *made[t].where) if r.tensor not in own]
        body: list[Statement] = []
        blocks = iter(self.blocks)
        for s in self.rolled.body:
            if isinstance(s, Iter):
                ends = [e for t, e in next(blocks).kept.items() if t in needed]
                inside = [e for e in ends if s.var in e.free]
                written = {
                    i for e in s.body if isinstance(e, Einsum) for i in (Read(tensor=e.tensor, indices=e.indices),)
                }
                late = [e for e in inside if e.expr in written]
                early = [e for e in inside if e not in late]
                body.append(replace(s, body=(*early, *s.body, *late)))
                body += [e for e in ends if e not in inside]
            else:
                body.append(s)
        extra = tuple(e for e in joint.einsums if e.tensor in needed)
        unseen = tuple(t for t in saved if t not in self.original.output_names)
        out = tuple(Output(tensor=t, dtype="float32", is_saved=True) for t in unseen)
        return replace(
            self.rolled,
            body=(*body, *extra),
            outputs=self.original.outputs + out,
            source=None,
            name=f"{self.original.name}_forward",
        )

    def _backward(
        self, joint: Cascade, given: list[Input], saved: tuple[str, ...], wanted: tuple[str, ...], looped: set[str]
    ) -> Cascade:
        made = producers(joint) | {t: e for loop in self.reverse.loops for t, e in loop.makes.items()}
        # An input of fewer than two axes, a slope or a sink, may be float32 beside halves: so is its gradient.
        small = {t for t in wanted if len(made[t].indices) < 2}
        body = tuple(e for e in joint.einsums if e.tensor not in saved)
        declared = {o.tensor: o.dtype for o in self.original.outputs}
        kept = tuple(
            Input(tensor=t, indices=made[t].free, is_saved=True, dtype=declared.get(t, "float32")) for t in saved
        )
        steps = [b for b in self.blocks if isinstance(b, Steps)]
        kept += tuple(
            Input(tensor=t, indices=b.kept[t].free, is_saved=True, dtype="float32")
            for b in steps
            for t in b.old.values()
        )
        cascade = _whole(
            replace(
                joint,
                inputs=(*self.reverse.base.inputs, *kept, *given),
                body=body,
                outputs=tuple(
                    Output(tensor=t, dtype="float32" if t in small else None, is_saved=t in small)
                    for t in dict.fromkeys(wanted)
                ),
                source=None,
                name=f"{self.original.name}_backward",
            ),
            self.reverse.loops,
        )
        cascade = divided(cascade)
        statements = [s for s in walk(cascade.body) if not isinstance(s, Iter)]
        needed = {r.tensor for s in statements for r in reads(s.expr, *(s.where if isinstance(s, Einsum) else ()))}
        needed |= {r.tensor for c in cascade.constraints for r in reads(c)} | set(cascade.output_names)
        inputs = tuple(i for i in cascade.inputs if i.tensor in needed - looped)
        cascade = _used(cascade)
        told = {rank_of(v) for i in inputs for v in i.indices} | {rank_of(d.name) for d in cascade.ranks}
        # An input that nothing reads may still be the only one that tells an extent.
        space = {rank_of(v) for e in cascade.einsums for v in e.space} | _extents(cascade)
        own = [i for i in cascade.inputs if self.original.input(i.tensor) is not None or i in (*kept, *given)]
        for i in own:
            if i not in inputs and any(rank_of(v) in space - told for v in i.indices):
                inputs, told = (*inputs, i), told | {rank_of(v) for v in i.indices}
        order = {i.tensor: n for n, i in enumerate(cascade.inputs)}
        return replace(cascade, inputs=tuple(sorted(inputs, key=lambda i: order[i.tensor])))


def _whole(cascade: Cascade, loops: list[Loop]) -> Cascade:
    """The cascade with its iterations where they have what they read, and without what no output needs."""
    if not loops:
        return drop_dead(cascade)
    left: list[Einsum | Loop] = [*cascade.einsums, *loops]
    pending = {t for x in left for t in (x.makes if isinstance(x, Loop) else (x.tensor,))}
    nodes: list[Einsum | Loop] = []
    while left:
        x = next(x for x in left if not pending & set(_needs(x)) - (set(x.makes) if isinstance(x, Loop) else set()))
        left.remove(x)
        pending -= set(x.makes) if isinstance(x, Loop) else {x.tensor}
        nodes.append(x)
    needed = set(cascade.output_names)
    body: list[Statement] = []
    for x in reversed(nodes):
        if isinstance(x, Loop):
            x = x.only(needed)
            found: tuple[Statement, ...] = (*x.inits, x.block) if x.makes else ()
        else:
            found = (x,) if x.tensor in needed else ()
        if found:
            needed |= set(_needs(x))
            body[:0] = found
    return cascade.with_body(tuple(body))


def _needs(x: Einsum | Loop) -> tuple[str, ...]:
    return x.needs if isinstance(x, Loop) else tuple(r.tensor for r in reads(x.expr, *x.where))


def _used(cascade: Cascade) -> Cascade:
    """Drop the constants that nothing uses."""
    exprs = [x for e in cascade.einsums for x in (e.expr, *e.indices, *e.where)]
    exprs += [*cascade.constraints, *(d.expr for d in cascade.ranks)]
    kept: list[Definition] = []
    for c in reversed(cascade.constants):
        if c.name in scalars(*exprs):
            kept.insert(0, c)
            exprs.append(c.expr)
    return replace(cascade, constants=tuple(kept))


def _extents(cascade: Cascade) -> set[str]:
    """The extents that stand as numbers."""
    exprs = [x for e in cascade.einsums for x in (e.expr, *e.indices, *e.where)]
    exprs += [*cascade.constraints, *(d.expr for d in (*cascade.ranks, *cascade.constants))]
    return {s for s in scalars(*exprs) if s[0].isupper()}
