"""The command: `einsumcascade bench`; in a bare checkout, where typer may be missing, `python -m benchmarks`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from einsumcascade.errors import EinsumCascadeError, InputError

# Seconds that a set may take.
BUDGETS = {"quick": 120.0, "standard": 540.0, "full": 7200.0, "smoke": 240.0}
STATIC = "static.json"


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
    mode = made.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="list the cases and the rivals, and run nothing")
    mode.add_argument("--static", action="store_true", help="what compiling tells, even where there is a GPU")
    mode.add_argument("--launch", action="store_true", help="what a call costs the host, the GPU stubbed")
    mode.add_argument("--show", type=Path, metavar="FILE", help="the tables and figures of an earlier results.json")
    return made


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m benchmarks") -> int:
    """Run the command; returns 1 where one of our kernels was wrong or failed, 2 for bad input, 130 after Ctrl-C."""
    options = parser(prog).parse_args(arguments)
    try:
        return _run(options, f"{prog} {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip())
    except EinsumCascadeError as error:
        print(error, file=sys.stderr)
        return 2


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
    from einsumcascade.benchmarks.measure import Settings
    from einsumcascade.benchmarks.session import Plan, run

    rivals.raise_limits()
    settings = Settings(seconds=0.01, draws=2) if smoke else Settings()
    plan = Plan(
        cases=cases,
        rivals=here,
        absent=absent,
        asked=bool(keys),
        smoke=smoke,
        budget=budget,
        settings=settings,
        folder=options.out,
        command=command,
    )
    with _quiet():
        result = run(plan, device, say=lambda text: print(text, flush=True))
    return _show(result, options.out)


@contextmanager
def _quiet() -> Any:
    """Keep what rivals say of deprecations and of precision away from the tables."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        yield


def _static(options: argparse.Namespace, cases: Sequence[Any], budget: float, command: str, *, missing: bool) -> int:
    from einsumcascade.benchmarks import static
    from einsumcascade.benchmarks.session import plain
    from einsumcascade.benchmarks.table import show

    if missing:
        print("There is no CUDA device here: nothing is measured. This is what compiling our kernels tells.\n")
    total, done = len(cases), 0

    def say(entry: static.Forecast) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done} of {total}: {entry.case}\x1b[K", end="", file=sys.stderr, flush=True)
        if options.out is not None:
            kept.append(entry.to_dict())
            text = json.dumps(plain({"command": command, "target": static.TARGET, "cases": kept}), indent=1)
            (options.out / STATIC).write_text(text + "\n", encoding="utf-8")

    kept: list[dict[str, Any]] = []
    found = static.forecast(cases, budget=budget, say=say)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    print(show(static.table(found)))
    print(f"\n{static.LEGEND}")
    return 0


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
    wrong = broken(result)
    if wrong:
        print(f"\n{wrong} of our own runs were wrong or failed", file=sys.stderr)
    return 130 if result.get("interrupted") else 1 if wrong else 0


def results_of(path: Path) -> dict[str, Any]:
    """Read the results of an earlier run. Raises: InputError: `benchmark-file`."""
    from einsumcascade.benchmarks.session import FORMAT

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        _refuse_file(f"'{path}' cannot be read: {error.strerror}")
    except ValueError:
        _refuse_file(f"'{path}' is no JSON")
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("cases"), list):
        _refuse_file(f"'{path}' holds no results of this benchmark")
    return found


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _refuse_file(f"'{path}' is no folder that can be written to: {error.strerror}")
    if not os.access(path, os.W_OK):
        _refuse_file(f"'{path}' is no folder that can be written to")


def _refuse_file(headline: str) -> NoReturn:
    raise InputError.of(
        "benchmark-file",
        headline,
        rule="--out names a folder, --show the results.json that an earlier run wrote there",
        hint="einsumcascade bench --out results, then einsumcascade bench --show results/results.json",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return value
