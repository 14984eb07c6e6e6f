"""Targets as data: arrays of processing elements, the cycles of each operation on them, buffers and DRAM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from einsumcascade.analysis.counts import CLASSES
from einsumcascade.analysis.spatial.files import Table, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """An array of processing elements that all do the same.

    Args:
        name: as mappings call it.
        dimensions: elements along each dimension, by name: `{"rows": 256, "columns": 256}`.
        cycles: cycles of one operation on one element, by class of `counts.CLASSES`; it lacks what is absent.
    """

    name: str
    dimensions: Mapping[str, int] = field(hash=False)
    cycles: Mapping[str, int] = field(hash=False)

    @property
    def elements(self) -> int:
        """Processing elements of the array."""
        return math.prod(self.dimensions.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SpatialTarget:
    """A machine of arrays that share buffers and one DRAM.

    Args:
        name: of the machine, for tables.
        clock_hz: cycles in a second, of every array.
        dram_bytes_per_second: reads and writes together.
        word_bytes: of every element of every tensor.
        arrays: by name.
        buffers: capacity in bytes, by name.
    """

    name: str
    clock_hz: int
    dram_bytes_per_second: int
    word_bytes: int
    arrays: Mapping[str, Array] = field(hash=False)
    buffers: Mapping[str, int] = field(hash=False)

    @property
    def elements(self) -> int:
        """Processing elements of all arrays."""
        return sum(a.elements for a in self.arrays.values())

    def resized(self, size: int, *, buffers: Mapping[str, int]) -> SpatialTarget:
        """Return the machine with `size` elements along each dimension of each array, and other buffers."""
        arrays = {n: replace(a, dimensions=dict.fromkeys(a.dimensions, size)) for n, a in self.arrays.items()}
        return replace(self, arrays=arrays, buffers={**self.buffers, **buffers})


def load_target(name: str | Path, *, beside: Path | None = None) -> SpatialTarget:
    """Load a target that comes with the package, by name, or from a `.toml` file.

    Args:
        name: `flat`, `fusemax`, or a path.
        beside: the folder that a relative path starts from.

    Raises: ModelError: `mapping`: the file is missing or wrong; the message shows the line.

    >>> load_target("fusemax").arrays["2d"].elements
    65536
    """
    file = read("targets", name, beside=beside)
    file.only("name", "clock_hz", "dram_bytes_per_second", "word_bytes", "arrays", "buffers")
    arrays, buffers = file.table("arrays"), file.table("buffers")
    return SpatialTarget(
        name=file.text("name"),
        clock_hz=file.integer("clock_hz"),
        dram_bytes_per_second=file.integer("dram_bytes_per_second"),
        word_bytes=file.integer("word_bytes"),
        arrays={n: _array(n, arrays.table(n)) for n in arrays.values},
        buffers={n: buffers.integer(n) for n in buffers.values},
    )


def _array(name: str, table: Table) -> Array:
    table.only("dimensions", "cycles")
    dimensions, cycles = table.table("dimensions"), table.table("cycles")
    cycles.only(*CLASSES)
    if not dimensions.values:
        table.reject(f"array '{name}' has no dimensions", key="dimensions")
    return Array(
        name=name,
        dimensions={d: dimensions.integer(d) for d in dimensions.values},
        cycles={c: cycles.integer(c) for c in cycles.values},
    )
