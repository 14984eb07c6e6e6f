"""Pack two residents of a kernel into one tile: the heads of a group beside the queries, so that keys are read once.

    QK[b,h,p,m] = Q[b,h,p,e] * K[b,h // R,m,e]  ->  QK[b,h1,ph,m] = Q[b,h1*R + ph % R,ph // R,e] * K[b,h1,m,e]

The tile walks `ph`, with `p = ph // R` and `h = h1*R + ph % R`; one program has all heads of a group. This is a change
of variables, made for each kernel after the cascade has been divided into them. Inputs are read at other places, which
the language allows anyway, and what lies in memory keeps its layout, so outputs are stored at these places. Where there
is no `p`, as where a text has one query a head, `h` is packed into itself: the tile walks `h0`, with `h = h1*R + h0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from einsumcascade.errors import Diagnostic, ScheduleError
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    subexpressions,
    transform,
    variables,
    walk,
)
from einsumcascade.rewrites.algebra import names_taken
from einsumcascade.schedules.program import Kernel, Packing, Program
from einsumcascade.schedules.roles import grid_tiles

# What a product reads has two axes of tiles: with a third, one matrix would be another for every head.
MOST_AXES = 2


def pack_program(program: Program, pack: Mapping[str, str]) -> Program:
    """Pack residents of every kernel that allows it.

    Args:
        program: kernels as the partition made them.
        pack: by the variable that joins a tile, the variable that it joins; itself where the tile is to be of it alone.

    Returns: the program; kernels that do not allow it are as they were.
    Raises: ScheduleError: no kernel allows it; the message says why.
    Cost: linear in the Einsums.
    """
    for inner, outer in pack.items():
        taken = names_taken(program.cascade)
        kernels: list[Kernel] = []
        ranks: dict[str, Definition] = {}
        reasons: dict[str, None] = {}
        for k in program.kernels:
            made = packed(k, inner, outer, program.bounded, taken)
            if not isinstance(made, str) and any(ranks.get(d.name, d) != d for d in made.cascade.ranks):
                # Another kernel has groups of another size.
                made = packed(k, inner, outer, program.bounded, taken | ranks.keys())
            if isinstance(made, str):
                reasons[made] = None
            else:
                ranks |= {d.name: d for d in made.cascade.ranks}
            kernels.append(k if isinstance(made, str) else made)
        if not ranks:
            raise _refused(inner, outer, "; ".join(reasons))
        known = {d.name for d in program.cascade.ranks}
        added = tuple(d for n, d in ranks.items() if n not in known)
        cascade = replace(program.cascade, ranks=(*program.cascade.ranks, *added))
        program = replace(program, cascade=cascade, kernels=tuple(kernels))
    return program


def _refused(inner: str, outer: str, why: str) -> ScheduleError:
    return ScheduleError(
        diagnostics=(
            Diagnostic(
                code="schedule-illegal",
                headline=f"the schedule packs '{inner}' into the tile of '{outer}': {why}",
                rule="heads h share the tile of queries p where what a product reads beside them varies with h at most "
                "as h // R",
                hint="kernel.program shows the variables that each kernel keeps, its residents",
            ),
        )
    )


def packings(kernel: Kernel, bounded: tuple[str, ...]) -> Iterator[tuple[str, str, Kernel]]:
    """Residents that may join the tile of a kernel, the variable of that tile, and the kernel that comes of it."""
    tiles = grid_tiles(kernel)
    for inner in (v for v in kernel.residents if v not in tiles):
        for outer in tiles or (inner,):
            made = packed(kernel, inner, outer, bounded, set())
            if not isinstance(made, str):
                yield inner, outer, made


def packed(kernel: Kernel, inner: str, outer: str, bounded: tuple[str, ...], taken: set[str]) -> Kernel | str:
    """Walk two residents of a kernel as one.

    Args:
        inner: the variable whose values stand side by side for each value of `outer`; equal: those of a group alone.
        bounded: variables whose whole extent a tile holds.
        taken: names that new variables must not have, besides those of the kernel.

    Returns: the kernel, or why it cannot be.
    """
    for v in (inner, outer):
        if v not in kernel.residents:
            return f"{kernel.name} keeps no '{v}'"
    if kernel.packed is not None or kernel.scattered:
        return f"{kernel.name} {'adds to what other programs add to' if kernel.scattered else 'is packed already'}"
    whole = () if inner == outer else (Scalar(name=rank_of(inner)),)
    why = f"'{inner}' has no groups"
    for group in (*whole, *_groups(kernel.cascade, inner)):
        made = _Packing(kernel, inner, outer, group, bounded, {*taken, *names_taken(kernel.cascade)}).run()
        if not isinstance(made, str):
            return made
        why = made
    return why


def _groups(cascade: Cascade, inner: str) -> tuple[Expr, ...]:
    """What a variable is divided by where tensors are read: `R` of `K[h // R]`."""
    found: dict[Expr, None] = {}
    for e in _expressions(cascade):
        match e:
            case Apply(op="floordiv", args=(Var(name=v), d)) if v == inner and _is_size(d, cascade):
                found[d] = None
            case _:
                pass
    return tuple(found)


def _is_size(expr: Expr, cascade: Cascade) -> bool:
    """Whether an expression is a whole number of at least 1 wherever there are elements at all."""
    match expr:
        case Num():
            return isinstance(expr.value, int) and expr.value >= 1
        case Scalar():
            return expr.is_extent or any(c.name == expr.name and _is_size(c.expr, cascade) for c in cascade.constants)
        case Apply(op="mul" | "floordiv"):
            return all(_is_size(a, cascade) for a in expr.args)
        case _:
            return False


def _expressions(cascade: Cascade) -> Iterator[Expr]:
    roots = list(cascade.constraints)
    for s in walk(cascade.body):
        roots += [s.expr, *s.where, *s.indices] if isinstance(s, Einsum) else []
        roots += [s.expr, *s.indices] if isinstance(s, Init) else []
    for root in roots:
        yield from subexpressions(root)


class _Packing:
    """A change of variables: `inner` and `outer` over the tile's variable and, where groups are many, the group's."""

    def __init__(
        self, kernel: Kernel, inner: str, outer: str, group: Expr, bounded: tuple[str, ...], taken: set[str]
    ) -> None:
        self.kernel, self.inner, self.outer, self.bounded = kernel, inner, outer, bounded
        self.group = group
        cascade = kernel.cascade
        self.is_whole = group == Scalar(name=rank_of(inner))
        alone = inner == outer
        self.tile = _variable(f"{inner}0" if alone else f"{outer}{inner}", taken)
        self.program = "" if self.is_whole else _variable(f"{inner}1", taken)
        own, extent = Var(name=self.tile), Scalar(name=rank_of(inner))
        self.ranks: list[Definition] = []
        if not isinstance(group, Scalar | Num) and not alone:
            # A name for the quotient of two extents, which is an argument of the kernel.
            size = _variable(f"{inner}0", taken)
            self.ranks.append(Definition(name=size, expr=group))
            group = Scalar(name=rank_of(size))
        size_of_tile = group if alone else apply("mul", Scalar(name=rank_of(outer)), group)
        self.ranks.append(Definition(name=self.tile, expr=size_of_tile))
        if alone and not isinstance(group, Num):
            group = Scalar(name=rank_of(self.tile))
        place: Expr = own if alone else apply("mod", own, group)
        self.known: dict[Expr, str] = {}
        self.live: tuple[Expr, ...] = ()
        if not self.is_whole:
            first = Var(name=self.program)
            groups = _quotient(cascade, extent, self.group)
            place = apply("add", apply("mul", first, group), place)
            if groups is None:
                # The last group may be cut short.
                self.live = (apply("lt", place, extent),)
                up = apply("sub", apply("add", extent, group), Num(value=1))
                self.ranks.append(Definition(name=self.program, expr=apply("floordiv", up, group)))
            else:
                self.known[first] = groups.name
                self.ranks.append(Definition(name=self.program, expr=groups))
        self.at: dict[str, Expr] = {inner: place} if alone else {outer: apply("floordiv", own, group), inner: place}
        self.known |= {at: rank_of(v) for v, at in self.at.items()}
        self.written = {
            s.tensor: s.indices
            for s in walk(cascade.body)
            if isinstance(s, Einsum | Init) and _is_plain(s, inner, outer)
        }

    def run(self) -> Kernel | str:
        k, pair = self.kernel, {self.inner, self.outer}
        for s in walk(k.cascade.body):
            if isinstance(s, Einsum | Init) and s.tensor not in self.written:
                return f"{s.tensor} is written at {s.tensor}[{', '.join(map(str, s.indices))}]"
            if isinstance(s, Einsum) and pair & set(s.ranks):
                return f"{s.tensor} reduces it"
            if isinstance(s, Einsum) and s.tensor in k.cascade.output_names and not pair <= set(s.free):
                return f"{s.tensor} has no '{next(iter(sorted(pair - set(s.free))))}'"
        for e in _expressions(k.cascade):
            if isinstance(e, Read) and (why := self._fault(e)):
                return why
        stored = {
            s.tensor: tuple(i.name for i in s.indices if isinstance(i, Var))
            for s in k.cascade.einsums
            if s.tensor in k.cascade.output_names
        }
        residents = tuple(x for v in k.residents for x in self._names(v))
        made = replace(
            k,
            residents=residents,
            cascade=replace(
                k.cascade,
                ranks=(*k.cascade.ranks, *self.ranks),
                constraints=tuple(self._moved(c) for c in k.cascade.constraints),
                body=tuple(map(self._statement, k.cascade.body)),
            ),
            packed=Packing(
                variable=self.tile, group=self.group, at=self.at, live=self.live, within=self.known, stored=stored
            ),
        )
        if self.tile not in grid_tiles(made):
            return "no product has them on one side only"
        return made

    def _fault(self, read: Read) -> str:
        """Why a read cannot be moved; "" where it can."""
        if read.tensor in self.written:
            for own, at in zip(self.written[read.tensor], read.indices, strict=True):
                if own in (Var(name=self.inner), Var(name=self.outer)) and at != own:
                    return f"{read} is read beside its own place"
            return ""
        moved = variables(*(self._moved(i) for i in read.indices))
        had = self.inner != self.outer and self.outer in variables(*read.indices)
        if self.tile not in moved or had:
            return ""
        axes = [v for v in moved if v == self.tile or v in self.bounded or v in self.kernel.loops]
        return f"{read} would be a tile of {len(axes)} axes" if len(axes) > MOST_AXES else ""

    def _names(self, v: str) -> tuple[str, ...]:
        """The residents in the place of one."""
        group = (self.program,) if v == self.inner and self.program else ()
        tile = (self.tile,) if v == self.outer else ()
        return (*group, *tile) if v in (self.inner, self.outer) else (v,)

    def _moved(self, expr: Expr) -> Expr:
        """An expression over the new variables."""

        def leaf(e: Expr) -> Expr | None:
            match e:
                case Apply(op="floordiv", args=(Var(name=v), d)) if v == self.inner and d == self.group:
                    return Var(name=self.program) if self.program else Num(value=0)
                case Read() if e.tensor in self.written:
                    return replace(e, indices=self._indices(self.written[e.tensor], e.indices))
                case Var():
                    return self.at.get(e.name)
                case _:
                    return None

        return transform(expr, leaf)

    def _indices(self, own: tuple[Expr, ...], at: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """Indices of a computed tensor: those of the group and of the tile in place of those packed."""
        alone = self.inner == self.outer or Var(name=self.outer) not in own
        out: list[Expr] = []
        for declared, i in zip(own, at, strict=True):
            name = declared.name if isinstance(declared, Var) else ""
            if name not in (self.inner, self.outer):
                out.append(self._moved(i))
                continue
            names = dict.fromkeys((*self._names(name), *((self.tile,) if alone else ())))
            out += [Var(name=v) for v in names]
        return tuple(out)

    def _statement(self, s: Statement) -> Statement:
        match s:
            case Einsum():
                return replace(
                    s,
                    indices=self._indices(s.indices, s.indices),
                    expr=self._moved(s.expr),
                    where=tuple(map(self._moved, s.where)),
                )
            case Init():
                return replace(s, indices=self._indices(s.indices, s.indices), expr=self._moved(s.expr))
            case Iter():
                return replace(s, body=tuple(map(self._statement, s.body)))


def _variable(name: str, taken: set[str]) -> str:
    """A variable such that neither it nor its rank has a name that is taken."""
    while name in taken or rank_of(name) in taken:
        name += "_"
    taken |= {name, rank_of(name)}
    return name


def _is_plain(s: Einsum | Init, inner: str, outer: str) -> bool:
    """Whether the packed variables stand alone among the indices of a statement."""
    return all(isinstance(i, Var) or not {inner, outer} & set(variables(i)) for i in s.indices)


def _quotient(cascade: Cascade, extent: Scalar, group: Expr) -> Scalar | None:
    """The number of groups that divide an extent without rest: G of `rank r = H / G`."""
    for d in cascade.ranks:
        match d.expr:
            case Apply(op="div", args=(Scalar() as whole, Scalar() as parts)):
                if Scalar(name=rank_of(d.name)) == group and whole == extent and parts.is_extent:
                    return parts
            case _:
                pass
    return None
