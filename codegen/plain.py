"""The plain formula: a cascade as written, Einsum by Einsum in eager PyTorch.

It is the yardstick of errors and of speed, so it shares nothing with the kernels and nothing with the reference: what
an Einsum writes is rounded to the dtype of the inputs, what it computes on the way is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from einsumcascade.codegen.dtypes import value_dtype
from einsumcascade.codegen.plain_ops import (
    HALF,
    Value,
    conditions_of,
    factors_of,
    multiply,
    propagate,
    reduce_over,
    unseen_when_culled,
    wanted_when_culled,
)
from einsumcascade.codegen.plain_values import Written
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Statement,
    reads,
    substitute,
    variables,
)
from einsumcascade.language.shapes import tensor_shapes
from einsumcascade.schedules.program import not_lowered


def run_plain(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    *,
    constants: Mapping[str, float] | None = None,
    extents: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Evaluate a cascade Einsum by Einsum with PyTorch's own operators.

    Each Einsum is computed in float32 (float64 for float64 inputs) and its result is rounded to the dtype of the first
    floating-point input, float32 without one, or to the dtype that `out` names. Contractions go through `torch.einsum`
    or `baddbmm`; in half precision on a GPU they are those of the tensor cores, which accumulate in float32. The value
    rules and the culling are those of the language; a mapped point that is culled is NaN in an output.

    Args:
        cascade: a checked cascade.
        inputs: tensors by name, on one device.
        constants: values in place of the text's.
        extents: extents in place of the text's, by upper-case rank.

    Returns: the outputs in the order of `out`.
    Raises: InputError: as `bind`.
    Cost: the points of all iteration spaces; every tensor is held. Waits for the device where a value rule could bite.

    >>> from einsumcascade.language.parser import parse
    >>> c = parse("in X[p, m]\\nconstraint m < p\\nS[p] = X[p, m] :: max(m)\\nout S")
    >>> run_plain(c, {"X": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})["S"].tolist()
    [-inf, 3.0]
    """
    binding = bind(cascade, shapes={k: tuple(v.shape) for k, v in inputs.items()}, extents=extents, constants=constants)
    given = [inputs[i.tensor] for i in cascade.inputs]
    machine = _Machine(
        cascade=cascade,
        binding=binding,
        shapes=tensor_shapes(cascade, binding),
        dtype=value_dtype(given),
        device=given[0].device,
    )
    for i in cascade.inputs:
        t = inputs[i.tensor]
        machine.pieces[i.tensor] = {(): t if t.is_floating_point() else t.to(torch.int64)}
    machine.run(cascade.body)
    return {o: machine.whole(o) for o in cascade.output_names}


@dataclass(slots=True)
class _Machine(Written):
    """The Einsums of a cascade, one after the other, and the point of the iteration."""

    # For a tensor whose culled points nobody looks at: the conditions, and what stands there.
    filled: dict[str, tuple[tuple[Expr, ...], float]] = field(default_factory=dict)

    def run(self, body: tuple[Statement, ...], now: Mapping[str, Expr] | None = None) -> None:
        now = now or {}
        for s in body:
            if isinstance(s, Iter):
                steps = range(self.binding.extent(s.var))
                for step in reversed(steps) if s.descending else steps:
                    self.run(s.body, {**now, s.var: Num(value=step)})
            else:
                self.einsum(s, now)

    def einsum(self, s: Einsum | Init, now: Mapping[str, Expr]) -> None:
        expr = substitute(s.expr, now)
        indices = tuple(substitute(i, now) for i in s.indices)
        free = variables(*indices)
        ranks = tuple(v for v in s.ranks if v not in now) if isinstance(s, Einsum) else ()
        conditions: tuple[Expr, ...] = ()
        if isinstance(s, Einsum):
            conditions = tuple(substitute(c, now) for c in conditions_of(self.cascade, s))
        self.order = free + ranks
        unseen = isinstance(s, Einsum) and bool(conditions) and unseen_when_culled(self.cascade, s)
        wanted = (
            wanted_when_culled(self.cascade, s.tensor, self.binding)
            if unseen and set(variables(*conditions)) <= set(free)
            else None
        )
        self.filled.pop(s.tensor, None)
        if isinstance(s, Einsum) and s.is_fiberwise:
            raise not_lowered(s, f"a {s.reduce}")
        row = s.reduction if isinstance(s, Einsum) and ranks else None
        result: Value | None = None
        if row is not None and row.name == "sum":
            result = self.contract(expr, conditions, free, ranks, unseen)
            if result is not None and wanted is not None:
                result = self.fill(s.tensor, result, conditions, wanted)
        if result is None:
            result, inside = self.evaluate(expr, top=row is None)
            if row is not None:
                known = isinstance(expr, Read) and self.filled.get(expr.tensor) == (conditions, row.empty)
                held = [] if known and row.name != "mean" else [self.condition(c) for c in conditions]
                live = self.all([*inside, *held])
                result = result if isinstance(result.data, Tensor) else self.single(result)
                result = result if live is None else self.where(live, result, row.empty)
                result = reduce_over(
                    row, result, live, ranks, order=self.order, extent=self.binding.extent, dtype=self.compute
                )
            elif not unseen or inside:
                live = self.all([*inside, *(self.condition(c) for c in conditions)])
                result = result if live is None else self.where(live, result, math.nan)
            elif wanted is not None and self.at_culled(expr, conditions) == wanted:
                self.filled[s.tensor] = (conditions, wanted)
            elif wanted is not None:
                result = self.fill(s.tensor, result, conditions, wanted)
        result = result if isinstance(result.data, Tensor) else self.single(result)
        declared = next((o.dtype for o in self.cascade.outputs if o.tensor == s.tensor and o.dtype), None)
        dtype = getattr(torch, declared) if declared else self.dtype
        shape = [self.binding.extent(v) for v in free]
        data = Value(result.data.to(dtype), result.axes).over(free).expand(shape)
        self.store(s.tensor, indices, free, data)

    def fill(self, tensor: str, value: Value, conditions: tuple[Expr, ...], wanted: float) -> Value:
        live = self.all([self.condition(c) for c in conditions])
        self.filled[tensor] = (conditions, wanted)
        return value if live is None else self.where(live, value, wanted)

    def at_culled(self, expr: Expr, conditions: tuple[Expr, ...]) -> float | None:
        """What a map gives at its culled points without a mask: a number, NaN for some finite one, None if unknown.

        So `exp(S - GM)` needs no mask of its own where S holds -inf there and GM is finite.
        """
        if not variables(expr) and not reads(expr):
            return float(self.binding.value(expr))
        match expr:
            case Read() if self.filled.get(expr.tensor, ((), 0.0))[0] == conditions:
                return self.filled[expr.tensor][1]
            case Read() if len(expr.indices) < len(self.order):
                value, inside = self.read(expr)
                return None if inside or not bool(torch.isfinite(value.data).all()) else math.nan
            case Apply():
                args = [self.at_culled(a, conditions) for a in expr.args]
                return None if None in args else propagate(expr.op, [a for a in args if a is not None])
        return None

    def contract(
        self, expr: Expr, conditions: tuple[Expr, ...], free: tuple[str, ...], ranks: tuple[str, ...], unseen: bool
    ) -> Value | None:
        """A sum of a product as a contraction, or None where it is none or zeros could meet what is not finite."""
        parts, scale = factors_of(expr, self.binding)
        found = [self.evaluate(p) for p in parts]
        factors = [v for v, _ in found]
        covered = {v for f in factors for v in f.axes}
        if len(factors) < 2 or not covered.issuperset(ranks) or not all(f.axes for f in factors):
            return None
        masked: set[int] = set()
        for n, (_, masks) in enumerate(found):
            for m in masks:
                factors[n] = self.where(m, factors[n], 0.0)
                masked.add(n)
        after: list[Value] = []
        for c in conditions:
            mask = self.condition(c)
            home = [n for n, f in enumerate(factors) if set(mask.axes) <= set(f.axes)]
            if set(mask.axes) <= set(free):
                after += [] if unseen else [mask]
                if not home:
                    continue
            if not home:
                factors.append(self.single(mask))
                masked.add(len(factors) - 1)
                continue
            n = home[0]
            masked.add(n)
            for k in home:
                part = parts[k] if k < len(parts) else None
                there = self.filled.get(part.tensor) if isinstance(part, Read) else None
                # One factor of zeros is enough, but no other may hold infinities there.
                if (k == n and (there is None or c not in there[0])) or (there is not None and there[1] != 0):
                    factors[k] = self.where(mask, factors[k], 0.0)
        for n, f in enumerate(factors):
            if masked - {n} and not bool(torch.isfinite(f.data).all()):
                return None
        # A condition such as `p - m == j` may be all that says where a point is added.
        kept = tuple(v for v in free if any(v in f.axes for f in factors))
        native = len(factors) == 2 and self.dtype in HALF and self.device.type == "cuda"
        if not (native and all(f.data.dtype == self.dtype for f in factors)):
            factors = [self.single(f) for f in factors]
        total = Value(multiply(factors, kept, scale), kept)
        live = self.all(after)
        return total if live is None else self.where(live, total, 0.0)
