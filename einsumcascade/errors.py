"""The errors a user can meet: one tree, one shape of message.

A message has a headline with both values, the place with a caret, the rule, a hint and the anchor of its page.
Codes are stable; each is a heading of docs/errors.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A place in a text: 1-based line and columns, the end column exclusive."""

    line: int
    column: int
    end_column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceText:
    """A text and the name a message gives it."""

    text: str
    name: str = "<text>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One mistake: what is wrong, where, the rule behind it and what to do.

    Args:
        code: stable name, a heading of docs/errors.md.
        headline: one sentence that holds both values in conflict.
        span: the place in the text, or None where there is no text (a call's argument).
        label: what the caret points at.
        rule: the rule broken, with the facts bound so far.
        hint: one thing to try.
    """

    code: str
    headline: str
    span: Span | None = None
    label: str = ""
    rule: str = ""
    hint: str = ""

    def render(self, source: SourceText | None = None, *, kind: str = "CascadeError") -> str:
        """Render the message, with the line and a caret where `source` is given."""
        out = [f"{kind}[{self.code}]: {self.headline}"]
        if self.span is not None and source is not None:
            lines = source.text.splitlines()
            row = self.span.line
            # A terminal obeys control characters, so none of the text's reach it.
            body = "".join(
                c if c.isprintable() else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}"
                for c in (lines[row - 1] if row <= len(lines) else "")
            )
            gutter = len(str(row))
            caret = "^" * max(1, self.span.end_column - self.span.column)
            out.append(f"{' ' * (gutter + 1)}--> {source.name}:{row}:{self.span.column}")
            out.append(f" {row} | {body}")
            out.append(f" {' ' * gutter} | {' ' * (self.span.column - 1)}{caret} {self.label}".rstrip())
        if self.rule:
            out.append(f"   = rule: {self.rule}")
        if self.hint:
            out.append(f"   = hint: {self.hint}")
        out.append(f"   = docs/errors.md#{self.code}")
        return "\n".join(out)


class EinsumCascadeError(Exception):
    """Base of every error that this package raises for a mistake of its caller."""


@dataclass(eq=False)
class DiagnosedError(EinsumCascadeError):
    """An error that carries one or more diagnostics, rendered one after the other."""

    diagnostics: tuple[Diagnostic, ...]
    source: SourceText | None = field(default=None)

    @classmethod
    def of(
        cls,
        code: str,
        headline: str,
        *,
        span: Span | None = None,
        label: str = "",
        rule: str = "",
        hint: str = "",
        source: SourceText | None = None,
    ) -> Self:
        """The error of one mistake: see `Diagnostic`."""
        one = Diagnostic(code=code, headline=headline, span=span, label=label, rule=rule, hint=hint)
        return cls(diagnostics=(one,), source=source)

    def __str__(self) -> str:
        kind = type(self).__name__
        return "\n\n".join(d.render(self.source, kind=kind) for d in self.diagnostics)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the diagnostics, in order."""
        return tuple(d.code for d in self.diagnostics)


class CascadeError(DiagnosedError):
    """A cascade is wrong: its text, its ranks, its tensors."""


class UnknownRankError(DiagnosedError):
    """A rank is named that the cascade does not have."""


class InputError(DiagnosedError):
    """A value handed to a cascade or an op does not fit: its shape, dtype, rank, device or name."""


class TraceError(DiagnosedError):
    """A callable handed to `flex_attention` does what no cascade can say; the place is that of the callable."""


class SpecFileError(DiagnosedError):
    """A spec file is missing, empty, not text, or of no known name."""


class ScheduleError(DiagnosedError):
    """A schedule is malformed or not legal for its cascade and target."""


class LoweringError(DiagnosedError):
    """A construct of a well-formed cascade has no lowering yet (`not-lowered-yet`)."""


class TargetError(DiagnosedError):
    """A target is unknown or cannot be compiled for here."""


class ModelError(DiagnosedError):
    """A file of the spatial model is wrong, or its figures cannot be drawn here."""


class EinsumCascadeWarning(UserWarning):
    """Something was done in another way than asked, at no change of the result; the message starts with its id."""


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return `did you mean 'X'?` for the name of `known` nearest to `name`, else the list of them."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    if not close:
        folded = {k.lower(): k for k in known}
        close = [folded[name.lower()]] if name.lower() in folded else []
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + (", ".join(known) if known else "none")
