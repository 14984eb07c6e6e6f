"""The streaming condition: a reduction that waits for another over the same rank, kept in one pass and proven.

A reduction `s(d) = (+)_m F(x_m, d)` whose d is known only once the same rank has been read streams, for a sum, when
the functions F(., d) span a space of finite dimension n: with a basis B(x, d) of it, `B(x, d') = C(d, d') B(x, d)`, so
the n sums of B, kept for the reference seen so far, are moved to the next one by the matrix C. Under a maximum it
streams when `F(x, d') = F(x, d) + C(d, d')`, or with a positive factor. Softmax is n = 1, a variance n = 3.
Source: FuseMax section IV for softmax; RedFuser and Neptune for n = 1; Chan, Golub, LeVeque for the variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, reads, subexpressions
from einsumcascade.rewrites.algebra import from_sympy, to_sympy
from einsumcascade.rewrites.corrections import Correction, Rejection, told, understood
from einsumcascade.rewrites.proofs import PRIME, Question, folder, found_in, ignored, names_of, remembered
from einsumcascade.rewrites.span import canonical, separated, span

Shared = tuple[tuple[Read, Expr], ...]


def correction(
    summand: Expr,
    references: Iterable[Read],
    *,
    reduce: str,
    positive: tuple[Expr, ...] = (),
    nonnegative: tuple[Expr, ...] = (),
    fixed: frozenset[Expr] = frozenset(),
    shared: Shared = (),
) -> Correction | Rejection:
    """Find C for a summand and prove it, or say why there is none.

    Args:
        summand: F, over leaves (reads) that vary along the rank, and the references.
        references: the reads of d; their next values appear in C as reads of `NAME__next`.
        reduce: name of the reduction.
        positive, nonnegative: references, and leaves of `fixed`, known to be > 0, or >= 0.
        fixed: other leaves that do not vary along the rank; constants and extents never do.
        shared: values that exist anyway, each as (read, its expression over the same leaves): the basis is written
            with them where they occur in it.

    Returns: the correction with its proof, or a rejection with its reason.
    Cost: SymPy, some 10-300 ms; cached by the structure of the summand, on disk too.
    """
    used = tuple(r for r in references if r in reads(summand))
    if not used:
        return Correction(form="none")
    names = names_of(summand, shared)

    def called(chosen: Iterable[Expr]) -> tuple[str, ...]:
        return tuple(names.leaves[e].tensor for e in names.leaves if e in set(chosen))

    sizes = [e for e in names.leaves if isinstance(e, Scalar) and e.is_extent]
    still = [e for e in names.leaves if isinstance(e, Scalar)]
    question = Question(
        summand=names.canonical(summand),
        used=tuple(names.leaves[r] for r in used),
        reduce=reduce,
        positive=called([*positive, *sizes]),
        nonnegative=called(nonnegative),
        fixed=called([*fixed, *still]),
        shared=tuple((names.shared[r].tensor, names.canonical(e)) for r, e in shared),
    )
    found = _answer(question)
    if isinstance(found, Rejection):
        where = None if found.where is None else found_in(summand, names.own(found.where))
        late = ", ".join(dict.fromkeys(r.tensor for r in used if where is None or r in reads(where)))
        reason = names.shown(found.reason).replace("{where}", str(where)).replace("{late}", late)
        return Rejection(reason=reason, where=where)
    return replace(
        found,
        basis=tuple(map(names.own, found.basis)),
        matrix=tuple(tuple(map(names.own, row)) for row in found.matrix),
        proof=tuple(map(names.shown, found.proof)),
        positive=positive,
        nonnegative=nonnegative,
    )


@lru_cache(maxsize=512)
def _answer(question: Question) -> Correction | Rejection:
    """The answer to a question, from disk if it is known there."""
    kept = remembered(question, lambda: told(_found(question)))
    answer = understood(kept, question)
    if answer is None:
        ignored(folder())
        answer = _found(question)
    return answer


def _found(question: Question) -> Correction | Rejection:
    """Find the answer by algebra."""
    import sympy as sp

    summand, used, reduce = question.summand, question.used, question.reduce
    symbols: dict[Expr, Any] = {}
    opaque: list[Apply] = []

    def symbol(e: Expr) -> Any:
        if isinstance(e, Apply) and any(r in used for r in reads(e)):
            opaque.append(e)
        if e not in symbols:
            name = e.tensor if isinstance(e, Read) else str(e)
            sign = {"positive": True} if name in question.positive else {}
            if not sign and name in question.nonnegative:
                sign = {"nonnegative": True}
            symbols[e] = sp.Symbol(name, real=True, **sign)
        return symbols[e]

    f = to_sympy(summand, symbol)
    if opaque:
        reason = "{where} depends on {late} through '" + opaque[0].op + "', which algebra cannot see into"
        return Rejection(reason=reason, where=opaque[0])
    old = [symbols[r] for r in used if r in symbols]
    new = [_twin(s) for s in old]
    still = {s for e, s in symbols.items() if isinstance(e, Read) and e.tensor in question.fixed}
    streamed = set(f.free_symbols) - set(old) - still
    back: dict[Any, Expr] = {s: e for e, s in symbols.items()}
    back |= {
        n: Read(tensor=r.tensor + PRIME, indices=r.indices)
        for r, n in zip((r for r in used if r in symbols), new, strict=True)
    }
    claim = _Claim(f=f, old=old, new=new)
    if reduce in ("max", "min"):
        shift = sp.simplify(sp.expand(claim.moved(f) - f))
        if not shift.free_symbols & streamed:
            return _written(claim, "shift", (f,), ((shift,),), back)
    found = span(f, streamed, old, new)
    if isinstance(found, str):
        where = _blamed(summand, used, symbol, streamed, set(old))
        what = "{where} mixes values along the rank with {late}: no finite sum of products" if where else found
        return Rejection(reason=what + ", so it must wait for the final {late}", where=where)
    if len(found.basis) > 1 and reduce != "sum":
        return Rejection(reason=f"a {reduce} of a sum of {len(found.basis)} products is not made of as many {reduce}s")
    lost = _lost(found.matrix, old)
    if lost is not None:
        name = next(r.tensor for r in used if symbols.get(r) == lost)
        why = f"C divides by {name}, which may be 0 while the sums for it are not, so it must wait for the final {name}"
        return Rejection(reason=why)
    (factor, *_), *_ = found.matrix
    if reduce in ("max", "min") and not (factor.is_positive or isinstance(factor, sp.exp)):
        return Rejection(reason=f"the factor {factor} is not known to be positive, so it may turn a {reduce} around")
    if reduce == "prod":
        return Rejection(reason="a factor of each element does not leave a product as one factor")
    names: dict[Any, Any] = {}
    for name, value in question.shared:
        known = canonical(to_sympy(value, symbol))
        if known.args and known.free_symbols & streamed:
            names[known] = sp.Symbol(name)
            back[names[known]] = Read(tensor=name)
    basis = (f, *(b.xreplace(names) for b in found.basis[1:]))
    return _written(claim, "linear", found.basis, found.matrix, back, spelled=basis)


def _blamed(
    summand: Expr, used: tuple[Read, ...], symbol: Callable[[Expr], Any], streamed: set[Any], old: set[Any]
) -> Expr | None:
    """The smallest part of a summand that is no sum of products of a function of x and one of d."""
    parts = [e for e in subexpressions(summand) if isinstance(e, Apply) and set(used) & set(reads(e))]
    for e in sorted(parts, key=lambda e: len(list(subexpressions(e)))):
        if isinstance(separated(to_sympy(e, symbol), streamed, old), str):
            return e
    return None


def _lost(matrix: tuple[tuple[Any, ...], ...], old: list[Any]) -> Any | None:
    """A reference at whose 0 a state keeps nothing, though there are keys: C divides by its old value."""
    import sympy as sp

    for entry in (c for row in matrix for c in row):
        below = sp.fraction(sp.together(entry))[1]
        for factor in sp.Mul.make_args(sp.factor(below)):
            free = [s for s in old if s in factor.free_symbols]
            if free and not (factor.is_positive or isinstance(factor, sp.exp)):
                return free[0]
    return None


def _twin(symbol: Any) -> Any:
    """The symbol of the next value of a reference, with the same assumptions."""
    import sympy as sp

    return sp.Symbol(f"{symbol}'", **symbol.assumptions0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """What is to be proven: B(x, d') = C(d, d') B(x, d), over these symbols of d and d'."""

    f: Any
    old: list[Any]
    new: list[Any]

    def moved(self, value: Any) -> Any:
        """The value at d' instead of d."""
        return value.subs(dict(zip(self.old, self.new, strict=True)), simultaneous=True)

    def back(self, value: Any) -> Any:
        """The value where d' is d."""
        return value.subs(dict(zip(self.new, self.old, strict=True)), simultaneous=True)

    def steps(self, value: Any) -> tuple[Any, Any]:
        """C(d', d'') and C(d, d'') for an entry C(d, d')."""
        third = [_twin(s) for s in self.new]
        both = dict(zip(self.old + self.new, self.new + third, strict=True))
        return value.subs(both, simultaneous=True), value.subs(
            dict(zip(self.new, third, strict=True)), simultaneous=True
        )


def _written(
    claim: _Claim,
    form: str,
    basis: tuple[Any, ...],
    matrix: tuple[tuple[Any, ...], ...],
    back: dict[Any, Expr],
    *,
    spelled: tuple[Any, ...] = (),
) -> Correction | Rejection:
    """Prove a claim and write it in the language."""
    import sympy as sp

    n = len(matrix)
    kind = "algebraic"
    for j, row in enumerate(matrix):
        predicted = basis[0] + row[0] if form == "shift" else sum((c * b for c, b in zip(row, basis, strict=True)), 0)
        residual = claim.moved(basis[j]) - predicted
        if not _is_zero(residual):
            if not _vanishes(residual):
                return Rejection(reason=f"the residual {sp.sstr(residual)} does not vanish")
            kind = "numerical"
    unit = 0 if form == "shift" else 1
    for j, row in enumerate(matrix):
        for k, entry in enumerate(row):
            want = unit if j == k else 0
            if not _is_zero(claim.back(entry) - want):
                return Rejection(reason=f"C(d, d) has {claim.back(entry)} at {j + 1}, {k + 1}, not {want}")
            step = [claim.steps(c)[0] for c in row]
            whole = claim.steps(entry)[1]
            joined = step[0] + entry if form == "shift" else sum((a * matrix[i][k] for i, a in enumerate(step)), 0)
            if not _is_zero(joined - whole):
                return Rejection(reason=f"C(d', d'') C(d, d') differs from C(d, d'') at {j + 1}, {k + 1}")
    entries = [[from_sympy(c, back) for c in row] for row in matrix]
    summands = [from_sympy(b, back) for b in (spelled or basis)]
    if any(e is None for row in entries for e in row) or any(b is None for b in summands[1:]):
        return Rejection(reason=f"C = {_shown(matrix)} cannot be written in the language")
    return Correction(
        form=form,
        basis=tuple(b if b is not None else Num(value=0) for b in summands),
        matrix=tuple(tuple(e for e in row if e is not None) for row in entries),
        sinks=tuple(tuple(_sinks(c, claim.old) for c in row) for row in matrix),
        kind=kind,
        proof=_proof(claim, form, basis, matrix, kind, n),
    )


def _proof(
    claim: _Claim, form: str, basis: tuple[Any, ...], matrix: tuple[tuple[Any, ...], ...], kind: str, n: int
) -> tuple[str, ...]:
    import sympy as sp

    sign, equal = ("+", "F(x, d) + C") if form == "shift" else ("*", "C F(x, d)")
    how = "is 0 identically" if kind == "algebraic" else "is 0 to 50 digits at 20 random points"
    f = claim.f
    lines = [f"F(x, d)       = {sp.sstr(f)}"]
    if n == 1:
        lines += [
            f"F(x, d')      = {sp.sstr(claim.moved(f))}",
            f"C(d, d')      = {_shown(matrix)}",
            f"residual        F(x, d') - ({equal}) {how}",
            f"laws            C(d, d) = {int(form != 'shift')};  C(d', d'') {sign} C(d, d') = C(d, d'')",
        ]
    else:
        lines += [f"B{j}(x, d)      = {sp.sstr(b)}" for j, b in enumerate(basis, start=1)]
        lines += [f"C(d, d') row {j} = {_shown((row,))}" for j, row in enumerate(matrix, start=1)]
        lines += [
            f"residual        B(x, d') - C B(x, d) {how}, {n} rows",
            "laws            C(d, d) = I;  C(d', d'') C(d, d') = C(d, d'')",
        ]
    return tuple(lines)


def _shown(matrix: tuple[tuple[Any, ...], ...]) -> str:
    import sympy as sp

    return "; ".join(", ".join(sp.sstr(c) for c in row) for row in matrix)


def _is_zero(value: Any) -> bool:
    import sympy as sp

    value = sp.sympify(value)
    return bool(value == 0 or _expanded(value) == 0 or sp.simplify(value) == 0)


def _sinks(c: Any, old: list[Any]) -> bool:
    """Whether C is one exponential that grows with every old reference it has."""
    import sympy as sp

    return isinstance(c, sp.exp) and all(sp.diff(c.args[0], s).is_positive for s in old)


def _expanded(value: Any) -> Any:
    import sympy as sp

    return sp.expand(sp.powsimp(sp.expand(sp.expand_log(value)), combine="exp"))


def _vanishes(residual: Any) -> bool:
    """Whether an expression is 0 to 50 digits at 20 random rational points."""
    import random

    import sympy as sp

    rng = random.Random(20)
    names = sorted(residual.free_symbols, key=str)
    for _ in range(20):
        point = {s: sp.Rational(rng.randint(1, 4000), 1000) for s in names}
        if abs(residual.subs(point).evalf(60)) > sp.Float(10) ** -48:
            return False
    return True
