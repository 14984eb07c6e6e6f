"""The op on CUDA tensors: the whole gallery, strides, descriptors, traces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen.build import load_module
from einsumcascade.errors import InputError
from einsumcascade.gallery import load
from einsumcascade.language.parser import constrained
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.calls import TRACED, VARIANTS, inputs_of, qkv, strided, variant_inputs
from tests.codegen.judging import assert_within_bounds


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_within_the_error_rule_on_a_gpu(name: str, dtype: str) -> None:
    cascade = load(name)
    inputs = {n: t.cuda() for n, t in variant_inputs(name, dtype).items()}
    assert_within_bounds(cascade, inputs, ec.compile(cascade)(**inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["transposed", "columns first", "every second", "broadcast", "an offset"])
def test_strides_do_not_matter_on_a_gpu(kind: str) -> None:
    inputs = {n: t.cuda() for n, t in strided(kind).items()}
    assert_within_bounds(load("softmax_attention"), inputs, ec.compile("softmax_attention")(**inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("constraint", ["", "m <= p", "p - m < 40"])
def test_pointers_and_descriptors_give_the_same_result(constraint: str) -> None:
    cascade = constrained(load("softmax_attention"), constraint, {}) if constraint else load("softmax_attention")
    inputs = {n: t.cuda() for n, t in inputs_of(cascade, "bfloat16", B=2, H=3, P=300, M=257, E=64, F=64).items()}
    outputs = []
    for descriptors in (False, True):
        tiles = KernelSchedule(tiles={"p": 64, "m": 64}, warps=4, stages=2, descriptors=descriptors)
        op = ec.compile(cascade, schedule=Schedule(kernels={"softmax_attention": tiles}))
        outputs.append(op(**inputs))
        assert_within_bounds(cascade, inputs, outputs[-1])
        assert ("make_tensor_descriptor" in op.source) == descriptors
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRACED)
def test_a_compiled_function_equals_the_eager_call_on_a_gpu(name: str) -> None:
    cascade = TRACED[name]
    op = ec.compile(cascade)
    torch._dynamo.reset()
    traced = torch.compile(lambda *xs: op(*xs), fullgraph=True)
    for lengths in ({"P": 90, "M": 120}, {"P": 170, "M": 50}):
        found = inputs_of(cascade, "bfloat16", B=1, H=2, E=32, F=32, **lengths)
        inputs = tuple(t.cuda() for t in found.values())
        torch.testing.assert_close(traced(*inputs), op(*inputs), rtol=0, atol=0)
        torch.library.opcheck(op._library, inputs)


@pytest.mark.gpu
def test_inputs_on_two_devices_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(InputError, match="K is on cpu, but Q on cuda:0"):
        ec.compile("softmax_attention")(q.cuda(), k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["softmax_attention", "alibi"])
def test_a_training_step_is_captured_in_a_graph(name: str) -> None:
    op = ec.compile(name)
    drawn = inputs_of(op.cascade, "bfloat16", B=1, H=2, P=200, M=200, E=64, F=64)
    leaves = [t.cuda().requires_grad_() for t in drawn.values()]

    def step() -> list[torch.Tensor]:
        out = op(*leaves)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    # Kernels are compiled before, on a stream of their own, as PyTorch asks of every capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in leaves:
            t.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(captured, step())


@pytest.mark.gpu
def test_a_call_waits_for_nothing() -> None:
    op = ec.compile("softmax_attention")
    leaves = [t.cuda().requires_grad_() for t in qkv(dtype=torch.bfloat16, e=64, f=64)]
    op(*leaves).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*leaves).sum().backward()
        op(*(t.detach() for t in leaves))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_on_a_gpu(dtype: torch.dtype) -> None:
    op = ec.compile("softmax_attention")
    leaves = [t.cuda().requires_grad_() for t in qkv(e=64, f=64)]
    with torch.autocast("cuda", dtype=dtype):
        out = op(*leaves)
    out.sum().backward()
    assert out.dtype == dtype and all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


@pytest.mark.gpu
def test_an_exported_file_computes_what_the_op_does(tmp_path: Path) -> None:
    op = ec.compile("softmax_attention")
    op.export(tmp_path / "mine.py", extents={"E": 64, "F": 64})
    module = load_module((tmp_path / "mine.py").read_text(encoding="utf-8"), directory=tmp_path)
    leaves = [t.cuda().requires_grad_() for t in qkv(dtype=torch.bfloat16, e=64, f=64)]
    found = []
    for function in (op, module.softmax_attention):
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    torch.testing.assert_close(*found, rtol=0, atol=0)
