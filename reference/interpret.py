"""Run any cascade in NumPy float64, one Einsum after the other: the meaning of the language, made executable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from einsumcascade.errors import CascadeError, InputError
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.fiberwise import check_extents, slot_of, solve_form
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Statement,
    Var,
    reads,
    variables,
    walk,
)
from einsumcascade.language.ops import Reduction
from einsumcascade.language.shapes import tensor_shapes
from einsumcascade.reference.contraction import factors, product_sum
from einsumcascade.reference.grid import Array, Grid, truth_of, whole_of

# Points of an iteration space that are held at once.
POINTS = 1 << 24


def run(
    cascade: Cascade,
    inputs: Mapping[str, ArrayLike],
    *,
    constants: Mapping[str, float] | None = None,
    extents: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Evaluate a cascade in float64.

    Every Einsum is evaluated over its whole iteration space. A point is *live* if the conditions of its `where` and
    all constraints whose rank variables it iterates hold there, and no index is out of range. A culled point gives a
    reduction its identity; a mapped point that is culled holds NaN. `select` reads only the branch it takes.

    Args:
        cascade: a checked cascade.
        inputs: by name, in the shape of the declaration; NumPy arrays, PyTorch tensors or nested lists. Integers stay
            integers, everything else becomes float64.
        constants: values in place of the text's.
        extents: extents in place of the text's, by upper-case rank.

    Returns: the outputs, float64, in the order of `out`.
    Raises:
        InputError: an input is missing, unknown, of the wrong shape or not numeric; see `bind`.
        CascadeError: a constraint reads a tensor at an Einsum that comes before that tensor is written.
    Cost: the points of all iteration spaces; memory: all tensors, and 2**24 points at a time. Sums of products go
        through `np.einsum` where all operands are finite.

    >>> from einsumcascade.language.parser import parse
    >>> c = parse("in X[p, m]\\nconstraint m < p\\nS[p] = X[p, m] :: max(m)\\nout S")
    >>> run(c, {"X": [[1.0, 2.0], [3.0, 4.0]]})["S"].tolist()
    [-inf, 3.0]
    """
    tensors = run_all(cascade, inputs, constants=constants, extents=extents)
    return {name: tensors[name] for name in cascade.output_names}


def run_all(
    cascade: Cascade,
    inputs: Mapping[str, ArrayLike],
    *,
    constants: Mapping[str, float] | None = None,
    extents: Mapping[str, int] | None = None,
    contract: bool = True,
) -> dict[str, Array]:
    """Evaluate a cascade as `run` does and return every tensor, inputs first.

    Args:
        contract: whether sums of products of finite operands may go through `np.einsum`; the value is the same but
            for rounding.

    Raises: as `run`.
    """
    arrays = {name: as_array(name, value) for name, value in inputs.items()}
    binding = bind(cascade, shapes={k: v.shape for k, v in arrays.items()}, extents=extents, constants=constants)
    check_extents(cascade, binding)
    machine = _Machine(cascade=cascade, binding=binding, shapes=tensor_shapes(cascade, binding), contract=contract)
    machine.tensors.update({i.tensor: arrays[i.tensor] for i in cascade.inputs})
    with np.errstate(all="ignore"):
        machine.run(cascade.body)
    return {
        k: v if v.dtype == np.float64 else v.astype(np.float64) if k in cascade.output_names else v
        for k, v in machine.tensors.items()
    }


def as_array(name: str, value: Any) -> Array:
    """Take over an input: integers as int64, all else as float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind in "fb":
        return array.astype(np.float64)
    raise InputError.of(
        "input-dtype",
        f"{name} has dtype {array.dtype}",
        rule="an input holds floating-point numbers, integers or truth values",
    )


@dataclass(slots=True)
class _Machine:
    """The tensors written so far and the values of the iterative ranks in progress."""

    cascade: Cascade
    binding: Binding
    shapes: Mapping[str, tuple[int, ...]]
    contract: bool
    tensors: dict[str, Array] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)

    def run(self, body: tuple[Statement, ...]) -> None:
        for s in body:
            match s:
                case Iter():
                    steps = range(self.binding.extent(s.var))
                    for step in reversed(steps) if s.descending else steps:
                        self.now[s.var] = step
                        self.run(s.body)
                    self.now.pop(s.var, None)
                    # With no step at all, what the block writes can still be read.
                    for inner in walk(s.body):
                        if not isinstance(inner, Iter):
                            self.storage(inner.tensor)
                case Init():
                    self.einsum(Einsum(tensor=s.tensor, indices=s.indices, expr=s.expr), ())
                case Einsum():
                    self.einsum(s, self.conditions(s))

    def conditions(self, e: Einsum) -> tuple[Expr, ...]:
        """Every condition that restricts an Einsum."""
        space = {*e.space}
        general = [c for c in self.cascade.constraints if space.issuperset(variables(c))]
        for c in general:
            for r in reads(c):
                if r.tensor not in self.tensors:
                    raise CascadeError.of(
                        "read-before-write",
                        f"{r.tensor} is read by a constraint before it is written",
                        span=c.span,
                        label=f"restricts {e.tensor}, which comes before {r.tensor}",
                        rule="a constraint restricts every Einsum that iterates all its ranks",
                        source=self.cascade.source,
                    )
        return (*general, *e.where)

    def storage(self, tensor: str) -> Array:
        if tensor not in self.tensors:
            self.tensors[tensor] = np.full(self.shapes[tensor], np.nan)
        return self.tensors[tensor]

    def einsum(self, e: Einsum, conditions: tuple[Expr, ...]) -> None:
        free = tuple(v for v in e.free if v not in self.now)
        ranks = tuple(v for v in e.ranks if v not in self.now)
        if e.is_fiberwise and e.reduce != "topk":
            self.solve(e, conditions, free)
            return
        if self.contract and e.reduce == "sum" and ranks:
            whole = Grid(self, {v: range(self.binding.extent(v)) for v in free + ranks})
            result = _contraction(whole, e.expr, conditions, free, ranks)
            if result is not None:
                self.store(e, Grid(self, {v: whole.ranges[v] for v in free}), result, True)
                return
        for ranges in self.blocks(free, ranks):
            grid = Grid(self, ranges)
            live: Any = True
            for c in conditions:
                truth, inside = grid.value(c)
                live = live & truth_of(truth) & inside
            value, inside = grid.value(e.expr)
            live = live & inside
            value = np.asarray(value, dtype=np.float64)
            outer = Grid(self, {v: ranges[v] for v in free})
            if e.reduce == "topk":
                self.store(e, outer, _largest(value, live, grid, free.index(slot_of(e))), True)
            elif e.reduction is None:
                self.store(e, outer, value, live)
            else:
                axes = tuple(range(len(free), len(free) + len(ranks)))
                self.store(e, outer, _reduce(e.reduction, value, live, grid.shape, axes), True)

    def solve(self, e: Einsum, conditions: tuple[Expr, ...], free: tuple[str, ...]) -> None:
        """Solve a linear system for each point of the ranks that its matrix has besides row and column."""
        form = solve_form(e)
        assert form is not None and isinstance(e.expr, Apply)
        matrix, right = e.expr.args
        # What the matrix does not vary along is one more column of the right side.
        varies = {*variables(matrix), *variables(*conditions)}
        batch = tuple(v for v in free if v in varies and v not in (form.row, form.column))
        columns = tuple(v for v in free if v not in (*batch, form.result))
        system = Grid(self, {v: range(self.binding.extent(v)) for v in (*batch, form.row, form.column)})
        live: Any = True
        for c in conditions:
            truth, inside = system.value(c)
            live = live & truth_of(truth) & inside
        a, inside = system.value(matrix)
        a = np.broadcast_to(np.where(live & inside, a, 0.0), system.shape)
        sides = Grid(self, {v: range(self.binding.extent(v)) for v in (*batch, form.right, *columns)})
        b, inside = sides.value(right)
        b = np.broadcast_to(np.where(inside, b, np.nan), sides.shape)
        flat = b.reshape(*b.shape[: len(batch) + 1], math.prod(b.shape[len(batch) + 1 :]))
        try:
            x = e.expr.row.array(np, a, flat).reshape(b.shape)
        except np.linalg.LinAlgError:
            raise CascadeError.of(
                "singular-solve",
                f"{e.tensor} solves with a singular matrix",
                span=e.span,
                rule="solve(A, B) needs a matrix A with an inverse at every point of its other ranks",
                hint="add a ridge to its diagonal: select(i == j, ridge, 0)",
                source=self.cascade.source,
            ) from None
        order = [(*batch, form.result, *columns).index(v) for v in free]
        self.store(e, Grid(self, {v: range(self.binding.extent(v)) for v in free}), x.transpose(order), True)

    def blocks(self, free: tuple[str, ...], ranks: tuple[str, ...]) -> Iterator[dict[str, range]]:
        """Cut an iteration space along the variables of the left, the first ones first, until a block fits."""
        extents = {v: self.binding.extent(v) for v in free + ranks}
        points = math.prod(extents.values())
        steps = dict(extents)
        for v in free:
            if points <= POINTS:
                break
            row = points // extents[v]
            steps[v] = max(1, POINTS // row)
            points = row * steps[v]
        cuts = [
            [range(lo, min(lo + steps[v], n)) for lo in range(0, n, steps[v])] if steps[v] else [range(0)]
            for v, n in extents.items()
        ]
        for block in product(*cuts):
            yield dict(zip(extents, block, strict=True))

    def store(self, e: Einsum, grid: Grid, value: Array, live: Any) -> None:
        """Populate the left side over the free variables; mapped points that are culled become NaN."""
        target = self.storage(e.tensor)
        culled = np.where(live, value, np.nan) if live is not True else value
        index: list[Any] = []
        for i, extent in zip(e.indices, target.shape, strict=True):
            if isinstance(i, Var) and i.name in grid.ranges:
                r = grid.ranges[i.name]
                index.append(slice(r.start, r.stop))
                continue
            where, inside = whole_of(grid.value(i), extent)
            if not isinstance(where, int):
                self.scatter(e, grid, culled, live)
                return
            if inside is False:
                return
            index.append(where)
        names = [i.name for i in e.indices if isinstance(i, Var) and i.name in grid.ranges]
        if len(set(names)) < len(names) or len(names) < len(grid.ranges):
            self.scatter(e, grid, culled, live)
            return
        target[tuple(index)] = np.broadcast_to(culled, grid.shape)

    def scatter(self, e: Einsum, grid: Grid, value: Array, live: Any) -> None:
        """Populate through computed indices; where two points meet, a live one wins, then the later."""
        target = self.storage(e.tensor)
        inside: Any = True
        index: list[Array] = []
        for i, extent in zip(e.indices, target.shape, strict=True):
            where, ok = whole_of(grid.value(i), extent)
            index.append(np.broadcast_to(where, grid.shape))
            inside = inside & ok
        value = np.broadcast_to(value, grid.shape)
        if target.size == 0:
            return
        for keep in (inside, inside & live):
            at = np.broadcast_to(keep, grid.shape)
            target[tuple(x[at] for x in index)] = value[at]


def _reduce(row: Reduction, value: Array, live: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Reduce over `axes` with culled points replaced by what an empty fiber gives."""
    full = np.broadcast_to(value if live is True else np.where(live, value, row.empty), shape)
    total: Array = getattr(np, row.numpy_ufunc).reduce(full, axis=axes, initial=row.empty).astype(np.float64)
    if row.name == "mean":
        count = np.broadcast_to(live, shape).sum(axis=axes)
        total = np.where(count == 0, row.empty, total / np.maximum(count, 1))
    return total


def _largest(value: Array, live: Any, grid: Grid, slot: int) -> Array:
    """Positions of the largest values along the last axis, one for each coordinate of the axis `slot`.

    Ties go to the lower position; culled points come last, the lower first.
    """
    size = grid.shape[-1]
    shape = np.broadcast_shapes(np.shape(value), np.shape(live), (*(1,) * (len(grid.shape) - 1), size))
    value, culled = np.broadcast_to(value, shape), ~np.broadcast_to(live, shape)
    # A NaN sorts behind every number.
    order = np.lexsort((np.where(culled, 0.0, -value), culled), axis=-1)
    taken = list(grid.ranges.values())[slot]
    which = np.arange(taken.start, taken.stop).reshape([-1 if k == slot else 1 for k in range(len(shape))])
    lead = np.broadcast_shapes(order.shape[:-1], which.shape[:-1])
    found = np.take_along_axis(np.broadcast_to(order, (*lead, size)), np.broadcast_to(which, (*lead, 1)), axis=-1)
    return np.broadcast_to(found[..., 0], grid.shape[:-1]).astype(np.float64)


def _contraction(
    grid: Grid, expr: Expr, conditions: tuple[Expr, ...], free: tuple[str, ...], ranks: tuple[str, ...]
) -> Array | None:
    """Sum a product of factors by `np.einsum`; None where that could differ from the plain evaluation.

    Culled points are zeroed in a factor that has all variables of the condition, in the result, or by a factor of
    zeros and ones. Every operand must then be finite, for 0 * inf is NaN.
    """
    known = grid.known
    parts, divisors = factors(expr, known.binding)
    scale = 1.0
    operands: list[tuple[tuple[str, ...], Array]] = []
    for part in parts:
        names = tuple(v for v in grid.ranges if v in variables(part))
        if math.prod(len(grid.ranges[v]) for v in names) > POINTS:
            return None
        value, inside = Grid(known, {v: grid.ranges[v] for v in names}).value(part)
        value = np.asarray(value, dtype=np.float64)
        if not names:
            if inside is not True:
                return None
            scale *= float(value)
            continue
        shape = tuple(len(grid.ranges[v]) for v in names)
        operands.append((names, np.broadcast_to(value if inside is True else np.where(inside, value, 0.0), shape)))
    covered = {v for names, _ in operands for v in names}
    if len(operands) < 2 or not covered.issuperset(ranks) or not covered.issuperset(free):
        return None
    after: Any = True
    for c in conditions:
        names = tuple(v for v in grid.ranges if v in variables(c))
        truth, inside = Grid(known, {v: grid.ranges[v] for v in names}).value(c)
        mask = np.broadcast_to(truth_of(truth) & inside, tuple(len(grid.ranges[v]) for v in names))
        home = next((n for n, (have, _) in enumerate(operands) if set(have) >= set(names)), None)
        if set(names) <= set(free):
            after = after & Grid(known, {v: grid.ranges[v] for v in free}).spread(mask, names)
        if home is not None:
            have, value = operands[home]
            local = Grid(known, {v: grid.ranges[v] for v in have})
            operands[home] = (have, np.where(local.spread(mask, names), value, 0.0))
        elif not set(names) <= set(free):
            operands.append((names, mask.astype(np.float64)))
    if not math.isfinite(scale) or not all(np.isfinite(v).all() for _, v in operands):
        return None
    total = product_sum(operands, free) * scale
    for d in divisors:
        total = total / known.binding.value(d)
    return total if after is True else np.where(after, total, 0.0)
