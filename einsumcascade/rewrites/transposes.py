"""What one Einsum of a cascade hands on to what it reads, and where that lands.

The state of a reverse (`reverse`): what each tensor has received so far, and the Einsums that say it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    substitute,
    transform,
    variables,
)
from einsumcascade.rewrites.adjoint import adjoints
from einsumcascade.rewrites.algebra import factors, fresh, is_positive, producers, terms, total
from einsumcascade.rewrites.blocks import Block, Steps
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.invariance import references
from einsumcascade.rewrites.scatter import landing, within
from einsumcascade.rewrites.step import Step
from einsumcascade.rewrites.weights import in_exponents, named, placed

# Of a maximum: some rounding errors of float32, and of its products.
NEAR = 2.0**-18
ZERO = Num(value=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """An iteration of a gradient: its first values and its steps."""

    inits: tuple[Init, ...]
    block: Iter

    @property
    def einsums(self) -> tuple[Einsum, ...]:
        """Its steps."""
        return tuple(s for s in self.block.body if isinstance(s, Einsum))

    @property
    def makes(self) -> dict[str, Einsum]:
        """What it computes, by name."""
        return {e.tensor: e for e in self.einsums}

    @property
    def needs(self) -> tuple[str, ...]:
        """The tensors around it that it reads."""
        exprs = [x for e in self.einsums for x in (e.expr, *e.where)] + [i.expr for i in self.inits]
        made = self.makes
        return tuple(dict.fromkeys(r.tensor for r in reads(*exprs) if r.tensor not in made))

    def only(self, needed: set[str]) -> Loop:
        """The iteration without what nothing needs."""
        made, left = self.makes, [t for t in self.makes if t in needed]
        for t in left:
            found = (r.tensor for r in reads(made[t].expr, *made[t].where))
            left += [x for x in dict.fromkeys(found) if x in made and x not in left]
        body = tuple(e for e in self.einsums if e.tensor in left)
        return Loop(inits=tuple(i for i in self.inits if i.tensor in left), block=replace(self.block, body=body))


@dataclass
class Transposes:
    """A cascade on its way back.

    Args:
        cascade: what is differentiated, without means and with no constraint over ranks that nothing reduces.
        wanted: inputs whose gradient is. taken: every name in use.
        blocks: the iterations that were taken out.

    `base` is the cascade as its gradient wants it; `body` and `loops` grow on the way.
    """

    cascade: Cascade
    wanted: tuple[str, ...]
    taken: set[str]
    blocks: tuple[Block, ...] = ()
    received: dict[str, list[Expr]] = field(default_factory=dict)
    body: list[Einsum] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    ranks: list[Definition] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        live = self._live(self.cascade)
        self.still = self._still(self.cascade)
        simple = named(self.cascade, live, self.still, self.taken)
        self.taken |= {e.tensor for e in simple.einsums}
        self.base, self.weights = in_exponents(simple, self.taken)
        self.live = self._live(self.base)
        self.defs = producers(self.base)
        handed = [r for s in self.base.einsums for r in dict.fromkeys(r for r, _ in adjoints(s.expr, Num(value=1)))]
        handed += [r for b in self.blocks if isinstance(b, Steps) for r in b.reads]
        self.uses = {t: sum(r.tensor == t for r in handed) for t in self.live}

    @property
    def forward(self) -> tuple[Einsum, ...]:
        """The cascade as its gradient wants it, with the weights that the gradient has found."""
        return placed(self.base.einsums, self.weights)

    def _live(self, cascade: Cascade) -> frozenset[str]:
        """Tensors that depend on an input that is wanted, other than through an index or a condition."""
        live = set(self.wanted)
        while True:
            before = len(live)
            for s in cascade.einsums:
                if not s.is_fiberwise and any(r.tensor in live for r, _ in adjoints(s.expr, Num(value=1))):
                    live.add(s.tensor)
            for b in self.blocks:
                if set(b.needs) & live:
                    live |= set(b.kept)
            if len(live) == before:
                return frozenset(live)

    def _still(self, cascade: Cascade) -> set[str]:
        """References that no output depends on, by name as the text has them."""
        out: set[str] = set()
        simple = simplify(self.cascade).cascade
        made = producers(simple)
        found = references(simple)
        for s in cascade.einsums:
            e = made.get(s.tensor)
            e = _behind(e, simple, found) if s.reduce is not None else e
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

    def indices(self, tensor: str) -> tuple[Var, ...]:
        """The variables that walk the axes of a tensor."""
        given = self.base.input(tensor)
        if given is not None:
            return tuple(Var(name=v) for v in given.indices)
        found = self.defs[tensor].indices
        assert all(isinstance(i, Var) for i in found)
        return tuple(i for i in found if isinstance(i, Var))

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
        # What a sum hands on is the same for each of its points.
        indices = tuple(i for i in s.indices if set(variables(i)) <= set(variables(value)))
        self.body.append(Einsum(tensor=name, indices=indices, expr=value))
        return Read(tensor=name, indices=indices)

    def _all(self, value: Expr, space: tuple[str, ...]) -> Expr:
        """The expression with every variable of a space in it, for a rule needs to see them."""
        for v in space:
            if v not in variables(value):
                value = apply("add", value, apply("mul", ZERO, Var(name=v)))
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
            expr=self._all(apply("select", here, Num(value=1), ZERO), s.space),
            reduce="sum",
            ranks=s.ranks,
            where=s.where,
        )
        self.body.append(count)
        share = apply("div", received, Read(tensor=count.tensor, indices=s.indices))
        return apply("select", here, share, ZERO)

    def _others(self, s: Einsum, received: Expr) -> Expr:
        """What an element of a product receives: the product of the others, right also where one of them is 0."""
        zero = apply("eq", s.expr, ZERO)

        def over(name: str, expr: Expr, reduce: str) -> Read:
            e = replace(s, tensor=fresh(f"{name}{s.tensor}", self.taken), expr=self._all(expr, s.space), reduce=reduce)
            self.body.append(e)
            return Read(tensor=e.tensor, indices=s.indices)

        zeros = over("N", apply("select", zero, Num(value=1), ZERO), "sum")
        rest = over("P", apply("select", zero, Num(value=1), s.expr), "prod")
        alone = apply("eq", zeros, Num(value=1))
        others = apply("select", zero, apply("select", alone, rest, ZERO), ZERO)
        none = apply("div", rest, apply("select", zero, Num(value=1), s.expr))
        return apply("mul", received, apply("select", apply("eq", zeros, ZERO), none, others))

    def _land(self, read: Read, s: Einsum, value: Expr) -> None:
        """Add what a read receives to what its tensor does."""
        axes = self.indices(read.tensor)
        found = landing(read, axes, s, self.base, self.taken)
        self.ranks += found.ranks
        value = _settled(substitute(value, found.solved))
        where = tuple(map(_settled, found.where))
        rest = tuple(v for v in found.space if v not in {a.name for a in found.indices})
        into = self.received.setdefault(read.tensor, [])
        if not rest and found.indices == axes and set(found.space) == {a.name for a in axes}:
            for c in (*where, *within(s, read, self.indices)):
                value = apply("select", c, value, ZERO)
            into.append(value)
            return
        number = "" if self.uses[read.tensor] == 1 else str(1 + len(into))
        name = fresh(f"D{read.tensor}{number}", self.taken)
        if rest:
            part = Einsum(tensor=name, indices=found.indices, expr=self._all(value, rest), where=where)
            part = replace(part, reduce="sum", ranks=rest)
        else:
            # Nothing where there is no point, and not no value.
            for c in (*where, *(_settled(substitute(c, found.solved)) for c in within(s, read, self.indices))):
                value = apply("select", c, value, ZERO)
            part = Einsum(tensor=name, indices=found.indices, expr=value)
        self.body.append(part)
        term: Expr = Read(tensor=name, indices=axes)
        sizes = {(d.name, d.expr) for d in (*self.base.ranks, *found.ranks)}
        for own, axis in zip(found.indices, axes, strict=True):
            here, there = Scalar(name=rank_of(own.name)), Scalar(name=rank_of(axis.name))
            if own != axis and not {(own.name, there), (axis.name, here)} & sizes:
                # The reader walks another rank, which may be shorter.
                term = apply("select", apply("lt", axis, here), term, ZERO)
        into.append(term)

    def _gradient(self, name: str) -> str:
        """The output of the backward cascade for an input."""
        axes = self.indices(name)
        value = self._tidy(total(tuple(t for e in self.received.get(name, []) for t in terms(e)) or ((ZERO, 1),)))
        computed = (*self.body, *(e for loop in self.loops for e in loop.einsums))
        made = next((e for e in computed if value == Read(tensor=e.tensor, indices=axes)), None)
        if made is not None and made.indices == axes:
            return made.tensor
        out = Einsum(tensor=fresh(f"D{name}", self.taken), indices=axes, expr=value)
        self.body.append(out)
        return out.tensor


def _settled(expr: Expr) -> Expr:
    """The expression, each place that adds and subtracts whole numbers with one of them: p + 1 - 1 is p."""

    def leaf(e: Expr) -> Expr | None:
        match e:
            case Apply(op="add" | "sub" as op, args=(x, Num(value=int(n)))) if not reads(x):
                match transform(x, leaf):
                    case Apply(op="add" | "sub" as first, args=(inner, Num(value=int(m)))):
                        whole = (m if first == "add" else -m) + (n if op == "add" else -n)
                        if whole == 0:
                            return inner
                        return apply("add" if whole > 0 else "sub", inner, Num(value=abs(whole)))
        return None

    return transform(expr, leaf)


def _behind(e: Einsum | None, cascade: Cascade, found: tuple[str, ...]) -> Einsum | None:
    """The maximum that a value is but for what has left it: factors, or terms of the row.

    Whatever such a value is, the maximum can be chosen to make it so; if no output depends on that, none does on this.
    """
    made = producers(cascade)
    while e is not None and e.reduce is None and e.tensor not in found:
        inner = reads(e.expr)
        if len(inner) > 1:
            inner = tuple(r for r in inner if r.tensor in found and _rises_with(e.expr, r, cascade))
            names = {r.tensor for r in inner}
            if sum(bool(names & {r.tensor for r in reads(x.expr, *x.where)}) for x in made.values()) > 1:
                # Shared with another value of the text, it does not move alone.
                return None
        if len(inner) != 1:
            return None
        e = made.get(inner[0].tensor)
    return e


def _rises_with(expr: Expr, read: Read, cascade: Cascade) -> bool:
    """Whether an expression is a positive factor times a read, plus terms without it: it takes every value then."""
    own = [t for t, n in terms(expr) if n == 1 and read in reads(t)]
    if len(own) != 1 or reads(expr).count(read) != 1:
        return False
    parts = factors(own[0])
    return (read, 1) in parts and all(is_positive(f, cascade) for f, _ in parts if f != read)
