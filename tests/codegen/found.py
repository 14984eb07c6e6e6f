"""Cases that once came out wrong, and what they broke."""

from __future__ import annotations

from tests.strategies import Case

SOFTMAX = """\
in Q[p,e], K[m,e], V[m,f]
{constraints}
S[p,m] = Q[p,e] * K[m,e] :: sum(e)
GM[p] = S[p,m] :: max(m)
SN[p,m] = exp(S[p,m] - GM[p])
SD[p] = SN[p,m] :: sum(m)
NV[p,f] = SN[p,m] * V[m,f] :: sum(m)
O[p,f] = NV[p,f] / SD[p]
Z[p] = GM[p] + log(SD[p])
out O, Z: float32
"""


def softmax(*constraints: str, **extents: int) -> Case:
    text = SOFTMAX.format(constraints="\n".join(f"constraint {c}" for c in constraints))
    return Case(text=text, extents={"P": 33, "M": 47, "E": 8, "F": 8, **extents}, tiles=(16, 16, 16, 16))


# A tensor and an extent of one name are two parameters.
CLASH = Case(
    text="in Q[g,p,e], K[g,m,e], V[g,m,f], G[g,p,f]\nS[g,p,m] = Q[g,p,e] * K[g,m,e] :: sum(e)\n"
    "O[g,p,f] = G[g,p,f] * sigmoid(S[g,p,m]) * V[g,m,f] :: sum(m)\nout O\n",
    extents={"G": 2, "P": 17, "M": 13, "E": 3, "F": 3},
)
# A mask on the outer of two key ranks must not cull the update of a state.
PAIR = Case(
    text="in Q[p,e], K[m,e], K2[n,e], V[m,f], V2[n,f]\nconstraint m <= p, n <= p\n"
    "S[p,m,n] = Q[p,e] * K[m,e] * K2[n,e] :: sum(e)\nGM[p] = S[p,m,n] :: max(m,n)\n"
    "SN[p,m,n] = exp(S[p,m,n] - GM[p])\nSD[p] = SN[p,m,n] :: sum(m,n)\n"
    "O[p,f] = SN[p,m,n] * V[m,f] * V2[n,f] / SD[p] :: sum(m,n)\nout O\n",
    extents={"P": 7, "M": 13, "N": 3, "E": 3, "F": 3},
)
# A scaled maximum read by a second loop.
SOFTCAP = Case(
    text="in Q[p,e], K[m,e], V[m,f]\nQK[p,m] = Q[p,e] * K[m,e] :: sum(e)\nS[p,m] = 20 * tanh(QK[p,m] / 20)\n"
    "GM[p] = S[p,m] :: max(m)\nSN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = SN[p,m] :: sum(m)\n"
    "O[p,f] = tanh(SN[p,m] / SD[p]) * V[m,f] :: sum(m)\nout O\n",
    extents={"P": 17, "M": 37, "E": 3, "F": 3},
)
# A correction that is 1 only up to rounding drifts with the number of tiles.
DRIFT = Case(
    text="in Q[p,e], K[m,e], K2[n,e], V[m,f], V2[n,f]\nQK[p,m,n] = Q[p,e] * K[m,e] * K2[n,e] :: sum(e)\n"
    "S[p,m,n] = QK[p,m,n] + 0.5\nGM[p] = S[p,m,n] :: max(m,n)\nSN[p,m,n] = exp(S[p,m,n] - GM[p])\n"
    "S2[p] = SN[p,m,n] * SN[p,m,n] :: sum(m,n)\n"
    "O[p,f] = SN[p,m,n] * V[m,f] * V2[n,f] / sqrt(S2[p]) :: sum(m,n)\nout O\n",
    extents={"P": 13, "M": 13, "N": 1, "E": 1, "F": 17},
    seed=55352,
    spread=4.0,
)
# A maximum that leaves another one is taken from a sum that was rounded in its own unit.
CANCELLED = Case(
    text="in Q[b,p,e], K[b,m,e], V[b,m,f]\nconst scale = E ** -0.5\nQK[b,p,m] = scale * Q[b,p,e] * K[b,m,e]\n"
    "S[b,p,m] = 20 * tanh(QK[b,p,m] / 20)\nGM[b,p] = S[b,p,m] :: max(m)\n"
    "O[b,p,f] = S[b,p,m] - GM[b,p] + V[b,m,f] :: max(m)\nout O\n",
    extents={"B": 2, "P": 13, "E": 8, "M": 1, "F": 17},
    seed=56921,
    tiles=(16, 64, 64, 32),
    spread=4.0,
)
# Row statistics that are single numbers meet a block: no query rank at all.
ROW = Case(
    text="in Q[b,e], K[b,m,e], LEN, V[b,m,f]\nconstraint m < LEN\nS[b,m] = Q[b,e] * K[b,m,e] :: sum(e)\n"
    "GM[b] = S[b,m] :: max(m)\nO[b,f] = S[b,m] - GM[b] + V[b,m,f] :: max(m)\nout O\n",
    extents={"B": 2, "M": 13, "E": 20, "F": 1},
    tiles=(32, 16),
)
# An operator that hides the reference from algebra.
HIDDEN = Case(
    text="in Q[p,e], K[m,e], V[m,f]\nS[p,m] = Q[p,e] * K[m,e] :: sum(e)\nGM[p] = S[p,m] :: mean(m)\n"
    "O[p,f] = lrelu(S[p,m] - GM[p]) * V[m,f] :: sum(m)\nout O\n",
    extents={"P": 17, "M": 37, "E": 3, "F": 3},
    tiles=(16,),
)
# An exponent whose factor is negative: the first reference is infinite.
COLD = Case(
    text="in Q[p,e], K[m,e], V[m,f], T[p]\nS[p,m] = Q[p,e] * K[m,e] :: sum(e)\nGM[p] = S[p,m] :: min(m)\n"
    "SN[p,m] = exp(GM[p] - S[p,m])\nSD[p] = SN[p,m] :: sum(m)\n"
    "O[p,f] = SN[p,m] * V[m,f] / SD[p] :: sum(m)\nout O\n",
    extents={"P": 17, "M": 37, "E": 3, "F": 3},
    tiles=(16,),
)
# Tiles of one key: a condition over the index alone is a single truth value.
SINGLE = Case(
    text=SOFTMAX.format(constraints="constraint m % 3 == 0"), extents={"P": 5, "M": 7, "E": 3, "F": 3}, tiles=(4, 1)
)
FOUND = {
    "single": SINGLE,
    "clash": CLASH,
    "pair": PAIR,
    "softcap": SOFTCAP,
    "drift": DRIFT,
    "cancelled": CANCELLED,
    "row": ROW,
    "hidden": HIDDEN,
    "cold": COLD,
}
