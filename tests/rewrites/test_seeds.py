"""States that begin at what every row has once, against the reference; and sums against known values."""

from __future__ import annotations

import numpy as np
import pytest

from einsumcascade.errors import InputError
from einsumcascade.language.known import saved_value
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.derive import Derivation, derive
from einsumcascade.rewrites.reassociate import reassociate
from einsumcascade.verify.certificate import check
from einsumcascade.verify.verify import verify

SELF = """in S[p,m] V[m,f] X[p] W[p,f]
constraint m < p
G0[p] = S[p,m] :: max(m)
G[p] = max(G0[p], X[p])
N[p,m] = exp(S[p,m] - G[p])
D[p] = N[p,m] :: sum(m)
NV[p,f] = N[p,m] * V[m,f] :: sum(m)
O[p,f] = (NV[p,f] + exp(X[p] - G[p]) * W[p,f]) / (D[p] + exp(X[p] - G[p]))
L[p] = G[p] + log(exp(X[p] - G[p]) + D[p])
out O, L"""
RIDGE = """in S[p,m] V[m,f]
G[p] = S[p,m] :: max(m)
N[p,m] = exp(S[p,m] - G[p])
D[p] = N[p,m] :: sum(m)
NV[p,f] = N[p,m] * V[m,f] :: sum(m)
O[p,f] = NV[p,f] / (D[p] + 0.5)
out O"""
BACKWARD = """in Q[p,e] K[m,e] V[m,f] DO[p,f] LSE[p] O[p,f]
QK[p,m] = Q[p,e] * K[m,e] :: sum(e)
A[p,m] = exp(QK[p,m] - LSE[p])
DP[p,m] = DO[p,f] * V[m,f] :: sum(f)
D[p] = A[p,m] * DP[p,m] :: sum(m)
DS[p,m] = A[p,m] * (DP[p,m] - D[p])
DQ[p,e] = DS[p,m] * K[m,e] :: sum(m)
out DQ"""
BOTH = """in Q[p,e] K[m,e] V[m,f] DO[p,f]
QK[p,m] = Q[p,e] * K[m,e] :: sum(e)
GM[p] = QK[p,m] :: max(m)
SN[p,m] = exp(QK[p,m] - GM[p])
SD[p] = SN[p,m] :: sum(m)
A[p,m] = SN[p,m] / SD[p]
DP[p,m] = DO[p,f] * V[m,f] :: sum(f)
D[p] = A[p,m] * DP[p,m] :: sum(m)
DS[p,m] = A[p,m] * (DP[p,m] - D[p])
DQ[p,e] = DS[p,m] * K[m,e] :: sum(m)
O[p,f] = A[p,m] * V[m,f] :: sum(m)
out DQ, O"""
SAVED = "O[p,f] = A[p,m] * V[m,f] :: sum(m)"


def rules(d: Derivation, rule: str) -> list[str]:
    return [s.what for s in d.steps if s.rule == rule]


def draw(text: str, rng: np.random.Generator, sizes: dict[str, int], scale: float = 1.0) -> dict[str, np.ndarray]:
    return {i.tensor: scale * rng.standard_normal([sizes[v] for v in i.indices]) for i in parse(text).inputs}


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_a_self_term_begins_the_maximum_the_normaliser_and_the_output() -> None:
    found = derive(parse(SELF))
    begun = [w.split(" begins")[0] for w in rules(found, "seed")]
    assert begun == ["G0", "D", "NV"]
    assert found.passes["M"] == (2, 1)
    assert "init RG0[p, 0] = X[p]" in str(found.cascade)
    assert check(found.certificate).passed


@pytest.mark.parametrize("tile", [1, 3, 128])
@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_a_seeded_state_has_the_value_of_the_text(tile: int, scale: float) -> None:
    inputs = draw(SELF, np.random.default_rng(1), {"p": 6, "m": 7, "f": 2}, scale)
    # Of no key, of a seed that is no key, and of neither.
    inputs["X"][[0, 3]] = -np.inf
    inputs["S"][5] = -np.inf
    want, found = run(parse(SELF), inputs), run(derive(parse(SELF), tile=tile).cascade, inputs)
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-12)


def test_a_seeded_kernel_verifies() -> None:
    assert verify(parse(SELF), extents={"P": 37, "M": 40, "F": 16}).passed


def test_a_constant_beside_a_normaliser_does_not_move_and_stays_outside() -> None:
    assert rules(derive(parse(RIDGE)), "seed") == []


def test_a_seed_that_needs_the_rank_itself_is_none() -> None:
    """The maximum over another rank in place of a seed: its own loop would have to end first."""
    assert rules(derive("persistent"), "seed") == []


def test_a_sum_that_nothing_moves_is_joined_at_the_end() -> None:
    text = "in X[p,m] B[p]\nS[p] = X[p,m] :: sum(m)\nO[p] = S[p] + B[p]\nout O"
    assert rules(derive(parse(text), rank="M"), "seed") == []


def test_an_output_is_not_seeded() -> None:
    assert rules(derive(parse(SELF + ", G0")), "seed") == [
        "D begins at exp(X[p] - max(-inf, X[p])), which every row has once",
        "NV begins at exp(X[p] - max(-inf, X[p])) * W[p, f], which every row has once",
    ]


# --- sums against a known value -------------------------------------------------------------------------------------


def test_a_saved_output_takes_a_loop_or_a_correction_away() -> None:
    # Without it, D is a reference that the running sum of DQ is moved by: a state of two sums.
    alone = derive(parse(BACKWARD))
    assert alone.passes["M"] == (2, 1) and len(rules(alone, "R3 running state")) == 1
    found = derive(parse(BACKWARD), saved=(SAVED,))
    assert found.passes["M"] == (2, 1) and not rules(found, "R3 running state")
    assert rules(found, "R7 reassociate") == ["D sums over F against O, which is saved already"]
    assert check(found.certificate).passed


def test_with_the_saved_value_the_result_is_the_same() -> None:
    rng = np.random.default_rng(2)
    inputs = draw(BACKWARD, rng, {"p": 3, "m": 9, "e": 4, "f": 5})
    scores = inputs["Q"] @ inputs["K"].T
    inputs["LSE"] = np.log(np.exp(scores).sum(1))
    inputs["O"] = np.exp(scores - inputs["LSE"][:, None]) @ inputs["V"]
    result = derive(parse(BACKWARD), saved=(SAVED,), tile=4).cascade
    np.testing.assert_allclose(run(result, inputs)["DQ"], run(parse(BACKWARD), inputs)["DQ"], rtol=1e-10, atol=1e-12)


def test_another_value_than_the_one_needed_takes_nothing_away() -> None:
    for wrong in ("O[p,f] = A[p,m] * A[p,m] * V[m,f] :: sum(m)", "O[p,f] = A[p,m] * V[m,f] :: sum(m) where m < p"):
        found = derive(parse(BACKWARD), saved=(wrong,))
        assert rules(found, "R7 reassociate") == []


def test_a_certificate_that_lies_about_what_was_saved_fails() -> None:
    text = derive(parse(BACKWARD), saved=(SAVED,)).certificate
    assert not check(text.replace("A[p,m] * V[m,f]", "2 * A[p,m] * V[m,f]")).passed


def test_a_value_that_the_cascade_computes_serves_too_but_not_at_the_price_of_a_pass() -> None:
    found = reassociate(parse(BOTH))
    assert [x.what for x in found.steps] == ["D sums over F against O, which is computed already"]
    inputs = draw(BOTH, np.random.default_rng(3), {"p": 3, "m": 7, "e": 4, "f": 5})
    want, got = run(parse(BOTH), inputs), run(found.cascade, inputs)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-10, atol=1e-12)
    # D would wait for all of O: with the sum over the keys, all of it is one loop.
    best = derive(parse(BOTH))
    assert best.passes["M"] == (4, 1) and rules(best, "R7 reassociate") == []
    assert any(c.reassociated and c.passes > best.considered[0].passes for c in best.considered)


def test_a_sum_over_a_feature_is_not_exchanged_for_one_over_the_rank() -> None:
    assert rules(derive("longshort"), "R7 reassociate") == []


@pytest.mark.parametrize(
    "text", ["X[p] = A[p,m] :: sum(m)", "O[p,f] = O[p,f] * A[p,m] :: sum(m)", "DP[p,m] = A[p,m]", ""]
)
def test_a_wrong_saved_value_is_one_error(text: str) -> None:
    with pytest.raises(InputError, match="option-saved"):
        saved_value(parse(BACKWARD), text)


# --- factors in an exponent -----------------------------------------------------------------------------------------


def test_a_normaliser_enters_the_exponent_as_a_logarithm() -> None:
    found = derive("softmax_attention", division="exponent")
    assert rules(found, "R9 exponent") == ["LA holds the logarithm of what A divides by"]
    assert found.passes["M"] == (3, 1) and " / " not in str(found.cascade).split("end")[0].split("iter")[1]
    assert check(found.certificate).passed


@pytest.mark.parametrize("name", ["softmax_attention", "softmax_3p", "pointer", "staticmap", "sinkscore", "gaam"])
def test_with_the_logarithm_the_value_is_the_same(name: str) -> None:
    from einsumcascade.gallery import load

    cascade = load(name)
    assert rules(found := derive(cascade, division="exponent"), "R9 exponent")
    assert check(found.certificate).passed


def test_a_factor_that_may_be_negative_stays_where_it_is() -> None:
    text = "in S[p,m] B[p]\nA[p,m] = exp(S[p,m]) / B[p]\nO[p] = A[p,m] * A[p,m] :: sum(m)\nout O"
    assert rules(derive(parse(text), rank="M", division="exponent"), "R9 exponent") == []


@pytest.mark.parametrize(
    "text",
    [
        # Multiplied, not divided; a sum of other terms; a factor that may be 0; a sum over fewer points.
        "SD[p] = SN[p,m] :: sum(m)\nA[p,m] = SN[p,m] * SD[p]",
        "SD[p] = relu(S[p,m]) :: sum(m)\nA[p,m] = SN[p,m] / SD[p]",
        "SD[p] = relu(B[p])\nA[p,m] = SN[p,m] * SD[p]",
        "SD[p] = SN[p,m] :: sum(m) where S[p,m] > 0\nA[p,m] = SN[p,m] / SD[p]",
        "SD[p] = SN[p,m] :: prod(m)\nA[p,m] = SN[p,m] / SD[p]",
    ],
)
def test_only_the_normaliser_of_the_very_exponential_enters_it(text: str) -> None:
    whole = f"in S[p,m] V[m] B[p]\nSN[p,m] = exp(S[p,m])\n{text}\nO[p] = A[p,m] * V[m] :: sum(m)\nout O"
    assert rules(derive(parse(whole), rank="M", division="exponent"), "R9 exponent") == []
