"""Addresses beyond 2^31 elements: in the compiler's form of every kernel, and in runs over memory that far apart."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.build import load_module
from einsumcascade.codegen.kernel import parameter_types
from einsumcascade.codegen.launch import Built, build, run_interpreted
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.calls import TWO_KERNELS, VARIANTS
from tests.codegen.judging import assert_within_bounds
from tests.gallery.draws import extents_of

FAR = 1 << 31
# A literal index and a looped last axis.
COLUMNS = parse(
    "in X[p,k], W[k,j,m], T[n,m]\nY[p,m] = X[p,k] * W[k,3,m] :: sum(k)\nZ[p,m] = Y[p,m] + T[2,m]\nout Z",
    name="columns.cascade",
)


def forms(built: Built) -> Iterator[str]:
    """Translate kernels to TTIR as for a call whose strides and lengths are any numbers of 32 bits."""
    for kernel, text in zip(built.kernels, built.texts, strict=True):
        function = getattr(load_module(built.source), text.name)
        types = parameter_types(built, kernel, text)
        source = ASTSource(
            function, {n: types.get(n, "constexpr") for n in function.arg_names}, constexprs=dict(text.constexprs)
        )
        backend = make_backend(GPUTarget("cuda", 90, 32))
        options, context = backend.parse_options({"enable_fp_fusion": True}), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        helpers = backend.get_codegen_implementation(options), backend.get_module_map()
        yield str(source.make_ir(GPUTarget("cuda", 90, 32), options, *helpers, context))


def assert_addresses_are_wide(form: str) -> None:
    """A stride is widened before anything is computed from it, and every offset of a pointer has 64 bits."""
    lines = [line.split(" loc(")[0].strip() for line in form.splitlines()]
    strides = [line for line in lines if re.search(r"%stride\w*", line) and not line.startswith("tt.func")]
    assert strides
    for line in strides:
        # A descriptor takes its strides as 64 bits; what searches a table is a function of its own, here as well.
        widened = re.fullmatch(r"%\S+ = arith\.extsi %stride\w* : i32 to i64", line)
        assert widened or re.search(r"tt\.call @\S+\._count__", line), line
    offsets = [line for line in lines if "tt.addptr" in line]
    assert offsets or "tt.make_tensor_descriptor" in form
    for line in offsets:
        assert re.search(r", (i64|tensor<[\dx]*xi64>)$", line), line


@pytest.mark.parametrize("name", [*VARIANTS, "columns", "two kernels"])
def test_no_address_is_computed_in_32_bits(name: str) -> None:
    own = {"columns": COLUMNS, "two kernels": TWO_KERNELS}
    cascade = own[name] if name in own else load(name)
    extents = {"J": 4, "N": 3} if name in own else extents_of(cascade, name)
    extents = {r: n for r, n in extents.items() if r in {v.upper() for i in cascade.inputs for v in i.indices}}
    for form in forms(ec.compile(cascade).kernel(extents=extents, target="cuda:90").built):
        assert_addresses_are_wide(form)


def test_descriptors_take_wide_strides() -> None:
    tiles = KernelSchedule(tiles={"p": 64, "m": 64}, warps=4, stages=2, descriptors=True)
    chosen = Schedule(kernels={"softmax_attention": tiles})
    for extent in (64, 80):
        kernel = ec.compile("softmax_attention", schedule=chosen).kernel(
            extents={"E": extent, "F": extent}, target="cuda:90"
        )
        for form in forms(kernel.built):
            assert "tt.make_tensor_descriptor" in form
            assert_addresses_are_wide(form)


def test_the_check_sees_a_product_in_32_bits() -> None:
    built = ec.compile("softmax_attention").kernel(target="cuda:90").built
    (form,) = forms(built)
    assert_addresses_are_wide(form)
    narrow = re.sub(r"arith\.extsi %stride_K_m : i32 to i64", "arith.muli %stride_K_m, %stride_K_m : i32", form)
    with pytest.raises(AssertionError):
        assert_addresses_are_wide(narrow)


def lazily(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Lay numbers over memory that is not touched in between: pages come to be as they are written."""
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    try:
        room = torch.empty(last + 1, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip(f"no {2 * (last + 1) >> 30} GiB of addresses here")
    out = room.as_strided(shape, strides)
    return out.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))))


def both(cascade: Cascade, inputs: dict[str, torch.Tensor]) -> None:
    """Judge the text in the interpreter and the op."""
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    features = {r: binding.extents[r] for r in ("E", "F")}
    built = build(cascade, extents=features, dtype="bfloat16", target=gpu_target("cuda:90"), tile_limit=16)
    found = run_interpreted(built, inputs, binding)
    assert_within_bounds(cascade, inputs, tuple(found[o] for o in cascade.output_names))
    assert_within_bounds(cascade, inputs, ec.compile(cascade)(*inputs.values()))


@pytest.mark.parametrize(
    "strides",
    [
        # A tensor of four axes whose second batch begins beyond 2^31 elements.
        pytest.param((FAR + 32, 1 << 12, 32, 1), id="batches apart"),
        # Keys so far apart that a tile of them passes 2^31, and their stride fits into 32 bits.
        pytest.param((64, 32, (1 << 27) + 8, 1), id="keys apart"),
        # A tile of features that passes 2^31.
        pytest.param((2048, 1024, 32, (1 << 27) + 2048), id="features apart"),
    ],
)
def test_tensors_of_more_than_2_to_the_31_elements(strides: tuple[int, ...]) -> None:
    shape = (2, 2, 33, 24)
    x = lazily(shape, strides)
    assert (x.untyped_storage().nbytes() // 2) > FAR
    near = torch.randn((2, 2, 5, 24), generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    both(load("softmax_attention"), {"Q": near, "K": x, "V": x})
