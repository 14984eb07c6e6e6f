"""Tiles that kernels skip, test and take as full, against the mask itself, point by point."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen import tables as mask_tables
from einsumcascade.codegen.kernel_ir import Loop, TileKernel
from einsumcascade.codegen.launch import Built, build, run_interpreted
from einsumcascade.codegen.programs import program_of
from einsumcascade.codegen.run_torch import run_on_cpu
from einsumcascade.codegen.tables import tables_of
from einsumcascade.codegen.tiles import FULL, SKIPPED, tile_maps
from einsumcascade.language.extents import bind
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from tests.strategies import tile_schedule

TEXT = """\
in S[h,p,m], V[h,m,f]
in LO[p], HI[p], LEN[h], ROUTE, DOC[t], SEG[t], TREE[t,u], ADJ[h,t,u]
const w = {w}
const s = {s}
const d = {d}
const g = {g}
{constraints}
D[h,p] = S[h,p,m] :: sum(m)
O[h,p,f] = S[h,p,m] * V[h,m,f] :: sum(m)
out O, D
"""
HEADS = 2
Tables = Mapping[str, torch.Tensor]


def built_for(constraints: tuple[str, ...], tiles: tuple[int, int], constants: Mapping[str, int]) -> Built:
    text = TEXT.format(**constants, constraints="\n".join(f"constraint {c}" for c in constraints))
    cascade = parse(text, name="masked.cascade")
    used = {r for r in ("LO", "HI", "LEN", "ROUTE", "DOC", "SEG", "TREE", "ADJ") if any(r in c for c in constraints)}
    kept = tuple(i for i in cascade.inputs if i.tensor in {"S", "V", *used})
    cascade = replace(cascade, inputs=kept)
    extents = {"F": 4}
    schedule = tile_schedule(program_of(cascade, extents), tiles)
    return build(cascade, extents=extents, dtype="float32", target=gpu_target("cuda:90"), schedule=schedule)


def tables(p: int, m: int, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    t = max(p, m)
    lo = rng.integers(-2, max(m, 1), size=p)
    drawn = {
        "LO": lo,
        "HI": lo + rng.integers(-1, m + 1, size=p),
        "LEN": rng.integers(0, m + 3, size=HEADS),
        "ROUTE": rng.integers(0, 2),
        "DOC": np.sort(rng.integers(0, 4, size=t)) if seed % 2 else rng.integers(0, 3, size=t),
        "SEG": np.sort(rng.integers(0, 4, size=t)),
        "TREE": np.tril(rng.random((t, t)) < 0.3).astype(np.int64),
        "ADJ": (rng.random((HEADS, t, t)) < 0.1).astype(np.int64),
    }
    kind = (torch.int32, torch.int64, torch.float32)[seed % 3]
    return {n: torch.tensor(x).to(kind) for n, x in drawn.items()}


def mask_of(
    constraints: tuple[str, ...], p: int, m: int, given_tables: Tables, constants: Mapping[str, int]
) -> NDArray[np.bool_]:
    """The mask by Python's own arithmetic: names are numbers, tables are lists; beyond their ends nothing is live."""
    live = np.zeros((HEADS, p, m), dtype=bool)
    lists = {n: x.tolist() for n, x in given_tables.items()}
    code = compile(" and ".join(f"({c})" for c in constraints) or "True", "mask", "eval")
    for h, q, k in itertools.product(range(HEADS), range(p), range(m)):
        names = {**lists, **constants, "p": q, "m": k, "h": h, "P": p, "M": m}
        live[h, q, k] = bool(eval(code, {"__builtins__": {}}, names))
    return live


def as_python(constraint: str) -> str:
    """Reads of several indices as Python writes them."""
    return constraint.replace("ADJ[h,p,m]", "ADJ[h][p][m]").replace("TREE[p,m]", "TREE[p][m]")


def states_of(built: Built, p: int, m: int, given_tables: Tables) -> NDArray[np.int8]:
    names = {i.tensor for i in built.cascade.inputs}
    extents = {"H": HEADS, "P": p, "M": m, "F": 4}
    found = tile_maps(built, {n: x for n, x in given_tables.items() if n in names}, extents)
    assert all(torch.equal(found[0].states, x.states) for x in found), "loops of one kernel walk alike"
    assert found[0].axes == ("h", "p")
    return found[0].states.numpy()


def blocks(live: NDArray[np.bool_], rows: int, columns: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether any, and whether every point of each tile is live; a tile beyond the end of the keys is not full."""
    h, p, m = live.shape
    up, right = -p % rows, -m % columns
    any_of = np.pad(live, ((0, 0), (0, up), (0, right)))
    all_of = np.pad(np.pad(live, ((0, 0), (0, up), (0, 0)), constant_values=True), ((0, 0), (0, 0), (0, right)))
    shape = (h, (p + up) // rows, rows, (m + right) // columns, columns)
    return any_of.reshape(shape).any(axis=(2, 4)), all_of.reshape(shape).all(axis=(2, 4))


def check(
    constraints: tuple[str, ...],
    p: int,
    m: int,
    tiles: tuple[int, int],
    constants: Mapping[str, int],
    seed: int = 0,
    *,
    exact: bool = False,
) -> None:
    built = built_for(constraints, tiles, constants)
    given_tables = tables(p, m, seed)
    states = states_of(built, p, m, given_tables)
    live = mask_of(tuple(map(as_python, constraints)), p, m, given_tables, constants)
    some, every = blocks(live, *tiles)
    assert not (some & (states == SKIPPED)).any(), "a live tile is skipped"
    assert not (~every & (states == FULL)).any(), "a tile with a culled point is taken as full"
    if exact:
        assert not (~some & (states != SKIPPED)).any(), "a dead tile is visited"
        assert not (every & some & (states != FULL)).any(), "a full tile is tested"


CONSTANTS = {"w": 5, "s": 3, "d": 3, "g": 6}
# Masks that intervals say exactly: no remainder, at most one `or`.
EXACT = (
    (),
    ("m <= p",),
    ("m < p",),
    ("m <= p", "m > p - w"),
    ("p - m <= w", "m - p <= w"),
    ("m <= p", "(m < s) or (p - m < w)"),
    ("(m <= p) or (m < s)",),
    ("m < (p//g + 1)*g",),
    ("m < (p//g + 1)*w + s",),
    ("m//w <= p//g",),
    ("m//g == p//g",),
    ("(m < s) or ((m - s <= p) and ((m - s)//g == p//g))",),
    ("m != p",),
    ("m <= p and p - m < w",),
    ("not (m > p or m < p - w)",),
    ("m < LEN[h]",),
    ("m <= p", "m < LEN[h]"),
    ("m >= LEN[h]", "p >= LEN[h]"),
    ("ROUTE == 1 or m <= p",),
    ("h < 1 or m <= p",),
    ("m < (h + 1) * w",),
)
ROWS = (
    *EXACT,
    ("m <= p", "ROUTE == 1 or (m < s or p - m < w)"),
    ("DOC[m] == DOC[p]", "m <= p"),
    ("SEG[m] <= SEG[p]",),
    ("LO[p] <= m", "m < HI[p]"),
    ("((m + s)%M)//g == ((p + s)%M)//g", "m <= p"),
    ("(h < 1 and m//g == p//g or h >= 1 and ((m + s) % M)//g == ((p + s) % M)//g or m < s)", "m <= p"),
    ("(p - m) % d == 0", "m <= p"),
    ("TREE[p,m] > 0",),
    ("ADJ[h,p,m] > 0",),
    ("m < 0",),
    ("m < s or m > p + w or m == p",),
    ("(m < s or m >= M - s) and (m <= p or m % 2 == 0)",),
    ("SEG[m] <= SEG[p]", "(m + s) % g < LEN[h]", "(m + s) % g == h * w"),
)
SIZES = ((1, 1, (4, 4)), (7, 9, (4, 2)), (16, 16, (4, 4)), (5, 23, (8, 4)), (23, 5, (2, 8)), (17, 40, (4, 8)))


@pytest.mark.parametrize("constraints", ROWS, ids=", ".join)
def test_no_live_tile_is_skipped_and_no_other_is_full(constraints: tuple[str, ...]) -> None:
    for (p, m, tiles), seed in itertools.product(SIZES, range(3)):
        check(constraints, p, m, tiles, CONSTANTS, seed, exact=constraints in EXACT)


EDGES = ("p", "p + s", "p - w", "s", "M - s", "p // g * g", "(p // g + 1) * g", "2 * p", "P - p", "LEN[h]", "h * w")
KEYS = ("m", "m + 2", "2 * m", "M - m", "m // w", "(m - s) // g", "(m + s) % g", "w * m + p", "m - p", "-m")


@st.composite
def conditions(draw: st.DrawFn, depth: int = 2) -> str:
    kind = draw(st.sampled_from(("compare", "compare", "tensor", "and", "or", "not") if depth else ("compare",)))
    match kind:
        case "and" | "or":
            return f"({draw(conditions(depth - 1))} {kind} {draw(conditions(depth - 1))})"
        case "not":
            return f"not ({draw(conditions(depth - 1))})"
        case "tensor":
            return draw(
                st.sampled_from(
                    ("DOC[m] == DOC[p]", "SEG[m] <= SEG[p]", "ROUTE == 1", "TREE[p,m] > 0", "LO[p] <= m", "m < HI[p]")
                )
            )
        case _:
            op = draw(st.sampled_from(("<=", "<", "==", ">", ">=", "!=")))
            return f"{draw(st.sampled_from(KEYS))} {op} {draw(st.sampled_from(EDGES))}"


@settings(max_examples=120, deadline=None)
@given(
    st.lists(conditions(), min_size=1, max_size=3, unique=True),
    st.integers(1, 20),
    st.integers(1, 26),
    st.sampled_from((2, 4, 8)),
    st.sampled_from((2, 4, 8)),
    st.fixed_dictionaries({c: st.integers(int(c != "s"), 9) for c in ("w", "s", "d", "g")}),
    st.integers(0, 5),
)
def test_any_composition_of_conditions(
    masks: list[str], p: int, m: int, rows: int, columns: int, constants: dict[str, int], seed: int
) -> None:
    check(tuple(masks), p, m, (rows, columns), constants, seed)


@pytest.mark.parametrize("constraints", ROWS, ids=", ".join)
def test_kernels_that_skip_tiles_agree_with_the_reference(constraints: tuple[str, ...]) -> None:
    built = built_for(constraints, (16, 16), CONSTANTS)
    for (p, m), seed in zip(((37, 75), (50, 21)), (1, 3), strict=True):
        rng = np.random.default_rng(seed)
        given_tables = tables(p, m, seed)
        names = [i.tensor for i in built.cascade.inputs]
        inputs = {n: given_tables[n] for n in names if n in given_tables}
        inputs["S"] = torch.tensor(rng.standard_normal((HEADS, p, m)), dtype=torch.float32)
        inputs["V"] = torch.tensor(rng.standard_normal((HEADS, m, 4)), dtype=torch.float32)
        inputs = {n: inputs[n] for n in names}
        wanted = run(built.cascade, {n: x.numpy() for n, x in inputs.items()})
        binding = bind(built.cascade, shapes={n: tuple(x.shape) for n, x in inputs.items()})
        for found in (run_interpreted(built, inputs, binding), run_on_cpu(built, inputs, binding)):
            for name in ("O", "D"):
                np.testing.assert_allclose(found[name].numpy(), wanted[name], rtol=2e-5, atol=2e-5)


# Rows of the table of masks as users write them.
LARGE = {"w": 40, "s": 20, "d": 3, "g": 48}
TABLE = {
    "causal": ("m <= p",),
    "strictly causal": ("m < p",),
    "sliding window": ("m <= p", "m > p - w"),
    "symmetric window": ("p - m <= w", "m - p <= w"),
    "sink and window": ("m <= p", "(m < s) or (p - m < w)"),
    "prefix": ("(m <= p) or (m < s)",),
    "document": ("DOC[m] == DOC[p]", "m <= p"),
    "segment order": ("SEG[m] <= SEG[p]",),
    "block causal": ("m < (p//g + 1)*g",),
    "future expanding": ("m < (p//g + 1)*w + s",),
    "causal with strides": ("m//w <= p//g",),
    "block diagonal": ("m//g == p//g",),
    "shifted groups": ("((m + s)%M)//g == ((p + s)%M)//g", "m <= p"),
    "shifted groups and sinks": ("((m + s)%M)//g == ((p + s)%M)//g or m < s", "m <= p"),
    "persistent and segment": ("(m < s) or ((m - s <= p) and ((m - s)//g == p//g))",),
    "dilated": ("(p - m) % d == 0", "m <= p"),
    "tree": ("TREE[p,m] > 0",),
    "adjacency": ("ADJ[h,p,m] > 0",),
    "routed": ("m <= p", "ROUTE == 1 or (m < s or p - m < w)"),
    "ragged": ("LO[p] <= m", "m < HI[p]"),
}


@pytest.mark.parametrize("name", TABLE)
def test_few_dead_tiles_are_visited(name: str) -> None:
    p, m, tiles = 250, 301, (32, 16)
    given_tables = tables(p, m, 1)
    given_tables["DOC"] = torch.arange(m) // 70
    given_tables["TREE"] = (torch.arange(m)[:, None] // 40 == torch.arange(m) // 40).to(torch.int64).tril()
    given_tables["ADJ"] = torch.stack([given_tables["TREE"], given_tables["TREE"].T])
    given_tables["LO"] = torch.arange(p) // 60 * 60
    given_tables["HI"] = given_tables["LO"] + 60
    built = built_for(TABLE[name], tiles, LARGE)
    states = states_of(built, p, m, given_tables)
    live = mask_of(tuple(map(as_python, TABLE[name])), p, m, given_tables, LARGE)
    some, every = blocks(live, *tiles)
    extra = int(((states != SKIPPED) & ~some).sum()) / int(some.sum())
    print(
        f"{name}: {int(some.sum())} of {some.size} tiles live, {extra:.1%} visited beyond them, "
        f"{int((states == FULL).sum())} of {int(every.sum())} full ones taken as full"
    )
    assert not (some & (states == SKIPPED)).any() and not (~every & (states == FULL)).any()
    assert extra <= 0.15


@pytest.mark.parametrize("constraint", ["m < 0", "p < 0", "m < LEN[h]", "ROUTE == 5 or m < 0", "m <= p - 1000"])
def test_a_mask_that_is_never_true_gives_zeros_and_no_weight(constraint: str) -> None:
    cascade = parse(
        "in S[h,p,m], V[h,m,f]"
        + (", LEN[h]" if "LEN" in constraint else ", ROUTE" if "ROUTE" in constraint else "")
        + f"\nconstraint {constraint}\nGM[h,p] = S[h,p,m] :: max(m)\nW[h,p,m] = exp(S[h,p,m] - GM[h,p])\n"
        "D[h,p] = W[h,p,m] :: sum(m)\nO[h,p,f] = W[h,p,m] * V[h,m,f] / D[h,p] :: sum(m)\n"
        "LSE[h,p] = GM[h,p] + log(D[h,p])\nout O, LSE",
        name="never.cascade",
    )
    inputs = {"S": torch.randn(HEADS, 19, 35), "V": torch.randn(HEADS, 35, 4)}
    inputs |= {"LEN": torch.tensor([0, -3])} if "LEN" in constraint else {}
    inputs |= {"ROUTE": torch.tensor(1)} if "ROUTE" in constraint else {}
    binding = bind(cascade, shapes={n: tuple(x.shape) for n, x in inputs.items()})
    built = build(cascade, extents={"F": 4}, dtype="float32", target=gpu_target("cuda:90"), tile_limit=16)
    for found in (run_interpreted(built, inputs, binding), run_on_cpu(built, inputs, binding)):
        assert (found["O"] == 0).all() and (found["LSE"] == -torch.inf).all()


@pytest.mark.parametrize("name", [n for n, cs in TABLE.items() if not any("[" in c for c in cs)])
def test_an_arithmetic_mask_needs_no_memory(name: str) -> None:
    """At any lengths: bounds are numbers, so neither a kernel nor its caller holds more than inputs and outputs."""
    built = built_for(TABLE[name], (128, 64), LARGE)
    (kernel,) = built.kernels
    assert not kernel.tables and not kernel.buffers
    assert set(kernel.tensors) - {"ROUTE"} == {"S", "V", "O", "D"}


def test_tables_of_a_mask_are_as_long_as_a_row_of_tiles() -> None:
    built = built_for(("DOC[m] == DOC[p]", "m <= p"), (128, 64), LARGE)
    made = tables_of(built.kernels[0], {"DOC": torch.arange(1 << 20) // 4000})
    assert {n: tuple(t.shape) for n, t in made.items()} == dict.fromkeys(
        ("least_DOC_64", "most_DOC_64", "rising_least_DOC_64", "rising_most_DOC_64"), (16384,)
    )
    assert torch.equal(made["least_DOC_64"], torch.arange(1 << 20)[::64] // 4000)


def test_ids_beyond_the_digits_of_float32_are_told_apart() -> None:
    built = built_for(("DOC[m] == DOC[p]",), (4, 4), CONSTANTS)
    ids = (1 << 40) + torch.arange(12) // 4
    (state,) = {tuple(map(tuple, x.tolist())) for x in torch.as_tensor(states_of(built, 12, 12, {"DOC": ids}))}
    assert state == ((2, 0, 0), (0, 2, 0), (0, 0, 2))


def test_ids_that_rise_give_exact_bounds() -> None:
    """Full tiles are found, and none but those with a live point is so much as asked."""
    built = built_for(("DOC[m] == DOC[p]", "m <= p"), (8, 4), CONSTANTS)
    ids = torch.arange(64) // 24
    states = states_of(built, 64, 64, {"DOC": ids})
    live = mask_of(("DOC[m] == DOC[p]", "m <= p"), 64, 64, {"DOC": ids}, CONSTANTS)
    some, every = blocks(live, 8, 4)
    assert ((states == FULL) == every).all() and ((states != SKIPPED) == some).all()
    plain = replace(built, kernels=tuple(map(without_tests, built.kernels)))
    assert (states_of(plain, 64, 64, {"DOC": ids}) == states).all()


def without_tests(kernel: TileKernel) -> TileKernel:
    """A kernel that asks no tile whether it has a live point."""
    body = [
        replace(s, segments=tuple(replace(g, live=None, tile=()) for g in s.segments)) if isinstance(s, Loop) else s
        for s in kernel.body
    ]
    return replace(kernel, body=tuple(body))


def test_masks_that_are_promised_unchanged_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ec.compile(ec.parse(str(ec.load("softmax_attention")) + "\nin DOC[t]\nconstraint DOC[m] == DOC[p]"))
    q, documents = torch.randn(1, 1, 70, 16), torch.arange(70) // 9
    made: list[str] = []
    real = mask_tables.block_table

    def noted(x: torch.Tensor, reduce: str, *rest: Any) -> torch.Tensor:
        made.append(reduce)
        return real(x, reduce, *rest)

    monkeypatch.setattr(mask_tables, "block_table", noted)
    plain = op(q, q, q, documents)
    each = len(made)
    assert each > 0
    with ec.unchanged_masks():
        assert torch.equal(op(q, q, q, documents), plain)
        assert len(made) == 2 * each
        assert torch.equal(op(q, q, q, documents), plain)
        assert len(made) == 2 * each
        documents += documents.flip(0)
        changed = op(q, q, q, documents)
        assert len(made) == 3 * each
    assert torch.equal(op(q, q, q, documents), changed)
    assert len(made) == 4 * each
