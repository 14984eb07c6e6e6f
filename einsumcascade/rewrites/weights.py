"""Write a cascade as its gradient wants it: weights with their normaliser inside, inner values with names of their own.

    SN[p,m] = exp(S[p,m] - GM[p])                  L[p]    = GM[p] + log(SD[p])
    NV[p,f] = SN[p,m] * V[m,f] :: sum(m)     ->    A[p,m]  = exp(S[p,m] - L[p])
    AV[p,f] = NV[p,f] / SD[p]                      AV[p,f] = A[p,m] * V[m,f] :: sum(m)

This is R9, with R1 taken back where it stands in the way. One number a row then tells all that a gradient needs of a
softmax. Precondition: what divides is the sum of that very exponential, plus terms that are positive.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from einsumcascade.analysis.dependence import rank_variables
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Iter,
    Num,
    Read,
    Statement,
    Var,
    apply,
    reads,
    transform,
    variables,
    walk,
)
from einsumcascade.rewrites.adjoint import needs_value
from einsumcascade.rewrites.algebra import (
    Factor,
    drop_dead,
    factors,
    fresh,
    inline,
    is_map,
    is_positive,
    ordered,
    producers,
    product,
    terms,
    total,
)


def named(cascade: Cascade, live: frozenset[str], still: set[str], taken: set[str]) -> Cascade:
    """Give a name to every inner value that tells a derivative: `20 * tanh(QK / 20)` needs that of the tanh.

    So does what a maximum is taken of, which is compared with it: written twice it might be rounded twice.

    Args:
        cascade: Einsums only. live: tensors through which a gradient goes, but for those of `still`.
        taken: names; those of new tensors are added.
    """
    body: list[Einsum] = []
    known = {e.expr: e for e in cascade.einsums if is_map(e)}

    def take(e: Expr, s: Einsum, root: bool) -> Expr:
        if not isinstance(e, Apply):
            return e
        if e.op == "select":
            # A side has a value under its condition only.
            return e
        e = Apply(op=e.op, args=tuple(take(a, s, False) for a in e.args))
        compared = root and s.reduce in ("max", "min", "prod") and s.tensor in live - still
        if not (needs_value(e, live) or compared) or (root and s.reduce is None):
            return e
        if e not in known:
            order = tuple(Var(name=v) for v in s.space if v in set(variables(e)))
            known[e] = Einsum(tensor=fresh(f"{s.tensor}I", taken), indices=order, expr=e, where=_held(s, order))
            body.append(known[e])
        d = known[e]
        return Read(tensor=d.tensor, indices=d.indices)

    for s in cascade.einsums:
        body.append(replace(s, expr=take(s.expr, s, True)))
    return cascade.with_body(tuple(body))


def _held(s: Einsum, order: tuple[Var, ...]) -> tuple[Expr, ...]:
    own = {v.name for v in order}
    return tuple(c for c in s.where if set(variables(c)) <= own)


@dataclass
class Weights:
    """The weights of a cascade: exponentials together with what they are divided by.

    `fold` writes an expression with them and may add Einsums to `added`, in an order in which each reads what is there.
    """

    cascade: Cascade
    taken: set[str]
    added: list[Einsum] = field(default_factory=list)
    _known: dict[tuple[str, Expr], Read] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.defs = producers(self.cascade)

    def whole(self, s: Einsum) -> Einsum:
        """An Einsum with its expression folded; one that is a weight and nothing else gives it its own name."""
        parts = factors(s.expr)
        if s.reduce is None and len(parts) == 2 and parts[0][1] == 1 and parts[1][1] == -1:
            f, g = parts[0][0], parts[1][0]
            plain = isinstance(f, Read) and self._is_exponential(f) and f.indices == s.indices
            if plain and isinstance(f, Read) and (f.tensor, g) not in self._known and self.normalises(g, f):
                return self._made(f, g, s.tensor)
        folded = self.fold(s.expr) if s.reduce in (None, "sum") else s.expr
        known = {r.tensor for r in self._known.values()}
        # An expression without a weight stays as it is: a maximum compares what is rounded in one order.
        return replace(s, expr=folded) if known & {r.tensor for r in reads(folded)} else s

    def fold(self, expr: Expr) -> Expr:
        """Bring each normaliser into the exponential it divides, and common factors before a sum."""
        parts = terms(expr)
        if len(parts) == 1 and parts[0][0] is expr:
            return product(self._folded(factors(expr)))
        return common(tuple((product(self._folded(factors(t))), n) for t, n in parts))

    def _folded(self, parts: tuple[Factor, ...]) -> tuple[Factor, ...]:
        for k, (f, power) in enumerate(parts):
            if power != 1 or not isinstance(f, Read) or not self._is_exponential(f):
                continue
            for j, (g, below) in enumerate(parts):
                if below == -1 and self.normalises(g, f):
                    rest = tuple(p for n, p in enumerate(parts) if n not in (j, k))
                    return self._folded(((self.weight(f, g), 1), *rest))
        return parts

    def _is_exponential(self, f: Read) -> bool:
        d = self.defs.get(f.tensor)
        return d is not None and is_map(d) and isinstance(d.expr, Apply) and d.expr.op == "exp"

    def absorbs(self, g: Expr, f: Read) -> bool:
        """Whether a factor is an exponential that takes a divisor in."""
        return self._is_exponential(f) and self.normalises(g, f)

    def normalises(self, g: Expr, f: Read) -> bool:
        """Whether a value of the row is the sum of an exponential over its points, plus positive terms."""
        if isinstance(g, Read):
            d = self.defs.get(g.tensor)
            if d is None or g != Read(tensor=d.tensor, indices=d.indices):
                return False
            if d.reduce == "sum":
                return not d.where and d.expr == f
            return is_map(d) and self.normalises(d.expr, f)
        parts = terms(g)
        return (
            len(parts) > 1
            and any(n == 1 and self.normalises(t, f) for t, n in parts)
            and all(n == 1 and (self.normalises(t, f) or is_positive(t, self.cascade)) for t, n in parts)
        )

    def weight(self, f: Read, g: Expr) -> Read:
        """The exponential `f` with its normaliser `g` inside, as a tensor of its own."""
        if (f.tensor, g) not in self._known:
            self.added.append(self._made(f, g, fresh(f"W{f.tensor}", self.taken)))
        return self._known[f.tensor, g]

    def _made(self, f: Read, g: Expr, name: str) -> Einsum:
        """The weight as an Einsum; its logarithm of the normaliser is added."""
        exponent = inline(f, self.defs[f.tensor])
        assert isinstance(exponent, Apply)
        row = set(variables(g))
        parts = terms(exponent.args[0])
        fixed = tuple(t for t in parts if set(variables(t[0])) <= row)
        moving = tuple(t for t in parts if t not in fixed)
        value = total((*((t, -k) for t, k in fixed), (apply("log", g), 1)))
        lse = next((e for e in self.defs.values() if is_map(e) and e.expr == value), None)
        if lse is None:
            order = tuple(Var(name=v) for v in rank_variables(self.cascade) if v in set(variables(value)))
            lse = Einsum(tensor=fresh("LSE", self.taken), indices=order, expr=value)
            self.added.append(lse)
        shifted = apply("exp", total((*moving, (Read(tensor=lse.tensor, indices=lse.indices), -1))))
        w = Einsum(tensor=name, indices=f.indices, expr=shifted)
        self.defs |= {lse.tensor: lse, w.tensor: w}
        self._known[f.tensor, g] = Read(tensor=name, indices=f.indices)
        return w


def in_exponents(cascade: Cascade, taken: set[str]) -> tuple[Cascade, Weights]:
    """Write a cascade with its weights. Returns: it, of equal value, and the weights for expressions to come."""
    weights = Weights(cascade, taken)
    defs = weights.defs
    body: list[Einsum] = []

    def absorbed(s: Einsum) -> tuple[Einsum, ...] | None:
        """A sum that is divided afterwards, with the division inside."""
        parts = factors(s.expr)
        for j, (g, below) in enumerate(parts):
            for k, (x, power) in enumerate(parts):
                d = defs.get(x.tensor) if isinstance(x, Read) and power == 1 and below == -1 else None
                if d is None or d.reduce != "sum" or x != Read(tensor=d.tensor, indices=d.indices):
                    continue
                inside = [f for f, n in factors(d.expr) if n == 1 and isinstance(f, Read)]
                # Only an exponent takes the division in; elsewhere the sum stays, for the gradient reads its quotient.
                if not any(weights.absorbs(g, f) for f in inside) or not set(variables(g)) <= set(d.free):
                    continue
                summed = replace(d, expr=weights.fold(product((*factors(d.expr), (g, -1)))))
                rest = tuple(p for n, p in enumerate(parts) if n not in (j, k))
                if not rest and len(s.indices) == len(d.indices) and set(s.indices) == set(d.indices):
                    return (replace(summed, tensor=s.tensor, indices=s.indices, where=(*d.where, *s.where)),)
                summed = replace(summed, tensor=fresh(f"{d.tensor}A", taken))
                read = Read(tensor=summed.tensor, indices=summed.indices)
                return summed, replace(s, expr=product(((read, 1), *rest)))
        return None

    for s in cascade.einsums:
        new = absorbed(s) if s.reduce is None else None
        body += new or (weights.whole(s),)
    return drop_dead(cascade.with_body(ordered(placed(tuple(body), weights)))), weights


def placed(body: tuple[Einsum, ...], weights: Weights) -> tuple[Einsum, ...]:
    """A body with the Einsums that weights have added, each right after what it needs last."""
    out = list(body)
    for e in weights.added:
        names = [x.tensor for x in out]
        if e.tensor not in names:
            last = max((names.index(r.tensor) for r in reads(e.expr) if r.tensor in names), default=-1)
            out.insert(last + 1, e)
    return tuple(out)


def common(parts: tuple[tuple[Expr, int], ...]) -> Expr:
    """A sum with the tensors that are factors of every term before it."""
    alike: dict[Expr, int] = {}
    for t, n in parts:
        alike[t] = alike.get(t, 0) + n
    merged = ((t if abs(n) == 1 else apply("mul", Num(value=abs(n)), t), n) for t, n in alike.items() if n)
    parts = tuple((t, 1 if n > 0 else -1) for t, n in merged) or ((Num(value=0), 1),)
    split = [list(factors(t)) for t, _ in parts]
    shared = [f for f in split[0] if isinstance(f[0], Read) and all(f in other for other in split[1:])]
    if len(parts) < 2 or not shared:
        return total(parts)
    for own in split:
        for f in shared:
            own.remove(f)
    rest = total(tuple((product(tuple(own)), n) for own, (_, n) in zip(split, parts, strict=True)))
    return product((*((f, n) for f, n in shared), (rest, 1)))


__all__ = ["Weights", "in_exponents", "named", "placed"]


def divided(cascade: Cascade) -> Cascade:
    """Take R9 back where both exponentials are computed: `exp(S - L)` with `L = GM + log(SD)` is `SN / SD`.

    So it is where no normaliser is saved. The quotient costs no exponential, and weights sum to 1 up to the last digit,
    where a logarithm is rounded in the unit of the scores.
    """
    defs = producers(cascade)
    # What has conditions of its own has no value where they fail.
    known = {e.expr: e for e in cascade.einsums if is_map(e)}

    def leaf(e: Expr) -> Expr | None:
        match e:
            case Apply(op="exp", args=(Apply(op="sub", args=(score, Read() as whole)),)):
                d = defs.get(whole.tensor)
                if d is None or not is_map(d):
                    return None
                match inline(whole, d):
                    case Apply(op="add", args=(reference, Apply(op="log", args=(total,)))):
                        made = known.get(apply("exp", apply("sub", score, reference)))
                        if made is not None:
                            return apply("div", Read(tensor=made.tensor, indices=made.indices), total)
        return None

    def one(s: Statement) -> Statement:
        if isinstance(s, Iter):
            return replace(s, body=tuple(map(one, s.body)))
        return replace(s, expr=transform(s.expr, leaf))

    new = cascade.with_body(tuple(map(one, cascade.body)))
    left = {r.tensor for s in walk(new.body) if not isinstance(s, Iter) for r in reads(s.expr, *_where(s))}
    gone = {t for t, d in defs.items() if is_map(d) and t not in left | set(cascade.output_names)}

    def kept(s: Statement) -> Statement:
        if not isinstance(s, Iter):
            return s
        return replace(s, body=tuple(x for x in s.body if isinstance(x, Iter) or x.tensor not in gone))

    return drop_dead(new.with_body(tuple(map(kept, new.body))))


def _where(s: Statement) -> tuple[Expr, ...]:
    return s.where if isinstance(s, Einsum) else ()
