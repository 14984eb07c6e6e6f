"""Cascades and inputs that the tests of the op share."""

from __future__ import annotations

import torch

from einsumcascade.codegen.dtypes import selectors
from einsumcascade.gallery import header, load, names
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse
from einsumcascade.verify.verify import filled_extents, random_inputs
from tests.gallery.draws import draw

VARIANTS = tuple(name for name in names() if header(name).kernel == "yes")
# A row statistic of one kernel is what the other subtracts.
TWO_KERNELS = parse(
    "in X[p,m], V[m,f]\nC[m] = X[p,m] :: sum(p)\nS[p,m] = exp(X[p,m] - C[m])\n"
    "Y[p,f] = S[p,m] * V[m,f] :: sum(m)\nout Y",
    name="column_sums.cascade",
)


# What every step reads receives a sum over generations that no kernel leaves in memory.
NO_GRADIENT = (
    "in X[b,t,e]\ninit R[b,0,e] = 0\niter t:\n R[b,t+1,e] = R[b,t,e] * X[b,t,e] + X[b,0,e]\nend\n"
    "O[b,e] = R[b,T,e]\nout O"
)


def qkv(
    p: int = 21, m: int = 34, *, e: int = 16, f: int = 8, dtype: torch.dtype = torch.float32, b: int = 2, h: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(p + m)
    shapes = ((b, h, p, e), (b, h, m, e), (b, h, m, f))
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return q, k, v


def inputs_of(cascade: Cascade, dtype: str, **extents: int) -> dict[str, torch.Tensor]:
    given = bind(cascade, extents=filled_extents(cascade, {k: n for k, n in extents.items() if k in ranks(cascade)}))
    return random_inputs(cascade, given, dtype)


def variant_inputs(name: str, dtype: str, kind: str = "odd") -> dict[str, torch.Tensor]:
    """The inputs that a gallery text is drawn, in one dtype; tables and lengths stay whole, unless reckoned with."""
    whole = selectors(load(name))
    return {
        n: torch.from_numpy(x).to(getattr(torch, "int32" if x.dtype.kind != "f" and n in whole else dtype))
        for n, x in draw(load(name), name, kind).items()
    }


def ranks(cascade: Cascade) -> set[str]:
    return {v.upper() for i in cascade.inputs for v in i.indices}


def strided(kind: str) -> dict[str, torch.Tensor]:
    q, k, v = qkv()
    match kind:
        case "transposed":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        case "columns first":
            q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
        case "every second":
            q, k, v = (torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in (q, k, v))
        case "broadcast":
            k, v = (x[:, :1].expand(-1, 3, -1, -1) for x in (k, v))
        case "an offset":
            q, k, v = (torch.cat((x[:, :, :1], x), 2)[:, :, 1:] for x in (q, k, v))
    return {"Q": q, "K": k, "V": v}


TRACED = {
    "softmax_attention": load("softmax_attention"),
    "softmax_lse": load("softmax_lse"),
    "alibi": load("alibi"),
    "linear": load("linear"),
    "two kernels": TWO_KERNELS,
}
