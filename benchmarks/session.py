"""Run cases within a budget of time; what is known is written as it grows, so a kill loses nothing."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from einsumcascade.benchmarks.benches import Bench, Skipped
from einsumcascade.benchmarks.cases import Case
from einsumcascade.benchmarks.files import FORMAT, PASSED, RESULTS, code_digest, commit, taken_over, write_json
from einsumcascade.benchmarks.measure import Row, Settings
from einsumcascade.benchmarks.rivals import Rival, suits
from einsumcascade.schedules import cache


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Args:
        cases: in order. rivals: those that are here; absent: why others are not.
        asked: whether the rivals were named by the caller.
        budget: seconds of the whole run; cases that do not fit any more are skipped.
        reserve: seconds of it that the last case keeps for the report.
        folder: for results, or None. command: what the user typed.
        earlier: results of a run that this one continues.
    """

    cases: Sequence[Case]
    rivals: Sequence[Rival]
    absent: Mapping[str, str]
    asked: bool
    smoke: bool
    budget: float
    reserve: float = 0.0
    settings: Settings
    folder: Path | None
    command: str
    earlier: Mapping[str, Any] | None = None


def run(
    plan: Plan, bench: Bench, *, say: Callable[[str], None] = print, now: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Measure the cases of a plan; Ctrl-C ends it with what is known.

    Returns: the results as JSON values: where and with what, and for each case its rows, why it was skipped, or both.
    Raises: WorkError: there is no process that can say what the device is.
    """
    began = now()

    def left() -> float:
        return plan.budget - plan.reserve - (now() - began)

    result: dict[str, Any] = {"format": FORMAT, **about(plan, bench.facts()), "cases": []}
    say(heading(result))
    known, why = taken_over(plan.earlier, result)
    if why:
        say(f"nothing is taken over: {why}")
    # All at once: what ends this run must not lose them.
    result["cases"] += [known[str(case)] for case in plan.cases if str(case) in known]
    if known:
        say("\n".join(f"taken over: {record['case']}" for record in result["cases"]))
    write(plan, result)
    try:
        _measure_all(plan, bench, result, [c for c in plan.cases if str(c) not in known], left, say, now)
    except KeyboardInterrupt:
        result["interrupted"] = True
        for record in result["cases"]:
            if record["case"] not in known and "seconds" not in record:
                record.setdefault("skipped", "interrupted")
    places = {str(case): n for n, case in enumerate(plan.cases)}
    result["cases"].sort(key=lambda record: places[record["case"]])
    result["seconds"] = now() - began
    write(plan, result)
    return result


def _measure_all(
    plan: Plan,
    bench: Bench,
    result: dict[str, Any],
    cases: Sequence[Case],
    left: Callable[[], float],
    say: Callable[[str], None],
    now: Callable[[], float],
) -> None:
    """Measure cases one after the other, and put what is known of each into the result as it grows."""
    longest: dict[str, float] = {}
    for case in cases:
        record = _record(case)
        result["cases"].append(record)
        expected = longest.get(case.direction, 0.0)
        if left() < max(expected, 1.0):
            record["skipped"] = f"{max(left(), 0.0):.0f} s left, a case like it took {expected:.0f} s"
            write(plan, result)
            continue
        start = now()
        say(f"\n{case}" + (f"  [{left():.0f} s left]" if math.isfinite(left()) else ""))
        rivals = [r for r in plan.rivals if suits(r, case, asked=plan.asked, smoke=plan.smoke)]
        rows: dict[str, Row] = {}

        def grown(row: Row, case: Case = case, record: Any = record, rows: dict[str, Row] = rows) -> None:
            rows[row.name] = row
            record["rows"] = [r.to_dict() for r in rows.values()]
            write(plan, result)
            if row.state != PASSED or row.times is not None:
                say(line(case, row))

        try:
            record["state"] = bench.measure(case, rivals, plan.settings, left=left, row=grown)
        except Skipped as reason:
            record["skipped"] = str(reason)
            say(f"  {'ended' if rows else 'skipped'}: {reason}")
        record["seconds"] = now() - start
        longest[case.direction] = max(expected, record["seconds"])
        write(plan, result)


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


def about(plan: Plan, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Say where and with what this runs."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": plan.command,
        "capability": None,
        "multiprocessors": None,
        **{k: v for k, v in facts.items() if k != "cudnn"},
        "versions": {
            "einsumcascade": sys.modules["einsumcascade"].__version__,
            "commit": commit(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": facts.get("cudnn"),
            "flash-attn": _version("flash-attn"),
            "flash-linear-attention": _version("flash-linear-attention"),
            "python": platform.python_version(),
        },
        "code": code_digest(),
        "settings": asdict(plan.settings),
        "budget": plan.budget,
        "rivals": [r.key for r in plan.rivals],
        "absent": dict(plan.absent),
        # A call of ours takes one that fits.
        "tuned_schedules": len(cache.entries()),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def heading(result: Mapping[str, Any]) -> str:
    """Where and with what, in some lines."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
    lines = [f"{result['device']}; {versions}"]
    if result.get("state"):
        lines.append("; ".join(f"{k} {v}" for k, v in result["state"].items()))
    if result.get("ceilings"):
        c = result["ceilings"]
        lines.append(f"ceilings: bf16 product {c['matmul_bf16_tflops']:.0f} TFLOP/s, copy {c['copy_gb_s']:.0f} GB/s")
    if result.get("tuned_schedules"):
        lines.append(f"ours takes tuned schedules where they fit: {result['tuned_schedules']} are kept here")
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
    """Write the results, if they are wanted."""
    if plan.folder is not None:
        write_json(plan.folder / RESULTS, result)
