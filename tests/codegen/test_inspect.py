"""A compiled kernel is read back: resources, spills, loops."""

from __future__ import annotations

import json

import pytest

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.build import compile_kernel
from einsumcascade.codegen.inspect import KernelReport, find_loops, inspect_kernel
from einsumcascade.codegen.isa import CLASSES, SASS, parse_sass
from einsumcascade.codegen.op import compile as compile_cascade
from einsumcascade.language.parser import parse
from tests.codegen.tritons import FLASH_DIVISIBLE, FLASH_FORWARD, FLASH_TYPES, run_with


def report_of(
    source: str = FLASH_FORWARD, *, target: str = "cuda:90", block: int = 128, num_warps: int = 8
) -> KernelReport:
    return inspect_kernel(
        compile_kernel(
            source,
            kernel="flash_forward",
            signature=FLASH_TYPES,
            divisible=FLASH_DIVISIBLE,
            constexprs={"D": 128, "CAUSAL": True, "BLOCK_P": block, "BLOCK_M": block},
            target=gpu_target(target),
            num_warps=num_warps,
            num_stages=2,
        )
    )


@pytest.mark.parametrize("triton", ["installed", "oldest"])
def test_the_hot_loop_on_sm_90_holds_what_the_algorithm_needs(triton: str) -> None:
    """Per thread: 64 scores and 64 accumulators, so one MUFU, FFMA, FADD, FMNMX and half an F2FP per score."""
    printed = run_with(
        triton,
        "import json\nfrom tests.codegen.test_inspect import report_of\nprint(json.dumps(report_of().to_dict()))",
    )
    loops = json.loads(printed)["loops"]
    assert len(loops) == 2
    hot, masked = loops
    needed = {"MMA": 16, "MUFU": 66, "FMUL": 66, "FMNMX": 68, "F2FP": 32, "SHFL": 8, "LDL": 0, "STL": 0}
    assert {name: hot["classes"][name] for name in needed} == needed
    # A row's correction is one fused operation or two plain ones.
    assert hot["classes"]["FFMA"] + hot["classes"]["FADD"] == 134
    assert hot["opcodes"]["HGMMA"] == 16
    assert not hot["serialised"]
    assert hot["instructions"] <= 560
    assert masked["instructions"] > hot["instructions"]


def test_serialised_products_are_noticed() -> None:
    """Addresses derived from the loop index make ptxas await each product."""
    source = FLASH_FORWARD.replace("        p_k += BLOCK_M * stride_km\n        p_v += BLOCK_M * stride_vm\n", "")
    for pointer, stride in (("k", "stride_km"), ("v", "stride_vm")):
        source = source.replace(
            f"p_{pointer} + o_{pointer}", f"p_{pointer} + start.to(tl.int64) * {stride} + o_{pointer}"
        )
    hot = report_of(source).hot_loop
    assert hot is not None and hot.serialised


def test_a_kernel_without_products_reports_its_largest_innermost_loop() -> None:
    source = """\
import triton
import triton.language as tl


@triton.jit
def norms(X, Y, N, M):
    o_n = tl.arange(0, 128)
    for row in range(0, M):
        b_x = tl.zeros([128], tl.float32)
        for start in range(0, N, 128):
            b_x += tl.exp2(tl.load(X + row * N + start + o_n))
        tl.store(Y + row * 128 + o_n, b_x)
"""
    report = inspect_kernel(
        compile_kernel(
            source,
            kernel="norms",
            signature={"X": "*fp32", "Y": "*fp32", "N": "i32", "M": "i32"},
            constexprs={},
            target=gpu_target("cuda:80"),
        )
    )
    assert report.hot_loop is not None
    assert report.hot_loop.count("MMA") == 0
    assert report.hot_loop.count("MUFU") >= 1
    assert len(report.loops) == 1 or report.loops[0].instructions >= report.loops[1].instructions


def test_packed_and_ternary_instructions_count_their_operations_on_sm_100() -> None:
    hot = report_of(target="cuda:100").hot_loop
    assert hot is not None
    assert any(opcode.startswith("UTC") and opcode.endswith("MMA") for opcode in hot.opcodes)
    assert hot.operations("FMNMX") > hot.count("FMNMX")
    assert hot.operations("FADD") == 64


def test_a_report_prints_as_a_table() -> None:
    lines = str(report_of()).splitlines()
    assert lines[0].startswith("flash_forward for cuda:90, 8 warps, 2 stages, Triton ")
    assert lines[2].split() == ["loop", *CLASSES, "total"]
    assert len({len(line) for line in lines[2:]}) == 1


def loop_text(*bodies: list[str]) -> str:
    """The assembly of loops one after the other."""
    lines, at = [], 0
    for body in bodies:
        start = at
        for opcode in [*body, f"@P1 BRA 0x{start:x}"]:
            lines.append(f"        /*{at:04x}*/                   {opcode} ;")
            at += 16
    return "\n".join(["\t\tFunction : f", *lines, f"        /*{at:04x}*/                   EXIT ;", ""])


def test_without_products_the_loop_without_masks_is_hotter_than_its_copy_with_them() -> None:
    maths = ["FADD R1, R2, R3", "MUFU.EX2 R1, R1", "FMNMX R2, R1, R2, !PT"]
    masked = ["ISETP.GE.AND P0, PT, R4, R5, PT", *maths, "FSEL R1, R1, R2, P0"]
    full = ["LDG.E R1, [R2.64]", *maths]
    unrolled = full * 4
    for texts in ([masked, full], [full, masked]):
        found = find_loops(parse_sass(loop_text(*texts), function="f"), isa=SASS)
        assert [loop.instructions for loop in found] == [len(full) + 1, len(masked) + 1]
    # What is left over after an unrolled loop does a fraction of its work.
    found = find_loops(parse_sass(loop_text(full, unrolled, masked), function="f"), isa=SASS)
    assert found[0].instructions == len(unrolled) + 1
    moves = [["MOV R1, R2"], ["MOV R1, R2", "MOV R2, R3"]]
    assert [x.instructions for x in find_loops(parse_sass(loop_text(*moves), function="f"), isa=SASS)] == [3, 2]


def test_the_hot_loop_of_a_compiled_kernel_without_products_tests_no_points() -> None:
    text = "in X[p, m]\nconstraint m <= p\nG[p] = X[p, m] :: max(m)\nS[p] = exp(X[p, m] - G[p]) :: sum(m)\nout S"
    kernel = compile_cascade(parse(text, name="row_sums")).kernel(extents={}, target="cuda:90")
    (report,) = kernel.inspect().kernels.values()
    hot, masked = report.loops
    assert hot.instructions < masked.instructions and hot.count("MUFU") == masked.count("MUFU")


def test_a_wait_behind_the_end_of_a_kernel_is_no_loop_and_widens_none() -> None:
    text = """\
		Function : f
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0020*/              @!P0 BRA 0x80 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   FADD R2, R2, R3 ;
        /*0060*/                   EXIT ;
        /*0070*/                   NOP ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0090*/              @!P0 BRA 0x80 ;
        /*00a0*/                   BRA 0x30 ;
"""
    (loop,) = find_loops(parse_sass(text, function="f"), isa=SASS)
    assert loop.start == "0x000010"
    assert loop.opcodes == {"BRA": 4, "SYNCS": 2, "HGMMA": 1}
    assert loop.count("FADD") == 0
