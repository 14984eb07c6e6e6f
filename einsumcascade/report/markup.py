"""Elements of the page, escaped, and the colours of ranks."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup, escape

# Colours of the style sheet, which repeat after the last.
RANK_COLOURS = 10


def element(name: str, attributes: Mapping[str, object] | None = None, *children: str) -> Markup:
    """Build an element. Attributes and texts are escaped; what is `Markup` already stays as it is.

    >>> print(element("text", {"x": 1.25, "class": "a"}, "<b>"))
    <text x="1.2" class="a">&lt;b&gt;</text>
    """
    parts = []
    for key, value in (attributes or {}).items():
        shown = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
        parts.append(Markup(' {}="{}"').format(key, shown))
    inside = Markup("").join(escape(c) for c in children)
    return Markup("<{}{}>{}</{}>").format(name, Markup("").join(parts), inside, name)


def rank_class(variable: str, ranks: Mapping[str, int]) -> str:
    """Name the style of a rank variable, `r3`; empty for what is none.

    Args:
        variable: a name.
        ranks: the number of each rank variable.
    """
    return f"r{ranks[variable] % RANK_COLOURS}" if variable in ranks else ""
