"""What is live across a boundary and the least of it that must be kept, against every set of tensors there is."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import pytest

from einsumcascade.analysis.cut import Network, Price, is_certain, least_cut
from einsumcascade.analysis.footprint import boundary_footprints
from einsumcascade.analysis.polynomial import number, volume
from einsumcascade.analysis.sizes import assumed_extents, long_ranks, never_more
from einsumcascade.errors import UnknownRankError
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade, rank_of, reads
from einsumcascade.language.parser import parse
from tests.analysis.random_nests import random_fibers

LONG = {"M": 65_536, "E": 64}


def test_global_softmax_keeps_its_scores_then_its_numerators() -> None:
    first, second = boundary_footprints(load("softmax_attention"), rank="M", extents=LONG)
    assert [h.tensor for h in first.plan.held] == ["QK"] and [h.tensor for h in second.plan.held] == ["SN"]
    assert first.plan.price_at(LONG) == second.plan.price_at(LONG) == 65_536
    assert first.plan.is_settled and second.plan.is_settled
    assert [(x.tensor, str(x.elements)) for x in first.live] == [("QK", "M"), ("GM", "1")]
    assert first.rows == ("B", "H", "P")


def test_where_128_queries_share_the_keys_the_scores_are_computed_again_at_half_the_price() -> None:
    first, second = boundary_footprints(load("softmax_attention"), rank="M", extents=LONG, blocks={"P": 128})
    assert [(h.tensor, h.how) for h in first.plan.held] == [("K", "read again")]
    assert first.plan.price_at(LONG) == 32_768 and first.plan.price == "E*M/128"
    assert [(r.tensor, r.sources) for r in first.plan.recomputed] == [("QK", ("Q", "K"))]
    assert [r.tensor for r in second.plan.recomputed] == ["QK", "SN"]


def test_reading_keys_again_pays_from_as_many_queries_as_a_key_has_features() -> None:
    found = boundary_footprints(load("softmax_attention"), rank="M")[0]
    assert str(found.break_even) == "E"
    for block, tensor in ((64, "QK"), (65, "K")):
        plan = boundary_footprints(load("softmax_attention"), rank="M", extents=LONG, blocks={"P": block})[0].plan
        assert [h.tensor for h in plan.held] == [tensor]


def test_a_cascade_of_one_level_has_no_boundary() -> None:
    assert boundary_footprints(load("softmax_1p"), rank="M") == ()


def test_what_does_not_fit_is_spilled_and_an_input_is_read_again() -> None:
    def how(capacity: int) -> dict[str, str]:
        text = """in X[p,m], Y[p,m,e]
        S[p,m] = Y[p,m,e] :: sum(e)
        G[p] = S[p,m] * X[p,m] :: sum(m)
        O[p,m] = S[p,m] + G[p] * X[p,m]
        out O"""
        (found,) = boundary_footprints(
            parse(text), rank="M", extents={"M": 100, "E": 8, "P": 50}, blocks={"P": 4}, capacity=capacity
        )
        return {h.tensor: h.how for h in found.plan.held}

    # Four rows of each are 400 elements.
    assert how(800) == {"X": "buffered", "S": "buffered"}
    assert how(799) == {"X": "buffered", "S": "spilled"}
    assert how(399) == {"X": "read again", "S": "spilled"}


def test_what_a_table_finds_costs_an_element_for_each_place_along_the_rank() -> None:
    (found,) = boundary_footprints(load("paged"), rank="M")
    assert [(h.tensor, str(h.price)) for h in found.plan.held] == [("QK", "M")]
    assert {x.tensor: str(x.elements) for x in found.live} == {"TAB": "T", "LEN": "1", "QK": "M", "GM": "1"}


def test_a_whole_tile_is_computed_again_from_the_scores() -> None:
    (found,) = boundary_footprints(load("softmax_2p_part"), rank="M")
    assert [h.tensor for h in found.plan.held] == ["QK"]
    assert [r.tensor for r in found.plan.recomputed] == ["LM", "SLN", "PLM"]


def test_what_must_be_whole_before_it_is_read_is_kept() -> None:
    text = "in X[m]\nY[m] = exp(X[m])\nS = Y[m] :: sum(m)\nZ[m] = Y[M-1-m] * S\nout Z"
    (found,) = boundary_footprints(parse(text), rank="M")
    assert [(h.tensor, h.how) for h in found.plan.held] == [("Y", "kept")]


def test_of_what_is_read_at_one_place_one_element_is_live() -> None:
    text = "in X[m]\nY[m] = exp(X[m])\nS = Y[m] :: sum(m)\nZ[m] = X[m] * S * Y[0]\nout Z"
    (found,) = boundary_footprints(parse(text), rank="M")
    assert {x.tensor: str(x.elements) for x in found.live} == {"X": "M", "Y": "1", "S": "1"}
    assert [h.tensor for h in found.plan.held] == ["X"]


def test_an_input_is_live_from_its_first_read_on_whatever_else_reads_it_at_any_time() -> None:
    text = "in X[m], W[e]\nT[e] = 2 * W[e]\nS = X[m] * W[e] :: sum(m,e)\nZ[m] = X[m] * S * W[0]\nout Z, T"
    (found,) = boundary_footprints(parse(text), rank="M")
    assert [x.tensor for x in found.live] == ["X", "W", "S"]


def test_a_comparison_that_holds_at_every_extent_is_proved() -> None:
    m = volume(("m",))
    assert never_more(m + m, m * m + number(1)) and not never_more(m * m, m + m)
    assert not never_more(m + m, m * m) and never_more(number(1), m)


def test_the_rank_must_exist() -> None:
    with pytest.raises(UnknownRankError, match="did you mean 'M'"):
        boundary_footprints(load("softmax_attention"), rank="m")


def test_a_choice_without_extents_takes_long_ranks_for_long() -> None:
    cascade = load("kronecker")
    assert long_ranks(cascade) == ("P", "M", "N")
    assert assumed_extents(cascade, {"N": 3}) == {"P": 65_536, "E": 64, "M": 65_536, "N": 3, "F": 64}
    (found,) = boundary_footprints(cascade, rank="M")
    assert [h.tensor for h in found.plan.held] == ["K1"] and not found.plan.is_settled
    (found,) = boundary_footprints(cascade, rank="M", extents={"N": 16, "E": 64})
    assert [h.tensor for h in found.plan.held] == ["S"]


def test_defined_extents_are_what_they_are_defined_as() -> None:
    known = assumed_extents(load("softmax_1p"), {"M": 1000})
    assert (known["M0"], known["M1"]) == (64, 16)


# --- brute force ------------------------------------------------------------------------------------------------------


def separates(network: Network, cut: tuple[str, ...]) -> bool:
    """Whether no path leads from a source to a target around a cut."""
    seen = [t for t in network.sources if t not in cut]
    for t in seen:
        seen += [b for a, b in network.edges if a == t and b not in cut and b not in seen]
    return not set(seen) & set(network.targets)


def behind(network: Network, cut: tuple[str, ...]) -> set[str]:
    """What must be computed again to have the targets from a cut."""
    seen = [t for t in network.targets if t not in cut]
    for t in seen:
        seen += [a for a, b in network.edges if b == t and a not in cut and a not in seen]
    return set(seen)


def subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for n in range(len(names) + 1):
        yield from combinations(names, n)


def random_network(rng: random.Random) -> Network:
    names = tuple("abcdefgh"[: rng.randint(1, 8)])
    edges = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :] if rng.random() < 0.35]
    widths = [volume(("m",)), volume(("m", "e")), volume(("m", "f")), volume(("e", "f")), number(rng.randint(1, 3))]
    prices = {
        t: Price(elements=rng.choice(widths) + rng.choice(widths), divisor=rng.choice((1, 1, 1, 4))) for t in names
    }
    sources = tuple(t for t in names if rng.random() < 0.4)
    targets = tuple(t for t in names if rng.random() < 0.4)
    return Network(prices=prices, edges=tuple(edges), sources=sources, targets=targets)


@pytest.mark.parametrize("seed", range(150))
def test_the_cut_is_the_cheapest_of_all_sets_and_nearest_to_the_targets(seed: int) -> None:
    rng = random.Random(seed)
    network = random_network(rng)
    extents = {r: rng.randint(1, 9) for r in "MEF"}
    found = least_cut(network, extents)

    def price(cut: tuple[str, ...], at: Mapping[str, int]) -> float:
        return float(sum(network.prices[t].at(at) for t in cut))

    cuts = [c for c in subsets(tuple(network.prices)) if separates(network, c)]
    least = min(price(c, extents) for c in cuts)
    assert separates(network, found) and price(found, extents) == least
    assert all(behind(network, found) <= behind(network, c) for c in cuts if price(c, extents) == least)
    if is_certain(network, found):
        for _ in range(20):
            other = {r: rng.choice((1, 2, 3, 100, 10_000)) for r in "MEF"}
            assert price(found, other) == min(price(c, other) for c in cuts)


def test_a_cut_that_another_extent_would_move_is_not_certain() -> None:
    prices = {"K": Price(elements=volume(("m", "e"))), "S": Price(elements=volume(("m", "n")))}
    chain = Network(prices=prices, edges=(("K", "S"),), sources=("K",), targets=("S",))
    cut = least_cut(chain, {"M": 9, "E": 2, "N": 7})
    assert cut == ("K",) and not is_certain(chain, cut)


@dataclass
class Fibers:
    """A cascade along m by its text alone: levels, and what each Einsum reads."""

    cascade: Cascade

    def __post_init__(self) -> None:
        self.reads = {e.tensor: [r.tensor for r in reads(e.expr)] for e in self.cascade.einsums}
        self.shape = {i.tensor: i.indices for i in self.cascade.inputs} | {
            e.tensor: e.free for e in self.cascade.einsums
        }
        self.gone = {e.tensor: set(e.ranks) for e in self.cascade.einsums}
        # An element of a fiber is known in the loop of its level, a sum only after it.
        self.level = {i.tensor: 0 for i in self.cascade.inputs}
        for t, found in self.reads.items():
            walks = "m" in self.shape[t] or "m" in self.gone[t]
            waits = [self.level[u] + int("m" not in self.shape[u]) for u in found]
            self.level[t] = max(1, *waits) if walks else max(self.level[u] for u in found)
        for i in self.cascade.inputs:
            self.level[i.tensor] = min(self.level[t] for t, found in self.reads.items() if i.tensor in found)

    def is_read_after(self, tensor: str, boundary: int) -> bool:
        return any(self.level[t] > boundary for t, found in self.reads.items() if tensor in found)

    def has(self, tensor: str, kept: tuple[str, ...], rows: set[str]) -> bool:
        """Whether a row has a tensor, kept or computed again from what is kept."""
        if tensor in kept:
            return True
        if tensor not in self.reads or self.gone[tensor] & rows:
            return False
        return all(self.has(u, kept, rows) for u in self.reads[tensor] if "m" in self.shape[u])

    def again(self, tensor: str, kept: tuple[str, ...]) -> set[str]:
        """What is computed again to have a tensor."""
        if tensor in kept:
            return set()
        return {tensor}.union(*(self.again(u, kept) for u in self.reads[tensor] if "m" in self.shape[u]))


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_what_is_kept_of_random_fibers_is_the_cheapest_set_that_has_all(first: int) -> None:
    boundaries = 0
    for seed in range(first, first + 40):
        fibers, rng = Fibers(random_fibers(seed)), random.Random(seed)
        extents = {"M": rng.choice((3, 50)), "E": rng.randint(1, 9), "F": rng.randint(1, 9), "G": rng.randint(1, 9)}
        found = boundary_footprints(fibers.cascade, rank="M", extents=extents)
        assert len(found) == max(max(fibers.level.values(), default=1) - 1, 0), str(fibers.cascade)
        for b in found:
            boundaries += 1
            rows = {r.lower() for r in b.rows}

            def size(tensor: str, without: set[str] = frozenset()) -> int:  # type: ignore[assignment]
                return math.prod(extents[rank_of(v)] for v in fibers.shape[tensor] if v not in without)  # noqa: B023

            before = tuple(t for t, at in fibers.level.items() if at <= b.number)
            live = {t: size(t) for t in before if fibers.is_read_after(t, b.number)}
            rows_of = {x.tensor: math.prod(extents[r] for r in x.rows) for x in b.live}
            assert {x.tensor: x.elements.at(extents) * rows_of[x.tensor] for x in b.live} == live, str(fibers.cascade)
            candidates = tuple(t for t in before if "m" in fibers.shape[t])
            wanted = [t for t in candidates if fibers.is_read_after(t, b.number)]
            sets = [c for c in subsets(candidates) if all(fibers.has(t, c, rows) for t in wanted)]
            least = min(sum(size(t, rows) for t in c) for c in sets)
            held = tuple(h.tensor for h in b.plan.held)
            assert held in [tuple(t for t in fibers.shape if t in c) for c in sets], str(fibers.cascade)
            assert b.plan.price_at(extents) == least
            computed = {r.tensor for r in b.plan.recomputed}
            assert computed == set().union(*(fibers.again(t, held) for t in wanted))
            for c in sets:
                if sum(size(t, rows) for t in c) == least:
                    assert computed <= set().union(*(fibers.again(t, c) for t in wanted))
    assert boundaries > 10
