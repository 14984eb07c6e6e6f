"""The claims of a certificate: B(x, d') = C(d, d') B(x, d), its laws, and that it is about what it says.

Evaluated to 40 digits at random points, by an evaluator of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import numpy as np

from einsumcascade.errors import CascadeError, InputError
from einsumcascade.language.check import extents_known
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Expr,
    Input,
    Num,
    Read,
    Scalar,
    Var,
    rank_of,
    subexpressions,
    substitute,
    transform,
)
from einsumcascade.language.ops import OPS
from einsumcascade.language.parser import parse_expr

POINTS = 20
DIGITS = 40
NEXT = "__next"
_Values = Mapping[str, mpmath.mpf]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One thing that was checked: what, whether it holds, and what was found."""

    what: str
    holds: bool
    found: str = ""


def wrong(headline: str, hint: str = "") -> InputError:
    """The error of a text that is no certificate."""
    return InputError.of(
        "certificate",
        headline,
        rule="a certificate is the JSON that `einsumcascade derive SPEC --json` prints",
        hint=hint,
    )


def claims(data: Mapping[str, Any], original: Cascade, result: Cascade, rng: np.random.Generator) -> Iterator[Verdict]:
    """Check the claim of each step that makes one."""
    reader = _Reader(original, result)
    for n, step in enumerate(data["steps"], start=1):
        if not isinstance(step, dict):
            raise wrong(f"step {n} of the certificate is no object")
        for statement in step.get("after", ()) if isinstance(step.get("after"), list) else ():
            reader.define(statement)
        claim = step.get("claim")
        if claim is None:
            continue
        if not isinstance(claim, dict):
            raise wrong(f"the claim of step {n} is no object")
        yield from _claim(n, step, claim, reader, rng)


def _claim(
    n: int, step: Mapping[str, Any], claim: Mapping[str, Any], reader: _Reader, rng: np.random.Generator
) -> Iterator[Verdict]:
    references = [reader.expr(t, n) for t in _texts(claim, "references", n)]
    basis = [reader.expr(t, n) for t in _texts(claim, "basis", n)]
    rows = claim.get("matrix")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise wrong(f"the claim of step {n} has no matrix")
    matrix = [[reader.expr(t, n) for t in row] for row in rows]
    form = claim.get("form")
    size = len(matrix)
    if form not in ("linear", "shift") or any(len(row) != size for row in matrix) or size == 0:
        raise wrong(f"the claim of step {n} is neither linear nor a shift of matching size")
    if len(basis) != size or (form == "shift" and size != 1):
        raise wrong(f"the claim of step {n} has {len(basis)} functions and {size} rows")
    positive = {str(reader.expr(t, n)) for key in ("positive", "nonnegative") for t in _texts(claim, key, n)}
    worst = {"moves": mpmath.mpf(0), "identity": mpmath.mpf(0), "cocycle": mpmath.mpf(0)}
    try:
        with mpmath.workdps(DIGITS):
            for _ in range(POINTS):
                at = _point([*basis, *(c for row in matrix for c in row)], references, positive, rng)
                for key, off in _errors(form, basis, matrix, references, at).items():
                    worst[key] = max(worst[key], off)
    except (ValueError, ArithmeticError, KeyError) as error:
        yield Verdict(what=f"step {n}: the claim can be evaluated", holds=False, found=str(error))
        return
    said = {
        "moves": "B(x, d') = C(d, d') B(x, d)" if form == "linear" else "F(x, d') = F(x, d) + C(d, d')",
        "identity": "C(d, d) = I" if form == "linear" else "C(d, d) = 0",
        "cocycle": "C(d', d'') C(d, d') = C(d, d'')" if form == "linear" else "C(d', d'') + C(d, d') = C(d, d'')",
    }
    for key, off in worst.items():
        holds = off < mpmath.mpf(10) ** (8 - DIGITS)
        yield Verdict(what=f"step {n}: {said[key]}", holds=bool(holds), found=f"largest error {mpmath.nstr(off, 3)}")
    yield _about(n, step, basis[0], reader, rng)


def _errors(
    form: str, basis: Sequence[Expr], matrix: Sequence[Sequence[Expr]], references: Sequence[Expr], at: _Values
) -> dict[str, mpmath.mpf]:
    """How far each law is from holding at a point, relative to what is compared."""
    names = [_key(r) for r in references]
    later = {**at, **{k: at[k + NEXT] for k in names}}
    third = {**at, **{k: at[k + NEXT] for k in names}, **{k + NEXT: at[k + NEXT * 2] for k in names}}
    direct = {**at, **{k + NEXT: at[k + NEXT * 2] for k in names}}
    same = {**at, **{k + NEXT: at[k] for k in names}}
    c = [[_value(e, at) for e in row] for row in matrix]
    step = [[_value(e, third) for e in row] for row in matrix]
    whole = [[_value(e, direct) for e in row] for row in matrix]
    unit = [[_value(e, same) for e in row] for row in matrix]
    b, moved = [_value(e, at) for e in basis], [_value(e, later) for e in basis]
    size = range(len(matrix))

    def off(x: mpmath.mpf, y: mpmath.mpf) -> mpmath.mpf:
        return abs(x - y) / max(abs(x), abs(y), mpmath.mpf(1))

    if form == "shift":
        return {
            "moves": off(b[0] + c[0][0], moved[0]),
            "identity": abs(unit[0][0]),
            "cocycle": off(step[0][0] + c[0][0], whole[0][0]),
        }
    return {
        "moves": max(off(mpmath.fsum(c[j][k] * b[k] for k in size), moved[j]) for j in size),
        "identity": max(off(unit[j][k], mpmath.mpf(j == k)) for j in size for k in size),
        "cocycle": max(off(mpmath.fsum(step[j][i] * c[i][k] for i in size), whole[j][k]) for j in size for k in size),
    }


def _about(n: int, step: Mapping[str, Any], summand: Expr, reader: _Reader, rng: np.random.Generator) -> Verdict:
    """Whether a claim is about the reduction that its step names."""
    before = step.get("before")
    text = before[0] if isinstance(before, list) and before and isinstance(before[0], str) else ""
    what = f"step {n}: the claim is about {text.split('=')[0].strip() or 'a reduction'}"
    e = reader.statement(text)
    if e is None:
        return Verdict(what=what, holds=False, found="the step names no reduction")
    leaves = {_key(x) for x in subexpressions(summand) if isinstance(x, Read)}
    own = reader.opened(e, leaves)
    try:
        with mpmath.workdps(DIGITS):
            for _ in range(POINTS):
                at = _point([own, summand], [], {_key(x) for x in subexpressions(own) if isinstance(x, Read)}, rng)
                if abs(_value(own, at) - _value(summand, at)) > mpmath.mpf(10) ** (10 - DIGITS):
                    return Verdict(what=what, holds=False, found=f"its summand is {own}")
    except (ValueError, ArithmeticError, KeyError) as error:
        return Verdict(what=what, holds=False, found=str(error))
    return Verdict(what=what, holds=True)


class _Reader:
    """Expressions and statements of a certificate, over the names of its two cascades."""

    def __init__(self, original: Cascade, result: Cascade) -> None:
        self.constants = {c.name: c for x in (original, result) for c in x.constants}
        self.variables = dict.fromkeys(v for x in (original, result) for v in extents_known(x))
        self.tensors = {i.tensor for x in (original, result) for i in x.inputs}
        self.maps: dict[str, tuple[tuple[Expr, ...], Expr]] = {}
        for e in original.einsums:
            self.tensors.add(e.tensor)
            self._keep(e.tensor, e.indices, e.expr if e.reduce is None else None)

    def _keep(self, tensor: str, indices: tuple[Expr, ...], expr: Expr | None) -> None:
        if expr is not None and all(isinstance(i, Var) for i in indices):
            self.maps[tensor] = (indices, expr)
        else:
            self.maps.pop(tensor, None)

    def define(self, statement: Any) -> None:
        """Take an Einsum of a step into account."""
        if not isinstance(statement, str):
            return
        left, equals, right = statement.partition(" = ")
        if not equals:
            return
        try:
            target = self._parse(left)
        except CascadeError:
            return
        if isinstance(target, Read):
            self.tensors.add(target.tensor)
            found = self.statement(statement)
            self._keep(target.tensor, target.indices, None if " :: " in right else found)

    def statement(self, text: str) -> Expr | None:
        """The right side of an Einsum, None if it is none."""
        _, equals, right = text.partition(" = ")
        body = re.split(r" :: | where ", right)[0]
        try:
            return self._parse(body) if equals else None
        except CascadeError:
            return None

    def expr(self, text: Any, n: int) -> Expr:
        if not isinstance(text, str):
            raise wrong(f"the claim of step {n} holds {text!r}, not an expression")
        try:
            return self._parse(text)
        except CascadeError as error:
            raise wrong(f"the claim of step {n} holds '{text}': {error.diagnostics[0].headline}") from None

    def _parse(self, text: str) -> Expr:
        named = dict.fromkeys(re.findall(r"[A-Za-z][A-Za-z0-9_]*(?=\s*\[)", text))
        bare = [w for w in dict.fromkeys(re.findall(r"[A-Za-z][A-Za-z0-9_]*", text)) if w[0].isupper()]
        extents = {rank_of(v) for v in self.variables}
        scalars = [w for w in bare if w not in named and w not in extents]
        over = Input(tensor="_", indices=tuple(self.variables))
        given = (over, *(Input(tensor=t, indices=()) for t in (*named, *scalars)))
        names = Cascade(inputs=given, constants=tuple(self.constants.values()), body=(), outputs=())
        return parse_expr(text, names_of=names)

    def opened(self, e: Expr, leaves: set[str]) -> Expr:
        """Maps written out until only the leaves of a claim are left."""

        def leaf(x: Expr) -> Expr | None:
            if isinstance(x, Read) and _key(x) not in leaves and x.tensor in self.maps:
                left, inner = self.maps[x.tensor]
                names = {i.name: to for i, to in zip(left, x.indices, strict=False) if isinstance(i, Var)}
                return transform(substitute(inner, names), leaf)
            return None

        return transform(e, leaf)


def _texts(claim: Mapping[str, Any], key: str, n: int) -> list[Any]:
    found = claim.get(key)
    if not isinstance(found, list):
        raise wrong(f"the claim of step {n} has no list '{key}'")
    return found


def _key(e: Expr) -> str:
    return str(e)


def _point(
    exprs: Sequence[Expr], references: Sequence[Expr], positive: set[str], rng: np.random.Generator
) -> dict[str, mpmath.mpf]:
    """Random numbers for every leaf; three for each reference."""
    out: dict[str, mpmath.mpf] = {}

    def number(key: str) -> mpmath.mpf:
        return mpmath.mpf(float(rng.uniform(0.3 if key in positive else -2.0, 2.0)))

    for e in exprs:
        for x in subexpressions(e):
            if isinstance(x, Read | Var) and not (isinstance(x, Read) and x.tensor.endswith(NEXT)):
                out.setdefault(_key(x), number(_key(x)))
            elif isinstance(x, Scalar):
                out.setdefault(_key(x), mpmath.mpf(int(rng.integers(2, 9))) if x.is_extent else number(_key(x)))
    for r in references:
        out.setdefault(_key(r), number(_key(r)))
        for suffix in (NEXT, NEXT * 2):
            out[_key(r) + suffix] = number(_key(r))
    return out


def _value(e: Expr, at: _Values) -> mpmath.mpf:
    match e:
        case Num():
            return mpmath.mpf(e.value)
        case Read() if e.tensor.endswith(NEXT):
            return at[_key(replace(e, tensor=e.tensor.removesuffix(NEXT))) + NEXT]
        case Read() | Var() | Scalar():
            return at[_key(e)]
        case Apply():
            return _FUNCTIONS[e.op](*(_value(a, at) for a in e.args))


_FUNCTIONS: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "pow": lambda x, y: x**y,
    "neg": lambda x: -x,
    "max": max,
    "min": min,
    "abs": abs,
    "clamp": lambda x, low, high: min(max(x, low), high),
    "relu": lambda x: max(x, mpmath.mpf(0)),
    "exp2": lambda x: mpmath.mpf(2) ** x,
    "log2": lambda x: mpmath.log(x, 2),
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "softplus": lambda x: mpmath.log(1 + mpmath.exp(x)),
    **{name: getattr(mpmath, name) for name in ("exp", "log", "sqrt", "tanh", "sin", "cos", "erf", "sign", "floor")},
    "ceil": mpmath.ceil,
    "floordiv": lambda x, y: mpmath.floor(x / y),
    "mod": lambda x, y: x - y * mpmath.floor(x / y),
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "and": lambda x, y: bool(x) and bool(y),
    "or": lambda x, y: bool(x) or bool(y),
    "not": lambda x: not x,
    "select": lambda c, x, y: x if c else y,
    "lrelu": lambda x: x if x >= 0 else x / 5,
    "elu": lambda x: x if x > 0 else mpmath.expm1(x),
    "uniform": lambda *counts: mpmath.mpf(float(OPS["uniform"].array(np, *(int(c) for c in counts)))),
}
