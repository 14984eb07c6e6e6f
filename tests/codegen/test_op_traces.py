"""The op in traces and exported programs, and its registration with torch.library."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen import ops, runner
from einsumcascade.language.parser import parse
from tests.codegen.calls import TRACED, inputs_of, qkv


@pytest.mark.parametrize("name", TRACED)
def test_the_library_op_passes_opcheck(name: str) -> None:
    cascade = TRACED[name]
    inputs = tuple(inputs_of(cascade, "float32", B=1, H=2, P=9, M=12, E=8, F=8).values())
    found = torch.library.opcheck(ec.compile(cascade)._library, inputs)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", TRACED)
def test_a_compiled_function_equals_the_eager_call(name: str, dynamic: bool) -> None:
    cascade = TRACED[name]
    op = ec.compile(cascade)
    torch._dynamo.reset()
    traced = torch.compile(lambda *xs: op(*xs), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ({"P": 9, "M": 12}, {"P": 17, "M": 5}):
        inputs = tuple(inputs_of(cascade, "float32", B=1, H=2, E=8, F=8, **lengths).values())
        torch.testing.assert_close(traced(*inputs), op(*inputs), rtol=0, atol=0)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_inductor_compiles_around_an_op() -> None:
    op = ec.compile("softmax_attention")
    torch._dynamo.reset()
    q, k, v = qkv()
    traced = torch.compile(lambda a, b, c: op(a * 2, b, c) + 1, fullgraph=True)
    torch.testing.assert_close(traced(q, k, v), op(q * 2, k, v) + 1)


@pytest.mark.parametrize("name", ["softmax_attention", "softmax_lse"])
def test_a_program_is_exported_with_a_dynamic_length(name: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = ec.compile(name)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
            return self.op(q, k, v)

    length = torch.export.Dim("P", min=2, max=4096)
    exported = torch.export.export(Model(), qkv(), dynamic_shapes=({2: length}, None, None))
    assert "einsumcascade" in str(exported.graph)
    q, k, v = qkv()
    torch.testing.assert_close(
        exported.module()(q[:, :, :5], k, v), ec.compile(name)(q[:, :, :5], k, v), rtol=0, atol=0
    )


def test_first_calls_at_once_register_one_op() -> None:
    cascade = parse("in X[p,m]\nATONCE[p] = X[p,m] :: max(m)\nout ATONCE")
    x = torch.randn(5, 7)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: ec.compile(cascade), range(32)))
        results = list(pool.map(lambda op: op(x), made))
    assert len({id(op._library) for op in made}) == 1
    assert all(torch.equal(r, x.amax(1)) for r in results)


def test_a_registration_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = parse("in X[p,m]\nFAILS[p] = X[p,m] :: max(m)\nout FAILS")
    before = dict(ops._OPS)

    def fail(self: object, fake: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("torch._library.custom_ops.CustomOpDef.register_fake", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            ec.compile(cascade)
    assert before == ops._OPS
    x = torch.randn(5, 7)
    assert torch.library.opcheck(ec.compile(cascade)._library, (x,))["test_faketensor"] == "SUCCESS"


def test_a_first_call_that_fails_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ec.compile("softmax_attention")

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runner, "build", fail)
        with pytest.raises(MemoryError):
            op(*qkv())
    assert not op._runner.built and op._runner.last is None
    assert op(*qkv()).shape == (2, 3, 21, 8)
