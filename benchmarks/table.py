"""Results as tables: rates, ratios to each rival, and their geometric means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from einsumcascade.benchmarks.files import OURS, OWN

Result = Mapping[str, Any]
# Behind a rate that the host may have slowed.
HOST = "~"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, the heads of columns, and rows of texts; the first columns are words, the others figures."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.heads, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            padded = [
                c.ljust(w) if n < self.words else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        return "\n".join([self.title, line(self.heads), line(["-" * w for w in widths]), *map(line, self.rows)])


def show(table: Table) -> str:
    """A table for a terminal: drawn by rich where it is installed and someone looks, else in plain text."""
    import sys

    if not sys.stdout.isatty():
        return str(table)
    try:
        from rich.console import Console
        from rich.table import Table as Drawn
    except ImportError:
        return str(table)
    drawn = Drawn(title=table.title, title_justify="left")
    for n, head in enumerate(table.heads):
        drawn.add_column(head, justify="left" if n < table.words else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    width = sum(max(map(len, column)) + 3 for column in zip(table.heads, *table.rows, strict=True)) + 1
    console = Console(width=max(width, 80), color_system=None)
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().rstrip()


def timed(record: Result, name: str) -> float | None:
    """The median of a candidate on a case in milliseconds, if it was timed."""
    for row in record.get("rows", ()):
        if row["name"] == name and row["times"]:
            return float(row["times"]["ms"])
    return None


def own(record: Result) -> float | None:
    """The median of ours in milliseconds, of the faster where it was tuned too."""
    return min((ms for name in OWN if (ms := timed(record, name))), default=None)


def ratio(record: Result, rival: str) -> float | None:
    """How many times faster ours is than a rival."""
    mine, other = own(record), timed(record, rival)
    return other / mine if mine and other else None


def is_broken(record: Result) -> bool:
    """Whether one of our own runs of a case was wrong or failed."""
    return any(row["name"] in OWN and row["state"] in ("wrong", "failed") for row in record.get("rows", ()))


def names(result: Result) -> list[str]:
    """The rivals that have a row, in order."""
    rows = (row for record in result["cases"] for row in record.get("rows", ()))
    return list(dict.fromkeys(row["name"] for row in rows if row["name"] not in OWN))


def own_names(result: Result) -> list[str]:
    """Ours, and ours tuned where that was measured."""
    rows = (row for record in result["cases"] for row in record.get("rows", ()))
    found = {row["name"] for row in rows}
    return [name for name in OWN if name == OURS or name in found]


def geomean(values: Iterable[float]) -> float:
    """The geometric mean.

    >>> round(geomean([1.0, 4.0]), 9)
    2.0
    """
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def rates(result: Result) -> Table:
    """The rate of every candidate on every measured case, and how ours compares with the fastest other."""
    rivals, ours = names(result), own_names(result)
    rows = []
    for record in result["cases"]:
        if not record.get("rows"):
            continue
        ratios = [r for n in rivals if (r := ratio(record, n)) is not None]
        cells = [_rate(record, n) for n in (*ours, *rivals)]
        rows.append([record["case"], record["unit"], *cells, f"{min(ratios):.2f}" if ratios else ""])
    return Table(
        title="Rates of live work, and ours over the fastest other",
        heads=["case", "unit", *ours, *rivals, "ratio"],
        rows=rows,
        words=2,
    )


def _rate(record: Result, name: str) -> str:
    for row in record["rows"]:
        if row["name"] == name:
            if row["rate"]:
                return figure(row["rate"]) + (HOST if is_of_host(row) else "")
            return str(row["state"]) if row["state"] != "passed" else "not timed"
    return ""


def is_of_host(row: Result) -> bool:
    """Whether the host took longer for a call than the clock hides, so that a part of that is in its times."""
    return bool(row.get("host_us") and row.get("hidden_us") and row["host_us"] > row["hidden_us"])


def remarks(result: Result) -> list[str]:
    """What is to be said of figures, a sentence each."""
    rows = [row for record in result["cases"] for row in record.get("rows", ())]
    late = [row for row in rows if row["times"] and is_of_host(row)]
    found = []
    if late:
        hidden = min(row["hidden_us"] for row in late)
        found.append(
            f"{HOST}: the host took longer for a call than the {hidden:.0f} us that the clock hides; that may count too"
        )
    return found


def figure(rate: float) -> str:
    """A rate in three digits, or as many as it has before the point.

    >>> figure(1234.5), figure(0.01234)
    ('1234', '0.0123')
    """
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def kind(record: Result) -> str:
    """The direction of a case; decoding is of a kind of its own."""
    return "decode" if record["variant"] == "decode" else str(record["direction"])


def means(result: Result) -> Table:
    """The geometric mean of the ratios to each rival, by direction, with the smallest and where it was."""
    rows = []
    for direction in dict.fromkeys(map(kind, result["cases"])):
        for rival in names(result):
            found = {
                record["case"]: r
                for record in result["cases"]
                if kind(record) == direction and (r := ratio(record, rival)) is not None
            }
            if found:
                least = min(found, key=lambda c: found[c])
                mean = f"{geomean(found.values()):.2f}"
                rows.append([direction, rival, least, str(len(found)), mean, f"{found[least]:.2f}"])
    return Table(
        title="Ours over each rival: geometric mean of the ratios of times",
        heads=["direction", "rival", "least at", "cases", "mean", "least"],
        rows=rows,
        words=3,
    )


def faults(result: Result) -> list[str]:
    """What was wrong, failed or was left out, a line each; ours first."""
    lines = []
    for record in result["cases"]:
        if "skipped" in record:
            lines.append(f"{record['case']}: skipped: {record['skipped']}")
        for row in record.get("rows", ()):
            if row["state"] != "passed":
                lines.append(f"{record['case']}: {row['name']} {row['state']}: {row['note']}")
            elif not row["times"]:
                lines.append(f"{record['case']}: {row['name']} {row['note']}")
    return sorted(lines, key=lambda text: f": {OURS}" not in text)


def broken(result: Result) -> int:
    """How many of our own runs were wrong or failed."""
    rows = [row for record in result["cases"] for row in record.get("rows", ())]
    return sum(row["name"] in OWN and row["state"] in ("wrong", "failed") for row in rows)
