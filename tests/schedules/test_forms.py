"""What a schedule says of the form of a program: a bound in place of a running maximum, and split-K."""

from __future__ import annotations

import pytest
import torch

from einsumcascade.codegen.op import compile as compile_cascade
from einsumcascade.errors import ScheduleError
from einsumcascade.gallery import load
from einsumcascade.language.parser import parse
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.verify.verify import verify
from tests.codegen.calls import qkv
from tests.rewrites.rows import ACCEPTED

SPLIT = Schedule(split={"m": 4})


def test_a_form_is_part_of_the_json_of_a_schedule() -> None:
    both = Schedule(reference="bound", split={"m": 4}, scatter="fixed order", sums="accumulated", pack={"h": "p"})
    assert Schedule.from_json(both.to_json()) == both
    assert Schedule.from_json('{"kernels": {}}') == Schedule()
    for text in (
        '{"kernels": {}, "split": {"m": 0}}',
        '{"kernels": {}, "reference": "no"}',
        '{"kernels": {}, "x": 1}',
        '{"kernels": {}, "sums": 1}',
        '{"kernels": {}, "pack": {"h": 1}}',
        '{"kernels": {}, "pack": ["h", "p"]}',
    ):
        with pytest.raises(ScheduleError):
            Schedule.from_json(text)


def test_a_rank_that_nothing_reduces_cannot_be_split() -> None:
    with pytest.raises(ScheduleError, match="splits 'p', which no Einsum reduces") as caught:
        compile_cascade("softmax_attention", schedule=Schedule(split={"p": 2})).kernel()
    assert caught.value.codes == ("schedule-illegal",)


def test_split_k_is_a_kernel_over_parts_and_one_that_merges() -> None:
    kernel = compile_cascade("softmax_attention", schedule=SPLIT).kernel()
    assert list(kernel.schedule.kernels) == ["softmax_attention_0", "softmax_attention_1"]
    assert "split m into 4 parts" in str(kernel.schedule)


@pytest.mark.parametrize("m", [1, 3, 77])
@pytest.mark.parametrize("condition", ["", "m <= p"])
def test_split_k_verifies_also_where_parts_are_empty(m: int, condition: str) -> None:
    cascade = load("softmax_attention")
    cascade = cascade.constrain(condition) if condition else cascade
    extents = {"B": 1, "H": 1, "P": 9, "M": m, "E": 16, "F": 16}
    found = verify(cascade, extents=extents, dtypes=("float32", "bfloat16"), schedule=SPLIT)
    assert found.passed, str(found)


@pytest.mark.parametrize("name", ["variance", "softmax-weighted variance", "p log p", "min-max normalisation"])
def test_split_k_of_states_of_several_sums_verifies(name: str) -> None:
    found = verify(parse(ACCEPTED[name].text), extents={"P": 9, "M": 77}, dtypes=("float32",), schedule=SPLIT)
    assert found.passed, str(found)


def test_split_k_on_a_cpu_gives_the_same() -> None:
    q, k, v = qkv()
    plain = compile_cascade("softmax_attention")(q, k, v)
    torch.testing.assert_close(compile_cascade("softmax_attention", schedule=SPLIT)(q, k, v), plain)


def test_a_bound_replaces_the_running_maximum_of_a_capped_score() -> None:
    bound = Schedule(reference="bound")
    assert "tl.max(" not in compile_cascade("softcap", schedule=bound).kernel().source
    assert "tl.max(" in compile_cascade("softcap").kernel().source
    extents = {"B": 1, "H": 1, "P": 9, "M": 77, "E": 16, "F": 16}
    for condition in ("m <= p", "m < p"):
        cascade = load("softcap").constrain(condition)
        found = verify(cascade, extents=extents, dtypes=("bfloat16",), schedule=bound)
        assert found.passed, str(found)
    # At a cap of 30, float32 had 6 times the error of the plain formula, and weights of float16 were all 0.
    for dtype in ("float16", "float32"):
        with pytest.raises(ScheduleError, match=f"not for {dtype} inputs"):
            compile_cascade("softcap", schedule=bound).kernel(dtype=dtype)


def test_a_score_without_a_bound_keeps_its_running_maximum() -> None:
    kernel = compile_cascade("softmax_attention", schedule=Schedule(reference="bound")).kernel()
    assert "tl.max(" in kernel.source
