"""The form that a call takes by its lengths: which, how many texts they are, and that they are right."""

from __future__ import annotations

import pytest
import torch

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.defaults import build_call, call_form, call_rule, form_of
from einsumcascade.codegen.launch import run_interpreted
from einsumcascade.codegen.plain import run_plain
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.parser import parse
from einsumcascade.reference.errorbound import EPS, conditioning, judge
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.schedules.calls import Form
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.verify.forms import spaces_of
from tests.codegen.test_lengths import LENGTHS, machine_codes

TARGET = gpu_target("cuda:90")
GQA = {"B": 1, "G": 8, "R": 4, "P": 1, "M": 8192, "E": 128, "F": 128}
PACKED = (("r", "p"),)


def gqa_form(**extents: int) -> Form:
    return call_form(load("gqa"), {**GQA, **extents}, "bfloat16", TARGET)


@pytest.mark.parametrize(
    ("extents", "form"),
    [
        # As many parts as give 132 multiprocessors a program each, none of fewer than 128 keys.
        ({}, Form(pack=PACKED, split=(("m", 32),), rows=16)),
        ({"M": 2048}, Form(pack=PACKED, split=(("m", 8),), rows=16)),
        ({"B": 4}, Form(pack=PACKED, split=(("m", 8),), rows=16)),
        ({"G": 1, "R": 32, "M": 131072}, Form(pack=PACKED, split=(("m", 128),), rows=64)),
        # Programs enough.
        ({"B": 16}, Form(pack=PACKED, rows=16)),
        ({"P": 4}, Form(pack=PACKED, split=(("m", 32),), rows=16)),
        ({"P": 5}, Form(pack=PACKED, split=(("m", 8),), rows=64)),
        ({"R": 1}, Form(split=(("m", 32),), rows=16)),
        # Queries fill tiles of their own, and keys are few.
        ({"P": 128, "R": 1}, Form(split=(("m", 8),))),
        ({"P": 4096}, Form()),
        ({"M": 1023}, Form()),
        ({"B": 0}, Form(pack=PACKED, rows=16)),
        ({"P": 0}, Form()),
    ],
)
def test_lengths_decide_the_form(extents: dict[str, int], form: Form) -> None:
    assert gqa_form(**extents) == form


def test_the_groups_that_are_packed_are_the_largest() -> None:
    text = (
        "in Q[b,h,p,e], K[b,g,m,e], V[b,g,m,f]\nrank r = H / G\n"
        "S[b,h,p,m] = Q[b,h,p,e] * K[b,h // R,m,e] :: sum(e)\n"
        "A[b,h,p,f] = relu(S[b,h,p,m]) * V[b,h // R,m,f] :: sum(m)\nout A"
    )
    extents = {"B": 1, "H": 32, "G": 8, "P": 1, "M": 8192, "E": 64, "F": 64}
    assert call_form(parse(text), extents, "bfloat16", TARGET).pack == (("h", "p"),)
    assert call_form(parse(text), {**extents, "G": 32}, "bfloat16", TARGET).pack == ()


def test_a_length_that_is_missing_leaves_the_usual_text() -> None:
    some = {n: x for n, x in GQA.items() if n != "P"}
    op = ec.compile("gqa")
    assert op.kernel(extents=some).source == op.kernel(extents={"E": 128, "F": 128}).source
    assert op.kernel(extents=GQA).source != op.kernel(extents={"E": 128, "F": 128}).source
    # A schedule of one's own is all that counts.
    own = Schedule(split={"m": 2})
    assert op.kernel(extents=GQA, schedule=own).schedule.pack == {}
    assert op.kernel(extents=GQA, gradient=True).source == op.kernel(extents={"E": 128, "F": 128}, gradient=True).source


def test_a_call_has_the_text_that_compile_prints_for_its_extents() -> None:
    generator = torch.Generator().manual_seed(5)
    extents = {"B": 1, "G": 2, "R": 4, "P": 1, "M": 1100, "E": 16, "F": 16}
    shapes = ((1, 2, 4, 1, 16), (1, 2, 1100, 16), (1, 2, 1100, 16))
    inputs = [torch.randn(s, generator=generator).bfloat16() for s in shapes]
    op = ec.compile("gqa")
    op(*inputs)
    assert op.source == op.kernel(extents=extents).source and op.schedule.pack == {"r": "p"}
    # So has one that records a gradient: its forward saves more.
    op(*(t.requires_grad_() for t in inputs))
    assert op.schedule.pack == {"r": "p"} and op.schedule.split == {"m": 8}


def test_100_lengths_of_decoding_are_two_forms_and_three_machine_codes() -> None:
    cascade = load("gqa")
    rule = call_rule(cascade, {"E": 64, "F": 64}, "bfloat16", TARGET)
    shapes = [{"Q": (2, 3, 4, 1, 64), "K": (2, 3, n, 64), "V": (2, 3, n, 64)} for n in LENGTHS]
    forms = {form_of(rule, bind(cascade, shapes=s), TARGET) for s in shapes}
    assert len(shapes) == 100 and forms == {Form(), Form(pack=PACKED, split=(("m", 8),), rows=16)}
    # One for the usual form, one for parts and one that merges them.
    assert machine_codes(cascade, shapes, by_lengths=True) == 3


def test_forms_are_few_however_many_lengths_there_are() -> None:
    lengths = [n + d for n in (1, 16, 1 << 10, 1 << 12, 1 << 14, 1 << 17, 1 << 20) for d in (-1, 0, 1) if n + d]
    assert len({gqa_form(M=n) for n in lengths}) == 3
    assert len({gqa_form(M=n, G=1) for n in lengths}) == 4
    every = {gqa_form(B=b, P=p, M=n) for b in (1, 2, 4, 32) for p in (1, 4, 5, 64, 65, 4096) for n in lengths}
    assert len(every) == 8


def test_all_numbers_of_parts_share_one_text() -> None:
    op = ec.compile("gqa")
    found = [op.kernel(extents={**GQA, "G": 1, "M": n}) for n in (2048, 8192, 131072)]
    assert [k.schedule.split["m"] for k in found] == [8, 32, 128]
    assert len({k.source for k in found}) == 1


def test_tuning_begins_with_the_schedule_of_a_call_and_tries_packing() -> None:
    cascade, features = load("gqa"), {"E": 128, "F": 128}
    spaces = spaces_of(cascade, GQA, features, "bfloat16", TARGET)
    assert spaces[0].default == ec.compile(cascade).kernel(extents=GQA, target="cuda:90").schedule
    forms = [(dict(s.form.pack), bool(s.form.split)) for s in spaces]
    assert {({"r": "p"}.items() <= p.items(), split) for p, split in forms} >= {
        (True, True),
        (True, False),
        (False, False),
    }
    # Queries that fill their tiles are packed by no candidate.
    assert not any(s.form.pack for s in spaces_of(cascade, {**GQA, "P": 4096}, features, "bfloat16", TARGET))


def test_a_form_that_a_cascade_has_not_falls_back() -> None:
    # The weights need the mean of the scores: no state of a part is merged, and nothing is split.
    text = (
        "in Q[b,p,e], K[b,m,e], V[b,m,f]\nS[b,p,m] = Q[b,p,e] * K[b,m,e] :: sum(e)\nMU[b,p] = S[b,p,m] :: mean(m)\n"
        "W[b,p,m] = relu(S[b,p,m] - MU[b,p])\nO[b,p,f] = W[b,p,m] * V[b,m,f] :: sum(m)\nout O"
    )
    extents = {"B": 1, "P": 1, "M": 8192, "E": 64, "F": 64}
    cascade = parse(text)
    assert call_form(cascade, extents, "bfloat16", TARGET).split
    assert ec.compile(cascade).kernel(extents=extents).source


def test_a_gradient_has_the_usual_form() -> None:
    backward = differentiate(load("gqa")).backward
    assert call_rule(backward, {"E": 64, "F": 64}, "bfloat16", TARGET) is None


@pytest.mark.parametrize(
    "name", ["gqa", "softmax_attention", "mla_absorbed", "alibi", "sink", "sliding_window", "paged"]
)
def test_the_form_of_a_call_is_right(name: str) -> None:
    cascade = load(name)
    own = {"B": 1, "G": 1, "H": 2, "R": 3, "P": 2, "M": 1040, "E": 16, "F": 16, "C": 32}
    own |= {"T": 260, "X": 1100} if name == "paged" else {}
    ranks = {v[0].upper() + v[1:] for i in cascade.inputs for v in i.indices}
    extents = {r: own[r] for r in ranks}
    form = call_form(cascade, extents, "bfloat16", TARGET)
    assert form != Form()
    generator = torch.Generator().manual_seed(7)
    inputs = {
        i.tensor: torch.randn([extents[v[0].upper() + v[1:]] for v in i.indices], generator=generator)
        for i in cascade.inputs
    }
    if name == "paged":
        inputs["TAB"] = torch.randperm(260, generator=generator).reshape(1, 260).to(torch.int32)
        inputs["LEN"] = torch.tensor([1001], dtype=torch.int32)
    features = {"E": 16, "F": 16, "C": 32, "R": 3}
    options = {"extents": {r: n for r, n in features.items() if r in ranks and not (name == "gqa" and r == "R")}}
    built = build_call(cascade, form=form, dtype="float32", target=TARGET, precision="ieee", **options)
    assert bool(built.schedule.split) == bool(form.split)
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    found = run_interpreted(built, inputs, binding)
    expected, plain = run(cascade, inputs), run_plain(cascade, inputs)
    room = conditioning(cascade, inputs, EPS["float32"])
    for n in expected:
        verdict = judge(found[n], expected[n], plain[n], room[n])
        assert verdict.passed, f"{n}: {verdict}"
