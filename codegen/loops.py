"""Loops of a machine program: basic blocks, dominators, natural loops. What an instruction means is `isa`'s."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from einsumcascade.codegen.isa import Instruction


def loop_bodies(instructions: Sequence[Instruction]) -> list[tuple[Instruction, frozenset[int], list[Instruction]]]:
    """List the natural loops: first instruction, blocks, and all instructions in the order of the program.

    A loop is an edge back to a block that dominates its source, with all that reaches the source: a compiler moves
    blocks that are rarely run behind the kernel's end, so an interval of addresses says little.

    Cost: nearly linear in the instructions.
    """
    if not instructions:
        return []
    starts, successors = _blocks(instructions)
    ends = [*starts[1:], len(instructions)]
    return [
        (instructions[starts[header]], body, [i for b in sorted(body) for i in instructions[starts[b] : ends[b]]])
        for header, body in _natural_loops(successors)
    ]


def _blocks(instructions: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Cut the instructions into basic blocks: the index each starts at, and the blocks that may follow each."""
    leaders = {0}
    for i, instruction in enumerate(instructions):
        if instruction.jump is not None:
            leaders.add(instruction.jump)
        if (instruction.jump is not None or not instruction.falls) and i + 1 < len(instructions):
            leaders.add(i + 1)
    starts = sorted(leaders)
    block_of = {start: block for block, start in enumerate(starts)}
    successors: list[list[int]] = []
    for end in [*starts[1:], len(instructions)]:
        last = instructions[end - 1]
        following = [block_of[last.jump]] if last.jump is not None else []
        if last.falls and end < len(instructions):
            following.append(block_of[end])
        successors.append(following)
    return starts, successors


def _natural_loops(successors: list[list[int]]) -> Iterable[tuple[int, frozenset[int]]]:
    """Yield header and body of every natural loop; loops of one header are one loop."""
    order = _postorder(successors)
    rank = {block: i for i, block in enumerate(order)}
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in successors[block]:
            predecessors[following].append(block)
    # Immediate dominators, by repeated intersection in reverse postorder.
    immediate = {0: 0}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            known = [p for p in predecessors[block] if p in immediate]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    if rank[best] < rank[other]:
                        best = immediate[best]
                    else:
                        other = immediate[other]
            if immediate.get(block) != best:
                immediate[block] = best
                changed = True
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            above = block
            while rank[above] < rank[header]:
                above = immediate[above]
            if above != header:
                continue
            body = bodies.setdefault(header, {header})
            pending = [block]
            while pending:
                inside = pending.pop()
                if inside not in body:
                    body.add(inside)
                    pending.extend(predecessors[inside])
    return [(header, frozenset(body)) for header, body in sorted(bodies.items())]


def _postorder(successors: list[list[int]]) -> list[int]:
    """List the blocks that the first one reaches, each after all that follow it but for edges back."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, following = stack[-1]
        for other in following:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(successors[other])))
                break
        else:
            order.append(block)
            stack.pop()
    return order
