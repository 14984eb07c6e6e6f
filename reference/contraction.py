"""Sums of products as matrix products: what makes the reference fast enough to be used."""

from __future__ import annotations

import math
import string
from typing import Any

import numpy as np
from numpy.typing import NDArray

from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Expr, Num, Scalar

Array = NDArray[Any]


def factors(expr: Expr, binding: Binding) -> tuple[list[Expr], list[Expr]]:
    """Split a product into its factors and the constants that divide it."""
    match expr:
        case Apply(op="mul", args=(x, y)):
            (a, b), (c, d) = factors(x, binding), factors(y, binding)
            return a + c, b + d
        case Apply(op="div", args=(x, Num() | Scalar() as y)) if binding.value(y) != 0:
            a, b = factors(x, binding)
            return a, [*b, y]
        case _:
            return [expr], []


def product_sum(operands: list[tuple[tuple[str, ...], Array]], free: tuple[str, ...]) -> Array:
    """Multiply operands and sum what is not in `free`; two operands go through a batched matrix product."""
    letters = dict(zip(dict.fromkeys(v for names, _ in operands for v in names), string.ascii_letters, strict=False))
    if len(operands) != 2:
        spec = ",".join("".join(letters[v] for v in names) for names, _ in operands)
        out: Array = np.einsum(f"{spec}->{''.join(letters[v] for v in free)}", *(v for _, v in operands), optimize=True)
        return out
    (a, x), (b, y) = operands
    # A variable of one operand alone that is not kept is summed before the product.
    x = x.sum(axis=tuple(n for n, v in enumerate(a) if v not in b and v not in free))
    y = y.sum(axis=tuple(n for n, v in enumerate(b) if v not in a and v not in free))
    a, b = (tuple(v for v in names if v in other or v in free) for names, other in ((a, b), (b, a)))
    batch = [v for v in free if v in a and v in b]
    inner = [v for v in a if v in b and v not in free]
    rows, columns = [v for v in a if v not in b], [v for v in b if v not in a]
    extent = {**dict(zip(a, x.shape, strict=True)), **dict(zip(b, y.shape, strict=True))}

    def size(names: list[str]) -> int:
        return math.prod(extent[v] for v in names)

    x = x.transpose([a.index(v) for v in batch + rows + inner]).reshape(size(batch), size(rows), size(inner))
    y = y.transpose([b.index(v) for v in batch + inner + columns]).reshape(size(batch), size(inner), size(columns))
    order = batch + rows + columns
    total: Array = np.matmul(x, y).reshape([extent[v] for v in order])
    return total.transpose([order.index(v) for v in free])
