"""Read kohya's format, the most common one for image models: one safetensors file with flattened names.

Tensors are `<prefix>_<module path with _ for .>.lora_down.weight` (r, in), `.lora_up.weight` (out, r), `.alpha` ().
The scale is alpha / r; a missing or zero alpha means r. Defined by kohya-ss/sd-scripts: `networks/lora.py`.
ComfyUI reads PEFT's `.lora_A.weight` and `.lora_B.weight` with these modules too (`comfy/lora.py`).
OneTrainer and LyCORIS add `.dora_scale`, DoRA's magnitude: (out, 1[, 1, 1]), or of V's columns (1, in).
A flattened name cannot be split by rule, so it is matched with the flattened names of the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...architectures.prefixes import KOHYA_PREFIXES
from ...errors import InputError, UsageError
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..config import AdapterConfig
from ..updates.headers import spec_from_roles
from ..updates.update import UpdateSpec
from .other_methods import refused_tensor

ROLES = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}


def claims(names: Iterable[str]) -> bool:
    return any(name.startswith(KOHYA_PREFIXES) for name in names)


def read(name: str, file: WeightsFile, alpha: float | None, lenient: bool = False) -> Adapter:
    """Read the adapter in `file`.

    Raises:
        InputError: a tensor is not one of LoRA or DoRA.
        UsageError: `alpha` contradicts the file.
    """
    found: dict[str, dict[str, str]] = {}
    for tensor in file.specs:
        module, _, end = tensor.partition(".")
        if end not in ROLES:
            raise refused_tensor(tensor, name)
        if (other := found.setdefault(module, {}).setdefault(ROLES[end], tensor)) != tensor:
            raise InputError(f"is the same as {other}", culprit=tensor)
    updates = {}
    for module, roles in found.items():
        stored = roles.pop("alpha", None)
        if not roles:
            raise InputError(f"has no lora_down and lora_up beside it in {name}", culprit=stored)
        value = file.scalar(stored) if stored else None
        if value is not None and not math.isfinite(value):
            raise InputError(f"is {value}", culprit=stored)
        if alpha is not None and value is not None and alpha != value:
            raise UsageError(f"--alpha {alpha:g} contradicts the file's {stored} = {value:g}", culprit=name)
        value = alpha if value is None else value
        rank = file.specs[roles["A"]].shape[0] if "A" in roles and file.specs[roles["A"]].shape else 0
        module_config = AdapterConfig(alpha=value or float(rank))
        updates[module] = pair_magnitude(module, roles, file, module_config, lenient)
    alphas = {spec.scale * spec.rank for spec in updates.values()}
    config = replace(AdapterConfig(), alpha=alphas.pop() if len(alphas) == 1 else None)
    return Adapter(name, "kohya", file, config, updates, flattened=True)


def pair_magnitude(
    module: str, roles: Mapping[str, str], file: WeightsFile, config: AdapterConfig, lenient: bool
) -> UpdateSpec:
    """Make a module's update, with DoRA over outputs or inputs as the shape of its `dora_scale` tells.

    Raises:
        InputError: `dora_scale` has neither shape, or is over the inputs of a convolution; and as `pair_factors` does.
    """
    key, A, B = roles.get("magnitude", ""), roles.get("A"), roles.get("B")
    shape = file.specs[key].shape if key.endswith(".dora_scale") else ()
    if A and B and len(shape) > 1 and shape[:1] != file.specs[B].shape[:1] and shape[1:2] == file.specs[A].shape[1:2]:
        if len(file.specs[A].shape) > 2:
            reason = f"is {shape}: DoRA along the inputs of a convolution, which is not supported"
            if not lenient:
                raise InputError(reason, culprit=key)
            rest = {role: name for role, name in roles.items() if role != "magnitude"}
            plain = spec_from_roles(module, rest, file, config, False, lenient=True)
            return replace(plain, fault=f"{key} {reason}")
        return spec_from_roles(module, roles, file, config, False, along_inputs=True, lenient=lenient)
    if shape and not lenient and shape.count(1) < len(shape) - 1:
        raise InputError(f"is {shape}, not a magnitude for each output", culprit=key)
    return spec_from_roles(module, roles, file, config, transposed=False, lenient=lenient)
