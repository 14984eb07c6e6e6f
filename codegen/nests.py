"""A loop over several ranks as one loop inside the other, so that each walks its rank as a loop over it alone would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Definition,
    Einsum,
    Expr,
    Init,
    Iter,
    Num,
    Read,
    Scalar,
    Statement,
    Var,
    apply,
    rank_of,
    transform,
    variables,
)
from einsumcascade.rewrites.algebra import names_taken
from einsumcascade.rewrites.loop_form import LoopForm


@dataclass(frozen=True, slots=True, kw_only=True)
class Nest:
    """A cascade whose loop over several ranks is a nest.

    Args:
        cascade: the result.
        outer: the variables of the loops that only repeat the one inside, outermost first.
        end: the generation of a state that the nest leaves.
        within: expressions that are always within a rank.
        walks: for each variable walked, that of its loop.
    """

    cascade: Cascade
    outer: tuple[str, ...]
    end: Expr
    within: dict[Expr, str] = field(hash=False)
    walks: dict[str, str] = field(hash=False)


def nested(cascade: Cascade, form: LoopForm, over: tuple[str, ...]) -> Nest:
    """See step `s` of a loop over `r` and tiles of `p` as tile `s % n` of step `s // n` of a loop over `r`.

    Args:
        cascade: in the loop form that `form` tells of. over: variables walked, outermost first.

    Returns: the nest. A state keeps its last generation, `R[.., Step]`, under that name. With one variable walked the
        cascade is as it was.
    Cost: linear in the Einsums.
    """
    outer, last = over[:-1], over[-1]
    end = Scalar(name=rank_of(form.index))
    if not outer:
        within = {} if form.inner else {form.points[last]: rank_of(last)}
        return Nest(cascade=cascade, outer=(), end=end, within=within, walks={last: form.index})
    turn = _turn(form, last)
    index = _fresh(f"{last}1", names_taken(cascade)) if form.inner else last
    places: dict[Expr, Expr] = {turn: Var(name=index), **{form.points[v]: Var(name=v) for v in outer}}
    count, step = turn.args[1], Var(name=form.index)

    def at(indices: Iterable[Expr]) -> tuple[Expr, ...]:
        """Step `s` is `r, p1`, and `s + 1` is `r, p1 + 1`: generations are counted through."""
        found: list[Expr] = []
        for i in indices:
            if i == step:
                found += [*(Var(name=v) for v in outer), Var(name=index)]
            elif i == apply("add", step, Num(value=1)):
                found += [*(Var(name=v) for v in outer), apply("add", Var(name=index), Num(value=1))]
            else:
                found.append(seen(i))
        return tuple(found)

    def seen(expr: Expr) -> Expr:
        return transform(
            expr, lambda e: Read(tensor=e.tensor, indices=at(e.indices)) if isinstance(e, Read) else places.get(e)
        )

    def one(s: Statement) -> Statement:
        match s:
            case Iter() if s.var == form.index:
                inside: Statement = Iter(var=index, body=tuple(map(one, s.body)))
                for v in reversed(outer):
                    inside = Iter(var=v, body=(inside,))
                return inside
            case Iter():
                return replace(s, body=tuple(map(one, s.body)))
            case Einsum():
                return replace(s, indices=at(s.indices), expr=seen(s.expr), where=tuple(map(seen, s.where)))
            case Init():
                return s

    ranks = (*cascade.ranks, Definition(name=index, expr=count)) if form.inner else cascade.ranks
    body, constraints = tuple(map(one, cascade.body)), tuple(map(seen, cascade.constraints))
    left = [e for e in cascade.with_body(body).einsums if form.index in variables(*e.indices, e.expr, *e.where)]
    assert not left, left
    within = {Var(name=v): rank_of(v) for v in (*outer, *(() if form.inner else (last,)))}
    return Nest(
        cascade=replace(cascade, ranks=ranks, body=body, constraints=constraints),
        outer=outer,
        end=end,
        within=within,
        walks={**{v: v for v in outer}, last: index},
    )


def _turn(form: LoopForm, last: str) -> Apply:
    """The tile of the last variable that a step walks: `s % n`."""
    place = form.points[last]
    if form.inner:
        assert isinstance(place, Apply)
        place = place.args[0]
        assert isinstance(place, Apply)
        place = place.args[0]
    assert isinstance(place, Apply) and place.op == "mod"
    return place


def _fresh(name: str, taken: Iterable[str]) -> str:
    known = set(taken)
    while name in known or rank_of(name) in known:
        name += "_"
    return name
