"""The dataflow graph: loops cut it as the analysis says, nothing overlaps, and all that crosses a barrier goes on."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade import gallery
from einsumcascade.analysis.dependence import dependencies
from einsumcascade.analysis.passes import PassCount
from einsumcascade.analysis.report import analyse
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.report.graph import Graph, build_graph, busiest_rank
from einsumcascade.report.layout import Layout, Place, apart, lay_out
from tests.strategies import Case, cases, examples

# One loop, many loops, inputs read again, several outputs, iterations whose steps traverse a rank anew, scalars.
NAMES = ("softmax_attention", "softmax_1p", "gaam", "moh", "vhd", "mla", "tin", "flow", "sparsemax", "deltanet")


def drawn(cascade: Cascade) -> tuple[Graph, PassCount]:
    analysis = analyse(cascade)
    graph = build_graph(cascade, analysis)
    return graph, analysis.by_rank[graph.rank]


@lru_cache(maxsize=32)
def of_gallery(name: str) -> tuple[Graph, PassCount]:
    return drawn(gallery.load(name))


def check_drawing(graph: Graph, layout: Layout) -> None:
    """What holds of every drawing."""
    boxes = [p for p in layout.places if p.kind == "box"]
    assert sorted(p.name for p in boxes) == sorted(n.name for n in graph.nodes)
    for p in layout.places:
        assert p.x - p.width / 2 >= 0 and p.x + p.width / 2 <= layout.width
        assert p.top >= 0 and p.bottom <= layout.height
    rows = [[p for p in layout.places if p.row == r] for r in range(max(p.row for p in layout.places) + 1)]
    for row in rows:
        for a, b in pairwise(sorted(row, key=lambda p: p.x)):
            assert a.x + a.width / 2 < b.x - b.width / 2, f"{a.name} and {b.name} overlap"
    for above, below in pairwise(rows):
        assert max(p.bottom for p in above) < min(p.top for p in below)
    check_edges(graph, layout)


def check_edges(graph: Graph, layout: Layout) -> None:
    """Every edge is drawn, downwards, through a slot on each barrier between its ends and nowhere else."""
    level = {n.name: n.level for n in graph.nodes}
    box = {p.name: k for k, p in enumerate(layout.places) if p.kind == "box"}
    heights = dict(layout.boundaries)
    for a, b in layout.links:
        assert layout.places[b].row == layout.places[a].row + 1
    drawn_edges = set()
    for source in graph.nodes:
        reached: list[list[Place]] = []
        open_paths = [[box[source.name]]]
        while open_paths:
            path = open_paths.pop()
            for a, b in layout.links:
                if a != path[-1]:
                    continue
                if layout.places[b].kind != "box":
                    assert layout.places[b].name == source.name
                    open_paths.append([*path, b])
                else:
                    reached.append([layout.places[k] for k in (*path, b)])
        for path_places in reached:
            target = path_places[-1].name
            drawn_edges.add((source.name, target))
            crossed = [p.boundary for p in path_places if p.kind == "slot"]
            assert crossed == list(range(level[source.name], level[target]))
            assert all(abs(p.y - heights[p.boundary]) < 0.1 for p in path_places if p.kind == "slot")
    assert drawn_edges == set(graph.edges)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps_and_barriers_are_crossed_downwards_only(name: str) -> None:
    graph, _ = of_gallery(name)
    check_drawing(graph, lay_out(graph))


@examples(25)
@given(case=cases())
def test_random_cascades_are_drawn_without_overlap(case: Case) -> None:
    graph, _ = drawn(case.cascade)
    check_drawing(graph, lay_out(graph))


@examples(25)
@given(case=cases())
def test_every_traversal_stands_in_the_loop_that_the_analysis_gives_it(case: Case) -> None:
    graph, count = drawn(case.cascade)
    assert {n.name: n.level for n in graph.nodes if n.name in count.level_of} == dict(count.level_of)
    assert graph.levels == count.levels
    assert [w for x in graph.loops for w in x.waits] == [(b.reader, b.producer) for b in count.level_barriers]


@pytest.mark.parametrize("name", NAMES)
def test_no_edge_goes_to_an_earlier_loop_and_every_read_is_an_edge(name: str) -> None:
    graph, _ = of_gallery(name)
    level = {n.name: n.level for n in graph.nodes}
    assert all(level[a] <= level[b] for a, b in graph.edges)
    expected = {(t, e) for e, found in dependencies(gallery.load(name)).items() for t in found if t != e}
    assert {(a.removeprefix("@"), b) for a, b in graph.edges} == expected


@pytest.mark.parametrize("name", NAMES)
def test_what_crosses_a_barrier_is_made_before_it_and_read_after_it(name: str) -> None:
    graph, _ = of_gallery(name)
    level = {n.name: n.level for n in graph.nodes}
    expected = {(k, a) for a, b in graph.edges for k in range(1, graph.levels) if level[a] <= k < level[b]}
    assert {(c.boundary, c.name) for c in graph.crossings} == expected


def test_the_least_cut_is_marked_on_the_barriers() -> None:
    graph, _ = of_gallery("softmax_attention")
    assert [(c.boundary, c.name, c.elements, c.role) for c in graph.crossings] == [
        (1, "QK", "M", "held"),
        (1, "GM", "", "value"),
        (2, "SN", "M", "held"),
        (2, "SD", "", "value"),
    ]


def test_an_earlier_step_is_a_node_of_its_own() -> None:
    graph, _ = of_gallery("softmax_1p")
    earlier = [n for n in graph.nodes if n.kind == "earlier"]
    assert [(n.tensor, n.indices) for n in earlier] == [("RM", ("b", "h", "m1", "p"))]
    assert ("@RM", "PRM") in graph.edges and ("RM", "PRM") in graph.edges and ("@RM", "SLN") not in graph.edges


def test_a_loop_that_steps_repeat_is_drawn_once_and_says_so() -> None:
    graph, count = of_gallery("sparsemax")
    assert count.level_formula == "2 + N"
    assert [x.steps for x in graph.loops] == [(), ("N",), ()]


def test_scalars_need_no_loop() -> None:
    cascade = parse("in X\nS = X * 2\nout S")
    assert busiest_rank(cascade, analyse(cascade)) == ""
    graph = build_graph(cascade, analyse(cascade))
    check_drawing(graph, lay_out(graph))
    assert graph.levels == 1


def test_a_tensor_that_only_has_a_first_generation_is_drawn() -> None:
    graph, _ = drawn(parse("in A[m]\ninit X[0, m] = A[m]\nY[m] = X[0, m]\nout Y"))
    assert graph.edges == (("A", "X"), ("X", "Y"))


def test_the_busiest_rank_is_a_length_where_passes_are_equal() -> None:
    cascade = gallery.load("softmax_1p")
    assert busiest_rank(cascade, analyse(cascade)) == "M"


@given(
    wanted=st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    data=st.data(),
)
def test_places_keep_their_order_and_no_shift_of_a_group_is_nearer(wanted: list[float], data: st.DataObject) -> None:
    n = len(wanted)
    weights = data.draw(st.lists(st.floats(0.5, 9), min_size=n, max_size=n))
    widths = data.draw(st.lists(st.floats(1, 40), min_size=n, max_size=n))
    found = apart(wanted, weights, widths, 5)

    def room(xs: list[float]) -> list[float]:
        return [xs[k + 1] - xs[k] - (widths[k] + widths[k + 1]) / 2 - 5 for k in range(n - 1)]

    def cost(xs: list[float]) -> float:
        return sum(w * (x - d) ** 2 for w, x, d in zip(weights, xs, wanted, strict=True))

    assert all(gap > -1e-6 for gap in room(found))
    for first in range(n):
        for last in range(first, n):
            for step in (-0.01, 0.01):
                moved = [x + step * (first <= k <= last) for k, x in enumerate(found)]
                assert min(room(moved), default=0) < -1e-6 or cost(moved) > cost(found) - 1e-6
