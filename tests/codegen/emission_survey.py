"""What the hot loops of every text of the first families hold, beside what their Einsums ask for.

To print the table of docs/schedules.md, in some minutes:

    python -m tests.codegen.emission_survey
"""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import einsumcascade as ec
from einsumcascade.gallery import header
from tests.gallery.draws import extents_of

GALLERY = Path(__file__).resolve().parents[2] / "docs" / "gallery.md"
FAMILIES = 4
SIZE = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel at its default schedule.

    Args:
        kernel: its name. is_product: its hot loop has products of tiles.
        instructions: of a thread for each element of the tile, products left out; 0 without one such loop.
        asked: operations that its Einsums ask for. spills: instructions of the hot loop that move spilled registers.
    """

    kernel: str
    is_product: bool
    instructions: float
    asked: float
    spills: int

    def __str__(self) -> str:
        return f"| {self.kernel} | {self.instructions:.1f} | {self.asked:.1f} |"


def texts() -> list[str]:
    """The texts of the first families of the gallery that have kernels."""
    sections = GALLERY.read_text(encoding="utf-8").split("\n## ")[1 : FAMILIES + 1]
    named = [n for section in sections for n in re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)]
    return [n for n in named if header(n).kernel == "yes"]


def survey(name: str) -> list[Row]:
    """Compile the forward of a text for cuda:90, heads of 64, bfloat16."""
    heads = {rank: SIZE for rank in ("E", "F") if rank in extents_of(ec.load(name), name)}
    found = ec.compile(name).kernel(dtype="bfloat16", target="cuda:90", extents=heads).inspect()
    rows = []
    for function, report in found.kernels.items():
        hot, step = report.hot_loop, found.steps.get(function)
        if hot is not None:
            instructions, asked = (step.instructions, step.needed) if step is not None else (0.0, 0.0)
            spills = hot.count("LDL") + hot.count("STL")
            rows.append(Row(function.removesuffix("_kernel"), hot.count("MMA") > 0, instructions, asked, spills))
    return rows


def scores(rows: list[Row]) -> list[Row]:
    """Those of loops over scores: products of tiles, and one element a score."""
    return [r for r in rows if r.is_product and 0 < r.instructions < 100]


def main() -> None:
    """Print the table, and the kernels that spill in their hot loop."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        rows = [row for found in pool.map(survey, texts()) for row in found]
    print("| kernel | instructions | asked |\n|---|---|---|")
    print(*sorted(scores(rows), key=lambda r: r.kernel), sep="\n")
    print("spills in its hot loop:", *(f"{r.kernel} ({r.spills})" for r in rows if r.spills))


if __name__ == "__main__":
    main()
