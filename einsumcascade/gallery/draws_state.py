"""How the inputs of texts with a state, a solve, a gather or two key ranks are drawn."""

from __future__ import annotations

from collections.abc import Mapping

from einsumcascade.gallery.drawing import Array, Draw, Generator, Recipe, between, unit, whole

# Sequences have one length, not two.
ONE = ("odd", "ones", "large")
# A choice of several rows needs more than one.
CHOICE = ("odd", "swapped", "large")
# A memory written with keys of length 1 and rates below 1 shrinks what it gets wrong; longer keys make it grow without
# bound, and rounding with it.
KEYS = unit()
RATES = between(0.05, 0.95)
# Chunks of 6.
CHUNKS = {"T": 18}
LOGS = between(-0.5, 0.0)


def segments(rng: Generator, shape: tuple[int, ...], extents: Mapping[str, int]) -> Array:
    """Four stretches of vectors, each around a direction of its own: the matrix between their means is far from
    singular, and stays so when the scores are large."""
    x = 0.3 * rng.standard_normal(shape)
    for row in range(shape[0]):
        x[row, row * 4 // shape[0]] += 2
    return x


def steps(rng: Generator, shape: tuple[int, ...], extents: Mapping[str, int]) -> Array:
    """What only gives its extent."""
    return 0.0 * rng.random(shape)


def levels(low: int, high: int) -> Draw:
    """Whole numbers from `low` to below `high` in float64."""
    return lambda rng, shape, extents: rng.integers(low, high, size=shape).astype("float64")


def simplex(rng: Generator, shape: tuple[int, ...], extents: Mapping[str, int]) -> Array:
    """Rows that sum to 1, no element near zero."""
    x = rng.uniform(0.5, 1.5, size=shape)
    return x / x.sum(axis=-1, keepdims=True)


DRAWS: dict[str, Recipe] = {
    # Recurrences.
    "linattn": Recipe(sets=ONE),
    "gla": Recipe(draws={"G": RATES}, sets=ONE),
    "gla_chunk": Recipe(fixed=CHUNKS, draws={"LG": LOGS}, sets=ONE),
    "retention": Recipe(draws={"GAM": RATES}, sets=ONE),
    "s6": Recipe(draws={"A": RATES}, large=("C",), sets=ONE),
    "dsfnorm": Recipe(sets=ONE),
    "aaren": Recipe(large=("QA",), sets=ONE),
    "selfgate": Recipe(sets=ONE),
    "ctmsync": Recipe(
        extents={"K": 8}, draws={"IL": whole(0, "D"), "IR": whole(0, "D"), "DEC": between(0.0, 2.0)}, large=("W",)
    ),
    # A gate for each position, whichever rank is longer.
    "fox": Recipe(fixed={"T": 40}, draws={"LF": between(-1.0, 0.0)}),
    # Whole tiles of 4 keys.
    "stickbreak": Recipe(extents={"P": 24, "M": 40}, sets=CHOICE),
    "flow_causal": Recipe(sets=ONE),
    "abc_causal": Recipe(large=("Q", "AK", "AVS"), sets=ONE),
    # Linked and nested normalisations.
    "landmark": Recipe(fixed={"M": 40}, times=3000.0),
    "slot": Recipe(times=3000.0),
    "abc": Recipe(large=("Q", "AK", "AW")),
    "nystrom": Recipe(
        fixed={"P": 24, "M": 24}, draws={"Q": segments, "K": segments}, times=3000.0, sets=("odd", "large")
    ),
    "lara": Recipe(large=("Q", "MU")),
    "longshort": Recipe(large=("Q", "CP")),
    "gman": Recipe(fixed={"N": 12}, large=("X",), times=60.0, sets=ONE),
    # Choices.
    "sparsifiner": Recipe(sets=CHOICE),
    "routing": Recipe(sets=CHOICE),
    "moba": Recipe(fixed={"M": 40}),
    "nsa": Recipe(fixed={"M": 40, "C": 3}, draws={"G": RATES}),
    "halo": Recipe(extents={"Y": 7, "X": 9, "I": 7, "J": 9}, fixed={"R": 11, "S": 11}, sets=ONE),
    "probsparse": Recipe(extents={"S": 30}, draws={"SMP": whole(0, "M")}, sets=CHOICE),
    "tcpa": Recipe(extents={"R": 7}, sets=CHOICE),
    "ttf": Recipe(draws={"DIFF": between(0.0, 0.05)}, sets=CHOICE),
    "heavy_hitters": Recipe(large=("Q", "QN"), sets=CHOICE),
    "bottleneck": Recipe(large=("C",), sets=("odd", "large")),
    "neighbour_cache": Recipe(draws={"NB": whole(0, "X"), "LEN": whole(0, "J")}, large=("AW",)),
    "sparse_causal": Recipe(extents={"T": 4, "H": 2}),
    # Delta rules and feedback.
    "deltanet": Recipe(draws={"K": KEYS, "BETA": RATES, "G": RATES}, sets=ONE),
    "deltanet_chunk": Recipe(fixed=CHUNKS, draws={"K": KEYS, "BETA": RATES, "LG": LOGS}, sets=ONE),
    "rwkv7": Recipe(draws={"KK": KEYS, "W": RATES, "A": RATES}, large=("R",), sets=ONE),
    # Row sums of the feedback below 1 bound its inverse.
    "sessa": Recipe(extents={"P": 23, "M": 23}, draws={"GAM": between(-0.9, 0.9)}, large=("Q", "QB"), sets=ONE),
    "deltaformer": Recipe(extents={"P": 23, "M": 23}, draws={"BETA": RATES}, sets=ONE),
    # With W of length 1, no factor I - beta W W' with beta below 2 lengthens a key.
    "path": Recipe(extents={"P": 23, "M": 23}, draws={"W": KEYS, "BETA": between(0.1, 1.9)}, sets=ONE),
    # Fits: the ridge is what makes a query with fewer keys than features have one.
    "lla_1p": Recipe(draws={"LAM": between(0.5, 2.0)}, times=50.0),
    # As many steps as E has elements end the search; a step after that divides rounding by rounding.
    "lla_cg": Recipe(fixed={"N": 5}, draws={"LAM": between(0.5, 2.0), "NIT": steps}, times=50.0),
    "local_quadratic": Recipe(extents={"E": 3}, draws={"LAM": between(0.5, 2.0)}, times=5.0),
    "mesa": Recipe(draws={"K": KEYS, "BETA": RATES, "G": RATES, "LAM": between(0.5, 2.0)}, sets=ONE),
    # Memories that learn: steps short enough to descend.
    "titans": Recipe(
        draws={"K": KEYS, "THETA": between(0.05, 0.4), "ALPHA": between(0.0, 0.3), "ETA": RATES}, sets=ONE
    ),
    "titans_chunk": Recipe(
        fixed=CHUNKS, draws={"K": KEYS, "THETA": between(0.05, 0.4), "LA": LOGS, "LE": between(-2.0, -0.2)}, sets=ONE
    ),
    "moneta": Recipe(draws={"K": KEYS, "ALPHA": between(0.8, 1.0), "ETA": between(0.01, 0.05)}, sets=ONE),
    "yaad": Recipe(draws={"K": KEYS, "ALPHA": between(0.8, 1.0), "ETA": RATES, "DELTA": between(0.3, 2.0)}, sets=ONE),
    "memora": Recipe(draws={"K": KEYS, "ALPHA": between(0.8, 1.0), "ETA": between(0.05, 0.4), "W0": simplex}, sets=ONE),
    "ttt_linear": Recipe(
        extents={"F": 5}, draws={"K": KEYS, "ETA": between(0.05, 0.4), "GA": between(0.5, 1.5)}, sets=ONE
    ),
    # Sixty halvings of an interval of length 1 leave nothing of it.
    "sparsemax": Recipe(fixed={"N": 60}, draws={"NIT": steps}),
    "entmax15": Recipe(fixed={"N": 60}, draws={"NIT": steps}),
    # Layouts.
    "flash_attention_1": Recipe(extents={"H": 1, "P": 7, "M": 150}),
    "rabe_staats": Recipe(extents={"H": 1, "P": 7, "M": 150}),
    # Longer than the farthest bucket begins.
    "t5bias": Recipe(extents={"H": 1, "P": 137, "M": 150}, fixed={"N": 32}),
    "swinbias": Recipe(extents={"W": 2, "Y": 4, "X": 3, "I": 4, "J": 3}, fixed={"U": 7, "V": 7}, sets=ONE),
    # Whole numbers as floating-point ones, which is how an op takes them.
    "quantised_kv": Recipe(
        draws={name: levels(-8, 8) for name in ("KI", "VI")}
        | {name: levels(-2, 3) for name in ("KZ", "VZ")}
        | {name: between(0.1, 0.3) for name in ("KS", "VS")}
    ),
    # Some periods divide the length, some do not.
    "mptsnet": Recipe(extents={"T": 12, "K": 5, "C": 4}, draws={"PER": whole(1, 7)}, large=("Q", "AMP"), sets=ONE),
    "axial": Recipe(extents={"N": 6}, large=("QS", "QT"), sets=ONE),
    # A score is the exponential of a product: that of ten is large.
    "sahp": Recipe(times=2.0),
    "pooling": Recipe(large=("W",), sets=ONE),
    "feedback": Recipe(extents={"N": 4}, draws={"NIT": steps}),
}
