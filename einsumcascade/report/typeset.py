"""Texts with the parts of speech marked: a cascade, and the kernel made from it."""

from __future__ import annotations

import builtins
import io
import keyword
import re
import tokenize
from collections.abc import Collection, Mapping
from typing import Final

from markupsafe import Markup, escape

from einsumcascade.language.ir import variable_of
from einsumcascade.report.markup import element, rank_class

_WORDS: Final = frozenset(
    {"in", "const", "rank", "constraint", "init", "iter", "desc", "end", "out", "where", "and", "or", "not"}
)
_TOKEN: Final = re.compile(r"#.*|[A-Za-z_]\w*|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|::|\s+|.")


def set_text(text: str, *, tensors: Collection[str], ranks: Mapping[str, int]) -> tuple[Markup, ...]:
    """Mark up a text of the language, line by line: words, tensors, ranks in their colours, comments.

    Args:
        text: a text of the language, or a part of one.
        tensors: names of tensors.
        ranks: the number of each rank variable.

    >>> print(set_text("out S  # <b>", tensors=["S"], ranks={})[0])
    <b class="word">out</b> <b class="tensor">S</b>  <i class="comment"># &lt;b&gt;</i>
    """
    return tuple(Markup("").join(_token(t, tensors, ranks) for t in _TOKEN.findall(line)) for line in text.splitlines())


def _token(token: str, tensors: Collection[str], ranks: Mapping[str, int]) -> Markup:
    if token.startswith("#"):
        return element("i", {"class": "comment"}, token)
    if token in _WORDS:
        return element("b", {"class": "word"}, token)
    if token in tensors:
        return element("b", {"class": "tensor"}, token)
    colour = rank_class(token, ranks) or (rank_class(variable_of(token), ranks) if token[0].isupper() else "")
    if colour:
        return element("span", {"class": colour}, token)
    return element("span", {"class": "operator"}, token) if token == "::" else escape(token)


def set_python(text: str) -> Markup:
    """Mark up Python: comments, strings, keywords, numbers; a text that is none stays as it is.

    >>> print(set_python("x = 1  # <b>\\n"))
    x = <span class="number">1</span>  <i class="comment"># &lt;b&gt;</i>
    <BLANKLINE>
    """
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    out, at = [], 0
    try:
        for t in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = _kind(t)
            if not kind:
                continue
            begin, end = starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1]
            out += [escape(text[at:begin]), element("i" if kind == "comment" else "span", {"class": kind}, t.string)]
            at = end
    except (tokenize.TokenError, IndentationError):
        pass
    return Markup("").join([*out, escape(text[at:])])


def _kind(token: tokenize.TokenInfo) -> str:
    match token.type:
        case tokenize.COMMENT:
            return "comment"
        case tokenize.STRING:
            return "string"
        case tokenize.NUMBER:
            return "number"
        case tokenize.NAME if keyword.iskeyword(token.string):
            return "word"
        case tokenize.NAME if hasattr(builtins, token.string):
            return "builtin"
        case _:
            return ""
