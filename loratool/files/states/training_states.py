"""Find the weights in a folder with a training run's sharded state, and open them by a file's name."""

from __future__ import annotations

import re
from pathlib import Path

from ...durable.fileio import is_beside, open_for_reading
from ...errors import InputError, shell_word
from .dcp_file import METADATA, DcpFile
from .dtensor_file import RANK_FILE, DTensorFile
from .sharded_file import ShardedFile
from .zero_file import EARLIER, OPTIMIZER, ZeroFile

# Names of the files that open a state -> its class
STATES: dict[re.Pattern[str], type[ShardedFile]] = {
    re.compile(re.escape(METADATA)): DcpFile,
    OPTIMIZER: ZeroFile,
    RANK_FILE: DTensorFile,
}

LATEST = ("latest", "latest_universal")  # DeepSpeed's files that name the folder of the last step

# A rank's DCP file in safetensors: it does not have the full shape of a tensor that is cut over the ranks
RANK_SAFETENSORS = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")

# A rank's file of Fast-LLM (`engine/checkpoint/distributed.py`), beside FAST_LLM: all its parameters as flat vectors
FAST_LLM_RANK, FAST_LLM = re.compile(r"rank_\d+\.safetensors"), "metadata.yaml"


def refuse_rank_file(path: Path) -> None:
    """Raise InputError for a rank's part of a model in safetensors, where tensors may be cut."""
    if FAST_LLM_RANK.fullmatch(path.name) and (path.parent / FAST_LLM).is_file():
        raise InputError(
            "is one rank's part of a Fast-LLM state, whose tensors are flat vectors without names",
            culprit=str(path),
            remedy="export the model with Fast-LLM; for an adapter, which it does not export, add it to the weights "
            "first, then: loratool extract BASE MODEL",
        )
    if RANK_SAFETENSORS.fullmatch(path.name):
        raise InputError(
            "is one rank's part of a sharded state (DCP in safetensors), which does not record the full sizes",
            culprit=str(path),
            remedy="put the parts together: consolidate_safetensors_files of torch.distributed.checkpoint",
        )


def opener(path: Path) -> type[ShardedFile] | None:
    """Return the class that opens a file of a sharded state, by its name; None for any other file."""
    return next((state for pattern, state in STATES.items() if pattern.fullmatch(path.name)), None)


def find_state(folder: Path) -> Path | None:
    """Return the file that opens a training run's weights in a folder; None without one.

    Raises:
        InputError: there are several, or only states without weights or in unsupported formats.
    """
    return _find_dcp(folder) or _find_zero(folder) or _find_ranks(folder)


def _find_dcp(folder: Path) -> Path | None:
    if (folder / METADATA).is_file():
        return folder / METADATA
    states = sorted(folder.glob(f"*/{METADATA}"))
    # accelerate saves the optimizer beside the model, in `optimizer_0`
    weights = [path for path in states if not path.parent.name.startswith("optimizer")]
    if states and not weights:
        raise InputError("holds only an optimizer's state, and no weights", culprit=str(folder))
    return _only(folder, weights)


def _find_zero(folder: Path) -> Path | None:
    step = folder
    for name in LATEST:
        if (folder / name).is_file():
            with open_for_reading(folder / name) as file:
                tag = file.read(256).decode(errors="replace").strip()
            step = folder / tag
            if not is_beside(tag) or not step.is_dir():
                raise InputError(f"names the step {tag!r}, which is missing", culprit=str(folder / name))
            break
    if next(step.glob("zero/*/fp32.pt"), None) or (step != folder and name == LATEST[1]):
        raise InputError(
            "is a universal checkpoint of DeepSpeed, which is not read",
            culprit=str(step),
            remedy="name the step that it was made from",
        )
    steps = {path.parent: path for path in (*step.glob("*.pt"), *step.glob("*/*.pt")) if OPTIMIZER.fullmatch(path.name)}
    if step in steps:
        return steps[step]
    if step != folder and (step / EARLIER).is_file():  # not of ZeRO: the model's weights are in one file
        return step / EARLIER
    if not steps and next(step.glob("zero_pp_rank_*_model_states.pt"), None):
        raise InputError(
            "is a part of a DeepSpeed ZeRO state: the weights are in the optimizer's files, which are missing",
            culprit=str(step),
            remedy="copy the whole folder",
        )
    return _only(folder, sorted(steps.values()))


def _find_ranks(folder: Path) -> Path | None:
    files = [*folder.glob("model_world_size_*_rank_0.pt"), *folder.glob("*/model_world_size_*_rank_0.pt")]
    here = [path for path in files if path.parent == folder]
    return _only(folder, sorted(path for path in here or files if RANK_FILE.fullmatch(path.name)))


def _only(folder: Path, states: list[Path]) -> Path | None:
    """Return the only state found; None if there is none."""
    if len(states) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in states[:4])
        raise InputError(
            f"holds {len(states)} states of training runs ({names})",
            culprit=str(folder),
            remedy=f"name one of them, like {shell_word(states[0])}",
        )
    return states[0] if states else None
