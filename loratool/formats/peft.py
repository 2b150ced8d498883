"""PEFT's adapters: `adapter_model.safetensors` beside `adapter_config.json`.

Keys are `base_model.model.<module>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r); rank, alpha and all
that changes the arithmetic stand in the config. Defined by peft: `peft/utils/save_and_load.py`,
`peft/tuners/lora/config.py`. A bare file may carry its config in its metadata: ours under `loratool`, or
diffusers' `lora_adapter_metadata`, whose fields start with the component's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..adapter import Adapter, AdapterConfig, UpdateSpec, pair_factors
from ..architectures.wrappers import PEFT_PREFIX, WRAPPERS
from ..checkpoint import read_json_file
from ..errors import InputError, UsageError
from ..tensorfile import TensorFile

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])\.weight", re.DOTALL)
_WRAPPED = re.compile(rf"^(?:(?:{'|'.join(sorted(WRAPPERS))})\.)*{re.escape(PEFT_PREFIX)}")

# What changes the arithmetic in a way that a plain `scale * B @ A` does not have. A field counts where it is
# neither null, false, empty nor the value given here.
REFUSED = {
    "use_dora": (False, "DoRA rescales the rows of the merged weight"),
    "lora_bias": (False, "it trained biases inside lora_B"),
    "bias": ("none", "it trained the base's biases"),
    "modules_to_save": (None, "it replaces whole modules"),
    "trainable_token_indices": (None, "it replaces rows of the embedding"),
    "target_parameters": (None, "it changes bare parameters (fused experts)"),
    "layer_replication": (None, "its layers are replicas that share the base's weights"),
    "alora_invocation_tokens": (None, "an activated LoRA depends on the prompt, so it can never be merged"),
    "use_qalora": (False, "QA-LoRA's A sees an averaged input"),
    "use_bdlora": (None, "BD-LoRA's factors are block-diagonal"),
    "arrow_config": (None, "Arrow routes between several adapters"),
    "kasa_config": (None, "KaSA truncates the base"),
    "velora_config": (None, "VeLoRA is a variant with a formula of its own"),
    "monteclora_config": (None, "MonteCLoRA is a variant with a formula of its own"),
}
# Initializations that change the base: on the untouched base the adapter is wrong by the size of its factors.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")


def claims(names: Iterable[str]) -> bool:
    """Keys of LoRA, and of PEFT's other methods: a base saved under PEFT's prefix has plain weights and biases only."""
    return any(
        ".lora_A." in name
        or ".lora_B." in name
        or ".lora_embedding_" in name
        or (name.startswith(PEFT_PREFIX) and not name.endswith((".weight", ".bias")))
        for name in names
    )


def read(name: str, file: TensorFile, alpha: float | None) -> Adapter:
    """Raises InputError for what is not plain LoRA on linear layers, naming the field or the tensor."""
    fields, component = _find_config(file)
    config = _parse_config(name, fields, alpha)
    found: dict[str, dict[str, str]] = {}
    for tensor in file.specs:
        match = _KEY.fullmatch(tensor)
        if not match:
            raise InputError(
                f"is no lora_A.weight or lora_B.weight of a linear layer; {name} does more than plain LoRA, "
                "which is not supported yet",
                culprit=tensor,
            )
        module = _WRAPPED.sub("", match["module"]).removeprefix(f"{component}." if component else "")
        roles = found.setdefault(module, {})
        if match["role"] in roles:
            raise InputError(f"is the same factor as {roles[match['role']]}", culprit=tensor)
        roles[match["role"]] = tensor
    updates: dict[str, UpdateSpec] = {
        module: pair_factors("lora", module, roles, file, config) for module, roles in found.items()
    }
    return Adapter(name, "peft", file, config, updates)


def _find_config(file: TensorFile) -> tuple[dict[str, Any], str]:
    """The config's fields and the component that prefixes the keys: from the metadata, else from the file beside."""
    metadata = file.metadata or {}
    if "loratool" in metadata:
        ours = _parse_metadata(file, "loratool").get("adapter_config")
        if isinstance(ours, dict):
            return ours, ""
    if "lora_adapter_metadata" in metadata:
        flat = _parse_metadata(file, "lora_adapter_metadata")
        components = sorted({key.partition(".")[0] for key in flat})
        if len(components) != 1:
            raise InputError(
                f"holds adapters of several components ({', '.join(components)})",
                culprit=str(file.path),
                remedy="split the file by component first",
            )
        return {"peft_type": "LORA", **{key.partition(".")[2]: value for key, value in flat.items()}}, components[0]
    beside = file.path.parent / CONFIG_NAME
    return (read_json_file(beside), "") if beside.is_file() else ({"peft_type": "LORA"}, "")


def _parse_metadata(file: TensorFile, key: str) -> dict[str, Any]:
    try:
        value = json.loads((file.metadata or {})[key])
    except ValueError as error:
        raise InputError(f"its metadata {key} is not JSON: {error}", culprit=str(file.path)) from error
    if not isinstance(value, dict):
        raise InputError(f"its metadata {key} is not a JSON object", culprit=str(file.path))
    return value


def _parse_config(name: str, fields: Mapping[str, Any], alpha: float | None) -> AdapterConfig:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise InputError(f"is a {kind} adapter; only LORA is supported", culprit=name)
    for field, (plain, reason) in REFUSED.items():
        value = fields.get(field)
        if value and value != plain:
            raise InputError(f"its config sets {field}: {reason}; not supported yet", culprit=name)
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise InputError(
            f"was initialized with {init}, which changed the base under it: on the original base it is wrong",
            culprit=name,
            remedy="convert it to plain LoRA with peft first (path_initial_model_for_weight_conversion)",
        )
    stored = _number(name, fields, "lora_alpha", (int, float))
    if alpha is not None and stored is not None and alpha != stored:
        raise UsageError(f"--alpha {alpha:g} contradicts the config's lora_alpha {stored:g}", culprit=name)
    return AdapterConfig(
        rank=_number(name, fields, "r", (int,)),
        alpha=stored if stored is not None else alpha,
        use_rslora=_flag(name, fields, "use_rslora") or False,
        rank_pattern=_pattern(name, fields, "rank_pattern"),
        alpha_pattern=_pattern(name, fields, "alpha_pattern"),
        fan_in_fan_out=_flag(name, fields, "fan_in_fan_out"),
        base_model=fields.get("base_model_name_or_path"),
        extra=dict(fields),
    )


def _flag(name: str, fields: Mapping[str, Any], field: str) -> bool | None:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"its config sets {field} to {value!r}, neither true nor false", culprit=name)
    return value


def _number(name: str, fields: Mapping[str, Any], field: str, types: tuple[type, ...]) -> Any:
    value = fields.get(field)
    if value is not None and not _is_number(value, types):
        raise InputError(f"its config's {field} is not a number that can be used", culprit=name)
    return value


def _is_number(value: Any, types: tuple[type, ...] = (int, float)) -> bool:
    """Finite and of a size that float64 holds; JSON knows NaN, Infinity and whole numbers of any length."""
    return type(value) in types and -1e300 < value < 1e300


def _pattern(name: str, fields: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = fields.get(field) or {}
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        raise InputError(f"its config's {field} does not map names to numbers", culprit=name)
    return value
