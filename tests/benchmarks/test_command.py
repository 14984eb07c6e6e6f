"""The command of the benchmark as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from einsumcascade.benchmarks.cases import SETS
from einsumcascade.benchmarks.launch import LENGTHS, binaries, overhead, stubbed
from einsumcascade.benchmarks.main import BUDGETS, main
from einsumcascade.benchmarks.session import _record
from einsumcascade.cli import app
from einsumcascade.codegen.op import compile as compile_cascade

ROOT = Path(__file__).resolve().parents[2]


# What a machine with a GPU may lack.
LACKED = ("typer", "rich", "platformdirs", "jinja2", "matplotlib")


def bare(folder: Path, *words: str | Path, lacked: Sequence[str] = LACKED) -> subprocess.CompletedProcess[str]:
    """Run the benchmark in the checkout, without some packages, and with the cache of a user who has named none."""
    blocked = folder / "blocked"
    for name in lacked:
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ModuleNotFoundError('{name} is not here', name='{name}')\n")
    own = {k: v for k, v in os.environ.items() if k != "EINSUMCASCADE_CACHE"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        cwd=ROOT,
        env={**own, "PYTHONPATH": f"{blocked}{os.pathsep}."},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_bare_checkout_compares_times_and_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "results"
    lacked = LACKED[:3]
    done = bare(tmp_path, "--set", "smoke", "causal", "forward,step", "--out", out, lacked=lacked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"results.json", "index.html", "forward.png", "step.png"} == {p.name for p in out.iterdir()}
    result = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [c["direction"] for c in result["cases"]] == ["forward", "step"]
    for record in result["cases"]:
        names = [row["name"] for row in record["rows"]]
        assert names[0] == "ours" and "torch.compile" in names
        for row in record["rows"]:
            assert row["state"] == "passed" or row["note"] == "it has no gradients on a CPU"
    assert "Rates of live work" in done.stdout and "geometric mean" in done.stdout
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "causal forward B1 H2 N40 D16" in page and "http" not in page and "<script" not in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_a_bare_checkout_tells_what_compiling_tells(tmp_path: Path) -> None:
    done = bare(tmp_path, "--static", "--quick", "causal", "forward", "D64")
    assert done.returncode == 0 and "mode" in done.stdout, done.stdout + done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("causal forward B4 H32 N4096 D64"))
    assert "warps" in row


def test_a_bare_checkout_says_what_it_needs(tmp_path: Path) -> None:
    done = bare(tmp_path, "--list", lacked=["lark"])
    assert done.returncode == 1
    assert done.stderr.startswith("lark is not here: the benchmark needs torch, triton, numpy")
    assert "may be missing" in done.stderr


def made_up(**rates: float | str) -> dict[str, Any]:
    """A result with one case, where each candidate has a rate, or a state."""
    record = _record(SETS["standard"][0])
    rows = []
    for name, rate in rates.items():
        timed = isinstance(rate, float)
        ms = record["flop"] * 1e-9 / rate if isinstance(rate, float) else 0.0
        times = {"ms": ms, "low": ms, "high": ms, "rounds": 9} if timed else None
        rows.append({"name": name, "state": "passed" if timed else rate, "rate": rate if timed else None})
        rows[-1] |= {"times": times, "note": "", "host_us": None, "schedule": "", "share": 0.5, "verdicts": {}}
    return {
        "format": 1,
        "date": "today",
        "command": "bench",
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11"},
        "absent": {},
        "cases": [{**record, "rows": rows}],
    }


def test_earlier_results_are_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made_up(ours=560.0, FlexAttention=400.0, cuDNN="wrong")))
    assert main(["--show", str(file), "--out", str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out
    rates = next(line for line in shown.splitlines() if line.startswith("full forward B4 H16 N4096 D128"))
    assert rates.split()[-4:] == ["560", "400", "wrong", "1.40"]
    assert "TFLOP/s, full, D 128" in shown and "met" in shown
    assert "full forward B4 H16 N4096 D128: cuDNN wrong" in shown
    file.write_text(json.dumps(made_up(ours="wrong", FlexAttention=400.0)))
    assert main(["--show", str(file)]) == 1
    assert "1 of our own runs were wrong or failed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_it_tells_what_compiling_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "causal", "forward", "D64", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("There is no CUDA device here: nothing is measured.")
    row = next(line for line in shown.splitlines() if line.startswith("causal forward B4 H32 N4096 D64"))
    assert "warps" in row
    kept = json.loads((tmp_path / "static.json").read_text(encoding="utf-8"))
    (kernel,) = kept["cases"][0]["kernels"]
    assert kernel["registers"] > 0 and kernel["loop"] > 0 and 5 < kernel["per_score"] < 40
    assert kept["cases"][0]["least_ms"] > 0


@pytest.mark.gpu
def test_on_a_gpu_ours_and_the_rivals_pass_and_are_timed(tmp_path: Path) -> None:
    assert main(["causal", "forward,backward", "N4096", "D64", "--rivals", "flash,flex", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert result["ceilings"]["copy_gb_s"] > 0
    for record in result["cases"]:
        assert [row["name"] for row in record["rows"]] == ["ours", "SDPA flash", "FlexAttention"]
        assert all(row["state"] == "passed" and row["times"]["ms"] > 0 for row in record["rows"])


def test_what_does_not_fit_the_budget_is_no_static_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--static", "--quick", "causal", "forward", "--budget", "0.001"]) == 0
    assert "skipped: 0 s left" in capsys.readouterr().out


def test_cases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--set", "standard", "decode"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 cases, {BUDGETS['standard']:.0f} s:"
    assert lines[1].strip() == "decode forward B1 H32/8 M8192 D128"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["causl"], "no case of this set has the word 'causl'"),
        (["sigmoid", "decode"], "no case of this set has all of: sigmoid decode"),
        (["--rivals", "flx"], "there is no rival 'flx'"),
        (["--show", "missing.json"], "'missing.json' cannot be read: No such file or directory"),
        (["--out", "/dev/null/x"], "'/dev/null/x' is no folder that can be written to: Not a directory"),
    ],
)
def test_mistakes_are_one_message_and_status_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 7}', '{"format": 1}', "{"])
def test_files_that_are_no_results_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    assert main(["--show", str(file)]) == 2
    assert "InputError[benchmark-file]" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf", "soon"])
def test_a_budget_is_a_number_of_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--budget", seconds])
    assert exit.value.code == 2
    assert f"'{seconds}' is no number of seconds above 0" in capsys.readouterr().err


def test_the_command_line_has_the_same_command() -> None:
    result = CliRunner().invoke(app, ["bench", "--list", "--quick", "window"])
    assert result.exit_code == 0 and "window forward B4 H16 N4096 D128" in result.stdout
    assert CliRunner().invoke(app, ["bench", "nothing"]).exit_code == 2
    shown = CliRunner().invoke(app, ["bench", "--help"])
    assert shown.exit_code == 0 and "usage: einsumcascade bench" in shown.stdout


# --- launch -----------------------------------------------------------------------------------------------------------


def test_calls_are_launched_on_a_driver_that_drives_nothing() -> None:
    found = overhead()
    assert found.launches == 1 and (found.lengths, found.texts) == (len(LENGTHS), 1)
    # No time is asserted: other work of this machine counts too.
    assert 0 < found.bare < found.light and found.recorded > 0 and found.backward > 0
    assert found.binaries == 1


@pytest.mark.parametrize(
    ("width", "lengths"),
    [(64, (16, 17, 33, 64, 1000, 1001)), (65, (17, 33, 35, 77)), (65, (16, 48, 64, 160))],
)
def test_lengths_make_no_binary_of_their_own(width: int, lengths: tuple[int, ...]) -> None:
    # Of 65 elements a row, strides of rows, heads and batches are multiples of 16 or not by the length alone.
    op = compile_cascade("relu", constants={"scale": lengths[1] / 64})
    with stubbed():
        for length in lengths:
            op(*[torch.zeros(1, 2, length, width, dtype=torch.bfloat16)[..., :64] for _ in range(3)])
        made = binaries(op.source)
        for length in (lengths[0] + 32, lengths[1] + 32):
            op(*[torch.zeros(1, 2, length, width, dtype=torch.bfloat16)[..., :64] for _ in range(3)])
    assert binaries(op.source) == made
    # Each case has a constant, so a text, of its own.
    assert made == 1
