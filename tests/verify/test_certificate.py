"""A certificate is verified again without the rewriter, and a changed one fails."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from einsumcascade.cli import app
from einsumcascade.errors import CascadeError, InputError
from einsumcascade.language.parser import parse
from einsumcascade.rewrites.derive import derive
from einsumcascade.verify.certificate import LIMIT_BYTES, check
from tests.rewrites.rows import ACCEPTED, MONOTONE, REJECTED

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {
    **{name: row.text for name, row in ACCEPTED.items()},
    **MONOTONE,
    **{name: text for name, (text, _) in REJECTED.items()},
}


def certificate(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(derive(parse(TEXTS[name])).certificate)
    return data


@pytest.mark.parametrize("name", TEXTS)
def test_what_was_derived_is_verified_again(name: str) -> None:
    found = check(json.dumps(certificate(name)))
    assert found.passed, str(found)


@pytest.mark.parametrize(
    "name", ["softmax_attention", "softcap", "sink", "alibi", "kronecker", "gda", "mla", "dropout", "var"]
)
def test_derivations_of_gallery_texts_are_verified_again(name: str) -> None:
    found = check(derive(name).certificate)
    assert found.passed, str(found)


@pytest.mark.parametrize("choice", [{"division": "immediate"}, {"reference": "local"}, {"reference": "bound"}])
def test_every_choice_of_a_derivation_is_verified_again(choice: dict[str, Any]) -> None:
    assert check(derive("softcap", **choice).certificate).passed


def claims(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [s["claim"] for s in data["steps"] if s["claim"]]


def changes(data: dict[str, Any]) -> list[Callable[[dict[str, Any]], None]]:
    """Ways to spoil a certificate: each entry of C, each function of each basis, a pass count, the result."""

    def entry(n: int, j: int, k: int, new: str) -> Callable[[dict[str, Any]], None]:
        return lambda d: claims(d)[n]["matrix"][j].__setitem__(k, new)

    def function(n: int, j: int, new: str) -> Callable[[dict[str, Any]], None]:
        return lambda d: claims(d)[n]["basis"].__setitem__(j, new)

    out: list[Callable[[dict[str, Any]], None]] = []
    for n, claim in enumerate(claims(data)):
        for j, row in enumerate(claim["matrix"]):
            for k, c in enumerate(row):
                out.append(entry(n, j, k, f"({c}) + 1"))
                if c != "0":
                    out.append(entry(n, j, k, f"-({c})"))
            out.append(function(n, j, f"2 * ({claim['basis'][j]}) + 1"))
    for rank in data["passes"]:
        out.append(lambda d, rank=rank: d["passes"][rank].__setitem__("after", d["passes"][rank]["after"] + 1))  # type: ignore[misc]
    return out


@pytest.mark.parametrize(
    "name", ["softmax-weighted variance", "variance", "p log p", "polynomial", "KL term", "cosine"]
)
def test_a_changed_claim_or_count_fails(name: str) -> None:
    data = certificate(name)
    spoils = changes(data)
    assert len(spoils) > 3
    for spoil in spoils:
        changed = copy.deepcopy(data)
        spoil(changed)
        assert not check(json.dumps(changed)).passed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" * RSD[", " / RSD["),
        ("exp(RGM[p, m1] - RGM[p, m1 + 1])", "exp(RGM[p, m1 + 1] - RGM[p, m1])"),
        ("max(m0)", "min(m0)"),
    ],
)
def test_a_changed_result_fails(old: str, new: str) -> None:
    data = certificate("entropy")
    assert old in data["cascade"]
    data["cascade"] = data["cascade"].replace(old, new)
    assert not check(json.dumps(data)).passed


def test_a_claim_about_something_else_fails() -> None:
    data = certificate("entropy")
    step = next(s for s in data["steps"] if s["claim"])
    step["before"] = ["SD[p] = 2 * SN[p, m] :: sum(m)"]
    assert not check(json.dumps(data)).passed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "original": 3, "cascade": "", "passes": {}, "steps": []}',
        " " * (LIMIT_BYTES + 1),
    ],
)
def test_what_is_no_certificate_is_one_error(text: str) -> None:
    with pytest.raises(InputError) as caught:
        check(text)
    assert caught.value.codes == ("certificate",)


@pytest.mark.parametrize("expression", ["__import__('os')", "exec(S)", "S[p, m", 3, None, "1 +"])
def test_an_expression_that_is_none_is_one_error(expression: object) -> None:
    data = certificate("entropy")
    claims(data)[0]["matrix"][0][0] = expression
    with pytest.raises(InputError) as caught:
        check(json.dumps(data))
    assert caught.value.codes == ("certificate",)


def test_a_text_that_does_not_parse_is_shown_with_its_place() -> None:
    data = certificate("entropy")
    data["cascade"] += "\nX = "
    with pytest.raises(CascadeError, match="<certificate: cascade>"):
        check(json.dumps(data))


def test_the_command_reads_what_derive_prints(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["derive", "entropy", "--json"])
    path = tmp_path / "certificate.json"
    path.write_text(printed.stdout)
    good = CliRunner().invoke(app, ["check", str(path)])
    assert good.exit_code == 0 and good.stdout.endswith("PASS\n")
    path.write_text(printed.stdout.replace('"after": 1', '"after": 2'))
    bad = CliRunner().invoke(app, ["check", str(path)])
    assert bad.exit_code == 1 and "FAILS  passes over M after: 2" in bad.stdout
    assert CliRunner().invoke(app, ["check", str(tmp_path / "none.json")]).exit_code == 2


def test_the_checker_does_not_use_the_rewriter() -> None:
    for name in ("certificate", "claims"):
        text = (ROOT / "einsumcascade" / "verify" / f"{name}.py").read_text(encoding="utf-8")
        assert "einsumcascade.rewrites" not in text and "sympy" not in text
