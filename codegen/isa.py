"""The machine languages that kernels end in: how their text is read, and the pipe that takes each instruction.

A language is data. Columns of a report have one set of names, those of NVIDIA's opcodes; what belongs to each is said
by a pattern over the opcodes of either language.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from einsumcascade.schedules.demands import ALU, FP32, SHUFFLE, SPECIAL, TENSOR

ACCESS, OTHER = "access", "other"
# Columns of a report: products of tiles; exponentials and the like; multiply-adds, products, sums, maxima of float32;
# conversions between floats; numbers handed from thread to thread; accesses to shared memory, to device memory; reads
# and writes of local memory.
CLASSES = ("MMA", "MUFU", "FFMA", "FMUL", "FADD", "FMNMX", "F2FP", "SHFL", "LDS", "LDG", "LDL", "STL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction of a kernel.

    Args:
        place: its address, or the label before it.
        opcode: as the text has it. base: without what selects a form of it.
        jump: index of the instruction that it may branch to.
        falls: the next one may follow it.
    """

    place: str
    opcode: str
    base: str
    jump: int | None = None
    falls: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Isa:
    """A machine language as a report counts it.

    Args:
        classes: by column, the opcodes that belong to it; one that does two things may belong to two.
        pipes: by pipe of a multiprocessor, the opcodes that it takes, each of one pipe; uniform and control
            instructions are of none.
        double: opcodes that do the work of two.
        beside: pipes whose instructions are issued beside those of the others, in the same clock.
    """

    classes: Mapping[str, re.Pattern[str]]
    pipes: Mapping[str, re.Pattern[str]]
    double: re.Pattern[str]
    beside: frozenset[str] = frozenset()


_MMA = re.compile(r"(HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA|OMMA|DMMA|UTC\w*MMA)")
SASS = Isa(
    classes={
        "MMA": _MMA,
        "MUFU": re.compile(r"MUFU"),
        "FFMA": re.compile(r"FFMA2?"),
        "FMUL": re.compile(r"FMUL2?"),
        "FADD": re.compile(r"FADD2?"),
        "FMNMX": re.compile(r"FMNMX3?"),
        "F2FP": re.compile(r"F2FP|F2F"),
        "SHFL": re.compile(r"SHFL"),
        "LDS": re.compile(r"LDSM?|STSM?|ATOMS"),
        "LDG": re.compile(r"LDG|STG|LDGSTS|ATOMG?|REDG?|UTMA(?!CMDFLUSH)\w+"),
        "LDL": re.compile(r"LDL"),
        "STL": re.compile(r"STL"),
    },
    pipes={
        TENSOR: _MMA,
        SPECIAL: re.compile(r"MUFU"),
        FP32: re.compile(r"F(FMA|MUL|ADD)2?|IMAD|HFMA2|HADD2|HMUL2"),
        ALU: re.compile(
            r"FMNMX3?|FSETP?|FSEL|F2FP|F2F|F2I|I2F|I2FP|FRND|V?IADD3?|VIMNMX3?|IMNMX|ISETP|ISCADD|LEA|LOP3|SHF|SEL|PRMT"
            r"|MOV|SGXT|BMSK|PLOP3|P2R|R2P|IABS|HMNMX2|HSETP2|POPC|FLO"
        ),
        SHUFFLE: re.compile(r"SHFL"),
        ACCESS: re.compile(r"LD[SGLTC]?|LDSM|LDGSTS|LDTM|ST[SGLT]?|STSM|STTM|ATOM[SG]?|RED|REDG|UTMA\w+|SYNCS"),
    },
    # Packed pairs, and the maximum of three.
    double=re.compile(r"F(FMA|MUL|ADD)2|FMNMX3"),
)
_MATRIX = r"v_s?mf(ma|mac)_\w+"
_SPECIAL = r"v_(exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)(_legacy)?_f(16|32|64)(_dpp)?"
_FP32 = r"(v_fma|v_fmac|v_pk_fma|v_pk_mul|v_pk_add|v_mul|v_mul_legacy|v_add|v_sub|v_subrev)_f32(_dpp)?"
_FUSED = r"(v_fmamk|v_fmaak|v_div_fmas)_f32"
_SWAP = r"ds_b?permute\w*|ds_swizzle\w*"
_MEMORY = r"(global|buffer|flat)_(load|store|atomic)\w*"
AMDGCN = Isa(
    classes={
        "MMA": re.compile(_MATRIX),
        "MUFU": re.compile(_SPECIAL),
        "FFMA": re.compile(rf"v_(pk_)?fmac?_f32(_dpp)?|{_FUSED}"),
        "FMUL": re.compile(r"v_(pk_)?mul(_legacy)?_f32(_dpp)?"),
        "FADD": re.compile(r"v_(pk_)?(add|sub|subrev)_f32(_dpp)?"),
        "FMNMX": re.compile(r"v_(max|min|max3|min3|med3)_f32(_dpp)?"),
        "F2FP": re.compile(r"v_cvt_(pk\w*_|sr_)?(f|bf|fp)\d+_(f|bf|fp)\d+(_dpp)?"),
        "SHFL": re.compile(rf"{_SWAP}|\w+_dpp|v_permlane\w*"),
        "LDS": re.compile(r"ds_(?!b?permute|swizzle)\w+|(global|buffer)_load_lds_\w+"),
        "LDG": re.compile(_MEMORY),
        "LDL": re.compile(r"scratch_load\w*"),
        "STL": re.compile(r"scratch_store\w*"),
    },
    pipes={
        TENSOR: re.compile(_MATRIX),
        SPECIAL: re.compile(_SPECIAL),
        FP32: re.compile(rf"{_FP32}|{_FUSED}"),
        # One unit takes all vector instructions: what is none of the others is of whole numbers, tests and moves.
        ALU: re.compile(rf"(?!{_MATRIX}$|{_SPECIAL}$|{_FP32}$|{_FUSED}$)v_\w+"),
        # Through the paths of shared memory; where a vector instruction reads another lane (DPP) it is of its own pipe.
        SHUFFLE: re.compile(_SWAP),
        ACCESS: re.compile(rf"ds_(?!b?permute|swizzle)\w+|{_MEMORY}|scratch_\w+"),
    },
    double=re.compile(r"v_pk_(fma|mul|add)_f32|v_(max3|min3|med3)_f32"),
    # In a clock one vector instruction is issued, and one each for scalars, shared memory, device memory and branches
    # (ROCm Compute Profiler, pipeline descriptions).
    beside=frozenset((SHUFFLE, ACCESS, OTHER)),
)

_SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_SASS_ENDS = ("BRX", "JMX", "JMP", "RET", "EXIT", "BRA")


def parse_sass(text: str, *, function: str) -> tuple[Instruction, ...]:
    """Read the instructions of `function` from the output of `cuobjdump -sass`."""
    sections = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    lines = list(_SASS_LINE.finditer(dict(zip(sections[1::2], sections[2::2], strict=True))[function]))
    index = {int(m[1], 16): i for i, m in enumerate(lines)}
    found = []
    for m in lines:
        base, operands = m[3].split(".")[0], m[4].strip()
        jump = re.search(r"0x([0-9a-f]+)\s*$", operands) if base == "BRA" else None
        predicated = m[2] is not None and "!PT" not in m[2]
        # A branch with a second operand tests it: a uniform predicate, or divergence.
        falls = base not in _SASS_ENDS or predicated or "," in operands
        target = index.get(int(jump[1], 16)) if jump is not None else None
        found.append(
            Instruction(place=f"{int(m[1], 16):#08x}", opcode=m[3], base=base, jump=target, falls=falls),
        )
    return tuple(found)


_GCN_LINE = re.compile(r"^(?:([.\w$]+):|\t([a-z]\w+)(?:[ \t]+([^;\n]*))?)", re.MULTILINE)


def parse_amdgcn(text: str, *, function: str) -> tuple[Instruction, ...]:
    """Read the instructions of `function` from the assembler text of an AMD target, with the labels of its branches."""
    begin = re.search(rf"^{re.escape(function)}:", text, re.MULTILINE)
    assert begin is not None, function
    body = text[begin.end() : text.index("\n.Lfunc_end", begin.end())]
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str]] = []
    place = ""
    for label, opcode, operands in (m.groups(default="") for m in _GCN_LINE.finditer(body)):
        if label:
            labels[label] = len(lines)
            place = label if label.startswith(".LBB") else place
        else:
            lines.append((place, opcode, operands.strip()))
            place = ""
    found = []
    far = ""
    for place, opcode, operands in lines:
        # A branch that is too long for its field adds the distance to the address of the program.
        distance = re.search(r"\((\.LBB\w+)-\.Lpost_getpc", operands)
        far = distance[1] if distance is not None else far
        conditional = opcode.startswith("s_cbranch_")
        to = operands if conditional or opcode == "s_branch" else far if opcode == "s_setpc_b64" else ""
        jump = labels.get(to)
        found.append(
            Instruction(
                place=place,
                opcode=opcode,
                base=re.sub(r"_(e32|e64|sdwa)(?=_dpp$|$)", "", opcode),
                jump=jump if jump is not None and jump < len(lines) else None,
                falls=conditional or not opcode.startswith(("s_branch", "s_setpc", "s_endpgm")),
            )
        )
    return tuple(found)
