"""Inputs of the texts of the gallery, by a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from einsumcascade.gallery import draws
from einsumcascade.gallery.draws import extents_of, recipe
from einsumcascade.language.ir import Cascade

__all__ = ["draw", "extents_of", "recipe"]


def draw(cascade: Cascade, name: str, kind: str = "odd", *, seed: int = 7) -> dict[str, Any]:
    """The inputs of one set, the same ones each time."""
    found = draws.draw(cascade, name, np.random.default_rng(seed), kind)
    return {tensor: np.asarray(x) for tensor, x in found.items()}
