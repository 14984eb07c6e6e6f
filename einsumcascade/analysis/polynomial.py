"""Counts as polynomials of extents: `E*M*P + M*P`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from einsumcascade.errors import InputError
from einsumcascade.language.ir import rank_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """A polynomial of extents that is a whole number at whole extents: `E*M*P + M*P`, `N**3/3 - N/3`.

    Args:
        terms: (names of the extents, sorted; coefficient, never 0) of each term, the highest degree first.
    """

    terms: tuple[tuple[tuple[str, ...], int | Fraction], ...] = ()

    def __add__(self, other: Count) -> Count:
        merged = dict(self.terms)
        for names, n in other.terms:
            merged[names] = merged.get(names, 0) + n
        return _count(merged)

    def __mul__(self, other: Count) -> Count:
        merged: dict[tuple[str, ...], int | Fraction] = {}
        for names, n in self.terms:
            for more, k in other.terms:
                key = tuple(sorted(names + more))
                merged[key] = merged.get(key, 0) + n * k
        return _count(merged)

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __str__(self) -> str:
        texts = []
        for names, n in self.terms:
            powers = [x if (k := names.count(x)) == 1 else f"{x}**{k}" for x in dict.fromkeys(names)]
            shown = [str(n.numerator)] * (n.numerator != 1 or not names) + powers
            texts.append("*".join(shown) + f"/{n.denominator}" * (n.denominator != 1))
        return " + ".join(texts).replace("-1*", "-").replace("+ -", "- ") or "0"

    @property
    def extents(self) -> tuple[str, ...]:
        """Names of the extents that occur, sorted."""
        return tuple(sorted({x for names, _ in self.terms for x in names}))

    def at(self, extents: Mapping[str, int]) -> int:
        """Return the exact number at given extents.

        Raises: InputError: an extent that occurs is not among `extents`.
        """
        missing = [x for x in self.extents if x not in extents]
        if missing:
            headline = f"the count {self} has no value: {', '.join(missing)} unknown"
            raise InputError.of(
                "missing-extent",
                headline,
                rule="a count has a value where every extent in it has one",
                hint=f"give {missing[0]} a number",
            )
        total = sum(n * math.prod(extents[x] for x in names) for names, n in self.terms)
        assert total == int(total), f"{self} at {dict(extents)}"
        return int(total)

    def sympy(self) -> Any:
        """Return the same polynomial as a SymPy expression over positive integer symbols."""
        import sympy

        total = sympy.Integer(0)
        for names, n in self.terms:
            symbols = [sympy.Symbol(x, integer=True, positive=True) for x in names]
            total += sympy.Rational(n.numerator, n.denominator) * sympy.prod(symbols)
        return total


def _count(terms: Mapping[tuple[str, ...], int | Fraction]) -> Count:
    kept = [(names, n.numerator if n.denominator == 1 else n) for names, n in terms.items() if n]
    return Count(terms=tuple(sorted(kept, key=lambda t: (-len(t[0]), t[0]))))


ZERO: Final = Count()
ONE: Final = _count({(): 1})


def number(value: int | Fraction) -> Count:
    """Return a constant count."""
    return _count({(): value})


def volume(names: tuple[str, ...]) -> Count:
    """Return the product of the extents of rank variables: `("m", "p")` gives M*P."""
    return _count({tuple(sorted(rank_of(v) for v in names)): 1})
