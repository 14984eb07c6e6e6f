"""Passes and levels: the published cascades, the rules one by one, and an oracle that expands every element."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einsumcascade.analysis.dependence import ancestors, carries, linear, partitions, producers, whole_ranks
from einsumcascade.analysis.passes import count_passes
from einsumcascade.errors import UnknownRankError
from einsumcascade.language.ir import Cascade, Einsum, reads, variables
from einsumcascade.language.parser import parse

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

TABLE = {
    "cascade 1": ("in A[m] B[m]\nY = A[m] * B[m]\nZ = Y * A[m]\nout Z", 2, 2),
    "cascade 2": ("in A[m] B[m]\nY = A[m] * B[m]\nX = A[m] :: sum(m)\nZ = Y * X\nout Z", 1, 1),
    "cascade 3": (
        "in A[m] B[m]\ninit RY[0] = 0\ninit RZ[0] = 0\niter m:\nRY[m+1] = RY[m] + A[m] * B[m]\n"
        "RZ[m+1] = RZ[m] * RY[m+1] / RY[m] + RY[m+1] * A[m]\nend\nZ = RZ[M] * 1\nout Z",
        1,
        1,
    ),
    "other tensor": ("in A[m] B[m]\nY = A[m] :: sum(m)\nZ = Y * B[m]\nout Z", 1, 2),
    "no max, immediate": (
        QKV + "N[p,m] = exp(S[p,m])\nD[p] = N[p,m] :: sum(m)\nA[p,m] = N[p,m] / D[p]\nO[p,f] = A[p,m] * V[m,f]\nout O",
        2,
        2,
    ),
    "no max, deferred": (
        QKV + "N[p,m] = exp(S[p,m])\nD[p] = N[p,m] :: sum(m)\nO[p,f] = N[p,m] * V[m,f]\n"
        "AV[p,f] = O[p,f] / D[p]\nout AV",
        1,
        1,
    ),
    "global max, immediate": (GLOBAL + "A[p,m] = SN[p,m] / SD[p]\nAV[p,f] = A[p,m] * V[m,f]\nout AV", 3, 3),
    "global max, deferred": (GLOBAL + "NV[p,f] = SN[p,m] * V[m,f]\nAV[p,f] = NV[p,f] / SD[p]\nout AV", 2, 2),
    "local max, immediate": (
        LOCAL + "SN[m1,m0,p] = SLN[m1,m0,p] * PLM[m1,p]\nA[m1,m0,p] = SN[m1,m0,p] / SD[p]\n"
        "AV[p,f] = A[m1,m0,p] * V[m1*M0+m0,f]\nout AV",
        2,
        2,
    ),
    "local max, deferred": (
        LOCAL + "LNV[m1,p,f] = SLN[m1,m0,p] * V[m1*M0+m0,f] :: sum(m0)\n"
        "NV[p,f] = LNV[m1,p,f] * PLM[m1,p]\nAV[p,f] = NV[p,f] / SD[p]\nout AV",
        1,
        1,
    ),
    "running max": (RUNNING, 1, 1),
    "running max, weights out": (RUNNING_A, 2, 2),
    "sigmoid": (QKV + "W[p,m] = sigmoid(S[p,m])\nO[p,f] = W[p,m] * V[m,f]\nout O", 1, 1),
    "linear": (
        "in Q[m,e] K[m,e] V[m,f]\ninit S[0,e,f] = 0\niter m:\nS[m+1,e,f] = S[m,e,f] + K[m,e] * V[m,f]\n"
        "O[m,f] = Q[m,e] * S[m+1,e,f]\nend\nout O",
        1,
        1,
    ),
    "LayerNorm": (
        NORM + "MU[n] = X[n,m] :: mean(m)\nVA[n] = (X[n,m] - MU[n]) * (X[n,m] - MU[n]) :: mean(m)\n"
        "Y[n,m] = (X[n,m] - MU[n]) / sqrt(VA[n])\nout Y",
        3,
        3,
    ),
    "LayerNorm, E[x2]": (
        NORM + "MU[n] = X[n,m] :: mean(m)\nX2[n] = X[n,m] * X[n,m] :: mean(m)\n"
        "Y[n,m] = (X[n,m] - MU[n]) / sqrt(X2[n] - MU[n] * MU[n])\nout Y",
        2,
        2,
    ),
    "LayerNorm, Welford": (WELFORD, 2, 2),
    "RMSNorm": (NORM + "X2[n] = X[n,m] * X[n,m] :: mean(m)\nY[n,m] = X[n,m] / sqrt(X2[n])\nout Y", 2, 2),
    "RMSNorm and GEMM": (
        NORM + "X2[n] = X[n,m] * X[n,m] :: mean(m)\nY[n,m] = X[n,m] / sqrt(X2[n])\nZ[n,f] = Y[n,m] * W[m,f]\nout Z",
        2,
        2,
    ),
    "RMSNorm and GEMM, deferred": (
        NORM + "X2[n] = X[n,m] * X[n,m] :: mean(m)\nG[n,f] = X[n,m] * W[m,f]\nZ[n,f] = G[n,f] / sqrt(X2[n])\nout Z",
        1,
        1,
    ),
    "backward, D given": (BACKWARD.format(extra=" D[p]" + BACKWARD_S, delta=""), 1, 1),
    "backward, D inside": (BACKWARD.format(extra=BACKWARD_S, delta="D[p] = P1[p,m] * DP[p,m] :: sum(m)\n"), 2, 2),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_published_cascades_holds(name: str) -> None:
    text, passes, levels = TABLE[name]
    found = count_passes(parse(text), rank="M")
    assert (found.passes, found.levels) == (passes, levels)
    assert {b.boundary for b in found.barriers} == set(range(1, passes))
    assert found.summary_traversals == int(name.startswith("local max"))


def test_a_barrier_names_the_einsum_that_completes_and_the_one_that_waits() -> None:
    found = count_passes(parse(TABLE["global max, immediate"][0]), rank="M")
    assert [(b.boundary, b.producer, b.reader) for b in found.barriers] == [(1, "GM", "SN"), (2, "SD", "A")]
    assert str(found.barriers[0]) == "SN waits for GM: it reads GM[p], complete only after all of M"
    assert dict(found.level_of) == {"S": 1, "GM": 1, "SN": 2, "SD": 2, "A": 3, "AV": 3}


def test_a_barrier_behind_maps_names_the_reduction() -> None:
    text = QKV + "T[p] = S[p,m] :: max(m)\nG[p] = max(T[p], 0)\nN[p,m] = exp(S[p,m] - G[p])\nout N"
    (barrier,) = count_passes(parse(text), rank="M").barriers
    assert str(barrier) == "N waits for T: it reads G[p], which needs T, complete only after all of M"


def test_a_loop_over_tiles_is_a_summary_and_no_pass() -> None:
    found = count_passes(parse(TABLE["local max, deferred"][0]), rank="M")
    assert (found.passes, found.summary_traversals, found.parts) == (1, 1, ("M1", "M0"))
    assert found.summaries == ("PLM", "SD", "NV")


def test_an_einsum_over_the_whole_rank_waits_for_a_summary() -> None:
    found = count_passes(parse(LOCAL + "SN[m1,m0,p] = SLN[m1,m0,p] * PLM[m1,p]\nout SN"), rank="M")
    assert [(b.producer, b.reader) for b in found.barriers] == [("GM", "SN")]


def test_families_tell_what_each_tensor_costs() -> None:
    found = count_passes(parse(TABLE["global max, immediate"][0]), rank="M")
    assert dict(found.families) == {"K": 3, "V": 1, "S": 3, "SN": 2, "A": 1}


@pytest.mark.parametrize(
    ("tail", "passes"),
    [
        ("C = B[m] * A[m]", 1),
        ("C = B[m-1] * A[m]", 1),
        ("C = B[m+2] * A[m]", 1),
        ("C = B[0] * A[m]", 1),
        ("C = B[M-1] * A[m]", 2),
        ("C = B[M-1-m] * A[m]", 2),
        ("C = B[TAB[m]] * A[m]", 2),
        ("D[m] = B[j] :: sum(j) where j <= m\nC = D[m] * A[m] :: sum(m)", 1),
        ("D[m] = B[j] * W[m,j] :: sum(j)\nC = D[m] * A[m] :: sum(m)", 2),
    ],
)
def test_an_index_decides_whether_a_read_waits(tail: str, passes: int) -> None:
    cascade = parse(f"in A[m] TAB[m] W[m,j]\nrank j = M\nB[m] = exp(A[m])\n{tail}\nout C")
    assert dict(count_passes(cascade, rank="M").families)["A"] == passes


def test_two_recurrences_in_opposite_directions_are_two_passes() -> None:
    text = "in X[t]\ninit F[0] = 0\niter t:\nF[t+1] = F[t] + X[t]\nend\ninit G[0] = 0\n"
    text += "iter t{}:\nG[t+1] = G[t] + F[t+1] * X[t]\nend\nout G"
    assert count_passes(parse(text.format("")), rank="T").passes == 1
    assert count_passes(parse(text.format(" desc")), rank="T").passes == 2


def test_a_loop_that_traverses_the_same_fiber_counts_by_the_step() -> None:
    text = (
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
    found = count_passes(parse(text), rank="M")
    assert (found.formula, found.level_formula, found.at({"N": 30})) == ("2 + N", "2 + N", 32)


def test_a_step_on_fibers_of_its_own_does_not_add_up() -> None:
    text = "in K[t,e] V[t,f]\ninit S[0,e,f] = 0\niter t:\nPR[t,f] = K[t,e] * S[t,e,f] :: sum(e)\n"
    text += "S[t+1,e,f] = S[t,e,f] + K[t,e] * (V[t,f] - PR[t,f])\nend\nout S"
    assert [count_passes(parse(text), rank=r).formula for r in ("T", "E", "F")] == ["1", "2", "1"]


def test_sinkhorn_is_two_passes_over_either_rank() -> None:
    cascade = parse(
        "in X[m,p]\nR[m] = X[m,p] :: sum(p)\nA[m,p] = X[m,p] / R[m]\nC[p] = A[m,p] :: sum(m)\n"
        "B[m,p] = A[m,p] / C[p]\nout B"
    )
    assert [count_passes(cascade, rank=r).passes for r in ("M", "P")] == [2, 2]


def test_the_queries_and_keys_of_one_tensor_do_not_wait_for_each_other() -> None:
    cascade = parse(
        "in X[m,e]\nrank p = M\nS[p,m] = X[p,e] * X[m,e] :: sum(e)\nG[p] = S[p,m] :: max(m)\n"
        "N[p,m] = exp(S[p,m] - G[p])\nO[p,e] = N[p,m] * X[m,e]\nout O"
    )
    assert count_passes(cascade, rank="M").passes == 2


def test_an_unknown_rank_is_an_error_that_lists_the_ranks() -> None:
    with pytest.raises(UnknownRankError) as caught:
        count_passes(parse(TABLE["cascade 1"][0]), rank="N")
    assert str(caught.value) == (
        "UnknownRankError[unknown-rank]: the cascade 'cascade' has no rank 'N'\n"
        "   = rule: ranks are named in upper case; known: M\n"
        "   = docs/errors.md#unknown-rank"
    )
    with pytest.raises(UnknownRankError, match="did you mean 'M'"):
        count_passes(parse(TABLE["cascade 1"][0]), rank="m")


def test_partitions_are_found_from_exact_affine_reads() -> None:
    nested = parse("in X[m]\nrank a = 2\nrank b = 3\nrank c = M//6\nY[c,b,a] = X[(c*B+b)*A+a] * 1\nout Y")
    assert partitions(nested)["m"].parts == ("c", "b", "a")
    window = parse("in X[m]\nrank j = 3\nrank t = M//2\nY[t] = X[t*2+j] :: max(j)\nout Y")
    assert partitions(window)["m"].parts == ()
    assert whole_ranks(parse(LOCAL + "out SD")) == ("p", "e", "m", "f")


def test_dependence_helpers_follow_reads() -> None:
    cascade = parse(RUNNING)
    assert list(producers(cascade))[:2] == ["S", "LM"]
    assert "K" in ancestors(cascade, "AV") and "RM" in ancestors(cascade, "RM")
    assert "AV" not in ancestors(cascade, "AV")
    index = next(r for r in reads(producers(cascade)["S"].expr) if r.tensor == "K").indices[0]
    assert carries(index, "m1") and not carries(index, "p")
    assert [(t.variable, t.factors) for t in linear(index) or ()] == [("m1", ("M0",)), ("m0", ())]


SIZES = {"m": 3, "p": 2}


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """Draw a cascade of maps and reductions over the ranks m and p."""
    shapes: dict[str, str] = {"A": "m", "B": draw(st.sampled_from(["m", "mp", "p"])), "C": "mp"}
    lines = ["in " + " ".join(f"{t}[{','.join(s)}]" for t, s in shapes.items())]
    for k in range(draw(st.integers(1, 7))):
        used = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=3, unique=True))
        space = "".join(v for v in "mp" if any(v in shapes[t] for t in used))
        kept = "".join(v for v in space if draw(st.booleans()))
        text = " * ".join(t + (f"[{','.join(shapes[t])}]" if shapes[t] else "") for t in used)
        left = f"T{k}" + (f"[{','.join(kept)}]" if kept else "")
        gone = [v for v in space if v not in kept]
        lines.append(f"{left} = exp({text})" + (f" :: max({','.join(gone)})" if gone else ""))
        shapes[f"T{k}"] = kept
    return parse("\n".join([*lines, f"out T{k}"]))


def points(e: Einsum, sizes: dict[str, int]) -> list[dict[str, int]]:
    return [dict(zip(e.space, c, strict=True)) for c in product(*(range(sizes[v]) for v in e.space))]


def element(tensor: str, names: tuple[str, ...], at: dict[str, int]) -> tuple[object, ...]:
    return (tensor, *(at[v] for v in names))


def reads_family(e: Einsum, family: set[str]) -> bool:
    return any(r.tensor in family and "m" in variables(r) for r in reads(e.expr))


def family_of(cascade: Cascade, tensor: str) -> set[str]:
    family = {tensor}
    for e in cascade.einsums:
        if "m" in e.free and reads_family(e, family):
            family.add(e.tensor)
    return family


def passes_by_definition(cascade: Cascade, tensor: str) -> int:
    """The paper's sentence: a read that must wait for every read of an earlier traversal is one traversal later."""
    family = family_of(cascade, tensor)
    seen: dict[tuple[object, ...], dict[int, set[int]]] = {}
    count = 0
    for e in cascade.einsums:
        for at in points(e, SIZES):
            known: dict[int, set[int]] = {}
            for r in reads(e.expr):
                for n, coordinates in seen.get(element(r.tensor, variables(r), at), {}).items():
                    known.setdefault(n, set()).update(coordinates)
            if reads_family(e, family):
                ended = [n for n, coordinates in known.items() if len(coordinates) == SIZES["m"]]
                traversal = 1 + max(ended, default=0)
                known.setdefault(traversal, set()).add(at["m"])
                count = max(count, traversal)
            into = seen.setdefault(element(e.tensor, e.free, at), {})
            for n, coordinates in known.items():
                into.setdefault(n, set()).update(coordinates)
    return count


def passes_by_simulation(cascade: Cascade, tensor: str) -> int:
    """Traverse the fiber again and again, doing all that can be done at each element.

    The last element of a traversal may run ahead into the next; the fiber is long, so that this never adds up to one.
    """
    length = 12
    family = family_of(cascade, tensor)
    work = [(e, at) for e in cascade.einsums for at in points(e, {"m": length, "p": 1})]
    writes: dict[tuple[object, ...], set[int]] = {}
    for k, (e, at) in enumerate(work):
        writes.setdefault(element(e.tensor, e.free, at), set()).add(k)

    needs = [
        set().union(*(writes.get(element(r.tensor, variables(r), at), set()) for r in reads(e.expr))) for e, at in work
    ]
    places = [at["m"] if reads_family(e, family) else None for e, at in work]

    def settle(done: set[int], here: int | None) -> None:
        before = -1
        while len(done) > before:
            before = len(done)
            done |= {k for k in range(len(work)) if places[k] in (None, here) and needs[k] <= done}

    done: set[int] = set()
    settle(done, None)
    traversals = 0
    while len(done) < len(work):
        traversals += 1
        for here in range(length):
            settle(done, here)
    return traversals


@settings(max_examples=300, deadline=None)
@given(cascades())
def test_the_sweep_agrees_with_the_definition_element_by_element(cascade: Cascade) -> None:
    for tensor in ("A", "C"):
        expected = passes_by_definition(cascade, tensor)
        found = dict(count_passes(cascade, rank="M").families)[tensor]
        # A tensor that is read without being traversed counts one all the same.
        assert max(1, found) == max(1, expected), f"{tensor} in\n{cascade}"


@settings(max_examples=100, deadline=None)
@given(cascades())
def test_traversing_greedily_takes_exactly_the_passes(cascade: Cascade) -> None:
    found = dict(count_passes(cascade, rank="M").families)["C"]
    assert max(1, passes_by_simulation(cascade, "C")) == max(1, found), str(cascade)


@settings(max_examples=100, deadline=None)
@given(cascades())
def test_levels_are_at_least_the_passes(cascade: Cascade) -> None:
    for rank in ("M", "P"):
        found = count_passes(cascade, rank=rank)
        assert found.passes <= found.levels
        assert {b.boundary for b in found.level_barriers} == set(range(1, found.levels))
