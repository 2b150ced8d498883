"""Plan the new adapter in the format that `init` was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...adapters.formats.content import AdapterContent
from ...adapters.formats.format import Format
from ...adapters.formats.peft import Peft
from ...adapters.updates.dora import DoRA
from ...binding.modules.image_modules import make_source_module
from ...files.checkpoint import Checkpoint
from ...transform.base import Base
from ...transform.image import plan_image
from ...transform.image_base import family_of, image_weights, is_image_adapter
from ...transform.lazy import Made, Tensors, start
from ...transform.log import NO_LOSS, Loss
from ...transform.new_factors import factored_update, new_adapter
from ...transform.output import content
from ...transform.plan import plan_one_model
from ...transform.request import ConvertRequest, request_for
from .starter import MAGNITUDE, AdaptedWeight, AdapterInitializer


def plan_start(
    base: Checkpoint,
    to: Format,
    adapted_weights: Sequence[AdaptedWeight],
    starter: AdapterInitializer,
    config: Mapping[str, Any],
) -> tuple[AdapterContent, tuple[str, ...]]:
    """Return what `init` writes in format `to`, and notes for the user; `config` is PEFT's adapter_config.json."""
    specs = {**starter.specs, **starter.magnitude_specs}
    is_image = is_image_adapter(base, to)
    if to.key == Peft.key and not is_image:
        return AdapterContent(specs, starter.load, config), ()
    made = {}
    for each in adapted_weights:
        one = _made(each, starter)
        made[one.update.module] = one
    adapter = new_adapter(str(base.path), base.shards[0], made, config)
    request = ConvertRequest(to.key, base=Base(str(base.path), base.config, False, lambda what: base))
    if not is_image:
        with request_for("init"):
            state = plan_one_model(start(adapter), request)
        return content(state, base.config), state.notes
    weights, weight_of = image_weights(base), {adapted.wrapper: adapted.weight.name for adapted in adapted_weights}
    family = family_of(base, to)
    sources = [make_source_module(m, update, *weights[weight_of[m]]) for m, update in adapter.updates.items()]
    state = plan_image(start(adapter), family, request, sources, [], {})
    return content(state), state.notes


def _made(adapted: AdaptedWeight, starter: AdapterInitializer) -> Made:
    """Return a weight's factors as a module of the new adapter."""
    weight, specs = adapted.weight, starter.specs
    key_A, key_B = adapted.keys
    sides = specs[key_A], specs[key_B]
    E, _, _ = weight.sizes
    update = factored_update(weight.kind, weight.in_model, adapted.wrapper, sides, adapted.scale, E, weight.bare)
    keys = {"A": key_A, "B": key_B}
    magnitude = f"{adapted.wrapper}.{MAGNITUDE}"
    if magnitude in starter.magnitude_specs:
        update = DoRA.of(update, magnitude, starter.magnitude_specs[magnitude], along_inputs=False)
        keys["magnitude"] = magnitude  # which is known once the factors are

    def make() -> tuple[Tensors, Loss]:
        return {role: starter.load_any(key) for role, key in keys.items()}, NO_LOSS

    return Made(update, make, (), numbers=False)
