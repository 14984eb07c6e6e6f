"""Judge the generated kernel: its own text, run on inputs, against float64 and the plain formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from einsumcascade.codegen.dtypes import selectors
from einsumcascade.codegen.programs import feature_ranks, with_constants, with_extents
from einsumcascade.errors import InputError, nearest
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade, rank_of, reads, subexpressions
from einsumcascade.schedules.parts import parts_of
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.verify.gradients import judged_gradient
from einsumcascade.verify.judging import Row, judged

DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_LENGTH, DEFAULT_FEATURE = 77, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was run, where, and every error beside its bound.

    Args:
        name: of the cascade. extents: by rank. where: "Triton's interpreter" or the name of the GPU.
        rows: one for each dtype and output, and for each dtype and gradient.
        without: why there are no gradients, empty if there are.
    """

    name: str
    extents: Mapping[str, int]
    where: str
    rows: tuple[Row, ...]
    without: str = ""

    @property
    def passed(self) -> bool:
        """Whether every output of every dtype is within its bound."""
        return all(r.verdict.passed for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "name": self.name,
            "extents": dict(self.extents),
            "where": self.where,
            "passed": self.passed,
            "without_gradient": self.without,
            "rows": [
                {
                    "dtype": r.dtype,
                    "output": r.output,
                    "passed": r.verdict.passed,
                    "max_error": r.verdict.max_error,
                    "max_bound": r.verdict.max_bound,
                    "rms_error": r.verdict.rms_error,
                    "rms_bound": r.verdict.rms_bound,
                    "plain_max_error": r.plain_max,
                    "plain_rms_error": r.plain_rms,
                    "misplaced": r.verdict.misplaced,
                }
                for r in self.rows
            ],
        }

    def __str__(self) -> str:
        ways = f"forward (no backward: {self.without})" if self.without else "forward and backward"
        head = f"{self.name}: generated kernels, {ways}, run in {self.where} at " + " ".join(
            f"{k}={v}" for k, v in self.extents.items()
        )
        lines = [
            head,
            "errors against the float64 reference; bound = 2 x plain formula + 4 x conditioning",
            "",
            f"{'dtype':9} {'output':8} {'max error':>10} {'bound':>10} {'plain':>10}   "
            f"{'rms error':>10} {'bound':>10} {'plain':>10}",
        ]
        for r in self.rows:
            v = r.verdict
            lines.append(
                f"{r.dtype:9} {r.output:8} {v.max_error:10.2e} {v.max_bound:10.2e} {r.plain_max:10.2e}   "
                f"{v.rms_error:10.2e} {v.rms_bound:10.2e} {r.plain_rms:10.2e}   "
                f"{'PASS' if v.passed else 'FAIL'}"
                + (f" ({v.misplaced} non-finite values misplaced)" if v.misplaced else "")
            )
        return "\n".join([*lines, "", "PASS" if self.passed else "FAIL"])


def verify(
    cascade: Cascade | str,
    *,
    extents: Mapping[str, int] | None = None,
    dtypes: Sequence[str] = DTYPES,
    seed: int = 0,
    schedule: Schedule | None = None,
    constants: Mapping[str, float] | None = None,
    progress: Any = None,
) -> Verification:
    """Run the generated Triton text of a cascade and of its gradient, and judge both by the error rule.

    On a machine with a GPU the kernel runs there, else in Triton's interpreter. Outputs start as NaN, so that an
    element that no program writes is found.

    Args:
        extents: by rank; lengths that are missing count 77, feature ranks 64, other ranks of a few elements 2.
        dtypes: of the inputs; float32 alone where all inputs only index or compare. seed: of their values, standard
            normal.
        schedule: of an op of the cascade, forward and backward.
        progress: called with a line of text before each dtype.

    Returns: the errors and the verdicts.
    Raises: InputError, ScheduleError, LoweringError.
    Cost: the reference is dense in the product of all extents of an Einsum.
    """
    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    cascade = with_extents(with_constants(cascade, dict(constants or {})), extents or {})
    for d in dtypes:
        if d not in DTYPES:
            raise InputError.of(
                "wrong-dtype",
                f"there is no dtype '{d}' to verify",
                rule="dtypes are " + ", ".join(DTYPES),
                hint=nearest(d, DTYPES),
            )
    binding = bind(cascade, extents=filled_extents(cascade, extents or {}))
    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else "Triton's interpreter"
    if all(i.tensor in selectors(cascade) for i in cascade.inputs):
        # Of whole numbers alone, values are float32.
        dtypes = DTYPES[-1:]
    rows: list[Row] = []
    without = ""
    plain = parts_of(schedule, cascade.name).plain
    for dtype in dtypes:
        if progress is not None:
            progress(f"{cascade.name} in {dtype}")
        inputs = random_inputs(cascade, binding, dtype, seed=seed)
        rows += judged(cascade, inputs, binding, dtype, seed=seed, schedule=plain)
        backward = judged_gradient(cascade, inputs, dtype, seed=seed, schedule=schedule)
        if isinstance(backward, str):
            without = backward
        else:
            rows += backward
    shown = {rank_of(v): binding.extents[rank_of(v)] for i in cascade.inputs for v in i.indices}
    return Verification(name=cascade.name, extents=shown, where=where, rows=tuple(rows), without=without)


def filled_extents(cascade: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """Extents for a trial run: those given, and a default for each other rank of the inputs."""
    reduced = {v for e in cascade.einsums for v in e.ranks}
    valued = {v for c in cascade.constraints for x in subexpressions(c) if hasattr(x, "name") for v in [x.name]}
    out = dict(extents)
    batch = [v for i in cascade.inputs for v in i.indices]
    features = feature_ranks(cascade)
    defined = {d.name for d in cascade.ranks}
    for v in dict.fromkeys(batch):
        if v in defined:
            continue
        r = rank_of(v)
        positions = [i.indices.index(v) == len(i.indices) - 2 for i in cascade.inputs if v in i.indices]
        length = v in reduced or v in valued or any(positions)
        out.setdefault(r, DEFAULT_FEATURE if r in features else DEFAULT_LENGTH if length else 2)
    return out


def random_inputs(cascade: Cascade, binding: Binding, dtype: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Standard normal inputs; a tensor that only indexes or compares gets whole numbers in range."""
    generator = torch.Generator().manual_seed(seed)
    whole, indexed = selectors(cascade), index_ranks(cascade)
    out = {}
    for i in cascade.inputs:
        shape = [binding.extents[rank_of(v)] for v in i.indices]
        if i.tensor in whole:
            # Four values for what is only compared: equal ones, and some of each.
            high = binding.extents[indexed[i.tensor]] if i.tensor in indexed else 4
            out[i.tensor] = torch.randint(0, max(high, 1), shape, generator=generator, dtype=torch.int32)
        elif i.tensor in indexed:
            # A number that is reckoned with and says a place too, as a period: whole, and not 0.
            out[i.tensor] = torch.randint(1, 5, shape, generator=generator).to(getattr(torch, dtype))
        else:
            out[i.tensor] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    return out


def index_ranks(cascade: Cascade) -> dict[str, str]:
    """The rank that an input indexes, by the tensors that stand in an index of another input."""
    declared = {i.tensor: i.indices for i in cascade.inputs}
    return {
        inner.tensor: rank_of(declared[r.tensor][n])
        for e in cascade.einsums
        for r in reads(e.expr, *e.where)
        if r.tensor in declared
        for n, index in enumerate(r.indices)
        for inner in reads(index)
    }
