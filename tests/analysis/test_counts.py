"""Counts of operations and of the least traffic."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.analysis.counts import (
    CONTRACTION,
    Count,
    count_operations,
    evaluate_extents,
    index_tensors,
    number,
    volume,
)
from einsumcascade.analysis.operations import matrix_product
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


def test_a_running_maximum_costs_one_more_exponential_for_each_tile_of_a_row() -> None:
    one, two = (count_operations(load(name)).total("exp") for name in ("softmax_1p", "softmax_2p"))
    assert str(two) == "B*H*M*P"
    assert str(one) == "B*H*M0*M1*P + B*H*M1*P"
    for tile in (1, 4, 32):
        at = EXTENTS | {"M0": tile, "M1": 32 // tile}
        # M*P becomes M*P*(1 + 1/M0).
        assert one.at(at) * tile == two.at(at) * (tile + 1)


def test_one_pass_costs_f_plus_one_more_multiply_adds_for_each_tile_of_a_row() -> None:
    rows = {e.tensor: e for e in count_operations(load("softmax_1p")).einsums}
    assert str(rows["RD"].multiply_add + rows["RNV"].multiply_add) == "B*F*H*M1*P + B*H*M1*P"
    one, two = (count_operations(load(name)).total("multiply_add").at(EXTENTS) for name in ("softmax_1p", "softmax_2p"))
    # Beside these, one subtraction in the exponent of each rescale.
    each = EXTENTS["B"] * EXTENTS["H"] * EXTENTS["P"] * EXTENTS["M1"]
    assert one - two == each * (EXTENTS["F"] + 1) + each


def test_rescaling_in_tiles_of_256_adds_four_in_a_thousand_to_the_products_with_values() -> None:
    rows = {e.tensor: e for e in count_operations(load("softmax_1p")).einsums}
    at = {"B": 1, "H": 1, "P": 1, "M0": 256, "M1": 16, "E": 64, "F": 64}
    more = (rows["RD"].multiply_add + rows["RNV"].multiply_add).at(at)
    assert 0.0039 < more / rows["SLNV"].multiply_add.at(at) < 0.0041


def test_what_an_iterative_block_does_counts_for_every_step() -> None:
    text = "in X[t,e]\ninit S[0,e] = 0\niter t:\nS[t+1,e] = S[t,e] * 0.5 + exp(X[t,e])\nend\nout S"
    assert count_operations(parse(text)).einsums[0].to_dict() == {"multiply_add": "E*T", "exp": "E*T"}


def test_a_top_k_compares_each_element_with_each_slot() -> None:
    found = count_operations(parse("in S[p,m]\nrank j = 4\nI[p,j] = 2 * S[p,m] :: topk(m)\nout I"))
    assert found.einsums[0].to_dict() == {"multiply_add": "M*P", "other": "J*M*P"}
    assert [(t.tensor, t.dtype, str(t.bytes)) for t in found.traffic(dtype="float16")] == [
        ("S", "float16", "2*M*P"),
        ("I", "int32", "4*J*P"),
    ]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_a_linear_system_counts_the_steps_of_an_elimination(n: int, columns: int, matrices: int) -> None:
    found = count_operations(parse("in A[t,i,j], B[t,i,c]\nX[t,j,c] = solve(A[t,i,j], B[t,i,c])\nout X"))
    steps = {"multiply_add": 0, "divide": 0}
    for _ in range(matrices):
        for pivot in range(n):
            for _row in range(pivot + 1, n):
                steps["divide"] += 1
                steps["multiply_add"] += len(range(pivot + 1, n))
        for _ in range(columns):
            for row in range(n):
                steps["multiply_add"] += len(range(row))
            for row in reversed(range(n)):
                steps["multiply_add"] += len(range(row + 1, n))
                steps["divide"] += 1
    at = {"T": matrices, "I": n, "J": n, "C": columns}
    assert {kind: found.total(kind).at(at) for kind in steps} == steps


@given(st.integers(1, 9), st.integers(1, 4))
def test_a_triangular_system_counts_its_substitutions(n: int, columns: int) -> None:
    found = count_operations(parse("in L[t,p,m], B[m,d]\nX[t,p,d] = trisolve(L[t,p,m], 3 * B[m,d])\nout X"))
    substitutions = sum(len(range(row)) for row in range(n))
    at = {"T": 2, "P": n, "M": n, "D": columns}
    assert found.total("multiply_add").at(at) == 2 * columns * substitutions + n * columns
    assert not found.total("divide")


def test_a_third_of_a_cube_is_part_of_a_whole_count() -> None:
    found = count_operations(parse("in A[i,j], B[i]\nX[j] = solve(A[i,j], B[i])\nout X")).total("multiply_add")
    assert str(found) == "I**3/3 + I**2/2 - 5*I/6"
    assert found.sympy().subs(dict.fromkeys(found.sympy().free_symbols, 7)) == found.at({"I": 7})


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("in A[i,k] B[k,j]\nC[i,j] = A[i,k] * B[k,j]\nout C", ("i", "k", "j")),
        ("in A[h,i,k] B[h,k,j] W[k]\nC[h,i,j] = 2 * A[h,i,k] * B[h,k,j] / W[k] :: sum(k)\nout C", ("i", "k", "j")),
        ("in A[i,k] B[k,j] D[i]\nC[i,j] = exp(A[i,k] - D[i]) * B[k,j] :: sum(k)\nout C", ("i", "k", "j")),
        ("in A[i,k] B[j]\nC[i,j] = A[i,k] * B[j] :: sum(k)\nout C", None),
        ("in A[i,k] B[k]\nC[i] = A[i,k] * B[k] :: sum(k)\nout C", None),
        ("in A[i,k] B[k,j]\nC[i,j] = A[i,k] + B[k,j] :: sum(k)\nout C", None),
        ("in A[i,k] B[k,j]\nC[i,j] = A[i,k] * B[k,j] :: max(k)\nout C", None),
        ("in A[i,k] B[k,j] D[i,j]\nC[i,j] = A[i,k] * B[k,j] * exp(D[i,j] - k) :: sum(k)\nout C", None),
    ],
)
def test_a_matrix_unit_takes_sums_of_products_of_two_matrices(text: str, axes: tuple[str, str, str] | None) -> None:
    (einsum,) = parse(text).einsums
    assert matrix_product(einsum) == axes


def test_both_products_of_attention_are_contractions() -> None:
    assert str(count_operations(load("softmax_2p")).total(CONTRACTION)) == "B*E*H*M*P + B*F*H*M*P"


def test_bytes_are_inputs_once_and_outputs_once() -> None:
    found = count_operations(parse("in A[m,k] B[k]\nC[m] = A[m,k] * B[k]\nout C: float32"))
    assert found.bytes(dtype="bfloat16").at({"M": 10, "K": 7}) == 2 * (70 + 7) + 4 * 10
    with pytest.raises(InputError, match="unknown-dtype"):
        found.bytes(dtype="int7")


def test_traffic_names_each_tensor_once() -> None:
    found = count_operations(load("paged")).traffic(dtype="bfloat16")
    assert {t.tensor: (t.is_output, t.dtype, str(t.bytes)) for t in found} == {
        "Q": (False, "bfloat16", "2*E*H"),
        "KP": (False, "bfloat16", "2*E*H*X"),
        "VP": (False, "bfloat16", "2*F*H*X"),
        "TAB": (False, "int32", "4*B*T"),
        "LEN": (False, "int32", "4*B"),
        "AV": (True, "bfloat16", "2*B*F*H"),
    }


def test_positions_are_what_stands_in_indices_and_conditions_alone() -> None:
    text = (
        "in X[m,f], T[p], D[m], W[m], Z[m]\nconstraint D[m] > 0\n"
        "Y[p,f] = X[T[p],f] * W[m] + select(Z[m] > 1, 1, W[m]) :: sum(m) where W[m] > 0\nout Y"
    )
    assert index_tensors(parse(text)) == ("T", "D", "Z")


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


def test_an_input_that_gives_an_extent_alone_is_not_read() -> None:
    found = count_operations(parse("in X[t], N[k]\nY = X[t] * K :: sum(t)\nout Y"))
    assert str(found.bytes(dtype="float32")) == "4*T + 4"
