"""How the inputs of texts with a state, a solve, a gather or two key ranks are drawn."""

from __future__ import annotations

from tests.gallery.drawing import Recipe

DRAWS: dict[str, Recipe] = {}
