"""Grouped-query attention in the ways that it is written, for tests of packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.dtypes import selectors
from einsumcascade.codegen.launch import Built, build, run_interpreted
from einsumcascade.codegen.plain import run_plain
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.language.parser import parse
from einsumcascade.reference.errorbound import EPS, conditioning, judge
from einsumcascade.reference.interpret import run
from einsumcascade.schedules.schedule import Schedule

# How keys are found: declarations, the index of K and V in place of h, and the pair that is packed.
GROUPS: Mapping[str, tuple[str, str, str]] = {
    "exact": ("K[b,g,m,e], V[b,g,m,f]{more}\nrank r = H / G", "h // R,", "h"),
    "quotient": ("K[b,g,m,e], V[b,g,m,f]{more}", "h // (H // G),", "h"),
    "number": ("K[b,g,m,e], V[b,g,m,f]{more}", "h // 3,", "h"),
    "constant": ("K[b,g,m,e], V[b,g,m,f]{more}\nconst n = 3", "h // n,", "h"),
    "one": ("K[b,m,e], V[b,m,f]{more}", "", "h"),
    "ranks": ("K[b,g,m,e], V[b,g,m,f]{more}", "g,", "r"),
}
# What else there may be: inputs, the score, and what the inputs hold.
EXTRAS: Mapping[str, tuple[str, str]] = {
    "": ("", "QK[{s}]"),
    "slopes": (", SL[h]", "QK[{s}] + SL[h] * (p - m)"),
    "bias": (", BIAS[h,p,m]", "QK[{s}] + BIAS[h,p,m]"),
    "table": (", BIAS[h,j]", "QK[{s}] + BIAS[h, p - m + M - 1]"),
    "lengths": (", LEN[b]", "QK[{s}]"),
    "ragged": (", LO[p], HI[p]", "QK[{s}]"),
    "documents": (", DOC[m], OF[p]", "QK[{s}]"),
}
MASKS = ("", "m <= p", "m <= p + M - P", "p + M - P - m < 9, m <= p + M - P")
MORE = {"lengths": "m < LEN[b]", "ragged": "LO[p] <= m, m < HI[p]", "documents": "DOC[m] == OF[p]"}


@dataclass(frozen=True)
class Grouped:
    """A text and the extents that it is called with."""

    group: str
    heads: int
    keys: int
    extra: str = ""
    mask: str = ""
    p: int = 1
    m: int = 37
    e: int = 16
    parts: int = 1
    has_p: bool = True

    @property
    def cascade(self) -> Cascade:
        head, at, _ = GROUPS[self.group]
        more, score = EXTRAS[self.extra]
        q = "b,g,r,p" if self.group == "ranks" else "b,h,p"
        s = f"{q},m"
        conditions = ", ".join(filter(None, (self.mask, MORE.get(self.extra, ""))))
        lines = [
            f"in Q[{q},e], {head.format(more=more)}",
            "const scale = E ** -0.5",
            f"constraint {conditions}" if conditions else "",
            f"QK[{s}] = scale * Q[{q},e] * K[b,{at}m,e] :: sum(e)",
            f"S[{s}] = {score.format(s=s)}",
            f"GM[{q}] = S[{s}] :: max(m)",
            f"SN[{s}] = exp(S[{s}] - GM[{q}])",
            f"SD[{q}] = SN[{s}] :: sum(m)",
            f"NV[{q},f] = SN[{s}] * V[b,{at}m,f] :: sum(m)",
            f"AV[{q},f] = NV[{q},f] / SD[{q}]",
            f"LSE[{q}] = log(SD[{q}]) + GM[{q}]",
            "out AV, LSE: float32",
        ]
        text = "\n".join(lines)
        if self.group == "ranks":
            text = text.replace("[h", "[r")
        return parse(text if self.has_p else text.replace("p,", "").replace(",p", ""), name="grouped.cascade")

    @property
    def schedule(self) -> Schedule:
        """Packing, and parts of m where there are more than one."""
        inner = GROUPS[self.group][2]
        split = {"m": self.parts} if self.parts > 1 else {}
        return Schedule(pack={inner: "p" if self.has_p else inner}, split=split)

    @property
    def extents(self) -> dict[str, int]:
        n = self.heads // self.keys if self.group == "ranks" else self.keys
        own = {"B": 2, "H": self.heads, "G": self.keys, "R": n, "P": self.p, "M": self.m, "E": self.e, "F": self.e}
        own["J"] = self.p + self.m
        return {rank_of(v): own[rank_of(v)] for i in self.cascade.inputs for v in i.indices}

    def inputs(self, dtype: str) -> dict[str, torch.Tensor]:
        """Random inputs; what only compares holds whole numbers, ascending where it stands for documents."""
        generator = torch.Generator().manual_seed(self.heads * 31 + self.p)
        whole = selectors(self.cascade)
        out = {}
        for i in self.cascade.inputs:
            shape = [self.extents[rank_of(v)] for v in i.indices]
            if i.tensor in whole:
                top = 4 if i.tensor in ("DOC", "OF") else self.m + 1
                drawn = torch.randint(0, top, shape, generator=generator)
                out[i.tensor] = (drawn.sort().values if i.tensor == "DOC" else drawn).to(torch.int32)
            else:
                out[i.tensor] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        return out

    def built(self, dtype: str, *, tile: int = 16, schedule: Schedule | None = None) -> Built:
        return build(
            self.cascade,
            extents={r: n for r, n in self.extents.items() if r in ("E", "F")},
            dtype=dtype,
            target=gpu_target("cuda:90"),
            schedule=schedule or self.schedule,
            tile_limit=tile,
        )

    def interpreted(self, dtype: str, *, tile: int = 16) -> Built:
        """Run the text, outputs poisoned, and require every output to be within its bound."""
        inputs = self.inputs(dtype)
        binding = bind(self.cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
        made = self.built(dtype, tile=tile)
        found = run_interpreted(made, inputs, binding)
        expected, plain = run(self.cascade, inputs), run_plain(self.cascade, inputs)
        room = conditioning(self.cascade, inputs, EPS[dtype])
        for name in expected:
            verdict = judge(found[name], expected[name], plain[name], room[name])
            assert verdict.passed, f"{name}: {verdict}\n{self}\n{self.cascade}"
        return made


@st.composite
def grouped(draw: st.DrawFn) -> Grouped:
    group = draw(st.sampled_from(tuple(GROUPS)))
    size, keys = draw(st.sampled_from((1, 3, 4, 8))), draw(st.sampled_from((1, 2, 3)))
    heads = size * keys
    if group == "one":
        keys = 1
    elif group in ("number", "constant"):
        # The last group may be cut short.
        heads = draw(st.integers(1, 10))
        keys = -(-heads // 3)
    elif group == "quotient":
        heads += draw(st.sampled_from((0, 0, 1)))
    has_p = group in ("one", "ranks") or draw(st.sampled_from((True, True, True, False)))
    return Grouped(
        group=group,
        heads=heads,
        keys=keys,
        extra=draw(st.sampled_from(tuple(EXTRAS) if has_p else ("", "lengths"))),
        mask=draw(st.sampled_from(MASKS)) if has_p else "",
        p=draw(st.sampled_from((1, 2, 5, 18))),
        m=draw(st.sampled_from((1, 16, 37, 65))),
        e=draw(st.sampled_from((16, 24))),
        parts=draw(st.sampled_from((1, 1, 2, 4))),
        has_p=has_p,
    )
