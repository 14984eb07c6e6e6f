"""Float32 products of less precision are work of the matrix unit: the model, the space and the default know it."""

from __future__ import annotations

from typing import Any

import pytest

import einsumcascade as ec
from einsumcascade.analysis.targets import TARGETS, gpu_target
from einsumcascade.gallery import load
from einsumcascade.rewrites.derive import simplify
from einsumcascade.schedules.demands import FP32, TENSOR
from einsumcascade.schedules.model import predict, rank
from einsumcascade.schedules.partition import partition
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.ranking import shortlist
from einsumcascade.schedules.schedule import PRECISIONS, KernelSchedule, Schedule, check_schedule
from einsumcascade.schedules.shared_memory import shared_memory
from einsumcascade.schedules.space import search_space
from einsumcascade.schedules.usual import usual_schedule

NAME = "softmax_attention"
H200 = gpu_target("cuda:90")


def program() -> Program:
    return partition(simplify(load(NAME)).cascade, bounded=("e", "f"))


def extents(size: int) -> dict[str, int]:
    return {"B": 4, "H": 16, "P": 4096, "M": 4096, "E": size, "F": size}


def one(p: int, m: int, warps: int) -> Schedule:
    return Schedule(kernels={NAME: KernelSchedule(tiles={"p": p, "m": m}, warps=warps, stages=2)})


def test_the_matrix_unit_takes_tf32_at_half_the_rate_and_three_products_for_one() -> None:
    for target in TARGETS:
        rates = [target.product_flops_per_clock(element=4, precision=p) for p in PRECISIONS]
        half = target.tensor_flops_per_clock / 2
        assert rates == [0, pytest.approx(half / 3), half]
        assert target.product_flops_per_clock(element=2, precision="ieee") == 2 * half


@pytest.mark.parametrize("size", [64, 128])
def test_less_precise_products_are_predicted_to_be_faster(size: int) -> None:
    found = {
        precision: predict(program(), Schedule(), extents=extents(size), dtype="float32", precision=precision).kernels[
            0
        ]
        for precision in PRECISIONS
    }
    assert found["tf32"].seconds < found["tf32x3"].seconds < found["ieee"].seconds
    assert found["ieee"].cycles[TENSOR] == 0
    assert found["tf32x3"].cycles[TENSOR] == pytest.approx(3 * found["tf32"].cycles[TENSOR])
    assert found["tf32"].cycles[FP32] < found["ieee"].cycles[FP32] / 10
    # Of 16 bits there is one precision.
    same = [predict(program(), one(128, 64, 8), extents=extents(size), precision=p).seconds for p in PRECISIONS]
    assert len(set(same)) == 1


def test_a_ranking_knows_the_precision() -> None:
    candidates = [one(16, 16, 4), one(128, 64, 8)]
    seconds = {}
    for precision in PRECISIONS:
        options: dict[str, Any] = {"dtype": "float32", "precision": precision}
        best, _ = rank(program(), candidates, extents=extents(64), **options)
        space = search_space(program(), extents=extents(64), dtype_bytes=4, target=H200, precision=precision)
        chosen = shortlist([space], extents=extents(64), target=H200, limit=6, **options)
        assert chosen[0].schedule == space.default
        seconds[precision] = (best.seconds, min(c.seconds for c in chosen))
        largest = max(k.tiles["p"] for k in space.kernels[NAME])
        assert largest == (128 if precision == "ieee" else 256)
    for n in (0, 1):
        assert seconds["tf32"][n] < seconds["tf32x3"][n] < seconds["ieee"][n]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_default_tiles_fit_every_target(size: int, target: Any) -> None:
    rows = {}
    for precision in PRECISIONS:
        options: dict[str, Any] = {"dtype_bytes": 4, "target": target, "precision": precision}
        found = usual_schedule(program(), extents=extents(size), **options)
        check_schedule(program(), found)
        asked = shared_memory(program(), program().kernels[0], found.kernels[NAME], extents=extents(size), **options)
        assert asked.predicted <= target.shared_memory_bytes
        rows[precision] = found.kernels[NAME].tiles["p"]
    if size <= 128 and target == H200:
        assert rows == {"ieee": 32 if size <= 64 else 16, "tf32x3": 128, "tf32": 128}


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize(("size", "choice"), [(64, (128, 64, 8)), (128, (128, 32, 8)), (128, (64, 64, 4))])
def test_shared_memory_of_less_precise_products_is_what_is_compiled(
    size: int, choice: tuple[int, int, int], precision: str
) -> None:
    schedule = one(*choice)
    kernel = ec.compile(NAME, precision=precision).kernel(
        extents={"E": size, "F": size}, dtype="float32", target="cuda:90", schedule=schedule
    )
    (report,) = kernel.inspect().kernels.values()
    assert report.hot_loop is not None and report.hot_loop.opcodes["HGMMA"] > 0
    asked = shared_memory(
        program(),
        program().kernels[0],
        schedule.kernels[NAME],
        extents=extents(size),
        dtype_bytes=4,
        target=H200,
        precision=precision,
    )
    assert asked.predicted == pytest.approx(report.shared_memory_bytes, rel=0.05)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_default_of_an_op_is_that_of_its_precision(precision: str) -> None:
    kernel = ec.compile(NAME, precision=precision).kernel(extents={"E": 64, "F": 64}, dtype="float32", target="cuda:90")
    (own,) = kernel.schedule.kernels.values()
    assert (own.tiles["p"] == 128) == (precision != "ieee")
    (report,) = kernel.inspect().kernels.values()
    assert (report.spill_bytes, (report.hot_loop or report).to_dict()["classes"]["MMA"] > 0) == (0, precision != "ieee")
