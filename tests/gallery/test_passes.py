"""The passes that are kept beside the gallery are those that are counted.

`python -m tests.gallery.test_passes` counts them anew.
"""

from __future__ import annotations

import json
from pathlib import Path

from einsumcascade import gallery
from einsumcascade.analysis.passes import passes_of

PATH = Path(gallery.__file__).with_name("passes.json")


def counted() -> dict[str, dict[str, int]]:
    """The passes over each rank of each text."""
    return {name: passes_of(gallery.load(name)) for name in gallery.names()}


def test_the_passes_that_are_kept_are_those_that_are_counted() -> None:
    assert gallery.passes() == counted()


if __name__ == "__main__":
    rows = (f"{json.dumps(name)}: {json.dumps(ranks)}" for name, ranks in counted().items())
    PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
