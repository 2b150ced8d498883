"""Write DoRA for programs that divide by the norms of W, where DoRA divides by those of W + D.

ComfyUI's `weight_decompose` (`comfy/weight_adapter/base.py`) computes m' (W + D) / (||W|| + eps) of each row, in
float32. With m' = m (||W|| + eps) / ||W + D|| that is DoRA's W' at strength 1. At another strength the program
interpolates from W to that W', as DoRA does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.updates.dora import DoRA
from ..binding.modules.placement import place_update
from ..binding.modules.resolve import resolve_modules
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.dtypes import TensorSpec
from ..numerics.arrays import Numbers, rounded_to
from ..numerics.forms import F32, Wide
from ..numerics.norms import row_norms
from ..numerics.products import Products
from ..numerics.stored import Zero
from ..numerics.workspace import Workspace
from .change_to_lora import read_weight
from .lazy import Made, S, Tensors, stored_tensors, with_factors
from .log import NO_LOSS, Loss

EPS = 2.0**-23  # the program adds float32's epsilon to a norm


def to_base_norms(state: S, modules: Sequence[str], base: Checkpoint) -> S:
    """Return the adapter with magnitudes in float32 for norms of W alone.

    Args:
        modules: DoRA of LoRA along the outputs.
        base: the adapter's model.

    Raises:
        InputError: a module is not in the base, or has no norm.
    """
    source, planned = state.adapter, dict[str, Made]()
    alone = source.only(modules)
    matches, absent = resolve_modules(base.specs, alone, base.configs)
    if absent:
        raise InputError(f"of {source.name} is not in {base.path}", culprit=absent[0])
    for module, update in alone.updates.items():
        places = [
            (match.name, placement)
            for match in matches[module]
            for placement in place_update(alone, module, 1.0, match, base.specs, base.model_types, matches)
        ]
        made = _magnitudes(source, module, Numbers.of(read_weight(source, update, base, places)))
        specs = {**update.specs, "magnitude": TensorSpec("F32", made.shape)}

        def make(module: str = module, made: Numbers = made) -> tuple[Tensors, Loss]:
            return {**stored_tensors(source.updates[module], source.file), "magnitude": made}, NO_LOSS

        planned[module] = Made(replace(update, specs=specs), make, (module,), numbers=False)
    return with_factors(state, planned)


@np.errstate(all="ignore")
def _magnitudes(source: Adapter, module: str, W: Numbers) -> Numbers:
    """Return m' of each row of W (out, in)."""
    loaded, work = source.load(source.updates[module]), Workspace()
    assert isinstance(loaded, DoRA)
    if not W.all_finite():
        raise InputError("has rows with inf or nan, but DoRA needs their norms", culprit=module)
    try:
        delta = Products(loaded.inner.terms(1.0, False)).rows(0, len(W))
    except ValueError as error:
        raise InputError(str(error), culprit=module) from error
    sums, norms = row_norms(delta, W, work), row_norms(Zero((len(W), W.shape[1])), W, work)
    m: Wide = loaded.magnitude.wide().reshape(-1)
    made = rounded_to(np.where(sums == 0, m, m * (norms + EPS) / sums), F32)  # for a row of zeros any m' is right
    if (sums < 0).any() or not made.all_finite():
        raise InputError("has a row whose norm is beyond float32, but DoRA needs it", culprit=module)
    return made
