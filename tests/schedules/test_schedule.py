"""Schedules are data: JSON both ways, and every mistake in one is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.errors import ScheduleError
from einsumcascade.language.parser import parse
from einsumcascade.rewrites.derive import simplify
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.schedule import ORDERS, KernelSchedule, Schedule, check_schedule, tiled_variables

TEXT = """\
in Q[h,p,e], K[h,m,e]
S[h,p,m] = Q[h,p,e] * K[h,m,e] :: sum(e)
GM[h,p] = S[h,p,m] :: max(m)
Z[h,p] = exp(S[h,p,m] - GM[h,p]) :: sum(m)
out Z
"""


def program() -> Program:
    return partition(simplify(parse(TEXT, name="t.cascade")).cascade, bounded=("e",))


def legal() -> Schedule:
    (k,) = program().kernels
    return Schedule(kernels={k.name: KernelSchedule(tiles={"p": 32, "m": 16})})


def problems(schedule: Schedule) -> list[str]:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(program(), schedule)
    assert all(d.code == "schedule-illegal" for d in caught.value.diagnostics)
    return [d.headline for d in caught.value.diagnostics]


def change(**fields: object) -> Schedule:
    ((name, k),) = legal().kernels.items()
    return Schedule(kernels={name: replace(k, **fields)})  # type: ignore[arg-type]


schedules = st.builds(
    Schedule,
    kernels=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.builds(
            KernelSchedule,
            tiles=st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 4096)),
            warps=st.integers(1, 32),
            stages=st.integers(1, 8),
            descriptors=st.booleans(),
            order=st.sampled_from(ORDERS),
            one_loop=st.booleans(),
            persistent=st.integers(0, 32),
        ),
        max_size=3,
    ),
)


@given(schedules)
def test_a_schedule_survives_json(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_the_tiles_are_the_grid_and_the_innermost_loop() -> None:
    p = program()
    assert tiled_variables(p, p.kernels[0].name) == ("p", "m")


def test_a_legal_schedule_passes() -> None:
    check_schedule(program(), legal())


@pytest.mark.parametrize("tile", [1, 2, 16, 1024])
def test_every_power_of_two_up_to_1024_is_a_tile(tile: int) -> None:
    check_schedule(program(), change(tiles={"p": tile, "m": tile}))


@pytest.mark.parametrize("tile", [0, -16, 3, 24, 2048])
def test_another_number_is_none(tile: int) -> None:
    assert problems(change(tiles={"p": 32, "m": tile})) == [
        f"the tile of 'm' in kernel 't' is {tile}: not a power of two from 1 to 1024"
    ]


def test_a_missing_tile_an_unknown_tile_and_a_missing_kernel_are_named() -> None:
    assert problems(change(tiles={"p": 32})) == ["kernel 't' has no tile for 'm'"]
    assert problems(change(tiles={"p": 32, "m": 16, "e": 16})) == ["kernel 't' tiles no variable 'e', only p, m"]
    assert problems(Schedule(kernels={})) == ["kernel 't' has no schedule"]


def test_an_unknown_kernel_names_the_nearest() -> None:
    found = problems(Schedule(kernels={**legal().kernels, "tt": KernelSchedule()}))
    assert len(found) == 1 and found[0].startswith("there is no kernel 'tt'") and "'t'" in found[0]


@pytest.mark.parametrize("warps", [0, 3, 32])
def test_warps_are_a_power_of_two_up_to_16(warps: int) -> None:
    assert problems(change(warps=warps)) == [f"kernel 't' has {warps} warps: not 1, 2, 4, 8 or 16"]


def test_stages_are_at_least_one() -> None:
    assert problems(change(stages=0)) == ["kernel 't' has 0 stages: fewer than 1"]


@pytest.mark.parametrize("persistent", [-1, 33, 1.5, "2"])
def test_persistent_programs_are_a_number_that_a_multiprocessor_may_hold(persistent: object) -> None:
    assert problems(change(persistent=persistent)) == [
        f"kernel 't' has {persistent} persistent programs a multiprocessor: not 0 to 32"
    ]


def test_a_kernel_of_one_program_and_one_without_a_loop_have_nothing_to_choose() -> None:
    found = []
    for name, text, chosen in (
        ("s", "in X[m]\nS = X[m] * X[m] :: sum(m)\nout S", KernelSchedule(persistent=2)),
        ("y", "in X[m]\nY[m] = 2 * X[m]\nout Y", KernelSchedule(one_loop=True)),
    ):
        one = partition(simplify(parse(text, name=f"{name}.cascade")).cascade, bounded=())
        tiles = dict.fromkeys(tiled_variables(one, one.kernels[0].name), 16)
        with pytest.raises(ScheduleError) as caught:
            check_schedule(one, Schedule(kernels={one.kernels[0].name: replace(chosen, tiles=tiles)}))
        found += [d.headline for d in caught.value.diagnostics]
    assert found == [
        "kernel 's' is one program: it has no grid to walk over",
        "kernel 'y' has no loop to test every tile in",
    ]


@pytest.mark.parametrize("parts", [-1, 0, 16385, 999_999_999, 1.5])
def test_a_rank_is_split_into_no_more_parts_than_run_together(parts: object) -> None:
    found = problems(replace(legal(), split={"m": parts}))  # type: ignore[dict-item]
    assert found == [f"'m' is split into {parts} parts: not 1 to 16384"]
    check_schedule(program(), replace(legal(), split={"m": 16384}))


def test_all_mistakes_are_reported_at_once() -> None:
    assert len(problems(change(tiles={"p": 5}, warps=3, stages=0))) == 4


@pytest.mark.parametrize(
    ("text", "headline"),
    [
        ("{", "the schedule is not JSON: Expecting property name enclosed in double quotes at line 1"),
        ("[]", "the schedule has no object 'kernels'"),
        ("{}", "the schedule has no object 'kernels'"),
        ('{"kernels": {"t": 3}}', "the schedule of kernel 't' is not an object"),
        ('{"kernels": {"t": {"warp": 3}}}', "kernel 't' has no choice 'warp'"),
        ('{"kernels": {"t": {"warps": "4"}}}', "'warps' of kernel 't' is '4', not a whole number"),
        ('{"kernels": {"t": {"warps": true}}}', "'warps' of kernel 't' is True, not a whole number"),
        ('{"kernels": {"t": {"persistent": true}}}', "'persistent' of kernel 't' is True, not a whole number"),
        ('{"kernels": {"t": {"one_loop": 1}}}', "'one_loop' of kernel 't' is 1, not true or false"),
        ('{"kernels": {"t": {"oneloop": true}}}', "kernel 't' has no choice 'oneloop'"),
        ('{"kernels": {"t": {"tiles": {"p": 1.5}}}}', "the tile of 'p' in kernel 't' is 1.5, not a whole number"),
    ],
)
def test_a_bad_file_is_refused(text: str, headline: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_json(text)
    assert caught.value.diagnostics[0].headline == headline
    assert caught.value.diagnostics[0].code == "schedule-file"


def test_a_schedule_reads_as_a_sentence() -> None:
    assert str(legal()) == "t: tiles p: 32, m: 16; warps 4; stages 2; loads by pointers"
    assert str(change(order="descending", one_loop=True, persistent=2)) == (
        "t: tiles p: 32, m: 16; warps 4; stages 2; loads by pointers; tiles descending; one loop; "
        "2 persistent a multiprocessor"
    )
