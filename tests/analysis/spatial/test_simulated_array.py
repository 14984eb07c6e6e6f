"""The cycles of a tile against arrays simulated operation by operation, which also compute the attention they time.

A value that an element has computed by the end of a cycle can be used anywhere from the next cycle on. The rows of the
2D array start one cycle after one another, so that sums and maxima move down with the work, and the 1D array, below the
last row, starts one cycle after that. Nothing here knows how the model counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from einsumcascade.analysis.spatial.cost import estimate
from einsumcascade.analysis.spatial.mapping import Plan, load_mapping
from einsumcascade.analysis.spatial.target import load_target

Name = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of one element, one cycle long: what it makes of which values."""

    name: Name
    needs: tuple[Name, ...]
    make: Callable[..., float]


@dataclass(slots=True, kw_only=True)
class Machine:
    """A 2D array of `rows` rows over a 1D array. Columns do not speak to each other: those simulated stand for all."""

    rows: int
    features: int
    tiles: int
    queries: list[list[list[float]]]
    keys: list[list[float]]
    values: list[list[float]]
    known: dict[Name, float] = field(default_factory=dict)
    ready: dict[Name, int] = field(default_factory=dict)

    def run(self, streams: dict[tuple[int, int], list[Operation]], start: int) -> tuple[int, int]:
        """Run the streams of elements, by row and column, as soon as every operand is there; return start and end."""
        while not self._runs(streams, start):
            start += 1
        return start, start + max(map(len, streams.values()), default=0)

    def _runs(self, streams: dict[tuple[int, int], list[Operation]], start: int) -> bool:
        timed = [(start + row + k, op) for (row, _), ops in streams.items() for k, op in enumerate(ops)]
        done: dict[Name, int] = {}
        made: dict[Name, float] = {}
        for cycle, op in sorted(timed, key=lambda pair: pair[0]):
            if any({**self.ready, **done}.get(n, cycle) >= cycle for n in op.needs):
                return False
            made[op.name] = op.make(*(made[n] if n in made else self.known[n] for n in op.needs))
            done[op.name] = cycle
        self.ready |= done
        self.known |= made
        return True


def exponential(name: Name, left: Name, right: Name) -> Iterator[Operation]:
    """Subtract, and exponentiate in six steps; the last of them has the result."""
    yield Operation(name=(*name, 0), needs=(left, right), make=lambda x, y: x - y)
    for k in range(1, 6):
        yield Operation(name=(*name, k), needs=((*name, k - 1),), make=lambda x: x)
    yield Operation(name=name, needs=((*name, 5),), make=math.exp)


def product(m: Machine, t: int, r: int, c: int) -> Iterator[Operation]:
    """The score of one key and query, and the maximum with the row above."""
    query, key = m.queries[t // m.tiles][c], m.keys[t % m.tiles * m.rows + r]
    for e in range(m.features):
        before: tuple[Name, ...] = (("QK", t, r, c, e - 1),) if e else ()
        last = e == m.features - 1
        yield Operation(
            name=("QK", t, r, c) if last else ("QK", t, r, c, e),
            needs=before,
            make=lambda x=0.0, e=e: x + query[e] * key[e],
        )
    above: tuple[Name, ...] = (("LM", t, r - 1, c),) if r else ()
    yield Operation(name=("LM", t, r, c), needs=(("QK", t, r, c), *above), make=max if r else lambda x: x)


def weight(m: Machine, t: int, r: int, c: int) -> Iterator[Operation]:
    """The exponential of a score, and its sum with the rows above."""
    yield from exponential(("SLN", t, r, c), ("QK", t, r, c), ("RM", t, c))
    above: tuple[Name, ...] = (("SLD", t, r - 1, c),) if r else ()
    yield Operation(name=("SLD", t, r, c), needs=(("SLN", t, r, c), *above), make=lambda x, y=0.0: x + y)


def weighted(m: Machine, t: int, r: int, c: int) -> Iterator[Operation]:
    """The products with the values, and their sums with the rows above."""
    value = m.values[t % m.tiles * m.rows + r]
    for f in range(m.features):
        above: tuple[Name, ...] = (("SLNV", t, r - 1, c, f),) if r else ()
        yield Operation(
            name=("SLNV", t, r, c, f),
            needs=(("SLN", t, r, c), *above),
            make=lambda x, y=0.0, f=f: x * value[f] + y,
        )


def running_maximum(m: Machine, t: int, c: int) -> Iterator[Operation]:
    """The maximum of all tiles so far."""
    before: tuple[Name, ...] = (("RM", t - 1, c),) if t % m.tiles else ()
    yield Operation(name=("RM", t, c), needs=(("LM", t, m.rows - 1, c), *before), make=max if before else lambda x: x)


def correction(m: Machine, t: int, c: int) -> Iterator[Operation]:
    """What the sums so far are multiplied by, and the denominator times it."""
    first = t % m.tiles == 0
    if first:
        m.known |= {("RM", t - 1, c, "none"): -math.inf, ("RD", t - 1, c, "none"): 0.0}
        m.ready |= {("RM", t - 1, c, "none"): -1, ("RD", t - 1, c, "none"): -1}
    tail = ("none",) if first else ()
    yield from exponential(("PRM", t, c), ("RM", t - 1, c, *tail), ("RM", t, c))
    yield Operation(name=("SPD", t, c), needs=(("RD", t - 1, c, *tail), ("PRM", t, c)), make=lambda x, y: x * y)


def corrected(m: Machine, t: int, c: int) -> Iterator[Operation]:
    """The numerators times the correction."""
    for f in range(m.features):
        before: tuple[Name, ...] = (("RNV", t - 1, c, f),) if t % m.tiles else ()
        yield Operation(name=("SPNV", t, c, f), needs=(("PRM", t, c), *before), make=lambda x, y=0.0: x * y)


def denominator(m: Machine, t: int, c: int) -> Iterator[Operation]:
    """The denominator of all tiles so far."""
    needs: tuple[Name, ...] = (("SLD", t, m.rows - 1, c), ("SPD", t, c))
    yield Operation(name=("RD", t, c), needs=needs, make=lambda x, y: x + y)


def numerators(m: Machine, t: int, c: int) -> Iterator[Operation]:
    """The numerators of all tiles so far."""
    for f in range(m.features):
        needs: tuple[Name, ...] = (("SLNV", t, m.rows - 1, c, f), ("SPNV", t, c, f))
        yield Operation(name=("RNV", t, c, f), needs=needs, make=lambda x, y: x + y)


def quotients(m: Machine, t: int, c: int) -> Iterator[Operation]:
    """The results, after the last tile of a query."""
    if t % m.tiles == m.tiles - 1:
        for f in range(m.features):
            needs: tuple[Name, ...] = (("RNV", t, c, f), ("RD", t, c))
            yield Operation(name=("AV", t // m.tiles, c, f), needs=needs, make=lambda x, y: x / y)


Part = Callable[[Machine, int, int, int], Iterator[Operation]] | Callable[[Machine, int, int], Iterator[Operation]]
# For each mapping: what the 1D array does for the tile before, beside the product; and beside the second product.
BESIDE: dict[str, tuple[tuple[Part, ...], tuple[Part, ...]]] = {
    "fusemax_architecture": ((denominator, quotients), (corrected, numerators)),
    "fusemax_binding": ((denominator, numerators, quotients), (corrected,)),
}


def starts(m: Machine, mapping: str, in_flight: int, steps: int, columns: int) -> list[int]:
    """Run all tiles, each from its exponentials on `in_flight - 1` steps late, and return when each step starts."""
    before, after = BESIDE[mapping]
    found, now = [], 0
    for step in range(steps):
        late = step - (in_flight - 1)
        phases: list[tuple[int, Sequence[Part], int, Sequence[Part]]] = [
            (step, [product], late - 1, before),
            (step, [], step, [running_maximum]),
            (late, [weight], late, [correction]),
            (late, [weighted], late, after),
        ]
        for number, (above, upper, below, lower) in enumerate(phases):
            streams: dict[tuple[int, int], list[Operation]] = {}
            for c in range(columns):
                for r in range(m.rows):
                    streams[r, c] = [op for part in upper if above >= 0 for op in part(m, above, r, c)]  # type: ignore[call-arg]
                streams[m.rows, c] = [op for part in lower if below >= 0 for op in part(m, below, c)]  # type: ignore[call-arg]
            start, now = m.run(streams, now)
            if number == 0:
                found.append(start)
    return found


def machine(*, rows: int, features: int, tiles: int, blocks: int, columns: int) -> Machine:
    """Make a machine and numbers for it."""
    draw = random.Random(rows * 1000 + features * 100 + tiles).gauss

    def rows_of(n: int) -> list[list[float]]:
        return [[draw(0, 1) for _ in range(features)] for _ in range(n)]

    return Machine(
        rows=rows,
        features=features,
        tiles=tiles,
        queries=[rows_of(columns) for _ in range(blocks)],
        keys=rows_of(rows * tiles),
        values=rows_of(rows * tiles),
    )


@pytest.mark.parametrize(
    ("mapping", "rows", "features", "tiles", "in_flight"),
    [
        ("fusemax_architecture", 4, 3, 3, 1),
        ("fusemax_architecture", 24, 2, 3, 1),
        ("fusemax_architecture", 24, 2, 3, 2),
        ("fusemax_architecture", 24, 2, 3, 3),
        ("fusemax_architecture", 7, 5, 1, 1),
        ("fusemax_binding", 4, 3, 2, 8),
        ("fusemax_binding", 9, 4, 3, 3),
        ("fusemax_binding", 6, 4, 3, 1),
        ("fusemax_binding", 8, 8, 4, 2),
    ],
)
def test_the_model_has_the_cycles_of_a_simulated_tile(
    mapping: str, rows: int, features: int, tiles: int, in_flight: int
) -> None:
    columns, measured = 2, math.lcm(tiles, in_flight)
    warm = measured + in_flight
    blocks = (warm + measured) // tiles + 1
    m = machine(rows=rows, features=features, tiles=tiles, blocks=blocks, columns=columns)
    times = starts(m, mapping, in_flight, warm + measured + 1, columns)
    simulated = times[warm + measured] - times[warm]

    loaded = load_mapping(mapping)
    (kernel,) = loaded.plans[0].kernels
    plan = Plan(kernels=(replace(kernel, in_flight=in_flight),), overlap=False)
    target = load_target("fusemax").resized(rows, buffers={})
    extents = {"B": 1, "H": 1, "E": features, "F": features, "M": rows * tiles, "P": rows * measured // tiles}
    found = estimate(replace(loaded, plans=(plan,)), extents, target=target)
    assert found.kernels[0].cycles == simulated


@pytest.mark.parametrize("mapping", BESIDE)
def test_the_simulated_arrays_compute_attention(mapping: str) -> None:
    m = machine(rows=5, features=3, tiles=4, blocks=6, columns=2)
    starts(m, mapping, 3, 24, 2)
    for block in range(5):
        for c in range(2):
            scores = [sum(q * k for q, k in zip(m.queries[block][c], key, strict=True)) for key in m.keys]
            weights = [math.exp(s - max(scores)) for s in scores]
            for f in range(3):
                expected = sum(w * v[f] for w, v in zip(weights, m.values, strict=True)) / sum(weights)
                assert m.known["AV", block, c, f] == pytest.approx(expected, rel=1e-12)
