"""The variants of the benchmark: cascade, formula and count of work mean the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import einsumcascade as ec
from einsumcascade.benchmarks import variants
from einsumcascade.benchmarks.cases import SETS
from einsumcascade.benchmarks.truth import OUT, evaluate, places
from einsumcascade.benchmarks.variants import VARIANTS, Shape, draw, sequences

CPU = torch.device("cpu")
TINY = {c.variant.name: c for c in SETS["smoke"] if c.direction == "forward"}


@pytest.fixture(autouse=True)
def small_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, documents and sequences shorter than the tiny shapes, so that their masks do something."""
    monkeypatch.setattr(variants, "WINDOW", 7)
    monkeypatch.setattr(variants, "DOCUMENT", 11)
    monkeypatch.setattr(variants, "RAGGED", (9, 1, 14))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_formula_is_what_the_reference_makes_of_the_cascade(name: str) -> None:
    case = TINY[name]
    variant, shape = case.variant, case.shape
    x = draw(variant, shape, torch.float32, CPU)
    arrays = {n: t.double().numpy() if t.is_floating_point() else t.numpy().astype(np.int64) for n, t in x.items()}
    (expected,) = ec.reference.run(variant.cascade(), arrays).values()
    found = evaluate(variant, shape, x, None, places(variant, shape), torch.float64)[OUT]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("decode", "relu2")])
def test_live_scores_are_those_that_give_a_value_weight(name: str) -> None:
    case = TINY[name]
    # With the identity as values a row of the output is its weights.
    variant, shape = case.variant, replace(case.shape, b=1, h=1, g=0, f=case.shape.m)
    x = draw(variant, shape, torch.float32, CPU)
    x["V"] = torch.eye(shape.m).reshape([shape.extent(a) for a in variant.inputs["V"]])
    weights = evaluate(variant, shape, x, None, places(variant, shape), torch.float64)[OUT]
    live = int((weights != 0).sum())
    assert live == variant.live(shape.p, shape.m)


@pytest.mark.parametrize(("p", "m"), [(5, 5), (20, 20), (20, 9), (9, 20), (1, 1)])
def test_counts_of_rectangles_are_those_of_the_masks(p: int, m: int) -> None:
    rows, columns = torch.arange(p)[:, None], torch.arange(m)
    assert VARIANTS["causal"].live(p, m) == int(variants.past({}, rows, columns).sum())
    assert VARIANTS["window"].live(p, m) == int(variants.near({}, rows, columns).sum())


def test_a_backward_of_equal_heads_is_two_and_a_half_forwards() -> None:
    shape = Shape(b=2, h=3, p=64, m=64, e=32, f=32)
    causal = VARIANTS["causal"]
    assert causal.flop(shape, "forward") == 4 * 2 * 3 * 32 * 64 * 65 / 2
    assert causal.flop(shape, "backward") == 2.5 * causal.flop(shape, "forward")
    assert causal.flop(shape, "step") == 3.5 * causal.flop(shape, "forward")
    # Two products for the scores, one with the values.
    assert VARIANTS["diff"].flop(shape, "forward") == 1.5 * causal.flop(shape, "forward")


def test_sequences_fill_their_tokens() -> None:
    for tokens in (1, 9, 10, 100):
        assert sum(sequences(tokens)) == tokens and min(sequences(tokens)) > 0


def test_the_sets_hold_what_the_page_says() -> None:
    standard = SETS["standard"]
    known = {str(c) for c in standard}
    assert len(known) == len(standard)
    assert {str(c) for c in SETS["quick"]} <= known <= {str(c) for c in SETS["full"]}
    for name in ("full", "causal", "alibi", "window", "document", "softcap", "sigmoid", "relu2", "diff", "sink", "mla"):
        assert any(c.variant.name == name and c.direction == "forward" for c in standard)
    assert {c.variant.name for c in standard if c.direction == "step"} == {"sigmoid", "diff", "bias"}
    lengths = {c.shape.p for c in SETS["full"] if c.variant.name == "causal" and c.direction == "forward"}
    assert {2048, 4096, 8192, 16384, 32768} <= lengths
    assert all(c.flop > 0 for c in SETS["full"])
