"""Values that say what is live across a boundary between loops over a rank, and what to keep of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from einsumcascade.analysis.cut import Price
from einsumcascade.analysis.polynomial import Count
from einsumcascade.analysis.sizes import quotient

How = Literal["kept", "buffered", "spilled", "read again"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A tensor that is live across a boundary between loops over a rank.

    It is made before the boundary and read after it: Definition F3 of docs/analysis.md.

    Args:
        tensor: its name.
        is_input: whether it is an input.
        readers: Einsums that read it after the boundary.
        is_fiber: whether its elements for one row grow with the rank.
        elements: how many a row has; rows are those of F3.
        rows: names of those ranks that it has.
        shared: names of those that it has not: their rows share it.
    """

    tensor: str
    is_input: bool
    readers: tuple[str, ...]
    is_fiber: bool
    elements: Count
    rows: tuple[str, ...]
    shared: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "tensor": self.tensor,
            "is_input": self.is_input,
            "readers": list(self.readers),
            "is_fiber": self.is_fiber,
            "elements": str(self.elements),
            "rows": list(self.rows),
            "shared": list(self.shared),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor of a cut: what a boundary keeps, or reads again.

    Args:
        tensor: its name.
        how: "kept" where no capacity is given; else "buffered" if it fits, and if not "spilled", an input "read again".
        price: elements a row, divided by the rows that share them.
        shared: names of the ranks of those rows.
    """

    tensor: str
    how: How
    price: Price
    shared: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "tensor": self.tensor,
            "how": self.how,
            "elements": str(self.price.elements),
            "rows_that_share": self.price.divisor,
            "shared": list(self.shared),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """A tensor that is computed a second time after a boundary, and from what."""

    tensor: str
    sources: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {"tensor": self.tensor, "sources": list(self.sources)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a boundary keeps and what it computes again, at the least price for a row.

    What has a price and what is not computed again: Definition F5 of docs/analysis.md.

    Args:
        held: the cut.
        recomputed: what lies between the cut and the readers after the boundary.
        is_settled: whether it is proved the least at all extents of 1 or more.
        weighed: names of the extents by which it was chosen.
    """

    held: tuple[Held, ...]
    recomputed: tuple[Recomputed, ...]
    is_settled: bool
    weighed: tuple[str, ...]

    def price_at(self, extents: Mapping[str, int]) -> float:
        """Elements a row at given extents."""
        return float(sum(h.price.at(extents) for h in self.held))

    @property
    def price(self) -> str:
        """Elements a row, as text: `M`, `E*M/128`."""
        return " + ".join(str(h.price) for h in self.held) or "0"

    def to_dict(self, extents: Mapping[str, int]) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "held": [h.to_dict() for h in self.held],
            "recomputed": [r.to_dict() for r in self.recomputed],
            "price": self.price,
            "is_settled": self.is_settled,
            "chosen_at": {r: extents[r] for r in self.weighed},
            "price_there": self.price_at(extents),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """A boundary between two loops over a rank.

    Args:
        rank: name of the rank.
        number: of the loop before the boundary.
        rows: names of the ranks that all tensors completed here have.
        live: what is live across it, in the order of the cascade.
        plan: what to keep where rows come one at a time, or in the blocks asked for.
        together: what to keep where all rows come together, so that they share what they can.
        extents: the numbers by which the plans were chosen.
    """

    rank: str
    number: int
    rows: tuple[str, ...]
    live: tuple[Live, ...]
    plan: Plan
    together: Plan
    extents: Mapping[str, int] = field(hash=False)

    @property
    def break_even(self) -> Count | None:
        """How many rows must come together before `together` costs less than `plan`, where that is one product."""
        if len(self.plan.held) != 1 or len(self.together.held) != 1:
            return None
        (alone,), (joint,) = self.plan.held, self.together.held
        if alone.shared or not joint.shared:
            return None
        return quotient(joint.price.elements, alone.price.elements)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "boundary": self.number,
            "rows": list(self.rows),
            "live": [x.to_dict() for x in self.live],
            "plan": self.plan.to_dict(self.extents),
            "together": self.together.to_dict(self.extents),
        }
