"""The interpreter against its own slow path, and rule by rule; closed forms are in tests/gallery."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from einsumcascade.errors import CascadeError, InputError
from einsumcascade.gallery import load, names
from einsumcascade.language.parser import parse
from einsumcascade.reference import interpret, run, run_all
from einsumcascade.reference.closed_forms import CLOSED_FORMS
from tests.gallery.draws import draw

Array = NDArray[np.float64]
Arrays = dict[str, Array]
RNG = np.random.default_rng


def evaluate(text: str, **inputs: object) -> Arrays:
    return run(parse(text), inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", names())
def test_contractions_change_nothing_but_rounding(name: str) -> None:
    cascade = load(name)
    arrays = draw(cascade, name, seed=1)
    fast, slow = run_all(cascade, arrays), run_all(cascade, arrays, contract=False)
    assert fast.keys() == slow.keys()
    # Directions of a search that has ended are rounding divided by rounding; what it found is not.
    for tensor in cascade.output_names if name == "lla_cg" else fast:
        np.testing.assert_allclose(fast[tensor], slow[tensor], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax_3p", "softmax_1p", "gqa", "kronecker"])
def test_small_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = load(name)
    arrays = draw(cascade, name, seed=2)
    whole = run(cascade, arrays)
    monkeypatch.setattr(interpret, "POINTS", 50)
    for tensor, value in run(cascade, arrays).items():
        np.testing.assert_allclose(value, whole[tensor], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 11, 16])
def test_the_running_form_agrees_at_every_tile(block: int) -> None:
    cascade = load("softmax_1p")
    arrays = draw(cascade, "softmax_1p", "large", seed=3)
    got = run(cascade, arrays, extents={"M0": block})["AV"]
    np.testing.assert_allclose(got, CLOSED_FORMS["softmax_1p"](arrays)["AV"], rtol=1e-10, atol=1e-12)


def test_a_query_without_keys_gives_zero() -> None:
    cascade = load("hpnet")
    assert not run(cascade, draw(cascade, "hpnet"))["AV"][:, 0].any()


def test_no_keys_at_all_give_zero() -> None:
    for name in ("softmax_3p", "softmax_1p"):
        cascade = load(name)
        arrays = draw(cascade, name)
        arrays |= {tensor: arrays[tensor][..., :0, :] for tensor in ("K", "V")}
        assert not run(cascade, arrays)["AV"].any()


@pytest.mark.parametrize(
    ("op", "empty"), [("max", -math.inf), ("min", math.inf), ("sum", 0), ("prod", 1), ("any", 0), ("mean", 0)]
)
def test_a_reduction_over_nothing_gives_its_identity(op: str, empty: float) -> None:
    got = evaluate(f"in X[p, m]\nS[p] = X[p, m] :: {op}(m) where m > p\nout S", X=np.ones((2, 2)))["S"]
    assert got.tolist() == [1.0, empty]
    assert evaluate(f"in X[p, m]\nS[p] = X[p, m] :: {op}(m)\nout S", X=np.ones((1, 0)))["S"].tolist() == [empty]


def test_mean_divides_by_the_live_points() -> None:
    got = evaluate("in X[p, m]\nS[p] = X[p, m] :: mean(m) where m <= p\nout S", X=[[2.0, 9.0], [2.0, 4.0]])["S"]
    assert got.tolist() == [2.0, 3.0]


def test_a_culled_point_is_never_multiplied() -> None:
    text = "in A[p, m] V[m]\nconstraint m <= p\nS[p] = A[p, m] * V[m] :: sum(m)\nout S"
    got = evaluate(text, A=[[1.0, math.nan], [1.0, 2.0]], V=[1.0, math.inf])["S"]
    assert got.tolist() == [1.0, math.inf]


def test_a_culled_mapped_point_holds_nan() -> None:
    got = evaluate("in X[p, m]\nconstraint m < p\nY[p, m] = 2 * X[p, m]\nout Y", X=np.ones((2, 2)))["Y"]
    assert np.isnan(got).tolist() == [[True, True], [False, True]]


def test_a_culled_fiber_of_a_reduction_holds_its_identity() -> None:
    text = "in Q[p, e] K[m, e]\nS[p, m] = Q[p, e] * K[m, e] :: sum(e) where m <= p\nout S"
    assert evaluate(text, Q=np.ones((2, 3)), K=np.ones((2, 3)))["S"].tolist() == [[3.0, 0.0], [3.0, 3.0]]


def test_a_constraint_applies_only_where_all_its_ranks_are_iterated() -> None:
    text = "in X[p, m]\nconstraint m < p\nR[m] = X[p, m] :: sum(p)\nC[m] = R[m]\nout R C"
    got = evaluate(text, X=np.ones((3, 3)))
    assert got["R"].tolist() == got["C"].tolist() == [2.0, 1.0, 0.0]


def test_a_constraint_may_read_data() -> None:
    text = "in X[m] D[m] E[p]\nconstraint D[m] == E[p]\nS[p] = X[m] :: sum(m)\nout S"
    got = evaluate(text.replace("X[m] ::", "X[m] * select(p == p, 1, 0) ::"), X=[1.0, 2.0, 4.0], D=[0, 1, 0], E=[0, 1])[
        "S"
    ]
    assert got.tolist() == [5.0, 2.0]


def test_a_constraint_on_a_tensor_not_yet_written_is_an_error() -> None:
    text = "in X[p, m]\nconstraint T[p] > 0\nY[p, m] = X[p, m]\nT[p] = X[p, m] :: sum(m)\nout Y"
    with pytest.raises(CascadeError, match="T is read by a constraint before it is written"):
        evaluate(text, X=np.ones((2, 2)))


def test_conditions_understand_division_and_modulo() -> None:
    text = "in X[p, m]\nS[p] = X[p, m] :: sum(m) where m // 2 == p // 2, (p - m) % 2 == 0\nout S"
    assert evaluate(text, X=np.ones((4, 4)))["S"].tolist() == [1.0] * 4


def test_an_index_out_of_range_removes_the_point() -> None:
    got = evaluate("in X[m]\nrank w = 3\nS[m] = X[m + w - 1] :: min(w)\nout S", X=[3.0, 1.0, 2.0])["S"]
    assert got.tolist() == [1.0, 1.0, 1.0]
    got = evaluate("in X[m]\nY[m] = X[m - 1]\nout Y", X=[3.0, 1.0])["Y"]
    assert math.isnan(got[0]) and got[1] == 3.0


def test_an_unread_branch_does_not_matter() -> None:
    got = evaluate("in X[m]\nY[m] = select(m > 0, X[m - 1], 7)\nout Y", X=[math.nan, 1.0])["Y"]
    assert got[0] == 7.0 and math.isnan(got[1])
    got = evaluate("in X[m]\nS = select(X[m] > 0, X[m], 0) :: sum(m)\nout S", X=[math.nan, 1.0])["S"]
    assert got == 1.0


def test_gathers_follow_integer_and_whole_float_indices() -> None:
    text = "in T[n, e] I[p, j]\nY[p, j, e] = T[I[p, j], e]\nout Y"
    table = RNG(0).normal(size=(4, 2))
    for dtype in (np.int32, np.float64):
        index = np.array([[3, 0, 9], [1, -1, 2]]).astype(dtype)
        got = evaluate(text, T=table, I=index)["Y"]
        np.testing.assert_array_equal(got[0, :2], table[[3, 0]])
        assert np.isnan(got[0, 2]).all() and np.isnan(got[1, 1]).all()


def test_value_rules() -> None:
    inputs = {"X": [-math.inf, 0.0, 0.0, 2.0], "Y": [-math.inf, 0.0, math.inf, 0.0]}
    text = "in X[m] Y[m]\nA[m] = X[m] - Y[m]\nB[m] = X[m] / Y[m]\nC[m] = log(Y[m])\nD[m] = X[m] * Y[m]\nout A B C D"
    got = evaluate(text, **inputs)
    np.testing.assert_array_equal(got["A"], [-math.inf, 0.0, -math.inf, 2.0])
    np.testing.assert_array_equal(got["B"], [math.nan, 0.0, 0.0, math.inf])
    np.testing.assert_array_equal(got["C"], [math.nan, -math.inf, math.inf, -math.inf])
    np.testing.assert_array_equal(got["D"], [math.inf, 0.0, math.nan, 0.0])


def test_an_iterative_tensor_has_one_slice_more_than_its_rank() -> None:
    text = "in X[t]\ninit C[0] = 0\niter t:\n C[t + 1] = C[t] + X[t]\nend\nL = C[T]\nout C L"
    got = evaluate(text, X=[1.0, 2.0, 4.0])
    assert got["C"].tolist() == [0.0, 1.0, 3.0, 7.0]
    assert got["L"] == 7.0
    assert evaluate(text, X=np.ones(0))["C"].tolist() == [0.0]


def test_a_descending_block_runs_from_the_last_value() -> None:
    text = "in X[t]\ninit C[T] = 0\niter t desc:\n C[t] = 2 * C[t + 1] + X[t]\nend\nout C"
    assert evaluate(text, X=[1.0, 2.0, 4.0])["C"].tolist() == [21.0, 10.0, 4.0, 0.0]


def test_blocks_nest() -> None:
    text = (
        "in X[a, b]\ninit R[0] = 0\niter a:\n init C[a, 0] = R[a]\n iter b:\n"
        "  C[a, b + 1] = C[a, b] + X[a, b]\n end\n R[a + 1] = 10 * C[a, B]\nend\nout R"
    )
    assert evaluate(text, X=[[1.0, 2.0], [3.0, 4.0]])["R"].tolist() == [0.0, 30.0, 370.0]


def test_a_partition_is_merged_through_an_affine_left_side() -> None:
    text = (
        "in X[m]\nrank m0 = 4\nrank m1 = (M + M0 - 1) // M0\n"
        "A[m1 * M0 + m0] = 2 * X[m1 * M0 + m0] where m1 * M0 + m0 < M\nout A"
    )
    x = np.arange(10.0)
    assert evaluate(text, X=x)["A"].tolist() == (2 * x).tolist()
    read = text.replace(" where m1 * M0 + m0 < M", "").replace("out A", "B[m] = A[m]\nout A B")
    assert evaluate(read, X=x)["A"].tolist() == (2 * x).tolist()


def test_outputs_come_in_the_order_of_out() -> None:
    got = evaluate("in X[m]\nA[m] = X[m]\nB[m] = X[m]\nout B, A", X=[1])
    assert list(got) == ["B", "A"]
    assert got["B"].dtype == np.float64


def test_inputs_are_arrays_or_tensors() -> None:
    torch = pytest.importorskip("torch")
    text = "in X[m] I[m]\nA[m] = X[I[m]]\nout A"
    x = torch.tensor([1.5, -2.0], dtype=torch.bfloat16, requires_grad=True)
    assert evaluate(text, X=x, I=torch.tensor([1, 0], dtype=torch.int32))["A"].tolist() == [-2.0, 1.5]


def test_an_input_that_is_not_numeric_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        evaluate("in X[m]\nA[m] = X[m]\nout A", X=["a"])
    assert caught.value.codes == ("input-dtype",)


def test_constants_and_extents_can_be_overridden() -> None:
    cascade = parse("in X[m]\nconst c = 2\nrank m0 = 2\nY[m, m0] = c * X[m] + m0\nout Y")
    assert run(cascade, {"X": [1.0]}, constants={"c": 5}, extents={"M0": 3})["Y"].tolist() == [[5.0, 6.0, 7.0]]


def test_a_condition_on_a_plain_index_does_not_shorten_the_tensor() -> None:
    got = evaluate("in X[p]\nY[p] = X[p] where 1 > p\nout Y", X=[1.0, 2.0, 3.0])["Y"]
    assert got.shape == (3,) and got[0] == 1.0 and np.isnan(got[1:]).all()


def test_every_condition_counts() -> None:
    text = "in Q[p, e] K[m, e]\nS[p, m] = Q[p, e] * K[m, e] :: sum(e) where m <= p, p - m < 2\nout S"
    got = evaluate(text, Q=np.ones((3, 2)), K=np.ones((3, 2)))["S"]
    assert got.tolist() == [[2.0, 0.0, 0.0], [2.0, 2.0, 0.0], [0.0, 2.0, 2.0]]
