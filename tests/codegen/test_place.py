"""Einsums lie where their data is ready: loops, segments, products of tiles and masks of lowered kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given

from einsumcascade.codegen.kernel_ir import Dot, Load, Loop, Map, Reduce, Stmt, Store, TileKernel
from einsumcascade.codegen.place import lower
from einsumcascade.errors import LoweringError
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.loop_form import loop_form
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.program import Kernel, bounded_variables
from einsumcascade.schedules.roles import padded
from tests.strategies import Case, cases, examples, tile_schedule

SOFTMAX = """\
in Q[p,e], K[m,e], V[m,f]
{constraint}
S[p,m] = Q[p,e] * K[m,e] :: sum(e)
GM[p] = S[p,m] :: max(m)
SN[p,m] = exp(S[p,m] - GM[p])
SD[p] = SN[p,m] :: sum(m)
O[p,f] = {weight} * V[m,f] :: sum(m)
out O
"""
SIZES = {"P": 64, "M": 96, "E": 16, "F": 16}


def lowered(cascade: Cascade, extents: Mapping[str, int], tiles: tuple[int, ...]) -> list[tuple[Kernel, TileKernel]]:
    """The kernels of a cascade, each as a cascade and as a tree."""
    simple = simplify(cascade).cascade
    binding = bind(simple, extents=extents)
    program = partition(simple, bounded=bounded_variables(simple, binding.extents))
    schedule = tile_schedule(program, tiles)
    return [(k, lower(k, program, schedule.kernels[k.name], binding)) for k in program.kernels]


def kernels(text: str, extents: dict[str, int] | None = None, tiles: tuple[int, ...] = (16, 16)) -> list[TileKernel]:
    cascade = parse(text, name="t.cascade")
    given_extents = {rank_of(v): (extents or SIZES)[rank_of(v)] for i in cascade.inputs for v in i.indices}
    return [made for _, made in lowered(cascade, given_extents, tiles)]


def softmax(weight: str = "SN[p,m] / SD[p]", constraint: str = "") -> TileKernel:
    (found,) = kernels(SOFTMAX.format(weight=weight, constraint=constraint))
    return found


def all_statements(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    for s in body:
        yield s
        if isinstance(s, Loop):
            for g in s.segments:
                yield from all_statements(g.body)


def loops(kernel: TileKernel) -> list[Loop]:
    return [s for s in kernel.body if isinstance(s, Loop)]


def test_softmax_is_one_loop_with_three_states_and_one_store_after_it() -> None:
    found = softmax()
    (loop,) = loops(found)
    assert all(len(g.carries) == 3 for g in loop.segments)
    stores = [s for s in found.body if isinstance(s, Store)]
    assert [s.tensor for s in stores] == ["O"] and found.body.index(stores[0]) > found.body.index(loop)


def test_a_weight_that_does_not_stream_takes_a_second_loop() -> None:
    assert len(loops(softmax("relu(SN[p,m] / SD[p] - 0.1)"))) == 2


def test_both_products_are_products_of_tiles_and_the_second_accumulates() -> None:
    (loop,) = loops(softmax())
    for g in loop.segments:
        scores, values = (s for s in g.body if isinstance(s, Dot))
        assert scores.over == "e" and scores.accumulate is None
        assert values.over == "m0" and values.accumulate is not None


def test_what_does_not_move_is_loaded_before_the_loop() -> None:
    found = softmax()
    before = [s.tensor for s in found.body if isinstance(s, Load)]
    inside = {s.tensor for g in loops(found)[0].segments for s in g.body if isinstance(s, Load)}
    assert before == ["Q"] and inside == {"K", "V"}


def test_a_causal_mask_makes_a_full_run_and_a_tested_one() -> None:
    (loop,) = loops(softmax(constraint="constraint m <= p"))
    assert [bool(g.tested) for g in loop.segments] == [False, True]


def test_a_window_makes_three_runs() -> None:
    (loop,) = loops(softmax(constraint="constraint m <= p, p - m < 40"))
    assert [bool(g.tested) for g in loop.segments] == [True, False, True]


def test_a_full_run_masks_no_reduction() -> None:
    (loop,) = loops(softmax(constraint="constraint m <= p"))
    full = next(g for g in loop.segments if not g.tested)
    assert not any("select" in str(s.expr) and "<=" in str(s.expr) for s in full.body if isinstance(s, Reduce | Map))


def test_a_sum_of_anything_but_a_product_of_two_tiles_is_a_reduction() -> None:
    (found,) = kernels(
        "in X[p,e], K[m,e], V[m,f]\nS[p,m] = (X[p,e] - K[m,e]) ** 2 :: sum(e)\n"
        "O[p,f] = S[p,m] * V[m,f] :: sum(m)\nout O\n"
    )
    over = [s.over for s in all_statements(found.body) if isinstance(s, Reduce)]
    assert ("e",) in over


def test_a_whole_rank_is_padded_to_a_power_of_two_and_its_loads_are_masked() -> None:
    (found,) = kernels(SOFTMAX.format(weight="SN[p,m]", constraint=""), {**SIZES, "E": 17, "F": 3})
    assert (found.axes["e"].size, found.axes["f"].size) == (32, 16)
    for s in all_statements(found.body):
        if isinstance(s, Load) and s.tensor in ("Q", "K"):
            assert any(str(c) == "e < E" for c in s.mask)


@pytest.mark.parametrize(("extent", "size"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128), (256, 256)])
def test_padding(extent: int, size: int) -> None:
    assert padded(extent) == size


def test_lengths_are_arguments_and_features_are_fixed() -> None:
    (found,) = kernels(SOFTMAX.format(weight="SN[p,m]", constraint=""), {**SIZES, "E": 17, "F": 3})
    assert set(found.lengths) == {"P", "M"}
    assert {r: found.fixed[r] for r in ("E", "F")} == {"E": 17, "F": 3}


def test_a_nested_iteration_is_refused() -> None:
    text = (
        "in X[p,m,n]\ninit R[p,0,0] = 0\nrank i = M\nrank j = N\niter i:\n  iter j:\n"
        "    R[p,i,j+1] = R[p,i,j] + X[p,i,j]\n  end\nend\nY[p] = R[p,0,N]\nout Y\n"
    )
    with pytest.raises(LoweringError) as caught:
        kernels(text, {"P": 4, "M": 3, "N": 3})
    assert caught.value.diagnostics[0].code == "not-lowered-yet"


@examples(60)
@given(cases())
def test_a_kernel_has_as_many_loops_as_its_loop_form(case: Case) -> None:
    for k, made in lowered(case.cascade, case.extents, case.tiles):
        wanted = loop_form(k.cascade, over=k.loops, tile=16).loops if k.loops else 0
        assert len(loops(made)) == wanted


@examples(60)
@given(cases())
def test_every_value_is_made_before_it_is_read_and_every_output_is_stored_once(case: Case) -> None:
    for _, made in lowered(case.cascade, case.extents, case.tiles):
        defined: set[str] = set()

        def go(body: tuple[Stmt, ...], defined: set[str]) -> None:
            for s in body:
                match s:
                    case Dot():
                        assert {s.left.name, s.right.name} <= defined
                        defined.add(s.value.name)
                    case Load() | Map() | Reduce():
                        defined.add(s.value.name)
                    case Loop():
                        for g in s.segments:
                            assert {c.name for c in g.carries} <= defined
                            inside = set(defined)
                            go(g.body, inside)
                    case Store():
                        pass

        go(made.body, defined)
        stored = [s.tensor for s in all_statements(made.body) if isinstance(s, Store)]
        assert sorted(stored) == sorted(made.outputs)
