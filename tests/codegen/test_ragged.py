"""Ragged batches: packed sequences, some of them empty, from the offsets that other libraries take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from einsumcascade.gallery import load
from tests.codegen.test_shapes import both
from tests.strategies import examples


def bounds(cu_q: torch.Tensor, cu_k: torch.Tensor) -> dict[str, torch.Tensor]:
    """The keys of each packed query, and the first query of its sequence; as docs/shapes.md has it."""
    lengths = cu_q.diff()
    each = {"LO": cu_k[:-1], "HI": cu_k[1:], "FIRST": cu_q[:-1]}
    return {name: x.repeat_interleave(lengths) for name, x in each.items()}


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(
    queries: list[int], keys: list[int], *, e: int, f: int, heads: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(queries) + 7 * sum(keys))
    shapes = {"Q": (sum(queries), heads, e), "K": (sum(keys), heads, e), "V": (sum(keys), heads, f)}
    drawn = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    return drawn | bounds(offsets(queries), offsets(keys))


def one_by_one(
    inputs: dict[str, torch.Tensor], queries: list[int], keys: list[int], *, causal: bool
) -> list[torch.Tensor]:
    """PyTorch's attention of each sequence by itself, in float64; none where there is no key."""
    q, k, v = (inputs[n].double() for n in "QKV")
    out = []
    for a, b, c in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        if len(b) == 0:
            out.append(torch.zeros(len(a), a.shape[1], c.shape[2], dtype=torch.float64))
            continue
        seen = torch.ones(len(a), len(b), dtype=torch.bool)
        mask = seen.tril() if causal else seen
        rows = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (a, b, c)), attn_mask=mask)
        out.append(rows.transpose(0, 1))
    return out


@pytest.mark.parametrize("causal", [False, True])
@examples(15)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    st.sampled_from([(16, 16), (80, 24)]),
)
def test_each_sequence_attends_to_itself(
    causal: bool, lengths: list[tuple[int, int]], features: tuple[int, int]
) -> None:
    queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
    inputs = packed(queries, keys, e=features[0], f=features[1])
    cascade = load("varlen_causal" if causal else "varlen")
    (found,) = both(cascade, {i.tensor: inputs[i.tensor] for i in cascade.inputs})
    for mine, known in zip(found.split(queries), one_by_one(inputs, queries, keys, causal=causal), strict=True):
        torch.testing.assert_close(mine.double(), known, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["varlen", "varlen_causal"])
def test_16_bit_sequences(name: str) -> None:
    cascade = load(name)
    inputs = packed([3, 0, 40, 1, 0], [5, 7, 33, 0, 2], e=72, f=64, dtype=torch.bfloat16)
    both(cascade, {i.tensor: inputs[i.tensor] for i in cascade.inputs})


@pytest.mark.parametrize("name", ["varlen", "varlen_causal"])
def test_bounds_in_no_order_mean_the_keys_between_them(name: str) -> None:
    """No offset is trusted: beyond the keys there are none, and bounds the wrong way round hold none."""
    cascade = load(name)
    inputs = packed([9], [21], e=16, f=16)
    inputs |= {
        "LO": torch.tensor([0, 5, -3, 20, 21, 30, -(2**31), 2, 7], dtype=torch.int32),
        "HI": torch.tensor([21, 2, 4, 2**31 - 1, 40, 50, 3, -7, 8], dtype=torch.int32),
        "FIRST": torch.tensor([0, 0, 8, -5, 3, 1, 0, 0, 0], dtype=torch.int32),
    }
    if name == "varlen_causal":
        # Places are sums of bounds: those of 32 bits are taken as they are.
        inputs["LO"][6] = -(2**30)
    (found,) = both(cascade, {i.tensor: inputs[i.tensor] for i in cascade.inputs})
    assert not found.isnan().any()
    for row in (1, 4, 5, 7):
        assert (found[row] == 0).all()


def test_offsets_that_decrease_are_refused_where_bounds_are_made() -> None:
    with pytest.raises(RuntimeError, match="negative"):
        bounds(torch.tensor([0, 5, 3]), torch.tensor([0, 5, 8]))
