"""Operations on whole fibers: top-k and linear systems."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.errors import CascadeError, InputError
from einsumcascade.language.fiberwise import SolveForm, solve_form
from einsumcascade.language.parser import parse
from einsumcascade.reference import run

TOPK = "in X[p, m]\nrank j = 3\nI[p, j] = X[p, m] :: topk(m)\nout I"


def ranking(row: list[float], live: list[bool]) -> list[int]:
    """Positions by falling value, ties to the lower, what is not live last: by selecting one after the other."""
    left, out = list(range(len(row))), []
    while left:
        best = left[0]
        for k in left[1:]:
            if (live[k], row[k]) > (live[best], row[best]) if live[k] and live[best] else live[k] and not live[best]:
                best = k
        out.append(best)
        left.remove(best)
    return out


@given(st.lists(st.lists(st.integers(-3, 3).map(float), min_size=5, max_size=5), min_size=1, max_size=4))
def test_a_top_k_holds_positions_of_the_largest_with_ties_to_the_lower(rows: list[list[float]]) -> None:
    found = run(parse(TOPK), {"X": rows})["I"]
    assert found.tolist() == [ranking(row, [True] * 5)[:3] for row in rows]


@given(st.lists(st.lists(st.integers(-3, 3).map(float), min_size=5, max_size=5), min_size=5, max_size=5))
def test_culled_elements_come_last(rows: list[list[float]]) -> None:
    cascade = parse(TOPK.replace("out", "constraint m <= p\nout"))
    found = run(cascade, {"X": rows}, extents={"J": 5})["I"]
    assert found.tolist() == [ranking(row, [m <= p for m in range(5)]) for p, row in enumerate(rows)]


def test_infinite_values_have_their_place_before_what_is_culled() -> None:
    cascade = parse(TOPK.replace("out", "constraint m != 0\nout"))
    assert run(cascade, {"X": [[9.0, -np.inf, np.inf]]})["I"].tolist() == [[2, 1, 0]]


def test_a_condition_may_differ_from_slot_to_slot() -> None:
    cascade = parse("in X[m]\nrank j = 2\nI[j] = X[m] :: topk(m) where m >= j\nout I")
    assert run(cascade, {"X": [3.0, 1.0, 2.0]})["I"].tolist() == [0, 1]


def test_slots_may_stand_before_other_ranks() -> None:
    cascade = parse("in X[p, m]\nrank j = 2\nI[j, p] = X[p, m] :: topk(m)\nout I")
    assert run(cascade, {"X": [[1.0, 2.0, 0.0], [5.0, 3.0, 4.0]]})["I"].tolist() == [[1, 0], [0, 2]]


@pytest.mark.parametrize("left", ["X[b, i, f]", "X[f, b, i]"])
def test_a_solve_inverts_its_matrix_at_every_point_of_the_other_ranks(left: str) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((3, 4, 4)), rng.standard_normal((3, 4, 2))
    found = run(parse(f"in A[b, i, j], B[b, j, f]\n{left} = solve(A[b, i, j], B[b, j, f])\nout X"), {"A": a, "B": b})
    x = found["X"] if left == "X[b, i, f]" else found["X"].transpose(1, 2, 0)
    np.testing.assert_allclose(a @ x, b, atol=1e-12)


def test_right_side_and_result_may_have_either_rank_of_the_matrix() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((4, 4)), rng.standard_normal(4)
    want = np.linalg.solve(a, b)
    for left in ("i", "j"):
        for right in ("i", "j"):
            text = f"in A[i, j], B[k]\nC[{right}] = B[{right}]\nX[{left}] = solve(A[i, j], C[{right}])\nout X"
            found = run(parse(text + "\nrank z = K"), {"A": a, "B": b})["X"]
            np.testing.assert_allclose(found, want, rtol=1e-12)


def test_a_triangular_solve_uses_what_is_below_the_diagonal_only() -> None:
    rng = np.random.default_rng(3)
    lower, b = rng.standard_normal((5, 5)), rng.standard_normal((5, 2))
    found = run(parse("in L[p, m], B[m, d]\nY[p, d] = trisolve(L[p, m], B[m, d])\nout Y"), {"L": lower, "B": b})["Y"]
    np.testing.assert_allclose((np.eye(5) + np.tril(lower, -1)) @ found, b, atol=1e-12)


def test_a_culled_entry_of_a_matrix_is_zero() -> None:
    text = "in A[i, j], B[j]\nconstraint i == j\nX[i] = solve(A[i, j], B[j])\nout X"
    assert run(parse(text), {"A": [[2.0, 5.0], [7.0, 4.0]], "B": [2.0, 8.0]})["X"].tolist() == [1.0, 2.0]


def test_an_empty_system_has_an_empty_solution() -> None:
    text = "in A[i, j], B[j, f]\nX[i, f] = solve(A[i, j], B[j, f])\nout X"
    assert run(parse(text), {"A": np.zeros((0, 0)), "B": np.zeros((0, 3))})["X"].shape == (0, 3)


def test_the_form_of_a_system_is_read_off_its_ranks() -> None:
    (e,) = parse("in A[t, e, i], Q[t, i]\nX[t, e] = solve(A[t, e, i], Q[t, i])\nout X").einsums
    assert solve_form(e) == SolveForm(row="e", column="i", right="i", result="e")
    assert (e.ranks, e.reduction, e.is_fiberwise) == (("i",), None, True)


@pytest.mark.parametrize(
    "line",
    [
        "X[i] = solve(A[i, j], B[j]) + 1",
        "X[i] = solve(2 * A[i, j], B[j])",
        "X[i] = solve(A[i, j + 1], B[j])",
        "X[i] = solve(A[i, j], A[i, j])",
        "X[i, j] = solve(A[i, j], B[j])",
        "X[k] = solve(A[i, j], B[j])",
        "X[i] = solve(A[i, j], B[j]) :: sum(j)",
        "X[i] = B[i] where solve(A[i, i], B[i]) > 0",
        "init X[i] = solve(A[i, i], B[i])",
    ],
)
def test_what_is_no_linear_system_is_one_located_error(line: str) -> None:
    with pytest.raises(CascadeError) as caught:
        parse(f"in A[i, j], B[j]\nrank k = 2\n{line}\nout X")
    assert "solve-form" in caught.value.codes and all(d.span is not None for d in caught.value.diagnostics)


@pytest.mark.parametrize("line", ["I[p] = X[p, m] :: topk(m)", "I[j] = X[p, m] :: topk(p, m)"])
def test_what_is_no_top_k_is_one_located_error(line: str) -> None:
    with pytest.raises(CascadeError) as caught:
        parse(f"in X[p, m]\nrank j = 2\n{line}\nout I")
    assert caught.value.codes == ("topk-form",)


def test_extents_and_values_that_do_not_fit_are_located_errors() -> None:
    with pytest.raises(InputError, match="takes the 3 largest of 2") as caught:
        run(parse(TOPK), {"X": np.zeros((1, 2))})
    assert caught.value.codes == ("topk-length",) and ":3:" in str(caught.value)
    solve = parse("in A[i, j], B[j]\nX[i] = solve(A[i, j], B[j])\nout X")
    with pytest.raises(InputError) as caught:
        run(solve, {"A": np.zeros((2, 3)), "B": np.zeros(3)})
    assert caught.value.codes == ("not-square",) and ":2:" in str(caught.value)
    with pytest.raises(CascadeError) as singular:
        run(solve, {"A": np.zeros((2, 2)), "B": np.zeros(2)})
    assert singular.value.codes == ("singular-solve",) and ":2:" in str(singular.value)
