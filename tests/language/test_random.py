"""Random numbers by seed and coordinates: the published bits, and the same ones wherever a cascade runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import einsumcascade as ec
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.codegen.plain import run_plain
from einsumcascade.codegen.runner import present_target
from einsumcascade.errors import CascadeError
from einsumcascade.language.extents import bind
from einsumcascade.language.philox import philox, uniform
from einsumcascade.reference.closed_forms.modifiers import philox as plain_philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_words_are_those_that_random123_publishes(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox(counter, key) == words


WHOLE = st.integers(min_value=-(2**53), max_value=2**53)


@given(seed=WHOLE, counter=st.tuples(WHOLE, WHOLE, WHOLE, WHOLE))
def test_numpy_and_pytorch_give_what_whole_numbers_of_any_size_give(seed: int, counter: tuple[int, ...]) -> None:
    *others, last = (c % 2**32 for c in counter)
    wanted = plain_philox(seed, *others, last // 4)[last % 4] // 256 / 2**24
    assert float(uniform(np, np.array([seed]), *counter)[0]) == wanted
    assert float(uniform(torch, torch.tensor([seed]), *counter)[0]) == wanted


@pytest.mark.parametrize("places", ["T[p], p, m - 3", "T[p], m", "m, p", "p, 2 * m", "T[p]", "p, m, p, m"])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 5, 2**53 - 1])
def test_reference_plain_formula_pytorch_and_kernel_agree_to_the_bit(seed: int, places: str) -> None:
    cascade = ec.parse(f"in X[p,m], SEED, T[p]\nR[p,m] = X[p,m] + uniform(SEED, {places})\nout R: float32")
    inputs = {
        "X": torch.zeros(5, 70),
        "SEED": torch.tensor(seed),
        "T": torch.tensor([0, 1, -1, 2**31 - 1, -(2**31)]),
    }
    wanted = ec.reference.run(cascade, {n: t.numpy() for n, t in inputs.items()})["R"]
    built = build(cascade, extents={"M": 70}, dtype="float32", target=present_target())
    for found in (
        run_plain(cascade, inputs)["R"],
        ec.compile(cascade)(*inputs.values()),
        run_interpreted(built, inputs, bind(cascade, extents={"P": 5, "M": 70}))["R"],
    ):
        np.testing.assert_array_equal(found.double().numpy(), wanted)


@pytest.mark.parametrize(
    "text",
    [
        "R[p] = X[p,m] + uniform(SEED, p, m) :: sum(m) where p - m < 20, m <= p",
        "R[m] = X[p,m] + uniform(SEED, p, m) :: sum(p) where p - m < 20, m <= p",
        "R[p] = X[p,m] + uniform(SEED, m, p) :: sum(m) where p + 30 <= m",
    ],
)
def test_tiles_that_begin_anywhere_have_the_numbers_of_their_places(text: str) -> None:
    cascade = ec.parse(f"in X[p,m], SEED\n{text}\nout R: float32")
    built = build(cascade, extents={}, dtype="float32", target=present_target())
    assert "_uniforms(" in built.source
    inputs = {"X": torch.zeros(130, 150), "SEED": torch.tensor(3)}
    wanted = ec.reference.run(cascade, {n: t.numpy() for n, t in inputs.items()})["R"]
    found = run_interpreted(built, inputs, bind(cascade, extents={"P": 130, "M": 150}))["R"]
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=1e-5)


def test_numbers_are_spread_evenly_and_differ_from_place_to_place() -> None:
    p, m = np.arange(300)[:, None], np.arange(400)[None, :]
    x = uniform(np, 3, p, m)
    assert x.min() >= 0.0 and x.max() < 1.0
    counts = np.histogram(x, bins=20, range=(0, 1))[0]
    # Chi squared of 19 degrees of freedom lies below 43.8 in 999 of 1000 cases.
    assert ((counts - 6000) ** 2 / 6000).sum() < 43.8
    assert len(np.unique(x)) > 0.99 * x.size
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(x.ravel(), uniform(np, 4, p, m).ravel())[0, 1]) < 0.01


def test_a_seed_may_be_a_constant_and_coordinates_left_out_count_zero() -> None:
    cascade = ec.parse("in X[m]\nconst seed = 5\nR[m] = X[m] + uniform(seed, m)\nout R: float32")
    assert "uniform(seed, 0, 0, 0, m)" in str(cascade)
    found = ec.compile(cascade)(torch.zeros(9)).double().numpy()
    np.testing.assert_array_equal(found, uniform(np, 5, 0, 0, 0, np.arange(9)))
    again = ec.compile(cascade, constants={"seed": 6})(torch.zeros(9))
    assert not torch.equal(again.double(), torch.tensor(found))


def test_dropout_keeps_the_sum_of_the_weights_on_average() -> None:
    drops = ec.load("dropout")
    q = k = torch.zeros(1, 1, 200, 4)
    v = torch.ones(1, 1, 200, 4)
    out = ec.compile(drops)(q, k, v, torch.tensor(11))
    assert abs(float(out.mean()) - 1.0) < 0.02
    assert float(out.std()) > 0.01


@pytest.mark.parametrize("call", ["uniform(3)", "uniform(1, 2, 3, 4, 5, 6)"])
def test_too_few_or_too_many_coordinates_are_one_error(call: str) -> None:
    with pytest.raises(CascadeError, match=r"uniform takes 2 to 5 operands, here are \d") as caught:
        ec.parse(f"in X[m]\nY[m] = X[m] + {call}\nout Y")
    assert caught.value.codes == ("operand-count",) and "3 of them may be left out" in str(caught.value)
