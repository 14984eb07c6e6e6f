"""The forms of a program that the tuner tries, and the search space of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.defaults import call_schedule
from einsumcascade.codegen.dtypes import DTYPE_BYTES
from einsumcascade.codegen.programs import program_of
from einsumcascade.errors import EinsumCascadeError
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade
from einsumcascade.schedules.calls import ROWS
from einsumcascade.schedules.heuristic import default_schedule
from einsumcascade.schedules.pack import packings
from einsumcascade.schedules.parts import in_fixed_order
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.schedule import SUMS, Schedule
from einsumcascade.schedules.space import Space, search_space


def spaces_of(
    cascade: Cascade,
    extents: Mapping[str, int],
    features: Mapping[str, int],
    dtype: str,
    target: GpuTarget,
    *,
    is_backward: bool = False,
    precision: str = "ieee",
) -> list[Space]:
    """The search spaces of every form of the program, that of a call without tuning first.

    Args:
        extents: of all ranks of the inputs. features: of those that enter a text.
        is_backward: whether it is the gradient of an op, whose schedule says how its sums are added up and no more.
        precision: of float32 products.
    """
    options: dict[str, Any] = {"extents": extents, "dtype_bytes": DTYPE_BYTES[dtype], "target": target}
    ordered = torch.are_deterministic_algorithms_enabled()
    plain = in_fixed_order(None) if ordered else Schedule()
    usual = program_of(cascade, features, plain)
    called = None if is_backward else call_schedule(cascade, extents, dtype, target, precision)
    forms = [*(() if called is None else (called,)), plain]
    forms += [replace(plain, sums=SUMS[1])] if not ordered else []
    if not is_backward:
        forms += _forward_forms(cascade, usual, extents, features, dtype, target, plain)
    spaces: list[Space] = []
    seen: set[str] = set()
    for form in forms:
        try:
            program = program_of(cascade, features, form)
            if str(program) not in seen:
                seen.add(str(program))
                spaces.append(search_space(program, form=form, precision=precision, **options))
        except EinsumCascadeError:
            if form == plain:
                raise
            # A form that this cascade has not.
    return spaces


def _forward_forms(
    cascade: Cascade,
    program: Program,
    extents: Mapping[str, int],
    features: Mapping[str, int],
    dtype: str,
    target: GpuTarget,
    plain: Schedule,
) -> Iterator[Schedule]:
    """Forms of a forward worth trying: a bound for a maximum, packing of few queries, split-K of few programs."""
    if dtype == "bfloat16":
        yield replace(plain, reference="bound")
    binding = bind(program.cascade, extents=extents)
    pairs = [(v, w) for k in program.kernels if k.loops for v, w, _ in packings(k, program.bounded)]
    few = [(v, w) for v, w in dict.fromkeys(pairs) if v == w or binding.extent(w) <= ROWS[-1]]
    for form in (plain, *(replace(plain, pack={v: w}) for v, w in few)):
        packed = program_of(cascade, features, form)
        if form != plain:
            yield form
        yield from _splits(packed, form, bind(packed.cascade, extents=extents), dtype, target)


def _splits(program: Program, form: Schedule, binding: Binding, dtype: str, target: GpuTarget) -> Iterator[Schedule]:
    """Parts of a rank that give every multiprocessor about one program, where programs are few."""
    default = default_schedule(program, extents=binding.extents, dtype_bytes=DTYPE_BYTES[dtype], target=target)
    for k in program.kernels:
        if len(k.loops) != 1:
            continue
        tiles = default.kernels[k.name].tiles
        programs = math.prod(-(-binding.extent(v) // tiles.get(v, 1)) for v in k.residents)
        if programs > target.multiprocessors // 2:
            continue
        steps = -(-binding.extent(k.loops[0]) // max(1, tiles.get(k.loops[0], 1)))
        wanted = 1 << (target.multiprocessors // max(programs, 1)).bit_length()
        most = 1 << max(steps, 1).bit_length() - 1
        for parts in dict.fromkeys((min(wanted // 2, most), min(wanted, most))):
            if parts > 1:
                yield replace(form, split={k.loops[0]: parts})
