"""Read the TOML files of the spatial model with the types they must have, and say where in them a mistake is."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from einsumcascade.errors import ModelError, SourceText, Span, nearest

_DATA = Path(__file__).parent / "data"
_HEADER = re.compile(r"\s*(\[\[?)\s*([\w.\-\s]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"\s*[\w\-]+\s*=")
_T = TypeVar("_T")
_NAMES: Mapping[type, str] = {
    str: "a text",
    int: "a whole number",
    list: "a list",
    dict: "a table",
    bool: "true or false",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of a TOML file that knows its place in it.

    Args:
        source: the text of the whole file and its name.
        folder: where the file lies; files that it names are looked for beside it.
        values: the keys of this table.
        path: the keys and positions that lead to it from the top of the file.
    """

    source: SourceText
    folder: Path
    values: Mapping[str, Any]
    path: tuple[str | int, ...] = ()

    def only(self, *known: str) -> None:
        """Refuse keys that are not among `known`.

        Raises: ModelError: `mapping`, at the first such key.
        """
        for key in self.values:
            if key not in known:
                self.reject(f"'{key}' means nothing here", key=key, hint=nearest(key, known))

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text. Raises: ModelError: it is absent without a default, or of another type."""
        return self._typed(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 on. Raises: ModelError: it is none."""
        value = self._typed(key, int, default)
        if isinstance(value, bool) or value < 1:
            self.reject(f"'{key}' is {value}", key=key, rule="it is a whole number, 1 or more")
        return value

    def flag(self, key: str) -> bool:
        """Return true or false, false where the key is absent. Raises: ModelError: it is neither."""
        return self._typed(key, bool, False)

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, empty where the key is absent. Raises: ModelError: it is none."""
        return tuple(self._item(key, item, str) for item in self._typed(key, list, []))

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers. Raises: ModelError: it is none."""
        return tuple(self._item(key, item, int) for item in self._typed(key, list, None))

    def table(self, key: str, *, optional: bool = False) -> Table:
        """Return a table inside this one. Raises: ModelError: it is none, or absent and not `optional`."""
        values = self._typed(key, dict, {} if optional else None)
        return replace(self, values=values, path=(*self.path, key))

    def tables(self, key: str) -> tuple[Table, ...]:
        """Return a list of tables, at least one. Raises: ModelError: it is none."""
        items = self._typed(key, list, None)
        if not items:
            self.reject(f"'{key}' is empty", key=key, rule="it lists at least one table")
        return tuple(
            replace(self, values=self._item(key, item, dict), path=(*self.path, key, k)) for k, item in enumerate(items)
        )

    def reject(
        self, headline: str, *, key: str | None = None, value: str = "", rule: str = "", hint: str = ""
    ) -> NoReturn:
        """Raise the error of a mistake in this table.

        Args:
            headline: what is wrong, without the name of the file.
            key: the key at fault, None for the table itself.
            value: the text at fault in the value of the key; the caret stands under it where it is found.
        """
        path = self.path if key is None else (*self.path, key)
        raise ModelError.of(
            "mapping",
            f"{self.source.name}: {headline}",
            span=_locate(self.source.text, path, value),
            rule=rule,
            hint=hint,
            source=self.source,
        )

    def _typed(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self.values.get(key, default)
        if value is None:
            self.reject(f"the key '{key}' is missing{_inside(self.path)}", rule=f"'{key}' is {_NAMES[kind]}")
        return self._item(key, value, kind)

    def _item(self, key: str, value: object, kind: type[_T]) -> _T:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.reject(f"'{key}' is {value!r}", key=key, value=str(value), rule=f"it is {_NAMES[kind]}")
        return value


def read(kind: str, name: str | Path, *, beside: Path | None = None) -> Table:
    """Read a file of the spatial model.

    Args:
        kind: `targets`, `mappings`, `workloads` or `evaluations`.
        name: one that comes with the package, or the path of a `.toml` file.
        beside: the folder that a relative path starts from; the current one if None.

    Raises: ModelError: `mapping`: there is no such file, or it is no TOML.

    >>> read("targets", "flat").text("name")
    'FLAT'
    """
    text = str(name)
    own = not text.endswith(".toml") and "/" not in text
    path = _DATA / kind / f"{text}.toml" if own else (beside or Path()) / text
    source = SourceText(text="", name=f"{kind}/{path.name}" if own else text)
    if own and not path.is_file():
        known = tuple(sorted(p.stem for p in (_DATA / kind).glob("*.toml")))
        _fail(source, f"there is no file '{text}' among the {kind}", hint=nearest(text, known))
    try:
        source = replace(source, text=path.read_text(encoding="utf-8"))
        return Table(source=source, folder=path.parent, values=tomllib.loads(source.text))
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        line, column = (int(n) for n in found.groups()) if found else (max(1, source.text.count("\n")), 1)
        reason = re.sub(r"\s*\(at .*", "", str(error))
        _fail(source, f"no TOML: {reason}", span=Span(line=line, column=column, end_column=column + 1))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        _fail(source, f"the file cannot be read: {reason}")


def _fail(source: SourceText, headline: str, *, span: Span | None = None, hint: str = "") -> NoReturn:
    rule = "a file of the spatial model is TOML; a name without .toml is one that comes with the package"
    raise ModelError.of("mapping", f"{source.name}: {headline}", span=span, rule=rule, hint=hint, source=source)


def _inside(path: tuple[str | int, ...]) -> str:
    return " in " + ".".join(str(p) for p in path) if path else ""


def _locate(text: str, path: tuple[str | int, ...], value: str) -> Span | None:
    """Find a key, or a text in its value, as a person would: the header of its table, then the key below it."""
    lines = text.splitlines()
    first, last, rest = _section(lines, path)
    keys = [str(p) for p in rest if isinstance(p, str)]
    place: tuple[int, int, int] | None = None
    row, column = first, 0
    for key in keys:
        pattern = re.compile(rf'(?<![\w\-"])("?){re.escape(key)}\1\s*=')
        hit = _search(lines, pattern, row, column, last)
        if hit is None:
            break
        place = hit
        row, column = hit[0], hit[2]
    if value and place is not None:
        hit = _search(
            lines, re.compile(rf"(?<![\w]){re.escape(value)}(?![\w])"), row, column, _end_of(lines, row, last)
        )
        place = hit or place
    if place is None:
        place = (first - 1, 0, len(lines[first - 1])) if 0 < first <= len(lines) and path else None
    return None if place is None else Span(line=place[0] + 1, column=place[1] + 1, end_column=place[2] + 1)


def _section(lines: list[str], path: tuple[str | int, ...]) -> tuple[int, int, tuple[str | int, ...]]:
    """Return the lines below the header of the longest part of `path` that has one, and what of the path is left."""
    counts: dict[tuple[str | int, ...], int] = {}
    depth = 0
    starts = [row for row, line in enumerate(lines) if _HEADER.match(line)] + [len(lines)]
    best: tuple[int, int, tuple[str | int, ...]] = (0, starts[0], path)
    for row, end in pairwise(starts):
        match = _HEADER.match(lines[row])
        assert match is not None
        here: tuple[str | int, ...] = ()
        names = [n.strip() for n in match[2].split(".")]
        for k, name in enumerate(names):
            here = (*here, name)
            if match[1] == "[[" and k == len(names) - 1:
                counts[here] = counts.get(here, -1) + 1
                for other in [c for c in counts if len(c) > len(here) and c[: len(here)] == here]:
                    del counts[other]
            if here in counts:
                here = (*here, counts[here])
        if here == path[: len(here)] and len(here) > depth:
            depth, best = len(here), (row + 1, end, path[len(here) :])
        elif here[:-1] == path and len(path) > depth:
            # The first table of a list stands for the list.
            depth, best = len(path), (row + 1, end, ())
    return best


def _search(
    lines: list[str], pattern: re.Pattern[str], row: int, column: int, last: int
) -> tuple[int, int, int] | None:
    for k in range(row, last):
        match = pattern.search(lines[k], column if k == row else 0)
        if match is not None:
            end = match.end() - (len(match[0]) - len(match[0].rstrip(" =")))
            return k, match.start(), end
    return None


def _end_of(lines: list[str], row: int, last: int) -> int:
    """Return the line where the value that begins on `row` has ended: the next key, or the end of the table."""
    return next((k for k in range(row + 1, last) if _KEY.match(lines[k])), last)
