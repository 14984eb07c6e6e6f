"""What a run found: its tables, and beside them what the project wants on an H200 (docs/benchmarks.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from einsumcascade.benchmarks.measure import OURS
from einsumcascade.benchmarks.table import Result, Table, faults, geomean, kind, means, rates, ratio, show, timed

FLEX, COMPILED = "FlexAttention", "torch.compile"


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A figure and the least it should be. `of` finds it in a result; None where nothing tells."""

    text: str
    least: float
    of: Callable[[Result], float | None]


def _ratios(result: Result, rival: str, direction: str, *variants: str) -> list[float]:
    return [
        r
        for record in result["cases"]
        if kind(record) == direction and (not variants or record["variant"] in variants)
        if (r := ratio(record, rival)) is not None
    ]


def _mean(rival: str, direction: str, *variants: str) -> Callable[[Result], float | None]:
    def found(result: Result) -> float | None:
        values = _ratios(result, rival, direction, *variants)
        return geomean(values) if values else None

    return found


def _least(rival: str, direction: str, *variants: str) -> Callable[[Result], float | None]:
    return lambda result: min(_ratios(result, rival, direction, *variants), default=None)


def _rate(case: str) -> Callable[[Result], float | None]:
    def found(result: Result) -> float | None:
        for record in result["cases"]:
            if record["case"] == case and (ms := timed(record, OURS)):
                return float(record["flop"]) / ms * 1e-9
        return None

    return found


AIMS = (
    Aim(text="forward over FlexAttention, geometric mean", least=1.15, of=_mean(FLEX, "forward")),
    Aim(text="forward over FlexAttention, least", least=0.95, of=_least(FLEX, "forward")),
    Aim(text="TFLOP/s, full, D 64", least=485, of=_rate("full forward B4 H32 N4096 D64")),
    Aim(text="TFLOP/s, causal, D 64", least=415, of=_rate("causal forward B4 H32 N4096 D64")),
    Aim(text="TFLOP/s, full, D 128", least=545, of=_rate("full forward B4 H16 N4096 D128")),
    Aim(text="TFLOP/s, causal, D 128", least=490, of=_rate("causal forward B4 H16 N4096 D128")),
    Aim(text="backward over FlexAttention, geometric mean", least=1.05, of=_mean(FLEX, "backward")),
    Aim(
        text="sigmoid and relu2 over torch.compile, least",
        least=4.0,
        of=_least(COMPILED, "forward", "sigmoid", "relu2"),
    ),
    Aim(text="differential over two FlexAttention calls", least=1.4, of=_least(FLEX, "forward", "diff")),
    Aim(text="softcap over FlexAttention", least=2.0, of=_least(FLEX, "forward", "softcap")),
)


def tables(result: Result) -> list[Table]:
    """All tables of a result that have a row. Aims are those of one device."""
    found = [rates(result), means(result), *([aims(result)] if "H200" in result["device"] else [])]
    return [t for t in found if t.rows]


def report(result: Result) -> str:
    """All that a run found, as text."""
    texts = [show(t) for t in tables(result)]
    problems = faults(result)
    if problems:
        texts.append("Not measured\n" + "\n".join(f"  {p}" for p in problems))
    return "\n\n".join(texts)


def aims(result: Result) -> Table:
    """What was wanted and what was found, of the aims that this run can tell of."""
    found: Iterable[tuple[Aim, float | None]] = ((a, a.of(result)) for a in AIMS)
    rows = [
        [a.text, f"{a.least:g}", f"{v:.3g}", "met" if v >= a.least else "missed"] for a, v in found if v is not None
    ]
    return Table(title="Aims on an H200", heads=["aim", "at least", "found", ""], rows=rows)
