"""The error rule: how far a kernel may be from float64, judged by the formula and by the data, never by a constant.

`error <= 2 * E_plain + 4 * E_cond`, for the element maximum and for the rms. E_plain is the error of the plain formula
in the kernel's dtype. E_cond is what rounding the inputs alone does to the exact result. Twice the plain error by
itself rejects correct kernels where the formula happens to round well; the second term is what the data cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from einsumcascade.errors import InputError
from einsumcascade.language.ir import Cascade
from einsumcascade.reference.interpret import as_array, run

# Unit roundoffs: half the distance from 1 to the next number.
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
DRAWS = 8
PLAIN_WEIGHT, CONDITION_WEIGHT = 2.0, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Largest change of a result when every input is rounded anew: of any element, and in rms over the elements."""

    maximum: float
    rms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was measured, what was allowed, and whether it passed.

    Args:
        max_error, max_bound: largest absolute error of an element, and its bound.
        rms_error, rms_bound: root of the mean squared error over the elements, and its bound.
        misplaced: elements whose NaN or infinity is not that of the expected value.
        passed: no element is misplaced, and both errors are within their bounds.
    """

    max_error: float
    max_bound: float
    rms_error: float
    rms_bound: float
    misplaced: int
    passed: bool

    def __str__(self) -> str:
        return (
            f"{'passed' if self.passed else 'FAILED'}: max {self.max_error:.3e} of {self.max_bound:.3e}, "
            f"rms {self.rms_error:.3e} of {self.rms_bound:.3e}, {self.misplaced} non-finite values misplaced"
        )


def conditioning(
    cascade: Cascade,
    inputs: Mapping[str, ArrayLike],
    eps: float,
    *,
    constants: Mapping[str, float] | None = None,
    extents: Mapping[str, int] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Condition]:
    """Measure how the outputs move when every floating-point input is multiplied by 1 + eps or 1 - eps.

    Each element of each input draws its own sign. Integer inputs stay as they are. Elements where either result is not
    finite are left out.

    Args:
        cascade: a checked cascade.
        inputs: as `run` takes them, already rounded to the dtype in question.
        eps: unit roundoff of that dtype, see `EPS`.
        draws: how many times the signs are drawn; the largest change counts.
        seed: of the signs, so that a verdict can be repeated.

    Returns: by output, in the order of `out`.
    Raises: as `run`.
    Cost: `draws + 1` runs of the reference.
    """
    arrays = {name: as_array(name, value) for name, value in inputs.items()}
    exact = run(cascade, arrays, constants=constants, extents=extents)
    rng = np.random.default_rng(seed)
    found = dict.fromkeys(exact, (0.0, 0.0))
    for _ in range(draws):
        moved = {
            name: value * (1.0 + eps * rng.choice((-1.0, 1.0), size=value.shape)) if value.dtype.kind == "f" else value
            for name, value in arrays.items()
        }
        for name, value in run(cascade, moved, constants=constants, extents=extents).items():
            change = _sizes(value, exact[name])
            found[name] = (max(found[name][0], change[0]), max(found[name][1], change[1]))
    return {name: Condition(maximum=m, rms=r) for name, (m, r) in found.items()}


def judge(actual: ArrayLike, expected: ArrayLike, plain: ArrayLike, cond: Condition) -> Verdict:
    """Judge a result against the float64 reference by the error rule.

    Args:
        actual: the result in question; arrays or tensors of one shape, as are the next two.
        expected: the float64 reference.
        plain: the plain formula in the dtype of `actual`.
        cond: what `conditioning` found for this output.

    Returns: the verdict. Non-finite values must stand where `expected` has them, with the same sign; the errors are
        those of the elements that are finite in both.
    Raises: InputError: the shapes differ (`shape-mismatch`).
    Cost: linear in the elements.

    >>> judge([1.0, 2.5], [1.0, 2.0], [1.0, 2.25], Condition(maximum=0.0, rms=0.0)).passed
    True
    """
    a, e, p = (as_array(name, value) for name, value in (("actual", actual), ("expected", expected), ("plain", plain)))
    if not a.shape == e.shape == p.shape:
        raise InputError.of(
            "shape-mismatch",
            f"the result has shape {a.shape}, the reference {e.shape}, the plain formula {p.shape}",
            rule="a result is judged element by element",
        )
    same = np.where(np.isfinite(e), np.isfinite(a), np.where(np.isnan(e), np.isnan(a), a == e))
    misplaced = int(same.size - np.count_nonzero(same))
    max_error, rms_error = _sizes(a, e)
    max_plain, rms_plain = _sizes(p, e)
    max_bound = PLAIN_WEIGHT * max_plain + CONDITION_WEIGHT * cond.maximum
    rms_bound = PLAIN_WEIGHT * rms_plain + CONDITION_WEIGHT * cond.rms
    return Verdict(
        max_error=max_error,
        max_bound=max_bound,
        rms_error=rms_error,
        rms_bound=rms_bound,
        misplaced=misplaced,
        passed=misplaced == 0 and max_error <= max_bound and rms_error <= rms_bound,
    )


def _sizes(x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
    """Largest and rms difference over the elements that are finite in both."""
    both = np.isfinite(x) & np.isfinite(y)
    difference = np.abs(x[both].astype(np.float64) - y[both])
    if difference.size == 0:
        return 0.0, 0.0
    return float(difference.max()), math.sqrt(float(np.mean(np.square(difference))))
