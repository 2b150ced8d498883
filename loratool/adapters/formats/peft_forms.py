"""Bring PEFT's files of older forms, and of trainers that name their tensors otherwise, to the form of today's.

A form is a function in FORMS: it returns the tensors and fields of today's, or None for a file that is not of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...architectures.prefixes import PEFT_PREFIX
from ...architectures.torchtune import INTERLEAVED
from ...errors import InputError, brief
from ...files.checkpoint import read_folder_config
from ...files.weights_file import WeightsFile
from .joined_factors import put_tensor
from .made_tensors import MadeTensor, copied, made_of, whole_B
from .peft_trainers import bridges, tinkers, unsloths

if TYPE_CHECKING:
    from torch import Tensor

Fields = Mapping[str, Any]  # of adapter_config.json, or of the base's config.json
Form = Callable[[WeightsFile, Fields, Fields], tuple[dict[str, MadeTensor], dict[str, Any]] | None]

MOST_BLOCKS = 256  # of a block-diagonal factor, one for each of the GPUs that serve it
FACTOR = re.compile(r"\.lora_([AB])(?:\.[^.]+)?\.weight\Z")

# ends of the tensors of trainable tokens and of tuned norms, where they are all that was trained
TOKENS = re.compile(r"(?<!\.token_adapter)\.trainable_tokens_delta(?=\.|\Z)")
NORM = re.compile(r"\.ln_tuning_layers(?:\.[^.]+)?(\.(?:weight|bias))\Z")

MOST_SLICES = 16  # of a MergedLinear, whose whole B has as many times the rows; models have q, k and v

# field of the config -> a mark of the tensors that serve its training alone: PEFT merges VeLoRA and MonteCLoRA as LoRA
# (their variants' `merge_safe` in `peft/tuners/lora/variants.py`)
OF_TRAINING = {"velora_config": ".lora_velora_embed", "monteclora_config": ".lora_monteclora_sampler."}

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


def hide_training(name: str, file: WeightsFile, fields: Fields) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Take the tensors that only a variant's training uses from a file; return the other fields, and a note on them."""
    hidden = [each for each in file.specs if any(mark in each for mark in OF_TRAINING.values())]
    file.hide(hidden)
    kept = {field: value for field, value in fields.items() if field not in OF_TRAINING or not value}
    note = f"{len(hidden)} tensors of {name} serve training alone, like {min(hidden, default='')}, and are not read"
    return kept, (note,) if hidden else ()


def block_diagonals(
    file: WeightsFile, fields: Fields, _: Fields
) -> tuple[dict[str, MadeTensor], dict[str, Any]] | None:
    """Return BD-LoRA's factors in full: one of A and B of a module has its diagonal blocks one below the other.

    Defined by `BdLoraLinearVariant` and `BlockDiagonalLinear` of `peft/tuners/lora/variants.py`.

    Raises:
        InputError: `use_bdlora` does not say which factors have how many blocks, or one does not divide by them.
    """
    said = fields.get("use_bdlora")
    if not said:
        return None
    said = said if isinstance(said, dict) else {}
    blocks = said.get("nblocks", 1)
    patterns = {side: said.get(f"target_modules_bd_{side.lower()}") or [] for side in "AB"}
    lists = all(isinstance(each, list) and all(isinstance(part, str) for part in each) for each in patterns.values())
    if type(blocks) is not int or not 1 <= blocks <= MOST_BLOCKS or not lists:
        shown = brief(fields["use_bdlora"])
        raise InputError(
            f"its config's use_bdlora is {shown}, which does not list modules and at most {MOST_BLOCKS} blocks",
            culprit=str(file.path),
        )
    tensors = {name: copied(file, name) for name in file.specs}
    for name, spec in file.specs.items():
        match = FACTOR.search(name)
        module = name[: match.start()].removeprefix(PEFT_PREFIX) if match else ""
        if match is None or not any(part in module for part in patterns[match[1]]):
            continue
        if len(spec.shape) != 2 or spec.shape[0] % blocks:
            raise InputError(f"is {spec.shape}, not {blocks} blocks one below the other", culprit=name)
        shape = spec.shape[0], blocks * spec.shape[1]
        tensors[name] = made_of(file, name, shape, functools.partial(_on_diagonal, blocks=blocks))
    return tensors, {field: value for field, value in fields.items() if field != "use_bdlora"}


def _on_diagonal(stacked: Tensor, blocks: int) -> Tensor:
    import torch

    whole: Tensor = torch.block_diag(*stacked.chunk(blocks))  # type: ignore[no-untyped-call]
    return whole


def standalone(file: WeightsFile, fields: Fields, _: Fields) -> tuple[dict[str, MadeTensor], dict[str, Any]] | None:
    """Return trainable tokens, or tuned norms, as the file of LoRA that trained these beside its factors.

    Defined by `peft/tuners/trainable_tokens`, whose `trainable_tokens_delta` are the new rows, and by
    `peft/tuners/ln_tuning`.
    """
    kind = fields.get("peft_type")
    if kind not in ("TRAINABLE_TOKENS", "LN_TUNING"):
        return None
    end, today = (TOKENS, ".token_adapter.trainable_tokens_delta") if kind == "TRAINABLE_TOKENS" else (NORM, r"\1")
    tensors: dict[str, MadeTensor] = {}
    modules: list[str] = []
    for name in file.specs:
        if match := end.search(name):
            modules.append(name[: match.start()].removeprefix(PEFT_PREFIX))
        put_tensor(tensors, end.sub(today, name), copied(file, name))
    saved = fields.get("modules_to_save") or []
    if kind == "LN_TUNING":
        own = {"modules_to_save": sorted({*saved, *modules}) if isinstance(saved, list) else saved}
    else:
        own = {"trainable_token_indices": dict.fromkeys(modules, fields.get("token_indices"))}
    kept = {field: value for field, value in fields.items() if field not in ("token_indices", "init_weights")}
    return tensors, {**kept, **own, "peft_type": "LORA", "target_modules": []}


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


FORMS: tuple[Form, ...] = (merged_linears, block_diagonals, standalone, torchtunes, unsloths, tinkers, bridges)
