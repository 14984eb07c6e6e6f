"""Count the passes and the levels that a cascade makes over a rank: Definitions P6 and P8 of docs/analysis.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from einsumcascade.analysis.dependence import dependencies, known_rank, partitions, rank_variables, whole_ranks
from einsumcascade.analysis.places import Ground
from einsumcascade.analysis.sweep import Barrier, Sweep, sweep
from einsumcascade.analysis.unroll import Unrolled, tensor_of
from einsumcascade.errors import UnknownRankError, nearest
from einsumcascade.language.ir import Cascade, Iter, rank_of, walk


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCount:
    """What the passes over one rank are, and why.

    Args:
        rank: name of the rank, upper case.
        passes: the most passes that any tensor family makes (Definition P6); an iteration over another rank makes one
            step.
        levels: how many loops over the rank the Einsums need (Definition P8): those of one level can share a loop.
        families: passes of each tensor that carries the whole rank, in order of appearance.
        barriers: for each boundary between passes, the Einsums that force it (Definition P7), in cascade order.
        level_barriers: the same for levels.
        level_of: level of each Einsum that traverses the rank, in cascade order.
        summary_traversals: loops over an outer partition alone (Definition P9); not passes.
        summaries: Einsums in those loops.
        per_step: (rank, passes) for each iterative rank whose every step traverses the same fibers anew, of the family
            that grows most.
        growing: the same for each tensor whose fibers are traversed anew.
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
    growing: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict, hash=False)
    level_per_step: tuple[tuple[str, int], ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def formula(self) -> str:
        """The passes as text, by Definition P10: `3`, or `2 + N` where each of N steps makes one more; `max(2, N)`."""
        most: dict[tuple[tuple[str, int], ...], int] = {}
        for t, n in self.families.items():
            more = self.growing.get(t, ())
            most[more] = max(n, most.get(more, n))
        # A family is left out where another grows at least as fast from at least as many.
        kept = [
            (more, n)
            for more, n in most.items()
            if not any(other != more and m >= n and _covers(other, more) for other, m in most.items())
        ]
        found = [_formula(n, more) for more, n in sorted(kept, key=lambda k: (len(k[0]), k[0]))]
        return f"max({', '.join(found)})" if len(found) > 1 else found[0] if found else str(self.passes)

    @property
    def level_formula(self) -> str:
        """The levels as text, as `formula`."""
        return _formula(self.levels, self.level_per_step)

    def at(self, extents: Mapping[str, int]) -> int:
        """Return the passes for given numbers of steps; an iterative rank without an extent counts once."""
        most = self.passes
        for t, more in self.growing.items():
            most = max(most, self.families[t] + sum(n * (extents.get(r, 1) - 1) for r, n in more))
        return most

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
            "growing": {t: dict(more) for t, more in self.growing.items()},
            "level_per_step": dict(self.level_per_step),
            "parts": list(self.parts),
        }


def count_passes(cascade: Cascade, *, rank: str) -> PassCount:
    """Count the passes that `cascade` must make over the fibers of `rank`.

    Passes are those of Definition P6 of docs/analysis.md, and Definition P11 says where the count is an upper bound. It
    belongs to the cascade; no loop order, tile or buffer lowers it, only a rewrite does.

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
    counter = _Counter(Ground(cascade, part))
    levels = counter.count(())
    counted = {t: counter.tensor(t) for t in counter.ground.shape if counter.ground.is_full(t)}
    used = {t for found in dependencies(cascade).values() for t in found} | set(cascade.output_names)
    families = {t: max(c.count, int(t in used)) for t, c in counted.items()}
    worst = max(counted.values(), key=lambda c: (c.count, sum(n for _, n in c.per_step)), default=None)
    fastest = max((c.per_step for c in counted.values()), key=lambda more: sum(n for _, n in more), default=())
    passes = max(families.values(), default=min(levels.count, 1))
    return PassCount(
        rank=rank,
        passes=passes,
        levels=max(levels.count, min(1, len(families))),
        families=families,
        barriers=_numbered(worst.sweep, passes)[1] if worst else (),
        level_barriers=_numbered(levels.sweep, levels.count)[1],
        level_of=_numbered(levels.sweep, levels.count)[0],
        summary_traversals=levels.sweep.summary_traversals,
        summaries=levels.sweep.summaries,
        per_step=fastest,
        growing={t: c.per_step for t, c in counted.items() if c.per_step},
        level_per_step=levels.per_step,
        parts=tuple(rank_of(v) for v in part.parts),
    )


def passes_of(cascade: Cascade) -> dict[str, int]:
    """Count the passes over every rank that is no part of another, by name.

    >>> from einsumcascade.language.parser import parse
    >>> passes_of(parse("in A[k], B[k]\\nY = A[k] * B[k]\\nZ = Y * A[k]\\nout Z"))
    {'K': 2}
    """
    return {rank_of(v): count_passes(cascade, rank=rank_of(v)).passes for v in whole_ranks(cascade)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Count:
    """What one sweep counts, each step once, what each further step adds, and the sweep of two steps."""

    count: int
    per_step: tuple[tuple[str, int], ...]
    sweep: Sweep


class _Counter:
    """Sweeps of one cascade for one rank, with iterations over other ranks unrolled to several lengths."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        blocks = (s.var for s in walk(ground.cascade.body) if isinstance(s, Iter))
        self.iterated = tuple(dict.fromkeys(v for v in blocks if v not in ground.along))
        self._unrolled: dict[tuple[int, ...], Unrolled] = {}

    def unrolled(self, *steps: int) -> Unrolled:
        """The cascade with so many steps of each iteration."""
        if steps not in self._unrolled:
            self._unrolled[steps] = Unrolled(self.ground, dict(zip(self.iterated, steps, strict=True)))
        return self._unrolled[steps]

    def tensor(self, name: str) -> _Count:
        """Count the passes of the fiber of a tensor that needs most."""
        parts = self.unrolled(*(2 for _ in self.iterated)).fibers(name)
        counts = (self.count(tuple(sorted(p))) for p in parts)
        return max(counts, key=lambda c: (sum(n for _, n in c.per_step), c.count))

    def count(self, family: tuple[str, ...]) -> _Count:
        """Count the passes of a family, or the levels."""
        short = tuple(2 for _ in self.iterated)
        found = sweep(self.unrolled(*short), family=frozenset(family))
        growing = [k for k, v in enumerate(self.iterated) if self.ground.looks_back(v, {tensor_of(p) for p in family})]
        if not growing:
            return _Count(count=found.count, per_step=found.endless, sweep=found)
        # What grows with every step has then outgrown all that does not.
        many = found.count + 2
        long = tuple(many if k in growing else 2 for k in range(len(short)))
        most = sweep(self.unrolled(*long), family=frozenset(family)).count
        if most == found.count:
            # So many more steps add nothing, nor then does one of any.
            growing = []
        more = {
            k: sweep(self.unrolled(*(n + (j == k) for j, n in enumerate(long))), family=frozenset(family)).count - most
            for k in growing
        }
        return _Count(
            count=most - sum(n * (long[k] - 1) for k, n in more.items()),
            per_step=tuple((rank_of(self.iterated[k]), n) for k, n in more.items() if n) + found.endless,
            sweep=found,
        )


def _numbered(found: Sweep, count: int) -> tuple[Mapping[str, int], tuple[Barrier, ...]]:
    """Number passes by their first step alone: what a second step adds stands between none of them."""
    used = sorted(set(found.level_of.values()))
    if len(used) != count or used[-1:] == [count]:
        return found.level_of, tuple(b for b in found.barriers if b.boundary < count)
    number = {old: k for k, old in enumerate(used, start=1)}
    barriers = (replace(b, boundary=number[b.boundary + 1] - 1) for b in found.barriers if b.boundary + 1 in number)
    return {t: number[k] for t, k in found.level_of.items()}, tuple(b for b in barriers if b.boundary)


def unknown_rank(cascade: Cascade, rank: str) -> UnknownRankError:
    """Build the error for a name that is no rank of `cascade`."""
    known = tuple(rank_of(v) for v in rank_variables(cascade))
    hint = nearest(rank, known)
    listed = "known: " + (", ".join(known) if known else "none")
    return UnknownRankError.of(
        "unknown-rank",
        f"the cascade '{cascade.name}' has no rank '{rank}'",
        rule="ranks are named in upper case; " + listed,
        hint="" if hint == listed else hint,
    )


def _covers(fast: tuple[tuple[str, int], ...], slow: tuple[tuple[str, int], ...]) -> bool:
    """Whether steps of every iteration add at least as many passes to `fast`."""
    return all(dict(fast).get(r, 0) >= n for r, n in slow)


def _formula(count: int, per_step: tuple[tuple[str, int], ...]) -> str:
    base = count - sum(n for _, n in per_step)
    terms = ([str(base)] if base or not per_step else []) + [r if n == 1 else f"{n}*{r}" for r, n in per_step]
    return " + ".join(terms)
