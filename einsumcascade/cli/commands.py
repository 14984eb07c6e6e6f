"""The commands: list, analyse, derive, compile, export, report, verify, bench and check.

Results go to stdout, messages and progress to stderr. Exit status: 0, 1 where a verification failed, 2 for bad input.
"""

from __future__ import annotations

import json
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from einsumcascade.cli.options import given_of, keep, parse_extents, refuse, schedule_of, spec_of, text_of
from einsumcascade.cli.output import counted, ending, print_json, progress, show, write_atomically
from einsumcascade.errors import EinsumCascadeError, EinsumCascadeWarning


class Dtype(StrEnum):
    """The dtypes that kernels are written for."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Division(StrEnum):
    """Where the division by a normaliser stands."""

    deferred = "deferred"
    immediate = "immediate"
    exponent = "exponent"


class Reference(StrEnum):
    """What a state refers to while the rank is read."""

    running = "running"
    local = "local"
    bound = "bound"


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
    typer.Option(
        "--constraint", metavar="TEXT", help="One more condition, as 'm <= p' or 'm <= p and p - m < w'. Repeatable."
    ),
]
Constants = Annotated[
    list[str] | None,
    typer.Option("--const", metavar="NAME=VALUE", help="The value of a constant. Repeatable."),
]
Scores = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        metavar="'QK = TEXT'",
        help="An expression in place of a tensor, as 'QK = QK + SLOPE[h] * (m - p)'; a new name with ranks is a new "
        "input. Repeatable.",
    ),
]
Over = Annotated[
    list[str] | None,
    typer.Option(
        "--over", metavar="B[=Q,K,...]", help="A new batch rank on all inputs, or on those named. Repeatable."
    ),
]
Extents = Annotated[str, typer.Option("--extents", metavar="P=4096,...", help="Extents of ranks.")]
ScheduleFile = Annotated[
    Path | None, typer.Option("--schedule", metavar="FILE", help="A schedule in JSON, instead of ours.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_gallery(as_json: AsJson = False) -> None:
    """List the gallery: name, paper, passes over each rank."""
    from einsumcascade import gallery
    from einsumcascade.cli.listing import gallery_passes

    heads = {name: gallery.header(name) for name in gallery.names()}
    with progress("counting passes"):
        passes = gallery_passes()
    if as_json:
        print_json(
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
    score: Scores = None,
    const: Constants = None,
    over: Over = None,
    extents: Extents = "",
    target: Annotated[
        str | None, typer.Option(metavar="cuda:90", help="A GPU whose roofline to add; give all extents too.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the inputs, for the roofline.")] = Dtype.bfloat16,
    as_json: AsJson = False,
) -> None:
    """Analyse a cascade: passes, levels, barriers, footprints, counts, and the roofline of a target."""
    bound = parse_extents(extents)
    cascade = spec_of(spec, constraint, const, over, score)
    from einsumcascade.analysis.report import analyse as analyse_cascade

    show(analyse_cascade(cascade, dtype=dtype.value, **given_of(extents=bound, target=target)), as_json=as_json)


@app.command()
def derive(
    spec: Spec,
    constraint: Constraints = None,
    score: Scores = None,
    const: Constants = None,
    over: Over = None,
    extents: Extents = "",
    rank: Annotated[
        str | None, typer.Option(metavar="M", help="The rank to stream, instead of all that chain.")
    ] = None,
    division: Annotated[
        Division | None,
        typer.Option(help="Divide after a reduction, inside it or in an exponent; else the cheaper."),
    ] = None,
    reference: Annotated[
        Reference, typer.Option(help="Correct a running state, merge local ones, or use a bound where it cancels.")
    ] = Reference.running,
    parts: Annotated[int, typer.Option(min=1, help="Parts of the rank, each with a local state.")] = 8,
    tile: Annotated[int, typer.Option(min=1, help="Elements of a tile of the running loop.")] = 128,
    saved: Annotated[
        list[str] | None,
        typer.Option(metavar="EINSUM", help="What an input is known to be, as 'O[p,f] = A[p,m]*V[m,f]'. Repeatable."),
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX for a paper.")] = False,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Derive the gradient instead: what is saved, and the backward cascade.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Derive the cascade of fewest passes, step by step; or its gradient."""
    bound = parse_extents(extents)
    if gradient and latex:
        raise typer.BadParameter("a gradient is printed as text or as JSON", param_hint="--latex")
    cascade = spec_of(spec, constraint, const, over, score)
    if gradient:
        from einsumcascade.rewrites.differentiate import differentiate

        with progress("differentiating"):
            found = differentiate(cascade, **given_of(extents=bound))
        show(found, as_json=as_json)
        return
    from einsumcascade.rewrites.derive import derive as derive_cascade

    with progress("deriving"):
        derivation = derive_cascade(
            cascade,
            parts=parts,
            tile=tile,
            reference=reference.value,
            division=division.value if division else None,
            saved=tuple(saved or ()),
            **given_of(rank=rank, extents=bound),
        )
    if latex:
        from einsumcascade.rewrites.latex import latex_of

        typer.echo(ending(latex_of(derivation)), nl=False)
        return
    show(derivation, as_json=as_json)


@app.command("compile")
def compile_kernel(
    spec: Spec,
    constraint: Constraints = None,
    score: Scores = None,
    const: Constants = None,
    over: Over = None,
    extents: Extents = "",
    target: Annotated[str, typer.Option(metavar="cuda:90", help="The GPU to compile for; none is needed.")] = "cuda:90",
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the inputs.")] = Dtype.bfloat16,
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

    Without -o the text goes to stdout, and what --inspect adds follows it as comments, so the whole is Python still.
    """
    bound = parse_extents(extents)
    cascade = spec_of(spec, constraint, const, over, score)
    from einsumcascade.analysis.targets import gpu_target

    gpu_target(target)
    keep(spec, output)
    chosen = schedule_of(schedule) if schedule is not None else None
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
def export(
    spec: Spec,
    constraint: Constraints = None,
    score: Scores = None,
    const: Constants = None,
    over: Over = None,
    extents: Extents = "",
    target: Annotated[str, typer.Option(metavar="cuda:90", help="The GPU to compile for; none is needed.")] = "cuda:90",
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the inputs.")] = Dtype.bfloat16,
    schedule: ScheduleFile = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")] = None,
) -> None:
    """Export a PyTorch op, forward and backward, as one file that needs torch and triton only."""
    bound = parse_extents(extents)
    cascade = spec_of(spec, constraint, const, over, score)
    keep(spec, output)
    chosen = schedule_of(schedule) if schedule is not None else None
    with progress("exporting"):
        from einsumcascade.codegen.op import compile as compile_cascade

        op = compile_cascade(cascade, **given_of(schedule=chosen))
        text = op.export(dtype=dtype.value, target=target, **given_of(extents=bound))
    if output is not None:
        write_atomically(output, text)
    else:
        typer.echo(text, nl=False)


@app.command()
def report(
    spec: Spec,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")],
    constraint: Constraints = None,
    score: Scores = None,
    const: Constants = None,
    over: Over = None,
    extents: Extents = "",
    target: Annotated[
        str, typer.Option(metavar="cuda:90", help="The GPU of costs and kernels; none is needed.")
    ] = "cuda:90",
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the inputs.")] = Dtype.bfloat16,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page shows as JSON too.")] = False,
) -> None:
    """Write a page of HTML that shows all there is: text, graph, passes, footprints, costs, derivation, kernels."""
    bound = parse_extents(extents)
    cascade = spec_of(spec, constraint, const, over, score)
    keep(spec, output)
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
def verify(
    spec: Annotated[
        str | None, typer.Argument(metavar="[SPEC]", help="A gallery name, or the path of a .cascade file.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Verify every gallery text that has a kernel, on every kind of input.")
    ] = False,
    constraint: Constraints = None,
    score: Scores = None,
    const: Constants = None,
    over: Over = None,
    extents: Extents = "",
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="A dtype to verify; repeatable. All of them unless one is named.")
    ] = None,
    schedule: ScheduleFile = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the random inputs.")] = 0,
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
    if (spec is None) != every or (every and (constraint or score or const or over or extents or schedule)):
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
    bound = parse_extents(extents)
    cascade = spec_of(spec, constraint, const, over, score)
    chosen = schedule_of(schedule) if schedule is not None else None
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


@app.command()
def check(
    certificate: Annotated[Path, typer.Argument(metavar="CERTIFICATE", help="What `derive SPEC --json` printed.")],
    seed: Annotated[int, typer.Option(min=0, help="The seed of the random points and inputs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check a derivation again, independently of the rewriter."""
    text = text_of(certificate)
    with progress("checking"):
        from einsumcascade.verify.certificate import check as check_certificate

        checked = check_certificate(text, seed=seed)
    show(checked, as_json=as_json)
    if not checked.passed:
        raise typer.Exit(1)


@app.command()
def model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="fusemax, or the path of an evaluation in TOML.")],
    plots: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Draw the tables there too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Model a spatial array: cycles, utilisation and traffic from cascade, mapping and target."""
    from einsumcascade.analysis.spatial.model import model as evaluate

    with progress("modelling"):
        evaluation = evaluate(name)
        if plots is not None:
            from einsumcascade.report.model_plots import plot_evaluation

            drawn = plot_evaluation(evaluation, plots)
            typer.echo(f"drawn: {', '.join(map(str, drawn))}", err=True)
    show(evaluation, as_json=as_json)


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
    return 0
