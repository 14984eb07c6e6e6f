"""Kernel text runs in Triton's interpreter as it would on a GPU."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from einsumcascade.codegen import interpreter
from einsumcascade.codegen.interpreter import KernelRunError, Launch, TensorRef, run_interpreted
from tests.codegen.tritons import FLASH_FORWARD, triton_path

HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"


@pytest.fixture(params=["installed", "oldest"])
def triton(request: pytest.FixtureRequest) -> Path | None:
    return triton_path(request.param)


def run(
    source: str,
    tensors: dict[str, torch.Tensor],
    *,
    triton: Path | None = None,
    grid: tuple[int, ...] = (1,),
    mended: bool = True,
    timeout_s: float = 60.0,
    **values: object,
) -> dict[str, torch.Tensor]:
    """Run the kernel `f` of `source` with every tensor under its own name."""
    arguments = {**{name: TensorRef(name) for name in tensors}, **values}
    launch = Launch(kernel="f", grid=grid, arguments=arguments)  # type: ignore[arg-type]
    return run_interpreted(HEAD + source, [launch], tensors, triton_path=triton, mended=mended, timeout_s=timeout_s)


DOT = """\
def f(A, B, C, N: tl.constexpr, T: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_b = tl.load(B + o)
    tl.store(C + o, tl.dot(tl.load(A + o), tl.trans(b_b) if T else b_b, input_precision="ieee"))
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_exact_with_float32_sums(triton: Path | None, dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).to(dtype)
    c = run(DOT, {"A": a, "B": b, "C": torch.empty(32, 32)}, triton=triton, N=32, T=transposed)["C"]
    want = a.double() @ (b.mT if transposed else b).double()
    torch.testing.assert_close(c.double(), want, atol=1e-5, rtol=1e-5)


def test_triton_itself_still_multiplies_bfloat16_wrongly(triton: Path | None) -> None:
    """When this fails for every supported Triton, `dot` of the mends has had its day."""
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = run(DOT, {"A": a, "B": b, "C": torch.empty(16, 16)}, triton=triton, mended=False, N=16, T=False)["C"]
    assert not torch.allclose(c.double(), a.double() @ b.double(), atol=1.0)


CAST = """\
def f(X, Y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(Y + o, tl.load(X + o).to(Y.dtype.element_ty))
"""


def tied_values() -> torch.Tensor:
    """Return float32 values around every kind of tie, and the extremes."""
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64)
    bits[:1024] = (bits[:1024] & ~0xFFFF) | 0x8000
    bits[1024:2048] = (bits[1024:2048] & ~0xFFFF) | 0x8001
    bits[2048:3072] = (bits[2048:3072] & ~0xFFFF) | 0x7FFF
    values = bits.to(torch.int32).view(torch.float32)
    values[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38])
    return values


def test_casts_to_bfloat16_round_to_nearest_even(triton: Path | None) -> None:
    torch.manual_seed(1)
    x = tied_values()
    y = run(CAST, {"X": x, "Y": torch.empty(4096, dtype=torch.bfloat16)}, triton=triton, N=4096)["Y"]
    want = x.bfloat16()
    assert torch.equal(y.isnan(), want.isnan())
    keep = ~want.isnan()
    assert torch.equal(y.view(torch.int16)[keep], want.view(torch.int16)[keep])


def test_triton_itself_still_truncates_casts_to_bfloat16(triton: Path | None) -> None:
    """When this fails for every supported Triton, `cast` of the mends has had its day."""
    x = torch.full((16,), 1.0 + 2**-8 + 2**-16)
    y = run(CAST, {"X": x, "Y": torch.empty(16, dtype=torch.bfloat16)}, triton=triton, mended=False, N=16)["Y"]
    assert not torch.equal(y, x.bfloat16())


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_casts_agree_with_torch(triton: Path | None, source: torch.dtype, target: torch.dtype) -> None:
    torch.manual_seed(2)
    x = (torch.randn(256) * 50).to(source)
    y = run(CAST, {"X": x, "Y": torch.empty(256, dtype=target)}, triton=triton, N=256)["Y"]
    assert torch.equal(y, x.to(target))


BFLOAT16 = """\
def f(X, Y, Z, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(X + o)
    b_y = tl.load(Y + o)
    b_z = tl.where(b_x < b_y, b_x + b_y, b_x * b_y)
    tl.store(Z + o, tl.maximum(-b_z, b_x) + tl.sum(b_x, 0))
"""


def test_elementwise_bfloat16_is_computed_in_float32_and_rounded(triton: Path | None) -> None:
    torch.manual_seed(3)
    x, y = torch.randn(2, 64).bfloat16()
    z = run(BFLOAT16, {"X": x, "Y": y, "Z": torch.empty_like(x)}, triton=triton, N=64)["Z"]
    picked = torch.maximum(-torch.where(x < y, x + y, x * y), x).double()
    # The order of the sum is the interpreter's own.
    torch.testing.assert_close(z.double(), picked + x.double().sum(), atol=0.1, rtol=0.02)


MIXED = """\
def f(X, Y, M, scale, N: tl.constexpr, HALF: tl.constexpr):
    i_n = tl.program_id(0)
    o = tl.arange(0, N)
    b_s = tl.zeros([N], tl.float32)
    for start in tl.range(i_n * N, M, N):
        b_x = tl.load(X + start + o, mask=start + o < M, other=float("-inf"))
        b_s += tl.math.exp2(tl.where(b_x > 0, b_x * scale, b_x))
    for start in range(0, tl.cdiv(M, N)):
        b_t = tl.load(X + start * N + o, mask=start * N + o < M, other=0.0)
        b_s += tl.max(b_t, 0) + tl.sum(tl.reshape(b_t, (2, HALF)), axis=1, keep_dims=True).reshape(2).sum()
    tl.store(Y + i_n * N + o, b_s)
"""


def test_loops_masks_and_reductions_work(triton: Path | None) -> None:
    torch.manual_seed(4)
    x = torch.randn(37)
    y = run(MIXED, {"X": x, "Y": torch.empty(3, 16)}, triton=triton, grid=(3,), M=37, scale=0.5, N=16, HALF=8)["Y"]
    padded = torch.cat([x, torch.full((11,), -math.inf)]).view(3, 16).double()
    powers = torch.exp2(torch.where(padded > 0, padded * 0.5, padded))
    filled = padded.masked_fill(padded.isinf(), 0)
    extra = (filled.amax(1) + filled.sum(1)).sum()
    want = torch.stack([powers[i:].sum(0) for i in range(3)]) + extra
    torch.testing.assert_close(y.double(), want, atol=1e-4, rtol=1e-5)


DESCRIPTOR = """\
def f(X, Y, P, M, stride, B: tl.constexpr):
    d_x = tl.make_tensor_descriptor(X, [P, M], [stride, 1], [B, B])
    d_y = tl.make_tensor_descriptor(Y, [P, M], [stride, 1], [B, B])
    for start in tl.range(0, M, B):
        d_y.store([tl.program_id(0) * B, start], d_x.load([tl.program_id(0) * B, start]) * 2)
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_descriptors_load_and_store(triton: Path | None, dtype: torch.dtype) -> None:
    x = torch.randn(40, 56).to(dtype)
    y = torch.full_like(x, math.nan)
    got = run(DESCRIPTOR, {"X": x, "Y": y}, triton=triton, grid=(3,), P=40, M=56, stride=56, B=16)["Y"]
    assert torch.equal(got, x * 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("extents", [(1, 1), (40, 40), (33, 70), (64, 64)])
def test_the_forward_kernel_agrees_with_float64(
    triton: Path | None, causal: bool, dtype: torch.dtype, extents: tuple[int, int]
) -> None:
    torch.manual_seed(5)
    p, m = extents
    q = torch.randn(1, 2, p, 32).to(dtype)
    # Keys and values lie side by side in one storage.
    k, v = torch.randn(1, m, 2, 2, 32).to(dtype).unbind(2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    tensors = {"Q": q, "K": k, "V": v, "AV": torch.full_like(q, math.nan), "LSE": torch.full((1, 2, p), math.nan)}
    strides = {
        f"stride_{letter}{rank}": tensors[name].stride(axis)
        for letter, name, row in (("q", "Q", "p"), ("k", "K", "m"), ("v", "V", "m"), ("o", "AV", "p"))
        for axis, rank in enumerate(("b", "h", row))
    }
    launch = Launch(
        kernel="flash_forward",
        grid=(-(-p // 16), 2),
        arguments={
            **{name: TensorRef(name) for name in tensors},
            **strides,
            "H": 2,
            "P": p,
            "M": m,
            "scale": math.log2(math.e) / math.sqrt(32),
            "D": 32,
            "CAUSAL": causal,
            "BLOCK_P": 16,
            "BLOCK_M": 16,
        },
    )
    out = run_interpreted(FLASH_FORWARD, [launch], tensors, triton_path=triton)
    scores = q.double() @ k.double().mT / math.sqrt(32)
    if causal:
        scores = scores.masked_fill(torch.ones(p, m, dtype=torch.bool).triu(1), -math.inf)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out["AV"].double(), scores.softmax(-1) @ v.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(out["LSE"].double(), scores.logsumexp(-1) / math.log(2), atol=1e-4, rtol=1e-5)
    assert out["Q"] is q


ADD_ONE = (
    "def f(X, N, stride):\n    for n in range(0, N):\n        tl.store(X + n * stride, tl.load(X + n * stride) + 1)\n"
)


def test_views_keep_strides_offset_and_shared_storage() -> None:
    base = torch.arange(24.0)
    tensors = {"X": base[3:21:3], "WHOLE": base}
    launch = Launch(kernel="f", grid=(1,), arguments={"X": TensorRef("X"), "N": 6, "stride": 3})
    out = run_interpreted(HEAD + ADD_ONE, [launch], tensors)
    want = base.clone()
    want[3:21:3] += 1
    assert torch.equal(out["WHOLE"], want) and torch.equal(base, torch.arange(24.0))
    assert out["X"].stride() == (3,) and out["X"].storage_offset() == 3
    assert out["X"].data_ptr() == out["WHOLE"].data_ptr() + 12


def test_a_sparse_view_of_a_huge_storage_travels_by_its_elements() -> None:
    stride = 2**31 // 4 + 1
    x = torch.empty(4 * stride, dtype=torch.float32)[1::stride]
    x[:] = torch.arange(4.0)
    start = time.monotonic()
    source = ADD_ONE.replace("n * stride", "n * stride.to(tl.int64)")
    out = run(source, {"X": x}, N=4, stride=stride)["X"]
    assert torch.equal(out, torch.arange(1.0, 5.0)) and out.stride() == (stride,)
    assert time.monotonic() - start < 5


def test_integers_of_one_dimension_and_empty_tensors_are_accepted() -> None:
    source = "def f(X, E, I):\n    tl.store(X, tl.load(I) * 2)\n"
    tensors = {"X": torch.zeros(()), "E": torch.empty(0, 4), "I": torch.tensor(21, dtype=torch.int64)}
    assert run(source, tensors)["X"].item() == 42.0


def test_launches_run_in_order_on_the_same_tensors() -> None:
    launches = [Launch(kernel="f", grid=(1,), arguments={"X": TensorRef("x"), "N": n, "stride": 1}) for n in (1, 2, 3)]
    assert run_interpreted(HEAD + ADD_ONE, launches, {"x": torch.zeros(3)})["x"].tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize(("n", "what"), [(4, "element 3 of X, which covers elements 0 to 2")])
def test_an_access_outside_every_tensor_names_the_line(triton: Path | None, n: int, what: str) -> None:
    with pytest.raises(KernelRunError) as caught:
        run(ADD_ONE, {"X": torch.zeros(3)}, triton=triton, N=n, stride=1)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"kernel f, program (0, 0, 0): IndexError: load outside every tensor: {what}"
    assert lines[1] == " 8 |         tl.store(X + n * stride, tl.load(X + n * stride) + 1)"


def test_masked_lanes_may_point_anywhere(triton: Path | None) -> None:
    source = "def f(X, N):\n    o = tl.arange(0, 16)\n    tl.store(X + o, tl.load(X + o, mask=o < N) + 1, mask=o < N)\n"
    assert run(source, {"X": torch.zeros(5)}, triton=triton, N=5)["X"].tolist() == [1.0] * 5


def test_an_error_leaves_the_worker_usable() -> None:
    with pytest.raises(KernelRunError, match=r"(?s)ValueError.*arange"):
        run("def f(X):\n    tl.store(X + tl.arange(0, 3), 0.0)\n", {"X": torch.zeros(4)})
    assert run(ADD_ONE, {"X": torch.zeros(1)}, N=1, stride=1)["X"].item() == 1


def test_a_text_that_does_not_import_is_an_error() -> None:
    with pytest.raises(KernelRunError, match="does not import"):
        run_interpreted("import nowhere_to_be_found\n", [], {})


def test_a_kernel_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KernelRunError, match=r"no @triton\.jit function 'g'"):
        run_interpreted(HEAD + ADD_ONE, [Launch(kernel="g", grid=(1,), arguments={})], {})


def test_a_hung_kernel_is_ended_and_the_next_call_works() -> None:
    with pytest.raises(KernelRunError, match=r"took too long in f; it starts anew"):
        run(ADD_ONE, {"X": torch.zeros(1)}, N=10**9, stride=0, timeout_s=1.0)
    assert run(ADD_ONE, {"X": torch.zeros(1)}, N=1, stride=1)["X"].item() == 1


def test_a_crashed_worker_is_reported_and_replaced() -> None:
    source = "def f(X):\n    os.kill(os.getpid(), 11)\n"
    with pytest.raises(KernelRunError, match=f"ended with status -{signal.SIGSEGV.value}"):
        launch = Launch(kernel="f", grid=(1,), arguments={"X": TensorRef("X")})
        run_interpreted("import os\n" + HEAD + source, [launch], {"X": torch.zeros(1)})
    assert run(ADD_ONE, {"X": torch.zeros(1)}, N=1, stride=1)["X"].item() == 1


def test_what_a_kernel_prints_does_not_reach_the_reply() -> None:
    source = ADD_ONE.replace("    for n", '    tl.device_print("x", tl.load(X))\n    for n')
    assert run(source, {"X": torch.zeros(1)}, N=1, stride=1)["X"].item() == 1


def test_one_worker_serves_all_calls_and_ends_with_close() -> None:
    run(ADD_ONE, {"X": torch.zeros(1)}, N=1, stride=1)
    before = interpreter._workers[None, True].process.pid
    run(ADD_ONE, {"X": torch.zeros(1)}, N=1, stride=1)
    assert interpreter._workers[None, True].process.pid == before
    interpreter.close_workers()
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_hundreds_of_texts_do_not_fill_the_worker() -> None:
    for n in range(300):
        source = ADD_ONE.replace("+ 1", f"+ {n}")
        assert run(source, {"X": torch.zeros(1)}, N=1, stride=1)["X"].item() == n


def test_a_small_launch_takes_milliseconds() -> None:
    run(ADD_ONE, {"X": torch.zeros(1)}, N=1, stride=1)
    start = time.perf_counter()
    for _ in range(50):
        run(ADD_ONE, {"X": torch.zeros(1)}, N=1, stride=1)
    assert (time.perf_counter() - start) / 50 < 0.02


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [(torch.zeros(1, dtype=torch.complex64), "dtype complex64"), (torch.zeros(1, device="meta"), "is on meta")],
)
def test_a_tensor_that_cannot_travel_is_refused(tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(ADD_ONE, {"X": tensor}, N=1, stride=1)


def test_a_tensor_that_is_not_given_is_refused() -> None:
    launch = Launch(kernel="f", grid=(1,), arguments={"X": TensorRef("y"), "N": 1, "stride": 1})
    with pytest.raises(ValueError, match="argument X names tensor y, which is not given"):
        run_interpreted(HEAD + ADD_ONE, [launch], {})
