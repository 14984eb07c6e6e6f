"""Passes and levels: the published cascades, the rules one by one, and a greedy traversal of every element."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsumcascade.analysis.dependence import ancestors, carries, linear, partitions, producers, whole_ranks
from einsumcascade.analysis.passes import count_passes
from einsumcascade.errors import UnknownRankError
from einsumcascade.language.ir import Cascade, Einsum, reads, variables
from einsumcascade.language.parser import parse
from tests.analysis.published import LOCAL, PUBLISHED, QKV, RUNNING


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_published_cascades_holds(name: str) -> None:
    text, passes, levels = PUBLISHED[name]
    found = count_passes(parse(text), rank="M")
    assert (found.passes, found.levels) == (passes, levels)
    assert {b.boundary for b in found.barriers} == set(range(1, passes))
    assert found.summary_traversals == int(name.startswith("local max"))


def test_a_barrier_names_the_einsum_that_completes_and_the_one_that_waits() -> None:
    found = count_passes(parse(PUBLISHED["global max, immediate"].text), rank="M")
    assert [(b.boundary, b.producer, b.reader) for b in found.barriers] == [(1, "GM", "SN"), (2, "SD", "A")]
    assert str(found.barriers[0]) == "SN waits for GM: it reads GM[p], complete only after all of M"
    assert dict(found.level_of) == {"S": 1, "GM": 1, "SN": 2, "SD": 2, "A": 3, "AV": 3}


def test_a_barrier_behind_maps_names_the_reduction() -> None:
    text = QKV + "T[p] = S[p,m] :: max(m)\nG[p] = max(T[p], 0)\nN[p,m] = exp(S[p,m] - G[p])\nout N"
    (barrier,) = count_passes(parse(text), rank="M").barriers
    assert str(barrier) == "N waits for T: it reads G[p], which needs T, complete only after all of M"


def test_a_loop_over_tiles_is_a_summary_and_no_pass() -> None:
    found = count_passes(parse(PUBLISHED["local max, deferred"].text), rank="M")
    assert (found.passes, found.summary_traversals, found.parts) == (1, 1, ("M1", "M0"))
    assert found.summaries == ("PLM", "SD", "NV")


def test_an_einsum_over_the_whole_rank_waits_for_a_summary() -> None:
    found = count_passes(parse(LOCAL + "SN[m1,m0,p] = SLN[m1,m0,p] * PLM[m1,p]\nout SN"), rank="M")
    assert [(b.producer, b.reader) for b in found.barriers] == [("GM", "SN")]


def test_families_tell_what_each_tensor_costs() -> None:
    found = count_passes(parse(PUBLISHED["global max, immediate"].text), rank="M")
    assert dict(found.families) == {"K": 3, "V": 1, "S": 3, "SN": 2, "A": 1}


def test_an_unknown_rank_is_an_error_that_lists_the_ranks() -> None:
    with pytest.raises(UnknownRankError) as caught:
        count_passes(parse(PUBLISHED["cascade 1"].text), rank="N")
    assert str(caught.value) == (
        "UnknownRankError[unknown-rank]: the cascade 'cascade' has no rank 'N'\n"
        "   = rule: ranks are named in upper case; known: M\n"
        "   = docs/errors.md#unknown-rank"
    )
    with pytest.raises(UnknownRankError, match="did you mean 'M'"):
        count_passes(parse(PUBLISHED["cascade 1"].text), rank="m")


def test_partitions_are_found_from_exact_affine_reads() -> None:
    nested = parse("in X[m]\nrank a = 2\nrank b = 3\nrank c = M//6\nY[c,b,a] = X[(c*B+b)*A+a] * 1\nout Y")
    assert partitions(nested)["m"].parts == ("c", "b", "a")
    window = parse("in X[m]\nrank j = 3\nrank t = M//2\nY[t] = X[t*2+j] :: max(j)\nout Y")
    assert partitions(window)["m"].parts == ()
    assert whole_ranks(parse(LOCAL + "out SD")) == ("p", "e", "m", "f")


def test_dependence_helpers_follow_reads() -> None:
    cascade = parse(RUNNING)
    assert list(producers(cascade))[:2] == ["S", "LM"]
    assert "K" in ancestors(cascade, "AV") and "RM" in ancestors(cascade, "RM")
    assert "AV" not in ancestors(cascade, "AV")
    index = next(r for r in reads(producers(cascade)["S"].expr) if r.tensor == "K").indices[0]
    assert carries(index, "m1") and not carries(index, "p")
    assert [(t.variable, t.factors) for t in linear(index) or ()] == [("m1", ("M0",)), ("m0", ())]


SIZES = {"m": 3, "p": 2}


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """Draw a cascade of maps and reductions over the ranks m and p."""
    shapes: dict[str, str] = {"A": "m", "B": draw(st.sampled_from(["m", "mp", "p"])), "C": "mp"}
    lines = ["in " + " ".join(f"{t}[{','.join(s)}]" for t, s in shapes.items())]
    for k in range(draw(st.integers(1, 7))):
        used = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=3, unique=True))
        space = "".join(v for v in "mp" if any(v in shapes[t] for t in used))
        kept = "".join(v for v in space if draw(st.booleans()))
        text = " * ".join(t + (f"[{','.join(shapes[t])}]" if shapes[t] else "") for t in used)
        left = f"T{k}" + (f"[{','.join(kept)}]" if kept else "")
        gone = [v for v in space if v not in kept]
        lines.append(f"{left} = exp({text})" + (f" :: max({','.join(gone)})" if gone else ""))
        shapes[f"T{k}"] = kept
    return parse("\n".join([*lines, f"out T{k}"]))


def points(e: Einsum, sizes: dict[str, int]) -> list[dict[str, int]]:
    return [dict(zip(e.space, c, strict=True)) for c in product(*(range(sizes[v]) for v in e.space))]


def element(tensor: str, names: tuple[str, ...], at: dict[str, int]) -> tuple[object, ...]:
    return (tensor, *(at[v] for v in names))


def reads_family(e: Einsum, family: set[str]) -> bool:
    return any(r.tensor in family and "m" in variables(r) for r in reads(e.expr))


def family_of(cascade: Cascade, tensor: str) -> set[str]:
    family = {tensor}
    for e in cascade.einsums:
        if "m" in e.free and reads_family(e, family):
            family.add(e.tensor)
    return family


def passes_by_simulation(cascade: Cascade, tensor: str) -> int:
    """Traverse the fiber again and again, doing all that can be done at each element.

    The last element of a traversal may run ahead into the next; the fiber is long, so that this never adds up to one.
    """
    length = 12
    family = family_of(cascade, tensor)
    work = [(e, at) for e in cascade.einsums for at in points(e, {"m": length, "p": 1})]
    writes: dict[tuple[object, ...], set[int]] = {}
    for k, (e, at) in enumerate(work):
        writes.setdefault(element(e.tensor, e.free, at), set()).add(k)

    needs = [
        set().union(*(writes.get(element(r.tensor, variables(r), at), set()) for r in reads(e.expr))) for e, at in work
    ]
    places = [at["m"] if reads_family(e, family) else None for e, at in work]

    def settle(done: set[int], here: int | None) -> None:
        before = -1
        while len(done) > before:
            before = len(done)
            done |= {k for k in range(len(work)) if places[k] in (None, here) and needs[k] <= done}

    done: set[int] = set()
    settle(done, None)
    traversals = 0
    while len(done) < len(work):
        traversals += 1
        for here in range(length):
            settle(done, here)
    return traversals


@settings(max_examples=100, deadline=None)
@given(cascades())
def test_traversing_greedily_takes_exactly_the_passes(cascade: Cascade) -> None:
    found = dict(count_passes(cascade, rank="M").families)["C"]
    assert max(1, passes_by_simulation(cascade, "C")) == max(1, found), str(cascade)


@settings(max_examples=100, deadline=None)
@given(cascades())
def test_levels_are_at_least_the_passes(cascade: Cascade) -> None:
    for rank in ("M", "P"):
        found = count_passes(cascade, rank=rank)
        assert found.passes <= found.levels
        assert {b.boundary for b in found.level_barriers} == set(range(1, found.levels))


def test_the_passes_of_steps_leave_no_gap() -> None:
    from einsumcascade.gallery import load

    found = count_passes(load("sparsemax"), rank="M")
    assert found.levels == 3 and set(found.level_of.values()) == {1, 2, 3}
    assert [(b.boundary, b.reader) for b in found.level_barriers] == [(1, "TS"), (2, "W")]
