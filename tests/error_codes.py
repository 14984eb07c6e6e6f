"""The codes of errors that the source names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def codes_of_the_tree() -> set[str]:
    """List the codes that the source names: `code="..."`, or the first argument of what takes a code first."""
    folders = ("einsumcascade", "benchmarks", "codegen", "schedules", "reference")
    trees = [ast.parse(p.read_text(encoding="utf-8")) for f in folders for p in sorted((ROOT / f).rglob("*.py"))]
    makers = {name for tree in trees for node in ast.walk(tree) for name in _takes_a_code_first(node)}
    return {
        value.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for value in _codes_of_a_call(node, makers)
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }


def _takes_a_code_first(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name):
            functions = [node]
        case ast.ClassDef(name=name, body=body):
            functions = [f for f in body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        case _:
            return
    for function in functions:
        if [a.arg for a in function.args.args if a.arg not in ("self", "cls")][:1] == ["code"] and name != "__init__":
            yield name


def _codes_of_a_call(node: ast.Call, makers: set[str]) -> Iterator[ast.expr]:
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    for value in [k.value for k in node.keywords if k.arg == "code"] + (node.args[:1] if name in makers else []):
        yield from (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
