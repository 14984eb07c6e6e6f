"""What a derivation records."""

from __future__ import annotations

from dataclasses import dataclass

from einsumcascade.language.ir import Cascade


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rewrite applied.

    Args:
        rule: its short name, `R1 defer` and so on.
        what: one sentence for this cascade.
        before, after: the Einsums taken away and put in their place, as text.
        proof: lines someone can check by hand; empty where the rule is a law of the operator table.
        kind: "law", "algebraic" or "numerical".
    """

    rule: str
    what: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    proof: tuple[str, ...] = ()
    kind: str = "law"

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
