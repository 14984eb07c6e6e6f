"""Tuning a gradient: the forward that saves and the backward, each compared, kept, and found by calls that record."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.autograd import Pair
from einsumcascade.codegen.launch import Built
from einsumcascade.codegen.programs import program_of
from einsumcascade.codegen.runner import Runner
from einsumcascade.errors import InputError, LoweringError
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.parser import parse
from einsumcascade.schedules.autotune import GradientTuning
from einsumcascade.schedules.cache import entries
from einsumcascade.schedules.schedule import SUMS, KernelSchedule, Schedule, tiled_variables
from einsumcascade.verify.measuring import Job, Processes
from einsumcascade.verify.tune import of_op, tune
from tests.verify.interpreting import NAME, SMALL, interpreted, spoiled

CANDIDATES = 6
WRT = ("Q", "K", "V")
pytestmark = pytest.mark.usefixtures("folder")


def fault(n: int, schedule: Schedule) -> str:
    """What is wrong with the backward's candidate of number `n`; the first is the default."""
    if n == 1:
        return "crash the compiler"
    # The interpreter runs a text of its own where a kernel adds by descriptors.
    return "wrong numbers" if n and not any(k.descriptors for k in schedule.kernels.values()) else ""


def faulty_backward(job: Job, text: Callable[[Schedule], Built], target: Any, jobs: int) -> Processes:
    """A device on which candidates of the backward go wrong."""
    number = count()

    def bad(schedule: Schedule) -> Built:
        return spoiled(text(schedule), fault(next(number), schedule), terms=("(-b_DLSEN",), instead="(b_DLSEN")

    return interpreted(job, bad if job.saving is not None else text, target, jobs)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[GradientTuning, Path]:
    """A tuning, and the folder it was kept in."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setenv("EINSUMCASCADE_CACHE", str(place))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        options: dict[str, Any] = {"extents": SMALL, "candidates": CANDIDATES, "device": faulty_backward}
        return tune("softmax_attention", gradient=True, **options), place / "tuned"


@pytest.fixture
def kept(once: tuple[GradientTuning, Path], folder: Path) -> GradientTuning:
    """A tuning, kept in a folder of this test's own."""
    shutil.copytree(once[1], folder)
    return once[0]


def test_what_is_wrong_in_the_backward_loses_itself(kept: GradientTuning) -> None:
    assert kept.backward is not None and kept.device == NAME and not kept.was_cut
    assert all(t.is_right for t in kept.forward.trials)
    trials = kept.backward.trials
    faults = [fault(n, t.schedule) for n, t in enumerate(trials)]
    assert set(faults) == {"", "crash the compiler", "wrong numbers"}
    whys = {"": "", "crash the compiler": "compiling: the process ended by SIGSEGV"}
    for f, t in zip(faults, trials, strict=True):
        assert t.why == whys[f] if f in whys else t.why.startswith("wrong: D")
        assert (t.seconds is None) == bool(f)
    assert {t.schedule.sums for t in trials} == {"apart", "accumulated"}


def test_calls_that_record_find_both_parts(kept: GradientTuning, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept.backward is not None and kept.backward.best is not None and kept.forward.best is not None
    assert [e.name for e in entries()] == ["softmax_attention_backward", "softmax_attention_forward"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)

    def of_call(runner: Runner, **extents: int) -> Schedule | None:
        binding = bind(runner.cascade, extents={**SMALL, **extents})
        return runner._tuned(torch.device("cuda:0"), "bfloat16", binding, "ieee")

    pair = Pair.of(load("softmax_attention"), WRT, None)
    assert of_call(pair.forward) == of_call(pair.forward, P=60) == kept.forward.best.schedule
    assert of_call(pair.backward) == of_call(pair.backward, M=64) == kept.backward.best.schedule
    assert of_call(pair.backward, E=32) is None
    # A gradient in fewer inputs has other kernels; calls without one have theirs.
    assert of_call(Pair.of(load("softmax_attention"), WRT[:1], None).backward) is None
    assert of_call(Runner(cascade=load("softmax_attention"))) is None
    # A schedule of one's own goes before.
    assert of_call(Pair.of(load("softmax_attention"), WRT, None, kept.schedule).backward) is None


def test_both_parts_are_one_schedule_that_an_op_takes(kept: GradientTuning) -> None:
    assert kept.backward is not None
    assert Schedule.from_json(kept.schedule.to_json()) == kept.schedule
    assert kept.schedule.kernels == {**kept.forward.schedule.kernels, **kept.backward.schedule.kernels}
    op = ec.compile("softmax_attention", schedule=kept.schedule)
    assert op.kernel(gradient=True).schedule == kept.backward.schedule
    pair = Pair.of(op.cascade, WRT, None, op.fixed_schedule)
    assert pair.forward.schedule is not None
    assert pair.forward.schedule.kernels == kept.forward.schedule.kernels
    inputs = [torch.randn(1, 2, n, 16, requires_grad=True) for n in (37, 50, 50)]
    assert len(torch.autograd.grad(op(*inputs).sum(), inputs)) == 3


def test_the_table_and_the_record_have_both(kept: GradientTuning) -> None:
    assert kept.backward is not None
    forward, backward = str(kept).split("\n\nsoftmax_attention_backward in ")
    assert forward == str(kept.forward)
    # A kernel a line, all in one column.
    columns = {line.index("softmax_attention_backward_") for line in backward.splitlines() if "_backward_" in line}
    assert len(columns) == 1
    assert kept.to_dict()["schedule"] == kept.schedule.to_dict()
    assert kept.to_dict()["backward"] == kept.backward.to_dict()


def test_a_forward_that_the_sums_of_the_backward_change_gets_the_default() -> None:
    text = "in Q[p, e], K[m, e]\nS[p, m] = Q[p, e] * K[m, e] :: sum(e)\nW[p, m] = exp(S[p, m])\n"
    cascade = parse(text + "Y[p] = W[p, m] :: sum(m)\nZ[m] = W[p, m] :: sum(p)\nout Y, Z", name="both_ways")
    pair = Pair.of(cascade, ("Q", "K"), None)
    apart, accumulated = (program_of(pair.gradient.forward, {}, Schedule(sums=s)) for s in SUMS)
    assert [k.name for k in apart.kernels] != [k.name for k in accumulated.kernels]
    for own, theirs in ((apart, SUMS[1]), (accumulated, SUMS[0])):
        kernels = {k.name: KernelSchedule(tiles=dict.fromkeys(tiled_variables(own, k.name), 16)) for k in own.kernels}
        forward = Schedule(kernels=kernels, sums=SUMS[own is accumulated])
        backward = ec.compile(cascade, schedule=Schedule(sums=theirs)).kernel(gradient=True).schedule
        op = ec.compile(cascade, schedule=of_op(pair.gradient, {}, forward, backward))
        assert op.kernel(gradient=True).schedule == backward
        q, k = (torch.randn(n, 16, requires_grad=True) for n in (37, 50))
        y, z = op(q, k)
        assert len(torch.autograd.grad(y.sum() + z.sum(), (q, k))) == 2


@pytest.mark.parametrize("program", ["forward", "backward"])
def test_an_interruption_ends_all_and_keeps_what_is_known(program: str) -> None:
    def interrupt(stage: str, done: int, planned: int, best: object) -> None:
        if stage == f"{program}: timing, round 1":
            raise KeyboardInterrupt

    options: dict[str, Any] = {"extents": SMALL, "candidates": 2, "device": interpreted, "progress": interrupt}
    found = tune("softmax_attention", gradient=True, **options)
    assert found.was_cut and found.forward.best is not None
    known = ["forward"] if program == "forward" else ["backward", "forward"]
    assert [e.name for e in entries()] == [f"softmax_attention_{p}" for p in known]
    if program == "forward":
        assert found.backward is None and found.schedule == found.forward.schedule
        assert str(found).endswith("the backward was not tuned: an interruption came first")
    else:
        assert found.backward is not None and found.backward.cut_by == "an interruption"
        assert found.backward.best is not None and found.schedule.sums == found.backward.schedule.sums


def test_an_op_is_tuned_for_the_gradient_in_what_requires_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import einsumcascade.verify.tune as module

    monkeypatch.setattr(module, "_real", interpreted)
    monkeypatch.setattr(module, "_device_of", lambda inputs: "cpu")
    monkeypatch.setattr(module, "target_of", lambda device: gpu_target("cuda:90"))
    op, other = ec.compile("softmax_attention"), ec.compile("softmax_attention")
    q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.bfloat16, requires_grad=n == 37) for n in (37, 50, 50))
    other(q, k, v).sum().backward()  # type: ignore[union-attr]
    (pair,) = other._pairs.values()
    assert pair.forward.calls and pair.backward.calls
    found = op.tune(q, k, v, gradient=True, candidates=1)
    assert found.backward is not None and found.forward.extents == found.backward.extents == SMALL
    assert not any("_backward_1" in n for n in found.backward.schedule.kernels)
    # Any such op looks again for what was tuned.
    assert not pair.forward.calls and not pair.backward.calls


def test_without_a_gpu_both_are_ranked_and_compiled(folder: Path) -> None:
    found = tune("sigmoid", gradient=True, extents={"P": 512, "M": 512}, candidates=1, target="cuda:90")
    assert found.device == "" and found.backward is not None and not found.is_fruitless
    assert all(t.compiled is not None and t.compiled.registers > 0 for p in found.tunings for t in p.trials)
    assert not folder.exists()


def test_what_has_no_gradient_is_refused_before_any_work() -> None:
    with pytest.raises(InputError) as caught:
        tune(parse("in X[m], N[m]\nY[m] = select(X[m] > N[m], 1, 0)\nout Y"), gradient=True)
    assert caught.value.codes == ("no-gradient",)
    with pytest.raises(LoweringError):
        tune("moba", gradient=True)
