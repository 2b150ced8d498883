"""Distinguish a model's layers from modules beside them, which get factors only if the user names them.

These are modules that few fine-tunes are meant to change and that runtimes do not apply adapters to: routers, gates
with one output, embeddings other than the vocabulary's, and MTP layers. MTP layers predict further tokens, and
transformers 5.24 does not load them (`_keys_to_ignore_on_load_unexpected`). All its language models were checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MTP, ROUTERS, GATES, EMBEDDINGS = "MTP layers", "routers", "gates with one output", "embeddings"
GROUPS = (MTP, ROUTERS, GATES, EMBEDDINGS)

_MTP = re.compile(r"(?:^|\.)(?:mtp|nextn|draft|eagle|medusa)(?:_\w+)?(?:\.|$)")

_LAYER = re.compile(r"^(?:thinker\.|model\.|language_model\.)*layers\.(\d{1,9})\.")

# `gate` is a router only beside experts: elsewhere it is half of an MLP
_ROUTER = re.compile(r"(?:^|\.)(?:router|router_gate|modality_router)(?:\.|$)")
_GATE = re.compile(r"\.gate(?=\.|$)")

# in a language model; an image encoder needs its own embeddings
_TOWER = re.compile(r"^model\.(?:\w+\.)*?\w*(?:vis|image|video|audio)\w*\.")

# Fields of config.json that hold the language model's own config.
_TEXT_CONFIGS = ("text_config", "language_config", "llm_config")


@dataclass(frozen=True)
class Layers:
    """The number of a model's layers, and its blocks with experts."""

    count: int | None  # layers with a number from this on are MTP layers; None if unknown
    mixtures: frozenset[str]  # paths of the blocks with experts

    @classmethod
    def find(cls, paths: Iterable[str], config: Mapping[str, Any]) -> Layers:
        """Find the layers, from the class's names for all tensors of a file and from config.json."""
        parts = [*(config.get(field) for field in _TEXT_CONFIGS), config]
        counts = (part.get("num_hidden_layers") for part in parts if isinstance(part, Mapping))
        count = next((n for n in counts if type(n) is int and n > 0), None)
        return cls(count, frozenset(path.partition(".experts.")[0] for path in paths if ".experts." in path))

    def is_mtp(self, path: str) -> bool:
        """Return whether a module or tensor is in an MTP layer or another part that predicts further tokens."""
        return bool(_MTP.search(path)) or self.is_beyond(path)

    def is_beyond(self, path: str) -> bool:
        """Return whether a module or tensor is in a layer with a number beyond config.json's count."""
        layer = _LAYER.match(path)
        return bool(layer and self.count and int(layer[1]) >= self.count)

    def group(self, module: str, role: str, shape: Sequence[int]) -> str:
        """Return the key of GROUPS for a module's weight, by its `weight_role` and shape; empty if it is in none."""
        if self.is_mtp(module):
            return MTP
        if role == "embedding":
            beside = module.endswith("embed_tokens_per_layer") or _TOWER.search(module)
            return EMBEDDINGS if beside else ""
        if role != "linear":
            return ""
        chooses = (module[: gate.start()] in self.mixtures for gate in _GATE.finditer(module))
        if _ROUTER.search(module) or any(chooses):
            return ROUTERS
        return GATES if shape[0] == 1 else ""
