"""Clocks that the programs of a kernel take: pipes, queues, and how programs are dealt to multiprocessors."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.schedules.demands import (
    ALU,
    CHUNK,
    FP32,
    ISSUE,
    L2,
    LANES,
    MEMORY,
    SHARED,
    SHUFFLE,
    SPECIAL,
    TENSOR,
    Demand,
    Work,
)
from einsumcascade.schedules.schedule import KernelSchedule

PIPES = (TENSOR, SPECIAL, FP32, ALU, SHUFFLE, ISSUE, SHARED, L2, MEMORY)
# (full, tested) steps of each loop of a program.
Walk: TypeAlias = tuple[tuple[int, int], ...]
# Registers are given to warps in portions of this many a thread, and each scheduler has a part of them for its own
# warps (CUDA C++ Programming Guide, occupancy).
REGISTER_PORTION, SCHEDULERS = 8, 4
# Rounds of programs whose end is dealt out one by one; those before them keep all multiprocessors busy.
ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a compiler made of a kernel, in place of what is estimated.

    Args:
        registers: of a thread.
        shared_memory_bytes: of a block.
        full, tested: instructions of a warp by pipe (of float32 operations, packed pairs being two), `issue` turns of
            its scheduler, in a step whose points are all live, and in one that tests them; None without a loop.
    """

    registers: int
    shared_memory_bytes: int
    full: Mapping[str, int] | None = field(default=None, hash=False)
    tested: Mapping[str, int] | None = field(default=None, hash=False)


def resident_blocks(target: GpuTarget, *, registers: int, shared_memory_bytes: int, warps: int) -> int:
    """Blocks that a multiprocessor holds together; 0 where not even one fits.

    >>> from einsumcascade.analysis.targets import gpu_target
    >>> resident_blocks(gpu_target("cuda:90"), registers=138, shared_memory_bytes=115712, warps=4)
    2
    >>> resident_blocks(gpu_target("cuda:90"), registers=200, shared_memory_bytes=1024, warps=1)
    8
    """
    if shared_memory_bytes > target.shared_memory_bytes:
        return 0
    portion = -(-max(registers, 1) // REGISTER_PORTION) * REGISTER_PORTION
    held = target.registers_per_multiprocessor // (portion * target.warp_size * SCHEDULERS) * SCHEDULERS
    return min(
        held // warps,
        target.shared_memory_per_multiprocessor // (shared_memory_bytes + target.shared_memory_reserved or 1),
        target.warps_per_multiprocessor // warps,
        target.blocks_per_multiprocessor,
    )


def estimated_blocks(work: Work, schedule: KernelSchedule, target: GpuTarget, *, shared_memory_bytes: int) -> int:
    """Blocks that a multiprocessor is expected to hold together, where nothing is compiled."""
    wanted = work.registers(target, warps=schedule.warps, descriptors=schedule.descriptors)
    return resident_blocks(
        target,
        registers=min(wanted, target.registers_per_thread),
        shared_memory_bytes=shared_memory_bytes,
        warps=schedule.warps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stations:
    """Clocks of one program alone, by the queue where it spends them, and of each pipe in all."""

    queues: Mapping[str, float]
    pipes: Mapping[str, float]

    def with_others(self, blocks: int) -> float:
        """Clocks of a program while `blocks` like it are resident: mean values of a closed network of queues.

        Each of k blocks finds the others waiting where they spend their time; no pipe works faster than it can.
        Source: Reiser and Lavenberg, Mean-value analysis of closed multichain queuing networks (JACM 1980).
        """
        demands = [d for d in self.queues.values() if d]
        waiting = [0.0] * len(demands)
        total = 0.0
        for k in range(1, blocks + 1):
            times = [d * (1 + q) for d, q in zip(demands, waiting, strict=True)]
            total = sum(times)
            waiting = [k * t / total for t in times]
        return max(total, blocks * max(self.pipes.values(), default=0.0))


class Price:
    """Clocks of programs by pipe, from their steps.

    Args:
        work: of the kernel's programs. schedule: its choices.
        compiled: what a compiler made of it, if that is known.
        spilled: registers of a thread that found no place.
    """

    def __init__(
        self, work: Work, schedule: KernelSchedule, target: GpuTarget, compiled: Compiled | None, *, spilled: int
    ) -> None:
        self.work, self.schedule, self.target, self.spilled = work, schedule, target, spilled
        exact = compiled if len(work.loops) == 1 else None
        counts = (exact.full, exact.tested) if exact else (None, None)
        self.once = self._part(work.outside, tested=False, counts=None)
        self.steps = [
            [self._part(demand, tested=tested, counts=counts[tested]) for tested in (False, True)]
            for demand in work.loops
        ]

    def program(self, walk: Walk) -> Stations:
        """What a program asks of the queues, given the steps of its loops."""
        fills = self.work.outside.loaded
        parts = [(1, self.once)]
        for demand, steps, own in zip(self.work.loops, walk, self.steps, strict=True):
            parts += zip(steps, own, strict=True)
            # A pipeline begins empty, once in each run of tiles; one without stages is always so.
            fills += demand.copied * (sum(n > 0 for n in steps) if self.schedule.stages > 1 else sum(steps))
        rate = self.target.l2_bytes_per_clock / self.target.multiprocessors
        queues: dict[str, float] = {L2: fills / rate}
        pipes: dict[str, float] = {}
        for n, (queued, whole) in parts:
            for q, clocks in queued.items():
                queues[q] = queues.get(q, 0.0) + n * clocks
            for pipe, clocks in whole.items():
                pipes[pipe] = pipes.get(pipe, 0.0) + n * clocks
        return Stations(queues=queues, pipes=pipes)

    def _part(
        self, demand: Demand, *, tested: bool, counts: Mapping[str, int] | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Clocks of one step, or of what stands outside loops, by queue and by pipe.

        A phase of a block waits for the pipe that it uses most; what it asks of the others overlaps.
        """
        phases = [self._issued(lanes) for lanes in self._phases(demand, tested=tested)]
        lanes = {p: sum(x[p] for x in phases) for p in (*LANES, ISSUE)}
        if counts is not None:
            # Phases as they are, of instructions as they were counted.
            threads = self.schedule.warps * self.target.warp_size
            known = {p: float(counts.get(p, 0) * threads) for p in LANES}
            known[ISSUE] = counts[ISSUE] * threads
            phases = [{p: known[p] * x[p] / lanes[p] if lanes[p] else 0.0 for p in known} for x in phases]
            lanes = known
        rates = {
            SPECIAL: self.target.special_per_clock,
            FP32: self.target.fp32_per_clock,
            ALU: self.target.alu_per_clock,
            SHUFFLE: self.target.shuffle_per_clock,
            ISSUE: self.target.issued_per_clock * self.target.warp_size,
        }
        pipes = {p: n / rates[p] for p, n in lanes.items()}
        queues = dict.fromkeys((TENSOR, *LANES, ISSUE), 0.0)
        for x in phases:
            slowest = max(x, key=lambda p: x[p] / rates[p])
            queues[slowest] += x[slowest] / rates[slowest]
        products = [
            p.cycles(self.target, warps=self.schedule.warps, element=self.work.element, precision=self.work.precision)
            for p in demand.products
        ]
        # Operands come from shared memory while products run; tiles were written there before.
        written = demand.copied / self.target.shared_bytes_per_clock
        queues[TENSOR] = sum(max(mma, operands) for mma, operands in products)
        pipes[TENSOR] = sum(mma for mma, _ in products)
        pipes[SHARED] = sum(operands for _, operands in products) + written
        pipes[SHARED] += 4 * self._spills() / self.target.shared_bytes_per_clock
        pipes[L2] = (demand.loaded + demand.stored) * self.target.multiprocessors / self.target.l2_bytes_per_clock
        return queues, pipes

    def _phases(self, demand: Demand, *, tested: bool) -> list[dict[str, float]]:
        """Operations by pipe, with those of masks and of exact products; address arithmetic is of the first phase."""
        phases = [dict[str, float](x) for x in demand.phases] or [{}]
        first = phases[0]
        first[ALU] = first.get(ALU, 0) + (demand.masked if tested else 0)
        if self.work.is_exact(self.target):
            # Exact products of float32 are multiply-adds.
            first[FP32] = first.get(FP32, 0) + sum(p.rows * p.columns * p.depth for p in demand.products)
        elif self.work.precision == "tf32x3":
            # Each operand is cut into a rounded number and the rest, rounded too.
            cut = sum((p.rows + p.columns) * p.depth for p in demand.products)
            first[FP32], first[ALU] = first.get(FP32, 0) + cut, first[ALU] + 2 * cut
        if not self.schedule.descriptors:
            # An address with its carry, and the copy itself, for each chunk.
            first[ALU] += 2 * demand.copied / CHUNK
            first[ISSUE] = demand.copied / CHUNK
        first[ISSUE] = first.get(ISSUE, 0.0) + self._spills()
        return phases

    def _spills(self) -> float:
        """Operations that move spilled registers in a step: each is written and read once."""
        return 2.0 * self.spilled * self.schedule.warps * self.target.warp_size

    def _issued(self, lanes: dict[str, float]) -> dict[str, float]:
        out = {p: lanes.get(p, 0.0) for p in LANES}
        turns = sum(out.values()) + (self.target.special_turns - 1) * out[SPECIAL]
        return {**out, ISSUE: turns + lanes.get(ISSUE, 0.0)}


def dealt(
    walks: Sequence[Walk],
    repeats: int,
    demands: Mapping[Walk, Stations],
    blocks: int,
    target: GpuTarget,
    *,
    order: str,
    persistent: int = 0,
    counts: Mapping[Walk, int] | None = None,
) -> float:
    """Clocks until the last program ends: each begins where the first block of a multiprocessor becomes free.

    Programs before the last rounds keep all busy. Where no program is left to begin, those that run on share a
    multiprocessor with fewer, and get faster. With `persistent` programs a multiprocessor there are just these: each
    takes tiles in turn, whether the others are done with theirs or not. `counts` says how often each walk is
    there, where that is known.

    Cost: linear in the programs of the last rounds; in all tiles where programs are persistent.
    """
    blocks = min(blocks, persistent or blocks)
    lengths = {walk: s.with_others(blocks) for walk, s in demands.items()}
    batch = [lengths[w] for w in walks]
    if order.startswith("descending"):
        batch.reverse()
    count, slots = len(batch) * repeats, target.multiprocessors * blocks
    inside = order.endswith("inside")
    if persistent:
        tiles = [n for n in batch for _ in range(repeats)] if inside else batch * repeats
        programs = min(count, target.multiprocessors * persistent)
        queue = [sum(tiles[n::programs]) for n in range(programs)]
        last = programs
    else:
        last = min(count, count % slots + ROUNDS * slots)
        queue = [batch[n // repeats if inside else n % len(batch)] for n in range(count - last, count)]
    start = (sum(batch) * repeats - sum(queue)) / slots
    free = [(0.0, slot) for slot in range(min(slots, last))]
    begun = 0.0
    for length in queue:
        begun, slot = free[0]
        heapq.heapreplace(free, (begun + length, slot))
    left: dict[int, list[float]] = {}
    for end, slot in free:
        left.setdefault(slot % target.multiprocessors, []).append(end - begun)
    mean = _mean(demands, Counter(walks) if counts is None else counts)
    pace = [mean.with_others(k) / (mean.with_others(blocks) or 1.0) for k in range(blocks + 1)]
    return start + begun + max((_drained(sorted(rest), pace) for rest in left.values()), default=0.0)


def _drained(rest: list[float], pace: list[float]) -> float:
    """Clocks until blocks of one multiprocessor end, given those they need at full occupancy, in ascending order."""
    clocks = done = 0.0
    for n, own in enumerate(rest):
        clocks += (own - done) * pace[len(rest) - n]
        done = own
    return clocks


def _mean(demands: Mapping[Walk, Stations], times: Mapping[Walk, int]) -> Stations:
    """The average program."""
    total = sum(times.values())
    shares = [(s, times[walk] / total) for walk, s in demands.items()]

    def of(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(p for f in figures for p in f)
        return {p: sum(f.get(p, 0.0) * x for f, (_, x) in zip(figures, shares, strict=True)) for p in names}

    return Stations(queues=of([s.queues for s, _ in shares]), pipes=of([s.pipes for s, _ in shares]))
