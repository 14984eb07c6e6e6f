"""The gallery: one `.cascade` text a variant, with its paper in the header, and the loading of any such file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from einsumcascade.errors import Diagnostic, SpecFileError, nearest
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse

_FOLDER = Path(__file__).parent
_SUFFIX = ".cascade"
# A thousand times the longest text of the gallery; what is longer is no spec, and may be endless (a device).
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the comments at the top of a gallery text say.

    Args:
        title: the first line.
        paper: the sources, with section or equation.
        kernel: `yes`, or `not yet (construct)`.
        systems: published systems that compute as the text does, if it says so: `systems: PyTorch, FLAT`.
    """

    title: str
    paper: str
    kernel: str
    systems: tuple[str, ...] = ()


def names() -> tuple[str, ...]:
    """List the names of the gallery in alphabetical order.

    >>> "gqa" in names()
    True
    """
    return tuple(sorted(path.stem for path in _FOLDER.glob(f"*{_SUFFIX}")))


def passes() -> dict[str, dict[str, int]]:
    """Read the passes that each text makes over each of its ranks, by the name of the text.

    They are counted when a text is added, since all of them take seconds; a test counts them again.

    >>> passes()["softmax_attention"]["M"]
    3
    """
    found: dict[str, dict[str, int]] = json.loads((_FOLDER / "passes.json").read_text(encoding="utf-8"))
    return found


def load(name_or_path: str | Path) -> Cascade:
    """Load a cascade by its gallery name, or from a file.

    A gallery name wins over a file of the same name; write `./gqa` for the file.

    Args:
        name_or_path: a name of the gallery, or the path of a text in the cascade language.

    Raises:
        SpecFileError: the name is unknown, or the file is missing, empty or no text.
        CascadeError: the text is wrong, with every mistake in it.

    >>> load("gqa").output_names
    ('AV',)
    """
    name = str(name_or_path)
    if name in names():
        path = _FOLDER / f"{name}{_SUFFIX}"
        return parse(path.read_text(encoding="utf-8"), name=path.name)
    return parse(_read(name), name=name)


def header(name: str) -> Header:
    """Read the header of the gallery text called `name`.

    Raises:
        SpecFileError: `unknown-spec`; the message has the nearest name.

    >>> header("gqa").kernel
    'yes'
    """
    if name not in names():
        _unknown(name)
    found = _header((_FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8"))
    assert found is not None and found.paper and found.kernel, f"the header of {name} is incomplete"
    return found


def header_of(name_or_path: str | Path) -> Header | None:
    """Read the header of a gallery text or of a file; None where a file begins with no comment.

    Raises: SpecFileError: as `load`.
    """
    name = str(name_or_path)
    return header(name) if name in names() else _header(_read(name))


def _header(text: str) -> Header | None:
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    if not lines or not lines[0]:
        return None
    fields = {key: value.strip() for key, colon, value in (line.partition(":") for line in lines[1:]) if colon}
    systems = tuple(s.strip() for s in fields.get("systems", "").split(",") if s.strip())
    return Header(title=lines[0], paper=fields.get("paper", ""), kernel=fields.get("kernel", ""), systems=systems)


def _read(name: str) -> str:
    path = Path(name)
    if not name:
        _unknown(name)
    try:
        if path.is_dir():
            _fail(
                "spec-missing",
                f"'{name}' is a folder, not a file",
                rule="a spec is one text file",
                hint=f"name the {_SUFFIX} file in it",
            )
        with path.open("rb") as stream:
            data = stream.read(_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        # A bare word is more likely a gallery name with a slip than a file.
        if path.suffix != _SUFFIX and len(path.parts) <= 1:
            _unknown(name)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        _fail(
            "spec-missing",
            f"the file '{name}' cannot be read: {reason}",
            rule="a spec is a gallery name or the path of a readable file",
            hint="`einsumcascade list` shows the gallery",
        )
    if len(data) > _LIMIT_BYTES:
        _fail(
            "spec-too-large",
            f"'{name}' holds more than {_LIMIT_BYTES} bytes",
            rule="a spec is a short text",
            hint="check that the path names a cascade",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _binary(name, f"byte {error.start} is not UTF-8")
    if "\0" in text:
        _binary(name, f"byte {data.index(0)} is NUL")
    if not text.strip():
        _fail(
            "spec-empty",
            f"the file '{name}' is empty",
            rule="a cascade has inputs, Einsums and outputs",
            hint="`einsumcascade list` shows the gallery; its texts are examples",
        )
    return text


def _unknown(name: str) -> NoReturn:
    near = nearest(name, names())
    _fail(
        "unknown-spec",
        f"'{name}' is neither in the gallery nor a file",
        rule="a spec is a gallery name or the path of a readable file",
        # The names are too many for a message.
        hint="`einsumcascade list` shows the gallery" if near.startswith("known: ") else near,
    )


def _binary(name: str, reason: str) -> NoReturn:
    _fail(
        "spec-binary",
        f"the file '{name}' is no text: {reason}",
        rule="a spec is text in UTF-8",
        hint="save the file as UTF-8",
    )


def _fail(code: str, headline: str, *, rule: str, hint: str) -> NoReturn:
    raise SpecFileError(diagnostics=(Diagnostic(code=code, headline=headline, rule=rule, hint=hint),))
