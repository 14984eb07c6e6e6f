"""Dependence in a cascade: who writes and reads what, how an index walks an axis, and which ranks are one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from einsumcascade.language.check import extents_known
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Num,
    Read,
    Scalar,
    Var,
    rank_of,
    reads,
    variable_of,
    variables,
    walk,
)


def producers(cascade: Cascade) -> dict[str, Einsum]:
    """Map each computed tensor to the Einsum that writes it, in the order of the cascade; inputs are absent.

    Cost: O(Einsums).   Source: FuseMax (MICRO 2024), section III-A.
    """
    return {e.tensor: e for e in cascade.einsums}


def conditions(cascade: Cascade, statement: Einsum | Init) -> tuple[Expr, ...]:
    """Return the conditions that cull points of a statement: its own, and each constraint over ranks it iterates."""
    if isinstance(statement, Init):
        return ()
    space = set(statement.space)
    shared = tuple(c for c in cascade.constraints if set(variables(c)) <= space)
    return statement.where + shared


def reads_of(cascade: Cascade, statement: Einsum | Init) -> tuple[Read, ...]:
    """Return the distinct reads of a statement: of its expression, its conditions and inside index expressions."""
    return reads(statement.expr, *conditions(cascade, statement))


def dependencies(cascade: Cascade) -> dict[str, tuple[str, ...]]:
    """Map each computed tensor to the tensors its statements read, in order of appearance.

    Guaranteed: an iterative tensor that reads its earlier generation lists itself.
    Cost: O(Einsums + accesses).   Source: FuseMax (MICRO 2024), section III-A.
    """
    out: dict[str, tuple[str, ...]] = {}
    for s in walk(cascade.body):
        if isinstance(s, Einsum | Init):
            new = (r.tensor for r in reads_of(cascade, s))
            out[s.tensor] = tuple(dict.fromkeys((*out.get(s.tensor, ()), *new)))
    return out


def ancestors(cascade: Cascade, tensor: str) -> tuple[str, ...]:
    """Return every tensor that `tensor` depends on, nearest first; `tensor` itself only if it recurs.

    Cost: O(Einsums + accesses).   Source: FuseMax (MICRO 2024), section III-A.
    """
    return reached(dependencies(cascade), tensor)


def reached(direct: Mapping[str, tuple[str, ...]], tensor: str) -> tuple[str, ...]:
    """Return every tensor that `tensor` depends on, nearest first, given what each reads itself."""
    seen: dict[str, None] = {}
    queue = list(direct.get(tensor, ()))
    for name in queue:
        if name not in seen:
            seen[name] = None
            queue += direct.get(name, ())
    return tuple(seen)


def carries(expr: Expr, variable: str) -> bool:
    """Tell whether the value of `expr` changes with a rank variable, through an index or as a number."""
    return variable in variables(expr)


def rank_variables(cascade: Cascade) -> tuple[str, ...]:
    """Return the variables of all ranks in order of first appearance: inputs, then `rank` statements."""
    return extents_known(cascade)


def axes(cascade: Cascade) -> dict[str, tuple[str | None, ...]]:
    """Map each tensor to the rank variable of each of its axes, None where only constants stand.

    Guaranteed: an axis written at `m1 + 1` belongs to `m1`; an Einsum decides where an `init` also writes.
    Cost: O(accesses).
    """
    out: dict[str, tuple[str | None, ...]] = {i.tensor: i.indices for i in cascade.inputs}
    for s in walk(cascade.body):
        if isinstance(s, Einsum) or (isinstance(s, Init) and s.tensor not in out):
            out[s.tensor] = tuple(next(iter(variables(i)), None) for i in s.indices)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """`number * factors * variable`, one term of an index expression; `variable` None is a constant.

    Args:
        number: integer factor, never 0.
        variable: the rank variable, or None.
        factors: names of extents and constants that multiply it, sorted.
    """

    number: int
    variable: str | None = None
    factors: tuple[str, ...] = ()


def linear(expr: Expr) -> tuple[Term, ...] | None:
    """Expand an index expression into terms linear in the rank variables; None where it is not affine.

    Guaranteed: like terms are merged, and terms that cancel are gone.
    Cost: linear in the expression.
    >>> from einsumcascade.language.ir import Num, Scalar, Var, apply
    >>> [t.variable for t in linear(apply("add", apply("mul", Var(name="m1"), Scalar(name="M0")), Var(name="m0")))]
    ['m1', 'm0']
    """
    found = _terms(expr)
    if found is None:
        return None
    merged: dict[tuple[str | None, tuple[str, ...]], int] = {}
    for t in found:
        key = (t.variable, t.factors)
        merged[key] = merged.get(key, 0) + t.number
    return tuple(Term(number=n, variable=v, factors=f) for (v, f), n in merged.items() if n)


def _terms(expr: Expr) -> list[Term] | None:
    match expr:
        case Num(value=int(n)):
            return [Term(number=n)] if n else []
        case Var(name=name):
            return [Term(number=1, variable=name)]
        case Scalar(name=name):
            return [Term(number=1, factors=(name,))]
        case Apply(op="neg", args=(x,)):
            inner = _terms(x)
            return None if inner is None else _scaled(inner, Term(number=-1))
        case Apply(op="add" | "sub" as op, args=(x, y)):
            left, right = _terms(x), _terms(y)
            if left is None or right is None:
                return None
            return left + (right if op == "add" else _scaled(right, Term(number=-1)))
        case Apply(op="mul", args=(x, y)):
            left, right = _terms(x), _terms(y)
            if left is None or right is None:
                return None
            if any(t.variable for t in left) and any(t.variable for t in right):
                return None
            return [product for t in right for product in _scaled(left, t)]
        case _:
            return None


def _scaled(terms: list[Term], by: Term) -> list[Term]:
    return [
        Term(
            number=t.number * by.number,
            variable=t.variable or by.variable,
            factors=tuple(sorted(t.factors + by.factors)),
        )
        for t in terms
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """The parts that a cascade splits a rank into, as its reads show: `K[e, m1*M0 + m0]` splits M.

    Args:
        whole: variable of the rank that is split.
        ways: for each way it is split, the variables of the parts, outer ones first.
        strides: for each way, the sizes whose product is a tile of its outermost part, sorted.
    """

    whole: str
    ways: tuple[tuple[str, ...], ...] = ()
    strides: tuple[tuple[str, ...], ...] = ()

    def moves_by(self, names: tuple[str, ...]) -> str | None:
        """The one of `names` that moves along the rank: its own variable, or that of a way's outermost part."""
        return next((v for v in (self.whole, *(w[0] for w in self.ways)) if v in names), None)

    def has_all(self, names: tuple[str, ...]) -> bool:
        """Tell whether `names` walk every coordinate of the rank."""
        return self.whole in names or any(set(w) <= set(names) for w in self.ways)

    def stride(self, variable: str) -> tuple[str, ...] | None:
        """The sizes whose product is a tile of `variable`; None if that is no outermost part."""
        return next((s for w, s in zip(self.ways, self.strides, strict=True) if w[0] == variable), None)

    @property
    def parts(self) -> tuple[str, ...]:
        """Variables of the parts, outer ones first."""
        deep = max((len(w) for w in self.ways), default=0)
        return tuple(dict.fromkeys(w[k] for k in range(deep) for w in self.ways if k < len(w)))


def partitions(cascade: Cascade) -> dict[str, Partition]:
    """Find the partition of every rank, keyed by its variable; a rank that is not split has no parts.

    Guaranteed: an affine read is a partition only if each factor is the extent of the parts inside it, so that the
    parts cover the rank without overlap (`m1*M0 + m0`, `(m2*M1 + m1)*M0 + m0`); a sliding window is none.
    Cost: O(accesses).   Source: FuseMax (MICRO 2024), section IV-B, equations 31-33.
    """
    shape = axes(cascade)
    sizes = canonical_sizes(cascade)
    ways: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {}
    for s in walk(cascade.body):
        if not isinstance(s, Einsum | Init):
            continue
        for r in reads_of(cascade, s):
            for whole, index in zip(shape[r.tensor], r.indices, strict=True):
                split = split_index(index, sizes) if whole is not None else None
                if whole is not None and split is not None and whole not in split:
                    stride = tuple(sorted(sizes[rank_of(v)] for v in split[1:]))
                    ways.setdefault(whole, {})[split] = stride
    return {
        v: Partition(whole=v, ways=tuple(ways.get(v, {})), strides=tuple(ways.get(v, {}).values()))
        for v in rank_variables(cascade)
    }


def whole_ranks(cascade: Cascade) -> tuple[str, ...]:
    """Return the variables of the ranks that are no part of another, in order of first appearance."""
    parts = {v for p in partitions(cascade).values() for v in p.parts}
    return tuple(v for v in rank_variables(cascade) if v not in parts)


def canonical_sizes(cascade: Cascade) -> dict[str, str]:
    """Map each extent or constant to one name for its size: `rank j0 = C0` and `rank c0 = 6` make both '6'."""
    given: dict[str, Expr] = {c.name: c.expr for c in cascade.constants}
    given |= {rank_of(r.name): r.expr for r in cascade.ranks}
    out: dict[str, str] = {}
    for name in (*given, *(rank_of(v) for v in rank_variables(cascade))):
        expr: Expr = Scalar(name=name)
        for _ in given:
            if not (isinstance(expr, Scalar) and expr.name in given):
                break
            following = given[expr.name]
            if not isinstance(following, Scalar | Num):
                break
            expr = following
        out[name] = str(expr)
    return out


def split_index(index: Expr, sizes: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the variables of a partitioned index, outermost first, or None; `sizes` are `canonical_sizes`."""
    terms = linear(index)
    if terms is None:
        return None
    moving = sorted((t for t in terms if t.variable), key=lambda t: (len(factors(t, sizes)), t.number))
    if len(moving) < 2 or any(t.number < 1 for t in moving):
        return None
    inside: list[str] = []
    for t in moving:
        if factors(t, sizes) != tuple(sorted(inside)):
            return None
        inside.append(sizes[rank_of(t.variable or "")])
    return tuple(t.variable for t in reversed(moving) if t.variable)


def factors(term: Term, sizes: Mapping[str, str]) -> tuple[str, ...]:
    """Name what multiplies the variable of a term, sorted."""
    names = [sizes.get(f, f) for f in term.factors]
    return tuple(sorted(names + ([str(term.number)] if term.number != 1 else [])))


def known_rank(cascade: Cascade, rank: str) -> str | None:
    """Return the variable of the rank called `rank` (upper case), or None if the cascade has none."""
    if not rank:
        return None
    v = variable_of(rank)
    return v if rank_of(v) == rank and v in rank_variables(cascade) else None
