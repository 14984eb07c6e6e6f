"""Predict how long a program's kernels take under a schedule, and rank schedules, with no GPU and nothing measured.

A multiprocessor is a closed network of queues: a block multiplies tiles, then works at other pipes, one phase after the
other, and blocks that are resident together take turns at each. So one block alone leaves every pipe idle while it uses
another, and each further block fills some of that. Programs are dealt to
multiprocessors in the order of the grid, so that waves, their tail and the uneven rows of a causal mask count. Every
constant is a figure of the target's record (`GpuTarget.sources`); none is fitted to a measurement.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from einsumcascade.analysis.counts import dtype_bytes
from einsumcascade.analysis.roofline import DTYPES
from einsumcascade.analysis.targets import GpuTarget, gpu_target
from einsumcascade.language.extents import Binding, bind
from einsumcascade.schedules.cost import KernelCost, kernel_cost
from einsumcascade.schedules.demands import MEMORY, Work, work_of
from einsumcascade.schedules.frame import frame_of
from einsumcascade.schedules.program import Kernel, Program
from einsumcascade.schedules.roles import steps_of_tiles
from einsumcascade.schedules.schedule import KernelSchedule, Schedule, check_schedule
from einsumcascade.schedules.shared_memory import Block
from einsumcascade.schedules.timing import PIPES, Compiled, Price, Stations, Walk, dealt, resident_blocks
from einsumcascade.schedules.usual import usual_schedule

# Kinds of programs that a ranking tells apart.
MOST = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPrediction:
    """One kernel under its schedule.

    Args:
        name: of the kernel. seconds: of all its programs.
        cycles: clocks that each pipe of a multiprocessor must work, whatever overlaps.
        registers, shared_memory_bytes: of a thread and of a block, compiled or estimated.
        blocks: that are resident together on a multiprocessor. programs: that are launched. waves: rounds of them.
        full_steps, tested_steps: of all programs, over tiles without masks and with them.
    """

    name: str
    seconds: float
    cycles: Mapping[str, float] = field(hash=False)
    registers: int
    shared_memory_bytes: int
    blocks: int
    programs: int
    waves: float
    full_steps: int
    tested_steps: int

    @property
    def binding(self) -> str:
        """The pipe that works longest."""
        return max(self.cycles, key=lambda p: self.cycles[p])

    def __str__(self) -> str:
        if not self.blocks:
            return f"{self.name}: does not fit"
        return (
            f"{self.name}: {self.seconds * 1e3:.4g} ms, bound by {self.binding}; {self.programs:,} programs in "
            f"{self.waves:.2f} waves of {self.blocks} block{'s' * (self.blocks != 1)} a multiprocessor; "
            f"{self.full_steps:,} full and {self.tested_steps:,} tested tiles"
        )

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "seconds": self.seconds,
            "binding": self.binding,
            "cycles": dict(self.cycles),
            "registers": self.registers,
            "shared_memory_bytes": self.shared_memory_bytes,
            "blocks": self.blocks,
            "programs": self.programs,
            "waves": self.waves,
            "full_steps": self.full_steps,
            "tested_steps": self.tested_steps,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A program under a schedule: its kernels run one after the other."""

    schedule: Schedule
    kernels: tuple[KernelPrediction, ...]

    @property
    def seconds(self) -> float:
        """Of all kernels together; infinite where one does not fit the target."""
        return sum(k.seconds for k in self.kernels)

    @property
    def slowest(self) -> KernelPrediction:
        """The kernel that takes longest."""
        return max(self.kernels, key=lambda k: k.seconds)

    @property
    def binding(self) -> str:
        """The pipe that works longest in the slowest kernel."""
        return self.slowest.binding

    def __str__(self) -> str:
        return "\n".join(map(str, self.kernels))

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "seconds": self.seconds,
            "binding": self.binding,
            "schedule": str(self.schedule),
            "kernels": [k.to_dict() for k in self.kernels],
        }


def predict(
    program: Program,
    schedule: Schedule,
    *,
    extents: Mapping[str, int],
    dtype: str = "bfloat16",
    target: str | GpuTarget = "cuda:90",
    precision: str = "ieee",
    compiled: Mapping[str, Compiled] | None = None,
) -> Prediction:
    """Predict the time of a program under a schedule.

    Args:
        program: the kernels. schedule: for each of them; one without kernels gets the default choices.
        extents: numbers by rank, upper case.
        dtype: of the inputs. target: a target or its name. precision: of float32 products.
        compiled: by kernel, what a compiler made of it; what is not given is estimated from the Einsums.

    Raises: ScheduleError, InputError, TargetError, as `cost` does.
    Cost: some milliseconds; the proofs of the loop form are cached.

    >>> from einsumcascade.gallery import load
    >>> from einsumcascade.schedules.partition import partition
    >>> from einsumcascade.schedules.roles import steps_of_tiles
    >>> from einsumcascade.schedules.schedule import KernelSchedule, Schedule
    >>> program = partition(load("softmax_2p"), bounded=("e", "f"))
    >>> tiles = Schedule(kernels={"softmax_2p": KernelSchedule(tiles={"p": 128, "m": 64}, warps=8)})
    >>> found = predict(program, tiles, extents={"B": 4, "H": 16, "P": 4096, "M": 4096, "E": 128, "F": 128})
    >>> found.binding, found.kernels[0].programs
    ('tensor', 2048)
    """
    return _Model(program, extents, dtype, target, precision).predict(schedule, compiled or {})


def rank(
    program: Program,
    candidates: Sequence[Schedule],
    *,
    extents: Mapping[str, int],
    target: str | GpuTarget = "cuda:90",
    dtype: str = "bfloat16",
    precision: str = "ieee",
) -> tuple[Prediction, ...]:
    """Predict the time of candidates and sort them, best first; nothing is compiled.

    Candidates of equal time stay in their order. One that does not fit the target takes infinite time. Of more than 512
    kinds of programs, as of the rows of a long causal mask, neighbours count as the one between them.

    Raises: as `predict`.
    Cost: 2 to 10 ms a candidate up to 512 kinds of programs, and a microsecond for each further one; what depends on
        tiles alone is worked out once.
    """
    model = _Model(program, extents, dtype, target, precision, most=MOST)
    return tuple(sorted((model.predict(c, {}) for c in candidates), key=lambda p: p.seconds))


def works(
    program: Program, schedule: Schedule, *, extents: Mapping[str, int], dtype: str = "bfloat16"
) -> dict[str, Work]:
    """Say what a program of each kernel asks for under a schedule that names them all; lengths do not enter.

    Raises: ScheduleError, InputError.
    """
    check_schedule(program, schedule)
    binding = bind(program.cascade, extents=extents)
    frames = {k.name: frame_of(program, k, schedule.kernels[k.name], binding) for k in program.kernels}
    return {name: work_of(program, frame, dtype=dtype) for name, frame in frames.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiled:
    """A kernel under tiles: what its programs ask for, and how many steps each of them has."""

    work: Work
    cost: KernelCost
    # Of every program of one batch, in the order of its tiles; how often they recur.
    walks: tuple[Walk, ...]
    repeats: int
    # Of each loop, whether it walks tiles that may be tested.
    tiled: tuple[bool, ...]
    # By `one_loop`: the walks, and how often each of them is there.
    counted: dict[bool, tuple[tuple[Walk, ...], Counter[Walk]]] = field(default_factory=dict, hash=False)

    def walked(self, schedule: KernelSchedule) -> tuple[tuple[Walk, ...], Counter[Walk]]:
        """The walks under a schedule, which may have every tile tested, and how many programs have each."""
        if schedule.one_loop not in self.counted:
            walks = self._tested() if schedule.one_loop else self.walks
            self.counted[schedule.one_loop] = walks, Counter(walks)
        return self.counted[schedule.one_loop]

    def _tested(self) -> tuple[Walk, ...]:
        return tuple(
            tuple((0, f + t) if tiled else (f, t) for (f, t), tiled in zip(walk, self.tiled, strict=True))
            for walk in self.walks
        )


class _Model:
    """Predictions for one program at given extents."""

    def __init__(
        self,
        program: Program,
        extents: Mapping[str, int],
        dtype: str,
        target: str | GpuTarget,
        precision: str,
        *,
        most: int = 0,
    ) -> None:
        self.element = dtype_bytes(dtype, known=DTYPES)
        self.program, self.dtype, self.precision, self.most = program, dtype, precision, most
        self.target = gpu_target(target) if isinstance(target, str) else target
        self.binding: Binding = bind(program.cascade, extents=extents)
        self.tiled: dict[tuple[str, tuple[tuple[str, int], ...]], _Tiled] = {}
        self.blocks = {
            k.name: Block(
                program,
                k,
                extents=self.binding.extents,
                dtype_bytes=self.element,
                target=self.target,
                precision=precision,
            )
            for k in program.kernels
        }
        # Candidates differ in one kernel, or in few.
        self.known: dict[tuple[str, str], KernelPrediction] = {}

    def predict(self, schedule: Schedule, compiled: Mapping[str, Compiled]) -> Prediction:
        chosen = schedule
        if not chosen.kernels:
            chosen = usual_schedule(
                self.program,
                extents=self.binding.extents,
                dtype_bytes=self.element,
                target=self.target,
                precision=self.precision,
            )
        check_schedule(self.program, chosen)
        kernels = tuple(self._known(k, chosen.kernels[k.name], compiled.get(k.name)) for k in self.program.kernels)
        return Prediction(schedule=schedule, kernels=kernels)

    def _known(self, kernel: Kernel, schedule: KernelSchedule, compiled: Compiled | None) -> KernelPrediction:
        if compiled is not None:
            return self._kernel(kernel, schedule, compiled)
        key = (kernel.name, str(schedule))
        if key not in self.known:
            self.known[key] = self._kernel(kernel, schedule, None)
        return self.known[key]

    def _tile(self, kernel: Kernel, schedule: KernelSchedule) -> _Tiled:
        key = (kernel.name, tuple(schedule.tiles.items()))
        if key not in self.tiled:
            frame = replace(frame_of(self.program, kernel, schedule, self.binding), most=self.most)
            walks: list[Walk] = []
            repeats = 1
            for corner in frame.corners():
                repeats = corner.programs
                steps = [(frame.steps(loop, corner), frame.full(loop, corner)) for loop in frame.loops]
                walks += corner.alike * [tuple((min(full, n), n - min(full, n)) for n, full in steps)]
            self.tiled[key] = _Tiled(
                work=work_of(self.program, frame, dtype=self.dtype, precision=self.precision),
                cost=kernel_cost(self.program, kernel, frame, dtype=self.dtype, device=self.target),
                walks=tuple(walks),
                repeats=repeats,
                # Tiles of the text's own loops are of a rank that it cuts by itself.
                tiled=tuple(
                    loop.tile > 1 or (not frame.inner and bool(steps_of_tiles(frame.cascade))) for loop in frame.loops
                ),
            )
        return self.tiled[key]

    def _kernel(self, kernel: Kernel, schedule: KernelSchedule, compiled: Compiled | None) -> KernelPrediction:
        target, tiled = self.target, self._tile(kernel, schedule)
        work = tiled.work
        wanted = work.registers(target, warps=schedule.warps, descriptors=schedule.descriptors)
        registers = compiled.registers if compiled is not None else min(wanted, target.registers_per_thread)
        shared = (
            compiled.shared_memory_bytes if compiled is not None else self.blocks[kernel.name].memory(schedule).least
        )
        blocks = resident_blocks(target, registers=registers, shared_memory_bytes=shared, warps=schedule.warps)
        spilled = max(0, wanted - registers) if compiled is None else 0
        price = Price(work, schedule, target, compiled, spilled=spilled)
        totals: dict[str, float] = dict.fromkeys(PIPES, 0.0)
        demands: dict[Walk, Stations] = {}
        walks, counts = tiled.walked(schedule)
        for walk, times in counts.items():
            demands[walk] = price.program(walk)
            for pipe, n in demands[walk].pipes.items():
                totals[pipe] += n * times * tiled.repeats
        programs = len(walks) * tiled.repeats
        if schedule.persistent:
            programs = min(programs, schedule.persistent * target.multiprocessors)
        cycles = {p: totals[p] / target.multiprocessors for p in PIPES if p != MEMORY}
        cycles[MEMORY] = tiled.cost.bounds_us["memory"] * target.clock_ghz * 1e3
        clocks = math.inf
        if blocks:
            clocks = max(
                dealt(
                    walks,
                    tiled.repeats,
                    demands,
                    blocks,
                    target,
                    order=schedule.order,
                    persistent=schedule.persistent,
                    counts=counts,
                ),
                cycles[MEMORY],
            )
        # Whole clocks: walks that are alike take the same time, in whatever order they are added up.
        seconds = round(clocks) / (target.clock_ghz * 1e9) if blocks else math.inf
        return KernelPrediction(
            name=kernel.name,
            seconds=seconds,
            cycles=cycles,
            registers=registers,
            shared_memory_bytes=shared,
            blocks=blocks,
            programs=programs,
            waves=programs / (target.multiprocessors * blocks) if blocks else math.inf,
            full_steps=tiled.repeats * sum(n * f for walk, n in counts.items() for f, _ in walk),
            tested_steps=tiled.repeats * sum(n * t for walk, n in counts.items() for _, t in walk),
        )
