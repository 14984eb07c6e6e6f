"""Count the operations and the least traffic of a cascade, as polynomials of its extents.

The counts are those of the cascade as written, every point of each iteration space: points that a constraint culls
are subtracted by `live_operations` alone, which needs numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from einsumcascade.analysis.dependence import axes, dependencies
from einsumcascade.analysis.operations import CLASSES, CONTRACTION, FUNCTION, KINDS, SPECIAL, Operations, operations_of
from einsumcascade.analysis.polynomial import ONE, ZERO, Count, number, volume
from einsumcascade.errors import InputError, nearest
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Num,
    Read,
    Scalar,
    rank_of,
    variables,
    walk,
)

__all__ = [
    "CLASSES",
    "CONTRACTION",
    "DTYPE_BYTES",
    "FUNCTION",
    "INDEX_DTYPE",
    "KINDS",
    "ONE",
    "SPECIAL",
    "Count",
    "Counts",
    "Operations",
    "TensorTraffic",
    "count_operations",
    "dtype_bytes",
    "element_bytes",
    "elements",
    "evaluate_extents",
    "index_tensors",
    "number",
    "operations_of",
    "volume",
]

DTYPE_BYTES: Final[Mapping[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Definition T2: tensors of positions hold integers of four bytes.
INDEX_DTYPE: Final = "int32"
INDEX_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTraffic:
    """What one tensor must move between memory and chip.

    Args:
        tensor: its name.
        is_output: written, not read.
        elements: how many it has.
        dtype: of an element, `int32` for positions.
    """

    tensor: str
    is_output: bool
    elements: Count
    dtype: str

    @property
    def element_bytes(self) -> int:
        """Bytes of an element."""
        return element_bytes(self.dtype)

    @property
    def bytes(self) -> Count:
        """Bytes of the whole tensor."""
        return self.elements * number(self.element_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Operations of a whole cascade and the elements that any kernel for it must move.

    Args:
        einsums: operations of each Einsum, in cascade order.
        inputs: (tensor, elements that are read) of each input.
        outputs: (tensor, elements, dtype or None for that of the first input) of each output.
        indices: names of the tensors that hold positions.
    """

    einsums: tuple[Operations, ...]
    inputs: tuple[tuple[str, Count], ...]
    outputs: tuple[tuple[str, Count, str | None], ...]
    indices: tuple[str, ...] = ()

    def total(self, kind: str) -> Count:
        """Return the sum over all Einsums of one of `KINDS`."""
        out = ZERO
        for e in self.einsums:
            out += e.of(kind)
        return out

    def traffic(self, *, dtype: str) -> tuple[TensorTraffic, ...]:
        """Return what each tensor must move at least, inputs first.

        Each tensor moves once, whole: Definition T1 of docs/analysis.md; dtypes are those of Definitions T2 and T3.

        Raises: InputError: `unknown-dtype`: `dtype` is none of float16, bfloat16, float32, float64.
        """
        dtype_bytes(dtype)

        def own(tensor: str, named: str | None) -> str:
            return named or (INDEX_DTYPE if tensor in self.indices else dtype)

        read = [TensorTraffic(tensor=t, is_output=False, elements=n, dtype=own(t, None)) for t, n in self.inputs]
        written = [TensorTraffic(tensor=t, is_output=True, elements=n, dtype=own(t, d)) for t, n, d in self.outputs]
        return (*read, *written)

    def bytes(self, *, dtype: str) -> Count:
        """Return the least traffic in bytes, over all tensors of `traffic`.

        Raises: InputError: `unknown-dtype`: `dtype` is none of float16, bfloat16, float32, float64.
        """
        out = ZERO
        for t in self.traffic(dtype=dtype):
            out += t.bytes
        return out

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, counts as text."""
        return {
            "einsums": [{"tensor": e.tensor, **e.to_dict()} for e in self.einsums],
            "total": {c: str(n) for c in CLASSES if (n := self.total(c))},
            "inputs": {t: str(n) for t, n in self.inputs},
            "outputs": {t: str(n) for t, n, _ in self.outputs},
        }


def dtype_bytes(dtype: str, *, known: tuple[str, ...] = tuple(DTYPE_BYTES)) -> int:
    """Return the bytes of an element of a floating dtype.

    Raises: InputError: `unknown-dtype`: it is none of `known`; the message has the nearest.

    >>> dtype_bytes("bfloat16")
    2
    """
    if dtype not in known:
        raise InputError.of(
            "unknown-dtype", f"'{dtype}' is no dtype", rule="counts know floating dtypes", hint=nearest(dtype, known)
        )
    return DTYPE_BYTES[dtype]


def element_bytes(dtype: str) -> int:
    """Return the bytes of an element of a tensor: a dtype of `DTYPE_BYTES`, or that of positions."""
    return INDEX_BYTES if dtype == INDEX_DTYPE else DTYPE_BYTES[dtype]


def count_operations(cascade: Cascade) -> Counts:
    """Count the operations of each Einsum and the elements of inputs and outputs.

    Index expressions and conditions are not counted; culled points are not subtracted. An Einsum of an iterative block
    is counted for every step, since it has the iterative variable; see Definitions O1 to O8 of docs/analysis.md.

    Returns: polynomials of the extents, parts of a partition under their own names (M1*M0, not M).
    Cost: linear in the cascade.   Source: FuseMax (MICRO 2024), section III.

    >>> from einsumcascade.language.parser import parse
    >>> str(count_operations(parse("in A[m, k], B[k, n]\\nC[m, n] = A[m, k] * B[k, n]\\nout C")).total("multiply_add"))
    'K*M*N'
    """
    shape = axes(cascade)
    einsums = [operations_of(s) for s in walk(cascade.body) if isinstance(s, Einsum | Init)]
    read = {t for tensors in dependencies(cascade).values() for t in tensors} | set(cascade.output_names)
    positions = (*index_tensors(cascade), *(e.tensor for e in cascade.einsums if e.reduce == "topk"))
    return Counts(
        # A first generation that is given costs nothing and has no row.
        einsums=tuple(e for e in einsums if not e.tensor.startswith("init ") or any(e.of(c) for c in CLASSES)),
        # An input that gives an extent alone is not read.
        inputs=tuple((i.tensor, volume(i.indices) if i.tensor in read else ZERO) for i in cascade.inputs),
        outputs=tuple((o.tensor, elements(cascade, o.tensor, shape=shape), o.dtype) for o in cascade.outputs),
        indices=positions,
    )


def index_tensors(cascade: Cascade) -> tuple[str, ...]:
    """Return the inputs that nothing is computed with: page tables, lengths, document numbers.

    They stand only in index expressions and conditions (Definition T2 of docs/analysis.md), or count, as a seed does,
    or stand nowhere and give an extent alone.
    """
    values = {t for s in walk(cascade.body) if isinstance(s, Einsum | Init) for t in _value_reads(s.expr)}
    return tuple(i.tensor for i in cascade.inputs if i.tensor not in values)


def _value_reads(expr: Expr) -> Iterator[str]:
    match expr:
        case Read(tensor=tensor):
            yield tensor
        case Apply() if not expr.row.condition and not expr.row.counts:
            for a in expr.args:
                yield from _value_reads(a)
        case _:
            pass


def elements(cascade: Cascade, tensor: str, *, shape: Mapping[str, tuple[str | None, ...]] | None = None) -> Count:
    """Return the number of elements of a tensor; an iterative tensor has one generation more than steps."""
    out = volume(tuple(v for v in (shape or axes(cascade))[tensor] if v))
    writer = next((e for e in cascade.einsums if e.tensor == tensor), None)
    for index in writer.indices if writer else ():
        match index:
            case Apply(op="add", args=(_, Num(value=int(step)))):
                kept = tuple(v for v in writer.free if v not in variables(index)) if writer else ()
                out += volume(kept) * number(step)
            case _:
                pass
    return out


def evaluate_extents(cascade: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """Complete given extents with those that `rank` statements define from them.

    Args:
        cascade: a checked cascade.
        extents: numbers by rank, upper case; a given number wins over a definition.

    Returns: every extent that has a whole value, in order of first appearance; the others are absent.
    Cost: linear in the definitions.
    """
    constants = {c.name: c.expr for c in cascade.constants}
    defined = {rank_of(r.name): r.expr for r in cascade.ranks}

    def value(expr: Expr, depth: int) -> float | None:
        match expr:
            case Num(value=v):
                return v
            case Scalar(name=name):
                if name in extents:
                    return extents[name]
                inner = defined.get(name, constants.get(name))
                # A definition in terms of itself has no value.
                return value(inner, depth + 1) if inner is not None and depth < 64 else None
            case Apply(args=args):
                return _folded(expr, [value(a, depth) for a in args])
            case _:
                return None

    names = dict.fromkeys([rank_of(v) for i in cascade.inputs for v in i.indices] + list(defined) + list(extents))
    out = {}
    for n in names:
        found = value(Scalar(name=n), 0)
        if found is not None and math.isfinite(found) and found == int(found):
            out[n] = int(found)
    return out


def _folded(expr: Apply, args: list[float | None]) -> float | None:
    if any(a is None for a in args):
        return None
    x, *rest = [a for a in args if a is not None]
    try:
        match expr.op:
            case "add":
                return x + rest[0]
            case "sub":
                return x - rest[0]
            case "neg":
                return -x
            case "mul":
                return x * rest[0]
            case "div":
                return x / rest[0]
            case "floordiv":
                return x // rest[0]
            case "mod":
                return x % rest[0]
            case "max":
                return max(x, rest[0])
            case "min":
                return min(x, rest[0])
            case "ceil":
                return math.ceil(x)
            case "floor":
                return math.floor(x)
            case _:
                return None
    except (ZeroDivisionError, OverflowError):
        return None
