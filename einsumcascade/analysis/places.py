"""Where a read stands beside an Einsum that moves along a rank: at the same place, behind it, ahead, or anywhere.

Places, and moving along a rank or iterating it, are those of Definition P1 of docs/analysis.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from einsumcascade.analysis.dependence import (
    Partition,
    axes,
    canonical_sizes,
    conditions,
    dependencies,
    factors,
    linear,
    reached,
    reads_of,
    split_index,
)
from einsumcascade.language.culling import conjuncts
from einsumcascade.language.fiberwise import solve_form
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Read,
    Statement,
    Var,
    apply,
    rank_of,
    reads,
    substitute,
    variables,
    walk,
)


class Place(Enum):
    """Where what is read stands, seen from the place where the Einsum stands along the rank."""

    HERE = "at the same place, or a constant distance away"
    BEHIND = "at the same or a lower place"
    AHEAD = "at the same or a higher place"
    FIRST = "at a constant place near the beginning"
    LAST = "at a constant place near the end"
    ANYWHERE = "anywhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What a statement is to a rank (Definitions P1 and P2 of docs/analysis.md).

    Args:
        tensor: what it writes.
        indices: where it writes it.
        free: variables of the left side.
        reduced: variables reduced.
        own: the variable by which it moves along the rank, or None.
        iterates: whether it walks all of the rank.
        carries: whether its left side has all of the rank.
        recurs: whether the tensor depends on itself.
        reads: what it needs, that of an operation on whole fibers included.
        conditions: what holds at its points.
        blocks: variables of the iterative blocks around it, outermost first.
        begins: whether it is an `init`.
    """

    tensor: str
    indices: tuple[Expr, ...]
    free: tuple[str, ...]
    reduced: tuple[str, ...]
    own: str | None
    iterates: bool
    carries: bool
    recurs: bool
    reads: tuple[Read, ...]
    conditions: tuple[Expr, ...]
    blocks: tuple[str, ...]
    begins: bool

    @property
    def space(self) -> tuple[str, ...]:
        """Variables of the left side, then those reduced."""
        return self.free + tuple(v for v in self.reduced if v not in self.free)


class Ground:
    """A cascade seen along one rank; what it finds out about a read it keeps."""

    def __init__(self, cascade: Cascade, part: Partition) -> None:
        self.cascade, self.part = cascade, part
        self.sizes = canonical_sizes(cascade)
        # An axis written at a partitioned index has the rank that the parts make.
        self.shape = {t: tuple(self._whole(t, k, v) for k, v in enumerate(s)) for t, s in axes(cascade).items()}
        self.along = (part.whole, *part.parts)
        self.iterative = {s.tensor for s in walk(cascade.body) if isinstance(s, Init)}
        direct = dependencies(cascade)
        recurring = {t for t in self.iterative if t in reached(direct, t)}
        on_a_circle = {
            s.tensor
            for s in walk(cascade.body)
            if isinstance(s, Einsum) and recurring and s.tensor in reached(direct, s.tensor)
        }
        self.facts = {id(s): self._fact(s, on_a_circle, b) for s, b in _placed(cascade.body, ())}
        # By identity: all that is asked about stands in a fact, and a hash of an expression walks all of it.
        self._places: dict[tuple[int, int, str | None, str | None], Place] = {}
        self._landings: dict[tuple[int, str | None, int], int | None] = {}
        self._leanings: dict[tuple[int, str | None], int] = {}
        self._full = {t: part.has_all(tuple(v for v in s if v)) for t, s in self.shape.items()}

    def _whole(self, tensor: str, axis: int, variable: str | None) -> str | None:
        for e in self.cascade.einsums:
            if e.tensor == tensor and len(variables(e.indices[axis])) > 1:
                return self.part.whole if split_index(e.indices[axis], self.sizes) in self.part.ways else variable
        return variable

    def _fact(self, s: Einsum | Init, circle: set[str], blocks: tuple[str, ...]) -> Fact:
        reduced = s.ranks if isinstance(s, Einsum) else ()
        needed, held = _needs(s, reads_of(self.cascade, s), conditions(self.cascade, s))
        space = (*s.free, *reduced)
        return Fact(
            tensor=s.tensor,
            indices=s.indices,
            free=s.free,
            reduced=reduced,
            own=self.part.moves_by(space),
            iterates=self.part.has_all(space),
            carries=self.part.has_all(s.free),
            recurs=s.tensor in circle and isinstance(s, Einsum),
            reads=needed,
            conditions=tuple(c for h in held for c in conjuncts(h)),
            blocks=blocks,
            begins=isinstance(s, Init),
        )

    def is_along(self, r: Read) -> bool:
        """Whether a read looks along the rank: at a tensor that has all of it, or by its own variable."""
        return self.is_full(r.tensor) or self.part.whole in variables(*r.indices)

    def is_first(self, r: Read) -> bool:
        """Whether a read takes the first generation of an iterative tensor and no other."""
        return any(
            f.begins
            and f.tensor == r.tensor
            and all(i == there for i, there in zip(r.indices, f.indices, strict=True) if not variables(there))
            for f in self.facts.values()
        )

    def looks_back(self, variable: str, tensors: set[str]) -> bool:
        """Whether steps of an iteration read what may be in the same fibers of `tensors` (if empty, of any)."""
        if any(variable in self.shape[t] for t in tensors):
            return False
        for block in (s for s in walk(self.cascade.body) if isinstance(s, Iter) and s.var == variable):
            written = {s.tensor for s in walk(block.body) if isinstance(s, Einsum)}
            for f in (self.facts[id(s)] for s in walk(block.body) if isinstance(s, Einsum)):
                if any(
                    self.is_along(r) and r.tensor not in written and variable not in variables(*r.indices)
                    for r in f.reads
                ):
                    return True
        return False

    def is_full(self, tensor: str) -> bool:
        """Whether a tensor has all of the rank."""
        return self._full[tensor]

    def axis(self, tensor: str) -> int | None:
        """The axis of a tensor that moves along the rank."""
        variable = self.part.moves_by(tuple(v for v in self.shape[tensor] if v))
        return None if variable is None else self.shape[tensor].index(variable)

    def through(self, r: Read, axis: int) -> str | None:
        """The variable of another rank that walks an axis of a read, if one does."""
        v = self.plain(r, axis)
        return None if v in self.along else v

    def plain(self, r: Read, axis: int) -> str | None:
        """The variable at which, but for a constant, an axis of a read is indexed."""
        moving = [t for t in linear(r.indices[axis]) or () if t.variable]
        return moving[0].variable if len(moving) == 1 and not factors(moving[0], self.sizes) else None

    def place(self, fact: Fact, r: Read, axis: int, stand: str | None) -> Place:
        """Find where an axis of a read stands, seen from a variable of the Einsum; None sees constants only."""
        return self._at(fact, r.indices[axis], self.shape[r.tensor][axis], stand)

    def _at(self, fact: Fact, index: Expr, axis: str | None, stand: str | None) -> Place:
        key = (id(fact), id(index), axis, stand)
        if key not in self._places:
            self._places[key] = self._place(fact, index, axis, stand)
        return self._places[key]

    def landing(self, fact: Fact, stand: str | None, *, way: int) -> int | None:
        """The axis of the result along which elements become known as `stand` moves; None: at the end.

        `way` is 1 where it moves up, -1 where it moves down, 0 where it may do both.
        """
        if stand is None:
            return None
        key = (id(fact), stand, way)
        if key not in self._landings:
            landing = self._here(fact, stand)
            if landing is None:
                leans = ((k, self._lean(fact, i, stand)) for k, i in enumerate(fact.indices))
                landing = next((k for k, lean in leans if lean and way in (0, lean)), None)
            self._landings[key] = landing
        return self._landings[key]

    def leaning(self, fact: Fact, stand: str | None) -> int:
        """The way in which a statement's elements become known before the end, if that is one way only; else 0."""
        key = (id(fact), stand)
        if key not in self._leanings:
            leans = (self._lean(fact, i, stand) for i in fact.indices)
            self._leanings[key] = 0 if self._here(fact, stand) is not None else next(filter(None, leans), 0)
        return self._leanings[key]

    def _here(self, fact: Fact, stand: str | None) -> int | None:
        """The axis of the result that is where `stand` is, if one is."""
        places = (self._at(fact, i, v, stand) for i, v in zip(fact.indices, self.shape[fact.tensor], strict=True))
        return next((k for k, p in enumerate(places) if p is Place.HERE), None)

    def _lean(self, fact: Fact, index: Expr, stand: str | None) -> int:
        """1 where an index of the result is at or above `stand`, -1 where it is at or below, else 0."""
        if stand is None or not isinstance(index, Var) or index.name == stand:
            return 0
        return 1 if self._is_below(fact, stand, index.name) else -1 if self._is_below(fact, index.name, stand) else 0

    def _place(self, fact: Fact, index: Expr, axis: str | None, stand: str | None) -> Place:
        tiles, standing = (self.part.stride(v or "") for v in (axis, stand))
        match index:
            case Apply(op="floordiv", args=(Var(name=v), by)) if stand is not None and standing is None:
                divisor = factors_of(by, self.sizes)
                if tiles is not None:
                    return Place.HERE if v == stand and divisor == tiles else Place.ANYWHERE
                below = v == stand or self._is_below(fact, v, stand)
                return Place.BEHIND if divisor and below else Place.ANYWHERE
        terms = linear(index)
        if terms is None:
            return Place.ANYWHERE
        moving = [t for t in terms if t.variable]
        fixed = [t for t in terms if not t.variable]
        if not moving:
            names = [factors(t, self.sizes) for t in fixed if t.factors]
            if not names:
                return Place.FIRST if sum(t.number for t in fixed) >= 0 else Place.ANYWHERE
            ends = axis is not None and names == [(self.sizes[rank_of(axis)],)]
            return Place.LAST if ends and sum(t.number for t in fixed if not t.factors) <= 0 else Place.ANYWHERE
        for t in moving:
            if t.variable == stand:
                scale = factors(t, self.sizes)
                if t.number < 1 or (tiles is not None and standing is None):
                    return Place.ANYWHERE
                if scale == (standing if standing is not None and tiles is None else ()):
                    return Place.HERE
                return Place.ANYWHERE if standing is not None else Place.AHEAD
        (t, *more) = moving
        if more or stand is None or t.number != 1 or t.factors or any(f.factors for f in fixed):
            return Place.ANYWHERE
        if self._is_below(fact, t.variable or "", stand):
            return Place.BEHIND
        if self._is_below(fact, stand, t.variable or ""):
            return Place.AHEAD
        return Place.ANYWHERE

    def _is_below(self, fact: Fact, low: str, high: str) -> bool:
        """Whether the conditions of an Einsum say `low <= high`."""
        for c in fact.conditions:
            match c:
                case Apply(op="le" | "lt" | "eq", args=(x, y)) if self._is_at(x, low) and self._is_at(y, high):
                    return True
                case Apply(op="ge" | "gt" | "eq", args=(x, y)) if self._is_at(x, high) and self._is_at(y, low):
                    return True
        return False

    def _is_at(self, expr: Expr, variable: str) -> bool:
        if expr == Var(name=variable):
            return True
        return self.part.stride(variable) is not None and (split_index(expr, self.sizes) or ("",))[0] == variable


def factors_of(expr: Expr, sizes: dict[str, str]) -> tuple[str, ...]:
    """Name the factors of a constant index, sorted; none where it is no product of names and a positive number."""
    terms = linear(expr)
    return factors(terms[0], sizes) if terms and len(terms) == 1 and terms[0].number > 0 else ()


def _placed(body: tuple[Statement, ...], blocks: tuple[str, ...]) -> Iterator[tuple[Einsum | Init, tuple[str, ...]]]:
    for s in body:
        if isinstance(s, Iter):
            yield from _placed(s.body, (*blocks, s.var))
        else:
            yield s, blocks


def _needs(
    s: Einsum | Init, found: tuple[Read, ...], held: tuple[Expr, ...]
) -> tuple[tuple[Read, ...], tuple[Expr, ...]]:
    """What a statement reads and the conditions on it, with what a solve needs beyond its own row and column."""
    form = solve_form(s) if isinstance(s, Einsum) else None
    if form is None or not isinstance(s, Einsum) or not isinstance(s.expr, Apply):
        return found, held
    matrix, right = s.expr.args
    z = Var(name=s.ranks[0])
    whole = (substitute(matrix, {form.row: z, form.column: z}), substitute(right, {form.right: z}))
    if s.reduce == "trisolve":
        # By forward substitution: the rows and the right side up to the row of the result, whose own row is at hand.
        row = substitute(matrix, {form.row: Var(name=form.result), form.column: z})
        return reads(row, *whole), (*held, apply("le", z, Var(name=form.result)))
    return reads(*whole), held
