"""Tell a model's layers from what stands beside them, which gets factors only if it is named.

That is what few fine-tunes mean to change and no runtime of adapters reads: routers, gates with one output, embeddings
other than the vocabulary's, and MTP layers, which predict further tokens and of which transformers 5.24 loads none
(`_keys_to_ignore_on_load_unexpected`). The modules of its classes of language models were gone through for it.
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

# in a language model; those of an encoder of images alone are its own
_TOWER = re.compile(r"^model\.(?:\w+\.)*?\w*(?:vis|image|video|audio)\w*\.")

# Fields of config.json that hold the language model's own config.
_TEXT_CONFIGS = ("text_config", "language_config", "llm_config")


@dataclass(frozen=True)
class Layers:
    """How many layers a model has, and which of its blocks have experts."""

    count: int | None  # those with a higher number are MTP layers; None if it is not known
    mixtures: frozenset[str]  # paths of the blocks that have experts

    @classmethod
    def find(cls, paths: Iterable[str], config: Mapping[str, Any]) -> Layers:
        """Find them by the names that the model's class has for all tensors of a file, and by config.json."""
        parts = [*(config.get(field) for field in _TEXT_CONFIGS), config]
        counts = (part.get("num_hidden_layers") for part in parts if isinstance(part, Mapping))
        count = next((n for n in counts if type(n) is int and n > 0), None)
        return cls(count, frozenset(path.partition(".experts.")[0] for path in paths if ".experts." in path))

    def is_mtp(self, path: str) -> bool:
        """Return whether a module or tensor is one of an MTP layer or of another draft of further tokens."""
        return bool(_MTP.search(path)) or self.is_beyond(path)

    def is_beyond(self, path: str) -> bool:
        """Return whether a module or tensor is of a layer whose number is beyond those that config.json counts."""
        layer = _LAYER.match(path)
        return bool(layer and self.count and int(layer[1]) >= self.count)

    def group(self, module: str, role: str, shape: Sequence[int]) -> str:
        """Return which of GROUPS a module's weight is of, by its `weight_role` and shape; empty if of none."""
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
