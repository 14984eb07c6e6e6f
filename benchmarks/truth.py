"""The float64 truth of a case, what rounding alone does to it, and the verdict on a result.

    error <= 2 * E_plain + 4 * E_cond        largest element and root mean square, for each output and gradient

E_plain is the error of the plain formula in the dtype of the case, E_cond the largest change of the float64 result when
every input is rounded anew, over several draws. Every element of a result is judged; the two errors that make its bound
are measured on some of the heads, which can only make the bound smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from einsumcascade.benchmarks.variants import Shape, Tensors, Variant

ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
DRAWS = 8
OUT = "out"
# Elements of a matrix of scores that are held at once, and heads that the bounds are measured on.
SCORES = 1 << 26
HEADS = 4
# Elements of a result that are judged at once.
JUDGED = 1 << 24

Place = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The largest error allowed of an element, and the largest root mean square, with what they are made of."""

    max: float
    rms: float
    plain_max: float
    cond_max: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The errors of one output or gradient beside their bounds."""

    max_error: float
    max_bound: float
    rms_error: float
    rms_bound: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within their bounds; NaN is not."""
        return self.max_error <= self.max_bound and self.rms_error <= self.rms_bound

    @property
    def share(self) -> float:
        """The larger of the errors as a share of its bound; NaN where an element is NaN."""
        pairs = ((self.max_error, self.max_bound), (self.rms_error, self.rms_bound))
        shares = [e / b if b else (0.0 if e == 0 else math.inf) if e == e else math.nan for e, b in pairs]
        return math.nan if any(s != s for s in shares) else max(shares)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The float64 results of a case by name, `out` and the inputs whose gradients they are, and their bounds."""

    axes: Mapping[str, str]
    results: Tensors
    bounds: Mapping[str, Bound]

    def judge(self, found: Tensors) -> dict[str, Verdict]:
        """Judge every element of every result."""
        return {name: self._verdict(name, found[name]) for name in self.results}

    def _verdict(self, name: str, got: Tensor) -> Verdict:
        want = self.results[name]
        assert got.shape == want.shape, (name, got.shape, want.shape)
        # Some elements at a time, so that no second float64 tensor of this size is held; the device is waited for once.
        got, want = got.reshape(-1), want.reshape(-1)
        found = [
            torch.stack((d.abs().max(), d.square().sum()))
            for g, w in zip(torch.split(got, JUDGED), torch.split(want, JUDGED), strict=True)
            if len(g)
            for d in [g.double() - w]
        ]
        parts = torch.stack(found) if found else want.new_zeros(1, 2)
        # A maximum of PyTorch, unlike that of Python, does not lose a NaN.
        largest, squares = torch.stack((parts[:, 0].max(), parts[:, 1].sum())).tolist()
        bound = self.bounds[name]
        rms = math.sqrt(squares / max(want.numel(), 1))
        return Verdict(max_error=largest, max_bound=bound.max, rms_error=rms, rms_bound=bound.rms)


def truth_of(variant: Variant, shape: Shape, x: Tensors, received: Tensor | None, *, draws: int = DRAWS) -> Truth:
    """Compute the float64 results and their bounds.

    Args:
        x: the inputs, in the dtype of the case.
        received: what the output receives; None where no gradient is wanted.

    Cost: the scores of all heads once in float64, those of `HEADS` heads `draws` + 2 times more.
    """
    results = evaluate(variant, shape, x, received, places(variant, shape), torch.float64)
    some = sample(variant, shape, gradients=received is not None)
    exact = evaluate(variant, shape, x, received, some, torch.float64)
    plain = evaluate(variant, shape, x, received, some, x["Q"].dtype)
    held = evaluate(variant, shape, x, received, some, None)
    count = {name: int(t.sum().item()) for name, t in held.items()}
    axes = {OUT: variant.out, **{n: variant.inputs[n] for n in results if n != OUT}}
    generator = torch.Generator(x["Q"].device).manual_seed(1)
    moved: dict[str, list[tuple[float, float]]] = {name: [] for name in results}
    for _ in range(draws):
        given = {n: _moved(t, generator) for n, t in x.items()}
        back = None if received is None else _moved(received, generator)
        changed = evaluate(variant, shape, given, back, some, torch.float64)
        for name, t in changed.items():
            moved[name].append(_sizes(t - exact[name], count[name]))
    bounds = {}
    for name in results:
        plain_max, plain_rms = _sizes(plain[name].double() - exact[name], count[name])
        cond_max, cond_rms = (max(column) for column in zip(*moved[name], strict=True))
        bounds[name] = Bound(
            max=2 * plain_max + 4 * cond_max,
            rms=2 * plain_rms + 4 * cond_rms,
            plain_max=plain_max,
            cond_max=cond_max,
        )
    return Truth(axes=axes, results=results, bounds=bounds)


def _moved(t: Tensor, generator: torch.Generator) -> Tensor:
    """Multiply each element by 1 plus or minus the roundoff of its dtype."""
    if not t.is_floating_point():
        return t
    sign = torch.randint(0, 2, t.shape, generator=generator, device=t.device, dtype=torch.int8) * 2 - 1
    return t.double() * (1 + ROUNDOFF[t.dtype] * sign.double())


def _sizes(difference: Tensor, count: int) -> tuple[float, float]:
    """The largest element, and the root mean square over the elements that were computed; the others are 0."""
    return difference.abs().max().item(), math.sqrt(difference.square().sum().item() / max(count, 1))


def places(variant: Variant, shape: Shape, limits: Place | None = None) -> list[dict[str, int]]:
    """The heads and batches of a case, or those below some limits."""
    outer = [a for a in variant.out if a not in "pf"]
    ranges = [range(min(shape.extent(a), (limits or {}).get(a, shape.extent(a)))) for a in outer]
    return [dict(zip(outer, at, strict=True)) for at in product(*ranges)]


def sample(variant: Variant, shape: Shape, *, gradients: bool) -> list[dict[str, int]]:
    """Some heads. A gradient that is summed over an axis is whole only with all of that axis."""
    outer = [a for a in variant.out if a not in "pf"]
    whole = [a for a in outer if gradients and any(a not in variant.inputs[n] for n in variant.wrt)]
    free = [a for a in outer if a not in whole]
    count = max(1, HEADS // math.prod(shape.extent(a) for a in whole))
    limits = {}
    for a in reversed(free):
        limits[a] = min(shape.extent(a), count)
        count = max(1, count // limits[a])
    return places(variant, shape, limits)


def at_place(t: Tensor, axes: str, at: Place) -> Tensor:
    """A view of a tensor at some places of its axes; axes that are not named stay."""
    return t[tuple(at.get(a, slice(None)) for a in axes)]


def _chunks(shape: Shape) -> Iterator[tuple[int, int]]:
    rows = max(1, min(shape.p, SCORES // max(shape.m, 1)))
    for start in range(0, shape.p, rows):
        yield start, min(start + rows, shape.p)


def evaluate(
    variant: Variant,
    shape: Shape,
    x: Tensors,
    received: Tensor | None,
    heads: list[dict[str, int]],
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Compute the formula and its gradients at some heads, some rows at a time; what is not computed is 0.

    In any dtype but float64 the inputs stay as they are. None computes nothing: ones stand where a result would.
    """
    kind, device = dtype or torch.float64, x["Q"].device
    wrt = variant.wrt if received is not None else ()
    results = {OUT: torch.zeros([shape.extent(a) for a in variant.out], dtype=kind, device=device)}
    # Partial sums of gradients are added up in float64 whatever the dtype.
    results |= {n: torch.zeros(x[n].shape, dtype=torch.float64, device=device) for n in wrt}
    columns = torch.arange(shape.m, device=device)
    for at in heads:
        here = {n: at_place(t, variant.inputs[n], at) for n, t in x.items()}
        if dtype == torch.float64:
            here = {n: t.double() if t.is_floating_point() else t for n, t in here.items()}
        for start, stop in _chunks(shape):
            rows, cut = torch.arange(start, stop, device=device), slice(start, stop)
            part = {n: _rows(t, _left(variant.inputs[n], at), cut) for n, t in here.items()}
            target = {OUT: _rows(at_place(results[OUT], variant.out, at), _left(variant.out, at), cut)}
            for n in wrt:
                target[n] = _rows(at_place(results[n], variant.inputs[n], at), _left(variant.inputs[n], at), cut)
            if dtype is None:
                for t in target.values():
                    t.fill_(1.0)
                continue
            leaves = {n: part[n].detach().requires_grad_() for n in wrt}
            with torch.set_grad_enabled(bool(wrt)):
                out = variant.formula({**part, **leaves}, rows, columns)
            target[OUT].copy_(out.detach())
            if received is not None:
                back = _rows(at_place(received, variant.out, at), _left(variant.out, at), cut).to(dtype)
                for n, g in zip(wrt, torch.autograd.grad(out, list(leaves.values()), back), strict=True):
                    target[n].add_(g)
    return results


def _left(axes: str, at: Place) -> str:
    return "".join(a for a in axes if a not in at)


def _rows(t: Tensor, axes: str, cut: slice) -> Tensor:
    return t[tuple(cut if a == "p" else slice(None) for a in axes)]
