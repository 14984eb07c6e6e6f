"""The cascade: frozen values that print as text and parse back to equal values.

Spans take no part in equality. A rank variable is lower case (`m`), its rank and its extent upper case (`M`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import TYPE_CHECKING, TypeAlias

from einsumcascade.errors import SourceText, Span
from einsumcascade.language.ops import FIBERWISE, OPS, REDUCTIONS, Op, Reduction

if TYPE_CHECKING:
    from einsumcascade.language.compose import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Num:
    """A literal number; `inf` is one."""

    value: int | float
    span: Span | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        from einsumcascade.language.printer import print_expr

        return print_expr(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Var:
    """A rank variable used as a number or an index."""

    name: str
    span: Span | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """A constant (`scale`) or an extent (`E`) used as a number."""

    name: str
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def is_extent(self) -> bool:
        """Whether the name is that of an extent: upper case."""
        return self.name[0].isupper()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """An element of a tensor at index expressions; a scalar tensor has none."""

    tensor: str
    indices: tuple[Expr, ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        from einsumcascade.language.printer import print_expr

        return print_expr(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """An operator of the table applied to operands."""

    op: str
    args: tuple[Expr, ...]
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def row(self) -> Op:
        """The operator's row of the table."""
        return OPS[self.op]

    def __str__(self) -> str:
        from einsumcascade.language.printer import print_expr

        return print_expr(self)


Expr: TypeAlias = Num | Var | Scalar | Read | Apply


@dataclass(frozen=True, slots=True, kw_only=True)
class Einsum:
    """`T[i, j] = expr :: op(k)  where c`: map, reduce, populate.

    Args:
        tensor: name of what is written.
        indices: index expressions on the left; rank variables, or `m1 + 1` inside an iterative block.
        expr: the mapped expression.
        reduce: name of the reduction or of the operation on whole fibers, or None where no rank is reduced.
        ranks: variables reduced, in the order of their first appearance.
        where: conditions of this Einsum alone.
    """

    tensor: str
    indices: tuple[Expr, ...]
    expr: Expr
    reduce: str | None = None
    ranks: tuple[str, ...] = ()
    where: tuple[Expr, ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def reduction(self) -> Reduction | None:
        """The row of the reduction, None for a pure map and for an operation on whole fibers."""
        return None if self.reduce is None or self.is_fiberwise else REDUCTIONS[self.reduce]

    @property
    def is_fiberwise(self) -> bool:
        """Whether this is a top-k or a solve: it takes whole fibers and no law of reductions holds for it."""
        return self.reduce in FIBERWISE

    @property
    def free(self) -> tuple[str, ...]:
        """Rank variables of the left side, in order."""
        return variables(*self.indices)

    @property
    def space(self) -> tuple[str, ...]:
        """The iteration space: variables of the left, then those reduced."""
        return self.free + tuple(r for r in self.ranks if r not in self.free)

    def __str__(self) -> str:
        from einsumcascade.language.printer import print_statement

        return print_statement(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Init:
    """`init T[.., 0, ..] = expr`: the first generation of an iterative tensor."""

    tensor: str
    indices: tuple[Expr, ...]
    expr: Expr
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def free(self) -> tuple[str, ...]:
        """Rank variables of the left side, in order."""
        return variables(*self.indices)

    def __str__(self) -> str:
        from einsumcascade.language.printer import print_statement

        return print_statement(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Iter:
    """`iter m1: ... end`: the body once for each value of an iterative rank, in order."""

    var: str
    body: tuple[Statement, ...]
    descending: bool = False
    span: Span | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        from einsumcascade.language.printer import print_statement

        return print_statement(self)


Statement: TypeAlias = Einsum | Init | Iter


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A declared input tensor and the rank variable of each axis; `is_saved`: laid out by a forward, not a caller.

    `dtype` None means that of the computation.
    """

    tensor: str
    indices: tuple[str, ...]
    is_saved: bool = field(default=False, compare=False)
    dtype: str | None = field(default=None, compare=False)
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """`const name = expr`, or `rank m1 = expr` (which defines the extent M1)."""

    name: str
    expr: Expr
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A tensor that leaves the cascade; `dtype` None means that of the first input.

    `is_saved`: it goes to a gradient, so it is float64 where the first input is.
    """

    tensor: str
    dtype: str | None = None
    is_saved: bool = field(default=False, compare=False)
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cascade:
    """A DAG of Einsums with its declarations. `str()` prints a text that parses to an equal value."""

    inputs: tuple[Input, ...]
    constants: tuple[Definition, ...] = ()
    ranks: tuple[Definition, ...] = ()
    constraints: tuple[Expr, ...] = ()
    body: tuple[Statement, ...]
    outputs: tuple[Output, ...]
    name: str = field(default="cascade", compare=False)
    source: SourceText | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        from einsumcascade.language.printer import print_cascade

        return print_cascade(self)

    @property
    def einsums(self) -> tuple[Einsum, ...]:
        """Every Einsum in order, those of iterative blocks included."""
        return tuple(s for s in walk(self.body) if isinstance(s, Einsum))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs in order."""
        return tuple(o.tensor for o in self.outputs)

    def input(self, tensor: str) -> Input | None:
        """The declaration of an input, or None."""
        return next((i for i in self.inputs if i.tensor == tensor), None)

    def constrain(self, condition: str | Mask, /, **constants: float) -> Cascade:
        """Return the cascade with one more constraint: text over its rank variables, or a mask.

        Args:
            condition: `m <= p`, or what `einsumcascade.mask` makes.
            constants: values of the constants that a text names and the cascade lacks.

        Raises: CascadeError: the text is not a condition over ranks of this cascade.
        """
        from einsumcascade.language.compose import Mask, masked
        from einsumcascade.language.parser import constrained

        if isinstance(condition, Mask):
            return masked(self, condition, constants)
        return constrained(self, condition, constants)

    def score(self, tensor: str, expression: str, /, **given: float | str | EllipsisType) -> Cascade:
        """Return the cascade with an expression of a tensor in place of what later Einsums read of it.

        Args:
            tensor: written by one Einsum; the expression calls its element by the bare name.
            expression: text over the element, its rank variables, and the names of the cascade.
            given: what else the expression names: the value of a constant, `cap=30.0`; the ranks of a new input,
                `SLOPE="h"`, or `SLOPE=...` for those that index it. An input comes after the others.

        Raises: CascadeError: the text is no expression, has a rank that the tensor lacks, or a name nobody knows.

        >>> from einsumcascade.language.parser import parse
        >>> cascade = parse("in X[h,p], Y[h,m]\\nQK[h,p,m] = X[h,p] * Y[h,m]\\nG[h,p] = QK[h,p,m] :: max(m)\\nout G")
        >>> print(cascade.score("QK", "QK + SLOPE[h] * (m - p)", SLOPE=...))
        in X[h, p], Y[h, m], SLOPE[h]
        QK[h, p, m] = X[h, p] * Y[h, m]
        S[h, p, m] = QK[h, p, m] + SLOPE[h] * (m - p)
        G[h, p] = S[h, p, m] :: max(m)
        out G
        """
        from einsumcascade.language.compose import scored

        return scored(self, tensor, expression, given)

    def over(self, variable: str, /, *tensors: str) -> Cascade:
        """Return the cascade with a batch rank, outermost, on some inputs and on all that is computed from them.

        Args:
            variable: the new rank variable, `b`.
            tensors: names of inputs that get it; none means all.

        Raises: InputError: a name is no input, or the variable has a meaning already.

        >>> from einsumcascade.language.parser import parse
        >>> print(parse("in Q[p,e], K[m,e]\\nS[p,m] = Q[p,e] * K[m,e]\\nout S").over("b", "Q"))
        in Q[b, p, e], K[m, e]
        S[b, p, m] = Q[b, p, e] * K[m, e] :: sum(e)
        out S
        """
        from einsumcascade.language.over import over

        return over(self, variable, tensors)

    def with_body(self, body: tuple[Statement, ...]) -> Cascade:
        """The same declarations over another body."""
        return replace(self, body=body)


def apply(op: str, *args: Expr) -> Apply:
    """Build an application of an operator of the table."""
    return Apply(op=op, args=args)


def walk(body: tuple[Statement, ...]) -> Iterator[Statement]:
    """Yield every statement, blocks before their bodies."""
    for s in body:
        yield s
        if isinstance(s, Iter):
            yield from walk(s.body)


def subexpressions(expr: Expr) -> Iterator[Expr]:
    """Yield `expr` and everything inside it, index expressions included, outermost first."""
    pending = [expr]
    while pending:
        e = pending.pop()
        yield e
        if isinstance(e, Apply):
            pending += reversed(e.args)
        elif isinstance(e, Read):
            pending += reversed(e.indices)


def reads(*exprs: Expr) -> tuple[Read, ...]:
    """Every distinct read, in order of appearance."""
    return tuple(dict.fromkeys(e for x in exprs for e in subexpressions(x) if isinstance(e, Read)))


def variables(*exprs: Expr) -> tuple[str, ...]:
    """Rank variables in order of first appearance."""
    return tuple(dict.fromkeys(e.name for x in exprs for e in subexpressions(x) if isinstance(e, Var)))


def scalars(*exprs: Expr) -> tuple[str, ...]:
    """Constants and extents in order of first appearance."""
    return tuple(dict.fromkeys(e.name for x in exprs for e in subexpressions(x) if isinstance(e, Scalar)))


def transform(expr: Expr, leaf: Callable[[Expr], Expr | None]) -> Expr:
    """Rebuild `expr`; wherever `leaf` returns an expression, it stands in place of that subtree."""
    new = leaf(expr)
    if new is not None:
        return new
    match expr:
        case Apply():
            return replace(expr, args=tuple(transform(a, leaf) for a in expr.args))
        case Read() if expr.indices:
            return replace(expr, indices=tuple(transform(a, leaf) for a in expr.indices))
        case _:
            return expr


def substitute(expr: Expr, values: Mapping[str, Expr]) -> Expr:
    """Replace rank variables by expressions, simultaneously."""
    return transform(expr, lambda e: values.get(e.name) if isinstance(e, Var) else None)


def rank_of(variable: str) -> str:
    """The rank (and extent) that a variable walks: `m1` -> `M1`."""
    return variable[0].upper() + variable[1:]


def variable_of(rank: str) -> str:
    """The variable of a rank: `M1` -> `m1`."""
    return rank[0].lower() + rank[1:]
