"""A device of the tuner that interprets: kernels are compiled for a GPU and run, slowly, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from einsumcascade.codegen.launch import Built
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.verify.measuring import Job, Processes

SMALL = {"B": 1, "H": 2, "P": 37, "M": 50, "E": 16, "F": 16}
NAME = "interpreted"


def interpreted(job: Job, text: Callable[[Schedule], Built], target: Any, jobs: int) -> Processes:
    """A device that runs the small inputs in Triton's interpreter."""
    return Processes(job=replace(job, device="cpu"), build=text, target=target, name=NAME, jobs=1)


def faulty(how: str) -> str:
    """What goes to the top of a kernel text to make it a bad one."""
    running = 'if os.environ.get("TRITON_INTERPRET"):\n    '
    return {
        "crash the compiler": "os.kill(os.getpid(), 11)",
        "hang the compiler": "while True:\n    pass",
        "crash": running + "os.kill(os.getpid(), 11)",
        "hang": running + "while True:\n        pass",
    }[how]


def spoiled(
    built: Built, how: str, *, terms: Sequence[str] = ("b_CGM * b_RSD", "b_RSD * b_CGM"), instead: str = "b_RSD"
) -> Built:
    """A candidate that goes wrong in some way; wrong numbers come of some `terms` that are put down as another."""
    source = built.source
    if how == "wrong numbers":
        for term in terms:
            source = source.replace(term, instead)
    elif how and how != "shared memory":
        source = source.replace("import triton\n", f"import os\n\n{faulty(how)}\nimport triton\n", 1)
    else:
        return built
    assert source != built.source, source
    return replace(built, source=source)
