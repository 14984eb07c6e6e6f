"""The op on CPU tensors: values, what it shows, its mistakes, its time and memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen.op import Op
from einsumcascade.errors import EinsumCascadeError, InputError, LoweringError, ScheduleError
from einsumcascade.gallery import load
from einsumcascade.language.parser import constrained, parse
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.calls import NO_GRADIENT, TWO_KERNELS, VARIANTS, inputs_of, qkv, strided, variant_inputs
from tests.codegen.judging import assert_within_bounds

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
SMALL = {"B": 2, "P": 21, "M": 34, "E": 16, "F": 8}


def refuse(code: str, action: object, *arguments: object, **named: object) -> str:
    with pytest.raises(EinsumCascadeError) as caught:
        action(*arguments, **named)  # type: ignore[operator]
    assert getattr(caught.value, "codes", None) == (code,)
    return str(caught.value)


# --- values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_within_the_error_rule(name: str, dtype: str) -> None:
    cascade = load(name)
    inputs = variant_inputs(name, dtype)
    assert_within_bounds(cascade, inputs, ec.compile(cascade)(*inputs.values()))


def test_what_is_no_cascade_is_refused() -> None:
    with pytest.raises(InputError, match="a NoneType cannot be compiled"):
        ec.compile(None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_program_of_two_kernels_is_within_the_error_rule(dtype: str) -> None:
    inputs = inputs_of(TWO_KERNELS, dtype, P=33, M=20, F=8)
    op = ec.compile(TWO_KERNELS)
    assert_within_bounds(TWO_KERNELS, inputs, op(**inputs))
    assert len(op.schedule.kernels) == 2


def test_inputs_are_given_by_position_by_name_or_both() -> None:
    op = ec.compile("softmax_attention")
    q, k, v = qkv()
    expected = op(q, k, v)
    assert torch.equal(op(V=v, K=k, Q=q), expected)
    assert torch.equal(op(q, V=v, K=k), expected)


def test_several_outputs_are_a_tuple_in_the_order_of_out() -> None:
    out, lse = ec.compile("softmax_lse")(*qkv(dtype=torch.bfloat16))
    assert (out.shape, out.dtype) == ((2, 3, 21, 8), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 3, 21), torch.float32)


@pytest.mark.parametrize("kind", ["transposed", "columns first", "every second", "broadcast", "an offset"])
def test_strides_do_not_matter(kind: str) -> None:
    inputs = strided(kind)
    op = ec.compile("softmax_attention")
    actual = op(**inputs)
    assert isinstance(actual, torch.Tensor) and actual.is_contiguous()
    torch.testing.assert_close(actual, op(**{n: t.contiguous() for n, t in inputs.items()}))
    assert_within_bounds(load("softmax_attention"), inputs, actual)


@pytest.mark.parametrize("extents", [{"b": 1, "h": 1}, {"p": 1}, {"m": 1}, {"p": 1, "m": 1, "e": 1, "f": 1}])
def test_extents_of_one(extents: dict[str, int]) -> None:
    inputs = dict(zip("QKV", qkv(**extents), strict=True))  # type: ignore[arg-type]
    assert_within_bounds(load("softmax_attention"), inputs, ec.compile("softmax_attention")(**inputs))


def test_a_tensor_that_is_negated_when_it_is_read_is_read_negated() -> None:
    q, k, v = qkv()
    op = ec.compile("softmax_attention")
    assert torch.equal(op(torch._neg_view(q), k, v), op(-q, k, v))


def test_empty_extents_give_empty_outputs_and_rows_without_keys_give_zero() -> None:
    op = ec.compile("softmax_attention")
    assert op(*qkv(p=0)).shape == (2, 3, 0, 8)
    assert torch.equal(op(*qkv(m=0)), torch.zeros(2, 3, 21, 8))


def test_large_scores_do_not_overflow() -> None:
    cascade = constrained(load("softmax_attention"), "m < p", {})
    q, k, v = qkv(dtype=torch.bfloat16)
    inputs = {"Q": q * 50, "K": k, "V": v}
    actual = ec.compile(cascade)(**inputs)
    assert_within_bounds(cascade, inputs, actual)
    assert isinstance(actual, torch.Tensor) and torch.equal(actual[:, :, 0], torch.zeros_like(actual[:, :, 0]))


def test_constants_replace_those_of_the_text() -> None:
    inputs = dict(zip("QKV", qkv(), strict=True))
    cascade = load("softmax_attention")
    actual = ec.compile(cascade, constants={"scale": 0.5})(**inputs)
    expected = ec.reference.run(cascade, {n: t.numpy() for n, t in inputs.items()}, constants={"scale": 0.5})
    torch.testing.assert_close(actual, torch.from_numpy(expected["AV"]).float())


def test_an_output_that_is_an_input_is_a_tensor_of_its_own() -> None:
    x = torch.ones(3)
    doubled, same = ec.compile(parse("in X[m]\nS[m] = 2 * X[m]\nout S, X"))(x)
    assert torch.equal(doubled, 2 * x) and torch.equal(same, x) and same.data_ptr() != x.data_ptr()


def test_a_tensor_that_only_indexes_may_come_first_and_hold_whole_numbers() -> None:
    op = ec.compile(parse("in ROW[p], X[m,e]\nY[p,e] = 2 * X[ROW[p],e]\nout Y"))
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(op(rows, x), 2 * x[rows])


# --- what an op shows -------------------------------------------------------------------------------------------


def test_the_text_is_that_of_the_last_call() -> None:
    op = ec.compile("softmax_attention")
    assert op.source == op.kernel(extents={"E": 64, "F": 64}, dtype="bfloat16").source
    op(*qkv(dtype=torch.float16))
    assert op.source == op.kernel(extents={"E": 16, "F": 8}, dtype="float16").source
    assert op.schedule == op.kernel(extents={"E": 16, "F": 8}, dtype="float16").schedule
    op(*qkv(dtype=torch.float64))
    assert op.source == op.kernel(extents={"E": 16, "F": 8}, dtype="bfloat16").source


def test_one_text_serves_all_lengths() -> None:
    op = ec.compile("sliding_window")
    texts = set()
    for p, m in ((7, 9), (640, 1)):
        op(*qkv(p, m))
        texts.add(op.source)
    assert len(texts) == 1 and len(op._runner.built) == 1
    lengths = {op.kernel(extents={"P": n, "M": 2 * n, "B": n}).source for n in (3, 4096)}
    assert lengths == {op.kernel().source}


def test_the_derivation_comes_with_the_op() -> None:
    assert "3 passes -> 1 over M" in str(ec.compile("softmax_attention").derivation)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_of_a_target_needs_no_gpu(target: str) -> None:
    kernel = ec.compile("softmax_attention").kernel(extents={"E": 64, "F": 64}, dtype="bfloat16", target=target)
    compile(kernel.source, "kernel", "exec")
    assert kernel.target.name == target and kernel.program.kernels[0].name in kernel.schedule.kernels


def test_a_schedule_is_taken_at_compile_or_for_one_kernel() -> None:
    chosen = Schedule(kernels={"softmax_attention": KernelSchedule(tiles={"p": 32, "m": 16}, warps=2, stages=1)})
    op = ec.compile("softmax_attention", schedule=chosen)
    assert op.schedule == chosen
    assert op.kernel().source == ec.compile("softmax_attention").kernel(schedule=chosen).source
    assert_within_bounds(load("softmax_attention"), dict(zip("QKV", qkv(), strict=True)), op(*qkv()))


def precisions(op: Op) -> set[str]:
    return set(re.findall(r'input_precision="(\w+)"', op.kernel(dtype="float32").source))


def test_float32_products_are_exact_unless_the_caller_allows_less() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        op = ec.compile("softmax_attention")
        assert precisions(op) == {"ieee"}
        for allowed, precision in (("high", "tf32x3"), ("medium", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(allowed)
            assert precisions(op) == {precision}
            assert precisions(ec.compile("softmax_attention", precision="ieee")) == {"ieee"}
        for precision in ("ieee", "tf32x3", "tf32"):
            assert precisions(ec.compile("softmax_attention", precision=precision)) == {precision}
    finally:
        torch.set_float32_matmul_precision(before)


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_a_gradient_that_cannot_be_given_is_one_clear_error() -> None:
    op = ec.compile(ec.parse(NO_GRADIENT))
    x = [torch.randn(3, 4, 5, requires_grad=True)]
    with pytest.raises(LoweringError, match="which another kernel than that of its iteration reads, has no lowering"):
        op(*x).sum().backward()
    with torch.no_grad():
        assert not op(*x).requires_grad


def test_mistakes_in_a_call_are_one_message_each() -> None:
    op = ec.compile("softmax_attention")
    q, k, v = qkv()
    assert "4 tensors for 3 inputs" in refuse("too-many-inputs", op, q, k, v, v)
    assert "did you mean 'V'?" in refuse("unknown-input", op, q, k, v=v)
    assert "K is given by position and by name" in refuse("repeated-input", op, q, k, K=k, V=v)
    assert "V not given" in refuse("missing-input", op, q, k)
    assert "K is a list" in refuse("wrong-type", op, q, [1.0], v)
    assert "K is torch.float16, but Q is torch.float32" in refuse("wrong-dtype", op, q, k.half(), v)
    assert "Q is torch.int32" in refuse("wrong-dtype", op, q.int(), k.int(), v.int())
    assert "K is on meta, but Q on cpu" in refuse("wrong-device", op, q, k.to("meta"), v)
    assert "Q is on meta" in refuse("wrong-device", op, *(x.to("meta") for x in (q, k, v)))
    assert refuse("rank-count", op, q[0], k, v)
    assert "rank M" in refuse("extent-mismatch", op, q, k, v[:, :, 1:])


def test_an_op_without_real_numbers_computes_in_float32() -> None:
    op = ec.compile(parse("in ROW[p], COLUMN[m]\nS[p] = 1 :: sum(m) where ROW[p] == COLUMN[m]\nout S"))
    found = op(torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32 and found.tolist() == [2.0, 0.0]


def test_mistakes_in_options_are_one_message_each() -> None:
    assert "did you mean 'tf32'?" in refuse("unknown-precision", ec.compile, "gqa", precision="tf3")
    assert "did you mean 'scale'?" in refuse("unknown-constant", ec.compile, "gqa", constants={"scal": 1.0})
    op = ec.compile("gqa")
    assert "did you mean 'float16'?" in refuse("wrong-dtype", op.kernel, dtype="float1")
    assert refuse("wrong-dtype", op.kernel, dtype="float64")
    assert refuse("unknown-target", op.kernel, target="cuda:91")
    assert refuse("unknown-rank", op.kernel, extents={"Z": 3})
    with pytest.raises(ScheduleError):
        op.kernel(schedule=Schedule(kernels={"gqb": KernelSchedule()}))
    with pytest.raises(LoweringError, match="without inputs"):
        ec.compile(parse("rank m = 4\nS[m] = m + 1\nout S"))
    with pytest.raises(InputError):
        op.kernel(extents={"E": -1})


# --- time and memory --------------------------------------------------------------------------------------------

MEASURE = """
import resource, statistics, time
import torch
import einsumcascade as ec

torch.set_num_threads(1)
q, k, v = (torch.randn(1, 4, 4096, 64) for _ in range(3))
op = ec.compile("softmax_attention")
op(q[:, :1, :64], k[:, :1], v[:, :1])


def seconds(action):
    start = time.process_time()
    action()
    return time.process_time() - start


before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ours = [seconds(lambda: op(q, k, v)) for _ in range(3)]
extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
plain = [seconds(lambda: torch.softmax(q @ k.mT * 0.125, -1) @ v) for _ in range(3)]
print(extra / 1024, statistics.median(ours) / statistics.median(plain))
"""


def test_a_long_call_on_a_cpu_takes_little_memory_and_about_the_time_of_the_formula() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    extra_mib, ratio = map(float, done.stdout.split())
    assert extra_mib < 64
    assert ratio <= 3
