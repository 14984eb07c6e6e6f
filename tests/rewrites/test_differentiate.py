"""Gradients of cascades, against differences of the reference and against PyTorch's own autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given

from einsumcascade.codegen.plain import run_plain
from einsumcascade.errors import EinsumCascadeError, InputError, LoweringError
from einsumcascade.gallery import load, names
from einsumcascade.language.ir import Cascade, Iter, Read, apply, reads, walk
from einsumcascade.language.ops import OPS
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites import transposes
from einsumcascade.rewrites.adjoint import adjoints
from einsumcascade.rewrites.differentiate import Gradient, differentiate
from tests.codegen.calls import VARIANTS, variant_inputs
from tests.codegen.found import CANCELLED
from tests.strategies import Case, cases, examples, random_case

# A solve has no gradient yet; steps of conjugate gradients after convergence divide rounding by rounding.
UNSOLVED = {"deltaformer", "deltanet_chunk", "lla_1p", "lla_cg", "local_quadratic", "mesa", "nystrom", "path", "sessa"}
DIFFERENTIABLE = tuple(n for n in names() if n not in UNSOLVED)
STRAIGHT = tuple(n for n in VARIANTS if not any(isinstance(s, Iter) for s in walk(load(n).body)))
# Where PyTorch multiplies 0 by an infinity of its own, or by what is not there: a branch that `where` leaves out.
UNSURE = {"entropy", "gaze", "hpnet", "landmark", "t5bias", "tin"}
SOFTMAX = (
    "in Q[p,e], K[m,e], V[m,f]\nS[p,m] = Q[p,e] * K[m,e]\nGM[p] = S[p,m] :: max(m)\nSN[p,m] = exp(S[p,m] - GM[p])\n"
    "SD[p] = SN[p,m]\nO[p,f] = SN[p,m] * V[m,f] / SD[p] :: sum(m)\n"
)


def drawn(**shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    return {k: rng.normal(size=s) for k, s in shapes.items()}


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {k: v.numpy() for k, v in inputs.items()}


def received(cascade: Cascade, values: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    return {o: rng.standard_normal(values[o].shape) for o in cascade.output_names}


def backward(gradient: Gradient, inputs: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The gradients by input, run by the reference."""
    forward = run(gradient.forward, inputs)
    known = {**inputs, **forward, **{gradient.received[o]: given[o] for o in gradient.received}}
    found = run(gradient.backward, {i.tensor: known[i.tensor] for i in gradient.backward.inputs})
    # A culled point has no value, which the reference writes as NaN; ops write 0, and so is its gradient.
    maps = {e.tensor for e in gradient.backward.einsums if e.reduce is None}
    return {x: np.nan_to_num(found[d], nan=0.0) if d in maps else found[d] for x, d in gradient.gradients.items()}


def total(cascade: Cascade, inputs: dict[str, Any], given: dict[str, Any]) -> float:
    found = run(cascade, inputs)
    return float(sum((np.where(np.isfinite(found[o]), found[o], 0.0) * given[o]).sum() for o in given))


def slope(cascade: Cascade, inputs: dict[str, Any], name: str, way: Any, given: dict[str, Any], h: float) -> float:
    ends = [total(cascade, {**inputs, name: inputs[name] + s * h * way}, given) for s in (1, -1)]
    return (ends[0] - ends[1]) / (2 * h)


def assert_slopes(cascade: Cascade, inputs: dict[str, Any]) -> None:
    """Every gradient agrees with the slope of the reference along a random direction."""
    gradient = differentiate(cascade)
    given = received(cascade, run(cascade, inputs))
    found = backward(gradient, inputs, given)
    rng = np.random.default_rng(5)
    exprs = [x for e in cascade.einsums for x in (e.expr, *e.where)]
    placing = {t.tensor for r in reads(*exprs) for t in reads(*r.indices)}
    placing |= {t.tensor for e in cascade.einsums for t in reads(*e.where)}
    for name, value in found.items():
        if name in placing:
            # Moved, it would read other elements.
            continue
        assert value.shape == inputs[name].shape
        assert np.isfinite(value).all(), name
        way = rng.standard_normal(value.shape)
        # Central differences of float64 are good to about 1e-9 of what is added up; a shorter step may miss a kink that
        # a longer one has in it.
        size = 1e-3 + abs(total(cascade, inputs, given)) + float(np.abs(value * way).sum())
        slopes = [slope(cascade, inputs, name, way, given, h) for h in (1e-5, 1e-6, 1e-7)]
        assert min(abs(float((value * way).sum()) - s) for s in slopes) < 1e-6 * size, (name, slopes)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_of_a_gallery_text_is_its_slope(name: str) -> None:
    assert_slopes(load(name), arrays(variant_inputs(name, "float64")))


@pytest.mark.parametrize("name", [n for n in STRAIGHT if n not in UNSURE])
def test_the_gradient_of_a_gallery_text_is_that_of_autograd(name: str) -> None:
    cascade = load(name)
    inputs = variant_inputs(name, "float64", "odd")
    gradient = differentiate(cascade)
    leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    outputs = run_plain(cascade, leaves)
    given = received(cascade, {o: outputs[o].detach() for o in cascade.output_names})
    reached = [o for o in given if outputs[o].requires_grad]
    torch.autograd.backward(
        [torch.where(torch.isfinite(outputs[o]), outputs[o], 0.0) for o in reached],
        [torch.from_numpy(given[o]).to(outputs[o].dtype) for o in reached],
    )
    # An output that the text makes float32 gives its gradient no more digits.
    room = 1e-6 if any(o.dtype == "float32" for o in cascade.outputs) else 1e-11
    for name_, value in backward(gradient, arrays(inputs), given).items():
        found = leaves[name_].grad
        assert found is not None
        expected = found.numpy()
        assert np.max(np.abs(value - expected)) <= room * max(1.0, np.abs(expected).max()), name_


@examples(60)
@given(cases())
@example(CANCELLED)
@example(random_case(8093))
def test_the_gradient_of_a_random_cascade_is_its_slope(case: Case) -> None:
    """With ties judged exactly, as float64 can: kernels take what is within rounding of a maximum for equal to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transposes, "NEAR", 0.0)
        assert_random_slopes(case)


def assert_random_slopes(case: Case) -> None:
    inputs = case.inputs()
    try:
        differentiate(case.cascade)
    except (InputError, LoweringError):
        assume(False)
    found = run(case.cascade, inputs)
    assume(all(np.isfinite(v).all() for v in found.values()))
    assert_slopes(case.cascade, inputs)


def test_softmax_saves_one_number_a_row_and_its_output() -> None:
    found = differentiate(parse(SOFTMAX + "out O"))
    assert found.saved == ("LSE", "O") or found.saved == ("O", "LSE")
    assert [str(e) for e in found.backward.einsums if e.tensor == "DLSE"] == ["DLSE[p] = -DO[p, f] * O[p, f] :: sum(f)"]
    assert any(s.rule == "reference" for s in found.steps)


def test_weights_are_quotients_where_their_exponentials_are_computed_anyway() -> None:
    near, wide = (str(differentiate(load(name)).backward) for name in ("neighbour_cache", "softmax_attention"))
    assert "WSN[p, j] = SN[p, j] / SD[p]" in near and "log(" not in near
    # Nor is an output computed again for a sum that is there without it.
    assert "DLSE[p] = -DWSN[p, j] * WSN[p, j] :: sum(j)" in near and "AV[" not in near.replace("DAV[", "")
    assert "exp(QK[b, h, p, m] - LSE[b, h, p])" in wide and "-DAV[b, h, p, f] * AV[b, h, p, f]" in wide


def test_a_maximum_that_an_output_depends_on_keeps_its_gradient() -> None:
    for text in (SOFTMAX + "out O, GM", SOFTMAX.replace("/ SD[p]", "/ (SD[p] + 0.5)") + "out O"):
        assert not any(s.rule == "reference" for s in differentiate(parse(text)).steps)
        assert_slopes(parse(text), drawn(Q=(5, 3), K=(7, 3), V=(7, 2)))


def test_no_gradient_goes_through_a_maximum_that_only_factors_of_the_row_have_left() -> None:
    found = differentiate(load("qknorm"))
    assert [s.what for s in found.steps if s.rule == "reference"] == [
        "no gradient goes through GM: no output depends on it"
    ]
    assert set(found.saved) == {"LSE", "AV"}


def test_elements_that_share_a_maximum_share_its_gradient() -> None:
    gradient = differentiate(parse("in X[p,m]\nG[p] = X[p,m] :: max(m)\nout G"))
    x = np.array([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    found = backward(gradient, {"X": x}, {"G": np.array([1.0, 6.0])})["X"]
    torch_x = torch.from_numpy(x).requires_grad_()
    torch_x.amax(1).backward(torch.tensor([1.0, 6.0], dtype=torch.float64))
    assert torch_x.grad is not None
    assert np.array_equal(found, torch_x.grad.numpy())


@pytest.mark.parametrize(
    "row", [[2.0, 3.0, 4.0], [2.0, 0.0, 4.0], [0.0, 0.0, 4.0]], ids=["no zero", "one zero", "two zeros"]
)
def test_a_product_of_zeros_has_the_gradient_of_the_others(row: list[float]) -> None:
    gradient = differentiate(parse("in X[m]\nP = X[m] :: prod(m)\nout P"))
    found = backward(gradient, {"X": np.array(row)}, {"P": np.array(1.0)})["X"]
    x = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    x.prod().backward()
    assert x.grad is not None
    assert np.allclose(found, x.grad.numpy(), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("in X[p], Y[p]\nZ[p] = X[p - 1] * Y[p]\nout Z", {"X": (6,), "Y": (6,)}),
        ("in X[p], Y[p]\nZ[p] = X[P - 1 - p] * Y[p]\nout Z", {"X": (6,), "Y": (6,)}),
        ("in X[p], Y[p]\nZ[p] = X[p - 1] * Y[p + 2] + X[p]\nout Z", {"X": (6,), "Y": (6,)}),
        ("in X[g], Y[p]\nconst r = 3\nZ[p] = X[p // r] * Y[p]\nout Z", {"X": (2,), "Y": (5,)}),
        ("in X[g], Y[p]\nconst r = 3\nZ[p] = X[p % r] * Y[p]\nout Z", {"X": (3,), "Y": (7,)}),
        ("in T[j], Y[p,m]\nconstraint m <= p\nZ[p] = T[p - m] * Y[p,m] :: sum(m)\nout Z", {"T": (4,), "Y": (6, 5)}),
        ("in X[p], Y[p]\nZ[p] = X[0] * Y[p] + X[P - 1]\nout Z", {"X": (6,), "Y": (6,)}),
        ("in X[p,q]\nrank q = P\nZ[p] = X[p,p]\nout Z", {"X": (4, 4)}),
        ("in K[m,e], Q[p,e]\nrank n = M\nZ[p,m] = Q[p,e] * K[m,e]\nY[p] = Z[p,n] * Z[p,n] :: sum(n)\nout Y",
         {"K": (5, 2), "Q": (3, 2)}),
    ],
    ids=["shift", "mirror", "two shifts", "quotient", "remainder", "difference", "ends", "diagonal", "another name"],
)  # fmt: skip
def test_what_is_read_elsewhere_is_given_back_there(text: str, shapes: dict[str, tuple[int, ...]]) -> None:
    assert_slopes(parse(text), drawn(**shapes))


def test_rows_without_a_key_have_no_gradient() -> None:
    cascade = parse(SOFTMAX + "out O").constrain("m < p")
    x = drawn(Q=(5, 3), K=(7, 3), V=(7, 2))
    found = backward(differentiate(cascade), x, {"O": np.ones((5, 2))})
    assert not found["Q"][0].any()
    assert all(np.isfinite(v).all() for v in found.values())
    assert_slopes(cascade, x)


@pytest.mark.parametrize("name", [o.name for o in OPS.values() if o.gradient and o.arity == 1 and any(o.gradient)])
@pytest.mark.parametrize("x", [-1.7, -0.3, 0.4, 2.2])
def test_the_gradient_of_an_operator_is_its_slope(name: str, x: float) -> None:
    if name in ("log", "log2", "sqrt", "rsqrt"):
        x = abs(x)
    cascade = parse(f"in X[m]\nY[m] = {name}(X[m])\nout Y" if name != "neg" else "in X[m]\nY[m] = -X[m]\nout Y")
    assert_slopes(cascade, {"X": np.array([x])})


@pytest.mark.parametrize("text", ["sqrt(X[m])", "X[m] / X[m]", "log(X[m] + 0 * Y[m])"])
def test_a_gradient_at_nothing_is_finite(text: str) -> None:
    cascade = parse(f"in X[m], Y[m]\nZ[m] = {text} * Y[m]\nout Z")
    found = backward(differentiate(cascade), {"X": np.zeros(2), "Y": np.ones(2)}, {"Z": np.ones(2)})
    assert np.isfinite(found["X"]).all()


def test_every_operator_of_numbers_has_a_gradient() -> None:
    numbers = {o.name for o in OPS.values() if not o.condition and not o.internal and not o.fiberwise}
    assert numbers == {o.name for o in OPS.values() if o.gradient}
    assert all(len(o.gradient) == o.arity for o in OPS.values() if o.gradient)
    assert adjoints(apply("floor", Read(tensor="X")), Read(tensor="G")) == ()


def test_an_input_that_no_gradient_reaches_is_an_error() -> None:
    cascade = parse("in X[m], I[p], Y[p]\nZ[p] = X[I[p]] * Y[p]\nout Z")
    with pytest.raises(InputError, match="no gradient reaches 'I'"):
        differentiate(cascade, wrt=("I",))
    assert set(differentiate(cascade).gradients) == {"X", "Y"}


def test_what_has_no_gradient_yet_says_so() -> None:
    for name in UNSOLVED - {"lla_cg"}:
        with pytest.raises(EinsumCascadeError, match="no gradient yet"):
            differentiate(load(name))


# --- iterations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax_1p", "flash_attention_1"])
def test_a_running_state_has_the_gradient_of_its_reductions(name: str) -> None:
    gradient = differentiate(load(name))
    assert not any(isinstance(s, Iter) for s in walk(gradient.backward.body))
    assert {frozenset(i.indices) for i in gradient.backward.inputs if i.is_saved} == {
        frozenset("bhp"),
        frozenset("bhpf"),
    }


@pytest.mark.parametrize("steps", [2, 60])
@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_a_root_has_the_gradient_of_the_implicit_function(name: str, steps: int) -> None:
    """Against the closed form: the softmax Jacobian with the support, or the square roots, for weights.

    After two steps the bracket is a quarter wide, and the slope of the steps themselves would be that of the maximum.
    """
    cascade = load(name)
    x = {**arrays(variant_inputs(name, "float64")), "NIT": np.zeros(steps)}
    given = received(cascade, run(cascade, x))
    gradient = differentiate(cascade)
    assert "implicit function theorem" in str(gradient) and "LO_root[p] = LO[N, p]" in str(gradient)
    found = backward(gradient, x, given)
    scale = x["Q"].shape[-1] ** -0.5 / (1 if name == "sparsemax" else 2)
    s = x["Q"] @ x["K"].T * scale
    s = np.where(np.tri(*s.shape) > 0, s, -np.inf)
    power = 1 if name == "sparsemax" else 2
    low, high = s.max(1, keepdims=True) - 1, s.max(1, keepdims=True)
    for _ in range(steps):
        middle = (low + high) / 2
        more = (np.maximum(s - middle, 0) ** power).sum(1, keepdims=True) >= 1
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    over = np.maximum(s - low, 0)
    weights = over**power / (over**power).sum(1, keepdims=True)
    way = power * over ** (power - 1) * (over > 0)
    by = given["O"] @ x["V"].T
    by = (by - (weights * by).sum(1, keepdims=True)) / (over**power).sum(1, keepdims=True)
    slope_of = way * (by - (way * by).sum(1, keepdims=True) / way.sum(1, keepdims=True)) * scale
    for tensor, expected in {"V": weights.T @ given["O"], "Q": slope_of @ x["K"], "K": slope_of.T @ x["Q"]}.items():
        np.testing.assert_allclose(found[tensor], expected, rtol=1e-9, atol=1e-11)


ITERATIONS = [
    # A weight that every step reads: what it receives is summed over the steps.
    "init R[0,e] = 0\niter t:\n Y[t,e] = W[e,g] * R[t,g] :: sum(g)\n R[t+1,e] = tanh(Y[t,e] + X[t,e])\nend\n"
    "O[e] = R[T,e]\nrank g = E\nout O",
    # Downwards, with what every step puts out.
    "init R[T,e] = X[0,e]\niter t desc:\n Y[t,e] = W[e,g] * R[t+1,g] :: sum(g)\n R[t,e] = tanh(Y[t,e]) * X[t,e]\n"
    " O[t,e] = R[t,e] + R[t+1,e]\nend\nrank g = E\nout O",
    # A first value that receives, two states, one read by the other's update.
    "S[e] = X[t,e] :: sum(t)\ninit R[0,e] = S[e]\ninit U[0,e] = 1\niter t:\n R[t+1,e] = R[t,e] * X[t,e] + U[t,e]\n"
    " U[t+1,e] = sin(R[t+1,e]) * U[t,e]\nend\nO[e] = R[T,e] * U[T,e] * W[e,0]\nout O",
    # Generations read elsewhere, in order; an iteration whose result another one reads.
    "init R[0] = 0\niter t:\n R[t+1] = R[t] * 0.5 + X[t,0]\nend\nY[t,e] = R[t+1] * X[t,e]\ninit U[0,e] = 0\n"
    "iter t:\n U[t+1,e] = U[t,e] * 0.7 + Y[t,e] * W[e,0]\nend\nO[e] = U[T,e] * R[T]\nout O",
    # An input that the steps read backwards, and as it lies.
    "init R[0,e] = X[0,e]\niter t:\n R[t+1,e] = tanh(R[t,e] * X[t,e]) + X[T-1-t,e] * W[e,0]\nend\nO[e] = R[T,e]\nout O",
    # A maximum in a step, and a state that no output depends on.
    "init R[0] = -inf\ninit D[0] = 0\niter t:\n M[t] = X[t,e] :: max(e)\n R[t+1] = max(R[t], M[t])\n"
    " D[t+1] = D[t] * exp(R[t] - R[t+1]) + exp(M[t] - R[t+1])\nend\nO[e] = W[e,0] * (R[T] + log(D[T]))\nout O",
]


@pytest.mark.parametrize("text", ITERATIONS)
def test_the_gradient_of_an_iteration_is_its_slope(text: str) -> None:
    assert_slopes(parse(f"in X[t,e], W[e,g2]\n{text}"), drawn(X=(5, 3), W=(3, 3)))


def test_an_iteration_keeps_only_what_its_gradient_reads() -> None:
    linear = differentiate(
        parse("in X[t], G[t]\ninit R[0] = 0\niter t:\n R[t+1] = 0.5 * R[t] + X[t]\nend\nO = R[T]\nout O")
    )
    assert linear.saved == () and "R_old" not in str(linear.backward)
    gated = differentiate(
        parse("in X[t], G[t]\ninit R[0] = 0\niter t:\n R[t+1] = G[t] * R[t] + X[t]\nend\nO = R[T]\nout O")
    )
    assert gated.saved == ("R_old",)


@pytest.mark.parametrize(
    ("ending", "what"),
    [
        ("O[p] = V[p] * R[2 * p]\nout O", "generation 2 \\* p of R, read elsewhere, has no gradient yet"),
        ("O = R[T]\nout R", "every generation of R as an output has no gradient yet"),
    ],
)
def test_what_an_iteration_cannot_be_is_said(ending: str, what: str) -> None:
    text = f"in X[t], V[p]\ninit R[0] = 0\niter t:\n R[t+1] = R[t] + X[t]\nend\n{ending}"
    with pytest.raises(LoweringError, match=what):
        differentiate(parse(text))


@pytest.mark.parametrize(
    "step",
    [
        " R[t+1] = 0.5 * R[t] + X[t] * W[IDX[t]]\n",
        " Y[t] = X[t] * W[j] :: sum(j) where j <= t\n R[t+1] = 0.5 * R[t] + Y[t]\n",
    ],
)
def test_steps_that_have_no_point_for_an_element_hand_it_nothing(step: str) -> None:
    cascade = parse(f"in X[t], W[j], IDX[t]\ninit R[0] = 0\niter t:\n{step}end\nO = R[T]\nout O")
    assert_slopes(cascade, {**drawn(X=(5,), W=(3,)), "IDX": np.array([0, 2, 1, 2, 2])})
