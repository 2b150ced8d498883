"""Plan the new adapter in the format that `init` was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...adapters.formats.content import AdapterContent
from ...adapters.formats.format import Format
from ...adapters.formats.peft import Peft, virtual_adapter
from ...binding.image_modules import make_source_module
from ...files.checkpoint import Checkpoint
from ...transform.base import Base
from ...transform.image import plan_image
from ...transform.image_base import family_of, image_weights, is_image_adapter
from ...transform.lazy import start
from ...transform.output import content
from ...transform.plan import plan_one_model
from ...transform.request import ConvertRequest, request_for
from .starter import AdaptedWeight, AdapterInitializer


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
    adapter = virtual_adapter(str(base.path), base.shards[0], AdapterContent(specs, starter.load_any, config))
    request = ConvertRequest(to.key, base=Base(str(base.path), base.config, False, lambda what: base))
    if not is_image:
        with request_for("init"):
            made = plan_one_model(start(adapter), request)
        return content(made, base.config), made.notes
    weights, weight_of = image_weights(base), {adapted.wrapper: adapted.weight.name for adapted in adapted_weights}
    family = family_of(base, to)
    sources = [make_source_module(m, update, *weights[weight_of[m]]) for m, update in adapter.updates.items()]
    made = plan_image(start(adapter), family, request, sources, [], {})
    return content(made), made.notes
