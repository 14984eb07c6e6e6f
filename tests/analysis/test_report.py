"""The page and the JSON of an analysis."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from einsumcascade.analysis.report import analyse
from einsumcascade.errors import InputError, SpecFileError, UnknownRankError
from einsumcascade.gallery import load, names
from einsumcascade.language.parser import parse

PAGE = """\
cascade: 4 Einsums over P, M, F

rank  passes  levels  passes of each tensor
----  ------  ------  ------------------------
P          1       1  S 1, GM 1, SN 1, SD 1, O 1
M          2       2  S 2, V 1, SN 1
F          1       1  V 1, O 1

Rank M: 2 passes
  pass 1: GM
    SN waits for GM: it reads GM[p], complete only after all of M
    live: S (M) and GM (1) for each P
    least kept: S read again (M)
  pass 2: SN, SD, O

Softmax SN: reference global, division none; 2 passes over M
  SN subtracts GM[p], the maximum over all of M
  nothing is divided by SD

Loop order P, M; F whole inside a step
  kept for each P: F + M + 2 (S M, GM 1, SD 1, O F)
  kept: F*M (V), or read again for each P
  1 other order keeps as much or more of what is computed

operations  multiply-add  exp  max
----------  ------------  ---  ---
GM                     -    -  M*P
SN                   M*P  M*P    -
SD                   M*P    -    -
O                  F*M*P    -    -
total    F*M*P + 2*M*P  M*P  M*P
(points that a constraint culls are not subtracted)

Least traffic, in elements: F*M + M*P read + F*P + P written"""
TEXT = """in S[p,m] V[m,f]
GM[p] = S[p,m] :: max(m)
SN[p,m] = exp(S[p,m] - GM[p])
SD[p] = SN[p,m] :: sum(m)
O[p,f] = SN[p,m] * V[m,f] :: sum(m)
out O, SD"""


def squeezed(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if not line.startswith("---")]


def test_the_page_shows_ranks_barriers_operations_and_traffic() -> None:
    assert squeezed(str(analyse(parse(TEXT)))) == squeezed(PAGE)


def test_columns_of_the_page_line_up() -> None:
    lines = str(analyse(parse(TEXT))).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("operations"))
    table = lines[start : start + 7]
    assert len({len(line) for line in table}) == 1


def test_an_intermediate_is_kept_or_recomputed() -> None:
    page = str(analyse("softmax_attention"))
    assert "live: QK (M) and GM (1) for each B, H, P" in page
    assert "least kept: QK (M)\n" in page
    again = "K read again (E*M a block), QK recomputed from Q and K; cheaper for blocks above E"
    assert f"or in blocks of P: {again}" in page
    assert "A waits for SD: it reads SD[b, h, p], complete only after all of M" in page


def test_the_page_shows_what_the_best_loop_order_keeps() -> None:
    page = str(analyse("softmax_1p"))
    assert "kept for each B, H, P: E + F + 2 (Q E, RM 1, RD 1, RNV F)" in page
    assert "kept for each B, H: E*M + F*M (K E*M, V F*M), or read again for each P" in page


def test_extents_decide_what_is_kept_and_are_named_where_they_were_assumed() -> None:
    assumed = "chosen at E = 64, M = 65,536, N = 65,536"
    assert f"K1 read again (E*M), S recomputed from Q, K1 and K2; {assumed}" in str(analyse("kronecker"))
    given = analyse("kronecker", extents={"P": 10, "E": 8, "M": 100, "N": 4, "F": 8})
    assert given.footprints["M"][0].plan.price == "M*N"
    assert "least kept: S (400)\n" in str(given)
    assert "chosen at" not in str(given)


def test_a_target_adds_the_roofline() -> None:
    extents = {"B": 1, "H": 2, "P": 64, "M": 1024, "E": 32, "F": 32}
    found = analyse("softmax_attention", extents=extents, target="cuda:90")
    assert found.roofline is not None and str(found).endswith(str(found.roofline))
    assert found.to_dict()["roofline"] == found.roofline.to_dict()
    assert analyse("softmax_attention", extents=extents).roofline is None
    with pytest.raises(InputError, match="5 ranks have no extent"):
        analyse("softmax_attention", extents={"M": 4}, target="cuda:90")


def test_extents_turn_counts_into_numbers() -> None:
    found = analyse("softmax_attention", extents={"B": 1, "H": 2, "P": 64, "M": 1024, "E": 32, "F": 32})
    page = str(found)
    assert f"{2 * 64 * 1024:,}" in page
    assert "bytes" in page
    assert found.to_dict()["counts"]["values"]["exp"] == 2 * 64 * 1024  # type: ignore[index]


def test_a_partition_is_shown_with_its_rank() -> None:
    found = analyse("softmax_1p")
    assert found.passes["M"] == 1
    assert "M = M1 x M0" in str(found)
    assert "M0" not in found.passes


def test_the_attributes_are_keyed_by_rank_in_order_of_first_appearance() -> None:
    found = analyse("softmax_attention")
    assert list(found.passes) == ["B", "H", "P", "E", "M", "F"]
    assert found.passes["M"] == found.levels["M"] == 3
    assert found.families["M"] == {"K": 3, "V": 1, "QK": 3, "SN": 2, "A": 1}
    assert [b.reader for b in found.barriers["M"]] == ["SN", "A"]


def test_the_json_is_stable_and_plain() -> None:
    first, second = (json.dumps(analyse("softmax_2p").to_dict()) for _ in range(2))
    assert first == second
    data = json.loads(first)
    assert list(data) == ["name", "extents", "ranks", "loop_orders", "counts", "taxonomy", "roofline"]
    assert data["ranks"]["M"]["footprints"][0]["plan"]["price"] == "M"
    assert data["loop_orders"]["orders"][0]["order"] == ["B", "H", "P", "M"]
    assert data["ranks"]["M"]["barriers"] == [{"boundary": 1, "producer": "GM", "reader": "SN", "read": "GM[b, h, p]"}]


@pytest.mark.parametrize("name", names())
def test_every_gallery_text_has_a_page_and_json(name: str) -> None:
    found = analyse(name)
    assert str(found).startswith(name)
    assert json.loads(json.dumps(found.to_dict()))["name"] == load(name).name
    assert all(n >= 1 for n in found.levels.values())
    assert found.orders.best is not None


def test_an_analysis_imports_no_algebra_and_no_numbers() -> None:
    code = "import sys, einsumcascade as ec; str(ec.analyse('softmax_attention')); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(ast.literal_eval(done.stdout))
    assert "networkx" in loaded
    assert not loaded & {"sympy", "numpy", "torch", "triton"}


def test_an_analysis_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        analyse("softmax_2p").name = "other"  # type: ignore[misc]


def test_wrong_extents_and_names_are_errors() -> None:
    with pytest.raises(UnknownRankError, match="did you mean 'M'"):
        analyse("softmax_2p", extents={"m": 4})
    with pytest.raises(InputError, match="the extent of M is -1"):
        analyse("softmax_2p", extents={"M": -1})
    with pytest.raises(SpecFileError):
        analyse("softmax_9p")
