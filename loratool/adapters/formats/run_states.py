"""Take the adapter out of the state of a training run, which has the base's tensors too, as PEFT does on saving.

A file that someone saved of a whole PeftModel is refused, as the base in it is lost to other tools; the state of a run
is all that there is of its adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files.folder.model_folder import read_json_file
from ...files.states.sharded_file import ShardedFile
from ...files.weights_file import WeightsFile

VERL_CONFIG = "lora_train_meta.json"  # verl's, beside the states of the ranks

# What names of an adapter's tensors have, of LoRA and of every method: peft/utils/save_and_load.py
_MARKS = (".lora_", ".modules_to_save.", ".trainable_tokens_")


def verl_fields(file: WeightsFile) -> dict[str, Any] | None:
    """Return the fields of a PEFT config that verl keeps of an adapter's, None if there is no such file."""
    path: Path = file.path.parent / VERL_CONFIG
    if not file.scattered or not path.is_file():
        return None
    modules = {name.partition(".lora_A.")[0] for name in file.specs if ".lora_A." in name}
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return {"peft_type": "LORA", "target_modules": targets, **read_json_file(path)}


def hide_base(name: str, file: WeightsFile, fields: Mapping[str, Any], marks: Collection[str]) -> tuple[str, ...]:
    """Take the base's tensors from the file of a run's state, and return a sentence on how many, if any.

    The state tells what was not trained, or the config that the base was not.

    Args:
        marks: of names of other methods' tensors.

    Raises:
        InputError: neither does: the base's biases may have been trained.
    """
    if not isinstance(file, ShardedFile):
        return ()
    others = [each for each in file.specs if not any(mark in each for mark in (*_MARKS, *marks))]
    hidden = [each for each in others if each in file.frozen or not file.frozen]
    if len(others) == len(file.specs) or not hidden:
        return ()
    biases = fields.get("bias") or "none"
    if not file.frozen and biases != "none":
        raise InputError(
            f"is the state of a whole PeftModel whose config trains biases ({biases}), and nothing tells which",
            culprit=name,
            remedy="save its adapter with save_pretrained",
        )
    file.hide(hidden)
    return (f"{len(hidden)} tensors of its base are in {name} too, and are not read",)
