"""The order of a cascade's statements, with iterations over ranks other than the one looked at unrolled.

A generation of such an iteration is a tensor of its own, `X@1`, and so is the part `K@1` of a tensor that step 1 reads:
their fibers are other ones. The first generation of an iteration along the rank is `R@first`. How steps count:
Definition P10 of docs/analysis.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TypeAlias

from einsumcascade.analysis.dependence import factors, linear, partitions, split_index
from einsumcascade.analysis.places import Fact, Ground
from einsumcascade.language.ir import Einsum, Expr, Init, Iter, Read, Statement, rank_of, variables, walk


# Compared by identity: each stands at its own place in the order, and a hash by value would walk its expressions.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instance:
    """One statement in one step.

    Args:
        fact: the statement.
        step: the step of each iteration unrolled around it, and of each that its left side has a coordinate of.
        writes: the part of the tensor that is written.
        reads: each read with the parts it may be of.
    """

    fact: Fact
    step: tuple[int, ...]
    writes: str
    reads: tuple[tuple[Read, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Along:
    """A block along the rank; `direction` is -1 where it descends, 0 where it moves inside a tile only."""

    variable: str
    direction: int
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """A block over another rank, step by step.

    Args:
        items: the statements of each step.
        carried: the parts of iterative tensors, each with the part that the first step begins with.
        returns: whether steps look along the rank at tensors that none of them writes and all of them see.
    """

    items: tuple[tuple[Item, ...], ...]
    carried: Mapping[str, str] = field(hash=False)
    returns: bool


Item: TypeAlias = Instance | Along | Steps


class Unrolled:
    """A cascade as a sequence, for one rank.

    Args:
        ground: the cascade and the rank.
        steps: how many steps each iteration over another rank makes, by its variable.
    """

    def __init__(self, ground: Ground, steps: Mapping[str, int]) -> None:
        self.ground, self.steps = ground, steps
        self.extents = {rank_of(v): n for v, n in steps.items()}
        # A rank in tiles, if an iteration goes from tile to tile: the outer variable and the sizes of a tile.
        self.tiles = {
            v: (w[0], stride)
            for v, p in partitions(ground.cascade).items()
            for w, stride in zip(p.ways, p.strides, strict=True)
            if w[0] in steps and v != ground.part.whole
        }
        self.parts: dict[str, dict[str, None]] = {}
        for i in ground.cascade.inputs:
            walked = (self.tiles[v][0] if v in self.tiles else v for v in i.indices)
            axes = [range(steps[v]) if v in steps else (None,) for v in walked]
            self.parts[i.tensor] = dict.fromkeys(_named(i.tensor, c) for c in product(*axes))
        self.items = tuple(self._items(ground.cascade.body, {}))

    def fibers(self, tensor: str) -> tuple[frozenset[str], ...]:
        """The parts of a tensor, those together that share their fibers."""
        found = tuple(self.parts.get(tensor, ()))
        together: dict[str, set[str]] = {}
        for p in found:
            together.setdefault(_element(p), set()).add(p)
        return tuple(frozenset(s) for s in together.values())

    def _items(self, body: tuple[Statement, ...], at: Mapping[str, int]) -> Iterator[Item]:
        for s in body:
            match s:
                case Iter(var=v) if v in self.steps:
                    order = range(self.steps[v])
                    steps = reversed(order) if s.descending else order
                    in_steps = tuple(tuple(self._items(s.body, {**at, v: n})) for n in steps)
                    yield Steps(items=in_steps, carried=self._carried(s), returns=self._returns(s))
                case Iter():
                    moves = self.ground.part.moves_by((s.var,)) is not None
                    # Once more, now that what a later statement hands to the next step is known.
                    tuple(self._items(s.body, at))
                    items = tuple(self._items(s.body, at))
                    direction = 0 if not moves else -1 if s.descending else 1
                    yield Along(variable=s.var, direction=direction, items=items)
                case _:
                    fact = self.ground.facts[id(s)]
                    loose = [v for v in fact.space if v in self.steps and v not in at]
                    for c in product(*(range(self.steps[v]) for v in loose)):
                        yield self._instance(s, fact, {**at, **dict(zip(loose, c, strict=True))})

    def _carried(self, block: Iter) -> dict[str, str]:
        written = {s.tensor for s in walk(block.body) if isinstance(s, Einsum)}
        return {p: next(iter(self.parts[t])) for t in sorted(written & self.ground.iterative) for p in self.parts[t]}

    def _returns(self, block: Iter) -> bool:
        written = {s.tensor for s in walk(block.body) if isinstance(s, Einsum)}
        facts = (self.ground.facts[id(s)] for s in walk(block.body) if isinstance(s, Einsum | Init))
        found = {r for f in facts if f.iterates for r in f.reads if r.tensor not in written and self.ground.is_along(r)}
        # At two coordinates of the iteration, what one step looks at is what another one does.
        places = {(r.tensor, tuple(self._window(i) for i in r.indices if block.var in variables(i))) for r in found}
        return any(not at for _, at in places) or len({t for t, _ in places}) < len(places)

    def _window(self, index: Expr) -> object:
        """An index as a place in a tile, whatever the variables inside the tile are called."""
        sizes = self.ground.sizes
        split = split_index(index, sizes)
        return index if split is None else (split[0], *(sizes[rank_of(v)] for v in split[1:]))

    def _instance(self, s: Einsum | Init, fact: Fact, at: Mapping[str, int]) -> Instance:
        reads = tuple((r, self._read(r, at)) for r in fact.reads)
        writes = _named(s.tensor, self._coordinates(s.tensor, s.indices, at))
        # What a sum over steps takes from each of them.
        writes += "".join(f"#{at[v]}" for v in fact.reduced if v in self.steps and v in at)
        if fact.begins and any(v in self.ground.along for v in self.ground.shape[s.tensor] if v):
            writes += "@first"
        self.parts.setdefault(s.tensor, {})[writes] = None
        return Instance(fact=fact, step=tuple(at.values()), writes=writes, reads=reads)

    def _read(self, r: Read, at: Mapping[str, int]) -> tuple[str, ...]:
        found = self._coordinates(r.tensor, r.indices, at)
        parts = self.parts.get(r.tensor, {})
        # What no step has named may be of any part.
        wanted = tuple(p for p in parts if _fits(_element(p), found))
        if self.ground.is_first(r):
            wanted = tuple(p for p in wanted if p.endswith("@first")) or wanted
        return wanted

    def _coordinates(
        self, tensor: str, indices: tuple[Expr, ...], at: Mapping[str, int]
    ) -> tuple[int | str | None, ...]:
        """Coordinates of the axes that unrolled iterations walk, "?" where it may be any; None for the others."""
        shape = self.ground.shape[tensor]
        return tuple(
            self._number(i, at) if v in self.steps else self._tile(i, *self.tiles[v], at) if v in self.tiles else None
            for v, i in zip(shape, indices, strict=True)
        )

    def _tile(self, index: Expr, outer: str, stride: tuple[str, ...], at: Mapping[str, int]) -> int | str:
        terms = linear(index) or ()
        inside = split_index(index, self.ground.sizes) is not None
        found = [t for t in terms if t.variable == outer and factors(t, self.ground.sizes) == stride]
        return at[outer] if inside and found and outer in at else "?"

    def _number(self, index: Expr, at: Mapping[str, int]) -> int | str:
        total = 0
        for t in linear(index) or ():
            if (t.variable and t.variable not in at) or any(f not in self.extents for f in t.factors):
                return "?"
            value = t.number * (at[t.variable] if t.variable else 1)
            for f in t.factors:
                value *= self.extents[f]
            total += value
        return total if linear(index) is not None else "?"


def _named(tensor: str, coordinates: tuple[int | str | None, ...]) -> str:
    return "@".join([tensor, *(str(c) for c in coordinates if c is not None)])


def tensor_of(part: str) -> str:
    """The tensor that a part belongs to."""
    return part.split("#")[0].split("@")[0]


def _element(part: str) -> str:
    return part.split("#")[0].removesuffix("@first")


def _fits(part: str, wanted: tuple[int | str | None, ...]) -> bool:
    given = part.split("@")[1:]
    return all(w in ("?", g) for w, g in zip((str(w) for w in wanted if w is not None), given, strict=True))
