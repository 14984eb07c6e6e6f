"""Verify many texts at once: every dtype, at the extents and on the inputs that break kernels.

One trial is one text on one kind of input in one dtype: its generated kernel, run and judged by the error rule.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from einsumcascade import gallery
from einsumcascade.codegen.dtypes import selectors
from einsumcascade.codegen.launch import build
from einsumcascade.codegen.programs import feature_ranks
from einsumcascade.codegen.runner import present_target
from einsumcascade.gallery.draws import drawn, extents_of, recipe
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade, Iter, Output, rank_of, walk
from einsumcascade.reference.interpret import run
from einsumcascade.verify.gradients import judged_gradient
from einsumcascade.verify.judging import Row, judged
from einsumcascade.verify.verify import DTYPES

KINDS = {
    "ones": "every extent 1 that may be",
    "primes": "few queries, prime extents, heads of 17",
    "swapped": "more queries than keys",
    "below": "lengths one below a tile",
    "above": "lengths one above a tile",
    "keyless": "rows without a key",
    "large": "scores of hundreds",
    "strided": "slices of larger tensors, not contiguous, at an offset",
    "offset": "inputs around 8 instead of 0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One text on one kind of input in one dtype.

    Args:
        name, kind, dtype: which. status: "pass", "FAIL", "ERROR" or "skip".
        ratio: the largest error over its bound, of any output or gradient. note: what failed, or why it was left out.
        without: why there are no gradients, empty if there are.
    """

    name: str
    kind: str
    dtype: str
    status: str
    ratio: float = 0.0
    note: str = ""
    without: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The trials that were made, and how many there should be."""

    trials: tuple[Trial, ...]
    planned: int

    @property
    def passed(self) -> bool:
        """Whether all trials were made and none failed."""
        return self.is_complete and not self.failures

    @property
    def is_complete(self) -> bool:
        """Whether nothing cut it short."""
        return len(self.trials) == self.planned

    @property
    def failures(self) -> tuple[Trial, ...]:
        """What failed or could not run."""
        return tuple(t for t in self.trials if t.status in ("FAIL", "ERROR"))

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "passed": self.passed,
            "complete": self.is_complete,
            "planned": self.planned,
            "trials": [asdict(t) for t in self.trials],
        }

    def __str__(self) -> str:
        names = list(dict.fromkeys(t.name for t in self.trials))
        kinds = [k for k in KINDS if any(t.kind == k for t in self.trials)]
        width = max(map(len, ("text", *names)))
        lines = [f"{k:9} {KINDS[k]}" for k in kinds]
        lines += ["", "largest error over its bound, of all dtypes; - where a kind does not apply", ""]
        lines.append(f"{'text':<{width}}  " + " ".join(f"{k:>8}" for k in kinds))
        for name in names:
            own = [[t for t in self.trials if (t.name, t.kind) == (name, k)] for k in kinds]
            verdict = "FAIL" if any(t.status in ("FAIL", "ERROR") for cell in own for t in cell) else "pass"
            lines.append(f"{name:<{width}}  " + " ".join(f"{_cell(cell):>8}" for cell in own) + f"  {verdict}")
        lines += ["", *(f"{t.status}  {t.name} {t.kind} {t.dtype}: {t.note}" for t in self.failures)]
        made = [t for t in self.trials if t.status != "skip"]
        cut = "" if self.is_complete else f"; INTERRUPTED after {len(self.trials)} of {self.planned}"
        total = f"{len(names)} texts, {len(made)} trials, {len(self.failures)} failed"
        forward = [n for n in names if any(t.without for t in self.trials if t.name == n)]
        if forward:
            lines.append(f"forward only, for want of a gradient: {', '.join(forward)}")
        return "\n".join([*lines, f"{total}{cut}", "", "PASS" if self.passed else "FAIL"])


def _cell(trials: Sequence[Trial]) -> str:
    bad = next((t.status for t in trials if t.status in ("FAIL", "ERROR")), "")
    made = [t.ratio for t in trials if t.status == "pass"]
    return bad or (f"{max(made):.2f}" if made else "-")


def verify_gallery(
    names: Sequence[str] | None = None,
    *,
    dtypes: Sequence[str] = DTYPES,
    kinds: Sequence[str] = tuple(KINDS),
    seed: int = 0,
    jobs: int | None = None,
    progress: Callable[[int, int, Trial], None] | None = None,
) -> Sweep:
    """Verify the kernel of every gallery text that has one, on every kind of input, in every dtype.

    Args:
        names: of texts; None: all whose header says `kernel: yes`.
        dtypes, kinds: which. seed: of the inputs. jobs: processes; None: one a core.
        progress: called after each trial with the number made, the number planned, and the trial.

    Returns: the trials; after an interruption (KeyboardInterrupt) those made so far.
    Cost: half a second to seconds a trial on a CPU; some twenty trials a text.
    """
    chosen = [n for n in names or gallery.names() if names or gallery.header(n).kernel == "yes"]
    tasks = [(name, kind) for name in chosen for kind in kinds]
    found: dict[tuple[str, str], list[Trial]] = {}
    planned, made = len(tasks) * len(dtypes), 0
    # A process that has run PyTorch's threads must not be forked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs or os.cpu_count() or 1, mp_context=context, initializer=_ignore_interrupts)
    try:
        futures: dict[Future[list[Trial]], tuple[str, str]] = {
            pool.submit(trials_of, name, kind, tuple(dtypes), seed): (name, kind) for name, kind in tasks
        }
        for future in as_completed(futures):
            name, kind = futures[future]
            try:
                found[name, kind] = future.result()
            except BrokenProcessPool as error:
                found[name, kind] = [_errored(name, kind, d, error) for d in dtypes]
            for trial in found[name, kind]:
                made += 1
                if progress is not None:
                    progress(made, planned, trial)
    except KeyboardInterrupt:
        for process in list((pool._processes or {}).values()):
            process.terminate()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return Sweep(trials=tuple(t for task in tasks for t in found.get(task, ())), planned=planned)


def _ignore_interrupts() -> None:
    """An interruption is for the process that collects the trials."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def trials_of(name: str, kind: str, dtypes: Sequence[str], seed: int) -> list[Trial]:
    """Run one text on one kind of input."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [_trial(name, kind, dtype, seed) for dtype in dtypes]


def _trial(name: str, kind: str, dtype: str, seed: int) -> Trial:
    try:
        cascade = gallery.load(name)
        if kind == "keyless":
            changed = without_keys(cascade)
            if changed is None:
                return Trial(name=name, kind=kind, dtype=dtype, status="skip", note="no rank of keys to empty")
            cascade = changed
        extents = _extents(cascade, name, kind, dtype)
        if extents is None:
            return Trial(name=name, kind=kind, dtype=dtype, status="skip", note="its extents are its own")
        rng = np.random.default_rng(seed)
        arrays = drawn(cascade, name, rng, extents, large=kind == "large")
        counts = {n for n, x in arrays.items() if np.asarray(x).dtype.kind in "iu"}
        inputs = {n: _tensor(cascade, name, kind, dtype, n, np.asarray(x)) for n, x in arrays.items()}
        rows = judged(cascade, inputs, _bound(cascade, inputs), dtype, seed=seed, counts=counts)
        backward = judged_gradient(cascade, inputs, dtype, seed=seed, counts=counts)
        without = backward if isinstance(backward, str) else ""
        rows += [] if isinstance(backward, str) else backward
        if dtype == "float16" and not all(r.verdict.passed for r in rows) and _overflows(cascade, inputs):
            note = "values beyond the range of float16, in which products take their operands"
            return Trial(name=name, kind=kind, dtype=dtype, status="skip", note=note)
    # What is no message of ours is a finding too, and must not end the other trials.
    except Exception as error:
        return _errored(name, kind, dtype, error)
    return _verdict(name, kind, dtype, rows, without)


def _errored(name: str, kind: str, dtype: str, error: Exception) -> Trial:
    note = f"{type(error).__name__}: {error}".splitlines()[0]
    return Trial(name=name, kind=kind, dtype=dtype, status="ERROR", note=note)


def _verdict(name: str, kind: str, dtype: str, rows: Sequence[Row], without: str) -> Trial:
    compared = [r for r in rows if r.largest == r.largest]
    if not compared:
        return Trial(name=name, kind=kind, dtype=dtype, status="skip", note="no element has a value")
    limit = float(torch.finfo(getattr(torch, dtype)).max)
    if any(r.largest > limit / 2 or r.overflows for r in compared):
        return Trial(name=name, kind=kind, dtype=dtype, status="skip", note="values beyond the range of the dtype")
    ratio = max(_ratio(r.verdict.max_error, r.verdict.max_bound) for r in rows)
    ratio = max(ratio, *(_ratio(r.verdict.rms_error, r.verdict.rms_bound) for r in rows))
    bad = [f"{r.output} {r.verdict}" for r in rows if not r.verdict.passed]
    status = "FAIL" if bad else "pass"
    return Trial(name=name, kind=kind, dtype=dtype, status=status, ratio=ratio, note="; ".join(bad), without=without)


def _ratio(error: float, bound: float) -> float:
    return error / bound if bound else 0.0 if error == 0 else float("inf")


def without_keys(cascade: Cascade) -> Cascade | None:
    """The text with one more condition, after which some rows, or all, have no key; None where no rank is reduced."""
    if any(isinstance(s, Iter) for s in walk(cascade.body)):
        return None
    features = {v for v in (v for i in cascade.inputs for v in i.indices) if rank_of(v) in feature_ranks(cascade)}
    declared = {v for i in cascade.inputs for v in i.indices}
    pairs = [
        (key, [v for v in e.free if v not in features and v in declared and e.free.index(v) > 0])
        for e in cascade.einsums
        if e.reduction is not None
        for key in e.ranks
        if key not in features and key in declared
    ]
    if not pairs:
        return None
    key, rows = next(((k, r) for k, r in pairs if r), pairs[0])
    # Every third row sees none; without rows, nothing does.
    return cascade.constrain(f"{rows[-1]} % 3 != 0 or {key} < 0" if rows else f"{key} < 0")


def _extents(cascade: Cascade, name: str, kind: str, dtype: str) -> dict[str, int] | None:
    made = recipe(name)
    if kind in ("ones", "swapped", "large") and kind not in made.sets:
        return None
    if kind in ("ones", "swapped", "large"):
        return extents_of(cascade, name, kind)
    odd = extents_of(cascade, name)
    if kind not in ("below", "above", "primes"):
        return odd
    features = feature_ranks(cascade)
    own = {*made.extents, *made.fixed}
    heads = {r: 17 if kind == "primes" else 16 for r in odd if r in features and r not in own}
    if kind == "primes":
        return {**odd, **heads}
    if len(odd) == len(features):
        return None
    built = build(cascade, extents={**odd, **heads}, dtype=dtype, target=present_target())
    step = -1 if kind == "below" else 1
    tiles: dict[str, int] = {}
    for k in built.schedule.kernels.values():
        for v, tile in k.tiles.items():
            tiles[rank_of(v)] = max(tile, tiles.get(rank_of(v), 0))
    sized = {r: max(n + step, 1) for r, n in tiles.items() if r in odd and r not in features and r not in own}
    # Batches and heads stay few: the reference is dense.
    few = {r: min(n, 2) for r, n in odd.items() if r not in tiles and r not in own and r not in features}
    return {**odd, **few, **heads, **sized} if sized else None


def _tensor(cascade: Cascade, name: str, kind: str, dtype: str, tensor: str, array: np.ndarray) -> torch.Tensor:
    whole = array.dtype.kind in "iu"
    if tensor in selectors(cascade) and (whole or array.dtype == bool):
        t = torch.from_numpy(array.astype(np.int64))
    else:
        shift = 8.0 if kind == "offset" and tensor not in recipe(name).draws else 0.0
        t = torch.from_numpy(array.astype(np.float64) + shift).to(getattr(torch, dtype))
    return _sliced(t) if kind == "strided" and t.ndim else t


def _sliced(t: torch.Tensor) -> torch.Tensor:
    """The same numbers as every second one of a larger tensor, its axes in another order, from an offset."""
    turned = t.permute(*reversed(range(t.ndim)))
    larger = torch.full([2 * n + 3 for n in turned.shape], 7, dtype=t.dtype)
    view = larger[tuple(slice(1, 1 + 2 * n, 2) for n in turned.shape)]
    view.copy_(turned)
    return view.permute(*reversed(range(t.ndim)))


def _overflows(cascade: Cascade, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether some value that the cascade computes is finite, and too large for float16."""
    arrays = {n: t.double().numpy() if t.is_floating_point() else t.numpy() for n, t in inputs.items()}
    everything = tuple(Output(tensor=e.tensor) for e in cascade.einsums)
    found = run(replace(cascade, outputs=everything), arrays)
    limit = float(torch.finfo(torch.float16).max)
    return any((np.isfinite(x) & (np.abs(x) > limit)).any() for x in found.values())


def _bound(cascade: Cascade, inputs: Mapping[str, torch.Tensor]) -> Binding:
    return bind(cascade, shapes={name: tuple(t.shape) for name, t in inputs.items()})
