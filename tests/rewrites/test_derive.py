"""A derivation says what it did, why it is right, and how many passes are left."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given

from einsumcascade.errors import UnknownRankError
from einsumcascade.gallery import load, names
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.rewrites.derive import derive, simplify
from tests.strategies import Case, cases, close, examples, random_case


def test_softmax_attention_goes_from_three_passes_to_one() -> None:
    found = derive("softmax_attention")
    assert found.passes == {"M": (3, 1)}
    assert str(found).startswith("3 passes -> 1 over M\n")


@pytest.mark.parametrize("name", names())
def test_no_gallery_text_gains_a_pass(name: str) -> None:
    for before, after in derive(name).passes.values():
        assert after <= before


def test_the_certificate_holds_every_proof() -> None:
    found = derive("softmax_attention")
    proofs = [s for s in found.steps if s.proof]
    assert len(proofs) >= 2
    held = json.loads(found.certificate)["steps"]
    for s in proofs:
        assert list(s.proof) in [h["proof"] for h in held]
        assert s.kind == "algebraic"


def test_the_correction_of_softmax_is_named() -> None:
    what = [s.what for s in derive("softmax_attention").steps if s.rule == "R3 running state"]
    assert what and all(w.endswith("moved by C = exp(GM[b, h, p] - GM_next[b, h, p])") for w in what)


def test_a_rejected_reduction_says_what_it_waits_for() -> None:
    text = "in S[p,m], V[m,f]\nGM[p] = S[p,m] :: mean(m)\nO[p,f] = relu(S[p,m] - GM[p]) * V[m,f] :: sum(m)\nout O"
    (step,) = (s for s in derive(parse(text)).steps if s.rule == "not streamed")
    assert "O waits for GM: one more loop over M" in step.what
    assert "mixes values along the rank with GM" in step.proof[-1]
    assert step.proof[1].count("^") == len("relu(S[p,m] - GM[p])")


def test_a_derivation_is_a_json_value() -> None:
    found = json.loads(json.dumps(derive("softmax_attention").to_dict()))
    assert found["passes"] == {"M": {"before": 3, "after": 1}}
    assert parse(found["cascade"], name="softmax_attention.cascade").output_names == ("AV",)


def test_a_rank_that_is_not_reduced_is_refused() -> None:
    with pytest.raises(UnknownRankError) as caught:
        derive("softmax_attention", rank="P")
    assert caught.value.diagnostics[0].headline == "no Einsum reduces a rank 'P'"


def test_a_cascade_without_a_chain_has_nothing_to_derive() -> None:
    found = derive(parse("in A[p,m], B[m,n]\nC[p,n] = A[p,m] * B[m,n] :: sum(m)\nout C"))
    assert found.passes == {} and found.steps == ()
    assert str(found).startswith("no rank is reduced in a chain: nothing to derive")


def test_the_tile_is_the_one_asked_for() -> None:
    assert "rank m0 = 32" in str(derive("softmax_attention", tile=32).cascade)


@examples(50)
@given(cases())
@example(random_case(21061455, (1, 2, 4, 8, 16)))
def test_a_derivation_keeps_the_value_and_never_adds_a_pass(case: Case) -> None:
    found = derive(case.cascade, rank="M", tile=16)
    x = case.inputs()
    expected = run(case.cascade, x)
    for result in (simplify(case.cascade).cascade, found.cascade):
        values = run(result, x)
        for name in expected:
            assert close(values[name], expected[name]), name
    assert all(after <= before for before, after in found.passes.values())
    assert found.original == case.cascade


def test_loading_by_name_and_giving_the_cascade_agree() -> None:
    assert derive("sink").cascade == derive(load("sink")).cascade
