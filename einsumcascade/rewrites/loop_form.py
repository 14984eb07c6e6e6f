"""Bring the reductions over a rank to loop form: an ordinary cascade with an iterative rank (R2, R3, R4).

    GM[p]   = S[p, m] :: max(m)              rank m0 = T,  rank m1 = (M + M0 - 1) // M0
    SN[p,m] = exp(S[p,m] - GM[p])            init RGM[p, 0] = -inf,  init RSD[p, 0] = 0
    SD[p]   = SN[p,m] :: sum(m)         ->   iter m1:
                                               LGM[p, m1] = S[p, m1, m0] :: max(m0)
                                               RGM[p, m1+1] = max(RGM[p, m1], LGM[p, m1])
                                               SN[p, m1, m0] = exp(S[p, m1, m0] - RGM[p, m1+1])
                                               LSD[p, m1] = SN[p, m1, m0] :: sum(m0)
                                               RSD[p, m1+1] = exp(RGM[p, m1] - RGM[p, m1+1]) * RSD[p, m1] + LSD[p, m1]
                                             end

A reduction whose correction cannot be derived goes to a second iteration over the rank, after the first has
finished. The result is a cascade like any other: the reference runs it, and it equals the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from einsumcascade.errors import Diagnostic, LoweringError
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
    reads,
    substitute,
    transform,
    variables,
)
from einsumcascade.rewrites.algebra import (
    carries,
    drop_dead,
    fresh,
    inline,
    inline_reads,
    is_map,
    is_positive,
    names_taken,
    producers,
)
from einsumcascade.rewrites.running_state import PRIME, Correction, Rejection, correction, leaves
from einsumcascade.rewrites.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopForm:
    """A cascade in loop form.

    Args:
        cascade: the result.
        index: the iterative variable, and `inner`: the variable of the tile, empty for tiles of 1.
        points: for each variable walked, its value over index and inner; always within its extent but for the tail.
        loops: number of iterations over the rank, one after the other.
        steps: what was proven, and what was not and why.
    """

    cascade: Cascade
    index: str
    inner: str
    points: Mapping[str, Expr]
    loops: int
    steps: tuple[Step, ...]


@dataclass(slots=True)
class _State:
    """One reduction over the rank, placed in a loop."""

    einsum: Einsum
    loop: int
    how: Correction
    summand: Expr
    anchors: tuple[Read, ...] = ()


def loop_form(cascade: Cascade, *, over: tuple[str, ...], tile: int) -> LoopForm:
    """Rewrite every reduction over the variables `over` as an iteration over tiles of the last of them.

    Several variables are walked by one iterative rank: the outer ones in steps of 1.

    Args:
        cascade: no iterative block may walk these variables.
        over: variables reduced, outermost first.
        tile: extent of the tile of the last.

    Returns: a cascade of equal value, with the proofs of its corrections as steps.
    Raises: LoweringError: a tensor that varies along the rank is read at an offset of it.
    Cost: one SymPy derivation a reduction, cached by its summand.
    """
    return _LoopForm(cascade, over, tile).run()


@dataclass(slots=True)
class _LoopForm:
    cascade: Cascade
    over: tuple[str, ...]
    tile: int
    taken: set[str] = field(default_factory=set)
    defs: dict[str, Einsum] = field(default_factory=dict)
    ready: dict[str, int] = field(default_factory=dict)  # loops finished before a value without the rank exists
    states: dict[str, _State] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    memo: dict[tuple[str, int], str] = field(default_factory=dict)
    corrections: dict[tuple[Expr, int], Read] = field(default_factory=dict)
    inner: str = ""
    index: str = ""

    def run(self) -> LoopForm:
        self.taken = names_taken(self.cascade)
        self.defs = producers(self.cascade)
        streams = self.over[-1]
        self.inner = self._variable(streams + "0") if self.tile > 1 else ""
        self.index = self._variable(streams + "1" if len(self.over) == 1 else "step")
        for s in self.cascade.body:
            if isinstance(s, Einsum):
                self._place(s)
        loops = 1 + max((s.loop for s in self.states.values()), default=0)
        body: list[Statement] = []
        emitted: set[str] = set()
        for loop in range(loops):
            body += self._straight(loop, emitted)
            inits, block = self._loop(loop)
            body += [*inits, block]
        body += self._straight(loops, emitted)
        cascade = replace(
            self.cascade, ranks=self.cascade.ranks + self._ranks(), body=tuple(body), constraints=self._constraints()
        )
        return LoopForm(
            cascade=drop_dead(cascade),
            index=self.index,
            inner=self.inner,
            loops=loops,
            points=self._point(),
            steps=tuple(self.steps),
        )

    def _variable(self, name: str) -> str:
        while name in self.taken or rank_of(name) in self.taken:
            name += "_"
        self.taken |= {name, rank_of(name)}
        return name

    # --- the partition ------------------------------------------------------------------------------------------

    def _point(self) -> dict[str, Expr]:
        """The value of each variable walked, over the index and the tile's variable."""
        last = self.over[-1]
        tiles: Expr = Var(name=self.index)
        out: dict[str, Expr] = {}
        if len(self.over) > 1:
            count = self._tiles()
            tiles = apply("mod", Var(name=self.index), count)
            rest: Expr = apply("floordiv", Var(name=self.index), count)
            for n, v in enumerate(reversed(self.over[:-1])):
                extent = Scalar(name=rank_of(v))
                out[v] = rest if n == len(self.over) - 2 else apply("mod", rest, extent)
                rest = apply("floordiv", rest, extent)
        if not self.inner:
            return {**out, last: tiles}
        inner = Scalar(name=rank_of(self.inner))
        out[last] = apply("add", apply("mul", tiles, inner), Var(name=self.inner))
        return out

    def _tiles(self) -> Expr:
        extent = Scalar(name=rank_of(self.over[-1]))
        if not self.inner:
            return extent
        inner = Scalar(name=rank_of(self.inner))
        return apply("floordiv", apply("sub", apply("add", extent, inner), Num(value=1)), inner)

    def _ranks(self) -> tuple[Definition, ...]:
        count = self._tiles()
        for v in self.over[:-1]:
            count = apply("mul", Scalar(name=rank_of(v)), count)
        index = Definition(name=self.index, expr=count)
        return (Definition(name=self.inner, expr=Num(value=self.tile)), index) if self.inner else (index,)

    def _constraints(self) -> tuple[Expr, ...]:
        point = self._point()
        last = self.over[-1]
        tail = (apply("lt", point[last], Scalar(name=rank_of(last))),) if self.inner else ()
        return (*tail, *(substitute(c, point) for c in self.cascade.constraints if not self._is_outer(c)))

    def _is_outer(self, condition: Expr) -> bool:
        """Whether a constraint would, at an index, cull a state's own update: it becomes a condition of reductions."""
        if not set(variables(condition)) & set(self.over):
            return False
        left = set(variables(substitute(condition, self._point()))) - {self.index}
        return any(left <= set(s.einsum.free) for s in self.states.values())

    def _conditions(self, s: Einsum) -> tuple[Expr, ...]:
        """The conditions that a reduction must carry itself inside a loop."""
        outer = (c for c in self.cascade.constraints if self._is_outer(c) and set(variables(c)) <= set(s.space))
        return (*outer, *s.where) if s.reduce is not None else s.where

    # --- which loop ---------------------------------------------------------------------------------------------

    def _streams(self, tensor: str) -> bool:
        d = self.defs.get(tensor)
        return d is not None and any(v in d.free for v in self.over)

    def _place(self, s: Einsum) -> None:
        if any(v in s.free for v in self.over):
            if not all(isinstance(i, Var) for i in s.indices):
                raise _not_lowered(s, "a tensor written at an offset of a looped rank")
            return
        if not set(s.ranks) & set(self.over):
            self.ready[s.tensor] = max((self._finished(r) for r in reads(s.expr, *s.where)), default=0)
            return
        self.states[s.tensor] = state = self._state(s)
        self.ready[s.tensor] = state.loop + 1

    def _finished(self, read: Read) -> int:
        """How many loops must have ended before this read can be evaluated inside a stream or outside."""
        if self._streams(read.tensor):
            d = self.defs[read.tensor]
            return max((self._finished(r) for r in reads(d.expr, *d.where)), default=0)
        return self.ready.get(read.tensor, 0)

    def _state(self, s: Einsum) -> _State:
        need = max((self._finished(r) for r in reads(s.expr, *s.where)), default=0)
        summand = inline_reads(s.expr, self.defs, lambda r, _: self._streams(r.tensor) and self._finished(r) == need)
        if need == 0:
            return _State(s, 0, Correction(form="none"), s.expr)
        anchors = tuple(
            r for r in reads(summand, *s.where) if not self._streams(r.tensor) and self.ready.get(r.tensor, 0) == need
        )
        answer = self._try(s, summand, anchors, need)
        if isinstance(answer, Rejection):
            self.steps.append(
                Step(
                    rule="not streamed",
                    kind="law",
                    before=(str(s),),
                    what=f"{s.tensor} waits for {', '.join(dict.fromkeys(a.tensor for a in anchors))}: "
                    f"one more loop over {', '.join(map(rank_of, self.over))}",
                    proof=(answer.reason,),
                )
            )
            return _State(s, need, Correction(form="none"), s.expr)
        if answer.c is None:
            return _State(s, need - 1, answer, s.expr, anchors)
        plain = transform(
            answer.c,
            lambda e: (
                Read(tensor=e.tensor.replace(PRIME, "") + "_next", indices=e.indices)
                if isinstance(e, Read) and e.tensor.endswith(PRIME)
                else None
            ),
        )
        self.steps.append(
            Step(
                rule="R3 running state",
                kind=answer.kind,
                before=(str(s),),
                proof=answer.proof,
                what=f"{s.tensor} keeps a running state, moved by C = {plain}",
            )
        )
        return _State(s, need - 1, answer, s.expr, anchors)

    def _try(self, s: Einsum, summand: Expr, anchors: tuple[Read, ...], need: int) -> Correction | Rejection:
        if any(self._streams(r.tensor) and self._finished(r) == need for r in reads(summand)):
            return Rejection(reason="a value along the rank depends on a finished reduction through another reduction")
        if any(set(variables(*a.indices)) & set(self.over) for a in anchors):
            return Rejection(reason="a finished reduction is read at positions of the rank it was reduced over")
        if any(reads(c) and {r.tensor for r in reads(c)} & {a.tensor for a in anchors} for c in s.where):
            return Rejection(reason="a condition depends on a finished reduction")
        for a in anchors:
            if self._anchor_expr(a, need - 1, "old") is None:
                return Rejection(reason=f"{a.tensor} is not a map of running states")
        fixed = frozenset(e for e in leaves(summand) if not set(variables(e)) & set(self.over))
        positive = tuple(e for e in leaves(summand) if e in fixed and is_positive(e, self.cascade))
        assert s.reduce is not None
        return correction(summand, anchors, reduce=s.reduce, positive=positive, fixed=fixed)

    def _anchor_expr(self, read: Read, loop: int, when: str) -> Expr | None:
        """A reference over the states of a loop, at the generation before ("old") or after ("new") the tile."""
        if read.tensor in self.states and self.states[read.tensor].loop == loop:
            return self._generation(read, when)
        if self.ready.get(read.tensor, 0) <= loop:
            return read
        d = self.defs[read.tensor]
        if not is_map(d):
            return None
        ok = True

        def leaf(e: Expr) -> Expr | None:
            nonlocal ok
            if isinstance(e, Read):
                inner = self._anchor_expr(e, loop, when)
                ok = ok and inner is not None
                return inner or e
            return None

        out = transform(inline(read, d), leaf)
        return out if ok else None

    def _generation(self, read: Read, when: str) -> Read:
        at: Expr = Var(name=self.index)
        if when == "new":
            at = apply("add", at, Num(value=1))
        elif when == "last":
            at = Scalar(name=rank_of(self.index))
        return Read(tensor=self._running(read.tensor), indices=(*read.indices, at))

    def _running(self, tensor: str) -> str:
        key = (tensor, -1)
        if key not in self.memo:
            self.memo[key] = fresh("R" + tensor, self.taken)
        return self.memo[key]

    # --- writing it out -----------------------------------------------------------------------------------------

    def _straight(self, loop: int, emitted: set[str]) -> list[Statement]:
        """Einsums without the rank that can run once `loop` loops have ended."""
        out: list[Statement] = []
        for s in self.cascade.body:
            if not isinstance(s, Einsum):
                if loop == 0:
                    out.append(s)
                continue
            if s.tensor in emitted or any(v in s.free for v in self.over):
                continue
            if self.ready[s.tensor] != loop:
                continue
            emitted.add(s.tensor)
            if s.tensor in self.states:
                if s.tensor in self.cascade.output_names:
                    last = self._generation(Read(tensor=s.tensor, indices=s.indices), "last")
                    out.append(replace(s, expr=last, reduce=None, ranks=(), where=()))
                continue
            out.append(replace(s, expr=self._final(s.expr), where=tuple(self._final(c) for c in s.where)))
        return out

    def _final(self, expr: Expr) -> Expr:
        """Read the last generation of every state."""

        def leaf(e: Expr) -> Expr | None:
            if isinstance(e, Read) and e.tensor in self.states:
                return self._generation(e, "last")
            return None

        return transform(expr, leaf)

    def _loop(self, loop: int) -> tuple[list[Init], Iter]:
        inits: list[Init] = []
        body: list[Statement] = []
        placed: dict[str, str] = {}
        anchored: dict[Read, Read] = {}
        for state in self.states.values():
            if state.loop != loop:
                continue
            s, how = state.einsum, state.how
            assert s.reduction is not None
            target = Read(tensor=s.tensor, indices=s.indices)
            inits.append(
                Init(
                    tensor=self._running(s.tensor), indices=(*s.indices, Num(value=0)), expr=_number(s.reduction.empty)
                )
            )
            expr = self._inside(s.expr, loop, body, placed, anchored)
            where = tuple(self._inside(c, loop, body, placed, anchored) for c in self._conditions(s))
            local = fresh("L" + s.tensor, self.taken)
            ranks = tuple(r for r in s.ranks if r not in self.over) + ((self.inner,) if self.inner else ())
            if not ranks:
                # A tile of one point is not reduced: a culled point is the identity by name.
                for c in reversed(where):
                    expr = apply("select", c, expr, _number(s.reduction.empty))
                where = ()
            body.append(
                Einsum(
                    tensor=local,
                    indices=(*s.indices, Var(name=self.index)),
                    expr=expr,
                    where=where,
                    reduce=s.reduce if ranks else None,
                    ranks=ranks,
                )
            )
            old, new = self._generation(target, "old"), self._generation(target, "new")
            part = Read(tensor=local, indices=(*s.indices, Var(name=self.index)))
            moved = self._moved(old, state, how, body, anchored)
            body.append(Einsum(tensor=new.tensor, indices=new.indices, expr=apply(s.reduction.op.name, moved, part)))
        return inits, Iter(var=self.index, body=tuple(body))

    def _moved(
        self, old: Expr, state: _State, how: Correction, body: list[Statement], anchored: dict[Read, Read]
    ) -> Expr:
        """C applied to the old state."""
        if how.c is None:
            return old
        loop = state.loop

        def leaf(e: Expr) -> Expr | None:
            if not isinstance(e, Read):
                return None
            if e.tensor.endswith(PRIME):
                base = Read(tensor=e.tensor.removesuffix(PRIME), indices=e.indices)
                return self._anchor(base, loop, body, anchored)
            if any(e == a for a in state.anchors):
                return self._old_anchor(e, loop, body)
            return None

        c = transform(how.c, leaf)
        c = self._correction_value(c, loop, state, body)
        if how.form == "shift":
            return apply("add", old, c)
        scaled = apply("mul", c, old)
        # A minimum starts at +inf, where such an exponential would be infinite.
        started = [r for a in state.anchors if (start := self._anchor_expr(a, loop, "old")) for r in reads(start)]
        low = {self._running(t) for t, other in self.states.items() if other.einsum.reduce != "min"}
        if how.is_exponential and all(r.tensor in low or r.tensor not in self.memo.values() for r in started):
            return scaled
        assert state.einsum.reduction is not None
        empty = _number(state.einsum.reduction.empty)
        return apply("select", apply("eq", old, empty), empty, scaled)

    def _correction_value(self, c: Expr, loop: int, state: _State, body: list[Statement]) -> Expr:
        """C as a tensor of its own, computed once a tile and shared by every state that it moves."""
        key = (c, loop)
        if key not in self.corrections:
            name = fresh("C" + state.anchors[0].tensor, self.taken)
            free = tuple(Var(name=v) for v in variables(c) if v != self.index)
            self.corrections[key] = Read(tensor=name, indices=(*free, Var(name=self.index)))
            body.append(Einsum(tensor=name, indices=(*free, Var(name=self.index)), expr=c))
        return self.corrections[key]

    def _old_anchor(self, read: Read, loop: int, body: list[Statement]) -> Expr:
        """The reference before this tile; a sum is a value of its own, so that C is exactly 1 where nothing changed."""
        expr = self._anchor_expr(read, loop, "old")
        assert expr is not None
        if not (isinstance(expr, Apply) and expr.op in ("add", "sub")):
            return expr
        key = (expr, loop)
        if key not in self.corrections:
            at = (*(Var(name=v) for v in variables(*read.indices)), Var(name=self.index))
            self.corrections[key] = Read(tensor=fresh("P" + read.tensor, self.taken), indices=at)
            body.append(Einsum(tensor=self.corrections[key].tensor, indices=at, expr=expr))
        return self.corrections[key]

    def _anchor(self, read: Read, loop: int, body: list[Statement], anchored: dict[Read, Read]) -> Expr:
        """The reference after this tile: a state, or a value of its own computed from states once a tile."""
        expr = self._anchor_expr(read, loop, "new")
        assert expr is not None
        if read.tensor in self.states or _is_scaled_state(expr):
            return expr
        d = self.defs[read.tensor]
        canonical = Read(tensor=read.tensor, indices=d.indices)
        if canonical not in anchored:
            name = fresh("R" + read.tensor, self.taken)
            value = self._anchor_expr(canonical, loop, "new")
            assert value is not None
            at = apply("add", Var(name=self.index), Num(value=1))
            body.append(Einsum(tensor=name, indices=(*d.indices, at), expr=value))
            anchored[canonical] = Read(tensor=name, indices=(*d.indices, at))
        made = anchored[canonical]
        return Read(tensor=made.tensor, indices=(*read.indices, made.indices[-1]))

    def _inside(
        self, expr: Expr, loop: int, body: list[Statement], placed: dict[str, str], anchored: dict[Read, Read]
    ) -> Expr:
        """Rewrite an expression for the inside of a loop, placing the streams it needs before it."""
        point = self._point()

        def leaf(e: Expr) -> Expr | None:
            if isinstance(e, Var) and e.name in point:
                return point[e.name]
            if not isinstance(e, Read):
                return None
            if self._streams(e.tensor):
                return self._stream(e, loop, body, placed, anchored)
            ready = self.ready.get(e.tensor, 0)
            if ready == loop + 1:
                return self._anchor(e, loop, body, anchored)
            if e.tensor in self.states:
                return self._generation(e, "last")
            return None

        return transform(expr, leaf)

    def _stream(
        self, read: Read, loop: int, body: list[Statement], placed: dict[str, str], anchored: dict[Read, Read]
    ) -> Expr:
        d = self.defs[read.tensor]
        at = []
        for i, own in zip(read.indices, d.indices, strict=True):
            assert isinstance(own, Var)
            if own.name in self.over:
                if i != own:
                    raise _not_lowered(d, f"{read} read at an offset of a looped rank")
                continue
            at.append(substitute(i, self._point()) if carries(i, self.over[-1]) else i)
        tiled: tuple[Expr, ...] = (Var(name=self.index), Var(name=self.inner))
        if self.over[-1] not in d.free or not self.inner:
            tiled = tiled[:1]
        if read.tensor not in placed:
            expr = self._inside(d.expr, loop, body, placed, anchored)
            where = tuple(self._inside(c, loop, body, placed, anchored) for c in self._conditions(d))
            key = (read.tensor, loop)
            first = not any(k[0] == read.tensor and k[1] >= 0 for k in self.memo)
            name = self.memo[key] = read.tensor if first else fresh(read.tensor, self.taken)
            own_left = tuple(i for i in d.indices if isinstance(i, Var) and i.name not in self.over)
            body.append(replace(d, tensor=name, indices=own_left + tiled, expr=expr, where=where))
            placed[read.tensor] = name
        return Read(tensor=placed[read.tensor], indices=(*at, *tiled))


def _is_scaled_state(expr: Expr) -> bool:
    """A state times constants: cheap enough to stand wherever it is read."""
    return (
        isinstance(expr, Apply)
        and expr.op in ("mul", "div")
        and all(isinstance(a, Scalar | Num | Read) for a in expr.args)
        and sum(isinstance(a, Read) for a in expr.args) == 1
    )


def _number(value: float) -> Num:
    return Num(value=int(value) if value in (0.0, 1.0) else value)


def _not_lowered(s: Einsum, what: str) -> LoweringError:
    return LoweringError(
        diagnostics=(
            Diagnostic(
                code="not-lowered-yet",
                headline=f"{what} has no lowering yet",
                span=s.span,
                rule="reference, analysis and derivation work all the same",
                hint=f"the Einsum is {s}",
            ),
        )
    )
