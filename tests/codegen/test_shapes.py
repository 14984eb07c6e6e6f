"""Layouts, grouped heads, extents of one and of none: the same text and the same op take them all."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import einsumcascade as ec
from einsumcascade.analysis.targets import gpu_target
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.errors import InputError
from einsumcascade.gallery import load
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import constrained, parse
from tests.codegen.calls import inputs_of
from tests.codegen.judging import assert_within_bounds
from tests.strategies import examples

# Query heads index the heads of keys; the ratio is a rank, so it has to be a whole number.
HEADS = parse(
    """
    in Q[b,h,p,e], K[b,g,m,e], V[b,g,m,f]
    rank r = H / G
    const scale = E ** -0.5
    QK[b,h,p,m] = scale * Q[b,h,p,e] * K[b,h // R,m,e] :: sum(e)
    GM[b,h,p] = QK[b,h,p,m] :: max(m)
    SN[b,h,p,m] = exp(QK[b,h,p,m] - GM[b,h,p])
    SD[b,h,p] = SN[b,h,p,m] :: sum(m)
    NV[b,h,p,f] = SN[b,h,p,m] * V[b,h // R,m,f] :: sum(m)
    AV[b,h,p,f] = NV[b,h,p,f] / SD[b,h,p]
    out AV
    """,
    name="heads.cascade",
)


def both(cascade: Cascade, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Judge the text in the interpreter and the op; return what the op found."""
    binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    features = {r: binding.extents[r] for r in feature_ranks(cascade)}
    dtype = str(next(iter(inputs.values())).dtype).removeprefix("torch.")
    built = build(cascade, extents=features, dtype=dtype, target=gpu_target("cuda:90"), tile_limit=16)
    found = run_interpreted(built, inputs, binding)
    assert_within_bounds(cascade, inputs, tuple(found[o] for o in cascade.output_names))
    result = ec.compile(cascade)(*inputs.values())
    assert_within_bounds(cascade, inputs, result)
    return (result,) if isinstance(result, torch.Tensor) else result


# --- grouped queries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1, 3, 5, 7])
@pytest.mark.parametrize("name", ["gqa", "heads"])
def test_any_whole_ratio_of_heads(name: str, ratio: int) -> None:
    cascade, heads = (load("gqa"), {"R": ratio}) if name == "gqa" else (HEADS, {"H": 2 * ratio})
    inputs = inputs_of(cascade, "float32", B=2, G=2, P=7, M=19, E=16, F=24, **heads)
    (found,) = both(cascade, inputs)
    q, k, v = (inputs[n].flatten(1, 2) if inputs[n].dim() == 5 else inputs[n] for n in "QKV")
    # PyTorch's own attention over heads that are repeated: another oracle.
    known = torch.nn.functional.scaled_dot_product_attention(
        q.double(), *(x.double().repeat_interleave(ratio, 1) for x in (k, v))
    )
    torch.testing.assert_close(found.reshape(known.shape).double(), known, rtol=1e-4, atol=1e-5)


def test_heads_are_read_without_masks() -> None:
    source = ec.compile(HEADS).kernel(target="cuda:90").source
    assert "tl.cast(i_h // R, tl.int64) * stride_K_g" in source
    assert "b_K = tl.load(p_K + o_K)  #" in source


def test_a_ratio_that_does_not_divide_is_one_error() -> None:
    with pytest.raises(InputError) as caught:
        ec.compile(HEADS)(torch.ones(1, 5, 3, 16), *[torch.ones(1, 2, 4, 16)] * 2)
    assert str(caught.value) == (
        "InputError[extent-value]: rank R is 2.5 by its `rank` statement\n"
        "  --> heads.cascade:3:5\n"
        " 3 |     rank r = H / G\n"
        "   |     ^^^^^^^^^^^^^^ R = 2.5\n"
        "   = rule: an extent is a whole number, 0 or more\n"
        "   = docs/errors.md#extent-value"
    )


def test_a_wrong_shape_names_the_tensors_and_the_place() -> None:
    q, k = torch.ones(1, 2, 3, 80), torch.ones(1, 2, 4, 72)
    with pytest.raises(InputError) as caught:
        ec.compile("softmax_attention")(q, k, k)
    (problem,) = caught.value.diagnostics
    assert problem.code == "extent-mismatch" and problem.span is not None
    assert "rank E is 80 in Q but 72 in K" in problem.headline


# --- layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS = ("BHSD", "BSHD", "SBHD", "DBHS", "BHDS")


@examples(30)
@given(
    st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    st.tuples(*[st.booleans()] * 3),
    st.sampled_from([(16, 16), (80, 24), (72, 40)]),
    st.sampled_from(["softmax_attention", "linear"]),
)
def test_any_order_of_axes_in_memory_and_broadcast_heads(
    layouts: tuple[str, ...], shared: tuple[bool, ...], features: tuple[int, int], name: str
) -> None:
    cascade = load(name)
    inputs = inputs_of(cascade, "float32", B=2, H=2, P=5, M=19, E=features[0], F=features[1])
    laid = {}
    for (n, x), layout, one in zip(inputs.items(), layouts, shared, strict=True):
        to = ["BHSD".index(c) for c in layout]
        x = x.permute(to).contiguous().permute([to.index(d) for d in range(4)])
        laid[n] = x[:, :1].expand(x.shape) if one else x
    both(cascade, laid)


# --- extents of one and of none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax_attention", "softmax_lse", "linear", "alibi", "gqa", "sink"])
@pytest.mark.parametrize("causal", [False, True])
def test_extents_of_one(name: str, causal: bool) -> None:
    cascade = load(name)
    if causal and {"p", "m"} <= {v for e in cascade.einsums for v in e.free if name != "linear"}:
        cascade = constrained(cascade, "m <= p", {})
    names = {v[0].upper() + v[1:] for i in cascade.inputs for v in i.indices}
    both(cascade, inputs_of(cascade, "float32", **dict.fromkeys(names, 1)))
    for odd in sorted(names):
        both(cascade, inputs_of(cascade, "float32", **{**dict.fromkeys(names, 1), odd: 3}))


# The scale of a head without elements, E ** -0.5, is infinite: of such heads only those without a scale have a value.
@pytest.mark.parametrize(
    ("name", "empty"), [*(("softmax_lse", r) for r in "BHPMF"), *(("linear", r) for r in "BHPMEF")]
)
def test_extents_of_none(name: str, empty: str) -> None:
    """Without keys a sum is 0, a maximum -inf and a mean of nothing 0; a product over no features is 0."""
    cascade = load(name)
    sizes = {"B": 2, "H": 2, "P": 3, "M": 5, "E": 16, "F": 24, empty: 0}
    inputs = {
        i.tensor: torch.randn([sizes[v.upper()] for v in i.indices], generator=torch.Generator().manual_seed(1))
        for i in cascade.inputs
    }
    for found in both(cascade, inputs):
        assert not found.isnan().any()
        if empty == "M":
            assert bool((found == 0).all() if found.dim() == 4 else (found == float("-inf")).all())
