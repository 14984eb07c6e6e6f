"""Kernel text to modules and to machine code, on a machine with or without the GPU it is for."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.caches import cache_folder
from einsumcascade.errors import LoweringError, TargetError

# Keyed by the digest of the text and the folder it lies in.
_modules: dict[tuple[str, Path], ModuleType] = {}


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A kernel in every form that its compilation went through.

    Args:
        kernel: name of the function.
        target: what it was compiled for.
        num_warps: warps of a program.
        num_stages: buffers of a software pipeline.
        shared_memory_bytes: what one block asks for at a launch.
        triton_version: of the compiler.
        assembly: text or binary by stage: `ttir`, `ttgir`, `llir`, then `ptx` and `cubin`, or `amdgcn` and `hsaco`.
    """

    kernel: str
    target: GpuTarget
    num_warps: int
    num_stages: int
    shared_memory_bytes: int
    triton_version: str
    assembly: Mapping[str, str | bytes] = field(repr=False)


def text_digest(source: str) -> str:
    """Return the name of a kernel text: sha256 of its UTF-8 bytes, in hexadecimal.

    >>> text_digest("")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(source.encode()).hexdigest()


@cache
def kernel_directory() -> Path:
    """Return the folder that kernel texts are kept in, one that lasts as long as the process where nothing is kept."""
    folder = cache_folder("kernels")
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    temporary = Path(tempfile.mkdtemp(prefix="einsumcascade-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def load_module(source: str, *, digest: str | None = None, directory: Path | None = None) -> ModuleType:
    """Import a kernel text as a module whose functions have source, as Triton demands.

    The text is written once, under its digest, with an atomic rename; a file of that name with any other content is
    replaced, never trusted. The same text gives the same module.

    Args:
        source: a whole module that imports what it uses.
        digest: `text_digest(source)`, where the caller has it already.
        directory: folder of the file; the default is `kernel_directory()`.

    Raises:
        LoweringError: `kernel-rejected`: the text is not Python, or its import fails.
        OSError: the file cannot be written.

    Cost: a file and an import the first time, a look-up after that.
    """
    folder = directory or kernel_directory()
    name = digest or text_digest(source)
    known = _modules.get((name, folder))
    if known is not None:
        return known
    path = folder / f"kernel_{name[:32]}.py"
    data = source.encode()
    try:
        stored = path.read_bytes()
    except OSError:
        stored = None
    if stored != data:
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    spec = importlib.util.spec_from_file_location(f"einsumcascade_kernel_{name[:32]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Decorators look their module up by name while it is being executed.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(spec.name, None)
        raise _rejected(f"the kernel text does not import: {_one_line(error)}") from error
    _modules[name, folder] = module
    return module


def forget_module(source: str, *, digest: str | None = None, directory: Path | None = None) -> None:
    """Drop the module of a text from memory; its file stays."""
    known = _modules.pop((digest or text_digest(source), directory or kernel_directory()), None)
    if known is not None:
        sys.modules.pop(known.__name__, None)


def compile_kernel(
    source: str,
    *,
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    divisible: Collection[str] = (),
    target: GpuTarget,
    num_warps: int = 4,
    num_stages: int = 2,
) -> CompiledKernel:
    """Compile one function of a kernel text for `target`; no GPU is needed.

    Args:
        source: the kernel text.
        kernel: name of the `@triton.jit` function.
        signature: type of every run-time parameter: `*bf16`, `*fp32`, `i32`, `i64`, `fp32`.
        constexprs: value of every compile-time parameter.
        divisible: parameters that are multiples of 16, pointers in bytes.
        target: what to compile for.
        num_warps: warps of a program.
        num_stages: buffers of a software pipeline.

    Raises:
        LoweringError: `kernel-rejected`: Triton refuses the text, or a parameter has no type or value.
        TargetError: `target-rejected`: the text is accepted but the target's compiler fails; `shared-memory`: a block
            asks for more than the target has; `interpreting-process`: Triton was imported to interpret, so it cannot
            compile here.

    Cost: seconds, then Triton's own cache on disk.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y"):
        raise _refused(
            "interpreting-process",
            f"kernel {kernel} cannot be compiled for {target.name} while TRITON_INTERPRET is set",
            rule="Triton decides when it is imported whether it interprets or compiles",
            hint="unset TRITON_INTERPRET and start a new process",
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load_module(source), kernel, None)
    if not isinstance(function, triton.JITFunction):
        raise _rejected(f"the kernel text has no @triton.jit function '{kernel}'")
    names: list[str] = list(function.arg_names)
    _check_parameters(kernel, names, signature, constexprs, divisible)
    ast_source = ASTSource(
        function,
        {name: signature.get(name, "constexpr") for name in names},
        constexprs=dict(constexprs),
        attrs={(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    try:
        compiled: Any = triton.compile(
            ast_source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
        )
    except triton.CompilationError as error:
        raise _rejected(f"Triton rejects kernel {kernel}: {_one_line(error)}") from error
    except Exception as error:
        raise _refused(
            "target-rejected",
            f"kernel {kernel} does not compile for {target.name}: {_one_line(error)}",
            hint="try smaller tiles, fewer stages or another number of warps",
        ) from error
    shared = int(compiled.metadata.shared)
    if shared > target.shared_memory_bytes:
        raise _refused(
            "shared-memory",
            f"kernel {kernel} needs {shared} bytes of shared memory, {target.name} has {target.shared_memory_bytes}",
            rule="tiles of the streamed tensors are held once per pipeline stage",
            hint="lower num_stages or the tile sizes",
        )
    return CompiledKernel(
        kernel=kernel,
        target=target,
        num_warps=num_warps,
        num_stages=num_stages,
        shared_memory_bytes=shared,
        triton_version=str(triton.__version__),
        assembly={stage: compiled.asm[stage] for stage in compiled.asm},
    )


def _check_parameters(
    kernel: str,
    names: list[str],
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    divisible: Collection[str],
) -> None:
    """Refuse a call whose parameters do not cover those of the function, each once."""
    given = [*signature, *constexprs]
    missing = [name for name in names if name not in given]
    unknown = [name for name in [*given, *divisible] if name not in names]
    twice = [name for name in signature if name in constexprs]
    for fault, what in ((missing, "no type or value for"), (unknown, "no parameter"), (twice, "type and value for")):
        if fault:
            raise _rejected(f"kernel {kernel}: {what} {', '.join(fault)}")


def _one_line(error: BaseException) -> str:
    """Return the line of an error that says most."""
    # Triton's own message quotes the text first and gives the reason last.
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\n")]
    for line in lines:
        if "error" in line.lower() or "out of" in line.lower():
            return line
    return lines[-1] if lines else type(error).__name__


def _rejected(headline: str) -> LoweringError:
    return LoweringError.of("kernel-rejected", headline)


def _refused(code: str, headline: str, *, rule: str = "", hint: str = "") -> TargetError:
    return TargetError.of(code, headline, rule=rule, hint=hint)
