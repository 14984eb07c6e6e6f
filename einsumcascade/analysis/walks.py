"""How each statement walks the axes of what it reads and writes: in step with a loop, at a fixed place, anyhow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from einsumcascade.analysis.dependence import canonical_sizes, linear, reads_of, split_index
from einsumcascade.language.fiberwise import slot_of, solve_form
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    variables,
)


class Step(Enum):
    """How an index moves with the rank variables in it."""

    EXACT = "one coordinate for each: `m`, `m + 1`, the tiles `m1*M0 + m0`"
    SLOW = "one coordinate for several that follow each other: `h // G`"
    FIXED = "one coordinate for all"
    ANY = "no rule: a gather, a window, a reversed rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """How one access walks one axis.

    Args:
        step: how the index moves.
        variables: rank variables in the index; of a partition the outer ones first.
        shift: the constant that is added, 0 where the step is not exact.
        index: the index as text.
    """

    step: Step
    variables: tuple[str, ...]
    shift: int = 0
    index: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A statement as the loops around it see it.

    Args:
        tensor: what it writes.
        is_init: whether it writes a first generation.
        space: rank variables it walks; an operation on whole fibers does not walk those fibers.
        reduced: those of them that it reduces.
        written: how it walks each axis of what it writes.
        reads: tensor and walks of each of its reads.
        ways: 1 or -1 for the variable of each iterative block around it, upwards or downwards.
    """

    tensor: str
    is_init: bool
    space: tuple[str, ...]
    reduced: tuple[str, ...]
    written: tuple[Walk, ...]
    reads: tuple[tuple[str, tuple[Walk, ...]], ...]
    ways: Mapping[str, int]


def lines(cascade: Cascade) -> tuple[Line, ...]:
    """Describe every statement of a cascade, in order.

    Cost: O(Einsums + accesses).
    >>> from einsumcascade.language.parser import parse
    >>> found = lines(parse("in X[g, m]\\nrank h = 2*G\\nY[h, m] = X[h//2, m]\\nout Y"))
    >>> [(w.step.name, w.variables) for w in found[0].reads[0][1]]
    [('SLOW', ('h',)), ('EXACT', ('m',))]
    """
    sizes = canonical_sizes(cascade)
    out: list[Line] = []

    def visit(body: tuple[Statement, ...], ways: Mapping[str, int]) -> None:
        for s in body:
            if isinstance(s, Iter):
                visit(s.body, {**ways, s.var: -1 if s.descending else 1})
            else:
                out.append(_line(cascade, s, ways, sizes))

    visit(cascade.body, {})
    return tuple(out)


def _line(cascade: Cascade, s: Einsum | Init, ways: Mapping[str, int], sizes: Mapping[str, str]) -> Line:
    taken: tuple[str, ...] = ()
    if isinstance(s, Einsum) and s.is_fiberwise:
        form = solve_form(s)
        taken = (slot_of(s),) if form is None else (form.row, form.column)

    def walk(index: Expr) -> Walk:
        found = _walk(index, sizes)
        if set(taken) & set(found.variables):
            return Walk(step=Step.ANY, variables=found.variables, index=found.index)
        return found

    reads: list[Read] = list(reads_of(cascade, s))
    space = s.space if isinstance(s, Einsum) else s.free
    return Line(
        tensor=s.tensor,
        is_init=isinstance(s, Init),
        space=tuple(v for v in space if v not in taken),
        reduced=tuple(v for v in s.ranks if v not in taken) if isinstance(s, Einsum) else (),
        written=tuple(walk(i) for i in s.indices),
        reads=tuple((r.tensor, tuple(walk(i) for i in r.indices)) for r in reads),
        ways=ways,
    )


def _walk(index: Expr, sizes: Mapping[str, str]) -> Walk:
    names, text = variables(index), str(index)
    if not names:
        # A number in memory decides: anywhere.
        fixed = linear(index) is not None
        return Walk(step=Step.FIXED if fixed else Step.ANY, variables=(), index=text)
    match index:
        case Apply(op="floordiv", args=(Var(), Scalar() | Num())):
            return Walk(step=Step.SLOW, variables=names, index=text)
    terms = linear(index)
    moving = [t for t in terms or () if t.variable]
    fixed_terms = [t for t in terms or () if not t.variable]
    shift = sum(t.number for t in fixed_terms)
    if moving and not any(t.factors for t in fixed_terms):
        if len(moving) == 1 and moving[0].number == 1 and not moving[0].factors:
            return Walk(step=Step.EXACT, variables=names, shift=shift, index=text)
        parts = split_index(index, sizes)
        if parts is not None and not shift:
            return Walk(step=Step.EXACT, variables=parts, index=text)
    return Walk(step=Step.ANY, variables=names, index=text)
