"""Serve a base and adapters by vLLM's own classes on a CPU, as far as weights and LoRA go: no kernel runs.

This is a program for an environment of its own, which has vLLM's Python files and what they import, but no CUDA
(`environment.sh` makes it). It builds the served model of a folder, reads the folder's weights by vLLM's loader, and
adapters by vLLM's LoRA manager. What vLLM asks of a kernel when a model is built is stubbed; names, checks, packing and
scales are its own.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any
from unittest import mock

import absent
from answers import answer, differences

ABSENT = "xgrammar librosa llguidance outlines_core lmformatenforcer depyf numba cv2 anthropic soxr av"


def start() -> None:
    """Import vLLM and stub its kernels."""
    os.environ.update(VLLM_TARGET_DEVICE="cpu", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    absent.stand_in(ABSENT)
    import transformers
    from vllm.lora import model_manager
    from vllm.lora.layers import fused_moe
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.transformers_utils import processor

    transformers.logging.set_verbosity_error()
    registry._run_in_subprocess = lambda function: function()
    absent.operators("_C")
    gated_or_not = types.SimpleNamespace(is_cuda_alike=lambda: True, fp8_dtype=current_platform.fp8_dtype)
    config.current_platform = gated_or_not
    fused_moe.FusedMoEKernelModularImpl = types.SimpleNamespace
    fused_moe.FusedMoEModularMethod = lambda method, kernel: method
    model_manager.MultiModalBudget = lambda config, registry: types.SimpleNamespace(
        mm_max_items_per_prompt={"image": 1}, mm_max_toks_per_item={"image": 16}, get_encoder_budget=lambda: 64
    )
    processor.cached_get_processor = lambda *args, **options: mock.MagicMock()
    global _Experts
    _Experts = type("_Experts", (LoRAExpertsMixin,), {})


def _with_kernels(model: Any) -> None:
    """Give every stack of experts a kernel of which vLLM asks only whether it knows LoRA."""
    from vllm.model_executor.layers.fused_moe import MoERunner

    for module in model.modules():
        if isinstance(module, MoERunner):
            method = module.routed_experts.quant_method
            type(method).supports_internal_mk, type(method).is_monolithic = True, False
            impl = types.SimpleNamespace(shared_experts=None, fused_experts=_Experts())
            method.moe_kernel = types.SimpleNamespace(
                impl=impl, fused_experts=impl.fused_experts, prepare_finalize=None, supports_lora=lambda: True
            )
            module._replace_quant_method = lambda method: None


def serve(folder: Path, weights: bool = True, **options: Any) -> tuple[Any, Any]:
    """Return vLLM's config of a model and the model, with the weights that stand in the folder."""
    import torch
    from safetensors.torch import load_file
    from vllm import distributed
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    args = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "max_model_len": 64, **options}
    args |= {"enable_lora": True, "max_lora_rank": 64, "enable_tower_connector_lora": True}
    config = EngineArgs(model=str(folder), **args).create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            meeting = f"file://{tempfile.mkdtemp()}/meeting"
            distributed.init_distributed_environment(1, 0, meeting, 0, backend="gloo")
        parallel_state.destroy_model_parallel()
        distributed.ensure_model_parallel_initialized(1, 1)
        model = initialize_model(config)
        for weight in model.parameters():  # what no file has, such as a tied head, is made of what lies in memory
            weight.data.zero_()
        if not weights:
            return config, model
        tensors = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
        model.load_weights(iter(tensors.items()))
    return config, model


def manage(config: Any, model: Any) -> Any:
    """Return vLLM's manager of adapters for a model, which wraps the modules that take LoRA."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    with set_current_vllm_config(config):
        _with_kernels(model)
        worker = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        worker.create_lora_manager(model, config)
    return worker


def change(module: Any) -> dict[str, Any]:
    """Return what the adapter in slot 0 adds to the weights of one module, by the weights' names."""
    import torch

    def products(lefts: Any, rights: Any) -> Any:
        return torch.cat([(B[0].double() @ A[0].double()).squeeze(0) for B, A in zip(lefts, rights, strict=True)], -2)

    if hasattr(module, "w13_lora_a_stacked"):
        return {
            "w13_weight": products(module.w13_lora_b_stacked, module.w13_lora_a_stacked),
            "w2_weight": products(module.w2_lora_b_stacked, module.w2_lora_a_stacked),
        }
    left, right = module.lora_b_stacked, module.lora_a_stacked
    if type(module).__name__ == "VocabParallelEmbeddingWithLoRA":
        return {"weight": right[0].double() @ left[0, 0].double().T}
    if isinstance(left, torch.Tensor):
        left, right = (left,), (right,)
    return {"weight": products(left, right)}


def compare(base: Path, merged: Path, adapter: Path) -> dict[str, Any]:
    """Load an adapter on a base, and hold what it adds to each weight against `merged - base`, all read by vLLM."""
    from vllm.lora.request import LoRARequest

    config, model = serve(base)
    before = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    after = {name: weight.detach().double() for name, weight in serve(merged)[1].named_parameters()}
    wanted = {name: after[name] - before[name] for name in before}
    prefixes = {id(module): name for name, module in model.named_modules()}
    worker = manage(config, model)
    try:
        worker.add_adapter(LoRARequest("one", 1, str(adapter)))
    except Exception as fault:
        return {"refused": f"{type(fault).__name__}: {fault}", "trace": traceback.format_exc()[-1500:]}
    found = {}
    for name, module in worker._adapter_manager.modules.items():
        inner = module.base_layer
        holder = inner.routed_experts if hasattr(inner, "routed_experts") else inner
        path = name if type(module).__name__ == "LogitsProcessorWithLoRA" else prefixes.get(id(holder), name)
        found |= {f"{path}.{each}": delta for each, delta in change(module).items()}
    return {"weights": differences(wanted, found)}


def facts(folder: Path) -> dict[str, Any]:
    """Return what vLLM's class of a model is to LoRA: modules that take it, their names in adapters, what they hold."""
    from vllm.model_executor.models.interfaces import supports_lora

    out: dict[str, Any] = {}
    try:
        config, model = serve(folder)
    except Exception as fault:
        out["unread"] = f"{type(fault).__name__}: {fault}"[:500]
        out["trace"] = traceback.format_exc()[-1200:]
        config, model = serve(folder, weights=False)
    out |= {"class": type(model).__name__, "file": type(model).__module__, "lora": bool(supports_lora(model))}
    if not out["lora"]:
        return out
    ids = {int(number): name for number, name in json.loads((folder / "ids.json").read_text())["ids"].items()}
    out["params"] = {name: _runs(weight, ids) for name, weight in model.named_parameters() if weight.dim() > 1}
    manager = manage(config, model)._adapter_manager
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper and mapper.get_rename_mapper()
    fields = ["regex", "substr", "prefix", "suffix"]
    out["mapper"] = mapper and {
        each: {getattr(key, "pattern", key): value for key, value in getattr(mapper, f"orig_to_new_{each}").items()}
        for each in fields
    }
    out["renaming"] = mapper and [repr(each) for each in mapper.orig_to_new_renaming]
    out["modules"] = {name: type(module).__name__ for name, module in manager.modules.items()}
    out["packed"] = manager.packed_modules
    out["packing"] = {key: list(each)[:6] for key, each in manager.packed_modules_mapping.items()}
    out["supported"] = sorted(manager.supported_lora_modules)
    out["3d"] = bool(manager._is_3d_moe_model)
    out["embeddings"] = {
        type(module).__name__: list(module.embedding_modules)
        for module in model.modules()
        if getattr(module, "embedding_modules", None)
    }
    out["towers"] = bool(getattr(model, "supports_tower_connector_lora", False)) if manager.supports_mm else None
    out["parts"] = vars(manager.mm_mapping) if manager.supports_mm else None
    out["skipped"] = getattr(model, "lora_skip_prefixes", None)
    names = {part for parts in manager.packed_modules.values() for part in parts} | set(manager.modules)
    texts = {text: name for name in names for text in manager._get_text_lora_names(name)}
    linear = json.loads((folder / "ids.json").read_text())

    packing = manager.packed_modules_mapping
    expected = {part for each in manager.supported_lora_modules for part in packing.get(each, [each])} | {"experts"}

    def hit(key: str) -> str | None:
        """Return the served module, or its part, that takes the factors of a key; None if none does or vLLM raises."""
        end = ".lora_A.weight"
        mapped = (mapper._map_name(key + end) if mapper else key + end)[: -len(end)]
        tested = mapped[mapped.find(".experts") + 1 :] if ".experts" in mapped else mapped.rpartition(".")[2]
        if tested not in expected:
            return None
        return mapped if mapped in names else texts.get(mapped)

    out["hits"] = {path: hit(path) for path in linear["linear"]}
    out["keys"] = {}
    for module, parts in {**{name: [name] for name in manager.modules}, **manager.packed_modules}.items():
        runs = out["params"].get(f"{module}.weight", [])
        for (parameter, _), part in zip(runs, parts, strict=False):
            path = parameter.removesuffix(".weight")
            if len(runs) == len(parts) and path in out["hits"]:
                written = next((key for key in (path, part, f"model.{part}") if hit(key) == part), None)
                out["keys"][path] = [part, written]
    out["loud"] = [
        path for path in linear["linear"] if path.rpartition(".")[2] not in expected and ".experts" not in path
    ]
    out["stacks"] = linear["stacks"]
    return out


def _runs(weight: Any, ids: dict[int, str]) -> list[list[Any]]:
    """Return which parameters stand in the rows of a served weight, as (name, count) run after run."""
    runs: list[list[Any]] = []
    for number in weight.detach().reshape(-1, weight.shape[-1])[:, 0].tolist()[:4096]:
        name = ids.get(number, str(number))
        if not runs or runs[-1][0] != name:
            runs.append([name, 0])
        runs[-1][1] += 1
    return runs[:32]


if __name__ == "__main__":
    answer(start, {"facts": facts, "compare": compare})
