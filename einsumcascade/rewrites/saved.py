"""What a forward cascade saves for its gradient: the least that spares it every loop over a long rank."""

from __future__ import annotations

from collections.abc import Mapping

from einsumcascade.analysis.counts import evaluate_extents
from einsumcascade.analysis.cut import Network, Price, least_cut
from einsumcascade.analysis.dependence import rank_variables
from einsumcascade.analysis.polynomial import volume
from einsumcascade.analysis.sizes import FEATURE, LENGTH
from einsumcascade.language.ir import Cascade, rank_of, reads
from einsumcascade.rewrites.algebra import producers

_NEVER = "never"


def least_saved(
    joint: Cascade,
    base: Cascade,
    forward: tuple[str, ...],
    wanted: tuple[str, ...],
    given: tuple[str, ...],
    extents: Mapping[str, int],
    *,
    also: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Choose what to save, by a vertex cut of least capacity between reductions over long ranks and the gradient.

    Args:
        joint: forward and gradient in one cascade. base: the forward part alone.
        forward: the tensors of the forward part. wanted: the gradients.
        given: outputs of the forward part, which are there anyway and cost nothing.
        extents: numbers by rank; those not given are assumed (Definition F2).
        also: what else the gradient reads.

    Returns: tensors, in the order of the cascade.
    """
    made = producers(joint)
    needed: dict[str, None] = {}
    pending = [*wanted, *also]
    for t in pending:
        if t in made and t not in needed:
            needed[t] = None
            e = made[t]
            pending += [r.tensor for r in reads(e.expr, *e.where)]
    first = {t for t in forward if t in needed}
    targets = {
        r.tensor for t in needed if t not in forward for r in reads(made[t].expr, *made[t].where) if r.tensor in first
    } | (first & set(also))
    sizes = _sizes(joint, base, extents)
    shapes = [i.indices for i in base.inputs] + [made[t].free for t in given if t in made]
    lengths = [{v for v in s if sizes[rank_of(v)] > FEATURE} for s in shapes]
    # What has lengths that nothing that goes in or out has together, as scores have, is computed again at any cost.
    large = {
        t for t in first if not any({v for v in made[t].free if sizes[rank_of(v)] > FEATURE} <= s for s in lengths)
    }
    late = [t for t in forward if t in first - large and any(sizes[rank_of(v)] > FEATURE for v in made[t].ranks)]
    edges = tuple((r.tensor, t) for t in first for r in reads(made[t].expr, *made[t].where) if r.tensor in first)
    # An output is there anyway.
    prices = {t: Price(elements=volume(() if t in given else made[t].free)) for t in forward if t in first - large}
    # With an extent of its own, what is large never pays.
    prices |= {t: Price(elements=volume((*made[t].free, _NEVER))) for t in forward if t in large}
    network = Network(prices=prices, edges=edges, sources=tuple(late), targets=tuple(sorted(targets)))
    return tuple(sorted(least_cut(network, {**sizes, rank_of(_NEVER): LENGTH**2}), key=forward.index))


def _sizes(joint: Cascade, base: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """Extents to choose by: a rank that is innermost in every matrix that has it is a feature, others are lengths."""
    matrices = [i.indices for i in base.inputs if len(i.indices) > 1]
    named = dict.fromkeys(v for i in base.inputs for v in i.indices)
    features = {s[-1] for s in matrices if all(s[-1] not in other[:-1] for other in matrices)}
    free = {rank_of(v): FEATURE if v in features else LENGTH for v in named}
    told = evaluate_extents(joint, {**free, **extents})
    return {rank_of(v): told.get(rank_of(v), LENGTH) for v in rank_variables(joint)}
