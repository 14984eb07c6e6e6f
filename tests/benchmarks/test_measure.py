"""Measuring: compared first, timed in rounds, within the budget; on a clock that tells what it is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from einsumcascade.benchmarks import measure as measuring
from einsumcascade.benchmarks.cases import SETS, Case, chosen
from einsumcascade.benchmarks.clock import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    CudaClock,
    HostClock,
    Times,
    device_state,
    host_us,
    interleaved,
)
from einsumcascade.benchmarks.files import OURS, TUNED
from einsumcascade.benchmarks.measure import Candidate, Lost, Row, Settings, TimeUp, Told, limited, measure
from einsumcascade.benchmarks.rivals import RIVALS, NotHere, Rival, found
from einsumcascade.benchmarks.table import is_of_host
from einsumcascade.codegen.op import Op
from einsumcascade.errors import InputError
from einsumcascade.schedules.schedule import Schedule

CPU = torch.device("cpu")
QUICKLY = Settings(seconds=0.0, draws=2)


class FakeClock:
    """A clock of given milliseconds: each call is run, and noted in the order of its first run."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.order: list[int] = []
        self.calls: list[Any] = []
        # By an error that stays.
        self.broken = False

    def run(self, call: Any) -> int:
        call()
        if call not in self.calls:
            self.calls.append(call)
        self.order.append(self.calls.index(call))
        return self.order[-1]

    def read(self, mark: int) -> float:
        return self.milliseconds[mark % len(self.milliseconds)]

    def wait(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def hidden_us(self) -> float:
        return 70.0


def case(name: str) -> Case:
    (one,) = chosen(SETS["smoke"], name.split())
    return one


def candidate(name: str, function: Callable[..., torch.Tensor]) -> Candidate:
    return Candidate(name=name, make=lambda: function)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def rows_of(name: str, clock: Any, *also: Candidate, **options: Any) -> dict[str, Row]:
    given = {"left": lambda: 100.0, **options}
    return {r.name: r for r in measure(case(name), CPU, clock, [], QUICKLY, also=also, **given)}


def test_what_passed_is_timed_in_rounds_of_changing_order() -> None:
    clock = FakeClock(2.0, 5.0)
    rows = rows_of("causal forward", clock, candidate("other", sdpa))
    assert [r.state for r in rows.values()] == ["passed", "passed"]
    times = rows[OURS].times
    assert times is not None and (times.ms, times.rounds) == (2.0, LEAST_ROUNDS)
    assert rows[OURS].rate == pytest.approx(case("causal forward").flop / 2e-3 * 1e-12)
    assert clock.order[:8] == [0, 1, 0, 1, 0, 1, 1, 0]


def test_what_is_wrong_is_told_and_never_timed() -> None:
    clock = FakeClock(1.0)

    def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def lost(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.full_like(q, torch.nan)

    rows = rows_of("causal forward", clock, candidate("unmasked", unmasked), candidate("lost", lost))
    for name in ("unmasked", "lost"):
        assert rows[name].state == "wrong" and rows[name].times is None
        assert rows[name].note == "out is outside its bound: not timed"
    assert len(clock.calls) == 1


def test_a_wrong_gradient_is_told_by_name() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, k: torch.Tensor) -> torch.Tensor:
            return k.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad / 2

    def halved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, Halved.apply(k), v)

    rows = rows_of("causal backward", FakeClock(1.0), candidate("right", sdpa), candidate("halved", halved))
    assert rows["right"].state == "passed" and set(rows["right"].verdicts) == {"out", "Q", "K", "V"}
    assert rows["halved"].note == "K is outside its bound: not timed"


def test_what_fails_is_left_out_or_takes_too_long_says_so() -> None:
    def refuse() -> Any:
        raise NotHere("it has no such mask")

    def fail(*given: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("No available kernel.\nmore")

    def hang(*given: torch.Tensor) -> torch.Tensor:
        time.sleep(30)
        raise AssertionError

    late = [0]

    def fail_later(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        late[0] += 1
        if late[0] > 1:
            raise RuntimeError("out of memory")
        return sdpa(q, k, v)

    patient = Settings(seconds=0.0, draws=2, patience=20.0)
    also = (
        Candidate(name="refuse", make=refuse),
        candidate("fail", fail),
        candidate("later", fail_later),
        candidate("hang", hang),
    )
    began = time.monotonic()
    left = iter([100.0] * 6 + [0.2] + [100.0] * 50)
    found_rows = measure(case("causal forward"), CPU, FakeClock(1.0), [], patient, left=lambda: next(left), also=also)
    rows = {r.name: r for r in found_rows}
    assert (rows["refuse"].state, rows["refuse"].note) == ("left out", "it has no such mask")
    assert (rows["fail"].state, rows["fail"].note) == ("failed", "RuntimeError: No available kernel.")
    assert (rows["later"].state, rows["later"].note) == ("failed", "when timed: RuntimeError: out of memory")
    assert (rows["hang"].state, rows["hang"].note) == ("failed", "TimeUp: took more than 0.2 s")
    assert rows[OURS].state == "passed" and rows[OURS].times is not None
    assert time.monotonic() - began < 20


def test_a_rival_that_wants_tokens_first_is_compared_in_our_layout() -> None:
    def tokens_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape == (1, 40, 2, 16) and q.is_contiguous()
        return sdpa(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    rival = Rival(
        key="x",
        title="tokens first",
        variants=frozenset({"causal"}),
        make=lambda case, x: tokens_first,
        tokens_first=True,
        absent=lambda device: "",
    )
    for direction in ("forward", "backward", "step"):
        rows = measure(case(f"causal {direction}"), CPU, FakeClock(1.0), [rival], QUICKLY, left=lambda: 100.0)
        assert [r.state for r in rows] == ["passed", "passed"], rows[1].note


@pytest.mark.parametrize("name", ["causal", "alibi", "window", "document", "softcap", "bias", "sink", "gqa", "varlen"])
def test_flex_attention_computes_the_variants_it_is_a_rival_of(name: str) -> None:
    rival = RIVALS["flex"]
    rows = measure(case(f"{name} forward"), CPU, FakeClock(1.0), [rival], QUICKLY, left=lambda: 100.0)
    assert [r.state for r in rows] == ["passed", "passed"], rows[1].note


def test_rivals_are_found_and_the_absent_say_why() -> None:
    here, absent = found([], CPU)
    assert {r.key for r in here} == {"flex", "math", "formula"}
    assert absent["cudnn"] == "needs a CUDA device"
    _, absent = found(["flash-attn", "fla"], torch.device("cuda"))
    assert absent == {"flash-attn": "flash_attn is not installed", "fla": "fla is not installed"}
    with pytest.raises(InputError, match="there is no rival 'cudn'"):
        found(["cudn"], CPU)


def test_a_limit_rings_once_and_gives_the_signal_back() -> None:
    with pytest.raises(TimeUp), limited(0.05):
        time.sleep(5)
    with limited(0.05):
        pass
    time.sleep(0.1)


def failing_from(number: int, *, stays: FakeClock | None = None) -> Candidate:
    """A candidate whose calls fail from one of them on, maybe with an error that stays."""
    calls = [0]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] >= number:
            if stays is not None:
                stays.broken = True
            raise RuntimeError("CUDA out of memory.")
        return sdpa(q, k, v)

    return candidate("failing", function)


@pytest.mark.parametrize("number", [3, 4, 5, 6, 8])
def test_what_fails_in_the_rounds_loses_its_own_times_only(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ours", lambda case: candidate(OURS, lambda q, k, v: q))
    rows = rows_of("causal forward", FakeClock(2.0), failing_from(number), candidate("right", sdpa))
    assert (rows[OURS].state, rows[OURS].note) == ("wrong", "out is outside its bound: not timed")
    assert (rows["failing"].state, rows["failing"].times) == ("failed", None)
    assert rows["failing"].note == "when timed: RuntimeError: CUDA out of memory."
    times = rows["right"].times
    assert times is not None and times.rounds == LEAST_ROUNDS


def test_what_fails_when_only_the_host_is_timed_has_no_times() -> None:
    rows = rows_of("causal forward", FakeClock(2.0), failing_from(2 + 2 + LEAST_ROUNDS + 3))
    assert (rows["failing"].state, rows["failing"].times) == ("failed", None)
    assert rows[OURS].times is not None


def test_an_error_that_stays_ends_the_process_and_is_laid_at_a_door_where_it_is_known() -> None:
    told: list[Row] = []

    def lost(number: int, *, awaited: bool) -> list[tuple[str, str]]:
        clock = FakeClock(1.0)
        told.clear()
        with pytest.raises(Lost, match="illegal memory access"):
            rows_of(
                "causal forward", clock, failing_from(number, stays=clock), told=Told(row=told.append), awaited=awaited
            )
        return [(r.name, r.state) for r in told]

    assert lost(1, awaited=False) == [(OURS, "passed"), ("failing", "failed")]
    assert lost(2, awaited=False)[2:] == [("failing", "failed")]
    # In rounds whose calls do not wait for each other it may be another's.
    assert lost(4, awaited=False)[2:] == []
    assert lost(4, awaited=True)[2:] == [("failing", "failed")]


def test_rows_whose_host_takes_longer_than_the_clock_hides_are_known() -> None:
    def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        time.sleep(0.001)
        return sdpa(q, k, v)

    rows = rows_of("causal forward", FakeClock(1.0), candidate("slow", slow))
    assert rows["slow"].hidden_us == 70.0 and is_of_host(rows["slow"].to_dict())
    assert not is_of_host({**rows["slow"].to_dict(), "host_us": 60.0})
    assert not is_of_host({**rows["slow"].to_dict(), "hidden_us": None})


def test_rounds_fill_their_seconds_and_not_more() -> None:
    (few,) = interleaved(FakeClock(1.0), [lambda: None], seconds=0.0)
    (many,) = interleaved(FakeClock(1.0), [lambda: None], seconds=60.0)
    assert (few.rounds, many.rounds) == (LEAST_ROUNDS, MOST_ROUNDS)
    assert interleaved(FakeClock(1.0), [], seconds=1.0) == []
    assert Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == Times(ms=3.5, low=2.0, high=5.0, rounds=6)
    (slept,) = interleaved(HostClock(), [lambda: time.sleep(0.002)], seconds=0.0)
    assert slept.ms >= 2.0 and host_us(lambda: time.sleep(0.001), lambda: None, times=3) >= 1000


def test_the_clock_of_a_gpu_empties_the_cache_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append(f"record, cache {clock.cache.unique().tolist()}")

        def synchronize(self) -> None:
            events.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 1.5

    monkeypatch.setattr("einsumcascade.benchmarks.clock.FLUSH_BYTES", 64)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = CudaClock(CPU)
    mark = clock.run(lambda: (events.append("call"), clock.cache.fill_(1)))
    assert events == ["record, cache [0]", "call", "record, cache [1]"]
    assert clock.read(mark) == 1.5 and events[-1] == "wait"


def test_the_state_of_a_gpu_is_what_its_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "0a1b"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_state(CPU) == {}
    # PyTorch's first GPU is not that of the driver where CUDA_VISIBLE_DEVICES says so: it has a name of its own.
    right = '[ "$3" = --id=GPU-0a1b ] || exit 6'
    tool.write_text(f"#!/bin/sh\n{right}\necho '580.1, 1980 MHz, 3201 MHz, 41, 310.20 W, 0x0000000000000000'\n")
    tool.chmod(0o755)
    found = device_state(CPU)
    assert (found["driver_version"], found["clocks.sm"], found["power.draw"]) == ("580.1", "1980 MHz", "310.20 W")
    tool.write_text("#!/bin/sh\nexit 6\n")
    assert device_state(CPU) == {}
    tool.write_text("#!/bin/sh\n")
    assert device_state(CPU)["driver_version"] == ""


# --- ours, tuned ------------------------------------------------------------------------------------------------------


def test_ours_is_measured_as_tuned_too_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    chosen_one = Schedule(reference="bound")

    def tune(op: Op, *tensors: torch.Tensor, **options: Any) -> Any:
        asked.append({**options, "requiring": [t.requires_grad for t in tensors]})
        return SimpleNamespace(device="GPU", is_fruitless=False, schedule=chosen_one)

    monkeypatch.setattr(Op, "tune", tune)
    settings = Settings(seconds=0.0, draws=2, tuning=6.0)
    for name, requiring in (("causal forward", False), ("causal step", True)):
        rows = measure(case(name), CPU, FakeClock(1.0), [], settings, left=lambda: 100.0)
        assert [(r.name, r.state) for r in rows] == [(OURS, "passed"), (TUNED, "passed")]
        assert all(r.times is not None for r in rows)
        assert asked.pop() == {
            "gradient": requiring,
            "budget_s": 3.0 if requiring else 6.0,
            "keep": False,
            "requiring": [requiring] * 3,
        }


def test_where_nothing_can_be_tuned_the_default_alone_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "tune", lambda op, *tensors, **options: SimpleNamespace(device="", is_fruitless=False))
    settings = Settings(seconds=0.0, draws=2, tuning=6.0)
    rows = measure(case("causal forward"), CPU, FakeClock(1.0), [], settings, left=lambda: 100.0)
    assert [(r.name, r.state, r.note) for r in rows][1] == (TUNED, "left out", "tuning timed no candidate")
