"""The documents: their Python runs, their cascades parse or fail as they say, their links lead somewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from einsumcascade.errors import CascadeError
from einsumcascade.language.parser import parse

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
_FAILS = "cascade fails: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: where it is, what follows the opening fence, and its text."""

    place: str
    info: str
    text: str


def blocks() -> list[Block]:
    """List the fenced blocks of all documents."""
    found = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(place=f"{path.name}:{line}", info=match[1].strip(), text=match[2]))
    return found


def some(*, prefix: str) -> list[object]:
    """List the blocks whose opening fence begins with `prefix` as parameters of a test."""
    return [pytest.param(b, id=b.place) for b in blocks() if b.info.startswith(prefix)]


def anchor(heading: str) -> str:
    """Return the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("block", some(prefix="python"))
def test_a_python_block_runs(block: Block) -> None:
    exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", [b for b in blocks() if b.info == "cascade"], ids=lambda b: b.place)
def test_a_cascade_block_parses(block: Block) -> None:
    cascade = parse(block.text, name=block.place)
    assert parse(str(cascade)) == cascade


@pytest.mark.parametrize("block", some(prefix=_FAILS))
def test_a_wrong_cascade_fails_with_the_one_code_it_names(block: Block) -> None:
    with pytest.raises(CascadeError) as caught:
        parse(block.text)
    assert caught.value.codes == (block.info.removeprefix(_FAILS),)


def test_every_block_is_of_a_known_kind() -> None:
    kinds = {b.info if not b.info.startswith(_FAILS) else "cascade" for b in blocks()}
    assert kinds <= {"python", "cascade", "text", "sh"}


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda p: p.name)
def test_every_link_within_the_repository_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)\s]*)?\)", path.read_text(encoding="utf-8")):
        if target and "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_every_anchor_leads_to_a_heading(path: Path) -> None:
    for target, wanted in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8")):
        aim = path.parent / target if target else path
        headings = re.findall(r"^#+ (.+)$", aim.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert wanted in map(anchor, headings), f"{target}#{wanted}"


def test_the_functions_listed_are_those_of_the_operator_table() -> None:
    from einsumcascade.language.ops import FUNCTIONS, REDUCTIONS

    text = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    section = text.split("## Expressions")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    listed = {name for row in rows for name in re.findall(r"`(\w+)[`(]", row.split("|")[2])}
    assert listed == set(FUNCTIONS)
    section = text.split("## Einsums")[1].split("\n## ")[0]
    reductions = {row.split("`")[1] for row in section.splitlines() if row.startswith("| `")}
    assert reductions == set(REDUCTIONS)


def test_the_glossary_is_in_alphabetical_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [word.lower() for word in re.findall(r"^\*\*([^*]+)\*\*", text, flags=re.MULTILINE)]
    assert words == sorted(words) and len(words) > 30
