"""Loops over several ranks, and pointers that walk from wherever a loop begins."""

from __future__ import annotations

import re

import pytest

import einsumcascade as ec
from einsumcascade.codegen.kernel_ir import Loop, all_statements
from einsumcascade.errors import LoweringError
from einsumcascade.language.parser import parse
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from einsumcascade.verify.verify import verify

SMALL = KernelSchedule(tiles={"p": 16, "n": 16})
TEXTS = {
    "lengths of an outer variable": (
        "in Q[p,e], K[r,n,e], V[r,n,f], LEN[r]\n"
        "constraint n < LEN[r]\n"
        "S[p,r,n] = Q[p,e] * K[r,n,e] :: sum(e)\n"
        "GM[p] = S[p,r,n] :: max(r,n)\nSN[p,r,n] = exp(S[p,r,n] - GM[p])\n"
        "SD[p] = SN[p,r,n] :: sum(r,n)\nY[p,f] = SN[p,r,n] / SD[p] * V[r,n,f] :: sum(r,n)\nout Y"
    ),
    "what only the outer loop changes": (
        "in Q[p,e], K[r,n,e], V[n,f], G[r], W[r,e]\n"
        "S[p,r,n] = Q[p,e] * K[r,n,e] * W[r,e] :: sum(e)\n"
        "Y[p,f] = sigmoid(S[p,r,n] * G[r]) * V[n,f] :: sum(r,n)\nout Y"
    ),
    "three ranks": (
        "in Q[p,e], K[s,r,n,e], V[r,n,f], G[s]\n"
        "constraint n <= p\n"
        "S[p,s,r,n] = Q[p,e] * K[s,r,n,e] :: sum(e)\n"
        "Y[p,f] = sigmoid(S[p,s,r,n]) * G[s] * V[r,n,f] :: sum(s,r,n)\nout Y"
    ),
    "every second key, from a number on": (
        "in Q[p,e], K[m,e], V[n,f]\n"
        "S[p,n] = Q[p,e] * K[2*n+3,e] :: sum(e)\n"
        "Y[p,f] = sigmoid(S[p,n]) * V[n,f] :: sum(n) where 2*n+3 < M\nout Y"
    ),
    "the key before": (
        "in Q[p,e], K[n,e], V[n,f]\n"
        "constraint n <= p\n"
        "S[p,n] = Q[p,e] * K[n-1,e] :: sum(e)\n"
        "Y[p,f] = sigmoid(S[p,n]) * V[n,f] :: sum(n)\nout Y"
    ),
}
EXTENTS = {"P": 37, "N": 41, "M": 60, "R": 3, "S": 2, "E": 16, "F": 16}


def text(source: str) -> str:
    return source.split('"""')[2]


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_whatever_is_walked_and_wherever_it_begins_the_result_is_right(name: str, descriptors: bool) -> None:
    cascade = parse(TEXTS[name])
    ranks = {v.upper() for i in cascade.inputs for v in i.indices}
    schedule = Schedule(kernels={"cascade": KernelSchedule(tiles=SMALL.tiles, descriptors=descriptors)})
    extents = {r: n for r, n in EXTENTS.items() if r in ranks}
    found = verify(cascade, extents=extents, dtypes=("float32", "bfloat16"), schedule=schedule)
    assert found.passed, str(found)


def test_heads_of_a_group_share_keys_in_a_nest_whose_inner_loop_skips_what_a_mask_culls() -> None:
    causal = ec.load("gqa").constrain("m <= p")
    kernel = ec.compile(causal).kernel(gradient=True, dtype="bfloat16", target="cuda:90")
    tree = next(t for t in kernel.built.kernels if t.name == "gqa_backward_1")
    outer, inner = (s for s in all_statements(tree.body) if isinstance(s, Loop))
    assert (outer.rank, outer.inner, len(outer.segments)) == ("R", None, 1)
    assert (inner.rank, [bool(s.tested) for s in inner.segments]) == ("P", [True, False, True])
    maps = kernel.tiles(extents={"B": 1, "G": 1, "R": 2, "P": 1024, "M": 1024, "E": 64, "F": 64})
    tiles = next(t for t in maps if t.kernel == "gqa_backward_1")
    # 8 tiles of 128 keys and 16 of 64 queries: those on or below the diagonal.
    assert tiles.visited == sum(16 - 2 * k for k in range(8)) and tiles.full == tiles.visited - 16


def test_what_only_an_outer_loop_changes_is_loaded_in_it() -> None:
    source = text(ec.compile(parse(TEXTS["what only the outer loop changes"])).kernel().source)
    outer, inner = source.split("for i_r")[1].split("# tiles", 1)
    assert "tl.load(p_G)" in outer and "tl.load(p_W" in outer and "p_G" not in inner and "p_W" not in inner


def test_a_sum_over_a_rank_walked_that_others_wait_for_is_no_nest() -> None:
    # Scores must be complete before their maximum is: a loop over e and m has neither first.
    with pytest.raises(LoweringError) as error:
        ec.compile("ctmsync").kernel()
    assert error.value.diagnostics[0].code == "not-lowered-yet"
    assert "a rank that is neither looped nor whole ('e')" in error.value.diagnostics[0].headline


def test_a_part_of_a_split_rank_is_walked_by_pointers_that_move() -> None:
    source = text(ec.compile("softmax_attention", schedule=Schedule(split={"m": 8})).kernel().source)
    loop = re.search(r"for start_m0 .*?(?=\n    # tiles)", source, re.DOTALL)
    assert loop is not None and "p_K =" not in loop[0] and "p_K += step_K" in loop[0]


def test_a_part_of_a_split_rank_is_loaded_by_descriptors() -> None:
    kernels = {
        "gqa_0": KernelSchedule(tiles={"p": 16, "m0": 16}, descriptors=True),
        "gqa_1": KernelSchedule(tiles={"m1": 16}),
    }
    schedule = Schedule(kernels=kernels, split={"m": 3})
    assert (
        "d_K.load([tl.cast(i_m1 * M0, tl.int32) + start_m0, 0])" in ec.compile("gqa", schedule=schedule).kernel().source
    )
    extents = {"B": 1, "G": 2, "R": 2, "P": 5, "M": 70, "E": 16, "F": 16}
    found = verify("gqa", extents=extents, dtypes=("bfloat16",), schedule=schedule)
    assert found.passed, str(found)
