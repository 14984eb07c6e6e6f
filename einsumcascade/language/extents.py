"""From shapes, extents and constants to a binding: every extent and every constant of a cascade as a number."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from einsumcascade.errors import Diagnostic, InputError, Span, nearest
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Expr,
    Num,
    Scalar,
    rank_of,
    subexpressions,
    variables,
)

Number = int | float


class _NoValueError(ArithmeticError):
    """An integer operation without a value: division by zero."""


def _whole(operation: Callable[[Number, Number], Number], x: Number, y: Number) -> Number:
    if y == 0:
        raise _NoValueError("division by zero")
    return operation(x, y)


# What the operator table's `array` spellings ask of their module, on Python numbers: integers stay exact.
_SCALARS = SimpleNamespace(
    **{name: getattr(math, name) for name in ("exp2", "tanh", "sin", "cos", "erf", "expm1", "log1p")},
    exp=lambda x: math.exp(x) if x < 709.0 else math.exp(709.0) * math.exp(min(x - 709.0, 700.0)),
    log=lambda x: math.log(x) if x > 0 else (-math.inf if x == 0 else math.nan),
    log2=lambda x: math.log2(x) if x > 0 else (-math.inf if x == 0 else math.nan),
    sqrt=lambda x: math.sqrt(x) if x >= 0 else math.nan,
    abs=abs,
    sign=lambda x: (x > 0) - (x < 0),
    floor=lambda x: math.floor(x) if math.isfinite(x) else x,
    ceil=lambda x: math.ceil(x) if math.isfinite(x) else x,
    maximum=max,
    minimum=min,
    where=lambda c, x, y: x if c else y,
    logical_not=lambda x: not x,
    floor_divide=lambda x, y: _whole(operator.floordiv, x, y),
    remainder=lambda x, y: _whole(operator.mod, x, y),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The numbers of one call of a cascade.

    Args:
        extents: extent of every rank, by its upper-case name.
        constants: value of every constant; integers stay integers.
    """

    extents: Mapping[str, int]
    constants: Mapping[str, float]

    def value(self, expr: Expr, leaf: Callable[[Expr], int | float] | None = None) -> int | float:
        """Evaluate an expression of numbers, constants and extents; `leaf` gives the value of what is none of these.

        Integer arithmetic (`+ - * // %`) is exact; division and functions follow IEEE and the value rules.

        Raises: InputError: `expr` reads a tensor or a rank variable, uses a name that is not bound, or divides an
            integer by zero with `//` or `%` (code `no-value`).

        >>> Binding(extents={"M": 10}, constants={"w": 4}).value(Apply(op="floordiv", args=(Scalar(name="M"),
        ...     Scalar(name="w"))))
        2
        """
        match expr:
            case Num():
                return expr.value
            case Scalar() if expr.name in self.constants:
                return self.constants[expr.name]
            case Scalar() if expr.name in self.extents:
                return self.extents[expr.name]
            case Apply():
                return self._apply(expr, leaf)
            case _ if leaf is not None:
                return leaf(expr)
            case _:
                raise _no_value(f"'{expr}' is not bound to a number")

    def _apply(self, expr: Apply, leaf: Callable[[Expr], int | float] | None) -> int | float:
        args = [self.value(a, leaf) for a in expr.args]
        try:
            result = expr.row.array(_SCALARS, *args)
        except _NoValueError:
            raise _no_value(f"'{expr}' divides {args[0]} by zero") from None
        except ZeroDivisionError:
            return math.copysign(math.inf, args[0])
        except OverflowError:
            return math.inf
        except ValueError:
            return math.nan
        if isinstance(result, complex):
            return math.nan
        return result if isinstance(result, int | float) else float(result)

    def extent(self, variable: str) -> int:
        """The extent of the rank that a variable walks."""
        return self.extents[rank_of(variable)]


def _no_value(headline: str) -> InputError:
    return InputError.of("no-value", headline, rule="a number is made of literals, constants and extents (upper case)")


@dataclass(slots=True)
class _Binder:
    """What is bound so far, where it came from, and what went wrong."""

    cascade: Cascade
    given: Mapping[str, float]
    extents: dict[str, int] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)
    # Names whose trouble is reported already.
    failed: dict[str, None] = field(default_factory=dict)
    open: dict[str, None] = field(default_factory=dict)

    def bound(self) -> str:
        facts = ", ".join(f"{k}={v}" for k, v in sorted(self.extents.items()))
        return facts or "nothing"

    def report(
        self, code: str, headline: str, rule: str, *, span: Span | None = None, label: str = "", hint: str = ""
    ) -> None:
        self.problems.append(Diagnostic(code=code, headline=headline, span=span, label=label, rule=rule, hint=hint))

    def set_extent(self, rank: str, value: Number, origin: str, *, span: Span | None = None, label: str = "") -> None:
        """Bind an extent, or report why it cannot be."""
        if isinstance(value, bool) or value != value or value < 0 or value != math.floor(value):
            self.report(
                "extent-value",
                f"rank {rank} is {value} {origin}",
                "an extent is a whole number, 0 or more",
                span=span,
                label=label,
            )
            self.failed.setdefault(rank)
            return
        value = int(value)
        if rank not in self.extents:
            self.extents[rank], self.origin[rank] = value, origin
        elif self.extents[rank] != value:
            self.report(
                "extent-mismatch",
                f"rank {rank} is {self.extents[rank]} {self.origin[rank]} but {value} {origin}",
                f"tensors that share a rank share its extent (bound so far: {self.bound()})",
                span=span,
                label=label,
                hint=f"pass tensors of one extent {rank}; for two lengths, use two ranks",
            )


def bind(
    cascade: Cascade,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    extents: Mapping[str, int] | None = None,
    constants: Mapping[str, float] | None = None,
) -> Binding:
    """Bind every extent and constant of a cascade.

    Extents come from the shapes of the inputs and from `rank` statements; `extents` and `constants` override what the
    text declares, and may use one another in any order.

    Args:
        cascade: what to bind.
        shapes: shape of every input, by name; None where extents alone are to be bound.
        extents: extents by rank, upper case: `{"M": 4096}`.
        constants: constants by name.

    Raises: InputError: with every mistake found: `extent-mismatch`, `rank-count`, `unknown-input`, `missing-input`,
        `unknown-rank`, `unknown-constant`, `missing-extent`, `extent-value` (negative or not whole), `no-value`.
    Cost: linear in the declarations.

    >>> from einsumcascade.language.parser import parse
    >>> c = parse("in X[p, m]\\nrank m0 = 4\\nrank m1 = M // M0\\nS[p, m1] = X[p, m1 * M0 + m0] :: sum(m0)\\nout S")
    >>> dict(bind(c, shapes={"X": (2, 8)}).extents)
    {'P': 2, 'M': 8, 'M0': 4, 'M1': 2}
    """
    extents, given = extents or {}, dict(constants or {})
    b = _Binder(cascade=cascade, given=given)
    ranks = list(
        dict.fromkeys(
            [rank_of(v) for i in cascade.inputs for v in i.indices] + [rank_of(d.name) for d in cascade.ranks]
        )
    )
    for name in given:
        if name not in {c.name for c in cascade.constants}:
            known = [c.name for c in cascade.constants]
            b.report(
                "unknown-constant",
                f"there is no constant '{name}'",
                "a constant is declared by `const`",
                hint=nearest(name, known),
            )
    for rank, value in extents.items():
        if rank not in ranks:
            b.report(
                "unknown-rank",
                f"there is no rank '{rank}'",
                "a rank is an upper-case name, walked by a variable of the text",
                hint=nearest(rank, ranks),
            )
        else:
            b.set_extent(rank, value, "in extents")
    if shapes is not None:
        _bind_shapes(b, shapes)
    numbers = {c.name: c for c in cascade.constants}
    derived = {rank_of(d.name): d for d in cascade.ranks}
    for rank in derived:
        _resolve(b, rank, numbers, derived)
    for name in numbers:
        _resolve(b, name, numbers, derived)
    # A definition also holds where an input shows the extent, unless the caller overrides it.
    for rank, d in derived.items():
        if rank not in extents and b.origin.get(rank, "").startswith("in ") and not b.problems:
            declared = _definition(b, d)
            if declared is not None:
                b.set_extent(rank, declared, "by its `rank` statement", span=d.span, label=f"{rank} = {declared}")
    absent = [r for r in ranks if r not in b.extents and r not in derived and r not in b.failed]
    if absent and not any(p.code in ("missing-input", "rank-count") for p in b.problems):
        plural = "ranks have" if len(absent) > 1 else "rank has"
        b.report(
            "missing-extent",
            f"{len(absent)} {plural} no extent: {', '.join(absent)}",
            f"an extent comes from a shape, a `rank` statement or `extents` (bound so far: {b.bound()})",
            hint="extents={" + ", ".join(f'"{r}": ...' for r in absent) + "}",
        )
    if b.problems:
        raise InputError(diagnostics=tuple(b.problems), source=cascade.source)
    order = [r for r in ranks if r in b.extents]
    return Binding(extents={r: b.extents[r] for r in order}, constants={c: b.constants[c] for c in numbers})


def _bind_shapes(b: _Binder, shapes: Mapping[str, Sequence[int]]) -> None:
    names = [i.tensor for i in b.cascade.inputs]
    for name in shapes:
        if name not in names:
            b.report(
                "unknown-input",
                f"the cascade has no input '{name}'",
                f"its inputs are {', '.join(names)}",
                hint=nearest(name, names),
            )
    for declared in b.cascade.inputs:
        name, ranks = declared.tensor, [rank_of(v) for v in declared.indices]
        if name not in shapes:
            b.report(
                "missing-input",
                f"the input {name} is not given",
                f"every input is passed: {', '.join(names)}",
                span=declared.span,
                label=f"{name} of shape ({', '.join(ranks)})",
            )
            continue
        shape = tuple(shapes[name])
        if len(shape) != len(ranks):
            b.report(
                "rank-count",
                f"{name} has {len(ranks)} ranks in the text but {len(shape)} axes in the call",
                f"a tensor has one axis for each rank: {name} of shape ({', '.join(ranks)})",
                span=declared.span,
                label=f"the call passes shape ({', '.join(map(str, shape))})",
                hint="name a leading axis as a rank of its own" if len(shape) > len(ranks) else "",
            )
            continue
        shown = ", ".join(f"{r}={n}" for r, n in zip(ranks, shape, strict=True))
        for rank, n in zip(ranks, shape, strict=True):
            b.set_extent(
                rank, n, f"in {name}", span=declared.span, label=f"{rank} = {n}, from {name} of shape ({shown})"
            )


def _resolve(b: _Binder, name: str, numbers: Mapping[str, Definition], derived: Mapping[str, Definition]) -> bool:
    """Bind a constant or an extent and, before it, what it is made of; False where that fails."""
    if name in b.constants or (name in b.extents and name not in numbers):
        return True
    if name in b.failed:
        return False
    d = numbers.get(name) or derived.get(name)
    if d is None:
        return False
    if name in numbers and name in b.given:
        b.constants[name] = b.given[name]
        return True
    what = "constant" if name in numbers else "rank"
    if name in b.open:
        chain = [*list(b.open)[list(b.open).index(name) :], name]
        b.report(
            "missing-extent",
            f"{what} {name} is defined by itself: {' -> '.join(chain)}",
            "definitions do not go round in circles",
            span=d.span,
        )
        b.failed.setdefault(name)
        return False
    b.open[name] = None
    # All of them before the verdict: every missing name is to be found, not the first alone.
    parts = [_resolve(b, s.name, numbers, derived) for s in subexpressions(d.expr) if isinstance(s, Scalar)]
    fine = all(parts)
    del b.open[name]
    if not fine:
        return False
    value = _definition(b, d)
    if value is None:
        b.failed.setdefault(name)
        return False
    if what == "constant":
        b.constants[name] = value
        return True
    b.set_extent(name, value, "by its `rank` statement", span=d.span, label=f"{name} = {value}")
    return name in b.extents


def _definition(b: _Binder, d: Definition) -> Number | None:
    try:
        return Binding(extents=b.extents, constants=b.constants).value(d.expr)
    except InputError as error:
        first = error.diagnostics[0]
        stray = variables(d.expr)
        hint = f"write the extent {rank_of(stray[0])}, not the variable {stray[0]}" if stray else ""
        b.report(first.code, f"{first.headline} in the definition of {d.name}", first.rule, span=d.span, hint=hint)
        return None
