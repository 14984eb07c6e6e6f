"""Count the operations of one Einsum, as polynomials of the extents of its ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from einsumcascade.analysis.polynomial import ZERO, Count, number, volume
from einsumcascade.language.fiberwise import solve_form
from einsumcascade.language.ir import Apply, Einsum, Expr, Init, Read, reads, variables
from einsumcascade.language.ops import OPS

CLASSES: Final = ("multiply_add", "exp", "divide", "max", "other")
# The part of the multiply-adds that a matrix unit takes: Definition O8.
CONTRACTION: Final = "contraction"
# Instructions of a special-function unit, and the operations that consist of them: Definition O11.
SPECIAL, FUNCTION = "special", "function"
# All that is counted: classes, and parts of them.
KINDS: Final = (*CLASSES, CONTRACTION, SPECIAL, FUNCTION)
_CLASS_OF: Final[Mapping[str, str]] = {"add": "multiply_add", "multiply": "multiply_add"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """The operations of one Einsum, by class.

    Args:
        tensor: what it writes; `init RM` for a first generation that is computed.
        multiply_add: multiplies and additions; a product that is added at once counts as one with the addition.
        exp, divide: as named; a mean divides once for each result.
        max: maxima and minima, reductions included.
        other: every other operator: logarithm, root, comparison, selection.
        contraction: those of `multiply_add` that a matrix unit can take.
        function: those of all classes that a special-function unit takes. special: its instructions for them.
    """

    tensor: str
    multiply_add: Count = ZERO
    exp: Count = ZERO
    divide: Count = ZERO
    max: Count = ZERO
    other: Count = ZERO
    contraction: Count = ZERO
    special: Count = ZERO
    function: Count = ZERO

    def of(self, kind: str) -> Count:
        """Return the count of one of `KINDS`."""
        assert kind in KINDS, kind
        found: Count = getattr(self, kind)
        return found

    def to_dict(self) -> dict[str, str]:
        """Return the counts as text, absent classes left out."""
        return {c: str(n) for c in CLASSES if (n := self.of(c))}


def operations_of(statement: Einsum | Init, known: set[Expr] | None = None) -> Operations:
    """Count the operations of one statement, by Definitions O1 to O8 of docs/analysis.md.

    Operators count by O1 to O4, operations on whole fibers by O5 to O7, contractions by O8, special functions by
    Definition O11.

    Args:
        known: functions (O11) that other statements have computed, which count nothing here; those of this one join
            them. None: each counts wherever it stands.

    >>> from einsumcascade.language.parser import parse
    >>> cascade = parse("in X[m]\\nS = X[m] :: max(m)\\nY[m] = exp(X[m] - S)\\nout Y")
    >>> operations_of(cascade.einsums[1]).to_dict()
    {'multiply_add': 'M', 'exp': 'M'}
    """
    if isinstance(statement, Init):
        return _operations(f"init {statement.tensor}", list(_of_expr(statement.expr, known)))
    found = _of_fiberwise(statement, known) if statement.is_fiberwise else _of_einsum(statement, known)
    if matrix_product(statement) is not None:
        found.append((CONTRACTION, volume(statement.space)))
    return _operations(statement.tensor, found)


def _operations(tensor: str, found: list[tuple[str, Count]]) -> Operations:
    sums = dict.fromkeys(KINDS, ZERO)
    for kind, n in found:
        sums[kind] += n
    return Operations(tensor=tensor, **sums)


def matrix_product(einsum: Einsum) -> tuple[str, str, str] | None:
    """See a sum of products as products of matrices (Definition O8 of docs/analysis.md); None where it is none.

    Returns: the rank variables (i, r, j).

    >>> from einsumcascade.language.parser import parse
    >>> c = parse("in Q[h, p, e], K[h, m, e]\\nS[h, p, m] = Q[h, p, e] * K[h, m, e] * h :: sum(e)\\nout S")
    >>> matrix_product(c.einsums[0])
    ('p', 'e', 'm')
    """
    if einsum.reduce != "sum":
        return None
    sets = [set(variables(f)) for f in _product(einsum.expr, quotients=True)]
    for r in einsum.ranks:
        for n, i in enumerate(einsum.free):
            for j in einsum.free[n + 1 :]:
                both = any({i, j} <= s for s in sets)
                if not both and all(any({v, r} <= s for s in sets) for v in (i, j)):
                    return i, r, j
    return None


def _of_einsum(s: Einsum, known: set[Expr] | None) -> list[tuple[str, Count]]:
    if s.reduction is None:
        return list(_of_expr(s.expr, known))
    space, free = volume(s.space), volume(s.free)
    summed = s.reduce in ("sum", "mean")
    inside, outside = s.expr, None
    if summed:
        factors = list(_product(s.expr))
        moved = [f for f in factors if not set(variables(f)) & set(s.ranks)]
        kept = [f for f in factors if f not in moved]
        if kept:
            inside = _multiplied(kept)
            outside = _multiplied(moved) if moved else None
    found: list[tuple[str, Count]] = []
    if summed and isinstance(inside, Apply) and inside.op == "mul":
        # The last product of the operand and the addition are one operation.
        found += [x for a in inside.args for x in _of_expr(a, known)]
    else:
        found += _of_expr(inside, known)
    found.append((_class(s.reduction.op.cost), space))
    if outside is not None:
        found += [*_of_expr(outside, known), ("multiply_add", free)]
    if s.reduce == "mean":
        found += _divisions(free)
    return found


def _of_fiberwise(s: Einsum, known: set[Expr] | None) -> list[tuple[str, Count]]:
    """A top-k or a linear system; its operands may be computed."""
    if not (isinstance(s.expr, Apply) and s.expr.row.fiberwise):
        return [*_of_expr(s.expr, known), ("other", volume(s.space))]
    form = solve_form(s)
    assert form is not None
    matrix, right = s.expr.args
    assert isinstance(matrix, Read)
    n, half, minus = volume((form.row,)), number(Fraction(1, 2)), number(-1)
    pairs = n * (n + minus) * half
    columns = volume(tuple(v for v in s.free if v != form.result))
    found = [*_of_expr(right, known)]
    if s.expr.op == "trisolve":
        return [*found, ("multiply_add", columns * pairs)]
    matrices = volume(variables(*matrix.indices[:-2]))
    cubes = pairs * (n + n + minus) * number(Fraction(1, 3))
    found += [("multiply_add", matrices * cubes), *_divisions(matrices * pairs)]
    return [*found, ("multiply_add", columns * pairs * number(2)), *_divisions(columns * n)]


def _product(expr: Expr, *, quotients: bool = False) -> Iterator[Expr]:
    """The factors of a product; with `quotients`, divisors too."""
    if isinstance(expr, Apply) and (expr.op == "mul" or (quotients and expr.op in ("div", "neg"))):
        for a in expr.args:
            yield from _product(a, quotients=quotients)
    else:
        yield expr


def _multiplied(factors: list[Expr]) -> Expr:
    out = factors[0]
    for f in factors[1:]:
        out = Apply(op="mul", args=(out, f))
    return out


def _of_expr(expr: Expr, known: set[Expr] | None) -> Iterator[tuple[str, Count]]:
    """Yield class and count of every operator of a value; what stands inside index expressions is no value."""
    if not isinstance(expr, Apply):
        return
    if known is not None and expr.row.special:
        if expr in known:
            return
        known.add(expr)
    kind = _class(expr.row.cost)
    # Numbers and constants are folded once; a sign is part of the operation that takes it.
    if (variables(expr) or reads(expr)) and expr.op != "neg":
        n = volume(variables(expr))
        yield kind, n
        if expr.row.special and not _divides_by_number(expr):
            yield SPECIAL, n * number(expr.row.special)
            yield FUNCTION, n
    fused = expr.row.cost == "add" and expr.op != "neg"
    for a in expr.args:
        if fused and isinstance(a, Apply) and a.op == "mul" and set(variables(a)) == set(variables(expr)):
            fused = False
            for inner in a.args:
                yield from _of_expr(inner, known)
        else:
            yield from _of_expr(a, known)


def _divides_by_number(expr: Apply) -> bool:
    """Whether it is a product with a reciprocal that is known beforehand."""
    return expr.op == "div" and not (variables(expr.args[1]) or reads(expr.args[1]))


def _divisions(count: Count) -> list[tuple[str, Count]]:
    """Divisions that no operator of a text stands for."""
    return [("divide", count), (SPECIAL, count * number(OPS["div"].special)), (FUNCTION, count)]


def _class(cost: str) -> str:
    named = _CLASS_OF.get(cost, cost)
    return named if named in CLASSES else "other"
