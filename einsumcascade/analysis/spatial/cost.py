"""What a mapping costs on a target: cycles, seconds, utilisation and DRAM traffic, from the cascade's own counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from einsumcascade.analysis.counts import evaluate_extents, volume
from einsumcascade.analysis.dependence import rank_variables
from einsumcascade.analysis.spatial.facts import Facts
from einsumcascade.analysis.spatial.files import Table
from einsumcascade.analysis.spatial.mapping import FIT, Kernel, Plan, SpatialMapping, load_mapping
from einsumcascade.analysis.spatial.target import Array, SpatialTarget, load_target
from einsumcascade.analysis.spatial.traffic import Tiling, dram_elements
from einsumcascade.errors import InputError, nearest
from einsumcascade.language.ir import Einsum, rank_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EinsumCost:
    """One Einsum on its array.

    Args:
        tensor: what it computes.
        array: where.
        cycles: for which it holds the array.
        work: cycles of single processing elements; less than cycles times elements where dimensions are not filled.
    """

    tensor: str
    array: str
    cycles: int
    work: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCost:
    """One kernel.

    Args:
        einsums: in the order of the phases.
        tiles: elements of the tile of each loop variable.
        cycles: of computing, stalls included.
        stall_cycles: in which both arrays wait for partial results to cross one of them.
        moved_bytes: between DRAM and chip, by tensor.
        kept_bytes: by buffer.
        compute_seconds, dram_seconds: of either alone.
    """

    einsums: tuple[EinsumCost, ...]
    tiles: Mapping[str, int] = field(hash=False)
    cycles: int
    stall_cycles: int
    moved_bytes: Mapping[str, int] = field(hash=False)
    kept_bytes: Mapping[str, int] = field(hash=False)
    compute_seconds: float
    dram_seconds: float

    @property
    def seconds(self) -> float:
        """The longer of computing and moving, which overlap."""
        return max(self.compute_seconds, self.dram_seconds)

    @property
    def dram_bytes(self) -> int:
        """All that passes between DRAM and chip."""
        return sum(self.moved_bytes.values())

    def busy(self, array: str) -> int:
        """Cycles that the Einsums of an array take."""
        return sum(e.cycles for e in self.einsums if e.array == array)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one mapping costs for given extents. `str()` is a page to read, `to_dict()` the same for machines.

    Args:
        mapping: its name.
        target: the machine.
        extents: every rank's.
        plan: number of the plan taken, from 1 on.
        kernels: in order.
        seconds: all kernels, one after the other or overlapped as the plan says.
        macs: multiply-adds of the products that are summed over a rank both factors have.
    """

    mapping: str
    target: SpatialTarget
    extents: Mapping[str, int] = field(hash=False)
    plan: int
    kernels: tuple[KernelCost, ...]
    seconds: float
    macs: int

    @property
    def cycles(self) -> float:
        """The seconds in cycles, waiting for DRAM included."""
        return self.seconds * self.target.clock_hz

    @property
    def dram_bytes(self) -> int:
        """All that passes between DRAM and chip."""
        return sum(k.dram_bytes for k in self.kernels)

    def shares(self, array: str) -> dict[str, float]:
        """Return, for each Einsum of an array, the part of its elements' cycles that it works in."""
        available = self.target.arrays[array].elements * self.cycles
        return {e.tensor: e.work / available for k in self.kernels for e in k.einsums if e.array == array}

    def utilisation(self, array: str) -> float:
        """Return the part of the cycles of an array's elements in which they work, 0 to 1."""
        return sum(self.shares(array).values())

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "mapping": self.mapping,
            "target": self.target.name,
            "extents": dict(self.extents),
            "plan": self.plan,
            "seconds": self.seconds,
            "dram_bytes": self.dram_bytes,
            "macs": self.macs,
            "utilisation": {a: self.utilisation(a) for a in self.target.arrays},
            "kernels": [
                {
                    "einsums": {e.tensor: {"array": e.array, "cycles": e.cycles} for e in k.einsums},
                    "tiles": dict(k.tiles),
                    "cycles": k.cycles,
                    "stall_cycles": k.stall_cycles,
                    "moved_bytes": dict(k.moved_bytes),
                    "kept_bytes": dict(k.kept_bytes),
                    "compute_seconds": k.compute_seconds,
                    "dram_seconds": k.dram_seconds,
                }
                for k in self.kernels
            ],
        }

    def __str__(self) -> str:
        used = ", ".join(f"{a} {100 * self.utilisation(a):.1f} %" for a in self.target.arrays)
        out = [f"{self.mapping} on {self.target.name}, plan {self.plan}: {self.seconds:.4g} s; used: {used}"]
        for k in self.kernels:
            tiles = ", ".join(f"{v} {n:,}" for v, n in k.tiles.items())
            moved = ", ".join(f"{t} {n:,}" for t, n in k.moved_bytes.items())
            kept = ", ".join(f"{b} {n:,}" for b, n in k.kept_bytes.items())
            out.append(f"  {', '.join(e.tensor for e in k.einsums)}")
            out.append(f"    tiles: {tiles or 'all at once'}; kept bytes: {kept or 'none'}")
            out.append(
                f"    computes {k.compute_seconds:.4g} s: {k.cycles:,} cycles, {k.stall_cycles:,} of them stalls"
            )
            out.append(f"    moves {k.dram_seconds:.4g} s: {k.dram_bytes:,} bytes: {moved}")
        return "\n".join(out)


def estimate(
    mapping: SpatialMapping | str | Path,
    extents: Mapping[str, int],
    *,
    target: SpatialTarget | str | Path | None = None,
) -> Cost:
    """Estimate what a mapping costs for given extents.

    Args:
        mapping: a mapping, the name of one that comes with the package, or the path of a file.
        extents: numbers by rank, upper case; names that the cascade lacks may enter the mapping's products.
        target: instead of the mapping's own.

    Returns: the cost of the first plan whose kept tensors fit the buffers; points that a constraint culls cost as much
        as others.
    Raises:
        ModelError: `mapping`: the file is wrong, does not fit the target, or none of its plans fits the buffers.
        InputError: `missing-extent`, `extent-value`.
    Cost: O(kernels * Einsums * accesses) for each tile tried.   Source: FuseMax (MICRO 2024), section VI.

    >>> found = estimate("fusemax_binding", dict(B=64, H=12, E=64, F=64, P=1024, M=1024))
    >>> round(found.utilisation("2d"), 3), found.kernels[0].tiles["p"]
    (0.89, 1024)
    """
    loaded = mapping if isinstance(mapping, SpatialMapping) else load_mapping(mapping)
    if not isinstance(target, SpatialTarget):
        target = load_target(target or loaded.target, beside=None if target else loaded.table.folder)
    found = fitting(loaded, extents, target=target)
    if found is not None:
        return found
    sizes = ", ".join(f"{b} {n:,}" for b, n in target.buffers.items())
    shown = ", ".join(f"{r}={n}" for r, n in _bound(loaded, extents, target).items())
    loaded.table.reject(
        f"no plan fits the buffers of {target.name} ({sizes} bytes) for {shown}",
        key="plan",
        rule="what a plan keeps fits the buffers",
        hint="add a plan with smaller tiles, or one that keeps less",
    )


def fitting(mapping: SpatialMapping, extents: Mapping[str, int], *, target: SpatialTarget) -> Cost | None:
    """Return what `estimate` does, or None where no plan fits the buffers.

    Raises:
        ModelError: `mapping`: the mapping does not fit the arrays or buffers of the target by name.
        InputError: `missing-extent`, `extent-value`.
    """
    bound = _bound(mapping, extents, target)
    for number, plan in enumerate(mapping.plans, 1):
        tilings = [_tiling(mapping.facts, k, bound, target) for k in plan.kernels]
        found = [t for t in tilings if t is not None]
        if len(found) == len(tilings) and (not plan.overlap or _fits(found, target)):
            kernels = tuple(_kernel_cost(plan, t, target) for t in found)
            return Cost(
                mapping=mapping.name,
                target=target,
                extents=bound,
                plan=number,
                kernels=kernels,
                seconds=_seconds(plan, kernels, target),
                macs=mapping.facts.contractions.at(bound),
            )
    return None


def _bound(mapping: SpatialMapping, extents: Mapping[str, int], target: SpatialTarget) -> dict[str, int]:
    _check_extents(extents)
    table = mapping.table.table("extents", optional=True)
    own = {r: _product(table, r, text, extents, target) for r, text in mapping.extents.items()}
    found = evaluate_extents(mapping.facts.cascade, {**extents, **own})
    ranks = [rank_of(v) for v in rank_variables(mapping.facts.cascade)]
    missing = [r for r in ranks if r not in found]
    if missing:
        _refuse(
            "missing-extent",
            f"{', '.join(missing)} {'have' if len(missing) > 1 else 'has'} no extent",
            rule=f"{mapping.name} maps a cascade over {', '.join(ranks)}",
            hint=f"give {missing[0]} a number",
        )
    bound = {r: found[r] for r in ranks}
    _check_extents(bound)
    return bound


def _check_extents(extents: Mapping[str, int]) -> None:
    for rank, n in extents.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            rule = "an extent here is a whole number, 1 or more"
            _refuse("extent-value", f"the extent of {rank} is {n!r}", rule=rule)


def _refuse(code: str, headline: str, *, rule: str, hint: str = "") -> None:
    raise InputError.of(code, headline, rule=rule, hint=hint)


def _product(table: Table, key: str, text: str, extents: Mapping[str, int], target: SpatialTarget) -> int:
    """Multiply out `2d.rows * 4` or `B * P`."""
    known = {f"{a.name}.{d}": n for a in target.arrays.values() for d, n in a.dimensions.items()} | dict(extents)
    value = 1
    for factor in (f.strip() for f in text.split("*")):
        if not factor.isdecimal() and factor not in known:
            table.reject(
                f"'{factor}' is no number, extent or array dimension of {target.name}",
                key=key,
                value=factor,
                rule="it is a product of numbers, extents (upper case) and dimensions (array.dimension)",
                hint=nearest(factor, tuple(known)),
            )
        value *= int(factor) if factor.isdecimal() else known[factor]
    return value


def _tiling(facts: Facts, kernel: Kernel, extents: Mapping[str, int], target: SpatialTarget) -> Tiling | None:
    """Choose the tiles: the first candidates that fit the buffers, if any do."""
    _check_target(kernel, target)
    candidates = [tuple(_candidates(kernel, v, extents, target)) for v in kernel.loops]
    for sizes in product(*candidates):
        tiles = dict(zip(kernel.loops, sizes, strict=True))
        tiling = Tiling(facts=facts, kernel=kernel, extents=extents, tiles=tiles)
        if _fits([tiling], target):
            return tiling
    return None


def _candidates(kernel: Kernel, variable: str, extents: Mapping[str, int], target: SpatialTarget) -> Iterator[int]:
    extent = extents[rank_of(variable)]
    match kernel.tiles[variable]:
        case str() as text if text == FIT:
            # Whole turns of the arrays, as many as divide the rank evenly.
            unit = max((_units(kernel, target.arrays[a], variable) for a in kernel.spatial), default=1)
            turns = math.ceil(extent / unit)
            yield from (min(extent, unit * n) for n in range(turns, 0, -1) if turns % n == 0)
        case str() as text:
            yield min(extent, _product(kernel.table.table("tile"), variable, text, extents, target))
        case int() as size:
            yield min(extent, size)
        case sizes:
            yield from (min(extent, n) for n in sizes)


def _fits(tilings: list[Tiling], target: SpatialTarget) -> bool:
    """Tell whether kernels that run at the same time fit the buffers together."""
    return all(
        sum(t.elements_kept(b) for t in tilings) * target.word_bytes <= size for b, size in target.buffers.items()
    )


def _check_target(kernel: Kernel, target: SpatialTarget) -> None:
    keep, spatial = kernel.table.table("keep", optional=True), kernel.table.table("spatial")
    keep.only(*target.buffers)
    spatial.only(*target.arrays)
    for a in kernel.spatial:
        spatial.table(a).only(*target.arrays[a].dimensions)


def _units(kernel: Kernel, array: Array, variable: str) -> int:
    """Return the processing elements that a rank is spread over, 1 if over none."""
    return math.prod(array.dimensions[d] for d, v in kernel.spatial[array.name].items() if v == variable)


def _kernel_cost(plan: Plan, tiling: Tiling, target: SpatialTarget) -> KernelCost:
    kernel = tiling.kernel
    einsums = tuple(_einsum_cost(e, tiling, target) for e in kernel.einsums)
    cycles_of = {e.tensor: e.cycles for e in einsums}
    phases = sum(max(sum(cycles_of[e] for e in names) for names in phase.values()) for phase in kernel.phases)
    waits = sum(_crossing(tiling.facts.einsums[e], tiling, target) for e in kernel.einsums)
    # A tile takes its phases and its waits; as many as are in flight share that time, if the phases leave any.
    stalls = max(0, math.ceil((phases + waits) / kernel.in_flight) - phases)
    moved = {t: n * target.word_bytes for t, n in dram_elements(plan, tiling).items()}
    return KernelCost(
        einsums=einsums,
        tiles=tiling.tiles,
        cycles=phases + stalls,
        stall_cycles=stalls,
        moved_bytes=moved,
        kept_bytes={b: tiling.elements_kept(b) * target.word_bytes for b in kernel.keep},
        compute_seconds=(phases + stalls) / target.clock_hz,
        dram_seconds=sum(moved.values()) / target.dram_bytes_per_second,
    )


def _einsum_cost(tensor: str, tiling: Tiling, target: SpatialTarget) -> EinsumCost:
    kernel = tiling.kernel
    array = target.arrays[kernel.array_of(tensor)]
    turns = {**tiling.extents, **_turns(tiling.facts.einsums[tensor], tiling, array)}
    cycles, work = [], []
    for kind, count in tiling.facts.operations[tensor].items():
        if kind not in array.cycles:
            kernel.table.tables("phases")[kernel.phase_of(tensor)].reject(
                f"{tensor} takes an operation '{kind}', which array '{array.name}' of {target.name} lacks",
                value=tensor,
                rule=f"array '{array.name}' has {', '.join(array.cycles) or 'no operation'}",
                hint="place the Einsum on another array",
            )
        cycles.append(array.cycles[kind] * count.at(turns))
        work.append(array.cycles[kind] * count.at(tiling.extents))
    total = max if tensor in kernel.chained else sum
    return EinsumCost(tensor=tensor, array=array.name, cycles=total([0, *cycles]), work=total([0, *work]))


def _turns(einsum: Einsum, tiling: Tiling, array: Array) -> dict[str, int]:
    """Return, for each rank that an Einsum spreads over the array, the turns that take the place of its extent."""
    spread = dict.fromkeys(v for v in tiling.kernel.spatial[array.name].values() if v in einsum.space)
    return {rank_of(v): tiling.turns(v, _units(tiling.kernel, array, v)) for v in spread}


def _crossing(einsum: Einsum, tiling: Tiling, target: SpatialTarget) -> int:
    """Return the cycles that partial results of a reduction take to cross an array where a later phase of it waits.

    Sums that only leave the array cost nothing: work follows them from element to element. One that comes back is
    needed where the work began, a whole crossing ago.
    """
    kernel = tiling.kernel
    array = target.arrays[kernel.array_of(einsum.tensor)]
    spread = {d: v for d, v in kernel.spatial[array.name].items() if v in einsum.ranks}
    if einsum.reduction is None or not spread or not _returns(einsum.tensor, tiling.facts, kernel):
        return 0
    kind = {"add": "multiply_add", "multiply": "multiply_add"}.get(einsum.reduction.op.cost, einsum.reduction.op.cost)
    each = sum(min(array.dimensions[d], tiling.tile(v)) for d, v in spread.items()) * array.cycles[kind]
    space = (*einsum.free, *dict.fromkeys(spread.values()))
    return each * volume(space).at({**tiling.extents, **_turns(einsum, tiling, array)})


def _returns(tensor: str, facts: Facts, kernel: Kernel) -> bool:
    """Tell whether a later phase of the array that computes `tensor` needs it for the same tile."""
    reached = [tensor]
    for t in reached:
        new = [e for e in kernel.einsums if t in facts.needs(e) and kernel.phase_of(e) >= kernel.phase_of(t)]
        reached += [e for e in new if e not in reached]
    later = [e for e in reached if kernel.phase_of(e) > kernel.phase_of(tensor)]
    return any(kernel.array_of(e) == kernel.array_of(tensor) for e in later)


def _seconds(plan: Plan, kernels: tuple[KernelCost, ...], target: SpatialTarget) -> float:
    if not plan.overlap:
        return sum(k.seconds for k in kernels)
    busy = max(sum(k.busy(a) for k in kernels) for a in target.arrays) / target.clock_hz
    return max(busy, sum(k.dram_seconds for k in kernels), *(k.compute_seconds for k in kernels))
