"""Tuning on a device that interprets: candidates that crash, hang or err lose themselves, and nothing wrong is kept."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.launch import Built, build
from einsumcascade.codegen.programs import program_of
from einsumcascade.codegen.runner import Runner, tuned_schedule
from einsumcascade.codegen.workers import Worker, WorkError
from einsumcascade.errors import EinsumCascadeWarning, InputError
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.schedules.autotune import Failure, Tuning
from einsumcascade.schedules.autotune import tune as search
from einsumcascade.schedules.cache import entries
from einsumcascade.schedules.calls import Form
from einsumcascade.schedules.ranking import Ranked
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from einsumcascade.verify import measuring
from einsumcascade.verify.measuring import Job, Processes, laid
from einsumcascade.verify.samples import cut_down
from einsumcascade.verify.tune import tune
from einsumcascade.verify.verify import random_inputs
from tests.verify.interpreting import NAME, SMALL, interpreted, spoiled

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("folder")


def test_each_bad_candidate_loses_itself_and_the_good_ones_are_timed() -> None:
    cascade = load("softmax_attention")
    binding = bind(cascade, extents={**SMALL, "E": 128, "F": 128})
    inputs = random_inputs(cascade, binding, "bfloat16")
    # Scores of hundreds, under which a lost correction shows.
    inputs["Q"] = inputs["Q"] * 50
    faults = ["", "crash the compiler", "hang the compiler", "wrong numbers", "crash", "hang", "shared memory", ""]

    def schedule(n: int) -> Schedule:
        is_large = faults[n] == "shared memory"
        tiles = {"p": 16, "m": 256} if is_large else {"p": 16 << n % 4, "m": 16 << n // 4}
        kernel = KernelSchedule(tiles=tiles, warps=4, stages=4 if is_large else 2)
        return Schedule(kernels={"softmax_attention": kernel})

    how = {schedule(n).to_json(): f for n, f in enumerate(faults)}

    def text(s: Schedule) -> Built:
        extents = {"E": 128, "F": 128}
        made = build(cascade, extents=extents, dtype="bfloat16", target=gpu_target("cuda:90"), schedule=s)
        return spoiled(made, how[s.to_json()])

    job = Job(cascade=cascade, dtype="bfloat16", seed=0, inputs=inputs, small=inputs, device="cpu")
    device = Processes(
        job=job, build=text, target=gpu_target("cuda:90"), name=NAME, jobs=2, compile_s=20.0, compare_s=15.0
    )
    with device:
        trials, cut_by = search([Ranked(schedule=schedule(n), seconds=1.0) for n in range(8)], device, budget_s=150.0)
    assert not cut_by
    whys = [t.why for t in trials]
    assert whys[0] == whys[7] == ""
    assert whys[1] == "compiling: the process ended by SIGSEGV"
    assert whys[2] == "compiling: took longer than 20 s"
    assert whys[3].startswith("wrong: AV ")
    assert whys[4].startswith("comparing: the interpreter ended with status -11")
    assert whys[5] == "comparing: took longer than 15 s"
    assert "bytes of shared memory, cuda:90 has 232448" in whys[6]
    assert [n for n, t in enumerate(trials) if t.seconds is not None] == [0, 7]
    assert [n for n, t in enumerate(trials) if t.is_right] == [0, 7]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuning, Path]:
    """A tuning, and the folder it was kept in."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setenv("EINSUMCASCADE_CACHE", str(place))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return tune("softmax_attention", extents=SMALL, candidates=2, device=interpreted), place / "tuned"


@pytest.fixture
def kept(once: tuple[Tuning, Path], folder: Path) -> Tuning:
    """A tuning, kept in a folder of this test's own."""
    shutil.copytree(once[1], folder)
    return once[0]


def test_a_tuning_is_kept_and_found_by_calls_of_such_extents(kept: Tuning) -> None:
    cascade, found = load("softmax_attention"), kept
    assert found.best is not None and found.device == NAME and len(found.timed) == 2
    (entry,) = entries()
    assert entry.schedule == found.best.schedule and entry.record["trials"][0]["measured_s"] > 0

    def of_call(source: Any, alike: Any = None, **extents: int) -> Schedule | None:
        return tuned_schedule(
            source,
            binding=bind(source, extents={**SMALL, **extents}),
            dtype="bfloat16",
            precision="ieee",
            ordered=False,
            device=NAME,
            alike=alike,
        )

    assert of_call(cascade) == of_call(cascade, P=60) == found.best.schedule
    assert of_call(cascade, E=32) is None
    # The forward that saves for the gradient has the same kernels, under another name.
    forward = differentiate(cascade).forward
    assert of_call(forward) is None
    saved = of_call(forward, alike=cascade)
    assert saved is not None
    assert list(saved.kernels.values()) == list(found.best.schedule.kernels.values())
    assert list(saved.kernels) == [k.name for k in program_of(forward, SMALL, saved).kernels]


def test_a_kept_schedule_that_fits_no_more_is_passed_over_with_a_warning(kept: Tuning, folder: Path) -> None:
    cascade = load("softmax_attention")
    (path,) = folder.iterdir()
    value = json.loads(path.read_text(encoding="utf-8"))
    value["schedule"]["kernels"]["softmax_attention"]["stages"] = 99
    path.write_text(json.dumps(value), encoding="utf-8")
    options: dict[str, Any] = {"dtype": "bfloat16", "precision": "ieee", "ordered": False, "device": NAME}
    with pytest.warns(EinsumCascadeWarning, match=r"\[tuned-schedule\] .* does not fit softmax_attention any more"):
        assert tuned_schedule(cascade, binding=bind(cascade, extents=SMALL), **options) is None


def test_a_kept_schedule_that_no_kernel_can_be_built_with_is_passed_over_with_a_warning() -> None:
    cascade, target = load("softmax_attention"), gpu_target("cuda:90")
    features = {"E": 16, "F": 16}
    # Underflow in float16 is seen when the text is made, not by what checks a schedule.
    bad = Schedule(reference="bound")
    with pytest.warns(EinsumCascadeWarning, match=r"\[tuned-schedule\] .* does not fit softmax_attention any more"):
        found = Runner(cascade=cascade)._built_for(target, "float16", features, "ieee", bad, Form())
    assert found.source == build(cascade, extents=features, dtype="float16", target=target).source


def test_without_a_gpu_nothing_is_timed_and_nothing_is_kept(folder: Path) -> None:
    found = tune("softmax_attention", extents={**SMALL, "P": 4096, "M": 4096}, candidates=1, target="cuda:90")
    assert found.device == "" and found.best is None
    assert all(t.compiled is not None and t.compiled.registers > 0 for t in found.trials)
    assert not folder.exists()


def test_an_interruption_keeps_what_is_known() -> None:
    def interrupt(stage: str, done: int, planned: int, best: object) -> None:
        if stage == "timing, round 1":
            raise KeyboardInterrupt

    found = tune("softmax_attention", extents=SMALL, candidates=2, device=interpreted, progress=interrupt)
    assert found.was_cut and found.best is not None and found.best.is_right
    (entry,) = entries()
    assert entry.schedule == found.best.schedule and entry.record["was_cut"] is True


def test_what_ended_early_takes_no_place_from_what_was_searched_to_the_end(kept: Tuning) -> None:
    def interrupt(stage: str, done: int, planned: int, best: object) -> None:
        if stage == "timing, round 1":
            raise KeyboardInterrupt

    (before,) = entries()
    found = tune("softmax_attention", extents=SMALL, candidates=2, device=interpreted, progress=interrupt)
    assert found.best is not None and entries() == (before,)
    assert tune("softmax_attention", extents=SMALL, candidates=1, device=interpreted).best is not None
    assert entries() != (before,)


def test_texts_that_take_long_to_make_take_no_more_than_their_time() -> None:
    cascade = load("softmax_attention")
    inputs = random_inputs(cascade, bind(cascade, extents=SMALL), "bfloat16")
    made: list[Schedule] = []

    def slow(s: Schedule) -> Built:
        made.append(s)
        time.sleep(1.0)
        if len(made) == 1:
            raise ValueError("no text")
        return build(cascade, extents=SMALL, dtype="bfloat16", target=gpu_target("cuda:90"))

    job = Job(cascade=cascade, dtype="bfloat16", seed=0, inputs=inputs, small={})
    many = [Schedule(split={"m": n + 2}) for n in range(40)]
    begun = time.monotonic()
    with Processes(job=job, build=slow, target=gpu_target("cuda:90"), name="", jobs=2) as device:
        found = dict(device.compile(many, deadline=begun + 3.0))
    assert time.monotonic() - begun < 20 and len(made) < 10
    assert sorted(found) == list(range(40))
    assert found[0] == Failure("ValueError: no text")
    assert all(found[n] == Failure("there was no time left", is_late=True) for n in range(len(made), 40))


def test_the_process_that_runs_candidates_may_die_before_the_first() -> None:
    class Killed(Processes):
        def compile(self, *arguments: Any, **options: Any) -> Any:
            yield from super().compile(*arguments, **options)
            assert self._runner.process is not None
            self._runner.process.kill()
            self._runner.process.wait()

    def killed(job: Job, text: Any, target: Any, jobs: int) -> Killed:
        return Killed(job=replace(job, device="cpu"), build=text, target=target, name=NAME, jobs=1)

    found = tune("softmax_attention", extents=SMALL, candidates=1, device=killed, keep=False)
    assert found.best is not None and not found.default.why


def faulty() -> None:
    """Time a candidate on a GPU that has had a fault."""

    def fault(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    job = SimpleNamespace(device="cuda:0")
    with (
        patch.object(measuring, "_job", lambda file: job),
        patch.object(measuring, "_bench", fault),
        patch.object(torch.cuda, "synchronize", fault),
    ):
        measuring.timed(0, None, 5)  # type: ignore[arg-type]


def refused() -> None:
    """Time a candidate that a GPU refuses to run, and that leaves it as it was."""

    def refuse(file: int) -> None:
        raise RuntimeError("out of resource: shared memory")

    job = SimpleNamespace(device="cuda:0")
    with (
        patch.object(measuring, "_job", lambda file: job),
        patch.object(measuring, "_bench", refuse),
        patch.object(torch.cuda, "synchronize", lambda device: None),
    ):
        measuring.timed(0, None, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("faulty", "the process ended with status 1: CUDA error: an illegal memory access was encountered"),
        ("refused", "out of resource: shared memory"),
    ],
)
def test_a_process_whose_gpu_has_had_a_fault_serves_no_other_candidate(
    how: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    worker = Worker()
    with pytest.raises(WorkError) as caught:
        worker.ask(f"tests.verify.test_tune:{how}", timeout_s=60)
    assert str(caught.value) == why
    assert worker.is_alive == (how == "refused")
    worker.close()


@pytest.mark.parametrize(("takes_s", "calls"), [(0.0, 10), (0.2, 4)])
def test_calls_that_take_long_are_made_fewer_times(takes_s: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    def call(given: object) -> None:
        made.append(time.perf_counter())
        time.sleep(takes_s)

    monkeypatch.setattr(measuring, "launcher", lambda built, inputs, binding: call)
    monkeypatch.setattr(measuring, "MEASURED_S", 1.0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flushed = torch.zeros(8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: flushed)
        bench: Any = SimpleNamespace(inputs={}, binding=None)
        seconds = measuring._median(bench, None, 10)  # type: ignore[arg-type]
    assert seconds >= takes_s and len(made) == 2 + calls


def test_a_tuner_that_is_killed_leaves_nothing_wrong_and_the_next_one_works(folder: Path) -> None:
    script = (
        "from tests.verify.interpreting import SMALL, interpreted\nfrom einsumcascade.verify.tune import tune\n"
        "tune('softmax_attention', extents=SMALL, candidates=1, device=interpreted,\n"
        "     progress=lambda stage, *_: print(stage, flush=True))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("comparing"):
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    assert entries() == () and not list(folder.glob("*"))
    assert tune("softmax_attention", extents=SMALL, candidates=1, device=interpreted).best is not None
    assert len(entries()) == 1


def test_an_op_is_tuned_on_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    import einsumcascade.verify.tune as module

    monkeypatch.setattr(module, "_real", interpreted)
    monkeypatch.setattr(module, "_device_of", lambda inputs: "cpu")
    monkeypatch.setattr(module, "target_of", lambda device: gpu_target("cuda:90"))
    op = ec.compile("softmax_attention")
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (37, 50, 50))
    op(q, k, v)
    found = op.tune(q, k, v, candidates=1)
    assert found.extents == SMALL and len(found.timed) == 1
    assert not op._runner.calls
    with pytest.raises(InputError, match="extent-mismatch"):
        op.tune(q, k, v[:, :, :40])


def test_inputs_that_find_no_room_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pickle, "dump", full)
    with pytest.raises(InputError) as caught:
        tune("softmax_attention", extents=SMALL, candidates=1, device=interpreted)
    assert caught.value.codes == ("tuning-inputs",) and "No space left on device" in str(caught.value)


def test_extents_that_no_memory_holds_are_one_message() -> None:
    with pytest.raises(InputError) as caught:
        tune("softmax_attention", extents={"P": 10**17, "M": 10**17}, candidates=1)
    assert caught.value.codes == ("tuning-inputs",) and "cannot be made" in str(caught.value)


def test_inputs_that_a_call_refuses_are_refused() -> None:
    q = torch.ones(1, 2, 8, 16, dtype=torch.bfloat16)
    good = {"Q": q, "K": q, "V": q}
    for inputs, code in (
        ({**good, "K": q.half()}, "wrong-dtype"),
        ({**good, "K": 3}, "wrong-type"),
        ({"Q": q, "K": q}, "missing-input"),
        ({**good, "MASK": q}, "unknown-input"),
        ({**good, "V": q[:, :, :4]}, "extent-mismatch"),
    ):
        with pytest.raises(InputError) as caught:
            tune("softmax_attention", inputs=inputs)  # type: ignore[arg-type]
        assert caught.value.codes == (code,)
    with pytest.raises(InputError, match="extent-mismatch"):
        tune("softmax_attention", inputs=good, extents={"P": 9})


@pytest.mark.parametrize(
    "options", [{"candidates": 0}, {"budget_s": 0.0}, {"budget_s": float("nan")}, {"jobs": 0}, {"dtype": "float8"}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        tune("softmax_attention", extents=SMALL, **options)
    assert caught.value.codes in {("option-budget",), ("wrong-dtype",)}


def test_tensors_that_no_kernel_takes_are_refused() -> None:
    q = torch.ones(1, 2, 8, 16, dtype=torch.float64)
    with pytest.raises(InputError, match="kernels take no inputs of 'float64'"):
        ec.compile("softmax_attention").tune(q, q, q)


# --- what candidates are compared on ----------------------------------------------------------------------------------


def small_of(name: str, **extents: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what the reference gets."""
    cascade = load(name)
    binding = bind(cascade, extents=extents)
    whole = random_inputs(cascade, binding, "bfloat16")
    return {n: tuple(t.shape) for n, t in cut_down(cascade, whole, binding).items()}


def test_the_reference_gets_few_heads_and_lengths_that_end_in_part_of_a_tile() -> None:
    shapes = small_of("softmax_attention", B=3, H=5, P=2048, M=2048, E=16, F=16)
    assert shapes["K"] == shapes["V"] == shapes["Q"] == (2, 2, 765, 16)


def test_a_window_is_narrower_than_what_it_slides_over() -> None:
    (_, _, length, _) = small_of("sliding_window", B=2, H=2, P=4096, M=4096, E=16, F=16)["K"]
    constants = bind(load("sliding_window"), extents={"B": 1, "H": 1, "P": 8, "M": 8, "E": 4, "F": 4}).constants
    assert length > max(constants.values())


def test_small_inputs_are_taken_as_they_are() -> None:
    assert small_of("softmax_attention", **SMALL)["Q"] == (1, 2, 37, 16)


@pytest.mark.parametrize("kind", ["plain", "transposed", "columns", "gaps", "repeats", "empty", "number"])
def test_a_tensor_is_copied_with_its_strides(kind: str) -> None:
    base = torch.arange(2 * 6 * 5 * 4, dtype=torch.float32).view(2, 6, 5, 4)
    t = {
        "plain": base,
        "transposed": base.transpose(1, 2),
        "columns": base.mT,
        "gaps": base[:, 1::2, :3, 1:],
        "repeats": base[:1, :, :1].expand(2, 6, 5, 4),
        "empty": base[:, :0],
        "number": base[0, 0, 0, 0],
    }[kind]
    copy = laid(t, "cpu")
    assert torch.equal(copy, t) and copy.stride() == t.stride()
    assert copy.data_ptr() != t.data_ptr() or not t.numel()
    assert copy.untyped_storage().nbytes() <= base.untyped_storage().nbytes()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["softmax_attention", "alibi", "sigmoid", "diff"])
def test_the_gpu_times_what_is_right_and_calls_use_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    extents = {"B": 2, "H": 8, "P": 2048, "M": 2048, "E": 64, "F": 64}
    cascade = load(name)
    named = {v.upper() for i in cascade.inputs for v in i.indices}
    begun = time.monotonic()
    found = tune(cascade, extents={r: n for r, n in extents.items() if r in named}, candidates=12, keep=False)
    assert time.monotonic() - begun < 100
    assert found.best is not None and found.default.seconds is not None and found.best.seconds is not None
    assert found.best.seconds <= 1.05 * found.default.seconds
    assert len(found.timed) >= 10 and found.correlation is not None
