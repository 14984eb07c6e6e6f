"""Evaluate a file of configurations: models, lengths and mappings in, the tables of a paper out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from einsumcascade.analysis.spatial.cost import Cost, estimate, fitting
from einsumcascade.analysis.spatial.evaluation import Evaluation, Mean, Resized, Share, Time, Utilisation
from einsumcascade.analysis.spatial.files import Table, read
from einsumcascade.analysis.spatial.mapping import SpatialMapping, load_mapping
from einsumcascade.analysis.spatial.target import SpatialTarget, load_target
from einsumcascade.errors import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Configuration:
    name: str
    label: str
    mapping: SpatialMapping
    target: SpatialTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workload:
    name: str
    extents: Mapping[str, int] = field(hash=False)
    ranks: tuple[str, ...]

    def at(self, length: int) -> dict[str, int]:
        return {**self.extents, **dict.fromkeys(self.ranks, length)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """One configuration at one model and length: its attention, and the other products of a layer if there are any."""

    model: str
    length: int
    configuration: str
    attention: Cost
    others: Cost | None

    @property
    def layer(self) -> tuple[Cost, ...]:
        return (self.attention, self.others) if self.others else (self.attention,)


def model(
    name: str | Path = "fusemax", *, workloads: Sequence[str] | None = None, lengths: Sequence[int] | None = None
) -> Evaluation:
    """Evaluate the configurations of a file at each of its models and lengths.

    Every number follows from cascades, mappings, targets and workloads, which are data: the files beside this module
    are examples for others, and the head of the module `mapping` says what a mapping holds.

    Args:
        name: an evaluation that comes with the package, `fusemax`, or the path of a `.toml` file.
        workloads: names of models, all of the file if None.
        lengths: of the sequences, those of the file if None.

    Raises:
        ModelError: `mapping`: a file is wrong, a name unknown, or a mapping does not fit its target.
        InputError: `extent-value`: a length is no whole number from 1 on.
        SpecFileError, CascadeError: the cascade of a mapping is missing or wrong.
    Cost: some milliseconds for each configuration, model and length.   Source: FuseMax (MICRO 2024), section VI.

    >>> found = model(workloads=["BERT"], lengths=[1024])
    >>> [(row.configuration, round(row.speedup, 2)) for row in found.attention]
    [('unfused', 1.0), ('flat', 1.63), ('cascade', 1.42), ('architecture', 3.65), ('binding', 10.84)]
    """
    file = read("evaluations", name)
    file.only(*_KEYS)
    found = tuple(_configuration(t) for t in file.tables("configuration"))
    baseline, subject = (_chosen(file, key, found) for key in ("baseline", "subject"))
    array = _array(file, found)
    models, all_lengths = _workloads(file, workloads)
    layers = load_mapping(file.text("layers"), beside=file.folder) if "layers" in file.values else None
    points = tuple(p for w in models for n in lengths or all_lengths for p in _points(found, w, n, layers))
    attention = tuple(_times(points, baseline.name, lambda p: (p.attention,)))
    end_to_end = tuple(_times(points, baseline.name, lambda p: p.layer)) if layers else ()
    figures = file.table("figures", optional=True)
    figures.only("shares", "utilisation", "breakdown", "attention", "end_to_end", "traffic", "sizes")
    return Evaluation(
        title=file.text("title"),
        labels={c.name: c.label for c in found},
        baseline=baseline.name,
        subject=subject.name,
        breakdown=array,
        figures={table: figures.text(table) for table in figures.values},
        missing=file.text("missing", ""),
        shares=tuple(_shares(points, subject.name)),
        utilisation=tuple(_utilisation(p, array) for p in points),
        attention=attention,
        end_to_end=end_to_end,
        sizes=tuple(_sizes(file.table("sweep"), subject, models)) if "sweep" in file.values else (),
        means=tuple(_means(found, subject.name, attention, end_to_end)),
    )


_KEYS = (
    *("title", "workloads", "layers", "baseline", "subject", "breakdown", "missing"),
    *("configuration", "sweep", "figures"),
)


def _configuration(table: Table) -> _Configuration:
    table.only("name", "label", "mapping")
    mapping = load_mapping(table.text("mapping"), beside=table.folder)
    return _Configuration(
        name=table.text("name"),
        label=table.text("label", table.text("name")),
        mapping=mapping,
        target=load_target(mapping.target, beside=mapping.table.folder),
    )


def _chosen(file: Table, key: str, found: Sequence[_Configuration]) -> _Configuration:
    wanted = file.text(key)
    for c in found:
        if c.name == wanted:
            return c
    file.reject(f"there is no configuration '{wanted}'", key=key, hint=nearest(wanted, [c.name for c in found]))


def _array(file: Table, found: Sequence[_Configuration]) -> str:
    wanted = file.text("breakdown")
    for c in found:
        if wanted not in c.target.arrays:
            file.reject(
                f"the target of '{c.name}' has no array '{wanted}'",
                key="breakdown",
                hint=nearest(wanted, tuple(c.target.arrays)),
            )
    return wanted


def _workloads(file: Table, wanted: Sequence[str] | None) -> tuple[tuple[_Workload, ...], tuple[int, ...]]:
    """Read the workloads of an evaluation, those that are wanted, and their lengths."""
    table = read("workloads", file.text("workloads"), beside=file.folder)
    table.only("ranks", "lengths", "workload")
    found: dict[str, _Workload] = {}
    for t in table.tables("workload"):
        t.only("name", "extents")
        extents = t.table("extents")
        numbers = {r: extents.integer(r) for r in extents.values}
        found[t.text("name")] = _Workload(name=t.text("name"), extents=numbers, ranks=table.names("ranks"))
    for name in wanted or ():
        if name not in found:
            table.reject(f"there is no workload '{name}'", hint=nearest(name, tuple(found)))
    return tuple(found[n] for n in wanted or found), table.integers("lengths")


def _points(
    found: Sequence[_Configuration], workload: _Workload, length: int, layers: SpatialMapping | None
) -> Iterator[_Point]:
    extents = workload.at(length)
    for c in found:
        yield _Point(
            model=workload.name,
            length=length,
            configuration=c.name,
            attention=estimate(c.mapping, extents, target=c.target),
            others=estimate(layers, extents, target=c.target) if layers else None,
        )


def _times(points: Sequence[_Point], baseline: str, part: Callable[[_Point], tuple[Cost, ...]]) -> Iterator[Time]:
    seconds = {(p.model, p.length, p.configuration): sum(c.seconds for c in part(p)) for p in points}
    for p in points:
        own = seconds[p.model, p.length, p.configuration]
        yield Time(
            model=p.model,
            length=p.length,
            configuration=p.configuration,
            seconds=own,
            dram_bytes=sum(c.dram_bytes for c in part(p)),
            speedup=seconds[p.model, p.length, baseline] / own,
        )


def _shares(points: Sequence[_Point], subject: str) -> Iterator[Share]:
    for p in points:
        if p.configuration == subject and p.others:
            yield Share(model=p.model, length=p.length, attention_macs=p.attention.macs, other_macs=p.others.macs)


def _utilisation(point: _Point, array: str) -> Utilisation:
    cost = point.attention
    return Utilisation(
        model=point.model,
        length=point.length,
        configuration=point.configuration,
        arrays={a: cost.utilisation(a) for a in cost.target.arrays},
        einsums=cost.shares(array),
    )


def _means(
    found: Sequence[_Configuration], subject: str, attention: Sequence[Time], end_to_end: Sequence[Time]
) -> Iterator[Mean]:
    for c in found:
        if c.name != subject:
            yield Mean(
                over=c.name,
                attention=_mean_speedup(attention, subject, c.name),
                end_to_end=_mean_speedup(end_to_end, subject, c.name) if end_to_end else 0.0,
            )


def _mean_speedup(rows: Sequence[Time], subject: str, over: str) -> float:
    fast, slow = ([r.seconds for r in rows if r.configuration == c] for c in (subject, over))
    return math.fsum(s / f for s, f in zip(slow, fast, strict=True)) / len(fast)


def _sizes(table: Table, subject: _Configuration, models: Sequence[_Workload]) -> Iterator[Resized]:
    table.only("buffer", "length", "sizes")
    buffer, length = table.text("buffer"), table.integer("length")
    if buffer not in subject.target.buffers:
        table.reject(
            f"the target of '{subject.name}' has no buffer '{buffer}'",
            key="buffer",
            hint=nearest(buffer, tuple(subject.target.buffers)),
        )
    for w in models:
        for size in table.integers("sizes"):
            cost = _roomy(subject, w.at(length), size, buffer)
            if cost is None:
                table.reject(f"no buffer is large enough for {w.name} on arrays of size {size}", key="sizes")
            yield Resized(
                model=w.name,
                length=length,
                size=size,
                elements=cost.target.elements,
                buffer_bytes=cost.target.buffers[buffer],
                seconds=cost.seconds,
            )


def _roomy(subject: _Configuration, extents: Mapping[str, int], size: int, buffer: str) -> Cost | None:
    """Double the buffer until a plan fits, and on while that saves waiting for DRAM."""
    best: Cost | None = None
    for bits in range(10, 41):
        target = subject.target.resized(size, buffers={buffer: 1 << bits})
        found = fitting(subject.mapping, extents, target=target)
        if found is None:
            continue
        if best is not None and found.seconds >= best.seconds:
            break
        best = found
        if all(k.dram_seconds <= k.compute_seconds for k in found.kernels):
            break
    return best
