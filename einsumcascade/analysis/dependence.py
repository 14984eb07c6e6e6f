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
    direct = dependencies(cascade)
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
        outers: variables that walk its tiles.
        middles: variables between the two, in a partition of three or more parts.
        inners: variables that walk inside a tile.
    """

    whole: str
    outers: tuple[str, ...] = ()
    middles: tuple[str, ...] = ()
    inners: tuple[str, ...] = ()

    def has_outer(self, names: tuple[str, ...]) -> bool:
        """Tell whether one of `names` moves along the rank: the rank's own variable or a tile's."""
        return self.whole in names or any(v in names for v in self.outers)

    def has_all(self, names: tuple[str, ...]) -> bool:
        """Tell whether `names` walk every coordinate of the rank."""
        return self.whole in names or (self.has_outer(names) and any(v in names for v in self.inners))

    @property
    def parts(self) -> tuple[str, ...]:
        """Variables of the parts, outer ones first."""
        return self.outers + self.middles + self.inners


def partitions(cascade: Cascade) -> dict[str, Partition]:
    """Find the partition of every rank, keyed by its variable; a rank that is not split has no parts.

    Guaranteed: an affine read is a partition only if each factor is the extent of the parts inside it, so that the
    parts cover the rank without overlap (`m1*M0 + m0`, `(m2*M1 + m1)*M0 + m0`); a sliding window is none.
    Cost: O(accesses).   Source: FuseMax (MICRO 2024), section IV-B, equations 31-33.
    """
    shape = axes(cascade)
    sizes = _sizes(cascade)
    outers: dict[str, dict[str, None]] = {}
    middles: dict[str, dict[str, None]] = {}
    inners: dict[str, dict[str, None]] = {}
    for s in walk(cascade.body):
        if not isinstance(s, Einsum | Init):
            continue
        for r in reads_of(cascade, s):
            for whole, index in zip(shape[r.tensor], r.indices, strict=True):
                split = _split(index, sizes) if whole is not None else None
                if whole is not None and split is not None and whole not in split:
                    outers.setdefault(whole, {})[split[-1]] = None
                    middles.setdefault(whole, {}).update(dict.fromkeys(reversed(split[1:-1])))
                    inners.setdefault(whole, {})[split[0]] = None
    return {
        v: Partition(
            whole=v,
            outers=tuple(outers.get(v, ())),
            middles=tuple(middles.get(v, ())),
            inners=tuple(inners.get(v, ())),
        )
        for v in rank_variables(cascade)
    }


def whole_ranks(cascade: Cascade) -> tuple[str, ...]:
    """Return the variables of the ranks that are no part of another, in order of first appearance."""
    parts = {v for p in partitions(cascade).values() for v in p.parts}
    return tuple(v for v in rank_variables(cascade) if v not in parts)


def _sizes(cascade: Cascade) -> dict[str, str]:
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


def _split(index: Expr, sizes: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the parts of a partitioned index, innermost first, or None."""
    terms = linear(index)
    if terms is None:
        return None
    moving = sorted((t for t in terms if t.variable), key=lambda t: (len(_factors(t, sizes)), t.number))
    if len(moving) < 2 or any(t.number < 1 for t in moving):
        return None
    inside: list[str] = []
    for t in moving:
        if sorted(_factors(t, sizes)) != sorted(inside):
            return None
        inside.append(sizes[rank_of(t.variable or "")])
    return tuple(t.variable for t in moving if t.variable)


def _factors(term: Term, sizes: Mapping[str, str]) -> list[str]:
    names = [sizes.get(f, f) for f in term.factors]
    return names + ([str(term.number)] if term.number != 1 else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a read meets a rank.

    Args:
        streaming: the coordinate read moves with the traversal, so the tensor need not be complete.
        sweeps: one element of the result reads the whole fiber, through a reduced variable that is not the rank's.
        direction: 1 where only an ascending traversal serves it (a prefix), else 0.
    """

    streaming: bool = True
    sweeps: bool = False
    direction: int = 0


def access(
    cascade: Cascade, statement: Einsum | Init, read: Read, *, part: Partition, shape: tuple[str | None, ...]
) -> Access:
    """Classify a read against a rank: it moves with the traversal, or it needs the tensor complete.

    A variable of the rank, plus or minus anything of other ranks, an affine partition and a prefix `j <= m` move
    with it. A fixed coordinate other than the first, a gather, a reversed index and another variable do not.

    Args:
        cascade: where the statement stands.
        statement: the statement that reads.
        read: one of its reads.
        part: the rank and its parts.
        shape: rank variable of each axis of the tensor read.

    Cost: linear in the read.   Source: FuseMax (MICRO 2024), section III-A.
    """
    streaming, sweeps, direction = True, False, 0
    reduced = statement.ranks if isinstance(statement, Einsum) else ()
    for axis, index in zip(shape, read.indices, strict=True):
        if axis is None or not part.has_outer((axis,)):
            continue
        terms = linear(index)
        if terms is not None and any(_moves(t, axis, part) for t in terms):
            continue
        if axis != part.whole and isinstance(index, Apply) and index.op == "floordiv" and carries(index, part.whole):
            continue
        if terms == () or _is_prefix(cascade, statement, index, part):
            direction = 1
            continue
        streaming = False
        sweeps = sweeps or any(v in reduced and v not in (part.whole, *part.parts) for v in variables(index))
    return Access(streaming=streaming, sweeps=sweeps, direction=direction)


def _moves(term: Term, axis: str, part: Partition) -> bool:
    if term.variable is None or term.number < 1:
        return False
    if term.variable == axis:
        return term.number == 1 and not term.factors
    return axis == part.whole and term.variable in part.outers


def _is_prefix(cascade: Cascade, statement: Einsum | Init, index: Expr, part: Partition) -> bool:
    if not isinstance(index, Var):
        return False
    for c in conditions(cascade, statement):
        match c:
            case Apply(op="le" | "lt", args=(Var(name=low), Var(name=high))):
                pass
            case Apply(op="ge" | "gt", args=(Var(name=high), Var(name=low))):
                pass
            case _:
                continue
        if low == index.name and part.has_outer((high,)):
            return True
    return False


def known_rank(cascade: Cascade, rank: str) -> str | None:
    """Return the variable of the rank called `rank` (upper case), or None if the cascade has none."""
    if not rank:
        return None
    v = variable_of(rank)
    return v if rank_of(v) == rank and v in rank_variables(cascade) else None
