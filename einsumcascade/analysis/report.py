"""Analyse a cascade and say the outcome on one page of plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from einsumcascade.analysis.counts import CLASSES, Counts, count_operations, evaluate_extents
from einsumcascade.analysis.dependence import known_rank, whole_ranks
from einsumcascade.analysis.footprint import boundary_footprints
from einsumcascade.analysis.loop_order import LoopOrders, loop_orders
from einsumcascade.analysis.page import boundary_lines, order_lines, plural, table
from einsumcascade.analysis.passes import PassCount, count_passes, unknown_rank
from einsumcascade.analysis.plans import Boundary
from einsumcascade.analysis.polynomial import Count
from einsumcascade.analysis.roofline import Roofline, roofline
from einsumcascade.analysis.sizes import assumed_extents
from einsumcascade.analysis.sweep import Barrier
from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.analysis.taxonomy import Taxonomy, classify
from einsumcascade.errors import InputError
from einsumcascade.language.ir import Cascade, rank_of

_TITLES = {"multiply_add": "multiply-add", "exp": "exp", "divide": "divide", "max": "max", "other": "other"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What an analysis found. `str()` is a page to read, `to_dict()` the same for machines.

    Ranks are keys in order of first appearance; a part of a partition counts with the rank it splits.

    Args:
        name: of the cascade.
        by_rank: the pass count of each rank.
        footprints: for each rank, what is live across each boundary between loops over it and what to keep of it.
        orders: what a fused loop nest of all Einsums keeps, for each order of its loops.
        counts: operations and least traffic.
        taxonomy: where each softmax of it stands.
        extents: the numbers given or defined, by rank.
        roofline: the bounds on the target asked for, if one was.
    """

    name: str
    by_rank: Mapping[str, PassCount] = field(hash=False)
    footprints: Mapping[str, tuple[Boundary, ...]] = field(hash=False)
    orders: LoopOrders = field(hash=False)
    counts: Counts
    taxonomy: Taxonomy
    extents: Mapping[str, int] = field(hash=False)
    roofline: Roofline | None = field(default=None, hash=False)

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
            "ranks": {
                r: {**n.to_dict(), "footprints": [b.to_dict() for b in self.footprints[r]]}
                for r, n in self.by_rank.items()
            },
            "loop_orders": self.orders.to_dict(),
            "counts": counts,
            "taxonomy": self.taxonomy.to_dict(),
            "roofline": self.roofline.to_dict() if self.roofline is not None else None,
        }

    def _knows(self, n: Count) -> bool:
        return set(n.extents) <= set(self.extents)

    def __str__(self) -> str:
        blocks = [f"{self.name}: {len(self.counts.einsums)} Einsums over {', '.join(self.by_rank)}", self._ranks()]
        blocks += [self._rank(r) for r in self.by_rank if self.by_rank[r].levels > 1 or self.by_rank[r].summaries]
        blocks += [f"Softmax {x}" for x in self.taxonomy.entries]
        blocks += ["\n".join(order_lines(self.orders, given=self.extents)), self._operations(), self._traffic()]
        blocks += [str(self.roofline) if self.roofline is not None else ""]
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
        return table(rows, left=(0, len(rows[0]) - 1))

    def _rank(self, rank: str) -> str:
        n = self.by_rank[rank]
        head = f"Rank {rank}: {plural(n.formula, 'pass', 'passes')}"
        if n.level_formula != n.formula:
            head += f", {plural(n.level_formula, 'level', 'levels')}"
        if n.summary_traversals:
            head += f", {plural(str(n.summary_traversals), 'summary traversal', 'summary traversals')}"
        lines = [head]
        word = "pass" if n.levels == n.passes else "level"
        for k in range(1, n.levels + 1):
            lines.append(f"  {word} {k}: {', '.join(t for t, at in n.level_of.items() if at == k)}")
            lines += [f"    {b}" for b in n.level_barriers if b.boundary == k]
            for found in self.footprints[rank]:
                if found.number == k:
                    lines += [f"    {x}" for x in boundary_lines(found, show=self._value, given=self.extents)]
        extra = [b for b in n.barriers if n.passes > n.levels]
        lines += [f"  pass {b.boundary + 1}: {b}" for b in extra]
        for r, k in n.per_step or n.level_per_step:
            more = plural(str(k), "pass", "passes")
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
        return table(rows, left=(0,)) + "\n(points that a constraint culls are not subtracted)"

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


def analyse(
    cascade: Cascade | str,
    *,
    extents: Mapping[str, int] | None = None,
    target: str | GpuTarget | None = None,
    dtype: str = "bfloat16",
) -> Analysis:
    """Analyse a cascade: passes, levels and barriers of each rank, footprints, operations, least traffic.

    Args:
        cascade: a cascade, a name of the gallery or the path of a text.
        extents: numbers by rank, upper case; counts are given as numbers where these suffice.
        target: name of a GPU target, or a target, whose roofline to add; all extents must be known.
        dtype: of the inputs, for the roofline.

    Returns: the analysis; `extents` decide what to keep where a choice depends on them, else only the numbers shown.
    Raises:
        UnknownRankError: `extents` names a rank the cascade does not have.
        InputError: an extent is no integer or is negative; for a roofline one is missing, or the target is unknown.
        SpecFileError: `cascade` is a text that names nothing.
        CascadeError: the text it names is wrong.
    Cost: O(ranks * tensors * (Einsums + accesses) + loops! * Einsums * accesses), five loops at most.
    Source: FuseMax (MICRO 2024), section III.

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
            raise InputError.of(
                "extent-value", f"the extent of {rank} is {n!r}", rule="an extent is a whole number, 0 or more"
            )
    ranks = [rank_of(v) for v in whole_ranks(cascade)]
    by_rank = {r: count_passes(cascade, rank=r) for r in ranks}
    known = assumed_extents(cascade, extents or {})
    return Analysis(
        name=cascade.name,
        by_rank=by_rank,
        footprints={r: boundary_footprints(cascade, rank=r, extents=known, count=by_rank[r]) for r in ranks},
        orders=loop_orders(cascade, extents=known),
        counts=count_operations(cascade),
        taxonomy=classify(cascade),
        extents=evaluate_extents(cascade, extents or {}),
        roofline=None if target is None else roofline(cascade, extents=extents or {}, dtype=dtype, target=target),
    )
