"""An op as a torch.nn.Module that holds some of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from einsumcascade.codegen.checks import check_kinds
from einsumcascade.errors import InputError, nearest

if TYPE_CHECKING:
    from einsumcascade.codegen.op import Op


class Module(torch.nn.Module):
    """An op some of whose inputs are parameters or buffers of the module; `forward` takes the others.

    Args:
        op: what `forward` computes.
        held: inputs by name: a torch.nn.Parameter is trained, a plain tensor becomes a buffer.

    Raises: InputError: `unknown-input`; `wrong-type`, `tensor-subclass`; `name-clash`: a module has an attribute of
        that name already.
    """

    def __init__(self, op: Op, held: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.op = op
        known = [i.tensor for i in op.cascade.inputs]
        for name, t in held.items():
            if name not in known:
                raise InputError.of(
                    "unknown-input",
                    f"the cascade has no input '{name}'",
                    rule=f"the inputs are ({', '.join(known)})",
                    hint=nearest(name, known),
                )
            check_kinds({name: t})
            if hasattr(self, name):
                raise InputError.of(
                    "name-clash",
                    f"a module has an attribute '{name}' already",
                    rule="what a module holds is an attribute of it by the name of the input",
                    hint="rename the input, or hand it over in each call",
                )
            if isinstance(t, torch.nn.Parameter):
                self.register_parameter(name, t)
            else:
                self.register_buffer(name, t)
        self.held = tuple(held)
        self.taken = tuple(n for n in known if n not in held)

    def forward(self, *tensors: torch.Tensor, **named: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Call the op; the inputs that are not held come in the order of `in`, or by name."""
        if len(tensors) > len(self.taken):
            raise InputError.of(
                "too-many-inputs",
                f"{len(tensors)} tensors for {len(self.taken)} inputs",
                rule=f"the module holds {', '.join(self.held)} and takes ({', '.join(self.taken)})",
            )
        given = dict(zip(self.taken, tensors, strict=False))
        for name in named:
            if name in given or name in self.held:
                raise InputError.of(
                    "repeated-input",
                    f"{name} is {'held' if name in self.held else 'given by position'} and given by name",
                    rule=f"the module takes ({', '.join(self.taken)})",
                )
        held = {name: getattr(self, name) for name in self.held}
        return self.op(**{**given, **named, **held})

    def extra_repr(self) -> str:
        """The signature."""
        return f"{self.op.cascade.name}({', '.join(self.taken)})"
