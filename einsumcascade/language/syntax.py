"""From text to syntax trees: statements as lines, and what is wrong with one that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from einsumcascade.errors import Diagnostic, Span, nearest

KEYWORDS = ("in", "const", "rank", "constraint", "init", "iter", "end", "out")
_READABLE = {
    "NAME": "a name",
    "NUMBER": "a number",
    "ADD": "an operator",
    "MUL": "an operator",
    "POW": "an operator",
    "COMPARE": "a comparison",
    "$END": "the end of the line",
}
_DEPTH = 150


class Mistake(Exception):
    """A diagnostic on its way to the list of all."""

    def __init__(self, code: str, headline: str, span: Span | None, *, rule: str = "", hint: str = "") -> None:
        super().__init__(headline)
        self.diagnostic = Diagnostic(code=code, headline=headline, span=span, rule=rule, hint=hint)


@cache
def grammar() -> Lark:
    """The parser of one statement or expression."""
    text = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(text, parser="lalr", start=["statement", "expr"], propagate_positions=True, maybe_placeholders=True)


def _readable(terminal: str) -> str:
    if terminal in _READABLE:
        return _READABLE[terminal]
    return f"'{grammar().get_terminal(terminal).pattern.value}'"


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (first line number, text) of each statement; comments become blanks, continuation lines are joined."""
    held, start, depth = "", 0, 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split("#", 1)[0]
        if not held.strip():
            held, start = "", number
        held += line + "\n"
        depth = sum(held.count(c) for c in "[(") - sum(held.count(c) for c in "])")
        if depth <= 0:
            if held.strip():
                yield start, held.rstrip("\n")
            held = ""
    if held.strip():
        yield start, held.rstrip("\n")


def parse_line(body: str, line: int, *, column: int = 0) -> Tree[Token]:
    """Parse a statement that begins at a line, and behind a column of it, to a tree with its places in the text.

    Raises: Mistake: `syntax`, `nested-too-deep`.
    """
    flat = body.replace("\n", " ")
    try:
        tree = grammar().parse(flat, start="statement")
    except UnexpectedInput as error:
        raise syntax_mistake(error, body, line, column) from None
    inner = tree.children[0]
    assert isinstance(inner, Tree)
    _shift(inner, body, line, column)
    limit_depth(inner)
    return inner


def limit_depth(tree: Tree[Token]) -> None:
    """Refuse a tree that recursion over it could not bear."""
    depth: dict[int, int] = {}
    # Children come before their parents.
    for sub in tree.iter_subtrees():
        depth[id(sub)] = 1 + max((depth[id(c)] for c in sub.children if isinstance(c, Tree)), default=0)
        if depth[id(sub)] > _DEPTH:
            fail(
                "nested-too-deep",
                f"an expression nests more than {_DEPTH} operators",
                sub,
                rule="a chain of operators counts each of them",
                hint="name a part of it by an Einsum of its own",
            )


def _place(body: str, line: int, column: int, offset: int) -> tuple[int, int]:
    """Line and column of an offset into a joined statement."""
    before = body[:offset]
    row = before.count("\n")
    col = offset - (before.rfind("\n") + 1) + 1
    return line + row, col + (column if row == 0 else 0)


def _shift(tree: Tree[Token], body: str, line: int, column: int) -> None:
    for sub in tree.iter_subtrees():
        if not sub.meta.empty:
            _set(sub.meta, body, line, column)
        for token in sub.children:
            if isinstance(token, Token):
                _set(token, body, line, column)


def _set(where: Any, body: str, line: int, column: int) -> None:
    if where.start_pos is None:
        return
    row, col = _place(body, line, column, where.start_pos)
    last_row, last_col = _place(body, line, column, where.end_pos)
    where.line, where.column = row, max(col, 1)
    where.end_column = last_col if last_row == row else col + 1


def syntax_mistake(error: UnexpectedInput, body: str, line: int, column: int) -> Mistake:
    """Say where a statement stops making sense, and what could stand there."""
    # Lark declares the place as None.
    place: Any = error.pos_in_stream
    offset = place if isinstance(place, int) and place >= 0 else len(body)
    width = 1
    if isinstance(error, UnexpectedToken):
        if error.token.type == "$END":
            offset, found = len(body.rstrip()), "the line ends"
        else:
            found, width = f"'{error.token}'", len(error.token)
        expected = sorted({_readable(t) for t in error.accepts or error.expected})
    else:
        assert isinstance(error, UnexpectedCharacters)
        found, expected = f"the character {body[offset]!r}", []
    row, col = _place(body, line, column, offset)
    first = body.split()[0] if body.split() else ""
    hint = ""
    if first.isalpha() and first.islower() and first not in KEYWORDS:
        hint = f"'{first}': " + nearest(first, KEYWORDS)
    elif 0 < len(expected) <= 8:
        hint = "expected " + " or ".join(expected)
    span = Span(line=row, column=max(col, 1), end_column=max(col, 1) + width)
    return Mistake(
        "syntax",
        f"the statement cannot go on here: {found}",
        span,
        rule="a statement is `in`, `const`, `rank`, `constraint`, `init`, `iter`, `end`, `out` or "
        "`T[i] = expr :: op(k) where c`",
        hint=hint,
    )


def span_of(node: Tree[Token] | Token) -> Span | None:
    """The place of a node, None if it has none."""
    where: Any = node if isinstance(node, Token) else node.meta
    if getattr(where, "line", None) is None:
        return None
    return Span(line=where.line, column=where.column, end_column=where.end_column)


def fail(code: str, headline: str, node: Tree[Token] | Token, *, rule: str = "", hint: str = "") -> NoReturn:
    """Raise the mistake that a node is."""
    raise Mistake(code, headline, span_of(node), rule=rule, hint=hint)
