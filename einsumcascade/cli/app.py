"""The application: what its commands share, and how it ends.

Results go to stdout, messages and progress to stderr. Exit status: 0, 1 where a verification failed, 2 for bad input.
"""

from __future__ import annotations

import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from einsumcascade.errors import EinsumCascadeError, EinsumCascadeWarning


class _Group(TyperGroup):
    """Commands whose mistakes of the caller are a message and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EinsumCascadeError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Compile cascades of extended Einsums: analyse, derive, compile and verify them.",
)


def main() -> int:
    """Run the command line on the arguments of the process and return its exit status."""
    plain = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, EinsumCascadeWarning):
            typer.echo(f"warning{message}", err=True)
        else:
            plain(message, category, *where, **more)

    warnings.showwarning = shown
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except OSError as error:
        # Of a stream, as of a full disk behind stdout; what a file is in the way of is said by its command.
        if error.filename is not None:
            raise
        typer.echo(f"the output cannot be written: {error.strerror or error}", err=True)
        return 1
    return 0
