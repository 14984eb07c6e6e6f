"""The least time of a cascade on a target: bytes against bandwidth, operations against the pipes that do them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from einsumcascade.analysis.counts import CLASSES, CONTRACTION, FUNCTION, KINDS, SPECIAL, count_operations, dtype_bytes
from einsumcascade.analysis.live import live_operations
from einsumcascade.analysis.targets import GpuTarget, gpu_target
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade

# Those whose rates a target has.
DTYPES: Final = ("float16", "bfloat16", "float32")
PIPES: Final = ("tensor", "fp32", "special")
MEMORY: Final = "memory"


def pipe_work(operations: Mapping[str, int], *, dtype: str) -> dict[str, int]:
    """Say how many operations each pipe of a GPU must do.

    Which operation is work of which pipe: Definition T4 of docs/analysis.md.

    Args:
        operations: by class, and the parts of `KINDS`.
        dtype: of the inputs.

    >>> found = {"multiply_add": 10, "contraction": 8, "other": 3, "max": 1, "function": 3, "special": 6}
    >>> pipe_work(found, dtype="bfloat16")
    {'tensor': 8, 'fp32': 3, 'special': 6}
    """
    n = {kind: operations.get(kind, 0) for kind in KINDS}
    tensor = n[CONTRACTION] if dtype_bytes(dtype) == 2 else 0
    return {
        "tensor": tensor,
        "fp32": sum(n[kind] for kind in CLASSES) - tensor - n[FUNCTION],
        "special": n[SPECIAL],
    }


def pipe_rates(target: GpuTarget) -> dict[str, float]:
    """Return how many operations each pipe of one multiprocessor does in a microsecond.

    A multiply-add is one operation here, on the tensor pipe too, whose rate the table gives in pairs.
    """
    clocks = target.clock_ghz * 1e3
    return {
        "tensor": clocks * target.tensor_flops_per_clock / 2,
        "fp32": clocks * target.fp32_per_clock,
        "special": clocks * target.special_per_clock,
    }


def flops(operations: Mapping[str, int]) -> int:
    """Return the operations in the customary unit: a multiply-add is two, everything else one."""
    return sum(n * (2 if kind == "multiply_add" else 1) for kind, n in operations.items() if kind in CLASSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The bounds of a cascade on a target, and the data of its roofline plot.

    Args:
        name: of the cascade.
        target: name of the target.
        dtype: of the inputs.
        extents: the numbers of all ranks.
        read_bytes, written_bytes: by tensor, each once.
        operations: by class, and the parts of `KINDS`.
        culls: whether points that constraints cull are left out; where they depend on data they are not.
        bounds_us: the least time of memory and of each pipe, in microseconds.
        bandwidth_gb_s: of the target's memory.
    """

    name: str
    target: str
    dtype: str
    extents: Mapping[str, int] = field(hash=False)
    read_bytes: Mapping[str, int] = field(hash=False)
    written_bytes: Mapping[str, int] = field(hash=False)
    operations: Mapping[str, int] = field(hash=False)
    culls: bool
    bounds_us: Mapping[str, float] = field(hash=False)
    bandwidth_gb_s: float

    @property
    def bytes(self) -> int:
        """The least traffic, in bytes."""
        return sum(self.read_bytes.values()) + sum(self.written_bytes.values())

    @property
    def binding(self) -> str:
        """What takes longest: `memory`, `tensor`, `fp32` or `special`."""
        return max(self.bounds_us, key=lambda k: self.bounds_us[k])

    @property
    def bound_us(self) -> float:
        """The least time in microseconds: that of what binds, all others hidden behind it."""
        return max(self.bounds_us.values())

    @property
    def flops(self) -> int:
        """Operations, a multiply-add as two."""
        return flops(self.operations)

    @property
    def intensity(self) -> float:
        """Operations for each byte of the least traffic, a multiply-add as two."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def intensity_by_class(self) -> dict[str, float]:
        """Operations of each class for each byte, a multiply-add as one."""
        return {kind: n / self.bytes if self.bytes else 0.0 for kind, n in self.operations.items()}

    @property
    def peak_gflops(self) -> float:
        """The rate at which the pipes could do this mix of operations if memory cost nothing, in 1e9 a second."""
        slowest = max(self.bounds_us[p] for p in PIPES)
        return self.flops / slowest / 1e3 if slowest else 0.0

    @property
    def attainable_gflops(self) -> float:
        """The rate at the least time: the roof at this intensity, in 1e9 a second."""
        return self.flops / self.bound_us / 1e3 if self.bound_us else 0.0

    @property
    def ridge(self) -> float:
        """The intensity at which memory takes as long as the pipes, in operations a byte."""
        return self.peak_gflops / self.bandwidth_gb_s

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; `plot` holds the point and the roof."""
        return {
            "name": self.name,
            "target": self.target,
            "dtype": self.dtype,
            "extents": dict(self.extents),
            "read_bytes": dict(self.read_bytes),
            "written_bytes": dict(self.written_bytes),
            "operations": dict(self.operations),
            "culls": self.culls,
            "intensity_by_class": self.intensity_by_class,
            "bounds_us": dict(self.bounds_us),
            "binding": self.binding,
            "bound_us": self.bound_us,
            "plot": {
                "intensity": self.intensity,
                "attainable_gflops": self.attainable_gflops,
                "peak_gflops": self.peak_gflops,
                "ridge": self.ridge,
                "bandwidth_gb_s": self.bandwidth_gb_s,
            },
        }

    def __str__(self) -> str:
        head = f"{self.name} on {self.target}, {self.dtype}: at least {self.bound_us:.4g} us, bound by {self.binding}"
        work = {MEMORY: self.bytes, **pipe_work(self.operations, dtype=self.dtype)}
        unit = {MEMORY: "bytes"}
        rows = [(p, f"{self.bounds_us[p]:.4g}", f"{work[p]:,} {unit.get(p, 'operations')}") for p in (MEMORY, *PIPES)]
        widths = [max(len(r[k]) for r in rows) for k in (0, 1)]
        lines = [f"  {p.ljust(widths[0])}  {t.rjust(widths[1])} us  {w}" for p, t, w in rows]
        culled = "culled points left out" if self.culls else "culled points depend on data and are counted"
        foot = (
            f"{self.intensity:.4g} operations a byte, memory and pipes meet at {self.ridge:.4g}; "
            f"{self.attainable_gflops:,.0f} of {self.peak_gflops:,.0f} Gflop/s attainable ({culled})"
        )
        return "\n".join([head, *lines, foot])


def roofline(
    cascade: Cascade | str,
    *,
    extents: Mapping[str, int],
    dtype: str = "bfloat16",
    target: str | GpuTarget = "cuda:90",
    constants: Mapping[str, float] | None = None,
) -> Roofline:
    """Bound the time of a cascade on a target from below, whatever the kernel.

    The least time is the largest bound: Definition T5 of docs/analysis.md. Intensity, peak and attainable rate are
    those of Definition T6.

    Args:
        cascade: a cascade, a name of the gallery or the path of a text.
        extents: numbers by rank, upper case.
        dtype: of the inputs: float16, bfloat16 or float32.
        target: a target or its name.
        constants: values in place of those the text declares.

    Raises:
        InputError: `unknown-dtype`; or an extent is missing, unknown or no whole number.
        TargetError: `unknown-target`.
        SpecFileError, CascadeError: `cascade` is a text that names nothing, or a wrong one.

    Cost: that of `live_operations`.   Source: Williams et al., Roofline (CACM 2009).

    >>> extents = {"B": 4, "H": 16, "P": 4096, "M": 4096, "E": 128, "F": 128}
    >>> found = roofline("softmax_2p", extents=extents)
    >>> found.binding, round(found.bounds_us["tensor"])
    ('tensor', 556)
    """
    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    dtype_bytes(dtype, known=DTYPES)
    device = gpu_target(target) if isinstance(target, str) else target
    binding = bind(cascade, extents=extents, constants=constants)
    counts = count_operations(cascade)
    live = live_operations(cascade, extents, constants=constants)
    operations = live or {kind: counts.total(kind).at(binding.extents) for kind in KINDS}
    moved = [(t, t.bytes.at(binding.extents)) for t in counts.traffic(dtype=dtype)]
    rates = pipe_rates(device)
    bounds = {MEMORY: sum(n for _, n in moved) / (device.bandwidth_gb_s * 1e3)}
    for pipe, n in pipe_work(operations, dtype=dtype).items():
        bounds[pipe] = n / (rates[pipe] * device.multiprocessors)
    return Roofline(
        name=cascade.name,
        target=device.name,
        dtype=dtype,
        extents=dict(binding.extents),
        read_bytes={t.tensor: n for t, n in moved if not t.is_output},
        written_bytes={t.tensor: n for t, n in moved if t.is_output},
        operations=operations,
        culls=live is not None,
        bounds_us=bounds,
        bandwidth_gb_s=device.bandwidth_gb_s,
    )
