"""The command of the benchmark as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from einsumcascade.benchmarks import static
from einsumcascade.benchmarks.cases import SETS
from einsumcascade.benchmarks.findings import aims
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
        rows[-1]["hidden_us"] = None
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


def with_cases(*cases: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    """A result of several cases of the standard set by their place, each as `made_up` makes it."""
    found = made_up()
    found["cases"] = []
    for n, rates in cases:
        record = _record(SETS["standard"][n])
        made = made_up(**rates)["cases"][0]
        found["cases"].append({**record, **{k: v for k, v in made.items() if k not in record}})
    return found


def aims_of(result: dict[str, Any]) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in aims(result).rows}


def test_an_aim_is_missed_where_a_kernel_of_ours_was_wrong() -> None:
    fine, wrong = {"ours": 560.0, "FlexAttention": 400.0}, {"ours": "wrong", "FlexAttention": 400.0}
    found = aims_of(with_cases((0, fine), *((n, wrong) for n in range(1, 6))))
    mean = "forward without decoding, over FlexAttention, geometric mean"
    assert found[mean] == ["missed: ours wrong or failed in 5", "1.15", "1.4", "1 of 6"]
    assert found["TFLOP/s, full, D 128"] == ["met", "545", "560", "1 of 1"]
    assert found["TFLOP/s, full, D 64"][0] == "missed: ours wrong or failed in 1"


def test_an_aim_that_some_cases_do_not_tell_of_says_so() -> None:
    fine, failed = {"ours": 560.0, "FlexAttention": 400.0}, {"ours": 560.0, "FlexAttention": "failed"}
    result = with_cases((0, fine), (1, failed), (2, {"ours": 300.0}))
    mean = "forward without decoding, over FlexAttention, geometric mean"
    assert aims_of(result)[mean] == ["met, but 1 not timed", "1.15", "1.4", "1 of 2"]
    # A case that ended before the rival's turn.
    result["cases"][2] |= {"variant": "full", "skipped": "the time was up"}
    assert aims_of(result)[mean] == ["met, but 2 not timed", "1.15", "1.4", "1 of 3"]
    slow = {"ours": 300.0, "FlexAttention": 400.0}
    assert aims_of(with_cases((0, slow)))[mean] == ["missed", "1.15", "0.75", "1 of 1"]
    assert aims_of(with_cases((0, {"ours": 300.0}))).keys() == {"TFLOP/s, full, D 128"}


def test_decoding_is_no_part_of_the_forward_aims() -> None:
    (decode,) = [n for n, c in enumerate(SETS["standard"]) if str(c) == "decode forward B1 H32/8 M8192 D128"]
    slow = {"ours": 100.0, "FlexAttention": 400.0}
    assert aims_of(with_cases((decode, slow))) == {}


def test_ours_is_compared_by_the_faster_of_default_and_tuned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = made_up(**{"ours": 300.0, "ours, tuned": 600.0, "FlexAttention": 400.0})
    file = tmp_path / "results.json"
    file.write_text(json.dumps(result))
    assert main(["--show", str(file)]) == 0
    shown = capsys.readouterr().out.splitlines()
    rates = next(line for line in shown if line.startswith("full forward B4 H16 N4096 D128"))
    assert rates.split()[-4:] == ["300", "600", "400", "1.50"]


def test_rates_that_the_host_may_have_slowed_are_marked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = made_up(ours=300.0, FlexAttention=400.0)
    for row, us in zip(result["cases"][0]["rows"], (60.0, 180.0), strict=True):
        row |= {"host_us": us, "hidden_us": 75.0}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(result))
    assert main(["--show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert " 300  " in shown and " 400~ " in shown
    assert "~: the host took longer for a call than the 75 us that the clock hides" in shown


def test_results_that_were_edited_are_shown_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = made_up(ours=560.0, FlexAttention=400.0, cuDNN="wrong")
    result |= {"ceilings": {"matmul_bf16_tflops": 798.0, "copy_gb_s": 4262.0}, "state": {"clocks.sm": "1980 MHz"}}
    file = tmp_path / "results.json"

    def places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
        yield path
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        ):
            yield from places(inner, *path, key)

    refused = 0
    for path in [p for p in places(result) if p]:
        for other in (None, "", "$x^", [], {}, -1, 1e300, True, [[]], "missing"):
            edited = json.loads(json.dumps(result))
            held = edited
            for key in path[:-1]:
                held = held[key]
            if other == "missing":
                del held[path[-1]]
            else:
                held[path[-1]] = other
            file.write_text(json.dumps(edited))
            status = main(["--show", str(file)])
            said = capsys.readouterr().err
            assert status in (0, 1, 2) and (status == 2) == said.startswith("InputError[benchmark-file]"), (path, other)
            refused += status == 2
    assert refused > 200
    file.write_text("\ufeff" + json.dumps(result), encoding="utf-8")
    assert main(["--show", str(file)]) == 0
    file.write_text("[" * 100_000)
    assert main(["--show", str(file)]) == 2


def test_edited_names_are_no_formulas_in_figures(tmp_path: Path) -> None:
    result = made_up(ours=560.0)
    result["cases"][0]["case"] = result["device"] = "$x^"
    file = tmp_path / "results.json"
    file.write_text(json.dumps(result))
    assert main(["--show", str(file), "--out", str(tmp_path)]) == 0


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


@pytest.fixture
def forecasts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the cases of a static run come to: lines, or what is raised; at the end, nothing is known."""
    given: list[Any] = []

    def made(case: Any, known: Any) -> static.Forecast:
        found = given.pop(0) if given else ""
        if isinstance(found, BaseException):
            raise found
        return static.Forecast(case=case, note=found)

    monkeypatch.setattr(static, "_forecast", made)
    return given


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (["", ""], 0),
        (["", RuntimeError("ptxas")], 1),
        ([RuntimeError("ptxas"), RuntimeError("ptxas")], 1),
        (["", KeyboardInterrupt()], 130),
        ([RuntimeError("ptxas"), KeyboardInterrupt()], 130),
    ],
)
def test_the_status_of_a_static_run_tells_how_it_ended(
    found: list[Any], status: int, forecasts: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forecasts += found
    assert main(["--static", "--quick", "full,causal", "forward", "D128", "--out", str(tmp_path)]) == status
    count = sum(not isinstance(f, KeyboardInterrupt) for f in found)
    kept = json.loads((tmp_path / "static.json").read_text(encoding="utf-8"))
    assert len(kept["cases"]) == count and [p.name for p in tmp_path.iterdir()] == ["static.json"]
    failed = sum(isinstance(f, RuntimeError) for f in found)
    assert (f"{failed} of our own kernels failed" in capsys.readouterr().err) == bool(failed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_the_model_says_where_it_counts_tiles_that_a_call_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--static", "document,causal", "forward", "N4096", "D128"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if " forward B4" in line}
    assert rows["document"][-3].endswith("+") and not rows["causal"][-3].endswith("+")


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "5"], "argument --budget: 10 of the seconds are kept for the report, so give more"),
        (["--set", "smoke", "--budget", "10"], "argument --budget: 10 of the seconds"),
        (["--resume"], "argument --resume: name the folder of the earlier run by --out"),
        (["--keep-tuned"], "argument --keep-tuned: nothing is tuned without --tune"),
        (["--tune", "causal"], "argument --tune: 'causal' is no number of seconds above 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_an_interrupted_run_shows_what_it_has_and_ends_with_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--set", "smoke", "--rivals", "none", "--out", str(tmp_path)]
    ended = [0.0]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        lines = []
        for line in run.stdout:
            lines.append(line)
            # The first case is done, and the second one begins.
            if line.startswith("causal") and not ended[0]:
                ended[0] = time.monotonic()
                run.send_signal(signal.SIGINT)
    shown = "".join(lines)
    assert run.returncode == 130 and time.monotonic() - ended[0] < 60
    assert "causal forward B1 H2 N40 D16: skipped: interrupted" in shown and "Rates of live work" in shown
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert kept["interrupted"] and kept["cases"][0]["rows"][0]["times"]


def test_an_interruption_of_the_report_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("einsumcascade.benchmarks.plots.write_png", interrupted)
    (tmp_path / "results.json").write_text(json.dumps(made_up(ours=560.0)))
    assert main(["--show", str(tmp_path / "results.json"), "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_second_run_keeps_the_results_of_the_first_or_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--set", "smoke", "forward", "--rivals", "none", "--out", str(tmp_path)]
    assert main([*words, "causal"]) == 0
    first = (tmp_path / "results.json").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main([*words, "full,causal", "--resume"]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "results-1.json").read_text(encoding="utf-8") == first
    assert "taken over: causal forward B1 H2 N40 D16" in shown and shown.count("[") == 1
    both = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    kept = {c["variant"]: c for c in both["cases"]}
    assert kept["causal"] == json.loads(first)["cases"][0] and kept["full"]["rows"][0]["times"]
    (tmp_path / "results.json").write_text("{}")
    assert main([*words, "causal", "--resume"]) == 2
    assert (tmp_path / "results.json").read_text() == "{}"


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
