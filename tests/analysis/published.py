"""Texts with the passes and levels that are known of them: the published cascades, and a case for each rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Published(NamedTuple):
    """A cascade over the rank M, with its passes and levels."""

    text: str
    passes: int
    levels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A text, the passes of some tensors over a rank, its levels, and the formula where steps add up."""

    text: str
    rank: str = "M"
    passes: Mapping[str, int] = field(default_factory=dict)
    levels: int
    formula: str = ""


QKV = "in Q[p,e] K[m,e] V[m,f]\nS[p,m] = Q[p,e] * K[m,e] :: sum(e)\n"
GLOBAL = QKV + "GM[p] = S[p,m] :: max(m)\nSN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = SN[p,m] :: sum(m)\n"
LOCAL = """in Q[p,e] K[m,e] V[m,f]
rank m0 = 4
rank m1 = (M+M0-1)//M0
constraint m1*M0+m0 < M
S[m1,m0,p] = Q[p,e] * K[m1*M0+m0,e] :: sum(e)
LM[m1,p] = S[m1,m0,p] :: max(m0)
SLN[m1,m0,p] = exp(S[m1,m0,p] - LM[m1,p])
SLD[m1,p] = SLN[m1,m0,p] :: sum(m0)
GM[p] = LM[m1,p] :: max(m1)
PLM[m1,p] = exp(LM[m1,p] - GM[p])
SD[p] = SLD[m1,p] * PLM[m1,p] :: sum(m1)
"""
RUNNING = """in Q[p,e] K[m,e] V[m,f]
rank m0 = 4
rank m1 = (M+M0-1)//M0
constraint m1*M0+m0 < M, m1*M0+m0 <= p
init RM[0,p] = -inf
init RD[0,p] = 0
init RNV[0,p,f] = 0
iter m1:
 S[m1,m0,p] = Q[p,e] * K[m1*M0+m0,e] :: sum(e)
 LM[m1,p] = S[m1,m0,p] :: max(m0)
 RM[m1+1,p] = max(RM[m1,p], LM[m1,p])
 SLN[m1,m0,p] = exp(S[m1,m0,p] - RM[m1+1,p])
 SLD[m1,p] = SLN[m1,m0,p] :: sum(m0)
 SLNV[m1,p,f] = SLN[m1,m0,p] * V[m1*M0+m0,f] :: sum(m0)
 PRM[m1,p] = exp(RM[m1,p] - RM[m1+1,p])
 RD[m1+1,p] = PRM[m1,p] * RD[m1,p] + SLD[m1,p]
 RNV[m1+1,p,f] = PRM[m1,p] * RNV[m1,p,f] + SLNV[m1,p,f]
end
AV[p,f] = RNV[M1,p,f] / RD[M1,p]
out AV
"""
RUNNING_A = RUNNING + "A[m1,m0,p] = SLN[m1,m0,p] * exp(RM[m1+1,p] - RM[M1,p]) / RD[M1,p]\nout A\n"
NORM = "in X[n,m] W[m,f]\n"
BACKWARD = """in Q[p,e] K[m,e] V[m,f] DO[p,f] LSE[p]{extra}
P1[p,m] = exp(QK[p,m] - LSE[p])
DP[p,m] = DO[p,f] * V[m,f] :: sum(f)
{delta}DS[p,m] = P1[p,m] * (DP[p,m] - D[p])
DQ[p,e] = DS[p,m] * K[m,e] :: sum(m)
out DQ
"""
BACKWARD_S = "\nQK[p,m] = Q[p,e] * K[m,e] :: sum(e)"
WELFORD = (
    NORM
    + """init MU[n,0] = 0
init M2[n,0] = 0
iter m:
 DE[n,m] = X[n,m] - MU[n,m]
 MU[n,m+1] = MU[n,m] + DE[n,m] / (m + 1)
 M2[n,m+1] = M2[n,m] + DE[n,m] * (X[n,m] - MU[n,m+1])
end
Y[n,m] = (X[n,m] - MU[n,M]) / sqrt(M2[n,M] / M)
out Y
"""
)

PUBLISHED: Mapping[str, Published] = {
    "cascade 1": Published("in A[m] B[m]\nY = A[m] * B[m]\nZ = Y * A[m]\nout Z", 2, 2),
    "cascade 2": Published("in A[m] B[m]\nY = A[m] * B[m]\nX = A[m] :: sum(m)\nZ = Y * X\nout Z", 1, 1),
    "cascade 3": Published(
        "in A[m] B[m]\ninit RY[0] = 0\ninit RZ[0] = 0\niter m:\nRY[m+1] = RY[m] + A[m] * B[m]\n"
        "RZ[m+1] = RZ[m] * RY[m+1] / RY[m] + RY[m+1] * A[m]\nend\nZ = RZ[M] * 1\nout Z",
        1,
        1,
    ),
    "other tensor": Published("in A[m] B[m]\nY = A[m] :: sum(m)\nZ = Y * B[m]\nout Z", 1, 2),
    "no max, immediate": Published(
        QKV + "N[p,m] = exp(S[p,m])\nD[p] = N[p,m] :: sum(m)\nA[p,m] = N[p,m] / D[p]\nO[p,f] = A[p,m] * V[m,f]\nout O",
        2,
        2,
    ),
    "no max, deferred": Published(
        QKV + "N[p,m] = exp(S[p,m])\nD[p] = N[p,m] :: sum(m)\nO[p,f] = N[p,m] * V[m,f]\n"
        "AV[p,f] = O[p,f] / D[p]\nout AV",
        1,
        1,
    ),
    "global max, immediate": Published(GLOBAL + "A[p,m] = SN[p,m] / SD[p]\nAV[p,f] = A[p,m] * V[m,f]\nout AV", 3, 3),
    "global max, deferred": Published(GLOBAL + "NV[p,f] = SN[p,m] * V[m,f]\nAV[p,f] = NV[p,f] / SD[p]\nout AV", 2, 2),
    "local max, immediate": Published(
        LOCAL + "SN[m1,m0,p] = SLN[m1,m0,p] * PLM[m1,p]\nA[m1,m0,p] = SN[m1,m0,p] / SD[p]\n"
        "AV[p,f] = A[m1,m0,p] * V[m1*M0+m0,f]\nout AV",
        2,
        2,
    ),
    "local max, deferred": Published(
        LOCAL + "LNV[m1,p,f] = SLN[m1,m0,p] * V[m1*M0+m0,f] :: sum(m0)\n"
        "NV[p,f] = LNV[m1,p,f] * PLM[m1,p]\nAV[p,f] = NV[p,f] / SD[p]\nout AV",
        1,
        1,
    ),
    "running max": Published(RUNNING, 1, 1),
    "running max, weights out": Published(RUNNING_A, 2, 2),
    "sigmoid": Published(QKV + "W[p,m] = sigmoid(S[p,m])\nO[p,f] = W[p,m] * V[m,f]\nout O", 1, 1),
    "linear": Published(
        "in Q[m,e] K[m,e] V[m,f]\ninit S[0,e,f] = 0\niter m:\nS[m+1,e,f] = S[m,e,f] + K[m,e] * V[m,f]\n"
        "O[m,f] = Q[m,e] * S[m+1,e,f]\nend\nout O",
        1,
        1,
    ),
    "LayerNorm": Published(
        NORM + "MU[n] = X[n,m] :: mean(m)\nVA[n] = (X[n,m] - MU[n]) * (X[n,m] - MU[n]) :: mean(m)\n"
        "Y[n,m] = (X[n,m] - MU[n]) / sqrt(VA[n])\nout Y",
        3,
        3,
    ),
    "LayerNorm, E[x2]": Published(
        NORM + "MU[n] = X[n,m] :: mean(m)\nX2[n] = X[n,m] * X[n,m] :: mean(m)\n"
        "Y[n,m] = (X[n,m] - MU[n]) / sqrt(X2[n] - MU[n] * MU[n])\nout Y",
        2,
        2,
    ),
    "LayerNorm, Welford": Published(WELFORD, 2, 2),
    "RMSNorm": Published(NORM + "X2[n] = X[n,m] * X[n,m] :: mean(m)\nY[n,m] = X[n,m] / sqrt(X2[n])\nout Y", 2, 2),
    "RMSNorm and GEMM": Published(
        NORM + "X2[n] = X[n,m] * X[n,m] :: mean(m)\nY[n,m] = X[n,m] / sqrt(X2[n])\nZ[n,f] = Y[n,m] * W[m,f]\nout Z",
        2,
        2,
    ),
    "RMSNorm and GEMM, deferred": Published(
        NORM + "X2[n] = X[n,m] * X[n,m] :: mean(m)\nG[n,f] = X[n,m] * W[m,f]\nZ[n,f] = G[n,f] / sqrt(X2[n])\nout Z",
        1,
        1,
    ),
    "backward, D given": Published(BACKWARD.format(extra=" D[p]" + BACKWARD_S, delta=""), 1, 1),
    "backward, D inside": Published(
        BACKWARD.format(extra=BACKWARD_S, delta="D[p] = P1[p,m] * DP[p,m] :: sum(m)\n"), 2, 2
    ),
}

INDEXED = "in A[m] TAB[m] W[m,j]\nrank j = M\nB[m] = exp(A[m])\n{}\nout C"
RECURRENCE = "in X[t]\ninit F[0] = 0\niter t:\nF[t+1] = F[t] + X[t]\nend\n"
BISECTION = (
    QKV
    + """GM[p] = S[p,m] :: max(m)
rank n = 30
init LO[0,p] = GM[p] - 1
iter n:
 TS[n,p] = relu(S[p,m] - LO[n,p]) :: sum(m)
 LO[n+1,p] = select(TS[n,p] >= 1, LO[n,p] + 0.5, LO[n,p])
end
W[p,m] = relu(S[p,m] - LO[N,p])
out W"""
)
DELTA = """in K[t,e] V[t,f]
init S[0,e,f] = 0
iter t:
PR[t,f] = K[t,e] * S[t,e,f] :: sum(e)
S[t+1,e,f] = S[t,e,f] + K[t,e] * (V[t,f] - PR[t,f])
end
out S"""
SINKHORN = """in X[m,p]
R[m] = X[m,p] :: sum(p)
A[m,p] = X[m,p] / R[m]
C[p] = A[m,p] :: sum(m)
B[m,p] = A[m,p] / C[p]
out B"""
SELF = """in X[m,e]
rank p = M
S[p,m] = X[p,e] * X[m,e] :: sum(e)
G[p] = S[p,m] :: max(m)
N[p,m] = exp(S[p,m] - G[p])
O[p,e] = N[p,m] * X[m,e]
out O"""


def _indexed(tail: str, passes: int, levels: int) -> Example:
    return Example(text=INDEXED.format(tail), passes={"A": passes}, levels=levels)


EXAMPLES: Mapping[str, Example] = {
    "read in place": _indexed("C = B[m] * A[m]", 1, 1),
    "read before": _indexed("C = B[m-1] * A[m]", 1, 1),
    "read ahead": _indexed("C = B[m+2] * A[m]", 1, 1),
    "the first": _indexed("C = B[0] * A[m]", 1, 1),
    # Read from the last element down, it is known first.
    "the last": _indexed("C = B[M-1] * A[m]", 1, 1),
    "reversed": _indexed("C = B[M-1-m] * A[m]", 2, 2),
    "gathered": _indexed("C = B[TAB[m]] * A[m]", 2, 2),
    "a prefix": _indexed("D[m] = B[j] :: sum(j) where j <= m\nC = D[m] * A[m] :: sum(m)", 1, 1),
    "all of another rank": _indexed("D[m] = B[j] * W[m,j] :: sum(j)\nC = D[m] * A[m] :: sum(m)", 2, 2),
    "two recurrences": Example(
        text=RECURRENCE + "init G[0] = 0\niter t:\nG[t+1] = G[t] + F[t+1] * X[t]\nend\nout G",
        rank="T",
        passes={"X": 1},
        levels=1,
    ),
    "two recurrences, one descending": Example(
        text=RECURRENCE + "init G[T] = 0\niter t desc:\nG[t] = G[t+1] + F[t+1] * X[t]\nend\nout G",
        rank="T",
        passes={"X": 2},
        levels=2,
    ),
    "bisection": Example(text=BISECTION, levels=3, formula="2 + N"),
    "delta rule, steps": Example(text=DELTA, rank="T", passes={"K": 1}, levels=1),
    "delta rule, keys": Example(text=DELTA, rank="E", passes={"K": 2}, levels=2),
    "Sinkhorn, rows": Example(text=SINKHORN, passes={"X": 2}, levels=2),
    "Sinkhorn, columns": Example(text=SINKHORN, rank="P", passes={"X": 2}, levels=2),
    "queries and keys of one tensor": Example(text=SELF, passes={"X": 2}, levels=2),
}
