"""Kernel text becomes modules and machine code."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from einsumcascade.analysis.targets import TARGETS, GpuTarget, gpu_target
from einsumcascade.codegen import build
from einsumcascade.codegen.build import CompiledKernel, compile_kernel, forget_module, load_module, text_digest
from einsumcascade.errors import LoweringError, TargetError
from tests.codegen.tritons import FLASH_DIVISIBLE, FLASH_FORWARD, FLASH_TYPES, run_with

COPY = """\
import triton
import triton.language as tl


@triton.jit
def copy(X, Y, N, BLOCK: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o_n, tl.load(X + o_n, mask=o_n < N), mask=o_n < N)
"""


def compile_copy(source: str = COPY, **changes: object) -> CompiledKernel:
    call: dict[str, object] = {
        "kernel": "copy",
        "signature": {"X": "*bf16", "Y": "*bf16", "N": "i32"},
        "constexprs": {"BLOCK": 128},
        "divisible": ("X", "Y"),
        "target": gpu_target("cuda:90"),
        **changes,
    }
    return compile_kernel(source, **call)  # type: ignore[arg-type]


def test_a_text_becomes_a_module_whose_functions_have_source(tmp_path: Path) -> None:
    module = load_module(COPY, directory=tmp_path)
    assert "def copy(X, Y, N" in inspect.getsource(module.copy.fn)
    assert load_module(COPY, directory=tmp_path) is module


def test_a_file_that_was_tampered_with_is_replaced(tmp_path: Path) -> None:
    load_module("A = 1\n", directory=tmp_path)
    forget_module("A = 1\n", directory=tmp_path)
    (path,) = tmp_path.glob("*.py")
    path.write_text("A = 2\n")
    assert load_module("A = 1\n", directory=tmp_path).A == 1
    assert path.read_text() == "A = 1\n"


def test_many_writers_of_one_text_leave_one_whole_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(lambda _: load_module("B = 1\n", directory=tmp_path), range(32)))
    assert {module.B for module in modules} == {1}
    assert [path.read_text() for path in tmp_path.iterdir() if path.is_file()] == ["B = 1\n"]


@pytest.mark.parametrize("place", ["blocked", ""])
def test_texts_lie_in_a_temporary_folder_where_nothing_can_be_kept(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("EINSUMCASCADE_CACHE", place and str(tmp_path / place))
    build.kernel_directory.cache_clear()
    try:
        folder = build.kernel_directory()
        assert folder.is_dir() and os.access(folder, os.W_OK)
        assert tmp_path not in folder.parents
    finally:
        build.kernel_directory.cache_clear()


def test_texts_lie_in_the_folder_that_the_environment_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EINSUMCASCADE_CACHE", str(tmp_path))
    build.kernel_directory.cache_clear()
    try:
        assert build.kernel_directory() == tmp_path / "kernels"
    finally:
        build.kernel_directory.cache_clear()


def test_a_folder_of_the_process_ends_with_it() -> None:
    program = "from einsumcascade.codegen.build import kernel_directory; print(kernel_directory())"
    own = {**os.environ, "EINSUMCASCADE_CACHE": ""}
    done = subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True, check=True)
    assert "einsumcascade-" in done.stdout and not Path(done.stdout.strip()).exists()


def test_a_text_that_is_not_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"kernel-rejected.*does not import") as caught:
        load_module("def f(:\n", directory=tmp_path)
    assert caught.value.codes == ("kernel-rejected",)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_kernel_compiles_for_every_target_without_a_gpu(target: GpuTarget) -> None:
    compiled = compile_copy(target=target)
    assert compiled.kernel == "copy"
    assert {"cuda": "cubin", "hip": "hsaco"}[target.backend] in compiled.assembly


@pytest.mark.parametrize("triton", ["installed", "oldest"])
@pytest.mark.parametrize("target", [target.name for target in TARGETS])
def test_the_forward_kernel_compiles_with_both_tritons(triton: str, target: str) -> None:
    printed = run_with(
        triton,
        f"""
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.build import compile_kernel
from tests.codegen.tritons import FLASH_DIVISIBLE, FLASH_FORWARD, FLASH_TYPES
compiled = compile_kernel(
    FLASH_FORWARD, kernel="flash_forward", signature=FLASH_TYPES, divisible=FLASH_DIVISIBLE,
    constexprs=dict(D=64, CAUSAL=True, BLOCK_P=64, BLOCK_M=64), target=gpu_target({target!r}),
)
print(compiled.triton_version, compiled.shared_memory_bytes > 0)
""",
    )
    assert printed.endswith("True\n")
    assert triton == "installed" or printed.startswith("3.6.0")


def test_a_multiplication_and_an_addition_are_fused() -> None:
    source = COPY.replace("tl.load(X + o_n, mask=o_n < N)", "tl.load(X + o_n, mask=o_n < N) * 3.0 + 0.5")
    compiled = compile_copy(source, signature={"X": "*fp32", "Y": "*fp32", "N": "i32"})
    assert "fma.rn.f32" in str(compiled.assembly["ptx"])


def test_too_much_shared_memory_is_refused_before_a_launch() -> None:
    with pytest.raises(TargetError) as caught:
        compile_kernel(
            FLASH_FORWARD,
            kernel="flash_forward",
            signature=FLASH_TYPES,
            divisible=FLASH_DIVISIBLE,
            constexprs={"D": 128, "CAUSAL": True, "BLOCK_P": 128, "BLOCK_M": 128},
            target=gpu_target("cuda:90"),
            num_warps=8,
            num_stages=4,
        )
    assert str(caught.value) == (
        "TargetError[shared-memory]: kernel flash_forward needs 294912 bytes of shared memory, cuda:90 has 232448\n"
        "   = rule: tiles of the streamed tensors are held once per pipeline stage\n"
        "   = hint: lower num_stages or the tile sizes\n"
        "   = docs/errors.md#shared-memory"
    )


def test_what_triton_rejects_is_reported_in_one_line() -> None:
    source = COPY.replace("tl.arange(0, BLOCK)", "tl.arange(0, 100)")
    with pytest.raises(LoweringError) as caught:
        compile_copy(source)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "kernel-rejected"
    assert diagnostic.headline == "Triton rejects kernel copy: arange's range must be a power of 2"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernel": "paste"}, "the kernel text has no @triton.jit function 'paste'"),
        ({"constexprs": {}}, "kernel copy: no type or value for BLOCK"),
        ({"divisible": ("Z",)}, "kernel copy: no parameter Z"),
        ({"constexprs": {"BLOCK": 128, "N": 1}}, "kernel copy: type and value for N"),
    ],
)
def test_a_call_that_does_not_fit_the_kernel_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(LoweringError) as caught:
        compile_copy(**changes)
    assert caught.value.diagnostics[0].headline == reason


def test_an_interpreting_process_refuses_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TargetError) as caught:
        compile_copy()
    assert str(caught.value) == (
        "TargetError[interpreting-process]: kernel copy cannot be compiled for cuda:90 while TRITON_INTERPRET is set\n"
        "   = rule: Triton decides when it is imported whether it interprets or compiles\n"
        "   = hint: unset TRITON_INTERPRET and start a new process\n"
        "   = docs/errors.md#interpreting-process"
    )


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(TargetError) as caught:
        gpu_target("cuda:91")
    assert str(caught.value) == (
        "TargetError[unknown-target]: there is no target 'cuda:91', only cuda:80, cuda:90, cuda:100, hip:gfx942\n"
        "   = rule: a target is named by the backend of Triton and the architecture, as in cuda:90\n"
        "   = hint: did you mean 'cuda:90'?\n"
        "   = docs/errors.md#unknown-target"
    )


def test_the_name_of_a_text_is_its_sha256() -> None:
    assert text_digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
