"""Operations on whole fibers: top-k and linear systems, which are neither map nor reduction.

    I[p, j] = S[p, m] :: topk(m)          positions of the largest elements, the j-th largest in slot j
    X[t, e] = solve(A[t, e, i], B[t, i])  A X = B, rows and columns of A in its last two ranks
    Y[p, d] = trisolve(L[p, m], B[m, d])  (I + L) Y = B, of L only what is below the diagonal

Row and column of a matrix have one extent, so either variable may name the rank of the right side and of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from einsumcascade.errors import Diagnostic, InputError
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Cascade, Einsum, Init, Read, Var, subexpressions, variables

SOLVE_RULE = "a system is written X[.., i, ..] = solve(A[.., i, j], B[.., j, ..]), one Einsum, nothing around it"


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveForm:
    """The ranks of a linear system.

    Args:
        row, column: variables of the last two ranks of the matrix.
        right: which of the two the right side has.
        result: which of the two the left side has.
    """

    row: str
    column: str
    right: str
    result: str


def solve_form(e: Einsum) -> SolveForm | None:
    """Return the ranks of a `solve` or `trisolve`, None if it is not of the form that the language takes."""
    if not (isinstance(e.expr, Apply) and e.expr.row.fiberwise):
        return None
    matrix, right = e.expr.args
    if not (isinstance(matrix, Read) and len(matrix.indices) > 1):
        return None
    row, column = matrix.indices[-2:]
    if not (isinstance(row, Var) and isinstance(column, Var)) or row == column:
        return None
    if {row.name, column.name} & set(variables(*matrix.indices[:-2])):
        return None
    both = (row.name, column.name)
    given = [v for v in both if v in variables(right)]
    found = [v for v in both if v in e.free]
    if len(given) != 1 or len(found) != 1 or len(e.ranks) != 1:
        return None
    return SolveForm(row=row.name, column=column.name, right=given[0], result=found[0])


def slot_of(e: Einsum) -> str:
    """Return the variable of the rank that a checked top-k writes its positions along."""
    return next(v for v in e.free if v not in variables(e.expr))


def check_fiberwise(s: Einsum | Init) -> Iterator[Diagnostic]:
    """Yield what is wrong with an operation on whole fibers, or with where it stands."""
    alone = isinstance(s, Einsum) and isinstance(s.expr, Apply) and s.expr.row.fiberwise
    inside = [*subexpressions(s.expr)][1:] if alone else [*subexpressions(s.expr)]
    for e in (*inside, *(x for c in (s.where if isinstance(s, Einsum) else ()) for x in subexpressions(c))):
        if isinstance(e, Apply) and e.row.fiberwise:
            yield Diagnostic(
                code="solve-form",
                headline=f"{e.op} stands inside another expression",
                span=e.span,
                rule=SOLVE_RULE,
                hint="give its result a name by an Einsum of its own",
            )
    if not isinstance(s, Einsum):
        return
    if alone and solve_form(s) is None:
        yield Diagnostic(
            code="solve-form",
            headline=f"the ranks of {s.expr} do not make a linear system for {s.tensor}",
            span=s.span,
            rule=SOLVE_RULE,
            hint="the last two ranks of A are plain variables; B and the left side have one of them each",
        )
    if s.reduce == "topk":
        slots = [v for v in s.free if v not in variables(s.expr)]
        if len(s.ranks) != 1 or len(slots) != 1:
            new = ", ".join(slots) or "none"
            yield Diagnostic(
                code="topk-form",
                headline=f"a top-k over {', '.join(s.ranks)} with {new} new on the left",
                span=s.span,
                rule="a top-k reduces one rank and writes positions along one new one",
                hint="I[p, j] = S[p, m] :: topk(m), with `rank j = 4`",
            )


def check_extents(cascade: Cascade, binding: Binding) -> None:
    """Check what operations on whole fibers ask of extents.

    Raises: InputError: `topk-length`, more slots than elements; `not-square`, a matrix of two extents.
    """
    problems = []
    for e in cascade.einsums:
        if e.reduce == "topk":
            slot, (rank,) = slot_of(e), e.ranks
            if binding.extent(slot) > binding.extent(rank):
                problems.append(
                    Diagnostic(
                        code="topk-length",
                        headline=f"{e.tensor} takes the {binding.extent(slot)} largest of {binding.extent(rank)}",
                        span=e.span,
                        rule="a top-k takes at most as many elements as its rank has",
                        hint=f"a smaller extent of {slot}, or a longer {rank}",
                    )
                )
        elif (form := solve_form(e)) is not None and binding.extent(form.row) != binding.extent(form.column):
            rows, columns = binding.extent(form.row), binding.extent(form.column)
            problems.append(
                Diagnostic(
                    code="not-square",
                    headline=f"the matrix of {e.tensor} has {rows} rows and {columns} columns",
                    span=e.span,
                    rule="a linear system has a square matrix",
                    hint=f"give {form.row} and {form.column} one extent",
                )
            )
    if problems:
        raise InputError(diagnostics=tuple(problems), source=cascade.source)
