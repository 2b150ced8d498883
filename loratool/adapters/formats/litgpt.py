"""Read litgpt's format: a torch file "lit_model.pth.lora", beside "hyperparameters.yaml" and "model_config.yaml".

Tensors are `transformer.h.0.attn.proj.lora_A` (r, in) and `.lora_B` (out, r). In `transformer.h.0.attn.qkv`, A stacks
the ranks of those of q, k and v that are adapted, and B stacks their rows. hyperparameters.yaml has rank, alpha and
the adapted projections; model_config.yaml has the sizes. Defined by litgpt 0.5.13: `litgpt/lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, final

from ...architectures.litgpt import FUSED, FUSED_BEFORE, IN_LAYERS, MLPS
from ...errors import InputError
from ...files.weights_file import WeightsFile
from ..adapter import Adapter
from ..updates.low_rank import LowRank
from .format import Capabilities, Format, ReadOptions
from .made_tensors import MadeTensor, copied, made_of
from .peft import read_as_peft
from .plain_yaml import read_plain_yaml

_NAME = re.compile(r"(?:transformer\.h\.(\d+)\.)?(.+)\.lora_([AB])")

# litgpt's settings of LoRA; another field would mean an unknown variant
KNOWN = {f"lora_{each}" for each in ("r", "alpha", "dropout", "query", "key", "value", "projection", "mlp", "head")}

HYPERPARAMETERS, MODEL = "hyperparameters.yaml", "model_config.yaml"


@final
class Litgpt(Format):
    """Torch files of one model's factors, under litgpt's names."""

    key = "litgpt"
    title = "litgpt: its lit_model.pth.lora, read only"
    can = Capabilities(kinds=frozenset({LowRank}), writes=False, components="one", alpha="config", kernels=False)

    def claims(self, names: Iterable[str]) -> bool:
        """Return whether names of litgpt's modules in layers are among these."""
        matches = [_NAME.fullmatch(name) for name in names if name.endswith((".lora_A", ".lora_B"))]
        return any(match and match[1] and match[2] in (FUSED, FUSED_BEFORE, *IN_LAYERS) for match in matches)

    def read(self, name: str, file: WeightsFile, options: ReadOptions) -> Adapter:
        """Read the adapter in `file`.

        Raises:
            InputError: a YAML file is missing or incomplete, or is of a model of another shape; or such a model has no
                tensor of this name or shape; or it is of litgpt before 0.5.5.
            UsageError: the alpha of `options` contradicts the file.
        """
        if before := next((tensor for tensor in file.specs if f".{FUSED_BEFORE}.lora_" in tensor), None):
            raise InputError(
                "is of litgpt before 0.5.5, whose versions add it to different rows of q, k and v",
                culprit=before,
                remedy="merge it by the litgpt that trained it (merge_lora, convert_lit_checkpoint), and `loratool "
                "extract BASE MODEL` makes an adapter of the change",
            )
        folder = file.path.parent
        settings = {**read_plain_yaml(folder / HYPERPARAMETERS), **read_plain_yaml(folder / MODEL)}
        if settings.get("mlp_class_name") not in MLPS:
            raise InputError(
                f"is of {settings.get('name')}, whose mlp_class_name is {settings.get('mlp_class_name')}: its names in "
                f"transformers are known for {', '.join(MLPS)}",
                culprit=name,
            )
        if unknown := sorted(field for field in settings if field.startswith("lora_") and field not in KNOWN):
            raise InputError(f"its {HYPERPARAMETERS} sets {unknown[0]}, which is not known", culprit=name)
        rank, alpha, head, query, key = (
            _number(settings, field, folder)
            for field in ("lora_r", "lora_alpha", "head_size", "n_head", "n_query_groups")
        )
        sizes = {"q": head * query, "k": head * key, "v": head * key}
        switches = [settings.get(field) for field in ("lora_query", "lora_key", "lora_value")]
        if not all(isinstance(each, bool) for each in switches):
            raise InputError(f"its {HYPERPARAMETERS} does not say which of q, k and v are adapted", culprit=name)
        enabled = {each: sizes[each] for each, on in zip("qkv", switches, strict=True) if on}
        tensors: dict[str, MadeTensor] = {}
        for tensor in file.specs:
            match = _NAME.fullmatch(tensor)
            layer, module, side = match.groups() if match else (None, "", "")
            if layer is not None and module == FUSED:
                stem = f"model.layers.{layer}.self_attn"
                tensors |= {
                    f"{stem}.{letter}_proj.lora_{side}.weight": part
                    for letter, part in _parts(file, tensor, side, rank, enabled).items()
                }
                continue
            if layer is not None and module in IN_LAYERS:
                path = f"model.layers.{layer}.{IN_LAYERS[module]}"
            elif layer is None and module == "lm_head":
                path = module
            else:
                raise InputError("is not a tensor of a litgpt model of Llama's shape", culprit=tensor)
            tensors[f"{path}.lora_{side}.weight"] = copied(file, tensor)
        config = {"r": rank, "lora_alpha": alpha, "base_model_name_or_path": settings.get("checkpoint_dir")}
        return read_as_peft(self.key, name, file, tensors, config, options)


def _parts(file: WeightsFile, tensor: str, side: str, rank: int, enabled: Mapping[str, int]) -> dict[str, MadeTensor]:
    """Return the rows of a fused factor for each enabled one of q, k, v: `rank` rows in A, its size in B."""
    rows = {letter: rank if side == "A" else size for letter, size in enabled.items()}
    shape = file.specs[tensor].shape
    if len(shape) != 2 or shape[0] != sum(rows.values()):
        what = f"{shape[0] if shape else 0} rows, not {' + '.join(map(str, rows.values())) or 'none'}"
        raise InputError(f"has {what} of {', '.join(rows) or 'q, k and v, which are not adapted'}", culprit=tensor)
    parts, start = {}, 0
    for letter, count in rows.items():
        parts[letter] = made_of(file, tensor, (count, shape[1]), itemgetter(slice(start, start + count)))
        start += count
    return parts


def _number(settings: Mapping[str, Any], field: str, folder: Path) -> int:
    value = settings.get(field)
    if type(value) is not int or value < 1:
        raise InputError(f"its {HYPERPARAMETERS} or {MODEL} does not say {field}", culprit=str(folder))
    return value
