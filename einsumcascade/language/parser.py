"""Parse text into a Cascade. Every mistake of a text is reported at once, each with its place."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from einsumcascade.errors import CascadeError, Diagnostic, SourceText, Span, nearest
from einsumcascade.language.check import check
from einsumcascade.language.ir import (
    Apply,
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
    Statement,
    Var,
    apply,
    subexpressions,
    variable_of,
    variables,
)
from einsumcascade.language.ops import FUNCTIONS, INFIX, OPS

KEYWORDS = ("in", "const", "rank", "constraint", "init", "iter", "end", "out")
_READABLE = {
    "NAME": "a name",
    "NUMBER": "a number",
    "ADD": "an operator",
    "MUL": "an operator",
    "POW": "an operator",
    "COMPARE": "a comparison",
    "$END": "the end of the line",
}
# Every walk over an expression is recursive; this stays well within the recursion limit of Python.
_DEPTH = 150


class _Mistake(Exception):
    """A diagnostic on its way to the list of all."""

    def __init__(self, code: str, headline: str, span: Span | None, *, rule: str = "", hint: str = "") -> None:
        super().__init__(headline)
        self.diagnostic = Diagnostic(code=code, headline=headline, span=span, rule=rule, hint=hint)


@cache
def _grammar() -> Lark:
    text = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(text, parser="lalr", start=["statement", "expr"], propagate_positions=True, maybe_placeholders=True)


def _readable(terminal: str) -> str:
    if terminal in _READABLE:
        return _READABLE[terminal]
    return f"'{_grammar().get_terminal(terminal).pattern.value}'"


def parse(text: str, *, name: str = "<text>") -> Cascade:
    """Parse and check the text of a cascade.

    Args:
        text: statements, one a line; `#` starts a comment; a line goes on inside open brackets.
        name: what messages call the text, usually its file.

    Returns: a checked cascade; `str()` of it parses to an equal value.
    Raises: CascadeError: with every mistake found, each with its line and a caret.
    Cost: linear in the text.

    >>> print(parse("in X[p, m]\\nS[p] = X[p, m] :: max(m)\\nout S"))
    in X[p, m]
    S[p] = X[p, m] :: max(m)
    out S
    """
    source = SourceText(text=text, name=name)
    problems: list[Diagnostic] = []
    trees: list[Tree[Token]] = []
    for line, body in _logical_lines(text):
        try:
            trees.append(_parse_line(body, line))
        except _Mistake as m:
            problems.append(m.diagnostic)
    if problems:
        # Names cannot be judged while a line that may define them is unreadable; operators can.
        late = _Builder(trees, "cascade").build()[1]
        problems += [d for d in late if d.code in ("unknown-operator", "not-associative", "operand-count")]
        raise CascadeError(diagnostics=tuple(_ordered(problems)), source=source)
    if not trees:
        raise CascadeError(
            diagnostics=(
                Diagnostic(
                    code="empty-text",
                    headline="the text holds no statement",
                    rule="a cascade has inputs, Einsums and outputs",
                    hint="in X[p, m]; S[p] = X[p, m] :: max(m); out S, one a line",
                ),
            ),
            source=source,
        )
    cascade, problems = _Builder(trees, "cascade" if name.startswith("<") else Path(name).stem or "cascade").build()
    problems = problems or list(check(cascade))
    if problems:
        raise CascadeError(diagnostics=tuple(_ordered(problems)), source=source)
    return replace(cascade, source=source)


def constrained(cascade: Cascade, condition: str, constants: Mapping[str, float]) -> Cascade:
    """Add constraints given as text; see `Cascade.constrain`."""
    source = SourceText(text=condition, name="<constraint>")
    try:
        if re.fullmatch(r"\s*", condition):
            raise _Mistake(
                "empty-text",
                "the constraint is empty",
                None,
                rule="a constraint is a condition",
                hint="for instance 'm <= p'",
            )
        numbers = {k: _number(k, v) for k, v in constants.items()}
        tree = _parse_line("constraint " + condition, 1, column=-len("constraint "))
        names = _Names(
            tensors={i.tensor for i in cascade.inputs} | {e.tensor for e in cascade.einsums},
            constants={c.name for c in cascade.constants} | set(constants),
            variables=set(_known_variables(cascade)),
        )
        conditions = tuple(_expr(t, names) for t in tree.children if isinstance(t, Tree | Token))
    except _Mistake as m:
        raise CascadeError(diagnostics=(m.diagnostic,), source=source) from None
    new = replace(
        cascade,
        constants=cascade.constants + tuple(Definition(name=k, expr=Num(value=v)) for k, v in numbers.items()),
        constraints=cascade.constraints + conditions,
    )
    problems = list(check(new))
    if problems:
        raise CascadeError(diagnostics=tuple(problems), source=source)
    return new


def _number(name: str, value: float) -> int | float:
    """Take a number of any library over as Python's own, which prints as the language writes it."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise _Mistake("syntax", f"'{name}' is no name", None, rule="a name is an ASCII word")
    if isinstance(value, bool) or not hasattr(value, "__float__") or math.isnan(value):
        raise _Mistake("number-range", f"the constant {name} is {value!r}", None, rule="a constant is a number")
    # The sum turns -0.0, which the language has no way to write, into 0.0.
    return operator.index(value) if hasattr(value, "__index__") else float(value) + 0.0


def _known_variables(cascade: Cascade) -> tuple[str, ...]:
    named = [v for i in cascade.inputs for v in i.indices] + [variable_of(r.name) for r in cascade.ranks]
    return tuple(dict.fromkeys(named))


def _ordered(problems: list[Diagnostic]) -> list[Diagnostic]:
    return sorted(problems, key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0))


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (first line number, text) of each statement; comments become blanks, continuation lines are joined."""
    held, start, depth = "", 0, 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split("#", 1)[0]
        if not held.strip():
            held, start = "", number
        held += line + "\n"
        depth = sum(held.count(c) for c in "[(") - sum(held.count(c) for c in "])")
        if depth <= 0:
            if held.strip():
                yield start, held.rstrip("\n")
            held = ""
    if held.strip():
        yield start, held.rstrip("\n")


def _parse_line(body: str, line: int, *, column: int = 0) -> Tree[Token]:
    flat = body.replace("\n", " ")
    try:
        tree = _grammar().parse(flat, start="statement")
    except UnexpectedInput as error:
        raise _syntax(error, body, line, column) from None
    inner = tree.children[0]
    assert isinstance(inner, Tree)
    _shift(inner, body, line, column)
    _limit_depth(inner)
    return inner


def _limit_depth(tree: Tree[Token]) -> None:
    depth: dict[int, int] = {}
    # Children come before their parents.
    for sub in tree.iter_subtrees():
        depth[id(sub)] = 1 + max((depth[id(c)] for c in sub.children if isinstance(c, Tree)), default=0)
        if depth[id(sub)] > _DEPTH:
            _fail(
                "nested-too-deep",
                f"an expression nests more than {_DEPTH} operators",
                sub,
                rule="a chain of operators counts each of them",
                hint="name a part of it by an Einsum of its own",
            )


def _place(body: str, line: int, column: int, offset: int) -> tuple[int, int]:
    """Line and column of an offset into a joined statement."""
    before = body[:offset]
    row = before.count("\n")
    col = offset - (before.rfind("\n") + 1) + 1
    return line + row, col + (column if row == 0 else 0)


def _shift(tree: Tree[Token], body: str, line: int, column: int) -> None:
    for sub in tree.iter_subtrees():
        if not sub.meta.empty:
            _set(sub.meta, body, line, column)
        for token in sub.children:
            if isinstance(token, Token):
                _set(token, body, line, column)


def _set(where: Any, body: str, line: int, column: int) -> None:
    if where.start_pos is None:
        return
    row, col = _place(body, line, column, where.start_pos)
    last_row, last_col = _place(body, line, column, where.end_pos)
    where.line, where.column = row, max(col, 1)
    where.end_column = last_col if last_row == row else col + 1


def _syntax(error: UnexpectedInput, body: str, line: int, column: int) -> _Mistake:
    # Lark declares the place as None.
    place: Any = error.pos_in_stream
    offset = place if isinstance(place, int) and place >= 0 else len(body)
    width = 1
    if isinstance(error, UnexpectedToken):
        if error.token.type == "$END":
            offset, found = len(body.rstrip()), "the line ends"
        else:
            found, width = f"'{error.token}'", len(error.token)
        expected = sorted({_readable(t) for t in error.accepts or error.expected})
    else:
        assert isinstance(error, UnexpectedCharacters)
        found, expected = f"the character {body[offset]!r}", []
    row, col = _place(body, line, column, offset)
    first = body.split()[0] if body.split() else ""
    hint = ""
    if first.isalpha() and first.islower() and first not in KEYWORDS:
        hint = f"'{first}': " + nearest(first, KEYWORDS)
    elif 0 < len(expected) <= 8:
        hint = "expected " + " or ".join(expected)
    span = Span(line=row, column=max(col, 1), end_column=max(col, 1) + width)
    return _Mistake(
        "syntax",
        f"the statement cannot go on here: {found}",
        span,
        rule="a statement is `in`, `const`, `rank`, `constraint`, `init`, `iter`, `end`, `out` or "
        "`T[i] = expr :: op(k) where c`",
        hint=hint,
    )


def _span(node: Tree[Token] | Token) -> Span | None:
    where: Any = node if isinstance(node, Token) else node.meta
    if getattr(where, "line", None) is None:
        return None
    return Span(line=where.line, column=where.column, end_column=where.end_column)


class _Names:
    """What a bare name of the text can mean."""

    def __init__(self, *, tensors: set[str], constants: set[str], variables: set[str]) -> None:
        self.tensors, self.constants, self.variables = tensors, constants, variables

    def resolve(self, name: str, span: Span | None) -> Expr:
        if name in self.tensors:
            return Read(tensor=name, span=span)
        if name in self.constants:
            return Scalar(name=name, span=span)
        if name in self.variables:
            return Var(name=name, span=span)
        if name[0].isupper() and variable_of(name) in self.variables:
            return Scalar(name=name, span=span)
        known = sorted(self.tensors | self.constants | self.variables)
        raise _Mistake(
            "unknown-name",
            f"nothing is called '{name}'",
            span,
            rule="a bare name is a constant, a rank variable, an extent (upper case) or a scalar tensor",
            hint=nearest(name, known),
        )


def _fail(code: str, headline: str, node: Tree[Token] | Token, *, rule: str = "", hint: str = "") -> NoReturn:
    raise _Mistake(code, headline, _span(node), rule=rule, hint=hint)


def _expr(node: Tree[Token] | Token, names: _Names) -> Expr:
    span = _span(node)
    if isinstance(node, Token):
        raise AssertionError(f"a bare token {node!r} where an expression stands")
    kids = [c for c in node.children if c is not None]
    match node.data:
        case "number":
            text = str(kids[0])
            if math.isinf(float(text)):
                _fail(
                    "number-range",
                    "the number is beyond the range of float64",
                    node,
                    rule="numbers are finite; infinity is written inf",
                )
            return Num(value=float(text) if re.search(r"[.eE]", text) else int(text), span=span)
        case "infinity":
            return Num(value=float("inf"), span=span)
        case "name":
            return names.resolve(str(kids[0]), span)
        case "infix":
            left, symbol, right = kids
            return Apply(op=INFIX[str(symbol)].name, args=(_expr(left, names), _expr(right, names)), span=span)
        case "prefix":
            operand = _expr(kids[1], names)
            if str(kids[0]) == "-":
                if isinstance(operand, Num) and operand.value > 0:
                    return Num(value=-operand.value, span=span)
                return Apply(op="neg", args=(operand,), span=span)
            return Apply(op="not", args=(operand,), span=span)
        case "read":
            return Read(tensor=str(kids[0]), indices=tuple(_expr(k, names) for k in kids[1:]), span=span)
        case "call":
            return _call(node, names)
        case _:
            raise AssertionError(node.data)


def _call(node: Tree[Token], names: _Names) -> Expr:
    head, *rest = node.children
    assert isinstance(head, Tree)
    name = str(head.children[0])
    if name not in FUNCTIONS:
        _fail(
            "unknown-operator",
            f"there is no operator '{name}'",
            head,
            rule="operators are those of the table; a tensor is read with square brackets",
            hint=nearest(name, FUNCTIONS),
        )
    args = [_expr(a, names) for a in rest]
    arity = OPS[name].arity
    if arity == 2 and len(args) > 2 and OPS[name].is_associative:
        out = args[0]
        for a in args[1:]:
            out = apply(name, out, a)
        return out
    if len(args) != arity:
        _fail(
            "operand-count",
            f"{name} takes {arity} operands, here are {len(args)}",
            node,
            rule=f"{name} is written {name}({', '.join('xyz'[:arity])})",
        )
    return Apply(op=name, args=tuple(args), span=_span(node))


class _Builder:
    """Assemble statements into a cascade: names first, then expressions."""

    def __init__(self, trees: list[Tree[Token]], name: str) -> None:
        self.trees, self.name = trees, name
        self.problems: list[Diagnostic] = []
        self.names = self._collect()

    def _collect(self) -> _Names:
        tensors: set[str] = set()
        constants: set[str] = set()
        named: set[str] = set()
        for tree in self.trees:
            for access in tree.iter_subtrees():
                match access.data:
                    case "tensor" | "scalar_tensor":
                        head, *rest = [str(c) for c in access.children if c is not None]
                        tensors.add(head)
                        named.update(rest)
                    case "constant":
                        constants.add(str(access.children[0]))
                    case "rank":
                        named.add(variable_of(str(access.children[0])))
                    case "access":
                        tensors.add(str(access.children[0]))
                        named.update(
                            str(n.children[0])
                            for c in access.children[1:]
                            if isinstance(c, Tree)
                            for n in c.iter_subtrees()
                            if n.data == "name" and str(n.children[0])[0].islower()
                        )
                    case "reduction":
                        named.update(str(c) for c in access.children[1:])
                    case _:
                        pass
        return _Names(tensors=tensors, constants=constants, variables=named - constants)

    def build(self) -> tuple[Cascade, list[Diagnostic]]:
        inputs: list[Input] = []
        constants: list[Definition] = []
        ranks: list[Definition] = []
        constraints: list[Expr] = []
        outputs: list[Output] = []
        stack: list[tuple[Tree[Token] | None, list[Statement]]] = [(None, [])]
        for tree in self.trees:
            kids: list[Any] = [c for c in tree.children if c is not None]
            try:
                match tree.data:
                    case "input":
                        for d in kids:
                            head, *rest = [str(c) for c in d.children if c is not None]
                            inputs.append(Input(tensor=head, indices=tuple(rest), span=_span(d)))
                    case "constant":
                        constants.append(Definition(name=str(kids[0]), expr=self._e(kids[1]), span=_span(tree)))
                    case "rank":
                        rank = str(kids[0])
                        ranks.append(Definition(name=variable_of(rank), expr=self._e(kids[1]), span=_span(tree)))
                    case "constraint":
                        constraints += [self._e(c) for c in kids]
                    case "output":
                        outputs += [
                            Output(
                                tensor=str(d.children[0]),
                                span=_span(d),
                                dtype=str(d.children[1]) if d.children[1] is not None else None,
                            )
                            for d in kids
                        ]
                    case "iter":
                        stack.append((tree, []))
                    case "end":
                        if len(stack) == 1:
                            _fail("unmatched-end", "`end` closes no block", tree, rule="`iter i:` opens a block")
                        head_tree, inner = stack.pop()
                        assert head_tree is not None
                        stack[-1][1].append(
                            Iter(
                                var=str(head_tree.children[0]),
                                body=tuple(inner),
                                descending=head_tree.children[1] is not None,
                                span=_span(head_tree),
                            )
                        )
                    case "init":
                        target = self._target(kids[0])
                        stack[-1][1].append(
                            Init(tensor=target.tensor, indices=target.indices, expr=self._e(kids[1]), span=_span(tree))
                        )
                    case "einsum":
                        stack[-1][1].append(self._einsum(tree))
                    case _:
                        raise AssertionError(tree.data)
            except _Mistake as m:
                self.problems.append(m.diagnostic)
        if len(stack) > 1:
            head_tree = stack[-1][0]
            assert head_tree is not None
            self.problems.append(
                Diagnostic(
                    code="unclosed-block",
                    headline=f"iter {head_tree.children[0]} has no end",
                    span=_span(head_tree),
                    rule="a block is closed by `end`",
                )
            )
        cascade = Cascade(
            inputs=tuple(inputs),
            constants=tuple(constants),
            ranks=tuple(ranks),
            constraints=_split(constraints),
            body=tuple(stack[0][1]),
            outputs=tuple(outputs),
            name=self.name,
        )
        return cascade, self.problems

    def _e(self, node: Tree[Token]) -> Expr:
        return _expr(node, self.names)

    def _target(self, node: Tree[Token]) -> Read:
        head, *rest = [c for c in node.children if c is not None]
        assert isinstance(head, Token)
        return Read(tensor=str(head), indices=tuple(_expr(r, self.names) for r in rest), span=_span(node))

    def _einsum(self, tree: Tree[Token]) -> Einsum:
        access, body, reduction, conditions = tree.children
        assert isinstance(access, Tree) and isinstance(body, Tree)
        target = self._target(access)
        expr = self._e(body)
        where: tuple[Expr, ...] = ()
        if isinstance(conditions, Tree):
            where = _split([self._e(c) for c in conditions.children if isinstance(c, Tree)])
        free = variables(*target.indices)
        inside = self._local(expr)
        op: str | None = "sum"
        ranks = tuple(v for v in inside if v not in free)
        if isinstance(reduction, Tree):
            op = self._reduction_name(reduction)
            listed = [str(c) for c in reduction.children[1:]]
            for token, v in zip(reduction.children[1:], listed, strict=True):
                if v in free:
                    _fail(
                        "reduced-rank-kept",
                        f"{v} is reduced and also on the left",
                        token,
                        rule="a reduced rank does not appear on the left",
                    )
                if listed.count(v) > 1:
                    _fail("rank-repeated", f"{v} is reduced twice", token, rule="a reduction names each rank once")
                if v not in variables(expr, *where):
                    _fail(
                        "reduced-rank-unused",
                        f"{v} is reduced, but nothing on the right has it",
                        token,
                        rule="a reduction goes over ranks of the right side",
                        hint=nearest(v, inside),
                    )
            missing = [v for v in ranks if v not in listed]
            if missing:
                _fail(
                    "rank-not-reduced",
                    f"{', '.join(missing)}: on the right, neither on the left nor reduced",
                    reduction,
                    rule="every rank of the right side is on the left or in the reduction",
                    hint=f":: {op}({', '.join([*listed, *missing])})",
                )
            ranks = tuple(listed)
        return Einsum(
            tensor=target.tensor,
            indices=target.indices,
            expr=expr,
            reduce=op if ranks else None,
            ranks=ranks,
            where=where,
            span=_span(access),
        )

    def _local(self, expr: Expr) -> tuple[str, ...]:
        return variables(expr)

    def _reduction_name(self, reduction: Tree[Token]) -> str:
        from einsumcascade.language.ops import REDUCTIONS

        token = reduction.children[0]
        assert isinstance(token, Token)
        name = str(token)
        alias = {"add": "sum", "mul": "prod", "or": "any"}.get(name, name)
        if alias in REDUCTIONS:
            return alias
        if name in OPS:
            _fail(
                "not-associative",
                f"'{name}' is not an associative operator of two operands",
                token,
                rule="a reduction may be regrouped, so its operator must be associative and have an identity",
                hint="known: " + ", ".join(REDUCTIONS),
            )
        _fail(
            "unknown-operator",
            f"there is no reduction '{name}'",
            token,
            rule="a reduction names an associative operator",
            hint=nearest(name, tuple(REDUCTIONS)),
        )


def _split(conditions: list[Expr]) -> tuple[Expr, ...]:
    """Take conjunctions apart: each condition applies by itself."""
    out: list[Expr] = []
    for c in conditions:
        if isinstance(c, Apply) and c.op == "and":
            out += _split(list(c.args))
        else:
            out.append(c)
    return tuple(out)


def parse_expr(text: str, *, names_of: Cascade) -> Expr:
    """Parse one expression over the names of a cascade.

    Raises: CascadeError: the text is not an expression, or uses a name the cascade lacks.
    """
    source = SourceText(text=text, name="<expression>")
    names = _Names(
        tensors={i.tensor for i in names_of.inputs} | {e.tensor for e in names_of.einsums},
        constants={c.name for c in names_of.constants},
        variables=set(_known_variables(names_of)) | {v for e in names_of.einsums for v in e.space},
    )
    try:
        tree = _grammar().parse(text, start="expr")
        _limit_depth(tree)
        return _expr(tree, names)
    except UnexpectedInput as error:
        raise CascadeError(diagnostics=(_syntax(error, text, 1, 0).diagnostic,), source=source) from None
    except _Mistake as m:
        raise CascadeError(diagnostics=(m.diagnostic,), source=source) from None


def uses(expr: Expr, name: str) -> bool:
    """Whether `expr` reads the tensor, variable or scalar called `name`."""
    return any(getattr(e, "name", getattr(e, "tensor", None)) == name for e in subexpressions(expr))
