"""Trace a callable on symbolic scalars: what it computes becomes expressions, what it captures becomes reads.

A proxy stands for one score or one index. Operators and functions of PyTorch that a proxy meets are looked up in the
operator table; tensors that the callable holds are read where a proxy indexes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import torch
from torch.overrides import TorchFunctionMode

from einsumcascade.codegen.trace_places import (
    WRITE_RULE,
    Place,
    callable_name,
    kind_name,
    place_at,
    place_of,
    refusal,
    user_frame,
    variable_name,
)
from einsumcascade.language.ir import Expr, Num, Read, Var

BOOL, INT, FLOAT = "bool", "int", "float"
NUMBER_RULE = "a traced value has no number yet: it stands for all of them"
NUMBER_HINT = "compute with PyTorch's functions"


@dataclass(slots=True, kw_only=True)
class Capture:
    """A tensor that a callable holds, the name it has there, and the name of its reads while tracing."""

    tensor: torch.Tensor
    name: str
    place: Place | None


@dataclass(eq=False)
class Tracer(TorchFunctionMode):
    """Run callables on proxies.

    Args:
        dtype: of a score, what the callable sees as `score.dtype`.
        device: what it sees as the device of every proxy.
    """

    dtype: torch.dtype
    device: torch.device
    captures: dict[str, Capture] = field(default_factory=dict)
    _known: dict[tuple[object, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def run(self, callable_: Callable[..., object], arguments: Mapping[str, str]) -> Proxy:
        """Call with proxies: rank variables as numbers, and the score, whose kind is "float".

        Raises: TraceError.
        """
        proxies = [
            Proxy(Read(tensor=name) if kind == FLOAT else Var(name=name), kind, self)
            for name, kind in arguments.items()
        ]
        with self:
            found = callable_(*proxies)
        out = self.lift(found)
        if out is None:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else kind_name(found)
            raise refusal(
                "trace-result",
                f"{callable_name(callable_)} returns {what}",
                rule="a callable returns one value: that of one score, or whether one key is seen",
                hint="index the tensor by b, h, q_idx or kv_idx" if isinstance(found, torch.Tensor) else "",
                place=place_of(callable_),
            )
        return out

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _holds_proxy((args, kwargs)):
            result = func(*args, **kwargs)
            # A number made on the way, as torch.tensor(0.5) is, is no input.
            made = isinstance(result, torch.Tensor) and result.dim() == 0 and not _holds((args, kwargs), torch.Tensor)
            return self.lift(result.item()) if made and result.device.type != "meta" else result
        from einsumcascade.codegen.tracing_ops import call

        return call(self, func, args, kwargs)

    # --- values -------------------------------------------------------------------------------------------------

    def lift(self, value: object) -> Proxy | None:
        """A number, a tensor of no axes or a proxy as a proxy; None for anything else."""
        match value:
            case Proxy():
                return value
            case bool():
                return Proxy(Num(value=int(value)), BOOL, self)
            case int():
                return Proxy(Num(value=value), INT, self)
            case float():
                if math.isnan(value):
                    raise refusal("trace-value", "the number is nan", rule="a cascade holds numbers and infinities")
                return Proxy(Num(value=value + 0.0), FLOAT, self)
            case torch.Tensor() if value.dim() == 0:
                found = self.read(value, ())
                return found if isinstance(found, Proxy) else None
            case _ if type(value).__module__ == "numpy" and not getattr(value, "shape", 0):
                number = getattr(value, "item", lambda: None)()
                return self.lift(number) if isinstance(number, bool | int | float) else None
            case _:
                return None

    def read(self, tensor: torch.Tensor, index: tuple[object, ...]) -> Any:
        """An element of a tensor that the callable holds, or its rows where indices are missing."""
        tensor, proxies = self._fixed(tensor, index)
        if len(proxies) < tensor.dim():
            return Rows(tensor, proxies, self)
        if tensor.dtype.is_complex:
            raise refusal(
                "trace-dtype", f"the tensor holds {tensor.dtype}", rule="a cascade computes on real and whole numbers"
            )
        name = self._name(tensor)
        element = Read(tensor=name, indices=tuple(p.expr for p in proxies))
        if tensor.dtype == torch.bool:
            from einsumcascade.language.ir import apply

            return Proxy(apply("ne", element, Num(value=0)), BOOL, self)
        return Proxy(element, FLOAT if tensor.is_floating_point() else INT, self)

    def _fixed(self, tensor: torch.Tensor, index: tuple[object, ...]) -> tuple[torch.Tensor, tuple[Proxy, ...]]:
        """Apply the indices that are numbers to the tensor itself; the others are proxies."""
        proxies: list[Proxy] = []
        at = 0
        if len([i for i in index if i is not Ellipsis]) > tensor.dim():
            raise refusal(
                "trace-index",
                f"{len(index)} indices for a tensor of shape {tuple(tensor.shape)}",
                rule="a tensor has one index for each axis",
            )
        for i in index:
            if isinstance(i, bool | slice | list | tuple) or i is None or (i is Ellipsis and i is not index[-1]):
                raise refusal(
                    "trace-index",
                    f"a captured tensor is indexed by {'...' if i is Ellipsis else kind_name(i)}",
                    rule="each index is b, h, q_idx, kv_idx, a number, or what is computed from them",
                    hint="take slices of the tensor before the callable does",
                )
            if i is Ellipsis:
                continue
            if isinstance(i, int):
                try:
                    tensor = tensor.select(at, i)
                except IndexError as error:
                    raise refusal("trace-index", str(error), rule="an index is within its axis") from None
                continue
            one = self.lift(i)
            if one is None or one.kind == FLOAT:
                what = "a number that is not whole" if one is not None else kind_name(i)
                raise refusal(
                    "trace-index",
                    f"a captured tensor is indexed by {what}",
                    rule="each index is a whole number",
                    hint=".to(torch.long) rounds towards 0",
                )
            proxies.append(one.as_number())
            at += 1
        return tensor, tuple(proxies)

    def _name(self, tensor: torch.Tensor) -> str:
        """The name of a capture while tracing: one tensor has one, whatever indexes it."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._known:
            frame = user_frame()
            self._known[key] = name = f"capture {len(self.captures)}"
            self.captures[name] = Capture(
                tensor=tensor, name=variable_name(tensor, frame) if frame else "", place=place_at(frame)
            )
        return self._known[key]


class Proxy:
    """One value of the callable: an expression and its kind, truth, whole number or real number."""

    __slots__ = ("expr", "kind", "tracer")
    __hash__ = object.__hash__

    def __init__(self, expr: Expr, kind: str, tracer: Tracer) -> None:
        self.expr, self.kind, self.tracer = expr, kind, tracer

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from einsumcascade.codegen.tracing_ops import call

        found = _first_proxy((args, kwargs or {}))
        assert found is not None
        return call(found.tracer, func, args, kwargs or {})

    def as_number(self) -> Proxy:
        """Truth as 1 or 0."""
        if self.kind != BOOL:
            return self
        from einsumcascade.codegen.tracing_ops import select

        return Proxy(select(self.expr, Num(value=1), Num(value=0)), INT, self.tracer)

    # What a callable may ask of a tensor.
    shape = torch.Size(())
    ndim = 0
    requires_grad = False
    is_cuda = property(lambda self: self.tracer.device.type == "cuda")
    device = property(lambda self: self.tracer.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the value would have."""
        return {BOOL: torch.bool, INT: torch.int64, FLOAT: self.tracer.dtype}[self.kind]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        from einsumcascade.codegen.tracing_ops import method

        return method(self.tracer, name, self)

    def __getitem__(self, index: object) -> Self:
        if index is Ellipsis or index == ():
            return self
        raise refusal("trace-index", "a traced value is indexed", rule="a score or an index is one number")

    def __setitem__(self, index: object, value: object) -> NoReturn:
        raise refusal("trace-write", "a traced value is written to", rule=WRITE_RULE)

    def _branch(self) -> NoReturn:
        raise refusal(
            "trace-branch",
            "the callable branches on a traced value",
            rule="if, while, and, or, not, min, max and chained comparisons need one answer for all points",
            hint="torch.where(condition, x, y); &, | and ~ for conditions; torch.minimum and torch.maximum",
        )

    def _convert(self, what: str) -> NoReturn:
        raise refusal("trace-number", f"{what} of a traced value", rule=NUMBER_RULE, hint=NUMBER_HINT)

    def __bool__(self) -> bool:
        self._branch()

    def __int__(self) -> int:
        self._convert("int()")

    def __float__(self) -> float:
        self._convert("float()")

    def __index__(self) -> int:
        self._convert("a Python index")

    def __complex__(self) -> complex:
        self._convert("complex()")

    def __round__(self, digits: int = 0) -> NoReturn:
        self._convert("round()")

    def __len__(self) -> int:
        self._convert("len()")

    def __iter__(self) -> Any:
        self._convert("iteration")

    def __array__(self, *arguments: object) -> NoReturn:
        self._convert("a NumPy array")

    def __pos__(self) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<traced {self.expr}>"


def _operator(name: str, *, swapped: bool = False) -> Callable[..., Any]:
    def operate(self: Proxy, *other: object) -> Any:
        from einsumcascade.codegen.tracing_ops import call_named

        return call_named(self.tracer, name, (*other, self) if swapped else (self, *other), {})

    return operate


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(Proxy, f"__{_name}__", _operator(_name))
    setattr(Proxy, f"__r{_name}__", _operator(_name, swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "invert", "matmul"):
    setattr(Proxy, f"__{_name}__", _operator(_name))


@dataclass(frozen=True, slots=True)
class Rows:
    """A captured tensor with some of its first indices: it is read once all are there."""

    tensor: torch.Tensor
    index: tuple[Proxy, ...]
    tracer: Tracer

    def __getitem__(self, index: object) -> Any:
        return self.tracer.read(self.tensor, (*self.index, *(index if isinstance(index, tuple) else (index,))))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raise the error of rows used as a value."""
        left = tuple(self.tensor.shape[len(self.index) :])
        raise refusal(
            "trace-index",
            f"rows of shape {left} of a captured tensor are used as a value",
            rule="a tensor has one index for each axis",
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from einsumcascade.codegen.tracing_ops import call

        found = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Rows))
        return call(found.tracer, func, args, kwargs or {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "lt", "le", "gt", "ge", "neg"):
    setattr(Rows, f"__{_name}__", lambda self, *other: self.refuse())
    setattr(Rows, f"__r{_name}__", lambda self, *other: self.refuse())


def _first_proxy(value: object) -> Proxy | None:
    match value:
        case Proxy():
            return value
        case tuple() | list():
            return next((p for x in value if (p := _first_proxy(x)) is not None), None)
        case dict():
            return _first_proxy(list(value.values()))
        case _:
            return None


def _holds_proxy(value: object) -> bool:
    return _holds(value, Proxy | Rows)


def _holds(value: object, kind: Any) -> bool:
    match value:
        case tuple() | list():
            return any(_holds(x, kind) for x in value)
        case dict():
            return any(_holds(x, kind) for x in value.values())
        case _:
            return isinstance(value, kind)
