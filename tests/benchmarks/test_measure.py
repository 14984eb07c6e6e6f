"""Measuring: compared first, timed in rounds, within the budget; on a clock that tells what it is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from einsumcascade.benchmarks import measure as measuring
from einsumcascade.benchmarks import session
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
from einsumcascade.benchmarks.measure import OURS, Candidate, Row, Settings, TimeUp, limited, measure
from einsumcascade.benchmarks.rivals import RIVALS, NotHere, Rival, found
from einsumcascade.benchmarks.session import Plan, run
from einsumcascade.benchmarks.table import broken, faults
from einsumcascade.errors import InputError

CPU = torch.device("cpu")
QUICKLY = Settings(seconds=0.0, draws=2)


class FakeClock:
    """A clock of given milliseconds: each call is run, and noted in the order of its first run."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.order: list[int] = []
        self.calls: list[Any] = []

    def run(self, call: Any) -> int:
        call()
        if call not in self.calls:
            self.calls.append(call)
        self.order.append(self.calls.index(call))
        return self.order[-1]

    def read(self, mark: int) -> float:
        return self.milliseconds[mark % len(self.milliseconds)]


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
    left = iter([100.0] * 5 + [0.2] + [100.0] * 50)
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
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_state() == {}
    tool.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 3201 MHz, 41, 310.20 W, 0x0000000000000000'\n")
    tool.chmod(0o755)
    found = device_state()
    assert (found["driver_version"], found["clocks.sm"], found["power.draw"]) == ("580.1", "1980 MHz", "310.20 W")
    tool.write_text("#!/bin/sh\nexit 6\n")
    assert device_state() == {}


# --- runs -------------------------------------------------------------------------------------------------------------


def plan(folder: Path | None, *cases: Case, budget: float = 100.0) -> Plan:
    return Plan(
        cases=cases,
        rivals=[],
        absent={"fla": "fla is not installed"},
        asked=False,
        smoke=True,
        budget=budget,
        settings=QUICKLY,
        folder=folder,
        command="bench",
    )


def test_results_are_written_after_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = case("causal forward"), case("full forward")
    inner = session.measure

    def killed(case: Case, *given: Any, **options: Any) -> Any:
        if case == two:
            raise SystemExit
        return inner(case, *given, **options)

    monkeypatch.setattr(session, "measure", killed)
    with pytest.raises(SystemExit):
        run(plan(tmp_path, one, two), CPU, say=lambda text: None)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert file.name == "results.json"
    assert {"date", "command", "device", "versions", "settings", "absent"} <= set(kept)
    (row,) = kept["cases"][0]["rows"]
    assert row["state"] == "passed" and row["times"]["ms"] > 0 and row["verdicts"]["out"]["max_bound"] > 0


def test_an_interrupt_ends_a_run_with_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "measure", interrupted)
    result = run(plan(None, case("full forward"), case("causal forward")), CPU, say=lambda text: None)
    assert [c["skipped"] for c in result["cases"]] == ["interrupted"] and result["interrupted"]


def test_cases_that_do_not_fit_the_budget_are_skipped_and_told() -> None:
    cases = [case(f"{n} forward") for n in ("causal", "full", "sigmoid")]
    seconds = iter(range(1000))
    # Each look at the clock takes a second of it.
    result = run(plan(None, *cases, budget=17.0), CPU, say=lambda text: None, now=lambda: float(next(seconds)))
    assert "rows" in result["cases"][0]
    assert all("s left, a case like it took" in c["skipped"] for c in result["cases"][1:])
    assert len([f for f in faults(result) if "skipped" in f]) == 2


def test_a_case_that_breaks_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = measuring.truth_of
    failing = iter([True, False])

    def short_of_memory(*given: Any, **options: Any) -> Any:
        if next(failing):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return inner(*given, **options)

    monkeypatch.setattr(measuring, "truth_of", short_of_memory)
    said: list[str] = []
    result = run(plan(None, case("full forward"), case("causal forward")), CPU, say=said.append)
    assert result["cases"][0]["skipped"] == "OutOfMemoryError: CUDA out of memory."
    assert result["cases"][1]["rows"][0]["state"] == "passed" and broken(result) == 0
    assert any(line.startswith("  skipped: OutOfMemoryError") for line in said)


def test_our_wrong_results_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ours", lambda case: candidate(OURS, lambda q, k, v: q))
    result = run(plan(None, case("causal forward")), CPU, say=lambda text: None)
    assert broken(result) == 1
    assert faults(result) == ["causal forward B1 H2 N40 D16: ours wrong: out is outside its bound: not timed"]
