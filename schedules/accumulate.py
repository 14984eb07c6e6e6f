"""Sums that a kernel of other ranks adds up: what would be computed again for them passes by there.

    DV[m] = A[p,m] * DO[p] :: sum(p)     (resident m; loop p)         one kernel, which computes A once:
    DQ[p] = S[p,m] * K[m] :: sum(m)      (resident p; loop m)   ->    (resident m; loop p), DQ[p] += its tile of m

Both kernels walk the points (p, m) and compute scores there. In one kernel the scores are computed once; the sum whose
ranks it does not keep is added to memory as its elements pass, by programs that come in any order. Precondition: the
kernels walk the same ranks and share a reduction over all of them, neither waits for the other, and nothing needs
either before the later of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from einsumcascade.language.ir import Einsum, Var, variables
from einsumcascade.schedules.units import Unit

Cone = Callable[[Unit], tuple[Mapping[str, Einsum], list[Unit]]]


def accumulate(units: list[Unit], cone: Cone) -> list[str]:
    """Let kernels that compute the same again become one.

    The kernel of most sums stays as it is, and the first of several; the sums of the others are added up in it: their
    units take its ranks and its stage.

    Args:
        units: of a program, with their stages; changed in place.
        cone: the maps that a unit computes for itself, and the units whose results it reads.

    Returns: the tensors that programs add to.
    Cost: O(units^2) cones.
    """
    by_points: dict[frozenset[str], dict[object, list[Unit]]] = {}
    for u in units:
        if u.joins:
            groups = by_points.setdefault(frozenset((*u.residents, *u.loops)), {})
            groups.setdefault(u.signature, []).append(u)
    added: list[str] = []
    for points, groups in by_points.items():
        hosts = [g for g in groups.values() if g[0].loops and g[0].residents and not any(u.solves for u in g)]
        if not hosts:
            continue
        host = max(hosts, key=lambda g: (len(g), len(g[0].residents)))
        for guests in groups.values():
            if guests is host or not all(map(_adds, guests)) or not _shared(points, host, guests, cone):
                continue
            stage = max(host[0].stage, guests[0].stage)
            if _may_meet(units, host, guests, stage, cone):
                for u in host:
                    u.stage = stage
                for u in guests:
                    u.residents, u.loops, u.stage = host[0].residents, host[0].loops, stage
                    added.append(u.writes[0])
                host += guests
    return added


def _adds(u: Unit) -> bool:
    """Whether a unit is a sum, or a map that is added to memory already."""
    e = u.statements[0]
    if not isinstance(e, Einsum) or len(u.statements) > 1:
        return False
    plain = all(isinstance(i, Var) for i in e.indices) and len(set(e.free)) == len(e.indices)
    return e.reduce == "sum" and plain if u.loops else e.reduce is None


def _shared(points: frozenset[str], host: list[Unit], guests: list[Unit], cone: Cone) -> bool:
    """Whether some reduction at every point would be computed by both."""

    def made(units: list[Unit]) -> set[str]:
        return {t for u in units for t, e in cone(u)[0].items() if e.ranks and points <= set(variables(*e.indices))}

    return bool(made(host) & made(guests))


def _may_meet(units: list[Unit], host: list[Unit], guests: list[Unit], stage: int, cone: Cone) -> bool:
    """Whether all that two kernels read is there at a stage, neither reads the other, and nothing needs them before."""
    both = (*host, *guests)
    for u in units:
        read = cone(u)[1]
        if u not in both and u.stage <= stage and any(d in both for d in read):
            return False
        if u in both and any(d in guests or (d in host and u in guests) for d in read):
            return False
        if u in both and any(d.stage >= stage for d in read if d not in both):
            return False
    return True
