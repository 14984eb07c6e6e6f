"""The derivation: from the text a person wrote to the fewest passes it needs, step by step."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from einsumcascade.analysis.counts import count_operations, evaluate_extents
from einsumcascade.analysis.dependence import whole_ranks
from einsumcascade.analysis.passes import PassCount, count_passes
from einsumcascade.errors import Diagnostic, InputError, LoweringError, UnknownRankError, nearest
from einsumcascade.language.ir import Cascade, Einsum, Iter, rank_of, variable_of, walk
from einsumcascade.language.known import saved_value
from einsumcascade.rewrites.bound import bound_references
from einsumcascade.rewrites.defer import defer, expand_means, localise
from einsumcascade.rewrites.exponent import into_exponents
from einsumcascade.rewrites.loop_form import loop_form
from einsumcascade.rewrites.monotone import lift_monotone
from einsumcascade.rewrites.reassociate import reassociate
from einsumcascade.rewrites.separate import separate
from einsumcascade.rewrites.split_form import split_form
from einsumcascade.rewrites.step import Rewritten, Step

DEFAULT_TILE = 128
Division = Literal["deferred", "immediate", "exponent"]
Reference = Literal["running", "local", "bound"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to rewrite a cascade, and what it costs.

    Args:
        division: whether factors known only after the rank was read leave its reductions ("deferred").
        reassociated: whether sums over a rank became sums over features against values that the cascade computes.
        passes: over all ranks that are streamed, added up.
        corrections: reductions whose state is moved from tile to tile.
        operations: of the result at the extents given, exponentials and divisions weighing 8.
    """

    division: str
    reassociated: bool
    passes: int
    corrections: int
    operations: int

    def __str__(self) -> str:
        count = f"{self.passes} pass{'es' if self.passes != 1 else ''}"
        known = ", sums against known values" if self.reassociated else ""
        work = f"{self.corrections} corrections, {self.operations:.4g} operations"
        return f"division {self.division}{known}: {count}, {work}"

    @property
    def cost(self) -> tuple[int, int, int]:
        """What is minimised: passes, then corrections, then operations."""
        return self.passes, self.corrections, self.operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    """What was rewritten, why it is right, and what came out.

    Args:
        original, cascade: before and after; equal in value for every input.
        steps: each rewrite with its proof.
        passes: for each rank streamed, its passes (before, after).
        considered: the choices that were weighed; the first is the one taken.
        saved: what inputs were known to be.
    """

    original: Cascade
    cascade: Cascade
    steps: tuple[Step, ...]
    passes: Mapping[str, tuple[int, int]]
    considered: tuple[Choice, ...] = ()
    saved: tuple[str, ...] = ()

    @property
    def certificate(self) -> str:
        """The derivation as JSON, which `einsumcascade check` verifies again without the rewriter."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """A JSON value: both texts, passes, steps with their claims, and what was considered."""
        return {
            "format": 1,
            "name": self.original.name,
            "passes": {k: {"before": a, "after": b} for k, (a, b) in self.passes.items()},
            "steps": [
                {
                    "rule": s.rule,
                    "what": s.what,
                    "before": list(s.before),
                    "after": list(s.after),
                    "proof": list(s.proof),
                    "kind": s.kind,
                    "claim": None if s.claim is None else s.claim.to_dict(),
                }
                for s in self.steps
            ],
            "saved": list(self.saved),
            "considered": [str(c) for c in self.considered],
            "original": str(self.original),
            "cascade": str(self.cascade),
        }

    def __str__(self) -> str:
        head = [f"{a} pass{'es' if a != 1 else ''} -> {b} over {r}" for r, (a, b) in self.passes.items()]
        if not head:
            head = ["no rank is reduced in a chain: nothing to derive"]
        blocks = [f"{n}. {s}" for n, s in enumerate(self.steps, start=1)]
        return "\n\n".join(["\n".join(head), *blocks, "result:\n" + str(self.cascade)])


def simplify(
    cascade: Cascade,
    *,
    division: Division = "deferred",
    bound: Mapping[str, int] | None = None,
    saved: tuple[Einsum, ...] = (),
    reassociated: bool = False,
    whole: Collection[str] = (),
) -> Rewritten:
    """Apply the rewrites that need no choice of tile: means, known sums, deferral, positive factors, monotone maps.

    Args:
        division: "deferred" takes out of a reduction every factor that leaves it; "immediate" keeps those inside that
            are known only once the same rank has been read, as FlashAttention-1 keeps its denominator; "exponent"
            brings such a factor into the exponential it multiplies, as a gradient does with the LSE.
        saved: inputs with what they are known to be.
        reassociated: whether sums meet values that the cascade computes too, which may delay them.
        bound: extents, to put bounds in place of running maxima where that is proven right; None: keep the maxima.
        whole: variables of ranks that a tile of a kernel holds whole, as `defer` takes them.
    """
    steps: list[Step] = []

    def take(found: Rewritten) -> Cascade:
        steps.extend(found.steps)
        return found.cascade

    cascade = take(expand_means(take(localise(cascade))))
    cascade = take(reassociate(cascade, saved=saved, computed=reassociated))
    if division == "exponent":
        cascade = take(into_exponents(cascade))
    if bound is not None:
        for v in dict.fromkeys(v for e in cascade.einsums if e.reduce == "max" for v in e.ranks):
            cascade = take(bound_references(cascade, variable=v, extents=bound))
    cascade = take(defer(cascade, immediate=division == "immediate", whole=whole))
    if division != "immediate":
        cascade = take(separate(cascade, whole=whole))
    cascade = take(lift_monotone(cascade))
    return Rewritten(cascade=cascade, steps=tuple(steps))


def derive(
    cascade: Cascade | str,
    *,
    rank: str | None = None,
    tile: int = DEFAULT_TILE,
    division: Division | None = None,
    reference: Reference = "running",
    parts: int = 8,
    extents: Mapping[str, int] | None = None,
    saved: tuple[str, ...] = (),
) -> Derivation:
    """Derive the form of a cascade that makes the fewest passes over a rank.

    Softmax attention gives FlashAttention-2; with `division="immediate"` FlashAttention-1, with `reference="local"`
    FlashDecoding: three choices of one derivation.

    Args:
        cascade: a cascade, or the name of a gallery text.
        rank: the rank to stream, `M`; None: each rank that is reduced in a chain of reductions.
        tile: extent of the tile in the loop form.
        division: "deferred" or "immediate"; None takes the cheaper: passes first, then corrections, then operations.
            "exponent" brings the normaliser into the exponential, as an LSE.
        reference: "running" corrects a state from tile to tile; "local" gives each of `parts` parts of the rank a state
            of its own and merges them; "bound" puts a bound in place of a running maximum where it cancels.
        extents: numbers by rank, which decide between equals; else lengths count as 1024 and feature ranks as 64.
        saved: for inputs that a forward pass has computed, what they are: `O[p,f] = A[p,m] * V[m,f] :: sum(m)`.

    Returns: the derivation; its `.cascade` equals the original in value and the reference runs it.
    Raises:
        UnknownRankError: `rank` is not reduced in the cascade.
        InputError: `option-value`, a choice is none of those named or `parts` is below 1; `option-saved`.
    Cost: seconds at most: one SymPy derivation for each reduction that depends on an earlier one.
    Source: FuseMax (MICRO 2024) section IV; RedFuser (2603.10026).
    """
    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    _complain(division, reference, parts)
    wanted = _wanted(cascade, rank)
    values = tuple(saved_value(cascade, text) for text in saved)
    sizes = _sizes(cascade, extents or {})
    bound = sizes if reference == "bound" else None
    before = {rank_of(v): count.passes for v, count in wanted.items()}
    found: list[tuple[Choice, Cascade, Cascade, list[Step], dict[str, int]]] = []
    divisions: tuple[Division, ...] = ("deferred", "immediate") if division is None else (division,)
    met = reassociate(expand_means(localise(cascade).cascade).cascade, saved=values).steps
    for d, r in ((d, r) for d in divisions for r in ((False, True) if met else (False,))):
        simple = simplify(cascade, division=d, bound=bound, saved=values, reassociated=r)
        if any(simple.cascade == f[1] for f in found):
            continue
        result, steps = _formed(simple, before, tile, parts if reference == "local" else 0)
        after = {rank_of(v): count_passes(result, rank=rank_of(v)).passes for v in wanted}
        choice = Choice(
            division=d,
            reassociated=r,
            passes=sum(after.values()),
            corrections=sum(s.claim is not None for s in steps),
            operations=_operations(result, sizes),
        )
        found.append((choice, simple.cascade, result, steps, after))
    found.sort(key=lambda f: f[0].cost)
    _, _, result, steps, after = found[0]
    passes = {r: (before[r], n) for r, n in after.items()}
    return Derivation(
        original=cascade,
        cascade=result,
        steps=tuple(steps),
        passes=passes,
        considered=tuple(f[0] for f in found),
        saved=saved,
    )


def _complain(division: str | None, reference: str, parts: int) -> None:
    problems = []
    for name, value, known in (
        ("division", division, ("deferred", "immediate", "exponent")),
        ("reference", reference, ("running", "local", "bound")),
    ):
        if value is not None and value not in known:
            rule = f"{name} is {', '.join(known[:-1])} or {known[-1]}"
            problems.append((f"'{value}' is no {name}", rule, nearest(value, known)))
    if parts < 1:
        problems.append((f"{parts} parts", "a rank is split into one part at least", ""))
    if problems:
        raise InputError(
            diagnostics=tuple(Diagnostic(code="option-value", headline=h, rule=r, hint=x) for h, r, x in problems)
        )


def _wanted(cascade: Cascade, rank: str | None) -> dict[str, PassCount]:
    """The variables of the ranks to stream, with their passes as written."""
    reduced = tuple(dict.fromkeys(v for e in cascade.einsums for v in e.ranks))
    if rank is None:
        counts = {v: count_passes(cascade, rank=rank_of(v)) for v in reduced}
        return {v: count for v, count in counts.items() if count.levels > 1}
    if not rank or variable_of(rank) not in reduced:
        names = tuple(map(rank_of, reduced))
        raise UnknownRankError.of(
            "unknown-rank",
            f"no Einsum reduces a rank '{rank}'",
            rule="a derivation streams a rank that is reduced",
            hint=nearest(rank, names),
        )
    return {variable_of(rank): count_passes(cascade, rank=rank)}


def _formed(simple: Rewritten, before: Mapping[str, int], tile: int, parts: int) -> tuple[Cascade, list[Step]]:
    """Bring each rank to loop form, or to parts with a state of their own; `before` has its passes as written."""
    result, steps = simple.cascade, list(simple.steps)
    wanted = tuple(map(variable_of, before))
    walked = [set(e.space) for e in result.einsums]
    lengths = {rank_of(v) for v in wanted if 2 * sum(v in space for space in walked) > len(walked)}
    # A loop over a feature must not stand in the way of one over a length.
    for v in sorted(wanted, key=lambda v: rank_of(v) not in lengths):
        # Of iterations only those of the text are looked into, and not where it splits the rank itself.
        here = any(isinstance(s, Einsum) and v in s.ranks for s in result.body)
        blocks = [s for s in simple.cascade.body if isinstance(s, Iter)]
        inside = any(isinstance(x, Einsum) and v in x.ranks for x in walk(tuple(blocks)))
        if not here and not (inside and v in whole_ranks(result)):
            continue
        try:
            if parts:
                form = split_form(result, variable=v, parts=parts)
            else:
                form = loop_form(result, over=(v,), tile=tile)
        except LoweringError as error:
            # The cascade keeps its passes over this rank; a derivation is not refused for it.
            why = error.diagnostics[0].headline
            steps.append(Step(rule="not streamed", what=f"{rank_of(v)} stays as it is", proof=(why,)))
            continue
        name = rank_of(v)
        if name not in lengths and count_passes(form.cascade, rank=name).passes >= before[name]:
            steps.append(Step(rule="not streamed", what=f"{name} stays as it is", proof=("a loop saves no pass",)))
            continue
        result = form.cascade
        steps += form.steps
    return result, steps


def _sizes(cascade: Cascade, given: Mapping[str, int]) -> dict[str, int]:
    """Extents to weigh operations at: those given, else 64 for ranks innermost in every input, 1024 for others."""
    out: dict[str, int] = {}
    for v in dict.fromkeys(v for i in cascade.inputs for v in i.indices):
        inner = all(i.indices[-1] == v for i in cascade.inputs if v in i.indices)
        out[rank_of(v)] = 64 if inner else 1024
    return {**out, **given}


def _operations(cascade: Cascade, sizes: Mapping[str, int]) -> int:
    """Operations, weighted by what they cost beside a multiply-add; 0 where an extent is unknown."""
    counts, extents = count_operations(cascade), evaluate_extents(cascade, sizes)
    total = 0
    for kind, weight in (("multiply_add", 1), ("max", 1), ("other", 1), ("exp", 8), ("divide", 8)):
        n = counts.total(kind)
        if not set(n.extents) <= set(extents):
            return 0
        total += weight * n.at(extents)
    return total
