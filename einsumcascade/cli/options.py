"""The options of the command line: what their texts mean, and what is wrong with them."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NoReturn

from einsumcascade.errors import Diagnostic, InputError, ScheduleError, SourceText, Span, nearest

if TYPE_CHECKING:
    from einsumcascade.language.ir import Cascade


def parse_extents(text: str) -> dict[str, int]:
    """Parse `P=4096,M=4096` into extents by rank; an empty text gives none.

    Raises:
        InputError: `option-extents`, for each part that is not `RANK=extent` with an extent of 1 or more.

    >>> parse_extents("P=77, M=4096")
    {'P': 77, 'M': 4096}
    """
    found: dict[str, int] = {}
    problems: list[Diagnostic] = []
    start = 0
    for part in text.split(",") if text.strip() else ():
        match = re.fullmatch(r"\s*([A-Z][A-Za-z0-9_]*)\s*=\s*([0-9]{1,18})\s*", part)
        first = start + len(part) - len(part.lstrip()) + 1
        span = Span(line=1, column=first, end_column=first + len(part.strip()))
        start += len(part) + 1
        if match is None:
            headline, hint = f"'{part.strip()}' is no extent", _extent_hint(part)
        elif match[1] in found:
            headline, hint = f"{match[1]} is {found[match[1]]} and {match[2]}", f"give {match[1]} once"
        elif int(match[2]) < 1:
            headline, hint = f"{match[1]} is {match[2]}", "an extent is 1 or more"
        else:
            found[match[1]] = int(match[2])
            continue
        problems.append(
            Diagnostic(
                code="option-extents",
                headline=headline,
                span=span,
                rule="--extents takes RANK=extent, separated by commas, each rank once",
                hint=hint,
            )
        )
    if problems:
        raise InputError(diagnostics=tuple(problems), source=SourceText(text=text, name="--extents"))
    return found


def _extent_hint(part: str) -> str:
    name, _, value = (piece.strip() for piece in part.partition("="))
    if re.fullmatch(r"[a-z][A-Za-z0-9_]*", name) and re.fullmatch(r"[0-9]+", value):
        return f"ranks are upper case: {name[0].upper()}{name[1:]}={value}"
    return "an extent has at most 18 digits" if re.fullmatch(r"[0-9]{19,}", value) else "for instance P=4096,M=4096"


def spec_of(
    spec: str,
    constraints: Sequence[str] | None,
    constants: Sequence[str] | None,
    over: Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
) -> Cascade:
    """Load SPEC and apply --constraint, --score, --const and --over."""
    from einsumcascade import gallery
    from einsumcascade.language.ir import Num

    cascade = gallery.load(spec)
    given = dict(_constant(text) for text in constants or ())
    declared = {c.name for c in cascade.constants}
    cascade = replace(
        cascade,
        constants=tuple(replace(c, expr=Num(value=given[c.name])) if c.name in given else c for c in cascade.constants),
    )
    # What the text does not declare, a constraint or a score may use; the first that does declares it.
    new = {name: value for name, value in given.items() if name not in declared}

    def used_by(text: str) -> dict[str, float]:
        return {name: new.pop(name) for name in list(new) if re.search(rf"\b{name}\b", text)}

    for text in constraints or ():
        cascade = cascade.constrain(text, **used_by(text))
    for text in scores or ():
        tensor, expression, inputs = _score(text, cascade)
        cascade = cascade.score(tensor, expression, **used_by(expression), **inputs)
    if new:
        name = next(iter(new))
        refuse(
            "option-const",
            f"nothing uses a constant '{name}'",
            rule="--const changes a constant of the text, or gives one that a --constraint or a --score uses",
            hint=nearest(name, sorted(declared)),
        )
    for text in over or ():
        variable, equals, tensors = text.partition("=")
        named = [name.strip() for name in tensors.split(",")] if equals else []
        cascade = cascade.over(variable.strip(), *named)
    return cascade


def _score(text: str, cascade: Cascade) -> tuple[str, str, dict[str, EllipsisType]]:
    """Take `QK = QK + BIAS[h]` apart: the tensor, the expression, and the inputs that the cascade lacks."""
    match = re.fullmatch(r"\s*([A-Za-z][A-Za-z0-9_]*)\s*=(?!=)(.*)", text, flags=re.DOTALL)
    if match is None:
        refuse(
            "option-score",
            f"'{text}' is no score",
            rule="--score takes TENSOR = expression; the bare name of the tensor in it is its element",
            hint="for instance --score 'QK = QK + SLOPE[h] * (m - p)'",
        )
    known = {i.tensor for i in cascade.inputs} | {e.tensor for e in cascade.einsums}
    indexed = dict.fromkeys(re.findall(r"\b([A-Z][A-Za-z0-9_]*)\s*\[", match[2]))
    return match[1], match[2].strip(), {name: ... for name in indexed if name not in known}


def _constant(text: str) -> tuple[str, float]:
    match = re.fullmatch(
        r"\s*([A-Za-z][A-Za-z0-9_]*)\s*=\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*", text
    )
    if match is not None and math.isfinite(float(match[2])):
        whole = re.fullmatch(r"[+-]?[0-9]{1,18}", match[2])
        return match[1], int(match[2]) if whole else float(match[2])
    refuse(
        "option-const",
        f"'{text}' is no constant",
        rule="--const takes NAME=VALUE, the value a finite number",
        hint="for instance --const w=1024",
    )


def refuse(code: str, headline: str, *, rule: str, hint: str) -> NoReturn:
    raise InputError(diagnostics=(Diagnostic(code=code, headline=headline, rule=rule, hint=hint),))


def check_output(spec: str, output: Path | None) -> None:
    """Refuse, before any work is done, to write over the text that is read, or where nothing can be written.

    Raises: InputError: `output-file`.
    """
    if output is None:
        return
    try:
        if output.exists() and Path(spec).exists() and output.samefile(spec):
            refuse(
                "output-file",
                f"'{output}' is the text itself",
                rule="what is made of a text is written beside it",
                hint="choose another file for -o",
            )
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        # What is no file, a pipe or a terminal, is written to; else a new file takes the place of the old.
        place = output if is_special(output) else output.resolve().parent.resolve(strict=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        unwritable(output, error)


def is_special(path: Path) -> bool:
    """Whether a path is there and no file: a pipe, a terminal, a device."""
    return path.exists() and not path.is_file()


def unwritable(path: Path, error: OSError | ValueError) -> NoReturn:
    """Say that the file of -o cannot be written."""
    refuse(
        "output-file",
        f"'{path}' cannot be written: {reason(error)}",
        rule="-o names a file in a folder that exists and may be written to",
        hint="create the folder, or choose another",
    )


def schedule_of(path: Path | None) -> Any:
    """Read the schedule in the JSON file at `path`; None without one."""
    if path is None:
        return None
    from einsumcascade.schedules.schedule import Schedule

    try:
        # Some editors begin a file with a mark of its encoding.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        problem = Diagnostic(
            code="schedule-file",
            headline=f"the schedule '{path}' cannot be read: {reason(error)}",
            rule="a schedule is a file of JSON text",
            hint="`einsumcascade compile SPEC --json` prints one",
        )
        raise ScheduleError(diagnostics=(problem,)) from None
    return Schedule.from_json(text)


def text_of(path: Path) -> str:
    """Read the certificate at `path`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        refuse(
            "certificate",
            f"the certificate '{path}' cannot be read: {reason(error)}",
            rule="a certificate is the JSON that `einsumcascade derive SPEC --json` prints",
            hint="einsumcascade derive SPEC --json > certificate.json",
        )


def given_of(**options: Any) -> dict[str, Any]:
    """Keep the options that the caller named, so that the defaults of the library hold for the others."""
    return {name: value for name, value in options.items() if value is not None and value != {}}


def reason(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    return (isinstance(error, OSError) and error.strerror) or str(error)
