"""Texts of random cascades: scores, masks, weights over the keys, what becomes of them, sometimes a second output."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class _Text:
    """A cascade under construction."""

    inputs: list[str]
    constants: list[str]
    constraints: list[str]
    body: list[str]
    outputs: list[str]

    def need(self, declaration: str) -> None:
        if declaration not in self.inputs:
            self.inputs.append(declaration)

    def __str__(self) -> str:
        return (
            "\n".join(
                [
                    "in " + ", ".join(self.inputs),
                    *(f"const {c}" for c in self.constants),
                    *(f"constraint {c}" for c in self.constraints),
                    *self.body,
                    "out " + ", ".join(self.outputs),
                ]
            )
            + "\n"
        )


BATCHES = (("", ""), ("b,", "b,"), ("h,", "h,"), ("b,h,", "b,h,"), ("b,h,", "h,"), ("g,r,", "g,"))
MASKS = (
    ("m <= p",),
    ("m <= p",),
    ("m < p",),
    ("m <= p", "p - m < w"),
    ("p - m < w", "m - p < w"),
    ("m >= p",),
    ("m // 8 == p // 8",),
    ("m % 3 == 0",),
    ("m <= p or m < 4",),
    ("m <= p + 3",),
    ("m < LEN",),
    ("DM[m] == DP[p]",),
    ("m <= p", "DM[m] == DP[p]"),
    ("2 * m <= p",),
    ("m != p",),
)
KEY_MASKS = (("m < LEN",), ("m % 3 == 0",), ("m < 5",))
PAIR_MASKS = (("m >= n",), ("m <= p", "n <= p"), ("n <= m", "m <= p"), ("n < 3",))
SCORES = ("{x}", "{x}", "{x}", "20 * tanh({x} / 20)", "sigmoid({x})", "relu({x})", "{x} + 0.5", "{x} * {x}")
BIASED = ("{x} - SLOPE[{h}] * (p - m)", "{x} - 0.25 * abs(p - m)", "{x} + BIAS[p,m]")
ONE_LOOP = (
    "softmax",
    "softmax",
    "softmax",
    "immediate",
    "square",
    "root",
    "double",
    "shifted",
    "sink",
    "epsilon",
    "rms",
    "mean",
    "sum",
    "maxplus",
    "lse",
    "ratio",
    "sharp",
    "spread",
    "plogp",
    "minmax",
    "variance",
    "scaled",
    "top",
)
TWO_LOOPS = ("threshold", "tanh", "hinge", "temperature", "centre")


def random_text(rng: random.Random) -> str:
    """A text of the class."""
    pick = rng.choice
    batch, keys_batch = pick(BATCHES)
    has_p = rng.random() < 0.9 or not batch
    pair = has_p and rng.random() < 0.1
    q = batch + ("p" if has_p else "")
    q = q.rstrip(",")
    over = "m,n" if pair else "m"
    t = _Text([], [], [], [], [])
    _scores(t, pick, q, keys_batch, over, has_p)
    if rng.random() < 0.5:
        masks = PAIR_MASKS if pair else MASKS if has_p else KEY_MASKS
        for c in pick(masks):
            t.constraints.append(c)
            if "LEN" in c:
                t.need("LEN")
            if "DM" in c:
                t.need("DM[m]")
                t.need("DP[p]")
            if "w" in c.split():
                t.constants = (
                    [*t.constants, f"w = {pick((1, 5, 20))}"]
                    if not any(k.startswith("w ") for k in t.constants)
                    else t.constants
                )
    kind = pick(TWO_LOOPS) if rng.random() < 0.2 else pick(ONE_LOOP)
    _weights(t, kind, q, keys_batch, over)
    _epilogue(t, pick, q)
    if rng.random() < 0.35:
        _second(t, pick, kind, q, keys_batch, over)
    return str(t)


def _scores(t: _Text, pick: Any, q: str, k: str, over: str, has_p: bool) -> None:
    t.need(f"Q[{q},e]")
    t.need(f"K[{k}m,e]")
    scale = pick(("", "scale * "))
    if scale:
        t.constants.append("scale = E ** -0.5")
    if over == "m,n":
        t.need("K2[n,e]")
        t.body.append(f"QK[{q},{over}] = {scale}Q[{q},e] * K[{k}m,e] * K2[n,e] :: sum(e)")
    elif not scale and pick((True, False, False, False, False, False)):
        t.body.append(f"QK[{q},m] = (Q[{q},e] - K[{k}m,e]) ** 2 :: sum(e)")
    else:
        t.body.append(f"QK[{q},m] = {scale}Q[{q},e] * K[{k}m,e] :: sum(e)")
    shape = pick(BIASED) if has_p and pick((True, False, False, False)) else pick(SCORES)
    if "SLOPE" in shape and not q.startswith(("h,", "b,h,")):
        shape = BIASED[1]
    if "SLOPE" in shape:
        t.need("SLOPE[h]")
    if "BIAS" in shape:
        t.need("BIAS[p,m]")
    t.body.append(f"S[{q},{over}] = " + shape.format(x=f"QK[{q},{over}]", h="h"))


def _weights(t: _Text, kind: str, q: str, k: str, over: str) -> None:
    """The chained reductions, down to a tensor `O` over the values."""
    s, d = f"S[{q},{over}]", f"{q},{over}"
    t.need(f"V[{k}m,f]")
    v = f"V[{k}m,f]"
    if over == "m,n":
        t.need("V2[n,f]")
        v += " * V2[n,f]"
    add = t.body.append
    without = ("rms", "mean", "sum", "temperature", "centre", "hinge", "maxplus", "minmax", "variance", "scaled", "top")
    needs_max = kind not in without
    if needs_max and kind != "sink":
        add(f"GM[{q}] = {s} :: max({over})")
    if kind == "sink":
        t.need("SINK")
        add(f"TM[{q}] = {s} :: max({over})")
        add(f"GM[{q}] = max(TM[{q}], SINK)")
    if needs_max:
        factor = {"double": "2 * ", "sharp": "beta * "}.get(kind, "")
        if kind == "sharp":
            t.constants.append("beta = 0.7")
        shifted = f"({s} - GM[{q}])" if factor else f"{s} - GM[{q}]"
        add(f"SN[{d}] = exp({factor}{shifted})")
        add(f"SD[{q}] = SN[{d}] :: sum({over})")
    match kind:
        case "softmax" | "lse" | "double" | "sharp":
            add(f"NV[{q},f] = SN[{d}] * {v} :: sum({over})")
            add(f"O[{q},f] = NV[{q},f] / SD[{q}]")
        case "immediate":
            add(f"A[{d}] = SN[{d}] / SD[{q}]")
            add(f"O[{q},f] = A[{d}] * {v} :: sum({over})")
        case "square":
            add(f"A[{d}] = (SN[{d}] / SD[{q}]) ** 2")
            add(f"O[{q},f] = A[{d}] * {v} :: sum({over})")
        case "root":
            add(f"S2[{q}] = SN[{d}] * SN[{d}] :: sum({over})")
            add(f"O[{q},f] = SN[{d}] * {v} / sqrt(S2[{q}]) :: sum({over})")
        case "shifted":
            add(f"SE[{q}] = exp(2 * ({s} - GM[{q}])) :: sum({over})")
            add(f"O[{q},f] = SN[{d}] * {v} / SE[{q}] :: sum({over})")
        case "sink":
            add(f"NV[{q},f] = SN[{d}] * {v} :: sum({over})")
            add(f"O[{q},f] = NV[{q},f] / (SD[{q}] + exp(SINK - GM[{q}]))")
        case "epsilon":
            add(f"NV[{q},f] = SN[{d}] * {v} :: sum({over})")
            add(f"O[{q},f] = NV[{q},f] / (SD[{q}] + 0.5)")
        case "rms":
            add(f"MS[{q}] = {s} * {s} :: mean({over})")
            add(f"O[{q},f] = {s} * {v} / sqrt(MS[{q}] + 0.001) :: sum({over})")
        case "mean":
            add(f"MS[{q}] = abs({s}) :: mean({over})")
            add(f"O[{q},f] = {s} / (1 + MS[{q}]) * {v} :: sum({over})")
        case "sum":
            add(f"SS[{q}] = sigmoid({s}) :: sum({over})")
            add(f"O[{q},f] = sigmoid({s}) * {v} / (1 + SS[{q}]) :: sum({over})")
        case "maxplus":
            add(f"GM[{q}] = {s} :: max({over})")
            add(f"O[{q},f] = {s} - GM[{q}] + {v} :: max({over})")
        case "ratio":
            add(f"SQ[{q}] = SN[{d}] * SN[{d}] :: sum({over})")
            add(f"NV[{q},f] = SN[{d}] * SN[{d}] * {v} :: sum({over})")
            add(f"O[{q},f] = NV[{q},f] / SQ[{q}] * SD[{q}] / (1 + SD[{q}])")
        case "spread":
            add(f"NV[{q},f] = SN[{d}] * {v} :: sum({over})")
            add(f"MU[{q},f] = NV[{q},f] / SD[{q}]")
            add(f"O[{q},f] = SN[{d}] * ({v} - MU[{q},f]) ** 2 / SD[{q}] :: sum({over})")
        case "plogp":
            add(f"SS[{q}] = SN[{d}] * ({s} - GM[{q}]) :: sum({over})")
            add(f"EN[{q}] = log(SD[{q}]) - SS[{q}] / SD[{q}]")
            add(f"O[{q},f] = SN[{d}] * {v} * (1 + max(EN[{q}], 0)) :: sum({over})")
        case "minmax":
            add(f"LO[{q}] = {s} :: min({over})")
            add(f"HI[{q}] = {s} :: max({over})")
            add(f"O[{q},f] = ({s} - LO[{q}]) / (HI[{q}] - LO[{q}] + 1) * {v} :: sum({over})")
        case "variance":
            add(f"MU[{q}] = {s} :: mean({over})")
            add(f"VA[{q}] = ({s} - MU[{q}]) ** 2 :: mean({over})")
            add(f"O[{q},f] = ({s} - MU[{q}]) * {v} / sqrt(VA[{q}] + 1) :: sum({over})")
        case "scaled":
            add(f"R[{q}] = {s} * {s} :: mean({over})")
            add(f"O[{q},f] = relu({s} / sqrt(R[{q}] + 1)) * {v} :: sum({over})")
        case "top":
            add(f"MU[{q}] = {s} :: mean({over})")
            add(f"TP[{q}] = relu({s} - MU[{q}]) :: max({over})")
            add(f"O[{q},f] = {s} * {v} / (1 + max(TP[{q}], 0)) :: sum({over})")
        case "threshold":
            add(f"A[{d}] = relu(SN[{d}] / SD[{q}] - 0.03)")
            add(f"O[{q},f] = A[{d}] * {v} :: sum({over})")
        case "tanh":
            add(f"A[{d}] = tanh(SN[{d}] / SD[{q}])")
            add(f"O[{q},f] = A[{d}] * {v} :: sum({over})")
        case "hinge":
            add(f"C[{q}] = {s} :: mean({over})")
            add(f"O[{q},f] = relu({s} - C[{q}]) * {v} :: sum({over})")
        case "temperature":
            add(f"C[{q}] = {s} * {s} :: mean({over})")
            add(f"O[{q},f] = sigmoid({s} / sqrt(1 + C[{q}])) * {v} :: sum({over})")
        case "centre":
            add(f"C[{q}] = {s} :: mean({over})")
            add(f"O[{q},f] = tanh({s} - C[{q}]) * {v} :: sum({over})")
        case _:
            raise AssertionError(kind)


def _epilogue(t: _Text, pick: Any, q: str) -> None:
    o = f"O[{q},f]"
    match pick(("none", "none", "none", "gate", "residual", "map")):
        case "gate":
            t.need(f"G[{q},f]")
            t.body.append(f"Y[{q},f] = sigmoid(G[{q},f]) * {o}")
        case "residual":
            t.need(f"X[{q},f]")
            t.body.append(f"Y[{q},f] = X[{q},f] + 0.5 * {o}")
        case "map":
            t.body.append(f"Y[{q},f] = tanh({o})")
        case _:
            t.outputs.append("O")
            return
    t.outputs.append("Y")


def _second(t: _Text, pick: Any, kind: str, q: str, k: str, over: str) -> None:
    s, add = f"S[{q},{over}]", t.body.append
    has_max, has_sum = any(b.startswith("GM[") for b in t.body), any(b.startswith("SD[") for b in t.body)
    options = ["moment", "values"]
    options += ["maximum"] if has_max else []
    options += ["lse", "lse", "average"] if has_sum and kind not in ("double", "sharp", "sink") else []
    match pick(options):
        case "moment":
            add(f"Z[{q}] = {s} * {s} :: mean({over})")
        case "values":
            t.need(f"W[{k}m,j]")
            add(f"Z[{q},j] = sigmoid({s}) * W[{k}m,j] :: sum({over})")
        case "maximum":
            add(f"Z[{q}] = GM[{q}]")
        case "lse":
            add(f"Z[{q}] = GM[{q}] + log(SD[{q}])")
        case "average":
            add(f"SX[{q}] = SN[{q},{over}] * {s} :: sum({over})")
            add(f"Z[{q}] = SX[{q}] / SD[{q}]")
    t.outputs.append(pick(("Z", "Z: float32")))
