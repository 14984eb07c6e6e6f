"""What the functions of PyTorch mean on proxies: rows of the operator table, found by their PyTorch spelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from einsumcascade.codegen.trace_places import WRITE_RULE, refusal
from einsumcascade.codegen.tracing import BOOL, FLOAT, INT, NUMBER_HINT, NUMBER_RULE, Proxy, Rows, Tracer
from einsumcascade.errors import nearest
from einsumcascade.language.ir import Apply, Expr, Num, apply
from einsumcascade.language.ops import OPS

# PyTorch's own second names.
_SYNONYMS = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "mod": "remainder",
    "floordiv": "floor_divide", "negative": "neg", "absolute": "abs", "greater": "gt", "greater_equal": "ge",
    "less": "lt", "less_equal": "le", "not_equal": "ne", "clip": "clamp", "bitwise_and": "and", "logical_and": "and",
    "bitwise_or": "or", "logical_or": "or", "bitwise_not": "logical_not", "invert": "logical_not",
    "bitwise_xor": "xor", "logical_xor": "xor", "max": "maximum", "min": "minimum", "fmax": "maximum",
    "fmin": "minimum", "special_expit": "sigmoid", "special_erf": "erf", "special_exp2": "exp2", "float_power": "pow",
}  # fmt: skip
_SAME = ("clone", "contiguous", "detach", "squeeze", "view_as", "expand_as")
_CASTS = {"float": torch.float32, "double": torch.float64, "int": torch.int32, "long": torch.int64, "bool": torch.bool,
          "half": torch.float16, "bfloat16": torch.bfloat16, "short": torch.int16}  # fmt: skip
_WHOLE_RESULT = ("add", "sub", "mul", "neg", "abs", "max", "min", "floordiv", "mod", "sign", "clamp", "floor", "ceil")


class _Noted:
    """Stands for the array module and for operands: what a row does with them is noted, not done."""

    def __init__(self, name: str = "", args: tuple[object, ...] = ()) -> None:
        self._name, self._args = name, args

    def __getattr__(self, name: str) -> Callable[..., _Noted]:
        return lambda *args: _Noted(name, args)


def _noting(name: str, *, swapped: bool = False) -> Callable[..., _Noted]:
    return lambda self, *other: _Noted(name, (*other, self) if swapped else (self, *other))


for _op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or"):
    setattr(_Noted, f"__{_op}__", _noting(_op))
    setattr(_Noted, f"__r{_op}__", _noting(_op, swapped=True))
for _op in ("lt", "le", "gt", "ge", "eq", "ne", "neg"):
    setattr(_Noted, f"__{_op}__", _noting(_op))


@cache
def rows() -> Mapping[str, str]:
    """Rows of the operator table by the PyTorch function that spells them, else by their own name."""
    found = {}
    for op in OPS.values():
        # No function of PyTorch's counts elements to draw numbers for them.
        if op.internal or op.fiberwise or op.counts:
            continue
        operands = tuple(_Noted() for _ in range(op.arity))
        noted = op.array(_Noted(), *operands)
        whole = isinstance(noted, _Noted) and len(noted._args) == op.arity
        whole = whole and all(a is b for a, b in zip(noted._args, operands, strict=True))
        found[noted._name if whole else op.name] = op.name
    return found


# --- from calls to rows -----------------------------------------------------------------------------------------


def call(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Trace a call of PyTorch's that holds a proxy. Raises: TraceError."""
    name = getattr(func, "__name__", str(func))
    space = getattr(func, "_qualified_op_name", "") or getattr(getattr(func, "_schema", None), "name", "")
    if space:
        # `approx` is where published code registers tanh by the approximate instruction of a GPU.
        name = space.split("::")[-1] if space.split("::")[0] in ("aten", "approx", "prims") else space
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
        return getattr(args[0], name)
    return call_named(tracer, name, args, kwargs)


def method(tracer: Tracer, name: str, self: Proxy) -> Callable[..., Any]:
    """A method of a proxy by name. Raises: TraceError: there is none."""
    if not _is_known(name):
        _unknown(name)
    return lambda *args, **kwargs: call_named(tracer, name, (self, *args), kwargs)


def call_named(tracer: Tracer, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Trace a function by name."""
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name.startswith("r") and _SYNONYMS.get(name[1:], name[1:]) in (*rows(), *_SPECIAL):
            name, args = name[1:], (args[1], args[0])
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return args[0][args[1]] if isinstance(args[0], Proxy | Rows) else tracer.read(args[0], index)
    if _writes(name) or "out" in kwargs or kwargs.get("inplace"):
        raise refusal(
            "trace-write", f"{name} writes to a tensor", rule=WRITE_RULE, hint="use what the function returns"
        )
    name = _SYNONYMS.get(name, name)
    for rows_ in (a for a in args if isinstance(a, Rows)):
        rows_.refuse()
    special = _SPECIAL.get(name)
    if special is not None:
        try:
            return special(tracer, *args, **kwargs)
        except TypeError as error:
            headline = f"{name} is called with operands or options that it does not take here"
            raise refusal("trace-operation", headline, rule="a call makes one value of single values") from error
    if name not in rows():
        _unknown(name)
    row = OPS[rows()[name]]
    named = {k: v for k, v in kwargs.items() if v is not None and v is not False}
    if len(args) != row.arity or named:
        extra = f" with {', '.join(named)}" if named else ""
        raise refusal(
            "trace-operation",
            f"{name} is called with {len(args)} operands{extra}",
            rule=f"{row.name} takes {row.arity} traced values or numbers and no options",
        )
    return applied(tracer, row.name, *args)


def applied(tracer: Tracer, op: str, *args: object) -> Proxy:
    """A row of the table on operands of any kind."""
    row = OPS[op]
    parts = [_operand(tracer, a, op) for a in args]
    if op in ("and", "or", "not"):
        for p in parts:
            if p.kind != BOOL:
                raise refusal(
                    "trace-operation",
                    f"{row.symbol} of whole numbers, bit by bit",
                    rule="&, | and ~ join conditions",
                    hint="x % 2 and x // 2 take bits of a number",
                )
        return Proxy(_logic(op, *(p.expr for p in parts)), BOOL, tracer)
    if op in ("eq", "ne") and all(p.kind == BOOL for p in parts):
        x, y = (p.expr for p in parts)
        both = _logic("or", _logic("and", x, y), _logic("and", _logic("not", x), _logic("not", y)))
        return Proxy(both if op == "eq" else _logic("not", both), BOOL, tracer)
    parts = [p.as_number() for p in parts]
    kind = FLOAT
    if row.condition:
        kind = BOOL
    elif all(p.kind == INT for p in parts) and op in _WHOLE_RESULT:
        kind = INT
    if op in ("floor", "ceil") and kind == INT:
        return parts[0]
    if op == "floordiv" and kind == FLOAT:
        return applied(tracer, "floor", applied(tracer, "div", *parts))
    return Proxy(_folded(op, *(p.expr for p in parts)), kind, tracer)


def _operand(tracer: Tracer, value: object, op: str) -> Proxy:
    found = tracer.lift(value)
    if found is None:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r}"
        raise refusal(
            "trace-operation",
            f"{op} of a traced value and {what}",
            rule="the operands are numbers, traced values and elements of captured tensors",
            hint="index the tensor by b, h, q_idx or kv_idx" if isinstance(value, torch.Tensor) else "",
        )
    return found


def _folded(op: str, *args: Expr) -> Expr:
    if args and all(isinstance(a, Num) for a in args):
        if OPS[op].condition:
            return Num(value=int(OPS[op].array(None, *(a.value for a in args if isinstance(a, Num)))))
        if op == "neg" and isinstance(args[0], Num):
            return Num(value=0 - args[0].value)
    match op, args:
        case ("add" | "sub", (x, Num(value=0))) if not isinstance(x, Num):
            return x
        case _:
            return apply(op, *args)


def _logic(op: str, *args: Expr) -> Expr:
    """Truth constants have no text, so they go where they meet another condition."""
    match op, args:
        case "not", (Num(value=x),):
            return Num(value=1 - x)
        case ("and", (Num(value=x), y)) | ("and", (y, Num(value=x))):
            return y if x else Num(value=0)
        case ("or", (Num(value=x), y)) | ("or", (y, Num(value=x))):
            return Num(value=1) if x else y
        case "and" | "or", _:
            first, *others = dict.fromkeys(p for a in args for p in _joined(op, a))
            for other in others:
                first = apply(op, first, other)
            return first
        case _:
            return apply(op, *args)


def _joined(op: str, x: Expr) -> list[Expr]:
    """The conditions that `and`, or `or`, joins."""
    return [p for a in x.args for p in _joined(op, a)] if isinstance(x, Apply) and x.op == op else [x]


def select(condition: Expr, x: Expr, y: Expr) -> Expr:
    """`x` where the condition holds, `y` elsewhere."""
    if isinstance(condition, Num):
        return x if condition.value else y
    return apply("select", condition, x, y)


# --- functions that are no row by themselves --------------------------------------------------------------------


def _where(tracer: Tracer, condition: object, input: object, other: object) -> Proxy:
    c, x, y = (_operand(tracer, v, "where") for v in (condition, input, other))
    if c.kind != BOOL:
        raise refusal("trace-operation", "where takes a number as its condition", rule="a condition is a comparison")
    if x.kind == y.kind == BOOL:
        one, other = _logic("and", c.expr, x.expr), _logic("and", _logic("not", c.expr), y.expr)
        return Proxy(_logic("or", one, other), BOOL, tracer)
    x, y = x.as_number(), y.as_number()
    return Proxy(select(c.expr, x.expr, y.expr), INT if x.kind == y.kind == INT else FLOAT, tracer)


def _masked_fill(tracer: Tracer, x: object, mask: object, value: object) -> Proxy:
    filled = _operand(tracer, x, "masked_fill")
    # The value takes the dtype of what it fills.
    return _where(tracer, mask, _cast(tracer, _operand(tracer, value, "masked_fill"), filled.dtype), filled)


def _clamp(tracer: Tracer, x: object, min: object = None, max: object = None) -> Proxy:
    if min is not None and max is not None:
        return applied(tracer, "clamp", x, min, max)
    out = x if min is None else applied(tracer, "max", x, min)
    return _operand(tracer, out if max is None else applied(tracer, "min", out, max), "clamp")


def _scaled(op: str) -> Callable[..., Proxy]:
    def sum_(tracer: Tracer, x: object, other: object, *, alpha: float = 1) -> Proxy:
        return applied(tracer, op, x, other if alpha == 1 else applied(tracer, "mul", other, alpha))

    return sum_


def _rsub(tracer: Tracer, x: object, other: object, *, alpha: float = 1) -> Proxy:
    return _scaled("sub")(tracer, other, x, alpha=alpha)


def _div(tracer: Tracer, x: object, y: object, *, rounding_mode: str | None = None) -> Proxy:
    match rounding_mode:
        case "floor":
            return applied(tracer, "floordiv", x, y)
        case "trunc":
            return _whole(tracer, applied(tracer, "div", x, y))
        case _:
            return applied(tracer, "div", x, y)


def _whole(tracer: Tracer, x: object) -> Proxy:
    """Round towards 0."""
    value = _operand(tracer, x, "trunc").as_number()
    if value.kind == INT:
        return value
    # Below 0 the ceiling is the larger one; above, the second is 0.
    down, up = apply("floor", value.expr), apply("ceil", apply("min", value.expr, Num(value=0)))
    return Proxy(apply("max", down, up), INT, tracer)


def _xor(tracer: Tracer, x: object, y: object) -> Proxy:
    both = applied(tracer, "and", x, y)
    return applied(tracer, "and", applied(tracer, "or", x, y), applied(tracer, "not", both))


def _cast(tracer: Tracer, x: Proxy, dtype: object = None, *rest: object, **options: object) -> Proxy:
    wanted = options.get("dtype") or next((d for d in (dtype, *rest) if isinstance(d, torch.dtype)), None)
    if isinstance(dtype, torch.Tensor | Proxy):
        wanted = dtype.dtype
    match wanted:
        case None:
            return x
        case torch.bool:
            return x if x.kind == BOOL else applied(tracer, "ne", x, 0)
        case torch.int8 | torch.int16 | torch.int32 | torch.int64:
            return _whole(tracer, x)
        case torch.float32 | torch.float64:
            return Proxy(x.as_number().expr, FLOAT, tracer)
        case _:
            raise refusal(
                "trace-dtype",
                f"a traced value becomes {wanted}",
                rule="scores are computed in float32, float64 for inputs of float64; nothing rounds them on the way",
                hint=".to(torch.float32), or no cast at all",
            )


def _cast_to(dtype: torch.dtype) -> Callable[..., Proxy]:
    return lambda tracer, x: _cast(tracer, x, dtype)


def _made(value: float | None) -> Callable[..., Any]:
    """new_ones((), dtype=...) and its like, of no axes: the number that fills it."""

    def make(tracer: Tracer, like: Proxy, *args: Any, **options: Any) -> Any:
        sizes = options.get("size", args[0] if args else ())
        shaped = sizes not in ((), [], torch.Size(())) if value is not None or len(args) > 1 else False
        if shaped:
            raise refusal("trace-operation", f"a tensor of shape {sizes} is made", rule="traced values have no axes")
        filled = value if value is not None else options.get("fill_value", args[-1] if args else 0)
        out = tracer.lift(filled)
        dtype = options.get("dtype") or like.dtype
        return filled if out is None else _cast(tracer, out, dtype)

    return make


def _number(what: str) -> Callable[..., Any]:
    def refuse(tracer: Tracer, *args: object, **options: object) -> Any:
        raise refusal("trace-number", f".{what}() of a traced value", rule=NUMBER_RULE, hint=NUMBER_HINT)

    return refuse


def _composed(text: Callable[..., Proxy]) -> Callable[..., Proxy]:
    return lambda tracer, x, **options: text(lambda op, *args: applied(tracer, op, *args), x)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "where": _where,
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clamp_min": lambda tracer, x, min: _clamp(tracer, x, min=min),
    "clamp_max": lambda tracer, x, max: _clamp(tracer, x, max=max),
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": _rsub,
    "div": _div,
    "xor": _xor,
    "trunc": lambda tracer, x: Proxy(_whole(tracer, x).expr, FLOAT, tracer),
    "to": _cast,
    "type": _cast,
    "type_as": _cast,
    **{name: _cast_to(dtype) for name, dtype in _CASTS.items()},
    "square": _composed(lambda f, x: f("mul", x, x)),
    "reciprocal": _composed(lambda f, x: f("div", 1, x)),
    "new_ones": _made(1),
    "new_zeros": _made(0),
    "ones_like": _made(1),
    "zeros_like": _made(0),
    "new_tensor": _made(None),
    "new_full": _made(None),
    "full_like": _made(None),
    **{name: _number(name) for name in ("item", "tolist", "numpy")},
    **{name: lambda tracer, x, *args, **options: x for name in _SAME},
}


def _is_known(name: str) -> bool:
    short = _SYNONYMS.get(name, name)
    return short in rows() or short in _SPECIAL or _writes(name)


def _writes(name: str) -> bool:
    plain = name.removesuffix("_")
    in_place = name.endswith("_") and name != plain
    return in_place or name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior")


def _unknown(name: str) -> Any:
    raise refusal(
        "trace-operation",
        f"'{name}' is no operation of a cascade",
        rule="operations are those of the operator table, by their names in PyTorch",
        hint=nearest(name, sorted(n for n in rows() if hasattr(torch, n))),
    )
