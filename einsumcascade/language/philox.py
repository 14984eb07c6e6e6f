"""Random numbers from a seed and coordinates: Philox 4x32-10, the same bits on every machine and in every library.

Counter based: a number depends on what it is asked for alone, never on an order, a tile or a device, so a backward pass
makes it again. Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from typing import Any

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def uniform(xp: Any, seed: Any, *counters: Any) -> Any:
    """Numbers of [0, 1) in steps of 2**-24, exact in float32: the high bits of a word.

    Four numbers that follow each other along the last coordinate are the words of one block, so that a kernel computes
    a block once for all of them.

    Args:
        xp: NumPy or PyTorch.
        seed: whole numbers, modulo 2**64. counters: up to four, whole, each modulo 2**32; those left out before the
            first are 0. Arrays that broadcast; real numbers are cut to whole ones.
    """
    key = _whole(xp, seed)
    *others, last = (_whole(xp, c) & _MASK for c in counters)
    block = (*(0,) * (3 - len(others)), *others, last >> 2)
    x, y, z, w = philox(block, (key & _MASK, (key >> 32) & _MASK))
    first, second = xp.where(last & 1 == 0, x, y), xp.where(last & 1 == 0, z, w)
    return (xp.where(last & 2 == 0, first, second) >> 8) * 2.0**-24


def philox(counters: tuple[Any, ...], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """One block of four 32-bit words, held in wider whole numbers."""
    a, b, c, d = (*counters, 0, 0, 0, 0)[:4]
    key0, key1 = key
    for _ in range(ROUNDS):
        high, low = _product(MULTIPLIERS[0], a)
        higher, lower = _product(MULTIPLIERS[1], c)
        a, b, c, d = higher ^ b ^ key0, lower, high ^ d ^ key1, low
        key0, key1 = (key0 + WEYL[0]) & _MASK, (key1 + WEYL[1]) & _MASK
    return a, b, c, d


def _product(x: int, y: Any) -> tuple[Any, Any]:
    """The high and the low word of a product of two words, in halves that 64 bits with a sign can hold."""
    small, large = x * (y & 0xFFFF), x * (y >> 16)
    carried = large + (small >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (small & 0xFFFF)


def _whole(xp: Any, x: Any) -> Any:
    x = xp.asarray(x)
    if hasattr(x, "is_floating_point"):
        return (xp.nan_to_num(x, 0.0, 0.0, 0.0) if x.is_floating_point() else x).to(xp.int64)
    # Where a point is culled, what it would read is NaN.
    return (xp.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) if x.dtype.kind == "f" else x).astype(xp.int64)
