"""What the analysis says of a cascade that a mapping places, computed once for all its plans and extents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from einsumcascade.analysis.counts import CLASSES, Count, count_operations, volume
from einsumcascade.analysis.dependence import Partition, axes, partitions, reads_of, whole_ranks
from einsumcascade.analysis.passes import count_passes
from einsumcascade.language.ir import Cascade, Einsum, Init, Iter, Read, Statement, rank_of, reads, variables, walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A cascade with the results of its analysis; every mapping is keyed by the tensor that an Einsum computes.

    Args:
        cascade: what is mapped.
        einsums: the Einsum of each computed tensor, in order.
        shape: rank variable of each axis of every tensor, inputs included.
        reads: distinct reads of each computed tensor, those of its first generation included.
        operations: their number by class of `counts.CLASSES`, those of the first generation included; an array works
            on whole tiles, so points that a condition culls count too.
        levels: for each whole rank its parts, and the level of each Einsum that traverses it.
        contractions: points of the sums of products: those of two or more reads that carry a summed rank.
    """

    cascade: Cascade
    einsums: Mapping[str, Einsum] = field(hash=False)
    shape: Mapping[str, tuple[str | None, ...]] = field(hash=False)
    reads: Mapping[str, tuple[Read, ...]] = field(hash=False)
    operations: Mapping[str, Mapping[str, Count]] = field(hash=False)
    levels: Mapping[str, tuple[Partition, Mapping[str, int]]] = field(hash=False)
    contractions: Count

    def needs(self, tensor: str) -> tuple[str, ...]:
        """Return the tensors that the Einsum of `tensor` reads."""
        return tuple(dict.fromkeys(r.tensor for r in self.reads[tensor]))

    def has_all(self, tensor: str, part: Partition) -> bool:
        """Tell whether a tensor carries every coordinate of a rank."""
        return part.has_all(tuple(v for v in self.shape[tensor] if v))


@cache
def gather(cascade: Cascade) -> Facts:
    """Analyse a cascade for mapping.

    Cost: a pass count for each rank, once for all mappings of the cascade.

    >>> from einsumcascade.gallery import load
    >>> str(gather(load("softmax_attention")).contractions)
    'B*E*H*M*P + B*F*H*M*P'
    """
    einsums = {e.tensor: e for e in cascade.einsums}
    found: dict[str, dict[Read, None]] = {t: {} for t in einsums}
    for s in walk(cascade.body):
        if isinstance(s, Einsum | Init):
            found[s.tensor] |= dict.fromkeys(reads_of(cascade, s))
    parts = partitions(cascade)
    return Facts(
        cascade=cascade,
        einsums=einsums,
        shape=axes(cascade),
        reads={t: tuple(r) for t, r in found.items()},
        operations=_operations(cascade),
        levels={rank_of(v): (parts[v], count_passes(cascade, rank=rank_of(v)).level_of) for v in whole_ranks(cascade)},
        contractions=_contractions(cascade),
    )


def _operations(cascade: Cascade) -> dict[str, dict[str, Count]]:
    out: dict[str, dict[str, Count]] = {e.tensor: {} for e in cascade.einsums}
    dense = replace(cascade, constraints=(), body=tuple(_without_conditions(s) for s in cascade.body))
    for found in count_operations(dense).einsums:
        of = out[found.tensor.removeprefix("init ")]
        for kind in CLASSES:
            if n := getattr(found, kind):
                of[kind] = of.get(kind, Count()) + n
    return out


def _without_conditions(statement: Statement) -> Statement:
    match statement:
        case Einsum():
            return replace(statement, where=())
        case Iter():
            return replace(statement, body=tuple(_without_conditions(s) for s in statement.body))
        case Init():
            return statement


def _contractions(cascade: Cascade) -> Count:
    total = Count()
    for e in cascade.einsums:
        if e.reduction is not None and e.reduction.op.cost == "add":
            factors = [r for r in reads(e.expr) if set(variables(*r.indices)) & set(e.ranks)]
            total += volume(e.space) if len(factors) > 1 else Count()
    return total
