"""The packaging: one name for each module, in a checkout, a wheel and an sdist; and CI runs what README says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("benchmarks", "codegen", "reference", "schedules")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")


def source_files() -> set[str]:
    """List what a wheel must hold: every file of the packages, so that no grammar, text or page is forgotten."""
    files = list((ROOT / "einsumcascade").glob("*"))
    for package in SETUPTOOLS["packages"]:
        if package != "einsumcascade":
            files += ROOT.joinpath(*package.split(".")).rglob("*")
    return {str(file.relative_to(ROOT)) for file in files if file.is_file() and file.suffix != ".pyc"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the sources, links as links, to build there: a build leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout") / "tree"
    return Path(shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_SOURCE))


def build(source: Path, kind: str, out: Path) -> Path:
    """Build the one `kind` ("wheel" or "sdist") of `source` and return the file."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


def wheel_names(wheel: Path) -> list[str]:
    """List the files of a wheel, but not its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


def test_the_package_list_equals_the_folders() -> None:
    folders: list[str] = []
    pending = [ROOT / "einsumcascade"]
    # Not rglob, which follows no links.
    while pending:
        folder = pending.pop()
        folders.append(".".join(folder.relative_to(ROOT).parts))
        pending += [entry for entry in folder.iterdir() if (entry / "__init__.py").exists()]
    assert sorted(folders) == sorted(SETUPTOOLS["packages"])


def test_the_mapped_folders_are_those_with_links_and_the_links_are_relative() -> None:
    links = {entry.name: os.readlink(entry) for entry in (ROOT / "einsumcascade").iterdir() if entry.is_symlink()}
    assert links == {name: f"../{name}" for name in MAPPED}
    assert SETUPTOOLS["package-dir"] == {f"einsumcascade.{name}": name for name in MAPPED}


def test_a_wheel_holds_every_source_once_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    names = wheel_names(build(checkout, "wheel", tmp_path / "out"))
    assert sorted(names) == sorted(source_files())


def test_a_wheel_built_from_the_sdist_holds_the_same(checkout: Path, tmp_path: Path) -> None:
    sdist = build(checkout, "sdist", tmp_path / "sdist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert sorted(wheel_names(build(unpacked, "wheel", tmp_path / "wheel"))) == sorted(source_files())


def test_an_uninstalled_checkout_imports_its_mapped_folders(checkout: Path) -> None:
    script = (
        "import einsumcascade, einsumcascade.codegen, einsumcascade.reference, einsumcascade.schedules\n"
        "print(einsumcascade.__file__, einsumcascade.codegen.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True, check=True, timeout=120
    )
    package = checkout / "einsumcascade"
    assert done.stdout.split() == [str(package / "__init__.py"), str(package / "codegen" / "__init__.py")]


def test_ci_runs_the_command_that_readme_gives_for_the_checks() -> None:
    shown = subprocess.run(
        [str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True, timeout=60
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert shown.stdout.splitlines() == commands[1:]
    assert all(f".venv/bin/{tool}" in shown.stdout for tool in ("ruff check", "ruff format --check", "mypy", "pytest"))
