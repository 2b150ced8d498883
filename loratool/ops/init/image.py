"""The new adapter in an image model's formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...adapters.formats import FORMATS
from ...architectures.prefixes import PEFT_PREFIX
from ...files.checkpoint import Checkpoint
from ...files.virtual import UnwrittenFile
from ..convert.image import Image, plan_image
from ..convert.image_base import _family, image_weights
from ..convert.language import plan_language
from ..convert.request import Output, Wish, asked_by, low_rank, select
from ..convert.source_modules import as_source
from .starter import Site, Starter


def plan_start(base: Checkpoint, to: str, sites: Sequence[Site], starter: Starter, config: Mapping[str, Any]) -> Output:
    """What `init` writes. config: of PEFT's adapter."""
    specs = {**starter.specs, **starter.magnitude_specs}
    if to == "peft":
        return Output(specs, starter.load, config, {}, (), (), ())
    file = UnwrittenFile(
        base.shards[0],
        {PEFT_PREFIX + name: spec for name, spec in specs.items()},
        lambda name: starter.load_any(name.removeprefix(PEFT_PREFIX)),
        {"loratool": json.dumps({"adapter_config": config})},
    )
    adapter = FORMATS["peft"].read(str(base.path), file, None, False)
    wish = Wish(to)
    if to == "loralib":
        with asked_by("init"):
            return plan_language(adapter, wish, *select(adapter, wish))
    weights, weight_of = image_weights(base), {site.wrapper: site.weight.name for site in sites}
    family = _family(base, weights)
    sources = [as_source(m, update, *weights[weight_of[m]]) for m, update in adapter.updates.items()]
    return plan_image(Image(adapter.name, {}, family, lambda each: low_rank(adapter, each)), wish, sources, [])
