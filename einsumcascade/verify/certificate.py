"""Check a certificate: the claims of a derivation, verified again without the rewriter.

A certificate is a file that anyone may have written: its texts are parsed as ours, nothing in it is evaluated as
Python, and no rewrite is run again. Checked are: each claim `B(x, d') = C(d, d') B(x, d)` and its laws to 40 digits at
random points; that a claim is about the reduction it names; that both cascades have equal values; and their passes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from einsumcascade.analysis.passes import count_passes
from einsumcascade.errors import EinsumCascadeError
from einsumcascade.language.ir import (
    Cascade,
    rank_of,
    reads,
)
from einsumcascade.language.known import known_value
from einsumcascade.language.parser import parse
from einsumcascade.reference.interpret import run
from einsumcascade.verify.claims import Verdict, claims, wrong

FORMAT = 1
LIMIT_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The outcome of a check."""

    name: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return all(v.holds for v in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        rows = [{"what": v.what, "holds": v.holds, "found": v.found} for v in self.verdicts]
        return {"name": self.name, "passed": self.passed, "verdicts": rows}

    def __str__(self) -> str:
        width = max((len(v.what) for v in self.verdicts), default=0)
        lines = [f"{'holds' if v.holds else 'FAILS'}  {v.what:<{width}}  {v.found}".rstrip() for v in self.verdicts]
        return "\n".join([f"certificate of {self.name}", *lines, "", "PASS" if self.passed else "FAIL"])


def check(text: str, *, seed: int = 0) -> Checked:
    """Verify a certificate again.

    Args:
        text: what `Derivation.certificate` gives. seed: of the random points and inputs.

    Raises:
        InputError: `certificate`: the text is not one.
        CascadeError: a cascade in it does not parse.
    Cost: seconds; the reference runs both cascades a few times.
    """
    data = _loaded(text)
    original, result = (_cascade(data, key) for key in ("original", "cascade"))
    rng = np.random.default_rng(seed)
    verdicts = list(claims(data, original, result, rng))
    saved = data.get("saved", [])
    if not isinstance(saved, list) or not all(isinstance(x, str) for x in saved):
        raise wrong("what is 'saved' in the certificate is no list of texts")
    verdicts += _values(original, result, tuple(data["passes"]), rng, tuple(known_value(original, x) for x in saved))
    verdicts += _passes(data, original, result)
    return Checked(name=str(data.get("name", "")), verdicts=tuple(verdicts))


def _loaded(text: str) -> dict[str, Any]:
    if len(text) > LIMIT_BYTES:
        raise wrong(f"the certificate holds more than {LIMIT_BYTES} characters")
    try:
        data = json.loads(text)
    except ValueError as error:
        line = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise wrong(f"the certificate is not JSON{line}") from None
    except RecursionError:
        raise wrong("the certificate is nested too deep") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise wrong(f"the certificate is not of format {FORMAT}")
    kinds = {"original": str, "cascade": str, "passes": dict, "steps": list}
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind):
            raise wrong(f"the certificate has no {kind.__name__} '{key}'")
    return data


def _cascade(data: Mapping[str, Any], key: str) -> Cascade:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return replace(parse(data[key], name=f"<certificate: {key}>"), name=key)


def _values(
    original: Cascade,
    result: Cascade,
    streamed: tuple[str, ...],
    rng: np.random.Generator,
    saved: tuple[tuple[str, Cascade], ...] = (),
) -> Iterator[Verdict]:
    """Run both cascades on random inputs: one of everything, odd sizes, more than a tile, large numbers."""
    same = [(i.tensor, i.indices) for i in original.inputs] == [(i.tensor, i.indices) for i in result.inputs]
    if not same or original.output_names != result.output_names:
        yield Verdict(what="inputs and outputs are the same", holds=False, found=", ".join(result.output_names))
        return
    reduced = {v for e in original.einsums for v in e.ranks}
    for label, small, long, scale in (("one of each", 1, 1, 1.0), ("odd sizes", 3, 7, 1.0), ("large", 3, 7, 100.0)):
        sizes = {v: long if v in reduced else small for v in _ranks(original)}
        yield _equal(original, result, label, sizes, scale, rng, saved)
    lengths = {v: 300 if rank_of(v) in streamed else 3 for v in _ranks(original)}
    yield _equal(original, result, "more than a tile", lengths, 1.0, rng, saved)


def _ranks(cascade: Cascade) -> tuple[str, ...]:
    return tuple(dict.fromkeys(v for i in cascade.inputs for v in i.indices))


def _equal(
    original: Cascade,
    result: Cascade,
    label: str,
    sizes: Mapping[str, int],
    scale: float,
    rng: np.random.Generator,
    saved: tuple[tuple[str, Cascade], ...],
) -> Verdict:
    selecting = {
        x.tensor
        for s in (*original.einsums,)
        for r in reads(s.expr, *s.where, *original.constraints)
        for i in r.indices
        for x in reads(i)
    }
    inputs: dict[str, Any] = {}
    for i in original.inputs:
        shape = [sizes[v] for v in i.indices]
        inputs[i.tensor] = rng.integers(0, 2, shape) if i.tensor in selecting else scale * rng.standard_normal(shape)
    what = f"equal values: {label} ({', '.join(f'{rank_of(v)}={n}' for v, n in sizes.items())})"
    try:
        for name, cascade in saved:
            inputs[name] = run(cascade, inputs)[cascade.output_names[-1]]
        want, found = run(original, inputs), run(result, inputs)
    except EinsumCascadeError as error:
        return Verdict(what=what, holds=False, found=str(error).splitlines()[0])
    worst = 0.0
    for o, x in want.items():
        y = found[o]
        if x.shape != y.shape or not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return Verdict(what=what, holds=False, found=f"{o} differs where it is finite, or in shape")
        fine = np.isfinite(x)
        if not np.array_equal(x[~fine], y[~fine], equal_nan=True):
            return Verdict(what=what, holds=False, found=f"{o} differs where it is infinite")
        size = max(float(np.abs(x[fine]).max(initial=0.0)), 1e-300)
        worst = max(worst, float(np.abs(x[fine] - y[fine]).max(initial=0.0)) / size)
    return Verdict(what=what, holds=worst < 1e-9, found=f"largest difference {worst:.1e} of the largest value")


def _passes(data: Mapping[str, Any], original: Cascade, result: Cascade) -> Iterator[Verdict]:
    for rank, said in data["passes"].items():
        if not isinstance(said, dict):
            raise wrong(f"the passes over {rank} are no object")
        for key, cascade in (("before", original), ("after", result)):
            found = count_passes(cascade, rank=rank).passes
            yield Verdict(
                what=f"passes over {rank} {key}: {said.get(key)}", holds=found == said.get(key), found=f"{found}"
            )
