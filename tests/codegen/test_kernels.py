"""Random cascades against float64: the Triton text in the interpreter, and the same statements on CPU tensors.

What passes is decided by the error rule of reference/errorbound alone; nothing here holds a tolerance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.launch import Built, build, run_interpreted
from einsumcascade.codegen.plain import run_plain
from einsumcascade.codegen.programs import program_of
from einsumcascade.codegen.run_torch import cpu_schedule, run_on_cpu
from einsumcascade.gallery import load
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import rank_of
from einsumcascade.language.parser import parse
from einsumcascade.reference.errorbound import EPS, Verdict, conditioning, judge
from einsumcascade.reference.interpret import run
from tests.codegen.calls import VARIANTS, variant_inputs
from tests.codegen.found import CANCELLED, DRIFT, FOUND, PAIR, SOFTMAX, softmax
from tests.codegen.tritons import triton_path
from tests.gallery.draws import extents_of
from tests.nightly import NIGHTLY
from tests.strategies import Case, cases, examples, random_case, sample

TARGET = gpu_target("cuda:90")
DTYPES = ("float32", "float16", "bfloat16")


def tensors(case: Case, dtype: str) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(v, dtype=getattr(torch, dtype)) for k, v in case.inputs().items()}


def built(case: Case, inputs: Mapping[str, torch.Tensor], dtype: str, *, cpu: bool = False) -> tuple[Built, Binding]:
    binding = bind(case.cascade, shapes={k: tuple(v.shape) for k, v in inputs.items()})
    # Those of the inputs alone: an extent that the text defines would replace its definition.
    given = {rank_of(v): binding.extents[rank_of(v)] for i in case.cascade.inputs for v in i.indices}
    program = program_of(case.cascade, given)
    schedule = cpu_schedule(program, binding.extents) if cpu else case.schedule(program)
    return build(case.cascade, extents=given, dtype=dtype, target=TARGET, schedule=schedule), binding


def verdicts(
    case: Case, inputs: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], dtype: str
) -> dict[str, Verdict]:
    expected, plain = run(case.cascade, inputs), run_plain(case.cascade, inputs)
    room = conditioning(case.cascade, inputs, EPS[dtype])
    return {n: judge(found[n], expected[n], plain[n], room[n]) for n in expected}


def require(case: Case, inputs: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], dtype: str) -> None:
    for name, verdict in verdicts(case, inputs, found, dtype).items():
        assert verdict.passed, f"{name}: {verdict}\n{case.text}"


def interpreted(
    case: Case, dtype: str, inputs: Mapping[str, torch.Tensor] | None = None, triton: Path | None = None
) -> dict[str, torch.Tensor]:
    """Run the text, outputs poisoned, and require every output to be within its bound."""
    inputs = tensors(case, dtype) if inputs is None else inputs
    made, binding = built(case, inputs, dtype)
    found = run_interpreted(made, inputs, binding, triton_path=triton)
    require(case, inputs, found, dtype)
    return found


def fits(case: Case, dtype: str) -> bool:
    """Whether a dtype has an answer: in float16 an output, or what the plain formula rounds, may overflow."""
    largest = torch.finfo(getattr(torch, dtype)).max
    inputs = tensors(case, dtype)
    plain = run_plain(case.cascade, inputs)
    return all(
        float(abs(v[np.isfinite(v)]).max(initial=0.0)) < largest
        and not (np.isfinite(v) & ~np.isfinite(plain[name].double().numpy())).any()
        for name, v in run(case.cascade, inputs).items()
    )


def on_cpu(
    case: Case, dtype: str, inputs: Mapping[str, torch.Tensor] | None = None, *, tiles_of_case: bool = True
) -> dict[str, torch.Tensor]:
    inputs = tensors(case, dtype) if inputs is None else inputs
    made, binding = built(case, inputs, dtype, cpu=not tiles_of_case)
    found = run_on_cpu(made, inputs, binding)
    require(case, inputs, found, dtype)
    return found


# --- counterexamples that were found, and what they broke -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FOUND)
def test_what_once_failed_stays_right(name: str, dtype: str) -> None:
    interpreted(FOUND[name], dtype)
    on_cpu(FOUND[name], dtype)


# --- random cascades ------------------------------------------------------------------------------------------------


@examples(160)
@given(cases(), st.sampled_from(DTYPES))
@example(DRIFT, "float32")
@example(CANCELLED, "float32")
@example(PAIR, "bfloat16")
def test_the_text_is_as_exact_as_the_plain_formula(case: Case, dtype: str) -> None:
    assume(fits(case, dtype))
    interpreted(case, dtype)


@examples(120)
@given(cases(), st.sampled_from(DTYPES))
@example(DRIFT, "float32")
def test_the_statements_on_cpu_tensors_are_as_exact_as_the_plain_formula(case: Case, dtype: str) -> None:
    assume(fits(case, dtype))
    on_cpu(case, dtype)


@examples(20)
@given(cases(), st.sampled_from(DTYPES))
def test_the_schedule_for_a_cpu_does_not_change_the_value(case: Case, dtype: str) -> None:
    assume(fits(case, dtype))
    on_cpu(case, dtype, tiles_of_case=False)


@examples(30)
@given(cases(tiles=(1, 2, 4, 8, 16, 128)), st.sampled_from(DTYPES))
def test_tiles_below_and_far_above_the_usual_ones_give_the_same(case: Case, dtype: str) -> None:
    assume(fits(case, dtype))
    on_cpu(case, dtype)


@pytest.mark.parametrize("number", range(12))
def test_the_oldest_triton_agrees(number: int) -> None:
    case = sample(12, first=5000)[number]
    interpreted(case, DTYPES[number % 3], triton=triton_path("oldest"))


@examples(25)
@given(cases(), st.integers(0, 1 << 16))
def test_strides_do_not_matter(case: Case, seed: int) -> None:
    """Transposed storage, gaps between elements and an offset give the very numbers that packed storage gives."""
    inputs = tensors(case, "float32")
    made, binding = built(case, inputs, "float32")
    packed = run_interpreted(made, inputs, binding)
    generator = torch.Generator().manual_seed(seed)
    apart = {}
    for name, t in inputs.items():
        order = torch.randperm(t.dim(), generator=generator).tolist()
        gaps = [2 if n % 2 else 1 for n in range(t.dim())]
        room = torch.full([t.shape[d] * g + 1 for d, g in zip(order, gaps, strict=True)], float("nan"))
        view = room[tuple(slice(1, None, g) for g in gaps)] if t.dim() else room
        view = view[tuple(slice(0, t.shape[d]) for d in order)].permute([order.index(d) for d in range(t.dim())])
        view.copy_(t)
        apart[name] = view
    again = run_interpreted(made, apart, binding)
    for name in packed:
        assert torch.equal(packed[name].nan_to_num(nan=7e7), again[name].nan_to_num(nan=7e7)), name
    require(case, apart, run_on_cpu(made, apart, binding), "float32")


# --- scores that are large ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [200.0, 1e4])
@pytest.mark.parametrize("pattern", ["up", "down", "alternating"])
def test_large_scores_of_both_signs(dtype: str, size: float, pattern: str) -> None:
    """Rows whose scores climb and fall over +-size: without the right reference every one overflows or vanishes."""
    case = softmax("m <= p + 20", E=1)
    inputs = tensors(case, dtype)
    m = torch.arange(case.extents["M"], dtype=torch.float32)
    shape = {"up": m / m[-1] * 2 - 1, "down": 1 - m / m[-1] * 2, "alternating": 1.0 - 2.0 * (m % 2)}[pattern]
    inputs["K"] = (shape * size)[:, None].to(getattr(torch, dtype))
    inputs["Q"] = torch.where(torch.arange(case.extents["P"]) % 2 == 0, 1.0, -1.0)[:, None].to(getattr(torch, dtype))
    for found in (interpreted(case, dtype, inputs), on_cpu(case, dtype, inputs)):
        assert found["O"].isfinite().all() and found["Z"].isfinite().all()


@examples(25)
@given(cases(), st.sampled_from(DTYPES), st.sampled_from((40.0, 200.0)))
@example(random_case(106), "float32", 40.0)
def test_random_cascades_with_large_queries(case: Case, dtype: str, spread: float) -> None:
    case = replace(case, spread=spread)
    assume(fits(case, dtype))
    on_cpu(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_of_minus_infinity_is_a_key_without_weight(dtype: str) -> None:
    text = """\
in S[p,m], V[m,f]
GM[p] = S[p,m] :: max(m)
SN[p,m] = exp(S[p,m] - GM[p])
SD[p] = SN[p,m] :: sum(m)
NV[p,f] = SN[p,m] * V[m,f] :: sum(m)
O[p,f] = NV[p,f] / SD[p]
Z[p] = GM[p] + log(SD[p])
out O, Z: float32
"""
    case = Case(text=text, extents={"P": 20, "M": 40, "F": 8}, tiles=(16, 16))
    inputs = tensors(case, dtype)
    inputs["S"][3, :20] = -torch.inf
    inputs["S"][4, 16:] = -torch.inf
    inputs["S"][5, :] = -torch.inf
    for found in (interpreted(case, dtype, inputs), on_cpu(case, dtype, inputs)):
        assert (found["O"][5] == 0).all() and found["Z"][5] == -torch.inf


# --- rows with no key, extents of 1, nothing at all -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraints", [("m < p",), ("m < p - 20",), ("m > p + 40",), ("m < 0",)], ids=" and ".join)
def test_a_row_without_a_key_is_zero_and_its_lse_minus_infinity(dtype: str, constraints: tuple[str, ...]) -> None:
    case = softmax(*constraints)
    expected = run(case.cascade, tensors(case, dtype))
    empty = torch.tensor(expected["Z"]) == -torch.inf
    assert empty.any()
    for found in (interpreted(case, dtype), on_cpu(case, dtype)):
        assert (found["O"][empty] == 0).all()
        assert (found["Z"][empty] == -torch.inf).all()


@pytest.mark.parametrize("ones", ["P", "M", "E", "F", "PM", "PMEF"])
def test_extents_of_one(ones: str) -> None:
    case = softmax("m <= p", **dict.fromkeys(ones, 1))
    interpreted(case, "float32")
    on_cpu(case, "float32")


def test_no_query_at_all_gives_an_empty_output() -> None:
    found = interpreted(softmax(P=0), "float32")
    assert found["O"].shape == (0, 8)


def test_no_key_at_all_gives_rows_without_a_key() -> None:
    for found in (interpreted(softmax(M=0), "float32"), on_cpu(softmax(M=0), "float32")):
        assert (found["O"] == 0).all() and (found["Z"] == -torch.inf).all()


# --- memory ---------------------------------------------------------------------------------------------------------


def test_offsets_beyond_two_to_the_31st_elements_do_not_wrap() -> None:
    """One batch a storage of 2^31 elements apart, of which a few pages are ever touched."""
    text = SOFTMAX.format(constraints="").replace("Q[p", "Q[b,p").replace("K[m", "K[b,m").replace("V[m", "V[b,m")
    for t in ("S", "GM", "SN", "SD", "NV", "O", "Z"):
        text = re.sub(rf"\b{t}\[p", f"{t}[b,p", text)
    case = Case(text=text, extents={"B": 2, "P": 5, "M": 19, "E": 4, "F": 4}, tiles=(16, 16))
    inputs = tensors(case, "float16")
    far = 2**31 + 64
    for name in ("K", "V"):
        t = inputs[name]
        room = torch.empty(far + t[0].numel(), dtype=t.dtype)
        inputs[name] = room.as_strided(t.shape, (far, t.shape[2], 1)).copy_(t)
    interpreted(case, "float16", inputs)


def test_memory_beyond_the_inputs_is_not_read_into_the_result() -> None:
    """The tail of every tile lies in NaN."""
    case = softmax("m <= p", P=17, M=19)
    inputs = {}
    for name, t in tensors(case, "float32").items():
        room = torch.full((t.shape[0] + 64, t.shape[1] + 24), torch.nan)
        inputs[name] = room[: t.shape[0], : t.shape[1]].copy_(t)
    interpreted(case, "float32", inputs)
    on_cpu(case, "float32", inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_twice_gives_the_same_bits(dtype: str) -> None:
    case = softmax("m <= p")
    first, again = interpreted(case, dtype), interpreted(case, dtype)
    assert all(torch.equal(first[n], again[n]) for n in first)


# --- mutations: what the checks are worth ---------------------------------------------------------------------------


def mutated(case: Case, pattern: str, replacement: str) -> dict[str, Verdict]:
    """The verdicts on a text in which one thing was broken."""
    inputs = tensors(case, "float32")
    made, binding = built(case, inputs, "float32")
    broken, count = re.subn(pattern, replacement, made.source)
    assert count, f"{pattern} is not in\n{made.source}"
    return verdicts(case, inputs, run_interpreted(replace(made, source=broken), inputs, binding), "float32")


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"(?m)^( *b_CGM) = .*$", r"\1 = b_RSD * 0.0 + 1.0"),
        (r"b_CGM\[:, None\] \* b_RNV", "b_RNV"),
        (r"b_CGM \* b_RSD", "b_RSD"),
        (r"tl\.maximum\(b_RGM, ([^\n]*)\)", r"tl.minimum(b_RGM, \1)"),
        (r"(o_m(?:\[None, :\])?) <= ", r"\1 < "),
    ],
    ids=["no correction", "no correction of the numerator", "no correction of the sum", "a minimum", "a smaller mask"],
)
def test_a_broken_text_is_caught(pattern: str, replacement: str) -> None:
    case = softmax("m <= p")
    assert not all(v.passed for v in mutated(case, pattern, replacement).values())


def rescaled() -> list[Case]:
    """Softmax-like cases whose keys span several tiles and whose scores have no bound."""
    return [
        replace(c, tiles=(16, 16, 16, 16), spread=4.0)
        for c in sample(1200, first=9000)
        if c.extents["M"] > 32
        and c.extents.get("P", 1) > 12
        and "K2" not in c.text
        and "exp(S" in c.text
        and "constraint" not in c.text
        and "+ 0.5" not in c.text
        and re.search(r"S\[.*m\] = QK\[[^\]]*\]$", c.text, re.MULTILINE)
    ]


@pytest.mark.parametrize("number", range(8 if NIGHTLY else 3))
def test_a_missing_rescale_is_caught_in_random_cascades(number: int) -> None:
    case = rescaled()[number]
    broken = mutated(case, r"(?m)^( *)(b_C[A-Z]\w*) = ([^#\n]*)", r"\1\2 = (\3) * 0.0 + 1.0  ")
    assert not all(v.passed for v in broken.values()), case.text


# --- the gallery and whole programs ---------------------------------------------------------------------------------

PROGRAMS = {
    "entropy": "in Q[p,e], K[m,e]\nS[p,m] = Q[p,e] * K[m,e] :: sum(e)\nGM[p] = S[p,m] :: max(m)\n"
    "SN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = SN[p,m] :: sum(m)\nSS[p] = SN[p,m] * S[p,m] :: sum(m)\n"
    "EN[p] = log(SD[p]) + GM[p] - SS[p] / SD[p]\nout EN\n",
    "column mean": "in Q[p,e], K[m,e]\nS[p,m] = Q[p,e] * K[m,e] :: sum(e)\nGM[p] = S[p,m] :: max(m)\n"
    "SN[p,m] = exp(S[p,m] - GM[p])\nSD[p] = SN[p,m] :: sum(m)\nA[p,m] = SN[p,m] / SD[p]\n"
    "C[m] = A[p,m] / P :: sum(p)\nout C\n",
    "product": "in A[p,k], B[k,n]\nC[p,n] = A[p,k] * B[k,n] :: sum(k)\nout C\n",
    "linear": "in Q[p,e], K[m,e], V[m,f]\nKV[e,f] = K[m,e] * V[m,f] :: sum(m)\nKS[e] = sigmoid(K[m,e]) :: sum(m)\n"
    "N[p,f] = Q[p,e] * KV[e,f] :: sum(e)\nD[p] = sigmoid(Q[p,e]) * KS[e] :: sum(e)\n"
    "O[p,f] = N[p,f] / D[p]\nout O\n",
    "normalise": "in X[b,p,m], W[m,f]\nMS[b,p] = X[b,p,m] * X[b,p,m] :: mean(m)\n"
    "O[b,p,f] = X[b,p,m] / sqrt(MS[b,p] + 0.000001) * W[m,f] :: sum(m)\nout O\n",
    "map": "in X[p,f], G[f]\nY[p,f] = relu(X[p,f]) * G[f]\nout Y\n",
    "max plus": "in QK[p,m], V[m,f]\nconstraint m <= p\nO[p,f] = QK[p,m] + V[m,f] :: max(m)\nout O\n",
}
EXTENTS = {"B": 2, "H": 2, "G": 2, "R": 3, "P": 33, "M": 47, "K": 40, "N": 21, "E": 17, "F": 8}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_one_and_more_kernels(name: str, dtype: str) -> None:
    cascade = parse(PROGRAMS[name])
    case = Case(
        text=PROGRAMS[name],
        tiles=(16, 32),
        extents={rank_of(v): EXTENTS[rank_of(v)] for i in cascade.inputs for v in i.indices},
    )
    interpreted(case, dtype)
    on_cpu(case, dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gallery(name: str) -> None:
    cascade = load(name)
    case = Case(text=str(cascade), tiles=(16, 16, 16, 16), extents=extents_of(cascade, name))
    interpreted(case, "bfloat16", variant_inputs(name, "bfloat16"))
    on_cpu(case, "float32", variant_inputs(name, "float32", "swapped"))
