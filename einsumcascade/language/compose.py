"""Change a cascade without editing its text: another score, and masks that are joined before they constrain."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from types import EllipsisType
from typing import NoReturn

from lark import Tree
from lark.exceptions import UnexpectedInput

from einsumcascade.errors import CascadeError, Diagnostic, InputError, SourceText, nearest
from einsumcascade.language.check import check
from einsumcascade.language.ir import (
    Cascade,
    Definition,
    Einsum,
    Expr,
    Init,
    Input,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    scalars,
    subexpressions,
    transform,
    variables,
    walk,
)
from einsumcascade.language.parser import conditions_of
from einsumcascade.language.syntax import Mistake, grammar, limit_depth, parse_line, syntax_mistake
from einsumcascade.language.terms import Names, conjuncts, expression, number

# --- masks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mask:
    """A condition on rank variables, joined with others by `&`, `|` and `~`; see `mask`.

    Args:
        text: the condition as given; empty for a joined mask.
        constants: the values of the constants that the text names, in order.
        op: "and", "or" or "not" of `parts`; empty for a text.
        parts: the masks that are joined.
    """

    text: str = ""
    constants: tuple[tuple[str, int | float], ...] = ()
    op: str = ""
    parts: tuple[Mask, ...] = ()

    def __and__(self, other: Mask) -> Mask:
        return Mask(op="and", parts=(self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Mask(op="or", parts=(self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Mask(op="not", parts=(self,))

    def __bool__(self) -> NoReturn:
        raise InputError.of(
            "mask-truth",
            f"the mask '{self}' is neither true nor false",
            rule="a mask holds for some points and not for others; Python's and, or, not need one answer",
            hint="masks are joined by &, | and ~",
        )

    def __str__(self) -> str:
        match self.op:
            case "":
                return self.text
            case "not":
                return f"not ({self.parts[0]})"
            case _:
                return f" {self.op} ".join(f"({p})" for p in self.parts)


def mask(condition: str, /, **constants: float) -> Mask:
    """Make a mask of a condition over rank variables, given as text.

    Args:
        condition: `m <= p`; several with commas all hold. Names are looked up in the cascade that it constrains.
        constants: values of the constants that the text names and the cascade lacks.

    Returns: a value that `&`, `|` and `~` join, and that `Cascade.constrain` and `flex_attention` take.
    Raises: CascadeError: the text cannot be read, or a constant is no number.

    >>> print(mask("m <= p") & (mask("p - m < w", w=128) | mask("m < s", s=4)))
    (m <= p) and ((p - m < w) or (m < s))
    """
    try:
        if condition.strip():
            parse_line("constraint " + condition, 1, column=-len("constraint "))
        values = tuple((name, number(name, value)) for name, value in constants.items())
    except Mistake as m:
        raise CascadeError(
            diagnostics=(m.diagnostic,), source=SourceText(text=condition, name="<constraint>")
        ) from None
    return Mask(text=condition, constants=values)


def masked(cascade: Cascade, mask: Mask, constants: Mapping[str, float]) -> Cascade:
    """Add the constraint of a mask, and constants that its texts lack.

    A constant that has a name of the cascade, or another value elsewhere in the mask, gets a number behind its name.

    Raises: CascadeError: a text of the mask is no condition over ranks of the cascade, with its place in that text.
    """
    try:
        common = {name: number(name, value) for name, value in constants.items()}
    except Mistake as m:
        raise CascadeError(diagnostics=(m.diagnostic,)) from None
    cascade = _constrained(cascade, (), common)
    taken = {c.name for c in cascade.constants}
    values: dict[str, int | float] = {}

    def condition(part: Mask) -> Expr:
        if part.op:
            parts = [condition(p) for p in part.parts]
            return apply(part.op, *parts)
        chosen = {name: _free(name, value, taken, values) for name, value in part.constants}
        values.update({chosen[name]: value for name, value in part.constants})
        source = SourceText(text=part.text, name="<constraint>")
        try:
            found = conditions_of(part.text, Names.of(cascade, constants=chosen))
        except Mistake as m:
            raise CascadeError(diagnostics=(m.diagnostic,), source=source) from None
        renamed = [transform(c, lambda e: _renamed(e, chosen)) for c in found]
        problems = list(check(_constrained(cascade, tuple(renamed), values)))
        if problems:
            raise CascadeError(diagnostics=tuple(problems), source=source)
        out = renamed[0]
        for c in renamed[1:]:
            out = apply("and", out, c)
        return out

    return _constrained(cascade, conjuncts([condition(mask)]), values)


def _constrained(cascade: Cascade, conditions: tuple[Expr, ...], values: Mapping[str, int | float]) -> Cascade:
    return replace(
        cascade,
        constants=cascade.constants + tuple(Definition(name=k, expr=Num(value=v)) for k, v in values.items()),
        constraints=cascade.constraints + conditions,
    )


def _free(name: str, value: float, taken: set[str], values: Mapping[str, float]) -> str:
    """The name of a constant, numbered where a value of another mask or of the cascade has it."""
    found, n = name, 2
    while found in taken or values.get(found, value) != value:
        found, n = f"{name}{n}", n + 1
    return found


def _renamed(e: Expr, names: Mapping[str, str]) -> Expr | None:
    if isinstance(e, Scalar) and names.get(e.name, e.name) != e.name:
        return replace(e, name=names[e.name])
    return None


# --- scores -----------------------------------------------------------------------------------------------------


def scored(cascade: Cascade, tensor: str, text: str, given: Mapping[str, float | str | EllipsisType]) -> Cascade:
    """Put an expression in place of a tensor; see `Cascade.score`."""
    source = SourceText(text=text, name="<score>")
    try:
        values = {k: number(k, v) for k, v in given.items() if not isinstance(v, str | EllipsisType)}
        wanted = {k: v for k, v in given.items() if isinstance(v, str | EllipsisType)}
        tree = grammar().parse(text, start="expr")
        limit_depth(tree)
        subtrees = tree.iter_subtrees() if isinstance(tree, Tree) else ()
        indexed = {str(t.children[0]) for t in subtrees if t.data == "read"}
        names = Names.of(cascade, tensors=wanted, constants=values)
        names.indexed |= indexed & wanted.keys()
        expr = expression(tree, names)
        inputs = tuple(_declared(cascade, name, how, expr) for name, how in wanted.items())
    except UnexpectedInput as error:
        raise CascadeError(diagnostics=(syntax_mistake(error, text, 1, 0).diagnostic,), source=source) from None
    except Mistake as m:
        raise CascadeError(diagnostics=(m.diagnostic,), source=source) from None
    for name in given:
        if name not in {r.tensor for r in reads(expr)} | set(scalars(expr)):
            problem = Diagnostic(
                code="unknown-name",
                headline=f"the score of {tensor} does not use '{name}'",
                rule="a keyword gives a constant its value, or a new input its ranks",
                hint=nearest(name, sorted({r.tensor for r in reads(expr)} | set(scalars(expr)))),
            )
            raise CascadeError(diagnostics=(problem,), source=source)
    constants = tuple(Definition(name=k, expr=Num(value=v)) for k, v in values.items())
    return with_score(cascade, tensor, expr, inputs=inputs, constants=constants, source=source)


def with_score(
    cascade: Cascade,
    tensor: str,
    expr: Expr,
    *,
    inputs: tuple[Input, ...] = (),
    constants: tuple[Definition, ...] = (),
    parts: tuple[Einsum, ...] = (),
    source: SourceText | None = None,
) -> Cascade:
    """Write a new tensor after `tensor`, and let later statements read it instead.

        QK[p,m] = ...; GM[p] = QK[p,m] :: max(m)   ->   QK[p,m] = ...; S[p,m] = 2 * QK[p,m]; GM[p] = S[p,m] :: max(m)

    Args:
        expr: of the new tensor's elements; `tensor` without indices is its element.
        inputs, constants: what `expr` reads and the cascade lacks.
        parts: Einsums that it reads, written before it.
        source: the text of `expr`, for messages.

    Raises: CascadeError: `unknown-tensor`; `score-target`: more than one Einsum writes it, or not by plain ranks;
        `score-rank`: the expression has a rank variable that the tensor lacks; whatever `check` finds.
    """
    writer = _writer(cascade, tensor)
    element = Read(tensor=tensor, indices=writer.indices)

    def bare(e: Expr) -> Expr | None:
        return element if isinstance(e, Read) and e.tensor == tensor and not e.indices else None

    expr = transform(expr, bare)
    stray = [v for v in variables(expr) if v not in writer.free]
    if stray:
        place = next(e for e in subexpressions(expr) if isinstance(e, Var) and e.name == stray[0])
        _refuse(
            "score-rank",
            f"{stray[0]} is no rank of {element}",
            source,
            place,
            rule="a score is an expression of one element and its rank variables; nothing is reduced in it",
            hint="its rank variables are " + ", ".join(writer.free),
        )
    name = _fresh(cascade, tensor)
    new = Einsum(tensor=name, indices=writer.indices, expr=expr)

    def later(e: Expr) -> Expr | None:
        if isinstance(e, Read) and e.tensor == tensor:
            return replace(e, tensor=name, indices=tuple(transform(i, later) for i in e.indices))
        return None

    seen = False

    def rewritten(s: Statement) -> tuple[Statement, ...]:
        nonlocal seen
        if isinstance(s, Iter):
            return (replace(s, body=tuple(x for inner in s.body for x in rewritten(inner))),)
        if s is writer:
            seen = True
            return s, *(replace(p, expr=transform(p.expr, bare)) for p in parts), new
        if not seen:
            return (s,)
        s = replace(s, expr=transform(s.expr, later))
        return (replace(s, where=tuple(transform(c, later) for c in s.where)) if isinstance(s, Einsum) else s,)

    changed = replace(
        cascade,
        inputs=cascade.inputs + inputs,
        constants=cascade.constants + constants,
        body=tuple(x for s in cascade.body for x in rewritten(s)),
        source=None,
    )
    problems = list(check(changed))
    if problems:
        raise CascadeError(diagnostics=tuple(problems), source=source)
    return changed


def _writer(cascade: Cascade, tensor: str) -> Einsum:
    writers = [s for s in walk(cascade.body) if isinstance(s, Einsum | Init) and s.tensor == tensor]
    if not writers:
        known = [e.tensor for e in cascade.einsums]
        _refuse(
            "unknown-tensor",
            f"no Einsum writes '{tensor}'",
            None,
            None,
            rule="a score is what one Einsum writes",
            hint=nearest(tensor, known),
        )
    first, *others = writers
    if others or isinstance(first, Init) or not all(isinstance(i, Var) for i in first.indices):
        _refuse(
            "score-target",
            f"{tensor} is not written by one Einsum over plain ranks",
            None,
            None,
            rule="what is put in place of a score stands after the one Einsum that writes it, element by element",
            hint="change the text",
        )
    return first


def _declared(cascade: Cascade, name: str, how: str | EllipsisType, expr: Expr) -> Input:
    """The declaration of a new input: ranks as given, else those that index it, and new ones where no rank does."""
    if not re.fullmatch(r"[A-Z][A-Za-z0-9_]*", name):
        raise Mistake("syntax", f"'{name}' is no name of an input", None, rule="tensors are upper-case names")
    if isinstance(how, str):
        return Input(tensor=name, indices=tuple(v.strip() for v in how.split(",")) if how.strip() else ())
    known = {v for i in cascade.inputs for v in i.indices} | {d.name for d in cascade.ranks}
    found = [r for r in reads(expr) if r.tensor == name]
    indices: list[str] = []
    for n in range(max((len(r.indices) for r in found), default=0)):
        at = {r.indices[n] for r in found if n < len(r.indices)}
        v = next(iter(at))
        if len(at) == 1 and isinstance(v, Var) and v.name in known and v.name not in indices:
            indices.append(v.name)
        else:
            indices.append(new_rank(cascade, indices))
    return Input(tensor=name, indices=tuple(indices))


def new_rank(cascade: Cascade, also: Collection[str] = ()) -> str:
    """A rank variable that neither the cascade nor `also` has: x, y, z, x2, ..."""
    taken = {v for i in cascade.inputs for v in i.indices} | {v for e in cascade.einsums for v in e.space}
    taken |= {d.name for d in (*cascade.ranks, *cascade.constants)} | set(also)
    tensors = {i.tensor for i in cascade.inputs} | {e.tensor for e in cascade.einsums}
    names = (f"{v}{n}" if n > 1 else v for n in count(1) for v in "xyz")
    return next(v for v in names if v not in taken and rank_of(v) not in tensors)


def _fresh(cascade: Cascade, tensor: str) -> str:
    """A name for the new score: S, else the old one's with a number."""
    taken = {i.tensor for i in cascade.inputs} | {s.tensor for s in walk(cascade.body) if not isinstance(s, Iter)}
    taken |= {rank_of(v) for v in (*(v for i in cascade.inputs for v in i.indices), *(d.name for d in cascade.ranks))}
    return next(name for name in chain("S", (f"{tensor}{n}" for n in count(2))) if name not in taken)


def _refuse(
    code: str, headline: str, source: SourceText | None, place: Expr | None, *, rule: str, hint: str
) -> NoReturn:
    span = place.span if place is not None else None
    raise CascadeError.of(code, headline, span=span, rule=rule, hint=hint, source=source)
