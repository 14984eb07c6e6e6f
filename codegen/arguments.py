"""The tensors of a call: in the order of the inputs, as autocast casts them, and what transforms of torch.func want."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from einsumcascade.codegen.autograd import underivable
from einsumcascade.errors import InputError, nearest
from einsumcascade.language.ir import Cascade


def in_order(
    cascade: Cascade, tensors: Sequence[torch.Tensor], named: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Lay tensors given by position and by name in the order of the inputs.

    Raises: InputError: `too-many-inputs`, `unknown-input`, `repeated-input`, `missing-input`.
    """
    names = [i.tensor for i in cascade.inputs]
    signature = f"({', '.join(names)})"
    if len(tensors) > len(names):
        raise InputError.of(
            "too-many-inputs", f"{len(tensors)} tensors for {len(names)} inputs", rule=f"the inputs are {signature}"
        )
    out: dict[str, torch.Tensor] = dict(zip(names, tensors, strict=False))
    for name, t in named.items():
        if name not in names:
            raise InputError.of(
                "unknown-input",
                f"the cascade has no input '{name}'",
                rule=f"the inputs are {signature}",
                hint=nearest(name, names),
            )
        if name in out:
            raise InputError.of(
                "repeated-input", f"{name} is given by position and by name", rule=f"the inputs are {signature}"
            )
        out[name] = t
    missing = [n for n in names if n not in out]
    if missing:
        raise InputError.of("missing-input", f"{', '.join(missing)} not given", rule=f"the inputs are {signature}")
    return [out[n] for n in names]


def cast_by_autocast(ordered: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Cast as autocast does: floating-point tensors but float64; those of fewer than two axes may stay float32."""
    return [
        t.to(dtype)
        if t.is_floating_point() and t.dtype != torch.float64 and (t.dim() > 1 or t.dtype != torch.float32)
        else t
        for t in ordered
    ]


def refuse_tangents(cascade: Cascade, ordered: Sequence[torch.Tensor]) -> None:
    """Refuse a call that derivatives in forward mode pass through.

    Raises: LoweringError: a transform wants them, or a tensor has one.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    transformed = any(i.key() == torch._C._functorch.TransformType.Jvp for i in stack)
    if transformed or any(_tangent(t) is not None for t in ordered):
        raise underivable(cascade.name, "the derivative in forward mode")


def _tangent(t: torch.Tensor) -> torch.Tensor | None:
    dual: Any = forward_ad.unpack_dual(t)  # type: ignore[no-untyped-call]
    tangent: torch.Tensor | None = dual.tangent
    return tangent


def wants_gradient(t: torch.Tensor) -> bool:
    """Whether a tensor requires a gradient, at any level of the transforms around a call."""
    while not t.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad
