"""Tune a cascade: search the schedules of its kernels on the GPU that is there, or rank them for one that is not."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import triton

from einsumcascade.analysis.targets import GpuTarget, gpu_target
from einsumcascade.codegen.launch import (
    DTYPE_BYTES,
    KERNEL_DTYPES,
    Built,
    build,
    feature_ranks,
    program_of,
    require_inputs,
    selectors,
    value_dtype,
    with_extents,
)
from einsumcascade.codegen.runner import DEFAULT_TARGET, allowed_precision, target_of
from einsumcascade.errors import Diagnostic, EinsumCascadeError, InputError, nearest
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.schedules import autotune, cache
from einsumcascade.schedules.autotune import Device, Trial, Tuning
from einsumcascade.schedules.heuristic import default_schedule
from einsumcascade.schedules.parts import in_fixed_order
from einsumcascade.schedules.program import Program
from einsumcascade.schedules.ranking import shortlist
from einsumcascade.schedules.schedule import SUMS, Schedule
from einsumcascade.schedules.space import Space, search_space
from einsumcascade.verify.measuring import Job, Processes, laid
from einsumcascade.verify.verify import filled_extents, index_ranks, random_inputs

# Candidates that are compiled, and seconds for all.
CANDIDATES, BUDGET_S = 24, 90.0
# Points of the largest Einsum that the reference is asked to compute, 9 times, in a few seconds.
_POINTS = 1 << 28
# Lengths it gets: three of the largest tiles, and more where a constant of the text may be a window.
_LENGTH, _WIDEST, _SHORTEST = 768, 2048, 64

Progress = Callable[[str, int, int, Trial | None], None]
Opened = AbstractContextManager[Device]


def tune(
    cascade: Cascade | str,
    *,
    extents: Mapping[str, int] | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    dtype: str = "bfloat16",
    target: str | None = None,
    precision: str | None = None,
    candidates: int = CANDIDATES,
    budget_s: float = BUDGET_S,
    jobs: int | None = None,
    seed: int = 0,
    keep: bool = True,
    progress: Progress | None = None,
    device: Callable[[Job, Callable[[Schedule], Built], GpuTarget, int], Opened] | None = None,
) -> Tuning:
    """Find the fastest schedule of a cascade for some extents.

    A model ranks the legal schedules; the best of them are compiled in parallel, compared with the float64 reference
    by the error rule, and timed in rounds that drop the slower half. The fastest is kept for later calls. On a machine
    without a GPU nothing is timed and nothing is kept: the candidates are ranked, compiled for `target`, and returned
    with registers, spills and shared memory.

    Args:
        cascade: constants put in; or the name of a gallery text or the path of a file.
        extents: by rank; lengths that are missing count 77, feature ranks 64, other ranks 2.
        inputs: tensors to tune on, by name, instead of `extents`; on a GPU they are timed as they lie.
        dtype: of the inputs, where none are given.
        target: what to compile for where there is no GPU; cuda:90 unless told.
        precision: of float32 products; None follows PyTorch.
        candidates: how many schedules to compile at most, the default one among them.
        budget_s: seconds for all of it.
        jobs: processes that compile; None: one a core.
        seed: of random inputs. keep: the result for later calls.
        progress: called with the stage, steps done and planned, and the best so far.
        device: opens the device, for tests.

    Returns: what became of each candidate. After an interruption (KeyboardInterrupt), what is known.
    Raises: CascadeError, InputError, TargetError; LoweringError: a construct has no lowering.
    Cost: at most about `budget_s` seconds.
    """
    begun = time.monotonic()
    if isinstance(cascade, str):
        from einsumcascade.gallery import load

        cascade = load(cascade)
    require_inputs(cascade)
    cascade = with_extents(cascade, extents or {})
    for what, n in (("candidates", candidates), ("budget_s", budget_s), ("jobs", 1 if jobs is None else jobs)):
        if not n > 0:
            raise _refused(
                "option-budget",
                f"{what} is {n:g}, which is not above 0",
                rule="the tuner needs a candidate, time and a process",
            )
    where = _device_of(inputs)
    if inputs is None:
        if dtype not in KERNEL_DTYPES:
            hint = nearest(dtype, KERNEL_DTYPES)
            raise _refused("wrong-dtype", f"kernels take no inputs of '{dtype}'", rule=_DTYPES, hint=hint)
        binding = bind(cascade, extents=filled_extents(cascade, extents or {}))
    else:
        dtype = str(value_dtype(inputs.values())).removeprefix("torch.")
        binding = bind(cascade, shapes={n: tuple(t.shape) for n, t in inputs.items()})
    on = target_of(torch.device(where)) if where else gpu_target(target or DEFAULT_TARGET)
    precision = precision or allowed_precision()
    features = {r: binding.extents[r] for r in feature_ranks(cascade)}
    source: Cascade = cascade

    def text(schedule: Schedule) -> Built:
        return build(source, extents=features, dtype=dtype, target=on, schedule=schedule, precision=precision)

    named = {r: binding.extents[r] for r in dict.fromkeys(rank_of(v) for i in cascade.inputs for v in i.indices)}
    spaces = _spaces(cascade, named, features, dtype, on)
    chosen = shortlist(spaces, extents=named, target=on, dtype=dtype, limit=candidates)
    if inputs is None:
        given = _drawn(cascade, binding, dtype, seed, real=bool(where or device))
    else:
        given = {n: laid(t.detach(), "cpu") for n, t in inputs.items()}
    job = Job(
        cascade=cascade,
        dtype=dtype,
        seed=seed,
        inputs=given,
        small=_small(cascade, given, binding) if where or device else {},
        counts=tuple(n for n, t in given.items() if not t.is_floating_point() and t.dtype != torch.bool),
        device=where,
    )
    opened = (device or _real)(job, text, on, jobs or os.cpu_count() or 1)
    with opened as found:
        left = budget_s - (time.monotonic() - begun)
        trials, was_cut = autotune.tune(chosen, found, budget_s=max(left, 1.0), progress=progress or (lambda *_: None))
        name = found.name
    tuning = Tuning(
        name=cascade.name,
        device=name,
        target=on.name,
        dtype=dtype,
        extents=named,
        trials=trials,
        was_cut=was_cut,
        seconds=time.monotonic() - begun,
    )
    if keep and tuning.best is not None:
        key = cache.key_of(
            cascade,
            extents=named,
            features=features,
            dtype=dtype,
            precision=precision,
            ordered=torch.are_deterministic_algorithms_enabled(),
            device=name,
            triton=str(triton.__version__),
        )
        cache.keep(key, cascade.name, tuning.best.schedule, tuning.to_dict())
    return tuning


_DTYPES = "inputs are " + ", ".join(KERNEL_DTYPES)


def _refused(code: str, headline: str, *, rule: str, hint: str = "") -> InputError:
    return InputError(diagnostics=(Diagnostic(code=code, headline=headline, rule=rule, hint=hint),))


def _device_of(inputs: Mapping[str, torch.Tensor] | None) -> str:
    """The GPU to tune on: that of the inputs, else the one present; empty: none."""
    own = next((t.device for t in (inputs or {}).values()), None)
    if own is not None and own.type == "cuda":
        return str(own)
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else ""


def _real(job: Job, text: Callable[[Schedule], Built], target: GpuTarget, jobs: int) -> Opened:
    name = torch.cuda.get_device_name(job.device) if job.device else ""
    return Processes(job=job, build=text, target=target, name=name, jobs=jobs)


def _spaces(
    cascade: Cascade, extents: Mapping[str, int], features: Mapping[str, int], dtype: str, target: GpuTarget
) -> list[Space]:
    """The search spaces of every form of the program, the plain one first."""
    options: dict[str, Any] = {"extents": extents, "dtype_bytes": DTYPE_BYTES[dtype], "target": target}
    ordered = torch.are_deterministic_algorithms_enabled()
    plain = in_fixed_order(None) if ordered else Schedule()
    spaces = [search_space(program_of(cascade, features, plain), form=plain, **options)]
    seen = {str(spaces[0].program)}
    for form in _forms(cascade, spaces[0].program, extents, dtype, target, plain):
        try:
            program = program_of(cascade, features, form)
            if str(program) not in seen:
                seen.add(str(program))
                spaces.append(search_space(program, form=form, **options))
        except EinsumCascadeError:
            # A form that this cascade has not.
            continue
    return spaces


def _forms(
    cascade: Cascade, program: Program, extents: Mapping[str, int], dtype: str, target: GpuTarget, plain: Schedule
) -> Iterator[Schedule]:
    """Forms worth trying: a bound instead of a running maximum, and split-K where programs are few."""
    if dtype == "bfloat16":
        yield replace(plain, reference="bound")
    if not torch.are_deterministic_algorithms_enabled():
        yield replace(plain, sums=SUMS[1])
    binding = bind(program.cascade, extents=extents)
    default = default_schedule(program, extents=binding.extents, dtype_bytes=DTYPE_BYTES[dtype], target=target)
    for k in program.kernels:
        if len(k.loops) != 1:
            continue
        tiles = default.kernels[k.name].tiles
        programs = math.prod(-(-binding.extent(v) // tiles.get(v, 1)) for v in k.residents)
        if programs > target.multiprocessors // 2:
            continue
        steps = -(-binding.extent(k.loops[0]) // max(1, tiles.get(k.loops[0], 1)))
        wanted = 1 << (target.multiprocessors // max(programs, 1)).bit_length()
        most = 1 << max(steps, 1).bit_length() - 1
        for parts in dict.fromkeys((min(wanted // 2, most), min(wanted, most))):
            if parts > 1:
                yield replace(plain, split={k.loops[0]: parts})


# --- inputs -----------------------------------------------------------------------------------------------------------


def _drawn(cascade: Cascade, binding: Binding, dtype: str, seed: int, *, real: bool) -> dict[str, torch.Tensor]:
    """Random inputs; where nothing is run, tensors of the same layout that take no memory.

    Statistics of a row that a forward has saved are float32, as it saves them.
    """
    features = set(feature_ranks(cascade))
    rows = {i.tensor for i in cascade.inputs if i.is_saved and not features & set(map(rank_of, i.indices))}
    if real:
        drawn = random_inputs(cascade, binding, dtype, seed=seed)
        return {n: t.float() if n in rows else t for n, t in drawn.items()}
    whole = selectors(cascade)
    found = {}
    for i in cascade.inputs:
        own = "int32" if i.tensor in whole else "float32" if i.tensor in rows else dtype
        shape = [binding.extents[rank_of(v)] for v in i.indices]
        found[i.tensor] = torch.empty(shape, dtype=getattr(torch, own), device="meta")
    return found


def _small(cascade: Cascade, inputs: Mapping[str, torch.Tensor], binding: Binding) -> dict[str, torch.Tensor]:
    """Slices of the inputs that the dense reference can compute: few heads, and lengths that end in half a tile.

    Ranks that positions of another tensor point into keep their extent, and so do feature ranks and those that the
    text defines. Machine code is the same for all lengths, so what is right here is right there.
    """
    pointed = set(index_ranks(cascade).values())
    fixed = {*feature_ranks(cascade), *(rank_of(d.name) for d in cascade.ranks), *pointed}
    reduced = {rank_of(v) for e in cascade.einsums for v in e.ranks}
    long = {rank_of(i.indices[-2]) for i in cascade.inputs if len(i.indices) > 1} | reduced
    extents = {rank_of(v): binding.extents[rank_of(v)] for i in cascade.inputs for v in i.indices}
    # A window must be narrower than what it slides over.
    window = max((int(x) for x in binding.constants.values() if math.isfinite(x) and x < _WIDEST), default=0)
    for batch, length in _cuts(max(_LENGTH, window * 3 // 2)):
        most = {r: n if r in fixed else length - 3 if r in long else batch for r, n in extents.items()}
        sliced = {
            i.tensor: inputs[i.tensor][tuple(slice(0, most[rank_of(v)]) for v in i.indices)].cpu().clone()
            for i in cascade.inputs
        }
        try:
            bound = bind(cascade, shapes={n: tuple(t.shape) for n, t in sliced.items()})
        except InputError:
            # Lengths that hang together, as a multiple of another, are not cut.
            break
        points = [math.prod(bound.extents.get(rank_of(v), 1) for v in e.space) for e in cascade.einsums]
        if max(points, default=1) <= _POINTS:
            return sliced
    return {n: t.cpu() for n, t in inputs.items()}


def _cuts(length: int) -> Iterator[tuple[int, int]]:
    """Extents of batches and lengths to try, the largest first."""
    yield 2, length
    while length >= _SHORTEST:
        yield 1, length
        length //= 2
