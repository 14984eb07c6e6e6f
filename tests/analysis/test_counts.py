"""Counts of operations and of the least traffic."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.analysis.counts import Count, count_operations, evaluate_extents, number, volume
from einsumcascade.errors import InputError
from einsumcascade.gallery import load
from einsumcascade.language.parser import parse

EXTENTS = {"B": 2, "H": 3, "P": 5, "M": 32, "E": 8, "F": 16, "M0": 4, "M1": 8}


def test_a_contraction_is_one_multiply_add_a_point() -> None:
    found = count_operations(parse("in A[m,k] B[k,n]\nC[m,n] = A[m,k] * B[k,n]\nout C"))
    assert found.einsums[0].to_dict() == {"multiply_add": "K*M*N"}


def test_a_factor_without_the_reduced_rank_stands_outside_the_sum() -> None:
    found = count_operations(parse("in A[m,k]\nconst c = 2\nC[m] = A[m,k] * A[m,k] * c :: sum(k)\nout C"))
    assert found.einsums[0].to_dict() == {"multiply_add": "K*M + M"}


def test_a_product_that_is_added_counts_once() -> None:
    found = count_operations(parse("in A[m] B[m] C[m]\nD[m] = A[m] * B[m] + C[m]\nout D"))
    assert found.einsums[0].to_dict() == {"multiply_add": "M"}


def test_a_subexpression_counts_on_the_ranks_it_has() -> None:
    found = count_operations(parse("in A[m,k] G[m]\nC[m] = A[m,k] - exp(G[m]) :: max(k)\nout C"))
    assert found.einsums[0].to_dict() == {"multiply_add": "K*M", "exp": "M", "max": "K*M"}


def test_index_expressions_and_conditions_are_no_operations() -> None:
    found = count_operations(parse("in A[m]\nrank j = 3\nC[m] = A[m-j] :: max(j) where m - j >= 0\nout C"))
    assert found.einsums[0].to_dict() == {"max": "J*M"}


def test_a_mean_divides_once_for_each_result() -> None:
    found = count_operations(parse("in A[m,k]\nC[m] = A[m,k] :: mean(k)\nout C"))
    assert found.einsums[0].to_dict() == {"multiply_add": "K*M", "divide": "M"}


def test_deferring_the_division_makes_as_many_as_there_are_outputs() -> None:
    assert str(count_operations(load("softmax_attention")).total("divide")) == "B*H*M*P"
    assert str(count_operations(load("softmax_2p")).total("divide")) == "B*F*H*P"


def test_one_pass_costs_one_more_exponential_a_tile_and_f_plus_one_more_multiply_adds() -> None:
    one, two = (count_operations(load(name)) for name in ("softmax_1p", "softmax_2p"))
    rows = EXTENTS["B"] * EXTENTS["H"] * EXTENTS["P"]
    assert one.total("exp").at(EXTENTS) == rows * EXTENTS["M"] * (4 + 1) // 4
    more = one.total("multiply_add").at(EXTENTS) - two.total("multiply_add").at(EXTENTS)
    # F + 1 for the running sums, and one subtraction inside the rescale.
    assert more == rows * EXTENTS["M1"] * (EXTENTS["F"] + 1 + 1)


def test_bytes_are_inputs_once_and_outputs_once() -> None:
    found = count_operations(parse("in A[m,k] B[k]\nC[m] = A[m,k] * B[k]\nout C: float32"))
    assert found.bytes(dtype="bfloat16").at({"M": 10, "K": 7}) == 2 * (70 + 7) + 4 * 10
    with pytest.raises(InputError, match="unknown-dtype"):
        found.bytes(dtype="int7")


def test_an_iterative_output_has_one_generation_more() -> None:
    text = "in X[t,e]\ninit S[0,e] = 0\niter t:\nS[t+1,e] = S[t,e] + X[t,e]\nend\nout S"
    assert str(count_operations(parse(text)).outputs[0][1]) == "E*T + E"


def test_extents_defined_by_others_are_completed() -> None:
    assert evaluate_extents(load("softmax_1p"), {"M": 10, "M0": 4})["M1"] == 3
    assert "M1" not in evaluate_extents(load("softmax_1p"), {"P": 3})


def test_a_count_without_its_extents_has_no_value() -> None:
    with pytest.raises(InputError, match=r"the count K\*M has no value: K unknown"):
        volume(("m", "k")).at({"M": 3})


@given(st.lists(st.tuples(st.lists(st.sampled_from("ab"), max_size=3), st.integers(-3, 3)), max_size=4))
def test_counts_add_and_multiply_as_polynomials(parts: list[tuple[list[str], int]]) -> None:
    total = Count()
    for names, n in parts:
        total += volume(tuple(names)) * number(n)
    for a, b in product((1, 2, 5), repeat=2):
        at = {"A": a, "B": b}
        value = sum(n * math.prod(at[x.upper()] for x in names) for names, n in parts)
        assert total.at({"A": a, "B": b}) == value
        assert (total * total).at(at) == value * value


def test_a_count_is_the_same_polynomial_in_sympy() -> None:
    found = count_operations(load("softmax_2p")).total("multiply_add")
    expression = found.sympy()
    assert expression.is_polynomial()
    assert expression.subs({s: EXTENTS[s.name] for s in expression.free_symbols}) == found.at(EXTENTS)
