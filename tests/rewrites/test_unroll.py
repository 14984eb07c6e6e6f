"""Small ranks written out: the same values, one tensor for each coordinate, and one loop for several softmaxes."""

from __future__ import annotations

import numpy as np
import pytest

import einsumcascade as ec
from einsumcascade.codegen.kernel_ir import Load, Loop
from einsumcascade.gallery import header, load, names
from einsumcascade.language.parser import parse
from einsumcascade.reference import run
from einsumcascade.rewrites.derive import simplify
from einsumcascade.rewrites.unroll import unroll
from tests.gallery.draws import draw, recipe

CASES = {
    "sum": "in X[s,p]\nrank s = 3\nY[p] = X[s,p] * (s + 1) :: sum(s)\nout Y",
    "max of a masked rank": "in X[s,p]\nrank s = 3\nconstraint s <= p\nY[p] = X[s,p] :: max(s)\nout Y",
    "two ranks reduced": "in X[s,p,e]\nrank s = 2\nY[p] = X[s,p,e] * X[1 - s,p,e] :: sum(s,e)\nout Y",
    "minimum and where": "in X[s,p]\nrank s = 4\nY[p] = X[s,p] :: min(s) where s + p >= 3\nout Y",
    "fixed reads": "in X[m]\nrank c = 3\nD[c] = X[m] * select(m % 3 == c, 1, 0)\nY = D[0] - D[2] / D[1]\nout Y",
    "chain": "in X[s,p]\nrank s = 2\nA[s,p] = exp(X[s,p])\nB[s,p] = A[s,p] * A[1-s,p]\nY[p] = B[s,p] :: prod(s)\nout Y",
    "a constraint among reduced": (
        "in X[s,p,m]\nrank s = 3\nconstraint m + s <= p\nS[s,p] = X[s,p,m] :: sum(m)\nY[p] = S[s,p] :: max(s)\nout Y"
    ),
    "one element": "in X[s,p]\nrank s = 1\nY[p] = X[s,p] :: sum(s)\nout Y",
}
KEPT = {
    "an output has it": "in X[p]\nrank s = 2\nY[s,p] = X[p] * s\nout Y",
    "too many elements": "in X[s,p]\nrank s = 9\nY[p] = X[s,p] :: sum(s)\nout Y",
    "an index with another variable": "in X[x]\nrank s = 2\nrank p = X // 2\nY[p] = X[p*2 + s] :: sum(s)\nout Y",
    "a gather along it": "in X[p], C[p]\nrank s = 2\nD[s,p] = X[p] * s\nY[p] = D[C[p], p]\nout Y",
    "a read out of range": "in X[s,p]\nrank s = 2\nA[s,p] = X[s,p]\nY[p] = A[s + 1, p] :: sum(s)\nout Y",
    "a top-k": "in X[p,m]\nrank s = 2\nI[p,s] = X[p,m] :: topk(m)\nY[p] = X[p, I[p,s]] :: sum(s)\nout Y",
    "an iteration": "in X[s,p]\nrank s = 2\ninit R[0,p] = 0\niter s:\n R[s+1,p] = R[s,p] + X[s,p]\nend\n"
    "Y[p] = R[S,p]\nout Y",
}


def sizes(text: str) -> dict[str, int]:
    cascade = parse(text)
    return {d.name.upper(): int(getattr(d.expr, "value", 0)) for d in cascade.ranks}


@pytest.mark.parametrize("name", CASES)
def test_values_stay_and_the_rank_goes(name: str) -> None:
    cascade, given = parse(CASES[name]), sizes(CASES[name])
    found = unroll(cascade, extents=given)
    assert found.steps and all("s" not in e.space and "c" not in e.space for e in found.cascade.einsums)
    rng = np.random.default_rng(3)
    inputs = {i.tensor: rng.standard_normal([given.get(v.upper(), 5) for v in i.indices]) for i in cascade.inputs}
    np.testing.assert_allclose(
        next(iter(run(found.cascade, inputs).values())), next(iter(run(cascade, inputs).values())), rtol=1e-13
    )


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_written_out_stays_as_it_is(name: str) -> None:
    text = KEPT[name]
    found = unroll(parse(text), extents=sizes(text))
    assert not found.steps and found.cascade == parse(text)


@pytest.mark.parametrize("name", [n for n in names() if load(n).ranks and header(n).kernel == "yes"])
def test_gallery_texts_keep_their_values(name: str) -> None:
    simple = simplify(load(name)).cascade
    found = unroll(
        simple, extents={d.name[0].upper() + d.name[1:]: int(getattr(d.expr, "value", 0)) for d in simple.ranks}
    )
    for kind in recipe(name).sets:
        inputs = draw(load(name), name, kind)
        wanted = run(simple, inputs)
        for tensor, x in run(found.cascade, inputs).items():
            np.testing.assert_allclose(x, wanted[tensor], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "tensor"), [("diff", "V"), ("var", "V"), ("var", "K")])
def test_several_states_share_one_load(name: str, tensor: str) -> None:
    kernel = ec.compile(name).kernel()
    (tree,) = kernel.built.kernels
    loop = next(s for s in tree.body if isinstance(s, Loop))
    assert sum(isinstance(s, Load) and s.tensor == tensor for s in loop.segments[0].body) == 1


@pytest.mark.parametrize("name", ["diff", "rope", "var"])
def test_one_kernel_without_a_buffer_and_without_tiles_of_three_axes(name: str) -> None:
    kernel = ec.compile(name).kernel()
    assert len(kernel.built.kernels) == 1
    assert not kernel.program.buffers
    assert "[:, :, None]" not in kernel.source and "[None, :, :]" not in kernel.source
    assert "1 < S" not in kernel.source and "1 < X" not in kernel.source
