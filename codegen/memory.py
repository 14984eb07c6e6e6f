"""Addresses, loads and stores of a kernel as Triton text: pointers that move tile by tile, or tensor descriptors."""

from __future__ import annotations

from dataclasses import dataclass, field

from einsumcascade.codegen.forms import conjunction
from einsumcascade.codegen.kernel_ir import Count, Load, Loop, Store, TileKernel, all_statements
from einsumcascade.codegen.names import safe
from einsumcascade.codegen.texts import ATOM, Text, Texts
from einsumcascade.language.ir import Expr, Num, Scalar, Var, apply, rank_of, reads, variable_of, variables
from einsumcascade.schedules.bounds import linear
from einsumcascade.schedules.intervals import summed

INDENT = "    "


@dataclass
class Memory:
    """Lines of a kernel's text as they grow, and how its tensors are read and written."""

    kernel: TileKernel
    precision: str
    coarse: bool = False
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    described: dict[str, bool] = field(default_factory=dict)  # tensors whose loads are all by descriptors
    noted: set[str] = field(default_factory=set)  # Einsums already named in a comment
    pointed: str = ""  # the last line that sets a pointer: pieces of a tile share it
    texts: Texts = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Texts(self.kernel, self.coarse)

    def _line(self, text: str, *, comment: str = "") -> None:
        self.lines.append(INDENT * self.depth + text + (f"  # {comment}" if comment else ""))

    def _temporaries(self) -> None:
        """Write what the next line uses by name."""
        for t, name in self.texts.temporaries.items():
            self._line(f"{name} = {t}")
        self.texts.temporaries.clear()

    def _assign(self, value: str, text: str, axes: tuple[str, ...], note: str) -> None:
        self._temporaries()
        if note and note not in self.noted:
            self.noted.add(note)
            self._line(f"# {note}")
        self._line(f"{value} = {text}", comment=self.texts.shape(axes) if axes else "")

    def _grown(self, text: str, axes: tuple[str, ...], wanted: tuple[str, ...]) -> str:
        if axes == wanted:
            return text
        return f"tl.broadcast_to({self.texts.expand(Text(text, ATOM, axes), wanted).text}, {self.texts.shape(wanted)})"

    def _dimensions(self, s: Load | Store, loop: Loop | None) -> tuple[list[str], list[tuple[Text, str]], str | None]:
        """Scalar offsets, tile offsets and the stride by which the pointer moves each step, if it does."""
        base: list[str] = []
        tile: list[tuple[Text, str]] = []
        moves: str | None = None
        for i, d in zip(s.indices, self.kernel.tensors[s.tensor], strict=True):
            stride = stride_name(s.tensor, d)
            walked = self._walked(i, loop)
            if walked is not None:
                assert loop is not None and loop.inner is not None
                times, offset = walked
                moves = stride if times == 1 else f"tl.cast({stride}, tl.int64) * {times}"
                inner = Text(f"r_{loop.inner}", ATOM, (loop.inner,))
                tile.append((inner if times == 1 else Text(f"{times} * {inner.text}", 0, inner.axes), stride))
                if offset is None:
                    continue
                i = offset
            t = self.texts.of(i, raw=True)
            if t.axes:
                tile.append((t, stride))
            elif not (isinstance(i, Num) and i.value == 0):
                base.append(self._offset(i, stride))
        return base, tile, moves

    def _offset(self, i: Expr, stride: str) -> str:
        """How far a number moves a pointer, in 64 bits."""
        text = self.texts.of(i, raw=True).text
        is_wide = isinstance(i, Var) and i.name in self.kernel.batch
        return f"{text if is_wide else f'tl.cast({text}, tl.int64)'} * {stride}"

    def _walked(self, i: Expr, loop: Loop | None) -> tuple[int, Expr | None] | None:
        """How an index follows a loop over tiles: how many elements a position, and from where if not from 0.

        None where it stands still, or its way depends on more than numbers that the loop leaves as they are.
        """
        if loop is None or loop.inner is None or loop.index not in variables(i):
            return None
        form, position = linear(i), linear(position_of(loop))
        assert position is not None
        times = {form.get(k, 0) for k in position} if form is not None else set()
        if form is None or len(times) != 1:
            return None
        rest = {k: n for k, n in form.items() if k not in position}
        if any(loop.index in variables(k) or self.texts.of(k, raw=True).axes or self._varies(k, loop) for k in rest):
            return None
        return times.pop(), summed(rest) if rest else None

    def _varies(self, i: Expr, loop: Loop) -> bool:
        """Whether an expression reads what a loop computes."""
        made = {s.value.name for s in all_statements((loop,)) if not isinstance(s, Store | Loop)}
        return any(r.tensor in made for r in reads(i))

    def _is_fixed(self, s: Load | Store, loop: Loop) -> bool:
        """Whether the address is a pointer that moves by one stride a step, tile by tile."""
        return all(
            self._walked(i, loop) is not None if loop.index in variables(i) else not self._varies(i, loop)
            for i in s.indices
        )

    def _address(self, s: Load | Store, loop: Loop | None) -> None:
        if self._by_descriptor(s, loop):
            self._describe(s, loop)
            return
        base, tile, _ = self._dimensions(s, loop)
        name = suffix_of(s)
        axes = s.value.axes if isinstance(s, Load) else s.axes
        start = ""
        if loop is not None and loop.parts == 1 and loop.segments[0].lo != Num(value=0) and loop.inner is not None:
            _, _, moves = self._dimensions(s, loop)
            if moves is not None:
                start = f" + {self.texts.plain(loop.segments[0].lo)}.to(tl.int64) * {moves}"
        parts = [
            self.texts.expand(
                Text(f"{t.text if t.precedence == ATOM else f'({t.text})'}.to(tl.int64)", ATOM, t.axes), axes
            ).text
            + f" * {stride}"
            for t, stride in tile
        ]
        self._temporaries()
        pointer = f"p_{pointer_of(s)} = {' + '.join([safe(s.tensor), *base])}{start}"
        if pointer != self.pointed:
            self._line(pointer)
            self.pointed = pointer
        if parts:
            self._line(f"o_{name} = {' + '.join(parts)}")

    def _load(self, s: Load, loop: Loop | None) -> None:
        name = suffix_of(s)
        if self._by_descriptor(s, loop):
            self._assign(s.value.name, f"d_{name}.load([{self._corners(s, loop)}])", s.value.axes, "")
            return
        text = self._element(s, loop)
        if s.mask:
            mask = self.texts.inside(conjunction(s.mask), s.value.axes)
            text += f", mask={mask}, other=0.0"
        self._assign(s.value.name, f"tl.load({text})", s.value.axes, "")

    def _element(self, s: Load | Store, loop: Loop | None) -> str:
        """The pointers to the elements of a tile."""
        axes = s.value.axes if isinstance(s, Load) else s.axes
        text = f"p_{pointer_of(s)} + o_{suffix_of(s)}" if axes else f"p_{pointer_of(s)}"
        if loop is not None and loop.parts > 1 and (moves := self._dimensions(s, loop)[2]) is not None:
            text += f" + tl.cast({start_name(loop)}, tl.int64) * {moves}"
        return text

    def _store(self, s: Store, loop: Loop | None = None) -> None:
        """Write a tile; `loop`: whose head has set the pointer."""
        if loop is None:
            self._address(s, None)
        if s.note and s.note not in self.noted:
            self.noted.add(s.note)
            self._line(f"# {s.note}")
        text = self._grown(
            self.texts.inside(s.expr, tuple(v for v in s.axes if v in self.texts.of(s.expr).axes)),
            tuple(v for v in s.axes if v in self.texts.of(s.expr).axes),
            s.axes,
        )
        text = f"({text})" if " " in text and not text.startswith("tl.") else text
        if self._by_descriptor(s, loop):
            self._line(f"d_{suffix_of(s)}.atomic_add([{self._corners(s, loop)}], {text})")
            return
        where = self._element(s, loop)
        mask = f", mask={self.texts.inside(conjunction(s.mask), s.axes)}" if s.mask else ""
        self._temporaries()
        if s.adds:
            spanned = {v for i in s.indices for v in self.texts.of(i, raw=True).axes}
            if set(s.axes) - spanned:
                where = f"tl.broadcast_to({where}, {self.texts.shape(s.axes)})"
            self._line(f"tl.atomic_add({where}, {text}{mask}, sem='relaxed')")
            return
        self._line(f"tl.store({where}, {text}.to({safe(s.tensor)}.dtype.element_ty){mask})")

    def _spans(self, i: Expr) -> bool:
        return bool(self.texts.of(i, raw=True).axes)

    def _by_descriptor(self, s: Load | Store, loop: Loop | None) -> bool:
        """Whether a load, or what is added, is a box of its tensor: two plain axes, its last axis among them."""
        axes = s.value.axes if isinstance(s, Load) else s.axes
        if not self.kernel.schedule.descriptors or len(axes) != 2 or not (isinstance(s, Load) or s.adds):
            return False
        spans = [self._spans(i) for i in s.indices]
        box = [i for i, spanned in zip(s.indices, spans, strict=True) if spanned]
        plain = all(isinstance(i, Var) or ((at := self._walked(i, loop)) is not None and at[0] == 1) for i in box)
        # One made of numbers that a loop reads would be made anew in each of its steps.
        yes = spans[-1] and sum(spans) == 2 and plain and (loop is not None or not reads(*s.indices))
        # A box is read, or written, whole but for what lies outside the tensor.
        declared = zip(s.indices, self.kernel.tensors[s.tensor], strict=True)
        within = [apply("lt", i, Scalar(name=rank_of(d))) for i, d in declared]
        yes = yes and set(s.mask) <= set(within)
        if isinstance(s, Store):
            yes = yes and tuple(v for i in s.indices for v in self.texts.of(i, raw=True).axes) == axes
        self.described[s.tensor] = self.described.get(s.tensor, False) or yes
        return yes

    def _corners(self, s: Load | Store, loop: Loop | None) -> str:
        """The first coordinates of a box."""
        return ", ".join(self._corner(i, loop) for i in s.indices if self._spans(i))

    def _corner(self, i: Expr, loop: Loop | None) -> str:
        walked = self._walked(i, loop)
        if walked is not None:
            assert loop is not None
            offset = f"tl.cast({self.texts.plain(walked[1])}, tl.int32) + " if walked[1] is not None else ""
            return offset + start_name(loop)
        assert isinstance(i, Var)
        axis = self.kernel.axes[i.name]
        if axis.role == "grid":
            return f"i_{i.name} * {self.texts.size(i.name)}"
        return " + ".join(map(self.texts.size, axis.before)) or "0"

    def _describe(self, s: Load | Store, loop: Loop | None) -> None:
        name = suffix_of(s)
        declared = list(zip(s.indices, self.kernel.tensors[s.tensor], strict=True))
        axes = [(i, d) for i, d in declared if self._spans(i)]
        base = [
            self._offset(i, stride_name(s.tensor, d)) for i, d in declared if not self._spans(i) and i != Num(value=0)
        ]
        shape = ", ".join(self.texts.extent(rank_of(d)) for _, d in axes)
        strides = f"{stride_name(s.tensor, axes[0][1])}, 1"
        block = ", ".join(self.texts.size(v) for v in (s.value.axes if isinstance(s, Load) else s.axes))
        self._line(
            f"d_{name} = tl.make_tensor_descriptor({' + '.join([safe(s.tensor), *base])}, "
            f"shape=[{shape}], strides=[{strides}], block_shape=[{block}])"
        )


def start_name(loop: Loop) -> str:
    return f"start_{variable_of(loop.rank)}" if loop.inner is not None else f"i_{loop.index}"


def position_product(loop: Loop) -> tuple[Expr, Expr]:
    assert loop.inner is not None
    return Var(name=loop.index), Scalar(name=rank_of(loop.inner))


def position_of(loop: Loop) -> Expr:
    """The looped coordinate as loop form writes it."""
    if loop.inner is None:
        return Var(name=loop.index)
    return apply("add", apply("mul", *position_product(loop)), Var(name=loop.inner))


def stride_name(tensor: str, variable: str) -> str:
    return f"stride_{tensor}_{variable}"


def suffix_of(s: Load | Count | Store) -> str:
    """The end of the names of a load's or a store's offsets."""
    return s.value.name.removeprefix("b_") if isinstance(s, Load | Count) else s.tensor + s.piece


def pointer_of(s: Load | Count | Store) -> str:
    """The end of the name of its pointer, which the pieces of a tile share."""
    return suffix_of(s) if isinstance(s, Count) else suffix_of(s).removesuffix(s.piece)
