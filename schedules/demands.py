"""What a program of a kernel asks of a multiprocessor: products, instructions by pipe, bytes, registers.

All of it is read off the Einsums of the loop form and the tiles of a schedule; nothing is compiled. What a compiler
made of a kernel replaces these figures where it is known (`model.Compiled`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from einsumcascade.analysis.counts import CONTRACTION, element_bytes, index_tensors, operations_of
from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.language.ir import Apply, Einsum, Expr, Init, Read, rank_of, reads, subexpressions, variables
from einsumcascade.schedules.cost import BUFFER_DTYPE, loaded, moves, statements
from einsumcascade.schedules.frame import Frame, Loop
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.roles import MINIMUM_DOT, contraction

# Bytes that one thread copies by one instruction, where a copy has no unit of its own.
CHUNK = 16
# Registers that a thread has for addresses, counters and what the calling convention keeps. Held against compiled
# kernels in tests/schedules/test_model.py; no time enters it.
ADDRESSES = 16
# Rows of a product that one warp holds.
WARP_ROWS = 16
# Threads that hold one row of a product between them (PTX ISA, fragments of mma and wgmma); a number of a row is kept,
# and computed, by each of them, and a reduction over a row ends with log2 of them exchanges.
ROW_THREADS = 4
EXCHANGES = 2
# Pipes whose work is instructions, and those that count something else.
TENSOR, SPECIAL, FP32, ALU, SHUFFLE, ISSUE, SHARED, L2, MEMORY = (
    "tensor",
    "special",
    "fp32",
    "alu",
    "shuffle",
    "issue",
    "shared",
    "l2",
    "memory",
)
LANES = (SPECIAL, FP32, ALU, SHUFFLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product of tiles: `rows x depth` by `depth x columns`; computed operands come from registers."""

    rows: int
    columns: int
    depth: int
    left_is_computed: bool
    right_is_computed: bool

    def cycles(self, target: GpuTarget, *, warps: int, element: int, precision: str = "ieee") -> tuple[float, float]:
        """Clocks of the matrix unit, 0 where the products are not its work, and of shared memory for the operands.

        A group of four warps (or a warp, or a block) multiplies `product_rows` rows at a time and reads the right
        operand anew for each such part.
        """
        group = target.product_rows
        rows = -(-self.rows // group) * group
        rate = target.product_flops_per_clock(element=element, precision=precision)
        mma = 2 * rows * self.columns * self.depth / rate if rate else 0.0
        left, right = self.rows * self.depth * element, self.columns * self.depth * element
        # Where fragments are held in registers, warps that share rows share what they read.
        parts = rows // group if target.has_asynchronous_dot else min(warps, rows // group)
        moved = parts * right + (0 if self.left_is_computed else left)
        moved += right if self.right_is_computed else 0
        if self.left_is_computed and warps * WARP_ROWS > self.rows:
            # Warps that share rows hold a part of them each, and hand it to the others.
            moved += 2 * left
        moved *= 3 if precision == "tf32x3" else 1
        return mma, moved / target.shared_bytes_per_clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a program asks for once, or in one step of a loop.

    Args:
        products: of tiles.
        phases: operations by pipe, one thread's part counting as one; what a thread does after a phase waits for all of
            it, as exponentials wait for the maximum of their row.
        loaded, stored: bytes between the program and the caches.
        copied: those of `loaded` that a step of a loop fetches ahead into shared memory.
        masked: additional operations of a step that tests its points.
        live_elements: of float32 tiles that are alive at once, carried ones left out.
        row_values: tensors of one axis of a tile that a step computes.
        points: elements of the tile that a step computes: scores, in attention.
    """

    products: tuple[Product, ...] = ()
    phases: tuple[Mapping[str, int], ...] = field(default=(), hash=False)
    loaded: int = 0
    stored: int = 0
    copied: int = 0
    masked: int = 0
    live_elements: float = 0.0
    row_values: int = 0
    points: int = 1

    @property
    def operations(self) -> int:
        """Of all phases, products left out."""
        return sum(sum(lanes.values()) for lanes in self.phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What programs of a kernel ask for under given tiles, whatever its warps and stages.

    Args:
        outside: outside all loops. loops: one step of each.
        carried: elements of tiles that loops keep. resident: bytes of tiles that products read in every step.
        rows: of the tile of the grid, or of the largest tile.
        element: bytes of an input's element. precision: of float32 products.
    """

    outside: Demand
    loops: tuple[Demand, ...]
    carried: int
    resident: int
    rows: int
    element: int
    precision: str = "ieee"

    def is_exact(self, target: GpuTarget) -> bool:
        """Whether products are multiply-adds of threads, no work of the matrix unit."""
        return not target.product_flops_per_clock(element=self.element, precision=self.precision)

    def registers(self, target: GpuTarget, *, warps: int, descriptors: bool) -> int:
        """Registers of a thread, as many as it would like: more than the target allows are spilled.

        Carried tiles, tiles that are alive at once in the step that has most, rows (which four threads share, in the
        layout of products), and two for each chunk that a thread copies by pointers.
        """
        threads = warps * target.warp_size
        # Accumulators have a memory of their own beside tcgen05 products of 128 rows.
        carried = 0 if target.product_rows > 64 else self.carried
        most = max((d.live_elements for d in self.loops), default=0.0)
        rows = max((d.row_values for d in self.loops), default=1) * max(1, self.rows * 4 // threads)
        copied = 0 if descriptors else max((d.copied for d in self.loops), default=0)
        held = 0 if target.has_asynchronous_dot or target.backend == "hip" else self.resident // 4
        chunks = -(-copied // (CHUNK * threads))
        tiles = max(carried + most + held, self.outside.live_elements)
        return math.ceil(tiles / threads) + rows + 2 * chunks + ADDRESSES


def work_of(program: Program, frame: Frame, *, dtype: str, precision: str = "ieee") -> Work:
    """See what a program of a kernel asks for; `precision` is that of float32 products.

    Cost: linear in the Einsums, quadratic in those of one loop.
    """
    return _Reader(program, frame, dtype, precision).read()


@dataclass(slots=True)
class _Reader:
    program: Program
    frame: Frame
    dtype: str
    precision: str
    resident: int = 0

    def read(self) -> Work:
        frame = self.frame
        outside = self._demand(None)
        loops = tuple(self._demand(loop) for loop in frame.loops)
        carried = sum(self._size(s.free) for s in statements(frame, None) if isinstance(s, Init))
        rows = max([n for v, n in frame.grid.items()], default=1)
        return Work(
            outside=outside,
            loops=loops,
            carried=carried,
            resident=self.resident,
            rows=rows,
            element=element_bytes(self.dtype),
            precision=self.precision if self.dtype == "float32" else "ieee",
        )

    def _size(self, axes: Iterable[str]) -> int:
        return math.prod(self.frame.sizes[rank_of(v)] for v in dict.fromkeys(axes) if v in self.frame.axes)

    def _bytes(self, read: Read) -> int:
        """Bytes of the tile that a read loads."""
        positions = index_tensors(self.program.cascade)
        dtype = BUFFER_DTYPE if read.tensor in self.program.buffers else self.dtype
        each = 4 if read.tensor in positions else element_bytes(dtype)
        return self._size(variables(*read.indices)) * each

    def _demand(self, loop: Loop | None) -> Demand:
        frame = self.frame
        body = statements(frame, loop)
        phases = [dict.fromkeys(LANES, 0)]
        products: list[Product] = []
        reads_in: dict[Read, None] = {}
        reads_out: dict[Read, None] = {}
        stored = masked = 0
        outputs = {o.tensor: o.dtype for o in frame.cascade.outputs}
        known: set[Expr] = set()
        for s in body:
            for r in loaded(frame.cascade, s):
                (reads_in if loop is None or moves(frame.cascade, r, loop) else reads_out)[r] = None
            product = self._product(s) if isinstance(s, Einsum) else None
            if product is not None:
                products.append(product[0])
            self._count(s, phases[-1], product, known)
            # Numbers of rows are those of a loop over tiles; outside they are few.
            rows = self._rows(s) if loop is not None else 0
            if rows and isinstance(s, Einsum) and s.ranks:
                last = {**dict.fromkeys(LANES, 0), SHUFFLE: EXCHANGES * rows}
                last[ALU if s.reduce in ("max", "min", "any") else FP32] = EXCHANGES * rows
                if self._is_awaited(s, body):
                    phases += [last, dict.fromkeys(LANES, 0)]
                else:
                    phases[-1] = {p: n + last[p] for p, n in phases[-1].items()}
            if isinstance(s, Einsum) and s.tensor in outputs:
                stored += self._size(s.free) * element_bytes(outputs[s.tensor] or self.dtype)
            if isinstance(s, Einsum) and loop is not None and s.ranks and not masked:
                masked = self._masked(s, loop)
        copied = 0
        if loop is not None:
            tiles = [r for r in reads_in if len([v for v in variables(*r.indices) if v in frame.axes]) > 1]
            copied = sum(map(self._bytes, tiles))
            for r in reads_out:
                if len([v for v in variables(*r.indices) if v in frame.axes]) > 1:
                    self.resident += self._bytes(r)
        live, rows = self._live(body)
        return Demand(
            products=tuple(products),
            phases=tuple(phases),
            loaded=sum(map(self._bytes, reads_in)),
            stored=stored,
            copied=copied,
            masked=masked,
            live_elements=live,
            row_values=rows,
            points=self._points(body, loop),
        )

    def _points(self, body: tuple[Einsum | Init, ...], loop: Loop | None) -> int:
        """Elements of the largest tile that a step computes along its loop; without one, those it walks."""
        if loop is None:
            return 1
        walked = self.frame.inner
        own = [s.free for s in body if isinstance(s, Einsum) and walked in s.free]
        return max((self._size(axes) for axes in own), default=self._size((walked,)))

    def _count(
        self, s: Einsum | Init, lanes: dict[str, int], product: tuple[Product, int] | None, known: set[Expr]
    ) -> None:
        """Add the operations of a statement to those of a phase, functions that are known already left out."""
        found, sizes = operations_of(s, known), self.frame.sizes
        count = {c: found.of(c).at(sizes) for c in ("multiply_add", "max", "other", CONTRACTION)}
        if product is not None:
            count["multiply_add"] -= count[CONTRACTION]
            # Two numbers are rounded by one instruction.
            count["other"] += product[1] // 2
        each = ROW_THREADS if self._rows(s) and not (isinstance(s, Einsum) and s.ranks) else 1
        lanes[FP32] += each * count["multiply_add"]
        lanes[ALU] += each * (count["max"] + count["other"])
        lanes[SPECIAL] += each * found.of(SPECIAL).at(sizes)

    def _rows(self, s: Einsum | Init) -> int:
        """Threads that hold a number of a row, where a statement computes one for each row of a tile."""
        axes = [v for v in s.free if v in self.frame.axes]
        return ROW_THREADS * self._size(axes) if len(axes) == 1 else 0

    def _product(self, s: Einsum) -> tuple[Product, int] | None:
        """A product of tiles, and the elements of its computed operands."""
        frame = self.frame
        found = contraction(s, frame.axes, frame.axes)
        if found is None or frame.sizes[rank_of(found.over)] < MINIMUM_DOT:
            return None
        i, j = found.axes
        sides = [self._is_computed(found.left), self._is_computed(found.right)]
        sizes = [self._size((i, found.over)), self._size((found.over, j))]
        product = Product(
            rows=self._size((i,)),
            columns=self._size((j,)),
            depth=self._size((found.over,)),
            left_is_computed=sides[0],
            right_is_computed=sides[1],
        )
        return product, sum(n for n, yes in zip(sizes, sides, strict=True) if yes)

    def _is_awaited(self, s: Einsum, body: tuple[Einsum | Init, ...]) -> bool:
        """Whether a reduction over a tile must be done before another tile is computed from it."""
        if not any(v in self.frame.axes for v in s.ranks):
            return False
        known = {s.tensor}
        for x in body[body.index(s) + 1 :]:
            if isinstance(x, Einsum) and known & {r.tensor for r in reads(x.expr)}:
                known.add(x.tensor)
                if len([v for v in x.space if v in self.frame.axes]) > 1:
                    return True
        return False

    def _is_computed(self, operand: Expr) -> bool:
        return not (isinstance(operand, Read) and self.frame.cascade.input(operand.tensor) is not None)

    def _masked(self, s: Einsum, loop: Loop) -> int:
        """Operations of a tile whose points are tested: a selection for each comparison, as compilers chain them.

        Those along one axis are made once a row; of them the end of the data alone is counted, by its selection.
        """
        frame = self.frame
        axes = [v for v in (*s.free, *s.ranks) if v in frame.axes]
        walked = {loop.walked[-1]}
        tile = self._size(v for v in axes if v in frame.grid or v in s.ranks)
        atoms = [e for c in loop.conditions for e in subexpressions(c) if isinstance(e, Apply) and e.row.condition]
        tests = [
            e
            for e in atoms
            if e.op not in ("and", "or", "not") and len((set(frame.grid) | walked) & set(variables(e))) > 1
        ]
        return tile * (1 + 2 * len(tests))

    def _live(self, body: tuple[Einsum | Init, ...]) -> tuple[float, int]:
        """Elements of tiles alive at once, and tensors of one axis: a product also holds its operand rounded."""
        computed: dict[str, int] = {}
        rows = 0
        states = {s.tensor for s in statements(self.frame, None) if isinstance(s, Init)}
        for s in body:
            if isinstance(s, Init):
                continue
            axes = [v for v in s.free if v in self.frame.axes]
            if len(axes) > 1 and s.tensor not in states:
                computed[s.tensor] = self._size(axes)
            rows += len(axes) == 1
        last = {r.tensor: n for n, s in enumerate(body) for r in reads(s.expr)}
        first = {s.tensor: n for n, s in enumerate(body)}
        # A local product that only joins a state is added to it by the matrix unit.
        joined = {s.tensor for s in body if isinstance(s, Einsum) and s.tensor in computed and self._joins(s, body)}
        kept = {t: size for t, size in computed.items() if t not in joined}
        most = 0.0
        for n, s in enumerate(body):
            before = sum(size for t, size in kept.items() if first[t] < n <= last.get(t, -1))
            after = sum(size for t, size in kept.items() if first[t] <= n < last.get(t, n + 1))
            product = self._product(s) if isinstance(s, Einsum) else None
            # What is read for the last time is written over, but a product reads its operands rounded.
            most = max(most, before + (product[1] / 2 if product else 0), after)
        return most, rows

    def _joins(self, s: Einsum, body: tuple[Einsum | Init, ...]) -> bool:
        readers = [x for x in body if any(r.tensor == s.tensor for r in reads(x.expr))]
        return self._product(s) is not None and all(
            isinstance(x.expr, Apply) and x.expr.op == "add" and isinstance(x.expr.args[-1], Read) for x in readers
        )
