"""Serve a base and adapters by ExLlamaV3's own classes on a CPU, as far as weights and LoRA go: no kernel runs.

This is a program for an environment of its own, which has ExLlamaV3's files and what they import, but neither CUDA nor
its extension (`environment.sh` makes it). It builds the served model of a folder and reads
adapters by ExLlamaV3's `LoRA`; which rows of which tensor a layer is made of, the layer says.
"""

from __future__ import annotations

import sys
import traceback
import types
from pathlib import Path
from typing import Any

import absent
from answers import answer, differences

ABSENT = "exllamav3_ext flash_attn formatron kbnf xformers flashinfer causal_conv1d fla pyfiglet marisa_trie ninja"


def start() -> None:
    """Import ExLlamaV3 with a stub for its extension, which it would compile when it is imported."""
    absent.stand_in(ABSENT)
    extension: Any = types.ModuleType("exllamav3.ext")
    extension.exllamav3_ext, extension.none_tensor = absent.AnyModule("exllamav3_ext"), None
    sys.modules["exllamav3.ext"] = extension
    import exllamav3.model.lora  # noqa: F401


def serve(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return ExLlamaV3's model of a folder, and the weights (out, in) that its linear layers say they are made of."""
    import torch
    from exllamav3.model.config import Config
    from exllamav3.model.model import Model
    from exllamav3.modules.linear import Linear
    from safetensors.torch import load_file

    tensors = {name: W.double() for file in folder.glob("*.safetensors") for name, W in load_file(file).items()}
    model = Model.from_config(Config.from_directory(str(folder)))
    weights = {}
    for module in model:
        if isinstance(module, Linear):
            module.device = torch.device("cpu")
            if f"{module.key}.weight" in tensors:
                weights[module.key] = tensors[f"{module.key}.weight"]
            elif f"{module.fkey}.weight" in tensors:
                weights[module.key] = tensors[f"{module.fkey}.weight"][slice(*module.frange)]
    return model, weights


def compare(base: Path, merged: Path, adapter: Path) -> dict[str, Any]:
    """Load an adapter on a base, and hold what it adds to each linear layer against `merged - base`."""
    from exllamav3.model.lora import LoRA

    model, before = serve(base)
    after = serve(merged)[1]
    try:
        lora = LoRA.from_directory(model, str(adapter))
    except Exception as fault:
        return {"refused": f"{type(fault).__name__}: {fault}"[:2000], "trace": traceback.format_exc()[-1500:]}
    found = {
        key: (layer.lora_a_tensors[lora].double() @ layer.lora_b_tensors[lora].double()).T
        for key, layer in lora.target_modules.items()
    }
    return {"weights": differences({key: after[key] - before[key] for key in before}, found)}


if __name__ == "__main__":
    answer(start, {"compare": compare})
