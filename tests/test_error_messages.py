"""The errors: the whole text of each message, and a section of docs/errors.md for each code and no other.

The texts are in golden/error_messages.txt, one after the other, each after a line `=== code`.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from einsumcascade.analysis.spatial.mapping import load_mapping
from einsumcascade.analysis.spatial.model import model
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.benchmarks.cases import SETS, chosen
from einsumcascade.benchmarks.files import results_of
from einsumcascade.benchmarks.rivals import found
from einsumcascade.cli import app, parse_extents, write_atomically
from einsumcascade.codegen.flex import flex_attention
from einsumcascade.codegen.inspect import _cuobjdump
from einsumcascade.codegen.op import compile as compile_cascade
from einsumcascade.errors import (
    CascadeError,
    DiagnosedError,
    Diagnostic,
    EinsumCascadeError,
    SourceText,
    Span,
    nearest,
)
from einsumcascade.gallery import load
from einsumcascade.language.compose import mask
from einsumcascade.language.extents import bind
from einsumcascade.language.parser import parse
from einsumcascade.report.model_plots import plot_evaluation
from einsumcascade.rewrites.derive import derive
from einsumcascade.rewrites.differentiate import differentiate
from einsumcascade.rewrites.monoid import running_state
from einsumcascade.schedules.schedule import KernelSchedule, Schedule
from einsumcascade.verify.certificate import check
from einsumcascade.verify.measuring import Job, Processes
from tests.error_codes import codes_of_the_tree

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "error_messages.txt"
KV = parse("in K[m,e], V[m,f]\nconst scale = 2\nS[e,f] = scale * K[m,e] * V[m,f]\nout S", name="kv.cascade")
HINGE = parse("in X[p,m]\nG[p] = X[p,m] :: mean(m)\nO[p] = relu(X[p,m] - G[p])\nout O", name="hinge.cascade")
NUMBERS = {"M": 8, "E": 4, "F": 4}

TEXTS = {
    "syntax": "in X[m]\nconst scale 2\nS = scale * X[m]\nout S",
    "empty-text": "# nothing\n",
    "unmatched-end": "in X[m]\nS = X[m]\nend\nout S",
    "unclosed-block": "in X[m]\ninit R[0] = 0\niter m:\n  R[m+1] = R[m] + X[m]\nout R",
    "unknown-name": "in X[m]\nconst scale = 2\nS[m] = scal * X[m]\nout S",
    "unknown-operator": "in X[m]\nS[m] = sigmod(X[m])\nout S",
    "nested-too-deep": "in X[m]\nS[m] = " + "-" * 151 + "X[m]\nout S",
    "number-range": "in X[m]\nS[m] = 1e400 * X[m]\nout S",
    "operand-count": "in X[m]\nT[m] = exp(X[m], 2)\nout T",
    "not-associative": "in X[m]\nS = X[m] :: sub(m)\nout S",
    "reduced-rank-kept": "in X[m]\nS[m] = X[m] :: sum(m)\nout S",
    "reduced-rank-unused": "in X[m], Y[k]\nS = X[m] :: sum(m, k)\nout S",
    "rank-not-reduced": "in X[m, k]\nS = X[m, k] :: max(m)\nout S",
    "unknown-tensor": "in X[m]\nS = x[m]\nout S",
    "read-before-write": "in X[m]\nS = T\nT = X[m]\nout S",
    "cyclic-cascade": "in X[m]\nA[m] = B[m] + X[m]\nB[m] = 2 * A[m]\nout B",
    "missing-init": "in X[m]\niter m:\n  R[m+1] = R[m] + X[m]\nend\nout R",
    "future-generation": "in X[m]\ninit R[0] = 0\niter m:\n  T[m] = R[m+1]\n  R[m+1] = R[m] + X[m]\nend\nout T",
    "topk-form": "in X[p, m]\nI[p] = X[p, m] :: topk(m)\nout I",
    "solve-form": "in A[i, j], B[i]\nX[i] = 2 * solve(A[i, j], B[j])\nout X",
    "defined-twice": "in X[m]\nS = X[m]\nS = 2 * X[m]\nout S",
    "index-count": "in X[p, m]\nS = X[m]\nout S",
    "rank-variable-case": "in X[M]\nS = X[0]\nout S",
    "rank-repeated": "in X[m, m]\nS = X[0, 0]\nout S",
    "name-clash": "in X[m], M\nconst c = M\nS = c * X[m]\nout S",
    "unbound-rank": "in X[m]\nS[k] = X[k]\nout S",
    "not-a-condition": "in X[p, m]\nconstraint p - m\nS[p] = X[p, m]\nout S",
    "not-a-number": "in X[p, m]\nS[p] = (X[p, m] > 0) * X[p, m]\nout S",
    "constant-case": "in X[p, m]\nconst R = 2\nS[p] = R * X[p, m]\nout S",
    "no-output": "in X[m]\nS = X[m]",
    "unknown-dtype": "in X[m]\nS = X[m]\nout S: double",
}


def spec(content: bytes) -> Callable[[], object]:
    """Load a file of this content from the current folder."""

    def action() -> object:
        Path("mine.cascade").write_bytes(content)
        return load("mine.cascade")

    return action


def command(*arguments: str) -> Callable[[], object]:
    """Run the command line up to its error."""

    def action() -> object:
        from typer.core import TyperGroup
        from typer.main import get_command

        group = get_command(app)
        assert isinstance(group, TyperGroup)
        context = group.make_context("einsumcascade", list(arguments))
        return TyperGroup.invoke(group, context)

    return action


def refer(line: str, *, j: int = 2, k: int = 1) -> object:
    """Run the reference on a system of zeros, or on what else a line makes of it."""
    from einsumcascade.reference import run

    cascade = parse(f"in A[i, j], B[{'i' if 'topk' in line else 'j'}]\nrank k = {k}\n{line}\nout {line[0]}")
    return run(cascade, {"A": np.zeros((2, j)), "B": np.zeros(2 if "topk" in line else j)})


def of_arrays() -> object:
    """Run the reference on an array of texts."""
    from einsumcascade.reference import run

    return run(KV, {"K": [["a"]], "V": [[1.0]]})  # type: ignore[dict-item]


def call(*tensors: object, **named: object) -> object:
    """Call a compiled cascade."""
    return compile_cascade(KV)(*tensors, **named)  # type: ignore[arg-type]


def zeros(device: str = "cpu", dtype: str = "float32", *, grad: bool = False) -> torch.Tensor:
    """Make an input of KV."""
    return torch.zeros(8, 4, dtype=getattr(torch, dtype), device=device, requires_grad=grad)


class Mine(torch.Tensor):
    """A tensor of a user's class."""


def twice() -> object:
    """Ask for the gradient of a gradient."""
    k = zeros(grad=True)
    (first,) = torch.autograd.grad(call(k, k).sum(), k, create_graph=True)  # type: ignore[attr-defined]
    return torch.autograd.grad(first.sum(), k)


def of_kernel(**options: object) -> object:
    """Ask for the kernel of KV."""
    return compile_cascade(KV).kernel(**options)  # type: ignore[arg-type]


def judged() -> object:
    """Judge a result of another shape."""
    from einsumcascade.reference.errorbound import Condition, judge

    return judge([1.0], [1.0, 2.0], [1.0, 2.0], Condition(maximum=0.0, rms=0.0))


def compiled(kernel: str = "f", **outcome: object) -> object:
    """Compile a kernel text for a target; `outcome` is that of Triton's compiler."""
    from einsumcascade.codegen.build import compile_kernel

    source = "import triton\n\n\n@triton.jit\ndef f(X):\n    pass\n"
    with patch("triton.compile", **outcome):  # type: ignore[call-overload]
        return compile_kernel(
            source, kernel=kernel, signature={"X": "*fp32"}, constexprs={}, target=gpu_target("cuda:90")
        )


def interpreted() -> object:
    """Compile where Triton interprets."""
    with patch.dict("os.environ", {"TRITON_INTERPRET": "1"}):
        return compiled()


def crowded() -> object:
    """Open the device of the tuner where no temporary file can be made."""
    job = Job(cascade=load("gqa"), dtype="bfloat16", seed=0, inputs={}, small={}, device="cpu")
    full = OSError(28, "No space left on device")
    with patch("tempfile.TemporaryFile", side_effect=full):
        return Processes(job=job, build=SimpleNamespace, target=gpu_target("cuda:90"), name="a GPU", jobs=1).__enter__()


def cleared() -> object:
    """Clear a cache that may not be changed."""
    refused = PermissionError(13, "Permission denied")
    with (
        patch.dict("os.environ", {"EINSUMCASCADE_CACHE": "mine"}),
        patch("einsumcascade.schedules.cache.clear", side_effect=refused),
    ):
        return command("cache", "clear")()


def mapped() -> object:
    """Load a mapping that places an Einsum the cascade does not have."""
    Path("mine.toml").write_text(
        'cascade = "softmax_attention"\ntarget = "flat"\n\n[[plan]]\n\n[[plan.kernel]]\nloops = ["b", "h"]\n'
        'spatial = { 2d = { rows = "m", columns = "p" } }\nphases = [{ 2d = ["QK", "AVV"] }]\n',
        encoding="utf-8",
    )
    return load_mapping("mine.toml")


def drawn() -> object:
    """Draw figures without matplotlib."""
    with patch.dict("sys.modules", {"matplotlib": None}):
        return plot_evaluation(model(workloads=["BERT"], lengths=[1024]), "figures")


def disassembled() -> object:
    """Inspect a kernel without a disassembler."""
    with patch("subprocess.run", side_effect=FileNotFoundError(2, "No such file or directory")):
        return _cuobjdump("-sass", Path("kernel.cubin"))


def traced(body: str, *, mask: bool = False, **names: object) -> Callable[[], object]:
    """Attend with a callable of one line, in a file that is only said to be there."""
    text = f"def mod({'' if mask else 'score, '}b, h, q_idx, kv_idx):\n    return {body}\n"

    def attend() -> object:
        linecache.cache["mine.py"] = (len(text), None, text.splitlines(keepends=True), "mine.py")
        names["torch"] = torch
        exec(compile(text, "mine.py", "exec"), names)
        q = torch.zeros(1, 2, 5, 4)
        mod = names["mod"]
        return flex_attention(q, q, q, **({"mask_mod": mod} if mask else {"score_mod": mod}))  # type: ignore[arg-type]

    return attend


def flexed(*, heads: int = 2, block_mask: object = None) -> object:
    """Attend to keys of one head."""
    q = torch.zeros(1, heads, 256, 4)
    return flex_attention(q, q[:, :1], q[:, :1], block_mask=block_mask, enable_gqa=True)


def listed() -> object:
    """Attend to the keys of a list of blocks."""
    number = torch.ones(1, 1, 2, dtype=torch.int32)
    return flexed(block_mask=BlockMask.from_kv_blocks(number, torch.zeros(1, 1, 2, 2, dtype=torch.int32)))


CASES: dict[str, Callable[[], object]] = {
    **{code: lambda text=text: parse(text) for code, text in TEXTS.items()},  # type: ignore[misc]
    "score-target": lambda: load("softmax_1p").score("RD", "RD"),
    "score-rank": lambda: KV.score("S", "S + m"),
    "mask-truth": lambda: mask("m <= p") and mask("p - m < 3"),
    "extent-mismatch": lambda: bind(KV, shapes={"K": (4096, 64), "V": (2048, 64)}),
    "rank-count": lambda: bind(KV, shapes={"K": (1, 4096, 64), "V": (4096, 64)}),
    "unknown-input": lambda: bind(KV, shapes={"K": (8, 4), "V": (8, 4), "v": (8, 4)}),
    "missing-input": lambda: bind(KV, shapes={"K": (8, 4)}),
    "unknown-rank": lambda: bind(KV, extents={**NUMBERS, "N": 8}),
    "unknown-constant": lambda: bind(KV, extents=NUMBERS, constants={"scal": 1.0}),
    "missing-extent": lambda: bind(KV, extents={"M": 8}),
    "extent-value": lambda: bind(KV, extents={**NUMBERS, "E": -4}),
    "no-value": lambda: bind(parse("in X[m]\nconst c = m\nS = c * X[m]\nout S"), extents={"M": 8}),
    "input-dtype": of_arrays,
    "topk-length": lambda: refer("I[k] = B[i] :: topk(i)", k=8),
    "not-square": lambda: refer("X[i] = solve(A[i, j], B[j])", j=3),
    "singular-solve": lambda: refer("X[i] = solve(A[i, j], B[j])"),
    "unknown-spec": lambda: load("gqaa"),
    "spec-missing": lambda: load("no/such.cascade"),
    "spec-empty": spec(b""),
    "spec-binary": spec(b"in X[m]\xff"),
    "spec-too-large": spec(b"#" * (1 << 21)),
    "unknown-target": lambda: gpu_target("cuda:91"),
    "option-extents": lambda: parse_extents("P=3, m=4,K=0"),
    "option-all": command("verify", "gqa", "--all"),
    "option-const": command("analyse", "gqa", "--const", "w=wide"),
    "option-score": command("analyse", "gqa", "--score", "QK + 1"),
    "option-budget": command("tune", "gqa", "--budget", "0"),
    "tuning-inputs": crowded,
    "cache-folder": cleared,
    "option-value": lambda: derive(KV, reference="runing"),  # type: ignore[arg-type]
    "output-file": lambda: write_atomically(Path("no/such/kernel.py"), ""),
    "certificate": lambda: check("{}"),
    "schedule-file": command("compile", "gqa", "--schedule", "no/such.json"),
    "benchmark-filter": lambda: chosen(SETS["standard"], ["causal", "D46"]),
    "benchmark-rival": lambda: found(["flex", "cudn"], torch.device("cpu")),
    "benchmark-file": lambda: results_of(Path("no/such.json")),
    "too-many-inputs": lambda: call(zeros(), zeros(), zeros()),
    "repeated-input": lambda: call(zeros(), K=zeros(), V=zeros()),
    "wrong-type": lambda: call(zeros(), [1.0]),
    "tensor-subclass": lambda: call(zeros(), zeros().as_subclass(Mine)),
    "wrong-dtype": lambda: call(zeros(dtype="bfloat16"), zeros(dtype="float16")),
    "wrong-device": lambda: call(zeros(), zeros("meta")),
    "no-gradient": lambda: differentiate(KV, wrt=("W",)),
    "shape-mismatch": judged,
    "head-count": lambda: flex_attention(torch.zeros(1, 6, 5, 4), *[torch.zeros(1, 2, 5, 4)] * 2),
    "block-list": listed,
    "trace-branch": traced("score if q_idx > kv_idx else 0.0"),
    "trace-number": traced("score + table[int(q_idx)]", table=[0.5, 0.25]),
    "trace-operation": traced("torch.cumsum(score, 0)"),
    "trace-write": traced("score.add_(1.0)"),
    "trace-index": traced("score + bias[h, :]", bias=torch.zeros(2, 5)),
    "trace-dtype": traced("score.to(torch.bfloat16)"),
    "trace-value": traced("torch.where(q_idx >= kv_idx, score, float('nan'))"),
    "trace-result": traced("q_idx - kv_idx", mask=True),
    "capture-length": traced("score + bias[h, q_idx - kv_idx + 4]", bias=torch.zeros(2, 8)),
    "unknown-precision": lambda: compile_cascade(KV, precision="tf31"),
    "schedule-illegal": lambda: of_kernel(schedule=Schedule(kernels={"vk": KernelSchedule()})),
    "not-lowered-yet": lambda: compile_cascade(parse("rank m = 4\nS[m] = m + 1\nout S")),
    "not-differentiated-yet": lambda: differentiate(load("mesa")),
    "first-derivatives-only": twice,
    "not-streamed": lambda: running_state(HINGE, rank="M"),
    "kernel-rejected": lambda: compiled("g"),
    "target-rejected": lambda: compiled(side_effect=RuntimeError("ptxas error: too many registers")),
    "shared-memory": lambda: compiled(return_value=SimpleNamespace(metadata=SimpleNamespace(shared=300_000))),
    "interpreting-process": interpreted,
    "no-disassembler": disassembled,
    "mapping": mapped,
    "no-matplotlib": drawn,
}


def golden() -> dict[str, str]:
    """Read the message of each code."""
    parts = re.split(r"^=== (\S+)\n", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {code: text.rstrip("\n") for code, text in zip(parts[1::2], parts[2::2], strict=True)}


def headings() -> list[str]:
    """List the sections of docs/errors.md."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    return re.findall(r"^### (.+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("code", CASES)
def test_the_message_is_word_for_word(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EinsumCascadeError) as caught:
        CASES[code]()
    assert isinstance(caught.value, DiagnosedError) and set(caught.value.codes) == {code}
    assert str(caught.value) == golden()[code]


def test_every_golden_message_has_a_case() -> None:
    assert list(golden()) == list(CASES)


def test_every_code_of_the_tree_has_a_section_and_every_section_a_code() -> None:
    assert len(set(headings())) == len(headings())
    codes = codes_of_the_tree()
    assert codes - set(headings()) == set(), "codes without a section of docs/errors.md"
    assert set(headings()) - codes == set(), "sections without a code"


def test_every_code_of_the_tree_has_a_test() -> None:
    others = [p for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__)]
    text = "".join(p.read_text(encoding="utf-8") for p in others)
    assert {code for code in codes_of_the_tree() - set(CASES) if code not in text} == set()


def test_a_code_is_lower_case_words_joined_by_hyphens() -> None:
    assert [code for code in codes_of_the_tree() if not re.fullmatch(r"[a-z]+(-[a-z]+)*", code)] == []


def test_mistakes_are_shown_one_after_the_other() -> None:
    with pytest.raises(CascadeError) as caught:
        parse("in X[m]\nS = Y\nT = Z\nout S")
    assert str(caught.value).count("\n\n") == 1 and caught.value.codes == ("unknown-name", "unknown-name")


def test_a_caret_stands_under_what_is_wrong_on_a_line_of_any_number() -> None:
    diagnostic = Diagnostic(code="syntax", headline="wrong", span=Span(line=12, column=3, end_column=6), label="here")
    text = diagnostic.render(SourceText(text="\n" * 11 + "ab cde", name="mine.cascade"), kind="CascadeError")
    assert text.splitlines()[1:4] == ["   --> mine.cascade:12:3", " 12 | ab cde", "    |   ^^^ here"]


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("gqaa", ("gqa", "sink"), "did you mean 'gqa'?"),
        ("X", ("x",), "did you mean 'x'?"),
        ("zzz", ("gqa", "sink"), "known: gqa, sink"),
        ("zzz", (), "known: none"),
    ],
)
def test_the_nearest_name_is_proposed_or_all_are_listed(name: str, known: tuple[str, ...], hint: str) -> None:
    assert nearest(name, known) == hint
