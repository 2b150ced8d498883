"""Choose the files of a hub repository to download: one set of weights, and its side files.

The choice depends on file names alone, before anything is downloaded. It follows the order in which a folder is read
(`find_weights`, `find_adapter_file`). So a repo id gives the same result as a clone of the repository, without copies
for other software, half-precision variants and earlier checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import filter as filter_names
from pathlib import Path

from ...durable.fileio import is_beside
from ...errors import InputError, shell_word
from ..containers.gguf_split import NAME as GGUF_PART
from ..containers.gguf_split import split_number
from ..folder.model_folder import (
    INDEX_NAMES,
    PIPELINE,
    SINGLE_NAMES,
    TORCH_NAMES,
    component_names,
    is_torch_weights,
    read_json_file,
)
from ..folder.sentence_transformers import module_folders
from ..folder.side_files import CARD, INITIAL, matches, why_left
from .names import HubName

# Names of an adapter's file, in the order of search: PEFT's; AdapterHub's (the head's weights are in a separate file);
# MLX's (earlier checkpoints are beside it); those of torchtune and litgpt (the merged model is beside them)
ADAPTER_NAMES = (
    "adapter_model.safetensors", "adapter_model.bin",
    "adapter.safetensors", "pytorch_adapter.bin", "adapters.safetensors", "adapters.npz", "adapter_model.pt",
    "lit_model.pth.lora",
)  # fmt: skip

# Files beside the weights that are needed to read them, in addition to the side files that are copied
BESIDE = (
    "adapter_config.json", "model_head.safetensors", "pytorch_model_head.bin", "loratool.undo*", f"{INITIAL}/*",
    CARD,
)  # fmt: skip

CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Needed:
    """The files for a hub name, as paths in the repository."""

    beside: tuple[str, ...]  # configs and other files that are read beside the weights
    weights: tuple[str, ...]  # with their index, which names more once it is downloaded
    is_certain: bool = True  # no other file of the repository could have been chosen

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.beside + self.weights))


def needed_files(name: HubName, listed: Mapping[str, int | None], snapshot: Path, config_alone: bool = False) -> Needed:
    """Return the files for a hub name.

    Args:
        listed: paths of the repository's files, all or the known ones, and their sizes.
        snapshot: the folder with the downloaded files; indexes are read from it.
        config_alone: weights are needed only if there is no config.json.

    Raises:
        InputError: there is no such folder or file, or it has no weights, or several and none has a usual name.
    """
    if name.path in listed:
        folder, _, file = name.path.rpartition("/")
        files = _inside(listed, folder)
        has_config = file not in CONFIGS and any(config in files for config in CONFIGS)
        beside = _beside(files, snapshot / folder) if has_config else []
        return Needed(tuple(_under(folder, beside)), tuple(_all_parts(name.path, snapshot)))
    files = _inside(listed, name.path)
    if not files:
        raise InputError("has no such folder or file", culprit=str(name))
    if PIPELINE in files:
        return _of_pipeline(name, files, snapshot)
    return _of_model(name, files, snapshot, config_alone)


def _of_pipeline(name: HubName, files: Mapping[str, int | None], snapshot: Path) -> Needed:
    """Return the files of a pipeline, and of its components if model_index.json is downloaded."""
    index = snapshot / name.path / PIPELINE
    needed = [Needed(tuple(_under(name.path, _beside(files, index.parent))), ())]
    for component in component_names(index.parent) if index.is_file() else ():
        inner = _inside(files, component)
        place = replace(name, path=f"{name.path}/{component}".lstrip("/"))
        if "config.json" in inner or _choose(inner).weights:
            needed.append(_of_model(place, inner, snapshot))
        else:  # a scheduler, or a tokenizer
            needed.append(Needed(tuple(_under(place.path, _beside(inner, snapshot / place.path))), ()))
    beside = tuple(file for part in needed for file in part.beside)
    weights = tuple(file for part in needed for file in part.weights)
    return Needed(beside, weights, all(part.is_certain for part in needed))


def _of_model(name: HubName, files: Mapping[str, int | None], snapshot: Path, config_alone: bool = False) -> Needed:
    """Return the needed ones among the files of a folder."""
    beside = tuple(_under(name.path, _beside(files, snapshot / name.path)))
    if config_alone and "config.json" in files:
        return Needed(beside, ())
    chosen = _choose(files)
    if len(chosen.weights) != 1 and not chosen.is_certain:
        raise _none_or_several(name, chosen.weights, files)
    weights = [part for path in _under(name.path, chosen.weights) for part in _all_parts(path, snapshot)]
    return Needed(beside, tuple(weights), chosen.is_certain)


def _choose(names: Collection[str]) -> Needed:
    """Choose the weights among the names in a folder: those with usual names, else all of the first kind present.

    A folder may have a model's weights and an adapter's; a command takes one of them.
    """
    kinds = (INDEX_NAMES + SINGLE_NAMES, ADAPTER_NAMES)
    usual = [next((name for name in kind if name in names), "") for kind in kinds]
    if any(usual):
        return Needed((), tuple(filter(None, usual)))
    files = sorted(name for name in names if "/" not in name)
    for pattern in ("*.safetensors.index*.json", "*.safetensors"):
        if weights := filter_names(files, pattern):
            return Needed((), tuple(weights), False)
    if torch := [name for name in TORCH_NAMES if name in names][:1]:
        return Needed((), tuple(torch))
    pickles = [name for name in files if is_torch_weights(Path(name))]
    models = [name for name in files if name.endswith(".gguf") and split_number(Path(name)) in (None, 1)]
    return Needed((), tuple(pickles or models), False)


def _beside(files: Mapping[str, int | None], folder: Path) -> list[str]:
    """Return the files of a folder that are copied with its weights, or are needed to read them."""
    modules = tuple(f"{name}/" for name in module_folders(folder))
    return [
        name
        for name, nbytes in files.items()
        if matches(name, BESIDE) or why_left(name, nbytes) is None or name.startswith(modules)
    ]


def _all_parts(path: str, snapshot: Path) -> list[str]:
    """Return a weights file, or an index and its shards, or all parts of a split GGUF model."""
    folder, _, file = path.rpartition("/")
    if part := GGUF_PART.fullmatch(file):
        count = int(part["count"])
        return _under(folder, [f"{part['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)])
    if not file.endswith(".json") or not (snapshot / path).is_file():
        return [path]
    weight_map = read_json_file(snapshot / path).get("weight_map")
    named = {str(each) for each in weight_map.values()} if isinstance(weight_map, dict) else set()
    return [path, *_under(folder, sorted(filter(is_beside, named)))]  # the others are refused when it is opened


def _inside(listed: Mapping[str, int | None], folder: str) -> dict[str, int | None]:
    """Return the files of a folder, by names relative to it, with their sizes."""
    prefix = f"{folder}/" if folder else ""
    return {path[len(prefix) :]: nbytes for path, nbytes in listed.items() if path.startswith(prefix)}


def _under(folder: str, names: Iterable[str]) -> list[str]:
    return [f"{folder}/{name}" if folder else name for name in names]


def _none_or_several(name: HubName, chosen: Collection[str], files: Iterable[str]) -> InputError:
    """Return the error for a folder without weights, or with several weights files: the user must name one."""
    several = bool(chosen)
    if not chosen:
        folders = {Path(each).parent.as_posix() for each in files if _choose([Path(each).name]).weights}
        chosen = sorted(folders, key=lambda folder: (folder.count("/"), folder))
    named = [name.within(each) for each in _under(name.path, chosen)]
    more = f" (there are {len(named)})" if len(named) > 4 else ""
    remedy = f"name one of them: {', '.join(map(shell_word, named[:4]))}{more}" if named else None
    what = "holds several files of weights" if several else "holds no weights in a supported format"
    return InputError(what, culprit=str(name), remedy=remedy)
