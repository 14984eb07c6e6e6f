"""Random cascades of the class that kernels are made for, with random extents, tiles and inputs.

Every cascade has a contraction and at least two chained reductions over one rank. About half are masked, a third have
a second output, most stream in one loop and about a fifth need a second one; tests/test_strategies.py holds the shares.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.schedule import ORDERS, KernelSchedule, Schedule, tiled_variables
from tests.nightly import NIGHTLY
from tests.random_texts import random_text

LENGTHS = (1, 2, 7, 13, 16, 17, 31, 33, 37, 47, 64)
FEATURES = (1, 3, 8, 16, 17, 20)
SMALL = (1, 2, 3)
TILES = (16, 32, 64)
USUAL = KernelSchedule()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A cascade, its extents, the tiles of its kernels and the inputs it is tried on.

    Args:
        text: the cascade.
        extents: of every rank of an input.
        tiles: sizes given to the tiled variables of all kernels, in turn.
        walk: how their grids and tiles are walked: the order, one loop and persistent programs of this schedule.
        seed: of the inputs. spread: standard deviation of queries.
    """

    text: str
    extents: Mapping[str, int]
    tiles: tuple[int, ...] = TILES
    seed: int = 0
    spread: float = 1.0
    walk: KernelSchedule = USUAL

    @property
    def cascade(self) -> Cascade:
        """The parsed text."""
        return parsed(self.text)

    def inputs(self) -> dict[str, np.ndarray[Any, Any]]:
        """The same arrays for the same case: normal numbers, lengths and document numbers where the names say so."""
        return random_inputs(self.cascade, self.extents, seed=self.seed, spread=self.spread)

    def schedule(self, program: Program) -> Schedule:
        """A legal schedule of the program with the tiles of this case."""
        return tile_schedule(program, self.tiles, walk=self.walk)


@lru_cache(maxsize=1024)
def parsed(text: str) -> Cascade:
    """Parse once."""
    return parse(text, name="random.cascade")


def random_inputs(
    cascade: Cascade, extents: Mapping[str, int], *, seed: int = 0, spread: float = 1.0
) -> dict[str, np.ndarray[Any, Any]]:
    """Normal inputs; `LEN` is a length of the keys, `DM` and `DP` are document numbers, `Q` has a spread of its own."""
    rng = np.random.default_rng(seed)
    out = {}
    for i in cascade.inputs:
        shape = tuple(extents[rank_of(v)] for v in i.indices)
        if i.tensor == "LEN":
            out[i.tensor] = rng.integers(0, extents["M"] + 2, size=shape).astype(np.float64)
        elif i.tensor in ("DM", "DP"):
            out[i.tensor] = rng.integers(0, 3, size=shape).astype(np.float64)
        else:
            out[i.tensor] = rng.standard_normal(shape) * (spread if i.tensor == "Q" else 1.0)
    return out


def tile_schedule(program: Program, tiles: tuple[int, ...], *, walk: KernelSchedule = USUAL) -> Schedule:
    """Hand out tile sizes in turn; small enough that a temporary of three axes stays below 2^20 elements.

    Kernels are walked as `walk` says, where they have a loop and a grid.
    """
    kernels, n = {}, 0
    for k in program.kernels:
        chosen = {}
        for v in tiled_variables(program, k.name):
            chosen[v] = tiles[n % len(tiles)]
            n += 1
        kernels[k.name] = replace(
            walk,
            tiles=chosen,
            one_loop=walk.one_loop and bool(k.loops),
            persistent=walk.persistent if k.residents else 0,
        )
    return Schedule(kernels=kernels)


def examples(count: int) -> settings:
    """The settings of a property test: that many examples, and ten times as many in the nightly profile."""
    return settings(max_examples=count * (10 if NIGHTLY else 1))


def random_extents(rng: random.Random, cascade: Cascade) -> dict[str, int]:
    """Extents for the ranks of a cascade's inputs: 1, primes, below and above a tile."""
    out = {}
    for v in dict.fromkeys(v for i in cascade.inputs for v in i.indices):
        out[rank_of(v)] = rng.choice(FEATURES if v in "efj" else SMALL if v in "bhgrn" else LENGTHS)
    return out


def random_case(seed: int, tiles: tuple[int, ...] = TILES) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    text = random_text(rng)
    return Case(
        text=text,
        extents=random_extents(rng, parsed(text)),
        seed=rng.randrange(1 << 16),
        tiles=tuple(rng.choice(tiles) for _ in range(4)),
        spread=rng.choice((1.0, 1.0, 1.0, 4.0)),
        walk=KernelSchedule(order=rng.choice(ORDERS), one_loop=rng.random() < 0.3, persistent=rng.choice((0, 0, 1, 3))),
    )


def cases(tiles: tuple[int, ...] = TILES) -> st.SearchStrategy[Case]:
    """Cases for property tests.

    One draw a case: drawn choice by choice, three quarters of hypothesis' examples repeat an earlier text.
    """
    return st.integers(0, (1 << 32) - 1).map(lambda seed: random_case(seed, tiles))


def sample(count: int, first: int = 0) -> list[Case]:
    """The cases of the seeds from `first` on: the same on every machine."""
    return [random_case(first + n) for n in range(count)]


def loops_of(cascade: Cascade) -> int:
    """Loops over the keys, one after the other, that the derived form needs."""
    from einsumcascade.rewrites.derive import simplify
    from einsumcascade.rewrites.loop_form import loop_form

    simple = simplify(cascade).cascade
    over = tuple(v for v in ("m", "n") if any(v in e.ranks for e in simple.einsums))
    return loop_form(simple, over=over, tile=16).loops


def close(actual: Any, expected: Any, *, rel: float = 1e-9) -> bool:
    """Whether float64 results agree relative to the largest finite element; infinities and NaN must be in place."""
    a, e = np.asarray(actual), np.asarray(expected)
    if a.shape != e.shape:
        return False
    both = np.isfinite(e)
    if not np.array_equal(both, np.isfinite(a)):
        return False
    if not np.array_equal(np.isnan(a), np.isnan(e)) or not np.array_equal(a[np.isinf(e)], e[np.isinf(e)]):
        return False
    size = max(1.0, float(np.abs(e[both]).max())) if both.any() else 1.0
    return bool(np.all(np.abs(a[both] - e[both]) <= rel * size)) and math.isfinite(size)
