"""Where a callable is that cannot be traced, and what it calls its tensors."""

from __future__ import annotations

import linecache
import sys
import types
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from einsumcascade.errors import Diagnostic, SourceText, Span, TraceError

_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a callable is: the text of its file, and the part of it that runs."""

    source: SourceText
    span: Span


WRITE_RULE = "a cascade says what is computed; a callable that writes has no place in it"


def refusal(code: str, headline: str, *, rule: str = "", hint: str = "", place: Place | None = None) -> TraceError:
    """Make the error of something that cannot be traced, at the line of the callable that runs now."""
    where = place or place_at(user_frame())
    problem = Diagnostic(code=code, headline=headline, span=where.span if where else None, rule=rule, hint=hint)
    return TraceError(diagnostics=(problem,), source=where.source if where else None)


def user_frame() -> types.FrameType | None:
    """The innermost frame that is neither PyTorch's nor ours."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((*_SKIPPED, "<frozen")):
        frame = frame.f_back
    return frame


def place_at(frame: types.FrameType | None) -> Place | None:
    """Where a frame stands, None for none."""
    if frame is None:
        return None
    line, last, column, end = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    return _located(frame.f_code.co_filename, line or frame.f_lineno, column, end if last == line else None)


def place_of(function: object) -> Place | None:
    """The first line of a function; None of what has no code of its own."""
    code = getattr(function, "__code__", None)
    return _located(code.co_filename, code.co_firstlineno, None, None) if code is not None else None


def _located(file: str, line: int, column: int | None, end: int | None) -> Place:
    lines = linecache.getlines(file)
    text = lines[line - 1] if line <= len(lines) else ""
    # Columns of code count bytes.
    start = len(text.encode()[: column or 0].decode(errors="ignore")) if column else len(text) - len(text.lstrip())
    stop = len(text.encode()[:end].decode(errors="ignore")) if end else len(text.rstrip())
    return Place(
        SourceText(text="".join(lines), name=file),
        Span(line=line, column=start + 1, end_column=max(stop, start + 1) + 1),
    )


def variable_name(tensor: torch.Tensor, frame: types.FrameType) -> str:
    """What the callable calls a tensor: a variable, or an attribute of one."""
    for names in (frame.f_locals, frame.f_globals):
        found = next((n for n, x in names.items() if x is tensor or _same(x, tensor)), None)
        if found:
            return found
    for holder in frame.f_locals.values():
        attributes = getattr(holder, "__dict__", {})
        for held in (attributes, attributes.get("_parameters"), attributes.get("_buffers")):
            if isinstance(held, dict):
                found = next((str(n) for n, x in held.items() if _same(x, tensor)), None)
                if found:
                    return found
    return ""


def _same(value: object, tensor: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return value is tensor or (value.data_ptr() == tensor.data_ptr() and value.dtype == tensor.dtype)


def kind_name(value: object) -> str:
    """What a message calls a value."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return {"NoneType": "None", "slice": "a slice"}.get(type(value).__name__, f"a {type(value).__name__}")


def callable_name(function: object) -> str:
    """What a message calls a callable."""
    return str(getattr(function, "__name__", type(function).__name__))
