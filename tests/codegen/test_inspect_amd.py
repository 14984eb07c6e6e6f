"""The assembler text of an AMD target is read back, and counted a second time by plain patterns."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache
from typing import Any

import pytest

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.build import CompiledKernel, compile_kernel
from einsumcascade.codegen.inspect import find_loops, inspect_kernel
from einsumcascade.codegen.inspection import compiled
from einsumcascade.codegen.isa import AMDGCN, CLASSES, SASS, parse_amdgcn
from einsumcascade.codegen.kernel import Kernel
from einsumcascade.gallery import load
from einsumcascade.language.parser import constrained
from einsumcascade.schedules.model import predict
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.tritons import FLASH_DIVISIBLE, FLASH_FORWARD, FLASH_TYPES

TARGET = gpu_target("hip:gfx942")
EXTENTS = {"B": 4, "H": 16, "P": 4096, "M": 4096, "E": 64, "F": 64}
# Terms of a product that one matrix instruction of a warp takes: 32 x 32 x 8.
TERMS = 32 * 32 * 8
PLAIN = """\
import triton
import triton.language as tl


@triton.jit
def scaled(X, Y):
    o_n = tl.arange(0, 256)
    tl.store(Y + o_n, tl.exp2(tl.load(X + o_n)))


@triton.jit
def sums(X, Y, N, M):
    o_n = tl.arange(0, 256)
    for row in range(0, M):
        b_x = tl.zeros([256], tl.float32)
        for start in range(0, N, 256):
            b_x += tl.exp2(tl.load(X + row * N + start + o_n))
        tl.store(Y + row * 256 + o_n, b_x)
"""


@cache
def flash(block: int = 64, *, num_warps: int = 4) -> CompiledKernel:
    """The hand-written kernel, under a causal mask: a loop over full tiles and one over tested ones."""
    return compile_kernel(
        FLASH_FORWARD,
        kernel="flash_forward",
        signature=FLASH_TYPES,
        divisible=FLASH_DIVISIBLE,
        constexprs={"D": 128, "CAUSAL": True, "BLOCK_P": block, "BLOCK_M": block},
        target=TARGET,
        num_warps=num_warps,
    )


@cache
def plain(kernel: str) -> CompiledKernel:
    types = {"X": "*fp32", "Y": "*fp32", "N": "i32", "M": "i32"}
    names = ("X", "Y") if kernel == "scaled" else tuple(types)
    return compile_kernel(PLAIN, kernel=kernel, signature={n: types[n] for n in names}, constexprs={}, target=TARGET)


def softmax(*, causal: bool = False, gradient: bool = False) -> Kernel:
    cascade = load("softmax_attention")
    op = ec.compile(constrained(cascade, "m <= p", {}) if causal else cascade)
    return op.kernel(target=TARGET.name, gradient=gradient, extents={"E": 64, "F": 64})


def text_of(kernel: CompiledKernel) -> str:
    text = kernel.assembly["amdgcn"]
    assert isinstance(text, str)
    return text


def between(text: str, label: str) -> list[str]:
    """Opcodes of a loop whose blocks lie one after the other: from its label to the last branch to it."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(f"{label}:"))
    last = max(n for n, line in enumerate(lines) if re.search(rf"s_c?branch\S* {re.escape(label)}$", line))
    assert first < last
    return [line.split()[0] for line in lines[first : last + 1] if re.match(r"\t[a-z]", line)]


@pytest.mark.parametrize("which", ["flash_forward", "sums"])
def test_a_loop_holds_what_a_plain_reading_of_its_lines_holds(which: str) -> None:
    kernel = flash() if which == "flash_forward" else plain(which)
    hot = inspect_kernel(kernel).hot_loop
    assert hot is not None
    seen = Counter(between(text_of(kernel), hot.start))
    assert sum(seen.values()) == hot.instructions == sum(hot.opcodes.values())

    def count(*beginnings: str) -> int:
        return sum(n for opcode, n in seen.items() if opcode.startswith(beginnings))

    assert hot.count("MMA") == count("v_mfma")
    assert hot.count("MUFU") == count("v_exp", "v_rcp", "v_log")
    assert hot.count("FFMA") == count("v_fma_f32", "v_fmac_f32", "v_pk_fma_f32")
    assert hot.operations("FFMA") == hot.count("FFMA") + count("v_pk_fma_f32")
    assert hot.count("FMUL") == count("v_mul_f32", "v_pk_mul_f32")
    assert hot.operations("FMUL") == hot.count("FMUL") + count("v_pk_mul_f32")
    assert hot.count("FADD") == count("v_add_f32", "v_sub_f32", "v_subrev_f32", "v_pk_add_f32")
    assert hot.count("FMNMX") == count("v_max_f32", "v_max3_f32")
    assert hot.count("SHFL") == count("ds_bpermute", "v_permlane") + sum(n for o, n in seen.items() if "_dpp" in o)
    assert hot.count("LDS") == count("ds_read", "ds_write")
    assert hot.count("LDG") == count("global_", "buffer_")
    assert (hot.count("LDL"), hot.count("STL"), hot.serialised) == (0, 0, False)
    pipes = hot.pipes
    assert sum(pipes.values()) == hot.instructions
    assert pipes["tensor"] + pipes["special"] + pipes["fp32"] + pipes["alu"] == count("v_")
    assert pipes["other"] == count("s_")
    assert pipes["access"] + pipes["shuffle"] == count("ds_", "global_", "buffer_")


def test_the_hot_loop_of_a_hand_written_kernel_holds_its_products_and_exponentials() -> None:
    report = inspect_kernel(flash(128))
    full, masked = report.loops
    scores = 128 * 128 // (report.num_warps * TARGET.warp_size)
    for loop in (full, masked):
        # Each warp has 32 rows of its own, so that none multiplies what another does.
        assert loop.count("MMA") == 2 * 128**3 // TERMS // report.num_warps
        # One for each score, and one for the correction of each row.
        assert scores < loop.count("MUFU") <= scores + 4
        # Accumulators are rescaled.
        assert loop.operations("FMUL") >= scores
    assert full.instructions < masked.instructions


def test_a_kernel_without_a_loop_has_none() -> None:
    report = inspect_kernel(plain("scaled"))
    assert report.loops == () and report.hot_loop is None
    assert "loop" not in str(report)
    assert compiled(report).full is None


def test_the_inner_of_two_loops_is_found_without_products() -> None:
    report = inspect_kernel(plain("sums"))
    hot = report.hot_loop
    assert hot is not None and hot.count("MMA") == 0 and hot.count("MUFU") >= 1
    assert hot.count("LDG") >= 1 and "global_store_dword" not in hot.opcodes


def test_full_and_tested_tiles_have_loops_of_their_own() -> None:
    (report,) = softmax(causal=True).inspect().kernels.values()
    assert len(report.loops) == 2
    full, tested = report.loops
    assert full.count("MMA") == tested.count("MMA") > 0
    assert full.instructions < tested.instructions
    assert full.start != tested.start


def test_the_gradient_of_softmax_is_seven_products_on_matrix_units() -> None:
    kernel = softmax(gradient=True)
    inspection = kernel.inspect()
    statistics, keys, queries = (inspection.kernels[f"{k.name}_kernel"] for k in kernel.program.kernels)
    assert statistics.loops == ()
    for report, tiles, products in (
        (keys, kernel.schedule.kernels["softmax_attention_backward_1"].tiles, 4),
        (queries, kernel.schedule.kernels["softmax_attention_backward_2"].tiles, 3),
    ):
        hot = report.hot_loop
        assert hot is not None
        assert hot.count("MMA") == products * tiles["p"] * tiles["m"] * 64 // TERMS // report.num_warps
        assert (hot.count("LDL"), hot.count("STL")) == (0, 0)
        step = inspection.steps[report.kernel]
        assert math.isclose(step.pipes["special"], 1.0)


def test_registers_are_those_of_the_text() -> None:
    kernel = flash()
    report = inspect_kernel(kernel)
    told = re.findall(r"^; (Total\w+|NumAgprs|ScratchSize): (\d+)$", text_of(kernel), re.MULTILINE)
    found = {name: int(number) for name, number in told}
    assert report.registers == found["TotalNumVgprs"]
    assert report.accumulation_registers == found["NumAgprs"]
    assert report.scalar_registers == found["TotalNumSgprs"]
    assert report.spill_bytes == found["ScratchSize"]
    assert report.shared_memory_bytes > 0
    assert f"registers {report.registers} (" in str(report)


def test_spills_are_counted_where_they_are() -> None:
    """A warp that has a tile alone, more than its registers hold."""
    kernel = flash(128, num_warps=1)
    report = inspect_kernel(kernel)
    assert report.spill_bytes > 0
    assert report.local_loads > 0 and report.local_stores > 0
    lines = text_of(kernel).splitlines()
    assert report.local_loads == sum(line.startswith("\tscratch_load") for line in lines)
    assert report.local_stores == sum(line.startswith("\tscratch_store") for line in lines)


def test_the_table_has_the_columns_of_every_target() -> None:
    report = inspect_kernel(flash())
    lines = str(report).splitlines()
    assert lines[2].split() == ["loop", *CLASSES, "total"]
    assert len({len(line) for line in lines[2:]}) == 1
    record: dict[str, Any] = json.loads(json.dumps(report.to_dict()))
    assert list(record["loops"][0]["classes"]) == list(CLASSES)
    assert list(AMDGCN.classes) == list(SASS.classes) == list(CLASSES)
    assert list(AMDGCN.pipes) == list(SASS.pipes)


def test_no_instruction_is_of_two_pipes() -> None:
    for kernel in (flash(), plain("sums"), flash(128, num_warps=1)):
        for i in parse_amdgcn(text_of(kernel), function=kernel.kernel):
            assert sum(p.fullmatch(i.base) is not None for p in AMDGCN.pipes.values()) == (not i.base.startswith("s_"))


@pytest.mark.parametrize(
    ("opcode", "base", "classes", "pipe"),
    [
        ("v_add_f32_dpp", "v_add_f32_dpp", {"FADD", "SHFL"}, "fp32"),
        ("v_mov_b32_dpp", "v_mov_b32_dpp", {"SHFL"}, "alu"),
        ("v_max_f32_e64_dpp", "v_max_f32_dpp", {"FMNMX", "SHFL"}, "alu"),
        ("v_and_b32_sdwa", "v_and_b32", set(), "alu"),
        ("ds_swizzle_b32", "ds_swizzle_b32", {"SHFL"}, "shuffle"),
        ("ds_read_b128", "ds_read_b128", {"LDS"}, "access"),
        ("v_smfmac_f32_16x16x32_bf16", "v_smfmac_f32_16x16x32_bf16", {"MMA"}, "tensor"),
        ("v_cvt_pkrtz_f16_f32", "v_cvt_pkrtz_f16_f32", {"F2FP"}, "alu"),
        ("v_cvt_f32_i32_e32", "v_cvt_f32_i32", set(), "alu"),
        ("v_rcp_iflag_f32_e32", "v_rcp_iflag_f32", {"MUFU"}, "special"),
        ("scratch_store_dwordx4", "scratch_store_dwordx4", {"STL"}, "access"),
        ("global_load_lds_dwordx4", "global_load_lds_dwordx4", {"LDS", "LDG"}, "access"),
        ("global_atomic_add_f32", "global_atomic_add_f32", {"LDG"}, "access"),
        ("s_waitcnt", "s_waitcnt", set(), ""),
    ],
)
def test_each_opcode_has_its_columns_and_its_pipe(opcode: str, base: str, classes: set[str], pipe: str) -> None:
    (found,) = parse_amdgcn(f"f:\n\t{opcode} v0, v1\n.Lfunc_end0:\n", function="f")
    assert found.base == base
    assert {c for c, p in AMDGCN.classes.items() if p.fullmatch(base)} == classes
    assert "".join(name for name, p in AMDGCN.pipes.items() if p.fullmatch(base)) == pipe


def test_blocks_behind_the_end_and_far_branches_are_of_their_loop() -> None:
    text = """\
g:
\ts_branch .LBB0_1
.Lfunc_end0:
f:                                      ; @f
; %bb.0:
\ts_mov_b32 s0, 0
.LBB1_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
\ts_cbranch_execz .LBB1_4
.LBB1_2:
\ts_cbranch_scc1 .LBB1_3 ; not the end
\ts_getpc_b64 s[2:3]
.Lpost_getpc0:
\ts_add_u32 s2, s2, (.LBB1_1-.Lpost_getpc0)&4294967295
\ts_addc_u32 s3, s3, (.LBB1_1-.Lpost_getpc0)>>32
\ts_setpc_b64 s[2:3]
.LBB1_3:
\ts_endpgm
.LBB1_4:
.Ltmp7:
\tv_exp_f32_e32 v1, v1
\ts_branch .LBB1_2
.Lfunc_end1:
"""
    (loop,) = find_loops(parse_amdgcn(text, function="f"), isa=AMDGCN)
    assert loop.start == ".LBB1_1"
    assert loop.instructions == 9
    assert (loop.count("MMA"), loop.count("MUFU"), loop.opcodes.get("s_endpgm", 0)) == (1, 1, 0)


def test_a_text_without_instructions_has_no_loop() -> None:
    assert find_loops(parse_amdgcn("f:\n.Lfunc_end0:\n", function="f"), isa=AMDGCN) == ()


def test_the_time_to_expect_comes_from_what_was_counted() -> None:
    kernel = softmax()
    inspection = kernel.inspect(extents=EXTENTS)
    (report,) = inspection.kernels.values()
    (found,) = inspection.predictions.values()
    hot = report.hot_loop
    assert hot is not None and found.blocks >= 1 and 0 < found.seconds < 1
    assert found.registers == report.registers and found.shared_memory_bytes == report.shared_memory_bytes
    # A compute unit issues one vector instruction a clock; a special function takes four turns of its unit.
    vector = sum(n for opcode, n in hot.opcodes.items() if opcode.startswith("v_")) + 3 * hot.count("MUFU")
    steps = found.full_steps + found.tested_steps
    turns = vector * report.num_warps * steps / TARGET.multiprocessors
    assert turns <= found.cycles["issue"] <= 1.1 * turns
    packed = sum(hot.operations(c) for c in ("FFMA", "FMUL", "FADD")) * report.num_warps * TARGET.warp_size
    expected = packed * steps / TARGET.fp32_per_clock / TARGET.multiprocessors
    assert expected <= found.cycles["fp32"] <= 1.1 * expected
    assert found.seconds * TARGET.clock_ghz * 1e9 >= max(found.cycles.values())


def test_without_counts_the_vector_unit_is_shared_too() -> None:
    kernel = softmax()
    chosen = Schedule(kernels={"softmax_attention": KernelSchedule(tiles={"p": 128, "m": 64}, warps=4)})
    (found,) = predict(kernel.program, chosen, extents=EXTENTS, target=TARGET).kernels
    assert found.cycles["issue"] >= found.cycles["alu"] + found.cycles["special"]
