"""The choices that do not change a result: tiles, warps, stages, how tiles are loaded. Frozen, JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from einsumcascade.errors import Diagnostic, ScheduleError, nearest
from einsumcascade.language.ir import Iter
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.roles import grid_tiles

PRECISIONS = ("ieee", "tf32x3", "tf32")
REFERENCES = ("running", "bound")
SCATTERS = ("any order", "fixed order")
# A pipeline of more buffers than this fits no target, and Triton's compiler may take minutes to say so.
MOST_STAGES = 16
# Blocks that a multiprocessor holds together on any target.
MOST_PERSISTENT = 32
# Parts of a rank: more than all programs that any target runs together.
MOST_PARTS = 1 << 14
# The order in which the programs of a grid begin, by the tiles that they have.
HEADS_INSIDE = "descending, heads inside"
ORDERS = ("ascending", "descending", HEADS_INSIDE)
SUMS = ("apart", "accumulated")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSchedule:
    """The choices of one kernel.

    Args:
        tiles: elements of the tile of each tiled variable: the residents on the grid, then the innermost loop.
        warps, stages: as Triton's num_warps and num_stages.
        descriptors: load whole tiles, and add to them, by tensor descriptors instead of pointers where their layout
            allows it.
        order: in which programs begin. "ascending": the tiles of one head, first to last, then those of the next, so
            that what a head streams stays in the cache. "descending": last tile first, which under a causal mask is
            the longest. "descending, heads inside": the last tile of every head, then the one before it of every head.
        one_loop: loops over tiles test the conditions of every tile, in place of one loop over tiles whose points are
            all live, which tests nothing, and others that do.
        persistent: programs for each multiprocessor, which walk over the grid in the order of the schedule until it is
            done; 0: each tile of the grid has a program of its own.
    """

    tiles: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    descriptors: bool = False
    order: str = ORDERS[0]
    one_loop: bool = False
    persistent: int = 0

    def __str__(self) -> str:
        tiles = ", ".join(f"{k}: {v}" for k, v in self.tiles.items()) or "none"
        return (
            f"tiles {tiles}; warps {self.warps}; stages {self.stages}; "
            f"loads by {'descriptors' if self.descriptors else 'pointers'}"
            + (f"; tiles {self.order}" if self.order != ORDERS[0] else "")
            + ("; one loop" if self.one_loop else "")
            + (f"; {self.persistent} persistent a multiprocessor" if self.persistent else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an order that is the usual one is left out, and so is what is not chosen."""
        return {
            "tiles": dict(self.tiles),
            "warps": self.warps,
            "stages": self.stages,
            "descriptors": self.descriptors,
            **({"order": self.order} if self.order != ORDERS[0] else {}),
            **({"one_loop": True} if self.one_loop else {}),
            **({"persistent": self.persistent} if self.persistent else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a cascade becomes kernels, and one KernelSchedule for each of them.

    Args:
        kernels: by kernel name, in order; kernels that are not named get the default choices.
        reference: "running" keeps a running maximum, "bound" puts a bound in its place where that is proven right.
        split: parts of a rank, by its variable, that are reduced by programs of their own and merged: split-K.
        scatter: how the gradient of a table that is read at computed places is added up: in "any order", as programs
            come to its elements, or in a "fixed order", each element looking for its points: deterministic.
        sums: "apart" gives sums over different ranks kernels of their own; "accumulated" lets a kernel that computes
            what another would compute again add to the other's sums as their elements pass, in any order.
        pack: variables that share the tile of another, {"h": "p"}: a program has all heads h of a group beside its
            queries p, so that it reads their keys once.
    """

    kernels: Mapping[str, KernelSchedule] = field(default_factory=dict)
    reference: str = "running"
    split: Mapping[str, int] = field(default_factory=dict)
    scatter: str = "any order"
    sums: str = "apart"
    pack: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {k}" for name, k in self.kernels.items()]
        lines += [f"reference {self.reference}"] if self.reference != "running" else []
        lines += [f"split {v} into {n} parts" for v, n in self.split.items()]
        lines += [f"pack {v} into the tile of {w}" for v, w in self.pack.items()]
        lines += [f"scatter in {self.scatter}"] if self.scatter != SCATTERS[0] else []
        lines += [f"sums {self.sums}"] if self.sums != SUMS[0] else []
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them back to an equal value."""
        return {
            "kernels": {n: k.to_dict() for n, k in self.kernels.items()},
            **({"reference": self.reference} if self.reference != "running" else {}),
            **({"split": dict(self.split)} if self.split else {}),
            **({"scatter": self.scatter} if self.scatter != SCATTERS[0] else {}),
            **({"sums": self.sums} if self.sums != SUMS[0] else {}),
            **({"pack": dict(self.pack)} if self.pack else {}),
        }

    def to_json(self) -> str:
        """Print as JSON; `from_json` reads it back to an equal value."""
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_json(text: str) -> Schedule:
        """Read a schedule.

        Raises: ScheduleError: the text is not JSON, or a field is missing, unknown or of the wrong kind.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise _bad(f"the schedule is not JSON: {error.msg} at line {error.lineno}") from None
        except (RecursionError, ValueError):
            raise _bad(
                "the schedule is no JSON that a schedule could be: nested too deep, or a number too long"
            ) from None
        return Schedule.from_dict(data)

    @staticmethod
    def from_dict(data: Any) -> Schedule:
        """Read a schedule from the values of its JSON; what `compile --json` prints around one may stand around it.

        Raises: ScheduleError: a field is missing, unknown or of the wrong kind.
        """
        if isinstance(data, dict) and "kernels" not in data and isinstance(data.get("schedule"), dict):
            data = data["schedule"]
        if not isinstance(data, dict) or not isinstance(data.get("kernels"), dict):
            raise _bad("the schedule has no object 'kernels'")
        fields = ("kernels", "reference", "split", "scatter", "sums", "pack")
        for key in data:
            if key not in fields:
                raise _bad(f"a schedule has no '{key}'", nearest(key, fields))
        reference, split = data.get("reference", "running"), data.get("split", {})
        if reference not in REFERENCES:
            raise _bad(f"the reference is {reference!r}, not {' or '.join(REFERENCES)}")
        if not isinstance(split, dict) or any(type(n) is not int or n < 1 for n in split.values()):
            raise _bad(f"'split' is {split!r}, not numbers of parts by variable")
        scatter = data.get("scatter", SCATTERS[0])
        if scatter not in SCATTERS:
            raise _bad(f"the scatter is {scatter!r}, not {' or '.join(map(repr, SCATTERS))}")
        sums = data.get("sums", SUMS[0])
        if sums not in SUMS:
            raise _bad(f"the sums are {sums!r}, not {' or '.join(map(repr, SUMS))}")
        pack = data.get("pack", {})
        if not isinstance(pack, dict) or any(type(v) is not str for v in pack.values()):
            raise _bad(f"'pack' is {pack!r}, not variables by the variable that joins their tile")
        kernels = {name: _kernel(name, choices) for name, choices in data["kernels"].items()}
        return Schedule(kernels=kernels, reference=reference, split=split, scatter=scatter, sums=sums, pack=pack)


_KINDS: dict[str, type] = {
    "tiles": dict,
    "warps": int,
    "stages": int,
    "descriptors": bool,
    "order": str,
    "one_loop": bool,
    "persistent": int,
}
_NAMED = {dict: "an object", int: "a whole number", bool: "true or false", str: "a text"}


def _kernel(name: str, fields: Any) -> KernelSchedule:
    if not isinstance(fields, dict):
        raise _bad(f"the schedule of kernel '{name}' is not an object")
    for key, value in fields.items():
        if key not in _KINDS:
            raise _bad(f"kernel '{name}' has no choice '{key}'", nearest(key, tuple(_KINDS)))
        if type(value) is not _KINDS[key]:
            raise _bad(f"'{key}' of kernel '{name}' is {value!r}, not {_NAMED[_KINDS[key]]}")
    for v, n in fields.get("tiles", {}).items():
        if type(n) is not int:
            raise _bad(f"the tile of '{v}' in kernel '{name}' is {n!r}, not a whole number")
    if fields.get("order", ORDERS[0]) not in ORDERS:
        raise _bad(f"the order of kernel '{name}' is {fields['order']!r}", nearest(fields["order"], ORDERS))
    return KernelSchedule(**fields)


def _bad(headline: str, hint: str = "") -> ScheduleError:
    return ScheduleError(
        diagnostics=(
            Diagnostic(
                code="schedule-file",
                headline=headline,
                hint=hint,
                rule='a schedule is {"kernels": {NAME: {"tiles": {VAR: N}, "warps": N, "stages": N, '
                '"descriptors": true|false}}}',
            ),
        )
    )


def renamed(schedule: Schedule, names: Sequence[str]) -> Schedule:
    """The schedule for the kernels of a program of other names, one for one and in order; unchanged if they differ."""
    if len(names) != len(schedule.kernels):
        return schedule
    return replace(schedule, kernels=dict(zip(names, schedule.kernels.values(), strict=True)))


def tiled_variables(program: Program, name: str) -> tuple[str, ...]:
    """The variables of a kernel that have a tile: grid tiles, then the innermost loop (none for a user's own)."""
    k = next(k for k in program.kernels if k.name == name)
    own = {s.var for s in k.cascade.body if isinstance(s, Iter)}
    loop = tuple(v for v in k.loops[-1:] if v not in own)
    return grid_tiles(k) + loop


def fitting_choices(program: Program, kernels: Mapping[str, KernelSchedule]) -> dict[str, KernelSchedule]:
    """Those choices that are for a kernel of a program with just the tiles that it has."""
    wanted = {k.name: set(tiled_variables(program, k.name)) for k in program.kernels}
    return {n: k for n, k in kernels.items() if wanted.get(n) == set(k.tiles)}


def check_schedule(program: Program, schedule: Schedule) -> None:
    """Check that a schedule fits a program.

    Raises: ScheduleError: a kernel or a tile is missing or unknown; a tile is not a power of two from 1 to 1024; warps
        is not 1, 2, 4, 8 or 16; stages is not 1 to 16; the order is unknown; persistent is not 0 to 32, or the kernel
        is one program; one_loop is chosen for a kernel without a loop; a rank is split into fewer than 1 or more than
        16384 parts. One error that lists every mistake.
    """
    problems: list[str] = []
    problems += [
        f"'{v}' is split into {n} parts: not 1 to {MOST_PARTS}"
        for v, n in schedule.split.items()
        if n not in range(1, MOST_PARTS + 1)
    ]
    names = [k.name for k in program.kernels]
    problems += [f"there is no kernel '{n}'; {nearest(n, names)}" for n in schedule.kernels if n not in names]
    for name in names:
        k = schedule.kernels.get(name)
        if k is None:
            problems.append(f"kernel '{name}' has no schedule")
            continue
        wanted = tiled_variables(program, name)
        problems += [
            f"kernel '{name}' tiles no variable '{v}', only {', '.join(wanted) or 'none'}"
            for v in k.tiles
            if v not in wanted
        ]
        problems += [f"kernel '{name}' has no tile for '{v}'" for v in wanted if v not in k.tiles]
        problems += [
            f"the tile of '{v}' in kernel '{name}' is {n}: not a power of two from 1 to 1024"
            for v, n in k.tiles.items()
            if n not in [1 << i for i in range(11)]
        ]
        if k.warps not in (1, 2, 4, 8, 16):
            problems.append(f"kernel '{name}' has {k.warps} warps: not 1, 2, 4, 8 or 16")
        if k.stages < 1:
            problems.append(f"kernel '{name}' has {k.stages} stages: fewer than 1")
        if k.stages > MOST_STAGES:
            problems.append(f"kernel '{name}' has {k.stages} stages: more than {MOST_STAGES}")
        if k.order not in ORDERS:
            problems.append(f"kernel '{name}' begins its tiles '{k.order}'; {nearest(k.order, ORDERS)}")
        own = next(x for x in program.kernels if x.name == name)
        if k.one_loop and not own.loops:
            problems.append(f"kernel '{name}' has no loop to test every tile in")
        if k.persistent not in range(MOST_PERSISTENT + 1):
            problems.append(
                f"kernel '{name}' has {k.persistent} persistent programs a multiprocessor: not 0 to {MOST_PERSISTENT}"
            )
        if k.persistent and not own.residents:
            problems.append(f"kernel '{name}' is one program: it has no grid to walk over")
    if problems:
        raise ScheduleError(
            diagnostics=tuple(
                Diagnostic(code="schedule-illegal", headline=p, rule="a schedule names kernels and each of their tiles")
                for p in problems
            )
        )
