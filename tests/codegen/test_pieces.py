"""Head dimensions of any size: cut into powers of two, as exact as the plain formula, and within what a GPU has."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.inspect import KernelReport
from einsumcascade.codegen.kernel_ir import Dot, Load, Store, all_statements
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.codegen.pieces import cut
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import constrained, parse
from einsumcascade.schedules.roles import held, pieces
from tests.codegen.calls import inputs_of
from tests.codegen.judging import assert_within_bounds
from tests.codegen.test_addresses import forms
from tests.codegen.test_kernels import Case, interpreted
from tests.strategies import cases, examples

SIZES = (16, 24, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256, 320, 576)
# Every size as E and as F, and never the same.
PAIRS = [(e, SIZES[(3 * n + 5) % len(SIZES)]) for n, e in enumerate(SIZES)]
# A reduction over a cut axis that is no product, of every kind, and cut axes beside it.
ROWS = parse(
    "in Q[p,e], K[m,e], V[m,f]\nD[p,m] = (Q[p,e] - K[m,e]) ** 2 :: sum(e)\nC[p,m] = Q[p,e] + K[m,e] :: max(e)\n"
    "L[p,m] = Q[p,e] - K[m,e] :: min(e)\nX[p] = 2 * Q[p,e] :: prod(e)\nY[p] = Q[p,e] > 2 :: any(e)\n"
    "O[p,f] = (exp(-D[p,m]) + C[p,m] + L[p,m]) * V[m,f] :: sum(m)\nZ[p,e] = O[p,f] * Q[p,e] :: max(f)\n"
    "out O, X, Y, Z",
    name="rows.cascade",
)


@given(st.integers(1, 4096))
def test_pieces_hold_an_extent_with_less_than_16_to_spare(extent: int) -> None:
    found = pieces(extent)
    assert all(n >= 16 and n & (n - 1) == 0 for n in found)
    assert list(found) == sorted(found, reverse=True) and len(set(found)) == len(found)
    assert 0 <= sum(found) - extent < 16 and sum(found) == held(extent)


def both(cascade: Cascade, dtype: str, **extents: int) -> None:
    """Judge the text in the interpreter and the op on CPU tensors, both against float64."""
    inputs = inputs_of(cascade, dtype, **extents)
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    features = {r: binding.extents[r] for r in feature_ranks(cascade)}
    built = build(cascade, extents=features, dtype=dtype, target=gpu_target("cuda:90"), tile_limit=16)
    assert len(built.kernels) == len(build(cascade, extents={}, dtype=dtype, target=built.target).kernels)
    found = run_interpreted(built, inputs, binding)
    assert_within_bounds(cascade, inputs, tuple(found[o] for o in cascade.output_names))
    assert_within_bounds(cascade, inputs, ec.compile(cascade)(*inputs.values()))


@pytest.mark.parametrize(("e", "f"), PAIRS)
@pytest.mark.parametrize("name", ["softmax_attention", "linear", "causal alibi"])
def test_heads_of_any_size(name: str, e: int, f: int) -> None:
    cascade = load(name.removeprefix("causal "))
    cascade = constrained(cascade, "m <= p", {}) if name.startswith("causal ") else cascade
    dtype = ("float32", "bfloat16", "float16")[(e + f) // 8 % 3]
    both(cascade, dtype, B=1, H=2, P=19, M=37, E=e, F=f)


@pytest.mark.parametrize(("e", "f"), [(80, 72), (17, 3), (40, 112), (72, 80), (576, 96)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reductions_over_a_cut_axis_combine_its_pieces(e: int, f: int, dtype: str) -> None:
    both(ROWS, dtype, P=9, M=21, E=e, F=f)


@examples(40)
@given(cases(), st.sampled_from((40, 72, 80)), st.sampled_from((24, 72, 112)))
def test_random_cascades_with_cut_heads(case: Case, e: int, f: int) -> None:
    extents = {r: {"E": e, "F": f}.get(r, n) for r, n in case.extents.items()}
    interpreted(replace(case, extents=extents), "float32")


def test_pieces_of_powers_of_two_change_nothing() -> None:
    for kernel in ec.compile("linear").kernel(extents={"E": 64, "F": 256}).built.kernels:
        assert cut(kernel) is kernel


def test_only_the_last_piece_is_masked() -> None:
    (kernel,) = ec.compile("softmax_attention").kernel(extents={"E": 72, "F": 80}).built.kernels
    for s in all_statements(cut(kernel).body):
        if isinstance(s, Load | Store):
            mask = " and ".join(map(str, s.mask))
            assert ("e_1 < E" in mask) == (s.tensor in ("Q", "K") and s.piece == "_1"), s
            assert "e_0" not in mask and "f_" not in mask, s


def test_names_of_pieces_give_way_to_those_of_the_text() -> None:
    cascade = parse(
        "in Q[p,e], Q_0[p,e_0], K[m,e], K_0[m,e_0], V[m,f]\n"
        "S[p,m] = Q[p,e] * K[m,e] :: sum(e)\nS_0[p,m] = Q_0[p,e_0] * K_0[m,e_0] :: sum(e_0)\n"
        "O[p,f] = sigmoid(S[p,m] + S_0[p,m]) * V[m,f] :: sum(m)\nout O",
        name="names.cascade",
    )
    both(cascade, "float32", P=5, M=7, E=80, E_0=72, F=40)


def products(built: object) -> Counter[tuple[int, int]]:
    """The extents K and N of every dot in TTIR, and how many have them."""
    found: Counter[tuple[int, int]] = Counter()
    for form in forms(built):  # type: ignore[arg-type]
        for line in form.splitlines():
            shapes = re.search(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<(\d+)x(\d+)x\w+>", line)
            if shapes:
                assert shapes[2] == shapes[3]
                found[int(shapes[2]), int(shapes[4])] += 1
    return found


@pytest.mark.parametrize(("e", "f"), [(80, 80), (96, 96), (192, 128), (576, 512), (72, 40), (320, 256)])
@pytest.mark.parametrize("name", ["softmax_attention", "softcap"])
def test_heads_compile_for_sm_90_without_padded_products(name: str, e: int, f: int) -> None:
    kernel = ec.compile(name).kernel(extents={"E": e, "F": f}, dtype="bfloat16", target="cuda:90")
    (tiles,) = (k.tiles["m"] for k in kernel.schedule.kernels.values())
    # The loop stands in the text twice: once for tiles without the end of the keys.
    wanted = Counter({(n, tiles): 2 for n in pieces(e)}) + Counter({(tiles, n): 2 for n in pieces(f)})
    assert products(kernel.built) == wanted
    (report,) = kernel.inspect().kernels.values()
    assert_it_fits(report)


def assert_it_fits(report: KernelReport) -> None:
    assert report.shared_memory_bytes <= report.target.shared_memory_bytes
    hot = report.hot_loop
    assert hot is not None and hot.count("MMA") > 0 and not hot.serialised
    # What does not fit into registers lies outside the hot loop.
    assert hot.count("STL") == 0 and hot.count("LDL") <= hot.instructions // 100, str(report)


def test_latent_keys_are_loaded_once_and_are_the_values_too() -> None:
    kernel = ec.compile("mla_absorbed").kernel(extents={"C": 512, "R": 64}, dtype="bfloat16", target="cuda:90")
    assert len(kernel.program.kernels) == 1 and not kernel.program.buffers
    (tiles,) = (k.tiles["m"] for k in kernel.schedule.kernels.values())
    assert products(kernel.built) == Counter({(512, tiles): 2, (64, tiles): 2, (tiles, 512): 2})
    for loop in kernel.source.split("# tiles ")[1:]:
        assert loop.count("tl.load(p_C ") == 1 and loop.count("tl.load(p_KR ") == 1
    (report,) = kernel.inspect().kernels.values()
    assert_it_fits(report)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
@pytest.mark.parametrize(("e", "f"), [(80, 80), (192, 128), (576, 512)])
def test_heads_fit_other_targets(target: str, e: int, f: int) -> None:
    kernel = ec.compile("softmax_attention").kernel(extents={"E": e, "F": f}, dtype="bfloat16", target=target)
    for report in kernel.inspect().kernels.values():
        assert report.shared_memory_bytes <= report.target.shared_memory_bytes


def test_descriptors_load_pieces() -> None:
    chosen = ec.compile("softmax_attention").kernel(extents={"E": 80, "F": 96}, target="cuda:90").schedule
    schedule = replace(chosen, kernels={n: replace(k, descriptors=True) for n, k in chosen.kernels.items()})
    kernel = ec.compile("softmax_attention", schedule=schedule).kernel(extents={"E": 80, "F": 96}, target="cuda:90")
    assert "b_K_1 = d_K_1.load([start_m, BLOCK_E_0])" in kernel.source
    (report,) = kernel.inspect().kernels.values()
    assert_it_fits(report)
    inputs = inputs_of(load("softmax_attention"), "bfloat16", B=1, H=2, P=19, M=37, E=80, F=96)
    binding = bind(load("softmax_attention"), shapes={n: tuple(t.shape) for n, t in inputs.items()})
    found = run_interpreted(kernel.built, inputs, binding)
    assert_within_bounds(load("softmax_attention"), inputs, found["AV"])


def test_the_tree_before_the_cut_runs_on_a_cpu() -> None:
    kernel = ec.compile("softmax_attention").kernel(extents={"E": 80, "F": 80}).built.kernels[0]
    assert sum(isinstance(s, Dot) for s in all_statements(cut(kernel).body)) == 2 * sum(
        isinstance(s, Dot) for s in all_statements(kernel.body)
    )
    q = torch.randn(1, 1, 5, 80)
    assert ec.compile("softmax_attention")(q, q, q).shape == q.shape
