"""What an op demands of its tensors: kinds, devices and dtypes; ranks and extents are checked as they are bound."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from einsumcascade.codegen.dtypes import KERNEL_DTYPES, WHOLE_DTYPES, selectors
from einsumcascade.errors import InputError
from einsumcascade.language.ir import Cascade

# What holds its elements itself.
PLAIN: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter)
# What PyTorch traces with: library operators take them.
TRACED: tuple[type, ...] = (FakeTensor, FunctionalTensor)


def check_kinds(inputs: Mapping[str, object]) -> None:
    """Refuse what is no tensor, and tensors that are more than their elements.

    Raises: InputError: `wrong-type`, `tensor-subclass`.
    """
    for name, t in inputs.items():
        if not isinstance(t, torch.Tensor):
            raise InputError.of(
                "wrong-type", f"{name} is a {type(t).__name__}, not a torch.Tensor", rule="an op takes tensors"
            )
        if type(t) not in PLAIN and type(t) not in TRACED:
            raise InputError.of(
                "tensor-subclass",
                f"{name} is a {type(t).__name__}, a subclass of torch.Tensor",
                rule="a kernel reads plain memory: an op takes torch.Tensor and torch.nn.Parameter",
                hint="hand over what is inside: `to_local()` of a DTensor, `to_padded_tensor(0.0)` of a nested tensor",
            )
        if t.is_nested or t.layout != torch.strided:
            raise InputError.of(
                "tensor-subclass",
                f"{name} is {'nested' if t.is_nested else str(t.layout).removeprefix('torch.')}, not a strided tensor",
                rule="a kernel reads plain memory: an op takes torch.Tensor and torch.nn.Parameter",
                hint=f"{name}.to_padded_tensor(0.0)" if t.is_nested else f"{name}.to_dense()",
            )


def check_tensors(cascade: Cascade, inputs: Mapping[str, torch.Tensor], wide: frozenset[str]) -> None:
    """Check kinds, devices and dtypes of a call.

    Args:
        cascade: what is called. inputs: by name, in order.
        wide: inputs that may be float32 whatever their axes.

    Raises: InputError: `wrong-type`, `tensor-subclass`, `wrong-device`, `wrong-dtype`.
    """
    check_kinds(inputs)
    index_only = selectors(cascade)
    first_name, first = next(iter(inputs.items()))
    if first.device.type not in ("cpu", "cuda"):
        raise InputError.of("wrong-device", f"{first_name} is on {first.device}", rule="tensors are on a GPU or a CPU")
    for name, t in inputs.items():
        if t.device != first.device:
            raise InputError.of(
                "wrong-device",
                f"{name} is on {t.device}, but {first_name} on {first.device}",
                rule="all inputs are on one device",
                hint=f"{name}.to({str(first.device)!r})",
            )
    whole = {getattr(torch, n) for n in WHOLE_DTYPES}
    values = {n: t for n, t in inputs.items() if n not in index_only or t.dtype not in whole}
    known = {getattr(torch, n) for n in KERNEL_DTYPES} | ({torch.float64} if first.device.type == "cpu" else set())
    for name, t in values.items():
        if t.dtype not in known:
            raise InputError.of(
                "wrong-dtype",
                f"{name} is {t.dtype}",
                rule="inputs are float16, bfloat16 or float32; float64 on a CPU only; a tensor that only "
                "indexes or compares may hold whole numbers",
            )
    if not values:
        return
    main_name, main = next(iter(values.items()))
    for name, t in values.items():
        if t.dtype != main.dtype and not (t.dtype == torch.float32 and (t.dim() < 2 or name in wide)):
            raise InputError.of(
                "wrong-dtype",
                f"{name} is {t.dtype}, but {main_name} is {main.dtype}",
                rule="inputs share the dtype of the first; one of fewer than two axes may be float32",
                hint=f"{name}.to({main.dtype})",
            )
