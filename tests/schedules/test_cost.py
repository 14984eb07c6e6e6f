"""The cost of a schedule equals what the lowered kernels do, lane by lane and step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.kernel_ir import Count, Reduce, TileKernel, all_statements, bounding
from einsumcascade.codegen.launch import Built, build
from einsumcascade.errors import InputError, ScheduleError, TargetError
from einsumcascade.gallery import header, load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse
from einsumcascade.rewrites.derive import simplify
from einsumcascade.schedules.cost import KernelCost, ScheduleCost, TensorCost, cost
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.schedules.lanes import walk
from tests.strategies import Case, cases, tile_schedule

H200 = gpu_target("cuda:90")
# A row statistic of one kernel is what the other subtracts.
COLUMN_SUMS = parse(
    "in X[p,m], V[m,f]\nC[m] = X[p,m] :: sum(p)\nS[p,m] = exp(X[p,m] - C[m])\n"
    "Y[p,f] = S[p,m] * V[m,f] :: sum(m)\nout Y",
    name="column_sums.cascade",
)
ATTENTION = {"B": 2, "H": 3, "P": 19, "M": 37, "E": 8, "F": 20}


def lowered(
    cascade: Cascade, extents: Mapping[str, int], tiles: tuple[int, ...], split: Mapping[str, int] | None = None
) -> Built:
    split = split or {}
    first = build(cascade, extents=extents, dtype="bfloat16", target=H200, schedule=Schedule(split=split))
    chosen = replace(tile_schedule(first.program, tiles), split=split)
    return build(cascade, extents=extents, dtype="bfloat16", target=H200, schedule=chosen)


def compare(
    cascade: Cascade, extents: Mapping[str, int], tiles: tuple[int, ...], split: Mapping[str, int] | None = None
) -> ScheduleCost:
    """Cost a cascade and hold every count against the walk of its kernels."""
    made = lowered(cascade, extents, tiles, split)
    binding = bind(made.program.cascade, extents=extents)
    found = cost(made.program, made.schedule, extents=extents)
    for kernel, costs in zip(made.kernels, found.kernels, strict=True):
        if is_bounded_by_data(kernel):
            # What tensors hold is not known to the cost, which counts every tile: there is nothing to hold it against.
            continue
        walked = walk(kernel, binding)
        assert costs.programs == walked.programs
        assert costs.steps == walked.steps
        assert {t.tensor: t.moved for t in costs.tensors if not t.is_written} == walked.loads
        assert {t.tensor: t.moved for t in costs.tensors if t.is_written} == walked.stores
        assert costs.operations["exp"] == walked.exponentials
        if any(e.where for e in kernel.cascade.einsums if e.ranks):
            # Where a condition of its own links both sides of a product, the lowering multiplies without a product of
            # tiles in the tiles that test it.
            assert costs.operations["contraction"] >= walked.products
        else:
            assert costs.operations["contraction"] == walked.products
    return found


def is_bounded_by_data(kernel: TileKernel) -> bool:
    """Whether bounds of its loops come from more of a tensor than one number a program."""
    names, _ = bounding(kernel.body)
    return any(
        isinstance(s, Count) or (isinstance(s, Reduce) and s.value.name in names) for s in all_statements(kernel.body)
    ) or bool(kernel.tables)


def extents_of(name: str) -> dict[str, int]:
    """Small extents for a gallery text, none of them a multiple of a tile."""
    cascade = load(name)
    defined = {rank_of(d.name) for d in cascade.ranks}
    ranks = dict.fromkeys(rank_of(v) for i in cascade.inputs for v in i.indices)
    few = {**ATTENTION, "G": 2, "R": 2, "T": 19, "X": 5, "Y": 2, "Dx": 3, "Dy": 2, "J": 4}
    return {r: few.get(r, 5 + n) for n, r in enumerate(ranks) if r not in defined}


@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 64)])
@pytest.mark.parametrize("constraint", [None, "m <= p", "m < p", "m >= p", "p - m < 7", "m == p"])
def test_attention_loads_what_its_programs_load(tiles: tuple[int, int], constraint: str | None) -> None:
    cascade = load("softmax_attention")
    compare(cascade.constrain(constraint) if constraint else cascade, ATTENTION, tiles)


@pytest.mark.parametrize(
    "name",
    [
        *("gqa", "cross_attention", "sliding_window", "softmax_1p", "softmax_2p_part", "alibi", "sigmoid", "entropy"),
        *("diff", "mla", "kronecker", "gatedconv", "splitkv", "paged", "tin", "fai", "linattn", "linear", "pointer"),
    ],
)
def test_the_cost_of_a_gallery_text_is_what_its_kernels_do(name: str) -> None:
    assert header(name).kernel == "yes"
    compare(load(name), extents_of(name), (16, 32))


def test_a_buffer_is_written_by_one_kernel_and_read_by_the_next() -> None:
    found = compare(COLUMN_SUMS, {"P": 19, "M": 37, "F": 20}, (16, 16))
    first, second = ({t.tensor: t for t in k.tensors} for k in found.kernels)
    assert first["C"].is_written
    assert (first["C"].moved, first["C"].element_bytes) == (37, 4)
    # Read again by each of the two programs along P.
    assert (second["C"].moved, second["C"].element_bytes) == (2 * 37, 4)


@pytest.mark.parametrize("constraint", [None, "m <= p"])
def test_parts_of_a_split_rank_are_programs_and_their_states_buffers(constraint: str | None) -> None:
    cascade = load("softmax_attention")
    cascade = cascade.constrain(constraint) if constraint else cascade
    parts, merge = compare(cascade, ATTENTION, (16, 16), {"m": 3}).kernels
    assert parts.programs == 3 * 2 * 3 * 2
    states = {t.tensor: t.moved for t in parts.tensors if t.is_written}
    assert {t.tensor: t.moved for t in merge.tensors if not t.is_written} == states


@settings(max_examples=12, deadline=None)
@given(cases())
def test_random_cascades_cost_what_their_kernels_do(case: Case) -> None:
    compare(case.cascade, case.extents, case.tiles)


def test_keys_are_read_once_for_each_tile_of_queries() -> None:
    found = attention({"P": 1024, "M": 4096}, {"p": 128, "m": 64})
    k = tensor(found, "K")
    assert k.moved == k.elements * 1024 // 128
    assert found.read_bytes == 2 * (4 * 1024 * 64 + 2 * 8 * k.elements)
    assert found.written_bytes == 2 * 4 * 1024 * 64


def test_a_causal_loop_ends_at_the_diagonal() -> None:
    found = attention({"P": 1024, "M": 1024}, {"p": 128, "m": 64}, "m <= p")
    # Eight tiles of queries, which see 2, 4, ... 16 tiles of keys.
    assert found.steps == 4 * sum(range(2, 17, 2))
    assert tensor(found, "K").moved == found.steps * 64 * 64
    assert found.operations["contraction"] == found.steps * 2 * 128 * 64 * 64


def test_tails_are_computed_whole_but_not_loaded() -> None:
    found = attention({"P": 1, "M": 65}, {"p": 128, "m": 64})
    assert tensor(found, "Q").moved == 4 * 64
    assert tensor(found, "K").moved == 4 * 65 * 64
    assert found.operations["contraction"] == 4 * 2 * (2 * 128 * 64 * 64)


def test_the_heads_of_a_group_do_not_share_loads() -> None:
    cascade = load("gqa")
    extents = {"B": 1, "G": 2, "R": 4, "P": 128, "M": 256, "E": 64, "F": 64}
    made = lowered(cascade, extents, (128, 64))
    (found,) = cost(made.program, made.schedule, extents=extents).kernels
    assert tensor(found, "K").moved == 4 * tensor(found, "K").elements


def test_positions_take_four_bytes() -> None:
    extents = extents_of("paged")
    made = lowered(load("paged"), extents, (16,))
    (found,) = cost(made.program, made.schedule, extents=extents, dtype="float16").kernels
    assert {t.tensor: t.element_bytes for t in found.tensors} == {
        **dict.fromkeys(("Q", "KP", "VP", "AV"), 2),
        **dict.fromkeys(("TAB", "LEN"), 4),
    }


def test_what_is_never_loaded_takes_no_time() -> None:
    # The window of the last queries leaves most keys of a longer sequence alone.
    found = attention({"P": 64, "M": 65536}, {"p": 64, "m": 64}, "m <= p")
    assert found.bounds_us["memory"] == pytest.approx(found.uncached_us)


def test_few_programs_leave_multiprocessors_idle() -> None:
    one = attention({"P": 128, "M": 4096}, {"p": 128, "m": 64}, heads=1)
    many = attention({"P": 128, "M": 4096}, {"p": 128, "m": 64}, heads=H200.multiprocessors)
    more = attention({"P": 128, "M": 4096}, {"p": 128, "m": 64}, heads=H200.multiprocessors + 1)
    assert (one.programs, one.waves, many.waves, more.waves) == (1, 1, 1, 2)
    assert one.bounds_us["tensor"] == pytest.approx(many.bounds_us["tensor"])
    assert more.bounds_us["tensor"] == pytest.approx(2 * many.bounds_us["tensor"])


def test_a_pipe_is_bound_by_the_largest_program() -> None:
    found = attention({"P": 256, "M": 256}, {"p": 128, "m": 64}, "m <= p", heads=1)
    # Two and four steps; the second program holds its multiprocessor alone.
    rate = H200.clock_ghz * 1e3 * H200.tensor_flops_per_clock / 2
    assert found.bounds_us["tensor"] == pytest.approx(4 * 2 * 128 * 64 * 64 / rate)


def test_float32_products_are_exact_so_they_take_the_fp32_pipe() -> None:
    found = attention({"P": 128, "M": 4096}, {"p": 32, "m": 32}, dtype="float32")
    assert found.bounds_us["tensor"] == 0
    assert found.binding == "fp32"


def test_a_rank_of_no_element_costs_nothing() -> None:
    found = attention({"P": 0, "M": 64}, {"p": 16, "m": 16})
    assert (found.programs, found.read_bytes, found.bound_us) == (0, 0, 0)


def test_a_schedule_without_kernels_gets_the_default_choices() -> None:
    cascade = load("softmax_attention")
    extents = {"B": 1, "H": 4, "P": 1024, "M": 1024, "E": 64, "F": 64}
    made = build(cascade, extents=extents, dtype="bfloat16", target=H200)
    assert cost(made.program, Schedule(), extents=extents) == cost(made.program, made.schedule, extents=extents)


def test_a_cost_is_a_page_and_a_json_value() -> None:
    cascade = load("softmax_attention").constrain("m <= p")
    extents = {"B": 1, "H": 4, "P": 1024, "M": 1024, "E": 64, "F": 64}
    made = lowered(cascade, extents, (128, 64))
    found = cost(made.program, made.schedule, extents=extents)
    text = str(found)
    assert "softmax_attention: 32 programs in 1 wave, 288 steps" in text
    assert "loads K: 2,359,296 bytes, 4.5 times each" in text
    back = json.loads(json.dumps(found.to_dict()))
    assert back["kernels"][0]["steps"] == 288
    assert back["bytes"] == found.bytes


def test_mistakes_have_the_codes_that_they_have_elsewhere() -> None:
    made = lowered(COLUMN_SUMS, {"P": 19, "M": 37, "F": 20}, (16, 16))
    good = {"P": 19, "M": 37, "F": 20}
    with pytest.raises(InputError, match="unknown-dtype"):
        cost(made.program, made.schedule, extents=good, dtype="float64")
    with pytest.raises(TargetError, match="unknown-target"):
        cost(made.program, made.schedule, extents=good, target="cuda:91")
    with pytest.raises(InputError, match="missing-extent"):
        cost(made.program, made.schedule, extents={"P": 19})
    with pytest.raises(InputError, match="unknown-rank"):
        cost(made.program, made.schedule, extents={**good, "Z": 3})
    with pytest.raises(ScheduleError, match="schedule-illegal"):
        cost(made.program, Schedule(kernels={"other": KernelSchedule()}), extents=good)


def attention(
    extents: Mapping[str, int],
    tiles: Mapping[str, int],
    constraint: str | None = None,
    *,
    heads: int = 4,
    dtype: str = "bfloat16",
) -> KernelCost:
    """Cost softmax attention of one batch and 64 features."""
    cascade = load("softmax_attention")
    cascade = cascade.constrain(constraint) if constraint else cascade
    every = {"B": 1, "H": heads, "E": 64, "F": 64, **extents}
    made = build(cascade, extents={"E": 64, "F": 64}, dtype="bfloat16", target=H200)
    schedule = Schedule(kernels={k: KernelSchedule(tiles=tiles) for k in made.schedule.kernels})
    (found,) = cost(made.program, schedule, extents=every, dtype=dtype).kernels
    return found


def tensor(found: KernelCost, name: str) -> TensorCost:
    return next(t for t in found.tensors if t.tensor == name)


@pytest.mark.parametrize(("head", "held"), [(64, 64), (72, 80), (80, 80), (96, 96), (576, 576), (3, 16)])
def test_a_head_costs_what_its_pieces_hold(head: int, held: int) -> None:
    """Not the next power of two: less than 16 elements beyond the head."""
    program = partition(simplify(load("softmax_attention")).cascade, bounded=("e", "f"))
    tiles = Schedule(kernels={"softmax_attention": KernelSchedule(tiles={"p": 64, "m": 32})})
    extents = {"B": 1, "H": 1, "P": 64, "M": 64, "E": head, "F": head}
    (found,) = cost(program, tiles, extents=extents).kernels
    assert found.operations["contraction"] == 2 * 64 * 64 * held
