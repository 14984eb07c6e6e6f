"""The op on CPU tensors, in traces and in exported programs; the same checks on a GPU where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen import op as op_module
from einsumcascade.codegen.op import Op
from einsumcascade.errors import EinsumCascadeError, InputError, LoweringError, ScheduleError
from einsumcascade.gallery import header, load, names
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import constrained, parse
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from einsumcascade.verify.verify import filled_extents, random_inputs
from tests.codegen.judging import assert_within_bounds

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = tuple(name for name in names() if header(name).kernel == "yes")
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
SMALL = {"B": 2, "P": 21, "M": 34, "E": 16, "F": 8}
# A row statistic of one kernel is what the other subtracts.
TWO_KERNELS = parse(
    "in X[p,m], V[m,f]\nC[m] = X[p,m] :: sum(p)\nS[p,m] = exp(X[p,m] - C[m])\nY[p,f] = S[p,m] * V[m,f] :: sum(m)\nout Y",
    name="column_sums.cascade",
)


def qkv(
    p: int = 21, m: int = 34, *, e: int = 16, f: int = 8, dtype: torch.dtype = torch.float32, b: int = 2, h: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(p + m)
    shapes = ((b, h, p, e), (b, h, m, e), (b, h, m, f))
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return q, k, v


def inputs_of(cascade: Cascade, dtype: str, **extents: int) -> dict[str, torch.Tensor]:
    given = bind(cascade, extents=filled_extents(cascade, {k: n for k, n in extents.items() if k in ranks(cascade)}))
    return random_inputs(cascade, given, dtype)


def ranks(cascade: Cascade) -> set[str]:
    return {v.upper() for i in cascade.inputs for v in i.indices}


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
    inputs = inputs_of(cascade, dtype, **SMALL)
    assert_within_bounds(cascade, inputs, ec.compile(cascade)(*inputs.values()))


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


def strided(kind: str) -> dict[str, torch.Tensor]:
    q, k, v = qkv()
    match kind:
        case "transposed":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        case "columns first":
            q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
        case "every second":
            q, k, v = (torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in (q, k, v))
        case "broadcast":
            k, v = (x[:, :1].expand(-1, 3, -1, -1) for x in (k, v))
        case "an offset":
            q, k, v = (torch.cat((x[:, :, :1], x), 2)[:, :, 1:] for x in (q, k, v))
    return {"Q": q, "K": k, "V": v}


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
    assert len(texts) == 1 and len(op._built) == 1
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


# --- traces and exports -----------------------------------------------------------------------------------------

TRACED = {
    "softmax_attention": load("softmax_attention"),
    "softmax_lse": load("softmax_lse"),
    "alibi": load("alibi"),
    "linear": load("linear"),
    "two kernels": TWO_KERNELS,
}


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
        ops = list(pool.map(lambda _: ec.compile(cascade), range(32)))
        results = list(pool.map(lambda op: op(x), ops))
    assert len({id(op._library) for op in ops}) == 1
    assert all(torch.equal(r, x.amax(1)) for r in results)


def test_a_registration_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = parse("in X[p,m]\nFAILS[p] = X[p,m] :: max(m)\nout FAILS")
    before = dict(op_module._OPS)

    def fail(self: object, fake: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("torch._library.custom_ops.CustomOpDef.register_fake", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            ec.compile(cascade)
    assert before == op_module._OPS
    x = torch.randn(5, 7)
    assert torch.library.opcheck(ec.compile(cascade)._library, (x,))["test_faketensor"] == "SUCCESS"


def test_a_first_call_that_fails_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ec.compile("softmax_attention")

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(op_module, "build", fail)
        with pytest.raises(MemoryError):
            op(*qkv())
    assert not op._built and op._last is None
    assert op(*qkv()).shape == (2, 3, 21, 8)


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_a_tensor_that_requires_grad_is_one_clear_error() -> None:
    op = ec.compile("softmax_attention")
    q, k, v = qkv()
    q.requires_grad_()
    assert "Q requires grad" in refuse("requires-grad", op, q, k, v)
    with torch.no_grad():
        assert torch.equal(op(q, k, v), op(q.detach(), k, v))


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


def test_an_op_without_real_numbers_is_refused() -> None:
    op = ec.compile(parse("in ROW[p], COLUMN[m]\nS[p] = 1 :: sum(m) where ROW[p] == COLUMN[m]\nout S"))
    assert refuse("input-dtype", op, torch.tensor([1, 2]), torch.tensor([1, 1]))


def test_mistakes_in_options_are_one_message_each() -> None:
    assert "did you mean 'tf32'?" in refuse("unknown-precision", ec.compile, "gqa", precision="tf3")
    assert "did you mean 'scale'?" in refuse("unknown-constant", ec.compile, "gqa", constants={"scal": 1.0})
    op = ec.compile("gqa")
    assert "did you mean 'float16'?" in refuse("wrong-dtype", op.kernel, dtype="float1")
    assert refuse("wrong-dtype", op.kernel, dtype="float64")
    assert refuse("unknown-target", op.kernel, target="cuda:91")
    assert refuse("unknown-rank", op.kernel, extents={"Z": 3})
    with pytest.raises(ScheduleError):
        op.kernel(schedule=Schedule(kernels={}))
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


# --- the same on a GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_within_the_error_rule_on_a_gpu(name: str, dtype: str) -> None:
    cascade = load(name)
    inputs = {n: t.cuda() for n, t in inputs_of(cascade, dtype, B=2, P=150, M=77, E=64, F=64).items()}
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
    assert "K is on cpu, but Q on cuda:0" in refuse("wrong-device", ec.compile("gqa"), q.cuda(), k, v)
