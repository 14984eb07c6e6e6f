"""Read a compiled kernel back: registers, spills and what its hot loop executes.

The tools that do this ship inside Triton's wheel, so no GPU and no CUDA installation is needed.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.build import CompiledKernel
from einsumcascade.errors import Diagnostic, TargetError
from einsumcascade.schedules.demands import ALU, FP32, SHUFFLE, SPECIAL, TENSOR

ACCESS, OTHER = "access", "other"
# Columns of a report, by the opcodes that belong to each.
CLASSES: Mapping[str, re.Pattern[str]] = {
    "MMA": re.compile(r"(HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA|OMMA|DMMA|UTC\w*MMA)"),
    "MUFU": re.compile(r"MUFU"),
    "FFMA": re.compile(r"FFMA2?"),
    "FMUL": re.compile(r"FMUL2?"),
    "FADD": re.compile(r"FADD2?"),
    "FMNMX": re.compile(r"FMNMX3?"),
    "F2FP": re.compile(r"F2FP|F2F"),
    "SHFL": re.compile(r"SHFL"),
    "LDL": re.compile(r"LDL"),
    "STL": re.compile(r"STL"),
}
# Pipes of a multiprocessor by the opcodes that they take; uniform and control instructions take nothing but a turn.
PIPES: Mapping[str, re.Pattern[str]] = {
    TENSOR: CLASSES["MMA"],
    SPECIAL: CLASSES["MUFU"],
    FP32: re.compile(r"F(FMA|MUL|ADD)2?|IMAD|HFMA2|HADD2|HMUL2"),
    ALU: re.compile(
        r"FMNMX3?|FSETP?|FSEL|F2FP|F2F|F2I|I2F|I2FP|FRND|V?IADD3?|VIMNMX3?|IMNMX|ISETP|ISCADD|LEA|LOP3|SHF|SEL|PRMT|MOV"
        r"|SGXT|BMSK|PLOP3|P2R|R2P|IABS|HMNMX2|HSETP2|POPC|FLO"
    ),
    SHUFFLE: CLASSES["SHFL"],
    ACCESS: re.compile(r"LD[SGLTC]?|LDSM|LDGSTS|LDTM|ST[SGLT]?|STSM|STTM|ATOM[SG]?|RED|REDG|UTMA\w+|SYNCS"),
}
# Opcodes that do the work of two: packed pairs, and the maximum of three.
_DOUBLE = re.compile(r"F(FMA|MUL|ADD)2|FMNMX3")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
# The longest loop that does nothing but wait for a copy.
_WAIT_INSTRUCTIONS = 8
_ENDS = ("BRX", "JMX", "JMP", "RET", "EXIT", "BRA")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Instruction:
    address: int
    predicated: bool
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True, kw_only=True)
class LoopReport:
    """What one iteration of a loop holds, per thread.

    Args:
        start: address of its first instruction, in bytes.
        instructions: all of them, on every path of the body.
        opcodes: instructions by opcode without its suffixes, most frequent first.
        serialised: every asynchronous product is awaited before the next is issued. ptxas does so when other code
            writes accumulators while products are under way; the tensor cores then idle.
    """

    start: int
    instructions: int
    opcodes: Mapping[str, int]
    serialised: bool

    def count(self, name: str) -> int:
        """Return the instructions of the class `name`, a key of `CLASSES`."""
        return sum(n for opcode, n in self.opcodes.items() if CLASSES[name].fullmatch(opcode))

    def operations(self, name: str) -> int:
        """Return the operations of the class `name`: a packed pair, or a maximum of three, counts as two."""
        return sum(
            n * (2 if _DOUBLE.fullmatch(opcode) else 1)
            for opcode, n in self.opcodes.items()
            if CLASSES[name].fullmatch(opcode)
        )

    @property
    def pipes(self) -> dict[str, int]:
        """Instructions by the pipe that takes them; `other` are uniform ones, branches and barriers."""
        found = {name: sum(n for o, n in self.opcodes.items() if p.fullmatch(o)) for name, p in PIPES.items()}
        return {**found, OTHER: self.instructions - sum(found.values())}

    def to_dict(self) -> dict[str, object]:
        """Return the report as values that JSON knows."""
        return {
            "start": self.start,
            "instructions": self.instructions,
            "serialised": self.serialised,
            "classes": {name: self.count(name) for name in CLASSES},
            "pipes": self.pipes,
            "opcodes": dict(self.opcodes),
        }


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """Resources of a kernel and, for NVIDIA targets, its loops.

    Args:
        kernel: name of the function.
        target: what it was compiled for.
        triton_version: of the compiler.
        num_warps: warps of a program.
        num_stages: buffers of a software pipeline.
        registers: of a thread.
        spill_bytes: local memory of a thread (its stack); registers that did not fit lie there.
        local_loads: instructions of the kernel that read local memory; None where there is no disassembler.
        local_stores: those that write it.
        shared_memory_bytes: of a block.
        loops: innermost loops, hottest first: those with products by fewest instructions, so that the loop without
            masks precedes the one with them; in a kernel without products, by most instructions.
    """

    kernel: str
    target: GpuTarget
    triton_version: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    local_loads: int | None
    local_stores: int | None
    shared_memory_bytes: int
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
            "spill_bytes": self.spill_bytes,
            "local_loads": self.local_loads,
            "local_stores": self.local_stores,
            "shared_memory_bytes": self.shared_memory_bytes,
            "loops": [loop.to_dict() for loop in self.loops],
        }

    def __str__(self) -> str:
        lines = [
            f"{self.kernel} for {self.target.name}, {self.num_warps} warps, {self.num_stages} stages, "
            f"Triton {self.triton_version}",
            f"  registers {self.registers}, spilled {self.spill_bytes} bytes, "
            f"shared memory {self.shared_memory_bytes} bytes",
        ]
        if self.loops:
            lines.append("  " + "loop".ljust(10) + "".join(name.rjust(7) for name in (*CLASSES, "total")))
        for loop in self.loops:
            counts = [loop.count(name) for name in CLASSES]
            mark = "  products serialised" if loop.serialised else ""
            row = "".join(str(n).rjust(7) for n in (*counts, loop.instructions))
            lines.append(f"  {loop.start:#08x}".ljust(12) + row + mark)
        return "\n".join(lines)


def inspect_kernel(compiled: CompiledKernel) -> KernelReport:
    """Report the resources and the loops of a compiled kernel.

    Returns: the report. For HIP targets it holds no loops, and counts of local accesses are None.

    Raises:
        TargetError: `no-disassembler`: Triton's wheel holds no working `cuobjdump`.

    Cost: two runs of `cuobjdump`, some 0.1 s.
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
        loops=find_loops(instructions),
    )


def _inspect_hip(compiled: CompiledKernel) -> KernelReport:
    """Read the metadata that the AMD assembler text ends with."""
    text = compiled.assembly["amdgcn"]
    assert isinstance(text, str)

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found is not None, key
        return int(found[1])

    return KernelReport(
        kernel=compiled.kernel,
        target=compiled.target,
        triton_version=compiled.triton_version,
        num_warps=compiled.num_warps,
        num_stages=compiled.num_stages,
        registers=value("vgpr_count"),
        spill_bytes=max(4 * value("vgpr_spill_count"), value("private_segment_fixed_size")),
        local_loads=None,
        local_stores=None,
        # Triton asks for the rest of what it uses at the launch.
        shared_memory_bytes=max(value("group_segment_fixed_size"), compiled.shared_memory_bytes),
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


def parse_sass(text: str, *, function: str) -> tuple[_Instruction, ...]:
    """Read the instructions of `function` from the output of `cuobjdump -sass`."""
    sections = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    bodies = dict(zip(sections[1::2], sections[2::2], strict=True))
    return tuple(
        _Instruction(
            address=int(m[1], 16), predicated=m[2] is not None and "!PT" not in m[2], opcode=m[3], operands=m[4].strip()
        )
        for m in _INSTRUCTION.finditer(bodies[function])
    )


def find_loops(instructions: tuple[_Instruction, ...]) -> tuple[LoopReport, ...]:
    """Find the innermost loops, hottest first.

    A loop is an edge back to a block that dominates its source, with all that reaches the source: ptxas moves the
    branches that wait for a copy behind the kernel's end, so an interval of addresses says little. Those waits are
    loops themselves and are left out.
    """
    starts, successors = _blocks(instructions)
    ends = [*starts[1:], len(instructions)]
    reports: list[tuple[frozenset[int], LoopReport]] = []
    for header, body in _natural_loops(successors):
        held = [i for block in sorted(body) for i in instructions[starts[block] : ends[block]]]
        opcodes = Counter(i.base for i in held)
        waits = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in held)
        report = LoopReport(
            start=instructions[starts[header]].address,
            instructions=len(held),
            opcodes=dict(sorted(opcodes.items(), key=lambda item: (-item[1], item[0]))),
            serialised=waits >= opcodes["HGMMA"] > 2,
        )
        if opcodes["SYNCS"] and len(held) <= _WAIT_INSTRUCTIONS and not report.count("MMA"):
            continue
        reports.append((body, report))
    multiplying = [entry for entry in reports if entry[1].count("MMA")]
    chosen = multiplying or reports
    innermost = [report for body, report in chosen if not any(other < body for other, _ in chosen)]
    return tuple(sorted(innermost, key=lambda loop: loop.instructions if multiplying else -loop.instructions))


def _blocks(instructions: tuple[_Instruction, ...]) -> tuple[list[int], list[list[int]]]:
    """Cut the instructions into basic blocks: the index each starts at, and the blocks that may follow each."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    targets: dict[int, int] = {}
    leaders = {0}
    for i, instruction in enumerate(instructions):
        if instruction.base not in _ENDS:
            continue
        if i + 1 < len(instructions):
            leaders.add(i + 1)
        found = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands) if instruction.base == "BRA" else None
        if found is not None and int(found[1], 16) in index:
            targets[i] = index[int(found[1], 16)]
            leaders.add(targets[i])
    starts = sorted(leaders)
    block_of = {start: block for block, start in enumerate(starts)}
    successors: list[list[int]] = []
    for block, start in enumerate(starts):
        last = (starts[block + 1] if block + 1 < len(starts) else len(instructions)) - 1
        assert last >= start
        instruction = instructions[last]
        following = [block_of[targets[last]]] if last in targets else []
        # A branch with a second operand tests it: a uniform predicate, or divergence.
        conditional = instruction.predicated or "," in instruction.operands
        if (instruction.base not in _ENDS or conditional) and last + 1 < len(instructions):
            following.append(block_of[last + 1])
        successors.append(following)
    return starts, successors


def _natural_loops(successors: list[list[int]]) -> Iterable[tuple[int, frozenset[int]]]:
    """Yield header and body of every natural loop; loops of one header are one loop."""
    order = _postorder(successors)
    rank = {block: i for i, block in enumerate(order)}
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in successors[block]:
            predecessors[following].append(block)
    # Immediate dominators, by repeated intersection in reverse postorder.
    immediate = {0: 0}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            known = [p for p in predecessors[block] if p in immediate]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    if rank[best] < rank[other]:
                        best = immediate[best]
                    else:
                        other = immediate[other]
            if immediate.get(block) != best:
                immediate[block] = best
                changed = True
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            above = block
            while rank[above] < rank[header]:
                above = immediate[above]
            if above != header:
                continue
            body = bodies.setdefault(header, {header})
            pending = [block]
            while pending:
                inside = pending.pop()
                if inside not in body:
                    body.add(inside)
                    pending.extend(predecessors[inside])
    return [(header, frozenset(body)) for header, body in sorted(bodies.items())]


def _postorder(successors: list[list[int]]) -> list[int]:
    """List the blocks that the first one reaches, each after all that follow it but for edges back."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, following = stack[-1]
        for other in following:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(successors[other])))
                break
        else:
            order.append(block)
            stack.pop()
    return order
