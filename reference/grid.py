"""Expressions over a box of an iteration space, and where all that they read is in range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var

Array = NDArray[Any]


class Known(Protocol):
    """What expressions are of: extents and constants, tensors written so far, the iterative ranks in progress."""

    binding: Binding
    tensors: dict[str, Array]
    now: dict[str, int]


@dataclass(frozen=True, slots=True)
class Grid:
    """A box of an iteration space: one axis a variable, in the order of `ranges`."""

    known: Known
    ranges: Mapping[str, range]

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent of each axis."""
        return tuple(len(r) for r in self.ranges.values())

    def spread(self, array: Array, names: tuple[str, ...]) -> Array:
        """Lay an array whose axes are `names` along the axes of the grid."""
        order = [v for v in self.ranges if v in names]
        array = array.transpose([names.index(v) for v in order])
        return array.reshape([len(self.ranges[v]) if v in names else 1 for v in self.ranges])

    def value(self, expr: Expr) -> tuple[Any, Any]:
        """Value of an expression over the grid, and where all that it reads is in range."""
        match expr:
            case Num():
                return expr.value, True
            case Scalar():
                return self.known.binding.value(expr), True
            case Var() if expr.name in self.known.now:
                return self.known.now[expr.name], True
            case Var():
                r = self.ranges[expr.name]
                return self.spread(np.arange(r.start, r.stop), (expr.name,)), True
            case Read():
                return self.read(expr)
            case Apply(op="select"):
                (c, c_in), (x, x_in), (y, y_in) = (self.value(a) for a in expr.args)
                c = truth_of(c)
                inside = x_in if x_in is y_in else np.where(c, x_in, y_in)
                return expr.row.array(np, c, x, y), c_in & inside
            case Apply():
                found = [self.value(a) for a in expr.args]
                inside = True
                for _, ok in found:
                    inside = inside & ok
                args = [v for v, _ in found]
                # NumPy has no integer 2 ** -1, and Python raises where IEEE has an infinity.
                if expr.op in ("pow", "div"):
                    args = [np.asarray(a, dtype=np.float64) for a in args]
                return expr.row.array(np, *args), inside

    def read(self, expr: Read) -> tuple[Any, Any]:
        """The elements of a tensor that a read has over the grid, and where they are in range."""
        array = self.known.tensors[expr.tensor]
        index: list[Any] = []
        names: list[str] = []
        for i, extent in zip(expr.indices, array.shape, strict=True):
            r = self.ranges.get(i.name, range(0)) if isinstance(i, Var) and i.name not in self.known.now else None
            if isinstance(i, Var) and r is not None and r.stop <= extent and i.name not in names:
                index.append(slice(r.start, r.stop))
                names.append(i.name)
                continue
            where, inside = whole_of(self.value(i), extent)
            if not isinstance(where, int):
                return self.gather(expr, array)
            if not inside:
                return np.nan, False
            index.append(where)
        return self.spread(array[tuple(index)], tuple(names)), True

    def gather(self, expr: Read, array: Array) -> tuple[Any, Any]:
        """The same, element by element."""
        inside: Any = True
        index: list[Any] = []
        for i, extent in zip(expr.indices, array.shape, strict=True):
            where, ok = whole_of(self.value(i), extent)
            index.append(where)
            inside = inside & ok
        if array.size == 0:
            return np.nan, False
        return array[tuple(index)], inside


def truth_of(value: Any) -> Any:
    """A value of a condition as truth values."""
    return value if isinstance(value, bool) else np.asarray(value).astype(bool)


def whole_of(found: tuple[Any, Any], extent: int) -> tuple[Any, Any]:
    """Turn a value into indices below `extent`: clipped ones, and where they were in range."""
    value, inside = found
    if np.ndim(value) == 0:
        fine = bool(inside) and bool(np.isfinite(value)) and value == int(value) and 0 <= value < extent
        return (int(value), True) if fine else (0, False)
    if value.dtype.kind not in "iu":
        whole = np.isfinite(value) & (value == np.floor(value))
        value = np.where(whole, value, -1).astype(np.int64)
    ok = (value >= 0) & (value < extent)
    return np.clip(value, 0, max(extent - 1, 0)), ok & inside
