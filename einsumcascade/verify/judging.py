"""Judge the kernels of a cascade on given inputs, output by output."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from einsumcascade.codegen.launch import build, run_interpreted, run_on_gpu
from einsumcascade.codegen.plain import run_plain
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.codegen.runner import present_target
from einsumcascade.language.extents import Binding
from einsumcascade.language.ir import Cascade
from einsumcascade.reference.errorbound import EPS, Condition, Verdict, conditioning, judge
from einsumcascade.reference.interpret import run
from einsumcascade.schedules.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One output in one dtype.

    Args:
        largest: largest finite element expected, NaN if none has a value.
        overflows: whether the plain formula has no finite value where there is one.
    """

    dtype: str
    output: str
    verdict: Verdict
    plain_max: float
    plain_rms: float
    largest: float
    overflows: bool


def judged(
    cascade: Cascade,
    inputs: Mapping[str, torch.Tensor],
    binding: Binding,
    dtype: str,
    *,
    seed: int,
    schedule: Schedule | None = None,
    counts: Collection[str] = (),
) -> list[Row]:
    """Run the kernels of a cascade on inputs and judge each output.

    Args:
        seed: of the conditioning. counts: inputs of whole numbers, which no rounding changes.
    """
    gpu = torch.cuda.is_available()
    features = {r: binding.extents[r] for r in feature_ranks(cascade)}
    built = build(cascade, extents=features, dtype=dtype, target=present_target(), schedule=schedule)
    if gpu:
        on_gpu = {n: t.cuda() for n, t in inputs.items()}
        actual = {n: t.cpu() for n, t in run_on_gpu(built, on_gpu, binding, multiprocessors=1).items()}
    else:
        actual = run_interpreted(built, inputs, binding)
    return yardstick(cascade, inputs, dtype, seed=seed, counts=counts).rows(actual)


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What the results of a cascade on given inputs are held against, by output.

    Args:
        expected: the float64 reference. plain: the plain formula in the dtype. conditions: of the problem.
    """

    dtype: str
    expected: Mapping[str, np.ndarray]
    plain: Mapping[str, torch.Tensor]
    conditions: Mapping[str, Condition]

    def rows(self, actual: Mapping[str, torch.Tensor]) -> list[Row]:
        """Judge each output of `actual`, tensors on a CPU."""
        rows = []
        for name, want in self.expected.items():
            # A culled element of an output has no value: the reference holds NaN there, and nothing is compared.
            hole = np.isnan(want)
            got = np.where(hole, np.nan, actual[name].double().numpy())
            base = np.where(hole, np.nan, self.plain[name].double().numpy())
            error = np.abs(np.where(np.isfinite(want), base - want, 0.0))
            rows.append(
                Row(
                    dtype=self.dtype,
                    output=name,
                    verdict=judge(got, want, base, self.conditions[name]),
                    plain_max=float(error.max(initial=0.0)),
                    plain_rms=float(np.sqrt(np.mean(error**2))) if error.size else 0.0,
                    overflows=bool((np.isfinite(want) & ~np.isfinite(base)).any()),
                    largest=float(np.abs(want[np.isfinite(want)]).max(initial=0.0)) if not hole.all() else math.nan,
                )
            )
        return rows


def yardstick(
    cascade: Cascade, inputs: Mapping[str, torch.Tensor], dtype: str, *, seed: int, counts: Collection[str] = ()
) -> Yardstick:
    """Compute once what any number of results on the same inputs are judged by; arguments as `judged`.

    Cost: the reference 9 times, dense in the product of all extents of an Einsum.
    """
    arrays = {n: t.double().numpy() if t.is_floating_point() else t.numpy() for n, t in inputs.items()}
    arrays |= {n: arrays[n].astype(np.int64) for n in counts}
    return Yardstick(
        dtype=dtype,
        expected=run(cascade, arrays),
        plain=run_plain(cascade, inputs),
        conditions=conditioning(cascade, arrays, EPS[dtype], seed=seed),
    )
