"""What makes a plan legal: one place for each Einsum, the order of the cascade, and its barriers."""

from __future__ import annotations

from einsumcascade.analysis.spatial.facts import Facts
from einsumcascade.analysis.spatial.files import Table
from einsumcascade.analysis.spatial.mapping import Kernel, Plan
from einsumcascade.language.ir import Apply, variables


def check_plan(facts: Facts, plan: Plan, *, table: Table) -> None:
    """Check a plan against its cascade.

    Args:
        facts: of the cascade.
        plan: its kernels.
        table: the plan's place in the file, for messages.

    Raises:
        ModelError: `mapping`: an Einsum has no place or two, a kernel reads what a later one writes, tiles pass by a
            barrier, a tensor that is needed again is not kept, or one is kept that is not needed.
    Cost: O(kernels * ranks * accesses).
    """
    _check_places(facts, plan, table)
    written = {e: k for k, kernel in enumerate(plan.kernels) for e in kernel.einsums}
    for k, kernel in enumerate(plan.kernels):
        for einsum in kernel.einsums:
            for tensor in facts.needs(einsum):
                if written.get(tensor, k) > k:
                    kernel.table.reject(
                        f"{einsum} reads {tensor}, which a later kernel writes",
                        key="phases",
                        value=einsum,
                        rule="kernels stand in the order of the cascade",
                        hint="move one of the two Einsums to the kernel of the other",
                    )
        for tensor in kernel.kept:
            if tensor not in kernel.einsums and not any(tensor in facts.needs(e) for e in kernel.einsums):
                kernel.table.reject(
                    f"{tensor} is kept, but no Einsum of the kernel reads or writes it",
                    key="keep",
                    value=tensor,
                    rule="a kernel keeps tiles that it works on",
                )
        _check_barriers(facts, kernel)
        _check_carried(facts, kernel)


def reading_passes(facts: Facts, kernel: Kernel, tensor: str) -> int:
    """Count how often a kernel reads a tensor that it does not keep: once for each level that reads it.

    Cost: O(ranks * accesses of the kernel).   Source: FuseMax (MICRO 2024), section III-A.
    """
    most = 1
    for part, level_of in facts.levels.values():
        if facts.has_all(tensor, part):
            readers = {level_of[e] for e in kernel.einsums if tensor in facts.needs(e) and e in level_of}
            most = max(most, len(readers))
    return most


def _check_places(facts: Facts, plan: Plan, table: Table) -> None:
    seen: dict[str, None] = {}
    for kernel in plan.kernels:
        for k, phase in enumerate(kernel.phases):
            for name in [n for names in phase.values() for n in names]:
                if name in seen:
                    kernel.table.tables("phases")[k].reject(
                        f"{name} has two places", value=name, rule="each Einsum runs once, on one array"
                    )
                seen[name] = None
    missing = [t for t in facts.einsums if t not in seen]
    if missing:
        table.reject(
            f"{', '.join(missing)} {'have' if len(missing) > 1 else 'has'} no place",
            rule="a plan runs every Einsum of the cascade",
            hint=f"name {missing[0]} in a phase",
        )


def _check_barriers(facts: Facts, kernel: Kernel) -> None:
    for rank, (part, level_of) in facts.levels.items():
        here = {e: level_of[e] for e in facts.einsums if e in kernel.einsums and e in level_of}
        if len(set(here.values())) < 2:
            continue
        first, last = (next(e for e, at in here.items() if at == f(here.values())) for f in (min, max))
        for v in kernel.loops:
            if v in (part.whole, *part.parts):
                kernel.table.reject(
                    f"{first} and {last} share a loop over {v}, with a barrier over {rank} between them",
                    key="loops",
                    value=v,
                    rule=f"over {rank}, {last} waits until all of {first} is done",
                    hint=f"leave {v} out of the loops, split the kernel, or rewrite the cascade to fewer passes",
                )
        for tensor in here:
            after = [e for e, at in here.items() if tensor in facts.needs(e) and at > here[tensor]]
            if after and tensor not in kernel.kept and facts.has_all(tensor, part):
                kernel.table.reject(
                    f"{tensor} is not kept, and {after[0]} reads it after a barrier over {rank}",
                    key="keep",
                    rule="what crosses a barrier inside a kernel stays in a buffer",
                    hint=f"keep {tensor}, or end the kernel between the two",
                )


def _check_carried(facts: Facts, kernel: Kernel) -> None:
    for tensor in kernel.einsums:
        einsum = facts.einsums[tensor]
        steps = variables(*(i for i in einsum.indices if isinstance(i, Apply)))
        over = [v for v in (*einsum.ranks, *steps) if v in kernel.loops]
        if over and tensor not in kernel.kept:
            kernel.table.reject(
                f"{tensor} is not kept, and grows from tile to tile of {over[0]}",
                key="keep",
                rule="what a loop carries stays in a buffer",
                hint=f"keep {tensor}",
            )
