"""The parts of an analysis as lines of plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from einsumcascade.analysis.loop_order import LoopOrders
from einsumcascade.analysis.plans import Boundary, Live, Plan
from einsumcascade.analysis.polynomial import Count

Show = Callable[[Count], str]


def boundary_lines(boundary: Boundary, *, show: Show, given: Mapping[str, int]) -> Iterator[str]:
    """Say what is live across a boundary and what to keep of it.

    Args:
        boundary: the boundary.
        show: turns a count into text.
        given: the extents that were given; a choice by others is marked.
    """
    groups: dict[tuple[str, ...], list[Live]] = {}
    for x in boundary.live:
        groups.setdefault(x.rows, []).append(x)
    parts = [
        listed([f"{x.tensor} ({show(x.elements)})" for x in group]) + each(rows)
        for rows, group in sorted(groups.items(), key=lambda g: -len(g[0]))
    ]
    if parts:
        yield "live: " + "; ".join(parts)
    plan, together = boundary.plan, boundary.together
    yield "least kept: " + _plan(plan, show=show, block="") + _chosen(boundary, given)
    if [h.tensor for h in together.held] != [h.tensor for h in plan.held]:
        joint = listed(tuple(dict.fromkeys(r for h in together.held for r in h.shared)))
        rows = boundary.break_even
        more = f"; cheaper for blocks above {show(rows)}" if rows is not None else ""
        yield f"or in blocks of {joint}: {_plan(together, show=show, block=' a block')}{more}"


def _plan(plan: Plan, *, show: Show, block: str) -> str:
    parts = []
    for h in plan.held:
        again = " read again" if h.how == "read again" else ""
        parts.append(f"{h.tensor}{again} ({show(h.price.elements)}{block if h.shared else ''})")
    if plan.recomputed:
        names = [r.tensor for r in plan.recomputed]
        sources = dict.fromkeys(t for r in plan.recomputed for t in r.sources if t not in names)
        parts.append(f"{listed(names)} recomputed" + (f" from {listed(tuple(sources))}" if sources else ""))
    return ", ".join(parts) or "nothing"


def _chosen(boundary: Boundary, given: Mapping[str, int]) -> str:
    """Where the choice rests on extents that were assumed: which ones."""
    if boundary.plan.is_settled:
        return ""
    return _assumed("; chosen at ", boundary.plan.weighed, boundary.extents, given)


def _assumed(text: str, names: Sequence[str], extents: Mapping[str, int], given: Mapping[str, int]) -> str:
    found = [f"{r} = {extents[r]:,}" for r in names if r not in given]
    return text + ", ".join(found) if found else ""


def order_lines(orders: LoopOrders, *, given: Mapping[str, int]) -> Iterator[str]:
    """Say what the best order of loops keeps from step to step.

    Args:
        orders: the orders.
        given: the extents that were given; a choice by others is marked.
    """
    best = orders.best
    if best is None:
        return
    # Numbers where all of them are known, so that they add up to what stands before them.
    known = set(best.total.extents) <= set(given)

    def show(n: Count) -> str:
        return f"{n.at(given):,}" if known else str(n)

    whole = f"; {', '.join(orders.whole)} whole inside a step" if orders.whole else ""
    yield f"Loop order {', '.join(best.order) or 'none'}{whole}"
    if not best.kept:
        yield "  nothing is kept from step to step"
    for rows, kept in best.by_rows.items():
        again = best.read_again(rows)
        names = ", ".join(f"{k.tensor} {show(k.elements)}" for k in kept) if len(kept) > 1 else kept[0].tensor
        more = f", or read again for each {again}" if again else ""
        yield f"  kept{each(rows)}: {show(best.total_of(rows))} ({names}){more}"
    others = len(orders.orders) - 1
    if others:
        noun = "1 other order keeps" if others == 1 else f"{others} other orders keep"
        weighed = [r for r in orders.extents if any(r in o.computed.extents for o in orders.orders)]
        at = "" if orders.is_settled else _assumed(" at ", weighed, orders.extents, given)
        yield f"  {noun} as much or more of what is computed{at}"


def each(rows: Sequence[str]) -> str:
    """` for each B, H`, or nothing."""
    return f" for each {', '.join(rows)}" if rows else ""


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does.

    >>> listed(["X", "Y", "Z"])
    'X, Y and Z'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def plural(count: str, one: str, many: str) -> str:
    """`1 pass`, `3 passes`."""
    return f"{count} {one if count == '1' else many}"


def table(rows: list[list[str]], *, left: tuple[int, ...]) -> str:
    """Align columns: those of `left` to the left, the others to the right, two blanks between."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if k in left else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
