"""The command line of schedules: `tune`, `cache`, and `--schedule` wherever a kernel is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from einsumcascade.schedules.cache import keep
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.cli_calls import call, refuse, succeed
from tests.schedules.test_cache import EXTENTS, key

TUNED = "B=1,H=2,P=512,M=512,E=64,F=64"
MINE = {"tiles": {"p": 64, "m": 32}, "warps": 4, "stages": 3, "descriptors": False}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, on a machine without a GPU."""
    monkeypatch.setenv("EINSUMCASCADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "cache" / "tuned"


def written(path: Path, *, kernel: str = "softmax_attention", **changes: object) -> str:
    """Write a schedule of a person's own."""
    path.write_text(json.dumps({"kernels": {kernel: {**MINE, **changes}}}))
    return str(path)


def test_without_a_gpu_candidates_are_ranked_and_compiled_and_it_says_so(tmp_path: Path, folder: Path) -> None:
    best = tmp_path / "best.json"
    text = succeed("tune", "softmax_attention", "--extents", TUNED, "--candidates", "2", "-o", str(best)).stdout
    assert "nothing was timed: there is no GPU here; the order is the model's" in text
    rows = [line for line in text.splitlines() if "tiles p: " in line]
    assert len(rows) == 2 and all(row.split()[0] == "-" and int(row.split()[3]) > 0 for row in rows)
    assert not folder.exists()
    # The file is taken by the other commands.
    source = succeed("compile", "softmax_attention", "--extents", "E=64,F=64", "--schedule", str(best)).stdout
    assert source.startswith('"""softmax_attention')


def test_the_schedule_of_a_gradient_is_written_and_taken(tmp_path: Path, folder: Path) -> None:
    best = tmp_path / "best.json"
    arguments = ("tune", "sigmoid", "--gradient", "--extents", TUNED, "--candidates", "1", "-o", str(best))
    text = succeed(*arguments, "--target", "cuda:90").stdout
    assert text.startswith("sigmoid_forward in bfloat16") and "\n\nsigmoid_backward in bfloat16" in text
    kernels = json.loads(best.read_text())["kernels"]
    assert {n.partition("sigmoid_")[2].rstrip("_0123") for n in kernels} == {"forward", "backward"}
    assert not folder.exists()
    common = ("--extents", "E=64,F=64", "--schedule", str(best))
    assert "sigmoid_backward" in succeed("compile", "sigmoid", "--gradient", *common).stdout
    assert "sigmoid_forward" in succeed("export", "sigmoid", *common).stdout
    record = json.loads(succeed(*arguments, "--json").stdout)
    assert record["schedule"]["kernels"] == kernels
    assert [record[n]["device"] for n in ("forward", "backward")] == ["", ""]
    refuse("no-gradient", "tune", "sessa", "--gradient")


def test_tune_prints_prediction_and_figures_as_json() -> None:
    # As above, so that the text is compiled already.
    record = json.loads(succeed("tune", "softmax_attention", "--extents", TUNED, "--candidates", "1", "--json").stdout)
    assert record["device"] == "" and record["best"] is None and record["target"] == "cuda:90"
    (trial,) = record["trials"]
    assert trial["predicted_s"] > 0 and trial["measured_s"] is None
    assert trial["registers"] > 0 and trial["shared_memory_bytes"] > 0


def test_bad_options_of_tune_are_one_message() -> None:
    refuse("option-budget", "tune", "gqa", "--budget", "0")
    refuse("unknown-target", "tune", "gqa", "--target", "cuda:91")
    refuse("option-extents", "tune", "gqa", "--extents", "P")
    refuse("not-lowered-yet", "tune", "moba")
    assert call("tune", "gqa", "--candidates", "0").exit_code == 2


def test_the_cache_is_listed_and_cleared(folder: Path) -> None:
    assert succeed("cache", "list").stdout == f"no schedule is kept in {folder}\n"
    schedule = Schedule(kernels={"softmax_attention": KernelSchedule(tiles={"p": 64, "m": 64})})
    trials = [{"measured_s": 2e-3}, {"measured_s": 1e-3}]
    keep(
        key(),
        "softmax_attention",
        schedule,
        {"extents": EXTENTS, "dtype": "bfloat16", "best": trials[1], "trials": trials},
    )
    keep(key(P=1024, M=1024), "softmax_attention", schedule, {})
    head, *rows = succeed("cache", "list").stdout.splitlines()
    assert head.split() == ["cascade", "device", "triton", "dtype", "tuned", "at", "time", "default"]
    assert len(rows) == 2
    assert any("P=4096" in row and "1000.0 us" in row and "2000.0 us" in row for row in rows)
    records = json.loads(succeed("cache", "list", "--json").stdout)
    assert [r["schedule"] for r in records] == [schedule.to_dict()] * 2
    assert succeed("cache", "clear").stdout == "removed 2 tuned schedules\n"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "record",
    [
        {"best": {"measured_s": 10**400}, "trials": [{"measured_s": float("nan")}]},
        {"best": {"measured_s": True}, "trials": {"0": 1}},
        {"best": [], "trials": [[]], "extents": [1], "dtype": 5},
        {"extents": {"P\x1b": 1}, "dtype": "\x1b[2J"},
        {"extents": {"P": {"Q": 1}}, "dtype": None},
    ],
)
def test_a_record_that_others_wrote_is_listed_without_what_is_no_figure(record: dict[str, object]) -> None:
    schedule = Schedule(kernels={"softmax_attention": KernelSchedule(tiles={"p": 64, "m": 64})})
    keep(key(), "softmax_attention", schedule, record)
    (_, row) = succeed("cache", "list").stdout.splitlines()
    assert "\x1b" not in row and "P=4096" in row and row.split()[-2:] == ["-", "-"]
    (found,) = json.loads(succeed("cache", "list", "--json").stdout)
    assert found["measured_s"] is None and found["default_s"] is None


def test_a_cache_that_is_switched_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINSUMCASCADE_CACHE", "")
    assert succeed("cache", "list").stdout == "EINSUMCASCADE_CACHE is empty: nothing is kept\n"
    assert succeed("cache", "clear").stdout == "removed 0 tuned schedules\n"


def test_export_takes_a_schedule_for_the_forward_and_for_kernels_of_the_backward(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    common = ("export", "softmax_attention", "--extents", "E=64,F=64")
    text = succeed(*common, "--schedule", written(path)).stdout
    assert "softmax_attention_forward: tiles p: 64, m: 32; warps 4; stages 3" in text
    assert "num_warps=4, num_stages=3" in text
    default = succeed(*common).stdout
    backward = [line for line in default.splitlines() if line.strip().startswith("# softmax_attention_backward_1: ")]
    assert backward and all(line in text for line in backward)
    both = json.loads(path.read_text())
    both["kernels"] |= {
        f"softmax_attention_backward_{n}": {"tiles": tiles, "warps": 2}
        for n, tiles in enumerate(({"p": 32}, {"m": 32, "p": 16}, {"p": 32, "m": 16}))
    }
    path.write_text(json.dumps(both))
    text = succeed(*common, "--schedule", str(path)).stdout
    assert "softmax_attention_backward_2: tiles p: 32, m: 16; warps 2" in text


@pytest.mark.parametrize("command", ["compile", "export", "verify"])
def test_a_schedule_of_another_cascade_is_refused(command: str, tmp_path: Path) -> None:
    path = written(tmp_path / "mine.json", kernel="softmax_atention")
    message = refuse("schedule-illegal", command, "softmax_attention", "--schedule", path)
    assert "there is no kernel 'softmax_atention'; did you mean 'softmax_attention'?" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "descendng"}, "the order of kernel 'softmax_attention' is 'descendng'"),
        ({"order": 3}, "'order' of kernel 'softmax_attention' is 3, not a text"),
        ({"stages": 2.0}, "'stages' of kernel 'softmax_attention' is 2.0, not a whole number"),
        ({"descriptors": 1}, "'descriptors' of kernel 'softmax_attention' is 1, not true or false"),
        ({"tiles": [64]}, "'tiles' of kernel 'softmax_attention' is [64], not an object"),
        ({"wraps": 4}, "kernel 'softmax_attention' has no choice 'wraps'"),
    ],
)
def test_a_slip_of_the_hand_in_a_schedule_is_named(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "mine.json", **changes)
    assert message in refuse("schedule-file", "compile", "softmax_attention", "--schedule", path)


def test_too_many_stages_are_refused_before_a_compiler_sees_them(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.json", stages=1000)
    assert "1000 stages: more than 16" in refuse("schedule-illegal", "compile", "softmax_attention", "--schedule", path)


def test_a_file_that_is_nested_too_deep_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("[" * 100_000)
    refuse("schedule-file", "compile", "softmax_attention", "--schedule", str(path))


def test_verify_takes_a_schedule(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.json", order="descending, heads inside")
    extents = "B=2,H=3,P=70,M=33,E=16,F=16"
    arguments = ("--constraint", "m <= p", "--dtype", "float16", "--extents", extents, "--schedule", path)
    assert succeed("verify", "softmax_attention", *arguments).stdout.rstrip().endswith("PASS")
    refuse("option-all", "verify", "--all", "--schedule", path)
