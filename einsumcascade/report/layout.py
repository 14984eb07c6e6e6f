"""A layered drawing: which row and where in it each box of a graph stands, and how its edges run between them.

Rows follow the loops, then the depth within a loop. An edge that spans several rows runs through a lane in each of
them, one lane for all the readers of a tensor, and between two loops through a slot wide enough for a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from einsumcascade.report.graph import Crossing, Graph, Node

# All in pixels of the drawing. Texts are set in a monospaced face, so their width is known.
CHARACTER = 7.3
SMALL_CHARACTER = 6.4
BOX_HEIGHT = 46.0
SLOT_HEIGHT = 22.0
_PADDING = 12.0
_LANE = 8.0
_BETWEEN = 18.0
_ROW = 34.0
_BOUNDARY = 30.0
_MARGIN = 16.0
_SWEEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A box, a lane or a slot.

    Args:
        name: of the node whose tensor it is. row: its row, from the top.
        x, y: its centre. width, height: its size; a lane has no more width than its line needs.
        kind: what stands there. boundary: of a slot, the number of the loop before it.
    """

    name: str
    kind: Literal["box", "lane", "slot"]
    row: int
    x: float
    y: float
    width: float
    height: float
    boundary: int = 0

    @property
    def top(self) -> float:
        """Its upper edge."""
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything stands.

    Args:
        width, height: of the drawing.
        places: row by row, from left to right.
        links: pairs of indices into `places`, from a row to the next.
        boundaries: number of the loop before each boundary, and its height.
        bands: for each loop its number, top and bottom.
    """

    width: float
    height: float
    places: tuple[Place, ...]
    links: tuple[tuple[int, int], ...]
    boundaries: tuple[tuple[int, float], ...]
    bands: tuple[tuple[int, float, float], ...]


def crossing_label(crossing: Crossing) -> str:
    """What stands in a slot: the tensor and, where it grows with the rank, the elements of a row."""
    name = crossing.name.removeprefix("@")
    return f"{name}: {crossing.elements}" if crossing.elements else name


def lay_out(graph: Graph, *, gutter: float = 104.0) -> Layout:
    """Lay out a graph.

    Args:
        graph: what to lay out.
        gutter: room at the left for the names of loops and barriers.

    Guaranteed: boxes, lanes and slots of a row do not overlap, links run downwards from a row to the next, and the
    same graph gives the same drawing.
    Cost: O(sweeps * links * log links).   Source: Sugiyama, Tagawa and Toda (1981); the order by barycentres, the
    positions by least squares.
    """
    row_of, last = _rows(graph)
    kinds = _row_kinds(graph, row_of)
    rows: list[list[tuple[str, str]]] = [[] for _ in kinds]
    links: dict[tuple[int, str], list[str]] = {}
    for n in graph.nodes:
        rows[row_of[n.name]].append((n.name, "box"))
    for n in graph.nodes:
        for r in range(row_of[n.name] + 1, last[n.name]):
            rows[r].append((n.name, "slot" if kinds[r] < 0 else "lane"))
    for source, target in graph.edges:
        links.setdefault((row_of[target] - 1, source), []).append(target)
    joined: list[list[tuple[int, int]]] = []
    rows = _initial(rows)
    for r in range(len(rows) - 1):
        here, below = _index(rows[r]), _index(rows[r + 1])
        pairs = [(here[s], below[t]) for (at, s), found in links.items() if at == r for t in found]
        pairs += [(here[name], below[name]) for name, kind in rows[r + 1] if kind != "box"]
        joined.append(sorted(pairs))
    orders = _order([len(r) for r in rows], joined)
    return _placed(graph, rows, kinds, joined, orders, gutter)


def _rows(graph: Graph) -> tuple[dict[str, int], dict[str, int]]:
    """The row of each node, and the last row of one that reads it."""
    inside: dict[str, list[str]] = {n.name: [] for n in graph.nodes}
    level = {n.name: n.level for n in graph.nodes}
    for source, target in graph.edges:
        if level[source] == level[target]:
            inside[target].append(source)
    depth: dict[str, int] = {}
    for n in graph.nodes:
        depth[n.name] = max((depth[s] + 1 for s in inside[n.name]), default=0)
    # An input stands right above its first reader.
    for n in graph.nodes:
        if n.kind != "einsum":
            readers = [depth[t] for t, found in inside.items() if n.name in found]
            depth[n.name] = min(readers, default=1) - 1
    row_of: dict[str, int] = {}
    start = 0
    for k in range(1, graph.levels + 1):
        here = [n.name for n in graph.nodes if n.level == k]
        first = min((depth[name] for name in here), default=0)
        row_of |= {name: start + depth[name] - first for name in here}
        # The row after a loop is its boundary.
        start = max((row_of[name] for name in here), default=start) + 2
    last = {n.name: max((row_of[t] for s, t in graph.edges if s == n.name), default=0) for n in graph.nodes}
    return row_of, last


def _row_kinds(graph: Graph, row_of: Mapping[str, int]) -> list[int]:
    """For each row the number of its loop, or minus that of the loop before the boundary it is."""
    count = max(row_of.values()) + 1
    kinds = [0] * count
    for n in graph.nodes:
        kinds[row_of[n.name]] = n.level
    for r in range(count):
        if not kinds[r]:
            kinds[r] = -max(n.level for n in graph.nodes if row_of[n.name] < r)
    return kinds


def _index(row: Sequence[tuple[str, str]]) -> dict[str, int]:
    return {name: k for k, (name, _) in enumerate(row)}


def _initial(rows: list[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    """Lanes of long edges to the left, so that boxes start in the order of the text."""
    return [[p for p in row if p[1] != "box"] + [p for p in row if p[1] == "box"] for row in rows]


def _order(sizes: Sequence[int], joined: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
    """Order each row by the barycentres of its neighbours, down and up, and keep what crosses least."""
    orders = [list(range(n)) for n in sizes]
    best, fewest = [list(o) for o in orders], _crossings(orders, joined)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for r in range(1, len(sizes)) if down else range(len(sizes) - 2, -1, -1):
            pairs = joined[r - 1] if down else [(b, a) for a, b in joined[r]]
            fixed = {k: at for at, k in enumerate(orders[r - 1 if down else r + 1])}
            near: dict[int, list[int]] = {k: [] for k in orders[r]}
            for other, own in pairs:
                near[own].append(fixed[other])
            at = {k: n for n, k in enumerate(orders[r])}
            scale = max(1, len(fixed)) / max(1, len(at))
            orders[r].sort(key=lambda k: sum(near[k]) / len(near[k]) if near[k] else at[k] * scale)
        found = _crossings(orders, joined)
        if found < fewest:
            best, fewest = [list(o) for o in orders], found
    return best


def _crossings(orders: Sequence[Sequence[int]], joined: Sequence[Sequence[tuple[int, int]]]) -> int:
    total = 0
    for r, pairs in enumerate(joined):
        upper = {k: at for at, k in enumerate(orders[r])}
        lower = {k: at for at, k in enumerate(orders[r + 1])}
        ends = sorted((upper[a], lower[b]) for a, b in pairs)
        for n, (a, b) in enumerate(ends):
            total += sum(c > a and d < b for c, d in ends[n + 1 :])
    return total


def _placed(
    graph: Graph,
    rows: Sequence[Sequence[tuple[str, str]]],
    kinds: Sequence[int],
    joined: Sequence[Sequence[tuple[int, int]]],
    orders: Sequence[Sequence[int]],
    gutter: float,
) -> Layout:
    nodes = {n.name: n for n in graph.nodes}
    labels = {(c.boundary, c.name): crossing_label(c) for c in graph.crossings}
    widths = [
        [_width(nodes[name], kind, labels.get((-kinds[r], name), "")) for name, kind in row]
        for r, row in enumerate(rows)
    ]
    xs = _columns(rows, widths, joined, orders)
    left = min(x - w / 2 for row, ws in zip(xs, widths, strict=True) for x, w in zip(row, ws, strict=True))
    shift = gutter + _MARGIN - left
    places: list[Place] = []
    start: list[dict[int, int]] = []
    boundaries: list[tuple[int, float]] = []
    tops: dict[int, float] = {}
    bottoms: dict[int, float] = {}
    y = _MARGIN
    for r, row in enumerate(rows):
        height = SLOT_HEIGHT if kinds[r] < 0 else BOX_HEIGHT
        if r:
            y += _BOUNDARY if kinds[r] < 0 or kinds[r - 1] < 0 else _ROW
        if kinds[r] < 0:
            boundaries.append((-kinds[r], y + height / 2))
        else:
            tops.setdefault(kinds[r], y)
            bottoms[kinds[r]] = y + height
        start.append({k: len(places) + at for at, k in enumerate(orders[r])})
        for k in orders[r]:
            name, kind = row[k]
            places.append(
                Place(
                    name=name,
                    kind="box" if kind == "box" else "slot" if kind == "slot" else "lane",
                    row=r,
                    x=round(xs[r][k] + shift, 1),
                    y=y + height / 2,
                    width=widths[r][k],
                    height=height,
                    boundary=max(0, -kinds[r]),
                )
            )
        y += height
    links = tuple((start[r][a], start[r + 1][b]) for r, pairs in enumerate(joined) for a, b in pairs)
    return Layout(
        width=max(p.x + p.width / 2 for p in places) + _MARGIN,
        height=y + _MARGIN,
        places=tuple(places),
        links=links,
        boundaries=tuple(boundaries),
        bands=tuple((k, tops[k], bottoms[k]) for k in tops),
    )


def _width(node: Node, kind: str, label: str) -> float:
    match kind:
        case "box":
            name = len(node.tensor) * CHARACTER + (len(",".join(node.indices)) + 2) * SMALL_CHARACTER
            return round(max(64.0, name, len(node.does) * SMALL_CHARACTER) + 2 * _PADDING, 1)
        case "slot":
            return round(len(label) * SMALL_CHARACTER + _PADDING, 1)
        case _:
            return _LANE


def _columns(
    rows: Sequence[Sequence[tuple[str, str]]],
    widths: Sequence[Sequence[float]],
    joined: Sequence[Sequence[tuple[int, int]]],
    orders: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Bring each place near its neighbours, long edges straight, and keep all of a row apart."""
    xs = [[0.0] * len(row) for row in rows]
    for r, order in enumerate(orders):
        x = 0.0
        for k in order:
            xs[r][k] = x + widths[r][k] / 2
            x += widths[r][k] + _BETWEEN
        middle = (x - _BETWEEN) / 2
        xs[r] = [value - middle for value in xs[r]]
    for sweep in range(2 * _SWEEPS):
        for r in range(len(rows)) if sweep % 2 == 0 else range(len(rows) - 1, -1, -1):
            pull: dict[int, list[tuple[float, float]]] = {k: [(0.05, xs[r][k])] for k in range(len(rows[r]))}
            for other, pairs in ((r - 1, joined[r - 1] if r else []), (r + 1, joined[r] if r + 1 < len(rows) else [])):
                for upper, lower in pairs:
                    here, there = (lower, upper) if other < r else (upper, lower)
                    straight = rows[r][here][0] == rows[other][there][0]
                    pull[here].append((8.0 if straight else 1.0, xs[other][there]))
            wanted, weights = [], []
            for k in orders[r]:
                weight = sum(w for w, _ in pull[k])
                weights.append(weight)
                wanted.append(sum(w * x for w, x in pull[k]) / weight)
            found = apart(wanted, weights, [widths[r][k] for k in orders[r]], _BETWEEN)
            for k, x in zip(orders[r], found, strict=True):
                xs[r][k] = x
    return xs


def apart(wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float], gap: float) -> list[float]:
    """Return the positions nearest to those wanted, in weighted squares, that keep the order and the gap.

    Cost: linear; pools of neighbours that would overlap move together (isotonic regression).

    >>> apart([0.0, 0.0], [1.0, 1.0], [10.0, 10.0], 2.0)
    [-6.0, 6.0]
    """
    offsets, at = [], 0.0
    for k, w in enumerate(widths):
        at += w / 2 + (widths[k - 1] / 2 + gap if k else 0.0)
        offsets.append(at)
    pools: list[tuple[float, float, int]] = []
    for x, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, total, count = x - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, more, number = pools.pop()
            mean = (mean * total + other * more) / (total + more)
            total, count = total + more, count + number
        pools.append((mean, total, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
