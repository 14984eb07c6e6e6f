"""How the inputs of every text of the gallery are drawn, and at which extents.

The sets are `odd`, fewer queries than keys; `swapped`, the other way round; `ones`, every extent 1 that may be; and
`large`, whose scores reach a thousand, so that a wrong sign on a maximum shows.
"""

from __future__ import annotations

from collections.abc import Mapping

from einsumcascade.gallery import draws_state
from einsumcascade.gallery.drawing import Array, Generator, Recipe, between, chance, normal, up_to, whole
from einsumcascade.language.ir import Cascade, rank_of

# Several tiles of 16, none of them full at the end.
USUAL = {"B": 2, "G": 2, "H": 3, "R": 3, "S": 2, "P": 23, "M": 37, "T": 13, "N": 11, "E": 5, "F": 3, "D": 7, "X": 9}
OTHERS = 5

DRAWS: dict[str, Recipe] = {
    # The texts with a tile or a window of their own see more than one of it.
    "softmax_1p": Recipe(extents={"H": 1, "P": 7, "M": 150}),
    "sliding_window": Recipe(extents={"B": 1, "H": 1, "P": 290, "M": 301}),
    "mla": Recipe(extents={"C": 7, "R": 4}, large=("Q", "QR")),
    "mla_absorbed": Recipe(extents={"C": 7, "R": 4}, large=("QC", "QR")),
    # Bounds in any order, so some hold no key.
    "varlen": Recipe(draws={"LO": whole(0, "M"), "HI": up_to("M")}),
    "varlen_causal": Recipe(draws={"LO": whole(0, "M"), "HI": up_to("M"), "FIRST": whole(0, "P")}),
    "paged": Recipe(
        extents={"B": 5, "T": 3},
        fixed={"X": 20},
        draws={"TAB": whole(0, 5), "LEN": lambda rng, shape, n: rng.integers(0, 4 * n["T"] + 1, size=shape)},
    ),
    # Scores are as large as the gains make them.
    "qknorm": Recipe(large=("GQ",)),
    "dropout": Recipe(extents={"H": 2, "P": 11}, draws={"SEED": whole(-(2**40), 2**40)}),
    "rope": Recipe(extents={"J": 3}, fixed={"X": 2}),
    "gatv2": Recipe(draws={"ADJ": chance(0.2)}, large=("AW",)),
    "tin": Recipe(extents={"B": 5}, draws={"LEN": whole(0, "M")}, large=("XT",)),
    "ista": Recipe(extents={"N": 2, "C": 2, "T": 3, "U": 7, "K": 3}),
    "rfattn": Recipe(large=("X0",)),
    # Positive features: else a denominator comes as near to zero as it likes.
    "kernelattn": Recipe(draws={"FQ": between(0.1, 1.0), "FK": between(0.1, 1.0)}, large=("FQ",)),
    # Features are elu(x) + 1, which rounds to zero below -37: larger keys would have no weight at all.
    "linear": Recipe(large=("Q", "K"), times=5.0),
    "gatedconv": Recipe(extents={"Y": 7}, fixed={"Dy": 3, "Dx": 3}, large=("X",)),
    "gaam": Recipe(draws={"CW": between(0.5, 2.0)}, large=("DELTA",)),
    "staticmap": Recipe(large=("J1",)),
    "diff": Recipe(fixed={"S": 2}),
    "gda": Recipe(large=("Q", "QN")),
    "ebt": Recipe(large=("QP",)),
    "moh": Recipe(extents={"H": 5, "S": 3}, fixed={"T": 2}, large=("LG",), sets=("odd", "swapped", "large")),
    "var": Recipe(draws={"CLS": whole(0, 4)}),
    # Of two heads one would lie exactly a standard deviation above the mean. Heads are ranked by how far they move, so
    # no two of them may lose the image without moving at all.
    "vhd": Recipe(extents={"H": 5}, draws={"IMG": chance(0.5)}, times=200.0),
    "pave": Recipe(extents={"T": 3, "N": 5}, draws={"IDX": whole(0, "X")}, large=("W",)),
    # Sharp enough for sinks.
    "sinkscore": Recipe(draws={"Q": normal(4.0)}),
    "gaze": Recipe(draws={"TXT": chance(0.8), "IMG": chance(0.5)}),
    **draws_state.DRAWS,
}


def recipe(name: str) -> Recipe:
    """The recipe of a text; most need none of their own."""
    return DRAWS.get(name, Recipe())


def extents_of(cascade: Cascade, name: str, kind: str = "odd") -> dict[str, int]:
    """The extents of the ranks of the inputs in one set."""
    made = recipe(name)
    usual = {**USUAL, **made.extents}
    if kind == "swapped":
        usual |= {"P": usual["M"], "M": usual["P"]}
    ranks = dict.fromkeys(rank_of(v) for i in cascade.inputs for v in i.indices)
    return {r: made.fixed.get(r, 1 if kind == "ones" else usual.get(r, OTHERS)) for r in ranks}


def draw(cascade: Cascade, name: str, rng: Generator, kind: str = "odd") -> dict[str, Array]:
    """The inputs of one set in float64, or in whole numbers; `rng` is a NumPy generator."""
    return drawn(cascade, name, rng, extents_of(cascade, name, kind), large=kind == "large")


def drawn(
    cascade: Cascade, name: str, rng: Generator, extents: Mapping[str, int], *, large: bool = False
) -> dict[str, Array]:
    """Inputs of given extents by the recipe of a text."""
    made, out = recipe(name), {}
    for i in cascade.inputs:
        shape = tuple(extents[rank_of(v)] for v in i.indices)
        x = made.draws[i.tensor](rng, shape, extents) if i.tensor in made.draws else rng.standard_normal(shape)
        out[i.tensor] = made.times * x if large and i.tensor in made.large else x
    return out
