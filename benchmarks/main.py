"""The command: `einsumcascade bench`; in a bare checkout, where typer may be missing, `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from einsumcascade.benchmarks.files import RESULTS, STATIC, put_aside, refuse_file, results_of, write_json
from einsumcascade.errors import EinsumCascadeError

# Seconds that a set may take.
BUDGETS = {"quick": 120.0, "standard": 540.0, "full": 7200.0, "smoke": 240.0}
# Seconds of it that are kept for the report.
RESERVE = 10.0
# Seconds for which a case is tuned unless told.
TUNING = 30.0


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        prog=prog,
        description="Compare our kernels and what a user would call instead with float64, then time those that passed. "
        "Without a GPU: what compiling our kernels tells.",
        epilog="A word chooses the cases that have it; commas part alternatives: 'causal,window forward D128'.",
    )
    made.add_argument("words", nargs="*", metavar="WORD", help="only cases that have all these words")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--set", choices=tuple(BUDGETS), default="standard", help="smoke: tiny shapes, anywhere")
    which.add_argument("--quick", action="store_const", const="quick", dest="set", help="the few most telling cases")
    made.add_argument(
        "--rivals", metavar="KEY,...", default="", help="only these, or none; all that are installed unless named"
    )
    made.add_argument("--budget", type=_seconds, metavar="SECONDS", help="what does not fit any more is skipped")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="write results.json, index.html and figures there")
    made.add_argument(
        "--resume",
        action="store_true",
        help="take over the finished cases of results.json there, if the set-up is alike",
    )
    made.add_argument(
        "--tune",
        type=_seconds,
        nargs="?",
        const=TUNING,
        metavar="SECONDS",
        help=f"measure ours tuned to each case too, after a search of so many seconds, {TUNING:.0f} unless told",
    )
    made.add_argument("--keep-tuned", action="store_true", help="keep what --tune finds for later calls")
    mode = made.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="list the cases and the rivals, and run nothing")
    mode.add_argument("--static", action="store_true", help="what compiling tells, even where there is a GPU")
    mode.add_argument("--launch", action="store_true", help="what a call costs the host, the GPU stubbed")
    mode.add_argument("--show", type=Path, metavar="FILE", help="the tables and figures of an earlier results.json")
    return made


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m benchmarks") -> int:
    """Run the command; returns 1 where one of our kernels was wrong or failed, 2 for bad input, 130 after Ctrl-C."""
    reader = parser(prog)
    options = reader.parse_intermixed_args(arguments)
    only_reads = options.static or options.launch or options.list or options.show is not None
    if options.budget is not None and options.budget <= RESERVE and not only_reads:
        reader.error(f"argument --budget: {RESERVE:g} of the seconds are kept for the report, so give more")
    if options.resume and options.out is None:
        reader.error("argument --resume: name the folder of the earlier run by --out")
    if options.keep_tuned and options.tune is None:
        reader.error("argument --keep-tuned: nothing is tuned without --tune")
    try:
        return _run(options, f"{prog} {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip())
    except EinsumCascadeError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, command: str) -> int:
    if options.show is not None:
        return _show(results_of(options.show), options.out)
    if options.out is not None:
        _folder(options.out)
    import torch

    from einsumcascade.benchmarks import rivals
    from einsumcascade.benchmarks.cases import SETS, chosen

    smoke = options.set == "smoke"
    cases = chosen(SETS[options.set], options.words)
    budget = options.budget or BUDGETS[options.set]
    device = torch.device("cuda" if torch.cuda.is_available() and not smoke else "cpu")
    keys = [k.strip() for k in options.rivals.split(",") if k.strip()]
    here, absent = ([], {}) if keys == ["none"] else rivals.found(keys, device)
    if options.list:
        print(f"{len(cases)} cases, {budget:.0f} s:", *(f"  {c}" for c in cases), sep="\n")
        if device.type == "cpu" and not smoke:
            print("There is no CUDA device here: no rival is measured.")
            return 0
        print("rivals here: " + (", ".join(r.key for r in here) or "none"))
        for key, why in absent.items():
            print(f"  {key}: {why}")
        return 0
    if options.launch:
        from einsumcascade.benchmarks.launch import launch_report

        print(launch_report())
        return 0
    if options.static or (device.type == "cpu" and not smoke):
        return _static(options, cases, budget, command, missing=not options.static)
    from einsumcascade.benchmarks.benches import Apart
    from einsumcascade.benchmarks.measure import Settings
    from einsumcascade.benchmarks.session import Plan, run
    from einsumcascade.codegen.workers import WorkError

    tuning = {"tuning": options.tune or 0.0, "keep": options.keep_tuned}
    settings = Settings(seconds=0.01, draws=2, **tuning) if smoke else Settings(**tuning)
    earlier = _earlier(options)
    plan = Plan(
        cases=cases,
        rivals=here,
        absent=absent,
        asked=bool(keys),
        smoke=smoke,
        budget=budget,
        reserve=RESERVE,
        settings=settings,
        folder=options.out,
        command=command,
        earlier=earlier,
    )
    bench = Apart(device.type)
    try:
        result = run(plan, bench, say=lambda text: print(text, flush=True))
    except WorkError as error:
        print(f"nothing can be measured on this device: {error}", file=sys.stderr)
        return 1
    finally:
        bench.close()
    return _show(result, options.out)


def _earlier(options: argparse.Namespace) -> dict[str, Any] | None:
    """The results that the folder holds, if the run continues them; they get a name of their own."""
    path = None if options.out is None else options.out / RESULTS
    if path is None or not path.exists():
        return None
    found = results_of(path) if options.resume else None
    print(f"the earlier results are now {put_aside(path)}")
    return found


def _static(options: argparse.Namespace, cases: Sequence[Any], budget: float, command: str, *, missing: bool) -> int:
    from einsumcascade.benchmarks import static
    from einsumcascade.benchmarks.table import show

    if missing:
        print("There is no CUDA device here: nothing is measured. This is what compiling our kernels tells.\n")
    total = len(cases)
    kept: list[dict[str, Any]] = []

    def say(entry: static.Forecast) -> None:
        kept.append(entry.to_dict())
        if sys.stderr.isatty():
            print(f"\r{len(kept)} of {total}: {entry.case}\x1b[K", end="", file=sys.stderr, flush=True)
        if options.out is not None:
            write_json(options.out / STATIC, {"command": command, "target": static.TARGET, "cases": kept})

    found, interrupted = static.forecast(cases, budget=budget, say=say)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    print(show(static.table(found)))
    print(f"\n{static.LEGEND}")
    failed = sum(f.failed for f in found)
    if failed:
        print(f"\n{failed} of our own kernels failed", file=sys.stderr)
    return 130 if interrupted else 1 if failed else 0


def _show(result: dict[str, Any], folder: Path | None) -> int:
    from einsumcascade.benchmarks.findings import report
    from einsumcascade.benchmarks.plots import write_page, write_png
    from einsumcascade.benchmarks.table import broken

    print(f"\n{report(result)}")
    if folder is not None:
        _folder(folder)
        written = [str(p) for p in write_png(result, folder)]
        if write_page(result, folder / "index.html"):
            written.insert(0, str(folder / "index.html"))
        print("\nwritten: " + (", ".join(written) or "results alone: neither jinja2 nor matplotlib is installed"))
    wrong, measured = broken(result), any(c.get("rows") for c in result["cases"])
    if wrong:
        print(f"\n{wrong} of our own runs were wrong or failed", file=sys.stderr)
    elif not measured:
        print("\nno case was measured", file=sys.stderr)
    return 130 if result.get("interrupted") else 1 if wrong or not measured else 0


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse_file(f"'{path}' is no folder that can be written to: {error.strerror}")
    if not os.access(path, os.W_OK):
        refuse_file(f"'{path}' is no folder that can be written to")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return value
