"""The sweep against the definition, element by element: every text there is, and random cascades."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from einsumcascade.analysis.dependence import partitions, whole_ranks
from einsumcascade.analysis.passes import count_passes
from einsumcascade.analysis.places import Ground
from einsumcascade.analysis.sweep import sweep
from einsumcascade.analysis.unroll import Unrolled
from einsumcascade.gallery import load, names
from einsumcascade.language.ir import Cascade, Iter, rank_of, walk
from einsumcascade.language.parser import parse
from tests.analysis.element_points import Expansion
from tests.analysis.pass_oracle import (
    MOST,
    level_of_by_definition,
    levels_by_definition,
    passes_by_definition,
)
from tests.analysis.published import EXAMPLES, PUBLISHED
from tests.analysis.random_cascades import random_cascade
from tests.analysis.tiny_extents import Text
from tests.nightly import NIGHTLY

TEXTS = Path(__file__).resolve().parents[1] / "texts"
SEEDS = 1000
# The definition keeps places along a rank as bits of a word; `rank c = E + E*E` has more of them at any odd E above 6.
LONGEST = 61
# To the sweep every point of an Einsum reads all branches of a `select`: in these, what one branch looks up is complete
# only after a pass that another branch makes, and the definition, which sees that no point reads both, counts one less.
BRANCHES = {("local_quadratic", "e"): {"Q": 1, "K": 1}}


def named() -> Iterator[Cascade]:
    """The gallery, the other texts of the tests, and the published cascades."""
    yield from (load(n) for n in names())
    yield from (load(p) for p in sorted(TEXTS.glob("*.cascade")))
    yield from (parse(p.text, name=n) for n, p in PUBLISHED.items())


def compare(cascade: Cascade, ranks: tuple[str, ...], *, steps: int) -> int:
    """Compare every tensor's passes and the levels over some ranks; return the number of tensors and ranks."""
    text, pairs = Text(cascade), 0
    for v in ranks:
        expansion = Expansion(text, v, steps=steps)
        if expansion.last > LONGEST:
            assert cascade.name == "local_quadratic" and v in ("c", "i")
            continue
        ground = Ground(cascade, partitions(cascade)[v])
        blocks = {s.var for s in walk(cascade.body) if isinstance(s, Iter)} - {*ground.along}
        unrolled = Unrolled(ground, {w: expansion.extent(w) for w in blocks})

        def number(family: frozenset[str], unrolled: Unrolled = unrolled) -> int:
            found = sweep(unrolled, family=family)
            return MOST if found.endless else min(found.count, MOST)

        expected = passes_by_definition(expansion)
        for tensor in ground.shape:
            if ground.is_full(tensor):
                found = max(map(number, unrolled.fibers(tensor)), default=0)
                found = max(found, int(tensor in text.used))
                more = BRANCHES.get((cascade.name, v), {}).get(tensor, 0)
                assert found == expected[tensor] + more, f"{tensor} over {rank_of(v)} in\n{cascade}"
                pairs += 1
        levels = levels_by_definition(expansion)
        assert max(number(frozenset()), int(pairs > 0 and bool(expected))) == levels, f"levels of {v} in\n{cascade}"
        # A solve is written out as sums that the cascade does not name, and some Einsums have no live point.
        loops = sweep(unrolled, family=frozenset()).level_of
        up = {t: n for t, n in level_of_by_definition(expansion).items() if t in loops}
        # With iterations over other ranks an Einsum has a level in each step.
        if max(up.values(), default=0) == levels < MOST and not blocks:
            assert {t: loops[t] for t in up} == up, f"levels of {v} in\n{cascade}"
    return pairs


def test_the_sweep_counts_what_the_definition_does_on_thousands_of_tensors_and_ranks() -> None:
    pairs = sum(compare(c, whole_ranks(c), steps=2) for c in named())
    for seed in range(SEEDS if NIGHTLY else SEEDS // 5):
        # Where M is read elsewhere than where Einsums stand, other ranks see fibers that the sweep takes for one.
        plain = seed % 3 == 2
        cascade = random_cascade(seed, plain=plain)
        pairs += compare(cascade, ("m", "p", "f") if plain else ("m",), steps=2 + seed % 2)
    assert pairs >= (10_000 if NIGHTLY else 2_000)


@pytest.mark.parametrize("name", [c.name for c in named() if any(isinstance(s, Iter) for s in c.body)])
def test_the_formula_holds_for_any_number_of_steps(name: str) -> None:
    cascade = next(c for c in named() if c.name == name)
    text = Text(cascade)
    for v in whole_ranks(cascade):
        found = count_passes(cascade, rank=rank_of(v))
        for steps in (2, 3, 5):
            expansion = Expansion(text, v, steps=steps)
            expected = passes_by_definition(expansion)
            assert min(found.at(expansion.numbers), MOST) == max(expected.values(), default=found.passes)
            more = sum(n * (expansion.numbers[r] - 1) for r, n in found.level_per_step)
            assert min(found.levels + more, MOST) == levels_by_definition(expansion)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_counts_as_it_should_and_as_the_definition_says(name: str) -> None:
    example = EXAMPLES[name]
    cascade = parse(example.text)
    found = count_passes(cascade, rank=example.rank)
    assert {t: dict(found.families)[t] for t in example.passes} == dict(example.passes)
    assert (found.levels, found.formula) == (example.levels, example.formula or str(found.passes))
    compare(cascade, (example.rank.lower(),), steps=3)
