"""The tuner: what is compiled, compared and timed, in which order, and what survives what."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.schedules.autotune import Compiled, Failure, Trial, Tuning, spearman, tune
from einsumcascade.schedules.ranking import Ranked
from einsumcascade.schedules.schedule import KernelSchedule, Schedule

LATE = Failure("there was no time left", is_late=True)
FINE = Compiled(registers=128, spill_bytes=0, shared_memory_bytes=1024, seconds=1.0)


def schedule(n: int) -> Schedule:
    """The schedule of number n."""
    return Schedule(kernels={"k": KernelSchedule(tiles={"p": 16}, stages=n + 1)})


def number(s: Schedule) -> int:
    return s.kernels["k"].stages - 1


@dataclass
class Fake:
    """A device that does as it is told, and notes what it is asked."""

    seconds: Sequence[float]
    unfit: frozenset[int] = frozenset()
    wrong: frozenset[int] = frozenset()
    faulty: frozenset[int] = frozenset()
    # What there is no time for: a stage and its requests.
    late: tuple[str, frozenset[int]] = ("", frozenset())
    name: str = "fake"
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    interrupted: tuple[str, int] = ("", -1)

    def _note(self, what: str, n: int, calls: int = 0) -> None:
        self.asked.append((what, n, calls))
        if self.interrupted == (what, sum(w == what for w, *_ in self.asked)):
            raise KeyboardInterrupt

    def _is_late(self, what: str) -> bool:
        """Whether there is no time for the request that was noted last."""
        return self.late[0] == what and sum(w == what for w, *_ in self.asked) in self.late[1]

    def compile(self, schedules: Sequence[Schedule], *, deadline: float) -> Iterator[tuple[int, Compiled | Failure]]:
        for n in reversed(range(len(schedules))):
            self._note("compile", n)
            yield n, LATE if self._is_late("compile") else Failure("no") if n in self.unfit else FINE

    def compare(self, schedule: Schedule, *, deadline: float) -> Failure | None:
        self._note("compare", number(schedule))
        if self._is_late("compare") or time.monotonic() > deadline:
            return LATE
        return Failure("wrong") if number(schedule) in self.wrong else None

    def time(self, schedule: Schedule, calls: int, *, deadline: float) -> float | Failure:
        n = number(schedule)
        self._note("time", n, calls)
        if self._is_late("time") or time.monotonic() > deadline:
            return LATE
        return Failure("fault") if n in self.faulty else self.seconds[n]


def tuned(device: Fake, budget_s: float = 60.0) -> Tuning:
    """Tune as many candidates as the device has times for."""
    candidates = [Ranked(schedule=schedule(n), seconds=n + 1.0) for n in range(len(device.seconds))]
    trials, cut_by = tune(candidates, device, budget_s=budget_s)
    return Tuning(
        device=device.name, target="cuda:90", dtype="bfloat16", extents={"P": 8}, trials=trials, cut_by=cut_by
    )


def test_the_fastest_is_found_in_rounds_that_drop_the_slower_half() -> None:
    device = Fake([5.0, 3.0, 4.0, 1.0, 2.0])
    found = tuned(device)
    assert found.best is not None and number(found.best.schedule) == 3 and not found.was_cut
    rounds = {calls: [n for what, n, c in device.asked if what == "time" and c == calls] for calls in (5, 10, 20)}
    assert rounds == {5: [0, 1, 2, 3, 4], 10: [3, 4, 1], 20: [3, 4]}


def test_nothing_is_timed_that_was_not_compared_and_found_right() -> None:
    device = Fake([3.0, 1.0, 1.0, 1.0], unfit=frozenset({1}), wrong=frozenset({2}))
    found = tuned(device)
    timed = {n for what, n, _ in device.asked if what == "time"}
    assert timed == {0, 3} and ("compare", 1, 0) not in device.asked
    before = [n for what, n, _ in device.asked[: device.asked.index(("time", 0, 5))] if what == "compare"]
    assert set(before) >= timed
    assert [t.why for t in found.trials] == ["", "no", "wrong", ""]
    assert [t.is_right for t in found.trials] == [True, False, False, True]


def test_what_fails_while_it_is_timed_is_out() -> None:
    found = tuned(Fake([3.0, 1.0], faulty=frozenset({1})))
    assert found.best is not None and number(found.best.schedule) == 0
    assert found.trials[1].seconds is None and not found.trials[1].is_right


@pytest.mark.parametrize("stage", ["compile", "compare"])
def test_an_interruption_before_anything_was_timed_leaves_nothing_to_keep(stage: str) -> None:
    found = tuned(Fake([3.0, 1.0, 2.0], interrupted=(stage, 2)))
    assert found.was_cut and found.best is None and len(found.trials) == 3
    assert "ended early" in str(found)


def test_an_interruption_keeps_what_is_known() -> None:
    # In the second round the slower of two was timed again, the faster was not.
    device = Fake([2.0, 1.0, 3.0, 4.0], interrupted=("time", 6))
    found = tuned(device)
    assert found.was_cut and found.best is not None and number(found.best.schedule) == 1


def test_without_a_device_candidates_are_compiled_and_nothing_is_said_to_be_measured() -> None:
    device = Fake([1.0, 2.0], name="")
    found = tuned(device)
    assert {what for what, *_ in device.asked} == {"compile"}
    assert found.best is None and found.correlation is None and not found.was_cut
    assert "nothing was timed: there is no GPU here" in str(found)


def test_a_spent_budget_ends_the_comparison_and_still_times_what_was_found_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(range(1000))
    monkeypatch.setattr("einsumcascade.schedules.autotune.time.monotonic", lambda: float(next(now)))
    found = tuned(Fake([2.0, 1.0, 3.0]), budget_s=3.0)
    assert found.was_cut and found.best is not None
    assert 0 < len(found.timed) < 3


def test_what_there_was_no_time_to_compile_is_a_search_that_was_cut() -> None:
    found = tuned(Fake([3.0, 1.0, 2.0], late=("compile", frozenset({1}))))
    assert found.cut_by == "the budget" and found.best is not None
    assert [t.why for t in found.trials] == ["", "", "there was no time left"]
    assert number(found.best.schedule) == 1


def test_what_there_was_no_time_to_compare_or_to_time_is_not_called_bad() -> None:
    for stage in ("compare", "time"):
        found = tuned(Fake([3.0, 1.0, 2.0], late=(stage, frozenset({2, 3, 4}))))
        assert found.cut_by == "the budget" and not any(t.why for t in found.trials)
        assert found.best is not None and number(found.best.schedule) == 0 and len(found.timed) == 1


def test_of_a_round_that_time_ended_none_has_the_advantage() -> None:
    class Slower(Fake):
        def time(self, schedule: Schedule, calls: int, *, deadline: float) -> float | Failure:
            found = super().time(schedule, calls, deadline=deadline)
            return found if isinstance(found, Failure) or calls == 5 else 3 * found

    # The faster of two took longer in the second round, and for the other there was no time.
    device = Slower([1.0, 0.5, 3.0, 4.0], late=("time", frozenset({6})))
    found = tuned(device)
    assert [c for what, _, c in device.asked if what == "time"] == [5, 5, 5, 5, 10, 10]
    assert found.cut_by == "the budget" and found.best is not None and number(found.best.schedule) == 0


def test_the_first_is_compared_and_timed_however_late_it_is() -> None:
    found = tuned(Fake([2.0, 1.0]), budget_s=1e-9)
    assert found.cut_by == "the budget" and [number(t.schedule) for t in found.timed] == [0]


def test_a_correlation_is_reported_of_ten_measurements() -> None:
    assert tuned(Fake([float(n) for n in range(9)])).correlation is None
    assert tuned(Fake([float(n) for n in range(10)])).correlation == pytest.approx(1.0)
    assert tuned(Fake([-float(n) for n in range(10)])).correlation == pytest.approx(-1.0)
    assert "rank correlation of prediction and measurement 1.00, of 10 candidates" in str(
        tuned(Fake([float(n) for n in range(10)]))
    )


@given(st.permutations(range(7)))
def test_spearman_is_the_textbook_formula_where_no_values_are_equal(order: list[int]) -> None:
    squares = sum((n - x) ** 2 for n, x in enumerate(order))
    assert spearman([(float(n), float(x)) for n, x in enumerate(order)]) == pytest.approx(1 - 6 * squares / (7 * 48))


def test_spearman_of_a_constant_is_nothing() -> None:
    assert spearman([(1.0, 1.0), (1.0, 2.0)]) is None


def test_prediction_and_measurement_stand_side_by_side() -> None:
    found = tuned(Fake([2.0, 1.0]))
    trials = found.to_dict()["trials"]
    assert [(t["predicted_s"], t["measured_s"]) for t in trials] == [(1.0, 2.0), (2.0, 1.0)]
    assert "2.00 times as fast as the default schedule" in str(found)


def test_the_default_may_win() -> None:
    assert "the default schedule is the fastest" in str(tuned(Fake([1.0, 2.0])))


def test_a_trial_says_why_it_is_out() -> None:
    assert Trial(schedule=schedule(0), predicted_s=1.0, why="no").to_dict()["why"] == "no"
