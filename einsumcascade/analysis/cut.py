"""The cheapest set of tensors from which all that is still wanted can be had: a vertex cut of least capacity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from einsumcascade.analysis.polynomial import Count
from einsumcascade.analysis.sizes import above_one


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one row pays for a tensor: its elements, divided by the rows that share them.

    Args:
        elements: of the part of the tensor that a row wants.
        divisor: rows that share it, 1 or more.
    """

    elements: Count
    divisor: int = 1

    def at(self, extents: Mapping[str, int]) -> Fraction:
        """The price at given extents, in elements a row."""
        return Fraction(self.elements.at(extents), self.divisor)

    def __str__(self) -> str:
        if self.divisor == 1:
            return str(self.elements)
        return (
            f"({self.elements})/{self.divisor}" if len(self.elements.terms) > 1 else f"{self.elements}/{self.divisor}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A dataflow graph with a price on each tensor.

    Args:
        prices: of each tensor.
        edges: (tensor, tensor that is computed from it).
        sources: tensors that cannot be had from others: inputs, and what must not be computed again.
        targets: tensors that are wanted.
    """

    prices: Mapping[str, Price] = field(hash=False)
    edges: tuple[tuple[str, str], ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]


def least_cut(network: Network, extents: Mapping[str, int]) -> tuple[str, ...]:
    """Find the set of tensors of least price that separates the sources from the targets.

    Of several such sets it is the one nearest to the targets: Definition F4 of docs/analysis.md.

    Args:
        network: what depends on what.
        extents: every extent in the prices.

    Returns: the tensors of the cut, in the order of `network.prices`.
    Cost: one maximum flow; networkx is imported.   Source: Ford and Fulkerson (1956).

    >>> from einsumcascade.analysis.polynomial import volume
    >>> prices = {"K": Price(elements=volume(("m", "e")), divisor=128), "QK": Price(elements=volume(("m",)))}
    >>> chain = Network(prices=prices, edges=(("K", "QK"),), sources=("K",), targets=("QK",))
    >>> least_cut(chain, {"M": 1024, "E": 64}), least_cut(chain, {"M": 1024, "E": 256})
    (('K',), ('QK',))
    """
    common = math.lcm(*(p.divisor for p in network.prices.values()), 1)
    capacity = {t: int(p.at(extents) * common) for t, p in network.prices.items()}
    return _flow(network, capacity)[0]


def is_certain(network: Network, cut: tuple[str, ...]) -> bool:
    """Tell whether a cut is proved least at all extents of 1 or more.

    Written in y = extent - 1 every price is a sum of products of y with factors of 0 or more. A cut that is least for
    the factors of each product on their own is least for every y. The converse fails: False is "not proved".

    Cost: a maximum flow for each product.
    """
    common = math.lcm(*(p.divisor for p in network.prices.values()), 1)
    factors = {
        t: {k: int(n * (common // p.divisor)) for k, n in above_one(p.elements).items()}
        for t, p in network.prices.items()
    }
    products = {k for f in factors.values() for k in f}
    return all(
        sum(factors[t].get(k, 0) for t in cut) == _flow(network, {t: f.get(k, 0) for t, f in factors.items()})[1]
        for k in products
    )


def _flow(network: Network, capacity: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The cut nearest to the targets and its capacity. A tensor is an edge from ("in", it) to ("out", it)."""
    import networkx as nx

    graph = nx.DiGraph()
    start, end = ("start", ""), ("end", "")
    graph.add_nodes_from((start, end))
    for t, n in capacity.items():
        graph.add_edge(("in", t), ("out", t), capacity=n)
    graph.add_edges_from((("out", a), ("in", b)) for a, b in network.edges)
    graph.add_edges_from((start, ("in", t)) for t in network.sources)
    graph.add_edges_from((("out", t), end) for t in network.targets)
    residual = nx.algorithms.flow.edmonds_karp(graph, start, end)
    # What can still send something to the end lies behind the cut.
    behind, queue = {end}, [end]
    for node in queue:
        for before, edge in residual.pred[node].items():
            if before not in behind and edge["capacity"] > edge["flow"]:
                behind.add(before)
                queue.append(before)
    cut = tuple(t for t in capacity if ("in", t) not in behind and ("out", t) in behind)
    return cut, int(residual.graph["flow_value"])


def reached(edges: Sequence[tuple[str, str]], targets: Sequence[str], cut: Sequence[str]) -> tuple[str, ...]:
    """List the tensors behind a cut that lead to a target: those computed again."""
    seen = dict.fromkeys(t for t in targets if t not in cut)
    queue = list(seen)
    for t in queue:
        for a, b in edges:
            if b == t and a not in seen and a not in cut:
                seen[a] = None
                queue.append(a)
    return tuple(seen)
