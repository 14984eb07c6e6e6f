"""The paper's figures, and those of its authors' artifact, from cascades, mappings and targets."""

from __future__ import annotations

import json
from functools import cache

import pytest

from einsumcascade.analysis.spatial.cost import estimate
from einsumcascade.analysis.spatial.evaluation import Evaluation, Time
from einsumcascade.analysis.spatial.model import model

LENGTHS = [1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20]


@cache
def evaluation() -> Evaluation:
    """Evaluate everything once."""
    return model("fusemax")


def speedups(rows: tuple[Time, ...], configuration: str, over: str, workload: str = "BERT") -> list[str]:
    """List, by length, the speed-up of a configuration over another, as printed."""
    seconds = {(r.length, r.configuration): r.seconds for r in rows if r.model == workload}
    return [f"{seconds[n, over] / seconds[n, configuration]:.2f}" for n in LENGTHS]


def test_attention_takes_the_published_shares_of_the_multiply_adds() -> None:
    shares = [f"{r.share:.3f}" for r in evaluation().shares if r.model == "BERT"]
    assert shares == ["0.182", "0.471", "0.780", "0.934", "0.983", "0.996"]


def test_the_binding_uses_the_2d_array_as_published() -> None:
    rows = [r for r in evaluation().utilisation if (r.model, r.configuration) == ("BERT", "binding")]
    assert [f"{r.arrays['2d']:.3f}" for r in rows] == ["0.890", "0.965", "0.986", "0.991", "0.992", "0.993"]


def test_the_binding_is_faster_than_unfused_attention_as_published() -> None:
    published = ["10.84", "11.38", "11.53", "11.56", "11.58", "11.58"]
    assert speedups(evaluation().attention, "binding", "unfused") == published


def test_the_binding_is_faster_than_flat_as_published() -> None:
    published = ["6.65", "7.21", "7.37", "7.41", "8.57", "8.57"]
    assert speedups(evaluation().attention, "binding", "flat") == published


def test_the_mean_speedups_are_the_headline_s() -> None:
    means = {m.over: (f"{m.attention:.1f}", f"{m.end_to_end:.1f}") for m in evaluation().means}
    assert f"{float(means['unfused'][0]):.0f}" == "10" and means["unfused"][1] == "7.6"
    assert means["flat"] == ("6.7", "5.3")


# Seconds of attention and its utilisation, as the artifact's files give them (micro24-fusemax-artifact, MIT licence).
PUBLISHED = [
    ("BERT", 1 << 10, "unfused", 0.02182357659574468, 0.0766721058359586, 0.6133768466876688),
    ("BERT", 1 << 18, "unfused", 1369.1499157787234, 0.08009257292322913, 0.6407405833858331),
    ("T5", 1 << 14, "unfused", 3.5745570723404256, 0.07988951589338528, 0.6391161271470822),
    ("XLM", 1 << 16, "unfused", 114.22582631489362, 0.16000283971104337, 0.6400113588441735),
    ("XLM", 1 << 20, "unfused", 29222.611536612767, 0.16010796565157073, 0.6404318626062829),
    ("BERT", 1 << 10, "flat", 0.013386076595744681, 0.125, 1.0),
    ("TrXL", 1 << 16, "flat", 73.10582631489362, 0.125, 1.0),
    ("BERT", 1 << 18, "flat", 1013.8800000000001, 0.1081575131892733, 0.8652601055141864),
    ("XLM", 1 << 18, "flat", 1392.96, 0.2099294346281117, 0.8397177385124468),
    ("XLM", 1 << 20, "flat", 22283.52, 0.20996561064648636, 0.8398624425859454),
    ("BERT", 1 << 10, "cascade", 0.015333855319148937, 0.10912190963341858, 1.0),
    ("XLM", 1 << 14, "cascade", 5.742626859574469, 0.19891219891219888, 1.0),
    ("BERT", 1 << 12, "architecture", 0.09579411063829786, 0.2991266375545852, 0.3100436681222708),
    ("XLM", 1 << 10, "architecture", 0.01132936170212766, 0.4076923076923077, 0.45846153846153853),
    ("BERT", 1 << 10, "binding", 0.002013140425531915, 0.8896103896103895, 1.0),
    ("T5", 1 << 16, "binding", 4.935000238297873, 0.9909584086799277, 1.0),
    ("XLM", 1 << 10, "binding", 0.005194076595744681, 0.889261744966443, 1.0),
    ("XLM", 1 << 20, "binding", 4862.10858920851, 0.9961235757077412, 1.0),
]


@pytest.mark.parametrize(("workload", "length", "configuration", "seconds", "used_2d", "used_1d"), PUBLISHED)
def test_time_and_utilisation_are_those_of_the_artifact(
    workload: str, length: int, configuration: str, seconds: float, used_2d: float, used_1d: float
) -> None:
    at = (workload, length, configuration)
    (time,) = [r for r in evaluation().attention if (r.model, r.length, r.configuration) == at]
    (used,) = [r for r in evaluation().utilisation if (r.model, r.length, r.configuration) == at]
    # Both sides are the same ratios of whole numbers; only the rounding of sums differs.
    found = (time.seconds, used.arrays["2d"], used.arrays["1d"])
    assert found == pytest.approx((seconds, used_2d, used_1d), rel=1e-9)


@pytest.mark.parametrize(
    ("workload", "length", "published"),
    [("BERT", 1 << 20, 21908.798652459576), ("TrXL", 1 << 20, 29211.731536612766), ("T5", 1 << 20, 14605.865768306383)],
)
def test_the_longest_unfused_attention_differs_by_the_mapper_s_choice_of_blocks(
    workload: str, length: int, published: float
) -> None:
    # The artifact's mapper reads K and V sixteen times, where a block that fits the buffer allows eight.
    at = (workload, length, "unfused")
    (time,) = [r for r in evaluation().attention if (r.model, r.length, r.configuration) == at]
    assert time.seconds < published == pytest.approx(time.seconds, rel=4e-3)


@pytest.mark.parametrize(
    ("workload", "length", "configuration", "published"),
    [
        ("BERT", 1 << 10, "unfused", 6845104128),
        ("BERT", 1 << 18, "unfused", 422367083888640),
        ("XLM", 1 << 20, "unfused", 9016545103577088),
        ("BERT", 1 << 18, "flat", 435458144206848),
        ("XLM", 1 << 20, "flat", 9570698963976192),
        ("BERT", 1 << 16, "architecture", 38654705664),
        ("BERT", 1 << 20, "binding", 6803228196864),
        ("XLM", 1 << 18, "binding", 2336462209024),
    ],
)
def test_dram_traffic_is_that_of_the_artifact_to_the_byte(
    workload: str, length: int, configuration: str, published: int
) -> None:
    at = (workload, length, configuration)
    (time,) = [r for r in evaluation().attention if (r.model, r.length, r.configuration) == at]
    assert time.dram_bytes == published


@pytest.mark.parametrize(
    ("extents", "seconds"),
    [
        ({"H": 12, "E": 64, "D": 768, "S": 3072}, 0.0075296680851063835),
        ({"H": 16, "E": 64, "D": 1024, "S": 4096}, 0.013386076595744683),
        # The only one whose projections wait for DRAM.
        ({"H": 8, "E": 64, "D": 512, "S": 2048}, 0.003485895578457447),
        ({"H": 16, "E": 128, "D": 2048, "S": 8192}, 0.05354430638297873),
    ],
)
@pytest.mark.parametrize("target", ["flat", "fusemax"])
def test_the_other_products_of_a_layer_take_the_artifact_s_time(
    extents: dict[str, int], seconds: float, target: str
) -> None:
    found = estimate("layers", {**extents, "B": 64, "P": 1024}, target=target)
    assert found.seconds == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize(
    ("workload", "size", "seconds"),
    [("BERT", 16, 30266.668803268083), ("BERT", 512, 29.583229276595745), ("XLM", 128, 1215.669932119149)],
)
def test_arrays_of_other_sizes_take_the_artifact_s_time(workload: str, size: int, seconds: float) -> None:
    (found,) = [r for r in evaluation().sizes if (r.model, r.size) == (workload, size)]
    assert found.seconds == pytest.approx(seconds, rel=1e-9)


def test_a_size_doubles_its_buffer_until_dram_is_no_limit() -> None:
    buffers = {r.size: r.buffer_bytes for r in evaluation().sizes if r.model == "BERT"}
    assert [buffers[s] for s in (256, 512)] == [1 << 18, 1 << 20]


def test_no_array_works_more_than_all_the_time() -> None:
    used = [(part, *r.einsums.values()) for r in evaluation().utilisation for part in r.arrays.values()]
    assert all(0 < u <= 1 + 1e-12 for row in used for u in row)


def test_the_parts_of_an_array_s_time_add_up_to_its_utilisation() -> None:
    for r in evaluation().utilisation:
        assert sum(r.einsums.values()) == pytest.approx(r.arrays["2d"])


def test_each_step_of_fusemax_uses_the_2d_array_better_and_longer_inputs_do_too() -> None:
    used = {(r.model, r.length, r.configuration): r.arrays["2d"] for r in evaluation().utilisation}
    for workload in ("BERT", "TrXL", "T5", "XLM"):
        for n in LENGTHS:
            assert used[workload, n, "cascade"] < used[workload, n, "architecture"] < used[workload, n, "binding"]
        binding = [used[workload, n, "binding"] for n in LENGTHS]
        assert binding == sorted(binding)


def test_time_grows_with_the_square_of_the_length() -> None:
    for r, longer in zip(evaluation().attention, evaluation().attention[5:], strict=False):
        if (r.model, r.configuration) == (longer.model, longer.configuration):
            assert 12 < longer.seconds / r.seconds < 20


def test_models_with_the_same_heads_speed_up_alike() -> None:
    rows = evaluation().attention
    assert len({tuple(speedups(rows, "binding", "flat", w)) for w in ("BERT", "TrXL", "T5")}) == 1


def test_the_tables_are_text_and_json() -> None:
    found = model(workloads=["T5", "BERT"], lengths=[1024, 2048])
    text = str(found)
    assert "Speed-up of attention over Unfused (Figure 8)" in text and "Not modelled: energy" in text
    assert max(map(len, text.splitlines())) <= 120
    plain = json.loads(json.dumps(found.to_dict()))
    assert [r["model"] for r in plain["shares"]] == ["T5", "T5", "BERT", "BERT"]
    assert {r["length"] for r in plain["attention"]} == {1024, 2048}
    assert plain["means"][0]["over"] == "unfused"
