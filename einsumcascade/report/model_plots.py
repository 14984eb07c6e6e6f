"""The figures of an evaluation on spatial arrays, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from einsumcascade.analysis.spatial.evaluation import Evaluation, Time, Utilisation, length_text
from einsumcascade.errors import InputError, ModelError

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_HEIGHT = 3.4


def plot_evaluation(evaluation: Evaluation, folder: str | Path, *, suffix: str = "svg") -> list[Path]:
    """Draw each table of an evaluation into a file of its own.

    Args:
        evaluation: what `analysis.spatial.model.model` returns.
        folder: where the files go; it is made if it is missing.
        suffix: `svg` or `png`.

    Returns: the files, in the order of the tables.
    Raises:
        ModelError: `no-matplotlib`: matplotlib is not installed.
        InputError: `output-file`: the folder or a file in it cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ModelError.of(
            "no-matplotlib",
            "the figures cannot be drawn: matplotlib is not installed",
            rule="tables need nothing more, figures need matplotlib",
            hint="pip install 'einsumcascade[plots]'",
        ) from None
    written = []
    # One salt and no date, so that the same tables give the same files.
    with matplotlib.rc_context({"svg.hashsalt": "einsumcascade"}):
        for name, figure in _figures(evaluation):
            path = Path(folder) / f"{name}.{suffix}"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None, dpi=150)
            except OSError as error:
                raise InputError.of(
                    "output-file",
                    f"'{path}' cannot be written: {error.strerror or error}",
                    rule="figures go into a folder that may be written to",
                    hint="choose another folder",
                ) from None
            written.append(path)
    return written


def _figures(evaluation: Evaluation) -> Iterator[tuple[str, Any]]:
    if evaluation.shares:
        yield "shares", _shares(evaluation)
    for array in evaluation.utilisation[0].arrays:

        def used(row: Utilisation, array: str = array) -> float:
            return row.arrays[array]

        yield f"utilisation-{array}", _bars(evaluation, evaluation.utilisation, used, f"Utilisation of array {array}")
    yield "breakdown", _breakdown(evaluation)
    over = f"over {evaluation.labels[evaluation.baseline]}"
    yield "attention", _bars(evaluation, evaluation.attention, _speedup, f"Speed-up of attention {over}")
    if evaluation.end_to_end:
        yield "end-to-end", _bars(evaluation, evaluation.end_to_end, _speedup, f"Speed-up of a layer {over}")
    yield "traffic", _bars(evaluation, evaluation.attention, _gigabytes, "DRAM traffic of attention, GB", log=True)
    if evaluation.sizes:
        yield "sizes", _sizes(evaluation)


def _speedup(row: Time) -> float:
    return row.speedup


def _gigabytes(row: Time) -> float:
    return row.dram_bytes / 1e9


def _panels(count: int, *, width: float) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count + 1.5, _HEIGHT), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for a in axes:
        a.grid(axis="y", linewidth=0.5, alpha=0.5)
        a.set_axisbelow(True)
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(
    evaluation: Evaluation, rows: Sequence[Any], value: Callable[[Any], float], label: str, *, log: bool = False
) -> Any:
    """Draw a panel for each model, a group of bars for each length, a bar for each configuration."""
    models = list(dict.fromkeys(r.model for r in rows))
    figure, axes = _panels(len(models), width=3.2)
    width = 0.8 / len(evaluation.labels)
    for panel, model in zip(axes, models, strict=True):
        lengths = list(dict.fromkeys(r.length for r in rows if r.model == model))
        for k, (configuration, text) in enumerate(evaluation.labels.items()):
            heights = [value(r) for r in rows if r.model == model and r.configuration == configuration]
            places = [n + (k - (len(evaluation.labels) - 1) / 2) * width for n in range(len(lengths))]
            panel.bar(places, heights, width, label=text, color=_COLOURS[k % len(_COLOURS)])
        panel.set_xticks(range(len(lengths)), [length_text(n) for n in lengths])
        panel.set_xlabel(model)
        if log:
            panel.set_yscale("log")
    axes[0].set_ylabel(label)
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right center", frameon=False)
    return figure


def _shares(evaluation: Evaluation) -> Any:
    figure, (panel,) = _panels(1, width=4.5)
    for k, model in enumerate(dict.fromkeys(r.model for r in evaluation.shares)):
        rows = [r for r in evaluation.shares if r.model == model]
        panel.plot([r.length for r in rows], [r.share for r in rows], marker="o", label=model, color=_COLOURS[k])
    lengths = sorted({r.length for r in evaluation.shares})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [length_text(n) for n in lengths])
    panel.set_ylim(0, 1.03)
    panel.set_xlabel("length")
    panel.set_ylabel("Attention's share of MACs")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _breakdown(evaluation: Evaluation) -> Any:
    """Draw a panel for each length of the first model, a stack of Einsums for each configuration."""
    first = evaluation.utilisation[0].model
    rows = [r for r in evaluation.utilisation if r.model == first]
    einsums = list(dict.fromkeys(e for r in rows for e in r.einsums))
    lengths = list(dict.fromkeys(r.length for r in rows))
    figure, axes = _panels(len(lengths), width=1.8)
    for panel, length in zip(axes, lengths, strict=True):
        here = [r for r in rows if r.length == length]
        bottom = [0.0] * len(here)
        for k, einsum in enumerate(einsums):
            heights = [r.einsums.get(einsum, 0.0) for r in here]
            panel.bar(range(len(here)), heights, 0.75, bottom=bottom, label=einsum, color=_COLOURS[k % len(_COLOURS)])
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        labels = [evaluation.labels[r.configuration] for r in here]
        panel.set_xticks(range(len(here)), labels, rotation=60, ha="right")
        panel.set_xlabel(length_text(length))
        panel.set_ylim(0, 1)
    axes[0].set_ylabel(f"Array {evaluation.breakdown} works, {first}")
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right center", frameon=False)
    return figure


def _sizes(evaluation: Evaluation) -> Any:
    figure, (panel,) = _panels(1, width=4.5)
    for k, model in enumerate(dict.fromkeys(r.model for r in evaluation.sizes)):
        rows = [r for r in evaluation.sizes if r.model == model]
        panel.plot([r.elements for r in rows], [r.seconds for r in rows], marker="o", label=model, color=_COLOURS[k])
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("processing elements")
    panel.set_ylabel(f"Attention at {length_text(evaluation.sizes[0].length)}, seconds")
    figure.legend(loc="outside right center", frameon=False)
    return figure
