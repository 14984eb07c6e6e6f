"""The forms of a program that the tuner tries, and the search space of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.launch import DTYPE_BYTES, program_of
from einsumcascade.errors import EinsumCascadeError
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.schedules.heuristic import default_schedule
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
) -> list[Space]:
    """The search spaces of every form of the program, the plain one first.

    Args:
        extents: of all ranks of the inputs. features: of those that enter a text.
        is_backward: whether it is the gradient of an op, whose schedule says how its sums are added up and no more.
    """
    options: dict[str, Any] = {"extents": extents, "dtype_bytes": DTYPE_BYTES[dtype], "target": target}
    ordered = torch.are_deterministic_algorithms_enabled()
    plain = in_fixed_order(None) if ordered else Schedule()
    spaces = [search_space(program_of(cascade, features, plain), form=plain, **options)]
    seen = {str(spaces[0].program)}
    forms = [replace(plain, sums=SUMS[1])] if not ordered else []
    if not is_backward:
        forms += _forward_forms(spaces[0].program, extents, dtype, target, plain)
    for form in forms:
        try:
            program = program_of(cascade, features, form)
            if str(program) not in seen:
                seen.add(str(program))
                spaces.append(search_space(program, form=form, **options))
        except EinsumCascadeError:
            # A form that this cascade has not.
            continue
    return spaces


def _forward_forms(
    program: Program, extents: Mapping[str, int], dtype: str, target: GpuTarget, plain: Schedule
) -> Iterator[Schedule]:
    """Forms of a forward worth trying: a bound instead of a running maximum, and split-K where programs are few."""
    if dtype == "bfloat16":
        yield replace(plain, reference="bound")
    binding = bind(program.cascade, extents=extents)
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
                yield replace(plain, split={k.loops[0]: parts})
