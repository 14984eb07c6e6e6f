"""Parse text into a Cascade. Every mistake of a text is reported at once, each with its place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lark import Token, Tree
from lark.exceptions import UnexpectedInput

from einsumcascade.errors import CascadeError, Diagnostic, EinsumCascadeWarning, SourceText, nearest
from einsumcascade.language.check import check
from einsumcascade.language.culling import culled_reads
from einsumcascade.language.fiberwise import SOLVE_RULE
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
    Statement,
    variable_of,
    variables,
)
from einsumcascade.language.ops import OPS
from einsumcascade.language.syntax import (
    KEYWORDS,
    Mistake,
    fail,
    grammar,
    limit_depth,
    logical_lines,
    parse_line,
    span_of,
    syntax_mistake,
)
from einsumcascade.language.terms import Names, conjuncts, expression, number


def parse(text: str, *, name: str = "<text>") -> Cascade:
    """Parse and check the text of a cascade.

    Args:
        text: statements, one a line; `#` starts a comment; a line goes on inside open brackets.
        name: what messages call the text, usually its file.

    Returns: a checked cascade; `str()` of it parses to an equal value.
    Raises: CascadeError: with every mistake found, each with its line and a caret.
    Warns: EinsumCascadeWarning: `culled-read`, an Einsum reads elements that the one that writes them had culled.
    Cost: linear in the text.

    >>> print(parse("in X[p, m]\\nS[p] = X[p, m] :: max(m)\\nout S"))
    in X[p, m]
    S[p] = X[p, m] :: max(m)
    out S
    """
    source = SourceText(text=text, name=name)
    problems: list[Diagnostic] = []
    trees: list[Tree[Token]] = []
    for line, body in logical_lines(text):
        try:
            trees.append(parse_line(body, line))
        except Mistake as m:
            problems.append(m.diagnostic)
    if problems:
        # Names cannot be judged while a line that may define them is unreadable; operators can.
        late = _Builder(trees, "cascade").build()[1]
        problems += [d for d in late if d.code in ("unknown-operator", "not-associative", "operand-count")]
        raise CascadeError(diagnostics=tuple(_ordered(problems)), source=source)
    if not trees:
        raise CascadeError.of(
            "empty-text",
            "the text holds no statement",
            rule="a cascade has inputs, Einsums and outputs",
            hint="in X[p, m]; S[p] = X[p, m] :: max(m); out S, one a line",
            source=source,
        )
    cascade, problems = _Builder(trees, "cascade" if name.startswith("<") else Path(name).stem or "cascade").build()
    problems = problems or list(check(cascade))
    if problems:
        raise CascadeError(diagnostics=tuple(_ordered(problems)), source=source)
    for d in culled_reads(cascade):
        warnings.warn(d.render(source, kind=""), EinsumCascadeWarning, stacklevel=2)
    return replace(cascade, source=source)


def constrained(cascade: Cascade, condition: str, constants: Mapping[str, float]) -> Cascade:
    """Add constraints given as text; see `Cascade.constrain`."""
    source = SourceText(text=condition, name="<constraint>")
    try:
        conditions = conditions_of(condition, Names.of(cascade, constants=constants))
        numbers = {k: number(k, v) for k, v in constants.items()}
    except Mistake as m:
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


def conditions_of(text: str, names: Names) -> tuple[Expr, ...]:
    """Read the conditions of a constraint. Raises: Mistake."""
    if not text.strip():
        raise Mistake(
            "empty-text",
            "the constraint is empty",
            None,
            rule="a constraint is a condition",
            hint="for instance 'm <= p'",
        )
    tree = parse_line("constraint " + text, 1, column=-len("constraint "))
    return tuple(expression(t, names) for t in tree.children if isinstance(t, Tree | Token))


def _ordered(problems: list[Diagnostic]) -> list[Diagnostic]:
    return sorted(problems, key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0))


class _Builder:
    """Assemble statements into a cascade: names first, then expressions."""

    def __init__(self, trees: list[Tree[Token]], name: str) -> None:
        self.trees, self.name = trees, name
        self.problems: list[Diagnostic] = []
        self.names = self._collect()

    def _collect(self) -> Names:
        tensors: set[str] = set()
        constants: set[str] = set()
        named: set[str] = set()
        indexed: set[str] = set()
        for tree in self.trees:
            for access in tree.iter_subtrees():
                match access.data:
                    case "tensor" | "scalar_tensor":
                        head, *rest = [str(c) for c in access.children if c is not None]
                        tensors.add(head)
                        named.update(rest)
                        indexed.update([head] if rest else [])
                    case "constant":
                        constants.add(str(access.children[0]))
                    case "rank":
                        named.add(variable_of(str(access.children[0])))
                    case "access":
                        tensors.add(str(access.children[0]))
                        indexed.update([str(access.children[0])] if len(access.children) > 1 else [])
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
        return Names(tensors=tensors, constants=constants, variables=named - constants, indexed=indexed)

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
                            inputs.append(Input(tensor=head, indices=tuple(rest), span=span_of(d)))
                    case "constant":
                        constants.append(Definition(name=str(kids[0]), expr=self._e(kids[1]), span=span_of(tree)))
                    case "rank":
                        rank = str(kids[0])
                        ranks.append(Definition(name=variable_of(rank), expr=self._e(kids[1]), span=span_of(tree)))
                    case "constraint":
                        constraints += [self._e(c) for c in kids]
                    case "output":
                        outputs += [
                            Output(
                                tensor=str(d.children[0]),
                                span=span_of(d),
                                dtype=str(d.children[1]) if d.children[1] is not None else None,
                            )
                            for d in kids
                        ]
                    case "iter":
                        stack.append((tree, []))
                    case "end":
                        if len(stack) == 1:
                            fail("unmatched-end", "`end` closes no block", tree, rule="`iter i:` opens a block")
                        head_tree, inner = stack.pop()
                        assert head_tree is not None
                        stack[-1][1].append(
                            Iter(
                                var=str(head_tree.children[0]),
                                body=tuple(inner),
                                descending=head_tree.children[1] is not None,
                                span=span_of(head_tree),
                            )
                        )
                    case "init":
                        target = self._target(kids[0])
                        stack[-1][1].append(
                            Init(
                                tensor=target.tensor, indices=target.indices, expr=self._e(kids[1]), span=span_of(tree)
                            )
                        )
                    case "einsum":
                        stack[-1][1].append(self._einsum(tree))
                    case _:
                        raise AssertionError(tree.data)
            except Mistake as m:
                self.problems.append(m.diagnostic)
        if len(stack) > 1:
            head_tree = stack[-1][0]
            assert head_tree is not None
            self.problems.append(
                Diagnostic(
                    code="unclosed-block",
                    headline=f"iter {head_tree.children[0]} has no end",
                    span=span_of(head_tree),
                    rule="a block is closed by `end`",
                )
            )
        cascade = Cascade(
            inputs=tuple(inputs),
            constants=tuple(constants),
            ranks=tuple(ranks),
            constraints=conjuncts(constraints),
            body=tuple(stack[0][1]),
            outputs=tuple(outputs),
            name=self.name,
        )
        return cascade, self.problems

    def _e(self, node: Tree[Token]) -> Expr:
        return expression(node, self.names)

    def _target(self, node: Tree[Token]) -> Read:
        head, *rest = [c for c in node.children if c is not None]
        assert isinstance(head, Token)
        return Read(tensor=str(head), indices=tuple(expression(r, self.names) for r in rest), span=span_of(node))

    def _einsum(self, tree: Tree[Token]) -> Einsum:
        access, body, reduction, conditions = tree.children
        assert isinstance(access, Tree) and isinstance(body, Tree)
        target = self._target(access)
        expr = self._e(body)
        where: tuple[Expr, ...] = ()
        if isinstance(conditions, Tree):
            where = conjuncts([self._e(c) for c in conditions.children if isinstance(c, Tree)])
        free = variables(*target.indices)
        inside = self._local(expr)
        op: str | None = "sum"
        ranks = tuple(v for v in inside if v not in free)
        if isinstance(expr, Apply) and expr.row.fiberwise:
            op = expr.op
            if isinstance(reduction, Tree):
                fail("solve-form", f"{op} reduces by itself", reduction, rule=SOLVE_RULE, hint="drop what follows `::`")
        if isinstance(reduction, Tree):
            op = self._reduction_name(reduction)
            listed = [str(c) for c in reduction.children[1:]]
            for token, v in zip(reduction.children[1:], listed, strict=True):
                if v in free:
                    fail(
                        "reduced-rank-kept",
                        f"{v} is reduced and also on the left",
                        token,
                        rule="a reduced rank does not appear on the left",
                    )
                if listed.count(v) > 1:
                    fail("rank-repeated", f"{v} is reduced twice", token, rule="a reduction names each rank once")
                if v not in variables(expr, *where):
                    fail(
                        "reduced-rank-unused",
                        f"{v} is reduced, but nothing on the right has it",
                        token,
                        rule="a reduction goes over ranks of the right side",
                        hint=nearest(v, inside),
                    )
            missing = [v for v in ranks if v not in listed]
            if missing:
                fail(
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
            span=span_of(access),
        )

    def _local(self, expr: Expr) -> tuple[str, ...]:
        return variables(expr)

    def _reduction_name(self, reduction: Tree[Token]) -> str:
        from einsumcascade.language.ops import REDUCTIONS

        token = reduction.children[0]
        assert isinstance(token, Token)
        name = str(token)
        alias = {"add": "sum", "mul": "prod", "or": "any"}.get(name, name)
        if alias in REDUCTIONS or alias == "topk":
            return alias
        if name in OPS:
            fail(
                "not-associative",
                f"'{name}' is not an associative operator of two operands",
                token,
                rule="a reduction may be regrouped, so its operator must be associative and have an identity",
                hint="known: " + ", ".join(REDUCTIONS),
            )
        fail(
            "unknown-operator",
            f"there is no reduction '{name}'",
            token,
            rule="a reduction names an associative operator",
            hint=nearest(name, (*REDUCTIONS, "topk")),
        )


def parse_expr(text: str, *, names_of: Cascade) -> Expr:
    """Parse one expression over the names of a cascade.

    Raises: CascadeError: the text is not an expression, or uses a name the cascade lacks.
    """
    source = SourceText(text=text, name="<expression>")
    names = Names.of(names_of, variables=[v for e in names_of.einsums for v in e.space])
    try:
        tree = grammar().parse(text, start="expr")
        limit_depth(tree)
        return expression(tree, names)
    except UnexpectedInput as error:
        raise CascadeError(diagnostics=(syntax_mistake(error, text, 1, 0).diagnostic,), source=source) from None
    except Mistake as m:
        raise CascadeError(diagnostics=(m.diagnostic,), source=source) from None


__all__ = ["KEYWORDS", "constrained", "parse", "parse_expr"]
