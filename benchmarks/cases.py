"""Which cases there are, in the order of importance, and how some of them are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from einsumcascade.benchmarks.variants import VARIANTS, Shape, Variant
from einsumcascade.errors import InputError, nearest

DIRECTIONS = ("forward", "backward", "step")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A variant in one shape, dtype and direction.

    Args:
        direction: "forward" without gradients, "backward" alone, or "step": a forward that saves and a backward.
        shape: the extents. dtype: of the inputs.
    """

    variant: Variant
    direction: str
    shape: Shape
    dtype: str = "bfloat16"

    @property
    def words(self) -> tuple[str, ...]:
        """What a filter may name."""
        s = self.shape
        length = f"N{s.p}" if s.p == s.m else f"M{s.m}"
        heads = f"H{s.h}" if s.g in (0, s.h) else f"H{s.h}/{s.g}"
        size = f"D{s.e}" if s.e == s.f else f"D{s.e}/{s.f}"
        return (self.variant.name, self.direction, f"B{s.b}", heads, length, size, *self._dtype())

    def _dtype(self) -> tuple[str, ...]:
        return () if self.dtype == "bfloat16" else (self.dtype,)

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def flop(self) -> float:
        """Operations of the products at live scores."""
        return self.variant.flop(self.shape, self.direction)

    @property
    def decodes(self) -> bool:
        """Whether bytes of keys and values are what counts."""
        return self.variant.name == "decode"

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and the values."""
        s = self.shape
        size = 4 if self.dtype == "float32" else 2
        return size * s.b * (s.g or s.h) * s.m * (s.e + s.f)


def _cases(direction: str, names: str, *shapes: Shape) -> list[Case]:
    return [Case(variant=VARIANTS[n], direction=direction, shape=s) for s in shapes for n in names.split()]


def _square(b: int, h: int, n: int, d: int, *, g: int = 0) -> Shape:
    return Shape(b=b, h=h, g=g, p=n, m=n, e=d, f=d)


def _decoding(b: int, m: int) -> Shape:
    return Shape(b=b, h=32, g=8, p=1, m=m, e=128, f=128)


LARGE, NARROW, LONG, SHORT = (
    _square(4, 16, 4096, 128),
    _square(4, 32, 4096, 64),
    _square(1, 16, 16384, 128),
    _square(16, 16, 1024, 128),
)
UNEQUAL = Shape(b=4, h=16, p=4096, m=4096, e=192, f=128)
GROUPED = _square(4, 16, 4096, 128, g=4)
PACKED = Shape(b=1, h=16, p=16384, m=16384, e=128, f=128)
# The grid of attention-gym: 4 batches, 16 heads, 2k to 32k tokens.
GRID = tuple(_square(4, 16, n, d) for n in (2048, 4096, 8192, 16384, 32768) for d in (64, 128))
DECODING = (_decoding(1, 8192), _decoding(1, 131072), _decoding(16, 8192))

QUICK = [
    *_cases("forward", "full causal", LARGE),
    *_cases("forward", "causal", NARROW),
    *_cases("forward", "softcap sigmoid window", LARGE),
    *_cases("backward", "causal", LARGE),
    *_cases("step", "sigmoid", LARGE),
]
STANDARD = [
    *_cases("forward", "full causal", LARGE, NARROW),
    *_cases("forward", "alibi window document softcap sigmoid relu2 diff sink", LARGE),
    *_cases("backward", "full causal", LARGE, NARROW),
    *_cases("step", "sigmoid diff bias", LARGE),
    *_cases("forward", "decode", *DECODING),
    *_cases("forward", "mla", UNEQUAL),
    *_cases("forward", "varlen", PACKED),
    *_cases("forward", "full causal", LONG, SHORT),
    *_cases("backward", "full causal", LONG),
    *_cases("backward", "alibi window document softcap sink", LARGE),
    *_cases("forward", "gqa", GROUPED),
    *_cases("forward", "causal", *(_square(4, 16, n, 64) for n in (2048, 8192, 32768))),
]
FULL = [
    *STANDARD,
    *_cases("backward", "sigmoid relu2 diff bias", LARGE),
    *_cases("backward", "mla", UNEQUAL),
    *_cases("backward", "varlen", PACKED),
    *_cases("backward", "gqa", GROUPED),
    *_cases("forward", "full causal alibi window document softcap sigmoid sink", *GRID),
    *_cases("backward", "full causal alibi window document softcap sink", *GRID),
]
# Shapes whose figures mean nothing, to try everything without a GPU.
_TINY = {
    "mla": Shape(b=1, h=2, p=40, m=40, e=48, f=32),
    "gqa": _square(1, 4, 40, 16, g=2),
    "varlen": Shape(h=2, p=40, m=40, e=16, f=16),
    "decode": Shape(b=1, h=4, g=2, p=1, m=600, e=16, f=16),
}
SMOKE = [
    Case(variant=v, direction=d, shape=_TINY.get(v.name, _square(1, 2, 40, 16)))
    for d in DIRECTIONS
    for v in VARIANTS.values()
    if v.name != "decode" or d == "forward"
]


def unique(cases: Iterable[Case]) -> list[Case]:
    """Cases in their order, each once."""
    return list({str(c): c for c in cases}.values())


SETS = {"quick": unique(QUICK), "standard": unique(STANDARD), "full": unique(FULL), "smoke": unique(SMOKE)}


def named(text: str) -> Case:
    """The case of a text, of any set.

    >>> named("causal backward B4 H32 N4096 D64").direction
    'backward'
    """
    return next(c for cases in SETS.values() for c in cases if str(c) == text)


def chosen(cases: Sequence[Case], filters: Sequence[str]) -> list[Case]:
    """The cases that hold each word of a filter; commas part alternatives.

    Raises: InputError: `benchmark-filter`: a word is that of no case, or no case holds all of them.

    >>> [str(c) for c in chosen(SETS["standard"], ["causal", "D64", "backward"])]
    ['causal backward B4 H32 N4096 D64']
    """
    known = list(dict.fromkeys(w for c in cases for w in c.words))
    folded = {w.lower(): w for w in known}
    wanted = []
    for text in filters:
        words = [w.strip() for w in text.split(",")]
        for w in words:
            if w.lower() not in folded:
                _refuse(f"no case of this set has the word '{w}'", nearest(w, known))
        wanted.append({w.lower() for w in words})
    found = [c for c in cases if all(w & {x.lower() for x in c.words} for w in wanted)]
    if not found:
        _refuse(f"no case of this set has all of: {' '.join(filters)}", "einsumcascade bench --list shows the cases")
    return found


def _refuse(headline: str, hint: str) -> None:
    raise InputError.of(
        "benchmark-filter",
        headline,
        rule="a filter is words of a case, as 'causal backward D64'; a comma parts alternatives",
        hint=hint,
    )
