"""What hot loops hold for each score: what the algorithm needs, and one reason for each instruction beyond.

To print the table of docs/schedules.md:

    python -m tests.codegen.test_emission
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

import einsumcascade as ec
from einsumcascade.codegen.inspect import KernelReport
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.test_hot_loop import cascade_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"
# Head, tiles of queries and keys, warps, stages: the fastest of a hand-written kernel on an H200.
BEST = [(128, 128, 64, 4, 2), (128, 64, 64, 4, 3), (64, 64, 128, 4, 2), (64, 64, 64, 4, 3)]
CLASSES = ("MUFU", "FFMA", "FMUL", "FADD", "FMNMX", "F2FP")
TABLE = (64, 128, 64, 8, 2)
# The softmax that the others are held against, and those that compute it and more.
SOFTMAX = "softmax_attention"
VARIANTS = (
    SOFTMAX,
    f"causal {SOFTMAX}",
    "sliding_window",
    "softcap",
    "alibi",
    "sigmoid",
    "diff",
    "qknorm",
    "dropout",
    "t5bias",
    "cosformer_quad",
)
# More than softmax, a score.
EXTRA = {
    f"causal {SOFTMAX}": {},
    "sliding_window": {},
    "softcap": {"MUFU": 1, "FMUL": 1},
    "alibi": {"FADD": 1, "FFMA": 1, "FMUL": 1},
}


@cache
def report_of(name: str, choice: tuple[int, int, int, int, int]) -> KernelReport:
    size, p, m, warps, stages = choice
    chosen = KernelSchedule(tiles={"p": p, "m": m}, warps=warps, stages=stages, descriptors=True)
    kernel = ec.compile(cascade_of(name)).kernel(
        extents={"E": size, "F": size},
        dtype="bfloat16",
        target="cuda:90",
        schedule=Schedule(kernels={name.removeprefix("causal "): chosen}),
    )
    (report,) = kernel.inspect().kernels.values()
    return report


def per_score(name: str) -> dict[str, float]:
    """Instructions of the hot loop for each score of a thread, at the choices of the table."""
    report = report_of(name, TABLE)
    hot = report.hot_loop
    assert hot is not None
    scores = TABLE[1] * TABLE[2] / (32 * report.num_warps)
    return {**{c: hot.count(c) / scores for c in CLASSES}, "all": hot.instructions / scores}


def row(name: str) -> str:
    return f"| {name} | " + " | ".join(f"{n:.2f}" for n in per_score(name).values()) + " |"


@pytest.mark.parametrize("choice", BEST)
@pytest.mark.parametrize("name", [SOFTMAX, f"causal {SOFTMAX}"])
def test_the_fastest_choices_need_no_more_than_the_algorithm(name: str, choice: tuple[int, int, int, int, int]) -> None:
    """One exponential, multiply-add, addition and maximum a score, half a rounding, one product an accumulator."""
    size, p, m, warps, _ = choice
    threads = 32 * warps
    scores, kept, rows = p * m / threads, p * size / threads, p / (16 * warps) * 2
    needed = {
        "MUFU": scores + rows,
        "FFMA": scores + rows,
        "FMUL": kept + rows,
        "FADD": scores + 2 * rows,
        "FMNMX": scores + 2 * rows,
        "F2FP": scores / 2,
        "SHFL": 4 * rows,
    }
    hot = report_of(name, choice).hot_loop
    assert hot is not None
    found = {c: hot.count(c) for c in needed}
    assert {c: n for c, n in found.items() if n > 1.02 * needed[c]} == {}
    assert (hot.count("LDL"), hot.count("STL"), hot.serialised) == (0, 0, False)


@pytest.mark.parametrize("name", EXTRA)
def test_a_variant_adds_what_its_own_mathematics_needs(name: str) -> None:
    base, found = per_score(SOFTMAX), per_score(name)
    assert {c: round(found[c] - base[c], 1) for c in CLASSES} == {c: EXTRA[name].get(c, 0) for c in CLASSES}


def test_four_dropped_weights_cost_one_block_of_random_words() -> None:
    hot = report_of("dropout", TABLE).hot_loop
    assert hot is not None
    scores = TABLE[1] * TABLE[2] / (32 * TABLE[3])
    # Ten rounds of two wide products and two exclusive ors, and what the compiler adds for their constants.
    assert 10 / 2 <= hot.opcodes["IMAD"] / scores < 8 and 10 / 2 - 1 <= hot.opcodes["LOP3"] / scores < 5


def test_a_logarithm_and_a_cosine_are_one_instruction() -> None:
    assert per_score("t5bias")["MUFU"] == per_score(SOFTMAX)["MUFU"] + 1
    assert round(per_score("cosformer_quad")["MUFU"]) == 1


@pytest.mark.parametrize(("name", "products"), [("qknorm", [4, 3]), ("cosformer_quad", [4, 2])])
def test_a_gradient_through_maps_of_rows_is_products_of_tiles(name: str, products: list[int]) -> None:
    """A norm divides an operand, a ReLU is one: no sum of a product over three axes is left."""
    kernel = ec.compile(name).kernel(extents={"E": 64, "F": 64}, dtype="bfloat16", target="cuda:90", gradient=True)
    texts = [t.text for t in kernel.built.texts]
    found = [t.split("# tiles whose points are all live")[1].split("# tiles that")[0] for t in texts if "tl.dot" in t]
    assert [t.count("tl.dot(") for t in found] == products
    assert not any("[:, :, None]" in t or "[None, :, :]" in t for t in texts)


def test_a_sigmoid_is_an_exponential_and_a_reciprocal() -> None:
    found = per_score("sigmoid")
    assert {c: found[c] for c in CLASSES} == {"MUFU": 2, "FFMA": 1, "FMUL": 0, "FADD": 1, "FMNMX": 0, "F2FP": 0.5}


def test_a_difference_of_softmaxes_is_two_of_them() -> None:
    base, found = per_score(SOFTMAX), per_score("diff")
    assert {c: found[c] for c in CLASSES} == {c: 2 * base[c] for c in CLASSES}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_page_shows_the_instructions_of_a_score(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8").split("| beyond softmax |")[1].split("\n\n")[0]
    (line,) = [x for x in page.splitlines() if x.startswith(f"| {name} | ") and x.count("|") == 10]
    shown = [float(c) for c in line.split("|")[2:9]]
    found = per_score(name)
    assert shown[:-1] == [round(found[c], 2) for c in CLASSES]
    # Moves and addresses are the compiler's, and other in each of its versions.
    assert abs(shown[-1] - found["all"]) <= 0.05 * found["all"]


if __name__ == "__main__":
    print("| | " + " | ".join((*CLASSES, "all")) + " | beyond softmax |\n|" + "---|" * 9)
    print(*map(row, VARIANTS), sep="\n")
