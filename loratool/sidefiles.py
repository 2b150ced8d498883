"""The files beside the weights: which travel with a model, and what in them must follow the output.

An allow-list, because a stray weight file, an optimizer state or a `.git` beside a checkpoint must never
end up in an output by accident. What does not travel is reported by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

TRAVELS = (
    "config.json",
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
NEVER = ("adapter_config.json",)
WEIGHTS = ("*.safetensors", "*.safetensors.index*.json")  # what an output folder holds besides


def survey(folder: Path, read: set[str]) -> tuple[list[str], list[str]]:
    """The relative paths in `folder` that travel, and those that do not; `read` are the weights already dealt with."""
    travels, stays = [], []
    for entry in sorted(folder.iterdir()):
        names = [entry.name]
        if entry.is_dir():
            names = [f"{entry.name}/{inner.name}" for inner in sorted(entry.iterdir()) if inner.is_file()]
        chosen = [name for name in names if _matches(name, TRAVELS) and name not in NEVER]
        travels += chosen
        if entry.name not in read and not chosen:
            stays.append(entry.name + ("/" if entry.is_dir() else ""))
    return travels, stays


def is_ours(relative: str) -> bool:
    """Whether an output folder may lose this file under --force: it is of a kind that we write."""
    return _matches(relative, TRAVELS + WEIGHTS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose dtype fields say `dtype` (torch's name), in nested configs too."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = dtype
        else:
            changed[key] = with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed


def encode_json(value: Mapping[str, Any]) -> bytes:
    """As transformers writes its JSON files."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def provenance(verb: str, facts: Mapping[str, Any], former: str | None) -> str:
    """The value of the metadata key `loratool`: what was done, never when, where or by which version.

    `former` is what the base says of itself, kept so that stacked edits can be read back.
    """
    value = {"verb": verb, **facts}
    if former is not None:
        value["former"] = former
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
