"""Calls of the command line in this process, and what is expected of all of them."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from einsumcascade.cli import app

SMALL = "B=1,H=2,P=33,M=20,E=16,F=16"


def call(*arguments: str) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(arguments))


def succeed(*arguments: str) -> Result:
    """Run the command line and expect status 0 and silence on stderr."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result.stderr == ""
    return result


def refuse(code: str, *arguments: str) -> str:
    """Run the command line and expect the one message `code`, status 2 and nothing on stdout."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert f"[{code}]: " in result.stderr and f"docs/errors.md#{code}" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    return result.stderr
