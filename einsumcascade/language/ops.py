"""The operator table: everything the system knows of an operator is one row here.

A row holds the laws (identity, associativity, what it distributes over), the facts that range analysis uses, the
cost class, and the spelling in NumPy and PyTorch (`array`, given the module), SymPy and Triton. Spellings receive
their module as an argument, so this file imports none of them. Adding an operator is adding a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from einsumcascade.language.philox import uniform

INF = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operator.

    Args:
        name: the name in texts, `name(x, y)`; infix operators have a `symbol` too.
        arity: number of operands; of these the `optional` ones after the first are 0 where a text leaves them out.
        array: value on arrays; first argument is the array module (NumPy or PyTorch), with the value rules of the
            language: (-inf) - (-inf) = -inf, 0/0 = 0, log 0 = -inf.
        sympy: expression on SymPy arguments; first argument is the module. None: opaque to algebra.
        triton: format string over the operands' texts; None: no lowering.
        coarse: Triton text for inputs of 16 bits on a GPU that has an instruction for it, if it differs from `triton`:
            right to 2^-11.
        ieee: Triton text that holds where the value rules cannot bite, if it differs from `triton`.
        symbol, precedence: infix spelling, higher binds tighter.
        cost: class of the operation in counts: add, multiply, divide, exp, max or other.
        special: instructions of a GPU's special-function unit that a value costs.
        identity: neutral element, for operators a reduction may use.
        distributes_over: names of reductions (+) with x (*) (a (+) b) = (x (*) a) (+) (x (*) b).
        condition: the value is a truth value.
        low, high: bounds of the value whatever the operands; None: none known.
        monotone: non-decreasing in its only operand.
        positive: the value is > 0 for every finite operand.
        internal: for lowerings only: no text may write it.
        counts: its operands are whole numbers, which no lowering may round to a floating-point dtype.
        fiberwise: takes whole fibers: `array` has matrices on its last two axes; stands alone on the right side.
        gradient: what each operand receives, as texts over G (what the value receives), the operands X, Y, Z and the
            value V; "" for nothing. Finite wherever the value is, also at 0/0, log 0 and sqrt 0, where it is 0.
    """

    name: str
    arity: int
    array: Callable[..., Any]
    sympy: Callable[..., Any] | None = None
    triton: str | None = None
    coarse: str = ""
    ieee: str | None = None
    symbol: str = ""
    precedence: int = 0
    cost: str = "other"
    special: int = 0
    identity: float | None = None
    is_associative: bool = False
    distributes_over: tuple[str, ...] = ()
    condition: bool = False
    low: float | None = None
    high: float | None = None
    monotone: bool = False
    positive: bool = False
    internal: bool = False
    optional: int = 0
    counts: bool = False
    fiberwise: bool = False
    gradient: tuple[str, ...] = ()


def _sub(xp: Any, x: Any, y: Any) -> Any:
    return xp.where((x == -INF) & (y == -INF), -INF, x - y)


def _div(xp: Any, x: Any, y: Any) -> Any:
    return xp.where((x == 0) & (y == 0), 0.0, x / xp.where((x == 0) & (y == 0), 1.0, y))


def _sigmoid(xp: Any, x: Any) -> Any:
    small = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1.0, small) / (1.0 + small)


def _erf(xp: Any, x: Any) -> Any:
    if hasattr(xp, "erf"):
        return xp.erf(x)
    return xp.vectorize(math.erf, otypes=[float])(x)


def _whole(xp: Any, x: Any, rounded: Callable[[Any], Any], unknown: int) -> Any:
    """Whole numbers next to those of an array; `unknown` stands for what is no number."""
    if "float" in str(x.dtype):
        x = xp.clip(rounded(xp.where(x == x, x, float(unknown))), -FAR, FAR)
    return xp.asarray(x, dtype=xp.int64)


def _trisolve(xp: Any, lower: Any, right: Any) -> Any:
    return xp.linalg.solve(xp.tril(lower, -1) + xp.eye(lower.shape[-1]), right)


# Further than any position.
FAR = 1 << 62

# One row an operator, kept compact.
# fmt: off
_ROWS = (
    # arithmetic
    Op(name="add", arity=2, symbol="+", precedence=5, array=lambda xp, x, y: x + y, sympy=lambda sp, x, y: x + y,
       triton="{0} + {1}", cost="add", identity=0.0, is_associative=True,
       distributes_over=("max", "min"),
       gradient=("G", "G")),
    Op(name="sub", arity=2, symbol="-", precedence=5, array=_sub, sympy=lambda sp, x, y: x - y,
       triton="tl.where(({0} == float('-inf')) & ({1} == float('-inf')), float('-inf'), {0} - {1})",
       ieee="{0} - {1}", cost="add",
       gradient=("G", "-G")),
    Op(name="mul", arity=2, symbol="*", precedence=6, array=lambda xp, x, y: x * y, sympy=lambda sp, x, y: x * y,
       triton="{0} * {1}", cost="multiply", identity=1.0, is_associative=True,
       distributes_over=("sum", "mean"),
       gradient=("G * Y", "G * X")),
    Op(name="div", arity=2, symbol="/", precedence=6, array=_div, sympy=lambda sp, x, y: x / y,
       triton="tl.where({0} == 0, tl.where({1} == 0, 0.0, {0} / {1}), {0} / {1})", ieee="{0} / {1}", cost="divide",
       special=1, gradient=("select(Y == 0, 0, G / Y)", "select(Y == 0, 0, -G * V / Y)")),
    Op(name="floordiv", arity=2, symbol="//", precedence=6, array=lambda xp, x, y: xp.floor_divide(x, y),
       sympy=lambda sp, x, y: sp.floor(x / y), triton="{0} // {1}",
       gradient=("", "")),
    Op(name="mod", arity=2, symbol="%", precedence=6, array=lambda xp, x, y: xp.remainder(x, y),
       sympy=lambda sp, x, y: x - y * sp.floor(x / y), triton="{0} % {1}",
       gradient=("G", "-G * floor(X / Y)")),
    Op(name="pow", arity=2, symbol="**", precedence=8, array=lambda xp, x, y: x**y, sympy=lambda sp, x, y: x**y,
       special=2, triton="tl.exp2({1} * tl.log2({0}))",
       gradient=("G * Y * X ** (Y - 1)", "G * V * log(X)")),
    Op(name="neg", arity=1, symbol="-", precedence=7, array=lambda xp, x: x * -1, sympy=lambda sp, x: -x,
       triton="-{0}", cost="add",
       gradient=("-G",)),
    Op(name="max", arity=2, array=lambda xp, x, y: xp.maximum(x, y), sympy=lambda sp, x, y: sp.Max(x, y),
       triton="tl.maximum({0}, {1})", cost="max", identity=-INF, is_associative=True,
       gradient=("select(X > Y, G, select(X == Y, G / 2, 0))", "select(Y > X, G, select(X == Y, G / 2, 0))")),
    Op(name="min", arity=2, array=lambda xp, x, y: xp.minimum(x, y), sympy=lambda sp, x, y: sp.Min(x, y),
       triton="tl.minimum({0}, {1})", cost="max", identity=INF, is_associative=True,
       gradient=("select(X < Y, G, select(X == Y, G / 2, 0))", "select(Y < X, G, select(X == Y, G / 2, 0))")),
    # plain IEEE forms, which lowerings use where the value rules cannot bite
    Op(name="ieee_sub", arity=2, array=lambda xp, x, y: x - y, sympy=lambda sp, x, y: x - y, triton="{0} - {1}",
       cost="add", internal=True),
    Op(name="ieee_div", arity=2, array=lambda xp, x, y: x / y, sympy=lambda sp, x, y: x / y, triton="{0} / {1}",
       special=1, cost="divide", internal=True),
    Op(name="quotient", arity=2, array=lambda xp, x, y: xp.floor_divide(x, y),
       sympy=lambda sp, x, y: sp.floor(x / y), triton="{0} // {1}", internal=True),  # of numbers >= 0
    # bounds of loops: whole numbers next to what a tensor holds, and positions in 32 bits
    Op(name="below", arity=1, array=lambda xp, x: _whole(xp, x, xp.floor, -FAR), triton="_below({0})", internal=True),
    Op(name="above", arity=1, array=lambda xp, x: _whole(xp, x, xp.ceil, FAR), triton="_above({0})", internal=True),
    Op(name="narrow", arity=1, array=lambda xp, x: x, triton="tl.cast({0}, tl.int32)", internal=True),
    # conditions
    Op(name="lt", arity=2, symbol="<", precedence=4, array=lambda xp, x, y: x < y, triton="{0} < {1}", condition=True),
    Op(name="le", arity=2, symbol="<=", precedence=4, array=lambda xp, x, y: x <= y, triton="{0} <= {1}",
       condition=True),
    Op(name="gt", arity=2, symbol=">", precedence=4, array=lambda xp, x, y: x > y, triton="{0} > {1}", condition=True),
    Op(name="ge", arity=2, symbol=">=", precedence=4, array=lambda xp, x, y: x >= y, triton="{0} >= {1}",
       condition=True),
    Op(name="eq", arity=2, symbol="==", precedence=4, array=lambda xp, x, y: x == y, triton="{0} == {1}",
       condition=True),
    Op(name="ne", arity=2, symbol="!=", precedence=4, array=lambda xp, x, y: x != y, triton="{0} != {1}",
       condition=True),
    Op(name="and", arity=2, symbol="and", precedence=2, array=lambda xp, x, y: x & y, triton="{0} & {1}",
       condition=True, identity=1.0, is_associative=True),
    Op(name="or", arity=2, symbol="or", precedence=1, array=lambda xp, x, y: x | y, triton="{0} | {1}",
       condition=True, identity=0.0, is_associative=True),
    Op(name="not", arity=1, symbol="not", precedence=3, array=lambda xp, x: xp.logical_not(x), triton="~{0}",
       condition=True),
    Op(name="select", arity=3, array=lambda xp, c, x, y: xp.where(c, x, y), triton="tl.where({0}, {1}, {2})",
       gradient=("", "select(X, G, 0)", "select(X, 0, G)")),
    # functions
    Op(name="exp", arity=1, array=lambda xp, x: xp.exp(x), sympy=lambda sp, x: sp.exp(x), triton="tl.exp({0})",
       special=1, cost="exp", low=0.0, monotone=True, positive=True,
       gradient=("G * V",)),
    Op(name="exp2", arity=1, array=lambda xp, x: xp.exp2(x), sympy=lambda sp, x: sp.exp(x * sp.log(2)),
       special=1, triton="tl.math.exp2({0})", cost="exp", low=0.0, monotone=True, positive=True,
       gradient=("0.6931471805599453 * G * V",)),
    Op(name="log", arity=1, array=lambda xp, x: xp.log(x), sympy=lambda sp, x: sp.log(x), triton="tl.log({0})",
       coarse="_log({0})", special=1, monotone=True,
       gradient=("select(X == 0, 0, G / X)",)),
    Op(name="log2", arity=1, array=lambda xp, x: xp.log2(x), sympy=lambda sp, x: sp.log(x) / sp.log(2),
       special=1, triton="tl.log2({0})", monotone=True,
       gradient=("select(X == 0, 0, 1.4426950408889634 * G / X)",)),
    Op(name="sqrt", arity=1, array=lambda xp, x: xp.sqrt(x), sympy=lambda sp, x: sp.sqrt(x), triton="tl.sqrt({0})",
       special=1, monotone=True, low=0.0,
       gradient=("select(V == 0, 0, G / (2 * V))",)),
    Op(name="rsqrt", arity=1, array=lambda xp, x: 1.0 / xp.sqrt(x), sympy=lambda sp, x: 1 / sp.sqrt(x),
       special=1, triton="tl.rsqrt({0})", low=0.0,
       gradient=("-0.5 * G * V * V * V",)),
    Op(name="abs", arity=1, array=lambda xp, x: xp.abs(x), sympy=lambda sp, x: sp.Abs(x), triton="tl.abs({0})",
       low=0.0,
       gradient=("G * sign(X)",)),
    Op(name="sign", arity=1, array=lambda xp, x: xp.sign(x), sympy=lambda sp, x: sp.sign(x),
       triton="tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))", low=-1.0, high=1.0, monotone=True,
       gradient=("",)),
    Op(name="floor", arity=1, array=lambda xp, x: xp.floor(x), sympy=lambda sp, x: sp.floor(x),
       triton="tl.floor({0})", monotone=True,
       gradient=("",)),
    Op(name="ceil", arity=1, array=lambda xp, x: xp.ceil(x), sympy=lambda sp, x: sp.ceiling(x),
       triton="tl.ceil({0})", monotone=True,
       gradient=("",)),
    Op(name="tanh", arity=1, array=lambda xp, x: xp.tanh(x), sympy=lambda sp, x: sp.tanh(x),
       special=1, triton="libdevice.tanh({0})", coarse="_tanh({0})", low=-1.0, high=1.0, monotone=True,
       gradient=("G * (1 - V * V)",)),
    Op(name="sigmoid", arity=1, array=_sigmoid, sympy=lambda sp, x: 1 / (1 + sp.exp(-x)),
       special=2, triton="tl.sigmoid({0})", low=0.0, high=1.0, monotone=True, positive=True,
       gradient=("G * V * (1 - V)",)),
    Op(name="silu", arity=1, array=lambda xp, x: xp.where(x == -INF, 0.0, x * _sigmoid(xp, x)),
       special=2, sympy=lambda sp, x: x / (1 + sp.exp(-x)),
       triton="{0} * _reciprocal(1.0 + tl.math.exp2(-1.4426950408889634 * {0}))", low=-0.28,
       gradient=("G * sigmoid(X) * (1 + X * (1 - sigmoid(X)))",)),
    Op(name="softplus", arity=1, array=lambda xp, x: xp.where(x > 0, x, 0.0) + xp.log1p(xp.exp(-xp.abs(x))),
       sympy=lambda sp, x: sp.log(1 + sp.exp(x)),
       triton="tl.maximum({0}, 0.0) + tl.log(1.0 + tl.math.exp2(-1.4426950408889634 * tl.abs({0})))", special=2,
       coarse="tl.maximum({0}, 0.0) + _log(1.0 + tl.math.exp2(-1.4426950408889634 * tl.abs({0})))",
       low=0.0, monotone=True, positive=True,
       gradient=("G * sigmoid(X)",)),
    Op(name="relu", arity=1, array=lambda xp, x: xp.where(x <= 0, 0.0, x), sympy=lambda sp, x: sp.Max(x, 0),
       triton="tl.maximum({0}, 0.0)", cost="max", low=0.0, monotone=True,
       gradient=("select(X > 0, G, 0)",)),
    Op(name="lrelu", arity=1, array=lambda xp, x: xp.where(x >= 0, x, 0.2 * x),
       triton="tl.where({0} >= 0, {0}, 0.2 * {0})", monotone=True,
       gradient=("select(X > 0, G, 0.2 * G)",)),
    Op(name="elu", arity=1, array=lambda xp, x: xp.where(x > 0, x, xp.expm1(xp.where(x < 0, x, 0.0))),
       triton="tl.where({0} > 0, {0}, tl.math.exp2(tl.minimum({0}, 0.0) * 1.4426950408889634) - 1.0)", special=1,
       low=-1.0, monotone=True,
       gradient=("select(X > 0, G, G * (V + 1))",)),
    Op(name="sin", arity=1, array=lambda xp, x: xp.sin(x), sympy=lambda sp, x: sp.sin(x), triton="tl.sin({0})",
       coarse="_sin({0})",
       special=1, low=-1.0, high=1.0,
       gradient=("G * cos(X)",)),
    Op(name="cos", arity=1, array=lambda xp, x: xp.cos(x), sympy=lambda sp, x: sp.cos(x), triton="tl.cos({0})",
       coarse="_cos({0})",
       special=1, low=-1.0, high=1.0,
       gradient=("-G * sin(X)",)),
    Op(name="erf", arity=1, array=_erf, sympy=lambda sp, x: sp.erf(x), triton="tl.erf({0})", low=-1.0, high=1.0,
       special=1, monotone=True,
       gradient=("1.1283791670955126 * G * exp(-X * X)",)),
    Op(name="clamp", arity=3, array=lambda xp, x, low, high: xp.minimum(xp.maximum(x, low), high),
       sympy=lambda sp, x, low, high: sp.Min(sp.Max(x, low), high),
       triton="tl.minimum(tl.maximum({0}, {1}), {2})", cost="max",
       gradient=("select(X < Y, 0, select(X > Z, 0, G))", "select(X < Y, G, 0)", "select(X > Z, G, 0)")),
    # a random number of [0, 1) from a seed and up to four coordinates
    Op(name="uniform", arity=5, optional=3, array=uniform, triton="_uniform({0}, {1}, {2}, {3}, {4})", low=0.0,
       high=1.0, counts=True, gradient=("", "", "", "", "")),
    # of whole fibers: solve(A, B) is X with A X = B; trisolve(L, B) is X with (I + L) X = B, L strictly lower
    Op(name="solve", arity=2, array=lambda xp, a, b: xp.linalg.solve(a, b), fiberwise=True),
    Op(name="trisolve", arity=2, array=_trisolve, fiberwise=True),
)
# fmt: on
OPS: dict[str, Op] = {op.name: op for op in _ROWS}
INFIX: dict[str, Op] = {op.symbol: op for op in _ROWS if op.symbol and op.arity == 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """A reduction by name: the operator that combines, and what an empty fiber gives.

    `mean` combines by addition and divides by the number of live points.
    """

    name: str
    op: Op
    empty: float
    numpy_ufunc: str
    triton: str


REDUCTIONS: dict[str, Reduction] = {
    r.name: r
    for r in (
        Reduction(name="sum", op=OPS["add"], empty=0.0, numpy_ufunc="add", triton="tl.sum({0}, axis={1})"),
        Reduction(
            name="prod", op=OPS["mul"], empty=1.0, numpy_ufunc="multiply", triton="tl.reduce({0}, {1}, _multiply)"
        ),
        Reduction(name="max", op=OPS["max"], empty=-INF, numpy_ufunc="maximum", triton="tl.max({0}, axis={1})"),
        Reduction(name="min", op=OPS["min"], empty=INF, numpy_ufunc="minimum", triton="tl.min({0}, axis={1})"),
        Reduction(name="any", op=OPS["or"], empty=0.0, numpy_ufunc="logical_or", triton="tl.max({0}, axis={1})"),
        Reduction(name="mean", op=OPS["add"], empty=0.0, numpy_ufunc="add", triton="tl.sum({0}, axis={1})"),
    )
}
# Operations on whole fibers: neither map nor reduction, and nothing distributes over them.
FIBERWISE: tuple[str, ...] = ("topk", *(op.name for op in _ROWS if op.fiberwise))
FUNCTIONS: tuple[str, ...] = tuple(op.name for op in _ROWS if not op.symbol and not op.internal)
