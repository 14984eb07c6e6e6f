"""What a partition puts into kernels: anchors, and the groups of them that share one."""

from __future__ import annotations

from dataclasses import dataclass, field

from einsumcascade.language.ir import Einsum, Statement


@dataclass(slots=True)
class Unit:
    """An anchor: one Einsum, or an iterative block with its inits; a solver is a block that reduces over `loops`."""

    statements: tuple[Statement, ...]
    writes: tuple[str, ...]
    residents: tuple[str, ...]
    loops: tuple[str, ...]
    stage: int = 0
    solves: bool = False

    @property
    def joins(self) -> bool:
        """Whether it may share a kernel with what it reads."""
        return self.solves or isinstance(self.statements[-1], Einsum)

    @property
    def signature(self) -> tuple[frozenset[str], frozenset[str], int]:
        """What the anchors of one kernel have in common."""
        return frozenset(self.residents), frozenset(self.loops), self.stage


@dataclass(slots=True)
class Group:
    """The anchors of a kernel, and the outputs that it writes besides."""

    residents: tuple[str, ...]
    loops: tuple[str, ...]
    stage: int
    units: list[Unit] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
