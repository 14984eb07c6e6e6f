"""The page of the gallery is complete: every text is in one of its tables, once."""

from __future__ import annotations

import re
from pathlib import Path

from einsumcascade.gallery import names

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gallery.md"


def rows() -> list[list[str]]:
    """The cells of every row whose first cell is one word in backticks."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def test_the_page_names_every_text_once_and_no_other() -> None:
    assert sorted(row[0].strip("`") for row in rows()) == list(names())


def test_every_text_is_described_and_covers_a_paper() -> None:
    for name, what, papers in rows():
        assert re.fullmatch(r"`\w+`", name) and what and papers, name
