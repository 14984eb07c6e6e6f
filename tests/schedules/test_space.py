"""The search space: legal, deterministic, and without holes; shared memory as the compiler lays it out."""

from __future__ import annotations

from dataclasses import replace

import pytest

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.programs import program_of
from einsumcascade.errors import InputError
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import constrained
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.schedules.heuristic import default_schedule
from einsumcascade.schedules.model import predict
from einsumcascade.schedules.ranking import ranked, shortlist
from einsumcascade.schedules.schedule import ORDERS, KernelSchedule, check_schedule
from einsumcascade.schedules.space import Space, search_space

EXTENTS = {"B": 4, "H": 16, "P": 4096, "M": 4096, "E": 64, "F": 64}
TARGET = gpu_target("cuda:90")


def cascade_of(name: str) -> Cascade:
    """Load a variant, causal or differentiated if the name says so."""
    if name.endswith(" backward"):
        return differentiate(cascade_of(name.removesuffix(" backward"))).backward
    if name.startswith("causal "):
        return constrained(load(name.removeprefix("causal ")), "m <= p", {})
    return load(name)


def space_of(name: str, *, dtype_bytes: int = 2, target: str = "cuda:90", **extents: int) -> Space:
    """The space of a variant."""
    cascade = cascade_of(name)
    named = {rank_of(v) for i in cascade.inputs for v in i.indices}
    given = {r: n for r, n in {**EXTENTS, **extents}.items() if r in named}
    return search_space(program_of(cascade, given), extents=given, dtype_bytes=dtype_bytes, target=gpu_target(target))


@pytest.mark.parametrize(
    "name", ["softmax_attention", "causal softmax_attention", "linear", "diff", "softmax_attention backward"]
)
def test_every_choice_is_legal_and_the_space_is_the_same_at_every_call(name: str) -> None:
    space = space_of(name)
    for kernel in space.kernels:
        for schedule in space.of(kernel):
            check_schedule(space.program, schedule)
    assert space_of(name).kernels == space.kernels
    default = default_schedule(space.program, extents=EXTENTS, dtype_bytes=2, target=TARGET)
    assert space.default == default
    for own in space.kernels.values():
        assert all(own.count(k) == 1 for k in own[:50])


# The fastest of 46 configurations on an H200, by head and mask: batches, heads, tiles and stages, all of 4 warps.
MEASURED = [
    ("softmax_attention", 128, (4, 16), (128, 64, 2)),
    ("causal softmax_attention", 128, (4, 16), (64, 64, 3)),
    ("softmax_attention", 64, (4, 32), (64, 128, 2)),
    ("causal softmax_attention", 64, (4, 32), (64, 64, 3)),
]


@pytest.mark.parametrize(("name", "size", "batch", "best"), MEASURED)
def test_the_fastest_that_were_measured_are_in_it_and_the_tuner_compiles_them(
    name: str, size: int, batch: tuple[int, int], best: tuple[int, int, int]
) -> None:
    space = space_of(name, E=size, F=size)
    p, m, stages = best
    wanted = KernelSchedule(tiles={"p": p, "m": m}, warps=4, stages=stages, descriptors=True)
    assert wanted in space.kernels["softmax_attention"]
    extents = {**EXTENTS, "B": batch[0], "H": batch[1], "E": size, "F": size}
    found = shortlist([space], extents=extents, target=TARGET, dtype="bfloat16", limit=24)
    own = [r.schedule.kernels["softmax_attention"] for r in found]
    # The model's favourites are walked in other ways, but the tiles are compiled as they were measured, or alike.
    assert wanted in [replace(k, order=ORDERS[0], one_loop=False, persistent=0) for k in own]


def orders(name: str, **extents: int) -> list[set[str]]:
    return [{k.order for k in own} for own in space_of(name, **extents).kernels.values()]


def test_programs_of_unequal_length_begin_in_several_orders() -> None:
    assert orders("softmax_attention") == [{"ascending"}]
    assert orders("causal softmax_attention") == [set(ORDERS)]
    # The kernel of the keys has its longest programs first as it is.
    assert orders("causal softmax_attention backward") == [{"ascending"}, {"ascending"}, set(ORDERS)]


def ways(name: str, **extents: int) -> set[tuple[bool, bool]]:
    """Whether there is one loop, and whether programs are persistent, over all choices."""
    return {(k.one_loop, k.persistent > 0) for own in space_of(name, **extents).kernels.values() for k in own}


def test_one_loop_is_for_tiles_of_both_kinds_and_persistent_programs_for_more_than_one_wave() -> None:
    assert ways("causal softmax_attention") == {(False, False), (False, True), (True, False), (True, True)}
    # 4096 keys are full tiles of every size; 4095 are not.
    assert ways("softmax_attention") == {(False, False), (False, True)}
    assert ways("softmax_attention", M=4095) == ways("causal softmax_attention")
    # A tile for each multiprocessor, or fewer.
    assert ways("causal softmax_attention", B=1, H=4, P=512, M=512) == {(False, False), (True, False)}
    assert ways("softmax_attention", B=1, H=1, P=1) == {(False, False)}


@pytest.mark.parametrize("name", ["causal softmax_attention", "linear", "softmax_attention backward"])
def test_persistent_programs_are_those_that_reside_together(name: str) -> None:
    space = space_of(name)
    named = {rank_of(v) for i in space.program.cascade.inputs for v in i.indices}
    extents = {r: n for r, n in EXTENTS.items() if r in named}
    for kernel, own in space.kernels.items():
        for k in [k for k in own if k.persistent][:: max(1, len(own) // 20)]:
            schedule = replace(space.default, kernels={**space.default.kernels, kernel: k})
            found = {p.name: p for p in predict(space.program, schedule, extents=extents).kernels}
            assert found[kernel].blocks == k.persistent and found[kernel].waves == 1.0


def test_no_tile_has_more_padding_than_data() -> None:
    (own,) = space_of("softmax_attention", P=1, M=100).kernels.values()
    assert {k.tiles["p"] for k in own[1:]} == {16}
    assert {k.tiles["m"] for k in own[1:]} == {16, 32, 64, 128}


def test_descriptors_are_for_targets_that_have_them() -> None:
    (own,) = space_of("softmax_attention", target="cuda:80").kernels.values()
    assert not any(k.descriptors for k in own)


def test_persistent_programs_ask_for_no_more_shared_memory() -> None:
    """Kernels with a loop of their own, and the second of linear attention, which has none."""
    for name in ("causal softmax_attention", "linear"):
        kernel = ec.compile(cascade_of(name)).kernel(extents={"E": 64, "F": 64}, dtype="bfloat16", target="cuda:90")
        found = []
        for persistent in (0, 2):
            kernels = {n: replace(k, stages=3, persistent=persistent) for n, k in kernel.schedule.kernels.items()}
            own = ec.compile(cascade_of(name), schedule=replace(kernel.schedule, kernels=kernels))
            reports = own.kernel(extents={"E": 64, "F": 64}, dtype="bfloat16", target="cuda:90").inspect().kernels
            found.append([r.shared_memory_bytes for r in reports.values()])
        assert found[0] == found[1], name


def test_an_extent_that_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="missing-extent"):
        search_space(program_of(load("softmax_attention"), {}), extents={"P": 4}, dtype_bytes=2, target=TARGET)


def test_a_list_for_the_compiler_begins_with_the_default_and_is_not_all_of_one_kind() -> None:
    space = space_of("causal softmax_attention")
    found = shortlist([space], extents=EXTENTS, target=TARGET, dtype="bfloat16", limit=24)
    assert len(found) == 24 and found[0].schedule == space.default
    tiles = [tuple(r.schedule.kernels["softmax_attention"].tiles.values()) for r in found[1:]]
    assert max(tiles.count(t) for t in tiles) <= 6
    assert [r.schedule for r in found] == [
        r.schedule for r in shortlist([space], extents=EXTENTS, target=TARGET, dtype="bfloat16", limit=24)
    ]


def test_kernels_are_ranked_alone_and_combined_place_by_place() -> None:
    space = space_of("softmax_attention backward")
    named = {n: space.of(n) for n in space.kernels}
    first, second = (next(x) for x in [iter(space.combined(named))] * 2)
    assert first == space.default
    assert all(second.kernels[n] == own[1] for n, own in space.kernels.items())


def test_a_rank_keeps_the_order_of_equals() -> None:
    space = space_of("softmax_attention")
    some = [s for s in space.of("softmax_attention") if s.kernels["softmax_attention"].tiles == {"p": 64, "m": 64}]
    found = ranked(space.program, some, extents=EXTENTS, target=TARGET, dtype="bfloat16")
    assert len({r.seconds for r in found}) == 1 or len(found) == len(some)
