"""Which loop each reduction over a rank belongs to, and how its state moves there.

A reduction that depends on an earlier one over the same rank shares its loop if a correction can be derived; if none
can, it waits for the loop to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from einsumcascade.errors import Diagnostic, LoweringError, SourceText
from einsumcascade.language.ir import (
    Cascade,
    Definition,
    Einsum,
    Expr,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    reads,
    substitute,
    transform,
    variables,
)
from einsumcascade.rewrites.algebra import equal, fresh, inline, inline_reads, is_map, is_positive
from einsumcascade.rewrites.corrections import Correction, Rejection
from einsumcascade.rewrites.proofs import PRIME, leaves
from einsumcascade.rewrites.running_state import correction
from einsumcascade.rewrites.step import Claim, Step


@dataclass(slots=True)
class State:
    """One reduction over the rank, placed in a loop.

    Args:
        einsum: the reduction. loop: the number of its loop.
        how: what moves its state, as row `row` of the matrix over the states `basis`.
        summand: what is reduced, over values that do not stream or do not wait.
        anchors: the reads of finished reductions that the summand has.
    """

    einsum: Einsum
    loop: int
    how: Correction
    summand: Expr
    anchors: tuple[Read, ...] = ()
    row: int = 0
    basis: tuple[Read, ...] = ()


@dataclass
class Loops:
    """Reductions over some variables, loop by loop.

    Args:
        cascade: what is rewritten. over: variables walked, outermost first. tile: extent of the tile of the last.
        added: outputs that are added up in memory.
    """

    cascade: Cascade
    over: tuple[str, ...]
    tile: int
    added: frozenset[str] = frozenset()
    taken: set[str] = field(default_factory=set)
    defs: dict[str, Einsum] = field(default_factory=dict)
    ready: dict[str, int] = field(default_factory=dict)  # loops finished before a value without the rank exists
    states: dict[str, State] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    memo: dict[tuple[str, int], str] = field(default_factory=dict)
    corrections: dict[tuple[Expr, int], Read] = field(default_factory=dict)
    inner: str = ""
    index: str = ""
    frees: list[frozenset[str]] = field(default_factory=list)  # left sides of states of other forms in the cascade

    def new_variable(self, name: str) -> str:
        """A variable whose name and rank are free."""
        while name in self.taken or rank_of(name) in self.taken:
            name += "_"
        self.taken |= {name, rank_of(name)}
        return name

    def point(self) -> dict[str, Expr]:
        """The value of each variable walked, over the index and the tile's variable."""
        last = self.over[-1]
        tiles: Expr = Var(name=self.index)
        out: dict[str, Expr] = {}
        if len(self.over) > 1:
            count = self.tiles()
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

    def tiles(self) -> Expr:
        """How many tiles the last variable has."""
        extent = Scalar(name=rank_of(self.over[-1]))
        if not self.inner:
            return extent
        inner = Scalar(name=rank_of(self.inner))
        return apply("floordiv", apply("sub", apply("add", extent, inner), Num(value=1)), inner)

    def ranks(self) -> tuple[Definition, ...]:
        """Definitions of the ranks that the loops walk."""
        count = self.tiles()
        for v in self.over[:-1]:
            count = apply("mul", Scalar(name=rank_of(v)), count)
        index = Definition(name=self.index, expr=count)
        return (Definition(name=self.inner, expr=Num(value=self.tile)), index) if self.inner else (index,)

    def constraints(self) -> tuple[Expr, ...]:
        """The end of the data, and the constraints of the cascade at a point of the loops."""
        point = self.point()
        last = self.over[-1]
        tail = (apply("lt", point[last], Scalar(name=rank_of(last))),) if self.inner else ()
        return (*tail, *(substitute(c, point) for c in self.cascade.constraints if not self.is_outer(c)))

    def is_outer(self, condition: Expr) -> bool:
        """Whether a constraint would, at an index, cull a state's own update: it becomes a condition of reductions."""
        if not set(variables(condition)) & set(self.over):
            return False
        left = set(variables(substitute(condition, self.point()))) - {self.index}
        return any(left <= free for free in (*self.frees, *(set(s.einsum.free) for s in self.states.values())))

    def conditions(self, s: Einsum) -> tuple[Expr, ...]:
        """The conditions that a reduction must carry itself inside a loop."""
        outer = (c for c in self.cascade.constraints if self.is_outer(c) and set(variables(c)) <= set(s.space))
        return (*outer, *s.where) if s.reduce is not None else s.where

    def streams(self, tensor: str) -> bool:
        """Whether a tensor varies along the ranks walked."""
        d = self.defs.get(tensor)
        return d is not None and any(v in d.free for v in self.over)

    def place(self, s: Einsum) -> None:
        """Find when an Einsum has its value, and which loop it belongs to if it reduces over the ranks walked."""
        if s.is_fiberwise and set(s.space) & set(self.over):
            raise not_lowered(s, f"a {s.reduce} along the rank that is streamed")
        if any(v in s.free for v in self.over):
            if s.tensor not in self.added and not all(isinstance(i, Var) for i in s.indices):
                raise not_lowered(s, "a tensor written at an offset of a looped rank")
            return
        if not set(s.ranks) & set(self.over):
            self.ready[s.tensor] = max((self.finished(r) for r in reads(s.expr, *s.where)), default=0)
            return
        self.states[s.tensor] = state = self.state_of(s)
        self.ready[s.tensor] = state.loop + 1

    def finished(self, read: Read) -> int:
        """How many loops must have ended before this read can be evaluated inside a stream or outside."""
        if self.streams(read.tensor):
            d = self.defs[read.tensor]
            return max((self.finished(r) for r in reads(d.expr, *d.where)), default=0)
        return self.ready.get(read.tensor, 0)

    def state_of(self, s: Einsum) -> State:
        """The state of a reduction: in the loop of what it waits for if a correction moves it, else in the next."""
        need = max((self.finished(r) for r in reads(s.expr, *s.where)), default=0)
        summand = inline_reads(s.expr, self.defs, lambda r, _: self.streams(r.tensor) and self.finished(r) == need)
        if need == 0:
            return State(s, 0, Correction(form="none"), summand)
        anchors = tuple(
            r for r in reads(summand, *s.where) if not self.streams(r.tensor) and self.ready.get(r.tensor, 0) == need
        )
        answer = self.derive_correction(s, summand, anchors, need)
        if isinstance(answer, Rejection):
            self.steps.append(
                Step(
                    rule="not streamed",
                    kind="law",
                    before=(str(s),),
                    what=f"{s.tensor} waits for {', '.join(dict.fromkeys(a.tensor for a in anchors))}: "
                    f"one more loop over {', '.join(map(rank_of, self.over))}",
                    proof=(*underlined(answer.where, self.cascade.source), answer.reason),
                )
            )
            return State(s, need, Correction(form="none"), summand)
        if answer.form == "none":
            return State(s, need - 1, answer, summand, anchors)
        basis, new = self.components(s, answer, anchors, need)
        shown = "; ".join(", ".join(map(plain, row)) for row in answer.matrix)
        named = ", ".join(dict.fromkeys(b.tensor for b in basis))
        self.steps.append(
            Step(
                rule="R3 running state",
                kind=answer.kind,
                before=(str(s),),
                after=tuple(str(e) for e in new),
                proof=answer.proof,
                claim=Claim(
                    reduce=s.reduce or "",
                    form=answer.form,
                    references=tuple(a for a in anchors if a in reads(summand)),
                    positive=answer.positive,
                    nonnegative=answer.nonnegative,
                    basis=(summand, *(self.states[b.tensor].summand for b in basis[1:])),
                    matrix=answer.matrix,
                ),
                what=f"{s.tensor} keeps a running state, moved by C = {shown}"
                if answer.dimension == 1
                else f"{s.tensor} keeps a running state of {answer.dimension} sums, {named}, moved by a matrix C",
            )
        )
        return State(s, need - 1, answer, summand, anchors, 0, basis)

    def components(
        self, s: Einsum, answer: Correction, anchors: tuple[Read, ...], need: int
    ) -> tuple[tuple[Read, ...], list[Einsum]]:
        """The sums that the state of `s` holds beside its own, each a state; those that exist already are shared."""
        reads_of_basis = [Read(tensor=s.tensor, indices=s.indices)]
        new: list[Einsum] = []
        for b in answer.basis[1:]:
            held = {v for c in self.cascade.constraints if set(variables(c)) <= set(s.space) for v in variables(c)}
            held |= set(variables(b, *s.where))
            kept = tuple(i for i in s.indices if set(variables(i)) & held)
            expr = self.spread(b, s.ranks)
            e = replace(s, tensor=fresh(f"{s.tensor}{len(reads_of_basis)}", self.taken), indices=kept, expr=expr)
            summand = inline_reads(e.expr, self.defs, lambda r, _: self.streams(r.tensor) and self.finished(r) == need)
            twin = self.twin(e, summand, need - 1)
            if twin is None:
                new.append(e)
                twin = e.tensor
                self.states[twin] = State(e, need - 1, answer, summand, anchors, len(reads_of_basis))
                self.defs[twin] = e
                self.ready[twin] = need
            reads_of_basis.append(Read(tensor=twin, indices=self.states[twin].einsum.indices))
        basis = tuple(reads_of_basis)
        for e in new:
            self.states[e.tensor].basis = basis
        return basis, new

    def twin(self, s: Einsum, summand: Expr, loop: int) -> str | None:
        """The state that sums the same over the same points in the same loop, if there is one."""
        for name, other in self.states.items():
            e = other.einsum
            alike = (e.indices, e.reduce, e.ranks, e.where) == (s.indices, s.reduce, s.ranks, s.where)
            if alike and other.loop == loop and equal(other.summand, summand):
                return name
        return None

    def spread(self, expr: Expr, ranks: tuple[str, ...]) -> Expr:
        """The expression, naming every reduced rank: a count is a sum of ones over them."""
        for v in ranks:
            if v not in variables(expr):
                expr = apply("add", expr, apply("mul", Num(value=0), Var(name=v)))
        return expr

    def derive_correction(
        self, s: Einsum, summand: Expr, anchors: tuple[Read, ...], need: int
    ) -> Correction | Rejection:
        """What moves the state of a reduction from one value of its anchors to the next."""
        if any(self.streams(r.tensor) and self.finished(r) == need for r in reads(summand)):
            return Rejection(reason="a value along the rank depends on a finished reduction through another reduction")
        if any(set(variables(*a.indices)) & set(self.over) for a in anchors):
            return Rejection(reason="a finished reduction is read at positions of the rank it was reduced over")
        if any(reads(c) and {r.tensor for r in reads(c)} & {a.tensor for a in anchors} for c in s.where):
            return Rejection(reason="a condition depends on a finished reduction")
        for a in anchors:
            if self.anchor_expr(a, need - 1, "old") is None:
                return Rejection(reason=f"{a.tensor} is not a map of running states")
        # A rank that is reduced beside those walked varies the summand too: what has it is no part of a correction.
        moving = {*self.over, *s.ranks}
        fixed = frozenset(e for e in leaves(summand) if not set(variables(e)) & moving)
        # Where a sum has no point yet, its state is the identity and stays so.
        positive = tuple(e for e in leaves(summand) if e in fixed and is_positive(e, self.cascade, live=True))
        assert s.reduce is not None
        return correction(
            summand,
            anchors,
            reduce=s.reduce,
            positive=positive,
            nonnegative=tuple(
                e for e in leaves(summand) if e in fixed and is_positive(e, self.cascade, strict=False, live=True)
            ),
            fixed=fixed,
            shared=self.shared(s.expr, need),
        )

    def shared(self, expr: Expr, need: int) -> tuple[tuple[Read, Expr], ...]:
        """Maps along the rank that an expression reads, directly or through others, with what they are."""
        out: dict[Read, Expr] = {}
        pending = list(reads(expr))
        for r in pending:
            d = self.defs.get(r.tensor)
            if r in out or d is None or not is_map(d) or not (self.streams(r.tensor) and self.finished(r) == need):
                continue
            inner = inline(r, d)
            pending += reads(inner)
            out[r] = inline_reads(inner, self.defs, lambda x, _: self.streams(x.tensor) and self.finished(x) == need)
        return tuple(out.items())

    def anchor_expr(self, read: Read, loop: int, when: str) -> Expr | None:
        """A reference over the states of a loop, at the generation before ("old") or after ("new") a tile,
        or at the "first"."""
        if read.tensor in self.states and self.states[read.tensor].loop == loop:
            return self.generation(read, when)
        if self.ready.get(read.tensor, 0) <= loop:
            return read
        d = self.defs[read.tensor]
        if not is_map(d):
            return None
        ok = True
        whole = inline(read, d)
        # What is divided by the extent is a sum; a scale of a maximum stays what it is.
        sums = all(self.states[r.tensor].einsum.reduce == "sum" for r in reads(whole) if r.tensor in self.states)

        def leaf(e: Expr) -> Expr | None:
            nonlocal ok
            if isinstance(e, Scalar) and sums and (count := self.count(e, loop)) is not None:
                return self.generation(count, when)
            if isinstance(e, Read):
                inner = self.anchor_expr(e, loop, when)
                ok = ok and inner is not None
                return inner or e
            return None

        out = transform(whole, leaf)
        return out if ok else None

    def count(self, extent: Scalar, loop: int) -> Read | None:
        """The state that counts the points seen, for a reference that is divided by the extent of the rank.

        So a mean is that of what was seen: a sum over all of M would be far from it, and cost digits.
        """
        (v, *others) = self.over
        if others or extent.name != rank_of(v) or any(set(variables(c)) <= {v} for c in self.cascade.constraints):
            return None
        e = Einsum(tensor="", indices=(), expr=self.spread(Num(value=1), (v,)), reduce="sum", ranks=(v,))
        name = self.twin(e, e.expr, loop)
        if name is None:
            name = fresh(f"{extent.name}C", self.taken)
            e = replace(e, tensor=name)
            self.states[name] = State(e, loop, Correction(form="none"), e.expr)
            self.defs[name] = e
            self.ready[name] = loop + 1
        return Read(tensor=name)

    def generation(self, read: Read, when: str) -> Read:
        """A state before a tile ("old"), after it ("new"), at the "first" or after the "last"."""
        at: Expr = Var(name=self.index)
        if when == "new":
            at = apply("add", at, Num(value=1))
        elif when == "first":
            at = Num(value=0)
        elif when == "last":
            at = Scalar(name=rank_of(self.index))
        return Read(tensor=self.running(read.tensor), indices=(*read.indices, at))

    def running(self, tensor: str) -> str:
        """The name of the running state of a reduction."""
        key = (tensor, -1)
        if key not in self.memo:
            self.memo[key] = fresh("R" + tensor, self.taken)
        return self.memo[key]


def underlined(e: Expr | None, source: SourceText | None) -> tuple[str, ...]:
    """The line of the text that an expression stands in, and one that underlines it; nothing if it has no place."""
    if e is None or e.span is None or source is None:
        return ()
    shown = Diagnostic(code="not-streamed", headline="", span=e.span).render(source, kind="").splitlines()
    return tuple(line[1:] for line in shown if line[:1] == " " and " | " in line)


def plain(c: Expr) -> str:
    """C as text, the next reference written as `NAME_next`."""
    return str(
        transform(
            c,
            lambda e: (
                Read(tensor=e.tensor.replace(PRIME, "") + "_next", indices=e.indices)
                if isinstance(e, Read) and e.tensor.endswith(PRIME)
                else None
            ),
        )
    )


def not_lowered(s: Einsum, what: str) -> LoweringError:
    """The error of what has no lowering yet."""
    return LoweringError.of(
        "not-lowered-yet",
        f"{what} has no lowering yet",
        span=s.span,
        rule="reference, analysis and derivation work all the same",
        hint=f"the Einsum is {s}",
    )
