"""Algebra on expressions: products and sums taken apart, signs, inlining, and the way to SymPy and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    Statement,
    Var,
    apply,
    reads,
    substitute,
    transform,
    variables,
    walk,
)

Factor = tuple[Expr, int]


def factors(expr: Expr) -> tuple[Factor, ...]:
    """Take a product apart: `a * b / c` -> ((a, 1), (b, 1), (c, -1)); a sign becomes a factor -1."""
    match expr:
        case Apply(op="mul"):
            return factors(expr.args[0]) + factors(expr.args[1])
        case Apply(op="div"):
            return factors(expr.args[0]) + tuple((e, -n) for e, n in factors(expr.args[1]))
        case Apply(op="neg"):
            return ((Num(value=-1), 1), *factors(expr.args[0]))
        case _:
            return ((expr, 1),)


def product(parts: tuple[Factor, ...]) -> Expr:
    """Build the product of factors, literal numbers folded where that is exact."""
    above = [e for e, n in parts if n > 0]
    below = [e for e, n in parts if n < 0]
    number: int | float = 1
    for e in above:
        if isinstance(e, Num):
            number = number * e.value
    above = [e for e in above if not isinstance(e, Num)]
    if number == -1 and above:
        above[0] = apply("neg", above[0])
    elif number != 1 or not above:
        above = [Num(value=number), *above]
    top = above[0]
    for e in above[1:]:
        top = apply("mul", top, e)
    for e in below:
        top = apply("div", top, e)
    return top


def terms(expr: Expr) -> tuple[tuple[Expr, int], ...]:
    """Take a sum apart: `a + b - c` -> ((a, 1), (b, 1), (c, -1))."""
    match expr:
        case Apply(op="add"):
            return terms(expr.args[0]) + terms(expr.args[1])
        case Apply(op="sub"):
            return terms(expr.args[0]) + tuple((e, -n) for e, n in terms(expr.args[1]))
        case Apply(op="neg"):
            return tuple((e, -n) for e, n in terms(expr.args[0]))
        case _:
            return ((expr, 1),)


def total(parts: tuple[tuple[Expr, int], ...]) -> Expr:
    """Build the sum of signed terms."""
    ordered = sorted(parts, key=lambda t: -t[1])
    first, sign = ordered[0]
    out = first if sign > 0 else apply("neg", first)
    for e, n in ordered[1:]:
        out = apply("add" if n > 0 else "sub", out, e)
    return out


def producers(cascade: Cascade) -> dict[str, Einsum]:
    """The Einsum that writes each tensor, iterative blocks included; what a step makes of a state is no definition.

    Upwards it is written at `t + 1`, which is no variable; downwards at `t`, like a map.
    """
    states = {s.tensor for s in cascade.body if isinstance(s, Init)}
    return {e.tensor: e for e in cascade.einsums if not (e.tensor in states and is_map(e))}


def is_map(einsum: Einsum | None) -> bool:
    """Whether an Einsum only maps: no reduction, no condition of its own, plain variables on the left."""
    return (
        einsum is not None
        and einsum.reduce is None
        and not einsum.where
        and all(isinstance(i, Var) for i in einsum.indices)
    )


def inline(read: Read, einsum: Einsum) -> Expr:
    """The expression of a map at the indices of a read."""
    names = [i.name for i in einsum.indices if isinstance(i, Var)]
    return substitute(einsum.expr, dict(zip(names, read.indices, strict=True)))


def inline_reads(expr: Expr, defs: Mapping[str, Einsum], when: Callable[[Read, Einsum], bool]) -> Expr:
    """Inline every read of a map for which `when` holds, repeatedly."""

    def leaf(e: Expr) -> Expr | None:
        if isinstance(e, Read):
            d = defs.get(e.tensor)
            if d is not None and is_map(d) and when(e, d):
                return transform(inline(e, d), leaf)
        return None

    return transform(expr, leaf)


def fresh(name: str, taken: set[str]) -> str:
    """A name not taken yet, `name` itself if free; the name is added to `taken`."""
    candidate, n = name, 2
    while candidate in taken:
        candidate, n = f"{name}{n}", n + 1
    taken.add(candidate)
    return candidate


def names_taken(cascade: Cascade) -> set[str]:
    """Every name of a cascade that a new tensor must not take; extents too."""
    from einsumcascade.language.check import extents_known
    from einsumcascade.language.ir import rank_of

    vs = extents_known(cascade)
    return (
        {i.tensor for i in cascade.inputs}
        | {e.tensor for e in cascade.einsums}
        | {c.name for c in cascade.constants}
        | set(vs)
        | {rank_of(v) for v in vs}
    )


def drop_dead(cascade: Cascade) -> Cascade:
    """Remove Einsums that no output needs; blocks stay whole."""
    needed = set(cascade.output_names)
    kept: list[Statement] = []
    for s in reversed(cascade.body):
        inside = [x for x in walk((s,)) if not isinstance(x, Iter)]
        if any(x.tensor in needed for x in inside):
            kept.append(s)
            for x in inside:
                exprs = (x.expr, *x.indices) if isinstance(x, Init) else (x.expr, *x.indices, *x.where)
                needed |= {r.tensor for r in reads(*exprs)}
    return cascade.with_body(tuple(reversed(kept)))


def ordered(body: tuple[Statement, ...]) -> tuple[Einsum, ...]:
    """Statements in an order in which each reads what is there already, as near to theirs as can be."""
    made = {s.tensor for s in body if isinstance(s, Einsum)}
    left = [s for s in body if isinstance(s, Einsum)]
    out: list[Einsum] = []
    done: set[str] = set()
    while left:
        s = next(x for x in left if {r.tensor for r in reads(x.expr, *x.where)} & made <= done)
        left.remove(s)
        out.append(s)
        done.add(s.tensor)
    return tuple(out)


def is_positive(expr: Expr, cascade: Cascade, *, strict: bool = True, live: bool = False) -> bool:
    """Whether the value is > 0 (>= 0 unless `strict`) for all finite inputs, by the facts of the operator table.

    With `live`, every sum is known to have a point.
    """
    consts = {c.name: c for c in cascade.constants}
    defs = producers(cascade)

    def go(e: Expr, strict: bool, depth: int) -> bool:
        if depth > 40:
            return False
        match e:
            case Num():
                return e.value > 0 or (not strict and e.value == 0)
            case Scalar():
                return e.is_extent or (e.name in consts and go(_const(consts[e.name]), strict, depth + 1))
            case Var():
                return not strict
            case Read():
                d = defs.get(e.tensor)
                if d is None or len(d.indices) != len(e.indices):
                    return False
                if d.reduce in (None, "max", "min", "prod") and d.reduce is None:
                    return go(d.expr, strict, depth + 1)
                # An empty sum is 0, so a sum of positive terms is only known not to be negative.
                if live and d.reduce in ("sum", "mean"):
                    return go(d.expr, strict, depth + 1)
                return not strict and d.reduce in ("sum", "mean", "prod") and go(d.expr, False, depth + 1)
            case Apply(op="mul" | "div" | "ieee_div"):
                if e.op == "mul" and e.args[0] == e.args[1] and not strict:
                    return True
                return go(e.args[0], strict, depth + 1) and go(e.args[1], strict, depth + 1)
            case Apply(op="add"):
                a, b = e.args
                return (
                    go(a, False, depth + 1)
                    and go(b, False, depth + 1)
                    and (not strict or go(a, True, depth + 1) or go(b, True, depth + 1))
                )
            case Apply(op="pow"):
                return go(e.args[0], True, depth + 1) or (not strict and e.args[1] == Num(value=2))
            case Apply(op="sqrt"):
                return not strict or go(e.args[0], True, depth + 1)
            case Apply(op="max"):
                return any(go(a, strict, depth + 1) for a in e.args)
            case Apply(op="min"):
                return all(go(a, strict, depth + 1) for a in e.args)
            case Apply():
                low = e.row.low
                return e.row.positive or (low is not None and (low > 0 or (low == 0 and not strict)))

    return go(expr, strict, 0)


def _const(d: Definition) -> Expr:
    return d.expr


def to_sympy(expr: Expr, symbol: Callable[[Expr], Any]) -> Any:
    """Build a SymPy expression node by node; `symbol` gives the symbol of a leaf or of an opaque operator."""
    import sympy as sp

    match expr:
        case Num():
            return (
                sp.nsimplify(expr.value, rational=True)
                if abs(expr.value) != float("inf")
                else (sp.oo if expr.value > 0 else -sp.oo)
            )
        case Apply() if expr.row.sympy is not None:
            return expr.row.sympy(sp, *(to_sympy(a, symbol) for a in expr.args))
        case _:
            return symbol(expr)


def from_sympy(value: Any, leaf: Mapping[Any, Expr]) -> Expr | None:
    """Translate a SymPy expression back; None where it holds something the language cannot say."""
    import sympy as sp

    if value in leaf:
        return leaf[value]
    if value.is_Integer:
        return Num(value=int(value))
    if value.is_Number or value.is_NumberSymbol:
        return Num(value=float(value))
    parts = [from_sympy(a, leaf) for a in value.args]
    if not parts or any(p is None for p in parts):
        return None
    args: list[Expr] = [p for p in parts if p is not None]
    named = {sp.exp: "exp", sp.log: "log", sp.cos: "cos", sp.sin: "sin", sp.tanh: "tanh", sp.Abs: "abs"}
    if type(value) in named:
        return apply(named[type(value)], args[0])
    if isinstance(value, sp.Max | sp.Min):
        op = "max" if isinstance(value, sp.Max) else "min"
        out = args[0]
        for a in args[1:]:
            out = apply(op, out, a)
        return out
    if value.is_Add:
        signed = []
        for v, a in zip(value.args, args, strict=True):
            if v.could_extract_minus_sign():
                minus = from_sympy(-v, leaf)
                assert minus is not None
                signed.append((minus, -1))
            else:
                signed.append((a, 1))
        return total(tuple(signed))
    if value.is_Mul:
        out_factors: list[Factor] = []
        for v, a in zip(value.args, args, strict=True):
            if v.is_Pow and v.exp.is_number and v.exp < 0:
                below = from_sympy(v.base ** (-v.exp), leaf)
                assert below is not None
                out_factors.append((below, -1))
            else:
                out_factors.append((a, 1))
        return product(tuple(out_factors))
    if value.is_Pow:
        base, power = value.base, value.exp
        if power == sp.Rational(1, 2):
            return apply("sqrt", args[0])
        if power.is_number and power < 0:
            below = from_sympy(base ** (-power), leaf)
            return None if below is None else apply("div", Num(value=1), below)
        if power.is_Integer and 2 <= int(power) <= 4:
            out = args[0]
            for _ in range(int(power) - 1):
                out = apply("mul", out, args[0])
            return out
        return apply("pow", args[0], args[1])
    return None


def equal(x: Expr, y: Expr, *, leaves: bool = False) -> bool:
    """Whether two expressions are equal by algebra; what algebra cannot see into is compared as it is written.

    Args:
        leaves: go on where they do not read the same elements, which may cancel.
    """
    if x == y:
        return True
    if not leaves and set(reads(x)) != set(reads(y)):
        return False
    import sympy as sp

    symbols: dict[Expr, Any] = {}

    def symbol(e: Expr) -> Any:
        return symbols.setdefault(e, sp.Symbol(str(e), real=True))

    difference = to_sympy(x, symbol) - to_sympy(y, symbol)
    if sp.expand(sp.powsimp(sp.expand(difference), combine="exp")) == 0:
        return True
    if not leaves or _differs_at_a_point(difference):
        return False
    return bool(sp.simplify(sp.expand_log(difference, force=True)) == 0)


def _differs_at_a_point(difference: Any) -> bool:
    """Whether a difference is clearly not 0 where each symbol is some positive number: much cheaper than a proof."""
    points = {x: 1 + (7 * n + 3) % 11 / 13 for n, x in enumerate(sorted(difference.free_symbols, key=str))}
    value = difference.subs(points).evalf()
    return bool(value.is_number and value.is_finite and abs(value) > 1e-6)


def without_axis(indices: tuple[Expr, ...], axis: int) -> tuple[Expr, ...]:
    """Indices but for that of one axis."""
    return (*indices[:axis], *indices[axis + 1 :])


def carries(expr: Expr, var: str) -> bool:
    """Whether an expression depends on a rank variable."""
    return var in variables(expr)
