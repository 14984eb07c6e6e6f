"""Extents to choose by where a choice depends on extents that nobody gave, and when a choice does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from einsumcascade.analysis.counts import evaluate_extents
from einsumcascade.analysis.dependence import partitions, rank_variables, whole_ranks
from einsumcascade.analysis.nest import edges_between, fuse
from einsumcascade.analysis.polynomial import Count, number
from einsumcascade.analysis.walks import lines
from einsumcascade.language.ir import Cascade, rank_of

LENGTH: Final = 65_536
FEATURE: Final = 64


def long_ranks(cascade: Cascade) -> tuple[str, ...]:
    """Name the long ranks of a cascade, in order of first appearance.

    Which ranks are long, and which are features: Definition F1 of docs/analysis.md.

    Cost: O(ranks * Einsums * accesses).
    >>> from einsumcascade.gallery import load
    >>> long_ranks(load("softmax_attention"))
    ('B', 'H', 'P', 'M')
    """
    own = lines(cascade)
    edges = edges_between(own)
    spaces = [set(e.space) for e in cascade.einsums]
    found = partitions(cascade)
    out = []
    for v in whole_ranks(cascade):
        walking = sum(not s.isdisjoint({v, *found[v].parts}) for s in spaces)
        nest = fuse(own, edges, (v,))
        # Stage 1 is the first loop, 2 what follows it, 3 the second loop.
        again = nest is not None and any(stage > 2 for (stage,) in nest.stages)
        if 2 * walking > len(spaces) or again:
            out.append(rank_of(v))
    return tuple(out)


def assumed_extents(cascade: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """Complete given extents, those of `rank` statements by what these say.

    Where nothing is given, long ranks and features have the extents of Definition F2 of docs/analysis.md.

    Cost: that of `long_ranks` where an extent is missing.
    """
    names = [rank_of(v) for v in rank_variables(cascade)]
    if set(names) <= set(extents):
        return dict(extents)
    long = long_ranks(cascade)
    assumed = {r: LENGTH if r in long else FEATURE for r in names}
    defined = {rank_of(r.name) for r in cascade.ranks}
    free = {r: n for r, n in assumed.items() if r not in defined}
    # A definition that has no value leaves its rank to the rule.
    return {**assumed, **evaluate_extents(cascade, {**free, **extents})}


def never_more(a: Count, b: Count) -> bool:
    """Tell whether `a <= b` is certain for all extents of 1 or more: with x = 1 + y, no term of b - a is negative.

    Cost: 2**degree a term.
    >>> from einsumcascade.analysis.polynomial import volume
    >>> never_more(volume(("m",)), volume(("m", "e"))), never_more(volume(("m",)), volume(("e",)))
    (True, False)
    """
    difference = b + a * number(-1)
    return all(n >= 0 for n in above_one(difference).values())


def above_one(count: Count) -> dict[tuple[str, ...], int | Fraction]:
    """Expand a count in y = extent - 1: coefficients by the names of each product of y."""
    out: dict[tuple[str, ...], int | Fraction] = {}
    for names, n in count.terms:
        powers = [(x, names.count(x)) for x in dict.fromkeys(names)]
        for taken in itertools.product(*(range(k + 1) for _, k in powers)):
            key = tuple(x for (x, _), t in zip(powers, taken, strict=True) for _ in range(t))
            ways = math.prod(math.comb(k, t) for (_, k), t in zip(powers, taken, strict=True))
            out[key] = out.get(key, 0) + n * ways
    return out


def quotient(a: Count, b: Count) -> Count | None:
    """Divide one product of extents by another; None where the quotient is no such product.

    >>> from einsumcascade.analysis.polynomial import volume
    >>> str(quotient(volume(("e", "m")), volume(("m",))))
    'E'
    """
    if len(a.terms) != 1 or len(b.terms) != 1:
        return None
    ((above, n),), ((below, k),) = a.terms, b.terms
    rest = list(above)
    for x in below:
        if x not in rest:
            return None
        rest.remove(x)
    return Count(terms=((tuple(rest), Fraction(n) / k),))
