"""`flex_attention`: PyTorch's FlexAttention by name and meaning, with its callables traced into a cascade."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from einsumcascade.codegen.captures import resolve
from einsumcascade.codegen.op import Op, compile
from einsumcascade.codegen.shared import named
from einsumcascade.codegen.trace_places import callable_name, place_of, refusal
from einsumcascade.codegen.tracing import BOOL, FLOAT, INT, Tracer
from einsumcascade.errors import InputError
from einsumcascade.language.compose import Mask, with_score
from einsumcascade.language.ir import (
    Apply,
    Cascade,
    Einsum,
    Expr,
    Input,
    Num,
    Read,
    Scalar,
    Var,
    apply,
    rank_of,
    transform,
    variables,
)
from einsumcascade.language.parser import parse
from einsumcascade.language.syntax import Mistake
from einsumcascade.language.terms import conjuncts, number

_ATTENTION = """
in Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f]
const scale = E ** -0.5
QK[b,h,p,m] = scale * Q[b,h,p,e] * K[b,h,m,e]  :: sum(e)
GM[b,h,p]   = QK[b,h,p,m]  :: max(m)
SN[b,h,p,m] = exp(QK[b,h,p,m] - GM[b,h,p])
SD[b,h,p]   = SN[b,h,p,m]  :: sum(m)
NV[b,h,p,f] = SN[b,h,p,m] * V[b,h,m,f]  :: sum(m)
AV[b,h,p,f] = NV[b,h,p,f] / SD[b,h,p]
LSE[b,h,p]  = GM[b,h,p] + log(SD[b,h,p])
out AV, LSE
"""
_INDICES = {"b": INT, "h": INT, "p": INT, "m": INT}
# Every name of the text, and what it is called once heads are grouped.
_TAKEN = ("Q", "K", "V", "QK", "S", "GM", "SN", "SD", "NV", "AV", "LSE", "B", "H", "P", "M", "E", "F", "G", "R")

ScoreMod = Callable[..., Any]
MaskMod = Callable[..., Any]


@torch.compiler.disable(reason="flex_attention traces its callables itself")  # type: ignore[no-untyped-call, untyped-decorator]
def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    *,
    mask_mod: MaskMod | Mask | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with changed scores and a mask, given as callables, as `torch.nn.attention.flex_attention` does.

    The callables are traced at every call: each becomes an expression or a constraint of a cascade, each tensor that
    they hold an input. A cascade is compiled once, so new tensors, and new lengths, meet the same kernel; a Python
    number is part of the text, so a new number is a new kernel. Of a query that sees no key the output is 0 and LSE is
    -inf.

    Args:
        query: (B, H, P, E), real numbers of any dtype that `compile` takes, on a CPU or a GPU.
        key: (B, H, M, E), or (B, G, M, E) with `enable_gqa`; B may be 1.
        value: (B, H, M, F), heads as those of `key`.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)` is the score that takes the place of `score`.
        block_mask: a `BlockMask` of PyTorch, whose `mask_mod` alone counts, or a mask of `einsumcascade.mask` over
            b, h, p (the query) and m (the key).
        scale: of the product of query and key; None is E ** -0.5.
        enable_gqa: H may be a multiple of G, the heads of `key`.
        return_lse: return the natural logarithm of the denominators too.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx)`, true where a query sees a key; or a mask. Both masks must hold.

    Returns: (B, H, P, F) in the dtype of `query`, differentiable; with `return_lse` also (B, H, P),
        float32, of float64 float64.
    Raises: TraceError: a callable does what no cascade can say, with its line; InputError: what a call of an op
        raises, and `head-count`.
    Cost: a trace of 0.1 to 1 ms; the first time a cascade is met, its compilation.
    Source: Dong et al., Flex Attention (2024).

    >>> q = torch.ones(1, 2, 5, 8)
    >>> flex_attention(q, q, q, lambda score, b, h, q_idx, kv_idx: score - (q_idx - kv_idx).abs()).shape
    torch.Size([1, 2, 5, 8])
    """
    op, tensors = traced(query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse, mask_mod=mask_mod)
    out = op(*tensors)
    outputs = (out,) if isinstance(out, torch.Tensor) else out
    # Grouped heads are one axis again.
    outputs = tuple(t.flatten(1, 2) for t in outputs) if tensors[0].dim() == 5 else outputs
    return (outputs[0], outputs[1]) if return_lse else outputs[0]


def traced(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    *,
    mask_mod: MaskMod | Mask | None = None,
) -> tuple[Op, tuple[torch.Tensor, ...]]:
    """Trace a call of `flex_attention` into an op and the tensors it takes: the query's heads grouped, then captures.

    `op.cascade` is what was traced, `op.source` its kernel. Arguments and errors are those of `flex_attention`.
    """
    query, key, value, groups = _shaped(query, key, value, enable_gqa)
    extents = {"b": query.shape[0], "h": query.shape[1], "p": query.shape[2], "m": key.shape[2]}
    tracer = Tracer(dtype=torch.float64 if query.dtype == torch.float64 else torch.float32, device=query.device)
    score: Expr = Read(tensor="QK")
    if score_mod is not None:
        traced = tracer.run(score_mod, {"QK": FLOAT, **_INDICES})
        if traced.kind == BOOL:
            raise _kind_of(score_mod, "a truth value", "a score_mod returns a number", "torch.where(seen, score, -inf)")
        score = traced.expr
    masks, conditions = _masks(block_mask, mask_mod, tracer)
    score, shown = _without_hidden(score)
    conditions = [*shown, *conditions]
    found = resolve([score, *conditions], tracer.captures, extents, taken=_TAKEN, query=query)
    form = _Form(
        score=found.exprs[0],
        conditions=found.exprs[1:],
        masks=masks,
        inputs=found.inputs,
        scale=None if scale is None else _number(scale),
        grouped=groups > 1,
        lse=("float64" if query.dtype == torch.float64 else "float32") if return_lse else "",
    )
    captured = found.tensors
    if form.grouped:
        query = _in_groups(query, 1, groups)
        captured = tuple(
            _in_groups(t, i.indices.index("h"), groups) if "h" in i.indices else t
            for i, t in zip(found.inputs, captured, strict=True)
        )
    return _op(form), (query, key, value, *captured)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """All that tells two cascades apart."""

    score: Expr
    conditions: tuple[Expr, ...]
    masks: tuple[Mask, ...]
    inputs: tuple[Input, ...]
    scale: int | float | None
    grouped: bool
    lse: str


@lru_cache(maxsize=256)
def _op(form: _Form) -> Op:
    return compile(cascade_of(form))


def cascade_of(form: _Form) -> Cascade:
    """The cascade of a traced call."""
    cascade = parse(_ATTENTION, name="flex_attention.cascade")
    if form.scale is not None:
        constant = replace(cascade.constants[0], expr=Num(value=form.scale))
        cascade = replace(cascade, constants=(constant,))
    if not form.lse:
        cascade = replace(cascade, body=cascade.body[:-1], outputs=cascade.outputs[:1])
    else:
        cascade = replace(cascade, outputs=(cascade.outputs[0], replace(cascade.outputs[1], dtype=form.lse)))
    if form.score != Read(tensor="QK"):
        taken = {*_TAKEN, *(i.tensor for i in form.inputs), *(rank_of(v) for i in form.inputs for v in i.indices)}
        parts, score = named(form.score, element="QK", order=tuple(_INDICES), taken=taken)
        cascade = with_score(cascade, "QK", score, inputs=form.inputs, parts=parts)
    else:
        cascade = replace(cascade, inputs=cascade.inputs + form.inputs)
    for mask in form.masks:
        cascade = cascade.constrain(mask)
    constraints = tuple(map(_of_keys, (*cascade.constraints, *form.conditions)))
    cascade = replace(cascade, constraints=constraints, source=None)
    return _grouped(cascade) if form.grouped else cascade


def _of_keys(condition: Expr) -> Expr:
    """A condition that names no key hides keys all the same, rather than the whole row of the output."""
    never = apply("lt", Var(name="m"), Num(value=0))
    if isinstance(condition, Num):
        return never
    return condition if "m" in variables(condition) else apply("or", condition, never)


def _grouped(cascade: Cascade) -> Cascade:
    """Heads as pairs g, r: keys and values have g alone."""
    g, r = Var(name="g"), Var(name="r")

    def indices_of(tensor: str, indices: tuple[Expr, ...]) -> tuple[Expr, ...]:
        pair = (g,) if tensor in ("K", "V") else (g, r)
        return tuple(x for i in indices for x in (pair if i == Var(name="h") else (transform(i, leaf),)))

    def leaf(e: Expr) -> Expr | None:
        if isinstance(e, Read):
            return replace(e, indices=indices_of(e.tensor, e.indices))
        if e == Var(name="h"):
            return apply("add", apply("mul", g, Scalar(name="R")), r)
        return None

    def declared(i: Input) -> Input:
        new = indices_of(i.tensor, tuple(Var(name=v) for v in i.indices))
        return replace(i, indices=tuple(v.name for v in new if isinstance(v, Var)))

    body = tuple(
        replace(s, indices=indices_of(s.tensor, s.indices), expr=transform(s.expr, leaf))
        for s in cascade.body
        if isinstance(s, Einsum)
    )
    return replace(
        cascade,
        inputs=tuple(map(declared, cascade.inputs)),
        constraints=tuple(transform(c, leaf) for c in cascade.constraints),
        body=body,
    )


def _without_hidden(score: Expr) -> tuple[Expr, list[Expr]]:
    """Scores of -inf under a condition as a constraint: a weight of 0 is no point, and whole tiles may go."""
    match score:
        case Apply(op="select", args=(condition, kept, Num(value=x))) if x == float("-inf"):
            inner, others = _without_hidden(kept)
            return inner, [*conjuncts([condition]), *others]
        case Apply(op="select", args=(condition, Num(value=x), kept)) if x == float("-inf"):
            inner, others = _without_hidden(kept)
            return inner, [apply("not", condition), *others]
        case _:
            return score, []


def _masks(block_mask: Any, mask_mod: Any, tracer: Tracer) -> tuple[tuple[Mask, ...], list[Expr]]:
    """The masks that are text, and the conditions of those that are callables."""
    texts: list[Mask] = []
    conditions: list[Expr] = []
    if block_mask is not None and not isinstance(block_mask, Mask):
        found = getattr(block_mask, "mask_mod", None)
        if not callable(found):
            raise InputError.of(
                "wrong-type",
                f"block_mask is a {type(block_mask).__name__}",
                rule="block_mask is a BlockMask of PyTorch or a mask of einsumcascade.mask",
                hint="mask_mod= takes the callable itself",
            )
        _complain_of_blocks(block_mask, found)
        block_mask = found
    for given in (block_mask, mask_mod):
        if isinstance(given, Mask):
            texts.append(given)
        elif given is not None:
            traced = tracer.run(given, _INDICES)
            if traced.kind != BOOL:
                raise _kind_of(given, "a number", "a mask_mod returns a condition", "compare it: x != 0")
            if traced.expr != Num(value=1):
                conditions += conjuncts([traced.expr])
    return tuple(texts), conditions


def _complain_of_blocks(block_mask: Any, mask_mod: Any) -> None:
    """Refuse a mask that lies in a list of blocks and not in a callable."""
    from torch.nn.attention.flex_attention import noop_mask

    if mask_mod is noop_mask and block_mask.sparsity() > 0:
        raise InputError.of(
            "block-list",
            f"the mask hides {block_mask.sparsity():.0f} % of the scores by its list of blocks alone",
            rule="of a BlockMask the mask_mod counts; which tiles are visited follows from it",
            hint="say by a mask_mod what the blocks hide",
        )


def _shaped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Tensors of one batch, and the query heads for each head of the keys."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise InputError.of(
                "wrong-type", f"{name} is a {type(t).__name__}, not a torch.Tensor", rule="an op takes tensors"
            )
        if t.dim() != 4:
            raise InputError.of(
                "rank-count",
                f"{name} has 4 ranks, but its shape {tuple(t.shape)} has {t.dim()} axes",
                rule="query, key and value are (batch, heads, length, features)",
            )
    heads, groups = query.shape[1], key.shape[1]
    if heads != groups and not (enable_gqa and groups and heads % groups == 0):
        raise InputError.of(
            "head-count",
            f"query has {heads} heads, key has {groups}",
            rule="heads are as many, or with enable_gqa=True a multiple of those of key and value",
            hint="" if enable_gqa or not groups or heads % groups else "enable_gqa=True",
        )
    if query.shape[0] != 1 and key.shape[0] == value.shape[0] == 1:
        key, value = (t.expand(query.shape[0], -1, -1, -1) for t in (key, value))
    return query, key, value, heads // groups if groups else 1


def _number(scale: float) -> int | float:
    try:
        return number("scale", scale)
    except Mistake as m:
        raise InputError(diagnostics=(m.diagnostic,)) from None


def _in_groups(t: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """A view whose axis of heads is two: heads of the keys, and the query heads of each."""
    return t.view(*t.shape[:axis], t.shape[axis] // groups, groups, *t.shape[axis + 1 :])


def _kind_of(function: Any, what: str, rule: str, hint: str) -> Exception:
    return refusal(
        "trace-result",
        f"{callable_name(function)} returns {what}",
        rule=rule,
        hint=hint,
        place=place_of(function),
    )
