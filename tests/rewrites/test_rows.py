"""What must stream does, with the dimension that an independent rank says; what cannot is told why and compiles."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch

from einsumcascade.codegen.plain import run_plain
from einsumcascade.language.ir import Apply, Cascade, Expr, Num, Read, Scalar, Var
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.reference.errorbound import EPS, conditioning, judge
from einsumcascade.rewrites.derive import derive
from einsumcascade.rewrites.monoid import running_state
from einsumcascade.rewrites.proofs import PRIME
from einsumcascade.rewrites.step import Claim
from einsumcascade.verify.verify import verify
from tests.rewrites.rows import ACCEPTED, MONOTONE, REJECTED, Accepted

EXTENTS = {"P": 5, "M": 21, "F": 3}
Array = np.ndarray


def draw(cascade: Cascade, *, seed: int = 0, **extents: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    sizes = {**EXTENTS, **extents}
    return {i.tensor: rng.standard_normal([sizes[v.upper()] for v in i.indices]) for i in cascade.inputs}


def claim_of(row: Accepted) -> Claim | None:
    derivation = derive(parse(row.text), division="deferred", rank="M", tile=4)
    found = [s.claim for s in derivation.steps if s.claim and s.what.startswith(f"{row.tensor} ")]
    return found[0] if found else None


def value(e: Expr, at: dict[str, mpmath.mpf]) -> mpmath.mpf:
    """Evaluate to 40 digits over one number for each tensor."""
    match e:
        case Num():
            return mpmath.mpf(e.value)
        case Read():
            return at[e.tensor]
        case Scalar() | Var():
            return at.get(e.name, mpmath.mpf(3))
        case Apply():
            args = [value(a, at) for a in e.args]
            mp = mpmath
            functions: dict[str, Callable[..., mpmath.mpf]] = {
                "add": lambda x, y: x + y,
                "sub": lambda x, y: x - y,
                "mul": lambda x, y: x * y,
                "div": lambda x, y: x / y,
                "neg": lambda x: -x,
                "pow": lambda x, y: x**y,
                "max": max,
                "relu": lambda x: max(x, mp.mpf(0)),
                "abs": abs,
                **{name: getattr(mp, name) for name in ("exp", "log", "sqrt", "tanh", "cos", "sin")},
            }
            return functions[e.op](*args)
    raise AssertionError(e)


def points(claim: Claim, seed: int) -> dict[str, mpmath.mpf]:
    """Random numbers for every tensor of a claim, positive where it says so, and for the next references."""
    rng = random.Random(seed)
    names = {r.tensor for b in claim.basis for r in _reads(b)} | {r.tensor for r in claim.references}
    positive = {r.tensor for e in (*claim.positive, *claim.nonnegative) for r in _reads(e)}
    out = {n: mpmath.mpf(rng.uniform(0.3, 2.0) if n in positive else rng.uniform(-2.0, 2.0)) for n in sorted(names)}
    for r in claim.references:
        low = 0.3 if r.tensor in positive else -2.0
        out[r.tensor + PRIME] = mpmath.mpf(rng.uniform(low, 2.0))
    return out


def _reads(e: Expr) -> tuple[Read, ...]:
    from einsumcascade.language.ir import reads

    return reads(e)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_must_stream_takes_one_pass_and_keeps_its_value(name: str) -> None:
    cascade = parse(ACCEPTED[name].text)
    derivation = derive(cascade, tile=4)
    assert all(after == 1 for _, after in derivation.passes.values())
    inputs = draw(cascade)
    found, want = run(derivation.cascade, inputs), run(cascade, inputs)
    for o in want:
        np.testing.assert_allclose(found[o], want[o], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, row in ACCEPTED.items() if row.n])
def test_the_dimension_is_the_rank_of_the_summand_and_c_moves_the_basis(name: str) -> None:
    row = ACCEPTED[name]
    claim = claim_of(row)
    assert claim is not None and len(claim.matrix) == row.n
    rng = np.random.default_rng(4)
    xs = rng.uniform(-2, 2, (12, row.x))
    lows = [0.3 if k in row.positive else -2.0 for k in range(row.d)]
    ds = np.array([[rng.uniform(low, 2) for low in lows] for _ in xs])
    table = np.array([[row.f(*x, *d) for d in ds] for x in xs])
    # Scaled to have a largest entry of 1, the rank of the table is that of the functions.
    assert np.linalg.matrix_rank(table / np.abs(table).max(), tol=1e-9) == row.n
    with mpmath.workdps(40):
        for seed in range(20):
            at = points(claim, seed)
            later = {**at, **{k.removesuffix(PRIME): v for k, v in at.items() if k.endswith(PRIME)}}
            for j, line in enumerate(claim.matrix):
                moved = mpmath.fsum(value(c, at) * value(b, at) for c, b in zip(line, claim.basis, strict=True))
                assert abs(moved - value(claim.basis[j], later)) < mpmath.mpf(10) ** -30


@pytest.mark.parametrize("name", [n for n, row in ACCEPTED.items() if row.n])
def test_changing_any_entry_of_c_or_its_sign_is_seen(name: str) -> None:
    claim = claim_of(ACCEPTED[name])
    assert claim is not None
    n = len(claim.matrix)
    with mpmath.workdps(40):
        at = points(claim, 1)
        later = {**at, **{k.removesuffix(PRIME): v for k, v in at.items() if k.endswith(PRIME)}}
        c = [[value(e, at) for e in line] for line in claim.matrix]
        b = [value(e, at) for e in claim.basis]
        want = [value(e, later) for e in claim.basis]
        for j, k in itertools.product(range(n), range(n)):
            for other in (c[j][k] + 1, -c[j][k]):
                if other == c[j][k]:
                    continue
                changed = sum((other if i == k else c[j][i]) * b[i] for i in range(n))
                assert abs(changed - want[j]) > mpmath.mpf(10) ** -10


@pytest.mark.parametrize("name", [n for n, row in ACCEPTED.items() if row.n == 0])
def test_what_depends_on_nothing_has_no_correction(name: str) -> None:
    assert claim_of(ACCEPTED[name]) is None


@pytest.mark.parametrize("name", MONOTONE)
def test_a_monotone_map_of_a_maximum_streams_without_a_correction(name: str) -> None:
    cascade = parse(MONOTONE[name])
    for culled in (cascade, cascade.constrain("m < p")):
        derivation = derive(culled, tile=4)
        assert all(after == 1 for _, after in derivation.passes.values())
        inputs = draw(culled)
        found, want = run(derivation.cascade, inputs), run(culled, inputs)
        np.testing.assert_allclose(found["O"], want["O"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", REJECTED)
def test_what_cannot_stream_is_told_why_by_its_part(name: str) -> None:
    text, part = REJECTED[name]
    derivation = derive(parse(text))
    (step,) = (s for s in derivation.steps if s.rule == "not streamed")
    assert step.proof[-1].startswith(part)
    if "select" not in part:
        assert set(step.proof[1].replace("|", "").strip()) == {"^"}
    assert derivation.passes["M"][1] == 2


@pytest.mark.parametrize("name", REJECTED)
def test_what_cannot_stream_is_compiled_as_more_passes_and_verifies(name: str) -> None:
    cascade = parse(REJECTED[name][0])
    found = verify(cascade, extents={"P": 9, "M": 37}, dtypes=("float32",))
    assert found.passed, str(found)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_must_stream_verifies_as_a_kernel(name: str) -> None:
    found = verify(parse(ACCEPTED[name].text), extents={"P": 9, "M": 37}, dtypes=("float32", "bfloat16"))
    assert found.passed, str(found)


CONDITIONS = ("", "m <= p", "m < p", "m >= 2 * p + 4")


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("kind", ["plain", "offset", "scores 400", "scores 10000", "minus infinity"])
def test_the_derived_form_holds_the_error_rule_in_float32(name: str, kind: str, condition: str) -> None:
    row = ACCEPTED[name]
    cascade = parse(row.text)
    cascade = cascade.constrain(condition) if condition else cascade
    # Enough outputs for the largest error of the plain formula to be one.
    inputs = draw(cascade, seed=2, P=24, M=77)
    scale = {"scores 400": 400.0, "scores 10000": 1e4}.get(kind)
    for t in inputs:
        if scale and t in ("S", "X"):
            inputs[t] = inputs[t] * scale
        if kind == "offset" and t in ("X", "V", "W"):
            inputs[t] = inputs[t] + 1e3
        if kind == "minus infinity" and t in row.scores:
            inputs[t][:, ::3] = -math.inf
            inputs[t][1] = -math.inf
    if name == "cosine" and scale:
        # The cosine of a number known to 1e-3 is known to 1e-3: the rule allows for it, but not for each key alike.
        inputs["X"] = inputs["X"] / scale
    tensors = {t: torch.from_numpy(x).float() for t, x in inputs.items()}
    arrays = {t: x.double().numpy() for t, x in tensors.items()}
    want = run(cascade, arrays)
    plain = run_plain(cascade, tensors)
    conditions = conditioning(cascade, arrays, EPS["float32"])
    # No kernel has a smaller tile than 16.
    found = run_plain(derive(cascade, tile=16).cascade, tensors)
    for o, x in want.items():
        hole = np.isnan(x)
        got, base = (np.where(hole, np.nan, t[o].double().numpy()) for t in (found, plain))
        if row.yardstick and not np.isfinite(base[np.isfinite(x)]).all():
            # The plain formula takes the logarithm of what underflows; another of the same value does not.
            assert np.isfinite(got[np.isfinite(x)]).all()
            other = parse(ACCEPTED[row.yardstick].text)
            base = run_plain(other.constrain(condition) if condition else other, tensors)[o].double().numpy()
        verdict = judge(got, x, base, conditions[o])
        assert verdict.passed, f"{o}: {verdict}"


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("name", ACCEPTED)
def test_parts_with_a_state_each_merge_to_the_same(name: str, parts: int) -> None:
    cascade = parse(ACCEPTED[name].text)
    for culled in (cascade, cascade.constrain("m < p")):
        split = derive(culled, reference="local", parts=parts).cascade
        assert parse(str(split)) == split
        inputs = draw(culled)
        found, want = run(split, inputs), run(culled, inputs)
        for o in want:
            np.testing.assert_allclose(found[o], want[o], rtol=1e-9, atol=1e-12)


def state_of(cascade: Cascade, inputs: dict[str, Array], lo: int, hi: int) -> dict[str, Array]:
    """The state of keys lo ... hi - 1, absorbed at once into that of none."""
    state = running_state(cascade, rank="M")
    step = state.step()
    given: dict[str, Array] = {}
    for i in step.inputs:
        if i.tensor.endswith("_old"):
            (component,) = (c for c in state.components if f"{c.tensor}_old" == i.tensor)
            given[i.tensor] = np.full([EXTENTS[v.upper()] for v in i.indices], component.identity)
        elif i.tensor == "START":
            given["START"] = np.array(float(lo))
        else:
            axis = i.indices.index("m") if "m" in i.indices else None
            x = inputs[i.tensor]
            given[i.tensor] = x if axis is None else x.take(range(lo, hi), axis=axis)
    found = run(step, given)
    return {c.tensor: found[c.tensor] for c in state.components}


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_merge_is_associative_and_has_an_identity(name: str) -> None:
    cascade = parse(ACCEPTED[name].text)
    state = running_state(cascade, rank="M")
    merge = state.merge()

    def merged(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
        both = {f"{t}_{side}": x for side, s in (("a", a), ("b", b)) for t, x in s.items()}
        return run(merge, {i.tensor: both[i.tensor] for i in merge.inputs})

    rng = random.Random(6)
    inputs = draw(cascade)
    for _ in range(6):
        cuts = sorted(rng.randint(0, EXTENTS["M"]) for _ in range(2))
        parts = [state_of(cascade, inputs, lo, hi) for lo, hi in itertools.pairwise((0, *cuts, EXTENTS["M"]))]
        left = merged(merged(parts[0], parts[1]), parts[2])
        right = merged(parts[0], merged(parts[1], parts[2]))
        whole = state_of(cascade, inputs, 0, EXTENTS["M"])
        empty = state_of(cascade, inputs, 0, 0)
        for t in whole:
            np.testing.assert_allclose(left[t], right[t], rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(left[t], whole[t], rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(merged(empty, parts[2])[t], parts[2][t], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(merged(parts[2], empty)[t], parts[2][t], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_scan_holds_every_prefix(name: str) -> None:
    cascade = parse(ACCEPTED[name].text)
    inputs = draw(cascade)
    found = run(running_state(cascade, rank="M").scan(), inputs)
    for n in (1, 2, EXTENTS["M"]):
        some = dict(inputs)
        for i in cascade.inputs:
            if "m" in i.indices:
                some[i.tensor] = inputs[i.tensor].take(range(n), axis=i.indices.index("m"))
        for o, want in run(cascade, some).items():
            np.testing.assert_allclose(found[o][..., n - 1], want, rtol=1e-9, atol=1e-11)
