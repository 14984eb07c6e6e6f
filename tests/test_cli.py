"""The command line: what it prints, where it prints it, and how it ends."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from einsumcascade.cli import write_atomically
from einsumcascade.errors import InputError
from einsumcascade.gallery import names
from tests.cli_calls import SMALL, call, refuse, succeed

ROOT = Path(__file__).resolve().parents[1]


def test_list_names_every_variant_with_its_passes_and_paper() -> None:
    lines = succeed("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *names()]
    attention = next(line for line in lines if line.startswith("softmax_attention "))
    assert "M: 3" in attention and "Vaswani" in attention
    assert "M: 2" in next(line for line in lines if line.startswith("softmax_2p "))


def test_list_as_json_holds_the_same() -> None:
    rows = json.loads(succeed("list", "--json").stdout)
    assert [row["name"] for row in rows] == list(names())
    attention = next(row for row in rows if row["name"] == "softmax_attention")
    assert attention["passes"]["M"] == 3 and attention["kernel"] == "yes"


def test_analyse_prints_the_passes_of_a_gallery_name_and_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.cascade"
    path.write_bytes((ROOT / "einsumcascade/gallery/softmax_attention.cascade").read_bytes())
    by_name = json.loads(succeed("analyse", "softmax_attention", "--json").stdout)
    by_path = json.loads(succeed("analyse", str(path), "--json").stdout)
    assert by_name["ranks"]["M"]["passes"] == 3
    assert by_path["ranks"] == by_name["ranks"]
    assert "M" in succeed("analyse", "softmax_attention").stdout


def test_analyse_takes_extents() -> None:
    arguments = ["analyse", "sliding_window", "--json", "--extents"]
    one, two = (json.loads(succeed(*arguments, f"P=64,M={m}").stdout) for m in (64, 65))
    assert one["extents"] == {"P": 64, "M": 64} and one != two


def test_json_is_the_same_in_every_run() -> None:
    arguments = ["analyse", "gqa", "--json"]
    assert len({succeed(*arguments).stdout for _ in range(3)}) == 1


def test_constraints_and_constants_change_the_cascade() -> None:
    arguments = ["--const", "w=2", "--constraint", "p < n", "--const", "n=9"]
    text = succeed("derive", "sliding_window", *arguments).stdout
    assert "const w = 2" in text and "const n = 9" in text and "p < n" in text


def test_derive_reaches_one_pass() -> None:
    assert "3 passes -> 1 over M" in succeed("derive", "softmax_attention").stdout
    assert isinstance(json.loads(succeed("derive", "softmax_attention", "--json").stdout), dict)


def test_derive_derives_the_gradient_instead() -> None:
    text = succeed("derive", "softmax_attention", "--gradient").stdout
    assert "no gradient goes through GM" in text and "DK[b, h, m, e] = " in text and "out AV, LSE: float32" in text
    record = json.loads(succeed("derive", "softmax_attention", "--gradient", "--json").stdout)
    assert record["gradients"] == {"Q": "DQ", "K": "DK", "V": "DV"} and record["saved"] == ["LSE", "AV"]
    assert record["backward"] in text
    refuse("not-differentiated-yet", "derive", "mesa", "--gradient")
    for option in ("--latex", "--rank=M", "--division=deferred", "--parts=4", "--tile=64", "--reference=local"):
        refused = call("derive", "softmax_attention", "--gradient", option)
        assert refused.exit_code == 2 and option.partition("=")[0] in refused.stderr


def test_export_writes_one_file_or_prints_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    assert succeed("export", "gqa", "-o", str(path), "--extents", "E=32", "--dtype", "float16").stdout == ""
    text = path.read_text(encoding="utf-8")
    ast.parse(text)
    assert "class GqaFunction(torch.autograd.Function)" in text and "# for cuda:90, float16, E = 32" in text
    assert succeed("export", "gqa", "--extents", "E=32", "--dtype", "float16").stdout == text


def test_compile_prints_python_on_stdout() -> None:
    source = succeed("compile", "softmax_attention").stdout
    ast.parse(source)
    assert "@triton.jit" in source


def test_compile_writes_a_file_and_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    assert succeed("compile", "gqa", "-o", str(path), "--dtype", "float16", "--extents", "E=64,F=64").stdout == ""
    ast.parse(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["kernel.py"]


def test_compile_takes_the_schedule_that_it_printed(tmp_path: Path) -> None:
    first = json.loads(succeed("compile", "softmax_attention", "--json").stdout)
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(first["schedule"]))
    second = json.loads(succeed("compile", "softmax_attention", "--schedule", str(path), "--json").stdout)
    assert second["source"] == first["source"] and second["schedule"] == first["schedule"]


def test_a_schedule_of_the_gradient_is_compiled_and_exported(tmp_path: Path) -> None:
    chosen = json.loads(succeed("compile", "gqa", "--gradient", "--json").stdout)["schedule"]
    assert list(chosen["kernels"]) == ["gqa_backward_0", "gqa_backward_1", "gqa_backward_2"]
    chosen = {"kernels": {"gqa_backward_1": {"tiles": {"m": 32, "p": 16}, "warps": 2}}, "sums": "accumulated"}
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(chosen))
    source = succeed("compile", "gqa", "--gradient", "--schedule", str(path)).stdout
    assert "tl.atomic_add(p_DQN" in source
    text = succeed("export", "gqa", "--schedule", str(path)).stdout
    assert "BLOCK_M=32, BLOCK_P=16" in text and "tl.atomic_add(p_DQN" in text


def test_compile_inspects_as_comments_after_the_text_or_alone(tmp_path: Path) -> None:
    arguments = ["compile", "relu", "--inspect", "--target", "cuda:80"]
    printed = succeed(*arguments).stdout
    ast.parse(printed)
    assert re.search(r"^#   registers \d+, spilled 0 bytes, shared memory \d+ bytes$", printed, re.MULTILINE)
    path = tmp_path / "kernel.py"
    report = succeed(*arguments, "-o", str(path)).stdout
    assert "registers" in report and "@triton.jit" not in report and "registers" not in path.read_text()
    record = json.loads(succeed(*arguments, "--json").stdout)
    assert record["source"] == path.read_text() and record["inspect"]["target"] == "cuda:80"


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_compile_takes_every_target_and_dtype(target: str, dtype: str) -> None:
    record = json.loads(succeed("compile", "gqa", "--target", target, "--dtype", dtype, "--json").stdout)
    assert (record["target"], record["dtype"]) == (target, dtype)
    ast.parse(record["source"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["derive", "sink"],
        ["compile", "sink"],
        ["verify", "relu", "--extents", SMALL, "--dtype", "float32"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_prints_the_same_json_each_time(arguments: list[str]) -> None:
    one, two = (succeed(*arguments, "--json").stdout for _ in range(2))
    assert one == two
    parsed = json.loads(one)
    assert one == json.dumps(parsed, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def test_verify_passes_on_a_small_case() -> None:
    result = succeed("verify", "softmax_attention", "--extents", SMALL, "--dtype", "float32", "--seed", "3")
    assert "float32" in result.stdout and "float16" not in result.stdout


def test_verify_ends_with_one_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    from einsumcascade.verify import verify

    @dataclass(frozen=True)
    class Failed:
        passed: bool = False

        def __str__(self) -> str:
            return "AV float32 failed"

        def to_dict(self) -> dict[str, object]:
            return {"passed": self.passed, "rows": ({"error": float("nan"), "bound": float("inf")},)}

    monkeypatch.setattr(verify, "verify", lambda *args, **options: Failed())
    result = call("verify", "gqa")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "AV float32 failed\n", "")
    result = call("verify", "gqa", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"passed": False, "rows": [{"error": "nan", "bound": "inf"}]}


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernel.py"
    write_atomically(path, "one\n")
    assert path.read_text() == "one\n"

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_atomically(path, "two\n")
    assert path.read_text() == "one\n" and os.listdir(tmp_path) == ["kernel.py"]


def test_a_link_stays_a_link_and_a_pipe_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "link.py").symlink_to("kernel.py")
    write_atomically(tmp_path / "link.py", "one\n")
    assert (tmp_path / "link.py").is_symlink() and (tmp_path / "kernel.py").read_text() == "one\n"
    write_atomically(Path(os.devnull), "one\n")
    assert not Path(os.devnull).is_file()


def test_the_module_runs_as_a_program_and_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "einsumcascade", "analyse", "gqaa"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("SpecFileError[unknown-spec]") and done.stdout == ""
    script = (
        "import sys; sys.argv[1:] = ['--help']\nfrom einsumcascade.cli import main\nassert main() == 0\n"
        "print([m for m in ('numpy', 'torch', 'triton', 'sympy', 'networkx', 'lark') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_batch_rank_is_added_without_editing_a_text() -> None:
    from einsumcascade.cli.options import spec_of

    cascade = spec_of("gqa", ["m <= p"], None, ["n", "u=Q"])
    assert [i.indices[:2] for i in cascade.inputs] == [("u", "n"), ("n", "b"), ("n", "b")]
    assert "V has no" not in refuse("unknown-input", "analyse", "gqa", "--over", "n=Q,W")
    refuse("name-clash", "analyse", "gqa", "--over", "p")


def test_a_read_of_culled_elements_is_a_warning_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "mine.cascade"
    path.write_text("in X[p, m]\nS[p, m] = 2 * X[p, m] where m <= p\nT[p] = S[p, m] :: max(m)\nout T\n")
    command = [sys.executable, "-m", "einsumcascade", "analyse", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    assert done.stderr.startswith("warning[culled-read]: T reads S[p, m] also where S is culled by m <= p\n")
    assert done.stdout.startswith("mine: 2 Einsums")


def test_the_choices_of_a_derivation_are_options() -> None:
    first = call("derive", "softmax_attention", "--division", "immediate").stdout
    assert "/ RSD[b, h, p, m1 + 1]" in first
    local = call("derive", "softmax_attention", "--reference", "local", "--parts", "4").stdout
    assert "rank m1 = 4" in local and "iter" not in local
    assert "rank m0 = 32" in call("derive", "softmax_attention", "--tile", "32", "--rank", "M").stdout
    assert "GM[b, h, p] = cap" in call("derive", "softcap", "--reference", "bound").stdout
    wide = call("derive", "softmax_attention", "--extents", "F=4096,M=64").stdout
    assert "/ RSD[b, h, p, m1 + 1]" in wide


def test_the_published_evaluation_is_modelled() -> None:
    text = call("model", "fusemax").stdout
    assert "+Binding       0.890  0.965  0.986  0.991  0.992  0.993" in text
    record = json.loads(call("model", "fusemax", "--json").stdout)
    assert set(record) >= {"attention", "means"}
    refuse("mapping", "model", "fusema")


def test_a_report_is_one_page_beside_the_text(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert call("report", "softmax_2p", "-o", str(page), "--extents", "P=256,M=256").exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "http" not in text.replace("http-equiv", "")
    refuse("unknown-target", "report", "softmax_2p", "-o", str(tmp_path / "none.html"), "--target", "cuda:91")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("command", ["report", "compile", "export"])
def test_a_text_is_not_written_over(command: str, tmp_path: Path) -> None:
    spec = tmp_path / "own.cascade"
    spec.write_text("# A sum\nin X[p,m]\nY[p] = X[p,m] :: sum(m)\nout Y\n", encoding="utf-8")
    before = spec.read_bytes()
    refuse("output-file", command, str(spec), "-o", str(spec))
    assert spec.read_bytes() == before


def test_analyse_places_the_softmax_and_adds_a_roofline() -> None:
    extents = "B=1,H=2,P=64,M=64,E=16,F=16"
    text = succeed("analyse", "softmax_attention", "--target", "cuda:90", "--extents", extents).stdout
    assert "Softmax SN: reference global, division immediate" in text and "bound by" in text
    refuse("missing-extent", "analyse", "softmax_attention", "--target", "cuda:90", "--extents", "P=64")
