"""The process that runs kernel text in Triton's interpreter: `python -m einsumcascade.codegen.interpreter_worker`.

It reads requests from its input and writes replies to its output until the input ends. It never imports PyTorch, so
it starts in half a second.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import os
import pickle
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from einsumcascade.codegen.build import forget_module, load_module
from einsumcascade.codegen.interpreter_mends import Memory, Span, mend

_ALIGNMENT = 64
_MODULES_KEPT = 256


class Interpreter:
    """Runs requests, one after the other."""

    def __init__(self, *, mended: bool) -> None:
        import triton.language as tl
        from triton.runtime import interpreter

        self.tl = tl
        self.interpreter = interpreter
        self.np = interpreter.np
        self.memory = Memory()
        self.mended = mended
        if mended:
            mend(lambda: self.memory)
        self.folder = tempfile.TemporaryDirectory(prefix="einsumcascade-interpreter-")
        self.sources: dict[str, ModuleType] = {}

    def module(self, source: str) -> ModuleType:
        """Import a kernel text, or find it among those used last."""
        module = self.sources.pop(source, None)
        if module is None:
            module = load_module(source, directory=Path(self.folder.name))
        self.sources[source] = module
        if len(self.sources) > _MODULES_KEPT:
            oldest = next(iter(self.sources))
            for value in vars(self.sources.pop(oldest)).values():
                if isinstance(value, self.interpreter.InterpretedFunction):
                    value.rewritten_fn.pop(value.fn, None)
            forget_module(oldest, directory=Path(self.folder.name))
        return module

    def launch(
        self, module: ModuleType, kernel: str, grid: Sequence[int], values: dict[str, Any], shuffled: int | None
    ) -> None:
        """Run every program of one launch: as they are numbered, or in the order that a seed gives."""
        function = getattr(module, kernel, None)
        if not isinstance(function, self.interpreter.InterpretedFunction):
            raise LookupError(f"the text has no @triton.jit function '{kernel}'")
        annotations = {name: str(a) for name, a in inspect.get_annotations(function.fn).items()}
        arguments = {
            name: value if "constexpr" in annotations.get(name, "") else self.convert(value)
            for name, value in inspect.getcallargs(function.fn, **values).items()
        }
        run = function.rewrite()
        self.interpreter._patch_lang(function.fn)
        builder = self.interpreter.interpreter_builder
        extents = (*grid, 1, 1, 1)[:3]
        builder.set_grid_dim(*extents)
        programs: Iterable[tuple[int, ...]] = itertools.product(*map(range, extents))
        if shuffled is not None:
            programs = list(programs)
            random.Random(shuffled).shuffle(programs)
        for x, y, z in programs:
            builder.set_grid_idx(x, y, z)
            run(**arguments)

    def convert(self, value: Any) -> Any:
        """Make a run-time scalar what a launch makes it: the narrowest integer type, or float32."""
        tl, np = self.tl, self.np
        match value:
            case bool():
                data, kind = np.array([value], bool), tl.int1
            case int():
                narrow = -(2**31) <= value < 2**31
                data = np.array([value], np.int32 if narrow else np.int64)
                kind = tl.int32 if narrow else tl.int64
            case float():
                data, kind = np.array([value], np.float32), tl.float32
            case _:
                return value
        return tl.tensor(self.interpreter.TensorHandle(data, kind), kind)

    def pointer(self, address: int, dtype: str) -> Any:
        """Make the first address of a tensor a pointer."""
        tl = self.tl
        kinds = {
            "bool": tl.int1,
            "float8_e4m3fn": tl.float8e4nv,
            "float8_e5m2": tl.float8e5,
            **{n: getattr(tl, n) for n in ("bfloat16", "float16", "float32", "float64")},
            **{n: getattr(tl, n) for n in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
        }
        kind = tl.pointer_type(kinds[dtype])
        data = self.np.array([address], self.np.uint64)
        return tl.tensor(self.interpreter.TensorHandle(data, kind), kind)

    def serve(self, request: dict[str, Any], read: Callable[[Any], None]) -> tuple[dict[str, Any], list[Any]]:
        """Run one request; its tensors follow it in the stream.

        Returns: the reply and the buffers that follow it: those of the storages that were written.
        """
        np = self.np
        buffers: list[Any] = []
        starts: list[int] = []
        for nbytes in request["storages"]:
            raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
            shift = -raw.ctypes.data % _ALIGNMENT
            buffers.append(raw[shift : shift + nbytes])
            starts.append(raw.ctypes.data + shift)

        def view(tensor: dict[str, Any]) -> Any:
            """See a tensor's elements as unsigned integers, which any copy keeps."""
            return np.ndarray(
                tensor["shape"],
                np.dtype(f"u{tensor['itemsize']}"),
                buffers[tensor["storage"]],
                tensor["offset"],
                tensor["strides"],
            )

        packed = set(request["packed"])
        for index, buffer in enumerate(buffers):
            if index not in packed:
                read(buffer)
        pointers: dict[str, Any] = {}
        spans: list[Span] = []
        for name, tensor in request["tensors"].items():
            low = starts[tensor["storage"]] + tensor["offset"]
            pointers[name] = self.pointer(low, tensor["dtype"])
            spans.append(Span(low, low + tensor["extent"], tensor["storage"], name))
            if tensor["storage"] in packed:
                elements = np.empty(tensor["shape"], np.dtype(f"u{tensor['itemsize']}"))
                read(elements.reshape(-1).view(np.uint8))
                view(tensor)[...] = elements
        self.memory = Memory(spans)
        module = self.module(request["source"])
        for kernel, grid, arguments in request["launches"]:
            values = {name: pointers[value] if is_tensor else value for name, (is_tensor, value) in arguments.items()}
            try:
                self.launch(module, kernel, grid, values, request["shuffled"])
            except Exception as error:
                return self.failure(error, module, kernel), []
        # Only a mended interpreter tells what it wrote.
        written = sorted(self.memory.written) if self.mended else list(range(len(buffers)))
        replies = [buffers[index] for index in written if index not in packed]
        for tensor in request["tensors"].values():
            if tensor["storage"] in packed and tensor["storage"] in written:
                replies.append(np.ascontiguousarray(view(tensor)).reshape(-1).view(np.uint8))
        return {"written": written}, replies

    def failure(self, error: BaseException, module: ModuleType, kernel: str) -> dict[str, Any]:
        """Describe an exception: its root, and the line of the kernel text that it left."""
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        chain = [frame for link in _links(error) for frame in traceback.extract_tb(link.__traceback__)]
        inside = [frame for frame in chain if frame.filename == module.__file__]
        return {
            "error": f"{type(root).__name__}: {root}",
            "kernel": kernel,
            "line": inside[-1].lineno if inside else None,
            "program": getattr(self.interpreter.interpreter_builder, "grid_idx", None),
            "traceback": "".join(traceback.format_exception(error)),
        }


def _links(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, outermost first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _read_into(stream: BinaryIO, buffer: Any) -> bool:
    """Fill `buffer`; return False where the stream ends instead."""
    rest = memoryview(buffer).cast("B")
    while rest:
        count = stream.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            return False
        rest = rest[count:]
    return True


def main(*, mended: bool) -> None:
    """Serve until the input ends."""
    # What a kernel prints must not fall between two replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    worker = Interpreter(mended=mended)
    # What lives now lives for ever; collections need not walk it.
    gc.freeze()

    def read(buffer: Any) -> None:
        if buffer.size and not _read_into(requests, buffer):
            raise EOFError

    size = bytearray(8)
    with suppress(BrokenPipeError, EOFError, KeyboardInterrupt):
        while _read_into(requests, size):
            head = bytearray(int.from_bytes(size, "little"))
            _read_into(requests, head)
            try:
                reply, buffers = worker.serve(pickle.loads(head), read)
            except EOFError:
                raise
            except Exception as error:
                reply, buffers = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}, []
            data = pickle.dumps(reply)
            replies.write(len(data).to_bytes(8, "little") + data)
            for buffer in buffers:
                replies.write(memoryview(buffer))
            replies.flush()


if __name__ == "__main__":
    main(mended="--unmended" not in sys.argv)
