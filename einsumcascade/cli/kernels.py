"""Commands that make kernels and show or judge them: compile, export, report, verify and bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from einsumcascade.cli.app import app
from einsumcascade.cli.options import check_output, given_of, refuse, schedule_of
from einsumcascade.cli.output import counted, ending, print_json, progress, show, write_atomically
from einsumcascade.cli.parameters import (
    AsJson,
    Changes,
    Dtype,
    InputDtype,
    ScheduleFile,
    Seed,
    Spec,
    Target,
    taken_apart,
)


@app.command("compile")
@taken_apart
def compile_kernel(
    spec: Spec,
    changes: Changes,
    target: Target = "cuda:90",
    dtype: InputDtype = Dtype.bfloat16,
    schedule: ScheduleFile = None,
    gradient: Annotated[bool, typer.Option("--gradient", help="The kernels of the gradient instead.")] = False,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Add registers, spills, shared memory and hot-loop counts.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the kernel text to a file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compile a cascade to the text of its kernels.

    The text holds for all lengths; where --extents has all of them, it is the one that a call of these extents takes.

    Without -o the text goes to stdout, and what --inspect adds follows it as comments, so the whole is Python still.
    """
    cascade, bound = changes.of(spec)
    from einsumcascade.analysis.targets import gpu_target

    gpu_target(target)
    check_output(spec, output)
    chosen = schedule_of(schedule)
    with progress("compiling"):
        from einsumcascade.codegen.op import compile as compile_cascade

        op = compile_cascade(cascade, **given_of(schedule=chosen))
        kernel = op.kernel(dtype=dtype.value, target=target, gradient=gradient, **given_of(extents=bound))
        inspection = kernel.inspect() if inspect else None
    if output is not None:
        write_atomically(output, ending(kernel.source))
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
        print_json(record)
        return
    report = f"{ending(str(kernel.schedule))}{ending(str(inspection))}" if inspection is not None else ""
    if output is None:
        typer.echo(ending(kernel.source), nl=False)
        report = "".join(f"# {line}".rstrip() + "\n" for line in report.splitlines())
    typer.echo(report, nl=False)


@app.command()
@taken_apart
def export(
    spec: Spec,
    changes: Changes,
    target: Target = "cuda:90",
    dtype: InputDtype = Dtype.bfloat16,
    schedule: ScheduleFile = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")] = None,
) -> None:
    """Export a PyTorch op, forward and backward, as one file that needs torch and triton only."""
    cascade, bound = changes.of(spec)
    check_output(spec, output)
    chosen = schedule_of(schedule)
    with progress("exporting"):
        from einsumcascade.codegen.op import compile as compile_cascade

        op = compile_cascade(cascade, **given_of(schedule=chosen))
        text = op.export(dtype=dtype.value, target=target, **given_of(extents=bound))
    if output is not None:
        write_atomically(output, text)
    else:
        typer.echo(text, nl=False)


@app.command()
@taken_apart
def report(
    spec: Spec,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")],
    changes: Changes,
    target: Target = "cuda:90",
    dtype: InputDtype = Dtype.bfloat16,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page shows as JSON too.")] = False,
) -> None:
    """Write a page of HTML that shows all there is: text, graph, passes, footprints, costs, derivation, kernels."""
    cascade, bound = changes.of(spec)
    check_output(spec, output)
    from einsumcascade import gallery

    with progress("reporting"):
        from einsumcascade.report.data import build_report
        from einsumcascade.report.page import render

        header = gallery.header_of(spec)
        found = build_report(cascade, dtype=dtype.value, target=target, header=header, **given_of(extents=bound))
        page = render(found)
    write_atomically(output, page)
    if as_json:
        print_json(found.to_dict())
    typer.echo(f"written: {output}", err=True)


@app.command()
@taken_apart
def verify(
    spec: Annotated[
        str | None, typer.Argument(metavar="SPEC", help="A gallery name, or the path of a .cascade file.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Verify every gallery text that has a kernel, on every kind of input.")
    ] = False,
    *,
    changes: Changes,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="A dtype to verify; repeatable. All of them unless one is named.")
    ] = None,
    schedule: ScheduleFile = None,
    seed: Seed = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes for --all; one a core unless told.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify the generated kernels against float64: errors, bounds and the verdict.

    With --all, of the whole gallery: extents of 1, primes, a tile and one more or less, rows without a key, scores of
    hundreds, slices, offsets. Ctrl-C ends it with what is known.
    """
    dtypes = tuple(dict.fromkeys(d.value for d in dtype or Dtype))
    if (spec is None) != every or (every and (changes.are_given or schedule)):
        refuse(
            "option-all",
            "--all stands beside a SPEC or its changes" if every else "verify has neither a SPEC nor --all",
            rule="verify takes one SPEC, with its changes, or --all, which verifies the gallery as it is",
            hint="einsumcascade verify --all, or einsumcascade verify gqa",
        )
    if spec is None:
        with counted("verifying") as step:
            from einsumcascade.verify.whole import verify_gallery

            sweep = verify_gallery(dtypes=dtypes, seed=seed, jobs=jobs, progress=step)
        show(sweep, as_json=as_json)
        if not sweep.passed:
            raise typer.Exit(1)
        return
    cascade, bound = changes.of(spec)
    chosen = schedule_of(schedule)
    with progress("verifying"):
        from einsumcascade.verify.verify import verify as verify_cascade

        verification = verify_cascade(cascade, dtypes=dtypes, seed=seed, **given_of(extents=bound, schedule=chosen))
    show(verification, as_json=as_json)
    if not verification.passed:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    options_metavar="",
)
def bench(context: typer.Context) -> None:
    """Benchmark our kernels beside what a user would call instead; `bench --help` tells how."""
    from einsumcascade.benchmarks.main import main as run

    # The same command runs in a bare checkout where typer is missing, so its options are read there.
    raise typer.Exit(run(context.args, prog="einsumcascade bench"))
