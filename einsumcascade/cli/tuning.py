"""The commands `tune` and `cache`: find the fastest schedule, and see what was found before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from einsumcascade.cli.commands import (
    AsJson,
    Constants,
    Constraints,
    Dtype,
    Extents,
    Over,
    Scores,
    Spec,
    app,
)
from einsumcascade.cli.options import given_of, keep, parse_extents, reason, refuse, spec_of
from einsumcascade.cli.output import ending, is_watched, print_json, show, write_atomically

cache_app = typer.Typer(no_args_is_help=True, help="List or clear the schedules that were tuned on this machine.")
app.add_typer(cache_app, name="cache")


@app.command()
def tune(
    spec: Spec,
    constraint: Constraints = None,
    score: Scores = None,
    const: Constants = None,
    over: Over = None,
    extents: Extents = "",
    target: Annotated[
        str | None,
        typer.Option(metavar="cuda:90", help="What to compile for where there is no GPU; cuda:90 unless told."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the inputs.")] = Dtype.bfloat16,
    candidates: Annotated[int, typer.Option(min=1, help="Schedules to compile at most.")] = 24,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for all of it.")] = 90.0,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes that compile; one a core.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the random inputs.")] = 0,
    dry: Annotated[bool, typer.Option("--no-keep", help="Do not keep the result for later calls.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the best schedule for --schedule.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tune the schedule of a cascade on the GPU that is there; without one, rank and compile the candidates.

    Each candidate is compared with the float64 reference before it is timed. The fastest is kept, and later calls with
    such extents use it. Ctrl-C ends it with what is known.
    """
    bound = parse_extents(extents)
    cascade = spec_of(spec, constraint, const, over, score)
    keep(spec, output)
    with _bar() as progress:
        from einsumcascade.verify.tune import tune as tune_cascade

        tuning = tune_cascade(
            cascade,
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
        best = tuning.best or tuning.expected
        write_atomically(output, ending(best.schedule.to_json()))
    show(tuning, as_json=as_json)
    if tuning.device and tuning.best is None:
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
    record = e.record
    extents = record.get("extents")
    best, trials = record.get("best"), record.get("trials")
    default = trials[0] if isinstance(trials, list) and trials and isinstance(trials[0], dict) else {}
    return {
        "name": e.name,
        "device": e.device,
        "triton": e.triton,
        "dtype": str(record.get("dtype", "")),
        "extents": extents if isinstance(extents, dict) else dict(e.bucket),
        "measured_s": best.get("measured_s") if isinstance(best, dict) else None,
        "default_s": default.get("measured_s"),
        "schedule": e.schedule.to_dict(),
        "file": str(e.path),
    }


def _us(seconds: Any) -> str:
    return f"{seconds * 1e6:.1f} us" if isinstance(seconds, int | float) else "-"
