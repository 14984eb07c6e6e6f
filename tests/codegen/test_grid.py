"""Programs that walk over the grid, and loops that test every tile: right in every order, and one text for all GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.inspect import KernelReport
from einsumcascade.codegen.kernel_ir import Loop, all_statements
from einsumcascade.codegen.launch import Built, allocate, build, plan, run_interpreted
from einsumcascade.codegen.programs import feature_ranks, program_of
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.schedules.schedule import HEADS_INSIDE, ORDERS, KernelSchedule, Schedule
from einsumcascade.verify.gradients import backward_inputs
from tests.codegen.calls import TWO_KERNELS, inputs_of, variant_inputs
from tests.codegen.judging import assert_within_bounds
from tests.codegen.test_export import DOCUMENTS, SMALL, alone
from tests.codegen.test_kernels import DTYPES, built, fits, require, tensors
from tests.strategies import Case, cases, examples, tile_schedule

TARGET = gpu_target("cuda:90")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"
SINKS = load("softmax_attention").constrain("m <= p").constrain("m < 4 or p - m < 20")
WHOLE = parse("in X[m]\nS = X[m] * X[m] :: sum(m)\nout S", name="whole.cascade")
# A kind of kernel each: the cascade, and what of its program is chosen.
KINDS: dict[str, tuple[Cascade, Schedule]] = {
    "causal": (load("softmax_attention").constrain("m <= p"), Schedule()),
    "window": (load("sliding_window"), Schedule()),
    "parts": (SINKS, Schedule()),
    "documents": (DOCUMENTS, Schedule()),
    "ragged": (load("varlen"), Schedule()),
    "groups": (load("gqa"), Schedule()),
    "split": (load("softmax_attention").constrain("m <= p"), Schedule(split={"m": 3})),
    "two kernels": (TWO_KERNELS, Schedule()),
    "linear": (load("linear"), Schedule()),
    "own loop": (load("softmax_1p"), Schedule()),
    "solver": (load("sparsemax"), Schedule()),
}
WALKS = (
    KernelSchedule(persistent=1),
    KernelSchedule(persistent=2, one_loop=True, order=HEADS_INSIDE),
    KernelSchedule(persistent=3, order="descending"),
    KernelSchedule(one_loop=True),
)


def made(cascade: Cascade, inputs: Mapping[str, torch.Tensor], form: Schedule, walk: KernelSchedule) -> Built:
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    extents = {r: binding.extents[r] for r in feature_ranks(cascade)}
    program = program_of(cascade, extents, form)
    kernels = tile_schedule(program, (16, 32), walk=walk).kernels
    schedule = Schedule(kernels=kernels, split=form.split, sums=form.sums)
    return build(cascade, extents=extents, dtype="float32", target=TARGET, schedule=schedule)


def drawn(cascade: Cascade) -> dict[str, torch.Tensor]:
    if cascade is DOCUMENTS:
        found = inputs_of(cascade, "float32", **SMALL)
        return found | {"DOC": torch.arange(SMALL["P"]) // 9, "DOM": torch.arange(SMALL["M"]) // 7}
    if cascade.name in ("varlen", "gqa", "sparsemax", "sliding_window", "softmax_1p", "linear"):
        return variant_inputs(cascade.name, "float32")
    return inputs_of(cascade, "float32", B=2, H=2, P=37, M=50, E=16, F=8)


@pytest.mark.parametrize("walk", WALKS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_however_a_grid_is_walked_the_result_is_within_the_error_rule(name: str, walk: KernelSchedule) -> None:
    cascade, form = KINDS[name]
    inputs = drawn(cascade)
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    found, usual = (run_interpreted(made(cascade, inputs, form, w), inputs, binding) for w in (walk, KernelSchedule()))
    assert_within_bounds(cascade, inputs, tuple(found.values()))
    if not walk.one_loop:
        # Each tile of the grid is computed as before.
        assert all(torch.equal(found[n].nan_to_num(nan=7e7), usual[n].nan_to_num(nan=7e7)) for n in found)


@pytest.mark.parametrize("sums", ["apart", "accumulated"])
@pytest.mark.parametrize("walk", WALKS, ids=str)
def test_so_is_a_gradient(sums: str, walk: KernelSchedule) -> None:
    gradient = differentiate(load("softmax_attention").constrain("m <= p"))
    inputs = backward_inputs(
        gradient, inputs_of(gradient.original, "float32", B=1, H=2, P=37, M=50, E=16, F=8), "float32"
    )
    binding = bind(gradient.backward, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    kernels = made(gradient.backward, inputs, Schedule(sums=sums), walk)
    assert (".atomic_add(" in kernels.source) == (sums == "accumulated")
    found = run_interpreted(kernels, inputs, binding, shuffled=3)
    assert_within_bounds(gradient.backward, inputs, tuple(found.values()))


@examples(40)
@given(cases(), st.sampled_from(DTYPES), st.sampled_from(ORDERS), st.booleans(), st.sampled_from((0, 1, 3)))
def test_random_cascades_in_every_way(case: Case, dtype: str, order: str, one_loop: bool, persistent: int) -> None:
    case = replace(case, walk=KernelSchedule(order=order, one_loop=one_loop, persistent=persistent))
    assume(fits(case, dtype))
    inputs = tensors(case, dtype)
    kernels, binding = built(case, inputs, dtype)
    require(case, inputs, run_interpreted(kernels, inputs, binding), dtype)


# --- one loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_one_loop_has_no_tiles_without_a_test_and_visits_the_same(name: str) -> None:
    cascade, form = KINDS[name]
    inputs = drawn(cascade)
    split, whole = (made(cascade, inputs, form, KernelSchedule(one_loop=x)) for x in (False, True))
    for one, two in zip(whole.kernels, split.kernels, strict=True):
        loops = [[s for s in all_statements(k.body) if isinstance(s, Loop) and s.inner is not None] for k in (one, two)]
        assert len(loops[0]) == len(loops[1])
        for a, b in zip(*loops, strict=True):
            assert len(a.segments) == 1 and a.segments[0].tested and a.parts <= b.parts
            assert a.segments[0].tested == b.segments[-1].tested or b.parts > 1
    assert len(whole.source) < len(split.source)


def test_one_loop_walks_the_tiles_that_are_live() -> None:
    wide = load("softmax_attention").constrain("m <= p").constrain("m < 40 or p - m < 90")
    for cascade in (KINDS["causal"][0], wide):
        extents = {"B": 2, "H": 2, "P": 300, "M": 300, "E": 16, "F": 8}
        maps = []
        for one_loop in (False, True):
            tiles = KernelSchedule(tiles={"p": 32, "m": 16}, one_loop=one_loop)
            kernel = ec.compile(cascade, schedule=Schedule(kernels={"softmax_attention": tiles})).kernel(
                extents={"E": 16, "F": 8}
            )
            maps += kernel.tiles(extents=extents)
        assert maps[0].visited == maps[1].visited
        assert maps[0].full > 0 == maps[1].full
        assert torch.equal(maps[0].states > 0, maps[1].states > 0)


# --- persistent programs ----------------------------------------------------------------------------------------------


def test_a_device_decides_how_many_programs_there_are_and_the_text_does_not() -> None:
    cascade = load("softmax_attention")
    inputs = inputs_of(cascade, "float32", B=2, H=3, P=300, M=50, E=16, F=8)
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    kernels = made(cascade, inputs, Schedule(), KernelSchedule(persistent=2))
    given_tensors = allocate(kernels, inputs, binding)
    for multiprocessors, programs in ((1, 2), (7, 14), (132, 2 * 3 * 19)):
        (call,) = plan(kernels, given_tensors, binding, multiprocessors=multiprocessors)
        assert call.programs == programs
    usual = made(cascade, inputs, Schedule(), KernelSchedule())
    (call,) = plan(usual, given_tensors, binding, multiprocessors=1)
    assert call.programs == 2 * 3 * 19
    assert not re.search(r"\b132\b", kernels.source)


def test_a_grid_without_tiles_has_no_programs() -> None:
    cascade = load("softmax_attention")
    inputs = inputs_of(cascade, "float32", B=2, H=3, P=300, M=50, E=16, F=8)
    inputs["Q"] = inputs["Q"][:, :, :0]
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    kernels = made(cascade, inputs, Schedule(), KernelSchedule(persistent=2))
    assert run_interpreted(kernels, inputs, binding)["AV"].shape == (2, 3, 0, 8)


def test_an_exported_file_asks_the_device(tmp_path: Path) -> None:
    cascade = load("softmax_attention").constrain("m <= p")
    walk = KernelSchedule(tiles={"p": 16, "m": 16}, persistent=2, one_loop=True, order=HEADS_INSIDE)
    names = ("softmax_attention", "softmax_attention_backward_2")
    op = ec.compile(cascade, schedule=Schedule(kernels=dict.fromkeys(names, walk)))
    alone(op, inputs_of(cascade, "float32", **SMALL), tmp_path)
    text = op.export()
    assert "grid = (min(triton.cdiv(P, 16) * B * H, 2 * _multiprocessors(Q)),)" in text
    assert text.count("def _multiprocessors(tensor):") == 1
    assert "_multiprocessors" not in ec.compile(cascade).export()


def report_of(size: int, **choices: object) -> KernelReport:
    tiles = KernelSchedule(tiles={"p": 64, "m": 64}, warps=4, stages=3, descriptors=True, order="descending", **choices)  # type: ignore[arg-type]
    kernel = ec.compile(KINDS["causal"][0], schedule=Schedule(kernels={"softmax_attention": tiles})).kernel(
        extents={"E": size, "F": size}, dtype="bfloat16", target="cuda:90"
    )
    (report,) = kernel.inspect().kernels.values()
    assert report.spill_bytes == 0
    return report


@pytest.mark.parametrize("size", [64, 128])
def test_a_walk_over_the_grid_leaves_the_inner_loops_as_they_are(size: int) -> None:
    """Pipelined copies and asynchronous products on cuda:90, and no operation more for a score."""
    registers = []
    for one_loop in (False, True):
        usual, walked = (report_of(size, one_loop=one_loop, persistent=n) for n in (0, 2))
        registers += [usual.registers, walked.registers]
        assert len(usual.loops) == len(walked.loops) == 2 - one_loop
        for a, b in zip(usual.loops, walked.loops, strict=True):
            assert not b.serialised and b.opcodes["UTMALDG"] == a.opcodes["UTMALDG"] == 2
            for name in ("MMA", "MUFU", "FFMA", "FMUL", "FADD", "FMNMX", "F2FP", "SHFL"):
                assert a.count(name) == b.count(name), name
    (row,) = [x for x in PAGE.read_text(encoding="utf-8").splitlines() if x.startswith(f"| heads of {size} |")]
    assert [int(cell) for cell in row.split("|")[2:6]] == registers
