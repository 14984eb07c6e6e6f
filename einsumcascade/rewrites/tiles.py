"""What one step of a loop computes: a tile of each value along the rank, once for all that read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from einsumcascade.language.ir import (
    Einsum,
    Expr,
    Read,
    Statement,
    Var,
    apply,
    substitute,
    transform,
)
from einsumcascade.rewrites.algebra import carries, fresh
from einsumcascade.rewrites.loops import not_lowered
from einsumcascade.rewrites.moves import Moves, number


@dataclass
class Tiles(Moves):
    """Values of a tile.

    Args:
        kept: tensors that keep their name and their axes, since what is outside the loops reads them too.
    """

    kept: frozenset[str] = frozenset()

    def passing(self, s: Einsum, loop: int, body: list[Statement], placed: dict[str, str]) -> Einsum:
        """What a tile adds to an output, at the elements of the output that pass."""

        def here(e: Expr) -> Expr:
            return self.inside(e, loop, body, placed)

        ranks = tuple(r for r in s.ranks if r not in self.over)
        ranks += (self.inner,) if self.inner and self.over[-1] in s.ranks else ()
        return replace(
            s,
            indices=tuple(map(here, s.indices)),
            expr=here(s.expr),
            where=tuple(map(here, self.conditions(s))),
            reduce=s.reduce if ranks else None,
            ranks=ranks,
        )

    def tile_of(self, s: Einsum, name: str, loop: int, body: list[Statement], placed: dict[str, str]) -> Read:
        """Append the reduction of one tile, over the reference that holds the tile."""
        assert s.reduction is not None
        expr = self.inside(s.expr, loop, body, placed)
        where = tuple(self.inside(c, loop, body, placed) for c in self.conditions(s))
        ranks = tuple(r for r in s.ranks if r not in self.over) + ((self.inner,) if self.inner else ())
        if not ranks:
            # A tile of one point is not reduced: a culled point is the identity by name.
            for c in reversed(where):
                expr = apply("select", c, expr, number(s.reduction.empty))
            where = ()
        at = (*s.indices, *self.tile_at())
        body.append(
            Einsum(tensor=name, indices=at, expr=expr, where=where, reduce=s.reduce if ranks else None, ranks=ranks)
        )
        return Read(tensor=name, indices=at)

    def tile_at(self) -> tuple[Expr, ...]:
        """The index of a value that a whole tile has one of."""
        return (Var(name=self.index),)

    def inside(self, expr: Expr, loop: int, body: list[Statement], placed: dict[str, str]) -> Expr:
        """Rewrite an expression for the inside of a loop, placing the streams it needs before it."""
        point = self.point()

        def leaf(e: Expr) -> Expr | None:
            if isinstance(e, Var) and e.name in point:
                return point[e.name]
            if not isinstance(e, Read):
                return None
            if self.streams(e.tensor):
                return self._stream(e, loop, body, placed)
            ready = self.ready.get(e.tensor, 0)
            if ready == loop + 1:
                return self.reference(e, loop, body, "new")
            if e.tensor in self.states:
                return self.generation(e, "last")
            return None

        return transform(expr, leaf)

    def stream_at(self, d: Einsum) -> tuple[Expr, ...]:
        """The index, inside a loop, of a value along the rank."""
        tiled: tuple[Expr, ...] = (Var(name=self.index), Var(name=self.inner))
        return tiled[:1] if self.over[-1] not in d.free or not self.inner else tiled

    def _stream(self, read: Read, loop: int, body: list[Statement], placed: dict[str, str]) -> Expr:
        d = self.defs[read.tensor]
        at = []
        for i, own in zip(read.indices, d.indices, strict=True):
            assert isinstance(own, Var)
            if own.name in self.over:
                if i != own:
                    raise not_lowered(d, f"{read} read at an offset of a looped rank")
                continue
            at.append(substitute(i, self.point()) if carries(i, self.over[-1]) else i)
        tiled = self.stream_at(d)
        if read.tensor not in placed:
            expr = self.inside(d.expr, loop, body, placed)
            where = tuple(self.inside(c, loop, body, placed) for c in self.conditions(d))
            key = (read.tensor, loop)
            first = read.tensor not in self.kept and not any(k[0] == read.tensor and k[1] >= 0 for k in self.memo)
            name = self.memo[key] = read.tensor if first else fresh(read.tensor, self.taken)
            own_left = tuple(i for i in d.indices if isinstance(i, Var) and i.name not in self.over)
            body.append(replace(d, tensor=name, indices=own_left + tiled, expr=expr, where=where))
            placed[read.tensor] = name
        return Read(tensor=placed[read.tensor], indices=(*at, *tiled))
