"""The judge of the benchmark: what is wrong is found, wherever it is; what is right passes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

import einsumcascade as ec
from einsumcascade.benchmarks import truth
from einsumcascade.benchmarks.truth import OUT, Bound, Truth, Verdict, evaluate, places, sample, truth_of
from einsumcascade.benchmarks.variants import VARIANTS, Shape, draw

CPU = torch.device("cpu")
SHAPE = Shape(b=2, h=6, p=33, m=33, e=16, f=16)


def causal(*, gradients: bool) -> tuple[Truth, dict[str, torch.Tensor], torch.Tensor | None]:
    """The truth of a causal case, its inputs, and what its output receives."""
    x = draw(VARIANTS["causal"], SHAPE, torch.bfloat16, CPU)
    received = torch.randn(2, 6, 33, 16).bfloat16() if gradients else None
    return truth_of(VARIANTS["causal"], SHAPE, x, received, draws=2), x, received


def plain(x: Mapping[str, torch.Tensor], received: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What the plain formula makes of all heads."""
    variant = VARIANTS["causal"]
    return evaluate(variant, SHAPE, x, received, places(variant, SHAPE), torch.bfloat16)


def test_the_plain_formula_passes() -> None:
    found, x, received = causal(gradients=True)
    verdicts = found.judge(plain(x, received))
    assert set(verdicts) == {OUT, "Q", "K", "V"}
    assert all(v.passed and 0 < v.share < 1 for v in verdicts.values())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3.0])
def test_one_wrong_element_of_the_last_head_is_found(wrong: float) -> None:
    found, x, received = causal(gradients=True)
    for name in (OUT, "Q", "K", "V"):
        got = plain(x, received)
        got[name][-1, -1, -1, -1] += wrong
        verdicts = found.judge(got)
        assert not verdicts[name].passed
        assert all(v.passed for n, v in verdicts.items() if n != name)


def test_a_forgotten_mask_is_found() -> None:
    found, x, _ = causal(gradients=False)
    q, k, v = x.values()
    assert not found.judge({OUT: torch.nn.functional.scaled_dot_product_attention(q, k, v)})[OUT].passed
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert found.judge({OUT: right})[OUT].passed


def test_the_truth_is_that_of_the_reference_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = VARIANTS["sink"]
    x = draw(variant, SHAPE, torch.bfloat16, CPU)
    received = torch.randn(2, 6, 33, 16).bfloat16()
    whole = evaluate(variant, SHAPE, x, received, places(variant, SHAPE), torch.float64)
    monkeypatch.setattr(truth, "SCORES", 5 * SHAPE.m)
    cut = evaluate(variant, SHAPE, x, received, places(variant, SHAPE), torch.float64)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], atol=1e-12, rtol=1e-12)
    expected = ec.reference.run(variant.cascade(), {n: t.double().numpy() for n, t in x.items()})["AV"]
    np.testing.assert_allclose(whole[OUT].numpy(), expected, atol=1e-13)


def test_gradients_are_those_of_autograd() -> None:
    variant = VARIANTS["bias"]
    x = {n: t.double() for n, t in draw(variant, SHAPE, torch.float32, CPU).items()}
    received = torch.randn(2, 6, 33, 16, dtype=torch.float64)
    found = evaluate(variant, SHAPE, x, received, places(variant, SHAPE), torch.float64)
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    out = variant.formula(leaves, torch.arange(33), torch.arange(33))
    for name, g in zip(variant.wrt, torch.autograd.grad(out, list(leaves.values()), received), strict=True):
        torch.testing.assert_close(found[name], g, atol=1e-11, rtol=1e-11)


def test_gradients_that_sum_over_an_axis_are_sampled_with_all_of_it() -> None:
    some = sample(VARIANTS["sink"], SHAPE, gradients=True)
    assert {at["b"] for at in some} == {0, 1} and 1 <= len({at["h"] for at in some}) < SHAPE.h
    grouped = Shape(b=1, h=6, g=2, p=5, m=5, e=4, f=4)
    assert {at["r"] for at in sample(VARIANTS["gqa"], grouped, gradients=True)} == {0, 1, 2}
    assert len(sample(VARIANTS["causal"], SHAPE, gradients=False)) == truth.HEADS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_are_rounded_anew_by_the_roundoff_of_their_own_dtype(dtype: torch.dtype) -> None:
    moved = truth._moved(torch.ones(100, dtype=dtype), torch.Generator().manual_seed(0))
    assert set((moved - 1).tolist()) == {truth.ROUNDOFF[dtype], -truth.ROUNDOFF[dtype]}
    whole = torch.arange(3)
    assert truth._moved(whole, torch.Generator()) is whole


def test_elements_are_judged_some_at_a_time_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    want = torch.randn(7, 5, dtype=torch.float64)
    got = (want + 0.01 * torch.randn(7, 5, dtype=torch.float64)).float()
    bound = Bound(max=1.0, rms=1.0, plain_max=0.0, cond_max=0.0)
    judge = Truth(axes={OUT: "pf"}, results={OUT: want}, bounds={OUT: bound}).judge
    difference = (got.double() - want).abs()
    for size in (1, 4, 35, 1000):
        monkeypatch.setattr(truth, "JUDGED", size)
        # Also as a view that is not contiguous, as results of rivals are.
        for found in (got, got.t().contiguous().t()):
            (verdict,) = judge({OUT: found}).values()
            assert verdict.max_error == difference.max().item()
            assert verdict.rms_error == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-12)
        for place in (0, 17, 34):
            broken = got.clone()
            broken.view(-1)[place] = torch.nan
            (verdict,) = judge({OUT: broken}).values()
            assert not verdict.passed and verdict.share != verdict.share
    empty = Truth(axes={OUT: "pf"}, results={OUT: want[:0]}, bounds={OUT: bound})
    assert empty.judge({OUT: got[:0]})[OUT].passed


def test_a_verdict_is_a_share_of_its_bound() -> None:
    assert Verdict(max_error=1.0, max_bound=2.0, rms_error=3.0, rms_bound=4.0).share == 0.75
    assert Verdict(max_error=0.0, max_bound=0.0, rms_error=0.0, rms_bound=0.0).passed
    bad = Verdict(max_error=float("nan"), max_bound=2.0, rms_error=0.0, rms_bound=1.0)
    assert not bad.passed and bad.share != bad.share
