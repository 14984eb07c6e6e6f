"""Drawings as SVG inside the page: its style sheet colours them, so they follow the reader's light or dark scheme."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from einsumcascade.report.graph import Crossing, Graph, Loop, Node
from einsumcascade.report.layout import SMALL_CHARACTER, Layout, Place, crossing_label, lay_out
from einsumcascade.report.markup import element, rank_class


def draw_graph(graph: Graph, *, ranks: Mapping[str, int]) -> Markup:
    """Draw a graph, a band for each loop and a line for each boundary between them.

    Args:
        graph: what to draw.
        ranks: the number of each rank variable, which decides its colour.
    """
    longest = max(len(line) for loop in graph.loops for line in [*_waits(loop), *_names(loop, graph.rank)])
    layout = lay_out(graph, gutter=max(96.0, longest * SMALL_CHARACTER + 24))
    nodes = {n.name: n for n in graph.nodes}
    crossings = {(c.boundary, c.name): c for c in graph.crossings}
    parts = [element("title", None, f"Dataflow of the cascade, cut into loops over {graph.rank}")]
    parts += [_band(layout, band, graph) for band in layout.bands]
    parts += [_boundary(layout, y, graph.loops[number - 1]) for number, y in layout.boundaries]
    parts += _links(layout, nodes)
    for p in layout.places:
        match p.kind:
            case "box":
                parts.append(_box(p, nodes[p.name], ranks))
            case "slot":
                parts.append(_slot(p, crossings[p.boundary, p.name]))
            case _:
                line = f"M{p.x:.1f} {p.top:.1f}V{p.bottom:.1f}"
                parts.append(element("path", {"class": _edge_class(nodes[p.name]), "d": line}))
    width, height = layout.width, layout.height
    attributes = {
        "class": "graph",
        "viewBox": f"0 0 {width:.0f} {height:.0f}",
        "role": "img",
        "style": f"width: {width:.0f}px; min-width: {min(width, max(520.0, width * 0.7)):.0f}px",
    }
    return element("svg", attributes, *parts)


def _names(loop: Loop, rank: str) -> list[str]:
    return [f"over {rank}" if rank else "", *(f"each step of {r}" for r in loop.steps)]


def _band(layout: Layout, band: tuple[int, float, float], graph: Graph) -> Markup:
    number, top, bottom = band
    label = f"loop {number}" if graph.levels > 1 else "one loop" if graph.rank else "no loop"
    names = _names(graph.loops[number - 1], graph.rank)
    return element(
        "g",
        {"class": "band"},
        element("rect", {"x": 4.0, "y": top - 10, "width": layout.width - 8, "height": bottom - top + 20, "rx": 8}),
        element("text", {"x": 18.0, "y": top + 12, "class": "band-name"}, label),
        *(element("text", {"x": 18.0, "y": top + 28 + 15 * k}, text) for k, text in enumerate(names)),
    )


def _waits(loop: Loop) -> list[str]:
    return [f"{reader} waits for {producer}" for reader, producer in loop.waits]


def _boundary(layout: Layout, y: float, loop: Loop) -> Markup:
    waits = _waits(loop)
    below = waits if len(waits) <= 2 else [waits[0], f"and {len(waits) - 1} more"]
    return element(
        "g",
        {"class": "boundary"},
        element("title", None, "; ".join(waits)),
        element("path", {"d": f"M4 {y:.1f}H{layout.width - 4:.1f}"}),
        element("text", {"x": 18.0, "y": y - 5}, f"barrier {loop.level}"),
        *(element("text", {"x": 18.0, "y": y + 14 + 13 * k, "class": "waits"}, t) for k, t in enumerate(below)),
    )


def _links(layout: Layout, nodes: Mapping[str, Node]) -> list[Markup]:
    out = []
    for a, b in layout.links:
        upper, lower = layout.places[a], layout.places[b]
        y, end = upper.bottom, lower.top
        arrow = lower.kind == "box"
        middle = (y + end) / 2
        d = f"M{upper.x:.1f} {y:.1f}"
        stop = end - 5 if arrow else end
        d += f"C{upper.x:.1f} {middle:.1f} {lower.x:.1f} {middle:.1f} {lower.x:.1f} {stop:.1f}"
        out.append(element("path", {"class": _edge_class(nodes[upper.name]), "d": d}))
        if arrow:
            tip = f"M{lower.x - 3.5:.1f} {end - 6:.1f}h7l-3.5 6z"
            out.append(element("path", {"class": "tip", "d": tip}))
    return out


def _edge_class(source: Node) -> str:
    return "edge" if source.kind == "einsum" else "edge given"


def _box(p: Place, n: Node, ranks: Mapping[str, int]) -> Markup:
    classes = " ".join(["node", n.kind] + ["output"] * n.is_output)
    x, y = p.x - p.width / 2, p.top
    label: list[Markup | str] = [element("tspan", {"class": "name"}, n.tensor)]
    for k, index in enumerate(n.indices):
        label.append(element("tspan", {"class": "index"}, "[" if not k else ","))
        label.append(element("tspan", {"class": f"index {rank_class(_variable(index), ranks)}"}, index))
    if n.indices:
        label.append(element("tspan", {"class": "index"}, "]"))
    inside: list[Markup] = [element("title", None, n.text)]
    inside.append(element("rect", {"x": x, "y": y, "width": p.width, "height": p.height, "rx": 6}))
    if n.is_output:
        inside.append(element("rect", {"x": x + 3, "y": y + 3, "width": p.width - 6, "height": p.height - 6, "rx": 4}))
    inside.append(element("text", {"x": p.x, "y": y + 19}, *label))
    inside.append(element("text", {"x": p.x, "y": y + 36, "class": "does"}, n.does))
    if n.iterates and n.kind == "einsum":
        inside.append(element("text", {"x": x + p.width - 5, "y": y + 12, "class": "turn"}, "↻"))
    return element("a", {"href": f"#line-{n.line}", "class": classes}, *inside)


def _slot(p: Place, c: Crossing) -> Markup:
    match c.role:
        case "held":
            what = "read again by the loops that follow" if c.is_input else "kept for the loops that follow"
        case "grows":
            what = "grows with the rank"
        case _:
            what = "known before the next loop begins; does not grow with the rank"
    return element(
        "g",
        {"class": f"crossing {c.role}"},
        element("title", None, f"{c.name.removeprefix('@')}: {what}"),
        element("rect", {"x": p.x - p.width / 2, "y": p.top, "width": p.width, "height": p.height, "rx": p.height / 2}),
        element("text", {"x": p.x, "y": p.y + 4}, crossing_label(c)),
    )


def _variable(index: str) -> str:
    name = ""
    for c in index:
        if not (c.isalnum() or c == "_"):
            break
        name += c
    return name
