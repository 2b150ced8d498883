"""Compare the configs of adapters by meaning: a missing field means PEFT's default."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ...adapters.adapter import Adapter
from ...views.diff_shared import PEFT_DEFAULTS

# Fields of adapter_config.json that say nothing of the deltas, or what the modules say.
NO_DIFFERENCE = ("target_modules", "inference_mode", "peft_version", "r", "lora_alpha", "rank_pattern", "alpha_pattern")


def count_ranks(adapter: Adapter) -> dict[int, int]:
    """Return rank -> how many modules have it."""
    ranks = [update.rank for update in adapter.updates.values() if update.rank]
    return {rank: ranks.count(rank) for rank in sorted(set(ranks))}


def differing_fields(adapters: Sequence[Adapter]) -> dict[str, tuple[Any, ...]]:
    """Return the fields of the configs that differ, except ranks and targets, which the modules show."""
    differing: dict[str, tuple[Any, ...]] = {
        "format": tuple(each.format for each in adapters),
        "alpha": tuple(each.config.alpha for each in adapters),
    }
    configs = [each.config.extra for each in adapters]
    if all(configs):
        for key in dict.fromkeys(key for config in configs for key in config if key not in NO_DIFFERENCE):
            differing[key] = tuple(_printable(key, config.get(key)) for config in configs)
    return {key: values for key, values in differing.items() if any(value != values[0] for value in values)}


def _printable(key: str, value: Any) -> Any:
    """Return a field's value for JSON. None if missing or false by default; text if it has NaN or Infinity."""
    text = json.dumps(value)
    if re.search(r"NaN|Infinity", text):
        return text
    return value if value is False and key in PEFT_DEFAULTS else value or None
