"""The gallery: every text is well formed, documented, and means what its paper says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from einsumcascade.errors import CascadeError, SpecFileError
from einsumcascade.gallery import header, load, names
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse
from tests.gallery.closed_forms import CLOSED_FORMS, Array

FOLDER = Path(__file__).resolve().parents[2] / "einsumcascade" / "gallery"
# P differs from M, and M is no multiple of any tile.
EXTENTS = {"B": 2, "H": 3, "G": 2, "R": 3, "P": 5, "M": 77, "E": 6, "F": 4}
# Long enough for a window of 256 to cull keys at both ends.
LONG = {**EXTENTS, "B": 1, "H": 1, "P": 300, "M": 290}


def draw(cascade: Cascade, extents: dict[str, int], *, spread: float = 1.0) -> dict[str, Array]:
    """Draw normal inputs, the same ones for the same names and extents."""
    rng = np.random.default_rng(7)
    return {
        i.tensor: spread * rng.standard_normal(tuple(extents[rank_of(v)] for v in i.indices)) for i in cascade.inputs
    }


def agrees(name: str, extents: dict[str, int], *, spread: float = 1.0) -> None:
    """Assert that the reference interpreter and the closed form give the same values."""
    from einsumcascade.reference import run

    cascade = load(name)
    inputs = draw(cascade, extents, spread=spread)
    found, wanted = run(cascade, inputs), CLOSED_FORMS[name](inputs)
    assert list(found) == list(cascade.output_names) == list(wanted)
    for tensor in wanted:
        np.testing.assert_allclose(found[tensor], wanted[tensor], rtol=1e-9, atol=1e-11, err_msg=tensor)


def test_every_variant_has_a_closed_form() -> None:
    assert set(names()) == set(CLOSED_FORMS)


@pytest.mark.parametrize("name", names())
def test_a_text_prints_as_a_text_that_parses_to_an_equal_cascade(name: str) -> None:
    cascade = load(name)
    assert parse(str(cascade)) == cascade
    assert cascade.name == name


@pytest.mark.parametrize("name", names())
def test_a_text_is_short(name: str) -> None:
    assert 1 <= len(load(name).einsums) <= 15


@pytest.mark.parametrize("name", names())
def test_a_header_names_its_paper_and_says_whether_there_is_a_kernel(name: str) -> None:
    head = header(name)
    assert head.title and not head.title.endswith(".")
    assert "(" in head.paper and any(year in head.paper for year in ("202", "2017"))
    assert head.kernel == "yes" or head.kernel.startswith("not yet (")
    lines = (FOLDER / f"{name}.cascade").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[2].startswith("# differs: ") and lines[3] == f"# kernel: {head.kernel}"
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", names())
def test_a_text_has_a_batch_rank_first(name: str) -> None:
    q, k, v = load(name).inputs[:3]
    assert (q.tensor, k.tensor, v.tensor) == ("Q", "K", "V")
    assert q.indices[0] == k.indices[0] == v.indices[0] == "b"


@pytest.mark.parametrize("name", names())
def test_a_text_means_its_formula(name: str) -> None:
    agrees(name, EXTENTS)


@pytest.mark.parametrize("name", names())
def test_a_text_means_its_formula_on_large_scores(name: str) -> None:
    agrees(name, EXTENTS, spread=15.0)


@pytest.mark.parametrize("name", names())
def test_a_text_means_its_formula_where_every_extent_is_one(name: str) -> None:
    agrees(name, dict.fromkeys(EXTENTS, 1))


@pytest.mark.parametrize("name", ["alibi", "sliding_window", "softmax_1p"])
def test_a_text_that_uses_positions_means_its_formula_on_long_sequences(name: str) -> None:
    agrees(name, LONG)


def test_a_query_whose_window_holds_no_key_gives_zero() -> None:
    from einsumcascade.reference import run

    cascade = load("sliding_window")
    extents = {**LONG, "M": 10}
    out = run(cascade, draw(cascade, extents))["AV"]
    # Key 9 is the last; the windows of the queries from 9 + 256 on hold none.
    assert np.all(out[:, :, 265:] == 0) and np.all(out[:, :, :265] != 0)


def test_sharing_no_heads_is_multi_head_attention() -> None:
    from einsumcascade.reference import run

    inputs = draw(load("softmax_attention"), EXTENTS)
    grouped = {"Q": inputs["Q"][:, :, None], "K": inputs["K"], "V": inputs["V"]}
    found = run(load("gqa"), grouped)["AV"][:, :, 0]
    np.testing.assert_allclose(found, run(load("softmax_attention"), inputs)["AV"], rtol=1e-12)


def test_a_path_is_loaded_like_a_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.cascade"
    path.write_bytes((FOLDER / "gqa.cascade").read_bytes())
    assert load(path) == load(str(path)) == load("gqa")
    assert load(path).name == "mine"


def test_a_mark_of_byte_order_and_foreign_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.cascade"
    text = (FOLDER / "gqa.cascade").read_text(encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load(path) == load("gqa")


def test_a_gallery_name_wins_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gqa").write_text("in X[m]\nS = X[m]\nout S\n")
    monkeypatch.chdir(tmp_path)
    assert load("gqa").output_names == ("AV",)
    assert load("./gqa").output_names == ("S",)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "spec-empty"),
        (b" \n\t\n", "spec-empty"),
        (b"\xef\xbb\xbf", "spec-empty"),
        (b"in X[m]\n\xff", "spec-binary"),
        (b"in X[m]\0", "spec-binary"),
        ("in X[m]".encode("utf-16"), "spec-binary"),
        (b"#" * (1 << 21), "spec-too-large"),
        (None, "spec-missing"),
    ],
)
def test_a_file_that_is_no_text_is_one_error(tmp_path: Path, content: bytes | None, code: str) -> None:
    path = tmp_path / "mine.cascade"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecFileError) as caught:
        load(path)
    assert caught.value.codes == (code,)


@pytest.mark.parametrize("name", [".", "/", "gallery/..", "no/such/file", "no.cascade"])
def test_a_path_that_is_no_file_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "gallery").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecFileError) as caught:
        load(name)
    assert caught.value.codes == ("spec-missing",)


@pytest.mark.parametrize("name", ["", "sofmax_2p", "GQA", "a" * 5000, "x\0y"])
def test_an_unknown_name_is_one_error(name: str) -> None:
    for use in (load, header):
        with pytest.raises(SpecFileError) as caught:
            use(name)
        assert caught.value.codes == ("unknown-spec",)


def test_an_unknown_name_has_a_suggestion() -> None:
    with pytest.raises(SpecFileError, match="did you mean 'gqa'"):
        load("gqaa")
    with pytest.raises(SpecFileError, match="known: alibi, cross_attention"):
        header("zzzzzzzz")


def test_a_file_with_mistakes_is_named_in_each(tmp_path: Path) -> None:
    path = tmp_path / "mine.cascade"
    path.write_text("in X[m]\nS = Y[m]\n")
    with pytest.raises(CascadeError, match=r"mine\.cascade:2:5"):
        load(path)


def test_loading_a_text_imports_no_numerical_library() -> None:
    script = (
        "import sys, einsumcascade.gallery as g; [g.load(n) for n in g.names()]\n"
        "print([m for m in ('numpy', 'torch', 'triton', 'sympy', 'networkx') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, cwd=FOLDER.parents[1]
    )
    assert done.stdout.strip() == "[]"
