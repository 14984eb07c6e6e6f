"""Results as figures: bars in PNG, where matplotlib is there, and one page of HTML that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einsumcascade.benchmarks.findings import tables
from einsumcascade.benchmarks.session import heading
from einsumcascade.benchmarks.table import faults, figure, kind, names, own_names, remarks

PAGE = "page.html.jinja"
# Ours is the saturated one.
COLOURS = ("#1f5fbf", "#9aa5b1", "#c9a66b", "#7fb09a", "#b58db6", "#d08c7a", "#8a8f5c", "#6f9bb8")


def colours(result: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each candidate."""
    return {name: COLOURS[n % len(COLOURS)] for n, name in enumerate((*own_names(result), *names(result)))}


def groups(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bars of each measured case, by kind."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in result["cases"]:
        bars = [
            {"name": r["name"], "rate": r["rate"], "times": r["times"]}
            for r in record.get("rows", ())
            if r["rate"] and r["times"]
        ]
        if bars:
            found.setdefault((kind(record), record["unit"]), []).append({"case": record["case"], "bars": bars})
    return [
        {"kind": k, "unit": u, "cases": cases, "most": max(b["rate"] for c in cases for b in c["bars"]) or 1.0}
        for (k, u), cases in found.items()
    ]


def write_png(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw a figure for each kind of case; none where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    plt: Any = pyplot

    # To matplotlib a dollar sign begins a formula.
    def text(words: str) -> str:
        return words.replace("$", r"\$")

    chosen, written = colours(result), []
    for group in groups(result):
        count = sum(len(c["bars"]) + 1 for c in group["cases"])
        drawing, axes = plt.subplots(figsize=(9, 1.2 + 0.17 * count), layout="constrained")
        y, ticks, labels, named = 0.0, [], [], set()
        for case in group["cases"]:
            ticks.append(y + (len(case["bars"]) - 1) / 2)
            labels.append(text(case["case"]))
            for bar in case["bars"]:
                name = bar["name"]
                axes.barh(y, bar["rate"], height=0.9, color=chosen[name], label=None if name in named else text(name))
                axes.text(bar["rate"], y, f" {figure(bar['rate'])}", va="center", fontsize=6)
                named.add(name)
                y += 1
            y += 1
        axes.set_yticks(ticks, labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(
            f"{group['unit']} of live work" if group["unit"] == "TFLOP/s" else f"{group['unit']} of keys and values"
        )
        axes.set_title(text(f"{group['kind']} on {result['device']}"), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.01)
        drawing.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=len(named))
        path = folder / f"{group['kind']}.png"
        drawing.savefig(path, dpi=150)
        plt.close(drawing)
        written.append(path)
    return written


def write_page(result: Mapping[str, Any], path: Path) -> bool:
    """Write the page; False where jinja2 is missing."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        return False
    text = Path(__file__).with_name(PAGE).read_text(encoding="utf-8")
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(text)
    page = template.render(
        result=result,
        heading=heading(result).splitlines(),
        groups=groups(result),
        colours=colours(result),
        tables=tables(result),
        faults=faults(result),
        remarks=remarks(result),
        figure=figure,
    )
    path.write_text(page, encoding="utf-8")
    return True
