"""Functions that kernel texts call, each a text of its own that stands in a module if a kernel mentions it."""

from __future__ import annotations

from einsumcascade.analysis.targets import GpuTarget

LIBDEVICE = "from triton.language.extra import libdevice\n"
WHOLE = """

@triton.jit
def _{name}(x):
    # The whole number at or {name} x, as a bound of a loop; what is no number bounds nothing.
    if x.dtype.is_floating():
        x = tl.where(x == x, x.to(tl.float32), {unknown})
        x = tl.{rounded}(tl.minimum(tl.maximum(x, -4611686018427387904.0), 4611686018427387904.0))
    return x.to(tl.int64)
"""
WHOLE_ROWS = (("below", "floor", "-4611686018427387904.0"), ("above", "ceil", "4611686018427387904.0"))
COUNT = """

@triton.jit
def _count(row, stride, length, limit):
    # How many numbers of a row in ascending order are at most the limit.
    low = tl.cast(0, tl.int32)
    high = tl.cast(length, tl.int32)
    while low < high:
        middle = (low + high) // 2
        is_counted = tl.load(row + middle.to(tl.int64) * stride) <= limit
        low = tl.where(is_counted, middle + 1, low)
        high = tl.where(is_counted, high, middle)
    return low
"""
MULTIPLY = """

@triton.jit
def _multiply(x, y):
    return x * y
"""
TANH = """

@triton.jit
def _tanh(x):
    # One instruction, right to 2^-11: less than what inputs of 16 bits are rounded by.
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
"""
LOG = """

@triton.jit
def _log(x):
    # One instruction gives the logarithm to base two, right to 2^-22, for what inputs of 16 bits are rounded by more.
    return 0.6931471805599453 * tl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
"""
TURN = """

@triton.jit
def _{name}(x):
    # One instruction, right to 2^-20, of an angle without its whole turns; up to 2^22 of these are counted exactly.
    turns = (x * 0.15915494309189535 + 12582912.0) - 12582912.0
    angle = tl.fma(turns, 1.7484555314695172e-07, tl.fma(turns, -6.2831854820251465, x))
    return tl.inline_asm_elementwise(
        "{name}.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
    )
"""
RECIPROCAL = """

@triton.jit
def _reciprocal(x):
    # 1 / x of x >= 1, which needs none of the care that other divisors take.
    return {quotient}
"""
RECIPROCAL_OF = {
    "cuda": (
        'tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)'
    ),
    "hip": "1.0 / x",
}
WORDS = """

@triton.jit
def _words(seed, a, b, c, d):
    # The four words of a block of Philox 4x32-10, keyed by the seed
    seed = tl.cast(seed, tl.int64)
    return tl.philox(seed, tl.cast(a, tl.int32), tl.cast(b, tl.int32), tl.cast(c, tl.int32), tl.cast(d, tl.int32))
"""
UNIFORM = """

@triton.jit
def _uniform(seed, a, b, c, d):
    # A number of [0, 1) from 24 bits of a word: which of its block, the last two bits of d say
    d = tl.cast(d, tl.int32).to(tl.uint32, bitcast=True)
    x, y, z, w = _words(seed, a, b, c, d >> 2)
    word = tl.where(d % 4 < 2, tl.where(d % 4 == 0, x, y), tl.where(d % 4 == 2, z, w))
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08
"""
UNIFORMS = """

@triton.jit
def _uniforms(seed, a, b, c, d):
    # The numbers of a tile, four from each block: d has one block for four columns
    x, y, z, w = _words(seed, a, b, c, d)
    words = tl.join(tl.join(x, z), tl.join(y, w)).reshape(x.shape[0], 4 * x.shape[1])
    return (words >> 8).to(tl.float32) * 5.9604644775390625e-08
"""


def helpers_of(body: str, target: GpuTarget) -> str:
    """The imports and functions that a text of kernels needs, in a fixed order."""
    found = LIBDEVICE if "libdevice." in body else ""
    found += MULTIPLY if "_multiply)" in body else ""
    found += WORDS if "_uniform(" in body or "_uniforms(" in body else ""
    found += UNIFORM if "_uniform(" in body else ""
    found += UNIFORMS if "_uniforms(" in body else ""
    found += COUNT if "_count(" in body else ""
    found += TANH if "_tanh(" in body else ""
    found += LOG if "_log(" in body else ""
    found += "".join(TURN.format(name=name) for name in ("cos", "sin") if f"_{name}(" in body)
    found += RECIPROCAL.format(quotient=RECIPROCAL_OF[target.backend]) if "_reciprocal(" in body else ""
    for name, rounded, unknown in WHOLE_ROWS:
        if f"_{name}(" in body:
            found += WHOLE.format(name=name, rounded=rounded, unknown=unknown)
    return found
