"""Closed forms: what each text of the gallery means, written from its mathematics in plain NumPy.

One module a family. They import NumPy and each other, nothing else: the interpreter is held against them, so they share
no code with it. A form takes the inputs by name and, as keywords, constants of its text; it gives the outputs by name.
`causal_NAME` is NAME under a causal mask.
"""

from __future__ import annotations

from einsumcascade.reference.closed_forms import (
    core,
    diagnostics,
    layouts,
    linked,
    maps,
    memories,
    modifiers,
    selected,
    several,
    solved,
    states,
)
from einsumcascade.reference.closed_forms.parts import Closed

TABLES = (
    core.CLOSED_FORMS,
    modifiers.CLOSED_FORMS,
    maps.CLOSED_FORMS,
    several.CLOSED_FORMS,
    diagnostics.CLOSED_FORMS,
    states.CLOSED_FORMS,
    linked.CLOSED_FORMS,
    selected.CLOSED_FORMS,
    solved.CLOSED_FORMS,
    memories.CLOSED_FORMS,
    layouts.CLOSED_FORMS,
)
CLOSED_FORMS: dict[str, Closed] = {name: form for table in TABLES for name, form in table.items()}
assert len(CLOSED_FORMS) == sum(map(len, TABLES)), "two closed forms have one name"
