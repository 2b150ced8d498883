"""Write a PEFT adapter: a folder that appears complete or not at all, or one file with its config in the metadata.

Tensors are computed one by one while they are written, so that memory holds one at a time. Fields are those of
huggingface/peft, `peft/tuners/lora/config.py`; patterns are anchored full paths.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ...architectures.prefixes import PEFT_PREFIX
from ...files.dtypes import TensorSpec
from ...files.fileio import partial_file, partial_folder, require_free_space, write_at, write_file
from ...files.safetensors_file import build_header, data_order, tensor_bytes
from ...files.weights_file import WeightsFile, require_unchanged
from .peft import WEIGHTS_NAMES
from .peft_config import CONFIG_NAME

if TYPE_CHECKING:
    import torch


def write_adapter(
    path: Path,
    is_file: bool,
    specs: Mapping[str, TensorSpec],
    load: Callable[[str], torch.Tensor],
    config: Mapping[str, Any],
    inputs: Collection[WeightsFile],
    prefix: str = PEFT_PREFIX,
) -> None:
    """Write an adapter as a folder, or as one file if `is_file`.

    Args:
        specs: name without `prefix` -> type and shape of a tensor.
        load: name without `prefix` -> a tensor of exactly that type and shape; called in the order of the data.
        inputs: the files that the tensors are made of.

    Raises:
        InputError: one of `inputs` changed meanwhile.
    """
    named = {prefix + name: spec for name, spec in specs.items()}
    metadata = {"loratool": json.dumps({"adapter_config": config}, sort_keys=True)} if is_file else {}
    header, begin = build_header(named, names := data_order(named), {"format": "pt", **metadata})
    require_free_space(path.absolute().parent, len(header) + sum(spec.nbytes for spec in named.values()))

    def fill(file: BinaryIO) -> None:
        write_at(file, memoryview(header), 0)
        for name in names:
            write_at(file, tensor_bytes(load(name.removeprefix(prefix)), named[name]), begin[name])
        require_unchanged(inputs)

    if is_file:
        with partial_file(path) as file:
            fill(file)
        return
    with partial_folder(path) as folder:
        with open(folder / WEIGHTS_NAMES[0], "w+b", buffering=0) as file:
            fill(file)
        write_file(folder / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def lora_config(modules: Mapping[str, int], parameters: Mapping[str, int], **fields: Any) -> dict[str, Any]:
    """Return the config of an adapter of modules and bare parameters (experts), given their ranks.

    The commonest rank is `r`, the others are patterns. alpha is the rank everywhere, so that the scale is 1. `fields`
    replace or add others.
    """
    ranks = {**modules, **parameters}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        **fields,
    }
    # PEFT before 0.19 ordered the factors of experts differently, which the shapes of a square one do not show
    return {**config, "target_parameters": sorted(parameters), "peft_version": "0.19.0"} if parameters else config


def nested(module: str, parameters: Sequence[str], declared: Sequence[str]) -> dict[str, str]:
    """Return bare parameter -> path of its wrapper.

    PEFT nests the wrappers of a module in the order in which its class declares the parameters, the first innermost.
    """
    order = sorted(parameters, key=declared.index)
    return {parameter: module + ".base_layer" * (len(order) - 1 - place) for place, parameter in enumerate(order)}
