"""Deterministic mode: no atomics, and the same bits in whatever order the programs of a grid run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen.interpreter import Launch, TensorRef, run_interpreted
from einsumcascade.codegen.kernel_ir import Store, all_statements
from einsumcascade.codegen.launch import Built, build
from einsumcascade.codegen.launch import run_interpreted as run_built
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.codegen.runner import present_target
from einsumcascade.errors import LoweringError
from einsumcascade.gallery import load
from einsumcascade.language.extents import Binding, bind
from einsumcascade.rewrites.differentiate import differentiable, differentiate
from einsumcascade.schedules.parts import in_fixed_order
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.verify.gradients import backward_inputs
from tests.codegen.calls import VARIANTS, inputs_of, variant_inputs
from tests.nightly import NIGHTLY

# Gradients of tables, of slopes, of inputs that several heads or loops share; then also of those that softmaxes share.
SOME = ("t5bias", "swinbias", "alibi", "gqa", "mla", "paged")
SHARED = (*SOME, "mla_absorbed", "diff", "persistent", "rabe_staats")
ORDERS = (1, 2, 3)
# An element of a table that looks for its points walks them all, slowly in an interpreter.
SMALL = {
    "t5bias": {"H": 2, "P": 9, "M": 19, "N": 32, "E": 5, "F": 3},
    "swinbias": {"W": 2, "H": 1, "Y": 2, "X": 2, "I": 2, "J": 2, "U": 3, "V": 3, "E": 5, "F": 3},
    "alibi": {"B": 2, "H": 1, "P": 17, "M": 18, "E": 5, "F": 3},
    "mla": {"H": 2, "P": 7, "M": 18, "E": 4, "C": 6, "F": 3, "R": 2},
}
PROGRAMS = """\
import triton
import triton.language as tl


@triton.jit
def f(LAST, SUM):
    tl.store(LAST, tl.program_id(0))
    tl.atomic_add(SUM, tl.program_id(0) * 1.0)
"""


def backward(name: str, schedule: Schedule | None) -> tuple[Built, dict[str, torch.Tensor], Binding]:
    """The kernels of a variant's gradient and their inputs, of small tiles so that there are many programs."""
    cascade = load(name)
    inputs = inputs_of(cascade, "float32", **SMALL[name]) if name in SMALL else variant_inputs(name, "float32")
    wrt = tuple(n for n in differentiable(cascade) if inputs[n].is_floating_point())
    if not wrt:
        pytest.skip("no gradient reaches an input")
    try:
        gradient = differentiate(cascade, wrt=wrt)
        given = backward_inputs(gradient, inputs, "float32")
        binding = bind(gradient.backward, shapes={n: tuple(t.shape) for n, t in given.items()})
        features = {r: binding.extents[r] for r in feature_ranks(gradient.backward)}
        options = {"extents": features, "dtype": "float32", "target": present_target(), "tile_limit": 16}
        return build(gradient.backward, schedule=schedule, **options), given, binding
    except LoweringError as error:
        pytest.skip(error.diagnostics[0].headline)


def test_the_interpreter_runs_programs_in_the_order_that_is_asked_for() -> None:
    tensors = {"LAST": torch.zeros(1, dtype=torch.int32), "SUM": torch.zeros(1)}
    launch = Launch(kernel="f", grid=(7, 2, 3), arguments={n: TensorRef(n) for n in tensors})
    found = [run_interpreted(PROGRAMS, [launch], tensors, shuffled=seed) for seed in (None, *range(20))]
    assert found[0]["LAST"] == 6
    assert {int(x["LAST"]) for x in found} == set(range(7))
    assert {float(x["SUM"]) for x in found} == {6.0 * 21}


@pytest.mark.parametrize("name", [*SOME, *(n for n in VARIANTS if NIGHTLY and n not in SOME)])
def test_the_order_of_programs_changes_no_bit_of_a_gradient(name: str) -> None:
    built, inputs, binding = backward(name, in_fixed_order(None))
    assert "atomic" not in built.source
    stores = [s for k in built.kernels for s in all_statements(k.body) if isinstance(s, Store)]
    assert stores and not any(s.adds for s in stores)
    first, *others = (run_built(built, inputs, binding, shuffled=seed) for seed in (None, *ORDERS))
    for other in others:
        for t, value in first.items():
            assert torch.equal(value.view(torch.int32), other[t].view(torch.int32)), t


def test_accumulated_sums_differ_in_their_last_bits() -> None:
    built, inputs, binding = backward("gqa", Schedule(sums="accumulated"))
    assert "tl.atomic_add" in built.source
    first, *others = (run_built(built, inputs, binding, shuffled=seed) for seed in (None, *ORDERS))
    assert any(not torch.equal(value, other[t]) for other in others for t, value in first.items())
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-3)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARED)
def test_twenty_runs_on_a_gpu_are_the_same_to_the_bit(name: str, deterministic: None) -> None:
    inputs = [t.cuda() for t in variant_inputs(name, "float32").values()]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    op = ec.compile(name, schedule=Schedule(sums="accumulated"))
    wanted = [t for t in leaves if t.requires_grad]

    def gradients() -> tuple[torch.Tensor, ...]:
        found = op(*leaves)
        total = sum(t.square().sum() for t in ((found,) if isinstance(found, torch.Tensor) else found))
        assert isinstance(total, torch.Tensor)
        return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)

    first = gradients()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
