"""loralib's adapters: what `loralib.lora_state_dict` leaves, in any container.

`<module path>.lora_A` (r, in) and `.lora_B` (out, r), without `.weight`; alpha is not stored. Of an Embedding, which
only the path tells, they are (r, rows) and (width, r), and the change is transposed. A MergedLinear has n of
the equal slices of its rows, A (r * n, in) and B (out / slices * n, r): which ones is not stored either.
Defined by microsoft/LoRA: `loralib/layers.py`, `loralib/utils.py`. Any other tensor is a trained one of the base's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ...architectures.prefixes import module_path
from ...architectures.roles import EMBEDDINGS
from ...errors import InputError, LoratoolError, NeedsFlag
from ...files.weights_file import WeightsFile
from ..adapter import UNPAIRED, Adapter, AdapterConfig, UpdateSpec, pair_factors
from .other_methods import find_marks

ROLES = {".lora_A": "A", ".lora_B": "B"}


def claims(names: Iterable[str]) -> bool:
    """Bare factors, which AdaLoRA has too, with its own mark beside them."""
    names = list(names)
    return any(name.endswith(tuple(ROLES)) for name in names) and not find_marks(names)


def read(
    name: str,
    file: WeightsFile,
    alpha: float | None,
    lenient: bool = False,
    enabled: Sequence[bool] | None = None,
) -> Adapter:
    """enabled: which slices MergedLinear's modules have; empty where nobody said so yet, None where none can.

    Raises InputError or, where it can be said, NeedsFlag for a MergedLinear without it.
    """
    found: dict[str, dict[str, str]] = {}
    updates: dict[str, UpdateSpec] = {}
    for tensor, spec in file.specs.items():
        end = next((end for end in ROLES if tensor.endswith(end)), None)
        if end:
            found.setdefault(tensor.removesuffix(end), {})[ROLES[end]] = tensor
        else:
            updates[module_path(tensor)] = UpdateSpec(
                "replace", module_path(tensor), {"value": tensor}, {"value": spec}
            )
    config = AdapterConfig(alpha=alpha)
    for module, roles in found.items():
        if module in updates:
            raise InputError(
                "is there beside its factors: whether they are in it already, the file does not say",
                culprit=updates[module].tensors["value"],
                remedy="save loralib.lora_state_dict(model), not model.state_dict()",
            )
        if _slices(roles, file):
            updates[module] = _merged(name, module, roles, file, config, enabled, lenient)
        else:
            looked_up = module.rpartition(".")[2] in EMBEDDINGS or None
            updates[module] = pair_factors(module, roles, file, config, looked_up, lenient=lenient)
    return Adapter(name, "loralib", file, config, updates)


def _slices(roles: Mapping[str, str], file: WeightsFile) -> int:
    """How many slices a MergedLinear has factors of; 0 for a plain linear layer and for what is no pair."""
    if set(roles) != {"A", "B"}:
        return 0
    A, B = (file.specs[roles[role]].shape for role in "AB")
    if len(A) != 2 or len(B) != 2 or not B[1] or A[0] % B[1] or B[0] % max(1, A[0] // B[1]):
        return 0
    return A[0] // B[1] if A[0] > B[1] else 0


def _merged(
    name: str,
    module: str,
    roles: Mapping[str, str],
    file: WeightsFile,
    config: AdapterConfig,
    enabled: Sequence[bool] | None,
    lenient: bool,
) -> UpdateSpec:
    """One low-rank change of all rows: alpha / r is that of one slice, the rank that of all together."""
    specs, n = {role: file.specs[key] for role, key in roles.items()}, _slices(roles, file)
    (rows, r), several = specs["B"].shape, f"holds factors of {n} slices of a MergedLinear"
    try:
        if enabled is None:
            raise InputError(
                f"{several}, and the file does not say which",
                culprit=module,
                remedy=f"first loratool convert {name} --to peft --enable-lora 1,0,1 (the model's own) --alpha ALPHA",
            )
        if not enabled:
            raise NeedsFlag(
                f"{several}, and the file does not say which", culprit=module, remedy="add --enable-lora, like 1,0,1"
            )
        if sum(enabled) != n:
            raise InputError(f"{several}, but --enable-lora names {sum(enabled)}", culprit=module)
        scale = config.scale_of(module, r)
    except LoratoolError as error:
        if not lenient:
            raise
        said = f"{error.message}; {error.remedy}" if error.remedy else error.message
        return UpdateSpec(UNPAIRED, module, {"value": roles["B"]}, {"value": specs["B"]}, fault=said)
    whole = replace(specs["B"], shape=(rows // n * len(enabled), r * n))
    return UpdateSpec("lora", module, roles, {**specs, "B": whole}, scale, enabled_slices=tuple(enabled))
