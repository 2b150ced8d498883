"""Extract the adapter from the state of a training run, which also has the base's tensors, as PEFT does on saving.

A saved file of a full PeftModel is refused, because other tools cannot use the base in it. The state of a run is
accepted, because no other file has its adapter.
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

# Marks in the names of an adapter's tensors, of LoRA and of every method: peft/utils/save_and_load.py
_MARKS = (".lora_", ".modules_to_save.", ".trainable_tokens_")


def verl_fields(file: WeightsFile) -> dict[str, Any] | None:
    """Return the fields of PEFT's config that verl stores; None without verl's file."""
    path: Path = file.path.parent / VERL_CONFIG
    if not file.scattered or not path.is_file():
        return None
    modules = {name.partition(".lora_A.")[0] for name in file.specs if ".lora_A." in name}
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return {"peft_type": "LORA", "target_modules": targets, **read_json_file(path)}


def hide_base(name: str, file: WeightsFile, fields: Mapping[str, Any], marks: Collection[str]) -> tuple[str, ...]:
    """Hide the base's tensors in the file of a run's state, and return a sentence with their number, if any.

    The state shows which tensors were not trained, or the config shows that the base was not.

    Args:
        marks: parts of the names of other methods' tensors.

    Raises:
        InputError: neither shows it, so the base's biases may have been trained.
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
            f"is the state of a whole PeftModel whose config trains biases ({biases}), but does not say which",
            culprit=name,
            remedy="save its adapter with save_pretrained",
        )
    file.hide(hidden)
    return (f"{len(hidden)} tensors of its base are in {name} too, and are not read",)
