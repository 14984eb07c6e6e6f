"""A report as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from typing import Any

from markupsafe import Markup, escape

from einsumcascade.analysis.counts import CLASSES
from einsumcascade.analysis.dependence import partitions, rank_variables
from einsumcascade.analysis.page import listed
from einsumcascade.analysis.polynomial import Count
from einsumcascade.analysis.roofline import pipe_work
from einsumcascade.analysis.taxonomy import Softmax
from einsumcascade.language.ir import Cascade, Einsum, Init, Iter, Statement, variable_of
from einsumcascade.report.data import Report
from einsumcascade.report.formula import PRIMED, Formulas
from einsumcascade.report.markup import element, rank_class
from einsumcascade.report.plots import draw_roofline
from einsumcascade.report.svg import draw_graph
from einsumcascade.report.typeset import set_python, set_text
from einsumcascade.rewrites.step import Claim
from einsumcascade.schedules.cost import KernelCost
from einsumcascade.schedules.program import Kernel


def render(report: Report) -> str:
    """Render a report as a page of HTML, ready to be written to a file.

    Guaranteed: the page refers to nothing outside itself, texts of the cascade are data and never markup, and equal
    reports give equal pages.

    >>> from einsumcascade.report.data import build_report
    >>> page = render(build_report("softmax_2p"))
    >>> page.startswith("<!doctype html>"), "http:" in page
    (True, False)
    """
    template = _environment().get_template("page.html.jinja")
    page: str = template.render(report=report, view=View(report), maker=_maker())
    return page


def _maker() -> str:
    """The name of this package, with its version where it is installed."""
    try:
        return f"EinsumCascade {metadata.version('einsumcascade')}"
    except metadata.PackageNotFoundError:
        return "EinsumCascade"


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("einsumcascade.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"si": si, "binary": binary, "time": time, "plural": plural, "listed": listed}
    return environment


class View:
    """The parts of a page that are set rather than written: code, formulas, drawings.

    Args:
        report: what is shown.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        derivation = report.derivation
        self.tensors = _tensors(report.cascade) | _tensors(derivation.cascade)
        for s in derivation.steps:
            # Names that a step brings and a later one takes away again.
            self.tensors |= {line.split("[")[0].split(" ")[0] for line in (*s.before, *s.after)}
        self.ranks = _ranks(report.cascade, derivation.cascade)
        self.formulas = Formulas(self.ranks)
        count = report.analysis.by_rank.get(report.graph.rank)
        traversing = count.level_of if count is not None else {}
        self.levels = {n.line: n.level for n in report.graph.nodes if n.name in traversing}

    @property
    def listing(self) -> tuple[Markup, ...]:
        """The source, line by line."""
        assert self.report.cascade.source is not None
        return self.text(self.report.cascade.source.text)

    def text(self, text: str) -> tuple[Markup, ...]:
        """A text of the language, line by line."""
        return set_text(text, tensors=self.tensors, ranks=self.ranks)

    def lines(self, cascade: Cascade) -> list[tuple[int, int, Markup]]:
        """The statements of a cascade as formulas, each with its line, 0 where it has none, and its depth."""
        return list(self._lines(cascade.body, 0))

    def _lines(self, body: tuple[Statement, ...], depth: int) -> list[tuple[int, int, Markup]]:
        out: list[tuple[int, int, Markup]] = []
        for s in body:
            line = s.span.line if s.span is not None else 0
            match s:
                case Iter():
                    out.append((line, depth, self.formulas.steps(s)))
                    out += self._lines(s.body, depth + 1)
                case Einsum() | Init():
                    out.append((line, depth, self.formulas.statement(s)))
        return out

    @property
    def result_lines(self) -> list[tuple[int, Markup]]:
        """The derived cascade as formulas; its lines are those of no text."""
        return [(depth, m) for _, depth, m in self.lines(self.report.derivation.cascade)]

    @property
    def graph(self) -> Markup:
        """The dataflow graph."""
        return draw_graph(self.report.graph, ranks=self.ranks)

    @property
    def roofline(self) -> Markup:
        """The roofline plot."""
        return draw_roofline(self.report.points, target=self.report.target, dtype=self.report.dtype)

    @property
    def softmaxes(self) -> list[tuple[Softmax, list[tuple[str, int, int]]]]:
        """Each softmax over a whole rank with (rank, passes, loops over its tiles); those over parts alone left out."""
        out = []
        for e in self.report.taxonomy.entries:
            found = zip(e.ranks, e.passes, e.summary_traversals, strict=True)
            whole = [x for x in found if x[0] in self.report.analysis.by_rank]
            out += [(e, whole)] if whole else []
        return out

    @property
    def classes(self) -> list[tuple[str, list[tuple[str, list[Any], str]]]]:
        """The table of the taxonomy: for each reference its cells, each a division, softmaxes and published systems."""
        rows = []
        for reference in ("none", "global", "local", "running"):
            cells = []
            for division in ("immediate", "deferred", "none"):
                here = [x for x in self.softmaxes if (x[0].reference, x[0].division) == (reference, division)]
                systems = [s.system for s in self.report.systems if (s.reference, s.division) == (reference, division)]
                cells.append((division, here, ", ".join(systems)))
            rows.append((reference, cells))
        return rows

    @property
    def work(self) -> dict[str, int]:
        """Operations of each pipe."""
        return pipe_work(self.report.roofline.operations, dtype=self.report.dtype)

    @property
    def kernels(self) -> list[tuple[Kernel, KernelCost]]:
        """Each kernel with its cost."""
        assert self.report.kernels is not None
        return list(zip(self.report.kernels.program.kernels, self.report.kernels.cost.kernels, strict=True))

    @property
    def kernel(self) -> Markup:
        """The text of the kernels."""
        assert self.report.kernels is not None
        return set_python(self.report.kernels.source)

    def rank(self, name: str) -> Markup:
        """The name of a rank in its colour."""
        return element("span", {"class": f"rank {rank_class(variable_of(name), self.ranks)}".strip()}, name)

    def rank_list(self, names: tuple[str, ...]) -> Markup:
        """Names of ranks in their colours."""
        return Markup(", ").join(self.rank(n) for n in names)

    def count(self, count: Count) -> Markup:
        """A polynomial of extents, with the ranks in their colours."""
        terms = []
        for names, n in count.terms:
            factors = [escape(n)] * (n != 1 or not names)
            for x in dict.fromkeys(names):
                power = names.count(x)
                factors.append(self.rank(x) + (element("sup", None, str(power)) if power > 1 else ""))
            terms.append(Markup("·").join(factors))
        return Markup(" + ").join(terms) or Markup("0")

    def value(self, count: Count) -> str:
        """Its value at the extents of the report; empty where one of them is not known."""
        known = set(count.extents) <= set(self.report.extents)
        return si(count.at(self.report.extents)) if known else ""

    @property
    def operations(self) -> list[str]:
        """Classes of operations that occur."""
        return [c for c in CLASSES if self.report.analysis.counts.total(c)]

    @property
    def passes(self) -> list[tuple[str, int, int]]:
        """Ranks that the derivation streams, with the passes over them before and after; parts left out."""
        return [(r, a, b) for r, (a, b) in self.report.derivation.passes.items() if r in self.report.analysis.by_rank]

    def claim(self, claim: Claim) -> list[Markup]:
        """What the proof of a correction is of, as formulas."""
        f, new = self.formulas, f"d{PRIMED}"
        name = "F" if len(claim.basis) == 1 else "B"
        before, after, moved = f.call(name, "x", "d"), f.call(name, "x", new), f.call("C", "d", new)
        return [
            f.equation(before, f.matrix(tuple((b,) for b in claim.basis))),
            f.equation(moved, f.matrix(claim.matrix)),
            f.equation(after, before, "+", moved) if claim.form == "shift" else f.equation(after, moved, "·", before),
        ]


def _tensors(cascade: Cascade) -> set[str]:
    return {i.tensor for i in cascade.inputs} | {e.tensor for e in cascade.einsums}


def _ranks(cascade: Cascade, derived: Cascade) -> Mapping[str, int]:
    """Number the rank variables; the parts of a rank have its number, so its colour."""
    out: dict[str, int] = {}
    for c in (cascade, derived):
        part_of = {v: p.whole for p in partitions(c).values() for v in p.parts}
        for v in rank_variables(c):
            whole = part_of.get(v, v)
            number = out.setdefault(whole, len(set(out.values())))
            out.setdefault(v, number)
    return out


def si(value: float) -> str:
    """Write a number short: `2.15 G`.

    >>> si(17179869184), si(4096), si(0.25)
    ('17.2 G', '4,096', '0.25')
    """
    if 1000 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{_three(value / 10**power)} {letter}"
    return f"{value:.3g}"


def binary(value: float) -> str:
    """Write a number of bytes.

    >>> binary(402653184), binary(96)
    ('384 MiB', '96 bytes')
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << power:
            return f"{_three(value / (1 << power))} {unit}"
    return f"{value:.0f} bytes"


def _three(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def time(microseconds: float) -> str:
    """Write a time.

    >>> time(2220.4), time(13.0)
    ('2.22 ms', '13 µs')
    """
    if microseconds >= 999.5e3:
        return f"{microseconds / 1e6:.3g} s"
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 999.5 else f"{microseconds:.3g} µs"


def plural(count: int, one: str, many: str = "") -> str:
    """Write a count with its noun.

    >>> plural(1, "pass", "passes"), plural(2, "loop")
    ('1 pass', '2 loops')
    """
    return f"{count} {one if count == 1 else many or one + 's'}"
