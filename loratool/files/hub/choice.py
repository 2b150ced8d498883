"""Choose the files of a repository on the hub that are needed: one set of weights, and what stands beside it.

The choice is made from names alone, before anything is downloaded, in the order in which a folder is read
(`find_weights`, `find_adapter_file`): so a name of the hub means what a clone of the repository would, without the
copies for other software, halves of the precision and earlier checkpoints beside.
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

# The names that an adapter's file has, in the order in which they are looked for: PEFT's; AdapterHub's, beside which
# the head's weights are in a separate file; MLX's, beside earlier checkpoints; those of torchtune and litgpt, beside
# the merged model
ADAPTER_NAMES = (
    "adapter_model.safetensors", "adapter_model.bin",
    "adapter.safetensors", "pytorch_adapter.bin", "adapters.safetensors", "adapter_model.pt", "lit_model.pth.lora",
)  # fmt: skip

# What stands beside weights and is needed to read them, besides what travels with a model
BESIDE = (
    "adapter_config.json", "model_head.safetensors", "pytorch_model_head.bin", "loratool.undo*", f"{INITIAL}/*",
    CARD,
)  # fmt: skip

CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Needed:
    """The files that a name of the hub stands for, by their paths in the repository."""

    beside: tuple[str, ...]  # configs and what else is read beside the weights
    weights: tuple[str, ...]  # with their index, which tells of more when it is here
    is_certain: bool = True  # no file of the repository could have been chosen instead

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.beside + self.weights))


def needed_files(name: HubName, there: Mapping[str, int | None], snapshot: Path, config_alone: bool = False) -> Needed:
    """Return the files that a name stands for.

    Args:
        there: the paths of all files of the repository, or of those that are known, and their sizes.
        snapshot: the folder with the files that are here, of which indexes are read.
        config_alone: the weights are needed only if there is no config.json.

    Raises:
        InputError: there is no such folder or file, or it has no weights, or several of which none has a usual name.
    """
    if name.path in there:
        folder, _, file = name.path.rpartition("/")
        own = _inside(there, folder)
        beside = _beside(own, snapshot / folder) if file not in CONFIGS and any(each in own for each in CONFIGS) else []
        return Needed(tuple(_under(folder, beside)), tuple(_all_parts(name.path, snapshot)))
    own = _inside(there, name.path)
    if not own:
        raise InputError("has no such folder or file", culprit=str(name))
    if PIPELINE in own:
        return _of_pipeline(name, own, snapshot)
    return _of_model(name, own, snapshot, config_alone)


def _of_pipeline(name: HubName, own: Mapping[str, int | None], snapshot: Path) -> Needed:
    """Return the files of a pipeline, and of its components if the file that names them is here."""
    index = snapshot / name.path / PIPELINE
    found = [Needed(tuple(_under(name.path, _beside(own, index.parent))), ())]
    for component in component_names(index.parent) if index.is_file() else ():
        inner = _inside(own, component)
        place = replace(name, path=f"{name.path}/{component}".lstrip("/"))
        if "config.json" in inner or _choose(inner).weights:
            found.append(_of_model(place, inner, snapshot))
        else:  # a scheduler, or a tokenizer
            found.append(Needed(tuple(_under(place.path, _beside(inner, snapshot / place.path))), ()))
    beside = tuple(file for each in found for file in each.beside)
    weights = tuple(file for each in found for file in each.weights)
    return Needed(beside, weights, all(each.is_certain for each in found))


def _of_model(name: HubName, own: Mapping[str, int | None], snapshot: Path, config_alone: bool = False) -> Needed:
    """Return the files of a folder with the files `own`."""
    beside = tuple(_under(name.path, _beside(own, snapshot / name.path)))
    if config_alone and "config.json" in own:
        return Needed(beside, ())
    chosen = _choose(own)
    if len(chosen.weights) != 1 and not chosen.is_certain:
        raise _none_or_several(name, chosen.weights, own)
    weights = [part for each in _under(name.path, chosen.weights) for part in _all_parts(each, snapshot)]
    return Needed(beside, tuple(weights), chosen.is_certain)


def _choose(own: Collection[str]) -> Needed:
    """Choose the weights among the names in a folder: those with the usual names, else all of the first kind there.

    A folder may have a model's and an adapter's, of which a command takes one.
    """
    usual = [next((name for name in names if name in own), "") for names in (INDEX_NAMES + SINGLE_NAMES, ADAPTER_NAMES)]
    if any(usual):
        return Needed((), tuple(filter(None, usual)))
    files = sorted(name for name in own if "/" not in name)
    for pattern in ("*.safetensors.index*.json", "*.safetensors"):
        if found := filter_names(files, pattern):
            return Needed((), tuple(found), False)
    if torch := [name for name in TORCH_NAMES if name in own][:1]:
        return Needed((), tuple(torch))
    pickles = [name for name in files if is_torch_weights(Path(name))]
    models = [name for name in files if name.endswith(".gguf") and split_number(Path(name)) in (None, 1)]
    return Needed((), tuple(pickles or models), False)


def _beside(own: Mapping[str, int | None], folder: Path) -> list[str]:
    """Return which files of a folder travel with its weights, or are needed to read them."""
    modules = tuple(f"{name}/" for name in module_folders(folder))
    return [
        name
        for name, nbytes in own.items()
        if matches(name, BESIDE) or why_left(name, nbytes) is None or name.startswith(modules)
    ]


def _all_parts(path: str, snapshot: Path) -> list[str]:
    """Return a file of weights, or an index and the shards that it names, or all parts of a split GGUF model."""
    folder, _, file = path.rpartition("/")
    if part := GGUF_PART.fullmatch(file):
        count = int(part["count"])
        return _under(folder, [f"{part['stem']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)])
    if not file.endswith(".json") or not (snapshot / path).is_file():
        return [path]
    weight_map = read_json_file(snapshot / path).get("weight_map")
    named = {str(each) for each in weight_map.values()} if isinstance(weight_map, dict) else set()
    return [path, *_under(folder, sorted(filter(is_beside, named)))]  # the others are refused when it is opened


def _inside(there: Mapping[str, int | None], folder: str) -> dict[str, int | None]:
    """Return the names of a folder's files, relative to it, and their sizes."""
    prefix = f"{folder}/" if folder else ""
    return {path[len(prefix) :]: nbytes for path, nbytes in there.items() if path.startswith(prefix)}


def _under(folder: str, names: Iterable[str]) -> list[str]:
    return [f"{folder}/{name}" if folder else name for name in names]


def _none_or_several(name: HubName, found: Collection[str], own: Iterable[str]) -> InputError:
    """Return the error for a folder with no weights, or with several files of them, of which one is to be named."""
    several = bool(found)
    if not found:
        folders = {Path(each).parent.as_posix() for each in own if _choose([Path(each).name]).weights}
        found = sorted(folders, key=lambda folder: (folder.count("/"), folder))
    named = [name.within(each) for each in _under(name.path, found)]
    more = f" (there are {len(named)})" if len(named) > 4 else ""
    remedy = f"name one of them: {', '.join(map(shell_word, named[:4]))}{more}" if named else None
    what = "holds several files of weights" if several else "holds no weights in a format that is read"
    return InputError(what, culprit=str(name), remedy=remedy)
