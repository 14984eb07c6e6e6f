"""Packed kernels against float64, and what packing makes of a program."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.kernel_ir import Load, Loop, all_statements
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.codegen.plain import run_plain
from einsumcascade.errors import ScheduleError
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import rank_of
from einsumcascade.language.parser import parse
from einsumcascade.reference.errorbound import EPS, conditioning, judge
from einsumcascade.reference.interpret import run
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.calls import inputs_of
from tests.codegen.packed import GROUPS, Grouped, grouped
from tests.strategies import examples

PACK = Schedule(pack={"r": "p"})


@pytest.mark.parametrize("p", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 4, 8])
@pytest.mark.parametrize("group", ["exact", "quotient", "ranks"])
def test_heads_of_a_group_share_a_tile_and_are_right(group: str, size: int, p: int) -> None:
    case = Grouped(group=group, heads=2 * size, keys=2, mask="m <= p + M - P", p=p, parts=2 if p == 2 else 1)
    case.interpreted("float32")


@examples(40)
@given(grouped())
def test_packed_text_is_right_whatever_is_grouped(case: Grouped) -> None:
    case.interpreted("bfloat16" if case.m % 2 else "float32")


def test_a_program_reads_the_keys_of_its_group_once() -> None:
    for group in GROUPS:
        kernel = Grouped(group=group, heads=8, keys=2, mask="m <= p").built("bfloat16").kernels[0]
        (loop,) = (s for s in kernel.body if isinstance(s, Loop))
        heads = [v for v in kernel.batch if v in ("h", "r")]
        assert not heads, f"{group}: {kernel.batch}"
        tile = kernel.tiles[0]
        for s in all_statements(loop.segments[0].body):
            assert not (isinstance(s, Load) and tile in s.value.axes), s.tensor


def test_one_text_serves_all_sizes_of_groups() -> None:
    for group in ("exact", "quotient", "one", "ranks"):
        texts = {Grouped(group=group, heads=n, keys=2).built("bfloat16").source for n in (2, 6, 8, 64)}
        assert len(texts) == 1


def test_masks_bound_the_loop_by_the_query_of_a_row() -> None:
    source = Grouped(group="exact", heads=8, keys=2, mask="m <= p + M - P").built("bfloat16").source
    assert "o_p = o_ph // R" in source and "o_h = i_h1 * R + o_ph % R" in source
    assert "hi_m = tl.minimum(M, last_ph // R + M + 1 - P)" in source
    ragged = Grouped(group="exact", heads=8, keys=2, extra="ragged").built("bfloat16").source
    assert "least_LO" in ragged and "lo_m = " in ragged


def test_the_last_group_may_be_cut_short() -> None:
    made = Grouped(group="number", heads=7, keys=3, p=2).interpreted("float32")
    assert "(o_h < H)" in made.source
    # Where a rank says that groups are whole no head is tested.
    assert "o_h < H" not in Grouped(group="exact", heads=6, keys=2).built("float32").source


def test_the_kernel_of_a_packed_program_is_a_cascade_over_the_new_variables() -> None:
    case = Grouped(group="exact", heads=6, keys=2, mask="m <= p + M - P", p=3)
    (kernel,) = case.built("float32").program.kernels
    assert kernel.packed is not None and kernel.residents == ("b", "h1", "ph")
    inputs = {n: t.double().numpy() for n, t in case.inputs("float64").items()}
    whole, moved = run(case.cascade, inputs)["AV"], run(kernel.cascade, inputs)["AV"]
    for h in range(6):
        for p in range(3):
            np.testing.assert_allclose(moved[:, h // 3, p * 3 + h % 3], whole[:, h, p], rtol=1e-12, atol=1e-12)


def test_a_cpu_gives_the_same_and_every_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 2, 3, 5, 16), (2, 2, 37, 16), (2, 2, 37, 16))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    for schedule in (PACK, Schedule(pack={"r": "p"}, split={"m": 3})):
        a, b = ec.compile("gqa", schedule=schedule)(*inputs), ec.compile("gqa")(*inputs)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        mine, theirs = (torch.autograd.grad(x.square().sum(), inputs) for x in (a, b))
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_packing_is_of_the_forward_alone() -> None:
    op = ec.compile("gqa", schedule=PACK)
    assert "pr: " in str(op.kernel().schedule) and not op.kernel(gradient=True).schedule.pack
    inputs = [torch.randn(s).requires_grad_() for s in ((1, 1, 2, 3, 16), (1, 1, 9, 16), (1, 1, 9, 16))]
    op(*inputs)
    assert op.schedule.pack == {"r": "p"} and "gqa_forward" in op.schedule.kernels


def test_tiles_of_a_packed_kernel_name_its_variable() -> None:
    mine = Schedule(pack={"r": "p"}, kernels={"gqa": KernelSchedule(tiles={"pr": 32, "m": 64})})
    assert str(ec.compile("gqa", schedule=mine).kernel().schedule).startswith("gqa: tiles pr: 32, m: 64;")
    inputs = [torch.randn(s) for s in ((1, 1, 2, 3, 16), (1, 1, 9, 16), (1, 1, 9, 16))]
    torch.testing.assert_close(ec.compile("gqa", schedule=mine)(*inputs), ec.compile("gqa")(*inputs))
    with pytest.raises(ScheduleError, match="kernel 'gqa' tiles no variable 'p', only pr, m"):
        ec.compile("gqa", schedule=Schedule(pack={"r": "p"}, kernels={"gqa": KernelSchedule(tiles={"p": 32})})).kernel()


@pytest.mark.parametrize(
    ("name", "pack", "why"),
    [
        ("softmax_attention", {"h": "p"}, r"K\[b, h, m, e\] would be a tile of 3 axes"),
        ("gqa", {"g": "p"}, r"K\[b, g, m, e\] would be a tile of 3 axes"),
        ("gqa", {"x": "p"}, "gqa keeps no 'x'"),
        ("gqa", {"r": "m"}, "gqa keeps no 'm'"),
        ("gqa", {"r": "r"}, "'r' has no groups"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_reason(name: str, pack: dict[str, str], why: str) -> None:
    with pytest.raises(ScheduleError, match=why) as caught:
        ec.compile(name, schedule=Schedule(pack=pack)).kernel()
    assert caught.value.codes == ("schedule-illegal",)


def test_tiles_say_which_are_visited_by_the_rows_of_a_group() -> None:
    case = Grouped(group="exact", heads=6, keys=2, mask="m <= p", p=24, m=64)
    kernel = ec.compile(
        case.cascade, schedule=Schedule(pack={"h": "p"}, kernels={"grouped": KernelSchedule(tiles={"ph": 16, "m": 16})})
    ).kernel(dtype="float32")
    (tiles,) = kernel.tiles(extents=case.extents)
    assert tiles.axes == ("b", "h1", "ph") and tiles.states.shape == (2, 2, 5, 4)
    # Rows 16 to 31 are of the queries 5 to 10.
    assert tiles.states[0, 0].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [2, 1, 0, 0], [2, 1, 0, 0]]


@pytest.mark.parametrize(
    "name", ["alibi", "softcap", "sigmoid", "sink", "sliding_window", "dropout", "softmax_1p", "diff", "diff in parts"]
)
def test_texts_of_the_gallery_with_grouped_keys_are_right_packed(name: str) -> None:
    split = {"m": 2} if name.endswith(" in parts") else {}
    text = str(load(name.removesuffix(" in parts")))
    head, rest = text.split("\n", 1)
    for tensor in "KV":
        head = re.sub(rf"\b{tensor}\[([bs, ]*)h", rf"{tensor}[\1g", head)
        rest = re.sub(rf"\b{tensor}\[([bs, ]*)h", rf"{tensor}[\1h // R", rest)
    cascade = parse(f"{head}\nrank r = H / G\n{rest}", name="grouped.cascade")
    inputs = inputs_of(cascade, "float32", B=2, H=6, G=2, P=5, M=70, E=16, F=16, S=2)
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    extents = {rank_of(v): binding.extents[rank_of(v)] for i in cascade.inputs for v in i.indices}
    schedule = Schedule(pack={"h": "p"}, split=split)
    made = build(
        cascade, extents=extents, dtype="float32", target=gpu_target("cuda:90"), schedule=schedule, tile_limit=16
    )
    assert made.program.kernels[0].packed is not None
    found = run_interpreted(made, inputs, binding)
    expected, plain = run(cascade, inputs), run_plain(cascade, inputs)
    room = conditioning(cascade, inputs, EPS["float32"])
    for n in expected:
        verdict = judge(found[n], expected[n], plain[n], room[n])
        assert verdict.passed, f"{n}: {verdict}"


def test_rows_beyond_the_last_head_read_no_group() -> None:
    text = (
        "in Q[p,h,c], C[m,c], SL[g]\nrank r = H / G\nS[p,h,m] = Q[p,h,c] * C[m,c] :: sum(c)\n"
        "W[p,h,m] = exp(S[p,h,m] * SL[h // R])\nO[p,h,c] = W[p,h,m] * C[m,c] :: sum(m)\nout O"
    )
    source = ec.compile(parse(text)).kernel().source
    (load_of_scale,) = (line.strip() for line in source.splitlines() if "tl.load(p_SL" in line)
    assert load_of_scale.startswith("b_SL = tl.load(p_SL + o_SL, mask=o_h < H, other=0.0)")
