"""Commands that need no kernel: list, analyse, derive, check and model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from einsumcascade.cli.app import app
from einsumcascade.cli.options import given_of, text_of
from einsumcascade.cli.output import ending, print_json, progress, show
from einsumcascade.cli.parameters import AsJson, Changes, Dtype, Spec, taken_apart

PARTS, TILE = 8, 128


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


@app.command("list")
def list_gallery(as_json: AsJson = False) -> None:
    """List the gallery: name, paper, passes over each rank."""
    from einsumcascade import gallery

    heads = {name: gallery.header(name) for name in gallery.names()}
    passes = gallery.passes()
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
@taken_apart
def analyse(
    spec: Spec,
    changes: Changes,
    target: Annotated[
        str | None, typer.Option(metavar="cuda:90", help="A GPU whose roofline to add; give all extents too.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the inputs, for the roofline.")] = Dtype.bfloat16,
    as_json: AsJson = False,
) -> None:
    """Analyse a cascade: passes, levels, barriers, footprints, counts, and the roofline of a target."""
    cascade, bound = changes.of(spec)
    from einsumcascade.analysis.report import analyse as analyse_cascade

    show(analyse_cascade(cascade, dtype=dtype.value, **given_of(extents=bound, target=target)), as_json=as_json)


@app.command()
@taken_apart
def derive(
    spec: Spec,
    changes: Changes,
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
    parts: Annotated[int, typer.Option(min=1, help="Parts of the rank, each with a local state.")] = PARTS,
    tile: Annotated[int, typer.Option(min=1, help="Elements of a tile of the running loop.")] = TILE,
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
    of_streams = {
        "--latex": latex,
        "--rank": rank,
        "--division": division,
        "--saved": saved,
        "--reference": reference is not Reference.running,
        "--parts": parts != PARTS,
        "--tile": tile != TILE,
    }
    unused = next((name for name, given in of_streams.items() if given), "")
    if gradient and unused:
        raise typer.BadParameter("a gradient has no loop form, and is printed as text or as JSON", param_hint=unused)
    cascade, bound = changes.of(spec)
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
