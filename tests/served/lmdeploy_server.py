"""Serve a base and an adapter by LMDeploy's PyTorch engine on a CPU, as far as weights and LoRA go: no kernel runs.

This is a program for an environment of its own, which has LMDeploy's files and what they import, but no CUDA
(`environment.sh` makes it). It builds the served model of a folder, reads its weights by LMDeploy's loader, and
the adapter by its `add_adapters`. Memory is never zero by chance, as LMDeploy does not clear what no tensor fills.
"""

from __future__ import annotations

import traceback
import types
from pathlib import Path
from typing import Any

import absent
from answers import answer, differences

ABSENT = """ray pynvml xgrammar openai flash_attn dlblas deep_gemm fla causal_conv1d dlslime librosa outlines uvicorn
    timm decord deep_ep"""


def start() -> None:
    """Import LMDeploy, and let no memory be zero by chance."""
    absent.stand_in(ABSENT)
    import torch
    from lmdeploy.pytorch.models import patch  # noqa: F401

    empty = torch.empty
    torch.empty = lambda *args, **options: (
        made.fill_(7) if (made := empty(*args, **options)).is_floating_point() else made
    )


def serve(folder: Path) -> Any:
    """Return LMDeploy's model of a folder, with the weights that stand there."""
    import torch
    import transformers
    from lmdeploy.pytorch.models.patch import BuildModelContext, build_patched_model
    from lmdeploy.pytorch.weight_loader.model_weight_loader import load_model_weights

    config = types.SimpleNamespace(hf_config=transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model = build_patched_model(config, device=torch.device("cpu"), build_model_ctx=BuildModelContext())
    load_model_weights(model, str(folder), device=torch.device("cpu"))
    return model


def change(layer: Any) -> Any:
    """Return what the adapter adds to the weight (out, in) of a linear layer, maybe several modules of PEFT's."""
    import torch

    with torch.inference_mode():
        whole = torch.zeros(layer.weight.shape, dtype=torch.float64)
        for lora in layer.lora_adapters.values():
            scale = float(lora.adapter_info.scalings[1])
            whole[lora.adapter_info.base_slice] += scale * (lora.lora_B.double().T @ lora.lora_A.double())
    return whole


def compare(base: Path, merged: Path, adapter: Path) -> dict[str, Any]:
    """Load an adapter on a base, and hold what it adds to each weight against `merged - base`, all read by LMDeploy."""
    import torch
    from lmdeploy.pytorch.models.patch import add_adapters

    model = serve(base)
    before = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    after = {name: weight.detach().double() for name, weight in serve(merged).named_parameters()}
    try:
        add_adapters(model, {"one": str(adapter)}, dtype=torch.float32, device=torch.device("cpu"))
    except Exception as fault:
        return {"refused": f"{type(fault).__name__}: {fault}"[:2000], "trace": traceback.format_exc()[-1500:]}
    layers = {name: layer for name, layer in model.named_modules() if getattr(layer, "lora_adapters", None)}
    found = {f"{name}.weight": change(layer) for name, layer in layers.items()}
    return {"weights": differences({name: after[name] - before[name] for name in before}, found)}


if __name__ == "__main__":
    answer(start, {"compare": compare})
