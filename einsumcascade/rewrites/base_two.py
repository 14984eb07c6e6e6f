"""Exponentials to base 2, and running maxima in the unit of their exponents.

    SN[p,m1,m0] = exp(scale * S[p,m1,m0] - scale * R[p,m1+1])
 -> SN[p,m1,m0] = exp2(S[p,m1,m0] * (scale * log2e) - R[p,m1+1])      R[p,m1+1] = max(R[p,m1], (scale*log2e) * L[p,m1])

    W[p,m]     = sigmoid(scale * S[p,m])
 -> W[p,m]     = 1 / (1 + exp2(-S[p,m] * (scale * log2e)))

A GPU has exp2, not exp; with the factor folded into the score's own scale an exponent costs one fused multiply-add,
and a maximum kept in that unit is subtracted as it is. Precondition of the change of unit: the state is a maximum, its
factor is positive, and every exponent in its loop reads it with the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from einsumcascade.language.ir import (
    Apply,
    Cascade,
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
    reads,
    subexpressions,
    transform,
    variables,
    walk,
)
from einsumcascade.rewrites.algebra import Factor, factors, fresh, is_positive, names_taken, product, terms, total

LOG2E = math.log2(math.e)


def to_base_two(cascade: Cascade) -> Cascade:
    """Rewrite every exponential to base 2, and keep running maxima in the unit of the exponents that read them.

    Args:
        cascade: in loop form, or any other.

    Returns: a cascade of equal value up to rounding; the reference runs it.
    Cost: linear in the Einsums.
    """
    cascade = cascade.with_body(_named(cascade.body, cascade.output_names, names_taken(cascade)))
    states = tuple(s.tensor for s in walk(cascade.body) if isinstance(s, Init))
    cascade = cascade.with_body(_inlined(cascade.body, (*cascade.output_names, *states)))
    positive = frozenset(c.name for c in cascade.constants if is_positive(Scalar(name=c.name), cascade))
    cascade = cascade.with_body(_each(cascade.body, lambda e: _gathered(e, positive)))
    cascade = cascade.with_body(tuple(_statement(s) for s in cascade.body))
    inits = {s.tensor: s for s in cascade.body if isinstance(s, Init)}
    for block in [s for s in cascade.body if isinstance(s, Iter)]:
        for e in block.body:
            if isinstance(e, Einsum) and e.tensor in inits:
                unit = _unit(e, cascade)
                if unit is not None:
                    cascade = _in_unit(cascade, block.var, e.tensor, unit)
    return cascade


# --- exponentials ---------------------------------------------------------------------------------------------------


def _statement(s: Statement) -> Statement:
    match s:
        case Iter():
            return replace(s, body=tuple(_statement(x) for x in s.body))
        case _:
            return replace(s, expr=_expr(s.expr))


def _expr(expr: Expr) -> Expr:
    if not isinstance(expr, Apply):
        return expr
    args = tuple(_expr(a) for a in expr.args)
    if expr.op not in ("exp", "sigmoid"):
        return replace(expr, args=args)
    scaled = []
    for term, sign in terms(args[0]):
        numbers, rest = _split(term)
        factor = _times_log2e(numbers)
        scaled.append((apply("mul", product(rest), factor) if rest else factor, sign))
    if expr.op == "exp":
        return apply("exp2", total(tuple(scaled)))
    below = apply("add", Num(value=1), apply("exp2", total(tuple((t, -sign) for t, sign in scaled))))
    return apply("div", Num(value=1), below)


def _split(term: Expr) -> tuple[tuple[Factor, ...], tuple[Factor, ...]]:
    """The constant factors of a term, and the others."""
    parts = factors(term)
    return tuple(f for f in parts if _is_number(f[0])), tuple(f for f in parts if not _is_number(f[0]))


def _times_log2e(numbers: tuple[Factor, ...]) -> Expr:
    return apply("mul", product(numbers), Num(value=LOG2E)) if numbers else Num(value=LOG2E)


def _is_number(e: Expr) -> bool:
    return not reads(e) and not variables(e)


# --- constants ------------------------------------------------------------------------------------------------------


def _each(body: tuple[Statement, ...], leaf: Callable[[Expr], Expr]) -> tuple[Statement, ...]:
    """A body with every value rewritten; conditions and indices stay as they are."""
    out: list[Statement] = []
    for s in body:
        out.append(replace(s, body=_each(s.body, leaf)) if isinstance(s, Iter) else replace(s, expr=leaf(s.expr)))
    return tuple(out)


def _gathered(expr: Expr, positive: frozenset[str]) -> Expr:
    """`a * X / b` as `X * (a / b)` for constants, of which those below are positive: one product for each element.

    Not under what jumps, as floor does: there the last digit of a quotient may decide.
    """
    if not isinstance(expr, Apply) or not all(expr.row.gradient) or not expr.row.gradient or expr.row.symbol == "%":
        return expr
    if expr.op in ("mul", "div"):
        parts = factors(expr)
        numbers = [(f, n) for f, n in parts if isinstance(f, Num) or (isinstance(f, Scalar) and not f.is_extent)]
        rest = tuple((_gathered(f, positive), n) for f, n in parts if (f, n) not in numbers)
        below = [f for f, n in numbers if n < 0]
        known = all(f.value > 0 if isinstance(f, Num) else f.name in positive for f in below)
        if len(numbers) + len(below) > 1 and known and any(n > 0 and not _is_number(f) for f, n in rest):
            return apply("mul", product(rest), product(tuple(numbers)))
    return replace(expr, args=tuple(_gathered(a, positive) for a in expr.args))


def _named(body: tuple[Statement, ...], outputs: tuple[str, ...], taken: set[str]) -> tuple[Statement, ...]:
    """Give a function of an element a name of its own where a map only multiplies it by constants.

        S = cap * tanh(X)   ->   SN = tanh(X),  S = cap * SN

    What else has the same function reads that name too, so that S stands where it is read, its factor in the scale of
    an exponent or outside a maximum.
    """
    found = tuple(replace(s, body=_named(s.body, outputs, taken)) if isinstance(s, Iter) else s for s in body)
    for s in found:
        if not isinstance(s, Einsum) or s.reduce is not None or s.where or s.tensor in outputs:
            continue
        numbers, rest = _split(s.expr)
        inner = rest[0][0] if len(rest) == 1 and rest[0][1] == 1 else None
        if (
            not numbers
            or not isinstance(inner, Apply)
            or inner.row.symbol
            or inner.row.condition
            or inner.op == "select"
        ):
            continue
        if not all(isinstance(i, Var) for i in s.indices) or set(variables(*s.indices)) != set(variables(inner)):
            continue
        new = replace(s, tensor=fresh(s.tensor + "N", taken), expr=inner)
        taken.add(new.tensor)
        value = Read(tensor=new.tensor, indices=s.indices)
        first = next(n for n, x in enumerate(found) if any(inner in subexpressions(e) for e in _exprs(x)))
        put = _each(found[first:], lambda e, inner=inner, value=value: transform(e, {inner: value}.get))  # type: ignore[misc]
        return _named((*found[:first], new, *put), outputs, taken)
    return found


# --- scaled values stand where they are read ------------------------------------------------------------------------


def _inlined(
    body: tuple[Statement, ...], kept: tuple[str, ...], around: dict[str, Einsum] | None = None
) -> tuple[Statement, ...]:
    """Put `c * T[..]` in place of a map that is only that, unless it is kept: an output, or a state."""
    scaled: dict[str, Einsum] = dict(around or {})
    out: list[Statement] = []
    for s in body:
        if isinstance(s, Iter):
            out.append(replace(s, body=_inlined(s.body, kept, scaled)))
            continue
        if isinstance(s, Init):
            s = replace(s, expr=_put(s.expr, scaled))
        if isinstance(s, Einsum):
            s = replace(s, expr=_put(s.expr, scaled), where=tuple(_put(c, scaled) for c in s.where))
            numbers, rest = _split(s.expr)
            if (
                s.reduce is None
                and not s.where
                and numbers
                and len(rest) == 1
                and rest[0][1] == 1
                and isinstance(rest[0][0], Read)
                and all(isinstance(i, Var) for i in s.indices)
                and set(variables(*s.indices)) == set(variables(s.expr))
                and s.tensor not in kept
                and any(s.tensor in {r.tensor for r in reads(*_exprs(x))} for x in body)
            ):
                scaled[s.tensor] = s
                continue
        out.append(s)
    return tuple(out)


def _exprs(s: Statement) -> tuple[Expr, ...]:
    match s:
        case Einsum():
            return (s.expr, *s.where)
        case Init():
            return (s.expr,)
        case Iter():
            return tuple(e for x in s.body for e in _exprs(x))


def _put(expr: Expr, scaled: dict[str, Einsum]) -> Expr:
    def leaf(e: Expr) -> Expr | None:
        if isinstance(e, Read) and e.tensor in scaled:
            own = scaled[e.tensor]
            at = {i.name: x for i, x in zip(own.indices, e.indices, strict=True) if isinstance(i, Var)}
            return transform(own.expr, lambda y: at.get(y.name) if isinstance(y, Var) else None)
        return None

    return transform(expr, leaf)


# --- the unit of a running maximum ----------------------------------------------------------------------------------


def _unit(update: Einsum, cascade: Cascade) -> Expr | None:
    """The positive factor with which every exponent reads a running maximum, if it is one."""
    if not (
        isinstance(update.expr, Apply)
        and update.expr.op == "max"
        and all(isinstance(a, Read) for a in update.expr.args)
        and isinstance(update.expr.args[0], Read)
        and update.expr.args[0].tensor == update.tensor
    ):
        return None
    if any(e.tensor in cascade.output_names and _is_scaled(e.expr, update.tensor) for e in cascade.einsums):
        # Another kernel reads it in exponents of its own: there and here it must be one number, to the last digit.
        return None
    units: list[Expr] = []
    # Where another loop subtracts the maximum itself from something, a rounded unit would cost digits.
    blocks = [b for b in cascade.body if isinstance(b, Iter)]
    for s in walk(tuple(blocks)):
        if s == update or not isinstance(s, Einsum):
            continue
        everywhere = sum(r.tensor == update.tensor for x in _exprs(s) for r in _all_reads(x))
        inside = [u for x in _exprs(s) for u in _exponent_units(x, update.tensor)]
        if everywhere != len(inside):
            return None
        units += inside
    unit = min(units, key=lambda u: len(factors(u)), default=None)
    if unit is None or any(_multiple(u, unit) is None for u in units) or not is_positive(unit, cascade):
        return None
    return unit


def _is_scaled(expr: Expr, tensor: str) -> bool:
    """Whether an expression is a tensor times a number."""
    rest = _split(expr)[1]
    return len(rest) == 1 and isinstance(rest[0][0], Read) and rest[0][0].tensor == tensor


def _multiple(factor: Expr, unit: Expr) -> Expr | None:
    """The literal number of units that a factor is, if it is one: the square of a weight reads the maximum twice."""
    left = list(factors(factor))
    for f in factors(unit):
        if f not in left:
            return None
        left.remove(f)
    if any(not isinstance(f, Num) or n != 1 for f, n in left):
        return None
    return product(tuple(left)) if left else Num(value=1)


def _mapped(s: Iter, leaf: Callable[[Expr], Expr | None]) -> Iter:
    """A block with every expression rewritten, nested ones too."""
    body: list[Statement] = []
    for x in s.body:
        match x:
            case Iter():
                body.append(_mapped(x, leaf))
            case Init():
                body.append(replace(x, expr=transform(x.expr, leaf)))
            case Einsum():
                body.append(replace(x, expr=transform(x.expr, leaf), where=tuple(transform(c, leaf) for c in x.where)))
    return replace(s, body=tuple(body))


def _all_reads(expr: Expr) -> list[Read]:
    return [e for e in subexpressions(expr) if isinstance(e, Read)]


def _exponent_units(expr: Expr, tensor: str) -> list[Expr]:
    """The factor of each term `factor * T[..]` of each exponent."""
    out = []
    for e in subexpressions(expr):
        if isinstance(e, Apply) and e.op == "exp2":
            for term, _ in terms(e.args[0]):
                if (
                    isinstance(term, Apply)
                    and term.op == "mul"
                    and isinstance(term.args[0], Read)
                    and (term.args[0].tensor == tensor)
                ):
                    out.append(term.args[1])
    return out


def _in_unit(cascade: Cascade, index: str, tensor: str, unit: Expr) -> Cascade:
    """Keep `unit * T` under the name of T."""
    last = Scalar(name=rank_of(index))

    def inside(e: Expr) -> Expr | None:
        if isinstance(e, Apply) and e.op == "mul" and isinstance(e.args[0], Read) and e.args[0].tensor == tensor:
            times = _multiple(e.args[1], unit)
            if times is not None:
                return e.args[0] if times == Num(value=1) else apply("mul", e.args[0], times)
        return None

    def after(e: Expr) -> Expr | None:
        if isinstance(e, Apply) and e.op in ("mul", "div"):
            parts = factors(e)
            if any(isinstance(f, Read) and f.tensor == tensor and last in f.indices and n == 1 for f, n in parts):
                kept = [
                    (transform(f, after) if not (isinstance(f, Read) and f.tensor == tensor) else f, n)
                    for f, n in parts
                ]
                for f, n in factors(unit):
                    if (f, n) in kept:
                        kept.remove((f, n))
                    else:
                        kept.append((f, -n))
                return product(tuple(kept))
        if isinstance(e, Read) and e.tensor == tensor and last in e.indices:
            return product(((e, 1), *((f, -n) for f, n in factors(unit))))
        return None

    body: list[Statement] = []
    for s in cascade.body:
        match s:
            case Iter() if s.var == index and any(isinstance(x, Einsum) and x.tensor == tensor for x in s.body):
                inner: list[Statement] = []
                for x in s.body:
                    assert isinstance(x, Einsum)
                    if x.tensor == tensor and isinstance(x.expr, Apply):
                        old, new = x.expr.args
                        inner.append(replace(x, expr=apply("max", old, apply("mul", new, unit))))
                    else:
                        inner.append(replace(x, expr=transform(x.expr, inside)))
                body.append(replace(s, body=tuple(inner)))
            case Einsum():
                where = tuple(transform(c, after) for c in s.where)
                body.append(replace(s, expr=transform(s.expr, after), where=where))
            case Iter():
                body.append(_mapped(s, after))
            case Init() if s.tensor == tensor and s.expr != Num(value=-math.inf):
                body.append(replace(s, expr=apply("mul", transform(s.expr, after), unit)))
            case Init():
                body.append(replace(s, expr=transform(s.expr, after)))
    return cascade.with_body(tuple(body))
