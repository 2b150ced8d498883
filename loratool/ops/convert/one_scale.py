"""Plan a language model's adapter for files that have one scale for all modules.

It is the scale that most modules have. Where another is, the quotient goes into B, which is exact if B's type or
float32 holds every product, as for a power of two; else it rounds, and the error is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from ...adapters.adapter import Adapter
from ...adapters.stacked import stack_factors
from ...adapters.updates.experts import Experts
from ...adapters.updates.low_rank import LowRank
from ...adapters.updates.update import UpdateSpec
from ...files.dtypes import SAFETENSORS, TensorSpec
from ...files.virtual import VirtualFile
from .factors import EPSILON, NO_LOSS, Loss, relative_error, scaled
from .language import plan_language
from .request import AdapterOutput, ConvertRequest


@dataclass(frozen=True)
class _Folded:
    """A module whose scale has become that of most."""

    update: UpdateSpec  # with the new scale, and the types that its factors have then
    ratio: float  # what B is multiplied by
    error: float  # ||D' - D|| / ||D||


def plan_one_scale(
    source: Adapter,
    request: ConvertRequest,
    kept: Mapping[str, UpdateSpec],
    dropped: tuple[str, ...],
    lost: Mapping[str, Loss],
) -> AdapterOutput:
    """Plan the output; raise what `plan_language` raises."""
    scales = Counter(update.scale for update in kept.values() if update.rank)
    common = scales.most_common(1)[0][0] if any(scales) else 1.0
    folded = {m: _fold(source, u, common) for m, u in kept.items() if u.rank and u.scale != common}
    if not folded or request.layout:
        return plan_language(source, request, kept, dropped, lost)
    of_tensor = {each.update.tensors[role]: (m, role) for m, each in folded.items() for role in "AB"}
    specs = dict(source.file.specs)
    specs |= {name: folded[m].update.specs[role] for name, (m, role) in of_tensor.items()}

    def load(name: str) -> Tensor:
        tensor = source.file.tensor(name)
        if name not in of_tensor:
            return tensor
        module, role = of_tensor[name]
        return _times(tensor, folded[module].ratio if role == "B" else 1.0, specs[name])

    updates = {m: folded[m].update if m in folded else update for m, update in kept.items()}
    file = VirtualFile(source.file, specs, load, source.file.metadata or {})
    own = {key: value for key, value in source.config.extra.items() if key != "r"}  # without it they are told anew
    made = plan_language(
        replace(source, file=file, updates=updates, config=replace(source.config, extra=own)),
        request,
        updates,
        dropped,
        {m: lost.get(m, NO_LOSS) + Loss(each.error**2, 1.0, "rounded") for m, each in folded.items()} | dict(lost),
    )
    rows = tuple(replace(row, how="folded") if row.name in folded and not row.error else row for row in made.modules)
    return replace(made, modules=rows)


def _fold(source: Adapter, update: UpdateSpec, scale: float) -> _Folded:
    """Return an update with the scale of most, and the error if its factors cannot be exactly those."""
    inner = update.cls.without_norm(update)
    loaded = source.load(inner)
    assert isinstance(loaded, LowRank | Experts)
    ratio = update.scale / scale if scale else 0.0
    B, is_exact = scaled(loaded.B, ratio)
    dtype = torch.promote_types(loaded.A.dtype, B.dtype)
    letters, error = SAFETENSORS[str(dtype).removeprefix("torch.")], 0.0
    if not is_exact or Fraction(ratio) * Fraction(scale) != Fraction(update.scale):
        other = replace(loaded, A=loaded.A.to(dtype), B=B.to(dtype), scale=scale)
        error = max(EPSILON, relative_error(stack_factors(loaded), stack_factors(other)))
    specs = {**update.specs, **{role: replace(update.specs[role], dtype=letters) for role in "AB"}}
    made = replace(update, specs=specs, scale=scale)
    return _Folded(made, ratio, error)


def _times(tensor: Tensor, ratio: float, spec: TensorSpec) -> Tensor:
    dtype = next(getattr(torch, name) for name, letters in SAFETENSORS.items() if letters == spec.dtype)
    return (tensor.double() * ratio).to(dtype) if ratio != 1.0 else tensor.to(dtype)
