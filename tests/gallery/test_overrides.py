"""A caller's extents and constants win over what a text declares, and mean what the closed form means by them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from einsumcascade.errors import EinsumCascadeError
from einsumcascade.gallery import load
from einsumcascade.reference import run
from einsumcascade.reference.closed_forms import CLOSED_FORMS
from tests.gallery.draws import draw

# A text, the values in place of its own, and the same for its closed form.
EXTENTS: list[tuple[str, Mapping[str, int], Mapping[str, int]]] = [
    ("landmark", {"M0": 5}, {"m0": 5}),
    ("moba", {"M0": 8, "J": 3}, {"m0": 8, "j": 3}),
    ("nsa", {"M0": 5, "J": 4}, {"m0": 5, "j": 4}),
    ("routing", {"A": 9, "B": 9}, {"a": 9, "b": 9}),
    ("routing", {"A": 4, "B": 9}, {"a": 4, "b": 9}),
    ("sparsifiner", {"I": 2, "J": 7}, {"i": 2, "j": 7}),
    ("probsparse", {"U": 9}, {"u": 9}),
    ("tcpa", {"J": 5}, {"j": 5}),
    ("heavy_hitters", {"J": 11}, {"j": 11}),
    ("bottleneck", {"J": 1}, {"j": 1}),
    ("ttf", {"J": 0}, {"j": 0}),
    ("gman", {"G": 4}, {"g": 4}),
    ("khop", {"D": 6}, {"steps": 6}),
    ("titans_chunk", {"C0": 9}, {"c0": 9}),
    ("deltanet_chunk", {"C0": 3}, {"c0": 3}),
    ("gla_chunk", {"C0": 2}, {"c0": 2}),
]
CONSTANTS: list[tuple[str, Mapping[str, float]]] = [
    ("nsa", {"w": 2}),
    ("khop", {"w": 5}),
    ("ttf", {"thr": 0.001}),
    ("longshort", {"w": 9}),
    ("heavy_hitters", {"recent": 0}),
    ("heavy_hitters", {"recent": 8}),
]


@pytest.mark.parametrize(("name", "extents", "keywords"), EXTENTS)
def test_an_extent_of_the_caller_wins(name: str, extents: Mapping[str, int], keywords: Mapping[str, int]) -> None:
    cascade, inputs = load(name), draw(load(name), name)
    wanted = CLOSED_FORMS[name](inputs, **keywords)
    differs = False
    for tensor, found in run(cascade, inputs, extents=extents).items():
        np.testing.assert_allclose(found, wanted[tensor], rtol=1e-9, atol=1e-11, err_msg=tensor)
        declared = run(cascade, inputs)[tensor]
        differs |= declared.shape != found.shape or not np.allclose(declared, found)
    assert differs


@pytest.mark.parametrize(("name", "constants"), CONSTANTS)
def test_a_constant_of_the_caller_wins(name: str, constants: Mapping[str, float]) -> None:
    cascade, inputs = load(name), draw(load(name), name)
    wanted = CLOSED_FORMS[name](inputs, **constants)
    for tensor, found in run(cascade, inputs, constants=constants).items():
        np.testing.assert_allclose(found, wanted[tensor], rtol=1e-9, atol=1e-11, err_msg=tensor)
        assert not np.allclose(run(cascade, inputs)[tensor], found)


@pytest.mark.parametrize("name", ["flash_attention_1", "rabe_staats", "stickbreak"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_size_of_a_tile_changes_nothing(name: str, size: int) -> None:
    cascade, inputs = load(name), draw(load(name), name)
    found = run(cascade, inputs, extents={"M0": size})["AV"]
    np.testing.assert_allclose(found, run(cascade, inputs)["AV"], rtol=1e-9, atol=1e-11)


def test_too_many_picks_are_refused_whoever_asks_for_them() -> None:
    with pytest.raises(EinsumCascadeError, match="takes the 8 largest of 7"):
        run(load("tcpa"), draw(load("tcpa"), "tcpa"), extents={"J": 8})
