"""The page of a report: complete, self-contained, and safe whatever the text says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from einsumcascade import gallery
from einsumcascade.errors import InputError, TargetError, UnknownRankError
from einsumcascade.language.ir import Scalar
from einsumcascade.language.parser import parse
from einsumcascade.report.data import Report, build_report
from einsumcascade.report.formula import PRIMED, Formulas
from einsumcascade.report.page import View, render
from einsumcascade.report.plots import ceilings
from einsumcascade.rewrites.step import Claim

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("softmax_attention", "softmax_1p", "gaam", "moh", "sparsemax")
VOID = {"meta", "br", "img", "hr", "input", "link", "mspace"}


@lru_cache(maxsize=16)
def report_of(name: str) -> Report:
    return build_report(name)


@lru_cache(maxsize=16)
def page_of(name: str) -> str:
    return render(report_of(name))


class Page(HTMLParser):
    """A strict reading: every tag closed in order, with the texts, links and ids on the way."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            self.attributes.add(key)
            if key in ("href", "src", "action", "srcset", "poster", "data", "xlink:href"):
                self.links.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_well_formed_and_refers_to_nothing_outside_itself(name: str) -> None:
    source = page_of(name)
    page = Page(source)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    assert "url(" not in source and "@import" not in source and "//" not in re.sub(r">[^<]*<", "><", source)
    assert not any(a.startswith("on") for a in page.attributes)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_all_that_the_report_holds(name: str) -> None:
    report, text = report_of(name), Page(page_of(name)).text
    assert report.title in text and report.paper in text
    source = report.cascade.source
    assert source is not None
    for line in source.text.splitlines():
        assert line in text
    for count in report.analysis.by_rank.values():
        for barrier in (*count.barriers, *count.level_barriers):
            assert str(barrier) in text
    for e in report.cascade.einsums:
        assert squeezed(str(e)) in squeezed(source.text) + squeezed(text)
    for step in report.derivation.steps:
        assert step.what in text and all(line in text for line in (*step.before, *step.after, *step.proof))
    assert not report.derivation.steps or str(report.derivation.cascade) in text
    if report.kernels is None:
        assert report.why_not in text
    else:
        assert report.kernels.source in text
        assert all(str(k) in text for k in report.kernels.schedule.kernels.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_plain_values_for_machines(name: str) -> None:
    report = report_of(name)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["name"] == name and parse(data["cascade"]) == report.cascade
    assert (data["kernels"] is None) == bool(data["why_not"])


@pytest.mark.parametrize("name", NAMES)
def test_every_einsum_is_a_box_and_a_line_and_a_formula(name: str) -> None:
    report, source = report_of(name), page_of(name)
    for e in report.cascade.einsums:
        assert e.span is not None and f'href="#line-{e.span.line}"' in source and f'id="line-{e.span.line}"' in source
    statements = len(View(report).lines(report.cascade))
    if report.derivation.steps:
        statements += len(View(report).lines(report.derivation.cascade))
    assert source.count('<math display="block">') >= statements


def test_the_cell_of_a_softmax_is_marked_and_holds_the_systems_of_its_class() -> None:
    (cell,) = re.findall(r'<td class="here">(.*?)</td>', page_of("softmax_attention"), re.DOTALL)
    text = Page(cell).text
    assert text.startswith("SN, 3 passes over M") and "PyTorch" in text and "FlashAttention" not in text
    assert Page(page_of("softmax_attention")).text.count("FlashAttention-2") == 1
    assert "The cascade has no softmax" in Page(render(build_report("relu"))).text


def test_a_cascade_without_a_kernel_says_why() -> None:
    text = Page(page_of("moh")).text
    assert "No kernel is generated: a top-k has no lowering yet." in text


def test_equal_reports_give_equal_bytes_whatever_the_order_of_hashes() -> None:
    script = (
        "import hashlib\nfrom einsumcascade.report.data import build_report\n"
        "from einsumcascade.report.page import render\n"
        "print(hashlib.sha256(render(build_report('gaam')).encode()).hexdigest())"
    )
    pages = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(pages) == 1


def test_markup_in_names_comments_and_titles_is_data() -> None:
    attack = '<script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7 * 6 }}</style>'
    text = f"# {attack}\nin X[m]  # {attack}\nS = X[m] :: max(m)\nY[m] = exp(X[m] - S)\nout Y"
    cascade = parse(text, name=f"{attack}.cascade")
    page = render(build_report(cascade, header=replace(gallery.header("gqa"), title=attack, paper=attack)))
    read = Page(page)
    assert not read.tags & {"script", "img"} and not any(a.startswith("on") for a in read.attributes)
    assert attack in read.text and "42" not in read.text.split("</style>")[0]
    assert page.count("</style>") == 1


def test_a_constraint_added_to_a_text_is_in_the_listing() -> None:
    report = build_report(gallery.load("softmax_2p").constrain("m <= p"))
    assert "constraint m <= p" in Page(render(report)).text
    assert report.cascade.source is not None and "m <= p" in report.cascade.source.text


def test_given_extents_are_used_and_the_others_are_said_to_be_assumed() -> None:
    report = build_report("softmax_2p", extents={"P": 1000, "M": 3000, "B": 2, "H": 5, "E": 128})
    assert report.extents == {"B": 2, "H": 5, "P": 1000, "E": 128, "M": 3000, "F": 64}
    assert report.assumed == ("F",)
    text = re.sub(r"\s+", " ", Page(render(report)).text)
    assert "M = 3,000" in text and "(F assumed" in text
    # Queries and outputs of 1000 rows, keys and values of 3000.
    assert report.roofline.bytes == 2 * 10 * (1000 * 128 + 3000 * 128 + 3000 * 64 + 1000 * 64)


def test_a_rank_that_is_not_there_and_a_target_that_is_not_known_are_refused() -> None:
    with pytest.raises(UnknownRankError):
        build_report("softmax_2p", extents={"Z": 3})
    with pytest.raises(InputError):
        build_report("softmax_2p", dtype="int8")
    with pytest.raises(TargetError):
        build_report("softmax_2p", target="cuda:1")


@pytest.mark.parametrize("text", ["in X\nS = X * 2\nout S", "in X[m]\nout X", "rank m = 4\nX[m] = m\nout X"])
def test_the_smallest_cascades_have_a_page(text: str) -> None:
    Page(render(build_report(parse(text))))


@pytest.mark.parametrize("name", NAMES)
def test_no_point_lies_above_the_roof(name: str) -> None:
    report = report_of(name)
    # The pipes work side by side.
    roof = sum(ceilings(report.target, dtype=report.dtype).values())
    for p in report.points:
        assert p.gflops <= 1.0001 * min(roof, p.intensity * report.target.bandwidth_gb_s)


def test_the_ceilings_are_those_of_the_data_sheet() -> None:
    report = report_of("softmax_attention")
    found = ceilings(report.target, dtype="bfloat16")
    # H200: 989 Tflop/s of dense bf16 products, 62 of float32 (boost clock of the table).
    assert found["tensor"] == pytest.approx(989e3, rel=0.01)
    assert found["fp32"] == pytest.approx(62e3, rel=0.01)
    assert "tensor" not in ceilings(report.target, dtype="float32")


def test_formulas_bracket_sums_and_stack_divisions() -> None:
    cascade = parse("in X[m], Y\nS = (X[m] - Y) * 1e-8 / (Y + 2) :: sum(m)\nout S")
    text = str(Formulas({"m": 0}).statement(cascade.einsums[0]))
    assert text.count("<mfrac>") == 1 and "∑" in text and "<mn>10</mn><mn>−8</mn>" in text
    assert text.count("<mo>(</mo>") == 1
    grown = parse("in X[m]\nS = X[m] + 1 :: max(m)\nout S").einsums[0]
    assert "<mo>(</mo>" in str(Formulas({}).statement(grown))


def test_a_shift_is_shown_as_a_sum_and_a_factor_as_a_product() -> None:
    view = View(report_of("softmax_attention"))
    y, new = Scalar(name="Y"), Scalar(name=f"Y{PRIMED}")
    parts = {"reduce": "max", "references": (), "positive": (), "nonnegative": (), "basis": (y,), "matrix": ((new,),)}
    shown = {form: str(view.claim(Claim(form=form, **parts))[-1]) for form in ("shift", "linear")}
    assert "<mo>+</mo>" in shown["shift"] and "<mo>·</mo>" in shown["linear"]
