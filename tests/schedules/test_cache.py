"""Tuned schedules on disk: what is found, and that nothing wrong in the folder is trusted or fatal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from einsumcascade.errors import EinsumCascadeWarning
from einsumcascade.gallery import load
from einsumcascade.schedules import cache
from einsumcascade.schedules.cache import Key, at, clear, entries, find, keep, key_of
from einsumcascade.schedules.schedule import KernelSchedule, Schedule

ROOT = Path(__file__).resolve().parents[2]
EXTENTS = {"B": 4, "H": 16, "P": 4096, "M": 4096, "E": 64, "F": 64}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("EINSUMCASCADE_CACHE", str(tmp_path))
    return tmp_path / "tuned"


def key(**changes: object) -> Key:
    """The key of softmax attention at some extents."""
    extents = {**EXTENTS, **{r: n for r, n in changes.items() if r in EXTENTS}}
    options = {"dtype": "bfloat16", "precision": "ieee", "ordered": False, "device": "H200", "triton": "3.6.0"}
    options |= {n: v for n, v in changes.items() if n in options}
    name = str(changes.get("name", "softmax_attention"))
    return key_of(load(name), extents=extents, features={r: extents[r] for r in "EF"}, **options)  # type: ignore[arg-type]


def schedule(stages: int = 2) -> Schedule:
    return Schedule(kernels={"softmax_attention": KernelSchedule(tiles={"p": 64, "m": 64}, stages=stages)})


def kept(k: Key | None = None, stages: int = 2) -> Path:
    """Keep a schedule and return its file."""
    path = keep(k or key(), "softmax_attention", schedule(stages), {"extents": EXTENTS})
    assert path is not None
    return path


def stages(k: Key) -> int | None:
    """The stages of the schedule that is found, which tell one from the other."""
    entry = find(k)
    return None if entry is None else entry.schedule.kernels["softmax_attention"].stages


def test_what_is_kept_is_found() -> None:
    kept()
    entry = find(key())
    assert entry is not None and entry.schedule == schedule() and entry.record == {"extents": EXTENTS}
    assert [e.name for e in entries()] == ["softmax_attention"]


def test_a_later_result_takes_the_place_of_an_earlier() -> None:
    assert kept(stages=2) == kept(stages=3)
    assert stages(key()) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "softcap"},
        {"E": 128},
        {"dtype": "float16"},
        {"ordered": True},
        {"device": "A100"},
        {"triton": "3.9.0"},
    ],
)
def test_another_kernel_device_or_triton_finds_nothing(changes: dict[str, object]) -> None:
    kept()
    assert find(key(**changes)) is None


def test_the_precision_of_products_counts_for_float32_alone() -> None:
    kept()
    assert find(key(precision="tf32")) is not None
    kept(key(dtype="float32"))
    assert find(key(dtype="float32", precision="tf32")) is None


def test_other_lengths_take_the_nearest_bucket() -> None:
    kept(key(P=1024, M=1024), stages=1)
    kept(key(P=8192, M=8192), stages=3)
    assert stages(key(P=1000, M=1000)) == 1
    assert stages(key(P=1500, M=1500)) == 1
    assert stages(key(P=4096, M=4096)) == 3
    assert stages(key(P=20000, M=20000)) == 3


def test_extents_of_another_kind_take_none() -> None:
    kept(key(P=4096, M=4096))
    assert find(key(P=1, M=4096)) is None
    assert find(key(P=256, M=4096)) is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "not JSON",
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: json.dumps({"format": 99}),
        lambda text: json.dumps({**json.loads(text), "schedule": {"kernels": {"k": {"stages": "2"}}}}),
        lambda text: json.dumps({**json.loads(text), "schedule": 5}),
        lambda text: json.dumps({**json.loads(text), "bucket": {"P": -1}}),
        lambda text: json.dumps({**json.loads(text), "bucket": {"P": True}}),
        lambda text: json.dumps({**json.loads(text), "device": None}),
        lambda text: text + " " * (1 << 20),
        lambda text: "9" * 5000,
        lambda text: '{"format": NaN}',
        # Half of a character, and what would move a cursor.
        lambda text: json.dumps({**json.loads(text), "name": "\ud800"}),
        lambda text: json.dumps({**json.loads(text), "record": {"dtype": "\ud800"}}),
        lambda text: json.dumps({**json.loads(text), "device": "\x1b[2J"}),
        lambda text: json.dumps({**json.loads(text), "bucket": {"\n": 1}}),
        lambda text: json.dumps({**json.loads(text), "bucket": {"P": 1 << 63}}),
        lambda text: json.dumps({**json.loads(text), "schedule": {"kernels": {}, "split": {"m": True}}}),
        lambda text: "{" + text[1:].replace('"format"', '"format": 1, "format": 2, "was"', 1),
    ],
)
def test_what_is_no_tuned_schedule_is_passed_over_with_a_warning(spoil: Callable[[str], str]) -> None:
    path = kept()
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.warns(EinsumCascadeWarning, match=r"\[tuned-schedule\] .* is no tuned schedule of this version"):
        assert find(key()) is None
    # The next result takes its place.
    kept()
    assert find(key()) is not None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_another_encoding_of_the_same_text_is_read(encoding: str) -> None:
    path = kept()
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert stages(key()) == 2


def test_what_is_no_file_is_not_waited_for() -> None:
    path = kept()
    path.unlink()
    os.mkfifo(path)
    assert find(key()) is None and entries() == ()
    kept()
    assert stages(key()) == 2


def test_a_file_or_a_folder_that_cannot_be_read_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = key()
    kept(wanted)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for owner, name in ((Path, "open"), (os, "listdir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refused)
            with pytest.warns(EinsumCascadeWarning, match=r"\[tuned-schedule\] .* cannot be read: Permission denied"):
                assert find(wanted) is None
    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(PermissionError):
        clear()


def test_a_schedule_that_is_kept_may_be_read_by_those_who_may_read_other_files() -> None:
    before = os.umask(0o027)
    try:
        assert kept().stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_an_interruption_while_a_schedule_is_written_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(stages=2)

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept(stages=3)
    assert stages(key()) == 2 and len(list(folder.iterdir())) == 1


def test_what_a_killed_process_began_to_write_is_never_read_and_is_cleared(folder: Path) -> None:
    path = kept()
    path.rename(folder / "tmp0123456789abcdef.draft")
    assert find(key()) is None and entries() == ()
    assert clear() == 0 and list(folder.iterdir()) == []


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EINSUMCASCADE_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache/einsumcascade"))
    monkeypatch.chdir(tmp_path)
    assert keep(key(), "softmax_attention", schedule(), {}) is None and find(key()) is None
    assert list(tmp_path.iterdir()) == []


def test_the_very_bucket_is_told_from_a_near_one() -> None:
    kept()
    assert at(key(P=1024)) is None and find(key(P=1024)) is not None
    entry = at(key(P=4000))
    assert entry is not None and entry.schedule == schedule()


def test_bytes_that_are_no_text_are_passed_over() -> None:
    path = kept()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(EinsumCascadeWarning):
        assert find(key()) is None


def test_a_file_of_another_key_under_this_name_is_not_taken() -> None:
    path = kept()
    other = kept(key(device="A100"))
    path.write_bytes(other.read_bytes())
    assert find(key()) is None


def test_files_of_others_are_left_alone(folder: Path) -> None:
    kept()
    (folder / "notes.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    assert clear() == 1
    assert sorted(p.name for p in folder.iterdir()) == ["notes.json", "notes.txt"]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EINSUMCASCADE_CACHE", str(tmp_path / "file"))
    with pytest.warns(EinsumCascadeWarning, match=r"\[tuned-schedule\] .* cannot be kept"):
        assert keep(key(), "softmax_attention", schedule(), {}) is None
    assert find(key()) is None and entries() == () and clear() == 0


def test_a_disk_that_fills_up_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(stages=2)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(EinsumCascadeWarning, match="No space left on device"):
        assert keep(key(), "softmax_attention", schedule(3), {}) is None
    assert stages(key()) == 2 and len(list(folder.iterdir())) == 1


def test_an_empty_variable_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINSUMCASCADE_CACHE", "")
    assert keep(key(), "softmax_attention", schedule(), {}) is None
    assert find(key()) is None and entries() == ()


def test_what_the_package_brings_along_comes_after_what_was_measured_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    path = kept(stages=4)
    path.rename(shipped / path.name)
    assert find(key()) is None
    monkeypatch.setattr(cache, "SHIPPED", shipped)
    assert stages(key()) == 4
    # The nearest of one's own, rather than the very bucket of another machine.
    kept(key(P=2048), stages=2)
    assert stages(key()) == 2
    assert [e.path.parent.name for e in entries()] == ["tuned"]


def test_nothing_is_shipped_that_was_not_measured() -> None:
    files = sorted(cache.SHIPPED.glob("*.json")) if cache.SHIPPED.is_dir() else []
    for path in files:
        assert json.loads(path.read_text(encoding="utf-8"))["record"]["best"]["measured_s"] > 0


def test_processes_that_write_at_once_leave_whole_files() -> None:
    script = (
        "from tests.schedules.test_cache import key, schedule, keep\n"
        "for n in range(1, 17):\n    assert keep(key(), 'softmax_attention', schedule(n), {'many': 'x' * 50_000})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(2)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(w.poll() is None for w in writers):
            found = find(key())
            assert found is None or found.record == {"many": "x" * 50_000}
    assert [w.returncode for w in writers] == [0, 0]
    assert stages(key()) == 16


def test_a_folder_that_is_cleared_while_others_write_holds_whole_files_or_none() -> None:
    script = (
        "import warnings\nfrom tests.schedules.test_cache import key, schedule, keep\n"
        "warnings.simplefilter('ignore')\n"
        "for n in range(1, 33):\n    keep(key(P=64 << n % 4), 'softmax_attention', schedule(n % 4 + 1), {})\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(2)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(w.poll() is None for w in writers):
            assert clear() <= 4
            assert all(e.schedule == schedule(e.schedule.kernels["softmax_attention"].stages) for e in entries())
    assert [w.returncode for w in writers] == [0, 0]
    clear()
    assert entries() == ()


def test_a_bucket_rounds_up_to_powers_of_two() -> None:
    assert key(P=4095, M=1, B=3, H=16).bucket == {"B": 4, "H": 16, "M": 1, "P": 4096}
    assert replace(key(), lengths={"P": 0}).bucket == {"P": 1}
