"""The layers: which part of the package may import which, and what importing the package costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "einsumcascade"

# Left to right: a layer may import itself and all before it. `gallery` reads texts with the parser, nothing more;
# `__main__` only starts the cli; the public face, `__init__`, comes last.
ORDER = (
    "errors",
    "caches",
    "language",
    "gallery",
    "analysis",
    "rewrites",
    "schedules",
    "codegen",
    "verify",
    "report",
    "benchmarks",
    "cli",
    "__main__",
    "__init__",
)
# Outside the order: the oracle may share no code with what it judges.
REFERENCE_IMPORTS = {"errors", "language", "reference"}
REFERENCE_IMPORTERS = {"verify", "__init__", "reference"}
# The interpreter is held against them: they import each other, and nothing of the package imports them.
CLOSED_FORMS = "einsumcascade.reference.closed_forms"

HOLDERS = {
    "torch": {"codegen", "verify", "benchmarks"},
    "triton": {"codegen", "verify", "benchmarks"},
    "numpy": {"reference", "verify"},
    "jinja2": {"report", "benchmarks"},
    "markupsafe": {"report"},
    "matplotlib": {"report", "benchmarks"},
}
HEAVY = ("torch", "triton", "sympy", "networkx", "numpy", "jinja2", "lark", "matplotlib", "rich", "typer")


def sources() -> list[Path]:
    """List the package's files once each, mapped folders through their links."""
    found: list[Path] = []
    folders = [PACKAGE]
    while folders:
        for entry in sorted(folders.pop().iterdir()):
            if entry.is_dir() and entry.name != "__pycache__":
                folders.append(entry)
            elif entry.suffix == ".py":
                found.append(entry)
    return sorted(found)


def module_name(path: Path) -> str:
    """Name the module at `path`; a package's own file keeps its `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def layer_of(module: str) -> str:
    """Return the layer that holds `module`: what follows `einsumcascade`, `__init__` for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def is_submodule(module: str, name: str) -> bool:
    """Tell whether `name` is a file or folder of the package `module`, rather than a value in it."""
    folder = ROOT.joinpath(*module.split("."))
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()


def imports_of(node: ast.AST, importer: str) -> Iterator[str]:
    """Yield the modules that the one statement or call `node` names."""
    match node:
        case ast.Import(names=names):
            for alias in names:
                yield alias.name
        case ast.ImportFrom(module=module, names=names, level=level):
            base = ".".join(importer.split(".")[:-level] + ([module] if module else [])) if level else module or ""
            for alias in names:
                yield f"{base}.{alias.name}" if is_submodule(base, alias.name) else base
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield name


def all_imports(text: str, importer: str) -> list[tuple[int, str]]:
    """List line and module of every import in `text`, those inside functions included."""
    return [
        (getattr(node, "lineno", 0), name) for node in ast.walk(ast.parse(text)) for name in imports_of(node, importer)
    ]


def fault(importer: str, imported: str) -> str | None:
    """Say which rule the import of `imported` by `importer` breaks, if any."""
    here = layer_of(importer)
    top = imported.split(".")[0]
    if top in HOLDERS and here not in HOLDERS[top]:
        return f"only {' and '.join(sorted(HOLDERS[top]))} import {top}"
    if top in ("benchmarks", "codegen", "schedules", "reference"):
        return f"its name is einsumcascade.{top}"
    if top != "einsumcascade":
        return None
    there = layer_of(imported)
    if importer.startswith(CLOSED_FORMS) != imported.startswith(CLOSED_FORMS):
        return "closed forms import NumPy and each other, and nothing imports them"
    if here == "reference":
        return None if there in REFERENCE_IMPORTS else "reference imports errors and language only"
    if there == "reference":
        return None if here in REFERENCE_IMPORTERS else "only verify and the public face import reference"
    if there not in ORDER:
        return f"{there} has no place in the order of layers"
    if ORDER.index(there) > ORDER.index(here):
        return f"{here} comes before {there}"
    return None


def eager_imports(text: str, importer: str) -> list[str]:
    """List what `text` imports when it is executed: not inside functions, not for type checkers alone."""
    found: list[str] = []
    pending: list[ast.AST] = [ast.parse(text)]
    while pending:
        node = pending.pop()
        found.extend(imports_of(node, importer))
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=orelse):
                pending.extend(orelse)
            case _:
                pending.extend(ast.iter_child_nodes(node))
    return found


def test_every_import_respects_the_order_of_layers() -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: imports {imported}: {rule}"
        for path in sources()
        for line, imported in all_imports(path.read_text(encoding="utf-8"), module_name(path))
        if (rule := fault(module_name(path), imported)) is not None
    ]
    assert not faults, "\n".join(faults)


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {layer_of(module_name(path)) for path in sources()} <= {*ORDER, "reference"}


@pytest.mark.parametrize(
    ("importer", "text"),
    [
        ("einsumcascade.language.ir", "from einsumcascade.analysis import counts"),
        ("einsumcascade.language.ir", "def f():\n    from einsumcascade.rewrites.defer import defer"),
        ("einsumcascade.language.ir", "from ..codegen.op import compile"),
        ("einsumcascade.analysis.counts", "import numpy as np"),
        ("einsumcascade.analysis.spatial.model", "def f():\n    import matplotlib"),
        ("einsumcascade.schedules.search", "def f():\n    import torch.cuda"),
        ("einsumcascade.reference.interpret", "from einsumcascade.analysis.extents import bind"),
        ("einsumcascade.reference.interpret", "import torch"),
        ("einsumcascade.reference.closed_forms.core", "from einsumcascade.reference.interpret import run"),
        ("einsumcascade.reference.interpret", "from einsumcascade.reference.closed_forms.parts import softmax"),
        ("einsumcascade.codegen.op", "from einsumcascade import reference"),
        ("einsumcascade.codegen.op", "import importlib\nimportlib.import_module('einsumcascade.verify.run')"),
        ("einsumcascade.cli", "import einsumcascade"),
        ("einsumcascade.cli", "import einsumcascade.reference"),
        ("einsumcascade.verify.run", "import reference"),
    ],
)
def test_an_import_against_the_layers_is_found(importer: str, text: str) -> None:
    assert any(fault(importer, imported) for _, imported in all_imports(text, importer))


@pytest.mark.parametrize(
    ("importer", "text"),
    [
        ("einsumcascade.language.ir", "from einsumcascade import errors\nfrom . import ops"),
        ("einsumcascade.verify.run", "import numpy, torch, triton\nfrom einsumcascade import reference"),
        ("einsumcascade.reference.interpret", "import numpy\nfrom einsumcascade.language.ir import Cascade"),
        ("einsumcascade.codegen.emit_triton", "TEXT = 'import numpy'"),
    ],
)
def test_an_import_along_the_layers_passes(importer: str, text: str) -> None:
    assert [fault(importer, imported) for _, imported in all_imports(text, importer) if fault(importer, imported)] == []


def test_the_public_face_imports_only_errors_eagerly() -> None:
    face = PACKAGE / "__init__.py"
    eager = eager_imports(face.read_text(encoding="utf-8"), module_name(face))
    assert {name for name in eager if name.split(".")[0] not in sys.stdlib_module_names} == {"einsumcascade.errors"}


def test_the_public_face_lists_its_names_and_refuses_others() -> None:
    import einsumcascade

    assert set(einsumcascade.__all__) <= set(dir(einsumcascade))
    with pytest.raises(AttributeError, match="no attribute 'analyze'"):
        _ = einsumcascade.analyze


def test_each_lazy_name_is_found_in_its_home() -> None:
    import einsumcascade

    for name in einsumcascade.__all__:
        value = getattr(einsumcascade, name)
        assert value.__name__.split(".")[-1] == name


def test_importing_the_package_is_light_and_quick() -> None:
    script = (
        "import json, sys, time\n"
        "start = time.perf_counter()\n"
        "import einsumcascade\n"
        "seconds = time.perf_counter() - start\n"
        f"print(json.dumps([seconds, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
            ).stdout
        )
        for _ in range(5)
    ]
    assert [loaded for _, loaded in runs] == [[]] * 5
    # The least, for a busy machine can only delay a run.
    assert min(seconds for seconds, _ in runs) < 0.15
