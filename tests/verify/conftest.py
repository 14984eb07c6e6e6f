"""What the tests of tuning share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tuned schedules are kept: a cache of its own for each test, on a machine without a GPU."""
    monkeypatch.setenv("EINSUMCASCADE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "tuned"
