"""The streaming condition for one-dimensional corrections: one pass with a running state, proven.

A reduction `s(d) = (+)_m F(x_m, d)` whose d is known only once the same rank has been read streams when
`F(x, d') = C(d, d') F(x, d)`, or `F(x, d') = F(x, d) + C(d, d')` under a maximum, with C free of x: then
`s(d') = C s(d)`, so a state kept for the reference seen so far can be moved to the next one.
Source: THEORY of cascaded reductions (RedFuser, Neptune); FuseMax section IV for softmax.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var, reads
from einsumcascade.rewrites.algebra import from_sympy, to_sympy


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How a state moves from the reference d to d'.

    Args:
        form: "none" (no dependence), "scale" (s' = C s) or "shift" (s' = s + C, under max and min).
        c: C over the reads of d (old) and their twins (new), None for form "none".
        kind: "algebraic" where the residual is zero as an identity, else "numerical".
        is_exponential: C is one exponential that grows with the old reference, so it is 0 where that is -inf.
        proof: lines to check by hand.
    """

    form: str
    c: Expr | None = None
    kind: str = "algebraic"
    is_exponential: bool = False
    proof: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why a reduction does not stream."""

    reason: str


PRIME = "__next"


def correction(
    summand: Expr,
    references: Iterable[Read],
    *,
    reduce: str,
    positive: tuple[Expr, ...] = (),
    fixed: frozenset[Expr] = frozenset(),
) -> Correction | Rejection:
    """Find C for a summand and prove it, or say why there is none.

    Args:
        summand: F, over leaves (reads) that vary along the rank, and the references.
        references: the reads of d; their next values appear in C as reads of `NAME__next`.
        reduce: name of the reduction.
        positive: references, and leaves of `fixed`, known to be > 0.
        fixed: other leaves that do not vary along the rank; constants and extents never do.

    Returns: the correction with its proof, or a rejection with its reason.
    Cost: SymPy, some 10-100 ms; cached by the arguments.
    """
    used = tuple(r for r in references if r in reads(summand))
    if not used:
        return Correction(form="none")
    return _correction(summand, used, reduce, positive, fixed)


@lru_cache(maxsize=512)
def _correction(
    summand: Expr, used: tuple[Read, ...], reduce: str, positive: tuple[Expr, ...], fixed: frozenset[Expr]
) -> Correction | Rejection:
    import sympy as sp

    symbols: dict[Expr, Any] = {}
    opaque: list[Apply] = []

    def symbol(e: Expr) -> Any:
        if isinstance(e, Apply) and any(r in used for r in reads(e)):
            opaque.append(e)
        if e not in symbols:
            name = str(e) if not isinstance(e, Read) else e.tensor
            taken = {str(s) for s in symbols.values()}
            unique, n = name, 2
            while unique in taken:
                unique, n = f"{name}_{n}", n + 1
            is_positive = (isinstance(e, Scalar) and e.is_extent) or e in positive
            symbols[e] = sp.Symbol(unique, real=True, positive=True if is_positive else None)
        return symbols[e]

    f = to_sympy(summand, symbol)
    if opaque:
        return Rejection(
            reason=f"{opaque[0]} depends on {', '.join(dict.fromkeys(r.tensor for r in used))} through "
            f"'{opaque[0].op}', which algebra cannot see into"
        )
    old = [symbols[r] for r in used if r in symbols]
    new = [sp.Symbol(f"{s}'", real=True, positive=s.is_positive) for s in old]
    moved = f.subs(dict(zip(old, new, strict=True)), simultaneous=True)
    still = {s for e, s in symbols.items() if isinstance(e, Scalar) or e in fixed}
    streamed = set(f.free_symbols) - set(old) - still
    back: dict[Any, Expr] = {s: e for e, s in symbols.items()}
    back |= {
        n: Read(tensor=r.tensor + PRIME, indices=r.indices)
        for r, n in zip((r for r in used if r in symbols), new, strict=True)
    }
    if reduce in ("max", "min"):
        shift = sp.simplify(sp.expand(moved - f))
        if not shift.free_symbols & streamed:
            return _proven("shift", shift, f, moved, old, new, back, lambda c: f + c)
    ratio = _ratio(f, moved)
    free = ratio.free_symbols & streamed
    if free:
        which = ", ".join(sorted(str(s) for s in free))
        return Rejection(
            reason=f"F(x, d') / F(x, d) still depends on {which}: no factor moves the state from "
            f"{_names(old)} to its next value, so the sum must wait for the final one"
        )
    if reduce in ("max", "min") and not (ratio.is_positive or isinstance(ratio, sp.exp)):
        return Rejection(reason=f"the factor {ratio} is not known to be positive, so it may turn a {reduce} around")
    if reduce == "prod":
        return Rejection(reason="a factor of each element does not leave a product as one factor")
    return _proven("scale", ratio, f, moved, old, new, back, lambda c: c * f)


def _names(symbols: list[Any]) -> str:
    return ", ".join(map(str, symbols))


def _ratio(f: Any, moved: Any) -> Any:
    """F(x, d') / F(x, d), exponentials combined into one so that nothing overflows."""
    import sympy as sp

    ratio = sp.powsimp(sp.powdenest(moved / f), combine="exp")
    ratio = _merge_exponents(sp.cancel(sp.expand_log(ratio)) if not ratio.has(sp.exp) else ratio)
    if ratio.free_symbols <= (moved / f).free_symbols and _is_simple(ratio):
        return ratio
    return _merge_exponents(sp.powsimp(sp.simplify(ratio), combine="exp"))


def _is_simple(ratio: Any) -> bool:
    return bool(ratio.count_ops() <= 6)


def _merge_exponents(value: Any) -> Any:
    """Join exponentials of a product and expand their exponent: exp(a - b') exp(-(a - b)) -> exp(b - b')."""
    import sympy as sp

    exponent, rest = sp.Integer(0), sp.Integer(1)
    for part in sp.Mul.make_args(value):
        base, power = part.as_base_exp()
        if isinstance(part, sp.exp):
            exponent += part.args[0]
        elif isinstance(base, sp.exp):
            exponent += base.args[0] * power
        elif base == sp.E:
            exponent += power
        else:
            rest *= part
    exponent = sp.expand(exponent)
    if exponent == 0:
        return sp.cancel(rest) if rest.is_rational_function() else rest
    return sp.exp(exponent) * rest


def _proven(
    form: str, c: Any, f: Any, moved: Any, old: list[Any], new: list[Any], back: dict[Any, Expr], predicted: Any
) -> Correction | Rejection:
    import sympy as sp

    residual = moved - predicted(c)
    kind = "algebraic"
    if _expanded(residual) != 0 and sp.simplify(residual) != 0:
        if not _vanishes(residual):
            return Rejection(reason=f"the residual {sp.sstr(residual)} does not vanish")
        kind = "numerical"
    identity = c.subs(dict(zip(new, old, strict=True)), simultaneous=True)
    unit = 0 if form == "shift" else 1
    if sp.simplify(identity - unit) != 0:
        return Rejection(reason=f"C(d, d) is {identity}, not {unit}")
    third = [sp.Symbol(f"{s}'", real=True, positive=s.is_positive) for s in new]
    step = c.subs(dict(zip(old + new, new + third, strict=True)), simultaneous=True)
    whole = c.subs(dict(zip(new, third, strict=True)), simultaneous=True)
    joined = step + c if form == "shift" else step * c
    if _expanded(joined - whole) != 0 and sp.simplify(joined - whole) != 0:
        return Rejection(reason="C(d', d'') C(d, d') differs from C(d, d'')")
    expr = from_sympy(c, back)
    if expr is None:
        return Rejection(reason=f"C = {sp.sstr(c)} cannot be written in the language")
    expr = _difference_form(expr)
    sign, equal = ("+", "F(x, d) + C") if form == "shift" else ("*", "C F(x, d)")
    how = "is 0 identically" if kind == "algebraic" else "is 0 to 50 digits at 20 random points"
    proof = (
        f"F(x, d)       = {sp.sstr(f)}",
        f"F(x, d')      = {sp.sstr(moved)}",
        f"C(d, d')      = {sp.sstr(c)}",
        f"residual        F(x, d') - ({equal}) {how}",
        f"laws            C(d, d) = {unit};  C(d', d'') {sign} C(d, d') = C(d, d'')",
    )
    return Correction(form=form, c=expr, kind=kind, proof=proof, is_exponential=_sinks(c, old))


def _sinks(c: Any, old: list[Any]) -> bool:
    """Whether C is one exponential that grows with every old reference."""
    import sympy as sp

    return isinstance(c, sp.exp) and all(sp.diff(c.args[0], s).is_positive for s in old)


def _difference_form(expr: Expr) -> Expr:
    return expr


def _expanded(value: Any) -> Any:
    import sympy as sp

    return sp.expand(sp.powsimp(sp.expand(value), combine="exp"))


def _vanishes(residual: Any) -> bool:
    """Whether an expression is 0 to 50 digits at 20 random rational points."""
    import random

    import sympy as sp

    rng = random.Random(20)
    names = sorted(residual.free_symbols, key=str)
    for _ in range(20):
        point = {s: sp.Rational(rng.randint(1, 4000), 1000) for s in names}
        if abs(residual.subs(point).evalf(60)) > sp.Float(10) ** -48:
            return False
    return True


def leaves(expr: Expr) -> tuple[Expr, ...]:
    """The reads and rank variables of an expression that algebra treats as symbols."""
    out: dict[Expr, None] = {}

    def go(e: Expr) -> None:
        match e:
            case Apply():
                for a in e.args:
                    go(a)
            case Read() | Var() | Scalar():
                out[e] = None
            case Num():
                pass

    go(expr)
    return tuple(out)
