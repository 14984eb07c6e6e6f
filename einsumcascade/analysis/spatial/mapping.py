"""Mappings as data: on which array each Einsum of a cascade runs, over which tiles, in which order, and what is kept.

A mapping file is TOML:

    cascade = "softmax_attention"  # a name of the gallery, or a .cascade file, its path from the folder of this file
    target = "fusemax"             # a target of the package, or the path of a .toml file
    folded = ["scale"]             # constants that inputs already carry: factors that cost nothing
    [extents]                      # ranks that the mapping decides: products of numbers, extents, array dimensions
    M0 = "2d.rows"

    [[plan]]                       # the first plan whose kept tensors fit the buffers is taken
    overlap = false                # true: its kernels run at the same time, on different blocks

    [[plan.kernel]]                # Einsums that run together; between kernels tensors go through DRAM
    loops = ["b", "h", "p", "m1"]  # rank variables whose tiles pass through the buffers, outermost first
    tile = { p = "fit" }           # by loop variable, its elements: see below
    keep = { global = ["Q", "K"] } # by buffer, the tensors whose tile stays; an inner list shares one place
    spatial = { 2d = { rows = "m0", columns = "p" } }  # the rank that each dimension of an array spreads
    in_flight = 1                  # tiles that an array works on in turn, so that one computes while another waits
    chained = ["SN"]               # Einsums whose kinds of operations work at the same time, in separate units
    phases = [                     # per tile, one after the other: the Einsums of each array, which work side by side
        { 2d = ["QK", "LM"], 1d = ["RD", "AV"] },
        { 1d = ["RM"] },
    ]

A tile is a number, a product (`"2d.rows * 4"`), a list (the first that fits the buffers), `"fit"` (whole turns of the
arrays, as many as fit and divide the rank evenly), or 1 where nothing is said; ranks without a loop are whole.
An Einsum may stand in a phase before what it reads: it then works on the tile before. A reduced rank may be spread over
a dimension; its partial results then move from element to element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from einsumcascade.analysis.dependence import rank_variables
from einsumcascade.analysis.spatial.facts import Facts, gather
from einsumcascade.analysis.spatial.files import Table, read
from einsumcascade.errors import nearest
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Scalar,
    Statement,
    rank_of,
    scalars,
    transform,
    walk,
)

FIT = "fit"
Tile = int | str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Einsums that run together, tile by tile.

    Args:
        loops: rank variables whose tiles pass by, outermost first.
        tiles: of loop variables: elements, a product as text, `FIT`, or candidates in the order of preference.
        keep: by buffer, groups of tensors whose tiles stay; a group shares one place.
        spatial: by array and dimension, the rank variable spread over it.
        in_flight: tiles that an array works on in turn.
        chained: Einsums whose kinds of operations work at the same time, in separate units.
        phases: one after the other for each tile: the Einsums of each array.
        table: its place in the file.
    """

    loops: tuple[str, ...]
    tiles: Mapping[str, Tile] = field(hash=False)
    keep: Mapping[str, tuple[tuple[str, ...], ...]] = field(hash=False)
    spatial: Mapping[str, Mapping[str, str]] = field(hash=False)
    in_flight: int
    chained: tuple[str, ...]
    phases: tuple[Mapping[str, tuple[str, ...]], ...] = field(hash=False)
    table: Table = field(compare=False, repr=False)

    @property
    def einsums(self) -> tuple[str, ...]:
        """Tensors that it computes, in the order of the phases."""
        return tuple(e for phase in self.phases for names in phase.values() for e in names)

    @property
    def kept(self) -> tuple[str, ...]:
        """Tensors whose tiles stay in a buffer."""
        return tuple(t for groups in self.keep.values() for group in groups for t in group)

    def array_of(self, einsum: str) -> str:
        """The array that computes `einsum`."""
        return next(a for phase in self.phases for a, names in phase.items() if einsum in names)

    def phase_of(self, einsum: str) -> int:
        """The position of the phase that computes `einsum`."""
        return next(k for k, phase in enumerate(self.phases) for names in phase.values() if einsum in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to run the whole cascade.

    Args:
        kernels: in the order of the cascade.
        overlap: whether they run at the same time, on different blocks, rather than one after the other.
    """

    kernels: tuple[Kernel, ...]
    overlap: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpatialMapping:
    """A cascade and the plans to run it on a spatial array.

    Args:
        name: of the file.
        facts: of the cascade, without the factors that the mapping folds away.
        target: name or path of the target it is made for.
        extents: ranks that the mapping decides, as products.
        plans: in the order of preference.
        table: the file.
    """

    name: str
    facts: Facts
    target: str
    extents: Mapping[str, str] = field(hash=False)
    plans: tuple[Plan, ...]
    table: Table = field(compare=False, repr=False)


def load_mapping(name: str | Path, *, beside: Path | None = None) -> SpatialMapping:
    """Load a mapping that comes with the package, by name, or from a `.toml` file, and check it against its cascade.

    Guaranteed: every Einsum has one place in each plan, kernels follow the order of the cascade, tiles respect its
    barriers, and what must stay on chip is kept.

    Args:
        name: a mapping of the package (`unfused`, `flat`, `fusemax_binding`, ...), or a path.
        beside: the folder that a relative path starts from.

    Raises:
        ModelError: `mapping`: the file is missing or wrong, or its plan is not legal; the message shows the line.
        SpecFileError: the cascade that it names is missing.
        CascadeError: the text of that cascade is wrong.
    Cost: linear in the file, and a pass count of the cascade for each kernel and rank.

    >>> [k.einsums for k in load_mapping("unfused").plans[0].kernels]
    [('QK',), ('GM', 'SN', 'SD', 'A'), ('AV',)]
    """
    from einsumcascade.analysis.spatial.legality import check_plan
    from einsumcascade.gallery import load

    file = read("mappings", name, beside=beside)
    file.only("cascade", "target", "folded", "extents", "plan")
    spec = file.text("cascade")
    cascade = load(file.folder / spec if spec.endswith(".cascade") else spec)
    extents = file.table("extents", optional=True)
    extents.only(*_ranks(cascade))
    facts = gather(_folded(file, cascade))
    mapping = SpatialMapping(
        name=Path(file.source.name).stem,
        facts=facts,
        target=file.text("target"),
        extents={r: extents.text(r) for r in extents.values},
        plans=tuple(_plan(t, cascade) for t in file.tables("plan")),
        table=file,
    )
    for plan, table in zip(mapping.plans, file.tables("plan"), strict=True):
        check_plan(facts, plan, table=table)
    return mapping


def _ranks(cascade: Cascade) -> tuple[str, ...]:
    return tuple(rank_of(v) for v in rank_variables(cascade))


def _plan(table: Table, cascade: Cascade) -> Plan:
    table.only("overlap", "kernel")
    return Plan(kernels=tuple(_kernel(t, cascade) for t in table.tables("kernel")), overlap=table.flag("overlap"))


def _kernel(table: Table, cascade: Cascade) -> Kernel:
    table.only("loops", "tile", "keep", "spatial", "in_flight", "chained", "phases")
    variables = rank_variables(cascade)
    computed = tuple(dict.fromkeys(e.tensor for e in cascade.einsums))
    tensors = (*(i.tensor for i in cascade.inputs), *computed)
    loops = _known(table, "loops", table.names("loops"), variables, "rank variable")
    tiles, keep = table.table("tile", optional=True), table.table("keep", optional=True)
    tiles.only(*loops)
    spatial = table.table("spatial")
    phases = tuple(_phase(t, tuple(spatial.values), computed) for t in table.tables("phases"))
    here = tuple(e for phase in phases for names in phase.values() for e in names)
    return Kernel(
        loops=loops,
        tiles={v: _tile(tiles, v) for v in loops},
        keep={b: tuple(_groups(keep, b, tensors)) for b in keep.values},
        spatial={a: _spread(spatial.table(a), variables) for a in spatial.values},
        in_flight=table.integer("in_flight", 1),
        chained=_known(table, "chained", table.names("chained"), here, "Einsum in this kernel"),
        phases=phases,
        table=table,
    )


def _phase(table: Table, arrays: tuple[str, ...], computed: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    table.only(*arrays)
    if not table.values:
        table.reject("a phase has no array", rule="a phase names the Einsums of at least one array")
    return {a: _known(table, a, table.names(a), computed, "Einsum") for a in table.values}


def _tile(tiles: Table, variable: str) -> Tile:
    match tiles.values.get(variable, 1):
        case list():
            return tiles.integers(variable)
        case str():
            return tiles.text(variable)
        case _:
            return tiles.integer(variable, 1)


def _groups(keep: Table, buffer: str, tensors: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    value = keep.values[buffer]
    for item in value if isinstance(value, list) else [value]:
        group = tuple(item) if isinstance(item, list) else (item,)
        for name in group:
            if not isinstance(name, str):
                keep.reject(f"'{buffer}' keeps {name!r}", key=buffer, rule="it lists tensors, or lists of tensors")
        yield _known(keep, buffer, group, tensors, "tensor")


def _spread(table: Table, variables: tuple[str, ...]) -> dict[str, str]:
    return {d: _known(table, d, (table.text(d),), variables, "rank variable")[0] for d in table.values}


def _known(table: Table, key: str, found: tuple[str, ...], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    for k, name in enumerate(found):
        if name not in known:
            table.reject(f"there is no {what} '{name}'", key=key, value=name, hint=nearest(name, known))
        if name in found[:k]:
            table.reject(f"'{name}' stands twice", key=key, value=name)
    return found


def _folded(file: Table, cascade: Cascade) -> Cascade:
    """Take the folded constants out of the products that they are factors of."""
    names = file.names("folded")

    def leaf(expr: Expr) -> Expr | None:
        match expr:
            case Apply(op="mul", args=(Scalar(name=n), rest) | (rest, Scalar(name=n))) if n in names:
                return transform(rest, leaf)
            case _:
                return None

    out = replace(cascade, body=tuple(_mapped(s, lambda e: transform(e, leaf)) for s in cascade.body))
    used = {n for c in (cascade, out) for s in walk(c.body) if not isinstance(s, Iter) for n in scalars(s.expr)}
    left = {n for s in walk(out.body) if not isinstance(s, Iter) for n in scalars(s.expr)}
    for name in names:
        if name not in used or name in left:
            declared = tuple(c.name for c in cascade.constants)
            what = "no factor" if name in left else "no constant in use"
            file.reject(
                f"'{name}' is {what} of the cascade",
                key="folded",
                value=name,
                rule="a folded constant is a factor wherever it stands, so that an input can carry it",
                hint=nearest(name, declared) if name not in declared else "",
            )
    return out


def _mapped(statement: Statement, change: Callable[[Expr], Expr]) -> Statement:
    match statement:
        case Iter():
            return replace(statement, body=tuple(_mapped(s, change) for s in statement.body))
        case Einsum() | Init():
            return replace(statement, expr=change(statement.expr))
