"""What Triton's interpreter gets wrong, put right: bfloat16, casts, loop bounds, speed and accesses gone astray.

A test for each says when Triton no longer needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of memory that one tensor covers."""

    low: int
    high: int
    storage: int
    name: str


@dataclass
class Memory:
    """The tensors of one request: what may be read, and what was written."""

    spans: list[Span] = field(default_factory=list)
    written: set[int] = field(default_factory=set)

    def check(self, addresses: Any, mask: Any, *, bytes_each: int, write: bool) -> None:
        """Refuse an access that leaves every tensor; note the storages that a write reaches."""
        active = addresses[mask]
        if active.size == 0:
            return
        low, high = int(active.min()), int(active.max()) + bytes_each
        span = self._holding(low, high)
        if span is not None:
            if write:
                self.written.add(span.storage)
            return
        for address in active.tolist():
            span = self._holding(address, address + bytes_each)
            if span is None:
                raise IndexError(self._astray(address, bytes_each, write=write))
            if write:
                self.written.add(span.storage)

    def _holding(self, low: int, high: int) -> Span | None:
        return next((span for span in self.spans if span.low <= low and high <= span.high), None)

    def _astray(self, address: int, bytes_each: int, *, write: bool) -> str:
        what = "store" if write else "load"
        if not self.spans:
            return f"{what} outside every tensor: there is none"
        near = min(self.spans, key=lambda span: max(span.low - address, address - span.high))
        element = (address - near.low) // bytes_each
        count = (near.high - near.low) // bytes_each
        return f"{what} outside every tensor: element {element} of {near.name}, which covers elements 0 to {count - 1}"


def mend(memory: Callable[[], Memory]) -> None:
    """Correct the interpreter in this process, and make it check every access against `memory()`.

    * bfloat16 is kept as its 16 bits, and everything but loads, stores and casts works on those bits as integers:
      products, sums, comparisons. Here they are computed in float32 and rounded.
    * A cast from float32 to bfloat16 truncates. Here it rounds to nearest, ties to even.
    * A loop bound that depends on the program fails in Triton 3.6 with NumPy 2.4, and so does a bfloat16 constant.
    * A truth value of a single number is taken for a float where it meets a block of truth values.
    * Functions of libdevice are not there, nor is inline assembly. What kernels use is computed by NumPy here.
    * The language is patched anew, and slowly, at every call of every function. Here it is patched once, and what else
      takes long is left out.
    """
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    # NumPy as the interpreter sees it: this file works on the interpreter's own arrays.
    np = interpreter.np
    builder = interpreter.InterpreterBuilder
    handle_of = interpreter.TensorHandle
    np.seterr(all="ignore")

    class Everything:
        __globals__: dict[str, object] = {"tl": tl, "core": tl.core}  # noqa: RUF012

    class Kept:
        def restore(self) -> None:
            """Leave the language patched."""

    interpreter._patch_lang(Everything)
    interpreter._patch_lang = lambda fn: Kept()
    # Half of the time went into assertions on the overflow of every 32-bit sum; a wrapped address is found anyway.
    language = interpreter.interpreter_builder
    language.options = replace(language.options, sanitize_overflow=False)
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        return handle_of(np.full(ret_ty.shape, arg.data.flat[0], dtype=arg.data.dtype), arg.dtype.scalar)

    builder.create_splat = create_splat

    def widen(data: Any) -> Any:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def narrow(data: Any) -> Any:
        bits = np.asarray(data, dtype=np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    def is_bfloat16(value: object) -> bool:
        return isinstance(value, handle_of) and bool(value.dtype.scalar == tl.bfloat16)

    def lifted(name: str) -> None:
        original = getattr(builder, name)

        @wraps(original)
        def replacement(self: Any, *args: Any) -> Any:
            if not any(is_bfloat16(value) for value in args):
                return original(self, *args)
            wide = [handle_of(widen(v.data), tl.float32) if is_bfloat16(v) else v for v in args]
            result = original(self, *wide)
            if result.data.dtype == np.bool_:
                return result
            return handle_of(narrow(result.data), tl.bfloat16)

        setattr(builder, name, replacement)

    def tanh(x: Any, **_: Any) -> Any:
        return tl.tensor(handle_of(np.tanh(x.handle.data), x.handle.dtype), x.type)

    libdevice.tanh = tanh

    def inline_asm_elementwise(asm: str, constraints: str, args: Sequence[Any], **_: Any) -> Any:
        (x,) = args
        data = instructions[asm.split()[0]](x.handle.data).astype(np.float32)
        return tl.tensor(handle_of(data, x.handle.dtype), x.type)

    def tanh_approx(x: Any) -> Any:
        # As wrong as the instruction may be, to 11 bits.
        fraction, exponent = np.frexp(np.tanh(x))
        return np.ldexp(np.rint(fraction * 2.0**11) / 2.0**11, exponent)

    def lg2_approx(x: Any) -> Any:
        # Right to 2^-22, absolute between 1/2 and 2 and relative elsewhere.
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.log2(x)
            exponent = np.maximum(np.frexp(value)[1], 0)
            steps = np.where(exponent > 0, 2.0**22, 2.0**21)
            return np.ldexp(np.rint(np.ldexp(value, -exponent) * steps) / steps, exponent)

    def turned(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: np.rint(function(x) * 2.0**20) / 2.0**20

    instructions: dict[str, Callable[[Any], Any]] = {
        "tanh.approx.f32": tanh_approx,
        "lg2.approx.f32": lg2_approx,
        "cos.approx.f32": turned(np.cos),
        "sin.approx.f32": turned(np.sin),
        "rcp.approx.ftz.f32": lambda x: 1 / x,
    }
    tl.inline_asm_elementwise = inline_asm_elementwise

    def get_bf16(self: Any, value: Any) -> Any:
        return handle_of(narrow(np.array([value])), tl.bfloat16)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # Rounded once: the product of two float32 is exact in float64.
        return handle_of((x.data.astype(np.float64) * y.data + z.data).astype(x.data.dtype), x.dtype.scalar)

    builder.create_fma = create_fma
    builder.get_bf16 = get_bf16
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt"):
        lifted(name)

    create_dot, cast_impl, create_fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def exact(operand: Any) -> Any:
            if is_bfloat16(operand):
                return handle_of(widen(operand.data), tl.float32)
            if operand.dtype == tl.float16 and d.data.dtype == np.float32:
                return handle_of(operand.data.astype(np.float32), tl.float32)
            return operand

        return create_dot(self, exact(a), exact(b), d, *rest)

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return handle_of(src.data, target)
        if source == tl.bfloat16:
            return cast(self, handle_of(widen(src.data), tl.float32), dst_type)
        if target == tl.bfloat16:
            return handle_of(narrow(src.data.astype(np.float32)), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        wide = tl.float32, tl.float16, tl.bfloat16
        if nearest and src.dtype.scalar in wide and dst_type.scalar in wide:
            return cast(self, src, dst_type)
        return create_fp_to_fp(self, src, dst_type, rounding_mode)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = dot, cast, fp_to_fp

    def reducing(kind: Any) -> None:
        original = kind.apply_impl

        def apply_impl(self: Any, values: Any) -> Any:
            if not any(is_bfloat16(value.handle) for value in values):
                return original(self, values)
            results = original(
                self,
                tuple(self.to_tensor(widen(v.handle.data), tl.float32) if is_bfloat16(v.handle) else v for v in values),
            )
            results = results if isinstance(results, (list, tuple)) else (results,)
            return tuple(
                self.to_tensor(narrow(r.handle.data), tl.bfloat16) if r.dtype == tl.float32 else r for r in results
            )

        kind.apply_impl = apply_impl

    reducing(interpreter.ReduceOps)
    reducing(interpreter.ScanOps)

    def checked(name: str, *, mask_at: int, write: bool) -> None:
        original = getattr(builder, name)

        @wraps(original)
        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            pointers = next(a for a in args if isinstance(a, handle_of) and a.data.dtype == np.uint64)
            if mask_at >= 0 and isinstance(args[mask_at], handle_of) and args[mask_at].data.dtype != np.bool_:
                # A condition on a loop's index alone is a Python bool here, and joins a mask as an integer.
                truth = handle_of(args[mask_at].data.astype(np.bool_), tl.int1)
                args = (*args[:mask_at], truth, *args[mask_at + 1 :])
            mask = args[mask_at].data if mask_at >= 0 else np.ones(pointers.data.shape, bool)
            bytes_each = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
            memory().check(
                pointers.data, np.broadcast_to(mask, pointers.data.shape), bytes_each=bytes_each, write=write
            )
            return original(self, *args, **kwargs)

        setattr(builder, name, replacement)

    checked("create_masked_load", mask_at=1, write=False)
    checked("create_masked_store", mask_at=2, write=True)
    checked("create_atomic_rmw", mask_at=3, write=True)
    checked("create_atomic_cas", mask_at=-1, write=True)
