"""Verification: the generated text passes, and a text with a mistake does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from einsumcascade.cli import app
from einsumcascade.codegen.dtypes import selectors
from einsumcascade.codegen.launch import Built
from einsumcascade.errors import InputError
from einsumcascade.gallery import header, load, names
from einsumcascade.language.extents import bind
from einsumcascade.language.parser import constrained, parse
from einsumcascade.schedules.schedule import ORDERS, KernelSchedule, Schedule
from einsumcascade.verify import judging as module
from einsumcascade.verify.verify import DTYPES, filled_extents, random_inputs, verify
from tests.gallery.draws import extents_of
from tests.nightly import NIGHTLY

VARIANTS = tuple(name for name in names() if header(name).kernel == "yes")
SMALL = {"B": 1, "P": 9, "M": 21, "E": 16, "F": 16}
TILES = Schedule(kernels={"softmax_attention": KernelSchedule(tiles={"p": 16, "m": 16})})


def test_inputs_that_only_compare_are_verified_in_float32() -> None:
    text = "in ID[b, p], KID[b, m]\nS[b, p] = 1 :: sum(m) where ID[b, p] == KID[b, m]\nout S"
    found = verify(parse(text), extents={"B": 2, "P": 9, "M": 21})
    assert found.passed and [(r.dtype, r.output) for r in found.rows] == [("float32", "S")]
    assert found.without == "no gradient reaches an input"


def small(name: str) -> dict[str, int]:
    ranks = {v.upper() for i in load(name).inputs for v in i.indices}
    return {rank: n for rank, n in SMALL.items() if rank in ranks}


# Kernels of many small steps, half a minute each where every step is interpreted, wait for the night.
@pytest.mark.parametrize("name", [n for n in VARIANTS if NIGHTLY or n not in ("hpnet", "mptsnet")])
def test_every_variant_passes(name: str) -> None:
    # One dtype each, in turn; all of them at night, and in `verify --all`.
    dtypes = DTYPES if NIGHTLY else (DTYPES[VARIANTS.index(name) % len(DTYPES)],)
    verification = verify(name, extents=extents_of(load(name), name), dtypes=dtypes)
    assert verification.passed, str(verification)
    assert {row.dtype for row in verification.rows} == set(dtypes)


@pytest.mark.parametrize("constraint", ["m <= p", "p - m < 5", "m < p"])
def test_a_constraint_passes_over_several_tiles(constraint: str) -> None:
    cascade = constrained(load("softmax_attention"), constraint, {})
    verification = verify(cascade, extents={**SMALL, "P": 37, "M": 50}, dtypes=("float32",), schedule=TILES)
    assert verification.passed, str(verification)


def breaking(old: str, new: str) -> Callable[..., Built]:
    """Build as always, then change the text."""
    build = module.build

    def broken(*arguments: Any, **options: Any) -> Built:
        built = build(*arguments, **options)
        # The kernels of the gradient stay as they are.
        assert old in built.source or "backward" in built.cascade.name
        return replace(built, source=built.source.replace(old, new))

    return broken


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("b_RAVN = b_CGM[:, None] * b_RAVN", "b_RAVN = b_RAVN"),
        ("b_RSD = b_CGM * b_RSD + b_LSD", "b_RSD = b_RSD + b_LSD"),
        ("mask=(o_p < P)[:, None])", "mask=(o_p < P - 1)[:, None])"),
        ("tl.where((o_m < M)[None, :], b_QKN, ", "tl.where((o_m < M - 1)[None, :], b_QKN, "),
    ],
    ids=["numerator not rescaled", "denominator not rescaled", "a row not written", "a key not read"],
)
def test_a_mistake_in_the_text_fails(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build", breaking(old, new))
    verification = verify("softmax_attention", extents=SMALL, dtypes=("float32",), schedule=TILES)
    assert not verification.passed
    assert str(verification).endswith("FAIL") and verification.to_dict()["passed"] is False


def test_the_command_ends_with_one_for_a_broken_text(monkeypatch: pytest.MonkeyPatch) -> None:
    # A text whose products lack their accumulator runs, and is wrong.
    monkeypatch.setattr(module, "build", breaking("b_V, b_RAVN,", "b_V,"))
    arguments = ["verify", "softmax_attention", "--extents", "B=1,H=1,P=9,M=80,E=16,F=16", "--dtype", "float32"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["passed"] is False
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and result.stdout.endswith("FAIL\n") and result.stderr == ""


def test_what_is_not_said_gets_an_extent() -> None:
    assert filled_extents(load("softmax_attention"), {"P": 5}) == {"B": 2, "H": 2, "P": 5, "E": 64, "M": 77, "F": 64}


def test_the_extent_of_a_rank_that_the_text_defines_replaces_its_definition() -> None:
    cascade = parse("in X[m], Y[k]\nrank j = M // 2\nS[j] = X[j] * Y[j]\nout S")
    verification = verify(cascade, extents={"M": 14, "K": 9, "J": 5}, dtypes=("float32",))
    assert verification.passed, str(verification)


def test_a_rank_that_the_text_defines_gets_no_extent_of_its_own() -> None:
    cascade = parse("in X[m], Y[n]\nrank n = M // 2\nS[n] = Y[n] * X[n]\nout S")
    verification = verify(cascade, extents={"M": 9}, dtypes=("float32",))
    assert verification.passed and verification.extents == {"M": 9, "N": 4}


def test_an_output_that_is_an_input_and_one_that_indexes() -> None:
    for text in ("in X[m]\nS[m] = 2 * X[m]\nout S, X", "in ROW[p], X[m,e]\nY[p,e] = 2 * X[ROW[p],e]\nout Y"):
        verification = verify(parse(text), dtypes=("bfloat16",))
        assert verification.passed, str(verification)


def test_what_only_selects_is_whole_and_may_be_equal() -> None:
    cascade = parse(
        "in X[m], KIND[m], ROW[m], Y[n], Z[m]\n"
        "S[m] = select(KIND[m] == 1, X[m], 0) + Y[ROW[m]] + select(Z[m] > 0, Z[m], 1)\nout S"
    )
    inputs = random_inputs(cascade, bind(cascade, extents={"M": 200, "N": 9}), "float32")
    assert {n for n, t in inputs.items() if not t.is_floating_point()} == {"KIND", "ROW"} == selectors(cascade)
    assert set(inputs["KIND"].tolist()) == set(range(4)) and set(inputs["ROW"].tolist()) == set(range(9))
    assert verify(cascade, extents={"M": 20, "N": 9}).passed


def test_a_seed_repeats_the_errors() -> None:
    one, two, other = (verify("gqa", extents=small("gqa"), dtypes=("float32",), seed=s).to_dict() for s in (1, 1, 2))
    assert one == two and one["rows"] != other["rows"]


def test_mistakes_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        verify("gqa", dtypes=("float8",))
    assert caught.value.codes == ("wrong-dtype",)
    with pytest.raises(InputError) as caught:
        verify("gqa", extents={"Z": 3})
    assert caught.value.codes == ("unknown-rank",)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["softmax_attention", "linear", "mla"])
def test_the_order_in_which_programs_begin_changes_no_result(name: str, order: str) -> None:
    cascade = load(name)
    extents = filled_extents(cascade, {r: n for r, n in {"B": 2, "H": 3, "P": 70, "M": 33}.items() if r in small(name)})
    binding = bind(cascade, extents={**extents, **{r: 16 for r in ("E", "F") if r in small(name)}})
    inputs = random_inputs(cascade, binding, "float16")
    built = module.build(
        cascade, extents=binding.extents, dtype="float16", target=module.present_target(), tile_limit=32
    )
    kernels = {n: replace(k, order=order) for n, k in built.schedule.kernels.items()}
    rows = module.judged(cascade, inputs, binding, "float16", seed=0, schedule=Schedule(kernels=kernels))
    assert all(r.verdict.passed for r in rows), rows
