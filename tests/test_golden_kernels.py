"""Kernel texts, word for word, and how a generated forward kernel compares with the one written by hand.

The texts are golden/NAME.py. To write them anew:

    python -m tests.test_golden_kernels
"""

from __future__ import annotations

from pathlib import Path

import pytest

import einsumcascade as ec
from einsumcascade.gallery import load
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import constrained, parse
from tests.codegen.test_hot_loop import large
from tests.codegen.test_inspect import report_of

FOLDER = Path(__file__).resolve().parent / "golden"
COLUMN_SUMS = """
in X[p,m], V[m,f]
C[m]   = X[p,m]  :: sum(p)
S[p,m] = exp(X[p,m] - C[m])
Y[p,f] = S[p,m] * V[m,f]  :: sum(m)
out Y
"""
MAX_PLUS = """
in A[p,k], W[k,m]
Y[p,m] = A[p,k] + W[k,m]  :: max(k)
out Y
"""


def cascades() -> dict[str, Cascade]:
    """List the cascades whose kernels are kept."""
    return {
        "softmax_attention": load("softmax_attention"),
        "softmax_attention_causal": constrained(load("softmax_attention"), "m <= p", {}),
        "alibi": load("alibi"),
        "linear": load("linear"),
        "column_sums": parse(COLUMN_SUMS, name="column_sums.cascade"),
        "softmax_1p": load("softmax_1p"),
        "max_plus": parse(MAX_PLUS, name="max_plus.cascade"),
    }


def text_of(cascade: Cascade) -> str:
    """Print the kernels of heads of 64, for bfloat16 on cuda:90 and by the default schedule."""
    return ec.compile(cascade).kernel(dtype="bfloat16", target="cuda:90").source


@pytest.mark.parametrize("name", cascades())
def test_a_kernel_is_word_for_word_the_one_that_was_read(name: str) -> None:
    assert text_of(cascades()[name]) == (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def test_every_kept_kernel_has_a_cascade() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(cascades())


@pytest.mark.parametrize("name", ["softmax_attention", "causal softmax_attention"])
def test_a_generated_forward_kernel_does_the_work_of_the_one_written_by_hand(name: str) -> None:
    hand = report_of().hot_loop
    (report,) = large(name).kernels.values()
    ours = report.hot_loop
    assert hand is not None and ours is not None
    for group in (("MMA",), ("MUFU",), ("FMNMX",), ("FFMA", "FADD"), ("FMUL",), ("F2FP",), ("SHFL",)):
        by_hand, generated = (sum(loop.count(c) for c in group) for loop in (hand, ours))
        assert abs(generated - by_hand) <= 0.02 * by_hand, group


def main() -> None:
    """Write the texts anew."""
    for name, cascade in cascades().items():
        (FOLDER / f"{name}.py").write_text(text_of(cascade), encoding="utf-8")


if __name__ == "__main__":
    main()
