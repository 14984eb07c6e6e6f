"""What a user would call instead, found by itself where it is installed.

A rival computes the very function of a case from the same numbers. It may want another layout of the tensors; it gets
them contiguous in its own, and what it returns is seen in ours for the comparison.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from einsumcascade.benchmarks.cases import Case
from einsumcascade.benchmarks.variants import CAP, LAMBDA, WINDOW, Tensors, offsets, sequences
from einsumcascade.errors import InputError, nearest

Function = Callable[..., Tensor]
# Scores that a compiled formula may hold, in bytes; it holds them more than once.
SCORE_BYTES = 16 << 30


class NotHere(Exception):
    """Why a rival has no figure for a case."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another implementation.

    Args:
        key: its name in filters. title: its name in tables.
        variants: those it computes.
        make: prepares a function of the inputs in the order of the variant; raises NotHere if it cannot.
        tokens_first: it wants tokens before heads.
        absent: why it is not here; empty where it is.
    """

    key: str
    title: str
    variants: frozenset[str]
    make: Callable[[Case, Tensors], Function]
    tokens_first: bool = False
    absent: Callable[[torch.device], str]

    def layout(self, axes: str) -> str:
        """The order in which the rival wants the axes of a tensor."""
        return axes.replace("hp", "ph").replace("hm", "mh") if self.tokens_first else axes


# --- PyTorch's scaled_dot_product_attention ---------------------------------------------------------------------------


def _sdpa(backend: SDPBackend, case: Case, x: Tensors) -> Function:
    name, causal = case.variant.name, case.variant.name not in ("full", "decode")
    grouped = name in ("gqa", "decode")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q = _heads_in_one(name, q)
        with sdpa_kernel(backend):
            out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        rows: Tensor = out.reshape(*shape[:-1], v.shape[-1])
        return rows

    return call


def _heads_in_one(name: str, q: Tensor) -> Tensor:
    """The queries with one axis of heads."""
    return q.flatten(1, 2) if name in ("gqa", "decode") else q


def _on_cuda(device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs a CUDA device"


# --- FlexAttention ----------------------------------------------------------------------------------------------------


def _flex(case: Case, x: Tensors) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s, name, device = case.shape, case.variant.name, x["Q"].device
    if device.type == "cpu" and case.direction != "forward":
        raise NotHere("it has no gradients on a CPU")
    mask = None
    if name not in ("full", "decode"):
        mask = create_block_mask(_flex_mask(name, x), None, None, s.p, s.m, device=str(device))
    attend: Any = partial(flex_attention, block_mask=mask, enable_gqa=name in ("gqa", "decode"))

    def scored(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        out: Tensor = attend(q, k, v, _flex_score(name, rest))
        return out

    def with_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        out, lse = _with_lse(attend, q, k, v)
        return (out * torch.sigmoid(lse - sink[:, None])[..., None]).to(out.dtype)

    def difference(q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attend(q0, k0, v) - LAMBDA * attend(q1, k1, v)
        return out

    special: dict[str, Function] = {"sink": with_sink, "diff": difference}
    inner = _compiled(special.get(name, scored), device)

    # Views are taken outside: not every release compiles FlexAttention of a view.
    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        out: Tensor
        if name == "diff":
            return inner(*q.unbind(0), *k.unbind(0), v)  # type: ignore[no-any-return]
        if name == "varlen":
            out = inner(*(t.transpose(0, 1)[None] for t in (q, k, v)))
            return out[0].transpose(0, 1)
        out = inner(_heads_in_one(name, q), k, v, *rest)
        return out.reshape(*q.shape[:-1], v.shape[-1])

    return call


def _with_lse(attend: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from torch.nn.attention import flex_attention as home

    if not hasattr(home, "AuxRequest"):
        out, lse = attend(q, k, v, return_lse=True)
        return out, lse
    out, aux = attend(q, k, v, return_aux=home.AuxRequest(lse=True))
    return out, aux.lse


def _flex_score(name: str, given: Sequence[Tensor]) -> Callable[..., Tensor] | None:
    if name == "alibi":
        return lambda score, b, h, i, j: score + given[0][h] * (j - i)
    if name == "bias":
        return lambda score, b, h, i, j: score + given[0][h, (i - j).clamp(min=0)]
    if name == "softcap":
        return lambda score, b, h, i, j: CAP * torch.tanh(score / CAP)
    return None


def _flex_mask(name: str, x: Tensors) -> Callable[..., Tensor]:
    if name == "window":
        return lambda b, h, i, j: (i >= j) & (i - j < WINDOW)
    if name in ("document", "varlen"):
        ids = x["DOC"] if name == "document" else x["LO"]
        return lambda b, h, i, j: (i >= j) & (ids[i] == ids[j])
    return lambda b, h, i, j: i >= j


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compile for fixed shapes, as is fastest; on a CPU only the meaning is of interest."""
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def raise_limits() -> None:
    """Let PyTorch compile every case: by default it gives up after some and runs eagerly, which is no fair rival."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    for name in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(dynamo, name):
            setattr(dynamo, name, 100_000)
    # A backward that is timed again and again needs what its forward kept.
    functorch.donated_buffer = False


# --- the formula ------------------------------------------------------------------------------------------------------


def _formula(case: Case, x: Tensors) -> Function:
    s, variant = case.shape, case.variant
    size = 2 * s.b * s.h * s.p * s.m * variant.scores
    if size > SCORE_BYTES:
        raise NotHere(f"its scores take {size / 2**30:.0f} GiB")
    device = x["Q"].device
    rows, columns = torch.arange(s.p, device=device), torch.arange(s.m, device=device)

    def formula(*given: Tensor) -> Tensor:
        return variant.formula(dict(zip(variant.inputs, given, strict=True)), rows, columns)

    return _compiled(formula, device)


# --- libraries --------------------------------------------------------------------------------------------------------


def _flash_attn(case: Case, x: Tensors) -> Function:
    flash_attn: Any = importlib.import_module("flash_attn")

    name = case.variant.name
    if name == "varlen":
        ends, longest = offsets(case.shape.p).to(x["Q"].device), max(sequences(case.shape.p))

        def packed(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor) -> Tensor:
            out: Tensor = flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
            return out

        return packed
    options: dict[str, Any] = {"causal": name != "full"}
    if name == "window":
        options["window_size"] = (WINDOW - 1, 0)
    if name == "softcap":
        options["softcap"] = CAP
    if name == "alibi":
        options["alibi_slopes"] = x["SLOPE"].float()

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        out: Tensor = flash_attn.flash_attn_func(q, k, v, **options)
        return out

    return call


def _torch_varlen(case: Case, x: Tensors) -> Function:
    from inspect import signature

    from torch.nn.attention.varlen import varlen_attn

    ends, longest = offsets(case.shape.p).to(x["Q"].device), max(sequences(case.shape.p))
    # The way to say causal changed with the releases.
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in signature(varlen_attn).parameters else {}
    options = options or {"window_size": (-1, 0)}

    def packed(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor) -> Tensor:
        out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, **options)
        return out if isinstance(out, Tensor) else out[0]

    return packed


def _fla(case: Case, x: Tensors) -> Function:
    parallel_attn = importlib.import_module("fla.ops.attn").parallel_attn

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = parallel_attn(q, k, v)
        return out

    return call


def _installed(module: str, device: torch.device) -> str:
    if device.type != "cuda":
        return "needs a CUDA device"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return "" if found else f"{module} is not installed"


_FLEX = "full causal alibi window document softcap bias sink diff mla gqa varlen decode"
_FORMULA = "full causal alibi window document softcap bias sink sigmoid relu2 diff mla"


def _rival(key: str, title: str, variants: str, make: Any, absent: Any, **options: Any) -> Rival:
    return Rival(key=key, title=title, variants=frozenset(variants.split()), make=make, absent=absent, **options)


RIVALS = {
    r.key: r
    for r in (
        _rival("flash", "SDPA flash", "full causal gqa decode", partial(_sdpa, SDPBackend.FLASH_ATTENTION), _on_cuda),
        _rival(
            "cudnn", "SDPA cuDNN", "full causal mla gqa decode", partial(_sdpa, SDPBackend.CUDNN_ATTENTION), _on_cuda
        ),
        _rival("flex", "FlexAttention", _FLEX, _flex, lambda device: ""),
        _rival(
            "varlen_attn",
            "varlen_attn",
            "varlen",
            _torch_varlen,
            partial(_installed, "torch.nn.attention.varlen"),
        ),
        _rival(
            "flash-attn",
            "flash-attn",
            "full causal alibi window softcap varlen",
            _flash_attn,
            partial(_installed, "flash_attn"),
            tokens_first=True,
        ),
        _rival("fla", "FLA", "causal", _fla, partial(_installed, "fla"), tokens_first=True),
        _rival(
            "math", "SDPA math", "full causal mla", partial(_sdpa, SDPBackend.MATH), lambda device: _only_cpu(device)
        ),
        _rival("formula", "torch.compile", _FORMULA, _formula, lambda device: ""),
    )
}
# Variants for which a compiled formula is all, or some, of what a user has; elsewhere it is measured when asked for.
FORMULA_ALONE = ("sigmoid", "relu2", "diff", "bias")


def _only_cpu(device: torch.device) -> str:
    return "" if device.type == "cpu" else "of no interest on a GPU"


def found(keys: Sequence[str], device: torch.device) -> tuple[list[Rival], dict[str, str]]:
    """The rivals that are here, and why the others are not.

    Args:
        keys: of those that are wanted; none means all.

    Raises: InputError: `benchmark-rival`: a key is that of no rival.
    """
    for key in keys:
        if key not in RIVALS:
            raise InputError.of(
                "benchmark-rival",
                f"there is no rival '{key}'",
                rule="rivals are " + ", ".join(RIVALS) + "; or none",
                hint=nearest(key, list(RIVALS)),
            )
    wanted = [r for r in RIVALS.values() if not keys or r.key in keys]
    reasons = {r.key: r.absent(device) for r in wanted}
    return [r for r in wanted if not reasons[r.key]], {k: why for k, why in reasons.items() if why}


def suits(rival: Rival, case: Case, *, asked: bool, smoke: bool) -> bool:
    """Whether a rival is measured on a case."""
    if case.variant.name not in rival.variants:
        return False
    return rival.key != "formula" or asked or smoke or case.variant.name in FORMULA_ALONE
