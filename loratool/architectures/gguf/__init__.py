"""llama.cpp's architectures: names and row orders of its GGUF files for the weights of transformers.

A row of `ARCHITECTURES` describes what `convert_hf_to_gguf.py` does to models of some types (llama.cpp: `conversion/`,
`gguf-py/gguf/tensor_mapping.py`, of 2026-11). A test compares each row with that program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..heads import text_fields
from .bert import BERT_ARCHITECTURES
from .experts import EXPERT_ARCHITECTURES
from .gemma import GEMMA_ARCHITECTURES
from .gpt import GPT_ARCHITECTURES
from .hybrid import HYBRID_ARCHITECTURES
from .llama import LLAMA_ARCHITECTURES
from .others import OTHER_ARCHITECTURES
from .table import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    each.key: each
    for each in (
        *LLAMA_ARCHITECTURES,
        *EXPERT_ARCHITECTURES,
        *GEMMA_ARCHITECTURES,
        *GPT_ARCHITECTURES,
        *BERT_ARCHITECTURES,
        *OTHER_ARCHITECTURES,
        *HYBRID_ARCHITECTURES,
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """Return the architecture of a model by its config.json."""
    model_type = config.get("model_type")
    if choose := CHOICES.get(str(model_type)):
        return ARCHITECTURES[choose(config)]
    return next((a for a in ARCHITECTURES.values() if model_type in (*a.model_types, *a.wrappers)), None)


def _of_granite_hybrid(config: Mapping[str, Any]) -> str:
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and not any(kind in kinds for kind in ("mamba", "linear_attention")):
        return "granitemoe" if config.get("num_experts_per_tok") else "granite"
    return "granitehybrid"


# Model types of several architectures -> (the config.json) -> the key of its architecture
CHOICES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "gemma3_text": lambda config: "gemma-embedding" if config.get("architectures") == ["Gemma3TextModel"] else "gemma3",
    "granitemoehybrid": _of_granite_hybrid,
    "mistral3": lambda config: "mistral4" if text_fields(config).get("model_type") == "mistral4" else "mistral3",
    "t5": lambda config: "t5encoder" if config.get("architectures") == ["T5EncoderModel"] else "t5",
    "nemotron_h": lambda config: "nemotron_h_moe" if "num_experts_per_tok" in config else "nemotron_h",
}
