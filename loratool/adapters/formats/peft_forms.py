"""Bring PEFT's files of older forms, and of trainers that name their tensors otherwise, to the form of today's.

A form is a function in FORMS: it returns the tensors and fields of today's, or None for a file that is not of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ...architectures.torchtune import INTERLEAVED
from ...errors import InputError, brief
from ...files.checkpoint import read_folder_config
from ...files.weights_file import WeightsFile
from .made_tensors import MadeTensor, copied, whole_B
from .peft_trainers import bridges, tinkers, unsloths

Fields = Mapping[str, Any]  # of adapter_config.json, or of the base's config.json
Form = Callable[[WeightsFile, Fields, Fields], tuple[dict[str, MadeTensor], dict[str, Any]] | None]

MOST_SLICES = 16  # of a MergedLinear, whose whole B has as many times the rows; models have q, k and v

TORCHTUNES_FIELDS = ("r", "lora_alpha", "target_modules", "peft_type")


def merged_linears(file: WeightsFile, fields: Fields, _: Fields) -> tuple[dict[str, MadeTensor], dict[str, Any]] | None:
    """Return PEFT's before 0.3 with `enable_lora`, whose every module adapts n of equal slices of its rows.

    Defined by `peft/tuners/lora.py` of PEFT 0.2 (MergedLinear.forward). The rank of today's is n r.

    Raises:
        InputError: `enable_lora` is no list of booleans, or a pair of factors does not divide by it.
    """
    if not fields.get("enable_lora"):
        return None
    enabled, rank, alpha = fields["enable_lora"], fields.get("r"), fields.get("lora_alpha")
    is_list = isinstance(enabled, list) and len(enabled) <= MOST_SLICES and all(type(each) is bool for each in enabled)
    if not is_list or not any(enabled):
        shown = brief(enabled)
        raise InputError(
            f"its config's enable_lora is {shown}, no list of at most {MOST_SLICES} of true and false",
            culprit=str(file.path),
        )
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError("its config sets enable_lora, but no r and lora_alpha", culprit=str(file.path))
    tensors = {name: copied(file, name) for name in file.specs}
    for name in file.specs:
        if ".lora_B." in name and (A := name.replace(".lora_B.", ".lora_A.")) in file.specs:
            tensors[name] = whole_B(file, A, name, rank, enabled)
    kept = {field: value for field, value in fields.items() if field not in ("enable_lora", "merge_weights")}
    n = sum(enabled)
    return tensors, {**kept, "r": n * rank, "lora_alpha": n * alpha}


def torchtunes(file: WeightsFile, fields: Fields, model: Fields) -> None:
    """Refuse an export by torchtune 0.6 with rows in a wrong order; return None for what is right, and others' files.

    `tune_to_peft_adapter_weights` turns the rows of B of q and k, those of Qwen too, which need no turn, and not the
    magnitudes of DoRA. It is known by its config, which has these fields in this order and none of another.

    Raises:
        InputError: it is such an export.
    """
    if tuple(fields)[:4] != TORCHTUNES_FIELDS or fields.keys() - {*TORCHTUNES_FIELDS, "base_model_name_or_path"}:
        return None
    kind = str((model or read_folder_config(file.path.parent)).get("model_type"))
    wrong = ".lora_B.", "lora_magnitude_vector"
    ends = wrong if INTERLEAVED.get(kind) is False else wrong[1:]
    turned = next((k for k in file.specs if re.search(r"\b[qk]_proj\b", k) and any(end in k for end in ends)), None)
    if turned:
        raise InputError(
            "seems to be of torchtune's export for PEFT, with rows in another order than the model's",
            culprit=turned,
            remedy="name the adapter_model.pt that torchtune writes beside it; if it was another tool, put that one's "
            "peft_version into the config",
        )
    return None


FORMS: tuple[Form, ...] = (merged_linears, torchtunes, unsloths, tinkers, bridges)
