"""What a call costs the host, measured where there is no GPU: everything runs but the driver's own launch.

The op believes to be on cuda:90. Its kernels are compiled for that target, their arguments bound and specialised by
Triton as ever; the last step, which hands a kernel to the GPU, does nothing. Tensors lie in the memory of the host.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.benchmarks.table import Table
from einsumcascade.codegen import runner as runners
from einsumcascade.codegen.compiling import PretendedDriver
from einsumcascade.codegen.dtypes import value_dtype
from einsumcascade.codegen.launch import build
from einsumcascade.codegen.op import compile as compile_cascade
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.schedules.schedule import Schedule

TARGET = "cuda:90"
# What the project wants of a call, in microseconds: with gradients and without.
AIM_RECORDED, AIM_LIGHT = 60.0, 35.0
# Lengths without a common divisor of 2, and multiples of 16: the two specialisations that a length may have.
LENGTHS = (*range(17, 77, 6), *range(32, 192, 16))


class _Launcher:
    """In place of the function that hands a kernel to the driver."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.launches = 0

    def __call__(self, *arguments: Any) -> None:
        self.launches += 1


class _Utils:
    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    @staticmethod
    def unload_module(module: int) -> None:
        return None

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        target = gpu_target(TARGET)
        return {"max_shared_mem": target.shared_memory_bytes, "multiprocessor_count": target.multiprocessors}


class StubDriver(PretendedDriver):
    """A driver of Triton that drives nothing."""

    launcher_cls = _Launcher
    utils = _Utils

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def stubbed() -> Iterator[None]:
    """Let ops launch on tensors of the host, on a driver that drives nothing."""
    from triton.runtime import driver

    def prepared(runner: Any, tensors: Sequence[Tensor], precision: str) -> Any:
        inputs = {i.tensor: t for i, t in zip(runner.cascade.inputs, tensors, strict=True)}
        binding = bind(runner.cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
        dtype = str(value_dtype(tensors)).removeprefix("torch.")
        features = {r: binding.extents[r] for r in feature_ranks(runner.cascade)}
        built = build(
            runner.cascade,
            extents=features,
            dtype=dtype,
            target=gpu_target(TARGET),
            schedule=runner.schedule,
            precision=precision,
        )
        return runner.launched(built, inputs, binding, dtype)

    before = driver._active
    driver.set_active(StubDriver(gpu_target(TARGET)))
    try:
        with (
            patch.object(runners.Runner, "_prepared", prepared),
            patch.object(torch.cuda, "current_device", lambda: None),
        ):
            yield
    finally:
        driver.set_active(before)


def host_us(call: Callable[[], object], *, batches: int = 200, calls: int = 20) -> float:
    """The microseconds of a call: those of the fastest batch, since what else the host does only adds to them."""
    for _ in range(calls):
        call()
    spans = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        spans.append(1e6 * (time.perf_counter() - start) / calls)
    return min(spans)


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What the parts of a call cost the host, in microseconds, and what calls of many lengths compiled.

    Args:
        light: a call without gradients. recorded: one that records them. backward: that of its gradient.
        launches: kernels of the light call. bare: those launches alone, as Triton's own interface takes them.
        lengths: lengths of queries and keys that were called. texts, binaries: what they made of the forward.
    """

    name: str
    light: float
    recorded: float
    backward: float
    launches: int
    bare: float
    lengths: int
    texts: int
    binaries: int


def overhead(name: str = "softmax_attention", schedule: Schedule | None = None, *, label: str = "") -> Overhead:
    """Measure the calls of a variant of the gallery whose inputs are Q, K and V.

    Cost: some seconds, most of them compilation.
    """
    op = compile_cascade(load(name), schedule=schedule)

    def tensors(p: int, *, grad: bool = False) -> list[Tensor]:
        return [torch.zeros(1, 2, p, 64, dtype=torch.bfloat16, requires_grad=grad) for _ in range(3)]

    with stubbed():
        plain, trained = tensors(64), tensors(64, grad=True)
        light = host_us(lambda: op(*plain))
        recorded = host_us(lambda: op(*trained))
        out: Any = op(*trained)
        back = torch.zeros_like(out)
        backward = host_us(lambda: torch.autograd.grad(out, trained, back, retain_graph=True))
        (call,) = op._runner.calls.values()
        launches: Any = call.compute.__self__  # type: ignore[attr-defined]
        ready = dict(zip(launches.names, plain, strict=True))
        ready |= {n: torch.empty(size, dtype=dtype) for n, size, dtype in launches.new}
        bare = host_us(lambda: launches.launch(ready))
        many = compile_cascade(load(name), schedule=schedule)
        for length in LENGTHS:
            many(*tensors(length))
        sources = {c.shown().source for c in many._runner.calls.values()}
        compiled = sum(map(binaries, sources))
    return Overhead(
        name=label or name,
        light=light,
        recorded=recorded,
        backward=backward,
        launches=len(launches.launches),
        bare=bare,
        lengths=len(LENGTHS),
        texts=len(sources),
        binaries=compiled,
    )


def binaries(source: str) -> int:
    """How many machine codes Triton holds of the kernels of a text."""
    from triton.runtime.jit import JITFunction

    from einsumcascade.codegen.build import load_module

    kernels = [k for k in vars(load_module(source)).values() if isinstance(k, JITFunction)]
    return sum(len(cache[0]) for k in kernels for cache in k.device_caches.values())


def launch_report() -> str:
    """Measure and say what a call costs the host, beside what the project wants."""
    import triton

    from einsumcascade.schedules.schedule import KernelSchedule

    described = Schedule(
        kernels={"softmax_attention": KernelSchedule(tiles={"p": 128, "m": 64}, warps=8, stages=2, descriptors=True)}
    )
    found = [
        overhead(),
        overhead(schedule=described, label="softmax_attention, descriptors"),
        overhead("sigmoid"),
    ]
    rows = [
        [
            o.name,
            f"{o.light:.1f}",
            f"{o.recorded:.1f}",
            f"{o.backward:.1f}",
            f"{o.bare:.1f}",
            str(o.lengths),
            str(o.texts),
            str(o.binaries),
        ]
        for o in found
    ]
    heads = ["op", "light", "recorded", "backward", "launch alone", "lengths", "texts", "binaries"]
    table = Table(title="Microseconds of the host a call", heads=heads, rows=rows)
    met = all(o.light <= AIM_LIGHT and o.recorded <= AIM_RECORDED for o in found)
    return (
        f"{table}\n\n"
        f"light: a call without gradients, wanted {AIM_LIGHT:.0f} us at most\n"
        f"recorded: a forward that records them, wanted {AIM_RECORDED:.0f} us at most; {'met' if met else 'NOT met'}\n"
        "backward: that of its gradient; launch alone: the part of a light call that Triton's interface takes\n"
        "texts and binaries: made for the forward at that many lengths; a length is a multiple of 16 or it is not\n"
        "kernels compiled and bound for cuda:90, the driver stubbed; the fastest of some batches\n"
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}"
    )
