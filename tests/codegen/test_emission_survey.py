"""The page shows what the hot loops of the first families hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.codegen.emission_survey import scores, survey, texts
from tests.nightly import NIGHTLY

PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"


def shown() -> dict[str, tuple[float, float]]:
    """The figures of the page by kernel, three kernels a line."""
    lines = PAGE.read_text(encoding="utf-8").split("| kernel | all | asked ")[-1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    triples = [row[i : i + 3] for row in cells for i in (0, 3, 6)]
    return {name: (float(instructions), float(asked)) for name, instructions, asked in triples if name}


@pytest.mark.parametrize("name", texts() if NIGHTLY else ["gqa", "relu"])
def test_the_page_shows_the_hot_loops_of_the_first_families(name: str) -> None:
    found = survey(name)
    page = shown()
    for row in scores(found):
        instructions, asked = page[row.kernel]
        # Moves and addresses are the compiler's, and other in each of its versions.
        assert abs(row.instructions - instructions) <= 0.05 * instructions + 0.05, row
        assert round(row.asked, 1) == asked, row
    assert all(row.spills == 0 for row in found) or name == "var"
