"""Choose the files beside the weights that are copied with a model, and edit those that depend on the output.

SIDE_FILES is the only table; the first row that matches a name decides. A stray weights file, an optimizer state or a
`.git` beside a checkpoint must never get into an output by accident. So files that match no row are not copied, and
the report has their size and the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from ...durable.fileio import file_length, has_bytes, length_of, open_for_reading, read_into, reading
from ...errors import InputError
from .model_folder import PIPELINE
from .sentence_transformers import DENSE, MODULES, module_folders

MODELFILE = "Modelfile"  # Ollama reads it, beside an adapter

UNDO_MARK = b"loratool undo "  # the first bytes of an undo file of any version

PATCH_MARK = b"loratool patch "  # the same of a patch

INITIAL = "initial_adapter"  # the subfolder of a residual base with the factors that were subtracted from it

TEMPLATES, GENERATION = "additional_chat_templates", "generation_config.json"

CARD = "README.md"  # the model card: each output gets its own, and the undo file has the base's

CODE = "code"  # of a model's own class; a user's scripts can have the same names

SMALL_TEXT = 10_000_000  # bytes

UNKNOWN, TOO_LARGE, UNREADABLE = "of a kind that is not copied", "too large for its kind", "cannot be read"

OTHER_WEIGHTS = "weights that were not read"

AN_ADAPTER = "an adapter, which is not part of the model"


@dataclass(frozen=True)
class SideFiles:
    """A kind of files beside a model's weights.

    Attributes:
        names: patterns of names in the model's folder, separated by spaces; those of folders end in a slash.
        left: the reason not to copy it; None if it is copied.
        limit: the most bytes that are copied; None for any size.
    """

    kind: str
    names: str
    left: str | None = None
    limit: int | None = None

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        return tuple(self.names.split())

    @property
    def always(self) -> bool:
        """Return whether it is copied whatever its size."""
        return not self.left and self.limit is None


SIDE_FILES = (
    SideFiles("undo file", "loratool.undo* *.undo *.undo.*", "the undo file of another merge"),
    SideFiles("list of an upload", "loratool.complete.json", "the list of another upload"),
    SideFiles("adapter", f"adapter_config.json adapter_model.* {INITIAL}/", AN_ADAPTER),
    SideFiles(
        "training state",
        "trainer_state.json training_args.* optimizer* scheduler.* scaler.* rng_state* random_states* *.distcp latest "
        "zero_to_fp32.py events.out.tfevents.* optimizer*/ checkpoint-*/ global_step*/ runs/ logs/ wandb/",
        "the state of a training run",
    ),
    SideFiles("voices", "spk_dict.pt"),  # Qwen2.5-Omni does not load without it
    SideFiles(
        "other weights",
        "*.safetensors *.bin *.pt *.pth *.ckpt *.gguf *.h5 *.msgpack *.ot *.npz *.onnx *.onnx_data *.onnx.data "
        "*.tflite *.mlmodel *.index.json *.safetensors.index*.json onnx/ openvino/ coreml/ original/ *.mlpackage/",
        OTHER_WEIGHTS,
    ),
    SideFiles("card", CARD, "the card of only that model"),
    SideFiles("hidden", ".* .*/", "hidden: of git, or of a download"),
    SideFiles(CODE, "*.py"),  # before the tokenizers, which an adapter or an undo file can bring
    SideFiles("chat template", f"chat_template* *.jinja {TEMPLATES}/*.jinja"),
    SideFiles(
        "tokenizer",
        "tokenizer* special_tokens_map.json added_tokens.json vocab* *vocab.json merges* tekken.json normalizer.json "
        "*.model *.model.v[0-9] *.spm *.tiktoken *.bpe *.codes *.tokenizer",
    ),
    SideFiles("processor", "*processor*.json feature_extractor*.json *.ttf *.otf"),
    SideFiles("generation", GENERATION),
    SideFiles(
        "sentence-transformers",
        f"{MODULES} config_sentence_transformers.json sentence_*_config.json "
        "[0-9]_*/config.json [0-9]_*/model.safetensors [0-9]_*/pytorch_model.bin",
    ),
    SideFiles("config", f"config.json {PIPELINE} *_config.json configuration*.json"),
    SideFiles("licence", "*LICENSE* *LICENCE* License* license* NOTICE* Notice* COPYING* USE_POLICY*"),
    SideFiles("other text", "*.json *.txt *.md", limit=SMALL_TEXT),
)

TEXT = ("tokenizer", "chat template")  # kinds that an adapter can replace

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # of a tokenizer: no vocabulary

MOST_COUNTED = 10_000  # files of a folder that is not copied


@dataclass(frozen=True)
class LeftBehind:
    """A file, or with a slash a folder, beside the weights that is not copied.

    Attributes:
        nbytes: of the file, or of all files in the folder; None if they cannot be counted or are too many.
        reason: why it is not copied.
    """

    name: str
    nbytes: int | None
    reason: str


def side_row(name: str) -> SideFiles | None:
    """Return the row of SIDE_FILES that matches a name in a model's folder; None for an unknown kind."""
    return next((row for row in SIDE_FILES if matches(name, row.patterns)), None)


def is_of_whole(name: str) -> bool:
    """Return whether a file that a merge edits belongs to the complete model, not to a transformer in a subfolder."""
    return name == CARD or matches(name, DENSE)


def side_kind(name: str) -> str | None:
    row = side_row(name)
    return row.kind if row else None


def why_left(name: str, nbytes: int | None) -> str | None:
    """Return why a file beside the weights is not copied, from its name and size; None if it is copied.

    Args:
        nbytes: None if it cannot be read. Then a file with a limit is not copied.
    """
    row = side_row(name)
    if row is None or row.left or row.limit is None:
        return row.left if row else UNKNOWN
    return UNREADABLE if nbytes is None else TOO_LARGE if nbytes > row.limit else None


def classify_side_files(
    folder: Path, read: Collection[str], models: Collection[str] = ()
) -> tuple[list[str], list[LeftBehind]]:
    """Return the relative paths in `folder` that are copied, and the files and folders that are not.

    Args:
        read: weights files, which are in neither result.
        models: folders of models, which are in neither result.

    Raises:
        InputError: a file to copy cannot be read, or a module of sentence-transformers is outside the folder.
    """
    copied: list[str] = []
    left: list[LeftBehind] = []
    modules = module_folders(folder)
    with reading(folder):
        for entry in sorted(each for each in folder.iterdir() if each.name not in models):
            names = [name for name in _names_of(folder, entry, modules) if name not in read]
            reasons = {name: _why_left(folder, name, modules) for name in names}
            if entry.is_dir() and names and None not in reasons.values():
                names, reasons = [entry.name + "/"], {entry.name + "/": _why_folder(entry)}
            copied += [name for name in names if reasons[name] is None]
            left += [LeftBehind(name, _nbytes(folder / name), why) for name in names if (why := reasons[name])]
    for name in copied:
        _require_file(folder / name)
    return copied, left


def _require_file(path: Path) -> None:
    if _file_size(path) is None:
        raise InputError("is copied with the model, but is not a readable file", culprit=str(path))


def _names_of(folder: Path, entry: Path, modules: Collection[str]) -> list[str]:
    """Return the relative paths of an entry: itself, or a folder's content, one level deep unless it is a module."""
    if not entry.is_dir():
        return [entry.name]
    if not os.access(entry, os.R_OK | os.X_OK):
        return [f"{entry.name}/"]
    has_modules = any(_is_in(f"{module}/", entry.name) for module in modules)
    paths = _walk(entry) if has_modules else sorted(entry.iterdir())
    return [each.relative_to(folder).as_posix() for each in paths]


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders, in order."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        else:
            yield entry


def _why_left(folder: Path, name: str, modules: Collection[str]) -> str | None:
    """Return why a file or folder is not copied, or None; files in a module's folder are copied unless hidden."""
    module = next((each for each in modules if _is_in(name, each)), None)
    if module is None or f"/{name.removeprefix(module)}".count("/."):
        return why_left(name, _file_size(folder / name))
    return None


def _is_in(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")


def _why_folder(folder: Path) -> str:
    """Return why a folder beside the weights is not copied."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return UNREADABLE
    if (folder / "adapter_config.json").is_file():
        return AN_ADAPTER
    why = why_left(f"{folder.name}/", None)
    has_weights = why == UNKNOWN and any(side_kind(inner.name) == "other weights" for inner in folder.iterdir())
    return OTHER_WEIGHTS if has_weights else why or UNKNOWN


def _file_size(path: Path) -> int | None:
    """Return the bytes of a file; None if it cannot be read or is not a file."""
    return length_of(path) if path.is_file() and os.access(path, os.R_OK) else None


def _nbytes(path: Path) -> int | None:
    """Return the bytes of a file, or of all files in a folder; None if they cannot be counted or are too many."""
    total = 0
    with suppress(OSError):
        if not path.is_dir():
            return length_of(path)
        for count, inner in enumerate(_walk(path)):
            if count == MOST_COUNTED:
                return None
            total += inner.lstat().st_size if inner.is_symlink() else length_of(inner)
        return total
    return None


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder's tokenizer and chat templates, by name.

    Raises:
        InputError: one cannot be read.
    """
    templates = folder / TEMPLATES
    with reading(folder):
        names = [entry.name for entry in sorted(folder.iterdir()) if not entry.is_dir()]
        names += [f"{TEMPLATES}/{entry.name}" for entry in sorted(templates.iterdir())] if templates.is_dir() else []
    files = {name: folder / name for name in names if is_of_tokenizer(name)}
    for path in files.values():
        _require_file(path)
    return files


def is_of_tokenizer(name: str) -> bool:
    """Return whether a file belongs to a tokenizer, or is a chat template."""
    return side_kind(name) in TEXT


def is_vocabulary(name: str) -> bool:
    """Return whether a file has a tokenizer's tokens or the rules that split text into them."""
    return side_kind(name) == "tokenizer" and name not in SETTINGS


def find_tokenizer(folder: Path) -> dict[str, Path]:
    """Return a folder's tokenizer files, chat templates and generation config by name."""
    files, generation = tokenizer_files(folder), folder / GENERATION
    return {**files, GENERATION: generation} if files and generation.is_file() else files


def undo_path(model: Path, is_file: bool) -> Path:
    """Return the path of a merged model's undo file: in the folder, or beside the file."""
    return model.with_suffix(".undo") if is_file else model / "loratool.undo"


def undo_files(path: Path) -> list[Path]:
    """Return an undo file and those of earlier merges, the last merge first: `x.undo`, `x.undo.1`, ..."""
    files = [path] if is_undo_file(path) else []
    while files and is_undo_file(following := path.with_name(f"{path.name}.{len(files)}")):
        files.append(following)
    return files


def has_card(folder: Path) -> bool:
    """Return whether a folder has a model card that an undo file can keep."""
    path = folder / CARD
    return path.is_file() and os.access(path, os.R_OK) and length_of(path) <= SMALL_TEXT


def is_copy(path: Path, other: Path) -> bool:
    """Return whether two files have the same bytes."""
    with open_for_reading(path) as file, open_for_reading(other) as second:
        nbytes = file_length(file)
        if nbytes != file_length(second):
            return False
        return has_bytes(file, 0, nbytes, lambda first, part: read_into(second, part, first))


def is_undo_file(path: Path) -> bool:
    """Return whether `path` is a file, not a link, that begins with `UNDO_MARK`."""
    return not path.is_symlink() and _begins_with(path, UNDO_MARK)


def is_patch(path: Path) -> bool:
    """Return whether `path` is a file that begins with `PATCH_MARK`."""
    return _begins_with(path, PATCH_MARK)


def _begins_with(path: Path, mark: bytes) -> bool:
    if not path.is_file():
        return False
    with open_for_reading(path) as file:
        return file.read(len(mark)) == mark


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def edited_config(config: Mapping[str, Any], fields: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a config with `fields` set, in its `text_config` too, and with `dtype` in every config that has one.

    If there is a `text_config`, a field is set at the top only if it is there already or ties the head.
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
    """Encode JSON in the style of transformers' files."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def provenance(command: str, facts: Mapping[str, Any], former: object) -> str:
    """Return the value of the metadata key `loratool`: the edit, without time, place or loratool's version.

    `former` is the base's value, included so that stacked edits can be read back. Raise InputError if it is damaged.
    """
    value = {"verb": command, **facts}
    if former is not None:
        try:
            value["former"] = json.loads(str(former))  # an object: strings in strings double their escapes
        except (ValueError, RecursionError) as error:
            raise InputError("the base's metadata `loratool` is broken; it is not ours") from error
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
