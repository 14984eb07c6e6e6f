"""One schedule serves all the kernels of an op: forward, the forward that saves, and backward."""

from __future__ import annotations

import pytest
import torch

import einsumcascade as ec
from einsumcascade.errors import InputError, ScheduleError
from einsumcascade.language.parser import parse
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.calls import qkv

FORWARD = KernelSchedule(tiles={"p": 64, "m": 32}, warps=2)
BACKWARD = KernelSchedule(tiles={"m": 32, "p": 64}, warps=8, stages=1)
SCHEDULE = Schedule(kernels={"softmax_attention": FORWARD, "softmax_attention_backward_1": BACKWARD})


def step(schedule: Schedule) -> ec.codegen.op.Op:  # type: ignore[name-defined]
    """An op that has made a step of training."""
    op = ec.compile("softmax_attention", schedule=schedule)
    op(*(t.requires_grad_() for t in qkv(9, 7, e=16, f=16))).sum().backward()  # type: ignore[union-attr]
    return op


def test_a_schedule_reaches_forward_and_backward() -> None:
    op = ec.compile("softmax_attention", schedule=SCHEDULE)
    assert op.kernel().schedule.kernels == {"softmax_attention": FORWARD}
    kernels = op.kernel(gradient=True).schedule.kernels
    assert [k == BACKWARD for k in kernels.values()] == [False, True, False]
    op = step(SCHEDULE)
    (pair,) = op._pairs.values()
    assert pair.backward.last is not None
    assert pair.backward.last().schedule.kernels["softmax_attention_backward_1"] == BACKWARD
    # What is chosen for the plain kernel serves the one that saves, unless it has a choice of its own.
    assert op.schedule.kernels == {"softmax_attention_forward": FORWARD}
    own = Schedule(kernels={**SCHEDULE.kernels, "softmax_attention_forward": KernelSchedule(tiles=FORWARD.tiles)})
    assert step(own).schedule.kernels["softmax_attention_forward"].warps == 4


def test_an_exported_file_has_the_choices_of_all_kernels() -> None:
    text = ec.compile("softmax_attention", schedule=SCHEDULE).export()
    assert f"# softmax_attention_forward: {FORWARD}" in text
    assert f"# softmax_attention_backward_1: {BACKWARD}" in text


@pytest.mark.parametrize("name", ["softmax_attention_backward_7", "softmaxattention", "softmax_attention_backwards"])
def test_a_kernel_that_is_not_there_is_refused_in_training_too(name: str) -> None:
    with pytest.raises(ScheduleError, match=f"there is no kernel '{name}'") as caught:
        step(Schedule(kernels={name: FORWARD}))
    assert caught.value.codes == ("schedule-illegal",)


def test_a_tile_that_is_not_there_is_refused_in_training_too() -> None:
    with pytest.raises(ScheduleError, match="kernel 'softmax_attention_backward_1' tiles no variable 'e'"):
        step(Schedule(kernels={"softmax_attention_backward_1": KernelSchedule(tiles={"m": 16, "p": 16, "e": 16})}))


def test_a_split_forward_that_saves_gives_the_same_gradients() -> None:
    inputs = [t.requires_grad_() for t in qkv(dtype=torch.float64)]
    plain, split = (
        torch.autograd.grad(ec.compile("softmax_attention", schedule=s)(*inputs).square().sum(), inputs)
        for s in (None, Schedule(split={"m": 4}))
    )
    torch.testing.assert_close(plain, split, rtol=1e-12, atol=1e-12)


def test_kernels_of_a_gradient_that_there_is_none_of_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        ec.compile(parse("in X[m], N[m]\nY[m] = select(X[m] > N[m], 1, 0)\nout Y")).kernel(gradient=True)
    assert caught.value.codes == ("no-gradient",)
