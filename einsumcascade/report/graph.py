"""The dataflow graph of a cascade, cut into the loops over one rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from einsumcascade.analysis.dependence import axes, partitions, reads_of
from einsumcascade.analysis.passes import PassCount
from einsumcascade.analysis.plans import Boundary
from einsumcascade.analysis.report import Analysis
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Read,
    Statement,
    rank_of,
    subexpressions,
    variable_of,
    variables,
)
from einsumcascade.language.printer import print_expr

_WORDS = {"sum": "Σ", "prod": "Π", "+": "add", "-": "subtract", "*": "multiply", "/": "divide"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A tensor of the graph.

    Args:
        name: its name; a generation that an iteration took over from its step before has an `@` in front.
        kind: an input, an Einsum, or such an earlier generation.
        indices: index expressions as text.
        does: what its Einsum does, in a few words: `Σ over e`, `exp`; or what else it is.
        text: its statement.
        line: where that stands in the source, 0 where there is none.
        level: number of the loop over the rank that it stands in, or at whose end it is known.
        is_output: whether it leaves the cascade.
        iterates: the variable of the iteration in whose steps it is written, else empty.
    """

    name: str
    kind: Literal["input", "einsum", "earlier"]
    indices: tuple[str, ...]
    does: str
    text: str
    line: int
    level: int
    is_output: bool = False
    iterates: str = ""

    @property
    def tensor(self) -> str:
        """The name of the tensor."""
        return self.name.removeprefix("@")


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A tensor that is known before a boundary and read after it.

    Args:
        boundary: number of the loop before it, as drawn.
        name: of the node.
        elements: how many a row of it holds, where these grow with the rank; else empty.
        role: "held" if it grows with the rank and is of the least set that must be kept or read again; "grows" if it
            grows and is not known to be of that set; "value" if it does not grow.
        is_input: whether it is an input, read again rather than kept.
    """

    boundary: int
    name: str
    elements: str
    role: Literal["held", "grows", "value"]
    is_input: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop over the rank, and the barrier that it ends at.

    Args:
        level: the number that the analysis gives it, which is that of its barrier too. Steps of an iteration that
            traverse the rank anew have numbers of their own there, but are drawn once.
        waits: who waits, and for whom, between this loop and the one drawn after it.
        steps: names of the ranks whose every step runs it.
    """

    level: int
    waits: tuple[tuple[str, str], ...]
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Nodes in the order of the cascade, edges from what is read to what reads it.

    Args:
        rank: the rank whose loops cut the graph.
        loops: in order.
        nodes: inputs, then what is computed. edges: pairs of names; none goes to a lower level.
        crossings: what crosses each boundary.
    """

    rank: str
    loops: tuple[Loop, ...]
    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]
    crossings: tuple[Crossing, ...]

    @property
    def levels(self) -> int:
        """The number of loops."""
        return len(self.loops)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "rank": self.rank,
            "loops": [
                {"level": x.level, "waits": [list(w) for w in x.waits], "steps": list(x.steps)} for x in self.loops
            ],
            "nodes": [
                {
                    "name": n.name,
                    "kind": n.kind,
                    "indices": list(n.indices),
                    "text": n.text,
                    "level": n.level,
                    "is_output": n.is_output,
                    "iterates": n.iterates,
                }
                for n in self.nodes
            ],
            "edges": [list(e) for e in self.edges],
            "crossings": [
                {"boundary": c.boundary, "name": c.name, "elements": c.elements, "role": c.role} for c in self.crossings
            ],
        }


def busiest_rank(cascade: Cascade, analysis: Analysis) -> str:
    """Return the rank with the most passes, then levels; of equals a length, then the one that is reduced most.

    A cascade of scalars has no rank, and gives an empty name.
    """
    features = feature_ranks(cascade)

    def reduced(rank: str) -> int:
        names = {rank, *analysis.by_rank[rank].parts}
        return sum(any(rank_of(v) in names for v in e.ranks) for e in cascade.einsums)

    def weight(rank: str) -> tuple[int, int, bool, int]:
        return analysis.passes[rank], analysis.levels[rank], rank not in features, reduced(rank)

    return max(analysis.by_rank, key=weight, default="")


def build_graph(cascade: Cascade, analysis: Analysis) -> Graph:
    """Build the graph of a cascade and put each tensor into a loop over the busiest rank.

    What traverses the rank stands in the loop that the analysis gives it, what does not in that of the latest tensor
    it reads, and an input in that of its first reader. So an edge that crosses a boundary always goes to a later loop.

    Args:
        cascade: a checked cascade.
        analysis: its analysis.

    Cost: O(Einsums + accesses).
    """
    rank = busiest_rank(cascade, analysis)
    count = analysis.by_rank.get(rank) or PassCount(rank="", passes=0, levels=1, families={}, level_of={})
    boundaries = analysis.footprints.get(rank, ())
    read_by: dict[str, dict[str, None]] = {}
    # A first generation stands for a tensor that has no other.
    written = {e.tensor for e in cascade.einsums}
    writers = {s.tensor: (n, around, s) for n, (around, s) in enumerate(_steps(cascade.body)) if _writes(s, written)}
    statements = {t: s for t, (_, _, s) in writers.items()}
    iterates = {t: around[-1][1] if around else "" for t, (_, around, _) in writers.items()}
    carried: dict[str, Read] = {}
    for n, (around, s) in enumerate(_steps(cascade.body)):
        found = read_by.setdefault(s.tensor, {})
        for r in reads_of(cascade, s):
            if r.tensor == s.tensor:
                continue
            at, inside, writer = writers.get(r.tensor, (-1, (), s))
            # An element of an earlier step: written further down, or at another place of the same iteration.
            together = takewhile(lambda pair: pair[0] == pair[1], zip(around, inside, strict=False))
            if at > n or any(_places(r, writer, v) for (_, v), _ in together):
                carried.setdefault(r.tensor, r)
                found["@" + r.tensor] = None
            else:
                found[r.tensor] = None
    # An input that nothing reads is an output as it stands, or is left out.
    inputs = [i.tensor for i in cascade.inputs]
    used = {t for found in read_by.values() for t in found}
    given = [t for t in inputs if t in used or t in cascade.output_names]
    known = _levels(statements, read_by, count.level_of, [*given, *(f"@{t}" for t in carried)])
    numbers = sorted(set(known.values()))
    level = {t: numbers.index(n) + 1 for t, n in known.items()}
    declared = {i.tensor: i for i in cascade.inputs}
    nodes = [
        Node(
            name=t,
            kind="input",
            indices=declared[t].indices,
            does="input",
            text=f"in {Read(tensor=t)}[{', '.join(declared[t].indices)}]" if declared[t].indices else f"in {t}",
            line=_line(cascade, declared[t]),
            level=level[t],
            is_output=t in cascade.output_names,
        )
        for t in given
    ]
    for t, r in carried.items():
        node = _node(cascade, statements[t], level[f"@{t}"], iterates[t])
        name, indices = f"@{t}", _texts(r.indices)
        nodes.append(replace(node, name=name, kind="earlier", indices=indices, does="step before", is_output=False))
    nodes += [_node(cascade, s, level[t], iterates[t]) for t, s in statements.items()]
    edges = tuple((source, t) for t, found in read_by.items() if t in statements for source in found)
    return Graph(
        rank=count.rank,
        loops=tuple(_loop(k, numbers, known, iterates, count) for k in range(len(numbers))),
        nodes=tuple(nodes),
        edges=edges,
        crossings=_crossings(
            level, edges, [_found(boundaries, n) for n in numbers[:-1]], given, _whole(cascade, count)
        ),
    )


def _loop(
    index: int, numbers: Sequence[int], level: Mapping[str, int], iterates: Mapping[str, str], count: PassCount
) -> Loop:
    here, following = numbers[index], numbers[index + 1 : index + 2]
    again = [r for r, _ in count.level_per_step]
    inside = [rank_of(v) for t, v in iterates.items() if v and count.level_of.get(t) == here]
    # A barrier before an Einsum that stands in no later loop is one between two steps.
    between = [b.reader for b in count.level_barriers if level[b.reader] == here != b.boundary + 1]
    turned = [rank_of(iterates[t]) for t in between if iterates[t]]
    return Loop(
        level=here,
        waits=tuple(
            dict.fromkeys((b.reader, b.producer) for b in count.level_barriers if [level[b.reader]] == following)
        ),
        steps=tuple(dict.fromkeys([r for r in again if r in inside] + turned)),
    )


def _found(boundaries: Sequence[Boundary], number: int) -> Boundary | None:
    return next((b for b in boundaries if b.number == number), None)


# The iterations around a statement, outermost first: the number of the block and its variable.
_Around = tuple[tuple[int, str], ...]


def _steps(body: tuple[Statement, ...], around: _Around = ()) -> list[tuple[_Around, Einsum | Init]]:
    """Every statement with the iterations around it."""
    out: list[tuple[_Around, Einsum | Init]] = []
    for number, s in enumerate(body):
        if isinstance(s, Iter):
            out += _steps(s.body, (*around, (number, s.var)))
        else:
            out.append((around, s))
    return out


def _writes(s: Einsum | Init, written: Collection[str]) -> bool:
    return isinstance(s, Einsum) or s.tensor not in written


def _places(r: Read, writer: Einsum | Init, variable: str) -> bool:
    """Whether a read takes another place along an iteration than the one that is written."""
    return any(
        variable in variables(there) and here != there for here, there in zip(r.indices, writer.indices, strict=True)
    )


def _levels(
    statements: Mapping[str, Einsum | Init],
    read_by: Mapping[str, Mapping[str, None]],
    known: Mapping[str, int],
    sources: list[str],
) -> dict[str, int]:
    level = dict.fromkeys(sources, 0)
    for t in statements:
        level[t] = max([known.get(t, 0), *(level.get(s, 0) for s in read_by[t])])
    # What needs no loop stands where it is first read: backwards, for its readers may need none either.
    for t in [*reversed(list(statements)), *sources]:
        if not level[t]:
            level[t] = min((level[r] for r, found in read_by.items() if t in found and r in level), default=1) or 1
    return level


def _node(cascade: Cascade, s: Einsum | Init, level: int, variable: str) -> Node:
    return Node(
        name=s.tensor,
        kind="einsum",
        indices=_texts(s.indices),
        does=_does(s),
        text=str(s),
        line=_line(cascade, s),
        level=level,
        is_output=s.tensor in cascade.output_names,
        iterates=variable,
    )


def _texts(indices: Sequence[Expr]) -> tuple[str, ...]:
    return tuple(print_expr(i).replace(" ", "") for i in indices)


def _does(s: Einsum | Init) -> str:
    """What an Einsum does: its reduction, else its outermost operator, then the functions inside."""
    functions = [e.op for e in subexpressions(s.expr) if isinstance(e, Apply) and not e.row.symbol]
    if isinstance(s, Einsum) and s.reduce:
        head = f"{_WORDS.get(s.reduce, s.reduce)} over {','.join(s.ranks)}"
    elif isinstance(s.expr, Apply):
        head = _WORDS.get(s.expr.row.symbol, s.expr.row.symbol) or s.expr.op
    else:
        head = "copy"
    parts = list(dict.fromkeys([head, *functions]))
    return " ".join(parts[:3]) + (" …" if len(parts) > 3 else "")


def _line(cascade: Cascade, s: object) -> int:
    span = getattr(s, "span", None)
    return span.line if cascade.source is not None and span is not None else 0


def _whole(cascade: Cascade, count: PassCount) -> set[str]:
    """Tensors that carry the whole rank."""
    if not count.rank:
        return set()
    part = partitions(cascade)[variable_of(count.rank)]
    return {t for t, shape in axes(cascade).items() if part.has_all(tuple(v for v in shape if v))}


def _crossings(
    level: Mapping[str, int],
    edges: tuple[tuple[str, str], ...],
    boundaries: Sequence[Boundary | None],
    inputs: Sequence[str],
    whole: Collection[str],
) -> tuple[Crossing, ...]:
    out = []
    for number, b in enumerate(boundaries, start=1):
        live = {x.tensor: x for x in b.live} if b is not None else {}
        held = [h.tensor for h in b.plan.held] if b is not None else []
        for name in dict.fromkeys(s for s, t in edges if level[s] <= number < level[t]):
            # The boundary after a loop that steps repeat has no footprint: what carries the rank grows.
            unknown = b is None or name.startswith("@")
            grows = live[name].is_fiber if name in live else unknown and name.removeprefix("@") in whole
            role: Literal["held", "grows", "value"] = "value" if not grows else "held" if name in held else "grows"
            elements = str(live[name].elements).replace("*", "×") if grows and name in live else ""
            out.append(Crossing(boundary=number, name=name, elements=elements, role=role, is_input=name in inputs))
    return tuple(out)
