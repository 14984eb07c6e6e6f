"""The numbered definitions of docs/analysis.md: what code cites is defined there, and what is defined is cited."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "analysis.md"
LETTERS = "FOPTX"
_NUMBERED = re.compile(r"^\* \*\*([A-Z])(\d+)\*\* \([^)]+\)\. ", flags=re.MULTILINE)
# `Definition F2`, `Definitions X1 and X2`, `Definitions O1 to O8`, `Definitions P1, P2 and P6`.
_LIST = re.compile(r"\bDefinitions?\s+([A-Z]\d+(?:(?:,\s+and|,|\s+and|\s+to)\s+[A-Z]\d+)*)")
_PART = re.compile(r"([A-Z])(\d+)(\s+to\s+)?")


def defined() -> list[tuple[str, int]]:
    """List the definitions of the page, in its order."""
    return [(m[1], int(m[2])) for m in _NUMBERED.finditer(PAGE.read_text(encoding="utf-8"))]


def cited(text: str) -> Iterator[tuple[str, int]]:
    """Yield the definitions that a text cites, ranges written out."""
    for found in _LIST.finditer(text):
        first: tuple[str, int] | None = None
        for letter, digits, to in _PART.findall(found[1]):
            number = int(digits)
            if first is not None:
                assert first[0] == letter and first[1] < number, found[0]
                yield from ((letter, n) for n in range(first[1] + 1, number))
            yield letter, number
            first = (letter, number) if to else None


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def sources() -> list[Path]:
    """List the files of the package, mapped folders by their real places."""
    folders = (ROOT / name for name in ("einsumcascade", "codegen", "schedules", "reference"))
    return sorted({p.resolve() for folder in folders for p in folder.rglob("*.py")})


def citations() -> dict[tuple[str, int], list[str]]:
    """Return where the package's docstrings cite each definition."""
    found: dict[tuple[str, int], list[str]] = {}
    for path in sources():
        for text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            for definition in cited(text):
                found.setdefault(definition, []).append(str(path.relative_to(ROOT)))
    return found


def test_lists_and_ranges_of_definitions_are_read() -> None:
    text = "Definition F2; Definitions X1 and\nX3, Definitions O1 to O4, O7 and P10; the ranks M1, M0."
    assert list(cited(text)) == [
        ("F", 2), ("X", 1), ("X", 3), ("O", 1), ("O", 2), ("O", 3), ("O", 4), ("O", 7), ("P", 10),
    ]  # fmt: skip


def test_what_docstrings_cite_is_defined() -> None:
    known = set(defined())
    assert {d: where for d, where in citations().items() if d not in known} == {}


def test_what_is_defined_is_cited() -> None:
    used = citations()
    assert [f"{letter}{number}" for letter, number in defined() if (letter, number) not in used] == []


def test_definitions_are_numbered_from_one_and_stand_once() -> None:
    numbers: dict[str, list[int]] = {}
    for letter, number in defined():
        numbers.setdefault(letter, []).append(number)
    assert set(numbers) == set(LETTERS)
    assert numbers == {letter: list(range(1, len(found) + 1)) for letter, found in numbers.items()}


def test_every_number_in_bold_is_a_definition_and_every_other_points_to_one() -> None:
    text = PAGE.read_text(encoding="utf-8")
    bold = Counter(re.findall(rf"\*\*([{LETTERS}]\d+)\*\*", text))
    assert bold == Counter(f"{letter}{number}" for letter, number in defined())
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(rf"\b[{LETTERS}]\d+\b", prose)) <= set(bold)
