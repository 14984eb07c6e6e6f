"""A derivation as LaTeX, for a paper: what was rewritten, and each claim with its matrix."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from einsumcascade.language.ir import Apply, Expr, Num, Read, Scalar, Var
from einsumcascade.rewrites.proofs import PRIME
from einsumcascade.rewrites.step import Claim, Step

if TYPE_CHECKING:
    from einsumcascade.rewrites.derive import Derivation

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": r"\,",
    "lt": "<",
    "le": r"\le",
    "gt": ">",
    "ge": r"\ge",
    "eq": "=",
    "ne": r"\ne",
}
_BINDS = {"add": 1, "sub": 1, "neg": 1, "mul": 2, "div": 3, "pow": 4}


def latex_of(derivation: Derivation) -> str:
    """Write a derivation as a LaTeX fragment that needs amsmath.

    Returns: text with balanced braces and environments; names are escaped.
    """
    lines = ["% Needs \\usepackage{amsmath}.", f"% Derivation of {_comment(derivation.original.name)}."]
    for rank, (before, after) in derivation.passes.items():
        lines.append(rf"Passes over ${_name(rank)}$: {before} $\to$ {after}.")
    for n, step in enumerate(derivation.steps, start=1):
        lines += ["", rf"\paragraph{{{n}. {_words(step.rule)}.}} {_words(step.what[:1].upper() + step.what[1:])}."]
        if step.claim is not None:
            lines += _claim(step.claim)
        elif step.rule == "not streamed":
            lines += [rf"\emph{{{_words(line)}}}" for line in step.proof[-1:]]
        else:
            lines += _texts(step)
    return "\n".join(lines) + "\n"


def _texts(step: Step) -> list[str]:
    """The Einsums before and after, as they are written."""
    before, after = (["\\\\\n".join(rf"\texttt{{{_words(s)}}}" for s in part)] for part in (step.before, step.after))
    arrow = [r"$\longrightarrow$"] if step.before and step.after else []
    return [r"\begin{quote}", *filter(None, before), *arrow, *filter(None, after), r"\end{quote}"]


def _claim(claim: Claim) -> list[str]:
    x, y = "x", "d"
    if claim.form == "shift":
        rows = [
            rf"F({x}, {y}) &= {latex(claim.basis[0])} \\",
            rf"F({x}, {y}') &= F({x}, {y}) + C, \qquad C = {latex(claim.matrix[0][0])}",
        ]
    elif len(claim.matrix) == 1:
        rows = [
            rf"F({x}, {y}) &= {latex(claim.basis[0])} \\",
            rf"F({x}, {y}') &= C\, F({x}, {y}), \qquad C = {latex(claim.matrix[0][0])}",
        ]
    else:
        basis = r" \\ ".join(latex(b) for b in claim.basis)
        matrix = r" \\ ".join(" & ".join(latex(c) for c in row) for row in claim.matrix)
        rows = [
            rf"B({x}, {y}) &= \begin{{pmatrix}} {basis} \end{{pmatrix}} \\",
            rf"B({x}, {y}') &= C\, B({x}, {y}), \qquad C = \begin{{pmatrix}} {matrix} \end{{pmatrix}}",
        ]
    laws = r"C(d, d) = I, \qquad C(d', d'')\, C(d, d') = C(d, d'')"
    if claim.form == "shift":
        laws = r"C(d, d) = 0, \qquad C(d', d'') + C(d, d') = C(d, d'')"
    references = ", ".join(latex(r) for r in claim.references)
    return [rf"With $d = ({references})$,", r"\begin{align*}", *rows, rf"\\ & {laws}", r"\end{align*}"]


def latex(e: Expr) -> str:
    """Write an expression as LaTeX mathematics."""
    return _latex(e)[0]


def _latex(e: Expr) -> tuple[str, int]:
    match e:
        case Num():
            if e.value in (float("inf"), float("-inf")):
                return (r"\infty" if e.value > 0 else r"-\infty"), 9 if e.value > 0 else 1
            return f"{e.value:g}", 9 if e.value >= 0 else 1
        case Var():
            return _name(e.name), 9
        case Scalar():
            return _name(e.name), 9
        case Read():
            prime = "'" if e.tensor.endswith(PRIME) else ""
            below = ",".join(latex(i) for i in e.indices)
            return _name(e.tensor.removesuffix(PRIME)) + prime + (f"_{{{below}}}" if below else ""), 9
        case Apply(op="div", args=(x, y)):
            return rf"\frac{{{latex(x)}}}{{{latex(y)}}}", 9
        case Apply(op="exp", args=(x,)):
            return rf"e^{{{latex(x)}}}", 9
        case Apply(op="sqrt", args=(x,)):
            return rf"\sqrt{{{latex(x)}}}", 9
        case Apply(op="pow", args=(x, y)):
            return rf"{_held(x, 9)}^{{{latex(y)}}}", 4
        case Apply(op="neg", args=(x,)):
            return f"-{_held(x, 2)}", 1
        case Apply(op="abs", args=(x,)):
            return rf"\left|{latex(x)}\right|", 9
        case Apply(op=op, args=(x, y)) if op in _INFIX:
            binds = _BINDS.get(op, 0)
            return f"{_held(x, binds)} {_INFIX[op]} {_held(y, binds + 1)}", binds
        case Apply(op=op, args=args):
            known = {"log", "sin", "cos", "tanh", "max", "min"}
            head = rf"\{op}" if op in known else rf"\operatorname{{{_name_text(op)}}}"
            return rf"{head}\left({', '.join(latex(a) for a in args)}\right)", 9


def _held(e: Expr, binds: int) -> str:
    text, own = _latex(e)
    return text if own >= binds else rf"\left({text}\right)"


def _name(name: str) -> str:
    """A name in mathematics: one letter as it is, a word upright."""
    return name if len(name) == 1 else rf"\mathit{{{_name_text(name)}}}"


def _name_text(name: str) -> str:
    return name.replace("_", r"\_")


_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _words(text: str) -> str:
    """Plain text with every character of LaTeX's own escaped."""
    return re.sub(r"[\\{}$&#_%^~<>]", lambda m: _ESCAPES[m[0]], text)


def _comment(text: str) -> str:
    return re.sub(r"\s+", " ", text)
