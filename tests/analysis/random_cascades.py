"""Random cascades for counting passes: every way of reading a rank, partitions, prefixes and iterations.

A text means nothing; what matters is who waits for whom. Along the rank M an element is read where the Einsum stands, a
constant distance away, at either end, backwards, through data, through another variable of the same extent (with or
without a condition between the two), in tiles, and as a generation of an iteration along M or over steps N.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, field

from einsumcascade.errors import CascadeError, EinsumCascadeWarning
from einsumcascade.language.ir import Cascade
from einsumcascade.language.parser import parse

# The coordinate variable of each axis; "g" are the generations of an iteration along M, "n" those of one over steps.
Shape = tuple[str, ...]


@dataclass(slots=True)
class _Text:
    """A cascade under construction."""

    rng: random.Random
    tiled: bool
    shapes: dict[str, Shape] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    written: int = 0
    # Along M, every read stands where the Einsum does: then the other ranks are worth a look too.
    plain: bool = False
    # In an iteration along M, no Einsum reads all of M anew.
    inside: bool = False

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def name(self) -> str:
        self.written += 1
        return f"T{self.written}"

    @property
    def here(self) -> str:
        """The coordinate along M where an Einsum stands."""
        return "m1*M0+m0" if self.tiled else "m"

    def index(self, axis: str) -> str:
        """Where to read an axis."""
        rare = self.rng.random() * (0.6 if self.plain else 1)
        if axis == "m":
            options = ("0", "M-1", "M-1-m", "TAB[m]", "m-1", "m+1", "m-2", "m//2", "2*m")
            # Half of a recurrence left out would leave generations that no step writes.
            options = options[:-1] if self.inside else options
            if self.tiled:
                options = ("0", "m1*M0+n0", "TAB[m1]")
            return self.here if rare < 0.75 else "j" if rare < 0.87 and not self.inside else self.pick(*options)
        if axis == "j":
            return "j" if rare < 0.7 or self.tiled else "m" if rare < 0.85 else self.pick("0", "M-1")
        if axis == "m1":
            return "m1" if rare < 0.9 else self.pick("m1-1", "0", "M1-1", "m1+1")
        if axis == "m0":
            return "m0" if rare < 0.9 else self.pick("n0", "M0-1")
        if axis == "g":
            return self.pick("m", "m+1") if rare < 0.7 else self.pick("M", "0", "j", "M-m")
        if axis == "g1":
            return self.pick("m1", "m1+1") if rare < 0.6 else self.pick("M1", "0")
        if axis == "n":
            return self.pick("N", "N", "0")
        return "0" if axis == "f" and rare < 0.05 else axis

    def read(self, tensor: str) -> str:
        """A read; no diagonals: those see one element of many fibers."""
        while True:
            indices = [self.index(a) for a in self.shapes[tensor]]
            if all(sum(_uses(i, v) for i in indices) < 2 for v in ("p", "m", "j", "f")):
                return tensor + self.brackets(indices)

    @staticmethod
    def brackets(indices: list[str]) -> str:
        return f"[{','.join(indices)}]" if indices else ""

    def operands(self, least: int = 1) -> list[str]:
        names = sorted(self.shapes)
        # Late tensors more often, so that chains grow long.
        weights = [1 + 2 * k for k in range(len(names))]
        return [self.read(t) for t in self.rng.choices(names, weights, k=self.rng.randint(least, 3))]

    def einsum(self, name: str, reads: list[str], *, always: Shape = ()) -> None:
        """Write an Einsum over what the reads iterate; `always` are variables kept on the left."""
        text = reads[0] if len(reads) == 1 else f"exp({reads[0]}) * " + " * ".join(reads[1:])
        space = [v for v in ("n", "p", "m1", "m0", "n0", "m", "j", "f") if _uses(text, v)]
        if len(reads) > 1 and not self.plain and "p" in space and "m" in space and self.chance(0.05):
            text = f"select(m <= p, {reads[0]}, {reads[1]})"
            space = [v for v in space if _uses(text, v)]
        left = [v for v in space if v in always or (v != "n" and self.chance(0.45 if v in ("j", "n0") else 0.6))]
        self.lines.append(self._statement(name, left, text, space))
        self.shapes[name] = tuple(left)

    def _statement(self, name: str, left: list[str], text: str, space: list[str]) -> str:
        gone = [v for v in space if v not in left]
        line = f"{name}{self.brackets(left)} = {text}"
        if gone:
            line += f" :: {self.pick('sum', 'max')}({','.join(gone)})"
        conditions = []
        if "m" in space and "j" in space and self.chance(0.5):
            conditions.append(self.pick("j <= m", "j < m", "m >= j", "j >= m", "m < j"))
        if "m" in space and "p" in space and self.chance(0.3) and not self.plain:
            conditions.append(self.pick("m <= p", "m < p", "p - m < 9"))
        if "m0" in space and "n0" in space and self.chance(0.3):
            conditions.append("n0 <= m0")
        return line + (f" where {', '.join(conditions)}" if conditions else "")


def _uses(text: str, variable: str) -> bool:
    padded = "".join(c if c.isalnum() else " " for c in text)
    return variable in padded.split()


def random_text(rng: random.Random, *, plain: bool = False) -> str:
    """A text of the class; it may break a rule of the language, then draw again."""
    t = _Text(rng, tiled=rng.random() < 0.3, plain=plain)
    t.shapes = {
        "A": ("m",),
        "B": rng.choice([("p", "m"), ("m", "f"), ("m",)]),
        "C": rng.choice([("p",), ("f",), ("m",)]),
    }
    head = ["in " + ", ".join(f"{n}{t.brackets(list(s))}" for n, s in t.shapes.items()) + ", TAB[m], PP[p], FF[f]"]
    head += ["rank j = M", "rank n = 2"] + (["rank m0 = 2", "rank n0 = M0", "rank m1 = M // M0"] if t.tiled else [])
    steps = rng.randint(2, 7)
    if t.chance(0.15) and not plain:
        head.append("constraint " + ("m1*M0+m0 <= p" if t.tiled else "m <= p"))
    for _ in range(steps):
        kind = rng.random()
        if kind < 0.15:
            _recurrence(t)
        elif kind < 0.28:
            _iteration(t)
        elif kind < 0.31 and not t.tiled:
            _largest(t)
        else:
            t.einsum(t.name(), t.operands())
    last = [n for n in t.shapes if n.startswith("T")]
    outputs = sorted({last[-1], rng.choice(last)})
    return "\n".join([*head, *t.lines, "out " + ", ".join(outputs)]) + "\n"


def _recurrence(t: _Text) -> None:
    """An iteration along M, up or down, with what it computes beside the state."""
    v, end, down = ("m1", "M1", False) if t.tiled else ("m", "M", t.chance(0.4))
    state, rest = t.name(), [r for r in ("p", "f") if t.chance(0.4)]
    inner = [r for r in ("m0",) if t.tiled and t.chance(0.2)]
    new, old = (v, f"{v}+1") if down else (f"{v}+1", v)
    first = end if down else "0"
    t.lines.append(
        f"init {state}{t.brackets([first, *inner, *rest])} = {t.pick('0', *(['PP[p]'] if 'p' in rest else []))}"
    )
    t.lines.append(f"iter {v}{' desc' if down else ''}:")
    t.inside = True
    fresh = dict(t.shapes)
    beside, name = t.chance(0.5), ""
    if beside:
        name = t.name()
        t.einsum(name, [t.read(rng_choice(t, fresh)), f"{state}{t.brackets([old, *inner, *rest])}"], always=(v,))
    # What a step writes is read by that step alone, where it stands.
    own = beside and t.chance(0.5)
    source = f"{name}{t.brackets(list(t.shapes[name]))}" if own else t.read(rng_choice(t, fresh))
    text = f"{state}{t.brackets([old, *inner, *rest])} * 2 + {source}"
    space = [u for u in ("p", "m1", "m0", "n0", "m", "j", "f") if _uses(text, u)]
    gone = [u for u in space if u not in (v, *inner, *rest)]
    kept = f"{state}{t.brackets([new, *inner, *rest])}"
    if gone:
        part = t.name()
        stay = [u for u in space if (u in (v, *inner, *rest) and _uses(source, u)) or u == v]
        t.lines.append(t._statement(part, stay, f"{source} * {v}", [*stay, *gone]))
        t.shapes[part] = tuple(stay)
        text = f"{state}{t.brackets([old, *inner, *rest])} * 2 + {part}{t.brackets(stay)}"
    t.lines.append(f"{kept} = {text}")
    t.shapes[state] = ("g1" if t.tiled else "g", *inner, *rest)
    if t.chance(0.5):
        other = f"{state}{t.brackets([new if t.chance(0.5) else old, *inner, *rest])}"
        t.einsum(t.name(), [other, t.read(rng_choice(t, fresh))], always=(v,))
    t.inside = False
    t.lines.append("end")


def rng_choice(t: _Text, shapes: dict[str, Shape]) -> str:
    return t.rng.choice(sorted(shapes))


def _iteration(t: _Text) -> None:
    """Steps over another rank, each reading what the one before left."""
    state = t.name()
    whole = ["m1", "m0"] if t.tiled else ["m"]
    rest = [*(["p"] if t.chance(0.5) else []), *(whole if t.chance(0.4) else [])]
    start = t.read(rng_choice(t, t.shapes))
    free = [u for u in ("p", "m1", "m0", "n0", "m", "j", "f") if _uses(start, u)]
    t.lines.append(f"init {state}{t.brackets(['0', *rest])} = {start if set(free) <= set(rest) else '1'}")
    t.lines.append("iter n:")
    fresh = dict(t.shapes)
    found: list[str] = []
    for _ in range(t.rng.randint(1, 2)):
        name = t.name()
        reads = [t.read(rng_choice(t, {**fresh, **{f: t.shapes[f] for f in found}}))]
        reads = [r.replace("[N,", "[n,").replace("[0,", "[n,") if r.split("[")[0] in found else r for r in reads]
        t.einsum(name, [f"{state}{t.brackets(['n', *rest])}", *reads], always=("n", *rest))
        found.append(name)
    shape = t.shapes[found[-1]]
    gone = [u for u in shape if u not in ("n", *rest)]
    reduce = f" :: sum({','.join(gone)})" if gone else ""
    source = f"{found[-1]}{t.brackets(list(shape))}"
    if gone:
        part = t.name()
        stay = [u for u in shape if u not in gone]
        t.lines.append(f"{part}{t.brackets(stay)} = {source}{reduce}")
        source = f"{part}{t.brackets(stay)}"
        t.shapes[part] = tuple(stay)
    t.lines.append(f"{state}{t.brackets(['n+1', *rest])} = {state}{t.brackets(['n', *rest])} + {source}")
    t.lines.append("end")
    t.shapes[state] = ("n", *rest)
    # Elements of steps are read by a step; afterwards only the state is.
    for name in [f for f in t.shapes if f not in fresh and f != state]:
        del t.shapes[name]


def _largest(t: _Text) -> None:
    """A top-k along M, and a gather through it."""
    found = t.read(rng_choice(t, t.shapes))
    if not _uses(found, "m"):
        return
    name = t.name()
    stay = [u for u in ("p", "f") if _uses(found, u)]
    gone = [u for u in ("j",) if _uses(found, u)]
    if gone:
        return
    t.lines.append(f"{name}{t.brackets([*stay, 'k'])} = {found} :: topk(m)")
    if not any(line.startswith("rank k") for line in t.lines):
        t.lines.insert(0, "rank k = 2")
    after = t.name()
    t.lines.append(f"{after}{t.brackets(stay)} = A[{name}{t.brackets([*stay, 'k'])}] :: sum(k)")
    t.shapes[after] = tuple(stay)


def random_cascade(seed: int, *, plain: bool = False) -> Cascade:
    """The cascade of a seed; a plain one reads M only where its Einsums stand."""
    rng = random.Random(seed)
    while True:
        try:
            with warnings.catch_warnings():
                # What reads elements that were never written waits for nothing there.
                warnings.simplefilter("error", EinsumCascadeWarning)
                return parse(random_text(rng, plain=plain))
        except (CascadeError, EinsumCascadeWarning):
            continue
