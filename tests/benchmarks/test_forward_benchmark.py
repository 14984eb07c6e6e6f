"""The benchmark script, on tiny shapes: it compares, it times only what passed, it writes what it found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "forward.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Import the script, which is in no package."""
    spec = importlib.util.spec_from_file_location("forward_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_smoke_run_compares_times_and_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "forward.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--smoke", "--draws", "2", "--out", out],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["smoke"] and {"date", "device", "torch", "triton", "python"} <= set(result)
    assert [case["causal"] for case in result["cases"]] == [False, True]
    for case in result["cases"]:
        names = [row["name"] for row in case["rows"]]
        assert names[0] == "ours, default schedule" and {"ours", "SDPA math", "plain formula"} <= set(names)
        for row in case["rows"]:
            assert row["passed"] and row["max_error"] <= case["max_bound"], row
            assert row["ms"] > 0 and row["tflops"] > 0


def test_a_wrong_result_is_not_timed(script: ModuleType) -> None:
    case = script.Case(B=1, H=1, N=20, D=16, causal=True)
    inputs = tuple(torch.randn(1, 1, 20, 16).to(torch.bfloat16) for _ in range(3))
    truth = script.truth_of(case, *inputs, draws=2)
    for wrong in (lambda q, k, v: script.plain(q, k, v, causal=False), lambda q, k, v: torch.full_like(q, torch.nan)):
        row = script.try_one(script.Row(name="wrong"), lambda wrong=wrong: wrong, truth, inputs, case)
        assert not row.passed and row.ms is None and row.note


def test_what_cannot_run_says_why(script: ModuleType) -> None:
    def absent() -> None:
        raise RuntimeError("No available kernel.\nmore")

    case = script.Case(B=1, H=1, N=20, D=16, causal=False)
    inputs = tuple(torch.randn(1, 1, 20, 16).to(torch.bfloat16) for _ in range(3))
    row = script.try_one(script.Row(name="absent"), absent, script.truth_of(case, *inputs, draws=1), inputs, case)
    assert not row.passed and row.note == "RuntimeError: No available kernel."


def test_the_float64_formula_agrees_with_another(script: ModuleType) -> None:
    q, k, v = (torch.randn(70, 16, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]
        assert torch.allclose(script.exact(q, k, v, causal=causal, rows=32), expected, atol=1e-12)
