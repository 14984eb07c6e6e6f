"""Functions that are single instructions for inputs of 16 bits, as wrong as these may be, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.codegen.runner import present_target
from einsumcascade.language.extents import bind


@pytest.mark.parametrize(
    ("function", "least", "most", "error"),
    [
        ("cos", -60000.0, 60000.0, 2.0**-19),
        ("sin", -60000.0, 60000.0, 2.0**-19),
        ("cos", -4.0, 4.0, 2.0**-19),
        ("log", 0.0, 60000.0, 2.0**-21),
        ("softplus", -30.0, 30.0, 2.0**-21),
    ],
)
def test_functions_that_are_instructions_are_right_for_all_numbers_of_16_bits(
    function: str, least: float, most: float, error: float
) -> None:
    cascade = ec.parse(f"in X[p,m]\nY[p,m] = {function}(X[p,m])\nout Y: float32")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = bits[(bits >= least) & (bits <= most)]
    x = torch.nn.functional.pad(x, (0, -len(x) % 64), value=1.0).reshape(-1, 64)
    built = build(cascade, extents={}, dtype="float16", target=present_target())
    assert f"_{function}(" in built.source or "_log(" in built.source
    found = run_interpreted(built, {"X": x}, bind(cascade, extents={"P": x.shape[0], "M": 64}))["Y"]
    wanted = ec.reference.run(cascade, {"X": x.double().numpy()})["Y"]
    # A logarithm is wrong by 2^-22 of itself, then rounded twice; turns are counted exactly.
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=2.0**-21, atol=error)


@pytest.mark.parametrize("function", ["cos", "sin", "log", "softplus", "tanh"])
def test_float32_has_functions_as_exact_as_it_is(function: str) -> None:
    cascade = ec.parse(f"in X[p,m]\nY[p,m] = {function}(X[p,m])\nout Y")
    assert "approx" not in build(cascade, extents={}, dtype="float32", target=present_target()).source
