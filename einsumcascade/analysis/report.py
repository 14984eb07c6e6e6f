"""Analyse a cascade and say the outcome on one page of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from einsumcascade.analysis.counts import CLASSES, Count, Counts, count_operations, evaluate_extents
from einsumcascade.analysis.dependence import Partition, axes, dependencies, known_rank, partitions, whole_ranks
from einsumcascade.analysis.passes import PassCount, count_passes, unknown_rank
from einsumcascade.analysis.sweep import Barrier
from einsumcascade.errors import Diagnostic, InputError
from einsumcascade.language.ir import Cascade, rank_of

_TITLES = {"multiply_add": "multiply-add", "exp": "exp", "divide": "divide", "max": "max", "other": "other"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A tensor that carries a whole rank and is needed on both sides of a boundary between loops over it.

    Args:
        boundary: number of the loop before the boundary.
        tensor: its name.
        is_input: whether it is an input, which is read again, or an intermediate, which is kept or recomputed.
        readers: Einsums that read it after the boundary.
        fiber: names of the ranks whose product is its elements for each row; a row is a point of `rows`.
        rows: names of its other ranks: those of what completes at the boundary.
        sources: (input, names of the ranks of its elements, ranks whose rows share them) to recompute it from.
    """

    boundary: int
    tensor: str
    is_input: bool
    readers: tuple[str, ...]
    fiber: tuple[str, ...]
    rows: tuple[str, ...]
    sources: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = ()

    def __str__(self) -> str:
        each = f" for each {', '.join(self.rows)}" if self.rows else ""
        readers = _listed(self.readers)
        if self.is_input:
            return f"{self.tensor} is read again by {readers}: {'*'.join(self.fiber)} elements{each}"
        text = f"{self.tensor}, read by {readers}, is kept: {'*'.join(self.fiber)} elements{each}"
        if not self.sources:
            return text
        again = []
        for name, fiber, shared in self.sources:
            block = f" for each block of {', '.join(shared)}" if shared else ""
            again.append(f"{name} ({'*'.join(fiber)} elements{block})")
        return f"{text}; or recomputed from {_listed(again)}"

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "boundary": self.boundary,
            "tensor": self.tensor,
            "is_input": self.is_input,
            "readers": list(self.readers),
            "fiber": list(self.fiber),
            "rows": list(self.rows),
            "sources": [name for name, _, _ in self.sources],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What an analysis found. `str()` is a page to read, `to_dict()` the same for machines.

    Ranks are keys in order of first appearance; a part of a partition counts with the rank it splits.

    Args:
        name: of the cascade.
        by_rank: the pass count of each rank.
        live: what crosses each boundary between loops over a rank.
        counts: operations and least traffic.
        extents: the numbers given or defined, by rank.
    """

    name: str
    by_rank: Mapping[str, PassCount] = field(hash=False)
    live: Mapping[str, tuple[Live, ...]] = field(hash=False)
    counts: Counts
    extents: Mapping[str, int] = field(hash=False)

    @property
    def passes(self) -> dict[str, int]:
        """Passes over each rank, the most of any tensor family; a repeated loop counts one step."""
        return {r: n.passes for r, n in self.by_rank.items()}

    @property
    def levels(self) -> dict[str, int]:
        """Loops over each rank that the Einsums need."""
        return {r: n.levels for r, n in self.by_rank.items()}

    @property
    def families(self) -> dict[str, dict[str, int]]:
        """Passes of each tensor family over each rank."""
        return {r: dict(n.families) for r, n in self.by_rank.items()}

    @property
    def barriers(self) -> dict[str, tuple[Barrier, ...]]:
        """The pairs of Einsums that force the passes over each rank."""
        return {r: n.barriers for r, n in self.by_rank.items()}

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; keys and their order are stable."""
        counts = self.counts.to_dict()
        counts["values"] = {c: n.at(self.extents) for c in CLASSES if (n := self.counts.total(c)) and self._knows(n)}
        return {
            "name": self.name,
            "extents": dict(self.extents),
            "ranks": {r: {**n.to_dict(), "live": [x.to_dict() for x in self.live[r]]} for r, n in self.by_rank.items()},
            "counts": counts,
        }

    def _knows(self, n: Count) -> bool:
        return set(n.extents) <= set(self.extents)

    def __str__(self) -> str:
        blocks = [f"{self.name}: {len(self.counts.einsums)} Einsums over {', '.join(self.by_rank)}", self._ranks()]
        blocks += [self._rank(r) for r in self.by_rank if self.by_rank[r].levels > 1 or self.by_rank[r].summaries]
        blocks += [self._operations(), self._traffic()]
        return "\n\n".join(b for b in blocks if b)

    def _ranks(self) -> str:
        rows = [["rank", "extent", "passes", "levels", "passes of each tensor"]]
        for r, n in self.by_rank.items():
            name = f"{r} = {' x '.join(n.parts)}" if n.parts else r
            ordered = sorted(n.families.items(), key=lambda f: -f[1])
            rows.append(
                [
                    name,
                    str(self.extents.get(r, "")),
                    n.formula,
                    n.level_formula,
                    ", ".join(f"{t} {k}" for t, k in ordered),
                ]
            )
        if not any(row[1] for row in rows[1:]):
            rows = [[row[0], *row[2:]] for row in rows]
        return _table(rows, left=(0, len(rows[0]) - 1))

    def _rank(self, rank: str) -> str:
        n = self.by_rank[rank]
        head = f"Rank {rank}: {_plural(n.formula, 'pass', 'passes')}"
        if n.level_formula != n.formula:
            head += f", {_plural(n.level_formula, 'level', 'levels')}"
        if n.summary_traversals:
            head += f", {_plural(str(n.summary_traversals), 'summary traversal', 'summary traversals')}"
        lines = [head]
        word = "pass" if n.levels == n.passes else "level"
        for k in range(1, n.levels + 1):
            lines.append(f"  {word} {k}: {', '.join(t for t, at in n.level_of.items() if at == k)}")
            lines += [f"    {b}" for b in n.level_barriers if b.boundary == k]
            lines += [f"    {x}" for x in self.live[rank] if x.boundary == k]
        extra = [b for b in n.barriers if n.passes > n.levels]
        lines += [f"  pass {b.boundary + 1}: {b}" for b in extra]
        for r, k in n.per_step or n.level_per_step:
            more = _plural(str(k), "pass", "passes")
            lines.append(f"  each step of {r} traverses the same fibers again: {more} a step")
        if n.summaries:
            lines.append(f"  over tiles only, no pass: {', '.join(n.summaries)}")
        return "\n".join(lines)

    def _operations(self) -> str:
        classes = [c for c in CLASSES if self.counts.total(c)]
        if not classes:
            return ""
        rows = [["operations", *(_TITLES[c] for c in classes)]]
        for e in self.counts.einsums:
            rows.append([e.tensor, *(self._value(getattr(e, c)) for c in classes)])
        rows.append(["total", *(self._value(self.counts.total(c)) for c in classes)])
        return _table(rows, left=(0,)) + "\n(points that a constraint culls are not subtracted)"

    def _traffic(self) -> str:
        inputs, outputs = Count(), Count()
        for _, n in self.counts.inputs:
            inputs += n
        for _, n, _ in self.counts.outputs:
            outputs += n
        text = f"Least traffic, in elements: {self._value(inputs)} read + {self._value(outputs)} written"
        whole = self.counts.bytes(dtype="bfloat16")
        if self._knows(whole):
            text += f"; in bfloat16 {whole.at(self.extents):,} bytes"
        return text

    def _value(self, n: Count) -> str:
        if not n:
            return "-"
        return f"{n.at(self.extents):,}" if self._knows(n) else str(n)


def analyse(cascade: Cascade | str, *, extents: Mapping[str, int] | None = None) -> Analysis:
    """Analyse a cascade: passes, levels and barriers of each rank, operations, least traffic.

    Args:
        cascade: a cascade, a name of the gallery or the path of a text.
        extents: numbers by rank, upper case; counts are given as numbers where these suffice.

    Returns: the analysis; nothing in it depends on `extents` but the numbers shown.
    Raises:
        UnknownRankError: `extents` names a rank the cascade does not have.
        InputError: an extent is no integer or is negative.
        SpecFileError: `cascade` is a text that names nothing.
        CascadeError: the text it names is wrong.
    Cost: O(ranks * tensors * (Einsums + accesses)).   Source: FuseMax (MICRO 2024), section III.

    >>> from einsumcascade.language.parser import parse
    >>> analyse(parse("in X[m]\\nS = X[m] :: max(m)\\nY[m] = exp(X[m] - S)\\nout Y")).passes
    {'M': 2}
    """
    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    for rank, n in (extents or {}).items():
        if known_rank(cascade, rank) is None:
            raise unknown_rank(cascade, rank)
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise InputError(
                diagnostics=(
                    Diagnostic(
                        code="extent-value",
                        headline=f"the extent of {rank} is {n!r}",
                        rule="an extent is a whole number, 0 or more",
                    ),
                )
            )
    ranks = [rank_of(v) for v in whole_ranks(cascade)]
    by_rank = {r: count_passes(cascade, rank=r) for r in ranks}
    return Analysis(
        name=cascade.name,
        by_rank=by_rank,
        live={r: tuple(_live(cascade, by_rank[r])) for r in ranks},
        counts=count_operations(cascade),
        extents=evaluate_extents(cascade, extents or {}),
    )


def _live(cascade: Cascade, count: PassCount) -> list[Live]:
    """List what is first seen at or before a boundary and read after it."""
    variable = known_rank(cascade, count.rank)
    assert variable is not None
    part = partitions(cascade)[variable]
    shape = {t: tuple(v for v in s if v) for t, s in axes(cascade).items()}
    direct = dependencies(cascade)
    inputs = [i.tensor for i in cascade.inputs]
    out = []
    for boundary in range(1, count.levels):
        done = [b.producer for b in count.level_barriers if b.boundary == boundary]
        along = (part.whole, *part.parts)
        common = [v for v in shape[done[0]] if v not in along and all(v in shape[t] for t in done)] if done else []
        for t in shape:
            if not part.has_all(shape[t]):
                continue
            readers = {e: at for e, at in count.level_of.items() if t in direct.get(e, ()) and e != t}
            first = min(readers.values(), default=0) if t in inputs else count.level_of.get(t, 0)
            after = tuple(e for e, at in readers.items() if at > boundary)
            if not after or not 0 < first <= boundary:
                continue
            sources = [] if t in inputs else _sources(t, direct, shape, part, inputs)
            out.append(
                Live(
                    boundary=boundary,
                    tensor=t,
                    is_input=t in inputs,
                    readers=after,
                    fiber=_named([v for v in shape[t] if v not in common], part),
                    rows=_named([v for v in shape[t] if v in common], part),
                    sources=tuple(
                        (
                            s,
                            _named([v for v in shape[s] if v not in common], part),
                            _named([v for v in common if v in shape[t] and v not in shape[s]], part),
                        )
                        for s in sources
                    ),
                )
            )
    return out


def _sources(
    tensor: str,
    direct: Mapping[str, tuple[str, ...]],
    shape: Mapping[str, tuple[str, ...]],
    part: Partition,
    inputs: Sequence[str],
) -> list[str]:
    """List the inputs along the rank that a tensor comes from, through tensors along it alone."""
    seen: dict[str, None] = {tensor: None}
    queue = [tensor]
    for t in queue:
        for d in direct.get(t, ()):
            if d not in seen and part.has_all(shape[d]):
                seen[d] = None
                queue.append(d)
    return [t for t in inputs if t in seen]


def _named(found: Sequence[str], part: Partition) -> tuple[str, ...]:
    """Name ranks, a tile's two parts as the whole."""
    both = part.has_all(tuple(found)) and part.whole not in found
    names: list[str] = []
    for v in found:
        names.append(rank_of(part.whole if both and v in part.parts else v))
    return tuple(dict.fromkeys(names))


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _plural(count: str, one: str, many: str) -> str:
    return f"{count} {one if count == '1' else many}"


def _table(rows: list[list[str]], *, left: tuple[int, ...]) -> str:
    """Align columns: those of `left` to the left, the others to the right, two blanks between."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
