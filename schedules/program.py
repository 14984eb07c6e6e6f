"""A program: a cascade as kernels in order and the buffers between them. Each kernel is a cascade itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from einsumcascade.errors import Diagnostic, LoweringError
from einsumcascade.language.ir import (
    Cascade,
    Expr,
    Read,
    Statement,
    Var,
    rank_of,
    scalars,
    subexpressions,
    variables,
)

# The widest head in use: keys of latent attention, 512 and 64.
WHOLE_LIMIT = 576


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Two residents that a kernel walks as one (schedules/pack.py).

    Args:
        variable: of the tile. group: how many values of the variable that joins it stand side by side.
        at: what each of the two is, over the tile's variable and that of the group.
        live: conditions under which an element within the tile's rank stands for something, none where all do.
        within: index expressions that are within a rank wherever an element stands for something.
        stored: variables of each output as it lies in memory.
    """

    variable: str
    group: Expr
    at: Mapping[str, Expr]
    live: tuple[Expr, ...]
    within: Mapping[Expr, str]
    stored: Mapping[str, tuple[str, ...]]

    def place(self, tensor: str) -> tuple[Expr, ...]:
        """Where an output is stored."""
        return tuple(self.at.get(v, Var(name=v)) for v in self.stored[tensor])


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of a program.

    Args:
        name: a name for its text.
        cascade: what it computes; its outputs are outputs of the program or buffers.
        residents: unbounded variables that its stores carry.
        loops: unbounded variables that it reduces, outermost first.
        scattered: outputs that programs add to, at indices of their own, with the variables of their axes.
        packed: residents that it walks as one.
    """

    name: str
    cascade: Cascade
    residents: tuple[str, ...]
    loops: tuple[str, ...]
    scattered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packed: Packing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Kernels in order.

    Args:
        cascade: the cascade they compute together.
        kernels: in an order in which every buffer is written before it is read.
        buffers: variables of each tensor that one kernel writes and a later one reads, float32.
        bounded: variables whose extent is fixed when the text is made.
    """

    cascade: Cascade
    kernels: tuple[Kernel, ...]
    buffers: Mapping[str, tuple[str, ...]]
    bounded: tuple[str, ...]

    def __str__(self) -> str:
        out = []
        for k in self.kernels:
            roles = f"resident {', '.join(k.residents) or '-'}; loop {', '.join(k.loops) or '-'}"
            out.append(f"kernel {k.name}  ({roles})\n{k.cascade}")
        return "\n\n".join(out)


def bounded_variables(cascade: Cascade, extents: Mapping[str, int], *, limit: int = WHOLE_LIMIT) -> tuple[str, ...]:
    """Variables whose extent the text of a kernel may fix: feature ranks and small defined ranks.

    A feature rank is the innermost axis of every input of two or more axes that has it, as `e` and `f` are in
    Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f]: memory is contiguous along it, so a tile holds all of it. A rank that is
    innermost in one input and not in another (k of A[i,k] B[k,j]) is a length; so is one whose variable is compared or
    counts as a number (m <= p), a rank that no Einsum iterates (a table that is only gathered from), and a feature rank
    longer than `limit`.
    """
    out = []
    compared = set(_numbers(cascade))
    iterated = {v for e in cascade.einsums for v in e.space}
    # The layout of what a forward has saved is ours, and says nothing about the caller's.
    matrices = [i for i in cascade.inputs if len(i.indices) > 1 and not i.is_saved]
    for v in dict.fromkeys(v for i in matrices for v in i.indices):
        innermost = all(i.indices[-1] == v for i in matrices if v in i.indices)
        if innermost and v in iterated and v not in compared and extents.get(rank_of(v), 0) <= limit:
            out.append(v)
    fixed = {rank_of(v) for v in out} | {c.name for c in cascade.constants}
    for d in cascade.ranks:
        if set(scalars(d.expr)) <= fixed and 0 < extents.get(rank_of(d.name), 0) <= limit:
            if not _is_batch(d.name, cascade, (*out, *(x.name for x in cascade.ranks))):
                out.append(d.name)
            fixed.add(rank_of(d.name))
    return tuple(out)


def _is_batch(variable: str, cascade: Cascade, short: tuple[str, ...]) -> bool:
    """Whether an output has a rank, and so has each of the largest tensors: programs of its elements share none."""
    outputs = set(cascade.output_names)
    if not any(variable in e.free for e in cascade.einsums if e.tensor in outputs):
        return False
    lengths = {e.tensor: len(set(e.free) - set(short)) for e in cascade.einsums}
    most = max(lengths.values())
    return most > 1 and all(variable in e.free for e in cascade.einsums if lengths[e.tensor] == most)


def _numbers(cascade: Cascade) -> Iterator[str]:
    """Rank variables that a constraint compares or an expression takes as a number, not as an index."""
    yield from variables(*cascade.constraints)
    for e in cascade.einsums:
        yield from variables(*e.where)
        indices = {
            id(x) for r in subexpressions(e.expr) if isinstance(r, Read) for i in r.indices for x in subexpressions(i)
        }
        yield from (x.name for x in subexpressions(e.expr) if isinstance(x, Var) and id(x) not in indices)


def identifier(name: str) -> str:
    """A name as a Python identifier: what a file is called never becomes code."""
    clean = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    return clean if clean[:1].isalpha() else "k_" + clean


def not_lowered(s: Statement, what: str) -> LoweringError:
    return LoweringError(
        diagnostics=(
            Diagnostic(
                code="not-lowered-yet",
                headline=f"{what} has no lowering yet",
                span=s.span,
                rule="reference, analysis and derivation work all the same",
            ),
        )
    )
