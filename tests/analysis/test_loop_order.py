"""What a fused loop nest keeps, against an element-by-element execution of the nest."""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from einsumcascade.analysis.dependence import axes
from einsumcascade.analysis.kept import Kept, Tensor, kept_by
from einsumcascade.analysis.loop_order import LoopOrder, loop_orders
from einsumcascade.analysis.nest import Nest, edges_between, fuse
from einsumcascade.analysis.walks import lines
from einsumcascade.errors import InputError, UnknownRankError
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from tests.analysis.nest_oracle import Expansion, numbers_of
from tests.analysis.random_cascades import random_cascade
from tests.analysis.random_nests import EXTENTS, random_nest
from tests.analysis.tiny_extents import rank_names


def nest_of(cascade: Cascade, order: tuple[str, ...]) -> Nest | None:
    own = lines(cascade)
    return fuse(own, edges_between(own), order)


def kept_at(cascade: Cascade, nest: Nest, numbers: dict[str, int]) -> dict[str, int]:
    shape = axes(cascade)
    found = (kept_by(nest, Tensor(t, nest.lines, shape[t])) for t in shape)
    return {k.tensor: k.elements.at(numbers) for k in found if k is not None}


def order_of(cascade: Cascade, *loops: str) -> LoopOrder:
    return next(o for o in loop_orders(cascade, loops=loops).orders if o.order == loops)


def kept_of(cascade: Cascade, *loops: str) -> dict[str, str]:
    return {k.tensor: str(k.elements) for k in order_of(cascade, *loops).kept}


FIGURES = {
    "P, M1": {"Q": "E", "RM": "1", "RD": "1", "RNV": "F", "K": "E*M", "V": "F*M"},
    "M1, P": {"Q": "E*P", "RM": "P", "RD": "P", "RNV": "F*P", "K": "E*M0", "V": "F*M0"},
}
ONE_PASS = """in Q[p,e], K[m,e], V[m,f]
rank m0 = 64
rank m1 = M // M0
init RM[0,p] = -inf
init RD[0,p] = 0
init RNV[0,p,f] = 0
iter m1:
  QK[m1,m0,p] = Q[p,e] * K[m1*M0+m0,e] :: sum(e)
  LM[m1,p] = QK[m1,m0,p] :: max(m0)
  RM[m1+1,p] = max(RM[m1,p], LM[m1,p])
  SLN[m1,m0,p] = exp(QK[m1,m0,p] - RM[m1+1,p])
  PRM[m1,p] = exp(RM[m1,p] - RM[m1+1,p])
  SLD[m1,p] = SLN[m1,m0,p] :: sum(m0)
  RD[m1+1,p] = PRM[m1,p] * RD[m1,p] + SLD[m1,p]
  SLNV[m1,p,f] = SLN[m1,m0,p] * V[m1*M0+m0,f] :: sum(m0)
  RNV[m1+1,p,f] = PRM[m1,p] * RNV[m1,p,f] + SLNV[m1,p,f]
end
AV[p,f] = RNV[M1,p,f] / RD[M1,p]
out AV"""


@pytest.mark.parametrize("order", FIGURES)
def test_the_one_pass_cascade_keeps_the_published_figures(order: str) -> None:
    assert kept_of(parse(ONE_PASS), *order.split(", ")) == FIGURES[order]


def test_with_queries_outermost_a_query_of_the_one_pass_cascade_keeps_the_same_for_any_length() -> None:
    best = loop_orders(load("softmax_1p")).best
    assert best is not None and best.order == ("B", "H", "P", "M1")
    assert str(best.total_of(("B", "H", "P"))) == "E + F + 2"
    assert [k.tensor for k in best.by_rows["B", "H", "P"]] == ["Q", "RM", "RD", "RNV"]
    assert best.read_again(("B", "H")) == "P"
    assert str(best.computed) == "F + 2"


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_what_is_kept_is_what_lives_from_step_to_step(first: int) -> None:
    for seed in range(first, first + 50):
        cascade = random_nest(seed)
        expansion, rng = Expansion(cascade, EXTENTS), random.Random(seed)
        variables = list(rank_names(cascade))
        for _ in range(3):
            order = tuple(rng.sample(variables, rng.randint(1, len(variables))))
            nest = nest_of(cascade, order)
            assert nest is not None and list(nest.stages) == expansion.stages(order), f"{cascade}\n{order}"
            live = expansion.most_live(order, nest.stages)
            kept = kept_at(cascade, nest, EXTENTS)
            assert {t: n for t, n in live.items() if n} == kept, f"{cascade}\n{order}\n{nest}"


NAMED = {
    "softmax_attention": ({"b": 1, "h": 2, "p": 3, "e": 2, "m": 4, "f": 2}, [*permutations("pmef"), ("h", "p", "m")]),
    "softmax_1p": (
        {"b": 1, "h": 1, "p": 3, "e": 2, "m": 6, "m0": 2, "f": 2},
        [("p", "m1"), ("m1", "p"), ("p", "m1", "m0"), ("m1", "p", "f", "m0", "e"), ("p", "m1", "e", "m0", "f")],
    ),
    "linattn": ({"t": 4, "e": 2, "f": 3}, [*permutations("tef")]),
    "gqa": ({"b": 1, "g": 2, "r": 2, "p": 3, "m": 3, "e": 2, "f": 2}, [("g", "r", "p", "m"), ("m", "r", "p")]),
    "splitkv": ({"h": 2, "e": 2, "m": 6, "f": 2, "j": 2}, [("h", "s"), ("s",), ("s", "j")]),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_named_cascades_keep_lives_from_step_to_step(name: str) -> None:
    cascade, (given, orders) = load(name), NAMED[name]
    numbers = numbers_of(cascade, given)
    expansion = Expansion(cascade, numbers)
    for order in orders:
        nest = nest_of(cascade, order)
        assert nest is not None and expansion.is_legal(order, nest.stages)
        live = expansion.most_live(order, nest.stages)
        assert {t: n for t, n in live.items() if n} == kept_at(cascade, nest, numbers), f"{order}\n{nest}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_a_nest_of_any_cascade_is_legal_and_keeps_all_that_lives(first: int) -> None:
    # Gathers, windows, prefixes, fixed and reversed places, culled points: more may be kept than lives, never less.
    for seed in range(first, first + 100):
        cascade = random_cascade(seed)
        if any(e.is_fiberwise for e in cascade.einsums):
            continue
        defined = {r.name for r in cascade.ranks}
        numbers = numbers_of(cascade, {v: 4 if v == "m" else 2 for v in rank_names(cascade) if v not in defined})
        expansion, rng = Expansion(cascade, numbers), random.Random(seed)
        walked = list(dict.fromkeys(v for x in lines(cascade) for v in x.space))
        if not walked or len(expansion.points) > 5000:
            continue
        order = tuple(rng.sample(walked, rng.randint(1, min(3, len(walked)))))
        nest = nest_of(cascade, order)
        if nest is None:
            continue
        assert expansion.is_legal(order, nest.stages), f"{cascade}\n{order}\n{nest}"
        kept = kept_at(cascade, nest, numbers)
        live = expansion.most_live(order, nest.stages)
        assert all(n <= kept.get(t, 0) for t, n in live.items()), f"{cascade}\n{order}\n{nest}"


def test_a_loop_that_a_recurrence_runs_through_cannot_stand_outside_it() -> None:
    text = """in K[t,e], V[t,f]
    init S[0,e,f] = 0
    iter t:
      R[t,f] = K[t,e] * S[t,e,f] :: sum(e)
      S[t+1,e,f] = S[t,e,f] + K[t,e] * (V[t,f] - R[t,f])
    end
    out S"""
    found = loop_orders(parse(text), loops=("T", "E"))
    assert (found.tried, [o.order for o in found.orders]) == (2, [("T", "E")])


def test_a_nest_prints_as_loops() -> None:
    assert order_of(load("softmax_attention"), "P", "M").nest == (
        "for p:\n  for m:\n    QK, GM\n  for m:\n    SN, SD\n  for m:\n    A, AV"
    )


def test_the_four_causes_are_named() -> None:
    kept: dict[str, Kept] = {k.tensor: k for k in order_of(parse(ONE_PASS), "P", "M1").kept}
    assert (kept["K"].cause, kept["RM"].cause) == ("shared", "carried")
    kept = {k.tensor: k for k in order_of(load("softmax_attention"), "P", "M").kept}
    assert (kept["QK"].cause, kept["GM"].cause, kept["AV"].cause) == ("between loops", "between loops", "reduced")


def test_einsums_that_share_a_nest_take_the_others_results_as_inputs() -> None:
    found = loop_orders(load("softmax_attention"), einsums=("SN", "SD"), loops=("P", "M")).orders
    kept = {k.tensor: k for k in next(o for o in found if o.order == ("P", "M")).kept}
    assert kept["GM"].is_input and set(kept) == {"GM", "SD"}


def test_two_ways_through_a_rank_are_two_loops() -> None:
    text = """in X[m]
    init U[0] = 0
    iter m:
      U[m+1] = U[m] + X[m]
    end
    init D[M] = 0
    iter m desc:
      D[m] = D[m+1] + X[m]
    end
    out U, D"""
    nest = nest_of(parse(text), ("m",))
    assert nest is not None and str(nest) == "U, D\nfor m:\n  U\nfor m:\n  D"
    assert kept_at(parse(text), nest, {"M": 5}) == {"X": 5, "U": 1, "D": 1}


def test_the_last_generation_is_kept_though_no_step_reads_the_one_before() -> None:
    text = "in X[m]\ninit U[0] = 0\niter m:\n  U[m+1] = 2 * X[m]\nend\nY = U[M]\nout Y"
    nest = nest_of(parse(text), ("m",))
    assert nest is not None and kept_at(parse(text), nest, {"M": 5}) == {"U": 1}


def test_no_more_than_five_loops_are_permuted() -> None:
    ranks = "abcdefg"
    rotated = [ranks[k:] + ranks[:k] for k in range(2)]
    text = "in X[a,b,c,d,e,f,g], Y[a,b,c,d,e,f]\nZ = X[a,b,c,d,e,f,g] * Y[a,b,c,d,e,f] :: sum(a,b,c,d,e,f,g)\nout Z"
    found = loop_orders(parse(text), loops=[v.upper() for v in rotated[0]])
    assert found.tried == 120 and len(found.whole) == 2


def test_the_least_order_is_proved_where_it_can_be() -> None:
    assert loop_orders(load("softmax_attention")).is_settled
    text = "in X[a,b], Y[a], Z[b]\nS[a] = X[a,b] * Y[a] :: sum(b)\nT[b] = X[a,b] * Z[b] :: sum(a)\nout S, T"
    found = loop_orders(parse(text), extents={"A": 4, "B": 100})
    assert not found.is_settled and found.best is not None and found.best.order == ("B", "A")
    turned = loop_orders(parse(text), extents={"A": 100, "B": 4}).best
    assert turned is not None and turned.order == ("A", "B")


def test_unknown_loops_and_einsums_are_errors() -> None:
    with pytest.raises(UnknownRankError, match="did you mean 'M'"):
        loop_orders(load("softmax_attention"), loops=("m",))
    with pytest.raises(InputError, match="no Einsum of the cascade 'softmax_attention' computes K"):
        loop_orders(load("softmax_attention"), einsums=("K",))
