"""The model that --base names: its config.json at once, its weights when a step needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Base:
    """A model whose names, sizes or weights a conversion needs."""

    path: str
    config: Mapping[str, Any]  # its config.json; empty if it has none
    is_config: bool  # it has no weights, only its config.json
    open: Callable[[str], Checkpoint]  # a clause for messages, the purpose of the model -> all of its weights
