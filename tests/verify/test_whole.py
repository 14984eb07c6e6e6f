"""The whole gallery, verified at once: what is tried, what is told, and what an interruption leaves."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from einsumcascade import gallery
from einsumcascade.cli import app
from einsumcascade.reference import run
from einsumcascade.verify import whole
from einsumcascade.verify.whole import KINDS, Sweep, Trial, trials_of, verify_gallery, without_keys
from tests.nightly import NIGHTLY

FAILED = Trial(name="gqa", kind="ones", dtype="float16", status="FAIL", ratio=3.0, note="AV is off")
PASSED = Trial(name="gqa", kind="large", dtype="float16", status="pass", ratio=0.25)


def test_every_kind_of_input_is_tried_in_every_dtype() -> None:
    sweep = verify_gallery(["softmax_attention"], dtypes=("float16", "float32"), jobs=2)
    assert [(t.kind, t.dtype) for t in sweep.trials] == [(k, d) for k in KINDS for d in ("float16", "float32")]
    assert sweep.passed and sweep.planned == 2 * len(KINDS), str(sweep)
    assert {t.status for t in sweep.trials} == {"pass"} and max(t.ratio for t in sweep.trials) > 0


@pytest.mark.parametrize("name", ["diff", "rope", "var", "dropout", "fai", "sinklogit", "entropy", "halo"])
def test_texts_whose_kernels_have_gone_wrong_before(name: str) -> None:
    for kind in ("large", "above", "keyless") if NIGHTLY else ("large",):
        for trial in trials_of(name, kind, ("bfloat16", "float32"), 0):
            assert trial.status in ("pass", "skip"), trial


def test_extents_lie_around_the_tiles_of_the_kernel() -> None:
    cascade = gallery.load("softmax_attention")
    below, above = (whole._extents(cascade, "softmax_attention", kind, "bfloat16") for kind in ("below", "above"))
    assert below is not None and above is not None
    assert {above[r] - below[r] for r in ("P", "M")} == {2} and below["M"] % 16 == 15


@pytest.mark.parametrize("name", ["softmax_attention", "sliding_window", "gatv2", "entropy", "linear", "sigmoid"])
def test_a_third_of_the_rows_or_all_lose_their_keys(name: str) -> None:
    cascade = without_keys(gallery.load(name))
    assert cascade is not None
    rng = np.random.default_rng(0)
    inputs = {i.tensor: rng.uniform(0.5, 1.5, [4] * len(i.indices)) for i in cascade.inputs}
    out = next(iter(run(cascade, inputs).values()))
    assert (out == 0).any() or np.isinf(out).any()


def test_inputs_may_be_slices_of_larger_tensors() -> None:
    t = torch.arange(24.0).reshape(2, 3, 4)
    s = whole._sliced(t)
    assert torch.equal(s, t) and not s.is_contiguous() and s.storage_offset() > 0 and s.stride(-1) != 1


def test_a_text_that_cannot_be_run_is_an_error_of_its_own() -> None:
    (trial,) = trials_of("moba", "primes", ("float32",), 0)
    assert trial.status == "ERROR" and "not-lowered-yet" in trial.note


def test_an_interruption_keeps_what_is_known() -> None:
    def stop(made: int, planned: int, trial: Trial) -> None:
        raise KeyboardInterrupt

    sweep = verify_gallery(["relu", "sigmoid"], kinds=("ones",), dtypes=("float32",), jobs=1, progress=stop)
    assert len(sweep.trials) == 1 and sweep.planned == 2
    assert not sweep.passed and "INTERRUPTED after 1 of 2" in str(sweep)


def test_the_table_names_what_failed() -> None:
    text = str(Sweep(trials=(FAILED, PASSED), planned=2))
    assert "gqa" in text and "0.25" in text and "FAIL  gqa ones float16: AV is off" in text and text.endswith("FAIL")
    assert str(Sweep(trials=(PASSED,), planned=1)).endswith("PASS")


@pytest.mark.parametrize(("trials", "status"), [((PASSED,), 0), ((FAILED, PASSED), 1), ((), 1)])
def test_the_command_ends_with_the_verdict(
    trials: tuple[Trial, ...], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(**given: Any) -> Sweep:
        assert given["jobs"] == 3 and given["dtypes"] == ("bfloat16",)
        return Sweep(trials=trials, planned=max(len(trials), 1))

    monkeypatch.setattr(whole, "verify_gallery", made)
    done = CliRunner().invoke(app, ["verify", "--all", "--jobs", "3", "--dtype", "bfloat16", "--json"])
    assert done.exit_code == status
    assert [t["status"] for t in json.loads(done.stdout)["trials"]] == [t.status for t in trials]


@pytest.mark.parametrize(
    "arguments", [[], ["gqa", "--all"], ["--all", "--extents", "P=3"], ["--all", "--const", "w=2"]]
)
def test_a_spec_or_all_but_not_both(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["verify", *arguments])
    assert done.exit_code == 2 and "[option-all]" in done.stderr
