"""`flex_attention`: published callables as their authors write them, against PyTorch's own on a CPU."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as theirs

import einsumcascade as ec
from einsumcascade.codegen import runner
from einsumcascade.codegen.flex import _op, traced
from einsumcascade.codegen.launch import run_interpreted
from einsumcascade.errors import DiagnosedError
from einsumcascade.language.extents import bind
from einsumcascade.language.parser import parse
from tests.codegen import gym
from tests.codegen.calls import qkv
from tests.codegen.judging import assert_within_bounds

SHAPE = {"p": gym.LENGTH, "m": gym.LENGTH, "b": 2, "h": gym.HEADS}
PAIRS = [
    ("softcap", "causal documents"),
    ("alibi table", "padded"),
    ("relative", "natten"),
    ("t5", "prefix"),
    ("temperature", "one batch sees nothing"),
    ("causal", "blocks"),
]


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, lse = theirs(q, k, v, return_lse=True, **options)
    return out, lse


def block(mask: Callable[..., Any] | None, p: int = gym.LENGTH, m: int = gym.LENGTH) -> Any:
    return None if mask is None else create_block_mask(mask, 2, gym.HEADS, p, m, device="cpu")


def assert_the_same(score_mod: Any, mask_mod: Any) -> None:
    """By the error rule in float32; and equal to PyTorch's eager call as far as both round."""
    q, k, v = qkv(**SHAPE)
    mask = block(mask_mod)
    op, tensors = traced(q, k, v, score_mod, mask, return_lse=True)
    inputs = {i.tensor: t for i, t in zip(op.cascade.inputs, tensors, strict=True)}
    assert_within_bounds(op.cascade, inputs, op(*tensors))
    assert parse(str(op.cascade)) == op.cascade
    found = ec.flex_attention(q, k, v, score_mod, mask, return_lse=True)
    for ours, torchs in zip(found, eager(q, k, v, score_mod=score_mod, block_mask=mask), strict=True):
        assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype)
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("name", gym.MASKS)
def test_a_published_mask_is_what_it_is_in_pytorch(name: str) -> None:
    assert_the_same(None, gym.MASKS[name])


@pytest.mark.parametrize("name", gym.SCORES)
def test_a_published_score_is_what_it_is_in_pytorch(name: str) -> None:
    assert_the_same(gym.SCORES[name], None)


@pytest.mark.parametrize(("score", "mask"), PAIRS)
def test_scores_and_masks_go_together(score: str, mask: str) -> None:
    assert_the_same(gym.SCORES[score], gym.MASKS[mask])


@pytest.mark.parametrize("name", ["causal documents", "natten clamped", "padded", "nothing"])
def test_in_float64_a_mask_agrees_near_rounding(name: str) -> None:
    q, k, v = qkv(**SHAPE, dtype=torch.float64)
    mask = block(gym.MASKS[name])
    found = ec.flex_attention(q, k, v, gym.softcap(2.0), mask, return_lse=True)
    for ours, torchs in zip(found, eager(q, k, v, score_mod=gym.softcap(2.0), block_mask=mask), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_the_error_rule(dtype: torch.dtype) -> None:
    q, k, v = qkv(**SHAPE, dtype=dtype)
    bias = gym.randn(gym.HEADS, 2 * gym.LENGTH - 1).to(dtype)
    op, tensors = traced(q, k, v, gym.relative(bias), mask_mod=gym.MASKS["causal documents"], return_lse=True)
    inputs = {i.tensor: t for i, t in zip(op.cascade.inputs, tensors, strict=True)}
    assert_within_bounds(op.cascade, inputs, op(*tensors))
    assert ec.flex_attention(q, k, v, gym.relative(bias)).dtype == dtype


@pytest.mark.parametrize("groups", [1, 2])
def test_heads_may_share_keys(groups: int) -> None:
    q, k, v = qkv(**SHAPE, dtype=torch.float64)
    k, v = k[:, :groups], v[:, :groups]
    score, mask = gym.alibi(gym.HEADS), block(gym.of_heads(torch.tensor([True, False, True, False]), 4))
    found = ec.flex_attention(q, k, v, score, mask, enable_gqa=True, return_lse=True)
    for ours, torchs in zip(found, eager(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)
    table = gym.alibi_table(torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64))
    ours = ec.flex_attention(q, k, v, table, None, 0.3, True)
    torch.testing.assert_close(ours, eager(q, k, v, score_mod=table, scale=0.3, enable_gqa=True)[0])


def test_one_batch_of_keys_serves_all_and_tables_may_be_longer_than_what_indexes_them() -> None:
    q, k, v = qkv(5, 9)
    table = gym.randn(8, 30, 30)
    score = lambda s, b, h, i, j: s + table[h, i, j]  # noqa: E731
    ours = ec.flex_attention(q, k[:1], v[:1], score)
    torch.testing.assert_close(
        ours, eager(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), score_mod=score)[0]
    )


def test_lengths_of_zero_and_one() -> None:
    for p, m in ((1, 1), (0, 3), (3, 0), (1, 40)):
        out, lse = ec.flex_attention(*qkv(p, m), gym.alibi(3), mask_mod=gym.causal, return_lse=True)
        assert out.shape == (2, 3, p, 8) and not out.isnan().any()
        assert m or (torch.equal(out, torch.zeros(2, 3, p, 8)) and bool((lse == -torch.inf).all()))


def test_masks_of_text_go_with_callables() -> None:
    q, k, v = qkv(**SHAPE)
    text = ec.mask("m <= p") & (ec.mask("p - m < w", w=5) | ec.mask("h == 1"))
    want = block(lambda b, h, i, j: (j <= i) & ((i - j < 5) | (h == 1)) & (j != 2))
    ours = ec.flex_attention(q, k, v, gym.softcap(2.0), text, mask_mod=lambda b, h, i, j: j != 2)
    torch.testing.assert_close(ours, eager(q, k, v, score_mod=gym.softcap(2.0), block_mask=want)[0])
    grouped = ec.flex_attention(q, k[:, :2], v[:, :2], gym.softcap(2.0), want, enable_gqa=True)
    text = text & ec.mask("m != 2")
    torch.testing.assert_close(
        ec.flex_attention(q, k[:, :2], v[:, :2], gym.softcap(2.0), mask_mod=text, enable_gqa=True), grouped
    )


def test_a_row_that_no_key_is_for_is_zero_and_its_lse_minus_infinity() -> None:
    out, lse = ec.flex_attention(*qkv(**SHAPE), mask_mod=lambda b, h, i, j: (b == 1) & (i > 2), return_lse=True)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and bool((lse[0] == -torch.inf).all())
    assert torch.equal(out[1, :, :3], torch.zeros_like(out[1, :, :3])) and not out.isnan().any()


@pytest.mark.parametrize("groups", [4, 2])
def test_gradients_reach_the_inputs_and_what_a_callable_captures(groups: int) -> None:
    q, k, v = qkv(9, 9, h=4)
    k, v = k[:, :groups], v[:, :groups]
    slopes, bias = gym.randn(4), gym.randn(4, 17)
    leaves = [t.requires_grad_() for t in (q, k, v, slopes, bias)]
    weights = gym.randn(2, 4, 9, 8)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return 5 * torch.tanh(s / 5) + slopes[h] * (j - i) + bias[h, i - j + 8]

    out = ec.flex_attention(q, k, v, score, mask_mod=gym.causal, enable_gqa=True)
    found = torch.autograd.grad((out * weights).sum(), leaves)
    i, j = torch.arange(9)[:, None], torch.arange(9)[None]
    keys, values = (t.repeat_interleave(4 // groups, 1) for t in (k, v))
    scores = score(q @ keys.mT * 16**-0.5, 0, torch.arange(4)[:, None, None], i, j)
    plain = scores.masked_fill(i < j, -torch.inf).softmax(-1) @ values
    for ours, theirs_ in zip(found, torch.autograd.grad((plain * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs_, rtol=1e-4, atol=1e-5)


# --- compilation ------------------------------------------------------------------------------------------------


def test_a_hundred_lengths_meet_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []
    build = runner.build
    monkeypatch.setattr(runner, "build", lambda *args, **options: builds.append(1) or build(*args, **options))
    _op.cache_clear()
    for n in range(2, 102):
        document = torch.arange(n) // 7
        slopes, bias = gym.randn(3), gym.randn(3, 2 * n)

        def score(s: Any, b: Any, h: Any, i: Any, j: Any, slopes: Any = slopes, bias: Any = bias) -> Any:
            return torch.tanh(s / 20) * 20 - slopes[h] * abs(i - j) + bias[h, i - j]

        def mask(b: Any, h: Any, i: Any, j: Any, document: Any = document) -> Any:
            return (document[i] == document[j]) & (i >= j)

        ec.flex_attention(*qkv(n, n), score, mask_mod=mask)
    assert len(builds) == 1 and _op.cache_info().misses == 1


def test_a_captured_number_is_part_of_the_text_and_a_captured_tensor_is_not() -> None:
    q, k, v = qkv()
    texts = {str(traced(q, k, v, gym.softcap(cap))[0].cascade) for cap in (2.0, 3.0)}
    assert len(texts) == 2
    ops = {id(traced(q, k, v, gym.temperature(torch.tensor(t)))[0]) for t in (0.1, 0.2)}
    assert len(ops) == 1


def test_the_kernel_of_several_callables_reads_as_that_of_a_text() -> None:
    q, k, v = qkv(**SHAPE)
    score = gym.chained(gym.softcap(20.0), gym.SCORES["alibi table"])
    op, _ = traced(q, k, v, score, block(gym.MASKS["joined"]))
    assert [str(c) for c in op.cascade.constraints][:3] == ["p - m <= 9", "p >= m", "p >= m or m < 2"]
    kernel = op.kernel(extents={"E": 64, "F": 64}, dtype="bfloat16", target="cuda:90").source
    assert "S[b, h, p, m] = tanh(QK[b, h, p, m] / 20.0) * 20.0 - SLOPES[h] * abs(p - m)" in kernel
    assert "p_SLOPES = SLOPES + i_h * stride_SLOPES_h" in kernel


def test_under_torch_compile_the_call_is_a_break_of_the_graph() -> None:
    q, k, v = qkv(**SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b, c: ec.flex_attention(a * 2, b, c, gym.alibi(4)) + 1, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), ec.flex_attention(q * 2, k, v, gym.alibi(4)) + 1)


# --- refusals ---------------------------------------------------------------------------------------------------


def refuse(code: str, *arguments: Any, **options: Any) -> str:
    with pytest.raises(DiagnosedError) as caught:
        ec.flex_attention(*arguments, **options)
    assert caught.value.codes == (code,)
    return str(caught.value)


TABLE = gym.randn(3, 21, 34)
UNTRACED: dict[str, tuple[str, Callable[..., Any]]] = {
    "if": ("trace-branch", lambda s, b, h, i, j: s if i > j else -s),
    "and": ("trace-branch", lambda s, b, h, i, j: torch.where(i > j and j > 2, s, 0.0)),
    "not": ("trace-branch", lambda s, b, h, i, j: torch.where(not (i > j), s, 0.0)),
    "chained": ("trace-branch", lambda s, b, h, i, j: torch.where(2 < i < 5, s, 0.0)),
    "min": ("trace-branch", lambda s, b, h, i, j: s * min(i, j)),
    "item": ("trace-number", lambda s, b, h, i, j: s + i.item()),
    "int": ("trace-number", lambda s, b, h, i, j: s + int(i)),
    "float": ("trace-number", lambda s, b, h, i, j: s + float(s)),
    "range": ("trace-number", lambda s, b, h, i, j: sum(s for _ in range(h))),
    "python list": ("trace-number", lambda s, b, h, i, j: s + [1.0, 2.0, 3.0][h]),
    "unpacked": ("trace-number", lambda s, b, h, i, j: s + sum(i)),
    "in place": ("trace-write", lambda s, b, h, i, j: s.add_(1)),
    "set": ("trace-write", lambda s, b, h, i, j: TABLE.__setitem__((h, i, j), s)),
    "round": ("trace-number", lambda s, b, h, i, j: s + round(s)),
    "floor": ("trace-number", lambda s, b, h, i, j: s + math.floor(i / 2)),
    "where alone": ("trace-operation", lambda s, b, h, i, j: torch.where(i > j)[0]),
    "clamp of four": ("trace-operation", lambda s, b, h, i, j: s.clamp(0, 1, 2)),
    "shape": ("trace-operation", lambda s, b, h, i, j: s.reshape(-1)),
    "sum": ("trace-operation", lambda s, b, h, i, j: s.sum()),
    "softmax": ("trace-operation", lambda s, b, h, i, j: torch.softmax(s, -1)),
    "bits": ("trace-operation", lambda s, b, h, i, j: s + (i & 1)),
    "shift": ("trace-operation", lambda s, b, h, i, j: s + (i << 1)),
    "whole tensor": ("trace-operation", lambda s, b, h, i, j: s + TABLE),
    "rows": ("trace-index", lambda s, b, h, i, j: s + TABLE[h, i]),
    "row times two": ("trace-index", lambda s, b, h, i, j: s + (TABLE[h] * 2)[i, j]),
    "slice": ("trace-index", lambda s, b, h, i, j: s + TABLE[h, 1:, j]),
    "real index": ("trace-index", lambda s, b, h, i, j: s + TABLE[h, i / 2, j]),
    "too many indices": ("trace-index", lambda s, b, h, i, j: s + TABLE[b, h, i, j]),
    "half": ("trace-dtype", lambda s, b, h, i, j: s.to(torch.bfloat16)),
    "complex": ("trace-dtype", lambda s, b, h, i, j: s + torch.zeros(21, dtype=torch.complex64)[i]),
    "nan": ("trace-value", lambda s, b, h, i, j: torch.where(i > j, s, float("nan"))),
    "condition": ("trace-result", lambda s, b, h, i, j: i > j),
    "nothing": ("trace-result", lambda s, b, h, i, j: None),
    "tensor": ("trace-result", lambda s, b, h, i, j: TABLE[0]),
    "too short": ("capture-length", lambda s, b, h, i, j: s + TABLE[h, j, i]),
    "beyond": ("capture-length", lambda s, b, h, i, j: s + TABLE[h, i - j + 30, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNTRACED)
def test_what_cannot_be_traced_is_refused_with_its_place(name: str) -> None:
    code, callable_ = UNTRACED[name]
    message = refuse(code, *qkv(), callable_)
    line = callable_.__code__.co_firstlineno
    assert f"--> {__file__}:{line}:" in message and "    ^" in message


def test_a_callable_with_too_few_parameters_fails_as_any_call_does() -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        ec.flex_attention(*qkv(), lambda score, b, h: score)


def test_mistakes_in_a_call_are_one_message_each() -> None:
    q, k, v = qkv()
    assert "query is a list" in refuse("wrong-type", [1.0], k, v)
    assert "its shape (3, 21, 16)" in refuse("rank-count", q[0], k, v)
    assert "rank M" in refuse("extent-mismatch", q, k, v[:, :, 1:])
    assert "rank B" in refuse("extent-mismatch", q, k[:1], v)
    assert "3 heads, key has 1" in refuse("head-count", q, k[:, :1], v[:, :1])
    assert "enable_gqa=True" in refuse("head-count", q, k[:, :1], v[:, :1])
    assert refuse("head-count", q, k[:, :2], v[:, :2], enable_gqa=True)
    assert "BIAS is torch.float16" in refuse("wrong-dtype", q, k, v, named(gym.randn(21, 34).half()))
    steps = torch.arange(21 * 34).view(21, 34)
    assert "STEPS is torch.int64" in refuse("wrong-dtype", q.half(), k.half(), v.half(), stepped(steps))
    torch.testing.assert_close(ec.flex_attention(q, k, v, stepped(steps)), eager(q, k, v, score_mod=stepped(steps))[0])
    assert refuse("number-range", q, k, v, scale=float("nan"))
    assert "block_mask is a function" in refuse("wrong-type", q, k, v, None, gym.causal)
    assert "returns a number" in refuse("trace-result", q, k, v, mask_mod=lambda b, h, i, j: i - j)
    assert "unknown-name" in refuse("unknown-name", q, k, v, mask_mod=ec.mask("n < 3"))


def stepped(steps: torch.Tensor) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: score + steps[q_idx, kv_idx] * 0.01


def named(bias: torch.Tensor) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: score + bias[q_idx, kv_idx]


def test_a_mask_that_lies_in_a_list_of_blocks_is_refused() -> None:
    from torch.nn.attention.flex_attention import BlockMask

    q, k, v = qkv(256, 256)
    number = torch.ones(1, 1, 2, dtype=torch.int32)
    blocks = BlockMask.from_kv_blocks(number, torch.zeros(1, 1, 2, 2, dtype=torch.int32))
    assert "list of blocks" in refuse("block-list", q, k, v, None, blocks)


@pytest.mark.parametrize(
    ("score", "mask", "grouped"),
    [
        (gym.chained(gym.softcap(2.0), gym.SCORES["alibi table"]), "joined", True),
        (gym.SCORES["from the end"], "natten clamped", False),
        (gym.SCORES["t5"], "causal documents", True),
        (gym.SCORES["by document"], "padded", False),
        (gym.hidden(gym.MASKS["of each batch"]), "blocks", False),
    ],
)
def test_the_kernel_computes_what_the_call_does(score: Any, mask: str, grouped: bool) -> None:
    q, k, v = qkv(**SHAPE)
    k, v = (k[:, :2], v[:, :2]) if grouped else (k, v)
    op, tensors = traced(q, k, v, score, block(gym.MASKS[mask]), enable_gqa=grouped, return_lse=True)
    inputs = {i.tensor: t for i, t in zip(op.cascade.inputs, tensors, strict=True)}
    op(*tensors)
    binding = bind(op.cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    kernel = op.kernel(extents={r: binding.extents[r] for r in "EF"}, dtype="float32")
    found = run_interpreted(kernel.built, inputs, binding)
    assert_within_bounds(op.cascade, inputs, tuple(found[o] for o in op.cascade.output_names))
