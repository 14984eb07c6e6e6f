"""What candidates of the tuner are tried on: inputs to time, and slices of them that the reference can compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from einsumcascade.codegen.dtypes import output_dtype, selectors, value_dtype
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.errors import InputError
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.rewrites.differentiate import Gradient
from einsumcascade.verify.verify import index_ranks, random_inputs

# Points of the largest Einsum that the reference is asked to compute, 9 times, in a few seconds.
_POINTS = 1 << 28
# Lengths it gets: three of the largest tiles, and more where a constant of the text may be a window.
_LENGTH, _WIDEST, _SHORTEST = 768, 2048, 64


def drawn(cascade: Cascade, binding: Binding, dtype: str, seed: int, *, real: bool) -> dict[str, torch.Tensor]:
    """Random inputs; where nothing is run, tensors of the same layout that take no memory.

    Statistics of a row that a forward has saved are float32, as it saves them.
    """
    features = set(feature_ranks(cascade))
    rows = {i.tensor for i in cascade.inputs if i.is_saved and not features & set(map(rank_of, i.indices))}
    if real:
        found = random_inputs(cascade, binding, dtype, seed=seed)
        return {n: t.float() if n in rows else t for n, t in found.items()}
    whole = selectors(cascade)
    found = {}
    for i in cascade.inputs:
        own = "int32" if i.tensor in whole else "float32" if i.tensor in rows else dtype
        shape = [binding.extents[rank_of(v)] for v in i.indices]
        found[i.tensor] = torch.empty(shape, dtype=getattr(torch, own), device="meta")
    return found


def of_backward(gradient: Gradient, inputs: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """What a backward reads at the extents of some inputs of the forward.

    Returns: the inputs as they are, random numbers for what outputs receive, on the device of the inputs, and for what
        is saved tensors without memory, since a forward has to compute it.
    """
    extents = bind(gradient.original, shapes={n: tuple(t.shape) for n, t in inputs.items()}).extents
    outputs = {o.tensor: o for o in gradient.forward.outputs}
    of = {d: o for o, d in gradient.received.items()}
    main = value_dtype(inputs.values())
    device = next(iter(inputs.values())).device
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i in gradient.backward.inputs:
        if i.tensor in inputs:
            found[i.tensor] = inputs[i.tensor]
            continue
        shape = [extents[rank_of(v)] for v in i.indices]
        own = output_dtype(outputs[of.get(i.tensor, i.tensor)], main)
        is_drawn = i.tensor in of and device.type != "meta"
        value = torch.randn(shape, generator=generator) if is_drawn else torch.empty(shape, device="meta")
        found[i.tensor] = value.to(own)
    return found


def cut_down(cascade: Cascade, inputs: Mapping[str, torch.Tensor], binding: Binding) -> dict[str, torch.Tensor]:
    """Slices of the inputs that the dense reference can compute: few heads, and lengths that end in half a tile.

    Ranks that positions of another tensor point into keep their extent, and so do feature ranks and those that the
    text defines. Machine code is the same for all lengths, so what is right here is right there.
    """
    pointed = set(index_ranks(cascade).values())
    fixed = {*feature_ranks(cascade), *(rank_of(d.name) for d in cascade.ranks), *pointed}
    reduced = {rank_of(v) for e in cascade.einsums for v in e.ranks}
    long = {rank_of(i.indices[-2]) for i in cascade.inputs if len(i.indices) > 1} | reduced
    extents = {rank_of(v): binding.extents[rank_of(v)] for i in cascade.inputs for v in i.indices}
    # A window must be narrower than what it slides over.
    window = max((int(x) for x in binding.constants.values() if math.isfinite(x) and x < _WIDEST), default=0)
    for batch, length in _cuts(max(_LENGTH, window * 3 // 2)):
        most = {r: n if r in fixed else length - 3 if r in long else batch for r, n in extents.items()}
        sliced = {
            i.tensor: inputs[i.tensor][tuple(slice(0, most[rank_of(v)]) for v in i.indices)].cpu().clone()
            for i in cascade.inputs
        }
        try:
            bound = bind(cascade, shapes={n: tuple(t.shape) for n, t in sliced.items()})
        except InputError:
            # Lengths that hang together, as a multiple of another, are not cut.
            break
        points = [math.prod(bound.extents.get(rank_of(v), 1) for v in e.space) for e in cascade.einsums]
        if max(points, default=1) <= _POINTS:
            return sliced
    return {n: t.cpu() for n, t in inputs.items()}


def _cuts(length: int) -> Iterator[tuple[int, int]]:
    """Extents of batches and lengths to try, the largest first."""
    yield 2, length
    while length >= _SHORTEST:
        yield 1, length
        length //= 2
