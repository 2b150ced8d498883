"""Convert PEFT's files of older versions, and of trainers with other tensor names, to PEFT's current form.

Each form is a function in FORMS. It returns the tensors and fields in the current form, or None for another file.
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
from ..config import is_in_listed_module
from .joined_factors import put_tensor
from .made_tensors import MadeTensor, copied, made_of, whole_B
from .peft_trainers import bridges, tinkers, unsloths

if TYPE_CHECKING:
    from ...numerics.forms import Bits

Fields = Mapping[str, Any]  # of adapter_config.json, or of the base's config.json
Form = Callable[[WeightsFile, Fields, Fields], tuple[dict[str, MadeTensor], dict[str, Any]] | None]

MOST_BLOCKS = 256  # of a block-diagonal factor, one for each GPU that serves it
FACTOR = re.compile(r"\.lora_([AB])(?:\.[^.]+)?\.weight\Z")

COPY = re.compile(r"\.(?:modules_to_save(?:\.default)?|original_module)(?=\.|\Z)")  # of a module, trained or not

# suffixes of the tensors of trainable tokens and of tuned norms, for files without LoRA factors
TOKENS = re.compile(r"(?<!\.token_adapter)\.trainable_tokens_delta(?=\.|\Z)")
NORM = re.compile(r"\.ln_tuning_layers(?:\.[^.]+)?(\.(?:weight|bias))\Z")

MOST_SLICES = 16  # of a MergedLinear; its full B has as many times the rows, and models have only q, k and v

# field of the config -> a mark of tensors used only in training: PEFT merges VeLoRA and MonteCLoRA as LoRA
# (their variants' `merge_safe` in `peft/tuners/lora/variants.py`)
OF_TRAINING = {"velora_config": ".lora_velora_embed", "monteclora_config": ".lora_monteclora_sampler."}

TORCHTUNES_FIELDS = ("r", "lora_alpha", "target_modules", "peft_type")


def merged_linears(file: WeightsFile, fields: Fields, _: Fields) -> tuple[dict[str, MadeTensor], dict[str, Any]] | None:
    """Convert adapters of PEFT before 0.3 with `enable_lora`: every module adapts n of the equal slices of its rows.

    Defined by `peft/tuners/lora.py` of PEFT 0.2 (MergedLinear.forward). The rank in the current form is n r.

    Raises:
        InputError: `enable_lora` is not a list of booleans, or a pair of factors does not divide by it.
    """
    if not fields.get("enable_lora"):
        return None
    enabled, rank, alpha = fields["enable_lora"], fields.get("r"), fields.get("lora_alpha")
    is_list = isinstance(enabled, list) and len(enabled) <= MOST_SLICES and all(type(each) is bool for each in enabled)
    if not is_list or not any(enabled):
        shown = brief(enabled)
        raise InputError(
            f"its config's enable_lora is {shown}, not a list of at most {MOST_SLICES} of true and false",
            culprit=str(file.path),
        )
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError("its config sets enable_lora, but no r and lora_alpha", culprit=str(file.path))
    tensors = {name: copied(file, name) for name in file.specs}
    for name in file.specs:
        if ".lora_B." in name and (A := name.replace(".lora_B.", ".lora_A.")) in file.specs:
            tensors[name] = whole_B(file, A, name, rank, enabled)
    others = {field: value for field, value in fields.items() if field not in ("enable_lora", "merge_weights")}
    if others.get("fan_in_fan_out"):  # PEFT 0.1 and 0.2 saved it as given, after resetting it for a linear layer
        del others["fan_in_fan_out"]
    n = sum(enabled)
    return tensors, {**others, "r": n * rank, "lora_alpha": n * alpha}


def hide_training(name: str, file: WeightsFile, fields: Fields) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Hide a file's tensors that only a variant's training uses; return the other fields and a note on the tensors."""
    hidden = [each for each in file.specs if any(mark in each for mark in OF_TRAINING.values())]
    file.hide(hidden)
    others = {field: value for field, value in fields.items() if field not in OF_TRAINING or not value}
    note = f"{len(hidden)} tensors of {name} are only for training, like {min(hidden, default='')}, and are not read"
    return others, (note,) if hidden else ()


def block_diagonals(
    file: WeightsFile, fields: Fields, _: Fields
) -> tuple[dict[str, MadeTensor], dict[str, Any]] | None:
    """Expand BD-LoRA's factors: either A or B of a module is stored as its diagonal blocks, one below the other.

    Defined by `BdLoraLinearVariant` and `BlockDiagonalLinear` of `peft/tuners/lora/variants.py`.

    Raises:
        InputError: `use_bdlora` does not list factors and blocks, or a factor does not divide into its blocks.
    """
    settings = fields.get("use_bdlora")
    if not settings:
        return None
    settings = settings if isinstance(settings, dict) else {}
    blocks = settings.get("nblocks", 1)
    patterns = {side: settings.get(f"target_modules_bd_{side.lower()}") or [] for side in "AB"}
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


def _on_diagonal(stacked: Bits, blocks: int) -> Bits:
    import numpy as np

    rows, columns = len(stacked) // blocks, stacked.shape[1]
    full: Bits = np.zeros((blocks, rows, blocks, columns), stacked.dtype)
    for block in range(blocks):
        full[block, :, block] = stacked[block * rows : (block + 1) * rows]
    return full.reshape(len(stacked), -1)


def standalone(file: WeightsFile, fields: Fields, _: Fields) -> tuple[dict[str, MadeTensor], dict[str, Any]] | None:
    """Convert trainable tokens, or tuned norms, to a file of LoRA that trained them beside its factors.

    Defined by `peft/tuners/trainable_tokens` (`trainable_tokens_delta` has the new rows) and `peft/tuners/ln_tuning`.
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
        listed = {"modules_to_save": sorted({*saved, *modules}) if isinstance(saved, list) else saved}
    else:
        listed = {"trainable_token_indices": dict.fromkeys(modules, fields.get("token_indices"))}
    others = {field: value for field, value in fields.items() if field not in ("token_indices", "init_weights")}
    return tensors, {**others, **listed, "peft_type": "LORA", "target_modules": []}


def lora_in_saved(file: WeightsFile, fields: Fields, _: Fields) -> tuple[dict[str, MadeTensor], dict[str, Any]] | None:
    """Convert adapters of PEFT before 0.6 with factors inside `modules_to_save`, which PEFT now loads without them.

    PEFT put its layers in first, and copied the module with them: its weights were trained, and their factors too. In
    the current form the weights are those under the factors, and `modules_to_save` lists the other trained modules.
    Defined by `_set_trainable` and `ModulesToSaveWrapper` of `peft/utils/other.py` of PEFT 0.5.
    """
    listed = [each for each in fields.get("modules_to_save") or () if isinstance(each, str)]
    stems = {COPY.sub("", name[: match.start()]) for name in file.specs if (match := FACTOR.search(name))}
    paths = {stem: stem.removeprefix(PEFT_PREFIX) for stem in stems if f"{stem}.weight" in file.specs}
    inside = {stem for stem, path in paths.items() if any(is_in_listed_module(entry, path) for entry in listed)}
    if not inside:
        return None
    tensors: dict[str, MadeTensor] = {}
    for name in file.specs:
        stem, parameter = name.rpartition(".")[::2]
        put_tensor(tensors, f"{stem}.base_layer.{parameter}" if stem in inside else name, copied(file, name))
    emptied = {entry for entry in listed if any(is_in_listed_module(entry, paths[stem]) for stem in inside)}
    others = {name.rpartition(".")[0].removeprefix(PEFT_PREFIX) for name in file.specs if ".lora_" not in name}
    others = {path for path in others - {paths[stem] for stem in inside} if path not in emptied}
    kept = {path for path in others if any(is_in_listed_module(entry, path) for entry in emptied)}
    return tensors, {**fields, "modules_to_save": sorted({*listed} - emptied | kept) or None}


def torchtunes(file: WeightsFile, fields: Fields, model: Fields) -> None:
    """Refuse an export by torchtune 0.6 with rows in a wrong order; accept correct exports and other files.

    `tune_to_peft_adapter_weights` reorders the rows of B of q and k. It also does so for Qwen, where it is wrong, and
    does not reorder DoRA's magnitudes. The export is recognized by the fields of its config and their order.

    Raises:
        InputError: the file is an export with a wrong order.
    """
    if tuple(fields)[:4] != TORCHTUNES_FIELDS or fields.keys() - {*TORCHTUNES_FIELDS, "base_model_name_or_path"}:
        return None
    kind = str((model or read_folder_config(file.path.parent)).get("model_type"))
    wrong = ".lora_B.", "lora_magnitude_vector"
    ends = wrong if INTERLEAVED.get(kind) is False else wrong[1:]
    reordered = next((k for k in file.specs if re.search(r"\b[qk]_proj\b", k) and any(end in k for end in ends)), None)
    if reordered:
        raise InputError(
            "seems to be torchtune's export for PEFT, with rows in another order than the model's",
            culprit=reordered,
            remedy="name the adapter_model.pt that torchtune writes beside it; if another tool wrote this file, put "
            "its peft_version into the config",
        )
    return None


FORMS: tuple[Form, ...] = (
    merged_linears,
    block_diagonals,
    standalone,
    lora_in_saved,
    torchtunes,
    unsloths,
    tinkers,
    bridges,
)
