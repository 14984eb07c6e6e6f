"""What the inputs of a cascade are known to be: values that another computation has saved."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

from einsumcascade.errors import InputError
from einsumcascade.language.ir import Cascade, Einsum, reads
from einsumcascade.language.parser import parse


def saved_value(cascade: Cascade, text: str) -> Einsum:
    """Read what an input is known to be, as an Einsum that writes it. Raises: as `known_value`."""
    name, found = known_value(cascade, text)
    value = next(e for e in found.einsums if e.tensor == found.output_names[-1])
    return replace(value, tensor=name)


def known_value(cascade: Cascade, text: str) -> tuple[str, Cascade]:
    """Read what an input is known to be: `O[p,f] = A[p,m] * V[m,f] :: sum(m)` over tensors of the cascade.

    Returns: the name of the input, and the cascade with that value as its last output, under a name of its own.
    Raises:
        InputError: `option-saved`: the left side is no input, or the value needs that input itself.
        CascadeError: the text is wrong.
    """
    name = text.split("[")[0].split("=")[0].strip()
    if name not in {i.tensor for i in cascade.inputs}:
        _refuse(f"'{name}' is no input of '{cascade.name}'")
    taken = {i.tensor for i in cascade.inputs} | {e.tensor for e in cascade.einsums}
    own = f"{name}KNOWN"
    while own in taken:
        own += "N"
    found = parse(f"{cascade}\n{own}{text.strip()[len(name) :]}\nout {own}\n", name=cascade.name)
    needed: set[str] = set()
    pending = [own]
    made = {e.tensor: e for e in found.einsums}
    for t in pending:
        e = made.get(t)
        new = {r.tensor for r in reads(e.expr, *e.where)} - needed if e is not None else set()
        needed |= new
        pending += sorted(new)
    if name in needed:
        _refuse(f"the value of {name} needs {name} itself")
    return name, found


def _refuse(headline: str) -> NoReturn:
    raise InputError.of(
        "option-saved",
        headline,
        rule="a saved value is an input, and what it is, as an Einsum over other tensors of the cascade",
        hint="for instance O[p,f] = A[p,m] * V[m,f] :: sum(m)",
    )
