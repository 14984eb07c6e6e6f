"""What a call has that no schedule was given or tuned for: its lengths may ask for a form that no text can know of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from einsumcascade.analysis.targets import GpuTarget
from einsumcascade.codegen.dtypes import DTYPE_BYTES
from einsumcascade.codegen.launch import Built, build, program_binding
from einsumcascade.codegen.programs import feature_ranks, program_of, text_binding
from einsumcascade.errors import EinsumCascadeError
from einsumcascade.language.extents import Binding, bind
from einsumcascade.language.ir import Cascade, rank_of
from einsumcascade.schedules.calls import Form, Rule, rule_of, with_rows
from einsumcascade.schedules.schedule import Schedule
from einsumcascade.schedules.usual import usual_schedule


def call_rule(cascade: Cascade, extents: Mapping[str, int], dtype: str, target: GpuTarget) -> Rule | None:
    """The rule for calls of a cascade; None where all of them have the usual form, or none has a lowering."""
    try:
        usual = _chosen(cascade, extents, Form(), dtype, target)
        return rule_of(program_of(cascade, extents), usual)
    except EinsumCascadeError:
        return None


def build_call(
    cascade: Cascade, *, form: Form, extents: Mapping[str, int], dtype: str, target: GpuTarget, precision: str
) -> Built:
    """Build the kernels of a form; where the cascade has it not, those of the nearest that it has.

    Args: as those of `build`.

    Raises: as `build` of the usual form.
    """
    for wanted in dict.fromkeys((form, replace(form, split=()))):
        try:
            return build(
                cascade,
                extents=extents,
                dtype=dtype,
                target=target,
                schedule=_chosen(cascade, extents, wanted, dtype, target, precision),
                precision=precision,
            )
        except EinsumCascadeError:
            # No merge of its states is proven, say.
            continue
    return build(cascade, extents=extents, dtype=dtype, target=target, precision=precision)


def call_form(cascade: Cascade, extents: Mapping[str, int], dtype: str, target: GpuTarget) -> Form:
    """The form of a call of these extents, the usual one where a length is missing; feature ranks count 64."""
    lengths = {rank_of(v) for i in cascade.inputs for v in i.indices}
    features = {r: extents.get(r, 64) for r in feature_ranks(cascade)}
    if not lengths <= {*extents, *features}:
        return Form()
    binding = bind(cascade, extents={**features, **extents})
    return form_of(call_rule(cascade, extents, dtype, target), binding, target)


def call_schedule(
    cascade: Cascade, extents: Mapping[str, int], dtype: str, target: GpuTarget, precision: str = "ieee"
) -> Schedule | None:
    """The schedule of a call of these extents, where they ask for more than the usual text."""
    form = call_form(cascade, extents, dtype, target)
    if form == Form():
        return None
    features = {r: extents[r] for r in feature_ranks(cascade) if r in extents}
    return build_call(cascade, form=form, extents=features, dtype=dtype, target=target, precision=precision).schedule


def form_of(rule: Rule | None, binding: Binding, target: GpuTarget) -> Form:
    """The form of a call."""
    return Form() if rule is None else rule.form(binding, target)


def _chosen(
    cascade: Cascade, extents: Mapping[str, int], form: Form, dtype: str, target: GpuTarget, precision: str = "ieee"
) -> Schedule:
    program = program_of(cascade, extents, form.schedule)
    sizes = program_binding(program, text_binding(cascade, extents)).extents
    options: dict[str, Any] = {"extents": sizes, "dtype_bytes": DTYPE_BYTES[dtype], "target": target}
    usual = usual_schedule(program, precision=precision, **options)
    return replace(form.schedule, kernels=with_rows(program, usual, form, **options).kernels)
