"""Binding of extents and constants, and the shapes that follow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.errors import InputError
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Einsum, Num, apply
from einsumcascade.language.parser import parse
from einsumcascade.language.shapes import index_range, tensor_shapes

TWO = "in K[m, e], V[m, f]\nA[e, f] = K[m, e] * V[m, f] :: sum(m)\nout A"
TILED = (
    "in X[p, m]\nconst page = 4\nrank m1 = (M + M0 - 1) // M0\nrank m0 = page\n"
    "S[p, m1] = X[p, m1 * M0 + m0] :: sum(m0)\nout S"
)


def codes(text: str, **options: object) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        bind(parse(text), **options)  # type: ignore[arg-type]
    return caught.value.codes


def test_extents_come_from_shapes_and_definitions_in_any_order() -> None:
    binding = bind(parse(TILED), shapes={"X": (2, 10)})
    assert dict(binding.extents) == {"P": 2, "M": 10, "M1": 3, "M0": 4}
    assert dict(binding.constants) == {"page": 4}
    assert isinstance(binding.constants["page"], int)


def test_the_caller_overrides_the_text() -> None:
    assert bind(parse(TILED), shapes={"X": (2, 10)}, extents={"M0": 2}).extents["M1"] == 5
    assert bind(parse(TILED), shapes={"X": (2, 10)}, constants={"page": 5}).extents == {
        "P": 2,
        "M": 10,
        "M1": 2,
        "M0": 5,
    }


def test_extents_alone_are_enough() -> None:
    assert bind(parse(TILED), extents={"P": 1, "M": 8}).extents["M1"] == 2


def test_constants_may_use_extents_and_one_another() -> None:
    text = "in X[m, e]\nconst b = 2 * a\nconst a = E ** -0.5\nY[m, e] = b * X[m, e]\nout Y"
    assert bind(parse(text), shapes={"X": (3, 16)}).constants == {"b": 0.5, "a": 0.25}


def test_a_mismatch_names_both_values_and_the_place() -> None:
    cascade = parse(TWO, name="two.cascade")
    with pytest.raises(InputError) as caught:
        bind(cascade, shapes={"K": (4096, 64), "V": (2048, 32)})
    assert str(caught.value) == (
        "InputError[extent-mismatch]: rank M is 4096 in K but 2048 in V\n"
        "  --> two.cascade:1:13\n"
        " 1 | in K[m, e], V[m, f]\n"
        "   |             ^^^^^^^ M = 2048, from V of shape (M=2048, F=32)\n"
        "   = rule: tensors that share a rank share its extent (bound so far: E=64, M=4096)\n"
        "   = hint: pass tensors of one extent M; for two lengths, use two ranks\n"
        "   = docs/errors.md#extent-mismatch"
    )


def test_every_mistake_is_reported_at_once() -> None:
    assert codes(TWO, shapes={"K": (2, 3, 4), "W": (1,)}, extents={"Z": 1}, constants={"c": 1}) == (
        "unknown-constant", "unknown-rank", "unknown-input", "rank-count", "missing-input",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"shapes": {"K": (2, 3, 4), "V": (3, 4)}}, "rank-count", "K has 2 ranks in the text but 3 axes in the call"),
        ({"shapes": {"K": (3, 4), "V": (3, 4), "k": (1,)}}, "unknown-input", "did you mean 'K'?"),
        ({"shapes": {"K": (3, 4)}}, "missing-input", "the input V is not given"),
        ({"shapes": {}}, "missing-input", "the input K is not given"),
        ({"extents": {"M": 3, "e": 4, "E": 2, "F": 2}}, "unknown-rank", "did you mean 'E'?"),
        ({"extents": {"M": 3}}, "missing-extent", "2 ranks have no extent: E, F"),
        ({"extents": {"M": -3, "E": 2, "F": 2}}, "extent-value", "rank M is -3 in extents"),
        ({"shapes": {"K": (3, 4), "V": (3, 4)}, "extents": {"M": 5}}, "extent-mismatch", "5 in extents but 3 in K"),
    ],
)
def test_a_wrong_argument_is_explained(options: dict[str, object], code: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        bind(parse(TWO), **options)  # type: ignore[arg-type]
    assert code in caught.value.codes
    assert words in str(caught.value)
    assert f"docs/errors.md#{code}" in str(caught.value)


def test_an_extent_is_whole_and_a_division_by_zero_has_no_value() -> None:
    head = "in X[p]\nconst z = 0\n"
    assert codes(head + "rank a = P / 2\nY[p, a] = X[p]\nout Y", shapes={"X": (3,)}) == ("extent-value",)
    assert codes(head + "rank a = P // z\nY[p, a] = X[p]\nout Y", shapes={"X": (3,)}) == ("no-value",)


def test_a_definition_holds_for_the_extent_of_an_input() -> None:
    text = "in X[p]\nrank p = 4\nY[p] = X[p]\nout Y"
    assert codes(text, shapes={"X": (3,)}) == ("extent-mismatch",)
    assert bind(parse(text), shapes={"X": (3,)}, extents={"P": 3}).extents["P"] == 3


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**20))
def test_integer_arithmetic_is_exact(x: int, y: int) -> None:
    value = Binding(extents={}, constants={}).value
    a, b = Num(value=x), Num(value=y)
    for op, want in (("add", x + y), ("sub", x - y), ("mul", x * y), ("floordiv", x // y), ("mod", x % y), ("neg", -x)):
        got = value(apply(op, a, b) if op != "neg" else apply(op, a))
        assert got == want and isinstance(got, int)


@pytest.mark.parametrize(
    ("op", "args", "want"),
    [
        ("div", (1, 0), math.inf), ("div", (-1, 0), -math.inf), ("div", (0, 0), 0.0), ("log", (0,), -math.inf),
        ("sub", (-math.inf, -math.inf), -math.inf), ("exp", (1000.0,), math.inf), ("pow", (0, -0.5), math.inf),
        ("pow", (-1, 0.5), math.nan), ("sqrt", (-1.0,), math.nan), ("max", (2, 3), 3), ("sigmoid", (0.0,), 0.5),
        ("select", (True, 4, 5), 4), ("floor", (2.5,), 2), ("le", (2, 2), True),
    ],
)  # fmt: skip
def test_values_follow_the_value_rules(op: str, args: tuple[float, ...], want: float) -> None:
    got = Binding(extents={}, constants={}).value(apply(op, *(Num(value=a) for a in args)))
    assert got == want or (math.isnan(want) and math.isnan(got))


def test_a_rank_variable_or_a_tensor_has_no_value() -> None:
    cascade = parse("in X[p]\nY[p] = X[p] + p\nout Y")
    with pytest.raises(InputError, match="is not bound to a number"):
        bind(cascade, shapes={"X": (2,)}).value(cascade.einsums[0].expr)


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("T[p, m] = X[p, m]", (3, 10)),
        ("T[m, p] = X[p, m]", (10, 3)),
        ("T[m1 * M0 + m0] = X[0, m1 * M0 + m0]", (12,)),
        ("T[m1 * M0 + m0] = X[0, m1 * M0 + m0] where m1 * M0 + m0 < M", (10,)),
        ("T[m1 * M0 + m0] = X[0, m1 * M0 + m0] where M > m1 * M0 + m0", (10,)),
        ("T[m1 * M0 + m0] = X[0, m1 * M0 + m0] where m1 * M0 + m0 <= 5", (6,)),
        ("T[m1 * M0 + m0] = X[0, m1 * M0 + m0]\nU[m] = T[m]", (10,)),
        ("init T[0, p] = 0\niter m:\n T[m + 1, p] = T[m, p] + X[p, m]\nend", (11, 3)),
        ("init T[M, p] = 0\niter m desc:\n T[m, p] = T[m + 1, p] + X[p, m]\nend", (11, 3)),
        ("T[p + 2] = X[p, 0]", (5,)),
        ("T[P - 1 - p] = X[p, 0]", (3,)),
        ("T = X[p, m] :: sum(p, m)", ()),
    ],
)
def test_shapes_follow_from_what_is_written(body: str, shape: tuple[int, ...]) -> None:
    cascade = parse(f"in X[p, m]\nrank m0 = 4\nrank m1 = (M + M0 - 1) // M0\n{body}\nout T")
    assert tensor_shapes(cascade, bind(cascade, shapes={"X": (3, 10)}))["T"] == shape


def test_a_scatter_needs_a_reader_that_tells_its_extent() -> None:
    text = "in X[p] I[p] Z[n]\nT[I[p]] = X[p]\nU[n] = T[n] + Z[n]\nout U"
    cascade = parse(text)
    assert tensor_shapes(cascade, bind(cascade, shapes={"X": (3,), "I": (3,), "Z": (7,)}))["T"] == (7,)
    cascade = parse(text.replace("U[n] = T[n] + Z[n]\nout U", "out T"))
    with pytest.raises(InputError, match="axis 0 of T has no extent"):
        tensor_shapes(cascade, bind(cascade, shapes={"X": (3,), "I": (3,), "Z": (7,)}))


@given(
    st.sampled_from(["p", "2 * p + m - 3", "(p + 1) // 2", "p % 2", "m - p", "-p + 4 * m", "max(p, m)", "p // 2 * m"])
)
def test_index_ranges_are_exact_or_enclose(text: str) -> None:
    cascade = parse(f"in X[p, m]\nT[p, m] = X[p, m] + ({text})\nout T")
    einsum = cascade.einsums[0]
    assert isinstance(einsum, Einsum)
    index = einsum.expr.args[1]  # type: ignore[union-attr]
    binding = bind(cascade, shapes={"X": (5, 3)})
    found = index_range(index, binding)
    values = [eval(text, {"p": p, "m": m, "max": max}) for p in range(5) for m in range(3)]
    assert found == (min(values), max(values))
