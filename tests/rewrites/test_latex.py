"""Derivations as LaTeX: balanced, escaped, and with what a reader needs."""

from __future__ import annotations

import re

import pytest

from einsumcascade.language.parser import parse
from einsumcascade.rewrites.derive import derive
from einsumcascade.rewrites.latex import latex, latex_of
from tests.rewrites.rows import ACCEPTED, MONOTONE, REJECTED

TEXTS = {
    **{name: row.text for name, row in ACCEPTED.items()},
    **MONOTONE,
    **{name: text for name, (text, _) in REJECTED.items()},
}


def balanced(text: str) -> bool:
    depth = 0
    for c in re.sub(r"\\[{}\\]", "", text):
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth < 0:
            return False
    begins, ends = (re.findall(rf"\\{word}{{(\w+\*?)}}", text) for word in ("begin", "end"))
    return depth == 0 and sorted(begins) == sorted(ends) and text.count(r"\left") == text.count(r"\right")


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_balanced_and_has_every_step(name: str) -> None:
    derivation = derive(parse(TEXTS[name]))
    text = latex_of(derivation)
    assert balanced(text)
    assert text.count(r"\paragraph{") == len(derivation.steps)
    assert text.count(r"\begin{align*}") == sum(s.claim is not None for s in derivation.steps)


def test_a_matrix_stands_beside_its_basis_and_laws() -> None:
    text = latex_of(derive(parse(ACCEPTED["variance"].text)))
    assert r"\begin{pmatrix} 1 & 2 \, \left(\mathit{MU}_{p} - \mathit{MU}'_{p}\right)" in text
    assert r"C(d', d'')\, C(d, d') = C(d, d'')" in text


def test_names_cannot_break_the_text() -> None:
    text = "in A_b[p,m]\nG_1[p] = A_b[p,m] :: max(m)\nS[p] = exp(A_b[p,m] - G_1[p]) :: sum(m)\nout S"
    shown = latex_of(derive(parse(text, name="50%_#.cascade")))
    assert balanced(shown) and r"\mathit{A\_b}" in shown
    body = "\n".join(line for line in shown.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)[#%]", body)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("X[p] / S", r"\frac{\mathit{X}_{p}}{S}"),
        ("(X[p] + S) * S", r"\left(X_{p} + S\right) \, S"),
        ("-(X[p] + S) ** 2", r"-\left(X_{p} + S\right)^{2}"),
        ("exp(X[p] - S)", r"e^{X_{p} - S}"),
        ("relu(X[p])", r"\operatorname{relu}\left(X_{p}\right)"),
        ("sqrt(abs(X[p]))", r"\sqrt{\left|X_{p}\right|}"),
        ("X[p] - (S - 1)", r"X_{p} - \left(S - 1\right)"),
    ],
)
def test_expressions_keep_their_grouping(text: str, shown: str) -> None:
    (e,) = parse(f"in X[p], S\nY[p] = {text}\nout Y").einsums
    assert latex(e.expr) == shown.replace(r"\mathit{X}", "X")
