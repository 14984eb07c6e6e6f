"""Sums accumulated in a kernel of other ranks: five products instead of seven in the gradient of softmax attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given

import einsumcascade as ec
from einsumcascade.analysis.passes import count_passes
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.kernel import Kernel
from einsumcascade.codegen.kernel_ir import Dot, Loop, Stmt, all_statements
from einsumcascade.codegen.op import Op
from einsumcascade.codegen.programs import program_of
from einsumcascade.errors import LoweringError, ScheduleError
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.differentiate import differentiable, differentiate
from einsumcascade.schedules.cost import cost
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from einsumcascade.verify.gradients import backward_inputs, judged_gradient
from tests.codegen.calls import VARIANTS, variant_inputs
from tests.codegen.test_hot_loop import assert_it_fits
from tests.nightly import NIGHTLY
from tests.schedules.test_program import by_kernels
from tests.strategies import Case, cases, examples

ACCUMULATED = Schedule(sums="accumulated")
# Every form once: heads in groups, a gradient of a slope, of a table, of two softmaxes, of sums in two kernels.
SOME = ("softmax_attention", "causal softmax_attention", "gqa", "alibi", "diff", "t5bias", "axial", "entropy")


def cascade_of(name: str) -> Cascade:
    cascade = load(name.removeprefix("causal "))
    return cascade.constrain("m <= p") if name.startswith("causal ") else cascade


def gradient(name: str, schedule: Schedule | None = None, **options: object) -> Kernel:
    return ec.compile(cascade_of(name)).kernel(gradient=True, schedule=schedule, **options)  # type: ignore[arg-type]


def joined(program: Program) -> list[str]:
    return [k.name for k in program.kernels if k.scattered]


def products(kernel: Kernel) -> list[int]:
    """Products of tiles in a step of each kernel's loops, those left out that only repeat another."""
    out = []
    for tree in kernel.built.kernels:
        loops = [s for s in all_statements(tree.body) if isinstance(s, Loop)]
        bodies: list[tuple[Stmt, ...]] = [s.segments[-1].body for s in loops]
        bodies = [b for b in bodies if not any(isinstance(s, Loop) for s in b)]
        out += [sum(isinstance(s, Dot) for s in body) for body in bodies]
    return out


@pytest.mark.parametrize("name", ["softmax_attention", "causal softmax_attention", "gqa", "alibi", "varlen"])
def test_a_gradient_of_softmax_has_seven_products_apart_and_five_accumulated(name: str) -> None:
    apart = products(gradient(name))
    # Apart, the gradient of a slope computes scores once more, row by row.
    assert [n for n in apart if n] == [4, 3]
    assert products(gradient(name, ACCUMULATED)) == [5]


def test_the_cost_model_counts_five_products_for_seven() -> None:
    extents = {"B": 1, "H": 2, "P": 512, "M": 512, "E": 64, "F": 64}
    found = []
    for schedule in (None, ACCUMULATED):
        kernel = gradient("causal softmax_attention", schedule, target="cuda:90")
        target = gpu_target("cuda:90")
        costs = cost(kernel.program, kernel.schedule, extents=extents, dtype="bfloat16", target=target).kernels
        found.append(sum(k.operations["contraction"] for k in costs))
    assert found[0] * 5 == found[1] * 7


@pytest.mark.parametrize("schedule", [None, ACCUMULATED])
@pytest.mark.parametrize("name", ["softmax_attention", "causal softmax_attention", "gqa"])
def test_every_kernel_of_a_gradient_is_one_pass(name: str, schedule: Schedule | None) -> None:
    for k in gradient(name, schedule).program.kernels:
        for v in k.loops:
            assert count_passes(k.cascade, rank=rank_of(v)).passes == 1, k.name


@pytest.mark.parametrize("name", ["softmax_attention", "alibi", "axial"])
def test_the_kernels_of_a_program_compute_the_gradient_in_the_reference(name: str) -> None:
    found = differentiate(load(name))
    inputs = backward_inputs(found, variant_inputs(name, "float64"), "float64")
    arrays = {n: t.numpy() for n, t in inputs.items()}
    known = by_kernels(program_of(found.backward, {}, ACCUMULATED), arrays)
    for n, value in run(found.backward, arrays).items():
        np.testing.assert_allclose(known[n], value, rtol=1e-9, atol=1e-9)


def test_what_waits_for_a_sum_of_its_own_kernel_stays_apart() -> None:
    # DK of an entropy needs a sum over m that the kernel of DQ has only when its loop has ended.
    program = gradient("entropy", ACCUMULATED).program
    assert joined(program) == [] and len(program.kernels) == 2


@pytest.mark.parametrize("name", [*SOME, *(n for n in VARIANTS if NIGHTLY and n not in SOME)])
def test_accumulated_gradients_are_within_the_error_rule(name: str) -> None:
    cascade = cascade_of(name)
    inputs = variant_inputs(name.removeprefix("causal "), "float32")
    found = judged_gradient(cascade, inputs, "float32", seed=0, schedule=ACCUMULATED)
    if isinstance(found, str):
        pytest.skip(found)
    assert [str(row.verdict) for row in found if not row.verdict.passed] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_accumulated_gradients_of_halves_are_within_the_error_rule(dtype: str) -> None:
    inputs = variant_inputs("gqa", dtype)
    # Descriptors are for a GPU; the interpreter adds by pointers.
    for schedule in (ACCUMULATED, DESCRIBED):
        found = judged_gradient(load("gqa"), inputs, dtype, seed=0, schedule=schedule)
        assert not isinstance(found, str)
        assert [str(row.verdict) for row in found if not row.verdict.passed] == []


DESCRIBED = Schedule(
    kernels={"gqa_backward_1": KernelSchedule(tiles={"m": 16, "p": 16}, descriptors=True)}, sums="accumulated"
)


def test_boxes_are_added_by_descriptors_where_these_are_chosen() -> None:
    name = "softmax_attention"
    described = replace(DESCRIBED, kernels={f"{name}_backward_1": k for k in DESCRIBED.kernels.values()})
    text = gradient(name, described).source
    assert "d_DQN.atomic_add([" in text and "tl.atomic_add(" not in text
    text = gradient(name, ACCUMULATED).source
    assert "tl.atomic_add(p_DQN + o_DQN, b_DQN, " in text and "descriptor" not in text


@pytest.mark.parametrize("name", ["softmax_attention", "alibi", "t5bias", "persistent"])
def test_a_cpu_computes_the_same_gradients(name: str) -> None:
    def gradients(op: Op) -> list[torch.Tensor]:
        inputs = [t.requires_grad_() for t in variant_inputs(name, "float64").values()]
        found = torch.autograd.grad(op(*inputs).square().sum(), inputs)  # type: ignore[union-attr]
        return list(found)

    apart, together = (gradients(ec.compile(name, schedule=s)) for s in (None, ACCUMULATED))
    torch.testing.assert_close(apart, together, rtol=1e-10, atol=1e-10)


def test_sums_that_are_accumulated_have_no_fixed_order() -> None:
    both = Schedule(sums="accumulated", scatter="fixed order")
    with pytest.raises(ScheduleError, match="sums that are accumulated have no fixed order") as caught:
        gradient("softmax_attention", both)
    assert caught.value.codes == ("schedule-illegal",)


def test_deterministic_algorithms_keep_sums_apart() -> None:
    named = Schedule(
        kernels={"softmax_attention_backward_1": KernelSchedule(tiles={"m": 32, "p": 32}, warps=2)}, sums="accumulated"
    )
    op = ec.compile("softmax_attention", schedule=named)
    inputs = [t.requires_grad_() for t in variant_inputs("softmax_attention", "float32").values()]

    def text() -> str:
        op(*inputs).sum().backward()  # type: ignore[union-attr]
        (pair,) = op._pairs.values()
        assert pair.backward.last is not None
        built = pair.backward.last()
        assert built.schedule.kernels["softmax_attention_backward_1"].warps == 2
        return built.source

    assert "tl.atomic_add" in text()
    torch.use_deterministic_algorithms(True)
    try:
        assert "atomic" not in text()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", ["softmax_attention", "causal softmax_attention", "gqa"])
def test_the_accumulated_gradient_is_five_products_on_tensor_cores(name: str, size: int) -> None:
    kernel = gradient(name, ACCUMULATED, extents={"E": size, "F": size}, dtype="bfloat16", target="cuda:90")
    inspection = kernel.inspect()
    assert_it_fits(inspection)
    (name,) = joined(kernel.program)
    tiles = kernel.schedule.kernels[name].tiles
    hot = inspection.kernels[f"{name}_kernel"].hot_loop
    assert hot is not None
    # Two products contract a head, two a tile of p, one a tile of m; one instruction contracts 16.
    assert hot.opcodes["HGMMA"] >= (2 * size + 2 * tiles["p"] + tiles["m"]) // 16 and "HMMA" not in hot.opcodes
    # Four elements are added at once.
    assert hot.opcodes["REDG"] * 4 * 256 == tiles["p"] * size


@pytest.mark.parametrize("name", [n for n in VARIANTS if NIGHTLY])
def test_every_variant_takes_accumulated_sums_or_none(name: str) -> None:
    cascade = load(name)
    try:
        backward = differentiate(cascade).backward if differentiable(cascade) else None
        if backward is not None:
            program_of(backward, {})
    except LoweringError:
        # No kernels in the other form either.
        backward = None
    if backward is not None:
        program_of(backward, {}, ACCUMULATED)


@examples(12)
@given(cases())
def test_gradients_of_random_cascades_may_be_accumulated(case: Case) -> None:
    backward = differentiate(case.cascade).backward
    assume(joined(program_of(backward, {}, ACCUMULATED)))
    inputs = {n: torch.tensor(x, dtype=torch.float32) for n, x in case.inputs().items()}
    found = judged_gradient(case.cascade, inputs, "float32", seed=0, schedule=ACCUMULATED)
    assert not isinstance(found, str)
    assert [str(row.verdict) for row in found if not row.verdict.passed] == [], case.text
