"""The schedule by rule is legal for every cascade and keeps within registers and shared memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.gallery import header, load, names
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import rank_of
from einsumcascade.language.parser import constrained, parse
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.schedules.heuristic import ELEMENTS_A_THREAD, default_schedule
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.program import Program, bounded_variables
from einsumcascade.schedules.schedule import Schedule, check_schedule, tiled_variables
from tests.strategies import Case, cases

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def planned(cascade: object, extents: dict[str, int], target: str, dtype_bytes: int) -> tuple[Program, Schedule]:
    simple = simplify(cascade).cascade  # type: ignore[arg-type]
    bound = bind(simple, extents=extents)
    program = partition(simple, bounded=bounded_variables(simple, bound.extents))
    return program, default_schedule(program, extents=bound.extents, dtype_bytes=dtype_bytes, target=gpu_target(target))


@settings(max_examples=80)
@given(
    cases(), st.sampled_from(TARGETS), st.sampled_from((2, 4)), st.sampled_from((16, 64, 80, 128, 192, 256, 320, 576))
)
def test_the_default_is_legal(case: Case, target: str, dtype_bytes: int, feature: int) -> None:
    extents = {r: feature if r in "EFJ" else 4096 for r in case.extents}
    program, schedule = planned(case.cascade, extents, target, dtype_bytes)
    check_schedule(program, schedule)
    for k in program.kernels:
        assert set(schedule.kernels[k.name].tiles) == set(tiled_variables(program, k.name))


@pytest.mark.parametrize("name", [name for name in names() if header(name).kernel == "yes"])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_stages_of_streamed_tiles_fit_into_half_of_the_shared_memory(name: str, dtype_bytes: int) -> None:
    """Tiles of a looped rank and feature ranks, such as those of keys and values."""
    cascade = load(name)
    extents = {rank_of(v): 128 if v in "ef" else 4096 for i in cascade.inputs for v in i.indices}
    sizes = bind(cascade, extents=extents).extents
    for target in TARGETS:
        program, schedule = planned(cascade, extents, target, dtype_bytes)
        for k in program.kernels:
            s = schedule.kernels[k.name]
            for v in set(s.tiles) & set(k.loops):
                others = [set(i.indices) - {v} for i in k.cascade.inputs if v in i.indices]
                rows = [
                    math.prod(sizes[rank_of(x)] for x in o & set(program.bounded))
                    for o in others
                    if not o & set(s.tiles)
                ]
                streamed = s.tiles[v] * sum(n for n in rows if n > 1) * dtype_bytes
                assert s.stages == 1 or s.stages * streamed <= gpu_target(target).shared_memory_bytes // 2


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("e", "f"), [(192, 128), (256, 256), (320, 320), (576, 512), (576, 64), (64, 576)])
def test_tiles_of_wide_heads_fit_into_shared_memory(e: int, f: int, target: str) -> None:
    extents = {"B": 1, "H": 8, "P": 4096, "M": 4096, "E": e, "F": f}
    (s,) = planned(load("softmax_attention"), extents, target, 2)[1].kernels.values()
    held = 2 * (s.tiles["p"] * e + s.stages * s.tiles["m"] * (e + f))
    assert held <= gpu_target(target).shared_memory_bytes


def test_a_temporary_of_three_axes_fits_into_registers() -> None:
    cascade = parse("in QK[p,m], V[m,f]\nO[p,f] = QK[p,m] + V[m,f] :: max(m)\nout O\n")
    target = gpu_target("cuda:90")
    program, schedule = planned(cascade, {"P": 4096, "M": 4096, "F": 64}, "cuda:90", 2)
    (s,) = schedule.kernels.values()
    assert s.tiles["p"] * s.tiles["m"] * 64 <= ELEMENTS_A_THREAD * target.warp_size * s.warps
    assert program.kernels[0].loops == ("m",)


def test_exact_products_of_float32_keep_tiles_small() -> None:
    extents = {"B": 1, "H": 8, "P": 4096, "M": 4096, "E": 64, "F": 64}
    (wide,) = planned(load("softmax_attention"), extents, "cuda:90", 2)[1].kernels.values()
    (exact,) = planned(load("softmax_attention"), extents, "cuda:90", 4)[1].kernels.values()
    assert max(exact.tiles.values()) < max(wide.tiles.values())


def test_the_same_arguments_give_the_same_schedule() -> None:
    extents = {"B": 1, "H": 8, "P": 4096, "M": 4096, "E": 64, "F": 64}
    first, again = (planned(load("softmax_lse"), extents, "cuda:90", 2)[1] for _ in range(2))
    assert first == again


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mask", ["", "m <= p", "m <= p and p - m < 100", "m >= p", "m < 100", "(p - m) % 3 == 0"])
def test_the_longest_programs_begin_first_whatever_the_lengths(mask: str, backward: bool) -> None:
    """Later queries have more keys under a causal mask, and earlier keys have more queries."""
    cascade = constrained(load("softmax_attention"), mask, {}) if mask else load("softmax_attention")
    if backward:
        cascade = differentiate(cascade).backward
    later = {"m <= p": "p", "m <= p and p - m < 100": "p", "m >= p": "m"}.get(mask)
    for length in (1, 64, 4096):
        extents = {rank_of(v): 64 if v in "ef" else length for i in cascade.inputs for v in i.indices}
        program, schedule = planned(cascade, extents, "cuda:90", 2)
        for k in program.kernels:
            wanted = "descending" if k.loops and later in k.residents else "ascending"
            assert schedule.kernels[k.name].order == wanted, (k.name, length)
