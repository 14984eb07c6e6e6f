"""Place a softmax on two axes: where the reference of its exponent comes from, and where it is divided.

The reference is that of Definition X1 of docs/analysis.md: none, global, local or running; the division that of
Definition X2: immediate, deferred or none. Both are read off what depends on what, never off names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from einsumcascade.analysis.dependence import known_rank, partitions, rank_variables
from einsumcascade.analysis.passes import count_passes, unknown_rank
from einsumcascade.analysis.softmaxes import Flow, Found, exponentials
from einsumcascade.language.ir import Cascade, Expr, rank_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Softmax:
    """One softmax of a cascade.

    Args:
        weights: the Einsum with the exponential.
        normaliser: the tensor that holds the sum of the exponentials.
        ranks: ranks that the sum runs over.
        reference: what the exponent subtracts (Definition X1): none, global, local or running.
        division: where the sum divides (Definition X2): immediate, deferred or none.
        passes: passes over each of the ranks.
        summary_traversals: loops over tiles of each rank alone.
        reasons: which Einsum and which read make it so.
    """

    weights: str
    normaliser: str
    ranks: tuple[str, ...]
    reference: str
    division: str
    passes: tuple[int, ...]
    summary_traversals: tuple[int, ...]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        counts = (
            f"{n} pass{'' if n == 1 else 'es'} over {r}" + f" + {s} over its tiles" * (s > 0)
            for r, n, s in zip(self.ranks, self.passes, self.summary_traversals, strict=True)
        )
        head = f"{self.weights}: reference {self.reference}, division {self.division}; {', '.join(counts)}"
        return "\n".join([head, *(f"  {r}" for r in self.reasons)])

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "weights": self.weights,
            "normaliser": self.normaliser,
            "ranks": list(self.ranks),
            "reference": self.reference,
            "division": self.division,
            "passes": list(self.passes),
            "summary_traversals": list(self.summary_traversals),
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Taxonomy:
    """Where the softmaxes of a cascade stand.

    Args:
        name: of the cascade.
        entries: one for each softmax, in the order of their exponentials.
        reason: why there is none; empty where there are some.
    """

    name: str
    entries: tuple[Softmax, ...]
    reason: str = ""

    @property
    def reference(self) -> str | None:
        """The reference of the exponent if all softmaxes agree on it, else None."""
        return _common(e.reference for e in self.entries)

    @property
    def division(self) -> str | None:
        """The place of the division if all softmaxes agree on it, else None."""
        return _common(e.division for e in self.entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries)) or f"no softmax: {self.reason}"

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "reference": self.reference,
            "division": self.division,
            "reason": self.reason,
            "softmaxes": [e.to_dict() for e in self.entries],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSystem:
    """A published system and the gallery text that computes as it does."""

    system: str
    cascade: str
    passes: int
    summary_traversals: int
    reference: str
    division: str

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "system": self.system,
            "cascade": self.cascade,
            "passes": self.passes,
            "summary_traversals": self.summary_traversals,
            "reference": self.reference,
            "division": self.division,
        }


def classify(cascade: Cascade | str, *, rank: str | None = None) -> Taxonomy:
    """Find the softmaxes of a cascade and place each on the two axes.

    The axes are Definitions X1 and X2 of docs/analysis.md; what counts as a softmax is Definition X3.

    Args:
        cascade: a cascade or the name of a gallery text.
        rank: name of a rank, upper case; None: all ranks.

    Returns: the softmaxes over the rank; with none, the reason.
    Raises: UnknownRankError: the cascade has no such rank.
    Cost: O(Einsums * accesses), and the pass count of each rank concerned.
    Source: FuseMax (MICRO 2024), Table I, which sorts by passes alone.

    >>> from einsumcascade.gallery import load
    >>> found = classify(load("softmax_attention"))
    >>> found.reference, found.division, found.entries[0].passes
    ('global', 'immediate', (3,))
    """
    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    if rank is not None and known_rank(cascade, rank) is None:
        raise unknown_rank(cascade, rank)
    found: dict[tuple[str, str, str, str], list[tuple[str, Found]]] = {}
    parts = partitions(cascade)
    inside = {v for p in parts.values() for v in p.parts}
    every = rank_variables(cascade)
    done: dict[Expr, set[str]] = {}
    # A softmax over a rank in tiles is none over the tiles.
    for v in (*(v for v in every if v not in inside), *(v for v in every if v in inside)):
        for site in Flow(cascade, parts[v]).softmaxes():
            if v not in done.get(site.exponential, ()):
                done.setdefault(site.exponential, set()).update((v, *parts[v].parts))
                key = (site.weights, site.normaliser, site.reference, site.division)
                found.setdefault(key, []).append((rank_of(v), site))
    order = [e.tensor for e in cascade.einsums]
    entries = []
    for (weights, normaliser, reference, division), sites in sorted(found.items(), key=lambda f: order.index(f[0][0])):
        ranks = tuple(r for r, _ in sites)
        if rank is None or rank in ranks:
            counts = [count_passes(cascade, rank=r) for r in ranks]
            entries.append(
                Softmax(
                    weights=weights,
                    normaliser=normaliser,
                    ranks=ranks,
                    reference=reference,
                    division=division,
                    passes=tuple(c.passes for c in counts),
                    summary_traversals=tuple(c.summary_traversals for c in counts),
                    reasons=tuple(dict.fromkeys(r for _, s in sites for r in s.reasons)),
                )
            )
    reason = ""
    if not entries:
        over = f" over {rank}" if rank else ""
        reason = f"no sum{over} of exponentials divides, is stabilised by a maximum or has its logarithm taken"
        if not any(True for e in cascade.einsums for _ in exponentials(e.expr)):
            reason = "no Einsum takes an exponential"
    return Taxonomy(name=cascade.name, entries=tuple(entries), reason=reason)


def published_systems() -> tuple[PublishedSystem, ...]:
    """List the systems that gallery texts say they compute as, most passes first.

    Source: FuseMax (MICRO 2024), Table I.

    >>> [s.passes for s in published_systems() if s.system == "FlashAttention-2"]
    [1]
    """
    from einsumcascade.gallery import header, load, names

    rows = []
    for name in names():
        systems = header(name).systems
        if systems:
            (entry,) = classify(load(name)).entries
            rows += [
                PublishedSystem(
                    system=s,
                    cascade=name,
                    passes=entry.passes[0],
                    summary_traversals=entry.summary_traversals[0],
                    reference=entry.reference,
                    division=entry.division,
                )
                for s in systems
            ]
    return tuple(sorted(rows, key=lambda r: -r.passes))


def _common(found: Iterable[str]) -> str | None:
    kinds = set(found)
    return kinds.pop() if len(kinds) == 1 else None
