"""Run cases within a budget of time; what is known is written after each case, so a kill loses nothing."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from einsumcascade.benchmarks.cases import Case
from einsumcascade.benchmarks.clock import Clock, CudaClock, HostClock, device_state, interleaved
from einsumcascade.benchmarks.measure import Row, Settings, TimeUp, first_line, measure
from einsumcascade.benchmarks.rivals import Rival, suits

RESULTS = "results.json"
FORMAT = 1
# Seconds that the last case of a run keeps for its report.
RESERVE = 10.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Args:
        cases: in order. rivals: those that are here; absent: why others are not.
        asked: whether the rivals were named by the caller.
        budget: seconds of the whole run; cases that do not fit any more are skipped.
        folder: for results, or None. command: what the user typed.
    """

    cases: Sequence[Case]
    rivals: Sequence[Rival]
    absent: Mapping[str, str]
    asked: bool
    smoke: bool
    budget: float
    settings: Settings
    folder: Path | None
    command: str


def run(
    plan: Plan, device: torch.device, *, say: Callable[[str], None] = print, now: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Measure the cases of a plan; Ctrl-C ends it with what is known.

    Returns: the results as JSON values: where and with what, and for each case its rows, or why it was skipped.
    """
    began = now()

    def left() -> float:
        return plan.budget - RESERVE - (now() - began)

    clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock()
    result: dict[str, Any] = {"format": FORMAT, **machine(device, plan), "cases": []}
    if device.type == "cuda":
        result["ceilings"] = ceilings(device, clock)
    say(heading(result))
    write(plan, result)
    longest: dict[str, float] = {}
    for case in plan.cases:
        record = _record(case)
        result["cases"].append(record)
        expected = longest.get(case.direction, 0.0)
        if left() < max(expected, 1.0):
            record["skipped"] = f"{max(left(), 0.0):.0f} s left, a case like it took {expected:.0f} s"
            write(plan, result)
            continue
        start = now()
        say(f"\n{case}" + (f"  [{left():.0f} s left]" if math.isfinite(left()) else ""))
        try:
            rivals = [r for r in plan.rivals if suits(r, case, asked=plan.asked, smoke=plan.smoke)]
            told = partial(_told, say, case)
            rows = measure(case, device, clock, rivals, plan.settings, left=left, say=told)
            record["rows"] = [r.to_dict() for r in rows]
        except TimeUp:
            record["skipped"] = "the time was up while it was measured"
        except KeyboardInterrupt:
            record["skipped"] = "interrupted"
            result["interrupted"] = True
        except Exception as error:
            # Memory that runs out in one case is no reason to lose the others.
            record["skipped"] = first_line(error)
        if "skipped" in record:
            say(f"  skipped: {record['skipped']}")
        record["seconds"] = now() - start
        record["state"] = device_state() if device.type == "cuda" else {}
        longest[case.direction] = max(expected, record["seconds"])
        write(plan, result)
        if "interrupted" in result:
            break
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result["seconds"] = now() - began
    write(plan, result)
    return result


def _told(say: Callable[[str], None], case: Case, row: Row) -> None:
    say(line(case, row))


def _record(case: Case) -> dict[str, Any]:
    return {
        "case": str(case),
        "variant": case.variant.name,
        "direction": case.direction,
        "dtype": case.dtype,
        **asdict(case.shape),
        "flop": case.flop,
        "unit": "GB/s" if case.decodes else "TFLOP/s",
    }


def machine(device: torch.device, plan: Plan) -> dict[str, Any]:
    """Say where and with what this runs."""
    cuda, cudnn = device.type == "cuda", cast(Any, torch.backends.cudnn)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": plan.command,
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count if cuda else None,
        "state": device_state() if cuda else {},
        "versions": {
            "einsumcascade": sys.modules["einsumcascade"].__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version() if cuda else None,
            "flash-attn": _version("flash-attn"),
            "flash-linear-attention": _version("flash-linear-attention"),
            "python": platform.python_version(),
        },
        "settings": asdict(plan.settings),
        "budget": plan.budget,
        "rivals": [r.key for r in plan.rivals],
        "absent": dict(plan.absent),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def ceilings(device: torch.device, clock: Clock) -> dict[str, float]:
    """Measure what this device can do at best: a large product, and a copy."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    big = torch.empty(1 << 30, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    product, copy = interleaved(clock, [lambda: a @ a, lambda: other.copy_(big)], seconds=0.5)
    return {"matmul_bf16_tflops": 2 * 8192**3 / product.ms * 1e-9, "copy_gb_s": 2 * big.numel() / copy.ms * 1e-6}


def heading(result: Mapping[str, Any]) -> str:
    """Where and with what, in some lines."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    lines = [f"{result['device']}; {versions}"]
    if result.get("state"):
        lines.append("; ".join(f"{k} {v}" for k, v in result["state"].items()))
    if result.get("ceilings"):
        c = result["ceilings"]
        lines.append(f"ceilings: bf16 product {c['matmul_bf16_tflops']:.0f} TFLOP/s, copy {c['copy_gb_s']:.0f} GB/s")
    if result["absent"]:
        lines.append("not here: " + "; ".join(f"{k} ({why})" for k, why in result["absent"].items()))
    return "\n".join(lines)


def line(case: Case, row: Row) -> str:
    """One candidate in one line."""
    text = f"  {row.name:<14} {row.state:<8}"
    text += f" error {row.share:5.2f} of its bound" if row.share is not None else ""
    if row.times is not None:
        rate = f"{row.rate:8.1f} {'GB/s' if case.decodes else 'TFLOP/s'}" if row.rate else ""
        text += f" {row.times.ms:9.4f} ms ({row.times.low:.4f} to {row.times.high:.4f}){rate}"
        text += f" {row.host_us:6.0f} us of host" if row.host_us is not None else ""
    return f"{text}  {row.note or row.schedule}".rstrip()


def write(plan: Plan, result: Mapping[str, Any]) -> None:
    """Write the results so that a reader sees the old file or the whole new one."""
    if plan.folder is None:
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    draft = plan.folder / f".{RESULTS}.{os.getpid()}"
    draft.write_text(json.dumps(plain(result), indent=1) + "\n", encoding="utf-8")
    draft.replace(plan.folder / RESULTS)


def plain(value: Any) -> Any:
    """Put null where JSON has no number."""
    match value:
        case Mapping():
            return {str(key): plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
