"""The commands `tune` and `cache`: find the fastest schedule, and see what was found before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from einsumcascade.cli.app import app
from einsumcascade.cli.options import check_output, given_of, reason, refuse
from einsumcascade.cli.output import ending, is_watched, print_json, show, write_atomically
from einsumcascade.cli.parameters import AsJson, Changes, Dtype, InputDtype, Seed, Spec, taken_apart

cache_app = typer.Typer(no_args_is_help=True, help="List or clear the schedules that were tuned on this machine.")
app.add_typer(cache_app, name="cache")


@app.command()
@taken_apart
def tune(
    spec: Spec,
    changes: Changes,
    target: Annotated[
        str | None,
        typer.Option(metavar="cuda:90", help="What to compile for where there is no GPU; cuda:90 unless told."),
    ] = None,
    dtype: InputDtype = Dtype.bfloat16,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Tune what training runs: the forward that saves and the backward.")
    ] = False,
    candidates: Annotated[int, typer.Option(min=1, help="Schedules of a program to compile at most.")] = 24,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for a program.")] = 90.0,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes that compile; one a core.")] = None,
    seed: Seed = 0,
    dry: Annotated[bool, typer.Option("--no-keep", help="Do not keep the result for later calls.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the best schedule for --schedule.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tune the schedule of a cascade on the GPU that is there; without one, rank and compile the candidates.

    Each candidate is compared with the float64 reference before it is timed. The fastest is kept, and later calls with
    such extents use it. With --gradient these are the forward that saves and the backward, one after the other.
    Ctrl-C ends it with what is known.
    """
    cascade, bound = changes.of(spec)
    check_output(spec, output)
    with _bar() as progress:
        from einsumcascade.verify.tune import tune as tune_cascade

        tuning = tune_cascade(
            cascade,
            gradient=gradient,
            extents=bound,
            dtype=dtype.value,
            candidates=candidates,
            budget_s=budget,
            seed=seed,
            keep=not dry,
            progress=progress,
            **given_of(target=target, jobs=jobs),
        )
    if output is not None:
        write_atomically(output, ending(tuning.schedule.to_json()))
    show(tuning, as_json=as_json)
    if tuning.is_fruitless:
        raise typer.Exit(1)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int, Any], None] | None]:
    """Show on stderr how far it is and the best so far, if a person is looking."""
    if not is_watched():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("ranking", total=None)

        def step(stage: str, done: int, planned: int, best: Any) -> None:
            known = f", best {best.seconds * 1e6:.1f} us" if best is not None else ""
            bar.update(task, completed=done, total=planned, description=stage + known)

        yield step


@cache_app.command("list")
def list_cache(as_json: AsJson = False) -> None:
    """List the tuned schedules of this machine: cascade, device, extents, time, and that of the default."""
    from einsumcascade.schedules.cache import entries, folder

    found = entries()
    if as_json:
        print_json([_described(e) for e in found])
        return
    if not found:
        where = folder()
        typer.echo(f"no schedule is kept in {where}" if where else "EINSUMCASCADE_CACHE is empty: nothing is kept")
        return
    rows = [("cascade", "device", "triton", "dtype", "tuned at", "time", "default")]
    for e in found:
        d = _described(e)
        extents = " ".join(f"{r}={n}" for r, n in d["extents"].items())
        rows.append((e.name, e.device, e.triton, d["dtype"], extents, _us(d["measured_s"]), _us(d["default_s"])))
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


@cache_app.command("clear")
def clear_cache() -> None:
    """Remove the tuned schedules of this machine; nothing else is touched."""
    from einsumcascade.schedules.cache import clear, folder

    try:
        count = clear()
    except OSError as error:
        refuse(
            "cache-folder",
            f"a tuned schedule in '{folder()}' cannot be removed: {reason(error)}",
            rule="the folder must be one that may be written to",
            hint="change its permissions, or name another folder by EINSUMCASCADE_CACHE",
        )
    typer.echo(f"removed {count} tuned schedule{'s' * (count != 1)}")


def _described(e: Any) -> dict[str, Any]:
    """What an entry says; its record may have been written by others, so what is no figure there is not shown."""
    record = e.record
    extents, dtype, trials = record.get("extents"), record.get("dtype"), record.get("trials")
    is_named = isinstance(extents, dict) and all(type(n) is int and r.isprintable() for r, n in extents.items())
    return {
        "name": e.name,
        "device": e.device,
        "triton": e.triton,
        "dtype": dtype if isinstance(dtype, str) and dtype.isprintable() else "",
        "extents": extents if is_named else dict(e.bucket),
        "measured_s": _measured(record.get("best")),
        "default_s": _measured(trials[0] if isinstance(trials, list) and trials else None),
        "schedule": e.schedule.to_dict(),
        "file": str(e.path),
    }


def _measured(trial: Any) -> float | None:
    seconds = trial.get("measured_s") if isinstance(trial, dict) else None
    return seconds if isinstance(seconds, float) and math.isfinite(seconds) else None


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f} us"
