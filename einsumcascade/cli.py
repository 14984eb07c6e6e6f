"""The command line: list, analyse, derive, compile and verify.

Results go to stdout, messages and progress to stderr. Exit status: 0, 1 where a verification failed, 2 for bad input.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from einsumcascade.errors import Diagnostic, EinsumCascadeError, InputError, ScheduleError, SourceText, Span, nearest

if TYPE_CHECKING:
    from einsumcascade.language.ir import Cascade


class Dtype(StrEnum):
    """The dtypes that kernels are written for."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


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
    help="Compile cascades of extended Einsums: analyse, derive, compile and verify them.",
)

Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A gallery name, or the path of a .cascade file.")]
Constraints = Annotated[
    list[str] | None,
    typer.Option("--constraint", metavar="TEXT", help="One more condition, as 'm <= p'. Repeatable."),
]
Constants = Annotated[
    list[str] | None,
    typer.Option("--const", metavar="NAME=VALUE", help="The value of a constant. Repeatable."),
]
Extents = Annotated[str, typer.Option("--extents", metavar="P=4096,...", help="Extents of ranks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_gallery(as_json: AsJson = False) -> None:
    """List the gallery: name, paper, passes over each rank."""
    from einsumcascade import gallery
    from einsumcascade.analysis.report import analyse as analyse_cascade

    heads = {name: gallery.header(name) for name in gallery.names()}
    passes = {name: dict(analyse_cascade(gallery.load(name)).passes) for name in heads}
    if as_json:
        _print_json(
            [
                {"name": name, "title": h.title, "paper": h.paper, "kernel": h.kernel, "passes": passes[name]}
                for name, h in heads.items()
            ]
        )
        return
    width = max(map(len, heads))
    repeated = {n: ", ".join(f"{rank}: {c}" for rank, c in passes[n].items() if c > 1) or "1" for n in heads}
    middle = max(map(len, ("passes", *repeated.values())))
    typer.echo(f"{'name':<{width}}  {'passes':<{middle}}  paper")
    for name, head in heads.items():
        typer.echo(f"{name:<{width}}  {repeated[name]:<{middle}}  {head.paper}")


@app.command()
def analyse(
    spec: Spec,
    constraint: Constraints = None,
    const: Constants = None,
    extents: Extents = "",
    as_json: AsJson = False,
) -> None:
    """Analyse a cascade: passes, levels, barriers, footprints and counts."""
    bound = parse_extents(extents)
    cascade = _cascade(spec, constraint, const)
    from einsumcascade.analysis.report import analyse as analyse_cascade

    _show(analyse_cascade(cascade, **_given(extents=bound)), as_json=as_json)


@app.command()
def derive(
    spec: Spec,
    constraint: Constraints = None,
    const: Constants = None,
    as_json: AsJson = False,
) -> None:
    """Derive the cascade of fewest passes, step by step."""
    cascade = _cascade(spec, constraint, const)
    from einsumcascade.rewrites.derive import derive as derive_cascade

    with _progress("deriving"):
        derivation = derive_cascade(cascade)
    _show(derivation, as_json=as_json)


@app.command("compile")
def compile_kernel(
    spec: Spec,
    constraint: Constraints = None,
    const: Constants = None,
    extents: Extents = "",
    target: Annotated[str, typer.Option(metavar="cuda:90", help="The GPU to compile for; none is needed.")] = "cuda:90",
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the inputs.")] = Dtype.bfloat16,
    schedule: Annotated[Path | None, typer.Option(metavar="FILE", help="A schedule in JSON, instead of ours.")] = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Add registers, spills, shared memory and hot-loop counts.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the kernel text to a file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compile a cascade to the text of its kernels.

    Without -o the text goes to stdout, and what --inspect adds follows it as comments, so the whole is Python still.
    """
    bound = parse_extents(extents)
    cascade = _cascade(spec, constraint, const)
    from einsumcascade.analysis.targets import gpu_target

    gpu_target(target)
    chosen = _schedule(schedule) if schedule is not None else None
    with _progress("compiling"):
        from einsumcascade.codegen.op import compile as compile_cascade

        op = compile_cascade(cascade, **_given(schedule=chosen))
        kernel = op.kernel(dtype=dtype.value, target=target, **_given(extents=bound, schedule=chosen))
        inspection = kernel.inspect() if inspect else None
    if output is not None:
        write_atomically(output, _ending(kernel.source))
    if as_json:
        record: dict[str, Any] = {
            "spec": cascade.name,
            "target": target,
            "dtype": dtype.value,
            "extents": bound,
            "schedule": json.loads(kernel.schedule.to_json()),
            "source": kernel.source,
        }
        if inspection is not None:
            record["inspect"] = inspection.to_dict()
        _print_json(record)
        return
    report = f"{_ending(str(kernel.schedule))}{_ending(str(inspection))}" if inspection is not None else ""
    if output is None:
        typer.echo(_ending(kernel.source), nl=False)
        report = "".join(f"# {line}".rstrip() + "\n" for line in report.splitlines())
    typer.echo(report, nl=False)


@app.command()
def verify(
    spec: Spec,
    constraint: Constraints = None,
    const: Constants = None,
    extents: Extents = "",
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="A dtype to verify; repeatable. All of them unless one is named.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the random inputs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Verify the generated kernels against float64: errors, bounds and the verdict."""
    bound = parse_extents(extents)
    cascade = _cascade(spec, constraint, const)
    dtypes = tuple(dict.fromkeys(d.value for d in dtype or Dtype))
    with _progress("verifying"):
        from einsumcascade.verify.verify import verify as verify_cascade

        verification = verify_cascade(cascade, dtypes=dtypes, seed=seed, **_given(extents=bound))
    _show(verification, as_json=as_json)
    if not verification.passed:
        raise typer.Exit(1)


def main() -> int:
    """Run the command line on the arguments of the process and return its exit status."""
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def parse_extents(text: str) -> dict[str, int]:
    """Parse `P=4096,M=4096` into extents by rank; an empty text gives none.

    Raises:
        InputError: `option-extents`, for each part that is not `RANK=extent` with an extent of 1 or more.

    >>> parse_extents("P=77, M=4096")
    {'P': 77, 'M': 4096}
    """
    found: dict[str, int] = {}
    problems: list[Diagnostic] = []
    start = 0
    for part in text.split(",") if text.strip() else ():
        match = re.fullmatch(r"\s*([A-Z][A-Za-z0-9_]*)\s*=\s*([0-9]{1,18})\s*", part)
        first = start + len(part) - len(part.lstrip()) + 1
        span = Span(line=1, column=first, end_column=first + len(part.strip()))
        start += len(part) + 1
        if match is None:
            headline, hint = f"'{part.strip()}' is no extent", _extent_hint(part)
        elif match[1] in found:
            headline, hint = f"{match[1]} is {found[match[1]]} and {match[2]}", f"give {match[1]} once"
        elif int(match[2]) < 1:
            headline, hint = f"{match[1]} is {match[2]}", "an extent is 1 or more"
        else:
            found[match[1]] = int(match[2])
            continue
        problems.append(
            Diagnostic(
                code="option-extents",
                headline=headline,
                span=span,
                rule="--extents takes RANK=extent, separated by commas, each rank once",
                hint=hint,
            )
        )
    if problems:
        raise InputError(diagnostics=tuple(problems), source=SourceText(text=text, name="--extents"))
    return found


def _extent_hint(part: str) -> str:
    name, _, value = (piece.strip() for piece in part.partition("="))
    if re.fullmatch(r"[a-z][A-Za-z0-9_]*", name) and re.fullmatch(r"[0-9]+", value):
        return f"ranks are upper case: {name[0].upper()}{name[1:]}={value}"
    return "for instance P=4096,M=4096"


def _cascade(spec: str, constraints: Sequence[str] | None, constants: Sequence[str] | None) -> Cascade:
    """Load SPEC and apply --constraint and --const."""
    from einsumcascade import gallery
    from einsumcascade.language.ir import Num
    from einsumcascade.language.parser import constrained

    cascade = gallery.load(spec)
    given = dict(_constant(text) for text in constants or ())
    declared = {c.name for c in cascade.constants}
    cascade = replace(
        cascade,
        constants=tuple(replace(c, expr=Num(value=given[c.name])) if c.name in given else c for c in cascade.constants),
    )
    # What the text does not declare, a constraint may use; the first that does declares it.
    new = {name: value for name, value in given.items() if name not in declared}
    for text in constraints or ():
        used = {name: new.pop(name) for name in list(new) if re.search(rf"\b{name}\b", text)}
        cascade = constrained(cascade, text, used)
    if new:
        name = next(iter(new))
        _refuse(
            "option-const",
            f"nothing uses a constant '{name}'",
            rule="--const changes a constant of the text, or gives one that a --constraint uses",
            hint=nearest(name, sorted(declared)),
        )
    return cascade


def _constant(text: str) -> tuple[str, float]:
    match = re.fullmatch(
        r"\s*([A-Za-z][A-Za-z0-9_]*)\s*=\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*", text
    )
    if match is not None and math.isfinite(float(match[2])):
        whole = re.fullmatch(r"[+-]?[0-9]{1,18}", match[2])
        return match[1], int(match[2]) if whole else float(match[2])
    _refuse(
        "option-const",
        f"'{text}' is no constant",
        rule="--const takes NAME=VALUE, the value a finite number",
        hint="for instance --const w=1024",
    )


def _refuse(code: str, headline: str, *, rule: str, hint: str) -> NoReturn:
    raise InputError(diagnostics=(Diagnostic(code=code, headline=headline, rule=rule, hint=hint),))


def _schedule(path: Path) -> Any:
    """Read the schedule in the JSON file at `path`."""
    from einsumcascade.schedules.schedule import Schedule

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        problem = Diagnostic(
            code="schedule-file",
            headline=f"the schedule '{path}' cannot be read: {_reason(error)}",
            rule="a schedule is a file of JSON text",
            hint="`einsumcascade compile SPEC --json` prints one",
        )
        raise ScheduleError(diagnostics=(problem,)) from None
    return Schedule.from_json(text)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one.

    Raises:
        InputError: `output-file`: the file cannot be written; what was there is unchanged.
    """
    try:
        # A link stays a link; what is no file, a pipe or a terminal, cannot be replaced.
        final = path.resolve()
        if final.exists() and not final.is_file():
            with final.open("w", encoding="utf-8") as stream:
                stream.write(text)
            return
        draft = final.with_name(f".{final.name[:40]}.{os.getpid()}")
        try:
            with draft.open("w", encoding="utf-8") as stream:
                stream.write(text)
            draft.replace(final)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        _refuse(
            "output-file",
            f"'{path}' cannot be written: {_reason(error)}",
            rule="-o names a file in a folder that exists and may be written to",
            hint="create the folder, or choose another",
        )


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _given(**options: Any) -> dict[str, Any]:
    """Keep the options that the caller named, so that the defaults of the library hold for the others."""
    return {name: value for name, value in options.items() if value is not None and value != {}}


def _show(result: Any, *, as_json: bool) -> None:
    """Print a result as text, or as JSON."""
    if as_json:
        _print_json(result.to_dict())
    else:
        typer.echo(_ending(str(result)), nl=False)


def _print_json(value: Any) -> None:
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


def _ending(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Show on stderr that work goes on, if a person is looking."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield
