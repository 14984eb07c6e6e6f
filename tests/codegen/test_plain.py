"""The plain formula against the reference: same meaning, one rounding an Einsum."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einsumcascade.codegen.plain import run_plain
from einsumcascade.codegen.plain_ops import Value, multiply
from einsumcascade.gallery import load, names
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.reference.errorbound import EPS, conditioning
from tests.codegen.calls import variant_inputs
from tests.gallery.draws import recipe

# Operations on whole fibers have no plain form yet.
PLAIN = [name for name in names() if not any(e.is_fiberwise for e in load(name).einsums)]
NAMES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def plain(text: str, **inputs: object) -> dict[str, torch.Tensor]:
    return run_plain(parse(text), {k: torch.as_tensor(v) for k, v in inputs.items()})


def agree(text: str, inputs: Mapping[str, torch.Tensor]) -> None:
    """Hold float64 against the reference, NaN for NaN."""
    cascade = parse(text)
    want = run(cascade, inputs)  # type: ignore[arg-type]
    for name, got in run_plain(cascade, inputs).items():
        np.testing.assert_allclose(got.numpy(), want[name], rtol=1e-9, atol=1e-9, err_msg=text)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in PLAIN for k in ("odd", "large") if k in recipe(n).sets])
def test_a_text_agrees_with_the_reference_in_float64(name: str, kind: str) -> None:
    # An output that is float32 whatever the inputs is compared in float64 too.
    agree(str(load(name)).replace(": float32", ""), variant_inputs(name, "float64", kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("name", ["softmax_3p", "softmax_2p", "softmax_1p", "alibi", "gqa", "sinklogit"])
def test_the_error_is_that_of_the_dtype(name: str, dtype: torch.dtype) -> None:
    cascade, inputs = load(name), variant_inputs(name, NAMES[dtype])
    eps = EPS[NAMES[dtype]]
    moved = conditioning(cascade, inputs, eps)["AV"].maximum  # type: ignore[arg-type]
    got = run_plain(cascade, inputs)["AV"]
    assert got.dtype == dtype
    error = np.abs(got.double().numpy() - run(cascade, inputs)["AV"]).max()  # type: ignore[arg-type]
    # Some eight roundings, of values near 1.
    assert 0 < error < 8 * (moved + 4 * eps)


def test_what_is_written_is_rounded_and_what_is_computed_is_not() -> None:
    inputs = {"X": torch.full((4096,), 1.0, dtype=torch.bfloat16)}
    sums = run_plain(parse("in X[m]\nS = X[m] :: sum(m)\nT = S + 1\nout S T"), inputs)
    # 4097 has no bfloat16; a sum taken in bfloat16 would have stopped at 256.
    assert sums["S"].item() == 4096.0 and sums["T"].item() == 4096.0
    third = torch.tensor([1.0], dtype=torch.bfloat16)
    once = run_plain(parse("in X[m]\nY[m] = X[m] / 3 * 3\nout Y"), {"X": third})["Y"]
    twice = run_plain(parse("in X[m]\nZ[m] = X[m] / 3\nY[m] = Z[m] * 3\nout Y"), {"X": third})["Y"]
    assert once.item() == 1.0
    assert twice.item() == (third / 3).float().mul(3).bfloat16().item()


def test_an_output_takes_the_dtype_that_is_named() -> None:
    got = run_plain(parse("in X[m]\nA[m] = X[m]\nB[m] = X[m]\nout A, B: float32"), {"X": torch.ones(2).half()})
    assert (got["A"].dtype, got["B"].dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("op", "empty"), [("max", -math.inf), ("min", math.inf), ("sum", 0), ("prod", 1), ("any", 0), ("mean", 0)]
)
def test_a_reduction_over_nothing_gives_its_identity(op: str, empty: float) -> None:
    got = plain(f"in X[p, m]\nS[p] = X[p, m] :: {op}(m) where m > p\nout S", X=torch.ones(2, 2))["S"]
    assert got.tolist() == [1.0, empty]
    assert plain(f"in X[p, m]\nS[p] = X[p, m] :: {op}(m)\nout S", X=torch.ones(1, 0))["S"].tolist() == [empty]


def test_a_culled_point_is_never_multiplied() -> None:
    text = "in A[p, m] V[m]\nconstraint m <= p\nS[p] = A[p, m] * V[m] :: sum(m)\nout S"
    got = plain(text, A=[[1.0, math.nan], [1.0, 2.0]], V=[1.0, math.inf])["S"]
    assert got.tolist() == [1.0, math.inf]


def test_a_culled_mapped_point_is_nan_where_it_can_be_seen() -> None:
    text = "in X[p, m]\nconstraint m < p\nY[p, m] = 2 * X[p, m]\nout Y"
    assert torch.isnan(plain(text, X=torch.ones(2, 2))["Y"]).tolist() == [[True, True], [False, True]]
    text = "in X[p, m]\nY[p, m] = 2 * X[p, m] where m < p\nZ[p] = Y[p, m] :: max(m)\nout Z"
    assert torch.isnan(plain(text, X=torch.ones(2, 2))["Z"]).all()


def test_value_rules() -> None:
    inputs = {"X": torch.tensor([-math.inf, 0.0, 0.0, 2.0]), "Y": torch.tensor([-math.inf, 0.0, math.inf, 0.0])}
    agree("in X[m] Y[m]\nA[m] = X[m] - Y[m]\nB[m] = X[m] / Y[m]\nC[m] = log(Y[m])\nout A B C", inputs)


BODIES = [
    "Y[m] = X[0, m - 1]",
    "Y[m] = select(m > 0, X[0, m - 1], 7)",
    "Y[p] = X[p, m + p - 1] * V[m] :: sum(m)",
    "Y[p, e] = K[J[p], e]",
    "Y[p] = K[J[p] - 1, 1 - e] :: max(e)",
    "Y[p, m] = X[p, m] * (p - m) where (p + m) % 2 == 0, m // 2 <= p",
    "Y[p] = X[p, m] * V[m] :: sum(m) where J[p] > m or V[m] > 0",
    "Y[p] = X[p, m] * V[m] / 3 * X[p, m] :: mean(m) where m < p",
    "Y[m] = X[p, m] :: prod(p)",
    "Y[p, m] = X[p, p] + X[m // 2, 2 * p]",
    "Y = X[p, m] * p :: sum(p, m)",
    "Y[t] = X[p, m] * V[m] :: sum(p, m) where p + m == t",
    "Y[t, e] = X[p, m] * K[m, e] :: sum(p, m) where p - m == t - 2",
    "Y[p, m] = 5",
    "Y[p, m] = min(p - m, 2) ** 2 + max(X[p, m], 0.5)",
    "Y[m1 * 2 + m0] = V[m1 * 2 + m0]",
    "Y[m1 * 2 + m0] = V[m1 * 2 + m0] where m1 * 2 + m0 < M",
    "Y[p, m] = sigmoid(X[p, m]) + silu(V[m]) + softplus(V[m]) + elu(V[m]) + relu(V[m]) + lrelu(V[m])",
    "Y[p] = Q[p, e] * K[m, e] * X[p, m] :: sum(e, m) where m <= p, p - m < 3",
    "init R[0, p] = 0\niter m:\n R[m + 1, p] = R[m, p] * 0.5 + X[p, m]\nend\nY[m, p] = R[m + 1, p] - R[M, p]",
    "init R[M, p] = J[p]\niter m desc:\n R[m, p] = R[m + 1, p] + select(m == 0, V[m], X[p, m])\nend\nY[p] = R[0, p]",
    "init R[p, 0] = 0\niter p:\n iter m:\n  R[p, m + 1] = R[p, m] + X[p, m]\n end\nend\nY[p] = R[p, M]",
    "iter m:\n Z[p] = X[p, m] + 1\n Y[m, p] = Z[p] * 2\nend",
]


@pytest.mark.parametrize("body", BODIES)
def test_a_construct_agrees_with_the_reference(body: str) -> None:
    rng = np.random.default_rng(3)
    inputs = {
        k: torch.from_numpy(rng.normal(size=n)) for k, n in {"Q": (4, 2), "K": (5, 2), "X": (4, 5), "V": (5,)}.items()
    }
    inputs["J"] = torch.tensor([0, 4, -1, 2], dtype=torch.int32)
    agree(f"in Q[p, e] K[m, e] X[p, m] V[m] J[p]\nrank m0 = 2\nrank m1 = 3\nrank t = M\n{body}\nout Y", inputs)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 4)] * 2),
    constraint=st.sampled_from(
        ["m <= p", "m < p", "p - m < 2, m - p < 2", "m // 2 == p // 2", "B[p, m] > 0", "m >= 0"]
    ),
    seed=st.integers(0, 10**6),
    wild=st.booleans(),
)
def test_masked_softmax_agrees_with_the_reference(
    sizes: tuple[int, ...], constraint: str, seed: int, wild: bool
) -> None:
    p, m, e, f = sizes
    rng = np.random.default_rng(seed)
    shapes = {"Q": (p, e), "K": (m, e), "V": (m, f), "B": (p, m)}
    inputs = {k: torch.from_numpy(np.asarray(4 * rng.normal(size=n))) for k, n in shapes.items()}
    if wild and m:
        inputs["V"][rng.integers(m)] = float(rng.choice([np.inf, -np.inf, np.nan]))
    agree(
        "in Q[p, e] K[m, e] V[m, f] B[p, m]\nconst scale = E ** -0.5\n"
        f"constraint {constraint}\n"
        "S[p, m] = Q[p, e] * K[m, e] * scale :: sum(e)\nGM[p] = S[p, m] :: max(m)\n"
        "SN[p, m] = exp(S[p, m] + 0 * B[p, m] - GM[p])\nSD[p] = SN[p, m] :: sum(m)\nA[p, m] = SN[p, m] / SD[p]\n"
        "AV[p, f] = A[p, m] * V[m, f] :: sum(m)\nLSE[p] = GM[p] + log(SD[p])\nout AV, LSE",
        inputs,
    )


def test_values_of_whole_numbers_are_float32() -> None:
    found = plain("in X[m]\nY[m] = X[m] / 2\nout Y", X=[1, 2])
    assert found["Y"].dtype == torch.float32 and found["Y"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3])
@pytest.mark.parametrize("out", ["bpm", "mbp", "pm"])
def test_a_contraction_in_half_precision_rounds_once(scale: float, out: str) -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=n)).bfloat16() for n in ((2, 5, 16), (16, 2, 7)))
    got = multiply([Value(x, tuple("bpe")), Value(y, tuple("ebm"))], tuple(out), scale)
    want = torch.einsum(f"bpe,ebm->{out}", x.double(), y.double()) * scale
    assert float(((got.double() - want).abs() / want.abs()).max()) <= 1.01 * EPS["bfloat16"] + 1e-3 * ("b" not in out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("name", PLAIN)
def test_a_gpu_gives_what_a_cpu_gives(name: str, dtype: torch.dtype) -> None:
    cascade, inputs = load(name), variant_inputs(name, NAMES[dtype])
    moved = conditioning(cascade, inputs, EPS[NAMES[dtype]])  # type: ignore[arg-type]
    here = run_plain(cascade, inputs)
    there = run_plain(cascade, {k: v.cuda() for k, v in inputs.items()})
    for name, want in here.items():
        assert there[name].dtype == want.dtype
        got, want = there[name].double().cpu(), want.double()
        assert torch.equal(got.isnan(), want.isnan())
        size = max(1.0, float(want.nan_to_num().abs().max()))
        assert float((got - want).nan_to_num().abs().max()) <= 8 * (moved[name].maximum + 2 * size * EPS[NAMES[dtype]])
