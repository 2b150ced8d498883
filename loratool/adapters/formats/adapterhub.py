"""Read LoRA in AdapterHub's format: `pytorch_adapter.bin` or `adapter.safetensors` beside `adapter_config.json`.

Tensors are `<module>.loras.<adapter's name>.lora_A` (r, in) and `.lora_B` (out, r); the delta is alpha / r * B @ A. A
fused qkv layer has the tensors of a MergedLinear, and the config's `attn_matrices` lists its slices. Defined by
adapters 1.3: `adapters/methods/lora.py`, `adapters/loading.py`, and adapter-transformers before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import final

from ...errors import InputError
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..updates.low_rank import LowRank
from .format import Capabilities, Format, ReadOptions
from .made_tensors import copied, whole_B
from .other_methods import OTHER_METHODS, is_adapterhub_lora
from .peft import read_as_peft
from .peft_config import CONFIG_NAME, find_config

_NAME = re.compile(r"(.+)\.loras\.([^.]+)\.lora_([AB])")

# The last names of fused qkv layers, whose slices are adapted one by one: GPT-2's, DeBERTa's
QKV = ("c_attn", "in_proj")

# Files beside the adapter's weights that hold a head; the adapter's config does not mention it.
HEADS = ("pytorch_model_head.bin", "model_head.safetensors")


@final
class AdapterHub(Format):
    """Folders of one model with AdapterHub's config."""

    key = "adapterhub"
    title = "AdapterHub: a folder of LoRA, read only"
    can = Capabilities(kinds=frozenset({LowRank}), writes=False, components="one", alpha="config", kernels=False)

    def claims(self, names: Iterable[str]) -> bool:
        """Return whether there are factors of LoRA; the config decides whether they are used as LoRA."""
        return any(".loras." in name and _NAME.fullmatch(name) for name in names)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: the config is missing or of a variant of LoRA, or a tensor is not of LoRA.
            UsageError: the alpha of `options` contradicts the config.
        """
        fields, _ = find_config(file)
        if not is_adapterhub_lora(fields):
            method = OTHER_METHODS["LORAS"]
            raise InputError(f"holds {method.title}, which {method.reason}", culprit=name, remedy=method.remedy)
        config_fields = fields["config"]
        rank, matrices, alpha = config_fields.get("r"), config_fields.get("attn_matrices"), config_fields.get("alpha")
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not isinstance(matrices, list):
            raise InputError(f"its {CONFIG_NAME} has no usable r, alpha or attn_matrices", culprit=name)
        matches = {tensor: _NAME.fullmatch(tensor) for tensor in file.specs}
        tensors, named, ranks = {}, set(), {}
        for tensor, match in matches.items():
            if match is None:
                raise InputError(f"is not a LoRA tensor, and {name} does not say how it is used", culprit=tensor)
            module, adapter, side = match.groups()
            named.add(adapter)
            A, B = (f"{module}.loras.{adapter}.lora_{each}" for each in "AB")
            of_qkv = module.rpartition(".")[2] in QKV and A in matches and B in matches and file.specs[A].shape
            if of_qkv:
                ranks[module] = file.specs[A].shape[0]
            tensors[f"{module}.lora_{side}.weight"] = (
                whole_B(file, A, B, rank, [each in matrices for each in "qkv"])
                if of_qkv and side == "B"
                else copied(file, tensor)
            )
        if len(named) > 1:
            raise InputError(f"holds several adapters ({', '.join(sorted(named))})", culprit=name)
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{re.escape(module)}": each for module, each in ranks.items()},
            "alpha_pattern": {f"^{re.escape(module)}": alpha * (each // rank) for module, each in ranks.items()},
            "base_model_name_or_path": fields.get("model_name"),
        }
        heads = [each for each in HEADS if (file.path.parent / each).is_file()]
        notes = tuple(f"{each} beside it is a head and is not read" for each in heads)
        return read_as_peft(self.key, name, file, tensors, config, options, notes)
