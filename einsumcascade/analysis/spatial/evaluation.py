"""The tables of an evaluation: rows as values, and all of them as text or plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The multiply-adds of attention's two products, and those of the other products of a layer."""

    model: str
    length: int
    attention_macs: int
    other_macs: int

    @property
    def share(self) -> float:
        """Attention's part of both."""
        return self.attention_macs / (self.attention_macs + self.other_macs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilisation:
    """The part of the time in which the elements of each array work, 0 to 1, during attention.

    Args:
        arrays: by array.
        einsums: the part of the array that `Evaluation.breakdown` names, by Einsum.
    """

    model: str
    length: int
    configuration: str
    arrays: Mapping[str, float] = field(hash=False)
    einsums: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """Seconds and DRAM bytes of one layer, and the speed-up over the baseline."""

    model: str
    length: int
    configuration: str
    seconds: float
    dram_bytes: int
    speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """Attention of one length on arrays of another size, with the least buffer that spares it from waiting for DRAM."""

    model: str
    length: int
    size: int
    elements: int
    buffer_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The arithmetic mean, over models and lengths, of the subject's speed-ups over another configuration.

    Args:
        over: that configuration.
        attention: of attention alone.
        end_to_end: of whole layers, 0 where the evaluation has no other products.
    """

    over: str
    attention: float
    end_to_end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The tables of an evaluation. `str()` is text to read, `to_dict()` the same for machines.

    Args:
        title: what is evaluated.
        labels: of the configurations, by name, in order; rows hold names.
        baseline, subject: names of configurations: speed-ups are over the one, means and sizes are of the other.
        breakdown: the array of `Utilisation.einsums`.
        figures: where the source shows each table, by name of the table.
        missing: what of the source is not modelled.
        shares, utilisation, attention, end_to_end, sizes, means: the tables.
    """

    title: str
    labels: Mapping[str, str] = field(hash=False)
    baseline: str
    subject: str
    breakdown: str
    figures: Mapping[str, str] = field(hash=False)
    missing: str
    shares: tuple[Share, ...]
    utilisation: tuple[Utilisation, ...]
    attention: tuple[Time, ...]
    end_to_end: tuple[Time, ...]
    sizes: tuple[Resized, ...]
    means: tuple[Mean, ...]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; a table is a list of rows."""
        return {
            "title": self.title,
            "labels": dict(self.labels),
            "baseline": self.baseline,
            "subject": self.subject,
            "figures": dict(self.figures),
            "missing": self.missing,
            "shares": [{**asdict(r), "share": r.share} for r in self.shares],
            "breakdown": self.breakdown,
            "utilisation": [asdict(r) for r in self.utilisation],
            "attention": [asdict(r) for r in self.attention],
            "end_to_end": [asdict(r) for r in self.end_to_end],
            "sizes": [asdict(r) for r in self.sizes],
            "means": [asdict(r) for r in self.means],
        }

    def __str__(self) -> str:
        return "\n\n".join([self.title, *self._tables(), *self._summary()])

    def _tables(self) -> Iterator[str]:
        names = self.labels
        if self.shares:
            rows = [((r.model,), r.length, f"{r.share:.3f}") for r in self.shares]
            yield self._titled("shares", "Attention's share of the multiply-adds of a layer", _pivot(("model",), rows))
        head = ("model", "configuration")
        for array in self.utilisation[0].arrays:
            used = [((r.model, names[r.configuration]), r.length, f"{r.arrays[array]:.3f}") for r in self.utilisation]
            yield self._titled("utilisation", f"Utilisation of array {array} during attention", _pivot(head, used))
        yield self._titled(
            "breakdown",
            f"Where the time of array {self.breakdown} goes, {self.utilisation[0].model}",
            self._breakdown(),
        )
        over = f"over {names[self.baseline]}"
        for name, times, what in (
            ("attention", self.attention, f"Speed-up of attention {over}"),
            ("end_to_end", self.end_to_end, f"Speed-up of a whole layer {over}"),
        ):
            if times:
                yield self._titled(name, what, self._times(times, lambda r: f"{r.speedup:.2f}"))
        yield self._titled(
            "traffic",
            "DRAM traffic of attention, GB",
            self._times(self.attention, _gigabytes),
        )
        if self.sizes:
            lengths = ", ".join(dict.fromkeys(length_text(r.length) for r in self.sizes))
            resized = [
                [r.model, str(r.size), f"{r.elements:,}", f"{r.buffer_bytes // 1024:,}", f"{r.seconds:.4g}"]
                for r in self.sizes
            ]
            header = ["model", "size", "elements", "buffer, KiB", "seconds"]
            what = f"Attention of length {lengths} on arrays of other sizes, {names[self.subject]}"
            yield self._titled("sizes", what, _aligned([header, *resized], left=1))

    def _titled(self, name: str, what: str, body: str) -> str:
        where = f" ({self.figures[name]})" if name in self.figures else ""
        return f"{what}{where}\n{body}"

    def _times(self, rows: Sequence[Time], shown: Callable[[Time], str]) -> str:
        cells = [((r.model, self.labels[r.configuration]), r.length, shown(r)) for r in rows]
        return _pivot(("model", "configuration"), cells)

    def _breakdown(self) -> str:
        rows = [r for r in self.utilisation if r.model == self.utilisation[0].model]
        einsums = tuple(dict.fromkeys(e for r in rows for e in r.einsums))
        table = [["length", "configuration", *einsums]]
        for r in sorted(rows, key=lambda r: r.length):
            parts = [f"{r.einsums[e]:.3f}" if e in r.einsums else "-" for e in einsums]
            table.append([length_text(r.length), self.labels[r.configuration], *parts])
        return _aligned(table, left=2)

    def _summary(self) -> Iterator[str]:
        subject = self.labels[self.subject]
        table = [["over", "attention", *(["whole layer"] if self.end_to_end else [])]]
        for m in self.means:
            whole = [f"{m.end_to_end:.2f}"] if self.end_to_end else []
            table.append([self.labels[m.over], f"{m.attention:.2f}", *whole])
        yield f"Mean speed-up of {subject}\n{_aligned(table, left=1)}"
        if self.missing:
            yield self.missing


def length_text(length: int) -> str:
    """Return a length as tables show it.

    >>> length_text(1024), length_text(1 << 20), length_text(1000)
    ('1K', '1M', '1000')
    """
    for unit, suffix in ((1 << 20, "M"), (1 << 10, "K")):
        if length % unit == 0:
            return f"{length // unit}{suffix}"
    return str(length)


def _gigabytes(row: Time) -> str:
    n = row.dram_bytes / 1e9
    return f"{n:,.0f}" if n >= 1000 else f"{n:.4g}"


def _pivot(head: tuple[str, ...], cells: Sequence[tuple[tuple[str, ...], int, str]]) -> str:
    """Lay out cells with their lengths as columns."""
    lengths = list(dict.fromkeys(length for _, length, _ in cells))
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for key, length, text in cells:
        rows.setdefault(key, {})[length] = text
    body = [[*key, *(row.get(n, "") for n in lengths)] for key, row in rows.items()]
    return _aligned([[*head, *map(length_text, lengths)], *body], left=len(head))


def _aligned(rows: list[list[str]], *, left: int) -> str:
    """Align columns, the first `left` of them to the left, under a header; a repeated first cell is left out."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines, before = [], ""
    for row in rows:
        shown = ["" if row[0] == before and left > 1 else row[0], *row[1:]]
        before = row[0]
        cells = [c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(shown, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
