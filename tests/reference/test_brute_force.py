"""The interpreter and the plain formula against a loop over single points, on tiny random cascades."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from einsumcascade.codegen.plain import run_plain
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Output,
    Read,
    Scalar,
    Statement,
    Var,
    variables,
)
from einsumcascade.language.parser import parse
from einsumcascade.reference import run_all

Cells = dict[tuple[int, ...], float]
NAN, INF = math.nan, math.inf


class Removed(Exception):
    """An index out of range: the point is not there."""


def larger(x: float, y: float) -> float:
    return NAN if x != x or y != y else max(x, y)


def smaller(x: float, y: float) -> float:
    return NAN if x != x or y != y else min(x, y)


def quotient(x: float, y: float) -> float:
    if y != 0:
        return x / y
    if x == 0:
        return 0.0
    return NAN if x != x else math.copysign(INF, x) * math.copysign(1.0, y)


PLAIN = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: -INF if x == y == -INF else x - y,
    "mul": lambda x, y: x * y,
    "div": quotient,
    "max": larger,
    "min": smaller,
    "neg": lambda x: -x,
    "abs": abs,
    "exp": lambda x: math.exp(x) if x < 700 else (NAN if x != x else INF),
    "floordiv": lambda x, y: x // y,
    "mod": lambda x, y: x % y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "and": lambda x, y: bool(x) and bool(y),
    "or": lambda x, y: bool(x) or bool(y),
    "not": lambda x: not x,
}


class Loop:
    """A cascade evaluated point by point; `cells` holds each tensor as a dictionary of its elements."""

    def __init__(self, cascade: Cascade, inputs: Mapping[str, NDArray[np.generic]], extents: dict[str, int]) -> None:
        self.cascade, self.extents = cascade, extents
        self.cells: dict[str, Cells] = {
            name: {at: value[at].item() for at in np.ndindex(value.shape)} for name, value in inputs.items()
        }

    def value(self, expr: Expr, at: Mapping[str, int]) -> float:
        match expr:
            case Num():
                return expr.value
            case Var():
                return at[expr.name]
            case Scalar():
                return self.extents[expr.name]
            case Read():
                index = tuple(self.value(i, at) for i in expr.indices)
                if index not in self.cells[expr.tensor]:
                    raise Removed
                return self.cells[expr.tensor][index]  # type: ignore[index]
            case Apply(op="select", args=(c, x, y)):
                return self.value(x if self.value(c, at) else y, at)
            case Apply():
                return PLAIN[expr.op](*[self.value(a, at) for a in expr.args])  # type: ignore[no-any-return,operator]

    def points(self, names: Iterable[str], now: Mapping[str, int]) -> Iterable[dict[str, int]]:
        names = [n for n in names if n not in now]
        for values in itertools.product(*(range(self.extents[n.upper()]) for n in names)):
            yield {**now, **dict(zip(names, values, strict=True))}

    def run(self, body: tuple[Statement, ...], now: Mapping[str, int]) -> None:
        for s in body:
            if isinstance(s, Iter):
                steps = list(range(self.extents[s.var.upper()]))
                for step in reversed(steps) if s.descending else steps:
                    self.run(s.body, {**now, s.var: step})
            else:
                self.write(s, now)

    def write(self, s: Einsum | Init, now: Mapping[str, int]) -> None:
        conditions: list[Expr] = []
        if isinstance(s, Einsum):
            conditions = [c for c in self.cascade.constraints if all(v in s.space for v in variables(c))]
            conditions += s.where
        cells = self.cells.setdefault(s.tensor, {})
        for outer in self.points(s.free, now):
            fiber: list[float] = []
            for at in self.points(s.ranks if isinstance(s, Einsum) else (), outer):
                try:
                    if all(self.value(c, at) for c in conditions):
                        fiber.append(self.value(s.expr, at))
                except Removed:
                    pass
            place = tuple(int(self.value(i, outer)) for i in s.indices)
            cells[place] = self.combine(s.reduce if isinstance(s, Einsum) else None, fiber)

    @staticmethod
    def combine(name: str | None, fiber: list[float]) -> float:
        match name:
            case None:
                return fiber[0] if fiber else NAN
            case "max" | "min":
                total = -INF if name == "max" else INF
                for x in fiber:
                    total = larger(total, x) if name == "max" else smaller(total, x)
                return total
            case "any":
                return float(any(x != 0 for x in fiber))
            case "prod":
                return math.prod(fiber)
            case _:
                return float(sum(fiber)) / (len(fiber) if name == "mean" and fiber else 1)


INPUTS = {"Q": "pe", "K": "me", "X": "pm", "V": "m", "J": "p"}
INDEX = ["{v}", "{v}", "{v}", "{v} + 1", "{v} - 1", "1 - {v}", "{v} // 2", "2 * {v}", "{v} % 2", "0"]


@st.composite
def read(draw: st.DrawFn, tensors: Mapping[str, str], names: str) -> str:
    tensor = draw(st.sampled_from(sorted(tensors)))
    indices = []
    for rank in tensors[tensor]:
        # Mostly the variable of the axis, sometimes any other.
        v = rank if rank in names and draw(st.booleans()) else draw(st.sampled_from(names))
        indices.append(draw(st.sampled_from(INDEX)).format(v=v))
        if rank == "m" and "p" in names and draw(st.integers(0, 7)) == 0:
            indices[-1] = "J[p]"
    return f"{tensor}[{', '.join(indices)}]"


@st.composite
def condition(draw: st.DrawFn, names: str, inputs: Mapping[str, str]) -> str:
    # Inputs are exact, so a comparison cannot hang on rounding.
    side = st.one_of(
        st.sampled_from([f"{v}" for v in names] + [f"{v} // 2" for v in names] + ["1", "2"]), read(inputs, names)
    )
    symbol = draw(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
    text = f"{draw(side)} {symbol} {draw(side)}"
    match draw(st.integers(0, 5)):
        case 0:
            return f"not ({text})"
        case 1:
            return f"({text}) or ({draw(condition(names, inputs))})"
        case _:
            return text


@st.composite
def expression(draw: st.DrawFn, tensors: Mapping[str, str], inputs: Mapping[str, str], names: str, depth: int) -> str:
    inner = expression(tensors, inputs, names, depth - 1)
    kind = draw(st.integers(0, 9)) if depth else draw(st.integers(0, 3))
    match kind:
        case 0 | 1 | 2:
            return draw(read(tensors, names))
        case 3:
            return draw(st.sampled_from([*names, "2", "0.5", "M"]))
        case 4 | 5:
            return f"({draw(inner)}) * ({draw(inner)})"
        case 6:
            return f"({draw(inner)}) {draw(st.sampled_from('+-'))} ({draw(inner)})"
        case 7:
            return f"{draw(st.sampled_from(['max', 'min']))}({draw(inner)}, {draw(inner)})"
        case 8:
            return f"select({draw(condition(names, inputs))}, {draw(inner)}, {draw(inner)})"
        case _:
            form = draw(st.sampled_from(["exp(min({0}, 2))", "abs({0})", "-({0})", "({0}) / ({1})"]))
            return form.format(draw(inner), draw(read(inputs, names)))


@st.composite
def cascades(draw: st.DrawFn) -> str:
    lines = ["in " + " ".join(f"{t}[{', '.join(r)}]" for t, r in INPUTS.items())]
    tensors = dict(INPUTS)
    constraint = draw(st.sampled_from(["", "", "m <= p", "m < p", "X[p, m] > 0", "m // 2 == p // 2"]))
    if constraint:
        lines.append(f"constraint {constraint}")
    for n in range(draw(st.integers(1, 4))):
        names = draw(st.sampled_from(["pme", "pm", "pe", "me", "p", "m"]))
        text = draw(expression(tensors, INPUTS, names, 3))
        inside = [v for v in names if re.search(rf"\b{v}\b", text)]
        left = "".join(v for v in draw(st.permutations(inside)) if draw(st.booleans()))
        reduced = [v for v in inside if v not in left]
        line = f"T{n}[{', '.join(left)}]" if left else f"T{n}"
        line += f" = {text}"
        if reduced:
            op = draw(st.sampled_from(["sum", "sum", "sum", "max", "min", "mean", "prod", "any"]))
            line += f" :: {op}({', '.join(reduced)})"
        if inside and draw(st.integers(0, 3)) == 0:
            line += f" where {draw(condition(''.join(inside), INPUTS))}"
        lines.append(line)
        # A scalar tensor and one whose axes repeat no rank can be read later.
        if left:
            tensors[f"T{n}"] = left
    if draw(st.booleans()):
        step = draw(expression(tensors, INPUTS, "pm", 2))
        last = "R[0, p]" if (back := draw(st.booleans())) else "R[M, p]"
        lines += [f"init R[{'M' if back else '0'}, p] = {draw(st.sampled_from(['0', '-inf', 'J[p]']))}"]
        old, new = ("R[m + 1, p]", "R[m, p]") if back else ("R[m, p]", "R[m + 1, p]")
        lines += [f"iter m{' desc' if back else ''}:", f"  {new} = max({old}, 0) + ({step})", "end", f"L[p] = {last}"]
    lines.append("out X")
    return "\n".join(lines)


NUMBERS = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0])
WILD = st.one_of(NUMBERS, NUMBERS, NUMBERS, st.sampled_from([INF, -INF, NAN]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, NDArray[np.generic]], Loop]:
    """A text, its inputs, and what the loop makes of them."""
    text = draw(cascades())
    extents = {"P": draw(st.integers(0, 3)), "M": draw(st.integers(0, 4)), "E": draw(st.integers(1, 2))}
    numbers = draw(st.sampled_from([NUMBERS, WILD]))
    inputs: dict[str, NDArray[np.generic]] = {}
    for tensor, ranks in INPUTS.items():
        shape = tuple(extents[v.upper()] for v in ranks)
        element = st.integers(-1, 4) if tensor == "J" else numbers
        size = math.prod(shape)
        values = draw(st.lists(element, min_size=size, max_size=size))
        inputs[tensor] = np.array(values, dtype=np.int64 if tensor == "J" else np.float64).reshape(shape)
    loop = Loop(parse(text), inputs, extents)
    loop.run(loop.cascade.body, {})
    return text, inputs, loop


def agree(loop: Loop, tensor: str, value: NDArray[np.float64], text: str) -> None:
    want = np.full(value.shape, NAN)
    for at, x in loop.cells[tensor].items():
        want[at] = x
    np.testing.assert_allclose(value, want, rtol=1e-9, atol=1e-7, err_msg=f"{tensor} of\n{text}")


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_interpreter_agrees_with_a_loop_over_points(
    case: tuple[str, dict[str, NDArray[np.generic]], Loop],
) -> None:
    text, inputs, loop = case
    for contract in (False, True):
        for tensor, value in run_all(loop.cascade, inputs, contract=contract).items():
            if tensor not in INPUTS:
                agree(loop, tensor, value, text)


@settings(max_examples=300, deadline=None)
@given(cases(), st.booleans())
def test_the_plain_formula_agrees_with_a_loop_over_points(
    case: tuple[str, dict[str, NDArray[np.generic]], Loop], last: bool
) -> None:
    text, inputs, loop = case
    names = tuple(dict.fromkeys(e.tensor for e in loop.cascade.einsums))
    # With the last tensor alone, culled points before it go unseen and may hold anything.
    cascade = replace(loop.cascade, outputs=tuple(Output(tensor=n) for n in (names[-1:] if last else names)))
    for tensor, value in run_plain(cascade, {k: torch.from_numpy(v) for k, v in inputs.items()}).items():
        agree(loop, tensor, value.numpy(), text)
