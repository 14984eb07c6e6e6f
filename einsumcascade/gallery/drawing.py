"""What the tables of draws are made of: a recipe for each text, and the kinds of numbers that are not normal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

# NumPy's arrays and its generator of random numbers, which the caller brings: a text is loaded without NumPy.
Array: TypeAlias = Any
Generator: TypeAlias = Any
# Takes the generator, the shape and all extents.
Draw = Callable[[Generator, tuple[int, ...], Mapping[str, int]], Array]

SETS = ("odd", "swapped", "ones", "large")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the inputs of one text are drawn.

    Args:
        extents: of the odd set, over the usual ones.
        fixed: what the text requires in every set.
        draws: by tensor; the others are standard normal.
        large: tensors that are `times` as large in the set of large scores.
        sets: the sets that the text is tried on.
    """

    extents: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    draws: Mapping[str, Draw] = field(default_factory=dict)
    large: tuple[str, ...] = ("Q",)
    times: float = 500.0
    sets: tuple[str, ...] = SETS


def whole(low: int, high: int | str) -> Draw:
    """Whole numbers from `low` to below `high`, a number or the extent of a rank."""
    return lambda rng, shape, extents: rng.integers(
        low, max(extents[high] if isinstance(high, str) else high, low + 1), size=shape
    )


def up_to(rank: str) -> Draw:
    """Whole numbers from 0 to the extent of a rank, both included."""
    return lambda rng, shape, extents: rng.integers(0, extents[rank] + 1, size=shape)


def normal(deviation: float) -> Draw:
    """Normal numbers with a standard deviation."""
    return lambda rng, shape, extents: deviation * rng.standard_normal(shape)


def chance(share: float) -> Draw:
    """Ones with the given chance, and zeros."""
    return lambda rng, shape, extents: (rng.random(shape) < share).astype("int64")


def between(low: float, high: float) -> Draw:
    """Numbers spread evenly over an interval."""
    return lambda rng, shape, extents: rng.uniform(low, high, size=shape)


def unit(axis: int = -1) -> Draw:
    """Vectors of length 1."""

    def draw(rng: Generator, shape: tuple[int, ...], extents: Mapping[str, int]) -> Array:
        x = rng.standard_normal(shape)
        return x / (x * x).sum(axis=axis, keepdims=True) ** 0.5

    return draw
