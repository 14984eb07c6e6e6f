"""Captured tensors become inputs: which ranks their axes are, and what a call hands over for them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch

from einsumcascade.codegen.trace_places import refusal
from einsumcascade.codegen.tracing import Capture
from einsumcascade.language.ir import Apply, Expr, Input, Num, Read, Scalar, Var, apply, rank_of, subexpressions
from einsumcascade.language.ir import transform as transformed
from einsumcascade.language.ops import OPS

Range = tuple[float, float]
EVERYTHING: Range = (float("-inf"), float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the captures of a trace became.

    Args:
        inputs: declarations, one for each way that a tensor is indexed.
        tensors: what a call hands over, in that order.
        exprs: the traced expressions over those inputs.
    """

    inputs: tuple[Input, ...]
    tensors: tuple[torch.Tensor, ...]
    exprs: tuple[Expr, ...]


def resolve(
    exprs: Sequence[Expr],
    captures: Mapping[str, Capture],
    extents: Mapping[str, int],
    *,
    taken: Sequence[str],
    query: torch.Tensor,
) -> Inputs:
    """Declare an input for every way that a captured tensor is indexed.

    An axis that a rank variable indexes has that rank, whatever is longer is cut; every other axis has a rank of its
    own, and an index that may be negative counts from its end, as in PyTorch.

    Args:
        exprs: what was traced; reads have the names of `captures`.
        extents: by rank variable, of this call.
        taken: names that mean something already.
        query: its dtype and device are those of numbers.

    Raises: TraceError: `capture-length`: an index is sure to leave its axis.
    """
    values = {id(e) for x in exprs for e in _values(x)}
    ways: dict[tuple[object, ...], str] = {}
    inputs: list[Input] = []
    tensors: list[torch.Tensor] = []
    names, ranks = {*taken, *map(rank_of, extents)}, {*extents, *(t[0].lower() for t in taken if len(t) == 1)}
    several = {c: len({_way(e, extents) for x in exprs for e in _reads(x) if e.tensor == c}) > 1 for c in captures}

    def leaf(e: Expr) -> Expr | None:
        if not isinstance(e, Read) or e.tensor not in captures:
            return None
        capture, way = captures[e.tensor], _way(e, extents)
        as_value = id(e) in values and not capture.tensor.is_floating_point()
        key = (e.tensor, way, as_value)
        if key not in ways:
            ways[key] = name = _name(capture.name, way if several[e.tensor] else (), names)
            axes = []
            for v in way:
                axes.append(v or next(r for r in _fresh() if r not in ranks and rank_of(r) not in names))
                ranks.add(axes[-1])
                names.add(rank_of(axes[-1]))
            inputs.append(Input(tensor=name, indices=tuple(axes)))
            tensors.append(_handed(capture, way, extents, as_value=as_value, query=query))
        declared = next(i for i in inputs if i.tensor == ways[key])
        indices = []
        for n, (i, v) in enumerate(zip(e.indices, way, strict=True)):
            size = capture.tensor.shape[n]
            found = i if v else _wrapped(i, declared.indices[n], size, captures, extents, capture, n)
            indices.append(transformed(found, leaf))
        return Read(tensor=ways[key], indices=tuple(indices))

    resolved = tuple(transformed(x, leaf) for x in exprs)
    return Inputs(inputs=tuple(inputs), tensors=tuple(tensors), exprs=resolved)


def _reads(x: Expr) -> list[Read]:
    return [e for e in subexpressions(x) if isinstance(e, Read)]


def _way(e: Read, extents: Mapping[str, int]) -> tuple[str, ...]:
    """For each axis the rank variable that indexes it, "" where it is another expression, or the rank is there."""
    out: list[str] = []
    for i in e.indices:
        out.append(i.name if isinstance(i, Var) and i.name in extents and i.name not in out else "")
    return tuple(out)


def _values(x: Expr) -> list[Expr]:
    """Parts of an expression that are values: neither in an index nor in a condition."""
    match x:
        case Apply() if x.row.condition:
            return []
        case Apply():
            return [x, *(e for a in x.args for e in _values(a))]
        case _:
            return [x]


def _name(variable: str, way: Sequence[str], taken: set[str]) -> str:
    """An upper-case name after the variable that holds the tensor, with the ranks where there are several reads."""
    plain = re.sub(r"[^A-Z0-9_]", "", variable.upper().strip("_"))
    plain = plain if re.match(r"[A-Z]", plain) else "T"
    stem = "_".join([plain, *(v.upper() for v in way if v)])
    name = next(n for n in chain([stem], (f"{stem}_{k}" for k in count(2))) if n not in taken)
    taken.add(name)
    return name


def _fresh() -> Any:
    return (f"{v}{n}" if n > 1 else v for n in count(1) for v in "xyzuw")


def _handed(
    capture: Capture, way: Sequence[str], extents: Mapping[str, int], *, as_value: bool, query: torch.Tensor
) -> torch.Tensor:
    """The tensor as a call takes it: axes cut to their ranks, truth as bytes, whole numbers among values real."""
    tensor = capture.tensor
    for n, v in enumerate(way):
        if v and tensor.shape[n] < extents[v]:
            _too_short(capture, n, f"{_SPOKEN.get(v, v)}, which goes to {extents[v] - 1},")
        if v:
            tensor = tensor.narrow(n, 0, extents[v])
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    if tensor.dim() == 0:
        tensor = tensor.to(query.device)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if tensor.dim() == 0 and tensor.dtype == torch.float64:
        return tensor.to(wide)
    # Whole numbers meet a score as PyTorch has them do, in the dtype of the score, where an op takes that dtype.
    return tensor.to(wide) if as_value and (tensor.dim() < 2 or query.dtype == wide) else tensor


_SPOKEN = {"p": "q_idx", "m": "kv_idx"}


def _too_short(capture: Capture, axis: int, what: str) -> None:
    name = capture.name or "a captured tensor"
    raise refusal(
        "capture-length",
        f"{name} has {capture.tensor.shape[axis]} elements along axis {axis}, but is indexed by {what} there",
        rule="every b, h, q_idx and kv_idx of a call indexes the tensor, those that the mask hides too",
        hint="clamp the index, or hand over a longer tensor",
        place=capture.place,
    )


def _wrapped(
    index: Expr,
    rank: str,
    size: int,
    captures: Mapping[str, Capture],
    extents: Mapping[str, int],
    capture: Capture,
    axis: int,
) -> Expr:
    """An index that PyTorch would count from the end where it is negative."""
    low, high = _range(index, captures, extents)
    if _is_exact(index) and low <= high and (high >= size or low < -size):
        text = _spoken(index)
        _too_short(capture, axis, f"{text}, which goes from {low:g} to {high:g},")
    if low >= 0:
        return index
    extent = Scalar(name=rank_of(rank))
    if any(isinstance(e, Read) for e in subexpressions(index)):
        return apply("select", apply("lt", index, Num(value=0)), apply("add", index, extent), index)
    return apply("mod", index, extent)


def _spoken(index: Expr) -> str:
    """An index in the words of the callable."""
    return str(transformed(index, lambda e: Var(name=_SPOKEN.get(e.name, e.name)) if isinstance(e, Var) else None))


def _is_exact(index: Expr) -> bool:
    """Whether interval arithmetic finds values that are taken: each variable stands once, and nothing chooses."""
    names = [e.name for e in subexpressions(index) if isinstance(e, Var)]
    operations = {e.op for e in subexpressions(index) if isinstance(e, Apply)}
    plain = operations <= {"add", "sub", "neg", "mul", "floordiv", "max", "min", "clamp", "abs"}
    return plain and len(set(names)) == len(names) and not any(isinstance(e, Read) for e in subexpressions(index))


def _range(x: Expr, captures: Mapping[str, Capture], extents: Mapping[str, int]) -> Range:
    """Bounds of a whole expression over the points of a call."""
    match x:
        case Num():
            return (x.value, x.value)
        case Var():
            return (0, extents[x.name] - 1)
        case Read():
            unsigned = captures[x.tensor].tensor.dtype in (torch.uint8, torch.bool)
            return (0, 255) if unsigned else EVERYTHING
        case Apply():
            parts = [_range(a, captures, extents) for a in x.args if not (isinstance(a, Apply) and a.row.condition)]
            return _applied(x.op, parts)
        case _:
            return EVERYTHING


def _applied(op: str, parts: Sequence[Range]) -> Range:
    match op, parts:
        case "add", ((a, b), (c, d)):
            return (a + c, b + d)
        case "sub", ((a, b), (c, d)):
            return (a - d, b - c)
        case "neg", ((a, b),):
            return (-b, -a)
        case "mul", ((a, b), (c, d)):
            products = [0.0 if 0 in (x, y) else x * y for x in (a, b) for y in (c, d)]
            return (min(products), max(products))
        case "floordiv", ((a, b), (c, d)) if c == d > 0:
            return (a // c, b // c)
        case "mod", ((_, _), (c, d)) if c > 0:
            return (0, d)
        case "abs", ((a, b),):
            return (max(a, -b, 0), max(-a, b))
        case ("max", ((a, b), (c, d))):
            return (max(a, c), max(b, d))
        case ("min", ((a, b), (c, d))):
            return (min(a, c), min(b, d))
        case "clamp", ((a, b), (c, d), (e, f)):
            return (min(max(a, c), e), min(max(b, d), f))
        case "select", ((a, b), (c, d)):
            return (min(a, c), max(b, d))
        case "div", ((a, b), (c, d)) if c == d > 0:
            return (a / c, b / c)
        case _, ((a, b),) if OPS[op].monotone:
            return (_value(op, a), _value(op, b))
        case _:
            return EVERYTHING


def _value(op: str, x: float) -> float:
    return float(OPS[op].array(torch, torch.tensor(x, dtype=torch.float64)))
