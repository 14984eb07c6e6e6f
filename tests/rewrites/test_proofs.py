"""Proofs by the structure of the summand: one for all names, kept on disk, never trusted blindly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from einsumcascade.errors import EinsumCascadeWarning
from einsumcascade.language.parser import parse
from einsumcascade.rewrites import running_state
from einsumcascade.rewrites.derive import derive

TEXT = "in S[p,m]\nG[p] = S[p,m] :: max(m)\nD[p] = exp(S[p,m] - G[p]) * (S[p,m] - G[p]) :: sum(m)\nout D"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EINSUMCASCADE_CACHE", str(tmp_path))
    running_state._answer.cache_clear()
    return tmp_path / "proofs"


def test_texts_that_differ_in_names_alone_ask_one_question(folder: Path) -> None:
    derive(parse(TEXT))
    derive(parse(TEXT.replace("S[", "X[").replace("G[", "TOP[").replace("D[", "Y[").replace("out D", "out Y")))
    assert len(list(folder.iterdir())) == 1


def test_what_is_read_back_is_what_was_found(folder: Path) -> None:
    first = derive(parse(TEXT))
    running_state._answer.cache_clear()
    again = derive(parse(TEXT))
    assert str(again) == str(first) and again.cascade == first.cascade
    assert [s.claim for s in again.steps] == [s.claim for s in first.steps]


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: "",
        lambda kept: "{",
        lambda kept: "[" * 100_000,
        lambda kept: json.dumps({**kept, "format": 0}),
        lambda kept: json.dumps({**kept, "question": "another"}),
        lambda kept: json.dumps({**kept, "answer": {**kept["answer"], "matrix": [["1"]]}}),
        lambda kept: json.dumps({**kept, "answer": {**kept["answer"], "basis": ["__import__('os')", "L0"]}}),
        lambda kept: json.dumps({**kept, "answer": {**kept["answer"], "basis": ["UNKNOWN", "L0"]}}),
        lambda kept: json.dumps({**kept, "answer": {**kept["answer"], "form": "magic"}}),
        lambda kept: json.dumps({**kept, "answer": {}}),
        lambda kept: json.dumps({**kept, "answer": {"padding": "x" * (1 << 20)}}),
    ],
)
def test_a_damaged_or_foreign_file_is_a_warning_and_the_proof_is_found_anew(folder: Path, damage: object) -> None:
    want = str(derive(parse(TEXT)))
    (path,) = folder.iterdir()
    path.write_text(damage(json.loads(path.read_text())))  # type: ignore[operator]
    running_state._answer.cache_clear()
    with pytest.warns(EinsumCascadeWarning, match=r"\[proof-cache\]"):
        assert str(derive(parse(TEXT))) == want


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EINSUMCASCADE_CACHE", str(tmp_path / "file"))
    running_state._answer.cache_clear()
    assert derive(parse(TEXT)).passes["M"] == (2, 1)


def test_an_empty_setting_switches_the_cache_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINSUMCASCADE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    running_state._answer.cache_clear()
    derive(parse(TEXT))
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_derives_softmax_without_sympy(tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import sys",
            "import einsumcascade as ec",
            "ec.derive('softmax_attention', division='deferred')",
            "print('sympy' in sys.modules)",
        ]
    )
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PATH": "", "PYTHONPATH": str(ROOT), "EINSUMCASCADE_CACHE": str(tmp_path)},
            timeout=120,
        )
        said.append(done.stdout.strip())
    assert said == ["True", "False"]
