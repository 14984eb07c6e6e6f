"""The Tritons that kernels are tested with: the installed one, and the oldest that is supported."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

OLDEST = "3.6.0"
ROOT = Path(__file__).resolve().parents[2]
FLASH_FORWARD = (ROOT / "tests" / "golden" / "hand" / "flash_forward.py").read_text(encoding="utf-8")


@cache
def oldest_triton() -> Path:
    """Return a folder that holds the oldest Triton: `EINSUMCASCADE_OLDEST_TRITON`, or one that pip fills.

    Skips the test where the package index cannot be reached; any other failure of pip is an error.
    """
    given = os.environ.get("EINSUMCASCADE_OLDEST_TRITON")
    if given:
        assert (Path(given) / f"triton-{OLDEST}.dist-info").is_dir(), f"{given} does not hold Triton {OLDEST}"
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"einsumcascade-tests-{os.getuid()}" / f"triton-{OLDEST}"
    if not folder.is_dir():
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        assert folder.parent.stat().st_uid == os.getuid()
        # Each worker fills a folder of its own; the first to finish gives it the name.
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", fresh]
            done = subprocess.run([*command, f"triton=={OLDEST}"], capture_output=True, text=True)
            if done.returncode != 0:
                unreachable = ("NewConnectionError", "ConnectTimeout", "Temporary failure", "Max retries", "ProxyError")
                assert any(word in done.stderr for word in unreachable), done.stderr
                pytest.skip(f"the package index cannot be reached, so Triton {OLDEST} is not here")
            try:
                Path(fresh).rename(folder)
                Path(fresh).mkdir()
            except OSError:
                assert folder.is_dir()
    return folder


def triton_path(name: str) -> Path | None:
    """Return the folder of the Triton called `name`: `installed` or `oldest`."""
    return oldest_triton() if name == "oldest" else None


def run_with(name: str, script: str) -> str:
    """Run a Python text in a clean process with the Triton called `name`; return what it prints."""
    folder = triton_path(name)
    paths = [*([str(folder)] if folder else []), str(ROOT)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FLASH_TYPES = {
    **dict.fromkeys(("Q", "K", "V", "AV"), "*bf16"),
    "LSE": "*fp32",
    **{f"stride_{tensor}{rank}": "i64" for tensor, row in zip("qkvo", "pmmp", strict=True) for rank in ("b", "h", row)},
    **dict.fromkeys(("H", "P", "M"), "i32"),
    "scale": "fp32",
}
FLASH_DIVISIBLE = [name for name in FLASH_TYPES if name not in ("H", "P", "M", "scale")]
