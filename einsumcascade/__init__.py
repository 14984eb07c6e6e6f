"""Compile cascades of extended Einsums: parse, analyse, derive, compile and verify them.

Every name but `errors` is imported when it is first used, so `import einsumcascade` stays quick and an analysis never
loads PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from einsumcascade import errors

if TYPE_CHECKING:
    from einsumcascade import reference
    from einsumcascade.analysis.report import analyse
    from einsumcascade.codegen.flex import flex_attention
    from einsumcascade.codegen.op import compile
    from einsumcascade.codegen.tables import unchanged_masks
    from einsumcascade.gallery import load
    from einsumcascade.language.compose import mask
    from einsumcascade.language.parser import parse
    from einsumcascade.rewrites.derive import derive
    from einsumcascade.verify.tune import tune

__version__ = "0.1.0"

__all__ = [
    "analyse",
    "compile",
    "derive",
    "errors",
    "flex_attention",
    "load",
    "mask",
    "parse",
    "reference",
    "tune",
    "unchanged_masks",
]

# The module that defines each lazy name; `reference` is itself a module.
_HOMES = {
    "analyse": "einsumcascade.analysis.report",
    "compile": "einsumcascade.codegen.op",
    "derive": "einsumcascade.rewrites.derive",
    "flex_attention": "einsumcascade.codegen.flex",
    "load": "einsumcascade.gallery",
    "mask": "einsumcascade.language.compose",
    "parse": "einsumcascade.language.parser",
    "reference": "einsumcascade.reference",
    "tune": "einsumcascade.verify.tune",
    "unchanged_masks": "einsumcascade.codegen.tables",
}


def __getattr__(name: str) -> object:
    """Import the public name `name` from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
    # Kept, so that the next use does not come here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
