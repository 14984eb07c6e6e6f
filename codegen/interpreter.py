"""Run kernel text on the CPU, in Triton's interpreter.

Triton decides when it is imported whether it interprets, so interpretation has a process of its own. It is started at
the first use, kept, and ended with this process.
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from einsumcascade import errors

# A storage of which the tensors use so little is sent by elements.
_SPARSE_BYTES = 1 << 20
_SPARSE_RATIO = 4
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64"),
)


class KernelRunError(RuntimeError):
    """A kernel raised in the interpreter, or took the interpreter down with it."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """An argument that is a tensor, by its name."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of one kernel.

    Args:
        kernel: name of the `@triton.jit` function.
        grid: programs along each axis, one to three.
        arguments: by parameter: a `TensorRef`, a run-time scalar, or the value of a `tl.constexpr`.
        num_warps: warps of a program; the interpreter has none and ignores it.
        num_stages: buffers of a software pipeline; likewise.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: Mapping[str, TensorRef | int | float | bool | str | None]
    num_warps: int = 4
    num_stages: int = 2


def run_interpreted(
    source: str,
    launches: Sequence[Launch],
    tensors: Mapping[str, torch.Tensor],
    *,
    triton_path: Path | None = None,
    timeout_s: float = 300.0,
    mended: bool = True,
    shuffled: int | None = None,
) -> dict[str, torch.Tensor]:
    """Run `launches` of the kernels of `source`, in order, on copies of `tensors`.

    Tensors keep dtype, shape, strides and storage offset, and share storage where they did. An access outside every
    tensor of the call is an error. bfloat16 is computed as a GPU does: exact products summed in float32, elementwise
    work in float32, rounded to nearest even.

    Args:
        source: the kernel text.
        launches: what to run.
        tensors: by name, on the CPU; none of them is changed.
        triton_path: folder of another Triton, as `pip install --target` makes it.
        timeout_s: seconds that all launches together may take.
        mended: correct what the interpreter gets wrong. Without it the result says what Triton itself does.
        shuffled: seed of an order for the programs of each launch; None: as they are numbered. A GPU promises none.

    Returns: every tensor of `tensors`, by name: a new one where its storage was written, else the one given.

    Raises:
        KernelRunError: a kernel raised (with the line of its text), crashed the process, or took too long.
        ValueError: a launch names a tensor that is not there, or a tensor is not on the CPU.

    Cost: half a second at the first call; then about a millisecond, and one for each few programs.
    """
    for launch in launches:
        for parameter, value in launch.arguments.items():
            if isinstance(value, TensorRef) and value.name not in tensors:
                raise ValueError(f"{launch.kernel}: argument {parameter} names tensor {value.name}, which is not given")
    parcel = _Parcel.of(tensors)
    request = {
        "source": source,
        "shuffled": shuffled,
        "storages": [nbytes for nbytes, _ in parcel.storages],
        "packed": sorted(parcel.packed),
        "tensors": parcel.tensors,
        "launches": [
            (
                launch.kernel,
                launch.grid,
                {
                    name: (True, value.name) if isinstance(value, TensorRef) else (False, value)
                    for name, value in launch.arguments.items()
                },
            )
            for launch in launches
        ],
    }
    with _lock:
        worker = _worker(triton_path, mended)
        try:
            reply = worker.ask(request, parcel.buffers(tensors), deadline=time.monotonic() + timeout_s)
            if "error" in reply:
                raise KernelRunError(_describe(reply, source))
            return parcel.unpack(tensors, reply["written"], worker.receive)
        except _WorkerGone as gone:
            worker.close(kill=True)
            names = ", ".join(dict.fromkeys(launch.kernel for launch in launches))
            raise KernelRunError(f"the interpreter {gone} in {names}; it starts anew with the next call") from None
        except BaseException as error:
            # Half of a reply may still be on its way.
            if not isinstance(error, KernelRunError):
                worker.close(kill=True)
            raise


def _describe(reply: dict[str, Any], source: str) -> str:
    """Put an exception of the worker into one message: error, kernel line, traceback."""
    head = reply["error"]
    if "kernel" in reply:
        head = f"kernel {reply['kernel']}, program {reply['program']}: {head}"
    if reply.get("line"):
        head += f"\n {reply['line']} | {source.splitlines()[reply['line'] - 1].rstrip()}"
    return f"{head}\n\n{reply['traceback']}"


@dataclass(frozen=True)
class _Parcel:
    """How tensors travel: each storage once, whole, or by elements where its tensors use little of it."""

    storages: tuple[tuple[int, torch.UntypedStorage], ...]
    packed: frozenset[int]
    tensors: dict[str, dict[str, Any]]

    @staticmethod
    def of(tensors: Mapping[str, torch.Tensor]) -> _Parcel:
        """Describe `tensors` and the storages beneath them."""
        storages: list[tuple[int, torch.UntypedStorage]] = []
        index_of: dict[int, int] = {}
        described: dict[str, dict[str, Any]] = {}
        used: list[int] = []
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise ValueError(f"tensor {name} is on {tensor.device}, the interpreter works on the CPU")
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise ValueError(f"tensor {name} has dtype {dtype}, which Triton has not")
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in index_of:
                index_of[key] = len(storages)
                storages.append((storage.nbytes(), storage))
                used.append(0)
            itemsize = tensor.element_size()
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            used[index_of[key]] += tensor.numel() * itemsize
            described[name] = {
                "dtype": dtype,
                "itemsize": itemsize,
                "shape": tuple(tensor.shape),
                "strides": tuple(stride * itemsize for stride in tensor.stride()),
                "offset": tensor.storage_offset() * itemsize,
                "extent": (last + 1) * itemsize if tensor.numel() else 0,
                "storage": index_of[key],
            }
        packed = frozenset(
            index
            for index, (nbytes, _) in enumerate(storages)
            if nbytes > _SPARSE_BYTES and nbytes > _SPARSE_RATIO * used[index]
        )
        return _Parcel(tuple(storages), packed, described)

    def buffers(self, tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
        """List what follows the request, in the order that the worker reads it."""
        out = [_bytes(storage) for i, (_, storage) in enumerate(self.storages) if i not in self.packed]
        for name, tensor in tensors.items():
            if self.tensors[name]["storage"] in self.packed:
                out.append(_bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).untyped_storage()))
        return [buffer for buffer in out if len(buffer)]

    def unpack(self, tensors: Mapping[str, torch.Tensor], written: list[int], receive: Any) -> dict[str, torch.Tensor]:
        """Read the storages that were written and lay the tensors over them again."""
        fresh: dict[int, torch.UntypedStorage] = {}
        for index in written:
            fresh[index] = torch.empty(self.storages[index][0], dtype=torch.uint8).untyped_storage()
            if index not in self.packed:
                receive(_bytes(fresh[index]))
        out: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            index = self.tensors[name]["storage"]
            if index not in fresh:
                out[name] = tensor
                continue
            laid = torch.empty(0, dtype=tensor.dtype)
            laid.set_(fresh[index], tensor.storage_offset(), tensor.shape, tensor.stride())
            if index in self.packed:
                elements = torch.empty(tensor.shape, dtype=tensor.dtype)
                receive(_bytes(elements.untyped_storage()))
                laid.copy_(elements)
            out[name] = laid
        return out


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    """See the bytes of a storage."""
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type, unused-ignore]
    array: Any = flat.numpy()
    return memoryview(array)


class _WorkerGone(Exception):
    """The worker ended, or was too slow to answer."""


class _Worker:
    """The process at the other end of two pipes."""

    def __init__(self, triton_path: Path | None, *, mended: bool) -> None:
        root = Path(errors.__file__).resolve().parents[1]
        inherited = os.environ.get("PYTHONPATH")
        paths = [*([str(triton_path)] if triton_path else []), str(root), *([inherited] if inherited else [])]
        flags = [] if mended else ["--unmended"]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # Lives as long as the process; `close` closes it.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "einsumcascade.codegen.interpreter_worker", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **threads, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
            bufsize=0,
        )
        self.owner = os.getpid()
        self.deadline = 0.0

    @property
    def alive(self) -> bool:
        """Whether this process may use the worker: it runs, and was not inherited by a fork."""
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, request: dict[str, Any], buffers: list[memoryview], *, deadline: float) -> dict[str, Any]:
        """Send a request and return the head of the reply; `receive` reads the buffers that follow it."""
        assert self.process.stdin is not None
        self.deadline = deadline
        head = pickle.dumps(request)
        pipe = self.process.stdin.fileno()
        try:
            for part in (memoryview(len(head).to_bytes(8, "little") + head), *buffers):
                rest = part
                while rest:
                    rest = rest[os.write(pipe, rest) :]
        except BrokenPipeError:
            raise self._gone() from None
        size = bytearray(8)
        self.receive(memoryview(size))
        body = bytearray(int.from_bytes(size, "little"))
        self.receive(memoryview(body))
        reply: dict[str, Any] = pickle.loads(body)
        return reply

    def receive(self, buffer: memoryview) -> None:
        """Fill `buffer` from the worker before the deadline."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        rest = buffer
        while rest:
            wait_ms = max(0.0, (self.deadline - time.monotonic()) * 1e3)
            if not poll.poll(wait_ms):
                raise _WorkerGone("took too long")
            count = os.readv(pipe, [rest])
            if not count:
                raise self._gone()
            rest = rest[count:]

    def _gone(self) -> _WorkerGone:
        """Say how the worker ended, with the last that it wrote to its error stream."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip()[-2000:]
        return _WorkerGone(f"ended with status {self.process.returncode}" + (f" ({last})" if last else ""))

    def close(self, *, kill: bool = False) -> None:
        """End the process: it leaves when its input ends."""
        if self.owner != os.getpid():
            return
        if kill:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


_lock = threading.RLock()
_workers: dict[tuple[Path | None, bool], _Worker] = {}


def _worker(triton_path: Path | None, mended: bool) -> _Worker:
    """Return the running worker for one Triton, started if need be."""
    worker = _workers.get((triton_path, mended))
    if worker is None or not worker.alive:
        worker = _workers[triton_path, mended] = _Worker(triton_path, mended=mended)
    return worker


@atexit.register
def close_workers() -> None:
    """End every worker of this process; the next call starts a new one."""
    while _workers:
        _workers.popitem()[1].close()
