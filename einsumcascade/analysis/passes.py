"""Count the passes and the levels that a cascade makes over a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from einsumcascade.analysis.dependence import Partition, axes, dependencies, known_rank, partitions, rank_variables
from einsumcascade.analysis.sweep import Barrier, Sweep, sweep
from einsumcascade.errors import Diagnostic, UnknownRankError, nearest
from einsumcascade.language.ir import Cascade, rank_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCount:
    """What the passes over one rank are, and why.

    Args:
        rank: name of the rank, upper case.
        passes: the most passes that any tensor family makes; each step of an outer iteration counts once.
        levels: how many loops over the rank the Einsums need, since those of one level can share a loop.
        families: passes of each tensor that carries the whole rank, in order of appearance.
        barriers: for each boundary between passes, the Einsums that force it, in cascade order.
        level_barriers: the same for levels.
        level_of: level of each Einsum that traverses the rank, in cascade order.
        summary_traversals: loops over an outer partition alone that cannot join another loop; not passes.
        summaries: Einsums in those loops.
        per_step: (rank, passes) for each iterative rank whose every step traverses the same fibers anew.
        level_per_step: the same for levels.
        parts: names of the ranks that this rank is split into, outer ones first.
    """

    rank: str
    passes: int
    levels: int
    families: Mapping[str, int] = field(hash=False)
    barriers: tuple[Barrier, ...] = ()
    level_barriers: tuple[Barrier, ...] = ()
    level_of: Mapping[str, int] = field(hash=False)
    summary_traversals: int = 0
    summaries: tuple[str, ...] = ()
    per_step: tuple[tuple[str, int], ...] = ()
    level_per_step: tuple[tuple[str, int], ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def formula(self) -> str:
        """The passes as text: `3`, or `2 + N` where each of N steps makes one more."""
        return _formula(self.passes, self.per_step)

    @property
    def level_formula(self) -> str:
        """The levels as text, as `formula`."""
        return _formula(self.levels, self.level_per_step)

    def at(self, extents: Mapping[str, int]) -> int:
        """Return the passes for given numbers of steps; an iterative rank without an extent counts once."""
        return self.passes + sum(n * (extents.get(r, 1) - 1) for r, n in self.per_step)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, keys in a fixed order."""
        return {
            "passes": self.passes,
            "levels": self.levels,
            "formula": self.formula,
            "level_formula": self.level_formula,
            "families": dict(self.families),
            "barriers": [b.to_dict() for b in self.barriers],
            "level_barriers": [b.to_dict() for b in self.level_barriers],
            "level_of": dict(self.level_of),
            "summary_traversals": self.summary_traversals,
            "summaries": list(self.summaries),
            "per_step": dict(self.per_step),
            "level_per_step": dict(self.level_per_step),
            "parts": list(self.parts),
        }


def count_passes(cascade: Cascade, *, rank: str) -> PassCount:
    """Count the passes that `cascade` must make over the fibers of `rank`.

    A pass ends at a barrier: an Einsum that needs a value known only once every element of the fiber has been read.
    The count belongs to the cascade; no loop order, tile or buffer lowers it, only a rewrite does. A partition of the
    rank counts with the rank; a loop over its tiles alone is a summary traversal and no pass.

    Args:
        cascade: a checked cascade.
        rank: the name of a rank, upper case.

    Returns: the passes and levels, and for each boundary the pair of Einsums that forces it, in cascade order.
    Raises: UnknownRankError: `rank` is not a rank of `cascade`; the message lists those that are.
    Cost: O(tensors * (Einsums + accesses)).   Source: FuseMax (MICRO 2024), section III-A.

    >>> from einsumcascade.language.parser import parse
    >>> text = "in A[k], B[k]\\nY = A[k] * B[k]\\nZ = Y * A[k]\\nout Z"
    >>> found = count_passes(parse(text), rank="K")
    >>> found.passes, str(found.barriers[0])
    (2, 'Z waits for Y: it reads Y, complete only after all of K')
    """
    variable = known_rank(cascade, rank)
    if variable is None:
        raise unknown_rank(cascade, rank)
    part = partitions(cascade)[variable]
    shape = axes(cascade)
    levels = sweep(cascade, part=part, family=None)
    swept = {t: sweep(cascade, part=part, family=t) for t in shape if _carries_all(shape[t], part)}
    used = {t for found in dependencies(cascade).values() for t in found} | set(cascade.output_names)
    families = {t: max(s.count, int(t in used)) for t, s in swept.items()}
    worst = _worst(swept)
    return PassCount(
        rank=rank,
        passes=max(families.values(), default=min(levels.count, 1)),
        levels=max(levels.count, min(1, len(families))),
        families=families,
        barriers=worst.barriers if worst else (),
        level_barriers=levels.barriers,
        level_of=levels.level_of,
        summary_traversals=levels.summary_traversals,
        summaries=levels.summaries,
        per_step=worst.per_step if worst else (),
        level_per_step=levels.per_step,
        parts=tuple(rank_of(v) for v in part.parts),
    )


def unknown_rank(cascade: Cascade, rank: str) -> UnknownRankError:
    """Build the error for a name that is no rank of `cascade`."""
    known = tuple(rank_of(v) for v in rank_variables(cascade))
    hint = nearest(rank, known)
    listed = "known: " + (", ".join(known) if known else "none")
    return UnknownRankError(
        diagnostics=(
            Diagnostic(
                code="unknown-rank",
                headline=f"the cascade '{cascade.name}' has no rank '{rank}'",
                rule="ranks are named in upper case; " + listed,
                hint="" if hint == listed else hint,
            ),
        )
    )


def _carries_all(shape: tuple[str | None, ...], part: Partition) -> bool:
    return part.has_all(tuple(v for v in shape if v))


def _worst(swept: Mapping[str, Sweep]) -> Sweep | None:
    if not swept:
        return None
    return max(swept.values(), key=lambda s: (s.count, sum(n for _, n in s.per_step)))


def _formula(count: int, per_step: tuple[tuple[str, int], ...]) -> str:
    base = count - sum(n for _, n in per_step)
    terms = ([str(base)] if base or not per_step else []) + [r if n == 1 else f"{n}*{r}" for r, n in per_step]
    return " + ".join(terms)
