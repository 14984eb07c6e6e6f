"""Processes that do work which may crash, hang or run out of memory, so that the one who asks for it does not.

A worker answers one request at a time: a function of this package by its name, and its arguments. One that dies or
takes too long loses its request only, and not what the function told before it (`tell`); the next one gets a new
process. Workers end when their owner ends, however it ends.
"""

from __future__ import annotations

import importlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from einsumcascade import errors

# A process imports Triton, and PyTorch too, before it can answer.
START_S = 120.0
# What a process that was killed may take to be gone.
_LAST_S = 5.0
# The end of what a process wrote to its error stream that a message quotes.
_QUOTED = 300


class WorkError(Exception):
    """A request ended without a result: the function raised, or the process died or took too long."""


class LateError(WorkError):
    """A request was not done by the deadline of all of them, which is no fault of its own."""

    def __init__(self) -> None:
        super().__init__("there was no time left")


class Worker:
    """One process, started at the first request and again after it was lost.

    Args:
        modules: what it imports before its time begins.
        files: descriptors that it inherits.
        told: gets what functions tell before they end; it may set another `deadline`.
    """

    def __init__(
        self,
        modules: Sequence[str] = (),
        files: Sequence[int] = (),
        *,
        told: Callable[[Any], None] = lambda value: None,
    ) -> None:
        self.modules, self.files, self.told = tuple(modules), tuple(files), told
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        # Seconds of a request, when they are over, and when there is no time for any.
        self.timeout_s = self.deadline = 0.0
        self.limit = math.inf
        self.reply: Any = None
        # Lives as long as the process.
        self.stream: Any = None

    def ask(self, function: str, *arguments: Any, timeout_s: float, deadline: float = math.inf) -> Any:
        """Call `package.module:function` in the process and return its result.

        Raises: WorkError: it raised, died or took longer than `timeout_s` seconds; LateError: than to the deadline.
        """
        self.begin(function, *arguments, timeout_s=timeout_s, deadline=deadline)
        try:
            return self.end()
        except KeyboardInterrupt:
            # Its answer must not be taken for that of the next request.
            self.close()
            raise

    @property
    def is_alive(self) -> bool:
        """Whether there is a process to ask."""
        return self.process is not None and self.process.poll() is None

    def begin(self, function: str, *arguments: Any, timeout_s: float, deadline: float = math.inf) -> None:
        """Send a request; `end` waits for its result.

        Raises: WorkError: no process can be started.
        """
        extra = 0.0
        if not self.is_alive:
            self._start()
            extra = START_S
        assert self.pipe is not None
        self.timeout_s, self.limit = timeout_s, deadline
        self.deadline = min(time.monotonic() + timeout_s + extra, deadline)
        with suppress(OSError):
            # One that is gone already is found so when its reply is read.
            self.pipe.send((function, arguments))

    def end(self) -> Any:
        """Wait for the result of the request that was begun."""
        assert self.pipe is not None
        while not (self.pipe.poll(max(0.0, self.deadline - time.monotonic())) and self.take()):
            if time.monotonic() >= self.deadline:
                self.give_up()
                break
        return self.result()

    def take(self) -> bool:
        """Read what the process says; tell whether it is the result."""
        assert self.pipe is not None
        try:
            state, found = self.pipe.recv()
        except (EOFError, OSError):
            state, found = "lost", self._how_it_ended()
        if state == "ready":
            self.deadline = min(time.monotonic() + self.timeout_s, self.limit)
            return False
        if state == "told":
            self.told(found)
            return False
        self.reply = found if state == "done" else WorkError(found)
        return True

    def give_up(self) -> None:
        """End the process of a request that took too long."""
        self.close()
        is_late = time.monotonic() >= self.limit
        self.reply = LateError() if is_late else WorkError(f"took longer than {self.timeout_s:.0f} s")

    def result(self) -> Any:
        """The result that was taken last. Raises: WorkError: it is none."""
        if isinstance(self.reply, WorkError):
            raise self.reply
        return self.reply

    def close(self) -> None:
        """End the process at once."""
        if self.process is not None:
            # With all that it has started itself, an assembler or an interpreter.
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            # One that a driver holds on to ends when that lets go of it.
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_LAST_S)
            self.process = None
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        root = Path(errors.__file__).resolve().parents[1]
        inherited = os.environ.get("PYTHONPATH")
        paths = os.pathsep.join([str(root), *([inherited] if inherited else [])])
        own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-P", "-m", "einsumcascade.codegen.workers"]
        try:
            self.stream = tempfile.TemporaryFile()  # noqa: SIM115
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid()), *self.modules],
                env={**own, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.stream,
                pass_fds=[theirs.fileno(), *self.files],
                # An interruption is for the one who asked.
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise WorkError(f"no process can be started: {error.strerror or error}") from None
        finally:
            theirs.close()
        self.pipe = Connection(ours.detach())

    def _how_it_ended(self) -> str:
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_LAST_S)
        code = self.process.returncode
        self.stream.seek(0)
        said = self.stream.read().decode(errors="replace").strip().splitlines()[-1:]
        self.close()
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        return f"the process ended {how}" + (f": {said[0][:_QUOTED]}" if said else "")


def ask_all(
    workers: Sequence[Worker],
    function: str,
    requests: Iterable[tuple[Any, ...]],
    *,
    timeout_s: float,
    deadline: float = math.inf,
) -> Iterator[tuple[int, Any]]:
    """Ask for many results at once, as many at a time as there are workers; yield each by its place as it ends.

    Args:
        function: as `Worker.ask` takes it. requests: its arguments, in the order in which they begin; the next is taken
            when a worker is free for it, so that what makes them need not be done with all before one begins.
        timeout_s: seconds that one may take. deadline: monotonic time after which none begins, and all end.

    Yields: the place of a request that began, and its result or a WorkError.
    """
    waiting = iter(enumerate(requests))
    busy: dict[Worker, int] = {}
    idle = list(workers)
    more = True
    try:
        while busy or (more and time.monotonic() < deadline):
            while more and idle and time.monotonic() < deadline:
                n, arguments = next(waiting, (-1, ()))
                more = n >= 0
                if not more:
                    break
                try:
                    idle[-1].begin(function, *arguments, timeout_s=timeout_s, deadline=deadline)
                except WorkError as error:
                    yield n, error
                else:
                    busy[idle.pop()] = n
            if not busy:
                continue
            first = min(w.deadline for w in busy)
            ready = wait([w.pipe for w in busy if w.pipe is not None], max(0.0, first - time.monotonic()))
            for worker in list(busy):
                if worker.pipe in ready:
                    if not worker.take():
                        continue
                elif time.monotonic() >= worker.deadline:
                    worker.give_up()
                else:
                    continue
                idle.append(worker)
                yield busy.pop(worker), worker.reply
    finally:
        for worker in busy:
            worker.close()


# Where the process of a worker says what it has.
_owner: Connection | None = None


def tell(value: Any) -> None:
    """Hand a value to the owner of this worker's process before the request is done; elsewhere it is dropped."""
    if _owner is not None:
        _owner.send(("told", value))


def _serve(pipe: Connection, modules: Sequence[str]) -> None:
    """Answer requests until the pipe closes."""
    global _owner
    _owner = pipe
    for name in modules:
        importlib.import_module(name)
    pipe.send(("ready", None))
    while True:
        try:
            name, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        module, _, function = name.partition(":")
        try:
            reply = ("done", getattr(importlib.import_module(module), function)(*arguments))
        except Exception as error:
            reply = ("failed", next(iter(str(error).splitlines()), "") or type(error).__name__)
        try:
            pipe.send(reply)
        except OSError:
            return


def _end_with(owner: int) -> None:
    """End this process when its owner has ended, also while it is stuck in a compiler."""
    with suppress(Exception):
        import ctypes

        # PR_SET_PDEATHSIG, on Linux.
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    # What requests import is this module under its own name.
    from einsumcascade.codegen import workers

    workers._serve(Connection(int(sys.argv[1])), sys.argv[3:])
