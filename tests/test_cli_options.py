"""The options of the command line: what they mean, and that each mistake is one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from einsumcascade.cli import parse_extents
from einsumcascade.errors import InputError
from tests.cli_calls import call, refuse, succeed

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["analyse", "derive", "compile", "verify"])
def test_a_wrong_spec_is_one_message_and_status_two(command: str, tmp_path: Path) -> None:
    assert "did you mean 'gqa'?" in refuse("unknown-spec", command, "gqaa")
    assert refuse("spec-missing", command, str(tmp_path / "no.cascade"))
    path = tmp_path / "mine.cascade"
    path.write_text("in X[m]\nS = Y[m]\nout S\n")
    assert f"{path}:2:5" in refuse("unknown-tensor", command, str(path))
    path.write_bytes(b"\x7fELF\x00")
    assert refuse("spec-binary", command, str(path))


MISTAKES = {
    "unknown-tensor": "in X[m], Y[m]\nS = X[m] * y[m]\nout S",
    "unbound-rank": "in X[m]\nS[k] = X[k]\nout S",
    "unknown-operator": "in X[m]\nS[m] = sigmod(X[m])\nout S",
    "not-associative": "in X[m]\nS = X[m] :: sub(m)\nout S",
    "spec-empty": "",
}


@pytest.mark.parametrize("command", ["analyse", "derive", "compile", "verify"])
@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_in_a_text_is_one_message_and_nothing_is_written(code: str, command: str, tmp_path: Path) -> None:
    path, output = tmp_path / "mine.cascade", tmp_path / "kernel.py"
    path.write_text(MISTAKES[code])
    message = refuse(code, command, str(path), *(["-o", str(output)] if command == "compile" else []))
    assert message.count("docs/errors.md#") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.cascade"]


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("unknown-rank", ["--extents", "Z=3"]),
        ("unknown-target", ["--target", "cuda:91"]),
        ("schedule-file", ["--schedule", "bad.json"]),
        ("schedule-illegal", ["--schedule", "illegal.json"]),
        ("option-extents", ["--extents", "E=64,E=32"]),
    ],
)
def test_nothing_is_written_where_an_option_is_wrong(
    code: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"kernels": 3}')
    Path("illegal.json").write_text('{"kernels": {"relu": {"tiles": {"p": 64, "m": 48}}}}')
    refuse(code, "compile", "relu", *arguments, "-o", "kernel.py")
    assert not Path("kernel.py").exists()


def test_an_extent_that_comes_out_broken_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "mine.cascade"
    path.write_text("in X[m]\nrank k = M / 3\nS[k] = X[k]\nout S\n")
    assert f"{path}:2:" in refuse("extent-value", "verify", str(path), "--extents", "M=8")
    assert json.loads(succeed("analyse", str(path), "--extents", "M=8", "--json").stdout)["extents"] == {"M": 8}


@pytest.mark.parametrize(
    "text", ["P", "P=", "P=x", "p=3", "P=0", "P=-1", "P=1.5", "P=3,P=4", "P=3,,M=4", "=3", "P=3;M=4", "P=3,"]
)
def test_wrong_extents_are_one_message(text: str) -> None:
    message = refuse("option-extents", "analyse", "gqa", "--extents", text)
    assert "--extents:1:" in message and "^" in message


def test_extents_are_read_with_blanks() -> None:
    assert parse_extents(" P = 3 , M0=4 ") == {"P": 3, "M0": 4}
    assert parse_extents("") == parse_extents("  ") == {}
    with pytest.raises(InputError, match="ranks are upper case: M0=4"):
        parse_extents("m0=4")


@pytest.mark.parametrize("text", ["w", "w=", "w=x", "=1", "w=inf", "w=nan", "w=1e999", "w-w=1", "w=1 2"])
def test_a_wrong_constant_is_one_message(text: str) -> None:
    refuse("option-const", "analyse", "sliding_window", "--const", text)


def test_a_constant_that_nothing_uses_is_one_message() -> None:
    assert "did you mean 'scale'?" in refuse("option-const", "analyse", "gqa", "--const", "scal=2")


def test_a_score_changes_the_cascade_of_every_command(tmp_path: Path) -> None:
    arguments = ["--score", "QK = cap * tanh(QK / cap) + SLOPE[h] * (m - p)", "--const", "cap=20"]
    assert call("report", "softmax_attention", *arguments, "-o", str(tmp_path / "page.html")).exit_code == 0
    assert "SLOPE" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "SLOPE" in succeed("analyse", "softmax_attention", *arguments).stdout
    assert "3 passes -> 1 over M" in succeed("derive", "softmax_attention", *arguments).stdout
    assert (
        "in Q[b, h, p, e], K[b, h, m, e], V[b, h, m, f], SLOPE[h]"
        in succeed("compile", "softmax_attention", *arguments).stdout
    )


def test_a_wrong_score_is_one_message() -> None:
    refuse("option-score", "derive", "gqa", "--score", "QK + 1")
    refuse("option-score", "derive", "gqa", "--score", "QK == 1")
    refuse("unknown-tensor", "derive", "gqa", "--score", "QQ = QK + 1")
    refuse("score-rank", "derive", "gqa", "--score", "QK = QK + f")
    refuse("option-const", "derive", "gqa", "--score", "QK = QK + 1", "--const", "w=3")


@pytest.mark.parametrize(
    ("text", "code"), [("", "empty-text"), ("m", "not-a-condition"), ("m < q", "unknown-name"), ("m <", "syntax")]
)
def test_a_wrong_constraint_is_one_message(text: str, code: str) -> None:
    refuse(code, "derive", "gqa", "--constraint", text)


def test_a_constant_may_have_any_name() -> None:
    from einsumcascade.cli.options import spec_of

    cascade = spec_of("gqa", ["p - m < condition"], ["condition=7", "scale=0.5"])
    assert str(cascade).splitlines()[1:4] == [
        "const scale = 0.5",
        "const condition = 7",
        "constraint p - m < condition",
    ]


def test_an_unknown_target_is_one_message() -> None:
    refuse("unknown-target", "compile", "gqa", "--target", "cuda:91")


def test_a_schedule_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text('\ufeff{"kernels": {}, "reference": "running"}', encoding="utf-8")
    assert succeed("compile", "gqa", "--schedule", str(path)).stdout


def test_a_schedule_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    refuse("schedule-file", "compile", "gqa", "--schedule", str(path))
    path.write_bytes(b"\xff\xfe")
    refuse("schedule-file", "compile", "gqa", "--schedule", str(path))
    path.write_text("{")
    refuse("schedule-file", "compile", "gqa", "--schedule", str(path))


def test_an_output_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    refuse("output-file", "compile", "gqa", "-o", str(tmp_path / "no" / "kernel.py"))
    refuse("output-file", "compile", "gqa", "-o", str(tmp_path))
    # Before a search of minutes, not after it.
    refuse("output-file", "tune", "gqa", "--extents", "P=1", "-o", str(tmp_path / "no" / "best.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["analyse"],
        ["verify", "gqa", "--dtype", "float8"],
        ["verify", "gqa", "--seed", "-1"],
        ["list", "--colour"],
        ["compile", "gqa", "--schedule"],
    ],
)
def test_a_wrong_command_line_ends_with_two(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Error" in result.stderr
