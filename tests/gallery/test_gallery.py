"""The gallery: every text is well formed, documented, and means what its paper says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.launch import build
from einsumcascade.errors import CascadeError, LoweringError, SpecFileError
from einsumcascade.gallery import header, load, names
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.reference.closed_forms import CLOSED_FORMS
from tests.gallery.draws import draw, extents_of, recipe

FOLDER = Path(__file__).resolve().parents[2] / "einsumcascade" / "gallery"
TEXTS = Path(__file__).resolve().parents[1] / "texts"
# Texts outside the gallery: they have the name of one in it, and are it under a causal mask.
CAUSAL = {path.stem: path for path in sorted(TEXTS.glob("*.cascade"))}
# What cannot be said in 15 Einsums.
LONG = ("lara", "lla_cg", "longshort", "moh", "nsa", "nystrom", "routing", "sparsifiner")


def cascade_of(key: str) -> tuple[str, Cascade]:
    """The name and the cascade behind the name of a closed form."""
    if key in names():
        return key, load(key)
    name = key.removeprefix("causal_")
    return name, parse(CAUSAL[name].read_text(encoding="utf-8"), name=CAUSAL[name].name)


def test_every_text_has_a_closed_form_and_every_closed_form_a_text() -> None:
    assert set(CLOSED_FORMS) == {*names(), *(f"causal_{name}" for name in CAUSAL)}
    assert set(CAUSAL) <= set(names())


@pytest.mark.parametrize("key", CLOSED_FORMS)
def test_a_text_prints_as_a_text_that_parses_to_an_equal_cascade(key: str) -> None:
    name, cascade = cascade_of(key)
    assert parse(str(cascade)) == cascade
    assert cascade.name == name


@pytest.mark.parametrize("name", names())
def test_a_text_is_short(name: str) -> None:
    assert (1 <= len(load(name).einsums) <= 15) != (name in LONG)


@pytest.mark.parametrize("name", names())
def test_a_header_names_its_paper_and_says_whether_there_is_a_kernel(name: str) -> None:
    head = header(name)
    assert head.title and not head.title.endswith(".")
    assert re.search(r"\(.*\b20[12]\d\b.*\)", head.paper)
    assert head.kernel == "yes" or head.kernel.startswith("not yet (")
    lines = (FOLDER / f"{name}.cascade").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[2].startswith("# differs: ") and lines[3] == f"# kernel: {head.kernel}"
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", names())
def test_a_text_has_a_kernel_where_its_header_says_so(name: str) -> None:
    cascade = load(name)
    try:
        build(cascade, extents=extents_of(cascade, name), dtype="bfloat16", target=gpu_target("cuda:90"))
        found = True
    except LoweringError:
        found = False
    # Conjugate gradients divide rounding by rounding once they have converged: the kernel is there, yet not exact.
    assert found == (header(name).kernel == "yes" or name == "lla_cg")


@pytest.mark.parametrize(("key", "kind"), [(k, s) for k in CLOSED_FORMS for s in recipe(k).sets])
def test_a_text_means_its_formula(key: str, kind: str) -> None:
    name, cascade = cascade_of(key)
    inputs = draw(cascade, name, kind)
    found, wanted = run(cascade, inputs), CLOSED_FORMS[key](inputs)
    assert list(found) == list(cascade.output_names) == list(wanted)
    for tensor in wanted:
        np.testing.assert_allclose(found[tensor], wanted[tensor], rtol=1e-9, atol=1e-11, err_msg=tensor)


@pytest.mark.parametrize("key", CLOSED_FORMS)
def test_the_usual_inputs_move_every_output(key: str) -> None:
    """A formula that is zero or constant on its inputs would tell nothing."""
    name, cascade = cascade_of(key)
    one, two = (CLOSED_FORMS[key](draw(cascade, name, seed=seed)) for seed in (7, 8))
    for tensor in one:
        assert np.any(one[tensor]) and not np.array_equal(one[tensor], two[tensor])


def test_a_query_whose_window_holds_no_key_gives_zero() -> None:
    cascade = load("sliding_window")
    inputs = draw(cascade, "sliding_window")
    inputs |= {name: inputs[name][:, :, :10] for name in ("K", "V")}
    out = run(cascade, inputs)["AV"]
    # Key 9 is the last; the windows of the queries from 9 + 256 on hold none.
    assert np.all(out[:, :, 265:] == 0) and np.all(out[:, :, :265] != 0)


def test_sharing_no_heads_is_multi_head_attention() -> None:
    inputs = draw(load("softmax_attention"), "softmax_attention")
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
    with pytest.raises(SpecFileError, match="hint: `einsumcascade list` shows the gallery"):
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
