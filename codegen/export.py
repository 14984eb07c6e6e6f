"""An op as one file of its own: kernels, their launches and the autograd.Function, in need of torch and triton only."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from einsumcascade.codegen.dtypes import selectors
from einsumcascade.codegen.emit_triton import module
from einsumcascade.codegen.launch import Built
from einsumcascade.codegen.names import extent_name, safe
from einsumcascade.codegen.programs import feature_ranks, text_binding
from einsumcascade.codegen.tables import block_table
from einsumcascade.language.ir import Cascade, Expr, Output, Scalar, rank_of, subexpressions, transform
from einsumcascade.language.printer import print_expr
from einsumcascade.rewrites.differentiate import Gradient
from einsumcascade.schedules.program import identifier

INDENT = "    "
# Names that a wrapper has for itself.
OWN = frozenset({"torch", "ctx", "extents", "grid", "AXES", "FIXED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What a file is made of.

    Args:
        original: the cascade. forward: its kernels, with what is saved put out where there is a gradient.
        gradient, backward: the gradient and its kernels; None where a construct has none.
        versions: of what exported it, by name.
        missing: why there is no gradient, where inputs could have one.
    """

    original: Cascade
    forward: Built
    gradient: Gradient | None
    backward: Built | None
    versions: Mapping[str, str]
    missing: str = ""

    @property
    def builts(self) -> tuple[Built, ...]:
        """The forward, and the backward where there is one."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


def exported(e: Exported) -> str:
    """Write the file: header, kernels, launches, op.

    Returns: a module; the same arguments give the same text.
    """
    name = _word(identifier(e.original.name))
    texts = tuple(t for b in e.builts for t in b.texts)
    kernels = module(texts, title=f"{name}: {_title(e)}", cascade=_header(e), target=e.forward.target)
    imports = "import contextvars\n\nimport torch" if _has_descriptors(e) else "import torch"
    kernels = kernels.replace("\nimport triton\n", f"\n{imports}\nimport triton\n", 1)
    kernels = "\n".join(line.rstrip() for line in kernels.splitlines())
    parts = [kernels, _tables(e), CHECK, *_helpers(e), _launches(e.forward, f"_{name}_forward")]
    if e.gradient is not None and e.backward is not None:
        parts += [_launches(e.backward, f"_{name}_backward"), _function(e.gradient, name)]
    parts.append(_op(e, name))
    return "\n\n\n".join(parts) + "\n"


def _title(e: Exported) -> str:
    return "a PyTorch op, forward and backward." if e.gradient is not None else "a PyTorch op without a gradient."


def _header(e: Exported) -> str:
    """Cascades, versions and choices; `module` indents it."""
    b = e.forward
    fixed = ", ".join(f"{r} = {n}" for r, n in _fixed(e).items())
    lines = [str(e.original)]
    if e.gradient is not None:
        made = {o.tensor for o in e.gradient.forward.outputs}
        saved = [i.tensor for i in e.gradient.backward.inputs if i.tensor in made]
        lines += ["", "# The gradient, derived from it" + (f"; saved: {', '.join(saved)}" if saved else "")]
        lines += [str(e.gradient.backward)]
    versions = ", ".join(f"{n} {v}" for n, v in e.versions.items())
    lines += ["", f"# Exported with {versions}", f"# for {b.target.name}, {b.dtype}{', ' + fixed if fixed else ''}"]
    lines += [f"# {line}" for built in e.builts for line in str(built.schedule).splitlines()]
    return "\n".join(lines)


def _word(name: str) -> str:
    """An identifier that means nothing else in the file."""
    name = safe(name)
    return f"{name}_" if name in OWN else name


def _fixed(e: Exported) -> dict[str, int]:
    """Extents that the kernels hold as numbers."""
    out: dict[str, int] = {}
    for b in e.builts:
        extents = text_binding(b.cascade, b.extents).extents
        out |= {r: extents[r] for r in feature_ranks(b.cascade)}
    return out


def _tables(e: Exported) -> str:
    """The ranks of each input, and the extents that are fixed."""
    rows = [f'{INDENT}"{i.tensor}": {_strings(i.indices)},' for i in e.original.inputs]
    fixed = ", ".join(f'"{r}": {n}' for r, n in _fixed(e).items())
    about = "# The ranks of every input, and the extents that the kernels are made for."
    return "\n".join([about, "AXES = {", *rows, "}", f"FIXED = {{{fixed}}}"])


def _strings(indices: tuple[str, ...]) -> str:
    inside = ", ".join(f'"{rank_of(v)}"' for v in indices)
    return f"({inside},)" if len(indices) == 1 else f"({inside})"


CHECK = '''def _check(**tensors):
    """Refuse tensors that do not fit together, or that the kernels are not made for."""
    extents = dict(FIXED)
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, another input on {device}")
        if tensor.dim() != len(AXES[name]):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not ({', '.join(AXES[name])})")
        for rank, extent in zip(AXES[name], tensor.shape):
            if extents.setdefault(rank, extent) != extent:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: {rank} is {extent}, not {extents[rank]}")'''


BOXED = '''def _boxed(tensor):
    """A tensor as descriptors take it, or a copy: rows side by side, addresses in steps of 16 bytes."""
    strides = [n * tensor.element_size() for n in tensor.stride()[:-1]]
    if tensor.stride(-1) == 1 and not tensor.data_ptr() % 16 and not any(n % 16 for n in strides):
        return tensor
    if tensor.shape[-1] * tensor.element_size() % 16:
        raise ValueError(f"rows of {tensor.shape[-1]} elements of {tensor.dtype} are no multiples of 16 bytes")
    return tensor.clone(memory_format=torch.contiguous_format)


def _with_memory(launches):
    """Give the descriptors that kernels make their memory, for these launches alone."""

    def run(*tensors):
        def allocate(size, alignment, stream):
            return torch.empty(size, dtype=torch.int8, device=tensors[0].device)

        context = contextvars.copy_context()
        context.run(triton.set_allocator, allocate)
        return context.run(launches, *tensors)

    return run'''


MULTIPROCESSORS = '''def _multiprocessors(tensor):
    """The multiprocessors of a tensor's GPU; 1 where it is on none, as for Triton's interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1'''


def _has_descriptors(e: Exported) -> bool:
    return any(t.descriptors for b in e.builts for t in b.texts)


def _helpers(e: Exported) -> list[str]:
    """What launches call besides."""
    out = []
    if any(k.tables for b in e.builts for k in b.kernels):
        source = inspect.getsource(block_table).replace("import torch\n\n    ", "")
        # Without annotations, whose names are not all in the file.
        head = "def _block_table(x, reduce, sizes, ascending=None):"
        out.append(re.sub(r"def block_table\(.*?\) -> [\w.]+:", head, source, count=1, flags=re.DOTALL).rstrip())
    out += [MULTIPROCESSORS] if any(k.walks_grid for b in e.builts for k in b.kernels) else []
    return out + ([BOXED] if _has_descriptors(e) else [])


@dataclass(frozen=True, slots=True)
class _Names:
    """What tensors and extents are called in a launch."""

    tensors: frozenset[str]

    def extent(self, rank: str) -> str:
        return _word(extent_name(rank, self.tensors))

    def number(self, expr: Expr, cascade: Cascade) -> str:
        """A whole expression over extents as Python."""
        values = {c.name: c.expr for c in cascade.constants}
        while any(isinstance(s, Scalar) and s.name in values for s in subexpressions(expr)):
            expr = transform(expr, lambda e: values.get(e.name) if isinstance(e, Scalar) else None)
        return print_expr(
            transform(expr, lambda e: Scalar(name=self.extent(e.name)) if isinstance(e, Scalar) else None)
        )


def _launches(built: Built, function: str) -> str:
    """A function that makes the outputs and launches the kernels."""
    cascade = built.cascade
    names = _Names(frozenset(t for k in built.kernels for t in k.tensors))
    inputs = [_word(i.tensor) for i in cascade.inputs]
    described = [t for t in inputs if any(t in map(_word, text.descriptors) for text in built.texts)]
    body = [f"{t} = _boxed({t})" for t in described]
    for kernel, text in zip(built.kernels, built.texts, strict=True):
        body += _buffers(built, kernel.outputs, kernel.tensors, names)
        for t in kernel.tables:
            ends = f", {t.ascending}" if t.ascending is not None else ""
            body.append(f'{_word(t.name)} = _block_table({_word(t.tensor)}, "{t.reduce}", {t.sizes}{ends})')
        counts = [f"triton.cdiv({names.extent(rank_of(v))}, {kernel.axes[v].size})" for v in kernel.tiles]
        counts += [names.extent(rank_of(v)) for v in kernel.batch]
        tiles = " * ".join(counts) or "1"
        if kernel.walks_grid:
            tiles = f"min({tiles}, {kernel.schedule.persistent} * _multiprocessors({inputs[0]}))"
        body.append(f"grid = ({tiles},)")
        rows = _rows([_word(t) for t in text.tensors])
        rows += _rows([f"*{_word(t)}.stride()" for t in text.tensors if kernel.tensors[t]])
        rows += [", ".join(names.extent(r) for r in text.lengths)]
        rows += [", ".join(f"{n}={value}" for n, value in text.constexprs.items())]
        rows += [f"num_warps={kernel.schedule.warps}, num_stages={kernel.schedule.stages}"]
        body += ["if grid[0]:", f"{INDENT}{text.name}[grid]("]
        body += [f"{2 * INDENT}{row}," for row in rows if row]
        body += [f"{INDENT})"]
    head = _extent_lines(built, names, "\n".join(body))
    given = {i.tensor for i in cascade.inputs}
    added = {t for k in built.kernels for t in k.scattered}
    main = _value_dtype(built)

    def handed(o: Output) -> str:
        if o.tensor in added and o.dtype is None:
            return f"{_word(o.tensor)}.to({main})"
        return f"{_word(o.tensor)}.clone()" if o.tensor in given else _word(o.tensor)

    outputs = ", ".join(map(handed, cascade.outputs))
    guarded = [f"with torch.cuda.device_of({inputs[0]}):", *(f"{INDENT}{line}" for line in body)]
    lines = [*head, *guarded, f"return {outputs}"]
    head = ["@_with_memory"] if any(t.descriptors for t in built.texts) else []
    head.append(f"def {function}({', '.join(inputs)}):")
    return "\n".join([*head, *(f"{INDENT}{line}" for line in lines)])


def _rows(items: list[str]) -> list[str]:
    """Items as lines of some 90 characters."""
    out = [""]
    for item in items:
        if len(out[-1]) + len(item) > 90:
            out.append("")
        out[-1] += f", {item}" if out[-1] else item
    return out


def _buffers(built: Built, outputs: tuple[str, ...], axes: Mapping[str, tuple[str, ...]], names: _Names) -> list[str]:
    """Make what a kernel writes, as `allocate` does."""
    cascade = built.cascade
    main = _value_dtype(built)
    device = f"{_word(cascade.inputs[0].tensor)}.device"
    dtypes = {o.tensor: o.dtype for o in cascade.outputs}
    lines = []
    for t in outputs:
        shape = "".join(f"{names.extent(rank_of(v))}, " for v in axes[t])
        shape = shape if len(axes[t]) == 1 else shape.removesuffix(", ")
        name = dtypes.get(t, "float32")
        # What programs add to begins at 0; its sum has the digits of float32 until it is handed on.
        adds = any(t in k.scattered for k in built.kernels)
        dtype = "torch.float32" if adds else main if name is None else f"torch.{name}"
        make = "zeros" if adds else "empty"
        lines.append(f"{_word(t)} = torch.{make}(({shape.rstrip(' ')}), dtype={dtype}, device={device})")
    return lines


def _value_dtype(built: Built) -> str:
    """The dtype of what is computed: that of the first input that holds real numbers, float32 if none does."""
    index_only = selectors(built.cascade)
    return next(
        (f"{_word(i.tensor)}.dtype" for i in built.cascade.inputs if i.tensor not in index_only), "torch.float32"
    )


def _extent_lines(built: Built, names: _Names, body: str) -> list[str]:
    """Bind the extents that a launch names, each from the first input that has it."""
    used = set(re.findall(r"\w+", body))
    defined = {rank_of(d.name): d.expr for d in built.program.cascade.ranks}
    pending = [r for r in defined if names.extent(r) in used]
    for r in pending:
        more = re.findall(r"\w+", names.number(defined[r], built.program.cascade))
        used |= set(more)
        pending += [x for x in defined if names.extent(x) in more and x not in pending]
    lines: list[str] = []
    bound: set[str] = set()
    for i in built.cascade.inputs:
        ranks = [rank_of(v) for v in i.indices]
        wanted = [names.extent(r) if names.extent(r) in used and r not in bound else "_" for r in ranks]
        named = [n for n, w in enumerate(wanted) if w != "_"]
        bound |= set(ranks)
        if len(named) == 1:
            lines.append(f"{wanted[named[0]]} = {_word(i.tensor)}.shape[{named[0]}]")
        elif named:
            lines.append(f"{', '.join(wanted)} = {_word(i.tensor)}.shape")
    for r, expr in defined.items():
        if r in pending and r not in bound:
            lines.append(f"{names.extent(r)} = {names.number(expr, built.program.cascade)}")
    return lines


def _function(g: Gradient, name: str) -> str:
    """The autograd.Function."""
    given = [_word(i.tensor) for i in g.original.inputs]
    made = [_word(o.tensor) for o in g.forward.outputs]
    own = [_word(o) for o in g.original.output_names]
    received = [_word(g.received[o]) if o in g.received else f"_{n}" for n, o in enumerate(g.original.output_names)]
    saved = [_word(i.tensor) for i in g.backward.inputs if i.tensor not in g.received.values()]
    found = [_word(o) for o in g.backward.output_names]
    back = [_word(g.gradients[i.tensor]) if i.tensor in g.gradients else "None" for i in g.original.inputs]
    still = [_word(o) for o in g.original.output_names if o not in g.received]
    lines = [
        f"class {_class(name)}(torch.autograd.Function):",
        f"{INDENT}@staticmethod",
        f"{INDENT}def forward(ctx, {', '.join(given)}):",
        f"{2 * INDENT}{', '.join(made)} = _{name}_forward({', '.join(given)})",
        f"{2 * INDENT}ctx.save_for_backward({', '.join(saved)})",
        *([f"{2 * INDENT}ctx.mark_non_differentiable({', '.join(still)})"] if still else []),
        f"{2 * INDENT}return {', '.join(own)}",
        "",
        f"{INDENT}@staticmethod",
        f"{INDENT}@torch.autograd.function.once_differentiable",
        f"{INDENT}def backward(ctx, {', '.join(received)}):",
        *([f"{2 * INDENT}{', '.join(saved)}{',' if len(saved) == 1 else ''} = ctx.saved_tensors"] if saved else []),
        f"{2 * INDENT}{', '.join(found)} = _{name}_backward({', '.join(_word(i.tensor) for i in g.backward.inputs)})",
        f"{2 * INDENT}return {', '.join(back)}",
    ]
    return "\n".join(lines)


def _class(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_")) + "Function"


def _op(e: Exported, name: str) -> str:
    """What a user calls."""
    given = ", ".join(_word(i.tensor) for i in e.original.inputs)
    shapes = [f"{_word(i.tensor)}: ({', '.join(rank_of(v) for v in i.indices)})" for i in e.original.inputs]
    checked = ", ".join(
        f"**{{{i.tensor!r}: {_word(i.tensor)}}}" if _word(i.tensor) != i.tensor else f"{i.tensor}={i.tensor}"
        for i in e.original.inputs
    )
    refused = []
    if e.missing:
        refused = [
            f"{INDENT}if torch.is_grad_enabled() and any(t.requires_grad for t in ({given},)):",
            f"{2 * INDENT}raise NotImplementedError({f'{name} has no gradient here: {e.missing}'!r})",
        ]
    call = f"{_class(name)}.apply({given})" if e.gradient is not None else f"_{name}_forward({given})"
    return "\n".join(
        [
            f"def {name}({given}):",
            f'{INDENT}"""Compute {", ".join(e.original.output_names)}.',
            "",
            f"{INDENT}{'; '.join(shapes)}.",
            f'{INDENT}"""',
            f"{INDENT}_check({checked})",
            *refused,
            f"{INDENT}return {call}",
        ]
    )
