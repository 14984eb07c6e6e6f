"""Ops in training under torch.compile: opcheck of every variant, losses of a model, lengths without recompiling."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import einsumcascade as ec
from einsumcascade.codegen.dtypes import selectors
from einsumcascade.codegen.plain import run_plain
from einsumcascade.errors import LoweringError
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade
from einsumcascade.rewrites.differentiate import differentiable, differentiate
from einsumcascade.schedules.schedule import Schedule
from tests.codegen.calls import VARIANTS, qkv, variant_inputs
from tests.nightly import NIGHTLY


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# One output and several, saved rows and none, shared heads, states, tables, lengths, inputs that only index.
SOME = ("softmax_attention", "softmax_lse", "alibi", "gqa", "diff", "sigmoid", "t5bias", "varlen", "linattn", "dropout")


def has_gradient(name: str) -> bool:
    try:
        differentiate(load(name))
    except LoweringError:
        return False
    return bool(differentiable(load(name)))


@pytest.mark.parametrize("name", VARIANTS if NIGHTLY else SOME)
def test_the_op_of_a_variant_passes_opcheck(name: str) -> None:
    op = ec.compile(name)
    # A number that is computed with is a real one; what indexes, compares or counts stays whole.
    whole = selectors(op.cascade)
    drawn = variant_inputs(name, "float32")
    inputs = tuple(t if n in whole else t.float() for n, t in drawn.items())
    assert set(torch.library.opcheck(op._library, inputs).values()) == {"SUCCESS"}
    if has_gradient(name):
        wrt = ",".join(differentiable(op.cascade))
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
        found = torch.library.opcheck(op._recording, (*leaves, wrt))
        assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


# --- a model ----------------------------------------------------------------------------------------------------

HEADS, WIDTH = 2, 16


class Block(nn.Module):
    """A transformer block around an attention."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


def attentions() -> list[Cascade]:
    """Soft-capped, sigmoid and windowed attention, all of them causal."""
    return [
        load("softcap").constrain("m <= p"),
        load("sigmoid").constrain("m <= p"),
        load("softmax_attention").constrain("m <= p, p - m < 5"),
    ]


def plain(cascade: Cascade) -> Callable[..., torch.Tensor]:
    names = [i.tensor for i in cascade.inputs]
    return lambda *ts: run_plain(cascade, dict(zip(names, ts, strict=True)))[cascade.output_names[0]]


def losses(made: Callable[[Cascade], Callable[..., torch.Tensor]], steps: int, **options: object) -> list[float]:
    """Train to say the last token again, and return the losses."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, WIDTH), *(Block(made(c)) for c in attentions()), nn.Linear(WIDTH, 7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(7, (4, 12), generator=torch.Generator().manual_seed(1))
    target = tokens.roll(1, 1)
    function = torch.compile(model, fullgraph=True, **options) if options else model  # type: ignore[call-overload]
    out = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(function(tokens).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def test_a_compiled_model_of_three_variants_trains_as_the_formulas_do() -> None:
    ours = losses(ec.compile, 50, backend="aot_eager")
    theirs = losses(plain, 50)
    assert ours[-1] < 0.5 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_inductor_trains_as_the_formulas_do() -> None:
    torch.testing.assert_close(losses(ec.compile, 3, backend="inductor"), losses(plain, 3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", [None, Schedule(sums="accumulated")])
def test_lengths_of_training_calls_compile_once(schedule: Schedule | None) -> None:
    op = ec.compile("softcap", schedule=schedule)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda q, k, v: op(q * 2, k, v) + 1, fullgraph=True, dynamic=True, backend=counter)
    # Each distinct from every other extent of the call, 2, 3, 16 and 8.
    for n in range(20):
        p, m = 20 + 2 * n, 61 + 3 * n
        tensors = [t.requires_grad_() for t in qkv(p, m)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            function(*tensors).sum().backward()
        again = [t.detach().requires_grad_() for t in tensors]
        (op(again[0] * 2, again[1], again[2]) + 1).sum().backward()
        assert all(torch.equal(t.grad, a.grad) for t, a in zip(tensors, again, strict=True))  # type: ignore[arg-type]
    assert counter.frame_count == 1
    # One text a program, whatever the lengths.
    (pair,) = op._pairs.values()
    assert len(pair.forward.built) == len(pair.backward.built) == 1
