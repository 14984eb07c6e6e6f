"""The derivation: from the text a person wrote to the fewest passes it needs, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from einsumcascade.language.ir import Cascade, Einsum, rank_of, variable_of
from einsumcascade.rewrites.defer import defer, expand_means, localise
from einsumcascade.rewrites.loop_form import loop_form
from einsumcascade.rewrites.monotone import lift_monotone
from einsumcascade.rewrites.step import Rewritten, Step

DEFAULT_TILE = 128
Division = Literal["deferred", "immediate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    """What was rewritten, why it is right, and what came out.

    Args:
        original, cascade: before and after; equal in value for every input.
        steps: each rewrite with its proof.
        passes: for each rank streamed, its passes (before, after).
    """

    original: Cascade
    cascade: Cascade
    steps: tuple[Step, ...]
    passes: Mapping[str, tuple[int, int]]

    @property
    def certificate(self) -> str:
        """The proofs alone, one block a step that has one."""
        return "\n\n".join(str(s) for s in self.steps if s.proof)

    def to_dict(self) -> dict[str, Any]:
        """A JSON value: passes, steps and both texts."""
        return {
            "passes": {k: {"before": a, "after": b} for k, (a, b) in self.passes.items()},
            "steps": [
                {
                    "rule": s.rule,
                    "what": s.what,
                    "before": list(s.before),
                    "after": list(s.after),
                    "proof": list(s.proof),
                    "kind": s.kind,
                }
                for s in self.steps
            ],
            "original": str(self.original),
            "cascade": str(self.cascade),
        }

    def __str__(self) -> str:
        head = [f"{a} pass{'es' if a != 1 else ''} -> {b} over {r}" for r, (a, b) in self.passes.items()]
        if not head:
            head = ["no rank is reduced in a chain: nothing to derive"]
        blocks = [f"{n}. {s}" for n, s in enumerate(self.steps, start=1)]
        return "\n\n".join(["\n".join(head), *blocks, "result:\n" + str(self.cascade)])


def simplify(cascade: Cascade, *, division: Division = "deferred") -> Rewritten:
    """Apply the rewrites that need no choice of tile: means, deferral, positive factors, monotone maps.

    Args:
        division: "deferred" takes out of a reduction every factor that leaves it; "immediate" keeps those inside that
            are known only once the same rank has been read, as FlashAttention-1 keeps its denominator.
    """
    local = localise(cascade)
    means = expand_means(local.cascade)
    deferred = defer(means.cascade, immediate=division == "immediate")
    lifted = lift_monotone(deferred.cascade)
    return Rewritten(cascade=lifted.cascade, steps=local.steps + means.steps + deferred.steps + lifted.steps)


def derive(cascade: Cascade | str, *, rank: str | None = None, tile: int = DEFAULT_TILE) -> Derivation:
    """Derive the form of a cascade that makes the fewest passes over a rank.

    Args:
        cascade: a cascade, or the name of a gallery text.
        rank: the rank to stream, `M`; None: each rank that is reduced in a chain of reductions.
        tile: extent of the tile in the loop form.

    Returns: the derivation; its `.cascade` equals the original in value and the reference runs it.
    Raises: UnknownRankError: `rank` is not reduced in the cascade.
    Cost: seconds at most: one SymPy derivation for each reduction that depends on an earlier one.
    Source: FuseMax (MICRO 2024) section IV; RedFuser (2603.10026).
    """
    from einsumcascade.analysis.passes import count_passes
    from einsumcascade.errors import Diagnostic, LoweringError, UnknownRankError, nearest

    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    first = simplify(cascade)
    reduced = tuple(dict.fromkeys(v for e in cascade.einsums for v in e.ranks))
    if rank is not None and variable_of(rank) not in reduced:
        names = tuple(map(rank_of, reduced))
        raise UnknownRankError(
            diagnostics=(
                Diagnostic(
                    code="unknown-rank",
                    headline=f"no Einsum reduces a rank '{rank}'",
                    rule="a derivation streams a rank that is reduced",
                    hint=nearest(rank, names),
                ),
            )
        )
    wanted = (variable_of(rank),) if rank else tuple(v for v in reduced if _chained(cascade, v))
    result, steps = first.cascade, list(first.steps)
    for v in wanted:
        if any(isinstance(s, Einsum) and v in s.ranks for s in result.body):
            try:
                form = loop_form(result, over=(v,), tile=tile)
            except LoweringError as error:
                # The cascade keeps its passes over this rank; a derivation is not refused for it.
                why = error.diagnostics[0].headline
                steps.append(Step(rule="not streamed", what=f"{rank_of(v)} stays as it is", proof=(why,)))
                continue
            result = form.cascade
            steps += form.steps
    passes = {
        rank_of(v): (count_passes(cascade, rank=rank_of(v)).passes, count_passes(result, rank=rank_of(v)).passes)
        for v in wanted
    }
    return Derivation(original=cascade, cascade=result, steps=tuple(steps), passes=passes)


def _chained(cascade: Cascade, variable: str) -> bool:
    from einsumcascade.analysis.passes import count_passes

    return count_passes(cascade, rank=rank_of(variable)).levels > 1
