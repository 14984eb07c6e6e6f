"""Exported files: they run where this project is not, and give the outputs and gradients of the op."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import einsumcascade as ec
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from tests.codegen.calls import NO_GRADIENT, TWO_KERNELS, inputs_of, ranks

SMALL = {"B": 1, "H": 2, "P": 37, "M": 21, "E": 16, "F": 16}
# Runs in a process that has torch and triton but, installed or not, neither this project nor what only it requires.
ABSENT = ("einsumcascade", "codegen", "schedules", "reference", "tests", "lark", "platformdirs", "typer")
ALONE = f"""
import importlib.util, sys, torch

for name in {ABSENT!r}:
    assert name not in sys.modules, name
    sys.modules[name] = None  # an import of it fails from here on
try:
    import einsumcascade
except ImportError:
    pass
else:
    raise AssertionError("this project can be imported")
path, data, name = sys.argv[1:]
modules = []
for again in range(2):
    spec = importlib.util.spec_from_file_location("exported_" + str(again), path)
    module = importlib.util.module_from_spec(spec)
    # Triton's interpreter looks a kernel's module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    modules.append(module)
given = torch.load(data)
found = []
for module in modules:
    inputs = [t.requires_grad_() if w else t for t, w in zip(given["inputs"], given["wanted"])]
    out = getattr(module, name)(*inputs)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    grads = torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], given["received"], allow_unused=True)
    found.append(dict(outputs=[o.detach() for o in outputs], grads=grads))
torch.save(found, data)
"""


def alone(op: ec.codegen.op.Op, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:  # type: ignore[name-defined]
    """Run the exported file by itself and compare with the op."""
    name = op.cascade.name
    path = tmp_path / "my_attention.py"
    extents = {"E": 16, "F": 16}
    text = op.export(path, extents={r: n for r, n in extents.items() if r in ranks(op.cascade)}, dtype="float32")
    assert path.read_text(encoding="utf-8") == text
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs.values()]
    out = op(*leaves)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    received = [torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).to(o.dtype) for o in outputs]
    wanted = [t.requires_grad for t in leaves]
    grads = torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], received, allow_unused=True)
    data = tmp_path / "data.pt"
    torch.save({"inputs": list(inputs.values()), "wanted": wanted, "received": received}, data)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(path), str(data), name],
        cwd=tmp_path,
        env={**environment, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for found in torch.load(data):
        # The order of float32 sums is that of other tiles.
        torch.testing.assert_close(found["outputs"], outputs, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(list(found["grads"]), list(grads), rtol=2e-4, atol=2e-4)


DOCUMENTS = parse(
    str(load("softmax_attention")) + "\nin DOC[p], DOM[m]\nconstraint DOC[p] == DOM[m]", name="documents.cascade"
)
RENAMED = parse(
    "in torch[m], print[m,e]\nconst ctx = 2\nextents[e] = torch[m] * print[m,e] * ctx :: sum(m)\nout extents, torch",
    name="words.cascade",
)


# Triton's own interpreter, without the mends of ours, refuses some texts that its compiler takes; these it runs.
@pytest.mark.parametrize("name", ["softmax_attention", "softmax_lse", "alibi", "two kernels", "words", "documents"])
def test_an_exported_file_runs_where_this_project_is_not(name: str, tmp_path: Path) -> None:
    cascade: Cascade = {"two kernels": TWO_KERNELS, "words": RENAMED, "documents": DOCUMENTS}.get(name) or load(name)
    # Small numbers, for one of them takes the exponential of a sum.
    inputs = {n: t / 8 for n, t in inputs_of(cascade, "float32", **SMALL).items()}
    if name == "documents":
        inputs |= {"DOC": torch.arange(SMALL["P"]) // 9, "DOM": torch.arange(SMALL["M"]) // 7}
    alone(ec.compile(cascade), inputs, tmp_path)
    text = (tmp_path / "my_attention.py").read_text(encoding="utf-8")
    assert (" = _block_table(" in text) == (name == "documents")


@pytest.mark.parametrize("described", [False, True])
def test_an_exported_file_of_a_schedule_runs_where_this_project_is_not(described: bool, tmp_path: Path) -> None:
    cascade = load("softmax_attention").constrain("m <= p")
    kernels = {
        "softmax_attention": KernelSchedule(tiles={"p": 16, "m": 16}, descriptors=True),
        "softmax_attention_backward_2": KernelSchedule(tiles={"p": 16, "m": 16}, descriptors=True),
    }
    # The interpreter has no addition by descriptors.
    schedule = Schedule(kernels=kernels) if described else Schedule(sums="accumulated")
    q, k, v = inputs_of(cascade, "float32", **SMALL).values()
    # Rows that do not lie side by side are copied.
    inputs = {"Q": q.transpose(2, 3).contiguous().transpose(2, 3), "K": k, "V": v}
    alone(ec.compile(cascade, schedule=schedule), inputs, tmp_path)
    text = (tmp_path / "my_attention.py").read_text()
    assert ("_boxed(Q)" in text, "tl.atomic_add(" in text) == (described, not described)


def test_the_file_holds_the_choices_it_was_exported_with() -> None:
    op = ec.compile("softmax_attention")
    for extents, dtype, target in (
        ({"E": 64, "F": 64}, "bfloat16", "cuda:90"),
        ({"E": 128, "F": 32}, "float32", "cuda:80"),
    ):
        text = op.export(extents=extents, dtype=dtype, target=target)
        pair = op._pair(("Q", "K", "V"))
        for runner in (pair.forward, pair.backward):
            kernel = ec.compile(runner.cascade).kernel(extents=extents, dtype=dtype, target=target)
            for tile, one in zip(kernel.built.kernels, kernel.built.texts, strict=True):
                assert one.text in text
                schedule = tile.schedule
                assert f"num_warps={schedule.warps}, num_stages={schedule.stages}," in text
                assert ", ".join(f"{n}={v}" for n, v in one.constexprs.items()) in text
        assert f"# for {target}, {dtype}, E = {extents['E']}, F = {extents['F']}" in text


def test_the_header_has_the_cascade_and_the_versions() -> None:
    text = ec.compile("gqa").export()
    header = text.split('"""')[1]
    for line in str(load("gqa")).splitlines():
        assert f"    {line}\n" in header
    assert f"einsumcascade {ec.__version__}, torch {torch.__version__.split('+')[0]}, triton" in header
    assert not re.search(r"[ \t]$", text, flags=re.MULTILINE)
    assert set(re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE)) == {"torch", "triton"}


def test_the_same_op_gives_the_same_file() -> None:
    assert ec.compile("alibi").export() == ec.compile("alibi").export()


def test_a_file_refuses_shapes_that_it_was_not_made_for() -> None:
    text = ec.compile("softmax_attention").export()
    start = text.index("# The ranks of every input")
    names: dict[str, object] = {}
    exec(text[start : text.index("def _softmax")], names)
    q = torch.zeros(1, 2, 3, 64)
    names["_check"](Q=q, K=q, V=q)  # type: ignore[operator]
    for wrong, message in (
        (q[..., :32], "E is 32, not 64"),
        (q[0], r"not \(B, H, M, E\)"),
        (q[:, :1], "H is 1, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            names["_check"](Q=q, K=wrong, V=q)  # type: ignore[operator]


def test_a_file_without_a_gradient_says_so_where_one_is_wanted() -> None:
    text = ec.compile(ec.parse(NO_GRADIENT)).export()
    compile(text, "exported", "exec")
    assert "autograd" not in text
    assert "raise NotImplementedError('cascade has no gradient here: " in text
    assert "requires_grad" not in ec.compile("gqa").export()
