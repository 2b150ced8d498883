"""Read loralib's format: the state dict of `loralib.lora_state_dict`, in any container.

Tensors are `<module path>.lora_A` (r, in) and `.lora_B` (out, r), without `.weight`. Alpha is not stored; in an image
model's adapter, as Genmo's trainer of Mochi writes it (`demos/fine_tuner`), it is the rank. For an Embedding, known
only by its path, they are (r, rows) and (width, r), and the delta is transposed. A MergedLinear adapts n of the equal
slices of its rows, with A (r * n, in) and B (out / slices * n, r); which slices is not stored.
Any other tensor replaces the base's. Defined by microsoft/LoRA: `loralib/layers.py`, `loralib/utils.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import final

from ...architectures.prefixes import module_path
from ...architectures.roles import EMBEDDINGS
from ...errors import InputError, LoratoolError, NeedsFlag, shell_word
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..config import AdapterConfig
from ..updates.headers import spec_from_roles
from ..updates.low_rank import LowRank, MergedLinear
from ..updates.replace import ReplaceTensor
from ..updates.update import Unpaired, UpdateSpec
from .format import Capabilities, Format, ReadOptions
from .image_paths import are_of_image_model
from .peft import adapter_names, saved_name

ENDS = {"A": "lora_A", "B": "lora_B"}
ROLES = {f".{end}": role for role, end in ENDS.items()}


@final
class Loralib(Format):
    """Files of one model's bare factors, without alphas."""

    key = "loralib"
    title = "loralib: a file of lora_A and lora_B of one component, without alpha"
    can = Capabilities(
        kinds=frozenset({LowRank, ReplaceTensor}),
        writes=True,
        components="one",
        alpha="none",
        kernels=False,
        slices=True,
    )
    ends = ENDS

    def claims(self, names: Iterable[str]) -> bool:
        """Return whether there are bare factors. AdaLoRA also has them, with a mark beside them."""
        names = list(names)
        ends = tuple(ROLES)
        return any(name.endswith(ends) for name in names) and not any(".lora_E" in name for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: a MergedLinear has another number of slices than are enabled, or the command has no option for
                them; or a weight is stored beside its factors.
            NeedsFlag: the slices of a MergedLinear were not given, or alpha is missing.
        """
        modules: dict[str, dict[str, str]] = {}
        updates: dict[str, UpdateSpec] = {}
        for tensor, spec in file.specs.items():
            end = next((end for end in ROLES if tensor.endswith(end)), None)
            if end:
                modules.setdefault(tensor.removesuffix(end), {})[ROLES[end]] = tensor
            else:
                updates[module_path(tensor)] = UpdateSpec(
                    ReplaceTensor, module_path(tensor), {"value": tensor}, {"value": spec}
                )
        config = AdapterConfig(alpha=options.alpha, rank_is_alpha=are_of_image_model(modules))
        for module, roles in modules.items():
            if module in updates:
                raise InputError(
                    "is there beside its factors, and the file does not say whether they are merged into it",
                    culprit=updates[module].tensors["value"],
                    remedy="save loralib.lora_state_dict(model), not model.state_dict()",
                )
            if _slices(roles, file):
                updates[module] = _merged(name, module, roles, file, config, options)
            else:
                is_embedding = module.rpartition(".")[2] in EMBEDDINGS or None
                updates[module] = spec_from_roles(module, roles, file, config, is_embedding, lenient=options.lenient)
        return Adapter(name, self.key, file, config, updates)

    def names(self, source: Adapter, updates: Mapping[str, UpdateSpec]) -> dict[str, tuple[str, str]]:
        named, names = adapter_names(source.file.specs), {}
        for module, update in updates.items():
            for role, key in update.tensors.items():
                name = saved_name(key, named).replace(".base_layer.", ".")
                names[self.tensor_name(module, role) if role in self.ends else name] = module, role
        return names


def _slices(roles: Mapping[str, str], file: WeightsFile) -> int:
    """Return how many slices of a MergedLinear have factors; 0 for a plain linear layer and without a pair."""
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
    options: ReadOptions,
) -> UpdateSpec:
    """Return a MergedLinear's factors as one update of all rows: with the scale of a slice and the sum of ranks."""
    specs, n = {role: file.specs[key] for role, key in roles.items()}, _slices(roles, file)
    enabled = options.enabled_slices
    (rows, r), finding = specs["B"].shape, f"holds factors of {n} slices of a MergedLinear"
    try:
        if enabled is None:
            raise InputError(
                f"{finding}, and the file does not say which",
                culprit=module,
                remedy=f"first loratool convert {shell_word(name)} --to peft --alpha ALPHA --enable-lora 1,0,1 "
                "(the model's own)",
            )
        if not enabled:
            raise NeedsFlag(
                f"{finding}, and the file does not say which", culprit=module, flags="--enable-lora", why=", like 1,0,1"
            )
        if sum(enabled) != n:
            raise InputError(f"{finding}, but --enable-lora names {sum(enabled)}", culprit=module)
        scale = config.scale_of(module, r)
    except LoratoolError as error:
        if not options.lenient:
            raise
        fault = f"{error.message}; {error.remedy}" if error.remedy else error.message
        return UpdateSpec(Unpaired, module, {"value": roles["B"]}, {"value": specs["B"]}, fault=fault)
    expanded = replace(specs["B"], shape=(rows // n * len(enabled), r * n))
    return UpdateSpec(LowRank, module, roles, {**specs, "B": expanded}, scale, detail=MergedLinear(tuple(enabled)))
