"""What moves a running state, or why nothing does: the answers of `running_state`, and their form on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from einsumcascade.language.ir import Expr, reads
from einsumcascade.rewrites.proofs import PRIME, Question, parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How a state moves from the reference d to d'.

    Args:
        form: "none" (no dependence), "linear" (B' = C B) or "shift" (s' = s + C, under max and min).
        basis: the summands B of the state over x and d; the first is F. One of them: a factor moves the state.
        matrix: C as rows, over the reads of d (old) and their twins (new); of a shift, its one amount.
        sinks: for each entry, whether it is one exponential that grows with the old reference, so that it is 0 where
            that is -inf.
        kind: "algebraic" where the residual is zero as an identity, else "numerical".
        proof: lines to check by hand.
        positive, nonnegative: what the proof takes to be > 0, or >= 0.
    """

    form: str
    basis: tuple[Expr, ...] = ()
    matrix: tuple[tuple[Expr, ...], ...] = ()
    sinks: tuple[tuple[bool, ...], ...] = ()
    kind: str = "algebraic"
    proof: tuple[str, ...] = ()
    positive: tuple[Expr, ...] = ()
    nonnegative: tuple[Expr, ...] = ()

    @property
    def dimension(self) -> int:
        """The number n of sums that the state holds."""
        return len(self.matrix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why a reduction does not stream.

    Args:
        reason: one sentence.
        where: the sub-expression of the summand that is to blame, if one is.
    """

    reason: str
    where: Expr | None = None


def told(answer: Correction | Rejection) -> dict[str, Any]:
    """An answer as a JSON value."""
    if isinstance(answer, Rejection):
        return {"reason": answer.reason, "where": None if answer.where is None else str(answer.where)}
    return {
        "form": answer.form,
        "basis": [str(b) for b in answer.basis],
        "matrix": [[str(c) for c in row] for row in answer.matrix],
        "sinks": [list(row) for row in answer.sinks],
        "kind": answer.kind,
        "proof": list(answer.proof),
    }


def understood(kept: Mapping[str, Any], question: Question) -> Correction | Rejection | None:
    """The answer that a JSON value tells, None if it is not one."""
    known = {x.tensor for e in (question.summand, *(e for _, e in question.shared)) for x in reads(e)}
    known |= {r.tensor + PRIME for r in question.used} | {t for t, _ in question.shared}
    try:
        if "reason" in kept:
            where = None if kept["where"] is None else parsed(kept["where"], known)
            return Rejection(reason=str(kept["reason"]), where=where)
        basis = [parsed(b, known) for b in kept["basis"]]
        matrix = [[parsed(c, known) for c in row] for row in kept["matrix"]]
        sinks = tuple(tuple(bool(s) for s in row) for row in kept["sinks"])
        n = len(matrix)
        square = all(len(row) == n for row in matrix) and len(basis) == n and [len(row) for row in sinks] == [n] * n
        if kept["form"] not in ("linear", "shift") or kept["kind"] not in ("algebraic", "numerical") or not square:
            return None
        if None in basis or any(None in row for row in matrix):
            return None
        return Correction(
            form=kept["form"],
            basis=tuple(b for b in basis if b is not None),
            matrix=tuple(tuple(c for c in row if c is not None) for row in matrix),
            sinks=sinks,
            kind=kept["kind"],
            proof=tuple(map(str, kept["proof"])),
        )
    except (KeyError, TypeError):
        return None
