"""List the kinds of files beside a model's weights, and which of them travel with it."""

from __future__ import annotations

from fnmatch import fnmatch

from .model_folder import PIPELINE

TRAVELS = (
    "config.json",
    PIPELINE,
    "*_config.json",  # generation, tokenizer, processor, preprocessor, sentence_bert, ...
    "configuration*.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "modules.json",
    "[0-9]_Pooling/config.json",
    "*.py",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)

INITIAL = "initial_adapter"  # the folder in a residual base with the factors that were subtracted from it


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)
