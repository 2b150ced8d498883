"""Plan the new adapter in the format that `init` was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...adapters.formats import FORMATS
from ...architectures.prefixes import PEFT_PREFIX
from ...files.checkpoint import Checkpoint
from ...files.virtual import VirtualFile
from ..convert.image import ImageAdapter, plan_image
from ..convert.image_base import _family, image_weights
from ..convert.language import plan_language
from ..convert.request import AdapterOutput, ConvertRequest, low_rank_modules, request_for, select_updates
from ..convert.source_modules import make_source_module
from .starter import AdaptedWeight, AdapterInitializer


def plan_start(
    base: Checkpoint,
    to: str,
    adapted_weights: Sequence[AdaptedWeight],
    starter: AdapterInitializer,
    config: Mapping[str, Any],
) -> AdapterOutput:
    """Plan the tensors that `init` writes in format `to`; `config` is PEFT's adapter_config.json."""
    specs = {**starter.specs, **starter.magnitude_specs}
    if to == "peft":
        return AdapterOutput(specs, starter.load, config, {}, (), (), ())
    file = VirtualFile(
        base.shards[0],
        {PEFT_PREFIX + name: spec for name, spec in specs.items()},
        lambda name: starter.load_any(name.removeprefix(PEFT_PREFIX)),
        {"loratool": json.dumps({"adapter_config": config})},
    )
    adapter = FORMATS["peft"].read(str(base.path), file, None, False)
    request = ConvertRequest(to)
    if to == "loralib":
        with request_for("init"):
            return plan_language(adapter, request, *select_updates(adapter, request))
    weights, weight_of = image_weights(base), {adapted.wrapper: adapted.weight.name for adapted in adapted_weights}
    family = _family(base, weights)
    sources = [make_source_module(m, update, *weights[weight_of[m]]) for m, update in adapter.updates.items()]
    return plan_image(
        ImageAdapter(adapter.name, {}, family, lambda each: low_rank_modules(adapter, each)), request, sources, []
    )
