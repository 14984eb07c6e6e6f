"""What gallery ops make of ids, lengths and seeds that are wrong: one error, or the value that the language gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import einsumcascade as ec
from einsumcascade.codegen.launch import build, run_interpreted
from einsumcascade.codegen.runner import present_target
from einsumcascade.errors import InputError
from einsumcascade.language.extents import bind
from einsumcascade.language.ir import Cascade
from einsumcascade.reference import run
from tests.gallery.draws import draw

Change = Callable[[torch.Tensor], torch.Tensor]


def prepared(name: str, tensor: str, change: Change) -> tuple[Cascade, dict[str, torch.Tensor]]:
    cascade = ec.load(name)
    inputs = {
        n: torch.from_numpy(np.array(x)).to(torch.int64 if x.dtype.kind in "iu" else torch.float32)
        for n, x in draw(cascade, name).items()
    }
    return cascade, inputs | {tensor: change(inputs[tensor])}


@pytest.mark.parametrize(
    ("name", "tensor", "change", "code"),
    [
        ("var", "CLS", lambda t: t[:-1], "extent-mismatch"),
        ("var", "CLS", lambda t: t[None], "rank-count"),
        ("var", "CLS", lambda t: t.half(), "wrong-dtype"),
        ("var", "CLS", lambda t: t.to(torch.complex64), "wrong-dtype"),
        ("paged", "LEN", lambda t: t[:-1], "extent-mismatch"),
        ("paged", "TAB", lambda t: t.to(torch.complex64), "wrong-dtype"),
        ("neighbour_cache", "NB", lambda t: t[..., 0], "rank-count"),
        ("gqa", "K", lambda t: t[:, :1].repeat(1, 3, 1, 1), "extent-mismatch"),
        ("gqa", "Q", lambda t: t[:, :, 0], "rank-count"),
        ("diff", "K", lambda t: t[:1], "extent-mismatch"),
        ("diff", "LAM", lambda t: t.repeat(2), "extent-mismatch"),
        ("dropout", "SEED", lambda t: t[None], "rank-count"),
    ],
)
def test_a_wrong_shape_or_dtype_is_one_error(name: str, tensor: str, change: Change, code: str) -> None:
    cascade, inputs = prepared(name, tensor, change)
    with pytest.raises(InputError) as caught:
        ec.compile(cascade)(**inputs)
    assert caught.value.codes == (code,) and tensor in str(caught.value)


def test_another_number_of_softmaxes_is_one_error() -> None:
    cascade, inputs = prepared("diff", "LAM", lambda t: t.repeat(2))
    doubled = inputs | {n: inputs[n].repeat(2, 1, 1, 1) for n in ("Q", "K")}
    with pytest.raises(InputError, match="rank S is 4 in Q but 2 by its `rank` statement"):
        ec.compile(cascade)(**doubled)


@pytest.mark.parametrize(
    ("name", "tensor", "change"),
    [
        ("var", "CLS", lambda t: t + 100),
        ("var", "CLS", lambda t: t - 9),
        ("var", "CLS", lambda t: t > 1),
        ("var", "CLS", lambda t: t.to(torch.uint8)),
        ("paged", "TAB", lambda t: t + 1000),
        ("paged", "TAB", lambda t: -t - 1),
        ("paged", "TAB", lambda t: t + 2**40),
        ("paged", "LEN", lambda t: t + 10**6),
        ("paged", "LEN", lambda t: -t - 1),
        ("paged", "LEN", lambda t: t.flip(0)),
        ("tin", "LEN", lambda t: -t),
        ("tin", "LEN", lambda t: t + 10**9),
        ("neighbour_cache", "NB", lambda t: t - 100),
        ("neighbour_cache", "NB", lambda t: t + 100),
        ("pave", "IDX", lambda t: -t),
        ("gatv2", "ADJ", lambda t: -t),
        ("gatv2", "ADJ", lambda t: t * 0),
        ("dropout", "SEED", lambda t: t * 0 - 1),
        ("dropout", "SEED", lambda t: torch.tensor(3.0)),
    ],
)
def test_ids_out_of_range_cull_their_points_and_nothing_is_nan(name: str, tensor: str, change: Change) -> None:
    cascade, inputs = prepared(name, tensor, change)
    arrays = {n: t.double().numpy() if t.is_floating_point() else t.numpy() for n, t in inputs.items()}
    with np.errstate(all="ignore"):
        wanted = run(cascade, arrays)
    shapes = {n: tuple(t.shape) for n, t in inputs.items()}
    binding = bind(cascade, shapes=shapes)
    built = build(cascade, extents=binding.extents, dtype="float32", target=present_target())
    kernel = run_interpreted(built, inputs, binding)
    called = ec.compile(cascade)(**inputs)
    found = called if isinstance(called, tuple) else (called,)
    for one, (out, x) in zip(found, wanted.items(), strict=True):
        assert not np.isnan(x).any()
        np.testing.assert_allclose(one.double().numpy(), x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(kernel[out].double().numpy(), x, rtol=1e-4, atol=1e-5)
