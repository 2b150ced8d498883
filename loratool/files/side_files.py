"""Choose the files beside the weights that travel with a model, and edit those that must follow the output.

The choice is an allow-list, because a stray weights file, an optimizer state or a `.git` beside a checkpoint must
never end up in an output by accident. Files that do not travel are reported by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .checkpoint import Checkpoint
from .fileio import open_for_reading, reading
from .model_folder import component_names, is_pipeline
from .side_kinds import INITIAL, TRAVELS, matches

NEVER = ("adapter_config.json",)

MODELFILE = "Modelfile"  # that Ollama reads, beside an adapter

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")

UNDO_MARK = b"loratool undo "  # the first bytes of an undo file of any version

# The weights and undo files in the output folders that loratool writes
WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index*.json",
    "*.gguf",
    "*pytorch_model*.bin",
    "*pytorch_model.bin.index.json",
    "loratool.undo*",
    f"{INITIAL}/adapter_model.safetensors",
    f"{INITIAL}/adapter_config.json",
)


def classify_side_files(folder: Path, read: set[str]) -> tuple[list[str], list[str]]:
    """Return the relative paths in `folder` that travel and those that do not, without the weights files `read`.

    Raises:
        InputError: one that travels cannot be read.
    """
    travels, stays = [], []
    with reading(folder):
        for entry in sorted(folder.iterdir()):
            opens = entry.is_dir() and os.access(entry, os.R_OK | os.X_OK)
            names = [f"{entry.name}/{inner.name}" for inner in sorted(entry.iterdir())] if opens else [entry.name]
            chosen = [n for n in names if n not in read and n not in NEVER and matches(n, TRAVELS)]
            travels += chosen
            rest = [n for n in names if n not in chosen and n not in read]
            stays += [entry.name + "/"] if entry.is_dir() and not chosen and rest else rest
    for name in travels:
        if not (folder / name).is_file() or not os.access(folder / name, os.R_OK):
            raise InputError("travels with the model, but is no file that can be read", culprit=str(folder / name))
    return travels, stays


def classify_checkpoint(base: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the paths that travel and those that do not, of a model's folder or of a pipeline's folders."""
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
    """Return a tokenizer's files in an adapter's folder by name; empty if there is none."""
    with reading(folder):
        names = [entry.name for entry in sorted(folder.iterdir()) if entry.is_file() and matches(entry.name, TOKENIZER)]
    return {name: folder / name for name in names} if "tokenizer_config.json" in names else {}


def find_tokenizer(folder: Path) -> dict[str, Path]:
    """Return what a folder has for text on its way to a model and back, by name: also how it generates."""
    patterns = (*TOKENIZER, "*.model", "*.tiktoken", "generation_config.json", "additional_chat_templates/*.jinja")
    names = [name for name in classify_side_files(folder, set())[0] if matches(name, patterns)]
    return {name: folder / name for name in names} if any(not n.startswith("generation") for n in names) else {}


def undo_path(model: Path, is_file: bool) -> Path:
    """Return the path of a merged model's undo file: in its folder, or beside the file."""
    return model.with_suffix(".undo") if is_file else model / "loratool.undo"


def undo_files(path: Path) -> list[Path]:
    """Return an undo file and those of earlier merges, the last merge's first: `x.undo`, `x.undo.1`, ..."""
    found = [path] if is_undo_file(path) else []
    while found and is_undo_file(following := path.with_name(f"{path.name}.{len(found)}")):
        found.append(following)
    return found


def is_undo_file(path: Path) -> bool:
    """Return whether `path` is a file, and no link, that begins with `UNDO_MARK`."""
    if path.is_symlink() or not path.is_file():
        return False
    with open_for_reading(path) as file:
        return file.read(len(UNDO_MARK)) == UNDO_MARK


def find_foreign_file(folder: Path) -> str | None:
    """Return a name in an output folder that loratool does not write, and that --force must not remove."""
    prefixes = tuple(f"{name}/" for name in component_names(folder)) if is_pipeline(folder) else ()
    names, weights = [], False
    for name in _names_in(folder):
        own = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
        if not matches(own, (*TRAVELS, *WEIGHTS, MODELFILE)):
            return name
        names.append(name)
        weights = weights or matches(own, WEIGHTS)
    return names[0] if names and not weights else None  # configs or scripts without weights are no output of ours


def _names_in(folder: Path) -> Iterator[str]:
    """Yield files, links and, with a slash, empty folders: one by one, because a home directory has millions."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or not entry.is_dir():
            yield entry.name
        elif not any(entry.iterdir()):
            yield f"{entry.name}/"
        else:
            found = (inner for inner in entry.rglob("*") if inner.is_symlink() or not inner.is_dir())
            yield from (inner.relative_to(folder).as_posix() for inner in found)


def edited_config(config: Mapping[str, Any], fields: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a config with `fields` set, in its `text_config` too, and with `dtype` in every config that has one.

    In a config with a `text_config`, a field is set at the top only if it is there already, or if it ties the head.
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
    """Encode JSON as transformers writes its files."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def provenance(command: str, facts: Mapping[str, Any], former: object) -> str:
    """Return the value of the metadata key `loratool`: the edit, but neither its time nor place nor our version.

    `former` is the base's value, kept so that stacked edits can be read back; InputError if it is broken.
    """
    value = {"verb": command, **facts}
    if former is not None:
        try:
            value["former"] = json.loads(str(former))  # an object: strings in strings double their escapes
        except (ValueError, RecursionError) as error:
            raise InputError("the base's metadata `loratool` is broken; it is not ours") from error
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
