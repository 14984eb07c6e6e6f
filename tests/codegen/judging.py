"""A result is judged by the error rule: against float64, with the plain formula and the conditioning as yardsticks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from einsumcascade.codegen.plain import run_plain
from einsumcascade.language.ir import Cascade
from einsumcascade.reference.errorbound import EPS, conditioning, judge
from einsumcascade.reference.interpret import run


def assert_within_bounds(
    cascade: Cascade, inputs: Mapping[str, torch.Tensor], outputs: torch.Tensor | tuple[torch.Tensor, ...]
) -> None:
    """Judge every output of a call; an element that the reference leaves open is not compared."""
    found = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    on_cpu = {name: t.cpu() for name, t in inputs.items()}
    main = next(t.dtype for t in inputs.values() if t.is_floating_point())
    arrays = {n: t.double().numpy() if t.is_floating_point() else t.numpy() for n, t in on_cpu.items()}
    expected = run(cascade, arrays)
    plain = run_plain(cascade, on_cpu)
    conditions = conditioning(cascade, arrays, EPS[str(main).removeprefix("torch.")])
    assert len(found) == len(expected)
    for (name, want), got in zip(expected.items(), found, strict=True):
        hole = np.isnan(want)
        actual, base = (np.where(hole, np.nan, t.cpu().double().numpy()) for t in (got, plain[name]))
        verdict = judge(actual, want, base, conditions[name])
        assert verdict.passed, f"{name}: {verdict}"
