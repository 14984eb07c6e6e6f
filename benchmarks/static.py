"""What can be said of our kernels without a GPU: choices, resources, instructions of hot loops, and the least time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from einsumcascade.analysis.roofline import MEMORY, roofline
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.benchmarks.cases import Case
from einsumcascade.benchmarks.measure import first_line
from einsumcascade.benchmarks.table import Table
from einsumcascade.codegen.kernel import Kernel
from einsumcascade.codegen.op import compile as compile_cascade
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.schedules.schedule import KernelSchedule

TARGET = "cuda:90"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One kernel of a case.

    Args:
        schedule: its choices. registers, spilled: of a thread; the latter in bytes.
        loop: instructions of an iteration of the hot loop; per_score: the same for each score of a thread's share of a
            tile; None without a loop.
        serialised: products of the loop wait for each other.
        seconds: predicted by the model; None where it cannot tell.
    """

    kernel: str
    schedule: KernelSchedule
    registers: int
    spilled: int
    loop: int | None
    per_score: float | None
    serialised: bool
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is known of a case beforehand.

    Args:
        least_ms: no kernels of this form can be faster on the target. bound_by: memory or the pipe that says so.
        by_data: masks are data, so the model counts tiles that a call leaves out.
        note: why there is no more. failed: because a kernel did not compile.
    """

    case: Case
    lines: Sequence[Line] = ()
    least_ms: float | None = None
    bound_by: str = ""
    by_data: bool = False
    note: str = ""
    failed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        kernels = [
            {
                "kernel": k.kernel,
                "schedule": str(k.schedule),
                "registers": k.registers,
                "spilled": k.spilled,
                "loop": k.loop,
                "per_score": k.per_score,
                "serialised": k.serialised,
                "predicted_ms": None if k.seconds is None else 1e3 * k.seconds,
            }
            for k in self.lines
        ]
        return {
            "case": str(self.case),
            "kernels": kernels,
            "least_ms": self.least_ms,
            "bound_by": self.bound_by,
            "every_tile_counted": self.by_data,
            "note": self.note,
        }


def forecast(
    cases: Sequence[Case],
    *,
    budget: float,
    say: Callable[[Forecast], None] = lambda f: None,
    now: Callable[[], float] = time.monotonic,
) -> tuple[list[Forecast], bool]:
    """Compile and inspect our kernels for each case, as long as the budget lasts; Ctrl-C ends it with what is known.

    Returns: the forecasts, and whether Ctrl-C ended it.
    Cost: 1 to 5 s a kernel; the same text is compiled once.
    """
    began, known, longest = now(), dict[tuple[str, str, str], list[Line]](), 0.0
    found: list[Forecast] = []
    for case in cases:
        start = now()
        if budget - (start - began) < longest:
            entry = Forecast(case=case, note=f"skipped: {max(budget - (start - began), 0):.0f} s left")
        else:
            try:
                entry = _forecast(case, known)
            except KeyboardInterrupt:
                return found, True
            except Exception as error:
                # A kernel that the compiler refuses is a line of the table, not its end.
                entry = Forecast(case=case, note=first_line(error), failed=True)
            longest = max(longest, now() - start)
        found.append(entry)
        say(entry)
    return found, False


def programs(case: Case) -> list[Cascade]:
    """The cascades that a case runs."""
    cascade = case.variant.cascade()
    if case.direction == "forward":
        return [cascade]
    gradient = differentiate(cascade, wrt=case.variant.wrt)
    return [gradient.backward] if case.direction == "backward" else [gradient.forward, gradient.backward]


def extents_of(cascade: Cascade, case: Case) -> dict[str, int]:
    """The extents of a case by the ranks of a cascade."""
    return {rank_of(v): case.shape.extent(v) for i in cascade.inputs for v in i.indices}


def _forecast(case: Case, known: dict[tuple[str, str, str], list[Line]]) -> Forecast:
    lines: list[Line] = []
    bounds: dict[str, float] = {}
    by_data = False
    for cascade in programs(case):
        extents = extents_of(cascade, case)
        kernel = compile_cascade(cascade).kernel(extents=extents, dtype=case.dtype, target=TARGET)
        key = (kernel.source, str(kernel.schedule), str(extents))
        if key not in known:
            known[key] = _inspected(kernel, extents)
        lines += known[key]
        # Of the form that the kernels have: as written, a text may divide at every score.
        form = kernel.program.cascade
        bound = roofline(form, extents=extents, dtype=case.dtype, target=TARGET)
        by_data |= bool(form.constraints) and not bound.culls
        share = 1.0 if bound.culls or not form.constraints else _live_share(case)
        for pipe, us in bound.bounds_us.items():
            bounds[pipe] = bounds.get(pipe, 0.0) + us * (1.0 if pipe == MEMORY else share)
    binding = max(bounds, key=lambda p: bounds[p])
    return Forecast(case=case, lines=lines, least_ms=bounds[binding] / 1e3, bound_by=binding, by_data=by_data)


def _live_share(case: Case) -> float:
    """The share of the scores that no mask removes, where a roofline cannot count them because data decide."""
    return case.variant.live(case.shape.p, case.shape.m) / (case.shape.p * case.shape.m)


def _inspected(kernel: Kernel, extents: Mapping[str, int]) -> list[Line]:
    found = kernel.inspect(extents=extents)
    lines = []
    for tile, (name, report) in zip(kernel.built.kernels, found.kernels.items(), strict=True):
        schedule: KernelSchedule = tile.schedule
        hot = report.hot_loop
        # A tile of fewer than two axes holds no scores.
        scores = math.prod(schedule.tiles.values()) / (32 * schedule.warps) if len(schedule.tiles) > 1 else None
        lines.append(
            Line(
                kernel=tile.name,
                schedule=schedule,
                registers=report.registers,
                spilled=report.spill_bytes,
                loop=hot.instructions if hot else None,
                per_score=hot.instructions / scores if hot and scores else None,
                serialised=bool(hot and hot.serialised),
                seconds=found.predictions[name].seconds if name in found.predictions else None,
            )
        )
    return lines


def table(found: Sequence[Forecast]) -> Table:
    """The forecasts as a table, a row a kernel."""
    rows = []
    for f in found:
        least = f"{f.least_ms:.3f}" if f.least_ms is not None else ""
        if not f.lines:
            rows.append([str(f.case), f.note, *[""] * 8])
        for n, k in enumerate(f.lines):
            tiles = " x ".join(f"{v} {t}" for v, t in k.schedule.tiles.items())
            choice = f"{tiles}, {k.schedule.warps} warps, {k.schedule.stages} stages"
            choice += ", descriptors" if k.schedule.descriptors else ""
            rows.append(
                [
                    str(f.case) if n == 0 else "",
                    k.kernel,
                    choice,
                    str(k.registers),
                    str(k.spilled),
                    "" if k.loop is None else str(k.loop) + ("*" if k.serialised else ""),
                    "" if k.per_score is None else f"{k.per_score:.1f}",
                    "" if k.seconds is None else f"{1e3 * k.seconds:.3f}" + ("+" if f.by_data else ""),
                    least if n == 0 else "",
                    f.bound_by if n == 0 else "",
                ]
            )
    target = gpu_target(TARGET)
    chip = f"{target.multiprocessors} multiprocessors, {target.clock_ghz} GHz"
    return Table(
        title=f"Our kernels for {TARGET} ({chip}), as compiled",
        heads=[
            "case",
            "kernel",
            "choices",
            "registers",
            "spilled",
            "loop",
            "per score",
            "model ms",
            "least ms",
            "bound by",
        ],
        rows=rows,
        words=3,
    )


LEGEND = """\
registers, spilled: of a thread, in registers and bytes; loop: instructions of one iteration of the hot loop, * where
its products wait for each other; per score: the same for each score that a thread holds; model ms: the time that the
static model predicts from these and from the rates of the target, + where data decide what is masked, so that it counts
tiles that a call leaves out; least ms: the roofline of the whole case, which no kernels of this form can beat. Nothing
here was measured."""
