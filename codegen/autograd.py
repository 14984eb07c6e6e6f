"""Gradients of an op: the pair of ops behind a call that records gradients, and how PyTorch comes to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from einsumcascade.codegen.ops import define, outputs_like
from einsumcascade.language.ir import Cascade
from einsumcascade.rewrites.differentiate import Gradient

if TYPE_CHECKING:
    from einsumcascade.codegen.op import Op

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """The forward that saves and the backward, for gradients in some inputs.

    Args:
        gradient: the two cascades.
        forward, backward: their ops.
    """

    gradient: Gradient
    forward: Op
    backward: Op

    @property
    def count(self) -> int:
        """The number of outputs that a caller sees."""
        return len(self.gradient.original.outputs)

    def kept(self, inputs: Tensors, outputs: Tensors) -> Tensors:
        """What the backward needs beside what the outputs receive, in its order."""
        known = dict(zip((o.tensor for o in self.gradient.forward.outputs), outputs, strict=True))
        known |= dict(zip((i.tensor for i in self.gradient.original.inputs), inputs, strict=True))
        return tuple(known[i.tensor] for i in self.gradient.backward.inputs if i.tensor in known)

    def given(self, kept: Tensors, received: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The inputs of the backward in its order."""
        names = {self.gradient.received[o]: t for o, t in received.items() if o in self.gradient.received}
        rest = iter(kept)
        return [names[i.tensor] if i.tensor in names else next(rest) for i in self.gradient.backward.inputs]

    def handed(self, found: Tensors, dtypes: list[torch.dtype]) -> list[torch.Tensor | None]:
        """The gradient of each input of the original, in its dtype."""
        by_name = dict(zip(self.gradient.backward.output_names, found, strict=True))
        out: list[torch.Tensor | None] = []
        for i, dtype in zip(self.gradient.original.inputs, dtypes, strict=True):
            name = self.gradient.gradients.get(i.tensor)
            out.append(None if name is None else by_name[name].to(dtype))
        return out

    def received(self, grads: tuple[torch.Tensor | None, ...], like: list[tuple[Any, ...]]) -> dict[str, torch.Tensor]:
        """What each output receives; nothing is a zero that takes no memory."""
        out = {}
        for o, g, (shape, dtype, device) in zip(self.gradient.original.output_names, grads, like, strict=True):
            out[o] = torch.zeros((), dtype=dtype, device=device).expand(shape) if g is None else g
        return out


class _Recorded(torch.autograd.Function):
    """One call in eager mode."""

    @staticmethod
    def forward(ctx: Any, pair: Pair, *tensors: torch.Tensor) -> Any:
        outputs = pair.forward._run(list(tensors))
        ctx.pair = pair
        ctx.dtypes = [t.dtype for t in tensors]
        seen = outputs[: pair.count]
        ctx.like = [(t.shape, t.dtype, t.device) for t in seen]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*pair.kept(tensors, outputs))
        names = pair.gradient.original.output_names
        still = [t for o, t in zip(names, seen, strict=True) if o not in pair.gradient.received]
        ctx.mark_non_differentiable(*still)
        return seen[0] if len(seen) == 1 else seen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        pair: Pair = ctx.pair
        given = pair.given(ctx.saved_tensors, pair.received(grads, ctx.like))
        return None, *pair.handed(pair.backward._run(given), ctx.dtypes)


def recorded(pair: Pair, tensors: list[torch.Tensor]) -> torch.Tensor | Tensors:
    """Run a call in eager mode and record its gradient."""
    result: torch.Tensor | Tensors = _Recorded.apply(pair, *tensors)  # type: ignore[no-untyped-call]
    return result


def library(cascade: Cascade, *, choices: str, pair: Callable[[tuple[str, ...]], Pair]) -> Callable[..., Any]:
    """The operator of torch.library that traced calls which record gradients go through.

    Its last argument names the inputs that require one, so that nothing is differentiated before a call wants it.

    Args:
        cascade: what it computes. choices: text of what else tells two ops apart.
        pair: finds the ops for gradients in some inputs.

    Returns: an operator of the inputs and a text; its first outputs are those of the cascade.
    """
    count = len(cascade.inputs)
    arguments = ", ".join(f"Tensor t{n}" for n in range(count))

    def of(wrt: str) -> Pair:
        return pair(tuple(wrt.split(",")))

    def forward(*given: Any) -> list[torch.Tensor]:
        return list(of(given[-1]).forward._run(list(given[:-1])))

    def shapes(*given: Any) -> list[torch.Tensor]:
        return outputs_like(of(given[-1]).gradient.forward, given[:-1])

    def backward(given: list[torch.Tensor], wrt: str) -> list[torch.Tensor]:
        return list(of(wrt).backward._run(given))

    def back_shapes(given: list[torch.Tensor], wrt: str) -> list[torch.Tensor]:
        return outputs_like(of(wrt).gradient.backward, tuple(given))

    first: Any = define(cascade, f"{choices}\nrecorded", f"({arguments}, str wrt) -> Tensor[]", forward, shapes)
    second = define(cascade, f"{choices}\nbackward", "(Tensor[] given, str wrt) -> Tensor[]", backward, back_shapes)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
        tensors, wrt = inputs[:-1], inputs[-1]
        ctx.wrt = wrt
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.like = [(t.shape, t.dtype, t.device) for t in output[: len(cascade.outputs)]]
        ctx.save_for_backward(*of(wrt).kept(tensors, tuple(output)))

    def back(ctx: Any, grads: list[torch.Tensor | None]) -> Any:
        p = of(ctx.wrt)
        given = p.given(ctx.saved_tensors, p.received(tuple(grads[: p.count]), ctx.like))
        return *p.handed(tuple(second(given, ctx.wrt)), ctx.dtypes), None

    first.register_autograd(back, setup_context=setup)
    op: Callable[..., Any] = first
    return op
