"""One schedule for an op: which of its choices are for the forward, for the forward that saves, for the backward.

Kernels are told apart by their names: those of the backward begin with the name of the cascade and `_backward`, those
of the forward that saves with `_forward`. The form of the forward, `reference`, `split` and `pack`, is not that of the
backward; how sums are added up, `scatter` and `sums`, is the same in all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from einsumcascade.schedules.program import Program, identifier
from einsumcascade.schedules.schedule import SCATTERS, SUMS, KernelSchedule, Schedule, fitting_choices

FORWARD, BACKWARD = "_forward", "_backward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The schedules of the programs of one op; None where all is left to the default.

    Args:
        plain: of the program without gradient.
        forward: of the forward that saves. shared: choices of the plain kernels by the names of this program's, for
            those that have the same tiles.
        backward: of the gradient.
    """

    plain: Schedule | None
    forward: Schedule | None
    shared: Mapping[str, KernelSchedule]
    backward: Schedule | None


def parts_of(schedule: Schedule | None, name: str) -> Parts:
    """Divide the schedule of an op among its programs.

    Args:
        schedule: as its user gave it. name: of the cascade.

    Returns: a part for each program; a name that is no kernel's is in the plain part, whose build refuses it.
    """
    if schedule is None:
        return Parts(plain=None, forward=None, shared={}, backward=None)
    own = identifier(name)
    of: dict[str, dict[str, KernelSchedule]] = {"": {}, FORWARD: {}, BACKWARD: {}}
    for n, k in schedule.kernels.items():
        of[next((part for part in (FORWARD, BACKWARD) if n.startswith(own + part)), "")][n] = k
    alike = {n: k for n, k in of[""].items() if re.fullmatch(re.escape(own) + r"(_\d+)?", n)}
    unknown = {n: k for n, k in of[""].items() if n not in alike}
    sums = Schedule(kernels=of[BACKWARD], scatter=schedule.scatter, sums=schedule.sums)
    return Parts(
        plain=_unless_default(replace(schedule, kernels=of[""])),
        forward=_unless_default(replace(schedule, kernels={**of[FORWARD], **unknown})),
        shared={own + FORWARD + n.removeprefix(own): k for n, k in alike.items()},
        backward=_unless_default(sums),
    )


def with_shared(parts: Parts, program: Program) -> Schedule | None:
    """The schedule of the forward that saves: what is chosen for the plain kernels serves it where it fits."""
    fitting = fitting_choices(program, parts.shared)
    if not fitting:
        return parts.forward
    chosen = parts.forward or Schedule()
    return replace(chosen, kernels={**fitting, **chosen.kernels})


def joined(forward: Schedule, backward: Schedule) -> Schedule:
    """One schedule for an op of one for its forward that saves and one for its gradient: what `parts_of` divides.

    How sums are added up is one choice for both, and it is the backward's.
    """
    kernels = {**forward.kernels, **backward.kernels}
    return replace(forward, kernels=kernels, scatter=backward.scatter, sums=backward.sums)


def in_fixed_order(schedule: Schedule | None) -> Schedule:
    """The same schedule with every sum in an order of its own: no program adds to what another does."""
    return replace(schedule or Schedule(), scatter=SCATTERS[1], sums=SUMS[0])


def _unless_default(schedule: Schedule) -> Schedule | None:
    return schedule if schedule != Schedule() else None
