"""Random cascades for loop nests and boundaries: every read is in step, so that footprints are exact."""

from __future__ import annotations

import random
from collections.abc import Sequence

from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse

EXTENTS = {"A": 2, "B": 3, "C": 2, "D": 3}


def random_nest(seed: int) -> Cascade:
    """Up to six Einsums over up to four ranks; a reader walks every rank of what it reads."""
    rng = random.Random(seed)
    ranks = "abcd"[: rng.randint(2, 4)]
    shapes = {f"I{k}": tuple(rng.sample(ranks, rng.randint(1, min(3, len(ranks))))) for k in range(rng.randint(1, 3))}
    if not set(ranks) <= {v for s in shapes.values() for v in s}:
        shapes["ALL"] = tuple(ranks)
    inputs, body, read = list(shapes), [], set()
    for k in range(rng.randint(1, 6)):
        names = list(shapes)
        operands = rng.sample(names, min(len(names), rng.choice((1, 1, 2, 2, 3))))
        if rng.random() < 0.7:
            operands[0] = names[-1]
        operands = list(dict.fromkeys(operands))
        walked = list(dict.fromkeys(v for t in operands for v in shapes[t]))
        left = [v for v in walked if rng.random() < 0.65]
        body.append(_einsum(f"T{k}", left, [(t, shapes[t]) for t in operands], walked))
        shapes[f"T{k}"] = tuple(left)
        read |= set(operands)
    outputs = [t for t in shapes if t not in read and t not in inputs]
    return _parsed(inputs, shapes, body, outputs)


def random_fibers(seed: int) -> Cascade:
    """Maps and sums over one rank m, with features of different widths beside it; sums are read again along m."""
    rng = random.Random(seed)
    shapes: dict[str, tuple[str, ...]] = {"I0": ("m",), "I1": ("m", rng.choice("efg"))}
    if rng.random() < 0.6:
        shapes["I2"] = ("m", *rng.sample("efg", 2))
    inputs, body, read = list(shapes), [], set()
    for k in range(rng.randint(2, 8)):
        along = [t for t, s in shapes.items() if "m" in s]
        sums = [t for t, s in shapes.items() if "m" not in s]
        operands = [rng.choice(along)]
        if rng.random() < 0.5:
            operands.append(rng.choice(along))
        if sums and rng.random() < 0.5:
            operands.append(rng.choice(sums))
        operands = list(dict.fromkeys(operands))
        walked = list(dict.fromkeys(v for t in operands for v in shapes[t]))
        left = [v for v in walked if rng.random() < 0.6 and v != "m"]
        if rng.random() < 0.6:
            left.insert(0, "m")
        body.append(_einsum(f"T{k}", left, [(t, shapes[t]) for t in operands], walked))
        shapes[f"T{k}"] = tuple(left)
        read |= set(operands)
    outputs = [t for t in shapes if t not in read and t not in inputs] or [f"T{len(body) - 1}"]
    return _parsed([t for t in inputs if t in read], shapes, body, outputs)


def _einsum(
    tensor: str, left: Sequence[str], operands: Sequence[tuple[str, Sequence[str]]], walked: Sequence[str]
) -> str:
    gone = [v for v in walked if v not in left]
    product = " * ".join(_read(t, s) for t, s in operands)
    return f"{_read(tensor, left)} = {product}" + (f" :: sum({','.join(gone)})" if gone else "")


def _read(tensor: str, shape: Sequence[str]) -> str:
    return f"{tensor}[{','.join(shape)}]" if shape else tensor


def _parsed(
    inputs: Sequence[str], shapes: dict[str, tuple[str, ...]], body: Sequence[str], outputs: Sequence[str]
) -> Cascade:
    head = "in " + ", ".join(_read(t, shapes[t]) for t in inputs)
    return parse("\n".join([head, *body, "out " + ", ".join(outputs)]))
