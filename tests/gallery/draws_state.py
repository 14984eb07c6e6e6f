"""How the inputs of texts with a state, a solve, a gather or two key ranks are drawn."""

from __future__ import annotations

import numpy as np

from tests.gallery.drawing import Draw, Recipe, between, normal, unit, whole

# Gates near 1 and their logs; small steps, so that a memory neither dies nor grows without bound.
GATE, LOG_GATE, STEP = between(0.6, 0.99), between(-0.4, -0.01), between(0.05, 0.4)
# A delta rule is a contraction where keys have length 1 and BETA lies between 0 and 1.
DELTA: dict[str, Draw] = {"K": unit(), "BETA": between(0.1, 0.9)}
# Recurrences over T have no scores; what is large is the query.
CHUNKS = {"T": 18}
SQUARE = {"M": 23}


def simplex(rng: np.random.Generator, shape: tuple[int, ...], extents: object) -> np.ndarray:
    """Rows of positive numbers that sum to 1."""
    x = rng.uniform(0.2, 1.0, size=shape)
    return x / x.sum(axis=-1, keepdims=True)


DRAWS: dict[str, Recipe] = {
    "gla": Recipe(draws={"G": GATE}, sets=("odd", "ones", "large")),
    "gla_chunk": Recipe(extents=CHUNKS, draws={"LG": LOG_GATE}, sets=("odd", "large")),
    "dsfnorm": Recipe(sets=("odd", "ones", "large")),
    "aaren": Recipe(large=("QA",), sets=("odd", "ones", "large")),
    "selfgate": Recipe(sets=("odd", "ones", "large")),
    "ctmsync": Recipe(
        extents={"K": 4}, draws={"IL": whole(0, "D"), "IR": whole(0, "D"), "DEC": between(0.0, 1.0)}, large=("W",)
    ),
    "s6": Recipe(draws={"A": GATE}, large=("U",), sets=("odd", "ones", "large")),
    "fox": Recipe(extents={"P": 13, "M": 13}, draws={"LF": LOG_GATE}, sets=("odd", "ones", "large")),
    "stickbreak": Recipe(fixed={"M": 36}, sets=("odd", "swapped", "large")),
    "flow_causal": Recipe(sets=("odd", "ones", "large")),
    "abc_causal": Recipe(large=("Q", "AK"), sets=("odd", "ones", "large")),
    "flow": Recipe(large=("Q",)),
    "landmark": Recipe(fixed={"P": 36, "M": 36}, sets=("odd", "large")),
    "slot": Recipe(large=("Q",)),
    "abc": Recipe(large=("Q", "AK")),
    # Well apart, so that the middle matrix has an inverse worth the name.
    "nystrom": Recipe(fixed={"P": 24, "M": 24}, draws={"Q": normal(3.0), "K": normal(3.0)}, sets=("odd",)),
    "lara": Recipe(extents={"C": 4}, large=("Q",), times=20.0),
    "longshort": Recipe(large=("Q", "CP")),
    "gman": Recipe(fixed={"N": 12}, large=("X",), times=20.0, sets=("odd", "large")),
    "sparsifiner": Recipe(extents={"C": 4, "K": 7}, sets=("odd", "swapped", "large")),
    "routing": Recipe(extents={"C": 3, "M": 23}, sets=("odd", "large")),
    "moba": Recipe(fixed={"P": 36, "M": 36}, sets=("odd", "large")),
    "halo": Recipe(fixed={"Y": 8, "X": 12, "I": 8, "J": 12, "R": 11, "S": 11}, sets=("odd", "large")),
    "probsparse": Recipe(extents={"S": 5}, draws={"SMP": whole(0, "M")}, sets=("odd", "swapped", "large")),
    "deltanet": Recipe(draws={**DELTA, "G": GATE}, sets=("odd", "ones", "large")),
    "deltanet_chunk": Recipe(extents=CHUNKS, draws={**DELTA, "LG": LOG_GATE}, sets=("odd", "large")),
    "rwkv7": Recipe(
        draws={"W": GATE, "KK": unit(), "A": between(0.1, 0.9)}, large=("R",), sets=("odd", "ones", "large")
    ),
    "sessa": Recipe(fixed={"P": 17, "M": 17}, draws={"GAM": between(-0.9, 0.9)}, sets=("odd", "large")),
    "deltaformer": Recipe(fixed={"P": 17, "M": 17}, draws={"BETA": between(0.1, 0.9)}, sets=("odd", "large")),
    # A ridge well above 0: the first queries see fewer keys than the fit has slopes.
    "lla_1p": Recipe(fixed={"P": 17, "M": 17}, draws={"LAM": between(0.5, 2.0)}, sets=("odd",)),
    # In exact arithmetic as many steps as E has elements are enough; a few more for rounding.
    "lla_cg": Recipe(fixed={"P": 17, "M": 17, "N": 12}, draws={"LAM": between(0.5, 2.0)}, sets=("odd",)),
    "mesa": Recipe(
        draws={"BETA": between(0.1, 0.9), "G": GATE, "LAM": between(0.5, 2.0)}, sets=("odd", "ones", "large")
    ),
    "titans": Recipe(
        draws={"K": unit(), "THETA": STEP, "ALPHA": between(0.05, 0.3), "ETA": between(0.1, 0.6)},
        sets=("odd", "ones", "large"),
    ),
    "titans_chunk": Recipe(
        extents=CHUNKS, draws={"K": unit(), "THETA": STEP, "LA": LOG_GATE, "LE": LOG_GATE}, sets=("odd", "large")
    ),
    "moneta": Recipe(draws={"K": unit(), "ALPHA": GATE, "ETA": between(0.01, 0.05)}, sets=("odd", "ones", "large")),
    "yaad": Recipe(
        draws={"K": unit(), "ALPHA": GATE, "ETA": STEP, "DELTA": between(0.3, 2.0)}, sets=("odd", "ones", "large")
    ),
    "memora": Recipe(draws={"K": unit(), "ALPHA": GATE, "ETA": STEP, "W0": simplex}, sets=("odd", "ones", "large")),
    # Bisection halves an interval of 1: 60 steps leave nothing of it.
    "sparsemax": Recipe(fixed={"N": 60}, times=5.0, sets=("odd", "ones", "large")),
}
