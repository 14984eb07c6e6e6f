"""Softmax attention forward: compare the generated kernels with float64, then time them beside PyTorch's.

    PYTHONPATH=. python benchmarks/forward.py --out forward.json       on a CUDA machine
    PYTHONPATH=. python benchmarks/forward.py --smoke                  anywhere: tiny shapes, figures without meaning

Nothing is timed that was not compared first, in the same shape and dtype, over every element of the output:

    error <= 2 * E_plain + 4 * E_cond        largest element and root mean square, against float64

E_plain is the error of the plain formula in the dtype, E_cond the largest change of the float64 result when every
input is rounded anew, over several draws. Both are computed here, from this file's own formulas.

Times are medians of `triton.testing.do_bench` in one process. TFLOP/s count 4*B*H*P*M*D, half of it if causal.
`host_us` is what a call costs the CPU before it returns: where it exceeds the kernel's time, the GPU waits.
Needs torch >= 2.11 and triton >= 3.6.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import einsumcascade as ec
from einsumcascade.schedules.schedule import KernelSchedule, Schedule

ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
KERNEL = "softmax_attention"
Function = Callable[[Tensor, Tensor, Tensor], Tensor]

# Tiles of P and M, warps, stages; each with pointers and with descriptors.
SHORT = (
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
)
FULL = tuple((p, m, w, s) for p in (64, 128) for m in (64, 128) for w in (4, 8) for s in (2, 3))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape; P = M = N."""

    B: int
    H: int
    N: int
    D: int
    causal: bool

    def __str__(self) -> str:
        return f"B{self.B} H{self.H} N{self.N} D{self.D} {'causal' if self.causal else 'full'}"

    @property
    def flop(self) -> float:
        return 4.0 * self.B * self.H * self.N * self.N * self.D / (2 if self.causal else 1)


@dataclass(kw_only=True)
class Row:
    """One implementation on one shape: its errors, its verdict, and its times if it passed."""

    name: str
    schedule: str = ""
    ran: bool = False
    passed: bool = False
    max_error: float = math.nan
    rms_error: float = math.nan
    ms: float | None = None
    tflops: float | None = None
    host_us: float | None = None
    note: str = ""


@dataclass(kw_only=True)
class Truth:
    """The float64 result and the bounds that a result is held to."""

    expected: Tensor
    max_bound: float
    rms_bound: float
    plain_max: float = 0.0
    cond_max: float = 0.0
    rows: list[Row] = field(default_factory=list)


def cases(*, smoke: bool) -> list[Case]:
    """List the shapes, the full one before the causal one."""
    shapes = (
        [(1, 2, 48, 16)]
        if smoke
        else [(4, 16, 4096, 128), (4, 32, 4096, 64), (1, 16, 16384, 128), (16, 16, 1024, 128), (16, 32, 1024, 64)]
    )
    return [Case(B=b, H=h, N=n, D=d, causal=c) for b, h, n, d in shapes for c in (False, True)]


# --- formulas -------------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Attention as it is written, each line rounded to the dtype of its inputs."""
    score = (q @ k.mT) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score.masked_fill_(future, float("-inf"))
    weight = torch.exp(score - score.amax(-1, keepdim=True))
    return (weight / weight.sum(-1, keepdim=True)) @ v


def exact(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, rows: int = 1024) -> Tensor:
    """Attention of one head in float64, some rows at a time."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64, device=q.device)
    column = torch.arange(k.shape[-2], device=q.device)
    for start in range(0, q.shape[-2], rows):
        stop = min(start + rows, q.shape[-2])
        score = (q[..., start:stop, :] @ k.mT) / math.sqrt(q.shape[-1])
        if causal:
            score.masked_fill_(column > column[start:stop, None], float("-inf"))
        out[..., start:stop, :] = torch.softmax(score, -1) @ v
    return out


def heads(*tensors: Tensor) -> Iterator[tuple[tuple[int, int], list[Tensor]]]:
    """Yield each head of some tensors with its place."""
    for b in range(tensors[0].shape[0]):
        for h in range(tensors[0].shape[1]):
            yield (b, h), [t[b, h] for t in tensors]


def sizes(difference: Tensor) -> tuple[float, float]:
    """Return the largest element and the sum of squares of a difference."""
    return difference.abs().max().item(), difference.square().sum().item()


def truth_of(case: Case, q: Tensor, k: Tensor, v: Tensor, *, draws: int) -> Truth:
    """Compute the float64 result and the bounds, head by head."""
    expected = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    generator = torch.Generator(q.device).manual_seed(1)
    eps = ROUNDOFF[q.dtype]

    def moved(t: Tensor) -> Tensor:
        sign = torch.randint(0, 2, t.shape, generator=generator, device=t.device, dtype=torch.float64) * 2 - 1
        return t.double() * (1 + eps * sign)

    plain_max, plain_squares, cond_max, cond_squares = 0.0, 0.0, [0.0] * draws, [0.0] * draws
    for at, (hq, hk, hv) in heads(q, k, v):
        expected[at] = exact(hq, hk, hv, causal=case.causal)
        largest, squares = sizes(plain(hq, hk, hv, causal=case.causal).double() - expected[at])
        plain_max, plain_squares = max(plain_max, largest), plain_squares + squares
        for n in range(draws):
            largest, squares = sizes(exact(moved(hq), moved(hk), moved(hv), causal=case.causal) - expected[at])
            cond_max[n], cond_squares[n] = max(cond_max[n], largest), cond_squares[n] + squares
    count = expected.numel()
    return Truth(
        expected=expected,
        plain_max=plain_max,
        cond_max=max(cond_max),
        max_bound=2 * plain_max + 4 * max(cond_max),
        rms_bound=2 * math.sqrt(plain_squares / count) + 4 * math.sqrt(max(cond_squares) / count),
    )


# --- what is compared -----------------------------------------------------------------------------------------------


def schedules(which: str, *, smoke: bool) -> list[Schedule]:
    """List the schedules to try after the default one."""
    if which == "none":
        return []
    chosen = ((32, 16, 4, 2), (16, 32, 4, 2)) if smoke else SHORT if which == "short" else FULL
    return [
        Schedule(kernels={KERNEL: KernelSchedule(tiles={"p": p, "m": m}, warps=w, stages=s, descriptors=d)})
        for p, m, w, s in chosen
        for d in (False, True)
    ]


def ours(case: Case, schedule: Schedule | None) -> Any:
    """Compile the op for a shape."""
    cascade = ec.load(KERNEL)
    return ec.compile(cascade.constrain("m <= p") if case.causal else cascade, schedule=schedule)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, which: SDPBackend) -> Tensor:
    with sdpa_kernel(which):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def flex(case: Case, device: torch.device) -> Function:
    """Compile FlexAttention, with a block mask if causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if case.causal:
        mask = create_block_mask(lambda b, h, p, m: p >= m, None, None, case.N, case.N, device=str(device))
    return partial(torch.compile(flex_attention), block_mask=mask)


def baselines(case: Case, device: torch.device) -> dict[str, Callable[[], Function]]:
    """List what a user would call instead; each is made when its turn comes, since it may not be there."""
    found: dict[str, Callable[[], Function]] = {}
    if device.type == "cuda":
        for name, which in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)):
            found[name] = partial(partial, sdpa, causal=case.causal, which=which)
        found["FlexAttention, compiled"] = partial(flex, case, device)
    else:
        found["SDPA math"] = partial(partial, sdpa, causal=case.causal, which=SDPBackend.MATH)
    found["plain formula"] = partial(partial, plain, causal=case.causal)
    return found


# --- measuring ------------------------------------------------------------------------------------------------------


def compare(row: Row, function: Function, truth: Truth, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Run once and judge every element."""
    # The block that the output will get from the allocator is filled with NaN, so an element nobody writes is seen.
    trap = torch.full(inputs[0].shape, float("nan"), dtype=inputs[0].dtype, device=inputs[0].device)
    del trap
    out = function(*inputs)
    largest, squares = 0.0, 0.0
    for _, (got, want) in heads(out, truth.expected):
        one, more = sizes(got.double() - want)
        # `max` would lose a NaN.
        largest, squares = one if not one <= largest else largest, squares + more
        if math.isnan(largest):
            break
    row.ran = True
    row.max_error, row.rms_error = largest, math.sqrt(squares / truth.expected.numel())
    row.passed = row.max_error <= truth.max_bound and row.rms_error <= truth.rms_bound
    if not row.passed:
        row.note = "outside its bound: not timed"


def measure(row: Row, call: Callable[[], Tensor], case: Case, device: torch.device) -> None:
    """Time a call that passed."""
    if device.type == "cuda":
        from triton.testing import do_bench

        row.ms = float(do_bench(call, warmup=50, rep=200, return_mode="median"))
        torch.cuda.synchronize()
        row.host_us = 1e6 * statistics.median(_spans(call, 20))
        torch.cuda.synchronize()
    else:
        row.ms = 1e3 * statistics.median(_spans(call, 5))
    row.tflops = case.flop / row.ms * 1e-9


def _spans(call: Callable[[], Tensor], times: int) -> list[float]:
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spans.append(time.perf_counter() - start)
    return spans


def try_one(
    row: Row, make: Callable[[], Function], truth: Truth, inputs: tuple[Tensor, Tensor, Tensor], case: Case
) -> Row:
    """Make, compare, then time; what cannot run says why."""
    try:
        function = make()
        compare(row, function, truth, inputs)
        if row.passed:
            measure(row, lambda: function(*inputs), case, inputs[0].device)
    except Exception as error:
        # Triton and the compilers behind it raise classes of their own, and none of them may end the run.
        row.note = _first_line(error)
    return row


def _first_line(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0][:160]


def run_case(case: Case, device: torch.device, *, which: str, draws: int, smoke: bool) -> dict[str, Any]:
    """Measure one shape, printing each row as it comes."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(case.B, case.H, case.N, case.D, generator=generator, device=device).to(torch.bfloat16)
        for _ in range(3)
    )
    truth = truth_of(case, q, k, v, draws=draws)
    print(f"\n{case}, bfloat16; bound: max {truth.max_bound:.2e}, rms {truth.rms_bound:.2e}")
    print(f"  {'':58} {'max error':>9} {'rms error':>9} {'ms':>9} {'TFLOP/s':>8} {'host us':>8}")
    wanted: list[tuple[Row, Callable[[], Function]]] = []
    for schedule in (None, *schedules(which, smoke=smoke)):
        op = ours(case, schedule)
        shown = str((schedule or op.kernel(extents={"E": case.D, "F": case.D}).schedule).kernels[KERNEL])
        name = "ours, default schedule" if schedule is None else "ours"
        wanted.append((Row(name=name, schedule=shown), partial(ours, case, schedule)))
        if smoke and schedule is not None:
            # A CPU uses no schedule; that its text is written is what can be tried.
            op.kernel(extents={"E": case.D, "F": case.D})
    wanted += [(Row(name=name), make) for name, make in baselines(case, device).items()]
    for row, make in wanted:
        truth.rows.append(try_one(row, make, truth, (q, k, v), case))
        print(_line(row), flush=True)
    return {
        "case": str(case),
        **asdict(case),
        "dtype": "bfloat16",
        "flop": case.flop,
        "max_bound": truth.max_bound,
        "rms_bound": truth.rms_bound,
        "plain_max_error": truth.plain_max,
        "cond_max": truth.cond_max,
        "rows": [asdict(r) for r in truth.rows],
    }


def _line(row: Row) -> str:
    name = row.name if row.name != "ours" else "  " + row.schedule.replace("loads by ", "")
    figures = [f"{row.max_error:9.2e} {row.rms_error:9.2e}" if not math.isnan(row.max_error) else " " * 19]
    if row.ms is not None:
        figures.append(f"{row.ms:9.4f} {row.tflops:8.1f} " + (f"{row.host_us:8.0f}" if row.host_us else ""))
    return f"  {name:58} {' '.join(figures)} {row.note}".rstrip()


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure what this device can do at best: a large product, and a copy."""
    from triton.testing import do_bench

    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    big = torch.empty(1 << 30, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    product_ms = float(do_bench(lambda: a @ a, return_mode="median"))
    copy_ms = float(do_bench(lambda: other.copy_(big), return_mode="median"))
    return {"matmul_bf16_tflops": 2 * 8192**3 / product_ms * 1e-9, "copy_gb_s": 2 * big.numel() / copy_ms * 1e-6}


def machine(device: torch.device) -> dict[str, Any]:
    """Say where and with what this ran."""
    cuda = device.type == "cuda"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {platform.machine()}",
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "einsumcascade": ec.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if one of our kernels failed its comparison or did not run by its default schedule."""
    parser = argparse.ArgumentParser(description="Softmax attention forward: compare, then time.")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU; tries the script, measures nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every figure as JSON")
    parser.add_argument("--only", metavar="TEXT", default="", help="shapes whose name contains this, as 'D64 causal'")
    parser.add_argument("--schedules", choices=("short", "all", "none"), default="short", help="beside the default one")
    parser.add_argument("--draws", type=int, default=8, help="roundings of the inputs that make the bound")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke runs anywhere")
    device = torch.device("cpu" if options.smoke else "cuda")
    chosen = [c for c in cases(smoke=options.smoke) if options.only in str(c)]
    if not chosen:
        parser.error(f"no shape's name contains '{options.only}'")
    result: dict[str, Any] = {**machine(device), "smoke": options.smoke, "draws": options.draws, "cases": []}
    print(", ".join(f"{key} {result[key]}" for key in ("device", "torch", "triton", "cudnn", "date")))
    with torch.no_grad():
        if not options.smoke:
            result["ceilings"] = ceilings(device)
            print(", ".join(f"{name} {value:.0f}" for name, value in result["ceilings"].items()))
        for case in chosen:
            torch.compiler.reset()
            result["cases"].append(
                run_case(case, device, which=options.schedules, draws=options.draws, smoke=options.smoke)
            )
            if options.out is not None:
                # After each shape, so that a run that is cut short leaves what it has.
                options.out.write_text(json.dumps(_plain(result), indent=2) + "\n", encoding="utf-8")
    rows = [r for c in result["cases"] for r in c["rows"] if r["name"].startswith("ours")]
    refused = [r for r in rows if not r["ran"]]
    bad = [r for r in rows if not r["passed"] and (r["ran"] or "default" in r["name"])]
    passed = sum(r["passed"] for r in rows)
    print(f"\nof {len(rows)} runs of ours {passed} passed, {len(refused)} did not run, {len(bad)} failed")
    return 1 if bad else 0


def _plain(value: Any) -> Any:
    """Put null where JSON has no number."""
    match value:
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


if __name__ == "__main__":
    sys.exit(main())
