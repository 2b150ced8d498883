"""Give all modules of a language model's adapter one scale, for files that have no other.

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
from ...files.dtypes import TORCH_FLOATS, safetensors_name
from ...files.virtual import VirtualFile
from .factors import EPSILON, NO_LOSS, Loss, relative_error, scaled


@dataclass(frozen=True)
class OneScale:
    """An adapter whose modules have one scale."""

    adapter: Adapter
    updates: Mapping[str, UpdateSpec]
    errors: Mapping[str, float]  # module that had another scale -> ||D' - D|| / ||D||, 0 if none of D is lost

    def lost(self, former: Mapping[str, Loss]) -> dict[str, Loss]:
        """Return what is lost of each module, with what was lost before."""
        both = {m: former.get(m, NO_LOSS) for m, error in self.errors.items() if error}
        added = {
            m: Loss(loss.relative**2 + self.errors[m] ** 2, 1.0, loss.how or "rounded") for m, loss in both.items()
        }
        return {**former, **added}


def with_one_scale(source: Adapter, kept: Mapping[str, UpdateSpec]) -> OneScale:
    """Return the adapter with the scale of most of the updates that are `kept`.

    Raises:
        InputError: a factor holds nan or inf.
    """
    scales = Counter(update.scale for update in kept.values() if update.rank and update.scale)
    common = scales.most_common(1)[0][0] if scales else 1.0
    others = {m: update for m, update in kept.items() if update.rank and update.scale != common}
    if not others:
        return OneScale(source, kept, {})
    folded = {m: _fold(source, update, common) for m, update in others.items()}
    of_tensor = {update.tensors[role]: (m, role) for m, update in others.items() for role in "AB"}
    specs = dict(source.file.specs)
    specs |= {name: folded[m][0].specs[role] for name, (m, role) in of_tensor.items()}

    def load(name: str) -> Tensor:
        tensor = source.file.tensor(name)
        if name not in of_tensor:
            return tensor
        module, role = of_tensor[name]
        product = tensor.double() * (others[module].scale / common) if role == "B" else tensor
        return product.to(getattr(torch, TORCH_FLOATS[specs[name].dtype]))

    peft = {key: value for key, value in source.config.peft.items() if key != "r"}  # without it, scales are told anew
    adapter = replace(
        source,
        file=VirtualFile(source.file, specs, load, source.file.metadata or {}),
        updates={**source.updates, **{m: update for m, (update, _) in folded.items()}},
        config=replace(source.config, peft=peft),
    )
    updates = {m: folded[m][0] if m in folded else update for m, update in kept.items()}
    return OneScale(adapter, updates, {m: error for m, (_, error) in folded.items()})


def _fold(source: Adapter, update: UpdateSpec, scale: float) -> tuple[UpdateSpec, float]:
    """Return an update with another scale and the types that its factors have then, and the error."""
    loaded = source.load(update.cls.without_norm(update))
    assert isinstance(loaded, LowRank | Experts)
    ratio = update.scale / scale
    B, is_exact = scaled(loaded.B, ratio)
    dtype = torch.promote_types(loaded.A.dtype, B.dtype)
    error = 0.0
    if not is_exact or Fraction(ratio) * Fraction(scale) != Fraction(update.scale):
        made = replace(loaded, A=loaded.A.to(dtype), B=B.to(dtype), scale=scale)
        error = max(EPSILON, relative_error(stack_factors(loaded), stack_factors(made)))
    letters = safetensors_name(dtype)
    specs = {**update.specs, **{role: replace(update.specs[role], dtype=letters) for role in "AB"}}
    return replace(update, specs=specs, scale=scale), error
