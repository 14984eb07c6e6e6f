"""The documents: Python and commands run and print what is shown, cascades parse or fail as said, links lead somewhere.

The Python blocks of a document are one program, in order; the lines of its `sh` blocks that begin with `einsumcascade`
run between them. A `text output` block shows what the block before it prints; `...` stands for anything.
"""

from __future__ import annotations

import doctest
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from einsumcascade.cli import app
from einsumcascade.errors import CascadeError
from einsumcascade.language.parser import parse

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# A few steps show that training works; the whole takes a minute.
SHORTER = {"train_characters.py": ["--steps", "12", "--attention", "sink"]}
_FAILS = "cascade fails: "
_OUTPUT = "text output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: where it is, what follows the opening fence, and its text."""

    place: str
    info: str
    text: str


def blocks(*paths: Path) -> list[Block]:
    """List the fenced blocks of some pages, of all if none is named."""
    found = []
    for path in paths or PAGES:
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


def run_commands(text: str) -> str | None:
    """Run the lines that begin with `einsumcascade` and return what they print; None if there is no such line."""
    commands = [line for line in text.splitlines() if line.startswith("einsumcascade ")]
    printed = ""
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
        printed += result.stdout
    return printed if commands else None


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_what_a_page_shows_runs_and_prints_what_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(path):
        if block.info == "python":
            with redirect_stdout(io.StringIO()) as stream:
                exec(compile(block.text, block.place, "exec"), names)
            printed = stream.getvalue()
        elif block.info == "sh":
            printed = run_commands(block.text)
        elif block.info == _OUTPUT:
            assert printed is not None, f"{block.place}: nothing before it prints"
            flags = doctest.ELLIPSIS | doctest.DONT_ACCEPT_BLANKLINE
            same = doctest.OutputChecker().check_output(block.text, f"{printed.rstrip()}\n", flags)
            if not same:
                pytest.fail(f"{block.place} shows\n{block.text}\nbut this is printed:\n{printed}", pytrace=False)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_runs_from_a_bare_checkout(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, path, *SHORTER.get(path.name, [])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
    assert kinds <= {"python", "cascade", "text", _OUTPUT, "sh"}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_every_link_within_the_repository_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)\s]*)?\)", path.read_text(encoding="utf-8")):
        if target and "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
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


def test_the_grammar_shown_is_the_one_that_the_parser_reads() -> None:
    text = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    shown = text.split("## Grammar")[1].split("```text\n")[1].split("```")[0]
    lines = (ROOT / "einsumcascade" / "language" / "grammar.lark").read_text(encoding="utf-8").splitlines()
    assert shown.split() == " ".join(line for line in lines if not line.startswith("//")).split()


def test_the_glossary_is_in_alphabetical_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [word.lower() for word in re.findall(r"^\*\*([^*]+)\*\*", text, flags=re.MULTILINE)]
    assert words == sorted(words) and len(words) > 30
