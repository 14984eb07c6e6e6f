"""Count the operations and the least traffic of a cascade, as polynomials of its extents.

The counts are those of the cascade as written, every point of each iteration space: points that a constraint culls
are not subtracted. What a point does not depend on is computed once for it: a factor or a subexpression without a
reduced rank stands outside the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from einsumcascade.analysis.dependence import axes
from einsumcascade.errors import Diagnostic, InputError, nearest
from einsumcascade.language.ir import Apply, Cascade, Einsum, Expr, Init, Num, Scalar, rank_of, variables, walk

CLASSES: Final = ("multiply_add", "exp", "divide", "max", "other")
DTYPE_BYTES: Final[Mapping[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_CLASS_OF: Final[Mapping[str, str]] = {"add": "multiply_add", "multiply": "multiply_add"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """A polynomial of extents with integer coefficients: `E*M*P + M*P`.

    Args:
        terms: (names of the extents, sorted; coefficient) of each term, the highest degree first.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...] = ()

    def __add__(self, other: Count) -> Count:
        merged = dict(self.terms)
        for names, n in other.terms:
            merged[names] = merged.get(names, 0) + n
        return _count(merged)

    def __mul__(self, other: Count) -> Count:
        merged: dict[tuple[str, ...], int] = {}
        for names, n in self.terms:
            for more, k in other.terms:
                key = tuple(sorted(names + more))
                merged[key] = merged.get(key, 0) + n * k
        return _count(merged)

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __str__(self) -> str:
        texts = []
        for names, n in self.terms:
            powers = [x if (k := names.count(x)) == 1 else f"{x}**{k}" for x in dict.fromkeys(names)]
            texts.append("*".join([str(n)] * (n != 1 or not names) + powers))
        return " + ".join(texts).replace("+ -", "- ") or "0"

    @property
    def extents(self) -> tuple[str, ...]:
        """Names of the extents that occur, sorted."""
        return tuple(sorted({x for names, _ in self.terms for x in names}))

    def at(self, extents: Mapping[str, int]) -> int:
        """Return the exact number at given extents.

        Raises: InputError: an extent that occurs is not among `extents`.
        """
        missing = [x for x in self.extents if x not in extents]
        if missing:
            headline = f"the count {self} has no value: {', '.join(missing)} unknown"
            raise InputError(
                diagnostics=(
                    Diagnostic(
                        code="missing-extent",
                        headline=headline,
                        rule="a count has a value where every extent in it has one",
                        hint=f"give {missing[0]} a number",
                    ),
                )
            )
        return sum(n * math.prod(extents[x] for x in names) for names, n in self.terms)

    def sympy(self) -> Any:
        """Return the same polynomial as a SymPy expression over positive integer symbols."""
        import sympy

        total = sympy.Integer(0)
        for names, n in self.terms:
            total += n * sympy.prod([sympy.Symbol(x, integer=True, positive=True) for x in names])
        return total


def _count(terms: Mapping[tuple[str, ...], int]) -> Count:
    kept = [(names, n) for names, n in terms.items() if n]
    return Count(terms=tuple(sorted(kept, key=lambda t: (-len(t[0]), t[0]))))


ONE: Final = _count({(): 1})


def number(value: int) -> Count:
    """Return a constant count."""
    return _count({(): value})


def volume(names: tuple[str, ...]) -> Count:
    """Return the product of the extents of rank variables: `("m", "p")` gives M*P."""
    return _count({tuple(sorted(rank_of(v) for v in names)): 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """The operations of one Einsum, by class.

    Args:
        tensor: what it writes; `init RM` for a first generation that is computed.
        multiply_add: multiplies and additions; a product that is added at once counts as one with the addition.
        exp, divide: as named; a mean divides once for each result.
        max: maxima and minima, reductions included.
        other: every other operator: logarithm, root, comparison, selection.
    """

    tensor: str
    multiply_add: Count = Count()
    exp: Count = Count()
    divide: Count = Count()
    max: Count = Count()
    other: Count = Count()

    def to_dict(self) -> dict[str, str]:
        """Return the counts as text, absent classes left out."""
        return {c: str(n) for c in CLASSES if (n := getattr(self, c))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Operations of a whole cascade and the elements that any kernel for it must move.

    Args:
        einsums: operations of each Einsum, in cascade order.
        inputs: (tensor, elements) of each input.
        outputs: (tensor, elements, dtype or None for that of the first input) of each output.
    """

    einsums: tuple[Operations, ...]
    inputs: tuple[tuple[str, Count], ...]
    outputs: tuple[tuple[str, Count, str | None], ...]

    def total(self, kind: str) -> Count:
        """Return the sum over all Einsums of one class of `CLASSES`."""
        assert kind in CLASSES, kind
        out = Count()
        for e in self.einsums:
            out += getattr(e, kind)
        return out

    def bytes(self, *, dtype: str) -> Count:
        """Return the least traffic in bytes: each input read once and each output written once.

        Args:
            dtype: of every input, index tensors included, and of the outputs that name none.

        Raises: InputError: `dtype` is none of float16, bfloat16, float32, float64.
        """
        if dtype not in DTYPE_BYTES:
            raise InputError(
                diagnostics=(
                    Diagnostic(
                        code="unknown-dtype",
                        headline=f"'{dtype}' is no dtype",
                        rule="counts know floating dtypes",
                        hint=nearest(dtype, tuple(DTYPE_BYTES)),
                    ),
                )
            )
        out = Count()
        for _, elements in self.inputs:
            out += elements * number(DTYPE_BYTES[dtype])
        for _, elements, own in self.outputs:
            out += elements * number(DTYPE_BYTES[own or dtype])
        return out

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, counts as text."""
        return {
            "einsums": [{"tensor": e.tensor, **e.to_dict()} for e in self.einsums],
            "total": {c: str(n) for c in CLASSES if (n := self.total(c))},
            "inputs": {t: str(n) for t, n in self.inputs},
            "outputs": {t: str(n) for t, n, _ in self.outputs},
        }


def count_operations(cascade: Cascade) -> Counts:
    """Count the operations of each Einsum and the elements of inputs and outputs.

    Guaranteed: an operator counts once for each value of the rank variables that its operands have. Index
    expressions and conditions are not counted; culled points are not subtracted.

    Returns: polynomials of the extents, parts of a partition under their own names (M1*M0, not M).
    Cost: linear in the cascade.   Source: FuseMax (MICRO 2024), section III.

    >>> from einsumcascade.language.parser import parse
    >>> str(count_operations(parse("in A[m, k], B[k, n]\\nC[m, n] = A[m, k] * B[k, n]\\nout C")).total("multiply_add"))
    'K*M*N'
    """
    shape = axes(cascade)
    einsums = []
    for s in walk(cascade.body):
        if isinstance(s, Einsum):
            einsums.append(_operations(s.tensor, _of_einsum(s)))
        elif isinstance(s, Init) and (found := list(_of_expr(s.expr))):
            einsums.append(_operations(f"init {s.tensor}", found))
    return Counts(
        einsums=tuple(einsums),
        inputs=tuple((i.tensor, volume(i.indices)) for i in cascade.inputs),
        outputs=tuple((o.tensor, elements(cascade, o.tensor, shape=shape), o.dtype) for o in cascade.outputs),
    )


def elements(cascade: Cascade, tensor: str, *, shape: Mapping[str, tuple[str | None, ...]] | None = None) -> Count:
    """Return the number of elements of a tensor; an iterative tensor has one generation more than steps."""
    out = volume(tuple(v for v in (shape or axes(cascade))[tensor] if v))
    writer = next((e for e in cascade.einsums if e.tensor == tensor), None)
    for index in writer.indices if writer else ():
        match index:
            case Apply(op="add", args=(_, Num(value=int(step)))):
                kept = tuple(v for v in writer.free if v not in variables(index)) if writer else ()
                out += volume(kept) * number(step)
            case _:
                pass
    return out


def _operations(tensor: str, found: list[tuple[str, Count]]) -> Operations:
    sums = {c: Count() for c in CLASSES}
    for kind, n in found:
        sums[kind] += n
    return Operations(tensor=tensor, **sums)


def _of_einsum(s: Einsum) -> list[tuple[str, Count]]:
    if s.reduction is None:
        return list(_of_expr(s.expr))
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
        found += [x for a in inside.args for x in _of_expr(a)]
    else:
        found += _of_expr(inside)
    found.append((_class(s.reduction.op.cost), space))
    if outside is not None:
        found += [*_of_expr(outside), ("multiply_add", free)]
    if s.reduce == "mean":
        found.append(("divide", free))
    return found


def _product(expr: Expr) -> Iterator[Expr]:
    if isinstance(expr, Apply) and expr.op == "mul":
        for a in expr.args:
            yield from _product(a)
    else:
        yield expr


def _multiplied(factors: list[Expr]) -> Expr:
    out = factors[0]
    for f in factors[1:]:
        out = Apply(op="mul", args=(out, f))
    return out


def _of_expr(expr: Expr) -> Iterator[tuple[str, Count]]:
    """Yield class and count of every operator of a value; what stands inside index expressions is no value."""
    if not isinstance(expr, Apply):
        return
    kind = _class(expr.row.cost)
    # Numbers and constants are folded once; a sign is part of the operation that takes it.
    if variables(expr) and expr.op != "neg":
        yield kind, volume(variables(expr))
    fused = expr.row.cost == "add" and expr.op != "neg"
    for a in expr.args:
        if fused and isinstance(a, Apply) and a.op == "mul" and set(variables(a)) == set(variables(expr)):
            fused = False
            for inner in a.args:
                yield from _of_expr(inner)
        else:
            yield from _of_expr(a)


def _class(cost: str) -> str:
    named = _CLASS_OF.get(cost, cost)
    return named if named in CLASSES else "other"


def evaluate_extents(cascade: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """Complete given extents with those that `rank` statements define from them.

    Args:
        cascade: a checked cascade.
        extents: numbers by rank, upper case; a given number wins over a definition.

    Returns: every extent that has a whole value, in order of first appearance; the others are absent.
    Cost: linear in the definitions.
    """
    constants = {c.name: c.expr for c in cascade.constants}
    defined = {rank_of(r.name): r.expr for r in cascade.ranks}

    def value(expr: Expr, depth: int) -> float | None:
        match expr:
            case Num(value=v):
                return v
            case Scalar(name=name):
                if name in extents:
                    return extents[name]
                inner = defined.get(name, constants.get(name))
                # A definition in terms of itself has no value.
                return value(inner, depth + 1) if inner is not None and depth < 64 else None
            case Apply(args=args):
                return _folded(expr, [value(a, depth) for a in args])
            case _:
                return None

    names = dict.fromkeys([rank_of(v) for i in cascade.inputs for v in i.indices] + list(defined) + list(extents))
    out = {}
    for n in names:
        found = value(Scalar(name=n), 0)
        if found is not None and math.isfinite(found) and found == int(found):
            out[n] = int(found)
    return out


def _folded(expr: Apply, args: list[float | None]) -> float | None:
    if any(a is None for a in args):
        return None
    x, *rest = [a for a in args if a is not None]
    try:
        match expr.op:
            case "add":
                return x + rest[0]
            case "sub":
                return x - rest[0]
            case "neg":
                return -x
            case "mul":
                return x * rest[0]
            case "div":
                return x / rest[0]
            case "floordiv":
                return x // rest[0]
            case "mod":
                return x % rest[0]
            case "max":
                return max(x, rest[0])
            case "min":
                return min(x, rest[0])
            case "ceil":
                return math.ceil(x)
            case "floor":
                return math.floor(x)
            case _:
                return None
    except (ZeroDivisionError, OverflowError):
        return None
