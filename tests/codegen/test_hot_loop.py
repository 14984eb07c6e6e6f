"""What the compilers make of generated kernels: the hot loop on sm_90, and resources on every target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

import einsumcascade as ec
from einsumcascade.analysis.targets import TARGETS
from einsumcascade.codegen.inspection import Inspection
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import constrained
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.calls import VARIANTS as KERNELS
from tests.codegen.tritons import run_with
from tests.gallery.draws import extents_of
from tests.nightly import NIGHTLY

# Every kind of loop once, on every target; the others on one.
VARIANTS = (
    "alibi",
    "cross_attention",
    "gated",
    "gqa",
    "linear",
    "relu",
    "sigmoid",
    "sink",
    "sliding_window",
    "softcap",
    "softmax_1p",
    "softmax_2p",
    "softmax_attention",
    "softmax_lse",
)
LARGE = Schedule(
    kernels={"softmax_attention": KernelSchedule(tiles={"p": 128, "m": 128}, warps=8, stages=2, descriptors=False)}
)
# Per thread: 64 scores and 64 accumulators, two rows, and the reductions of a row over its threads.
NEEDED = {"MUFU": 66, "FFMA": 66, "FMUL": 66, "FADD": 68, "FMNMX": 68}


def cascade_of(name: str) -> Cascade:
    """Load a variant; `causal NAME` is the variant under a causal mask."""
    variant = load(name.removeprefix("causal "))
    return constrained(variant, "m <= p", {}) if name.startswith("causal ") else variant


def large(name: str) -> Inspection:
    """Inspect the kernel of 128 x 128 tiles that the hand-written text has too."""
    kernel = ec.compile(cascade_of(name)).kernel(
        extents={"E": 128, "F": 128}, dtype="bfloat16", target="cuda:90", schedule=LARGE
    )
    return kernel.inspect()


def default(name: str, *, size: int, target: str, dtype: str = "bfloat16") -> Inspection:
    """Inspect the kernels of the default schedule."""
    return ec.compile(cascade_of(name)).kernel(extents={"E": size, "F": size}, dtype=dtype, target=target).inspect()


@pytest.mark.parametrize("triton", ["installed", "oldest"])
@pytest.mark.parametrize("name", ["softmax_attention", "causal softmax_attention"])
def test_the_hot_loop_needs_what_the_algorithm_needs(name: str, triton: str) -> None:
    printed = run_with(
        triton,
        "import json\nfrom tests.codegen.test_hot_loop import large\n"
        f"print(json.dumps(large({name!r}).to_dict()['kernels']))",
    )
    (report,) = json.loads(printed).values()
    hot = report["loops"][0]
    classes = hot["classes"]
    assert {c: classes[c] for c in NEEDED if classes[c] > 1.02 * NEEDED[c]} == {}
    assert hot["opcodes"]["HGMMA"] == 16
    assert (classes["LDL"], classes["STL"]) == (0, 0)
    assert not hot["serialised"]
    assert triton == "installed" or report["triton_version"] == "3.6.0"


def assert_it_fits(inspection: Inspection) -> None:
    for report in inspection.kernels.values():
        target = report.target
        assert 0 < report.registers <= target.registers_per_thread
        assert 0 <= report.shared_memory_bytes <= target.shared_memory_bytes
        if report.loops:
            hot = report.loops[0]
            assert (hot.count("LDL"), hot.count("STL"), hot.serialised) == (0, 0, False), str(report)


def turns(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each name with one target in turn, every second one with cuda:90 besides; with every target at night."""
    targets = [target.name for target in TARGETS]
    return [
        (name, target)
        for n, name in enumerate(names)
        for k, target in enumerate(targets)
        if NIGHTLY or k == n % len(targets) or (target == "cuda:90" and n % 2)
    ]


@pytest.mark.parametrize(("name", "target"), turns([*VARIANTS, "causal softmax_attention"]))
def test_no_default_schedule_spills_in_its_hot_loop(name: str, target: str) -> None:
    assert_it_fits(default(name, size=64, target=target))


@pytest.mark.parametrize("target", [target.name for target in TARGETS])
@pytest.mark.parametrize("name", ["softcap", "softmax_1p", "causal softmax_attention"])
def test_no_default_schedule_spills_with_heads_of_128(name: str, target: str) -> None:
    assert_it_fits(default(name, size=128, target=target))


@pytest.mark.parametrize("name", ["softmax_attention", "causal softmax_attention", "gqa"])
@pytest.mark.parametrize("size", [64, 128])
def test_the_gradient_of_softmax_is_seven_products_on_tensor_cores(name: str, size: int) -> None:
    backward = differentiate(cascade_of(name)).backward
    kernel = ec.compile(backward).kernel(extents={"E": size, "F": size}, dtype="bfloat16", target="cuda:90")
    inspection = kernel.inspect()
    assert_it_fits(inspection)
    # Two products contract a head, the others a tile of 64; one instruction contracts 16.
    statistics, keys, queries = kernel.program.kernels
    assert (statistics.loops, keys.loops[-1:], queries.loops) == ((), ("p",), ("m",))
    loops = [inspection.kernels[f"{k.name}_kernel"].hot_loop for k in (keys, queries)]
    found = [loop.opcodes["HGMMA"] for loop in loops if loop is not None]
    assert found == [2 * size // 16 + 2 * 4, 2 * size // 16 + 4]


@pytest.mark.parametrize("size", [64, 128])
def test_exact_float32_products_use_no_tensor_core_and_do_not_spill(size: int) -> None:
    inspection = default("softmax_attention", size=size, target="cuda:90", dtype="float32")
    assert_it_fits(inspection)
    hot = inspection.kernels["softmax_attention_kernel"].hot_loop
    assert hot is not None and hot.count("MMA") == 0


@pytest.mark.parametrize("name", sorted(set(KERNELS) - set(VARIANTS)))
def test_the_compiler_takes_every_kernel_of_the_gallery(name: str) -> None:
    """With small tiles, which compile fast: what Triton refuses, its interpreter may yet run."""
    cascade = load(name)
    op, options = ec.compile(cascade), {"dtype": "bfloat16", "target": "cuda:90"}
    extents = extents_of(cascade, name)
    built = op.kernel(extents=extents, **options).built
    small = {
        kernel: replace(chosen, tiles={v: min(n, 16) for v, n in chosen.tiles.items()}, warps=4)
        for kernel, chosen in built.schedule.kernels.items()
    }
    inspection = op.kernel(extents=extents, schedule=Schedule(kernels=small), **options).inspect()
    assert len(inspection.kernels) == len(built.kernels)
    assert all(report.registers > 0 for report in inspection.kernels.values())


def test_a_hip_kernel_reports_registers_and_shared_memory() -> None:
    record = default("softmax_attention", size=64, target="hip:gfx942").to_dict()
    assert record["target"] == "hip:gfx942"
    kernels = record["kernels"]
    assert isinstance(kernels, dict)
    report = kernels["softmax_attention_kernel"]
    assert report["registers"] > 0 and report["shared_memory_bytes"] > 0 and report["spill_bytes"] == 0
