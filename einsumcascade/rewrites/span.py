"""The span of a summand: is F(x, d) a finite sum of products G_j(x) H_j(d), and how does it move from d to d'?

If the functions F(., d) span a space of dimension n, choose n of them (F and its derivatives with respect to d) as a
basis B(x, d). Then B(x, d') = C(d, d') B(x, d) with one matrix C, so the n sums of B are a state that moves from any
reference to any other. The expressions here are SymPy's; nothing is parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LIMIT = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A basis of the space that F(., d) spans, and the matrix that moves it.

    Args:
        basis: functions of x and d, the first is F.
        matrix: C(d, d') as rows, B(x, d') = C B(x, d).
    """

    basis: tuple[Any, ...]
    matrix: tuple[tuple[Any, ...], ...]


def span(f: Any, streamed: set[Any], old: Sequence[Any], new: Sequence[Any]) -> Span | str:
    """Find the span of F, or say in one sentence why it has none of small dimension.

    Args:
        f: the summand, real-valued. streamed: its symbols that vary along the rank.
        old, new: symbols of d, and those of d'.

    Cost: some 10-300 ms of SymPy.
    """
    import sympy as sp

    groups = separated(f, streamed, set(old))
    if isinstance(groups, str):
        return groups
    shapes = list(groups)
    if len(shapes) > LIMIT:
        return f"{f} is a sum of {len(shapes)} products of a function of x and one of d; a state has at most {LIMIT}"
    rows = _rows([groups[g] for g in shapes], old)
    columns = _independent_columns(rows, old)
    h = sp.Matrix([[row[k] for k in columns] for row in rows])
    moved = h.subs(dict(zip(old, new, strict=True)), simultaneous=True)
    # The adjugate brings no denominator but the determinant's.
    inverse = h.adjugate() / canonical(h.det())
    matrix = (moved * inverse).applyfunc(canonical)
    basis = [f, *(canonical(sum((a * g for a, g in zip(row, shapes, strict=True)), sp.Integer(0))) for row in rows[1:])]
    return Span(basis=tuple(basis), matrix=tuple(tuple(matrix.row(i)) for i in range(len(rows))))


def separated(f: Any, streamed: set[Any], references: set[Any]) -> dict[Any, Any] | str:
    """Write F as a sum of G(x) H(d): each G with its H, or the sentence that says which part mixes x and d."""
    import sympy as sp

    groups: dict[Any, Any] = {}
    for term in sp.Add.make_args(opened(f, streamed)):
        shape, factor = sp.Integer(1), sp.Integer(1)
        for part in sp.Mul.make_args(term):
            if not part.free_symbols & streamed:
                factor *= part
            elif not part.free_symbols & references:
                shape *= part
            else:
                return f"'{sp.sstr(part)}' is no finite sum of products"
        groups[shape] = groups.get(shape, 0) + factor
    groups = {g: h for g, h in groups.items() if h != 0}
    return _merged(groups, references)


def opened(f: Any, streamed: set[Any]) -> Any:
    """A summand as a sum of products, as far as algebra goes: powers, logarithms, exponentials, angles taken apart."""
    import sympy as sp

    value = sp.expand_log(_positive_factors_out(f, streamed))
    if value.has(sp.sin, sp.cos):
        value = sp.expand_trig(value)
    return sp.expand(value, power_exp=True, power_base=True)


def _merged(groups: dict[Any, Any], references: set[Any]) -> dict[Any, Any]:
    """Join the G whose H differ by a factor free of d: (x + y) h(d) is one product, not two."""
    import sympy as sp

    out: list[tuple[Any, Any]] = []
    for g, h in groups.items():
        for k, (other, base) in enumerate(out):
            ratio = sp.cancel(sp.powsimp(h / base)) if not (h / base).has(sp.exp) else sp.powsimp(h / base)
            if not ratio.free_symbols & references:
                out[k] = (other + ratio * g, base)
                break
        else:
            out.append((g, h))
    # The highest power leads, so that the basis steps down from it: (x - mu)**2, x - mu, 1.
    return dict(sorted(out, key=lambda t: (-_degree(t[0]), -sp.count_ops(t[0]), str(t[0]))))


def _degree(g: Any) -> float:
    return float(sum(n for b, n in g.as_powers_dict().items() if n.is_number and b.free_symbols))


def _positive_factors_out(f: Any, streamed: set[Any]) -> Any:
    """Take positive factors that are free of x out of maxima: max(x / s, 0) = max(x, 0) / s for s > 0 (R6)."""
    import sympy as sp

    def out(kind: Any) -> Any:
        def one(*args: Any) -> Any:
            scales = {a.as_independent(*streamed, as_Add=False)[0] for a in args if a != 0}
            (c, *others) = scales
            if others or c == 1 or not c.is_positive:
                return kind(*args)
            return c * kind(*(a / c for a in args))

        return one

    return f.replace(sp.Max, out(sp.Max)).replace(sp.Min, out(sp.Min)) if f.has(sp.Max, sp.Min) else f


def _rows(first: list[Any], old: Sequence[Any]) -> list[list[Any]]:
    """Coefficients, over the G, of F and of enough of its derivatives for a basis."""
    import sympy as sp

    rows = [first]
    for row in rows:
        for d in old:
            if len(rows) == len(first):
                break
            new = _reduced([sp.diff(a, d) for a in row], rows)
            if any(a != 0 for a in new) and _rank([*rows, new], old) > len(rows):
                rows.append(new)
    return rows


def _reduced(row: list[Any], rows: list[list[Any]]) -> list[Any]:
    """Take multiples of earlier rows away where that brings no new denominator, and numeric factors."""
    import sympy as sp

    known = {s for r in rows for a in r for s in sp.Poly(1, sp.Symbol("_")).free_symbols | _denominator(a)}
    for other in rows:
        pivot = next((k for k, a in enumerate(other) if a != 0), None)
        if pivot is None or row[pivot] == 0:
            continue
        c = canonical(row[pivot] / other[pivot])
        if c.is_rational_function(*c.free_symbols) and _denominator(c) <= known:
            row = [canonical(a - c * b) for a, b in zip(row, other, strict=True)]
    return _without_content([canonical(a) for a in row])


def _without_content(row: list[Any]) -> list[Any]:
    """Divide a row by the rational factor that its coefficients share; exponentials stay, they keep it bounded."""
    import sympy as sp

    parts = [_split_exponent(a) for a in row if a != 0]
    if not parts or any(a.is_Add and a.has(sp.exp) for a in row) or len({e for e, _ in parts}) > 1:
        number = next((a for a in row if a != 0), sp.Integer(1)).as_coeff_Mul()[0]
        return [a / number for a in row]
    fractions = [sp.fraction(sp.together(rest)) for _, rest in parts]
    if not all(f.is_polynomial() for pair in fractions for f in pair):
        number = parts[0][1].as_coeff_Mul()[0]
        return [a / number for a in row]
    above, below = fractions[0]
    for n, d in fractions[1:]:
        above, below = sp.gcd(above, n), sp.gcd(below, d)
    content = above / below
    if (parts[0][1] / content).as_coeff_Mul()[0] < 0:
        content = -content
    return [canonical(a / content) for a in row]


def _denominator(value: Any) -> set[Any]:
    import sympy as sp

    below = sp.fraction(sp.together(value))[1]
    return {p.as_base_exp()[0] for p in sp.Mul.make_args(sp.factor(below)) if not p.is_number and not p.has(sp.exp)}


def _points(old: Sequence[Any], count: int) -> list[dict[Any, Any]]:
    import random

    import sympy as sp

    rng = random.Random(11)
    return [{s: sp.Rational(rng.randint(200, 3000), 1009) for s in old} for _ in range(count)]


def _numeric(value: Any, at: dict[Any, Any]) -> Any:
    """A number for an expression; what is fixed beside d takes fixed values."""
    import sympy as sp

    rest = {s: sp.Rational(17 + 4 * k, 13) for k, s in enumerate(sorted(value.free_symbols - set(at), key=str))}
    return value.subs({**at, **rest}).evalf(40)


def _rank(rows: list[list[Any]], old: Sequence[Any]) -> int:
    import sympy as sp

    (at,) = _points(old, 1)
    m = sp.Matrix([[_numeric(a, at) for a in row] for row in rows])
    return int(m.rank(iszerofunc=lambda v: abs(v) < sp.Float(10) ** -25))


def _independent_columns(rows: list[list[Any]], old: Sequence[Any]) -> list[int]:
    chosen: list[int] = []
    for k in range(len(rows[0])):
        trial = [[row[j] for j in (*chosen, k)] for row in rows]
        if _rank(trial, old) == len(chosen) + 1:
            chosen.append(k)
        if len(chosen) == len(rows):
            break
    return chosen


def canonical(value: Any) -> Any:
    """Write a value factored, its exponentials joined into one: what a float32 kernel can evaluate.

    Left expanded, mu**2/2 - mu*mu' + mu'**2/2 loses all digits at a large offset; split, exp(m) exp(-m') overflows.
    """
    import sympy as sp

    value = sp.sympify(value)
    if value.has(sp.sin, sp.cos):
        return sp.simplify(value)
    joined = sp.powsimp(sp.expand(value), combine="exp", deep=True)
    by_exponent: dict[Any, Any] = {}
    for term in sp.Add.make_args(joined):
        exponent, rest = _split_exponent(term)
        by_exponent[exponent] = by_exponent.get(exponent, 0) + rest
    total = sp.Integer(0)
    for exponent, rest in by_exponent.items():
        total += sp.factor(sp.together(rest)) * (sp.exp(exponent) if exponent != 0 else 1)
    return total


def _split_exponent(term: Any) -> tuple[Any, Any]:
    """Take a product apart into the exponent of its exponentials and the rest."""
    import sympy as sp

    exponent, rest = sp.Integer(0), sp.Integer(1)
    for part in sp.Mul.make_args(term):
        base, power = part.as_base_exp()
        if isinstance(part, sp.exp):
            exponent += part.args[0]
        elif base == sp.E:
            exponent += power
        elif isinstance(base, sp.exp):
            exponent += base.args[0] * power
        else:
            rest *= part
    return sp.expand(exponent), rest
