"""The printer: whatever it prints parses to an equal value."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.language.ir import (
    Cascade,
    Definition,
    Einsum,
    Expr,
    Init,
    Input,
    Iter,
    Num,
    Output,
    Read,
    Scalar,
    Var,
    apply,
    variables,
)
from einsumcascade.language.ops import OPS, REDUCTIONS
from einsumcascade.language.parser import parse, parse_expr
from einsumcascade.language.printer import print_expr

RANKS = ("m", "p", "k")
TENSORS = {"X": ("p", "m"), "Y": ("m",), "W": ("k", "p"), "Z": ()}
NAMES = parse("in X[p,m], Y[m], W[k,p], Z\nconst c = 2\nS[p] = X[p,m] * Y[m] * W[k,p] * Z * c :: sum(m, k)\nout S")

_numbers = st.one_of(
    st.integers(min_value=-20, max_value=10**12),
    st.floats(allow_nan=False, allow_infinity=True, width=64).filter(lambda x: x != 0 or math.copysign(1, x) > 0),
).map(lambda v: Num(value=v))
_leaves = st.one_of(
    _numbers,
    st.sampled_from(RANKS).map(lambda v: Var(name=v)),
    st.sampled_from(["c", "M", "P", "K"]).map(lambda v: Scalar(name=v)),
)
_ARITHMETIC = sorted(
    o.name for o in OPS.values() if not (o.condition or o.internal or o.fiberwise) and o.name not in ("select", "neg")
)
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def _grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def applied(name: str) -> st.SearchStrategy[Expr]:
        return st.tuples(*[inner] * OPS[name].arity).map(lambda args: apply(name, *args))

    def read(name: str) -> st.SearchStrategy[Expr]:
        return st.tuples(*[inner] * len(TENSORS[name])).map(lambda i: Read(tensor=name, indices=i))

    return st.one_of(
        st.sampled_from(_ARITHMETIC).flatmap(applied),
        st.sampled_from(sorted(TENSORS)).flatmap(read),
        # The text of a negated literal is that of a negative literal, so the parser never makes the former.
        inner.filter(lambda e: not isinstance(e, Num)).map(lambda e: apply("neg", e)),
        st.tuples(_conditions(inner), inner, inner).map(lambda a: apply("select", *a)),
    )


def _conditions(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    comparison = st.tuples(st.sampled_from(_COMPARISONS), inner, inner).map(lambda a: apply(*a))
    return st.recursive(
        comparison,
        lambda c: st.one_of(
            st.tuples(st.sampled_from(["and", "or", "eq"]), c, c).map(lambda a: apply(*a)),
            c.map(lambda e: apply("not", e)),
        ),
        max_leaves=4,
    )


expressions = st.recursive(_leaves, _grow, max_leaves=12)
# A conjunction of a constraint or `where` is two conditions, so a single one is none.
conditions = _conditions(_leaves).filter(lambda e: getattr(e, "op", "") != "and")


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """Draw a cascade of one to four Einsums over the inputs of TENSORS, some in an iterative block."""
    statements: list[Einsum | Init | Iter] = []
    count = draw(st.integers(min_value=1, max_value=4))
    for i in range(count):
        expr = draw(expressions)
        inside = variables(expr)
        kept = tuple(v for v in inside if draw(st.booleans()))
        reduced = tuple(v for v in inside if v not in kept)
        where = tuple(c for c in draw(st.lists(conditions, max_size=2)) if set(variables(c)) <= set(inside))
        statements.append(
            Einsum(
                tensor=f"T{i}",
                indices=tuple(Var(name=v) for v in kept),
                expr=expr,
                reduce=draw(st.sampled_from(sorted(REDUCTIONS))) if reduced else None,
                ranks=reduced,
                where=where,
            )
        )
    if draw(st.booleans()):
        k, descending = Var(name="k"), draw(st.booleans())
        here, following = (apply("add", k, Num(value=1)), k) if descending else (k, apply("add", k, Num(value=1)))
        step = Einsum(
            tensor="R",
            indices=(following,),
            expr=apply(
                "max", Read(tensor="R", indices=(here,)), draw(_leaves.filter(lambda e: not isinstance(e, Var)))
            ),
        )
        first = Scalar(name="K") if descending else Num(value=0)
        statements += [
            Init(tensor="R", indices=(first,), expr=draw(_numbers)),
            Iter(var="k", body=(step,), descending=descending),
        ]
    return Cascade(
        inputs=tuple(Input(tensor=t, indices=i) for t, i in TENSORS.items()),
        constants=(Definition(name="c", expr=draw(_numbers)),),
        ranks=tuple(draw(st.lists(st.just(Definition(name="j", expr=Num(value=4))), max_size=1))),
        constraints=tuple(draw(st.lists(conditions, max_size=2))),
        body=tuple(statements),
        outputs=(Output(tensor="T0", dtype=draw(st.sampled_from([None, "float32"]))),),
    )


@given(expressions)
def test_a_printed_expression_parses_to_an_equal_one(expr: Expr) -> None:
    assert parse_expr(print_expr(expr), names_of=NAMES) == expr


@given(conditions)
def test_a_printed_condition_parses_to_an_equal_one(condition: Expr) -> None:
    assert parse_expr(print_expr(condition), names_of=NAMES) == condition


@given(cascades())
def test_a_printed_cascade_parses_to_an_equal_one(cascade: Cascade) -> None:
    assert parse(str(cascade)) == cascade


@given(cascades())
def test_printing_twice_gives_the_same_text(cascade: Cascade) -> None:
    assert str(parse(str(cascade))) == str(cascade)


@pytest.mark.parametrize(
    "text",
    [
        "m + p + 2",
        "m - (p - 2)",
        "m * (p + 2)",
        "-(m + p)",
        "-m ** 2",
        "(-m) ** 2",
        "2 ** -m",
        "(m ** p) ** 2",
        "m / (p / 2)",
        "max(m, 0)",
        "exp(-X[p, m])",
        "X[p - 1, m // 2 + 1]",
        "m - -2",
        "-inf",
        "(-2) ** m",
    ],
)
def test_an_expression_has_the_brackets_it_needs_and_no_more(text: str) -> None:
    assert print_expr(parse_expr(text, names_of=NAMES)) == text


def test_a_cascade_prints_its_declarations_first_and_indents_blocks() -> None:
    text = """out S: float32, R
R[k+1] = R[k] + Y[k]  # moved below, into the block
in Y[k], X[p,m]
const c = E0 / 2
rank e0 = 4
constraint m<=p"""
    lines = text.splitlines()
    text = "\n".join(
        [lines[0], "S[p] = c*X[p,m] :: max(m) where m!=2", "init R[0] = 0", "iter k:", lines[1], "end", *lines[2:]]
    )
    assert (
        str(parse(text))
        == """\
in Y[k], X[p, m]
const c = E0 / 2
rank e0 = 4
constraint m <= p
S[p] = c * X[p, m] :: max(m) where m != 2
init R[0] = 0
iter k:
  R[k + 1] = R[k] + Y[k]
end
out S: float32, R"""
    )


def test_every_part_prints_its_own_text() -> None:
    cascade = parse("in Y[k]\ninit R[K] = 0\niter k desc:\nR[k] = R[k+1] + Y[k]\nend\nout R")
    assert [str(s) for s in cascade.body] == ["init R[K] = 0", "iter k desc:\n  R[k] = R[k + 1] + Y[k]\nend"]
    assert str(cascade.einsums[0].expr) == "R[k + 1] + Y[k]"
