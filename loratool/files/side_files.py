"""The files beside the weights: which travel with a model, and what in them must follow the output.

An allow-list, because a stray weight file, an optimizer state or a `.git` beside a checkpoint must never
end up in an output by accident. What does not travel is reported by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import InputError
from .checkpoint import PIPELINE, Checkpoint, component_names, is_pipeline
from .fileio import open_for_reading, reading

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


NEVER = ("adapter_config.json",)


TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")


UNDO_MARK = b"loratool undo "  # the first bytes of an undo file of any version


INITIAL = "initial_adapter"  # the folder in a residual base with the factors that were taken out of it


# what an output folder holds besides
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index*.json",
    "*pytorch_model*.bin",
    "*pytorch_model.bin.index.json",
    "loratool.undo*",
    f"{INITIAL}/adapter_model.safetensors",
    f"{INITIAL}/adapter_config.json",
)


def classify_side_files(folder: Path, read: set[str]) -> tuple[list[str], list[str]]:
    """The relative paths in `folder` that travel, and those that do not; `read` are the weights already dealt with.

    Raises InputError for one that travels and cannot be read, before there is anything to undo.
    """
    travels, stays = [], []
    with reading(folder):
        for entry in sorted(folder.iterdir()):
            opens = entry.is_dir() and os.access(entry, os.R_OK | os.X_OK)
            names = [f"{entry.name}/{inner.name}" for inner in sorted(entry.iterdir())] if opens else [entry.name]
            chosen = [n for n in names if n not in read and n not in NEVER and matches(n, TRAVELS)]
            travels += chosen
            rest = [n for n in names if n not in chosen and n not in read]
            stays += [entry.name + "/"] if entry.is_dir() and not chosen else rest
    for name in travels:
        if not (folder / name).is_file() or not os.access(folder / name, os.R_OK):
            raise InputError("travels with the model, but is no file that can be read", culprit=str(folder / name))
    return travels, stays


def classify_checkpoint(base: Checkpoint) -> tuple[list[str], list[str]]:
    """`survey` of all folders of a checkpoint: a pipeline's own, and each of its components'."""
    if not base.parts:
        return classify_side_files(base.folder, base.weight_files)
    travels, stays = classify_side_files(base.folder, set())
    stays = [name for name in stays if name not in {part.prefix for part in base.parts}]
    for part in base.parts:
        names, rest = classify_side_files(part.folder, part.weight_files)
        travels += [part.prefix + name for name in names]
        stays += [part.prefix + name for name in rest]
    return travels, stays


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """A tokenizer's files in an adapter's folder, {} where there is none."""
    with reading(folder):
        names = [entry.name for entry in sorted(folder.iterdir()) if entry.is_file() and matches(entry.name, TOKENIZER)]
    return {name: folder / name for name in names} if "tokenizer_config.json" in names else {}


def undo_path(model: Path, is_file: bool) -> Path:
    """Where a merged model has its undo file: in its folder, or beside the file."""
    return model.with_suffix(".undo") if is_file else model / "loratool.undo"


def undo_files(path: Path) -> list[Path]:
    """An undo file and those of the merges before: `x.undo`, `x.undo.1`, ..."""
    found = [path] if is_undo_file(path) else []
    while found and is_undo_file(following := path.with_name(f"{path.name}.{len(found)}")):
        found.append(following)
    return found


def is_undo_file(path: Path) -> bool:
    """Whether there is a file, and no link to one, that begins as one does."""
    if path.is_symlink() or not path.is_file():
        return False
    with open_for_reading(path) as file:
        return file.read(len(UNDO_MARK)) == UNDO_MARK


def find_foreign_file(folder: Path) -> str | None:
    """Something in an output folder that --force must not remove: it is of no kind that we write."""
    prefixes = tuple(f"{name}/" for name in component_names(folder)) if is_pipeline(folder) else ()
    names, weights = [], False
    for name in _names_in(folder):
        own = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
        if not matches(own, TRAVELS + WEIGHTS):
            return name
        names.append(name)
        weights = weights or matches(own, WEIGHTS)
    return names[0] if names and not weights else None  # configs or scripts without weights are no output of ours


def _names_in(folder: Path) -> Iterator[str]:
    """Files and links, and empty folders with a slash: one by one, since a home has millions."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or not entry.is_dir():
            yield entry.name
        elif not any(entry.iterdir()):
            yield f"{entry.name}/"
        else:
            found = (inner for inner in entry.rglob("*") if inner.is_symlink() or not inner.is_dir())
            yield from (inner.relative_to(folder).as_posix() for inner in found)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


def edited_config(config: Mapping[str, Any], fields: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config with some fields set, in `text_config` too where there is one, and with another dtype everywhere.

    Beside a `text_config` a field is set at the top only if it stands there, but for the flag that ties a head.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and dtype:
            changed[key] = dtype
        elif isinstance(value, dict) and key == "text_config":
            changed[key] = edited_config(value, fields, dtype)
        else:
            changed[key] = edited_config(value, {}, dtype) if isinstance(value, dict) else value
    nested = "text_config" in config
    at_top = {k: v for k, v in fields.items() if not nested or k in config or k == "tie_word_embeddings"}
    return {**changed, **at_top} if config else {}


def encode_json(value: Mapping[str, Any]) -> bytes:
    """As transformers writes its JSON files."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def provenance(verb: str, facts: Mapping[str, Any], former: object) -> str:
    """The value of the metadata key `loratool`: what was done, never when, where or by which version.

    `former` is the value that the base has, kept so that stacked edits can be read back; InputError if it is broken.
    """
    value = {"verb": verb, **facts}
    if former is not None:
        try:
            value["former"] = json.loads(str(former))  # an object: strings in strings double their escapes
        except (ValueError, RecursionError) as error:
            raise InputError("the base's metadata `loratool` is broken; it is not ours") from error
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
