"""The bounds of a roofline against arithmetic by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import einsumcascade as ec
from einsumcascade.analysis.roofline import Roofline, flops, pipe_rates, pipe_work, roofline
from einsumcascade.analysis.targets import TARGETS, gpu_target
from einsumcascade.errors import InputError, SpecFileError, TargetError
from einsumcascade.gallery import load
from einsumcascade.language.parser import parse

ATTENTION = {"B": 4, "H": 16, "P": 4096, "M": 4096, "E": 128, "F": 128}
SCORES = 4 * 16 * 4096 * 4096
PRODUCT = parse("in A[i,k], B[k,j]\nC[i,j] = A[i,k] * B[k,j] :: sum(k)\nout C")


def test_attention_of_16_bits_is_bound_by_its_products() -> None:
    found = roofline("softmax_2p", extents=ATTENTION, dtype="bfloat16", target="cuda:90")
    assert found.read_bytes == dict.fromkeys("QKV", 2 * SCORES // 4096 * 128)
    assert found.written_bytes == {"AV": 2 * SCORES // 4096 * 128}
    # 132 multiprocessors at 1.83 GHz, 4096 operations a clock: 989.4 Tflop/s; 4800 GB/s; 16 exponentials a clock.
    assert found.bounds_us["tensor"] == pytest.approx(4 * SCORES * 128 / 989.4e6, rel=1e-4)
    assert found.bounds_us["memory"] == pytest.approx(4 * 2 * SCORES // 4096 * 128 / 4800e3)
    assert found.bounds_us["special"] == pytest.approx((SCORES + 4 * 16 * 4096 * 128) / (132 * 1830 * 16))
    assert (found.binding, found.bound_us) == ("tensor", found.bounds_us["tensor"])


@pytest.mark.parametrize(("name", "instructions"), [("softcap", 2), ("sigmoid", 2), ("softmax_2p", 1), ("relu", 0)])
def test_special_functions_of_scores_are_those_of_the_operator_table(name: str, instructions: int) -> None:
    found = roofline(load(name), extents=ATTENTION)
    # A tanh and an exponential; an exponential and a reciprocal. The cap divides by a constant.
    rows = 0 if instructions == 0 or name == "sigmoid" else 4 * 16 * 4096 * 128
    assert found.operations["special"] == instructions * SCORES + rows
    assert found.bounds_us["special"] == pytest.approx(found.operations["special"] / (132 * 1830 * 16))


def test_a_function_that_stands_in_several_places_is_computed_once() -> None:
    one = "in X[p, m]\nG[p] = tanh(X[p, m] / 3) :: max(m)\n"
    for text, special in (
        (f"{one}S[p] = exp(tanh(X[p, m] / 3) - G[p]) :: sum(m)\nout S", 2),
        (f"{one}S[p] = exp(tanh(X[p, m] / 4) - G[p]) :: sum(m)\nout S", 3),
    ):
        found = roofline(parse(text), extents={"P": 10, "M": 20})
        assert found.operations["special"] == special * 200


def test_no_bound_of_a_kernels_form_is_above_what_is_compiled() -> None:
    """The tanh of a cap stands in the maximum and in the exponential, and text has it once."""
    extents = {"B": 1, "H": 1, "P": 4096, "M": 4096, "E": 64, "F": 64}
    for name in ("softcap", "sigmoid"):
        kernel = ec.compile(name).kernel(extents=extents, target="cuda:90")
        found = roofline(kernel.program.cascade, extents=extents)
        (report,) = kernel.inspect().kernels.values()
        (schedule,) = kernel.schedule.kernels.values()
        assert report.hot_loop is not None
        scores = schedule.tiles["p"] * schedule.tiles["m"] / (32 * schedule.warps)
        each = report.hot_loop.count("MUFU") / scores
        # Beside them, the divisions of rows at the end, and a correction a row and step.
        assert found.operations["special"] / 4096**2 <= each + 64 / 4096
        assert each <= 1.05 * found.operations["special"] / 4096**2


def test_a_function_is_no_work_of_the_fp32_pipe_and_a_known_reciprocal_is() -> None:
    text = "in X[m], D[m]\nconst cap = 30\nY[m] = {}\nout Y"
    for right, fp32, special in (
        ("tanh(X[m])", 0, 1),
        ("sigmoid(X[m])", 0, 2),
        ("X[m] / cap", 1, 0),
        ("X[m] / 3", 1, 0),
        ("X[m] / D[m]", 0, 1),
        ("log(X[m]) + exp(X[m])", 1, 2),
    ):
        found = roofline(parse(text.format(right)), extents={"M": 10})
        work = pipe_work(found.operations, dtype="bfloat16")
        assert (work["fp32"], work["special"]) == (10 * fp32, 10 * special), right


def test_a_causal_constraint_halves_the_work_but_not_the_traffic() -> None:
    whole, half = (roofline(c, extents=ATTENTION) for c in (load("softmax_2p"), load("softmax_2p").constrain("m <= p")))
    assert half.culls
    assert half.operations["exp"] == 4 * 16 * 4096 * 4097 // 2
    assert half.bounds_us["tensor"] == pytest.approx(whole.bounds_us["tensor"] * 4097 / 8192)
    assert half.bounds_us["memory"] == whole.bounds_us["memory"]


def test_points_that_depend_on_data_are_all_counted() -> None:
    cascade = load("paged")
    extents = {"H": 8, "E": 64, "F": 64, "X": 256, "B": 2, "T": 16}
    found = roofline(cascade, extents=extents)
    assert not found.culls
    assert found.operations["exp"] == 2 * 8 * 64
    assert "depend on data" in str(found)


def test_float32_products_are_work_of_the_fp32_pipe() -> None:
    found = roofline(PRODUCT, extents={"I": 1024, "J": 1024, "K": 1024}, dtype="float32")
    assert found.bounds_us["tensor"] == 0
    assert found.bounds_us["fp32"] == pytest.approx(1024**3 / (132 * 1830 * 128))
    assert found.bytes == 3 * 4 * 1024**2


def test_intensity_counts_a_multiply_add_as_two() -> None:
    found = roofline(PRODUCT, extents={"I": 100, "J": 200, "K": 50})
    assert found.flops == flops(found.operations) == 2 * 100 * 200 * 50
    assert found.intensity == pytest.approx(2 * 100 * 200 * 50 / (2 * (100 * 50 + 50 * 200 + 100 * 200)))
    assert found.intensity_by_class["contraction"] == pytest.approx(found.intensity / 2)


@pytest.mark.parametrize("target", [t.name for t in TARGETS])
@pytest.mark.parametrize("k", [1, 16, 4096])
def test_the_roof_is_the_lower_of_bandwidth_and_pipes(target: str, k: int) -> None:
    found = roofline(PRODUCT, extents={"I": 4096, "J": 4096, "K": k}, target=target)
    device = gpu_target(target)
    assert found.peak_gflops == pytest.approx(
        device.multiprocessors * device.clock_ghz * device.tensor_flops_per_clock, rel=1e-9
    )
    assert found.attainable_gflops == pytest.approx(min(found.peak_gflops, found.intensity * device.bandwidth_gb_s))
    assert (found.binding == "memory") == (found.intensity < found.ridge)
    assert found.bound_us == pytest.approx(found.flops / found.attainable_gflops / 1e3)


def test_every_operation_is_work_of_one_pipe() -> None:
    operations = {"multiply_add": 100, "contraction": 60, "exp": 7, "divide": 5, "max": 3, "other": 2}
    operations |= {"function": 13, "special": 13}
    for dtype in ("float16", "float32"):
        assert sum(pipe_work(operations, dtype=dtype).values()) == 117
    assert flops(operations) == 217


def test_rates_are_of_single_operations() -> None:
    assert pipe_rates(gpu_target("cuda:80")) == pytest.approx(
        {"tensor": 1410 * 1024, "fp32": 1410 * 64, "special": 1410 * 16}
    )


def test_a_target_may_be_a_record_of_the_callers_own() -> None:
    slow = replace(gpu_target("cuda:90"), name="slow", bandwidth_gb_s=1.0)
    found = roofline("softmax_2p", extents=ATTENTION, target=slow)
    assert (found.target, found.binding) == ("slow", "memory")


def test_constants_and_extents_of_the_call_replace_those_of_the_text() -> None:
    cascade = load("sliding_window")
    found = [roofline(cascade, extents=ATTENTION, constants={"w": w}).operations["exp"] for w in (1, 256)]
    assert found[0] == 4 * 16 * 4096
    assert found[1] == 4 * 16 * (256 * 4096 - 256 * 255 // 2)


def test_nothing_to_do_takes_no_time() -> None:
    found = roofline(PRODUCT, extents={"I": 0, "J": 4, "K": 4})
    assert (found.flops, found.bounds_us["tensor"], found.peak_gflops) == (0, 0, 0)
    none = roofline(PRODUCT, extents={"I": 0, "J": 0, "K": 0})
    assert (none.bytes, none.intensity, none.attainable_gflops) == (0, 0, 0)


def test_a_roofline_is_a_page_and_a_json_value() -> None:
    found = roofline("softmax_2p", extents=ATTENTION)
    assert str(found).splitlines() == [
        "softmax_2p on cuda:90, bfloat16: at least 555.6 us, bound by tensor",
        "  memory   55.92 us  268,435,456 bytes",
        "  tensor   555.6 us  274,877,906,944 operations",
        "  fp32     138.9 us  4,294,967,296 operations",
        "  special  286.5 us  1,107,296,256 operations",
        "2080 operations a byte, memory and pipes meet at 209.4; "
        "1,004,950 of 1,004,950 Gflop/s attainable (culled points left out)",
    ]
    back = json.loads(json.dumps(found.to_dict()))
    assert back["binding"] == "tensor"
    assert set(back["plot"]) == {"intensity", "attainable_gflops", "peak_gflops", "ridge", "bandwidth_gb_s"}
    assert isinstance(found, Roofline)


def test_mistakes_have_the_codes_that_they_have_elsewhere() -> None:
    with pytest.raises(InputError, match="unknown-dtype"):
        roofline("softmax_2p", extents=ATTENTION, dtype="float64")
    with pytest.raises(TargetError, match="unknown-target"):
        roofline("softmax_2p", extents=ATTENTION, target="cuda:91")
    with pytest.raises(InputError, match="missing-extent"):
        roofline("softmax_2p", extents={"P": 3})
    with pytest.raises(InputError, match="extent-value"):
        roofline("softmax_2p", extents={**ATTENTION, "P": -1})
    with pytest.raises(SpecFileError, match="unknown-spec"):
        roofline("softmax_5p", extents=ATTENTION)
