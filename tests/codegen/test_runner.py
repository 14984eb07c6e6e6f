"""What a call needs beside its tensors is worked out once a signature: launches, and what they are handed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen.launch import build, plan
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.codegen.runner import Runner, _Launches, present_target
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.rewrites.differentiate import differentiate
from tests.codegen.calls import inputs_of, qkv

SMALL = {"B": 2, "H": 3, "P": 21, "M": 34, "E": 16, "F": 8}


@pytest.mark.parametrize("name", ["softmax_attention", "softmax_lse", "alibi", "diff", "sink", "gqa"])
@pytest.mark.parametrize("part", ["original", "forward", "backward"])
def test_launches_are_handed_what_was_planned(name: str, part: str) -> None:
    original = load(name)
    cascade: Cascade = original if part == "original" else getattr(differentiate(original), part)
    inputs = inputs_of(cascade, "bfloat16", **SMALL)
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    features = {r: binding.extents[r] for r in feature_ranks(cascade)}
    built = build(cascade, extents=features, dtype="bfloat16", target=present_target())
    launches = _Launches(built, inputs, binding)
    handed: list[tuple[Any, ...]] = []
    launches.launches = [
        (lambda *given, **options: handed.append((given, options)), *rest) for _, *rest in launches.launches
    ]
    outputs = launches._run(list(inputs.values()))
    assert set(cascade.output_names) <= set(outputs)
    calls = plan(built, outputs, binding)
    assert len(handed) == len(calls)
    for (given, options), call in zip(handed, calls, strict=True):
        count = len(call.tensors)
        assert all(a is outputs[t] for a, t in zip(given, call.tensors.values(), strict=False))
        assert list(given[count:]) == list(call.arguments.values())
        assert (options["num_warps"], options["num_stages"]) == (call.warps, call.stages)


def test_a_signature_is_worked_out_once() -> None:
    op = ec.compile("softmax_attention")
    for _ in range(3):
        op(*qkv())
    assert len(op._runner.calls) == 1
    op(*qkv(22))
    op(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv()))
    assert len(op._runner.calls) == 3 and len(op._runner.built) == 1


def test_signatures_that_are_forgotten_are_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einsumcascade.codegen.runner.REMEMBERED", 2)
    runner = Runner(cascade=load("softmax_attention"))
    for p in (5, 6, 7, 5):
        (out,) = runner(qkv(p))
        torch.testing.assert_close(out, ec.compile("softmax_attention")(*qkv(p)))
        assert len(runner.calls) <= 2
