"""From a cascade to its program: what a text may fix of a cascade, and the rewrites before its kernels are placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from einsumcascade.errors import ScheduleError, nearest
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade, Definition, Num, Scalar, rank_of, variable_of
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.distribute import distribute
from einsumcascade.rewrites.shifted import recompute_shifted
from einsumcascade.rewrites.split_form import features_last, split_form
from einsumcascade.rewrites.unroll import unroll
from einsumcascade.schedules.pack import pack_program
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.program import Program, bounded_variables
from einsumcascade.schedules.schedule import SCATTERS, SUMS, Schedule

# A length in the text of a kernel: longer than any rank that a tile holds whole.
LENGTH = 1 << 20


def with_constants(cascade: Cascade, constants: Mapping[str, float]) -> Cascade:
    """Put values in place of declared constants, so that facts such as signs are those of the values."""
    if not constants:
        return cascade
    return replace(
        cascade,
        constants=tuple(
            Definition(name=c.name, expr=Num(value=constants[c.name]), span=c.span) if c.name in constants else c
            for c in cascade.constants
        ),
    )


def with_extents(cascade: Cascade, extents: Mapping[str, int]) -> Cascade:
    """Put extents in place of the definitions of the ranks that they name."""
    return replace(
        cascade,
        ranks=tuple(
            Definition(name=d.name, expr=Num(value=extents[rank_of(d.name)]), span=d.span)
            if rank_of(d.name) in extents
            else d
            for d in cascade.ranks
        ),
    )


def text_binding(cascade: Cascade, extents: Mapping[str, int]) -> Binding:
    """Bind what may enter a text: extents of feature ranks, 64 where nothing says; every length counts as unbounded.

    Raises: InputError: an extent names no rank of the cascade, or is not a whole number >= 0.
    """
    features = feature_ranks(cascade)
    named = [rank_of(v) for i in cascade.inputs for v in i.indices]
    told = {rank_of(d.name): int(d.expr.value) for d in cascade.ranks if isinstance(d.expr, Num)}
    given = {r: extents.get(r, told.get(r, 64)) if r in features else LENGTH for r in named}
    return bind(cascade, extents={**{r: n for r, n in extents.items() if r not in given}, **given})


@lru_cache(maxsize=256)
def feature_ranks(cascade: Cascade) -> tuple[str, ...]:
    """Ranks whose extent a text may fix, by the layout of the inputs: see `bounded_variables`."""
    return tuple(
        rank_of(v)
        for v in bounded_variables(cascade, {rank_of(v): 1 for i in cascade.inputs for v in i.indices})
        if any(v in i.indices for i in cascade.inputs)
    )


def program_of(cascade: Cascade, extents: Mapping[str, int], form: Schedule | None = None) -> Program:
    """The kernels of a cascade, of the form that a schedule asks for; cached by the extents that matter."""
    form = form or Schedule()
    known = {v for e in cascade.einsums for v in e.ranks}
    for v in form.split:
        if v not in known:
            raise ScheduleError.of(
                "schedule-illegal",
                f"the schedule splits '{v}', which no Einsum reduces",
                rule="split names variables of ranks that are reduced",
                hint=nearest(v, sorted(known)),
            )
    sizes = tuple(sorted(text_binding(cascade, extents).extents.items()))
    options = (form.reference, tuple(form.split.items()), form.scatter, form.sums)
    program = _program(cascade, cascade.name, sizes, *options)
    return pack_program(program, form.pack)


@lru_cache(maxsize=256)
def _program(
    cascade: Cascade,
    name: str,
    extents: tuple[tuple[str, int], ...],
    reference: str,
    split: tuple[tuple[str, int], ...],
    scatter: str,
    sums: str,
) -> Program:
    # Cascades are equal whatever they are called, but their kernels are not: the name is part of the key.
    assert name == cascade.name
    # An output that is an input needs no kernel.
    given = {i.tensor for i in cascade.inputs}
    written = tuple(o for o in cascade.outputs if o.tensor not in given)
    bound = dict(extents) if reference == "bound" else None
    whole = bounded_variables(cascade, dict(extents))
    simple = simplify(replace(cascade, outputs=written), bound=bound, whole=whole).cascade
    simple = unroll(simple, extents=dict(extents)).cascade
    for v, parts in split:
        simple = split_form(simple, variable=v, parts=parts).cascade
    if split:
        # Programs that write and read states of parts walk their features in one run.
        simple = features_last(simple, whole)
    bounded = bounded_variables(simple, dict(extents))
    simple = distribute(simple, bounded=bounded).cascade
    known = {d.name for d in simple.ranks}
    simple = recompute_shifted(simple, kept=lambda e: bool(set(e.ranks) - set(bounded))).cascade
    # A rank of its own that a definition written again walks is bounded where that of its size is.
    own = {d.name: d.expr for d in simple.ranks if d.name not in known}
    bounded += tuple(v for v, size in own.items() if isinstance(size, Scalar) and variable_of(size.name) in bounded)
    return partition(simple, bounded=bounded, scatters=scatter == SCATTERS[0], accumulates=sums == SUMS[1])
