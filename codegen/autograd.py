"""Gradients of an op: the pair of runners behind a call that records gradients, and how PyTorch comes to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from einsumcascade.codegen.ops import choices_of, define, outputs_like, registered, with_batch
from einsumcascade.codegen.programs import program_of
from einsumcascade.codegen.runner import Runner, Tensors
from einsumcascade.errors import InputError, LoweringError
from einsumcascade.language.ir import Cascade
from einsumcascade.rewrites.differentiate import Gradient, differentiable, differentiate
from einsumcascade.schedules.parts import parts_of, with_shared
from einsumcascade.schedules.schedule import Schedule


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """The forward that saves and the backward, for gradients in some inputs.

    Args:
        gradient: the two cascades.
        forward, backward: what runs them on plain tensors.
    """

    gradient: Gradient
    forward: Runner
    backward: Runner

    @staticmethod
    def of(cascade: Cascade, wrt: tuple[str, ...], precision: str | None, schedule: Schedule | None = None) -> Pair:
        """Differentiate a cascade with respect to those of `wrt` that a gradient reaches.

        Args:
            schedule: of the op: `parts_of` says which of its choices are for which program.

        Raises: LoweringError: a construct has no gradient yet.
        """
        gradient = _gradient(cascade, cascade.name, wrt)
        given = frozenset(gradient.received.values()) | set(gradient.saved)
        parts = parts_of(schedule, cascade.name)
        forward = parts.forward
        if parts.shared:
            forward = with_shared(parts, program_of(gradient.forward, {}, forward))
        return Pair(
            gradient=gradient,
            forward=Runner(cascade=gradient.forward, precision=precision, schedule=forward, alike=cascade),
            backward=Runner(cascade=gradient.backward, precision=precision, wide=given, schedule=parts.backward),
        )

    @property
    def count(self) -> int:
        """The number of outputs that a caller sees."""
        return len(self.gradient.original.outputs)

    @cached_property
    def still(self) -> tuple[int, ...]:
        """The outputs of the forward that no gradient comes back from: those it saves, and those no input reaches."""
        names = [o.tensor for o in self.gradient.forward.outputs]
        return tuple(n for n, o in enumerate(names) if n >= self.count or o not in self.gradient.received)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where among inputs and outputs the backward finds what it needs beside what the outputs receive."""
        names = [i.tensor for i in self.gradient.original.inputs]
        found = {o.tensor: n for n, o in enumerate(self.gradient.forward.outputs, len(names))}
        found |= {t: n for n, t in enumerate(names)}
        return tuple(found[i.tensor] for i in self.gradient.backward.inputs if i.tensor in found)

    def kept(self, inputs: Sequence[torch.Tensor], outputs: Tensors) -> Tensors:
        """What the backward needs beside what the outputs receive, in its order."""
        known = [*inputs, *outputs]
        return tuple([known[n] for n in self.places])

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


def reached(cascade: Cascade) -> tuple[str, ...]:
    """The inputs that have a gradient.

    Raises: InputError: `no-gradient`: none has.
    """
    found = differentiable(cascade)
    if not found:
        raise InputError.of(
            "no-gradient",
            f"no gradient reaches an input of {cascade.name}",
            rule="a gradient goes to inputs whose values reach an output; indices and conditions pass none",
        )
    return found


@lru_cache(maxsize=256)
def _gradient(cascade: Cascade, name: str, wrt: tuple[str, ...]) -> Gradient:
    # Cascades are equal whatever they are called, but their kernels are not.
    assert name == cascade.name
    reached = set(differentiable(cascade))
    return differentiate(cascade, wrt=tuple(t for t in wrt if t in reached))


def _operator(runner: Runner) -> Callable[..., Any]:
    return registered(runner.cascade, precision=runner.precision, schedule=runner.schedule, wide=runner.wide)


def _computed(runner: Runner, tensors: Sequence[torch.Tensor]) -> Tensors:
    """Run on plain tensors; those of a transform go to the operator, which the transform takes apart."""
    if not torch._C._are_functorch_transforms_active():
        return runner(tensors)
    found = _operator(runner)(*tensors)
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def underivable(name: str, what: str) -> LoweringError:
    """The error of a derivative that is not derived."""
    return LoweringError.of(
        "first-derivatives-only",
        f"{name}: {what} is not derived",
        rule="an op has first derivatives, in reverse mode",
        hint="`run_plain` of einsumcascade.codegen.plain computes any cascade in plain PyTorch, which has all",
    )


class _Recorded(torch.autograd.Function):
    """One call under transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pair: Pair, *tensors: torch.Tensor) -> Tensors:
        return _computed(pair.forward, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensors) -> None:
        pair, *tensors = inputs
        ctx.pair = pair
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.like = [(t.shape, t.dtype, t.device) for t in output[: pair.count]]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*pair.kept(tensors, output))
        ctx.mark_non_differentiable(*[output[n] for n in pair.still])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        pair: Pair = ctx.pair
        given = pair.given(ctx.saved_tensors, pair.received(grads[: pair.count], ctx.like))
        if torch.is_grad_enabled():
            found: Tensors = _Backward.apply(pair, *given)  # type: ignore[no-untyped-call]
        else:
            found = _computed(pair.backward, given)
        return None, *pair.handed(found, ctx.dtypes)


class _Eager(torch.autograd.Function):
    """One call in eager mode. With a `setup_context` of its own, PyTorch would inspect signatures at every call."""

    @staticmethod
    def forward(ctx: Any, pair: Pair, *tensors: torch.Tensor) -> Tensors:
        output = pair.forward(tensors)
        _Recorded.setup_context(ctx, (pair, *tensors), output)
        return output

    backward = _Recorded.backward


class _Backward(torch.autograd.Function):
    """The backward where a gradient of it may be asked for, which there is none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pair: Pair, *given: torch.Tensor) -> Tensors:
        return _computed(pair.backward, given)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensors) -> None:
        ctx.name = inputs[0].gradient.original.name

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise underivable(ctx.name, "the gradient of a gradient")


def recorded(pair: Pair, tensors: Sequence[torch.Tensor]) -> torch.Tensor | Tensors:
    """Run a call in eager mode, or under transforms, and record its gradient."""
    function = _Recorded if torch._C._are_functorch_transforms_active() else _Eager
    found: Tensors = function.apply(pair, *tensors)  # type: ignore[no-untyped-call]
    return found[0] if pair.count == 1 else found[: pair.count]


def library(
    cascade: Cascade, *, precision: str | None, schedule: Schedule | None, pair: Callable[[tuple[str, ...]], Pair]
) -> Callable[..., Any]:
    """The operator of torch.library that traced calls which record gradients go through.

    Its last argument names the inputs that require one, so that nothing is differentiated before a call wants it.

    Args:
        cascade: what it computes. precision, schedule: what else tells two ops apart.
        pair: finds the runners for gradients in some inputs.

    Returns: an operator of the inputs and a text; its first outputs are those of the cascade.
    """
    choices = choices_of(precision, schedule)
    arguments = ", ".join(f"Tensor t{n}" for n in range(len(cascade.inputs)))

    def of(wrt: str) -> Pair:
        return pair(tuple(wrt.split(",")))

    def forward(*given: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(of(given[-1]).forward(given[:-1]))

    def shapes(*given: Any) -> list[torch.Tensor]:
        return outputs_like(of(given[-1]).gradient.forward, given[:-1])

    def batched(info: Any, axes: tuple[int | None, ...], *given: Any) -> Any:
        return _batched(of(given[-1]).forward, axes[:-1], given[:-1])

    def backward(given: list[torch.Tensor], wrt: str) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(of(wrt).backward(given))

    def back_shapes(given: list[torch.Tensor], wrt: str) -> list[torch.Tensor]:
        return outputs_like(of(wrt).gradient.backward, tuple(given))

    def back_batched(info: Any, axes: Any, given: list[torch.Tensor], wrt: str) -> Any:
        return _batched(of(wrt).backward, tuple(axes[0]), tuple(given))

    first: Any = define(
        cascade, f"{choices}\nrecorded", f"({arguments}, str wrt) -> Tensor[]", forward, shapes, batched
    )
    second: Any = define(
        cascade, f"{choices}\nbackward", "(Tensor[] given, str wrt) -> Tensor[]", backward, back_shapes, back_batched
    )

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

    def refuse(ctx: Any, grads: Any) -> Any:
        raise underivable(cascade.name, "the gradient of a gradient")

    first.register_autograd(back, setup_context=setup)
    second.register_autograd(refuse)
    op: Callable[..., Any] = first
    return op


def _batched(runner: Runner, axes: tuple[int | None, ...], tensors: tuple[torch.Tensor, ...]) -> Any:
    more, given, out = with_batch(runner.cascade, axes, tensors)
    found = registered(more, precision=runner.precision, schedule=runner.schedule, wide=runner.wide)(*given)
    outputs = [found] if isinstance(found, torch.Tensor) else list(found)
    return outputs, list(out)
