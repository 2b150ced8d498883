"""Find the weights file of an adapter that is given by the path of a file or a folder."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ...files.checkpoint import is_torch_weights
from ...files.training_states import find_state
from .peft_config import CONFIG_NAME, WEIGHTS_NAMES

# AdapterHub's names, beside which the head's weights are in a separate file; MLX's, beside earlier checkpoints; those
# of torchtune and litgpt, beside the merged model
OTHERS_NAMES = (
    "adapter.safetensors", "pytorch_adapter.bin", "adapters.safetensors", "adapter_model.pt", "lit_model.pth.lora"
)  # fmt: skip


def find_adapter_file(path: Path) -> Path:
    """Return `path` unless it is a folder, else the weights file in the folder or in its only subfolder with a config.

    Raises:
        InputError: the folder holds no weights, several files of weights, or several adapters.
    """
    if not path.is_dir():
        return path
    found = _in_folder(path)
    if not found:
        named = [entry for entry in sorted(path.iterdir()) if (entry / CONFIG_NAME).is_file()]
        if len(named) > 1:
            names = ", ".join(entry.name for entry in named[:4])
            raise InputError(
                f"holds several adapters ({names})", culprit=str(path), remedy=f"name one, like {named[0]}"
            )
        found = _in_folder(named[0]) if named else []
    if len(found) > 1:
        raise InputError(
            f"holds {len(found)} files of weights", culprit=str(path), remedy=f"name one of them, like {found[0]}"
        )
    if not found:
        raise InputError("holds no weights: no *.safetensors file and none of torch", culprit=str(path))
    return found[0]


def _in_folder(path: Path) -> list[Path]:
    """Return the file with a known name, else all safetensors files, else that of a sharded state, else torch files."""
    for name in (*WEIGHTS_NAMES, *OTHERS_NAMES):
        if (path / name).is_file():
            return [path / name]
    files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" and p.is_file())
    if not files and (state := find_state(path)):
        return [state]
    return files or sorted(filter(is_torch_weights, path.iterdir()))
