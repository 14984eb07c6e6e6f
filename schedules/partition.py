"""The choice behind a program: which Einsums share a kernel, and what lies in memory between kernels.

An anchor is a reduction over an unbounded rank; its signature is (unbounded ranks kept, unbounded ranks reduced).
Anchors of one signature share a kernel; everything else is cloned into the kernels that need it, stopping at inputs and
at the anchors of other kernels, which become buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Einsum,
    Expr,
    Init,
    Input,
    Iter,
    Num,
    Output,
    Read,
    Statement,
    Var,
    apply,
    reads,
    scalars,
    variables,
    walk,
)
from einsumcascade.rewrites.distribute import name_last
from einsumcascade.schedules.accumulate import accumulate
from einsumcascade.schedules.program import Kernel, Program, identifier, not_lowered
from einsumcascade.schedules.units import Group, Unit


def partition(
    cascade: Cascade, *, bounded: tuple[str, ...], scatters: bool = False, accumulates: bool = False
) -> Program:
    """Partition a cascade into kernels.

    Args:
        cascade: after the rewrites that need no tile.
        bounded: variables whose whole extent a tile may hold.
        scatters: sums over the points `where p - m == j` are added up element by element, in any order, instead of
            looked for by every j.
        accumulates: kernels that compute the same again become one, which adds to sums over other ranks.

    Returns: a program; running its kernels in order with the reference gives the outputs of the cascade.
    Raises: LoweringError: another kernel needs a generation of a state that is neither kept nor the last.
    Cost: O(Einsums^2).
    """
    return _Partition(cascade, frozenset(bounded), scatters, accumulates).run(bounded)


@dataclass(slots=True)
class _Partition:
    cascade: Cascade
    bounded: frozenset[str]
    scatters: bool = False
    accumulates: bool = False
    ends: Mapping[str, Einsum] = field(default_factory=dict)  # what gives the last generation of a state its name
    scattered: dict[str, tuple[str, ...]] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    by_tensor: dict[str, Unit] = field(default_factory=dict)
    maps: dict[str, Einsum] = field(default_factory=dict)

    def run(self, bounded: tuple[str, ...]) -> Program:
        self._collect()
        self._buffer()
        for u in self.units:
            u.stage = self._stage(u)
        self._delay()
        if self.accumulates:
            self._accumulate()
        groups = self._groups()
        outputs = self.cascade.output_names
        for name in outputs:
            if name not in self.by_tensor:
                self._host(name, groups).outputs.append(name)
        groups.sort(key=lambda g: g.stage)
        if states := self._states_elsewhere(groups):
            named, ends = name_last(self.cascade, states)
            return _Partition(named, self.bounded, self.scatters, self.accumulates, ends).run(bounded)
        needed = self._needed(groups)
        buffers: dict[str, tuple[str, ...]] = {}
        kernels = []
        names = [t for g in groups for u in g.units for t in u.writes] + list(outputs)
        for n, g in enumerate(groups):
            own = [t for u in g.units for t in u.writes]
            out = list(dict.fromkeys([t for t in own if t in needed or t in outputs] + g.outputs))
            for t in out:
                if t in needed:
                    buffers[t] = self.scattered.get(t, needed[t].free)
            suffix = f"_{n}" if len(groups) > 1 else ""
            kernels.append(self._kernel(f"{identifier(self.cascade.name)}{suffix}", g, out, names))
        return Program(cascade=self.cascade, kernels=tuple(kernels), buffers=buffers, bounded=bounded)

    def _unbounded(self, vs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(v for v in vs if v not in self.bounded)

    def _collect(self) -> None:
        inits: dict[str, Init] = {}
        for e in self.cascade.einsums:
            if e.is_fiberwise:
                raise not_lowered(e, {"topk": "a top-k"}.get(e.reduce or "", f"a {e.reduce}"))
        for s in self.cascade.body:
            if isinstance(s, Init):
                inits[s.tensor] = s
            elif isinstance(s, Iter):
                inner = [x for x in walk(s.body) if isinstance(x, Einsum)]
                if any(isinstance(x, Iter) for x in walk(s.body)):
                    raise not_lowered(s, "a nested iteration")
                own = tuple(inits[t] for t in dict.fromkeys(x.tensor for x in inner) if t in inits)
                free = dict.fromkeys(v for x in inner for v in x.free if v != s.var)
                reduced = self._unbounded(tuple(dict.fromkeys(v for x in inner for v in x.ranks)))
                if any(set(x.free) & set(reduced) for x in inner if x.tensor in inits):
                    # A state along the rank is no solver's: one program would have to hold all of it.
                    reduced = ()
                states = {t.tensor for t in own}
                for e in inner:
                    if e.tensor in states & set(self.cascade.output_names):
                        raise not_lowered(e, f"every generation of {e.tensor} as an output")
                residents = tuple(v for v in self._unbounded(tuple(free)) if v not in reduced)
                ends = tuple(self.ends[t] for t in states if t in self.ends)
                writes = tuple(x.tensor for x in (*inner, *ends))
                self._add(Unit((*own, *ends, s), writes, residents, reduced or (s.var,), solves=bool(reduced)))
            elif s in self.ends.values():
                continue
            elif (spread := self._scattered(s)) is not None:
                self.scattered[s.tensor] = s.free
                self._add(Unit((spread,), (s.tensor,), self._unbounded(spread.free), ()))
            elif loops := self._unbounded(s.ranks):
                self._add(Unit((s,), (s.tensor,), self._unbounded(s.free), loops))
            else:
                self.maps[s.tensor] = s

    def _scattered(self, s: Einsum) -> Einsum | None:
        """A sum `where i(p, m) == j` as a map that is added to at i(p, m)."""
        if not self.scatters or s.reduce != "sum" or len(self._unbounded(s.ranks)) < 1:
            return None
        names = [i.name for i in s.indices if isinstance(i, Var)]
        at: dict[str, Expr] = {}
        rest: list[Expr] = []
        for c in s.where:
            match c:
                case Apply(op="eq", args=(index, Var(name=j))) if j in names and j not in at:
                    at[j] = index
                case _:
                    rest.append(c)
        if not at or set(at) & set(variables(s.expr, *rest, *at.values())) or len(names) != len(s.indices):
            return None
        # What the place does not depend on is walked all the same: the left side names it, times 0.
        first = next(iter(at))
        for v in s.ranks:
            if v not in variables(*at.values()):
                at[first] = apply("add", at[first], apply("mul", Num(value=0), Var(name=v)))
        indices = tuple(at.get(n, Var(name=n)) for n in names)
        return replace(s, indices=indices, reduce=None, ranks=(), where=tuple(rest))

    def _buffer(self) -> None:
        """Make kernels of their own for statistics that loops would load a tensor for again in every program.

            D[p] = DO[p,f] * O[p,f] :: sum(f)   is read in a loop over p by programs that each hold a tile of m

        Whatever else such a loop needs of D it would have to load as well, once more for each tile of m, so that a
        buffer of one number a row costs less. What only reads tensors that the loop loads anyway stays inside.
        """
        for name, e in list(self.maps.items()):
            free = set(self._unbounded(e.free))
            plain = e.ranks and not e.where and all(isinstance(i, Var) for i in e.indices)
            # Scores are no statistic: nothing that is given has as many elements.
            if not plain or not any(free <= set(i.indices) for i in self.cascade.inputs):
                continue
            for u in self.units:
                maps, _ = self._cone(u.statements)
                shared = set(u.residents) & free
                apart = set(u.residents) - free
                if name not in maps or not apart or not free & set(u.loops) or not free - shared <= set(u.loops):
                    continue
                own = self._loaded((e,), set())
                if own - self._loaded(u.statements, {name}):
                    del self.maps[name]
                    self._add(Unit((e,), (name,), self._unbounded(e.free), ()))
                    break
        order = {s.tensor: n for n, s in enumerate(self.cascade.body) if isinstance(s, Einsum)}
        order |= {x.tensor: n for n, s in enumerate(self.cascade.body) for x in walk((s,)) if isinstance(x, Einsum)}
        self.units.sort(key=lambda u: order[u.writes[-1]])

    def _loaded(self, statements: tuple[Statement, ...], without: set[str]) -> set[str]:
        """Tensors that statements load, through maps too but for some."""
        out: set[str] = set()
        seen: set[str] = set(without)
        pending = list(_reads_of(statements))
        for r in pending:
            e = self.maps.get(r.tensor)
            if e is None:
                out |= {r.tensor} - without
            elif r.tensor not in seen:
                seen.add(r.tensor)
                pending += reads(e.expr, *e.where)
        return out

    def _add(self, u: Unit) -> None:
        self.units.append(u)
        for t in u.writes:
            self.by_tensor[t] = u

    def _cone(self, statements: tuple[Statement, ...]) -> tuple[dict[str, Einsum], dict[int, tuple[Unit, bool]]]:
        """Maps and units that statements need; a unit is flagged where it is read other than element by element."""
        maps: dict[str, Einsum] = {}
        units: dict[int, tuple[Unit, bool]] = {}

        def visit(read: Read, shifted: bool) -> None:
            u = self.by_tensor.get(read.tensor)
            if u is not None:
                if u.statements == statements:
                    return
                last = u.statements[-1]
                # What programs add to is complete when all of them have ended.
                moved = shifted or u.writes[0] in self.scattered
                moved = moved or (isinstance(last, Einsum) and read.indices != last.indices)
                units[id(u)] = (u, moved or units.get(id(u), (u, False))[1])
                return
            e = self.maps.get(read.tensor)
            if e is not None:
                maps[e.tensor] = e
                for r in reads(e.expr, *e.where):
                    visit(r, shifted or read.indices != e.indices)

        for r in _reads_of(statements):
            visit(r, False)
        return maps, units

    def _stage(self, u: Unit) -> int:
        stage = 0
        for d, moved in self._cone(u.statements)[1].values():
            same = set(d.residents) == set(u.residents) and set(d.loops) == set(u.loops) and not moved
            stage = max(stage, d.stage + (0 if same and d.joins and u.joins else 1))
        return stage

    def _delay(self) -> None:
        """Put off a kernel until another of the same ranks, where nothing needs it before: DV until DK."""
        kernels: dict[object, list[Unit]] = {}
        for u in self.units:
            if u.joins:
                kernels.setdefault(u.signature, []).append(u)
        for own in sorted(kernels.values(), key=lambda us: -us[0].stage):
            residents, loops, stage = own[0].signature
            alike = (u.stage for us in kernels.values() for u in us if u.signature[:2] == (residents, loops))
            for later in sorted(set(alike)):
                if later > stage and all(self._may_wait(u, later, own) for u in own):
                    for u in own:
                        u.stage = later
                    break

    def _accumulate(self) -> None:
        """Let kernels that compute the same again become one, and what then waits for its sums, come after it."""

        def cone(u: Unit) -> tuple[dict[str, Einsum], list[Unit]]:
            maps, units = self._cone(u.statements)
            return maps, [d for d, _ in units.values()]

        for t in accumulate(self.units, cone):
            e = self.by_tensor[t].statements[0]
            assert isinstance(e, Einsum)
            self.scattered.setdefault(t, e.free)

    def _may_wait(self, u: Unit, stage: int, mates: list[Unit]) -> bool:
        for reader in self.units:
            found = self._cone(reader.statements)[1].get(id(u))
            if found is None or reader in mates:
                continue
            same = reader.joins and reader.signature[:2] == u.signature[:2] and not found[1]
            if reader.stage < stage or (reader.stage == stage and not same):
                return False
        return True

    def _groups(self) -> list[Group]:
        groups: dict[object, Group] = {}
        for u in self.units:
            key = u.signature if u.joins else id(u)
            if key not in groups:
                groups[key] = Group(u.residents, u.loops, u.stage)
            groups[key].units.append(u)
        return list(groups.values())

    def _host(self, name: str, groups: list[Group]) -> Group:
        """The kernel that writes an output which is not an anchor: the last it depends on, or one of its own."""
        e = self.maps[name]
        residents = self._unbounded(e.free)
        deps = self._cone((e,))[1]
        of = [(g, moved) for g in groups for u, moved in deps.values() if u in g.units]
        if of:
            last = max((g for g, _ in of), key=lambda g: g.stage)
            alone = all(g is last or g.stage < last.stage for g, _ in of)
            if alone and set(last.residents) == set(residents) and not any(m for g, m in of if g is last):
                return last
        stage = 1 + max((g.stage for g, _ in of), default=-1)
        for g in groups:
            if not g.loops and g.stage == stage and set(g.residents) == set(residents):
                return g
        fresh = Group(residents, (), stage)
        groups.append(fresh)
        return fresh

    def _needed(self, groups: list[Group]) -> dict[str, Einsum]:
        """Tensors that a kernel other than their own reads, with what writes them."""
        return {t: e for g in groups for t, e in self._foreign(g).items()}

    def _foreign(self, g: Group) -> dict[str, Einsum]:
        """Tensors of other kernels that a kernel reads, with what writes them."""
        return {
            r.tensor: next(s for s in walk(u.statements) if isinstance(s, Einsum) and s.tensor == r.tensor)
            for r, u in self._reads_elsewhere(g)
        }

    def _states_elsewhere(self, groups: list[Group]) -> frozenset[str]:
        """States of iterations that are read by a kernel other than their own, where they are no tensors."""
        found = [(r.tensor, u) for g in groups for r, u in self._reads_elsewhere(g)]
        return frozenset(t for t, u in found if any(isinstance(s, Init) and s.tensor == t for s in u.statements))

    def _reads_elsewhere(self, g: Group) -> Iterator[tuple[Read, Unit]]:
        """What a kernel reads of other kernels."""
        for statements in self._roots(g):
            maps, _ = self._cone(statements)
            for r in _reads_of((*statements, *maps.values())):
                u = self.by_tensor.get(r.tensor)
                if u is not None and u not in g.units:
                    yield r, u

    def _roots(self, g: Group) -> list[tuple[Statement, ...]]:
        return [u.statements for u in g.units] + [(self.maps[o],) for o in g.outputs]

    def _constants(self, body: tuple[Statement, ...], constraints: tuple[Expr, ...]) -> tuple[Definition, ...]:
        """The constants that some statements use."""
        exprs = [*_exprs_of(body), *constraints, *(d.expr for d in self.cascade.ranks)]
        used: list[Definition] = []
        for c in reversed(self.cascade.constants):
            if c.name in scalars(*exprs):
                used.insert(0, c)
                exprs.append(c.expr)
        return tuple(used)

    def _kernel(self, name: str, g: Group, out: list[str], anchors: list[str]) -> Kernel:
        wanted: set[str] = set(g.outputs)
        foreign = self._foreign(g)
        for statements in self._roots(g):
            wanted |= set(self._cone(statements)[0])
        own = {s for u in g.units for s in u.statements}
        added = {u.writes[0]: u.statements[0] for u in g.units if u.writes[0] in self.scattered}
        body = tuple(
            added.get(s.tensor, s) if isinstance(s, Einsum) else s
            for s in self.cascade.body
            if s in own or (isinstance(s, Einsum) and (s.tensor in added or s.tensor in wanted & self.maps.keys()))
        )
        used = {r.tensor for s in body for r in _reads_of((s,))}
        used |= {r.tensor for c in self.cascade.constraints for r in reads(c)}
        inputs = tuple(i for i in self.cascade.inputs if i.tensor in used)
        inputs += tuple(Input(tensor=t, indices=self.scattered.get(t, e.free)) for t, e in foreign.items())
        space = {v for s in walk(body) if isinstance(s, Einsum) for v in s.space}
        constraints = tuple(c for c in self.cascade.constraints if set(variables(c)) <= space)
        dtypes = {o.tensor: o.dtype for o in self.cascade.outputs}
        outputs = tuple(Output(tensor=t, dtype=dtypes.get(t, "float32")) for t in out)
        order = list(dict.fromkeys(v for s in walk(body) if isinstance(s, Einsum) for v in s.space))
        return Kernel(
            name=name,
            residents=g.residents,
            loops=tuple(v for v in order if v in g.loops) or g.loops,
            scattered={t: self.scattered[t] for t in out if t in self.scattered},
            cascade=replace(
                self.cascade,
                inputs=inputs,
                constants=self._constants(body, constraints),
                body=body,
                constraints=constraints,
                outputs=outputs,
                source=None,
            ),
        )


def _exprs_of(body: tuple[Statement, ...]) -> Iterator[Expr]:
    for s in walk(body):
        match s:
            case Einsum():
                yield from (s.expr, *s.where, *s.indices)
            case Init():
                yield from (s.expr, *s.indices)
            case Iter():
                pass


def _reads_of(statements: tuple[Statement, ...]) -> tuple[Read, ...]:
    return tuple(dict.fromkeys(reads(*_exprs_of(statements))))
