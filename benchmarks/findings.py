"""What a run found: its tables, and beside them what the project wants on an H200 (docs/benchmarks.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from einsumcascade.benchmarks.table import (
    Result,
    Table,
    faults,
    geomean,
    is_broken,
    kind,
    means,
    names,
    own,
    rates,
    ratio,
    remarks,
    show,
)

FLEX, COMPILED = "FlexAttention", "torch.compile"


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A figure and the least it should be.

    Args:
        text: what it is of. least: what is wanted.
        figure: the geometric mean or the least of the ratios to a rival, or a rate in TFLOP/s.
        kind: of the cases that it is of, see `kind`. rival: that they are compared with; empty for a rate.
        variants: of them; empty: all. case: the only one.
    """

    text: str
    least: float
    figure: Literal["mean", "least", "rate"]
    kind: str = "forward"
    rival: str = ""
    variants: tuple[str, ...] = ()
    case: str = ""

    def cases(self, result: Result) -> list[Result]:
        """The cases of a result that it is of: those that have a row of the rival, or ended before they could."""
        found = [
            r
            for r in result["cases"]
            if kind(r) == self.kind
            and (not self.variants or r["variant"] in self.variants)
            and self.case in ("", r["case"])
        ]
        if not self.rival:
            return found
        compared = [any(row["name"] == self.rival for row in r.get("rows", ())) for r in found]
        variants = {r["variant"] for r, yes in zip(found, compared, strict=True) if yes}
        return [
            r for r, yes in zip(found, compared, strict=True) if yes or ("skipped" in r and r["variant"] in variants)
        ]

    def value(self, record: Result) -> float | None:
        """The ratio or the rate of a case; None where it was not timed."""
        if self.rival:
            return ratio(record, self.rival)
        ms = own(record)
        return float(record["flop"]) / ms * 1e-9 if ms else None

    def row(self, result: Result) -> list[str] | None:
        """What was wanted and what was found; None where this run has no case of it, or the rival nowhere."""
        cases = self.cases(result)
        if not cases or (self.rival and self.rival not in names(result)):
            return None
        values = [v for r in cases if (v := self.value(r)) is not None]
        found = (geomean(values) if self.figure == "mean" else min(values)) if values else None
        wrong, missing = sum(map(is_broken, cases)), len(cases) - len(values)
        if wrong:
            verdict = f"missed: ours wrong or failed in {wrong}"
        elif found is None:
            verdict = "not measured"
        elif found < self.least:
            verdict = "missed"
        else:
            verdict = f"met, but {missing} not timed" if missing else "met"
        share = f"{len(values)} of {len(cases)}"
        return [self.text, verdict, f"{self.least:g}", "" if found is None else f"{found:.3g}", share]


def _rate(text: str, least: float, case: str) -> Aim:
    return Aim(text=f"TFLOP/s, {text}", least=least, figure="rate", case=case)


AIMS: Sequence[Aim] = (
    Aim(text="forward without decoding, over FlexAttention, geometric mean", least=1.15, figure="mean", rival=FLEX),
    Aim(text="forward without decoding, over FlexAttention, least", least=0.95, figure="least", rival=FLEX),
    _rate("full, D 64", 485, "full forward B4 H32 N4096 D64"),
    _rate("causal, D 64", 415, "causal forward B4 H32 N4096 D64"),
    _rate("full, D 128", 545, "full forward B4 H16 N4096 D128"),
    _rate("causal, D 128", 490, "causal forward B4 H16 N4096 D128"),
    Aim(text="backward over FlexAttention, geometric mean", least=1.05, figure="mean", kind="backward", rival=FLEX),
    Aim(
        text="sigmoid and relu2 over torch.compile, least",
        least=4.0,
        figure="least",
        rival=COMPILED,
        variants=("sigmoid", "relu2"),
    ),
    Aim(
        text="differential over two FlexAttention calls",
        least=1.4,
        figure="least",
        rival=FLEX,
        variants=("diff",),
    ),
    Aim(text="softcap over FlexAttention", least=2.0, figure="least", rival=FLEX, variants=("softcap",)),
)


def tables(result: Result) -> list[Table]:
    """All tables of a result that have a row. Aims are those of one device."""
    found = [rates(result), means(result), *([aims(result)] if "H200" in result["device"] else [])]
    return [t for t in found if t.rows]


def report(result: Result) -> str:
    """All that a run found, as text."""
    texts = [show(t) for t in tables(result)]
    texts += remarks(result)
    problems = faults(result)
    if problems:
        texts.append("Not measured\n" + "\n".join(f"  {p}" for p in problems))
    return "\n\n".join(texts)


def aims(result: Result) -> Table:
    """What was wanted and what was found, of the aims that this run can tell of.

    One is met if all of its cases say so: where a kernel of ours was wrong or failed it is missed.
    """
    rows = [row for a in AIMS if (row := a.row(result)) is not None]
    return Table(title="Aims on an H200", heads=["aim", "", "at least", "found", "cases"], rows=rows, words=2)
