"""Masks as constraints: each means a softmax under an array of truth values, and has a kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from tests.codegen.judging import assert_within_bounds

Arrays = Mapping[str, NDArray[Any]]
# Whether query p of head h sees key m.
Sees = Callable[[int, int, int, Arrays], bool]
FOLDER = Path(__file__).resolve().parents[2] / "einsumcascade" / "gallery"
RNG = np.random.default_rng(5)
# Longer than both sequences, so that either may be the longer one.
TOKENS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """One mask.

    Args:
        constraint: its conditions over p and m. sees: the same for a single pair of positions.
        constants: of the conditions. tensors: inputs that they read, declared with their ranks.
    """

    constraint: str
    sees: Sees
    constants: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)


DOCUMENTS = {"DOC[t]": np.repeat([0, 1, 2, 3], [7, 1, 19, 13])}
SEGMENTS = {"SEG[t]": np.repeat([0, 1, 2], [9, 4, 27])}
# An ancestor table: token p descends from m.
PARENTS = [-1] + [int(RNG.integers(max(0, n - 4), n)) for n in range(1, TOKENS)]
TREE = np.eye(TOKENS, dtype=np.int64)
for _node in range(1, TOKENS):
    TREE[_node] |= TREE[PARENTS[_node]]
ADJACENCY = (RNG.random((TOKENS, TOKENS)) < 0.15).astype(np.int64)
SHIFTED = "(h < 2 and m//g == p//g or h >= 2 and ((m + s) % n)//g == ((p + s) % n)//g"


def grouped(h: int, p: int, m: int) -> bool:
    """Groups of 8 positions; in the second half of the heads they begin 4 earlier and close around the end at 40."""
    if h < 2:
        return p // 8 == m // 8
    starts = [[*range(36, 40), *range(4)], *([*range(n, n + 8)] for n in (4, 12, 20, 28))]
    return any(p in group and m in group for group in starts)


MASKS = {
    "none": Mask(constraint="", sees=lambda h, p, m, x: True),
    "causal": Mask(constraint="m <= p", sees=lambda h, p, m, x: m in range(p + 1)),
    "strictly causal": Mask(constraint="m < p", sees=lambda h, p, m, x: m in range(p)),
    "sliding window": Mask(
        constraint="m <= p, m > p - w", sees=lambda h, p, m, x: m in range(p - 4, p + 1), constants={"w": 5}
    ),
    "symmetric window": Mask(
        constraint="p - m <= w, m - p <= w", sees=lambda h, p, m, x: abs(p - m) <= 3, constants={"w": 3}
    ),
    "sink and window": Mask(
        constraint="m <= p, (m < s) or (p - m < w)",
        sees=lambda h, p, m, x: m <= p and m in {0, 1, *range(p - 5, p + 1)},
        constants={"s": 2, "w": 6},
    ),
    "prefix": Mask(constraint="(m <= p) or (m < n)", sees=lambda h, p, m, x: m <= max(p, 10), constants={"n": 11}),
    "document": Mask(
        constraint="DOC[m] == DOC[p], m <= p",
        sees=lambda h, p, m, x: m <= p and x["DOC"][m] == x["DOC"][p],
        tensors=DOCUMENTS,
    ),
    "segment order": Mask(
        constraint="SEG[m] <= SEG[p]", sees=lambda h, p, m, x: x["SEG"][m] <= x["SEG"][p], tensors=SEGMENTS
    ),
    "block causal": Mask(
        constraint="m < (p//b0 + 1)*b0", sees=lambda h, p, m, x: m // 6 <= p // 6, constants={"b0": 6}
    ),
    "future expanding": Mask(
        constraint="m < (p//lv + 1)*la + ahead",
        sees=lambda h, p, m, x: m < 2 + 5 * (1 + p // 4),
        constants={"lv": 4, "la": 5, "ahead": 2},
    ),
    "causal with strides": Mask(
        constraint="m//lm <= p//lp", sees=lambda h, p, m, x: m // 3 <= p // 2, constants={"lm": 3, "lp": 2}
    ),
    "block diagonal": Mask(
        constraint="m//b0 == p//b0", sees=lambda h, p, m, x: m in range(p - p % 6, p - p % 6 + 6), constants={"b0": 6}
    ),
    "shifted groups": Mask(
        constraint=SHIFTED + "), m <= p",
        sees=lambda h, p, m, x: m <= p and grouped(h, p, m),
        constants={"s": 4, "n": TOKENS, "g": 8},
    ),
    "shifted groups and sinks": Mask(
        constraint=SHIFTED + " or m < sinks), m <= p",
        sees=lambda h, p, m, x: m <= p and (m < 2 or grouped(h, p, m)),
        constants={"s": 4, "n": TOKENS, "g": 8, "sinks": 2},
    ),
    # The first n keys are persistent; token p is key n + p, and sees its segment up to itself.
    "persistent and segment": Mask(
        constraint="(m < n) or ((m - n <= p) and ((m - n)//w == p//w))",
        sees=lambda h, p, m, x: m < 3 or m - 3 in range(p - p % 7, p + 1),
        constants={"n": 3, "w": 7},
    ),
    "dilated": Mask(
        constraint="(p - m) % d == 0, m <= p", sees=lambda h, p, m, x: m in range(p, -1, -3), constants={"d": 3}
    ),
    "tree": Mask(constraint="TREE[p,m] > 0", sees=lambda h, p, m, x: m in ancestors(p), tensors={"TREE[t,u]": TREE}),
    "adjacency": Mask(
        constraint="ADJ[p,m] > 0", sees=lambda h, p, m, x: bool(ADJACENCY[p, m]), tensors={"ADJ[t,u]": ADJACENCY}
    ),
    "routed to full attention": Mask(
        constraint="m <= p, ROUTE == 1 or (m < 2 or p - m < 6)",
        sees=lambda h, p, m, x: m <= p,
        tensors={"ROUTE": np.array(1)},
    ),
    "routed to a stream": Mask(
        constraint="m <= p, ROUTE == 1 or (m < 2 or p - m < 6)",
        sees=lambda h, p, m, x: m <= p and (m < 2 or p - m < 6),
        tensors={"ROUTE": np.array(0)},
    ),
}


def ancestors(node: int) -> set[int]:
    """The node and all above it, parent by parent."""
    found = set()
    while node >= 0:
        found.add(node)
        node = PARENTS[node]
    return found


def masked(name: str, mask: Mask) -> Cascade:
    """A text of the gallery with more declarations at its end, and a constraint if there is one."""
    text = (FOLDER / f"{name}.cascade").read_text(encoding="utf-8")
    lines = [f"in {tensor}" for tensor in mask.tensors]
    lines += [f"const {constant} = {value}" for constant, value in mask.constants.items()]
    if mask.constraint:
        # Where the keys are partitioned, their position is an expression.
        key = "(m1*M0 + m0)" if "rank m0" in text else "m"
        lines.append("constraint " + re.sub(r"\bm\b", key, mask.constraint))
    return parse(text + "\n".join(lines) + "\n", name=f"{name}.cascade")


def drawn(p: int, m: int, mask: Mask, *, large: float = 1.0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(p)
    shapes = {"Q": (2, 4, p, 5), "K": (2, 4, m, 5), "V": (2, 4, m, 3)}
    inputs: dict[str, NDArray[Any]] = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    inputs["Q"] *= large
    return inputs | {name.split("[")[0]: values for name, values in mask.tensors.items()}


def seen(mask: Mask, p: int, m: int) -> NDArray[np.bool_]:
    """The mask of each head, point by point."""
    tables = {name.split("[")[0]: values for name, values in mask.tensors.items()}
    return np.array([[[mask.sees(h, q, k, tables) for k in range(m)] for q in range(p)] for h in range(4)])


def weights(inputs: Arrays, sees: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Softmax over the keys that are seen; a query that sees none has no weights."""
    scores = np.einsum("bhpe,bhme->bhpm", inputs["Q"], inputs["K"]) / np.sqrt(5)
    top = np.max(scores, axis=-1, keepdims=True, where=sees, initial=-1e300)
    raised = np.where(sees, np.exp(np.minimum(scores - top, 0.0)), 0.0)
    return np.asarray(raised / np.maximum(raised.sum(axis=-1, keepdims=True), 1e-300))


@pytest.mark.parametrize(("p", "m", "large"), [(23, 37, 1.0), (37, 23, 1.0), (1, 1, 1.0), (23, 37, 200.0)])
@pytest.mark.parametrize("text", ["softmax_attention", "softmax_1p"])
@pytest.mark.parametrize("name", MASKS)
def test_a_constraint_is_a_mask(name: str, text: str, p: int, m: int, large: float) -> None:
    mask = MASKS[name]
    inputs = drawn(p, m, mask, large=large)
    found = run(masked(text, mask), inputs, extents={"M0": 8} if text == "softmax_1p" else None)["AV"]
    np.testing.assert_allclose(found, weights(inputs, seen(mask, p, m)) @ inputs["V"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_hides_some_keys_and_not_all(name: str) -> None:
    """Else the tests above would show nothing."""
    sees = seen(MASKS[name], 23, 37)
    assert sees.any() and (name == "none" or not sees.all())


@pytest.mark.parametrize("name", MASKS)
def test_a_kernel_under_a_constraint_is_within_the_error_rule(name: str) -> None:
    mask = MASKS[name]
    cascade = masked("softmax_attention", mask)
    inputs = {
        n: torch.tensor(v, dtype=torch.float32 if v.dtype.kind == "f" else torch.int32)
        for n, v in drawn(37, 75, mask).items()
    }
    assert_within_bounds(cascade, inputs, ec.compile(cascade)(**inputs))
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    built = build(cascade, extents=binding.extents, dtype="float32", target=gpu_target("cuda:90"), tile_limit=16)
    found = run_interpreted(built, inputs, binding)
    assert_within_bounds(cascade, inputs, tuple(found.values()))


@pytest.mark.parametrize("text", ["softmax_attention", "softmax_1p"])
def test_a_constraint_of_the_numerator_alone_selects_after_the_softmax(text: str) -> None:
    """The denominator runs over all keys, so weights that are left do not sum to 1."""
    mask = Mask(constraint="", sees=lambda h, p, m, x: True, tensors={"SEL[t,u]": ADJACENCY})
    cascade = masked(text, mask)
    weighed = "A[b, h, p, m] * V[b, h, m, f]" if text == "softmax_attention" else "SLN[b, h, m1, m0, p] * V"
    key = "m" if text == "softmax_attention" else "m1 * M0 + m0"
    lines = [f"{line} where SEL[p, {key}] > 0" if weighed in line else line for line in str(cascade).splitlines()]
    assert lines != str(cascade).splitlines()
    inputs = drawn(23, 37, mask)
    found = run(parse("\n".join(lines)), inputs)["AV"]
    chosen = np.where(ADJACENCY[:23, :37] > 0, weights(inputs, np.ones((23, 37), dtype=bool)), 0.0)
    np.testing.assert_allclose(found, chosen @ inputs["V"], rtol=1e-9, atol=1e-11)


def test_a_diagonal_term_and_the_strict_past_are_the_past() -> None:
    """An Einsum on m == p gives the score of a token with itself, which starts the maximum, the sum and the values."""
    cascade = parse(
        "in Q[p,e], K[m,e], V[m,f]\nconst scale = E ** -0.5\n"
        "QK[p,m] = scale * Q[p,e] * K[m,e] :: sum(e)\n"
        "D[p] = QK[p,m] :: sum(m) where m == p\n"
        "OWN[p,f] = V[m,f] * select(p == p, 1, 0) :: sum(m) where m == p\n"
        "TM[p] = QK[p,m] :: max(m) where m < p\n"
        "GM[p] = max(TM[p], D[p])\n"
        "SN[p,m] = exp(QK[p,m] - GM[p])\n"
        "SD[p] = SN[p,m] :: sum(m) where m < p\n"
        "NV[p,f] = SN[p,m] * V[m,f] :: sum(m) where m < p\n"
        "AV[p,f] = (NV[p,f] + exp(D[p] - GM[p]) * OWN[p,f]) / (SD[p] + exp(D[p] - GM[p]))\nout AV"
    )
    inputs = drawn(23, 37, MASKS["none"])
    one = {name: inputs[name][0, 0] for name in ("Q", "K", "V")}
    wanted = weights(inputs, seen(MASKS["causal"], 23, 37)) @ inputs["V"]
    np.testing.assert_allclose(run(cascade, one)["AV"], wanted[0, 0], rtol=1e-9, atol=1e-11)
