"""What a kernel must be told: extents as arguments, sizes and constants that its text fixes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from einsumcascade.codegen.kernel_ir import Axis, Stmt, expressions
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Cascade, Definition, Read, Scalar, rank_of, scalars, subexpressions


def names_used(statements: tuple[Stmt, ...]) -> set[str]:
    """Scalars and values that some statements name."""
    everything = (x for e in expressions(statements) for x in subexpressions(e))
    return {x.name if isinstance(x, Scalar) else x.tensor for x in everything if isinstance(x, Scalar | Read)}


def constants_used(
    cascade: Cascade, used: set[str], fixed: Mapping[str, int], binding: Binding
) -> tuple[tuple[Definition, ...], dict[str, float]]:
    """Constants that are needed, in order, and the values of those that no length enters."""
    wanted = set(used)
    for c in reversed(cascade.constants):
        if c.name in wanted:
            wanted |= set(scalars(c.expr))
    kept = tuple(c for c in cascade.constants if c.name in wanted)
    known = set(fixed)
    values: dict[str, float] = {}
    for c in kept:
        if set(scalars(c.expr)) <= known:
            known.add(c.name)
            values[c.name] = binding.constants[c.name]
    return kept, values


def extents_used(
    cascade: Cascade, used: Iterable[str], axes: Mapping[str, Axis], batch: tuple[str, ...], binding: Binding
) -> tuple[str, ...]:
    """Extents that a kernel names, those of its grid first."""
    wanted = dict.fromkeys(rank_of(v) for v in (*batch, *(a for a in axes if axes[a].role == "grid")))
    wanted |= dict.fromkeys(sorted(n for n in used if n[0].isupper()))
    for d in reversed(cascade.ranks):
        if rank_of(d.name) in wanted:
            wanted |= dict.fromkeys(n for n in scalars(d.expr) if n[0].isupper())
    return tuple(n for n in wanted if n in binding.extents)
