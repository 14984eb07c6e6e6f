"""The gradient of a cascade, as a cascade: reverse mode on Einsums.

    S[p,m]  = Q[p,e] * K[m,e] :: sum(e)         DQ[p,e] = DS[p,m] * K[m,e] :: sum(m)
                                           ->   DK[m,e] = DS[p,m] * Q[p,e] :: sum(p)

What a tensor receives is the sum over its readers. The transpose of a read at the variables of a tensor is a sum over
the others; of a read `X[p - 1]`, `K[h // R]` one that is solved for the variable; of any other, `T[p - m]`,
`T[IDX[p]]`, a sum over the points `where p - m == j`. Values that the whole of a long rank tells are saved by the
forward cascade, the least of them that separates the two; all else is computed again.

No gradient goes through a reference that no output depends on (`bound.invariant` proves it), nor through an index or a
condition. Under a maximum it goes to the elements that attain it, in equal shares, as PyTorch's `amax` has it.
Source: Griewank and Walther, reverse accumulation; FlashAttention-2 appendix B, of which this is no special case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from einsumcascade.errors import Diagnostic, InputError, LoweringError, nearest
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
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
    scalars,
    substitute,
    transform,
    variables,
    walk,
)
from einsumcascade.rewrites.adjoint import adjoints
from einsumcascade.rewrites.algebra import drop_dead, fresh, is_positive, names_taken, producers, terms, total
from einsumcascade.rewrites.bound import references
from einsumcascade.rewrites.defer import expand_means, localise
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.reassociate import reassociate
from einsumcascade.rewrites.saved import least_saved
from einsumcascade.rewrites.scatter import landing, within
from einsumcascade.rewrites.step import Step
from einsumcascade.rewrites.weights import in_exponents, named, placed

# Of a maximum: some rounding errors of float32, and of its products.
NEAR = 2.0**-18


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
    return _Reverse(cascade, wanted, dict(extents or {})).run()


def _refuse(cascade: Cascade) -> None:
    for s in walk(cascade.body):
        what = ""
        if isinstance(s, Iter | Init):
            what = "an iteration"
        elif s.is_fiberwise:
            what = {"topk": "a top-k"}.get(s.reduce or "", f"a {s.reduce}")
        if what:
            raise LoweringError(
                diagnostics=(
                    Diagnostic(
                        code="not-differentiated-yet",
                        headline=f"{what} has no gradient yet",
                        span=s.span,
                        rule="reference, analysis and the kernel itself work all the same",
                    ),
                ),
                source=cascade.source,
            )


def differentiable(cascade: Cascade) -> tuple[str, ...]:
    """Name the inputs that a gradient reaches: those whose values, not their use as an index, reach an output."""
    reaching: set[str] = set(cascade.output_names)
    for s in reversed(cascade.einsums):
        if s.tensor in reaching:
            reaching |= {r.tensor for r, _ in adjoints(s.expr, Num(value=1))}
    return tuple(i.tensor for i in cascade.inputs if i.tensor in reaching)


def _wanted(cascade: Cascade, wrt: tuple[str, ...] | None) -> tuple[str, ...]:
    known = differentiable(cascade)
    for name in wrt or ():
        if name not in known:
            raise InputError(
                diagnostics=(
                    Diagnostic(
                        code="no-gradient",
                        headline=f"no gradient reaches '{name}'",
                        rule="a gradient goes to inputs whose values reach an output; indices and conditions pass none",
                        hint=nearest(name, known),
                    ),
                )
            )
    return known if wrt is None else wrt


@dataclass
class _Reverse:
    """One differentiation; it lives inside `differentiate` only."""

    original: Cascade
    wanted: tuple[str, ...]
    extents: dict[str, int]
    received: dict[str, list[Expr]] = field(default_factory=dict)
    body: list[Einsum] = field(default_factory=list)
    ranks: list[Definition] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def run(self) -> Gradient:
        simple = expand_means(localise(self.original).cascade).cascade
        live = self._live(simple)
        self.still = self._still(simple)
        simple = named(simple, live, self.still)
        self.taken = names_taken(simple)
        self.base, self.weights = in_exponents(simple, self.taken)
        self.live = self._live(self.base)
        self.defs = producers(self.base)
        self.uses = {
            t: sum(r.tensor == t for s in self.base.einsums for r in {r for r, _ in adjoints(s.expr, Num(value=1))})
            for t in self.live
        }
        given: dict[str, str] = {}
        inputs: list[Input] = []
        for name in self.original.output_names:
            if name in self.live:
                given[name] = fresh(f"D{name}", self.taken)
                indices = self._indices(name)
                inputs.append(Input(tensor=given[name], indices=tuple(v.name for v in indices)))
                self.received.setdefault(name, []).append(Read(tensor=given[name], indices=indices))
        for s in reversed(self.base.einsums):
            if s.tensor in self.live and s.tensor not in self.still and s.tensor in self.received:
                self._transpose(s)
        gradients = {x: self._gradient(x) for x in self.wanted}
        return self._split(given, inputs, gradients)

    def _live(self, cascade: Cascade) -> frozenset[str]:
        """Tensors that depend on an input that is wanted, other than through an index or a condition."""
        live = set(self.wanted)
        for s in cascade.einsums:
            if any(r.tensor in live for r, _ in adjoints(s.expr, Num(value=1))):
                live.add(s.tensor)
        return frozenset(live)

    def _still(self, cascade: Cascade) -> set[str]:
        """References that no output depends on, by name as the text has them."""
        out: set[str] = set()
        simple = simplify(self.original).cascade
        made = producers(simple)
        for v in dict.fromkeys(v for s in simple.einsums if s.reduce in ("max", "min") for v in s.ranks):
            try:
                found = references(simple, variable=v)
            except LoweringError:
                continue
            for s in cascade.einsums:
                # A positive factor may have left the maximum: it is that of the text, times a constant.
                e = made.get(s.tensor)
                while s.reduce is not None and e is not None and e.reduce is None and len(reads(e.expr)) == 1:
                    e = made.get(reads(e.expr)[0].tensor)
                if e is None or e.tensor not in found or s.tensor in out | set(cascade.output_names):
                    continue
                out.add(s.tensor)
                self.steps.append(
                    Step(
                        rule="reference",
                        kind="algebraic",
                        what=f"no gradient goes through {s.tensor}: no output depends on it",
                        proof=("out(d', C(d, d') S) = out(d, S) for every output",),
                    )
                )
        return out

    def _indices(self, tensor: str) -> tuple[Var, ...]:
        """The variables that walk the axes of a tensor."""
        given = self.base.input(tensor)
        if given is not None:
            return tuple(Var(name=v) for v in given.indices)
        found = self.defs[tensor].indices
        assert all(isinstance(i, Var) for i in found)
        return tuple(i for i in found if isinstance(i, Var))

    # --- one Einsum ---------------------------------------------------------------------------------------------

    def _transpose(self, s: Einsum) -> None:
        """Hand what an Einsum receives on to what it reads."""
        received = self._whole(s.tensor)
        if s.reduce in ("max", "min"):
            received = self._shared(s, received)
        elif s.reduce == "prod":
            received = self._others(s, received)
        handed: dict[Read, list[Expr]] = {}
        value = Read(tensor=s.tensor, indices=s.indices) if s.reduce is None else None
        for r, e in adjoints(s.expr, received, value=value):
            if r.tensor in self.live and r.tensor not in self.still:
                handed.setdefault(r, []).append(e)
        for r, parts in handed.items():
            self._land(r, s, self._tidy(total(tuple(t for e in parts for t in terms(e)))))

    def _whole(self, tensor: str) -> Expr:
        """All that a tensor receives, under a name where it is used more than once."""
        value = self._tidy(total(tuple(t for e in self.received[tensor] for t in terms(e))))
        s = self.defs[tensor]
        several = sum(r.tensor in self.live - self.still for r, _ in adjoints(s.expr, Num(value=1))) > 1
        if isinstance(value, Read) or not (several or s.reduce in ("max", "min", "prod")):
            return value
        name = fresh(f"D{tensor}", self.taken)
        self.body.append(Einsum(tensor=name, indices=s.indices, expr=value))
        return Read(tensor=name, indices=s.indices)

    def _all(self, value: Expr, space: tuple[str, ...]) -> Expr:
        """The expression with every variable of a space in it, for a rule needs to see them."""
        for v in space:
            if v not in variables(value):
                value = apply("add", value, apply("mul", Num(value=0), Var(name=v)))
        return value

    def _tidy(self, value: Expr) -> Expr:
        def sure(e: Expr) -> Expr | None:
            match e:
                case Apply(op="select", args=(Apply(op="eq", args=(x, Num(value=0))), _, other)):
                    return transform(other, sure) if is_positive(x, self.base, live=True) else None
            return None

        return self.weights.fold(transform(value, sure))

    def _shared(self, s: Einsum, received: Expr) -> Expr:
        """What an element under a maximum receives: an equal share if it attains it."""
        most = Read(tensor=s.tensor, indices=s.indices)
        # What a gradient computes again may be rounded otherwise: what is that near attains it.
        here = apply("le", apply("abs", apply("sub", s.expr, most)), apply("mul", Num(value=NEAR), apply("abs", most)))
        count = Einsum(
            tensor=fresh(f"N{s.tensor}", self.taken),
            indices=s.indices,
            expr=self._all(apply("select", here, Num(value=1), Num(value=0)), s.space),
            reduce="sum",
            ranks=s.ranks,
            where=s.where,
        )
        self.body.append(count)
        share = apply("div", received, Read(tensor=count.tensor, indices=s.indices))
        return apply("select", here, share, Num(value=0))

    def _others(self, s: Einsum, received: Expr) -> Expr:
        """What an element of a product receives: the product of the others, right also where one of them is 0."""
        zero = apply("eq", s.expr, Num(value=0))

        def over(name: str, expr: Expr, reduce: str) -> Read:
            e = replace(s, tensor=fresh(f"{name}{s.tensor}", self.taken), expr=self._all(expr, s.space), reduce=reduce)
            self.body.append(e)
            return Read(tensor=e.tensor, indices=s.indices)

        zeros = over("N", apply("select", zero, Num(value=1), Num(value=0)), "sum")
        rest = over("P", apply("select", zero, Num(value=1), s.expr), "prod")
        alone = apply("eq", zeros, Num(value=1))
        others = apply("select", zero, apply("select", alone, rest, Num(value=0)), Num(value=0))
        none = apply("div", rest, apply("select", zero, Num(value=1), s.expr))
        return apply("mul", received, apply("select", apply("eq", zeros, Num(value=0)), none, others))

    def _land(self, read: Read, s: Einsum, value: Expr) -> None:
        """Add what a read receives to what its tensor does."""
        axes = self._indices(read.tensor)
        found = landing(read, axes, s, self.base, self.taken)
        self.ranks += found.ranks
        value = substitute(value, found.solved)
        where = found.where
        rest = tuple(v for v in found.space if v not in {a.name for a in found.indices})
        into = self.received.setdefault(read.tensor, [])
        if not rest and found.indices == axes and set(found.space) == {a.name for a in axes}:
            for c in (*where, *within(s, read, self._indices)):
                value = apply("select", c, value, Num(value=0))
            into.append(value)
            return
        number = "" if self.uses[read.tensor] == 1 else str(1 + len(into))
        name = fresh(f"D{read.tensor}{number}", self.taken)
        if rest:
            part = Einsum(tensor=name, indices=found.indices, expr=self._all(value, rest), where=where)
            part = replace(part, reduce="sum", ranks=rest)
        else:
            # Nothing where there is no point, and not no value.
            for c in (*where, *(substitute(c, found.solved) for c in within(s, read, self._indices))):
                value = apply("select", c, value, Num(value=0))
            part = Einsum(tensor=name, indices=found.indices, expr=value)
        self.body.append(part)
        term: Expr = Read(tensor=name, indices=axes)
        sizes = {(d.name, d.expr) for d in (*self.base.ranks, *found.ranks)}
        for own, axis in zip(found.indices, axes, strict=True):
            here, there = Scalar(name=rank_of(own.name)), Scalar(name=rank_of(axis.name))
            if own != axis and not {(own.name, there), (axis.name, here)} & sizes:
                # The reader walks another rank, which may be shorter.
                term = apply("select", apply("lt", axis, here), term, Num(value=0))
        into.append(term)

    def _gradient(self, name: str) -> str:
        """The output of the backward cascade for an input."""
        axes = self._indices(name)
        value = self._tidy(
            total(tuple(t for e in self.received.get(name, []) for t in terms(e)) or ((Num(value=0), 1),))
        )
        made = next((e for e in self.body if value == Read(tensor=e.tensor, indices=axes)), None)
        if made is not None and made.indices == axes:
            return made.tensor
        out = Einsum(tensor=fresh(f"D{name}", self.taken), indices=axes, expr=value)
        self.body.append(out)
        return out.tensor

    # --- the two cascades ---------------------------------------------------------------------------------------

    def _split(self, given: dict[str, str], inputs: list[Input], gradients: dict[str, str]) -> Gradient:
        outputs = tuple(Output(tensor=t) for t in dict.fromkeys((*self.original.output_names, *gradients.values())))
        forward = placed(self.base.einsums, self.weights)
        joint = replace(
            self.base,
            inputs=self.base.inputs + tuple(inputs),
            ranks=self.base.ranks + tuple(self.ranks),
            body=(*forward, *self.body),
            outputs=outputs,
        )
        met = reassociate(joint)
        self.steps += met.steps
        joint = met.cascade
        wanted = tuple(gradients.values())
        saved = least_saved(
            joint, self.base, tuple(e.tensor for e in forward), wanted, self.original.output_names, self.extents
        )
        backward = self._backward(joint, inputs, saved, wanted)
        return Gradient(
            original=self.original,
            forward=self._forward(joint, saved),
            backward=backward,
            saved=saved,
            received=given,
            gradients=gradients,
            steps=tuple(self.steps),
        )

    def _forward(self, joint: Cascade, saved: tuple[str, ...]) -> Cascade:
        """The original with what else is saved, and what that needs."""
        own = {e.tensor for e in self.original.einsums} | {i.tensor for i in self.original.inputs}
        made = producers(joint)
        needed: dict[str, None] = {}
        pending = [t for t in saved if t not in own]
        for t in pending:
            if t not in needed:
                needed[t] = None
                pending += [r.tensor for r in reads(made[t].expr, *made[t].where) if r.tensor not in own]
        extra = tuple(e for e in joint.einsums if e.tensor in needed)
        unseen = tuple(t for t in saved if t not in self.original.output_names)
        out = tuple(Output(tensor=t, dtype="float32", is_saved=True) for t in unseen)
        return replace(
            self.original,
            body=(*self.original.body, *extra),
            outputs=self.original.outputs + out,
            source=None,
            name=f"{self.original.name}_forward",
        )

    def _backward(self, joint: Cascade, given: list[Input], saved: tuple[str, ...], wanted: tuple[str, ...]) -> Cascade:
        made = producers(joint)
        # An input of fewer than two axes, a slope or a sink, may be float32 beside halves: so is its gradient.
        small = {t for t in wanted if len(made[t].indices) < 2}
        body = tuple(e for e in joint.einsums if e.tensor not in saved)
        kept = tuple(Input(tensor=t, indices=made[t].free, is_saved=True) for t in saved)
        cascade = drop_dead(
            replace(
                joint,
                inputs=(*self.base.inputs, *kept, *given),
                body=body,
                outputs=tuple(
                    Output(tensor=t, dtype="float32" if t in small else None, is_saved=t in small)
                    for t in dict.fromkeys(wanted)
                ),
                source=None,
                name=f"{self.original.name}_backward",
            )
        )
        needed = {r.tensor for e in cascade.einsums for r in reads(e.expr, *e.where)}
        needed |= {r.tensor for c in cascade.constraints for r in reads(c)} | set(cascade.output_names)
        inputs = tuple(i for i in cascade.inputs if i.tensor in needed)
        cascade = _used(cascade)
        told = {rank_of(v) for i in inputs for v in i.indices} | {rank_of(d.name) for d in cascade.ranks}
        # An input that nothing reads may still be the only one that tells an extent.
        space = {rank_of(v) for e in cascade.einsums for v in e.space} | _extents(cascade)
        for i in cascade.inputs:
            if i not in inputs and any(rank_of(v) in space - told for v in i.indices):
                inputs, told = (*inputs, i), told | {rank_of(v) for v in i.indices}
        order = {i.tensor: n for n, i in enumerate(cascade.inputs)}
        return replace(cascade, inputs=tuple(sorted(inputs, key=lambda i: order[i.tensor])))


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
