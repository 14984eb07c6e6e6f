"""What a derivation records."""

from __future__ import annotations

from dataclasses import dataclass

from einsumcascade.language.ir import Cascade, Expr, Read


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What is proven of a running state: B(x, d') = C(d, d') B(x, d), or F(x, d') = F(x, d) + C for a shift.

    Args:
        reduce: name of the reduction. form: "linear" or "shift".
        references: the reads of d; those of d' are reads of `NAME__next`.
        positive, nonnegative: expressions free of the rank that are > 0, or >= 0, where there is a key at all.
        basis: B over x and d; the first is the summand.
        matrix: C as rows.
    """

    reduce: str
    form: str
    references: tuple[Read, ...]
    positive: tuple[Expr, ...]
    nonnegative: tuple[Expr, ...]
    basis: tuple[Expr, ...]
    matrix: tuple[tuple[Expr, ...], ...]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON: expressions as text of the language."""
        return {
            "reduce": self.reduce,
            "form": self.form,
            "references": [str(r) for r in self.references],
            "positive": [str(e) for e in self.positive],
            "nonnegative": [str(e) for e in self.nonnegative],
            "basis": [str(b) for b in self.basis],
            "matrix": [[str(c) for c in row] for row in self.matrix],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rewrite applied.

    Args:
        rule: its short name, `R1 defer` and so on.
        what: one sentence for this cascade.
        before, after: the Einsums taken away and put in their place, as text.
        proof: lines someone can check by hand; empty where the rule is a law of the operator table.
        kind: "law", "algebraic" or "numerical".
        claim: what the proof is of, for a correction.
    """

    rule: str
    what: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    proof: tuple[str, ...] = ()
    kind: str = "law"
    claim: Claim | None = None

    def __str__(self) -> str:
        lines = [f"{self.rule}: {self.what}"]
        lines += [f"  - {b}" for b in self.before] + [f"  + {a}" for a in self.after]
        if self.proof:
            lines.append(f"  proof ({self.kind}):")
            lines += [f"    {p}" for p in self.proof]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """A cascade and the steps that led to it."""

    cascade: Cascade
    steps: tuple[Step, ...] = ()
