"""Read a compiled kernel back: registers, spills and what its hot loop executes.

The tools that do this ship inside Triton's wheel, so no GPU and no CUDA installation is needed; AMD's assembler text is
what the compiler leaves.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.build import CompiledKernel
from einsumcascade.codegen.isa import AMDGCN, CLASSES, OTHER, SASS, Instruction, Isa, parse_amdgcn, parse_sass
from einsumcascade.codegen.loops import loop_bodies
from einsumcascade.errors import Diagnostic, TargetError
from einsumcascade.schedules.demands import FP32, ISSUE, SPECIAL

# The longest loop that does nothing but wait for a copy.
_WAIT_INSTRUCTIONS = 8


@dataclass(frozen=True, kw_only=True)
class LoopReport:
    """What one iteration of a loop holds, per thread.

    Args:
        start: address of its first instruction in bytes, or the label before it.
        instructions: all of them, on every path of the body.
        opcodes: instructions by opcode without its suffixes, most frequent first.
        isa: the language that they are of.
        serialised: every asynchronous product is awaited before the next is issued. ptxas does so when other code
            writes accumulators while products are under way; the tensor cores then idle.
    """

    start: str
    instructions: int
    opcodes: Mapping[str, int]
    serialised: bool
    isa: Isa = field(repr=False)

    def count(self, name: str) -> int:
        """Return the instructions of the class `name`, one of `CLASSES`."""
        return self._sum(self.isa.classes[name])

    def operations(self, name: str) -> int:
        """Return the operations of the class `name`: a packed pair, or a maximum of three, counts as two."""
        return self._sum(self.isa.classes[name], doubled=True)

    @property
    def pipes(self) -> dict[str, int]:
        """Instructions by the pipe that takes them; `other` are uniform ones, branches and barriers."""
        found = {name: self._sum(pattern) for name, pattern in self.isa.pipes.items()}
        return {**found, OTHER: self.instructions - sum(found.values())}

    def asked(self, target: GpuTarget) -> dict[str, int]:
        """What a thread asks of each pipe, as a target's rates are given: operations of float32, else instructions.

        Returns: by pipe; `issue` are turns of the scheduler.
        """
        pipes = self.pipes
        issued = {pipe: n for pipe, n in pipes.items() if pipe not in self.isa.beside}
        issue = sum(issued.values()) + (target.special_turns - 1) * issued[SPECIAL]
        return {**pipes, FP32: self._sum(self.isa.pipes[FP32], doubled=True), ISSUE: issue}

    def _sum(self, pattern: re.Pattern[str], *, doubled: bool = False) -> int:
        return sum(
            n * (2 if doubled and self.isa.double.fullmatch(opcode) else 1)
            for opcode, n in self.opcodes.items()
            if pattern.fullmatch(opcode)
        )

    def to_dict(self) -> dict[str, object]:
        """Return the report as values that JSON knows."""
        return {
            "start": self.start,
            "instructions": self.instructions,
            "serialised": self.serialised,
            "classes": {name: self.count(name) for name in CLASSES},
            "operations": {name: self.operations(name) for name in CLASSES},
            "pipes": self.pipes,
            "opcodes": dict(self.opcodes),
        }


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """Resources of a kernel, and its loops.

    Args:
        kernel: name of the function.
        target: what it was compiled for.
        triton_version: of the compiler.
        num_warps: warps of a program.
        num_stages: buffers of a software pipeline.
        registers: of a thread.
        accumulation_registers: those of them that only products and moves can name (AGPRs); 0 for NVIDIA.
        scalar_registers: of a warp, beside those of its threads; 0 for NVIDIA, whose uniform ones are not reported.
        spill_bytes: local memory of a thread (its stack); registers that did not fit lie there.
        local_loads: instructions of the kernel that read local memory.
        local_stores: those that write it.
        shared_memory_bytes: of a block.
        loops: innermost loops, hottest first: those that do most of the work by fewest instructions, so that the loop
            without masks precedes the one with them; then the others, by most instructions.
    """

    kernel: str
    target: GpuTarget
    triton_version: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    local_loads: int
    local_stores: int
    shared_memory_bytes: int
    accumulation_registers: int = 0
    scalar_registers: int = 0
    loops: tuple[LoopReport, ...] = field(default=())

    @property
    def hot_loop(self) -> LoopReport | None:
        """The loop that a long input spends its time in."""
        return self.loops[0] if self.loops else None

    def to_dict(self) -> dict[str, object]:
        """Return the report as values that JSON knows."""
        return {
            "kernel": self.kernel,
            "target": self.target.name,
            "triton_version": self.triton_version,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "registers": self.registers,
            "accumulation_registers": self.accumulation_registers,
            "scalar_registers": self.scalar_registers,
            "spill_bytes": self.spill_bytes,
            "local_loads": self.local_loads,
            "local_stores": self.local_stores,
            "shared_memory_bytes": self.shared_memory_bytes,
            "loops": [loop.to_dict() for loop in self.loops],
        }

    def __str__(self) -> str:
        registers = f"registers {self.registers}"
        if self.scalar_registers:
            registers += f" ({self.accumulation_registers} for accumulators), scalar {self.scalar_registers}"
        lines = [
            f"{self.kernel} for {self.target.name}, {self.num_warps} warps, {self.num_stages} stages, "
            f"Triton {self.triton_version}",
            f"  {registers}, spilled {self.spill_bytes} bytes, shared memory {self.shared_memory_bytes} bytes",
        ]
        if self.loops:
            lines.append("  " + "loop".ljust(10) + "".join(name.rjust(7) for name in (*CLASSES, "total")))
        for loop in self.loops:
            counts = [loop.count(name) for name in CLASSES]
            mark = "  products serialised" if loop.serialised else ""
            row = "".join(str(n).rjust(7) for n in (*counts, loop.instructions))
            lines.append(f"  {loop.start}".ljust(12) + row + mark)
        return "\n".join(lines)


def inspect_kernel(compiled: CompiledKernel) -> KernelReport:
    """Report the resources and the loops of a compiled kernel.

    Raises:
        TargetError: `no-disassembler`: Triton's wheel holds no working `cuobjdump`.

    Cost: two runs of `cuobjdump`, some 0.1 s; none for AMD.
    """
    if compiled.target.backend == "hip":
        return _inspect_hip(compiled)
    cubin = compiled.assembly["cubin"]
    assert isinstance(cubin, bytes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        text = _cuobjdump("-sass", path)
    found = re.search(rf"Function {re.escape(compiled.kernel)}:\s+REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    instructions = parse_sass(text, function=compiled.kernel)
    opcodes = Counter(instruction.base for instruction in instructions)
    return KernelReport(
        kernel=compiled.kernel,
        target=compiled.target,
        triton_version=compiled.triton_version,
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
        registers=int(found[1]),
        spill_bytes=int(found[2]),
        local_loads=opcodes["LDL"],
        local_stores=opcodes["STL"],
        shared_memory_bytes=compiled.shared_memory_bytes,
        loops=find_loops(instructions, isa=SASS),
    )


def _inspect_hip(compiled: CompiledKernel) -> KernelReport:
    """Read the assembler text, and the metadata that it ends with."""
    text = compiled.assembly["amdgcn"]
    assert isinstance(text, str)

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found is not None, key
        return int(found[1])

    instructions = parse_amdgcn(text, function=compiled.kernel)
    return KernelReport(
        kernel=compiled.kernel,
        target=compiled.target,
        triton_version=compiled.triton_version,
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
        # Both files together, where a thread has accumulation registers.
        registers=value("vgpr_count"),
        accumulation_registers=value("agpr_count"),
        scalar_registers=value("sgpr_count"),
        spill_bytes=max(4 * value("vgpr_spill_count"), value("private_segment_fixed_size")),
        local_loads=sum(i.opcode.startswith("scratch_load") for i in instructions),
        local_stores=sum(i.opcode.startswith("scratch_store") for i in instructions),
        # Triton asks for the rest of what it uses at the launch.
        shared_memory_bytes=max(value("group_segment_fixed_size"), compiled.shared_memory_bytes),
        loops=find_loops(instructions, isa=AMDGCN),
    )


def _cuobjdump(option: str, path: Path) -> str:
    """Run the disassembler of Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    try:
        done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"exit status {error.returncode}"
        problem = Diagnostic(
            code="no-disassembler",
            headline=f"the disassembler of Triton's wheel cannot read the kernel: {reason}",
            rule="registers and loops are read by the `cuobjdump` that Triton brings along",
            hint="reinstall Triton; the kernel itself is not affected",
        )
        raise TargetError((problem,)) from error
    return done.stdout


def find_loops(instructions: Sequence[Instruction], *, isa: Isa) -> tuple[LoopReport, ...]:
    """Find the innermost loops, hottest first; those that only wait for a copy are left out."""
    reports: list[tuple[frozenset[int], LoopReport]] = []
    for first, body, held in loop_bodies(instructions):
        opcodes = Counter(i.base for i in held)
        waits = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in held)
        report = LoopReport(
            start=first.place,
            instructions=len(held),
            opcodes=dict(sorted(opcodes.items(), key=lambda item: (-item[1], item[0]))),
            serialised=waits >= opcodes["HGMMA"] > 2,
            isa=isa,
        )
        if opcodes["SYNCS"] and len(held) <= _WAIT_INSTRUCTIONS and not report.count("MMA"):
            continue
        reports.append((body, report))
    multiplying = [entry for entry in reports if entry[1].count("MMA")]
    chosen = multiplying or reports
    innermost = [report for body, report in chosen if not any(other < body for other, _ in chosen)]
    if multiplying:
        return tuple(sorted(innermost, key=lambda loop: loop.instructions))
    # A loop and its remainder, where a compiler has unrolled it, are not alike; one and its copy with masks are.
    most = max(map(_arithmetic, innermost), default=0)
    main = [loop for loop in innermost if most and 2 * _arithmetic(loop) > most]
    rest = [loop for loop in innermost if loop not in main]
    return (*sorted(main, key=lambda x: x.instructions), *sorted(rest, key=lambda x: -x.instructions))


def _arithmetic(loop: LoopReport) -> int:
    """Instructions that compute values, as masks and addresses do not."""
    return loop.pipes[FP32] + loop.pipes[SPECIAL] + loop.count("FMNMX")
