"""Find the weights file of an adapter, given the path of a file or a folder."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import InputError, shell_word
from ...files.containers.file_kinds import found_by_content, no_weights
from ...files.folder.model_folder import NO_WEIGHTS, is_torch_weights
from ...files.folder.weight_changes import refuse_change_folder
from ...files.hub.choice import ADAPTER_NAMES
from ...files.states.training_states import find_state
from .peft_config import CONFIG_NAME, WEIGHTS_NAMES

OTHERS_NAMES = tuple(name for name in ADAPTER_NAMES if name not in WEIGHTS_NAMES)

# Folders of a training run's checkpoints: those of transformers' Trainer (and so LLaMA-Factory's, axolotl's, TRL's,
# unsloth's), torchtune's, litgpt's
CHECKPOINT = re.compile(r"(checkpoint-|epoch_|step-)(\d{1,12})")


def find_adapter_file(path: Path) -> Path:
    """Return `path` if it is a file, else the weights in the folder or in its only subfolder with an adapter.

    Of several checkpoints of one run, the one with the highest number is taken.

    Raises:
        InputError: the folder holds no weights, several files of weights, or several adapters; or the newest checkpoint
            holds none, because the run ended while it saved.
    """
    if not path.is_dir():
        return path
    refuse_change_folder(path)
    files = _in_folder(path)
    if not files:
        named = _with_adapters(path)
        newest = _newest(named)
        if newest is None and named:
            names = ", ".join(entry.name for entry in named[:4])
            raise InputError(
                f"holds several adapters ({names})", culprit=str(path), remedy=f"name one, like {shell_word(named[0])}"
            )
        if newest and (later := _later(path, newest)):
            raise InputError(
                f"has a later checkpoint than {newest.name}, {later}, which holds no adapter",
                culprit=str(path),
                remedy=f"name the one to read, like {shell_word(newest)}",
            )
        files, path = (_in_folder(newest), newest) if newest else ([], path)
    if len(files) > 1:
        raise InputError(
            f"holds {len(files)} files of weights",
            culprit=str(path),
            remedy=f"name one of them, like {shell_word(files[0])}",
        )
    if not files:
        raise no_weights(path)
    return files[0]


def notes_on_choice(path: Path, weights: Path) -> tuple[str, ...]:
    """Return notes on the files in a folder that `find_adapter_file` did not choose."""
    if not path.is_dir():
        return ()
    notes, folder = [], weights.parent
    others = [each for each in _with_adapters(path) if each != folder] if folder != path else []
    if others:
        notes.append(f"it is read from {folder.name}, the newest of {len(others) + 1} checkpoints there")
    beside = [name for name in ADAPTER_NAMES if name != weights.name and (folder / name).is_file()]
    notes += [f"{name} beside {weights.name} is not read" for name in beside]
    return tuple(notes)


def _with_adapters(path: Path) -> list[Path]:
    """Return the subfolders that hold an adapter's config or a file of its usual name."""
    marks = (CONFIG_NAME, *OTHERS_NAMES)
    return [each for each in sorted(path.iterdir()) if any((each / mark).is_file() for mark in marks)]


def _newest(folders: list[Path]) -> Path | None:
    """Return the only folder, or the last of one run's checkpoints; None if there is none or several are unrelated."""
    numbers = {folder: match for folder in folders if (match := CHECKPOINT.fullmatch(folder.name))}
    if len(folders) > 1 and (len(numbers) < len(folders) or len({match[1] for match in numbers.values()}) > 1):
        return None
    return max(folders, key=lambda folder: int(numbers[folder][2]) if folder in numbers else 0, default=None)


def _later(path: Path, newest: Path) -> str | None:
    """Return the name of a later checkpoint of the same run in the folder; None if there is none."""
    chosen = CHECKPOINT.fullmatch(newest.name)
    every = [match for each in path.iterdir() if (match := CHECKPOINT.fullmatch(each.name))]
    return next((m[0] for m in every if chosen and m[1] == chosen[1] and int(m[2]) > int(chosen[2])), None)


def _in_folder(path: Path) -> list[Path]:
    """Return the file with a known name, else safetensors files, else a sharded state, else torch files."""
    for name in ADAPTER_NAMES:
        if (path / name).is_file():
            return [path / name]
    files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" and p.is_file())
    if not files and (state := find_state(path)):
        return [state]
    others = files or sorted(each for each in path.iterdir() if is_torch_weights(each) and not each.is_dir())
    others = others or [each for each in sorted(path.glob("*.gguf")) if not each.is_dir()]
    return others or [each for each in found_by_content(path) if not NO_WEIGHTS.fullmatch(each.name)]
