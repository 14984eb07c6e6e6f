"""Mappings that a user writes: what they cost, and what is said of mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from einsumcascade.analysis.spatial.cost import Cost, estimate
from einsumcascade.analysis.spatial.mapping import load_mapping
from einsumcascade.analysis.spatial.model import model
from einsumcascade.analysis.spatial.target import load_target
from einsumcascade.errors import CascadeError, InputError, ModelError, SpecFileError
from einsumcascade.gallery import load
from einsumcascade.language.parser import parse

SMALL = {"B": 2, "H": 3, "E": 4, "F": 8, "M": 64, "P": 32}

TARGET = """
name = "Small"
clock_hz = 1_000_000
dram_bytes_per_second = 8_000_000
word_bytes = 4

[arrays.grid]
dimensions = { down = 16, across = 8 }
cycles = { multiply_add = 1, exp = 4 }

[arrays.line]
dimensions = { lanes = 8 }
cycles = { multiply_add = 1, divide = 3 }

[buffers]
near = 2_000
"""

CASCADE = """
in Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f]
QK[b,h,m,p] = Q[b,h,p,e] * K[b,h,m,e] :: sum(e)
SN[b,h,m,p] = exp(QK[b,h,m,p])
SD[b,h,p] = SN[b,h,m,p] :: sum(m)
SNV[b,h,p,f] = SN[b,h,m,p] * V[b,h,m,f] :: sum(m)
AV[b,h,p,f] = SNV[b,h,p,f] / SD[b,h,p]
out AV
"""

# Attention without a maximum, in tiles of half the grid's rows.
MAPPING = """
cascade = "plain.cascade"
target = "small.toml"

[[plan]]

[[plan.kernel]]
loops = ["b", "h", "p", "m"]
tile = { p = "fit", m = 8 }
keep = { near = ["Q", "K", "V", "SD", "SNV"] }
spatial = { grid = { down = "m", across = "p" }, line = { lanes = "p" } }
phases = [
    { grid = ["QK"] },
    { grid = ["SN", "SD"], line = ["AV"] },
    { grid = ["SNV"] },
]
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write the files, with pieces of the mapping replaced, and return the mapping's path."""

    def files(*changes: tuple[str, str], target: str = TARGET) -> Path:
        text = MAPPING
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / "small.toml").write_text(target, encoding="utf-8")
        (tmp_path / "plain.cascade").write_text(CASCADE, encoding="utf-8")
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return files


Write = Callable[..., Path]


def cost(path: Path, **extents: int) -> Cost:
    """Estimate a mapping for small extents."""
    return estimate(path, {**SMALL, **extents})


def test_a_mapping_of_another_cascade_costs_what_its_phases_add_up_to(write: Write) -> None:
    (kernel,) = cost(write()).kernels
    tiles = 2 * 3 * (64 // 8) * (32 // 8)
    # E multiply-adds; an exponential and a sum; F multiply-adds; the division waits for the 1D array nowhere.
    assert kernel.cycles == tiles * (4 + (4 + 1) + 8) and kernel.stall_cycles == 0
    assert kernel.busy("line") == 2 * 3 * 8 * (32 // 8) * 3


def test_half_filled_rows_halve_the_utilisation(write: Write) -> None:
    quick = TARGET.replace("= 8_000_000", "= 8_000_000_000").replace("divide = 3", "divide = 1")
    half = cost(write(target=quick))
    full = cost(write(("m = 8", 'm = "grid.down"'), target=quick))
    assert half.utilisation("grid") == pytest.approx(full.utilisation("grid") / 2)
    assert full.seconds < half.seconds


def test_kept_tiles_fill_the_buffer_and_decide_the_traffic(write: Write) -> None:
    (kernel,) = cost(write()).kernels
    # Q, SD and SNV for 16 queries, one tile of K and of V: 32 queries would take 2,048 bytes.
    assert kernel.tiles == {"b": 1, "h": 1, "p": 16, "m": 8}
    assert kernel.kept_bytes == {"near": 4 * (16 * (4 + 1 + 8) + 8 * (4 + 8))}
    heads = 2 * 3
    assert kernel.moved_bytes == {
        "Q": 4 * heads * 32 * 4,
        "K": 4 * heads * 64 * 4 * 2,
        "V": 4 * heads * 64 * 8 * 2,
        "AV": 4 * heads * 32 * 8,
    }
    assert kernel.seconds == kernel.dram_seconds == sum(kernel.moved_bytes.values()) / 8_000_000


def test_ragged_ranks_take_whole_turns(write: Write) -> None:
    (kernel,) = cost(write(), M=13, P=9).kernels
    tiles = 2 * 3 * 2 * 2
    assert {e.tensor: e.cycles for e in kernel.einsums}["QK"] == tiles * 4
    assert {e.tensor: e.work for e in kernel.einsums}["QK"] == 2 * 3 * 13 * 9 * 4


def test_what_comes_back_from_a_spread_sum_makes_the_arrays_wait(write: Write) -> None:
    phases = ('{ grid = ["QK"] },\n    { grid = ["SN", "SD"], line = ["AV"] },\n    { grid = ["SNV"] },',)
    apart = '{ grid = ["QK"] },\n    { grid = ["SN", "SD", "SNV"] },\n    { grid = ["AV"] },'
    text = TARGET.replace("exp = 4 }", "exp = 4, divide = 3 }")
    (kernel,) = cost(write((*phases, apart), target=text)).kernels
    # SD and SNV cross the eight rows in use, once a tile, before AV can have them.
    assert kernel.stall_cycles == 2 * 8 * 2 * 3 * 8 * 4 + 8 * 7 * 2 * 3 * 8 * 4
    filled = write((*phases, apart), ("spatial", "in_flight = 9\nspatial"), target=text)
    assert cost(filled).kernels[0].stall_cycles == 0


def test_kinds_of_operations_in_chained_units_take_the_time_of_the_slowest() -> None:
    (kernel,) = estimate("flat", SMALL).kernels
    cycles = {e.tensor: e.cycles for e in kernel.einsums}
    # A subtraction and an exponential for each point on 256 lanes, as long as the maximum alone.
    assert cycles["SN"] == cycles["GM"] == 2 * 3 * 32


def test_overlapped_kernels_take_the_longest_of_each_array_and_of_all_traffic() -> None:
    found = estimate("flat", {"B": 1, "H": 1, "E": 64, "F": 64, "M": 1 << 18, "P": 1 << 12})
    assert found.plan == 2
    assert found.seconds == pytest.approx(sum(k.dram_seconds for k in found.kernels))
    assert found.seconds < sum(k.seconds for k in found.kernels)


def test_a_mapping_runs_on_another_target(write: Write) -> None:
    path = write()
    faster = load_target(path.parent / "small.toml").resized(16, buffers={"near": 1 << 20})
    found = estimate(path, SMALL, target=faster)
    assert found.kernels[0].tiles["p"] == 32 and found.seconds < cost(path).seconds


def test_a_cost_is_text_and_plain_values(write: Write) -> None:
    found = cost(write())
    text = str(found)
    assert text.startswith("mine on Small, plan 1: ") and "tiles: b 1, h 1, p 16, m 8" in text
    assert found.to_dict()["dram_bytes"] == found.dram_bytes
    assert found.cycles == pytest.approx(found.seconds * 1_000_000)


def test_an_evaluation_of_one_s_own_has_the_tables_that_its_files_allow(write: Write) -> None:
    folder = write().parent
    (folder / "sizes.toml").write_text(
        'ranks = ["M", "P"]\nlengths = [32]\n[[workload]]\nname = "tiny"\nextents = { B = 1, H = 2, E = 4, F = 4 }\n',
        encoding="utf-8",
    )
    (folder / "all.toml").write_text(
        'title = "Mine"\nworkloads = "sizes.toml"\nbaseline = "plain"\nsubject = "plain"\nbreakdown = "grid"\n'
        '[[configuration]]\nname = "plain"\nmapping = "mine.toml"\n',
        encoding="utf-8",
    )
    found = model(folder / "all.toml")
    assert [r.speedup for r in found.attention] == [1.0]
    assert (found.end_to_end, found.shares, found.sizes, found.means) == ((), (), (), ())
    assert str(found).startswith("Mine\n\nUtilisation of array grid during attention\n")


def test_the_one_pass_text_means_what_the_gallery_s_does() -> None:
    import numpy as np

    from einsumcascade.reference import run

    own = load(Path(load_mapping("fusemax_binding").table.folder) / "attention_1p.cascade")
    draw = np.random.default_rng(0).normal
    inputs = {"Q": draw(size=(2, 2, 5, 3)), "K": draw(size=(2, 2, 11, 3)), "V": draw(size=(2, 2, 11, 4))}
    found, expected = (run(c, inputs, extents={"M0": 4})["AV"] for c in (own, load("softmax_1p")))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_text_of_the_layers_is_six_products() -> None:
    cascade = load(Path(load_mapping("layers").table.folder) / "layers.cascade")
    assert parse(str(cascade)) == cascade and len(cascade.einsums) == 6


# What is changed in the mapping, the line of the message, and what it says.
MISTAKES: list[tuple[str, str, int, str]] = [
    ('cascade = "plain.cascade"', "", 0, "the key 'cascade' is missing"),
    ("[[plan]]\n\n", "[[plan]\n", 5, "no TOML"),
    ("[[plan]]\n", "[[plan]]\noverlaps = true\n", 6, "'overlaps' means nothing here"),
    ("[[plan]]\n", "[[plan]]\noverlap = 1\n", 6, "'overlap' is 1"),
    ('"p", "m"]', '"p", "n"]', 8, "there is no rank variable 'n'"),
    ('"p", "m"]', '"p", "p"]', 8, "'p' stands twice"),
    ('tile = { p = "fit"', 'tile = { q = 2, p = "fit"', 9, "'q' means nothing here"),
    ("m = 8", "m = 0", 9, "'m' is 0"),
    ("m = 8", "m = [8, 2.5]", 9, "'m' is 2.5"),
    ('"SD", "SNV"]', '"SD", "SVN"]', 10, "there is no tensor 'SVN'"),
    ('"SD", "SNV"]', '"SD", "SNV", 3]', 10, "'near' keeps 3"),
    ('"SD", "SNV"]', '"SD"]', 10, "SNV is not kept, and grows from tile to tile of m"),
    ('down = "m"', 'down = "k"', 11, "there is no rank variable 'k'"),
    ('line = ["AV"]', 'row = ["AV"]', 14, "'row' means nothing here"),
    ('{ grid = ["SNV"] }', "{}", 12, "a phase has no array"),
    ('line = ["AV"]', 'line = ["AVV"]', 14, "there is no Einsum 'AVV'"),
    ('line = ["AV"]', 'line = ["AV", "QK"]', 13, "QK has two places"),
    (', line = ["AV"]', "", 5, "AV has no place"),
    ("spatial =", 'chained = ["Q"]\nspatial =', 11, "there is no Einsum in this kernel 'Q'"),
    ("spatial =", "in_flight = true\nspatial =", 11, "'in_flight' is True"),
    ('target = "small.toml"', 'target = "small.toml"\nfolded = ["scale"]', 4, "'scale' is no constant in use"),
    ('target = "small.toml"', 'target = "small.toml"\n[extents]\nN = "4"', 5, "'N' means nothing here"),
]


@pytest.mark.parametrize(("old", "new", "line", "said"), MISTAKES, ids=[said for *_, said in MISTAKES])
def test_a_mistake_in_a_mapping_is_shown_where_it_is(write: Write, old: str, new: str, line: int, said: str) -> None:
    path = write((old, new))
    with pytest.raises(ModelError) as caught:
        load_mapping(path)
    (found,) = caught.value.diagnostics
    assert found.code == "mapping" and said in found.headline and str(path) in found.headline
    assert (found.span.line if found.span else 0) == line


# What only the numbers of a target show.
MISFITS: list[tuple[str, str, int, str]] = [
    ("near = [", "far = [", 10, "'far' means nothing here"),
    ("down =", "along =", 11, "'along' means nothing here"),
    ("line = { lanes", "row = { lanes", 11, "'row' means nothing here"),
    ("m = 8", 'm = "grid.up"', 9, "'grid.up' is no number, extent or array dimension of Small"),
    ('"SD"], line = ["AV"]', '"SD", "AV"]', 14, "AV takes an operation 'divide', which array 'grid' of Small lacks"),
]


@pytest.mark.parametrize(("old", "new", "line", "said"), MISFITS, ids=[said for *_, said in MISFITS])
def test_a_mapping_that_does_not_fit_its_target_says_where(
    write: Write, old: str, new: str, line: int, said: str
) -> None:
    changes = [(old, new)] + ([('line = ["AV"]', 'row = ["AV"]')] if "row" in new else [])
    with pytest.raises(ModelError) as caught:
        cost(write(*changes))
    (found,) = caught.value.diagnostics
    assert found.span is not None and (found.span.line, said in found.headline) == (line, True)


def test_buffers_that_no_plan_fits_are_named_with_the_extents(write: Write) -> None:
    with pytest.raises(
        ModelError, match=r"no plan fits the buffers of Small \(near 2,000 bytes\) for B=2, .*E=4000"
    ) as e:
        cost(write(), E=4000)
    (found,) = e.value.diagnostics
    assert found.span is not None and found.span.line == 5


def test_a_loop_past_a_barrier_is_refused(tmp_path: Path) -> None:
    folder = load_mapping("flat").table.folder
    text = (folder / "flat.toml").read_text(encoding="utf-8")
    path = tmp_path / "tiled.toml"
    path.write_text(text.replace('loops = ["b", "h", "p"]', 'loops = ["b", "h", "p", "m"]', 1), encoding="utf-8")
    with pytest.raises(ModelError, match="QK and A share a loop over m, with a barrier over M between them"):
        load_mapping(path)


def test_what_crosses_a_barrier_is_to_be_kept(tmp_path: Path) -> None:
    folder = load_mapping("flat").table.folder
    text = (folder / "flat.toml").read_text(encoding="utf-8")
    path = tmp_path / "forgetful.toml"
    path.write_text(text.replace('[["QK", "SN"]]', '["QK"]', 1), encoding="utf-8")
    with pytest.raises(ModelError, match="SN is not kept, and A reads it after a barrier over M"):
        load_mapping(path)
    path.write_text(text.replace('[["QK", "SN"]]', '[["QK", "SN"], "AV", "GM", "Q"]', 1), encoding="utf-8")
    assert load_mapping(path).plans[0].kernels[0].kept == ("QK", "SN", "AV", "GM", "Q")
    path.write_text(text.replace('keep = { global = ["Q", "K"] }', 'keep = { global = ["V"] }', 1), encoding="utf-8")
    with pytest.raises(ModelError, match="V is kept, but no Einsum of the kernel reads or writes it"):
        load_mapping(path)


def test_kernels_follow_the_order_of_the_cascade(write: Write) -> None:
    first = '[[plan.kernel]]\nspatial = { line = { lanes = "p" } }\nphases = [{ line = ["AV"] }]\n\n[[plan.kernel]]\n'
    with pytest.raises(ModelError, match="AV reads SNV, which a later kernel writes"):
        load_mapping(write(("[[plan.kernel]]\n", first), (', line = ["AV"]', "")))


def test_names_of_files_are_completed_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file 'flatt' among the mappings"):
        load_mapping("flatt")
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        load_target(tmp_path / "none.toml")
    with pytest.raises(ModelError, match="among the evaluations"):
        model("fusemin")
    with pytest.raises(ModelError, match="there is no workload 'Bert'"):
        model(workloads=["Bert"])
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="cannot be read"):
        load_target(tmp_path / "binary.toml")


def test_a_cascade_that_is_missing_or_wrong_is_reported_as_such(write: Write) -> None:
    path = write()
    (path.parent / "plain.cascade").write_text("in Q[m]\nS = R\nout S", encoding="utf-8")
    with pytest.raises(CascadeError):
        load_mapping(path)
    (path.parent / "plain.cascade").unlink()
    with pytest.raises(SpecFileError):
        load_mapping(path)


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("exp = 4 }", "expo = 4 }", 9, "'expo' means nothing here"),
        ("lanes = 8", "lanes = 0", 12, "'lanes' is 0"),
        ("{ lanes = 8 }", "{}", 12, "array 'line' has no dimensions"),
        ("near = 2_000", 'near = "2K"', 16, "'near' is '2K'"),
        ("clock_hz = 1_000_000", "", 0, "the key 'clock_hz' is missing"),
        ("word_bytes = 4", "word_bytes = 4\nvolts = 1", 6, "'volts' means nothing here"),
    ],
)
def test_a_mistake_in_a_target_is_shown_where_it_is(write: Write, old: str, new: str, line: int, said: str) -> None:
    path = write(target=TARGET.replace(old, new)).parent / "small.toml"
    with pytest.raises(ModelError) as caught:
        load_target(path)
    (found,) = caught.value.diagnostics
    assert said in found.headline and (found.span.line if found.span else 0) == line


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('baseline = "unfused"', 'baseline = "fused"', "there is no configuration 'fused'"),
        ('breakdown = "2d"', 'breakdown = "3d"', "the target of 'unfused' has no array '3d'"),
        ('buffer = "global"', 'buffer = "local"', "the target of 'binding' has no buffer 'local'"),
        ('shares = "Figure 1b"', 'share = "Figure 1b"', "'share' means nothing here"),
        ("sizes = [16,", "sizes = [1, 16,", ""),
    ],
)
def test_a_mistake_in_an_evaluation_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    import einsumcascade.analysis.spatial

    folder = Path(einsumcascade.analysis.spatial.__path__[0]) / "data" / "evaluations"
    text = (folder / "fusemax.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "fusemax.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    if said:
        with pytest.raises(ModelError, match=said):
            model(path, workloads=["BERT"], lengths=[1024])
    else:
        assert model(path, workloads=["BERT"], lengths=[1024]).sizes[0].size == 1


@pytest.mark.parametrize("length", [0, -1, 2.5, True])
def test_a_length_is_a_whole_number(length: int) -> None:
    with pytest.raises(InputError, match="extent-value"):
        model(workloads=["BERT"], lengths=[length])


def test_a_rank_that_comes_out_empty_is_refused(write: Write) -> None:
    path = write()
    text = CASCADE.replace("in Q", "rank b = P // 64\nin Q", 1)
    (path.parent / "plain.cascade").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="the extent of B is 0"):
        estimate(path, {r: n for r, n in SMALL.items() if r != "B"})


def test_extents_that_are_missing_are_named() -> None:
    with pytest.raises(InputError, match="M, F have no extent"):
        estimate("unfused", {"B": 1, "H": 1, "E": 1, "P": 1})
