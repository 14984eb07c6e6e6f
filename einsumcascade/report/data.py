"""Everything that a report shows, gathered once: the cascade, its analysis, its derivation, its costs, its kernels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from einsumcascade import gallery
from einsumcascade.analysis.counts import dtype_bytes, elements
from einsumcascade.analysis.dependence import dependencies
from einsumcascade.analysis.report import Analysis, analyse
from einsumcascade.analysis.roofline import MEMORY, Roofline, flops
from einsumcascade.analysis.targets import GpuTarget, gpu_target
from einsumcascade.analysis.taxonomy import PublishedSystem, Taxonomy, classify, published_systems
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.errors import EinsumCascadeWarning, LoweringError, ScheduleError
from einsumcascade.gallery import Header
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse
from einsumcascade.report.graph import Graph, build_graph
from einsumcascade.rewrites.derive import Derivation, derive
from einsumcascade.schedules.cost import ScheduleCost, cost
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.schedule import Schedule

LENGTH: Final = 4096
BATCH: Final = 16
FEATURE: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The kernels generated for a cascade.

    Args:
        source: their text.
        program: what each computes. schedule: the choices behind it.
        cost: what they cost at the extents of the report.
    """

    source: str
    program: Program
    schedule: Schedule
    cost: ScheduleCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to run a cascade, on a roofline.

    Args:
        name: what is run.
        bytes: moved between memory and chip.
        gflops: the most that bandwidth and pipes allow, 1e9 operations a second.
        intensity: operations a byte.
    """

    name: str
    bytes: int
    gflops: float
    intensity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a page shows. `to_dict()` is the same for machines.

    Args:
        cascade: with a source text, whose lines the page numbers.
        title, paper: of the text; without a header the title is the name.
        extents: numbers by rank that costs are given at. assumed: names of those that nobody gave.
        dtype: of the inputs. target: what costs and kernels are for.
        analysis, derivation, taxonomy: of the cascade.
        systems: published ones, to stand beside the softmaxes of the cascade; none where it has no softmax.
        graph: the dataflow, cut by the loops over the rank with the most passes.
        points: ways to run the cascade, on the plot.
        kernels: what is generated, or None. why_not: the sentence that says why there are none.
    """

    cascade: Cascade
    title: str
    paper: str
    extents: Mapping[str, int] = field(hash=False)
    assumed: tuple[str, ...]
    dtype: str
    target: GpuTarget
    analysis: Analysis
    graph: Graph
    points: tuple[Point, ...]
    derivation: Derivation
    taxonomy: Taxonomy
    systems: tuple[PublishedSystem, ...]
    kernels: Kernels | None
    why_not: str = ""

    @property
    def roofline(self) -> Roofline:
        """The least time of the cascade on the target."""
        assert self.analysis.roofline is not None
        return self.analysis.roofline

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        kernels = None
        if self.kernels is not None:
            kernels = {
                "source": self.kernels.source,
                "schedule": json.loads(self.kernels.schedule.to_json()),
                "cost": self.kernels.cost.to_dict(),
            }
        return {
            "name": self.cascade.name,
            "title": self.title,
            "paper": self.paper,
            "cascade": str(self.cascade),
            "extents": dict(self.extents),
            "assumed": list(self.assumed),
            "dtype": self.dtype,
            "target": self.target.name,
            "analysis": self.analysis.to_dict(),
            "graph": self.graph.to_dict(),
            "points": [
                {"name": p.name, "bytes": p.bytes, "gflops": p.gflops, "intensity": p.intensity} for p in self.points
            ],
            "taxonomy": self.taxonomy.to_dict(),
            "systems": [s.to_dict() for s in self.systems],
            "derivation": self.derivation.to_dict(),
            "kernels": kernels,
            "why_not": self.why_not,
        }


def build_report(
    cascade: Cascade | str,
    *,
    extents: Mapping[str, int] | None = None,
    dtype: str = "bfloat16",
    target: str = "cuda:90",
    header: Header | None = None,
) -> Report:
    """Gather what a report shows of a cascade.

    Args:
        cascade: a cascade, a name of the gallery or the path of a text.
        extents: numbers by rank, upper case. Where one is missing, the report assumes and says so: 64 for ranks that
            lie innermost in memory (features), 4096 for the next one of each input (lengths), 16 for all others.
        dtype: of the inputs: float16, bfloat16 or float32.
        target: a GPU by name, which need not be there.
        header: title and paper; None: those of the gallery text that `cascade` names, else the name alone.

    Raises:
        SpecFileError, CascadeError: `cascade` is a text that names nothing, or a wrong one.
        UnknownRankError, InputError: an extent names no rank, or is no whole number; a dtype that kernels do not take.
        TargetError: the target is unknown.
    Cost: seconds, most of it the import of PyTorch and one SymPy derivation a reduction. No GPU is needed.

    >>> found = build_report("softmax_2p")
    >>> found.analysis.passes["M"], found.graph.rank, len(found.kernels.program.kernels)
    (2, 'M', 1)
    """
    device = gpu_target(target)
    if isinstance(cascade, str):
        header = header or gallery.header_of(cascade)
        cascade = gallery.load(cascade)
    cascade = _with_source(cascade)
    sizes = {**_assumed(cascade), **(extents or {})}
    analysis = analyse(cascade, extents=sizes, dtype=dtype, target=device)
    bound = analysis.roofline
    assert bound is not None
    taxonomy = classify(cascade)
    kernels, why_not = _kernels(cascade, dict(extents or {}), bound)
    return Report(
        cascade=cascade,
        title=header.title if header is not None else cascade.name,
        paper=header.paper if header is not None else "",
        extents=bound.extents,
        assumed=tuple(r for r in sizes if r not in (extents or {})),
        dtype=dtype,
        target=device,
        analysis=analysis,
        graph=build_graph(cascade, analysis),
        points=_points(cascade, bound, device, kernels),
        derivation=derive(cascade, extents=sizes),
        taxonomy=taxonomy,
        systems=published_systems() if taxonomy.entries else (),
        kernels=kernels,
        why_not=why_not,
    )


def _with_source(cascade: Cascade) -> Cascade:
    """The cascade with the text that says all of it: a constraint added later is in no source."""
    # Who made the cascade has seen what there is to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EinsumCascadeWarning)
        if cascade.source is not None and parse(cascade.source.text, name=cascade.name) == cascade:
            return cascade
        return parse(str(cascade), name=cascade.name)


def _assumed(cascade: Cascade) -> dict[str, int]:
    """Extents for ranks that the text does not define."""
    features = feature_ranks(cascade)
    defined = {rank_of(r.name) for r in cascade.ranks}
    last = set()
    for i in cascade.inputs:
        lengths = [rank_of(v) for v in i.indices if rank_of(v) not in features]
        last |= set(lengths[-1:] if len(i.indices) > 1 else ())
    names = dict.fromkeys(rank_of(v) for i in cascade.inputs for v in i.indices)
    return {r: LENGTH if r in last else FEATURE if r in features else BATCH for r in names if r not in defined}


def _kernels(cascade: Cascade, extents: Mapping[str, int], bound: Roofline) -> tuple[Kernels | None, str]:
    from einsumcascade.codegen.op import compile

    try:
        found = compile(cascade, precision="ieee").kernel(extents=extents, dtype=bound.dtype, target=bound.target)
        costs = cost(found.program, found.schedule, extents=bound.extents, dtype=bound.dtype, target=bound.target)
    except (LoweringError, ScheduleError) as error:
        return None, error.diagnostics[0].headline
    return Kernels(source=found.source, program=found.program, schedule=found.schedule, cost=costs), ""


def _points(cascade: Cascade, bound: Roofline, target: GpuTarget, kernels: Kernels | None) -> tuple[Point, ...]:
    """Each Einsum on its own, least traffic, and the generated kernels with each tensor moved once a kernel."""
    size = dtype_bytes(bound.dtype)
    each = 0
    for tensor, found in dependencies(cascade).items():
        each += sum(elements(cascade, t).at(bound.extents) * size for t in (*found, tensor))
    bandwidth = target.bandwidth_gb_s * 1e3

    def point(name: str, moved: int, operations: int, pipes_us: float) -> Point:
        time_us = max(pipes_us, moved / bandwidth)
        return Point(
            name=name,
            bytes=moved,
            gflops=operations / time_us / 1e3 if time_us else 0.0,
            intensity=operations / moved if moved else 0.0,
        )

    pipes = max(t for k, t in bound.bounds_us.items() if k != MEMORY)
    out = [
        point("as written, each Einsum on its own", each, bound.flops, pipes),
        point("as written, least traffic", bound.bytes, bound.flops, pipes),
    ]
    if kernels is not None:
        costs = kernels.cost.kernels
        moved = sum(t.elements * t.element_bytes for k in costs for t in k.tensors)
        out.append(point("generated kernels", moved, sum(flops(k.operations) for k in costs), kernels.cost.bound_us))
    return tuple(out)
