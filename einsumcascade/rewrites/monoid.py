"""The running state of a cascade over a rank: one object, from which every form of the kernel follows.

The reductions of a cascade over a rank, if they stream, are the components of a state (r, S). States form a monoid:
the state of no key is its identity, and two states of disjoint keys merge. The running loop absorbs tile after tile,
split-K merges the states of parts, several devices merge theirs, the prefix scan keeps every state on the way, and a
decode step absorbs the keys that are new. Each of these is an ordinary cascade here, which the reference runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from einsumcascade.errors import LoweringError, UnknownRankError, nearest
from einsumcascade.language.ir import (
    Cascade,
    Einsum,
    Expr,
    Input,
    Iter,
    Num,
    Output,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    scalars,
    substitute,
    transform,
    variable_of,
    variables,
)
from einsumcascade.rewrites.algebra import drop_dead, fresh
from einsumcascade.rewrites.loop_form import Iterations, LoopForm, loop_form
from einsumcascade.rewrites.loops import State, not_lowered
from einsumcascade.rewrites.split_form import split_form
from einsumcascade.rewrites.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One number, or one tensor of numbers, of a running state.

    Args:
        tensor: the reduction that it is the state of. indices: its ranks.
        reduce: name of the reduction, and `identity`: its value for no key.
        summand: what is reduced, as text.
        moves: for each component it is moved from, the entry of C as text; "1" for itself alone if nothing moves it.
    """

    tensor: str
    indices: tuple[str, ...]
    reduce: str
    identity: float
    summand: str
    moves: Mapping[str, str] = field(hash=False)

    def __str__(self) -> str:
        name = f"{self.tensor}[{', '.join(self.indices)}]" if self.indices else self.tensor
        moved = " + ".join(t if c == "1" else f"({c}) * {t}" for t, c in self.moves.items())
        return f"{name} = {self.reduce} of {self.summand}; of no key {self.identity:g}; moves to {moved}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningState:
    """The monoid of a cascade over a rank.

    Args:
        cascade: the cascade, means expanded and factors deferred.
        variable: the variable of the rank.
        components: the state, in an order in which each refers to earlier ones only.
        steps: the proofs of its corrections.
    """

    cascade: Cascade
    variable: str
    components: tuple[Component, ...]
    steps: tuple[Step, ...]

    def loop(self, *, tile: int = 128) -> Cascade:
        """The cascade with a running loop over tiles: FlashAttention."""
        return self.loop_form(tile=tile).cascade

    def loop_form(self, *, tile: int) -> LoopForm:
        """The running loop with what a lowering needs to know of it."""
        return loop_form(self.cascade, over=(self.variable,), tile=tile)

    def split(self, *, parts: int) -> Cascade:
        """The cascade with a state for each of `parts` parts of the rank, and their merge: split-K, FlashDecoding."""
        return split_form(self.cascade, variable=self.variable, parts=parts).cascade

    def merge(self) -> Cascade:
        """A cascade that merges two states: inputs `X_a` and `X_b` for each component X, outputs the components."""
        return _Merge(self.cascade, (self.variable,), 1).write()

    def step(self) -> Cascade:
        """A cascade that absorbs keys into a state: inputs `X_old` and the tensors of the new keys, the state out.

        The outputs of the cascade follow the components. Where positions count, `START` is the number of keys before.
        """
        return _Step(self.cascade, (self.variable,), 1).write()

    def scan(self) -> Cascade:
        """The cascade for every prefix of the rank: each output gains the rank, last, at m for the keys 0 ... m."""
        return _Scan(self.cascade, (self.variable,), 1).write()

    def __str__(self) -> str:
        head = f"running state over {rank_of(self.variable)}:"
        return "\n".join([head, *(f"  {c}" for c in self.components)])


def running_state(cascade: Cascade, *, rank: str) -> RunningState:
    """Derive the running state of a cascade over a rank.

    Args:
        cascade: a checked cascade; means, and factors that leave a reduction, are taken care of.
        rank: the name of a rank that it reduces, upper case.

    Raises:
        UnknownRankError: no Einsum reduces the rank.
        LoweringError: `not-streamed`, with the reason: one reduction must wait for another to end; `not-lowered-yet`.
    Cost: one SymPy derivation for each reduction that depends on an earlier one, cached.
    Source: FuseMax (MICRO 2024) section IV; online normalisers; Chan, Golub, LeVeque for the variance.

    >>> from einsumcascade.language.parser import parse
    >>> text = "in X[p, m]\\nG[p] = X[p, m] :: max(m)\\nD[p] = exp(X[p, m] - G[p]) :: sum(m)\\nout D"
    >>> print(running_state(parse(text), rank="M"))
    running state over M:
      G[p] = max of X[p, m]; of no key -inf; moves to G
      D[p] = sum of exp(X[p, m] - G[p]); of no key 0; moves to (exp(G[p] - G_next[p])) * D
    """
    from einsumcascade.rewrites.derive import simplify

    variable = variable_of(rank)
    simple = simplify(cascade)
    reduced = tuple(dict.fromkeys(rank_of(v) for e in simple.cascade.einsums for v in e.ranks))
    if rank not in reduced:
        raise UnknownRankError.of(
            "unknown-rank",
            f"no Einsum reduces a rank '{rank}'",
            rule="a running state belongs to a rank that is reduced",
            hint=nearest(rank, reduced),
        )
    found = Iterations(simple.cascade, (variable,), 1)
    found.prepare()
    if found.loops > 1:
        late = next(s for s in found.states.values() if s.loop > 0)
        why = next((s.proof[-1] for s in found.steps if s.rule == "not streamed"), "it waits for another")
        raise LoweringError.of(
            "not-streamed",
            f"{late.einsum.tensor} has no running state over {rank}",
            span=late.einsum.span,
            rule=why,
            hint="compile it all the same: it takes one more pass over the rank",
            source=cascade.source,
        )
    return RunningState(
        cascade=simple.cascade,
        variable=variable,
        components=tuple(_component(s) for s in found.states.values()),
        steps=simple.steps + tuple(found.steps),
    )


def _component(state: State) -> Component:
    from einsumcascade.rewrites.loops import plain

    e = state.einsum
    assert e.reduction is not None
    moves = {e.tensor: "1"}
    if state.how.form == "linear":
        row = zip(state.basis, state.how.matrix[state.row], strict=True)
        moves = {r.tensor: plain(c) for r, c in row if c != Num(value=0)}
    elif state.how.form == "shift":
        moves = {e.tensor: "1", plain(state.how.matrix[0][0]): "1"}
    return Component(
        tensor=e.tensor,
        indices=e.free,
        reduce=e.reduce or "",
        identity=e.reduction.empty,
        summand=str(e.expr),
        moves=moves,
    )


@dataclass
class _Merge(Iterations):
    """Two states made one."""

    def generation(self, read: Read, when: str) -> Read:
        return replace(read, tensor=f"{read.tensor}_{when}") if when in ("a", "b") else read

    def write(self) -> Cascade:
        self.prepare()
        body: list[Statement] = []
        inputs: list[Input] = []
        for state in self.states.values():
            s = state.einsum
            assert s.reduction is not None
            left = self.moved(state, body, source="a", target="last")
            right = self.moved(state, body, source="b", target="last")
            body.append(replace(s, expr=apply(s.reduction.op.name, left, right), reduce=None, ranks=(), where=()))
            inputs += [Input(tensor=f"{s.tensor}_{side}", indices=s.free) for side in ("a", "b")]
        return _cascade(self.cascade, inputs, body, tuple(Output(tensor=t) for t in self.states))


@dataclass
class _Growing(Iterations):
    """States of some of the keys: the extent of the rank is their number."""

    def prepare(self) -> None:
        super().prepare()
        extent = rank_of(self.over[-1])
        # A constant that counts the keys is no constant here.
        counting = {c.name: c.expr for c in self.cascade.constants if extent in scalars(c.expr)}

        def leaf(e: Expr) -> Expr | None:
            return counting.get(e.name) if isinstance(e, Scalar) else None

        self.cascade = self.cascade.with_body(
            tuple(replace(s, expr=transform(s.expr, leaf)) if isinstance(s, Einsum) else s for s in self.cascade.body)
        )
        for s in self.cascade.einsums:
            if extent in scalars(s.expr) and (s.tensor in self.states or self.streams(s.tensor)):
                raise not_lowered(s, f"a step over keys whose summand has the extent {extent}")
        if self.kept:
            raise not_lowered(self.defs[sorted(self.kept)[0]], "a step over keys that puts out a tensor along them")

    def prologue(self) -> list[Statement]:
        """What is needed before any key."""
        return self.straight(0, set())

    def epilogue(self, seen: Expr) -> list[Einsum]:
        """What follows the state, the extent of the rank being the keys seen."""
        extent = Scalar(name=rank_of(self.over[-1]))
        after = [s for s in self.straight(1, set()) if isinstance(s, Einsum)]
        return [replace(s, expr=transform(s.expr, lambda e: seen if e == extent else None)) for s in after]


@dataclass
class _Step(_Growing):
    """New keys absorbed into a state."""

    start: str = ""

    def prepare(self) -> None:
        # The rank of the new keys is walked whole: no index beside it.
        super().prepare()
        self.index, self.inner = "", self.over[-1]
        self.start = fresh("START", self.taken)

    def generation(self, read: Read, when: str) -> Read:
        return replace(read, tensor=f"{read.tensor}_old") if when == "old" else read

    def finished_state(self, s: Einsum) -> list[Statement]:
        return []

    def point(self) -> dict[str, Expr]:
        v = self.over[-1]
        return {v: apply("add", Read(tensor=self.start), Var(name=v))}

    def absorbed_at(self) -> tuple[Expr, ...]:
        return ()

    def tile_at(self) -> tuple[Expr, ...]:
        return ()

    def stream_at(self, d: Einsum) -> tuple[Expr, ...]:
        return tuple(Var(name=v) for v in self.over if v in d.free)

    def inside(self, expr: Expr, loop: int, body: list[Statement], placed: dict[str, str]) -> Expr:
        return self.own_keys(super().inside(expr, loop, body, placed))

    def own_keys(self, expr: Expr) -> Expr:
        """Positions count from the first key of all; an input of the new keys is read from its own first one."""
        v = self.over[-1]
        position = self.point()[v]

        def leaf(e: Expr) -> Expr | None:
            declared = self.cascade.input(e.tensor) if isinstance(e, Read) else None
            if declared is None or not isinstance(e, Read):
                return None
            for i, own in zip(e.indices, declared.indices, strict=True):
                if own == v and i != position:
                    raise not_lowered(next(iter(self.states.values())).einsum, f"a step over new keys that reads {e}")
            return replace(e, indices=tuple(Var(name=v) if i == position else i for i in e.indices))

        return transform(expr, leaf)

    def write(self) -> Cascade:
        self.prepare()
        body = self.prologue()
        placed: dict[str, str] = {}
        inputs: list[Input] = []
        for state in self.states.values():
            s = state.einsum
            assert s.reduction is not None
            part = self.tile_of(s, fresh("L" + s.tensor, self.taken), 0, body, placed)
            moved = self.moved(state, body, source="old", target="new")
            new = replace(s, expr=apply(s.reduction.op.name, moved, part), reduce=None, ranks=(), where=())
            body.append(new)
            inputs.append(Input(tensor=f"{s.tensor}_old", indices=s.free))
        seen = apply("add", Read(tensor=self.start), Scalar(name=rank_of(self.over[-1])))
        body += self.epilogue(seen)
        constraints = tuple(self.own_keys(substitute(c, self.point())) for c in self.cascade.constraints)
        exprs = [x for s in body if isinstance(s, Einsum) for x in (s.expr, *s.where)]
        if self.start in {r.tensor for r in reads(*exprs, *constraints)}:
            inputs.append(Input(tensor=self.start, indices=()))
        dtypes = {o.tensor: o.dtype for o in self.cascade.outputs}
        named = dict.fromkeys((*self.states, *self.cascade.output_names))
        outputs = tuple(Output(tensor=t, dtype=dtypes.get(t)) for t in named)
        return _cascade(replace(self.cascade, constraints=constraints), inputs, body, outputs)


@dataclass
class _Scan(_Growing):
    """Every prefix of the rank."""

    def traverse(self, loop: int) -> list[Statement]:
        *inits, block = super().traverse(loop)
        after = self.epilogue(apply("add", Var(name=self.index), Num(value=1)))
        lasts = {self.running(t): t for t in self.states}
        at = apply("add", Var(name=self.index), Num(value=1))
        names = {s.tensor for s in after}

        def leaf(e: Expr) -> Expr | None:
            if isinstance(e, Read) and e.tensor in lasts:
                return Read(tensor=e.tensor, indices=(*e.indices[:-1], at))
            if isinstance(e, Read) and e.tensor in names:
                return replace(e, indices=(*e.indices, Var(name=self.index)))
            return None

        every = [replace(s, indices=(*s.indices, Var(name=self.index)), expr=transform(s.expr, leaf)) for s in after]
        assert isinstance(block, Iter)
        return [*inits, replace(block, body=(*block.body, *every))]

    def write(self) -> Cascade:
        self.prepare()
        body = (*self.prologue(), *self.traverse(0))
        return drop_dead(
            replace(
                self.cascade,
                body=body,
                ranks=self.cascade.ranks + self.ranks(),
                constraints=self.constraints(),
                source=None,
            )
        )


def _cascade(cascade: Cascade, inputs: list[Input], body: list[Statement], outputs: tuple[Output, ...]) -> Cascade:
    """A cascade of these statements with what they need of the declarations."""
    einsums = [s for s in body if isinstance(s, Einsum)]
    space = {v for s in einsums for v in s.space}
    constraints = tuple(c for c in cascade.constraints if set(variables(c)) <= space)
    used = {r.tensor for s in einsums for r in reads(s.expr, *s.where)} | {r.tensor for r in reads(*constraints)}
    return drop_dead(
        replace(
            cascade,
            inputs=(*(i for i in cascade.inputs if i.tensor in used), *inputs),
            constraints=constraints,
            body=tuple(body),
            outputs=outputs,
            source=None,
        )
    )
