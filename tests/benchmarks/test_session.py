"""Runs of cases: what is known is kept, whatever a candidate, a process or the user does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from einsumcascade.benchmarks import benches, session
from einsumcascade.benchmarks import measure as measuring
from einsumcascade.benchmarks.benches import Apart, Here, Skipped
from einsumcascade.benchmarks.cases import SETS, Case, chosen
from einsumcascade.benchmarks.files import OURS
from einsumcascade.benchmarks.measure import Candidate, Row, Settings
from einsumcascade.benchmarks.session import Plan, run
from einsumcascade.benchmarks.table import broken, faults
from tests.nightly import NIGHTLY

CPU = torch.device("cpu")
QUICKLY = Settings(seconds=0.0, draws=2)
ILLEGAL = "CUDA error: an illegal memory access was encountered"


def case(name: str) -> Case:
    (one,) = chosen(SETS["smoke"], name.split())
    return one


def plan(folder: Path | None, *cases: Case, budget: float = 100.0, **options: Any) -> Plan:
    given: dict[str, Any] = {"settings": QUICKLY, **options}
    return Plan(
        cases=cases,
        rivals=[],
        absent={"fla": "fla is not installed"},
        asked=False,
        smoke=True,
        budget=budget,
        folder=folder,
        command="bench",
        **given,
    )


class Made(Here):
    """A bench on the CPU whose cases are what a function makes of them."""

    def __init__(self, of: Callable[[Case, Callable[[Row], None]], None]) -> None:
        super().__init__(CPU)
        self.of = of

    def measure(self, case: Case, *given: Any, row: Any, **options: Any) -> dict[str, str]:  # type: ignore[override]
        self.of(case, row)
        return {}


def silent(text: str) -> None:
    pass


def test_results_are_written_as_they_grow(tmp_path: Path) -> None:
    one, two = case("causal forward"), case("full forward")
    inner = Here(CPU)

    def killed(case: Case, row: Callable[[Row], None]) -> None:
        if case == two:
            row(Row(name=OURS, state="wrong", note="out is outside its bound: not timed"))
            raise SystemExit
        inner.measure(case, [], QUICKLY, left=lambda: 100.0, row=row)

    with pytest.raises(SystemExit):
        run(plan(tmp_path, one, two), Made(killed), say=silent)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert file.name == "results.json"
    assert {"date", "command", "device", "versions", "settings", "absent", "code"} <= set(kept)
    (row,) = kept["cases"][0]["rows"]
    assert row["state"] == "passed" and row["times"]["ms"] > 0 and row["verdicts"]["out"]["max_bound"] > 0
    assert kept["cases"][1]["rows"][0]["state"] == "wrong" and broken(kept) == 1


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), Skipped("the time was up")])
def test_what_was_wrong_is_known_whatever_ends_its_case(reason: BaseException) -> None:
    def ended(case: Case, row: Callable[[Row], None]) -> None:
        row(Row(name=OURS, state="wrong", note="out is outside its bound: not timed"))
        raise reason

    result = run(plan(None, case("full forward"), case("causal forward")), Made(ended), say=silent)
    assert broken(result) == len(result["cases"]) and all("skipped" in c for c in result["cases"])
    assert result.get("interrupted", False) == isinstance(reason, KeyboardInterrupt)
    assert len(result["cases"]) == (1 if "interrupted" in result else 2)


def test_cases_that_do_not_fit_the_budget_are_skipped_and_told() -> None:
    cases = [case(f"{n} forward") for n in ("causal", "full", "sigmoid")]
    seconds = iter(range(1000))
    # Each look at the clock takes a second of it.
    tight = plan(None, *cases, budget=17.0, reserve=10.0)
    result = run(tight, Here(CPU), say=silent, now=lambda: float(next(seconds)))
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
    result = run(plan(None, case("full forward"), case("causal forward")), Here(CPU), say=said.append)
    assert result["cases"][0]["skipped"] == "OutOfMemoryError: CUDA out of memory."
    assert result["cases"][1]["rows"][0]["state"] == "passed" and broken(result) == 0
    assert any(line.startswith("  skipped: OutOfMemoryError") for line in said)


def test_our_wrong_results_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Candidate(name=OURS, make=lambda: lambda q, k, v: q)
    monkeypatch.setattr(measuring, "ours", lambda case: wrong)
    result = run(plan(None, case("causal forward")), Here(CPU), say=silent)
    assert broken(result) == 1
    assert faults(result) == ["causal forward B1 H2 N40 D16: ours wrong: out is outside its bound: not timed"]


# --- a process of its own ---------------------------------------------------------------------------------------------


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Apart]]:
    monkeypatch.setattr(benches, "GRACE", 4.0)
    opened: list[Apart] = []

    def opened_with(*names: str) -> Apart:
        opened.append(Apart("cpu", also=[f"tests.benchmarks.taking_down:{n}" for n in names]))
        return opened[-1]

    yield opened_with
    for one in opened:
        one.close()


def rows_after(apart: Apart, *cases: Case, patience: float = 60.0) -> list[dict[str, Any]]:
    settings = Settings(seconds=0.0, draws=2, patience=patience)
    result = run(plan(None, *cases, settings=settings), apart, say=silent)
    return [{r["name"]: r for r in record["rows"]} for record in result["cases"]]


def are_timed(rows: dict[str, Any], names: Sequence[str]) -> bool:
    return all(rows[n]["state"] == "passed" and rows[n]["times"] for n in names)


def test_one_process_serves_all_cases(apart: Callable[..., Apart]) -> None:
    bench = apart()
    processes = []

    def say(text: str) -> None:
        processes.append(bench.worker.process)

    result = run(plan(None, case("causal forward"), case("full step")), bench, say=say)
    assert [c["rows"][0]["state"] for c in result["cases"]] == ["passed", "passed"]
    assert len(set(processes)) == 1 and result["device"].startswith("CPU")


@pytest.mark.parametrize(
    ("name", "row", "note"),
    [
        ("killed_in_rounds", "killed in rounds", "the process ended by SIGSEGV"),
        *(
            (
                ("killed", "killed", "the process ended by SIGSEGV"),
                ("breaking", "breaking", f"RuntimeError: {ILLEGAL}"),
            )
            if NIGHTLY
            else ()
        ),
    ],
)
def test_what_takes_its_process_down_loses_its_own_row_only(
    name: str, row: str, note: str, apart: Callable[..., Apart]
) -> None:
    bench = apart(name, "right")
    first, second = rows_after(bench, case("causal forward"), case("causal step"))
    for rows in (first, second):
        assert (rows[row]["state"], rows[row]["note"]) == ("failed", note)
        assert are_timed(rows, (OURS, "right"))


def test_what_hangs_in_native_code_is_ended_by_its_deadline(apart: Callable[..., Apart]) -> None:
    bench = apart("hanging", "right")
    began = time.monotonic()
    (rows,) = rows_after(bench, case("causal forward"), patience=15.0)
    assert rows["hanging"]["note"] == "took longer than 15 s"
    assert are_timed(rows, (OURS, "right")) and time.monotonic() - began < 100


def test_an_interruption_ends_the_process(apart: Callable[..., Apart]) -> None:
    bench = apart("right")

    def interrupt(row: Row) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure(case("causal forward"), [], QUICKLY, left=lambda: 100.0, row=interrupt)
    assert not bench.worker.is_alive


# --- runs that go on --------------------------------------------------------------------------------------------------


def made_row(state: str = "passed", ms: float | None = 1.0) -> Row:
    times = None if ms is None else measuring.Times(ms=ms, low=ms, high=ms, rounds=7)
    return Row(name=OURS, state=state, times=times)


def test_finished_cases_of_the_same_set_up_are_taken_over(tmp_path: Path) -> None:
    names = ("causal", "full", "alibi", "sink")
    cases = [case(f"{n} forward") for n in names]
    rows = dict(zip(names, (made_row(), made_row("wrong", None), made_row(ms=None), made_row()), strict=True))

    def first(case: Case, row: Callable[[Row], None]) -> None:
        row(rows[case.variant.name])
        if case.variant.name == "sink":
            raise Skipped("the time was up")

    earlier = json.loads(json.dumps(session.run(plan(tmp_path, *cases), Made(first), say=silent)))
    again: list[str] = []

    def second(case: Case, row: Callable[[Row], None]) -> None:
        again.append(case.variant.name)
        row(made_row())

    said: list[str] = []
    result = run(plan(tmp_path, *reversed(cases), earlier=earlier), Made(second), say=said.append)
    # Not those that were not timed, or not to their end.
    assert again == ["sink", "alibi"]
    assert [c["variant"] for c in result["cases"]] == ["sink", "alibi", "full", "causal"] and broken(result) == 1
    for key, other in (("code", "another"), ("device", "NVIDIA H200")):
        again.clear()
        run(plan(None, *cases, earlier={**earlier, key: other}), Made(second), say=said.append)
        assert len(again) == 4 and f"nothing is taken over: the earlier run differs in {key}" in said
