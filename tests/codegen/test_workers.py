"""Processes that may crash or hang lose one request each; they end when their owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from einsumcascade.codegen.workers import LateError, Worker, WorkError, ask_all

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.codegen.test_workers"


def double(n: int) -> int:
    return 2 * n


def crash(n: int) -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return n


def leave(n: int) -> int:
    print("the compiler gives up", file=sys.stderr)
    sys.stderr.flush()
    os._exit(n)


def hang(n: int) -> int:
    time.sleep(1000)
    return n


def fail(n: int) -> int:
    raise ValueError(f"no {n}\nmore")


def any_of(name: str, n: int) -> int:
    """Do one of the above."""
    return int(globals()[name](n))


def child(n: int) -> int:
    return subprocess.Popen([sys.executable, "-c", f"import time\ntime.sleep({n})"]).pid


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for is listed all the same."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def process() -> int:
    return os.getpid()


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = Worker()
    yield made
    made.close()


def test_a_process_answers_and_is_kept(worker: Worker) -> None:
    assert [worker.ask(f"{HERE}:double", n, timeout_s=30) for n in (1, 2)] == [2, 4]
    assert worker.ask(f"{HERE}:process", timeout_s=30) == worker.ask(f"{HERE}:process", timeout_s=30) != os.getpid()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("crash", "the process ended by SIGSEGV"),
        ("leave", "the process ended with status 3: the compiler gives up"),
        ("hang", "took longer than 1 s"),
        ("fail", "no 3"),
        ("missing", "module 'tests.codegen.test_workers' has no attribute 'missing'"),
    ],
)
def test_what_fails_says_why_and_the_next_request_is_answered(worker: Worker, function: str, why: str) -> None:
    with pytest.raises(WorkError) as caught:
        worker.ask(f"{HERE}:{function}", 3, timeout_s=1)
    assert str(caught.value) == why
    assert worker.ask(f"{HERE}:double", 4, timeout_s=30) == 8


def test_of_many_requests_the_bad_ones_alone_are_lost() -> None:
    workers = [Worker(), Worker()]
    wanted = [("double", 1), ("crash", 2), ("hang", 3), ("double", 4), ("fail", 5), ("leave", 6), ("double", 7)]
    try:
        found = dict(ask_all(workers, f"{HERE}:any_of", wanted, timeout_s=2))
    finally:
        for w in workers:
            w.close()
    assert {n: r for n, r in found.items() if not isinstance(r, WorkError)} == {0: 2, 3: 8, 6: 14}
    assert set(found) == set(range(7))


def test_nothing_begins_after_the_deadline_and_what_runs_is_ended() -> None:
    worker = Worker()
    worker.ask(f"{HERE}:double", 1, timeout_s=30)
    begun = time.monotonic()
    found = dict(ask_all([worker], f"{HERE}:hang", [(1,), (2,)], timeout_s=60, deadline=time.monotonic() + 1))
    assert time.monotonic() - begun < 20
    assert list(found) == [0] and isinstance(found[0], LateError)
    assert worker.process is None
    with pytest.raises(LateError, match="there was no time left"):
        worker.ask(f"{HERE}:double", 1, timeout_s=60, deadline=time.monotonic())


def test_what_a_process_has_started_ends_with_it(worker: Worker) -> None:
    pid = worker.ask(f"{HERE}:child", 600, timeout_s=30)
    assert is_running(pid)
    worker.close()
    for _ in range(100):
        if not is_running(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} lives on")


@pytest.mark.parametrize("function", ["double", "hang"])
def test_a_process_ends_when_its_owner_is_killed(function: str) -> None:
    script = (
        "from einsumcascade.codegen.workers import Worker\n"
        f"w = Worker()\nprint(w.ask('{HERE}:process', timeout_s=60), flush=True)\n"
        f"w.begin('{HERE}:{function}', 1, timeout_s=600)\nimport time\ntime.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    for _ in range(100):
        if not is_running(pid):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} lives on")


def test_a_request_is_made_when_a_process_is_free_for_it() -> None:
    made: list[int] = []

    def requests() -> Iterator[tuple[int]]:
        for n in range(6):
            made.append(n)
            yield (n,)

    workers = [Worker(), Worker()]
    try:
        for answers, (n, found) in enumerate(ask_all(workers, f"{HERE}:double", requests(), timeout_s=30)):
            assert found == 2 * n
            assert len(made) <= answers + len(workers)
    finally:
        for w in workers:
            w.close()
    assert made == list(range(6))


def test_where_no_process_can_be_started_each_request_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    worker = Worker()
    found = dict(ask_all([worker], f"{HERE}:double", [(1,), (2,)], timeout_s=30))
    assert [str(found[n]) for n in (0, 1)] == ["no process can be started: Resource temporarily unavailable"] * 2
    monkeypatch.undo()
    assert worker.ask(f"{HERE}:double", 2, timeout_s=30) == 4
    worker.close()


def read(file: int) -> bytes:
    with open(file, "rb", closefd=False) as stream:
        stream.seek(0)
        return stream.read()


def test_a_process_inherits_files_also_when_it_is_started_again(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as stream:
        stream.write(b"inputs")
        stream.flush()
        worker = Worker((), (stream.fileno(),))
        for _ in range(2):
            assert worker.ask(f"{HERE}:read", stream.fileno(), timeout_s=30) == b"inputs"
            worker.close()


def test_an_answer_that_nobody_waited_for_is_not_given_to_the_next_request(worker: Worker) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    worker.ask(f"{HERE}:double", 1, timeout_s=30)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.ask(f"{HERE}:hang", 1, timeout_s=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert worker.ask(f"{HERE}:double", 4, timeout_s=30) == 8
