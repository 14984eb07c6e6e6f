"""Judge the kernels of a gradient: the backward cascade is a cascade like any other, and is judged like one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch

from einsumcascade.codegen.dtypes import output_dtype
from einsumcascade.errors import LoweringError
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.differentiate import Gradient, differentiable, differentiate
from einsumcascade.schedules.parts import parts_of
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.verify.judging import Row, judged


def backward_inputs(
    gradient: Gradient, inputs: Mapping[str, torch.Tensor], dtype: str, *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """What the backward cascade reads: inputs, what the forward saves, and what each output receives.

    The forward is run by the reference and rounded as its outputs are; what outputs receive is standard normal.
    """
    arrays = {n: t.double().numpy() if t.is_floating_point() else t.numpy() for n, t in inputs.items()}
    forward, main = run(gradient.forward, arrays), getattr(torch, dtype)
    outputs = {o.tensor: o for o in gradient.forward.outputs}
    generator = torch.Generator().manual_seed(seed)
    of = {d: o for o, d in gradient.received.items()}
    found: dict[str, torch.Tensor] = {}
    for i in gradient.backward.inputs:
        if i.tensor in inputs:
            found[i.tensor] = inputs[i.tensor]
            continue
        name = of.get(i.tensor, i.tensor)
        # A culled point of an output has no value in the reference, and 0 in what an op returns.
        value = torch.as_tensor(np.nan_to_num(forward[name], nan=0.0, posinf=np.inf, neginf=-np.inf))
        if i.tensor in of:
            value = torch.randn(value.shape, generator=generator)
        found[i.tensor] = value.to(output_dtype(outputs[name], main))
    return found


def judged_gradient(
    cascade: Cascade,
    inputs: Mapping[str, torch.Tensor],
    dtype: str,
    *,
    seed: int,
    counts: Collection[str] = (),
    schedule: Schedule | None = None,
) -> list[Row] | str:
    """Run the kernels of the gradient of a cascade and judge what each input receives.

    Args:
        schedule: of an op of the cascade; what it says of the backward is used.

    Returns: a row for each gradient, or why there are none: no input has one, or a construct has no gradient, or no
        lowering of it, yet.
    """
    wrt = tuple(n for n in differentiable(cascade) if inputs[n].is_floating_point())
    if not wrt:
        return "no gradient reaches an input"
    try:
        gradient = differentiate(cascade, wrt=wrt)
        given = backward_inputs(gradient, inputs, dtype, seed=seed)
        binding = bind(gradient.backward, shapes={n: tuple(t.shape) for n, t in given.items()})
        own = [n for n in counts if n in given]
        chosen = parts_of(schedule, cascade.name).backward
        return judged(gradient.backward, given, binding, dtype, seed=seed, counts=own, schedule=chosen)
    except LoweringError as error:
        return error.diagnostics[0].headline
