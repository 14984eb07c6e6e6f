"""Candidates that take their process down, or would take the run with them."""

from __future__ import annotations

import ctypes
import os
import signal

import torch

from einsumcascade.benchmarks import clock
from einsumcascade.benchmarks.cases import Case
from einsumcascade.benchmarks.measure import Candidate


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def right(case: Case) -> Candidate:
    return Candidate(name="right", make=lambda: sdpa)


def hanging(case: Case) -> Candidate:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Holds the interpreter and hears no signal, as a driver does that waits for a kernel without an end.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        ctypes.PyDLL(None).sleep(600)
        return q

    return Candidate(name="hanging", make=lambda: function)


def killed(case: Case) -> Candidate:
    return _from_call(1, "killed", lambda: os.kill(os.getpid(), signal.SIGSEGV))


def killed_in_rounds(case: Case) -> Candidate:
    return _from_call(4, "killed in rounds", lambda: os.kill(os.getpid(), signal.SIGSEGV))


def breaking(case: Case) -> Candidate:
    def fail() -> None:
        def wait(self: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        clock.HostClock.wait = wait  # type: ignore[method-assign,assignment]
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    return _from_call(1, "breaking", fail)


def _from_call(number: int, name: str, do: object) -> Candidate:
    calls = [0]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] >= number:
            do()  # type: ignore[operator]
        return sdpa(q, k, v)

    return Candidate(name=name, make=lambda: function)
