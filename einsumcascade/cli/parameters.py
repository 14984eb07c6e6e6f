"""The parameters that commands share: each is described once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from einsumcascade.cli.options import parse_extents, spec_of

if TYPE_CHECKING:
    from einsumcascade.language.ir import Cascade


class Dtype(StrEnum):
    """The dtypes that kernels are written for."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A gallery name, or the path of a .cascade file.")]
Constraints = Annotated[
    list[str] | None,
    typer.Option(
        "--constraint", metavar="TEXT", help="One more condition, as 'm <= p' or 'm <= p and p - m < w'. Repeatable."
    ),
]
Constants = Annotated[
    list[str] | None,
    typer.Option("--const", metavar="NAME=VALUE", help="The value of a constant. Repeatable."),
]
Scores = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        metavar="'QK = TEXT'",
        help="An expression in place of a tensor, as 'QK = QK + SLOPE[h] * (m - p)'; a new name with ranks is a new "
        "input. Repeatable.",
    ),
]
Over = Annotated[
    list[str] | None,
    typer.Option(
        "--over", metavar="B[=Q,K,...]", help="A new batch rank on all inputs, or on those named. Repeatable."
    ),
]
Extents = Annotated[str, typer.Option("--extents", metavar="P=4096,...", help="Extents of ranks.")]
ScheduleFile = Annotated[
    Path | None, typer.Option("--schedule", metavar="FILE", help="A schedule in JSON, instead of ours.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Target = Annotated[
    str, typer.Option("--target", metavar="cuda:90", help="The GPU of costs and kernels; none is needed.")
]
InputDtype = Annotated[Dtype, typer.Option("--dtype", help="The dtype of the inputs.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The seed of the random inputs.")]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is changed of the text of SPEC, and the extents that are known."""

    constraint: Constraints = None
    score: Scores = None
    const: Constants = None
    over: Over = None
    extents: Extents = ""

    @property
    def are_given(self) -> bool:
        """Whether there are any."""
        return self != Changes()

    def of(self, spec: str) -> tuple[Cascade, dict[str, int]]:
        """Load SPEC and change it; returns the cascade and the extents."""
        bound = parse_extents(self.extents)
        return spec_of(spec, self.constraint, self.const, self.over, self.score), bound


def taken_apart(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of its dataclass parameters as options of its own."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    def parameters() -> Iterator[inspect.Parameter]:
        for name, p in inspect.signature(command).parameters.items():
            own = get_type_hints(groups[name], include_extras=True) if name in groups else {name: hints[name]}
            defaults = {f.name: f.default for f in fields(groups[name])} if name in groups else {name: p.default}
            for field, hint in own.items():
                yield inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=defaults[field], annotation=hint)

    expanded = list(parameters())

    @wraps(command)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        command(**given)

    call.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in expanded}
    return call
