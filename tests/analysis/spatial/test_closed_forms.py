"""The model against closed forms written by hand, and its traffic against a buffer simulated step by step."""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsumcascade.analysis.spatial.cost import Cost, estimate
from einsumcascade.analysis.spatial.facts import gather
from einsumcascade.analysis.spatial.mapping import Kernel, Plan, SpatialMapping, load_mapping
from einsumcascade.analysis.spatial.traffic import Tiling, dram_elements
from einsumcascade.gallery import load
from einsumcascade.language.parser import parse

BANDWIDTH, CLOCK, MIB = 400 * 2**30, 940_000_000, 2**20
SHAPES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 64),
        "H": st.integers(1, 16),
        "E": st.integers(1, 192),
        "F": st.integers(1, 192),
        "M": st.integers(1, 4096).map(lambda n: 256 * n),
        "P": st.integers(1, 4096).map(lambda n: 256 * n),
    }
)


@cache
def mapping(name: str) -> SpatialMapping:
    """Load a mapping of the package once."""
    return load_mapping(name)


def cost(name: str, shape: dict[str, int]) -> Cost:
    """Estimate a mapping of the package."""
    return estimate(mapping(name), shape)


def tiles(shape: dict[str, int]) -> int:
    """Count the tiles of 256 x 256 scores."""
    return shape["B"] * shape["H"] * (shape["M"] // 256) * (shape["P"] // 256)


@given(SHAPES)
def test_a_tile_with_binding_takes_four_phases(shape: dict[str, int]) -> None:
    e, f, m1 = shape["E"], shape["F"], shape["M"] // 256
    (kernel,) = cost("fusemax_binding", shape).kernels
    # Products and maximum beside the sums of the last tile; running maximum; exponentials; product with the values.
    each = max(m1 * (e + 1), m1 * (1 + f) + f) + m1 * (1 + max(7 + 1, 7 + 1) + max(f, f))
    blocks = tiles(shape) // m1
    # With eight tiles in flight, a very short one still waits for the 256 rows that its maximum crosses.
    assert kernel.cycles == max(each * blocks, math.ceil((each + 256 * m1) * blocks / 8))


@given(SHAPES)
def test_a_tile_without_binding_waits_for_its_maximum_to_cross_256_rows(shape: dict[str, int]) -> None:
    e, f, m1 = shape["E"], shape["F"], shape["M"] // 256
    (kernel,) = cost("fusemax_architecture", shape).kernels
    each = max(m1 * (e + 1), m1 * 1 + f) + m1 * (256 + 1 + 8 + 2 * f)
    assert kernel.cycles * m1 == each * tiles(shape)


@given(SHAPES)
def test_the_cascade_alone_is_bound_by_the_1d_array(shape: dict[str, int]) -> None:
    e, f, m1 = shape["E"], shape["F"], shape["M"] // 256
    (kernel,) = cost("fusemax_cascade", shape).kernels
    assert kernel.cycles * m1 == max(m1 * (4 * 256 + 5 + 2 * f) + f, m1 * (e + f)) * tiles(shape)


@given(SHAPES)
def test_flat_takes_the_longer_of_softmax_products_and_traffic(shape: dict[str, int]) -> None:
    found = cost("flat", shape)
    e, f, m, p = (shape[r] for r in "EFMP")
    heads = shape["B"] * shape["H"]
    compute = max(4 * 256, e + f) * tiles(shape) / CLOCK
    if m * 256 * 2 <= 32 * MIB:
        rows = min(p, next(n for n in (1024, 512, 256) if min(n, p) * m * 2 <= 32 * MIB))
        moved = heads * 2 * (p * (e + f) + m * (e + f) * math.ceil(p / rows))
    else:
        moved = heads * 2 * (4 * m * p + p * (e + f) + m * (e + f) * math.ceil(p / min(p, 1024)))
    assert found.dram_bytes == moved
    assert found.seconds == pytest.approx(max(compute, moved / BANDWIDTH), rel=1e-12)


@given(SHAPES)
def test_unfused_is_three_kernels_that_each_wait_for_the_longer_of_computing_and_moving(shape: dict[str, int]) -> None:
    found = cost("unfused", shape)
    e, f, m, p = (shape[r] for r in "EFMP")
    heads = shape["B"] * shape["H"]
    scores = heads * m * p * 2
    total = max(2 * scores / BANDWIDTH, 4 * 256 * tiles(shape) / CLOCK)
    for depth in (e, f):
        turns = p // 256
        blocks = next(n for n in range(1, turns + 1) if turns % n == 0 and (p // n + 256) * depth * 2 <= 32 * MIB)
        # A single tile of keys or values stays for all blocks.
        moved = scores + heads * 2 * depth * (p + m * (blocks if m > 256 else 1))
        total += max(moved / BANDWIDTH, depth * tiles(shape) / CLOCK)
    assert found.seconds == pytest.approx(total, rel=1e-12)


@given(SHAPES)
def test_fusemax_reads_keys_and_values_once_for_each_block_of_queries_that_fits(shape: dict[str, int]) -> None:
    found = cost("fusemax_binding", shape)
    e, f, m, p = (shape[r] for r in "EFMP")
    turns = p // 256
    room = 16 * MIB - 256 * (2 * e + 2 * f)
    p1 = max(n for n in range(1, turns + 1) if turns % n == 0 and n * 256 * (e + 1 + 1 + f) * 2 <= room)
    assert found.kernels[0].tiles["p"] == 256 * p1
    # A single tile of keys and values stays for all blocks.
    times = turns // p1 if m > 256 else 1
    assert found.dram_bytes == shape["B"] * shape["H"] * 2 * (e + f) * (p + m * times)


# C is kept wherever a loop adds to it: plans without that are refused.
LOOPS = st.permutations(["i", "j", "k"])
SIZES = st.fixed_dictionaries({r: st.integers(1, 6) for r in "IJK"})
TILES = st.fixed_dictionaries({v: st.integers(1, 4) for v in "ijk"})


@given(LOOPS, SIZES, TILES, st.booleans(), st.booleans())
@settings(max_examples=300)
def test_traffic_is_that_of_a_buffer_simulated_tile_by_tile(
    loops: list[str], extents: dict[str, int], sizes: dict[str, int], keeps_a: bool, keeps_b: bool
) -> None:
    cascade = parse("in A[i,k], B[k,j]\nC[i,j] = A[i,k] * B[k,j]\nout C")
    kept = ("C", *["A"] * keeps_a, *["B"] * keeps_b)
    table = mapping("flat").table
    kernel = Kernel(
        loops=tuple(loops),
        tiles=sizes,
        keep={"global": tuple((t,) for t in kept)},
        spatial={"2d": {}},
        in_flight=1,
        chained=(),
        phases=({"2d": ("C",)},),
        table=table,
    )
    tiling = Tiling(facts=gather(cascade), kernel=kernel, extents=extents, tiles=sizes)
    found = dram_elements(Plan(kernels=(kernel,), overlap=False), tiling)
    assert found == simulated(loops, extents, sizes, kept)


def simulated(
    loops: list[str], extents: dict[str, int], sizes: dict[str, int], kept: tuple[str, ...]
) -> dict[str, int]:
    """Walk all tiles in order with room for one tile of each tensor, and count what moves."""
    ranks = {"A": "ik", "B": "kj", "C": "ij"}
    starts = [range(0, extents[v.upper()], sizes[v]) for v in loops]
    held: dict[str, tuple[int, ...] | None] = dict.fromkeys(ranks)
    moved = dict.fromkeys(ranks, 0)
    written: set[tuple[int, ...]] = set()

    def size(tensor: str, tile: tuple[int, ...]) -> int:
        return math.prod(min(sizes[v], extents[v.upper()] - at) for v, at in zip(ranks[tensor], tile, strict=True))

    for point in product(*starts):
        at = dict(zip(loops, point, strict=True))
        for tensor in "AB":
            tile = tuple(at[v] for v in ranks[tensor])
            if held[tensor] != tile or tensor not in kept:
                moved[tensor] += size(tensor, tile)
                held[tensor] = tile
        tile = tuple(at[v] for v in ranks["C"])
        if held["C"] != tile:
            moved["C"] += size("C", held["C"]) if held["C"] else 0
            moved["C"] += size("C", tile) if tile in written else 0
            held["C"] = tile
            written.add(tile)
    assert held["C"] is not None
    moved["C"] += size("C", held["C"])
    return moved


def test_a_tensor_that_is_not_kept_passes_by_once_for_each_level_that_reads_it(tmp_path: Path) -> None:
    text = (
        'cascade = "softmax_attention"\ntarget = "flat"\n'
        '[[plan]]\n[[plan.kernel]]\nspatial = { 2d = { rows = "m", columns = "p" } }\nphases = [{ 2d = ["QK"] }]\n'
        '[[plan.kernel]]\nloops = ["b", "h", "p"]\nkeep = { global = ["SN"] }\n'
        'spatial = { 1d = { lanes = "m" } }\nphases = [{ 1d = ["GM", "SN", "SD", "A"] }]\n'
        '[[plan.kernel]]\nspatial = { 2d = { rows = "m", columns = "p" } }\nphases = [{ 2d = ["AV"] }]\n'
    )
    path = tmp_path / "spilling.toml"
    path.write_text(text, encoding="utf-8")
    softmax = estimate(path, {"B": 1, "H": 2, "E": 4, "F": 4, "M": 512, "P": 256}).kernels[1]
    # The maximum and the exponentials are two levels; the cascade makes three passes, but the last reads SN.
    assert softmax.moved_bytes == {"QK": 2 * 2 * 512 * 256 * 2, "A": 2 * 512 * 256 * 2}


def test_a_last_generation_read_elsewhere_moves_alone() -> None:
    cascade = load(Path(mapping("fusemax_binding").table.folder) / "attention_1p.cascade")
    facts = gather(cascade)
    names = tuple(t for t in facts.einsums if t != "AV")
    table = mapping("fusemax_binding").table
    shared = {"keep": {}, "spatial": {}, "in_flight": 1, "chained": (), "table": table, "tiles": {}, "loops": ()}
    first = Kernel(phases=({"2d": names},), **shared)  # type: ignore[arg-type]
    last = Kernel(phases=({"2d": ("AV",)},), **shared)  # type: ignore[arg-type]
    extents = {"B": 2, "H": 3, "P": 5, "E": 7, "F": 11, "M": 12, "M0": 4, "M1": 3}
    moved = dram_elements(
        Plan(kernels=(first, last), overlap=False), Tiling(facts=facts, kernel=last, extents=extents, tiles={})
    )
    assert moved == {"RD": 2 * 3 * 5, "RNV": 2 * 3 * 5 * 11, "AV": 2 * 3 * 5 * 11}
