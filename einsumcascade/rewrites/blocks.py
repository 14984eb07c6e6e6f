"""Take the iterations out of a cascade, so that what is left of it is differentiated Einsum by Einsum.

What is read of an iteration elsewhere becomes an input, as if a forward had kept it. Two kinds are told apart:

A bisection finds x with f(x) = 0, whatever steps it takes: dx = -df / (df/dx), the implicit function theorem. Its own
derivative, step by step, would be that of the first bracket.

    iter n:  MI = (LO + HI) / 2;  LO', HI' = select(f(MI) >= 0, (MI, HI), (LO, MI))

Any other is differentiated step by step: generation t of a state receives what step t hands back of what
t + 1 received, an iteration in the other direction. The step itself is a cascade without one, over all t at once.
Source: Griewank and Walther, chapters 3 and 15.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from einsumcascade.errors import LoweringError, SourceText
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Input,
    Iter,
    Num,
    Output,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    transform,
)
from einsumcascade.rewrites.algebra import equal, fresh, without_axis
from einsumcascade.rewrites.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A bisection.

    Args:
        block: the iteration. tensor: its root, an input of what is left.
        chain: what is 0 at the root, and what that needs, as Einsums of what is left; `residual` is the last.
        kept: how a forward keeps the root.
    """

    block: Iter
    tensor: str
    chain: tuple[Einsum, ...]
    kept: Mapping[str, Einsum]

    @property
    def needs(self) -> tuple[str, ...]:
        """The tensors that what is 0 there reads."""
        return tuple(dict.fromkeys(r.tensor for e in self.chain for r in reads(e.expr, *e.where)))

    @property
    def residual(self) -> Einsum:
        """What is 0 at the root."""
        return self.chain[-1]

    @property
    def step(self) -> Step:
        """What a derivation says of it."""
        r, x = self.residual.tensor, self.tensor
        return Step(
            rule="root",
            kind="algebraic",
            what=f"{x} is where {r} is 0: its gradient is that of the root, whatever steps find it",
            after=tuple(map(str, self.chain)),
            proof=(
                "where the condition differs at the ends of the first bracket, each step halves it and keeps that so:",
                "both ends go to one root",
                f"d{x} = -d{r} / (d{r}/d{x}), the implicit function theorem",
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Any other iteration.

    Args:
        block: the iteration.
        inits: the first value of each state; `old` and `new`: its names before and after a step; `last`, `each`: those
            of its last generation, and of what each step makes of it, as they are read elsewhere.
        einsums: the step without iteration, over all generations at once.
        kept: how a forward keeps a tensor that is an input of what is left or of the step.
        reads: what the step needs of tensors around it.
    """

    block: Iter
    inits: Mapping[str, Init]
    old: Mapping[str, str]
    new: Mapping[str, str]
    last: Mapping[str, str]
    each: Mapping[str, str]
    einsums: tuple[Einsum, ...]
    kept: Mapping[str, Einsum]
    reads: tuple[Read, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The tensors around it that its steps and first values read."""
        return tuple(dict.fromkeys(r.tensor for r in (*self.reads, *reads(*(i.expr for i in self.inits.values())))))

    @property
    def step(self) -> Step:
        """What a derivation says of it."""
        states = ", ".join(self.inits)
        way = "up" if self.block.descending else "down"
        return Step(
            rule="reverse",
            what=f"{states}: each generation receives what its step hands back, in steps that go {way}",
            proof=("the chain rule, step by step; the generations before the steps are kept where a step needs them",),
        )


Block = Root | Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A cascade without its iterations, and these. The cascade puts out what they read too."""

    cascade: Cascade
    blocks: tuple[Block, ...]


def opened(cascade: Cascade, taken: set[str]) -> Opened:
    """Take every iteration out.

    Args:
        taken: names; those of new tensors are added.

    Raises: LoweringError: `not-differentiated-yet`: iterations in one another, generations read other than the last or
        in order, an operation on whole fibers in a step.
    """
    blocks: list[Block] = []
    for s in [s for s in cascade.body if isinstance(s, Iter)]:
        opener = _Opener(cascade, s, taken)
        block = opener.root() or opener.steps()
        cascade = opener.left(block)
        blocks.append(block)
    made = {e.tensor for e in cascade.einsums} - set(cascade.output_names)
    read = [t for b in blocks for t in (b.needs if isinstance(b, Steps) else (b.residual.tensor,))]
    needed = dict.fromkeys(t for t in read if t in made)
    extra = tuple(Output(tensor=t) for t in needed)
    return Opened(cascade=replace(cascade, outputs=(*cascade.outputs, *extra)), blocks=tuple(blocks))


class _Opener:
    """One iteration of one cascade."""

    def __init__(self, cascade: Cascade, block: Iter, taken: set[str]) -> None:
        self.cascade, self.block, self.var, self.taken = cascade, block, block.var, taken
        if any(not isinstance(s, Einsum) or s.is_fiberwise for s in block.body):
            raise undifferentiated(
                block, "an iteration with another, or with an operation on whole fibers, in it", cascade.source
            )
        self.made = {s.tensor: s for s in block.body if isinstance(s, Einsum)}
        self.inits = {s.tensor: s for s in cascade.body if isinstance(s, Init) and s.tensor in self.made}
        here: Expr = Var(name=self.var)
        following = apply("add", here, Num(value=1))
        self.before: Expr = following if block.descending else here
        self.after: Expr = here if block.descending else following
        self.end: Expr = Num(value=0) if block.descending else Scalar(name=rank_of(self.var))
        self.axes = {t: self._axis(self.made[t]) for t in self.inits}

    def _axis(self, e: Einsum) -> int:
        axis = next((n for n, i in enumerate(e.indices) if i == self.after), -1)
        if axis < 0 or not all(isinstance(i, Var) for i in without_axis(e.indices, axis)):
            raise undifferentiated(
                e, f"{e.tensor}, a state with its generations on no axis of their own,", self.cascade.source
            )
        return axis

    def _generation(self, tensor: str, generation: Expr) -> Read:
        indices, axis = self.made[tensor].indices, self.axes[tensor]
        return Read(tensor=tensor, indices=(*indices[:axis], generation, *indices[axis + 1 :]))

    def _kept(self, name: str, tensor: str) -> Einsum:
        """The last generation of a state as a tensor."""
        indices = without_axis(self.made[tensor].indices, self.axes[tensor])
        return Einsum(tensor=name, indices=indices, expr=self._generation(tensor, self.end))

    def left(self, block: Block) -> Cascade:
        """The cascade with inputs in the place of what it reads of the iteration."""
        inputs: dict[str, Einsum] = {}

        def read(e: Expr) -> Expr | None:
            if not isinstance(e, Read) or e.tensor not in self.made:
                return None
            indices = tuple(transform(i, read) for i in e.indices)
            if e.tensor not in self.inits:
                inputs[e.tensor] = self.made[e.tensor]
                return replace(e, indices=indices)
            axis = self.axes[e.tensor]
            if isinstance(block, Steps) and (step := self._step(indices[axis])) is not None:
                name = block.each[e.tensor]
                inputs[name] = block.kept[name]
                return Read(tensor=name, indices=_put(indices, axis, step))
            if indices[axis] != self.end:
                raise undifferentiated(
                    self.block, f"generation {indices[axis]} of {e.tensor}, read elsewhere,", self.cascade.source
                )
            name = block.tensor if isinstance(block, Root) else block.last[e.tensor]
            inputs[name] = block.kept[name]
            return Read(tensor=name, indices=without_axis(indices, axis))

        body: list[Statement] = []
        for s in self.cascade.body:
            if s is self.block:
                body += block.chain if isinstance(block, Root) else ()
            elif isinstance(s, Einsum):
                where = tuple(transform(c, read) for c in s.where)
                body.append(replace(s, expr=transform(s.expr, read), where=where))
            elif isinstance(s, Iter) and {r.tensor for x in s.body if isinstance(x, Einsum) for r in reads(x.expr)} & {
                *self.made
            }:
                raise undifferentiated(self.block, "an iteration that another one reads", self.cascade.source)
            elif not isinstance(s, Init) or s.tensor not in self.inits:
                body.append(s)
        for name in self.cascade.output_names:
            if name in self.inits:
                raise undifferentiated(self.block, f"every generation of {name} as an output", self.cascade.source)
            if name in self.made:
                inputs[name] = self.made[name]
        if isinstance(block, Root):
            inputs[block.tensor] = block.kept[block.tensor]
        new = tuple(Input(tensor=t, indices=e.free, is_saved=True) for t, e in inputs.items())
        return replace(self.cascade, inputs=(*self.cascade.inputs, *new), body=tuple(body))

    def _step(self, generation: Expr) -> Expr | None:
        """The step that makes a generation read elsewhere; None for the last one, and where steps have no number."""
        match generation:
            case Apply(op="add", args=(step, Num(value=1))) if not self.block.descending:
                return step
            case Var() if self.block.descending:
                return generation
        return None

    # --- the two kinds ------------------------------------------------------------------------------------------

    def steps(self) -> Steps:
        """The iteration as one that is gone through step by step."""
        old = {t: fresh(f"{t}_old", self.taken) for t in self.inits}
        new = {t: fresh(f"{t}_new", self.taken) for t in self.inits}
        last = {t: fresh(f"{t}_last", self.taken) for t in self.inits}
        each = {t: fresh(f"{t}_each", self.taken) for t in self.inits}
        here = Var(name=self.var)

        def leaf(e: Expr) -> Expr | None:
            if not isinstance(e, Read) or e.tensor not in self.inits:
                return None
            axis = self.axes[e.tensor]
            names = {self.before: old, self.after: new}
            if e.indices[axis] not in names:
                raise undifferentiated(
                    e, f"generation {e.indices[axis]} of {e.tensor}, read by a step,", self.cascade.source
                )
            indices = tuple(transform(i, leaf) for i in e.indices)
            return Read(tensor=names[indices[axis]][e.tensor], indices=_put(indices, axis, here))

        einsums = []
        for e in self.made.values():
            axis = self.axes.get(e.tensor)
            indices = e.indices if axis is None else _put(e.indices, axis, here)
            name = e.tensor if axis is None else new[e.tensor]
            where = tuple(transform(c, leaf) for c in e.where)
            einsums.append(replace(e, tensor=name, indices=indices, expr=transform(e.expr, leaf), where=where))
        kept = {e.tensor: e for e in self.made.values() if e.tensor not in self.inits}
        for t in self.inits:
            before = self._generation(t, self.before)
            indices = _put(before.indices, self.axes[t], here)
            kept[old[t]] = Einsum(tensor=old[t], indices=indices, expr=before)
            kept[each[t]] = Einsum(tensor=each[t], indices=indices, expr=self._generation(t, self.after))
            kept[last[t]] = self._kept(last[t], t)
        inside = {*self.made, *old.values(), *new.values()}
        around = tuple(r for r in _reads(einsums) if r.tensor not in inside)
        return Steps(
            block=self.block,
            inits=self.inits,
            old=old,
            new=new,
            last=last,
            each=each,
            einsums=tuple(einsums),
            kept=kept,
            reads=around,
        )

    def root(self) -> Root | None:
        """The iteration as a bisection; None if it is none."""
        if len(self.inits) != 2:
            return None
        for low, high in (tuple(self.inits), tuple(self.inits)[::-1]):
            match (self.made[low].expr, self.made[high].expr):
                case (
                    Apply(op="select", args=(c, Read() as middle, stays)),
                    Apply(op="select", args=(other, also, Read() as same)),
                ) if c == other and (stays, also, middle) == (
                    self._generation(low, self.before),
                    self._generation(high, self.before),
                    same,
                ):
                    return self._bisected(low, high, c, middle)
        return None

    def _bisected(self, low: str, high: str, condition: Expr, middle: Read) -> Root | None:
        d = self.made.get(middle.tensor)
        ends = (self._generation(low, self.before), self._generation(high, self.before))
        half = apply("div", apply("add", *ends), Num(value=2))
        if d is None or d.reduce is not None or not equal(d.expr, half) or not isinstance(condition, Apply):
            return None
        if condition.op not in ("lt", "le", "gt", "ge"):
            return None
        rest = [e for e in self.made.values() if e.tensor not in (low, high, d.tensor)]
        if {r.tensor for r in _reads(rest)} & {low, high}:
            return None
        name = fresh(f"{low}_root", self.taken)
        names = {e.tensor: fresh(f"{e.tensor}_root", self.taken) for e in rest}
        here = Var(name=self.var)

        def leaf(e: Expr) -> Expr | None:
            if not isinstance(e, Read) or e.tensor not in {*names, d.tensor}:
                return None
            if here not in e.indices:
                raise undifferentiated(e, f"{e.tensor} of another step", self.cascade.source)
            new = name if e.tensor == d.tensor else names[e.tensor]
            return Read(tensor=new, indices=tuple(transform(i, leaf) for i in e.indices if i != here))

        chain = [
            replace(
                e,
                tensor=names[e.tensor],
                indices=tuple(i for i in e.indices if i != here),
                expr=transform(e.expr, leaf),
                where=tuple(transform(c, leaf) for c in e.where),
            )
            for e in rest
        ]
        kept = self._kept(name, low)
        residual = fresh(f"{low}_residual", self.taken)
        difference = transform(apply("sub", *condition.args), leaf)
        chain.append(Einsum(tensor=residual, indices=kept.indices, expr=difference))
        return Root(block=self.block, tensor=name, chain=tuple(chain), kept={name: kept})


def undifferentiated(where: Statement | Expr, what: str, source: SourceText | None) -> LoweringError:
    """The error of what has no gradient yet."""
    return LoweringError.of(
        "not-differentiated-yet",
        f"{what} has no gradient yet",
        span=where.span,
        rule="reference, analysis and the kernel itself work all the same",
        source=source,
    )


def _reads(einsums: Iterable[Einsum]) -> tuple[Read, ...]:
    return reads(*(x for e in einsums for x in (e.expr, *e.where)))


def _put(indices: tuple[Expr, ...], axis: int, index: Expr) -> tuple[Expr, ...]:
    return (*indices[:axis], index, *indices[axis + 1 :])
