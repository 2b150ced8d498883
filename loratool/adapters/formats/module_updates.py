"""Create the updates of one module from its tensors by role, in image adapters and others with LyCORIS's names.

A module can have an update of its weight and one of its bias. Defined by LyCORIS: `lycoris/modules/*.py`; ComfyUI:
`comfy/weight_adapter/*.py`, `comfy/lora.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from ...architectures.families.table import CONTROL_NORMS
from ...errors import InputError
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile
from ..config import AdapterConfig
from ..updates.add import AddDelta
from ..updates.diff import Diff
from ..updates.headers import spec_from_roles, unpaired
from ..updates.replace import ReplaceTensor
from ..updates.update import Unpaired, UpdateSpec
from .other_methods import EXTRACT_REMEDY

BIAS_ROLES = ("diff_b", "bias")

# roles -> (the method that has them, why it cannot be merged)
REFUSED = {
    ("reshape",): ("ComfyUI's LoRA of a model that has grown", "changes the shape of its weight"),
    ("q_layer", "p_layer", "lambda_layer"): ("T-LoRA", "has other factors at each step of the diffusion"),
}


def module_updates(
    module: str, roles: Mapping[str, str], file: WeightsFile, config: AdapterConfig, bias: str, lenient: bool
) -> Iterator[UpdateSpec]:
    """Yield the updates of a module.

    Args:
        roles: role -> tensor, without alpha.
        bias: the path of the module's bias, in the format's spelling.
        lenient: as `ReadOptions.lenient`.

    Raises:
        InputError: the roles are of no kind that can be merged, or as `spec_from_roles`.
    """
    weight_roles = {role: name for role, name in roles.items() if role not in BIAS_ROLES}
    if "reshape" in weight_roles and _is_reshaped(weight_roles, file):
        del weight_roles["reshape"]
    if key := roles.get("diff_b"):
        yield UpdateSpec(Diff, bias, {"diff": key}, {"diff": file.specs[key]}, transposed=False)
    if key := roles.get("bias"):  # PEFT's bias of the layer that has B as weight
        rank = file.specs[roles["A"]].shape[:1] if "A" in roles else ()
        if not lenient and not (rank and rank[0]):
            raise InputError(f"has no partner: the A factor of {module} is missing or empty", culprit=key)
        scale = config.scale_of(module, rank[0]) if rank and rank[0] else 1.0
        yield UpdateSpec(AddDelta, bias, {"value": key}, {"value": file.specs[key]}, scale)
    if weight_roles.keys() == {"weight"} and module.endswith(CONTROL_NORMS):  # diffusers' new weight of a norm
        weight_roles = {"set": weight_roles["weight"]}
    if "set" in weight_roles:  # ComfyUI's full weight, which replaces the base's
        if len(weight_roles) > 1:
            raise InputError("is there beside factors, which it would undo", culprit=weight_roles["set"])
        yield UpdateSpec(
            ReplaceTensor, module, {"value": weight_roles["set"]}, {"value": file.specs[weight_roles["set"]]}
        )
        return
    if not weight_roles:
        return
    try:
        yield _of_weight(module, weight_roles, file, config, lenient)
    except InputError as error:
        if not lenient:
            raise
        yield unpaired(module, weight_roles, file, error)


def _is_reshaped(roles: Mapping[str, str], file: WeightsFile) -> bool:
    """Return whether the shape to which ComfyUI widens a weight is that of the change, which says it too."""
    spec, sides = file.specs[roles["reshape"]], (roles.get("B"), roles.get("A"))
    if spec != TensorSpec("I64", (2,)) or None in sides:
        return False
    rows, columns = (file.specs[name or ""].shape for name in sides)
    shape = struct.unpack("<qq", file.read(roles["reshape"]))
    return len(rows) == len(columns) == 2 and shape == (rows[0], columns[1])


def _of_weight(
    module: str, roles: Mapping[str, str], file: WeightsFile, config: AdapterConfig, lenient: bool
) -> UpdateSpec:
    _refuse_methods(roles)
    if {"b1", "b2"} <= roles.keys() and not {"a1", "a2"} & roles.keys():  # GLoRA without its first part is LoRA
        rest = {role: name for role, name in roles.items() if role not in ("b1", "b2")}
        if {"A", "B"} & rest.keys():
            raise InputError("has factors of GLoRA and of LoRA", culprit=module)
        roles = {**rest, "A": roles["b2"], "B": roles["b1"]}
    key, rest = roles.get("magnitude"), {role: name for role, name in roles.items() if role != "magnitude"}
    plain = spec_from_roles(module, rest or roles, file, config, False, lenient=lenient)
    if key is None or plain.cls is Unpaired:
        return plain
    shape, inner = file.specs[key].shape, plain.shape
    by_axes = key.endswith(".dora_scale") and min(len(shape), len(inner)) > 1
    along_inputs = by_axes and shape[0] != inner[0] and inner[1] % max(1, shape[1]) == 0 and shape[0] == 1
    if by_axes and not along_inputs and not lenient and shape.count(1) < len(shape) - 1:
        raise InputError(f"is {shape}, not a magnitude for each output", culprit=key)
    return spec_from_roles(module, roles, file, config, False, along_inputs=along_inputs, lenient=lenient)


def _refuse_methods(roles: Mapping[str, str]) -> None:
    for marks, (method, reason) in REFUSED.items():
        mark = next((role for role in marks if role in roles), None)
        if mark:
            raise InputError(f"is a tensor of {method}, which {reason}", culprit=roles[mark], remedy=EXTRACT_REMEDY)
