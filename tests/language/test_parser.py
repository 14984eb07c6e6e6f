"""The parser: what each form of the notation becomes, where mistakes are reported, and text as nothing but data."""

from __future__ import annotations

import math
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.errors import CascadeError
from einsumcascade.language.ir import Apply, Cascade, Einsum, Expr, Init, Iter, Num, Read, Scalar, Var, apply
from einsumcascade.language.parser import KEYWORDS, parse, parse_expr

X = Read(tensor="X", indices=(Var(name="m"),))


def body(expression: str, *, after: str = "") -> Expr:
    """Parse `expression` as what an Einsum over p and m maps."""
    cascade = parse(f"in X[m], Y[p], Z, D[m]\nconst c = 2\nS[p, m] = {expression}{after}\nout S")
    return cascade.einsums[0].expr


def codes(text: str) -> tuple[str, ...]:
    """Parse a wrong text and list the codes of its mistakes."""
    with pytest.raises(CascadeError) as caught:
        parse(text)
    return caught.value.codes


def test_a_name_is_a_variable_a_constant_an_extent_or_a_scalar_tensor() -> None:
    assert body("m") == Var(name="m")
    assert body("c") == Scalar(name="c") and not Scalar(name="c").is_extent
    assert body("M") == Scalar(name="M") and Scalar(name="M").is_extent
    assert body("Z") == Read(tensor="Z")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("3.5", 3.5), ("3.", 3.0), (".5", 0.5), ("1e3", 1000.0), ("2E-3", 0.002), ("-4", -4), ("inf", math.inf)],
)
def test_a_number_keeps_its_value_and_kind(text: str, value: float) -> None:
    number = body(text)
    assert number == Num(value=value)
    assert isinstance(number, Num) and type(number.value) is type(value)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("m + p * 2", "m + (p * 2)"),
        ("m - p - 2", "(m - p) - 2"),
        ("m / p * 2", "(m / p) * 2"),
        ("m // p % 2", "(m // p) % 2"),
        ("-m ** 2", "-(m ** 2)"),
        ("2 ** -m", "2 ** (-m)"),
        ("m ** p ** 2", "m ** (p ** 2)"),
        ("-m * p", "(-m) * p"),
        ("max(m, p, 2)", "max(max(m, p), 2)"),
    ],
)
def test_operators_bind_as_in_python(text: str, same: str) -> None:
    assert body(text) == body(same)
    assert str(body(text)) == str(body(same))


def test_conditions_bind_weaker_than_arithmetic_and_or_weakest() -> None:
    m, p = Var(name="m"), Var(name="p")
    condition = body("1", after=" where not m + 1 < p or m == p and p > 2")
    assert condition == Num(value=1)
    where = parse("in X[p, m]\nS[p, m] = X[p, m] where not m + 1 < p or m == p and p > 2\nout S").einsums[0].where
    less = apply("not", apply("lt", apply("add", m, Num(value=1)), p))
    assert where == (apply("or", less, apply("and", apply("eq", m, p), apply("gt", p, Num(value=2)))),)


def test_a_conjunction_and_a_list_of_conditions_are_the_same() -> None:
    start = "in X[p, m]\nS[p, m] = X[p, m] where "
    assert parse(start + "m <= p and p < 3, m > 0\nout S") == parse(start + "m <= p, p < 3, m > 0\nout S")
    assert parse("in X[p, m]\nconstraint m <= p and m > 0\nS = X[p, m]\nout S").constraints == (
        apply("le", Var(name="m"), Var(name="p")),
        apply("gt", Var(name="m"), Num(value=0)),
    )


def test_ranks_only_on_the_right_are_summed_in_the_order_of_their_appearance() -> None:
    einsum = parse("in X[p, m], Y[m, k]\nS[p] = X[p, m] * Y[m, k]\nout S").einsums[0]
    assert (einsum.reduce, einsum.ranks) == ("sum", ("m", "k"))
    assert parse("in X[p, m]\nS[p, m] = X[p, m]\nout S").einsums[0].reduce is None


@pytest.mark.parametrize(("written", "meant"), [("add", "sum"), ("mul", "prod"), ("or", "any"), ("max", "max")])
def test_a_reduction_goes_by_its_own_name_or_that_of_its_operator(written: str, meant: str) -> None:
    assert parse(f"in X[m]\nS = X[m] :: {written}(m)\nout S").einsums[0].reduce == meant


def test_inputs_may_be_separated_by_blanks_and_declarations_may_come_last() -> None:
    first = parse("in X[p,m], Y\nconst c = 2\nconstraint m <= p\nS[p] = c * Y * X[p,m]\nout S")
    assert parse("out S\nS[p] = c * Y * X[p,m]\nconstraint m <= p\nconst c = 2\nin X[p,m] Y") == first


def test_a_rank_statement_takes_the_rank_or_its_variable() -> None:
    text = "in X[m]\nrank {} = 4\nS[m0] = X[m0]\nout S"
    assert parse(text.format("m0")) == parse(text.format("M0"))
    assert parse(text.format("m0")).ranks[0].name == "m0"


def test_indices_may_be_affine_divided_or_gathered() -> None:
    cascade = parse("in X[m], T[j]\nrank k = 4\nS[k, j] = X[2*k + 1] * X[T[j] % 3] * X[k // 2]\nout S")
    first, second = cascade.einsums[0].expr.args  # type: ignore[union-attr]
    assert str(first) == "X[2 * k + 1] * X[T[j] % 3]" and str(second) == "X[k // 2]"


def test_an_iterative_block_holds_its_statements_in_order() -> None:
    cascade = parse("in X[m]\ninit R[0] = 0\niter m:\n  R[m+1] = R[m] + X[m]\nend\nS = R[M]\nout S")
    init, block, last = cascade.body
    assert isinstance(init, Init) and isinstance(last, Einsum)
    assert isinstance(block, Iter) and (block.var, block.descending, len(block.body)) == ("m", False, 1)
    assert parse("in X[m]\ninit R[M] = 0\niter m desc:\nR[m] = R[m+1] + X[m]\nend\nout R").body[1].descending  # type: ignore[union-attr]


def test_comments_blank_lines_and_open_brackets_do_not_matter() -> None:
    plain = parse("in X[p,m]\nS[p] = max(X[p,m], 0) :: sum(m)\nout S")
    assert (
        parse("# a ( comment [\n\nin X[p,\n  m] # more\n\nS[p] = max(X[p,m],\n\n   0) :: sum(m)\r\nout S\n\n") == plain
    )


def test_outputs_may_name_a_dtype() -> None:
    outputs = parse("in X[m]\nS = X[m]\nT = X[m] :: max(m)\nout S: float32, T").outputs
    assert [(o.tensor, o.dtype) for o in outputs] == [("S", "float32"), ("T", None)]


def test_the_name_of_a_file_becomes_the_name_of_the_cascade() -> None:
    text = "in X[m]\nS = X[m]\nout S"
    assert parse(text, name="folder/mine.cascade").name == "mine"
    assert parse(text).name == "cascade"


def test_spans_are_kept_and_do_not_take_part_in_equality() -> None:
    here, there = parse("in X[m]\nS = X[m]\nout S"), parse("\n\n  in X[m]\n  S =   X[m]\nout S")
    assert here == there and hash(here) == hash(there)
    span = there.einsums[0].expr.span
    assert span is not None and (span.line, span.column, span.end_column) == (4, 9, 13)


def test_a_place_on_a_continued_line_is_that_of_its_own_line() -> None:
    with pytest.raises(CascadeError) as caught:
        parse("in X[m]\nS = max(X[m],\n        nothing)\nout S")
    span = caught.value.diagnostics[0].span
    assert span is not None and (span.line, span.column, span.end_column) == (3, 9, 16)


def test_every_mistake_is_reported_in_the_order_of_the_text() -> None:
    text = "in X[m]\nA = foo(X[m])\nB = X[m] + nothing\nC = X[m] :: sub(m)\nD = exp(X[m], 2)\nout A"
    assert codes(text) == ("unknown-operator", "unknown-name", "not-associative", "operand-count")


def test_mistakes_of_operators_are_reported_beside_those_of_syntax() -> None:
    assert codes("in X[m]\nA = X[m] +\nB = foo(X[m])\nout A") == ("syntax", "unknown-operator")


def test_a_constraint_is_added_to_a_cascade_with_its_constants() -> None:
    cascade = parse("in X[p, m]\nS[p] = X[p, m] :: sum(m)\nout S")
    found = cascade.constrain("p - m < w, m <= p", w=16)
    assert found == parse("in X[p, m]\nconst w = 16\nconstraint p - m < w, m <= p\nS[p] = X[p, m] :: sum(m)\nout S")
    assert cascade.constraints == ()


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("", "empty-text"),
        (" ", "empty-text"),
        ("p - m", "not-a-condition"),
        ("p <", "syntax"),
        ("q < 3", "unknown-name"),
        ("p < m)", "syntax"),
        ("p < w", "unknown-name"),
        ("p < X", "index-count"),
    ],
)
def test_a_wrong_constraint_is_refused(condition: str, code: str) -> None:
    cascade = parse("in X[p, m]\nS[p] = X[p, m] :: sum(m)\nout S")
    with pytest.raises(CascadeError) as caught:
        cascade.constrain(condition)
    assert caught.value.codes == (code,)


def test_an_expression_is_parsed_over_the_names_of_a_cascade() -> None:
    cascade = parse("in X[p, m]\nconst c = 2\nS[p] = X[p, m] :: sum(m)\nout S")
    assert str(parse_expr("c * S[p] + m", names_of=cascade)) == "c * S[p] + m"
    with pytest.raises(CascadeError, match="unknown-name"):
        parse_expr("d * S[p]", names_of=cascade)
    with pytest.raises(CascadeError, match="syntax"):
        parse_expr("c *", names_of=cascade)


@pytest.mark.parametrize(
    "name",
    [
        "__import__",
        "__class__",
        "_x",
        "os.system",
        "X.__class__",
        "`id`",
        "$(id)",
        "'a'",
        '"a"',
        "{0}",
        "x;y",
        "α",
        "x\0",
        "\x1b[31m",
        "a\\b",
    ],
)
def test_what_is_no_ascii_word_is_no_name(name: str) -> None:
    assert "syntax" in codes(f"in X[m], {name}[m]\nS = X[m]\nout S")
    assert "syntax" in codes(f"in X[m]\nS = X[m] * {name}\nout S")


@pytest.mark.parametrize(
    "name", ["lambda", "import", "tl", "exec", "eval", "class", "None", "True", "float", "torch", "np"]
)
def test_a_word_of_python_is_an_ordinary_name(name: str) -> None:
    cascade = parse(f"in {name}[m], X[m]\nS = {name}[m] * X[m]\nout S")
    assert cascade.inputs[0].tensor == name
    assert parse(str(cascade)) == cascade


@pytest.mark.parametrize("name", ["lambda", "exec", "eval", "open", "print", "getattr", "system"])
def test_only_operators_of_the_table_can_be_called(name: str) -> None:
    assert codes(f"in X[m]\nS = {name}(X[m])\nout S") == ("unknown-operator",)


@pytest.mark.parametrize(
    "expression",
    ["(" * 5000 + "X[m]" + ")" * 5000, "-" * 5000 + "X[m]", " + ".join(["X[m]"] * 5000), "X[m] * " + "9" * 5000],
    ids=["brackets", "signs", "terms", "digits"],
)
def test_an_expression_beyond_all_measure_parses_or_is_a_cascade_error(expression: str) -> None:
    try:
        cascade = parse(f"in X[m]\nS[m] = {expression}\nout S")
    except CascadeError as error:
        assert error.codes
    else:
        assert parse(str(cascade)) == cascade


def test_a_message_holds_no_control_character_of_the_text() -> None:
    with pytest.raises(CascadeError) as caught:
        parse("in X[m]\nS = X[m] \x1b[2J\0\nout S")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", str(caught.value))


def test_a_hint_names_no_terminal_of_the_grammar() -> None:
    with pytest.raises(CascadeError) as caught:
        parse("in X[m]\nS = X[m] where 0 <= m < 3\nT = X[m] +\nout S, T")
    assert not re.search(r"\b(INF|ADD|MUL|POW|AND|OR|NOT|DESC|COMPARE|NAME|NUMBER)\b", str(caught.value))


@given(st.text(alphabet=string.printable + "αé\0\x85\u2028", max_size=60))
def test_any_text_parses_or_is_a_cascade_error(text: str) -> None:
    for candidate in (text, f"in X[m]\nS[m] = {text}\nout S"):
        try:
            cascade = parse(candidate)
        except CascadeError as error:
            assert error.diagnostics and str(error)
        else:
            assert isinstance(cascade, Cascade)


_WORDS = st.sampled_from(
    [
        *KEYWORDS,
        "X",
        "S",
        "m",
        "p",
        "M",
        "[",
        "]",
        "(",
        ")",
        "=",
        "::",
        ":",
        ",",
        "+",
        "-",
        "*",
        "**",
        "//",
        "<=",
        "<",
        "2",
        "1.5",
        "inf",
        "exp",
        "max",
        "sum",
        "where",
        "and",
        "not",
        "desc",
        "\n",
        "#",
    ]
)


@given(st.lists(_WORDS, max_size=30))
def test_any_arrangement_of_words_parses_or_is_a_cascade_error(words: list[str]) -> None:
    text = " ".join(words)
    try:
        cascade = parse(f"in X[m]\n{text}\nout S")
    except CascadeError as error:
        assert all(d.code and d.headline for d in error.diagnostics)
    else:
        assert parse(str(cascade)) == cascade


def test_the_operators_of_the_notation_are_those_of_the_table() -> None:
    expr = body("exp(m) + silu(m) + select(m < p, m, p)")
    assert isinstance(expr, Apply) and expr.row.symbol == "+"


def test_a_bare_name_of_a_tensor_with_ranks_is_the_extent() -> None:
    text = "in C[m,c], X[m]\nrank m1 = C // 2\nS[c] = C[m,c] * X[m] / C :: sum(m)\nout S"
    cascade = parse(text)
    assert parse(str(cascade)) == cascade
    assert [type(x).__name__ for x in (cascade.ranks[0].expr.args[0],)] == ["Scalar"]  # type: ignore[union-attr]
