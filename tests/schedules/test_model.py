"""The model ranks as an H200 does, counts tiles as the lowering walks them, and estimates what a compiler makes."""

from __future__ import annotations

import heapq
import itertools
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import einsumcascade as ec
from einsumcascade.analysis.targets import TARGETS, gpu_target
from einsumcascade.codegen.inspection import compiled
from einsumcascade.errors import ScheduleError, TargetError
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import constrained
from einsumcascade.rewrites.derive import simplify
from einsumcascade.schedules.demands import L2, TENSOR
from einsumcascade.schedules.frame import frame_of
from einsumcascade.schedules.model import MOST, Prediction, predict, rank, works
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.schedule import ORDERS, KernelSchedule, Schedule
from einsumcascade.schedules.timing import Price, Stations, dealt, resident_blocks
from tests.codegen.calls import VARIANTS
from tests.gallery.draws import extents_of

NAME = "softmax_attention"
MEASURED = Path(__file__).with_name("measured_h200.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"
SHAPES = [(16, 128, False), (16, 128, True), (32, 64, False), (32, 64, True)]
Choice = tuple[int, int, int, int, bool]
SPACE: tuple[Choice, ...] = tuple(itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4), (True, False)))
H200 = gpu_target("cuda:90")


def program_of(cascade: Cascade) -> Program:
    return partition(simplify(cascade).cascade, bounded=("e", "f"))


def schedule_of(choice: Choice) -> Schedule:
    p, m, warps, stages, descriptors = choice
    return Schedule(
        kernels={NAME: KernelSchedule(tiles={"p": p, "m": m}, warps=warps, stages=stages, descriptors=descriptors)}
    )


@cache
def ranking(heads: int, size: int, causal: bool) -> dict[Choice, Prediction]:
    cascade = constrained(load(NAME), "m <= p", {}) if causal else load(NAME)
    extents = {"B": 4, "H": heads, "P": 4096, "M": 4096, "E": size, "F": size}
    choices = {str(schedule_of(c)): c for c in SPACE}
    ranked = rank(program_of(cascade), [schedule_of(c) for c in SPACE], extents=extents)
    return {choices[str(r.schedule)]: r for r in ranked if math.isfinite(r.seconds)}


def measured(heads: int, size: int, causal: bool) -> dict[Choice, float]:
    """TFLOP/s of the rows that are of the space and gave right results."""
    rows: list[dict[str, Any]] = json.loads(MEASURED.read_text())["rows"]
    return {
        (r["block_m"], r["block_n"], r["warps"], r["stages"], r["descriptors"]): r["tflops"]
        for r in rows
        if (r["H"], r["D"], r["causal"]) == (heads, size, causal)
        and r["correct"]
        and not r["source_pipelined"]
        and not r["warp_specialize"]
    }


def place(heads: int, size: int, causal: bool) -> tuple[int, int]:
    """The place of the measured best in the model's ranking, behind all that it finds equal, and how many there are."""
    ranked, rows = ranking(heads, size, causal), measured(heads, size, causal)
    best = ranked[max(rows, key=lambda c: rows[c])].seconds
    return sum(r.seconds <= best for r in ranked.values()), len(ranked)


def correlation(heads: int, size: int, causal: bool) -> float:
    """Spearman's, of measured speed and predicted speed."""
    rows = measured(heads, size, causal)
    ranked = ranking(heads, size, causal)
    pairs = [_ranks(list(rows.values())), _ranks([1 / ranked[c].seconds for c in rows])]
    middle = (len(rows) - 1) / 2
    above = sum((x - middle) * (y - middle) for x, y in zip(*pairs, strict=True))
    return above / math.sqrt(math.prod(sum((x - middle) ** 2 for x in p) for p in pairs))


def _ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_measured_best_is_in_the_upper_quarter_of_the_ranking(shape: tuple[int, int, bool]) -> None:
    behind, count = place(*shape)
    assert count >= 90
    assert behind <= count / 4


def test_the_page_shows_the_places_and_the_correlations() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for heads, size, causal in SHAPES:
        behind, count = place(heads, size, causal)
        row = f"| D {size} {'causal' if causal else 'full'} |"
        (line,) = [x for x in page.splitlines() if x.startswith(row)]
        cells = [c.strip() for c in line.split("|")]
        rows = len(measured(heads, size, causal))
        assert cells[3:6] == [f"{behind} of {count}", f"{correlation(heads, size, causal):.2f}", str(rows)], line


@given(blocks=st.integers(1, 16), stations=st.integers(1, 5), clocks=st.integers(1, 1000))
def test_a_balanced_network_has_its_closed_form(blocks: int, stations: int, clocks: int) -> None:
    """K stations of equal demand D with n customers take (n + K - 1) D a customer's turn."""
    network = Stations(queues={str(k): float(clocks) for k in range(stations)}, pipes={TENSOR: 0.0})
    assert math.isclose(network.with_others(blocks), (blocks + stations - 1) * clocks)


def test_no_pipe_works_faster_than_it_can() -> None:
    network = Stations(queues={"a": 10.0, "b": 10.0}, pipes={"a": 10.0, "c": 30.0})
    assert network.with_others(4) == 4 * 30.0
    assert network.with_others(1) == 30.0


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    repeats=st.integers(1, 300),
    blocks=st.integers(1, 3),
    order=st.sampled_from(["ascending", "descending", "descending, heads inside"]),
)
def test_programs_are_dealt_as_they_become_free(lengths: list[int], repeats: int, blocks: int, order: str) -> None:
    """With one pipe alone a multiprocessor is never slower than its work; the end is that of a list schedule."""
    walks = tuple(((n, 0),) for n in lengths)
    demands = {w: Stations(queues={"a": float(w[0][0])}, pipes={TENSOR: 0.0}) for w in walks}
    found = dealt(walks, repeats, demands, blocks, H200, order=order)
    total = sum(lengths) * repeats
    assert found >= max(max(lengths), total / H200.multiprocessors) * (1 - 1e-9)
    # No program begins later than a busy machine lets it, and the longest may begin last.
    assert found <= total / H200.multiprocessors + (blocks + 1) * max(lengths)
    if len(lengths) * repeats <= 3 * H200.multiprocessors and blocks == 1:
        batch = lengths if order == "ascending" else lengths[::-1]
        queue = [n for n in batch for _ in range(repeats)] if "inside" in order else batch * repeats
        free = [0] * H200.multiprocessors
        for n in queue:
            heapq.heapreplace(free, free[0] + n)
        assert math.isclose(found, max(free))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    repeats=st.integers(1, 100),
    persistent=st.integers(1, 3),
    blocks=st.integers(1, 3),
    order=st.sampled_from(["ascending", "descending", "descending, heads inside"]),
)
def test_persistent_programs_take_tiles_in_turn(
    lengths: list[int], repeats: int, persistent: int, blocks: int, order: str
) -> None:
    """Whoever is done first takes no more than its share; what does not reside at once begins later."""
    walks = tuple(((n, 0),) for n in lengths)
    demands = {w: Stations(queues={"a": float(w[0][0])}, pipes={TENSOR: 0.0}) for w in walks}
    found = dealt(walks, repeats, demands, blocks, H200, order=order, persistent=persistent)
    batch = lengths if order == "ascending" else lengths[::-1]
    tiles = [n for n in batch for _ in range(repeats)] if "inside" in order else batch * repeats
    programs = min(len(tiles), persistent * H200.multiprocessors)
    shares = [0] * programs
    for n, length in enumerate(tiles):
        shares[n % programs] += length
    assert found >= max(sum(tiles) / H200.multiprocessors, max(shares)) * (1 - 1e-9)
    if blocks == 1:
        free = [0] * H200.multiprocessors
        for share in shares:
            heapq.heapreplace(free, free[0] + share)
        assert math.isclose(found, max(free))
    elif persistent == 1:
        assert math.isclose(found, max(shares))


@pytest.mark.parametrize("order", ["ascending", "descending", "descending, heads inside"])
def test_programs_that_are_alike_take_the_same_time_persistent_or_not(order: str) -> None:
    extents = {"B": 4, "H": 32, "P": 4096, "M": 4096, "E": 64, "F": 64}
    program = program_of(load(NAME))
    k = KernelSchedule(tiles={"p": 64, "m": 64}, stages=3, descriptors=True, order=order)
    usual, walked = (
        predict(program, Schedule(kernels={NAME: replace(k, persistent=n)}), extents=extents).kernels[0] for n in (0, 3)
    )
    assert usual.blocks == 3 and usual.seconds == walked.seconds
    assert (usual.programs, walked.programs) == (8192, 3 * 132) and walked.waves == 1.0


@pytest.mark.parametrize("choice", [(64, 64, 4, 3, True), (128, 64, 8, 2, True)])
def test_every_tile_of_one_loop_is_tested_and_counts_so(choice: Choice) -> None:
    cascade = constrained(load(NAME), "m <= p", {})
    ((_, k),) = schedule_of(choice).kernels.items()
    one, two = (Schedule(kernels={NAME: replace(k, one_loop=x)}) for x in (True, False))
    extents = {"B": 4, "H": 16, "P": 8192, "M": 8192, "E": 64, "F": 64}
    (a,), (b,) = (predict(program_of(cascade), s, extents=extents).kernels for s in (one, two))
    assert (a.full_steps, a.tested_steps) == (0, b.full_steps + b.tested_steps)
    assert a.cycles["alu"] > b.cycles["alu"] and a.cycles["tensor"] == b.cycles["tensor"]
    assert a.seconds > b.seconds
    # A run of tiles less has a pipeline less to fill: where runs are short that counts.
    (work,) = works(program_of(cascade), one, extents=extents).values()
    price = Price(work, k, H200, None, spilled=0)
    fills = [price.program((steps,)).queues[L2] for steps in ((1, 1), (0, 2))]
    rate = H200.l2_bytes_per_clock / H200.multiprocessors
    assert math.isclose(fills[0] - fills[1], work.loops[0].copied / rate)
    kernel = ec.compile(cascade).kernel(extents={"E": 64, "F": 64}, target="cuda:90", schedule=one)
    (tiles,) = kernel.tiles(extents={"B": 1, "H": 1, "P": 512, "M": 512, "E": 64, "F": 64})
    assert tiles.full == 0 < tiles.visited


@pytest.mark.parametrize(("mask", "conditions"), [("", 0), ("m <= p", 1), ("m <= p and p - m < 100", 2)])
def test_a_tested_tile_has_the_selections_and_comparisons_that_are_compiled(mask: str, conditions: int) -> None:
    cascade = constrained(load(NAME), mask, {}) if mask else load(NAME)
    ((_, k),) = schedule_of((64, 64, 4, 2, True)).kernels.items()
    one = Schedule(kernels={NAME: replace(k, one_loop=True)})
    kernel = ec.compile(cascade).kernel(extents={"E": 64, "F": 64}, target="cuda:90", schedule=one)
    (report,) = kernel.inspect().kernels.values()
    assert report.hot_loop is not None
    (work,) = works(kernel.program, one, extents={"E": 64, "F": 64, **dict.fromkeys("BHPM", 64)}).values()
    scores = 64 * 64 // (4 * 32)
    assert work.loops[0].masked == 64 * 64 * (1 + 2 * conditions)
    opcodes = report.hot_loop.opcodes
    # Two more for the rows; comparisons of keys with their end are fewer.
    assert opcodes["FSEL"] == scores * (1 + conditions) + 2
    assert scores * conditions <= opcodes["ISETP"] <= scores * (conditions + 1)


def test_a_last_wave_that_is_not_full_runs_with_fewer_blocks() -> None:
    walks = tuple(((n, 0),) for n in (4,))
    demands = {walks[0]: Stations(queues={"a": 4.0, "b": 4.0}, pipes={TENSOR: 0.0})}
    one = dealt(walks, 132, demands, 2, H200, order="ascending")
    two = dealt(walks, 264, demands, 2, H200, order="ascending")
    assert (one, two) == (8.0, 12.0)
    assert dealt(walks, 264 + 132, demands, 2, H200, order="ascending") == 20.0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(255, 98336, 4, 2), (138, 115712, 4, 2), (110, 58368, 4, 3), (32, 0, 1, 32), (168, 0, 12, 1), (16, 233000, 4, 0)],
)
def test_blocks_that_are_resident_are_those_of_the_occupancy_calculator(
    registers: int, shared: int, warps: int, blocks: int
) -> None:
    assert resident_blocks(H200, registers=registers, shared_memory_bytes=shared, warps=warps) == blocks


@given(registers=st.integers(1, 255), warps=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_registers_are_given_to_four_warps_at_a_time(registers: int, warps: int) -> None:
    # The rule of the CUDA occupancy calculator.
    warps_in_all = 65536 // (-(-registers // 8) * 8 * 32) // 4 * 4
    wanted = min(32, 64 // warps, warps_in_all // warps)
    assert resident_blocks(H200, registers=registers, shared_memory_bytes=1024, warps=warps) == wanted


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("choice", [(128, 64, 4, 2, True), (64, 64, 4, 3, True), (64, 128, 4, 2, False)])
def test_registers_and_shared_memory_are_near_what_is_compiled(size: int, choice: Choice) -> None:
    kernel = ec.compile(NAME).kernel(extents={"E": size, "F": size}, target="cuda:90", schedule=schedule_of(choice))
    (report,) = kernel.inspect().kernels.values()
    extents = {"B": 4, "H": 16, "P": 4096, "M": 4096, "E": size, "F": size}
    (estimated,) = predict(kernel.program, schedule_of(choice), extents=extents).kernels
    assert abs(estimated.registers - report.registers) <= 0.1 * report.registers
    assert abs(estimated.shared_memory_bytes - report.shared_memory_bytes) <= 0.05 * report.shared_memory_bytes


def test_what_was_compiled_takes_the_place_of_estimates() -> None:
    choice = (64, 64, 4, 3, True)
    kernel = ec.compile(NAME).kernel(extents={"E": 64, "F": 64}, target="cuda:90", schedule=schedule_of(choice))
    (report,) = kernel.inspect().kernels.values()
    extents = {"B": 4, "H": 32, "P": 4096, "M": 4096, "E": 64, "F": 64}
    options: dict[str, Any] = {"extents": extents, "compiled": {NAME: compiled(report)}}
    (found,) = predict(kernel.program, schedule_of(choice), **options).kernels
    assert (found.registers, found.shared_memory_bytes) == (report.registers, report.shared_memory_bytes)
    steps = found.full_steps + found.tested_steps
    hot = report.hot_loop
    assert hot is not None
    issued = hot.instructions * report.num_warps / 4 * steps / H200.multiprocessors
    assert issued <= found.cycles["issue"] <= 1.1 * issued
    # Two products of 64 x 64 x 64 a step.
    assert math.isclose(found.cycles["tensor"], steps * 2 * 2 * 64**3 / 4096 / H200.multiprocessors)


@pytest.mark.parametrize("constraint", ["m <= p", "m <= p and p - m < 100", "m <= p and (m < 70 or p - m < 100)", ""])
def test_full_and_tested_tiles_are_those_that_the_kernel_walks(constraint: str) -> None:
    cascade = constrained(load(NAME), constraint, {}) if constraint else load(NAME)
    extents = {"B": 1, "H": 2, "P": 500, "M": 700, "E": 64, "F": 64}
    chosen = schedule_of((64, 32, 4, 2, False))
    kernel = ec.compile(cascade).kernel(extents={"E": 64, "F": 64}, target="cuda:90", schedule=chosen)
    (tiles,) = kernel.tiles(extents=extents)
    (found,) = predict(kernel.program, chosen, extents=extents).kernels
    assert (found.full_steps, found.tested_steps) == (tiles.full, tiles.visited - tiles.full)


@pytest.mark.parametrize("target", [t.name for t in TARGETS if t.backend == "cuda"])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_kernel_of_the_gallery_has_a_time(name: str, target: str) -> None:
    cascade = load(name)
    built = ec.compile(cascade).kernel(extents=extents_of(cascade, name), target=target)
    found = predict(built.program, built.schedule, extents=extents_of(cascade, name), target=target)
    assert 0 < found.seconds < 1
    assert json.loads(json.dumps(found.to_dict()))["binding"] == found.binding


def test_a_schedule_that_cannot_run_comes_last() -> None:
    large, small = schedule_of((256, 128, 8, 4, True)), schedule_of((64, 64, 4, 2, True))
    extents = {"B": 1, "H": 1, "P": 512, "M": 512, "E": 128, "F": 128}
    program = program_of(load(NAME))
    ranked = rank(program, [large, small], extents=extents)
    assert [r.schedule for r in ranked] == [small, large]
    assert math.isinf(ranked[1].seconds) and ranked[1].kernels[0].blocks == 0
    with pytest.raises(ScheduleError):
        rank(program, [Schedule(kernels={NAME: KernelSchedule(tiles={"p": 96, "m": 64})})], extents=extents)
    with pytest.raises(TargetError):
        rank(program, [small], extents=extents, target="cuda:91")


def test_every_target_says_where_its_figures_stand() -> None:
    assert all(t.sources and all(t.sources.values()) for t in TARGETS)


@pytest.mark.parametrize("lengths", [(0, 512), (512, 0), (0, 0), (1, 1), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("constraint", ["", "m <= p"])
def test_lengths_may_be_nothing_and_very_many(lengths: tuple[int, int], constraint: str) -> None:
    cascade = constrained(load(NAME), constraint, {}) if constraint else load(NAME)
    extents = {"B": 1, "H": 1, "P": lengths[0], "M": lengths[1], "E": 64, "F": 64}
    (found,) = predict(program_of(cascade), schedule_of((128, 128, 8, 2, True)), extents=extents).kernels
    assert math.isfinite(found.seconds) and (found.seconds > 0) == (lengths[0] > 0)


@pytest.mark.parametrize("constraint", ["m <= p", "p - m < 1000 and m <= p"])
def test_a_ranking_of_many_kinds_of_programs_is_that_of_all_of_them(constraint: str) -> None:
    program = program_of(constrained(load(NAME), constraint, {}))
    some = [schedule_of((p, m, 4, 2, False)) for p, m in ((16, 32), (32, 64), (64, 64), (128, 64))]
    some += [
        Schedule(kernels={NAME: replace(s.kernels[NAME], **{field: value})})  # type: ignore[arg-type]
        for s in some
        for field, value in (("order", ORDERS[1]), ("persistent", 2), ("one_loop", True))
    ]
    for length in (4096, 1 << 15):
        extents = {"B": 1, "H": 8, "P": length, "M": length, "E": 64, "F": 64}
        for quick in rank(program, some, extents=extents):
            every = predict(program, quick.schedule, extents=extents)
            tile = quick.schedule.kernels[NAME].tiles["p"]
            assert quick.kernels[0].programs == every.kernels[0].programs
            assert quick == every if length // tile <= MOST else quick.seconds == pytest.approx(every.seconds, rel=0.03)


def test_corners_that_stand_for_others_stand_for_all_of_them() -> None:
    program = program_of(constrained(load(NAME), "m <= p", {}))
    binding = bind(program.cascade, extents={"B": 1, "H": 1, "P": 5000, "M": 5000, "E": 64, "F": 64})
    frame = frame_of(program, program.kernels[0], schedule_of((16, 32, 4, 2, False)).kernels[NAME], binding)
    every = list(frame.corners())
    for most in (1, 2, 7, 100, 312, 313, 1000):
        some = list(replace(frame, most=most).corners())
        assert len(some) <= most and sum(c.alike for c in some) == len(every) == 313
        places = [n for n, c in enumerate(every) if c.ranges in [s.ranges for s in some]]
        assert len(places) == len(some)
