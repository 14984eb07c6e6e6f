"""A bound in place of a running maximum, where the score is bounded and the reference cancels.

    S = cap * tanh(QK / cap); GM = S :: max(m); SN = exp(S - GM)   ->   GM = cap; SN = exp(S - cap)

Preconditions: (1) every output is invariant under C, `out(d', C(d, d') S) = out(d, S)`, so that any reference gives the
same value; (2) the score lies in an interval known from the operator table, or from the norms of the vectors whose
product it is, and (3) the interval is short enough that no weight underflows in float32. The maximum is then no state
and nothing is corrected. Source: the gradient through a maximum vanishes for the same reason; Cauchy and Schwarz.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from einsumcascade.errors import InputError
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    reads,
    scalars,
    substitute,
    transform,
    variables,
)
from einsumcascade.rewrites.algebra import (
    drop_dead,
    equal,
    factors,
    inline,
    inline_reads,
    is_map,
    is_positive,
    producers,
    product,
)
from einsumcascade.rewrites.invariance import invariant
from einsumcascade.rewrites.loop_form import Iterations
from einsumcascade.rewrites.proofs import PRIME
from einsumcascade.rewrites.step import Rewritten, Step

# exp(-80) is 1.8e-35, well above the least normal float32 number, also when a value scales it.
WIDEST = 80.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where the values of an expression lie; the ends are made of numbers, constants and extents."""

    low: Expr
    high: Expr


def bound_references(cascade: Cascade, *, variable: str, extents: Mapping[str, int] | None = None) -> Rewritten:
    """Replace each maximum over a rank that only serves as a reference by a bound of what it is the maximum of.

    Args:
        cascade: means expanded, nothing deferred yet. variable: of the rank.
        extents: numbers by rank, for bounds that extents are part of.

    Returns: the cascade, and one step for each maximum, which says why it stays where it does.
    """
    steps: list[Step] = []
    for s in cascade.body:
        if not (isinstance(s, Einsum) and s.reduce == "max" and variable in s.ranks):
            continue
        found = _bounded(cascade, s, variable, extents or {})
        if isinstance(found, str):
            steps.append(Step(rule="bound", what=f"{s.tensor} stays a running maximum: {found}", before=(str(s),)))
            continue
        new = replace(s, expr=found, reduce=None, ranks=(), where=())
        steps.append(
            Step(
                rule="bound",
                kind="algebraic",
                what=f"{s.tensor} is only a reference: its bound serves as well",
                before=(str(s),),
                after=(str(new),),
                proof=("out(d', C(d, d') S) = out(d, S) for every output",),
            )
        )
        cascade = drop_dead(cascade.with_body(tuple(new if x is s else x for x in cascade.body)))
    return Rewritten(cascade=cascade, steps=tuple(steps))


def _bounded(cascade: Cascade, s: Einsum, variable: str, extents: Mapping[str, int]) -> Expr | str:
    found = interval(s.expr, cascade)
    if found is None:
        return f"nothing bounds {s.expr}"
    form = Iterations(cascade, (variable,), 1)
    form.prepare()
    if not invariant(form, s.tensor):
        return "an output depends on it beyond the weights it scales"
    for state in form.states.values():
        for c in (c for row in state.how.matrix for c in row):
            exponent = _exponent(c, s.tensor, found, form)
            if given := reads(exponent):
                return f"what {given[0]} makes of its interval has no bound"
            width = _number(exponent, cascade, extents)
            if width is None:
                return f"the length of its interval, {apply('sub', found.high, found.low)}, needs extents"
            if abs(width) > WIDEST:
                return f"weights could be as small as exp(-{abs(width):g}), which underflows"
    return found.high


def _exponent(c: Expr, reference: str, found: Interval, form: Iterations) -> Expr:
    """The exponent of an entry of C that moves a state from one end of the interval of the reference to the other."""

    def at(e: Expr) -> Expr | None:
        if not isinstance(e, Read):
            return None
        name = e.tensor.removesuffix(PRIME)
        end = found.low if e.tensor.endswith(PRIME) else found.high
        if name == reference:
            return end
        d = form.defs.get(name)
        if d is not None and is_map(d) and reference in {r.tensor for r in reads(d.expr)}:
            inner = inline(replace(e, tensor=name), d)
            return transform(inner, lambda x: end if isinstance(x, Read) and x.tensor == reference else None)
        return None

    return transform(c.args[0], at) if isinstance(c, Apply) and c.op == "exp" else Num(value=0)


def interval(expr: Expr, cascade: Cascade) -> Interval | None:
    """The interval of an expression for all inputs, None where it has no ends."""
    defs = producers(cascade)
    match expr:
        case Num():
            return Interval(low=expr, high=expr)
        case Scalar():
            return Interval(low=expr, high=expr)
        case Read() if (d := defs.get(expr.tensor)) is not None and is_map(d):
            return interval(inline(expr, d), cascade)
        case Read() if expr.tensor in defs and defs[expr.tensor].reduce == "sum":
            return _product_of_vectors(defs[expr.tensor], cascade)
        case Apply(op="mul" | "div", args=(x, y)):
            for scale, other, k in ((x, y, 0), (y, x, 1)):
                inner = interval(other, cascade)
                fine = not reads(scale) and not variables(scale) and is_positive(scale, cascade)
                if inner is None or not fine or (expr.op == "div" and k == 0):
                    continue
                sign = 1 if expr.op == "mul" else -1
                ends = [product(((end, 1), (scale, sign))) for end in (inner.low, inner.high)]
                return Interval(low=ends[0], high=ends[1])
            return None
        case Apply(op="add" | "sub", args=(x, y)):
            a, b = interval(x, cascade), interval(y, cascade)
            if a is None or b is None:
                return None
            low, high = (b.low, b.high) if expr.op == "add" else (b.high, b.low)
            return Interval(low=apply(expr.op, a.low, low), high=apply(expr.op, a.high, high))
        case Apply(op="neg", args=(x,)):
            a = interval(x, cascade)
            return None if a is None else Interval(low=apply("neg", a.high), high=apply("neg", a.low))
        case Apply() if expr.row.low is not None and expr.row.high is not None:
            return Interval(low=Num(value=expr.row.low), high=Num(value=expr.row.high))
        case _:
            return None


def _product_of_vectors(e: Einsum, cascade: Cascade) -> Interval | None:
    """The interval of a scalar product of two normalised vectors: its size is at most the product of their norms."""
    if len(e.ranks) != 1:
        return None
    (over,) = e.ranks
    vectors = [f for f, n in factors(e.expr) if over in variables(f) and n > 0]
    rest = [(f, n) for f, n in factors(e.expr) if over not in variables(f)]
    if len(vectors) != 2 or len(vectors) + len(rest) != len(factors(e.expr)):
        return None
    if any(reads(f) or variables(f) or not is_positive(f, cascade) for f, _ in rest):
        return None
    squares = [norm_squared(v, over, cascade) for v in vectors]
    if squares[0] is None or squares[1] is None:
        return None
    both = apply("sqrt", apply("mul", squares[0], squares[1]))
    most = product(((squares[0] if squares[0] == squares[1] else both, 1), *rest))
    return Interval(low=apply("neg", most), high=most)


def norm_squared(vector: Expr, over: str, cascade: Cascade) -> Expr | None:
    """A bound of the sum of squares of a vector divided by its own norm: 1, or the extent where the norm is a mean."""
    defs = producers(cascade)
    if isinstance(vector, Read) and is_map(defs.get(vector.tensor)):
        vector = inline_reads(vector, defs, lambda r, _: over in variables(r))
    above = [f for f, n in factors(vector) if n > 0]
    below = [f for f, n in factors(vector) if n < 0]
    if len(above) != 1 or len(below) != 1 or not isinstance(below[0], Apply) or below[0].op != "sqrt":
        return None
    inside = below[0].args[0]
    if isinstance(inside, Apply) and inside.op == "add" and is_positive(inside.args[1], cascade, strict=False):
        inside = inside.args[0]
    inside = inline_reads(inside, defs, lambda r, _: is_map(defs.get(r.tensor)))
    number: Expr = Num(value=1)
    if isinstance(inside, Apply) and inside.op == "div" and not variables(inside.args[1]):
        inside, number = inside.args
    if not isinstance(inside, Read):
        return None
    total = defs.get(inside.tensor)
    if total is None or total.reduce != "sum" or total.ranks != (over,):
        return None
    if total.where or any(over in variables(c) for c in cascade.constraints):
        return None
    names = {i.name: to for i, to in zip(total.indices, inside.indices, strict=True) if isinstance(i, Var)}
    return number if equal(substitute(total.expr, names), apply("mul", above[0], above[0])) else None


def _number(e: Expr, cascade: Cascade, extents: Mapping[str, int]) -> float | None:
    needed = set(scalars(e))
    known: dict[str, float] = {}
    for c in cascade.constants:
        try:
            known[c.name] = Binding(extents=extents, constants=known).value(c.expr)
        except (InputError, KeyError):
            continue
    if any(n not in known and n not in extents for n in needed):
        return None
    return float(Binding(extents=extents, constants=known).value(e))
