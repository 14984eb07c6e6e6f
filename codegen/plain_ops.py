"""Named values and the operators of the plain formula: PyTorch's own, with the value rules of the language."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Cascade, Einsum, Expr, Iter, Num, Read, Scalar, reads, variables, walk
from einsumcascade.language.ops import Reduction

HALF = (torch.float16, torch.bfloat16)


class Value(NamedTuple):
    """Numbers over some rank variables: a tensor with an axis for each, or one number over none."""

    data: Any
    axes: tuple[str, ...] = ()

    def over(self, axes: tuple[str, ...]) -> Any:
        """The data laid along `axes`, extent 1 where a variable is not one of its own."""
        if not isinstance(self.data, Tensor) or not axes:
            return self.data
        mine = [v for v in axes if v in self.axes]
        data = self.data.permute([self.axes.index(v) for v in mine])
        for n, v in enumerate(axes):
            if v not in self.axes:
                data = data.unsqueeze(n)
        return data


def factors_of(expr: Expr, binding: Binding) -> tuple[list[Expr], float]:
    """The factors of a product that vary, and the constant that scales it."""
    if not variables(expr) and not reads(expr):
        return [], float(binding.value(expr))
    match expr:
        case Apply(op="mul", args=(x, y)):
            (a, r), (b, s) = factors_of(x, binding), factors_of(y, binding)
            return a + b, r * s
        case Apply(op="div", args=(x, Num() | Scalar() as y)) if binding.value(y) != 0:
            a, r = factors_of(x, binding)
            return a, r / float(binding.value(y))
    return [expr], 1.0


def reduce_over(
    row: Reduction,
    value: Value,
    live: Value | None,
    ranks: tuple[str, ...],
    *,
    order: tuple[str, ...],
    extent: Callable[[str], int],
    dtype: torch.dtype,
) -> Value:
    """Reduce over `ranks` a value whose culled points hold what an empty fiber gives; sums are taken in `dtype`."""
    axes = tuple(v for v in order if v in value.axes or v in ranks)
    sizes = [extent(v) for v in axes]
    data = torch.as_tensor(value.over(axes)).expand(sizes)
    where = tuple(n for n, v in enumerate(axes) if v in ranks)
    rest = tuple(v for v in axes if v not in ranks)
    if 0 in [sizes[n] for n in where]:
        return Value(data.new_full([extent(v) for v in rest], row.empty, dtype=dtype), rest)
    match row.name:
        case "max" | "min":
            return Value((torch.amax if row.name == "max" else torch.amin)(data, dim=where), rest)
        case "any":
            return Value((data != 0).sum(dim=where).gt(0).to(dtype), rest)
        case "prod":
            for n in reversed(where):
                data = torch.prod(data, dim=n, dtype=dtype)
            return Value(data, rest)
    total = torch.sum(data, dim=where, dtype=dtype)
    if row.name == "sum":
        return Value(total, rest)
    if live is None:
        return Value(total / math.prod(extent(v) for v in ranks), rest)
    over = tuple(v for v in order if v in live.axes or v in ranks)
    count = (
        live.over(over).expand([extent(v) for v in over]).sum(dim=tuple(n for n, v in enumerate(over) if v in ranks))
    )
    # With no live point the total is 0 already.
    points = Value(count.clamp(min=1), tuple(v for v in over if v not in ranks))
    return Value(total / points.over(rest), rest)


def multiply(factors: list[Value], out: tuple[str, ...], scale: float) -> Tensor:
    """Contract factors to `out`; a scaled product of two goes through `baddbmm`, which scales before it rounds."""
    names = dict(zip(dict.fromkeys(v for f in factors for v in f.axes), string.ascii_letters, strict=False))
    spec = ",".join("".join(names[v] for v in f.axes) for f in factors) + "->" + "".join(names[v] for v in out)
    if scale == 1.0 or len(factors) != 2:
        total: Tensor = torch.einsum(spec, *(f.data for f in factors))
        return total if scale == 1.0 else total * scale
    a, b = factors
    if any(v not in b.axes and v not in out for v in a.axes) or any(v not in a.axes and v not in out for v in b.axes):
        half = a.data.dtype in HALF
        wide: Tensor = torch.einsum(spec, *(f.data.float() if half else f.data for f in factors))
        return wide * scale
    batch = tuple(v for v in out if v in a.axes and v in b.axes)
    inner = tuple(v for v in a.axes if v in b.axes and v not in out)
    rows, columns = tuple(v for v in out if v not in b.axes), tuple(v for v in out if v not in a.axes)
    extent = {v: n for f in factors for v, n in zip(f.axes, f.data.shape, strict=True)}
    size = [math.prod(extent[v] for v in group) for group in (batch, rows, inner, columns)]
    x = a.over(batch + rows + inner).reshape(size[0], size[1], size[2])
    y = b.over(batch + inner + columns).reshape(size[0], size[2], size[3])
    total = torch.baddbmm(x.new_zeros(1, 1, 1), x, y, beta=0, alpha=scale)
    order = batch + rows + columns
    laid: Tensor = Value(total.reshape([extent[v] for v in order]), order).over(out)
    return laid


def _subtract(x: Tensor, y: Tensor) -> Tensor:
    r = x - y
    if r.is_floating_point() and bool((min(x, y, key=Tensor.numel) == -math.inf).any()):
        return torch.where((x == -math.inf) & (y == -math.inf), -math.inf, r)
    return r


def _divide(x: Tensor, y: Tensor) -> Tensor:
    if bool((min(x, y, key=Tensor.numel) == 0).any()):
        both = (x == 0) & (y == 0)
        return torch.where(both, 0.0, x / torch.where(both, 1.0, y))
    return x / y


# Value rules at the price of a look at the smaller operand, and functions that PyTorch has in one kernel.
_OWN: dict[str, Callable[..., Any]] = {
    "sub": _subtract,
    "div": _divide,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "elu": torch.nn.functional.elu,
}


def operation(expr: Apply) -> Callable[..., Any]:
    """The operator of an application as a function of tensors."""
    return _OWN.get(expr.op) or (lambda *args: expr.row.array(torch, *args))


def propagate(op: str, args: list[float]) -> float | None:
    """The one value of an operation on operands that are known, or known to be finite (NaN); None if it is not one."""
    match op, args:
        case (("add" | "sub"), [x, y]) if x == -math.inf and not math.isinf(y):
            return x
        case (("mul" | "div"), [x, y]) if (x == 0 and not math.isinf(y)) or (x == -math.inf and 0 < y < math.inf):
            return x
        case "mul", [x, y] if (y == 0 and not math.isinf(x)) or (y == -math.inf and 0 < x < math.inf):
            return y
        case "exp", [x] if x == -math.inf:
            return 0.0
    return None


def conditions_of(cascade: Cascade, e: Einsum) -> tuple[Expr, ...]:
    """All conditions that restrict an Einsum."""
    return tuple(c for c in cascade.constraints if all(v in e.space for v in variables(c))) + e.where


def unseen_when_culled(cascade: Cascade, s: Einsum) -> bool:
    """Whether no reader looks at the culled points of what `s` writes: each has the conditions of `s` itself."""
    mine = conditions_of(cascade, s)
    if s.tensor in cascade.output_names:
        return False
    for other in walk(cascade.body):
        if isinstance(other, Iter):
            continue
        held = conditions_of(cascade, other) if isinstance(other, Einsum) else ()
        for r in reads(other.expr, *held):
            if r.tensor == s.tensor and not (r.indices == s.indices and set(mine) <= set(held)):
                return False
    return True


def wanted_when_culled(cascade: Cascade, tensor: str, binding: Binding) -> float | None:
    """What a reduction would like to find at the culled points of a tensor, None where none reads it."""
    for e in cascade.einsums:
        if e.reduction is None:
            continue
        if isinstance(e.expr, Read) and e.expr.tensor == tensor:
            return e.reduction.empty
        if any(isinstance(f, Read) and f.tensor == tensor for f in factors_of(e.expr, binding)[0]):
            return 0.0
    return None
