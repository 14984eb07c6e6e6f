"""Which schedules of a space are worth compiling: the order of a model, and a shortlist of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from einsumcascade.analysis.counts import dtype_bytes
from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.schedules.model import rank
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from einsumcascade.schedules.shared_memory import shared_memory
from einsumcascade.schedules.space import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A schedule and the seconds that a model expects of it."""

    schedule: Schedule
    seconds: float


def ranked(
    program: Program,
    schedules: Sequence[Schedule],
    *,
    extents: Mapping[str, int],
    target: GpuTarget,
    dtype: str,
    precision: str = "ieee",
) -> tuple[Ranked, ...]:
    """Rank schedules of a program, the fastest expected first; equals stay in order.

    Cost: some ms a schedule.
    """
    found = rank(program, schedules, extents=extents, target=target, dtype=dtype, precision=precision)
    return tuple(Ranked(schedule=p.schedule, seconds=p.seconds) for p in found)


def shortlist(
    spaces: Sequence[Space],
    *,
    extents: Mapping[str, int],
    target: GpuTarget,
    dtype: str,
    limit: int,
    precision: str = "ieee",
) -> tuple[Ranked, ...]:
    """Choose the schedules to compile: the default first, then by rank.

    Kernels run one after the other, so each is ranked alone and the rankings are combined place by place. No more than
    a quarter of the list has the same tiles: a model that errs about these should not decide everything. What seems to
    ask for more shared memory than there is comes last.

    Args:
        spaces: one a form of the program.
        limit: of the list. precision: of float32 products.

    Cost: one ranking a kernel and form.
    """
    default = spaces[0].default
    (first,) = ranked(spaces[0].program, [default], extents=extents, target=target, dtype=dtype, precision=precision)
    rest: list[tuple[bool, Ranked]] = []
    for space in spaces:
        orders = {name: _alone(space, name, 2 * limit, extents, target, dtype, precision) for name in space.kernels}
        alone = _few([s for s in space.combined(orders) if s != default], 4 * limit, limit)
        for r in ranked(space.program, alone, extents=extents, target=target, dtype=dtype, precision=precision):
            rest.append((_is_large(space.program, r.schedule, extents, target, dtype, precision), r))
    rest.sort(key=lambda entry: (entry[0], entry[1].seconds))
    chosen = _few([r.schedule for _, r in rest], limit - 1, max(1, limit // 4))
    seconds = {id(r.schedule): r.seconds for _, r in rest}
    return (first, *(Ranked(schedule=s, seconds=seconds[id(s)]) for s in chosen))[:limit]


def _alone(
    space: Space, name: str, limit: int, extents: Mapping[str, int], target: GpuTarget, dtype: str, precision: str
) -> list[Schedule]:
    """The best choices for one kernel: ranked as its grid is usually walked, then the first of them in every way."""
    every = space.of(name)
    order = space.kernels[name][0].order

    def usual(s: Schedule) -> KernelSchedule:
        return replace(s.kernels[name], order=order, one_loop=False, persistent=0)

    some = [s for s in every if s.kernels[name] == usual(s)]
    first = ranked(space.program, some, extents=extents, target=target, dtype=dtype, precision=precision)
    if len(some) == len(every):
        return [r.schedule for r in first]
    kept = [r.schedule.kernels[name] for r in first[:limit]]
    some = [s for s in every if usual(s) in kept]
    return [
        r.schedule
        for r in ranked(space.program, some, extents=extents, target=target, dtype=dtype, precision=precision)
    ]


def _few(schedules: Sequence[Schedule], limit: int, alike: int) -> list[Schedule]:
    """The first schedules: at most `alike` of them with the same tiles, then the rest while there is room."""
    seen: Counter[object] = Counter()
    chosen: list[Schedule] = []
    others: list[Schedule] = []
    for s in schedules:
        key = (s.reference, *s.split.items(), *s.pack.items(), *((n, *k.tiles.items()) for n, k in s.kernels.items()))
        seen[key] += 1
        (chosen if seen[key] <= alike else others).append(s)
    return (chosen + others)[:limit]


def _is_large(
    program: Program, s: Schedule, extents: Mapping[str, int], target: GpuTarget, dtype: str, precision: str
) -> bool:
    return any(
        shared_memory(
            program,
            k,
            s.kernels[k.name],
            extents=extents,
            dtype_bytes=dtype_bytes(dtype),
            target=target,
            precision=precision,
        ).predicted
        > target.shared_memory_bytes
        for k in program.kernels
    )
