"""The random cascades keep to their class, and its kinds come in the shares that the property tests count on."""

from __future__ import annotations

from functools import cache

import pytest

from einsumcascade.language.ir import reads
from einsumcascade.language.parser import parse
from tests.strategies import Case, close, loops_of, random_case, sample

COUNT = 200


@cache
def fixed() -> tuple[Case, ...]:
    return tuple(sample(COUNT))


@cache
def loops() -> tuple[int, ...]:
    return tuple(loops_of(c.cascade) for c in fixed())


def test_a_seed_always_gives_the_same_case() -> None:
    assert random_case(7) == random_case(7)
    assert len({c.text for c in fixed()}) > 0.9 * COUNT


def test_every_cascade_has_a_contraction() -> None:
    for c in fixed():
        assert any(e.reduce == "sum" and len(reads(e.expr)) > 1 for e in c.cascade.einsums), c.text


def test_every_cascade_chains_two_reductions_over_a_rank() -> None:
    for c in fixed():
        over_m = {e.tensor for e in c.cascade.einsums if "m" in e.ranks}
        behind: dict[str, set[str]] = {}
        for e in c.cascade.einsums:
            behind[e.tensor] = {x for r in reads(e.expr) for x in (r.tensor, *behind.get(r.tensor, ()))}
        assert any(behind[t] & over_m for t in over_m), c.text


def test_half_of_the_cascades_are_masked() -> None:
    assert 0.4 * COUNT <= sum(bool(c.cascade.constraints) for c in fixed()) <= 0.6 * COUNT


def test_a_third_of_the_cascades_have_a_second_output() -> None:
    assert 0.25 * COUNT <= sum(len(c.cascade.outputs) > 1 for c in fixed()) <= 0.45 * COUNT


def test_at_least_half_of_the_cascades_stream_and_a_fifth_need_a_second_loop() -> None:
    assert sum(n == 1 for n in loops()) >= 0.5 * COUNT
    assert 0.15 * COUNT <= sum(n == 2 for n in loops()) <= 0.45 * COUNT


def test_there_are_batches_groups_pairs_of_keys_and_single_queries() -> None:
    ranks = [{v for e in c.cascade.einsums for v in e.space} for c in fixed()]
    for wanted in ("b", "h", "g", "n"):
        assert sum(wanted in r for r in ranks) >= 5, wanted
    assert sum("p" not in r for r in ranks) >= 3


@pytest.mark.parametrize("rank", ["P", "M", "E", "F"])
def test_extents_are_one_and_on_both_sides_of_a_tile(rank: str) -> None:
    found = {c.extents[rank] for c in fixed() if rank in c.extents}
    assert 1 in found and any(1 < n < 16 for n in found) and any(n > 16 for n in found)


def test_texts_print_and_parse_back() -> None:
    for c in fixed():
        assert parse(str(c.cascade), name="random.cascade") == c.cascade


def test_inputs_repeat_and_fit_their_declarations() -> None:
    for c in fixed()[:20]:
        first, again = c.inputs(), c.inputs()
        for i in c.cascade.inputs:
            assert first[i.tensor].shape == tuple(c.extents[v.upper()] for v in i.indices)
            assert close(first[i.tensor], again[i.tensor], rel=0.0)
