"""Find softmaxes: exponentials along a rank, the sums they go into, and what these divide.

Definitions X1 to X3 of docs/analysis.md say what is looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from einsumcascade.analysis.dependence import Partition, ancestors, producers
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Iter,
    Num,
    Read,
    Scalar,
    Var,
    rank_of,
    reads,
    subexpressions,
    substitute,
    transform,
    variables,
    walk,
)

DIVISIONS = ("immediate", "deferred", "none")
EXPONENTIALS = ("exp", "exp2")
SAID: Mapping[str, str] = {
    "global": "the maximum over all of {}",
    "local": "the maximum over a tile of {}",
    "running": "the largest so far along {}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A softmax over one rank; `exponential` is that of its weights."""

    exponential: Expr
    weights: str
    normaliser: str
    reference: str
    division: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Uses:
    """What the exponentials of a softmax go into.

    Args:
        raw: tensors that hold them along the rank, among other things perhaps.
        sums: tensors made of sums of them and of nothing else, in cascade order.
        mixed: tensors made of sums of them and of other things.
    """

    raw: frozenset[str]
    sums: tuple[str, ...]
    mixed: frozenset[str]


class Flow:
    """What depends on what along one rank."""

    def __init__(self, cascade: Cascade, part: Partition) -> None:
        self.cascade, self.part = cascade, part
        self.own = (part.whole, *part.parts)
        self.name = rank_of(part.whole)
        self.made = producers(cascade)
        self.circular = {e.tensor for e in cascade.einsums if e.tensor in ancestors(cascade, e.tensor)}
        blocks = (s for s in walk(cascade.body) if isinstance(s, Iter) and s.var in self.own)
        inside = {e.tensor for b in blocks for e in walk(b.body) if isinstance(e, Einsum)}
        self.recurring = self.circular & inside

    def softmaxes(self) -> Iterator[Found]:
        """Yield the softmaxes over the rank, in cascade order, each where its exponential stands first."""
        seen: set[Expr] = set()
        for e in self.cascade.einsums:
            for x in exponentials(e.expr):
                site = self.inlined(x)
                if site not in seen:
                    seen.add(site)
                    found = self._softmax(e, site)
                    if found is not None:
                        yield found

    def _softmax(self, e: Einsum, site: Expr) -> Found | None:
        assert isinstance(site, Apply)
        plus, minus = _terms(site.args[0])
        scores = [x for x in plus if self.reference(x) is None]
        if not self.part.has_all(variables(*scores)) or any(self._is_logarithm(x) for x in minus):
            return None
        uses = self._uses(site)
        complete = [t for t in uses.sums if t in self.recurring or not self._moves(self.made[t])]
        if not complete:
            return None
        reference, reasons = self._referred(e, minus, uses)
        divisions = list(self._divisions(site, uses))
        summed = set(uses.sums)
        if not divisions and reference == "none" and not self._logarithms_of(summed):
            return None
        division = next((d for d in DIVISIONS if any(d == kind for kind, _ in divisions)), "none")
        reasons += [why for kind, why in divisions if kind == division]
        if not divisions:
            reasons += self._logarithms_of(summed) or [f"nothing is divided by {complete[0]}"]
        return Found(
            exponential=site,
            weights=e.tensor,
            normaliser=complete[0],
            reference=reference,
            division=division,
            reasons=tuple(dict.fromkeys(reasons)),
        )

    def _referred(self, e: Einsum, minus: list[Expr], uses: _Uses) -> tuple[str, list[str]]:
        """The reference of the exponent, that of the running sum where it moves there, and why."""
        found = [(kind, x) for x in minus if (kind := self.reference(x)) is not None]
        reasons = [f"{e.tensor} subtracts {x}, {SAID[kind].format(self.name)}" for kind, x in found]
        reference = found[0][0] if found else "none"
        if not found:
            reasons.append(f"{e.tensor} subtracts no maximum over {self.name}")
        for t in uses.sums:
            for x in exponentials(self.inlined(self.made[t].expr)):
                assert isinstance(x, Apply)
                for moved in (m for side in _terms(x.args[0]) for m in side):
                    if self.reference(moved) == "running" and reference != "running":
                        reference = "running"
                        reasons.append(f"{t} moves its sum to {moved}, {SAID['running'].format(self.name)}")
        return reference, reasons

    def _uses(self, site: Expr) -> _Uses:
        """Follow the exponentials of `site` until nothing new is found: what a step hands on is read before it."""
        raw: set[str] = set()
        pure: set[str] = set()
        sums: dict[str, None] = {}
        mixed: set[str] = set()
        while True:
            before = len(raw), len(pure), len(sums), len(mixed)
            for s in self.cascade.einsums:
                expr = self.inlined(s.expr)
                origin = site in set(subexpressions(expr))
                taken = _tensors(expr) | ({s.tensor} & self.circular)
                known = raw | sums.keys() | mixed
                if not origin and not taken & known:
                    continue
                # An exponential of none of these moves a sum to another reference, and adds nothing to it.
                values = {r.tensor for r in reads(*_values(expr, site))} - {s.tensor}
                others = any(x != site and _tensors(x) & known for x in exponentials(expr))
                alone = values <= (pure | sums.keys()) and not others
                if (origin or taken & raw) and self._moves(s) and not self._sums_up(s):
                    raw.add(s.tensor)
                    pure |= {s.tensor} if alone else set()
                elif alone and (origin or not taken & mixed - {s.tensor}):
                    sums[s.tensor] = None
                else:
                    mixed.add(s.tensor)
            if before == (len(raw), len(pure), len(sums), len(mixed)):
                order = tuple(e.tensor for e in self.cascade.einsums if e.tensor in sums.keys() - mixed)
                return _Uses(raw=frozenset(raw), sums=order, mixed=frozenset(mixed))

    def _divisions(self, site: Expr, uses: _Uses) -> Iterator[tuple[str, str]]:
        """Yield each division by the sum as (kind, why)."""
        summed = set(uses.sums)
        for s in self.cascade.einsums:
            expr = self.inlined(s.expr)
            here = {self.inlined(x) for x in subexpressions(s.expr) if isinstance(x, Apply) and x.op == "div"}
            for x in subexpressions(expr):
                match x:
                    case Apply(op="div", args=(above, below)) if _tensors(below) & summed:
                        # What is divided: of `1 / SD`, all that it is multiplied by.
                        whole = above if self._holds(above, site, uses) else expr
                        if (whole is above and x not in here) or _tensors(below) & uses.raw:
                            continue
                        raw = site in set(subexpressions(whole)) or bool(_tensors(whole) & uses.raw)
                        if raw:
                            yield "immediate", f"{s.tensor} divides by {below} before the sum over {self.name}"
                        elif s.tensor in self.recurring:
                            yield "immediate", f"{s.tensor} divides by {below} in every step along {self.name}"
                        elif self._holds(whole, site, uses):
                            yield "deferred", f"{s.tensor} divides by {below} after the sum over {self.name}"
                    case Apply(op=op, args=(inside,)) if op in EXPONENTIALS and self.part.has_all(variables(inside)):
                        if any(self._is_logarithm(m) and _tensors(m) & summed for m in _terms(inside)[1]):
                            yield "immediate", f"{s.tensor} subtracts the logarithm of the sum in its exponent"

    def _holds(self, x: Expr, site: Expr, uses: _Uses) -> bool:
        """Whether an expression has something of the exponentials in it, summed or not."""
        return site in set(subexpressions(x)) or bool(_tensors(x) & (uses.raw | set(uses.sums) | uses.mixed))

    def _logarithms_of(self, sums: set[str]) -> list[str]:
        return [
            f"{s.tensor} takes the logarithm of the sum"
            for s in self.cascade.einsums
            if any(isinstance(x, Apply) and x.op == "log" and _tensors(x) & sums for x in subexpressions(s.expr))
        ]

    def _is_logarithm(self, x: Expr) -> bool:
        return isinstance(x, Apply) and x.op == "log"

    def _along(self, e: Einsum) -> tuple[str, ...]:
        """The variables by which an Einsum moves along the rank."""
        return (self.part.whole,) if self.part.whole in e.space else self.part.parts

    def _moves(self, e: Einsum) -> bool:
        """Whether what an Einsum writes still moves along the rank."""
        return any(v in e.free for v in self._along(e))

    def _sums_up(self, e: Einsum) -> bool:
        """Whether an Einsum adds up along the rank: in one go, over a tile, or from step to step."""
        gone = any(v in e.ranks for v in self._along(e))
        steps = e.tensor in self.recurring and e.tensor in _tensors(e.expr)
        return (gone and e.reduce in ("sum", "mean")) or steps

    def inlined(self, expr: Expr) -> Expr:
        """Replace reads of what a map has written by what it computed."""

        def leaf(x: Expr) -> Expr | None:
            e = self.made.get(x.tensor) if isinstance(x, Read) else None
            if e is None or e.reduce is not None or e.tensor in self.circular or not isinstance(x, Read):
                return None
            names: dict[str, Expr] = {}
            for there, here in zip(e.indices, x.indices, strict=True):
                # A constant coordinate takes one element of a fiber: that is no map along it.
                if isinstance(there, Var) and variables(here):
                    names[there.name] = here
                elif there != here:
                    return None
            return self.inlined(substitute(e.expr, names))

        return transform(expr, leaf)

    def reference(self, x: Expr) -> str | None:
        """What kind of maximum along the rank an expression is, if it is one."""
        kinds = [k for r in reads(x) if (k := self._maximum(r, ())) is not None]
        return next((k for k in ("running", "local", "global") if k in kinds), None)

    def _maximum(self, r: Read, seen: tuple[str, ...]) -> str | None:
        e = self.made.get(r.tensor)
        if e is None or r.tensor in seen:
            return None
        if r.tensor in self.recurring:
            if not (isinstance(e.expr, Apply) and e.expr.op == "max" and r.tensor in _tensors(e.expr)):
                return None
            return "running" if any(v in self.own for v in variables(*r.indices)) else "global"
        if e.reduce == "max" and any(v in e.ranks for v in self._along(e)):
            return "local" if self._moves(e) else "global"
        if e.reduce is None and not self.part.has_all(e.free):
            inner = (self._maximum(x, (*seen, r.tensor)) for x in reads(e.expr))
            return next((k for k in inner if k is not None), None)
        return None


def _tensors(x: Expr) -> set[str]:
    return {r.tensor for r in reads(x)}


def exponentials(expr: Expr) -> Iterator[Expr]:
    """Yield the exponentials in an expression, outermost first."""
    return (x for x in subexpressions(expr) if isinstance(x, Apply) and x.op in EXPONENTIALS)


def _values(expr: Expr, site: Expr) -> Iterator[Expr]:
    """Yield the reads that make a value what it is: not those in conditions or exponentials, nor in `site`."""
    match expr:
        case Read():
            yield expr
        case Apply(op="select", args=(_, x, y)):
            yield from _values(x, site)
            yield from _values(y, site)
        case Apply(op=op, args=args) if expr != site and op not in EXPONENTIALS:
            for a in args:
                yield from _values(a, site)
        case _:
            pass


def _terms(expr: Expr) -> tuple[list[Expr], list[Expr]]:
    """Split a sum into what is added and what is subtracted; constant factors are left out."""
    match expr:
        case Apply(op="add" | "sub" as op, args=(x, y)):
            plus, minus = _terms(x)
            more, less = _terms(y) if op == "add" else _terms(y)[::-1]
            return plus + more, minus + less
        case Apply(op="neg", args=(x,)):
            return _terms(x)[::-1]
        case Apply(op="mul", args=(Num() | Scalar(), x)) | Apply(op="mul" | "div", args=(x, Num() | Scalar())):
            return _terms(x)
        case _:
            return [expr], []
