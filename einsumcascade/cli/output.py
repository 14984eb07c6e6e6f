"""What the command line writes: text or JSON, files, progress."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from einsumcascade.cli.options import is_special, unwritable


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one.

    Raises:
        InputError: `output-file`: the file cannot be written; what was there is unchanged.
    """
    try:
        # What is no file, a pipe or a terminal, cannot be replaced.
        if is_special(path):
            with path.open("w", encoding="utf-8") as stream:
                stream.write(text)
            return
        # A link stays a link.
        final = path.resolve()
        draft = final.with_name(f".{final.name[:40]}.{os.getpid()}")
        try:
            with draft.open("w", encoding="utf-8") as stream:
                stream.write(text)
            draft.replace(final)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        unwritable(path, error)


def show(result: Any, *, as_json: bool) -> None:
    """Print a result as text, or as JSON."""
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(ending(str(result)), nl=False)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(_plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    """Turn what JSON lacks into what it has: keys and strange values into text, infinities too."""
    match value:
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
        case bool() | int() | str() | None:
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case list() | tuple():
            return [_plain(v) for v in value]
        case _:
            return str(value)


def ending(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def is_watched() -> bool:
    """Whether a person looks at stderr."""
    return sys.stderr.isatty()


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show on stderr that work goes on, if a person is looking."""
    if not is_watched():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int, Any], None] | None]:
    """Show on stderr a bar of how much is done, if a person is looking; yields what to call after each step."""
    if not is_watched():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        failed = 0

        def step(made: int, planned: int, trial: Any) -> None:
            nonlocal failed
            failed += trial.status in ("FAIL", "ERROR")
            label = f"{what} {trial.name}" + (f", {failed} failed" if failed else "")
            bar.update(task, completed=made, total=planned, description=label)

        yield step
