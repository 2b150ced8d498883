"""Serve a base and adapters by SGLang's own classes on a CPU, as far as weights and LoRA go: no kernel runs.

This is a program for an environment of its own, which has SGLang's files and what they import, but no CUDA
(`environment.sh` makes it). It builds the served model of a folder, reads the folder's weights by SGLang's loader, and
adapters by SGLang's LoRA manager, into the memory pool that the kernels read. What is asked of a kernel when a model is
built is stubbed; names, checks, stacking and scales are SGLang's own.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absent
from answers import answer, differences

ABSENT = """xgrammar librosa llguidance outlines_core outlines depyf numba cv2 anthropic soxr av sgl_kernel flashinfer
    decord torchcodec IPython interegular openai_harmony deep_gemm cuda datasets torch_memory_saver quack nvtx
    modelscope hf_transfer tilelang tvm_ffi uvicorn vllm"""


def start() -> None:
    """Import SGLang and stub its kernels."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    absent.stand_in(ABSENT)
    absent.operators("sgl_kernel", "_cpu")
    import torch

    torch.Tensor.pin_memory = lambda self, *args: self
    import sglang.srt.lora.lora_manager  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401

    logging.disable(logging.INFO)


@contextlib.contextmanager
def _unpinned() -> Iterator[None]:
    """Let tensors be asked for in pinned memory, which needs a GPU."""
    import torch

    makers = {name: getattr(torch, name) for name in ("tensor", "zeros", "empty")}
    for name, make in makers.items():
        setattr(torch, name, lambda *args, make=make, pin_memory=False, **options: make(*args, **options))
    try:
        yield
    finally:
        for name, make in makers.items():
            setattr(torch, name, make)


def serve(folder: Path) -> tuple[Any, Any, Any]:
    """Return SGLang's arguments, its config of a model, and the model with the weights that stand in the folder."""
    import torch
    from safetensors.torch import load_file
    from sglang.srt import distributed, runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.server_args import ServerArgs

    options = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "context_length": 64,
        "attention_backend": "triton",
        "disable_radix_cache": True,
    }
    arguments = ServerArgs(
        model_path=str(folder), device="cpu", enable_lora=True, lora_backend="torch_native", max_lora_rank=64,
        lora_target_modules=["all"], **options,
    )  # fmt: skip
    runtime_context.publish(arguments, role="scheduler")
    ones = dict.fromkeys("tp_size attn_cp_size attn_tp_size moe_dp_size moe_ep_size".split(), 1)
    ranks = runtime_context.derive_spawn_ranks(world_rank=0, ep_join_rank_offset=0, **ones)
    runtime_context.get_parallel().override_permanently(attn_tp_rank=0, attn_dp_rank=0, **ranks)
    if not torch.distributed.is_initialized():
        meeting = f"file://{tempfile.mkdtemp()}/meeting"
        distributed.init_distributed_environment(1, 0, distributed_init_method=meeting, local_rank=0, backend="gloo")
        distributed.initialize_model_parallel()
    config = ModelConfig.from_server_args(arguments)
    initialize_dp_attention(arguments)
    model = _initialize_model(config, LoadConfig())
    for weight in model.parameters():  # what no file has, such as a tied head, is made of what lies in memory
        weight.data.zero_()
    model.load_weights((name, W) for file in folder.glob("*.safetensors") for name, W in load_file(file).items())
    return arguments, config, model


def manage(arguments: Any, config: Any, model: Any, adapter: Path) -> Any:
    """Return SGLang's manager of adapters, with one adapter in slot 0 of its memory pool."""
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.lora_registry import LoRARef

    one = LoRARef(lora_id="one", lora_name="one", lora_path=str(adapter), pinned=False)
    with _unpinned():
        manager = LoRAManager(
            base_model=model,
            base_hf_config=config.hf_config,
            max_loras_per_batch=1,
            load_config=LoadConfig(),
            dtype=torch.float32,
            server_args=arguments,
            lora_backend="torch_native",
            lora_paths=[one],
        )
        manager.fetch_new_loras({"one"})
    return manager


def change(module: Any, scale: float) -> dict[str, Any]:
    """Return what the adapter in slot 0 adds to the weights of one module, by the weights' names."""
    import torch

    def product(left: Any, right: Any, offsets: Any) -> Any:
        rank = left.shape[-1]
        rows = [
            left[first:end].double() @ right[i * rank : (i + 1) * rank].double()
            for i, (first, end) in enumerate(itertools.pairwise(offsets))
        ]
        return scale * torch.cat(rows)

    kind = type(module).__name__
    if kind == "FusedMoEWithLoRA":
        scale = 1.0  # it stands in B already
        first, second = module.gate_up_lora_b_weights[0], module.down_lora_b_weights[0]
        half = first.shape[1] * module.gate_up_lora_b_weights.shape[-1] // module.gate_up_lora_a_weights.shape[2]
        ends = [*range(0, first.shape[1] + 1, half)]
        gate_up = [product(B, A, ends) for B, A in zip(first, module.gate_up_lora_a_weights[0], strict=True)]
        down = [product(B, A, [0, B.shape[0]]) for B, A in zip(second, module.down_lora_a_weights[0], strict=True)]
        return {"w13_weight": torch.stack(gate_up), "w2_weight": torch.stack(down)}
    if kind == "VocabParallelEmbeddingWithLoRA":
        return {"weight": scale * (module.embedding_B_buffer[0].double() @ module.embedding_A_buffer[0].double()).T}
    if kind == "ParallelLMHeadWithLoRA":
        left = module.lm_head_B_buffer[0]
        return {"weight": product(left, module.lm_head_A_buffer[0], [0, left.shape[0]])}
    return {"weight": product(module.lora_b[0], module.lora_a[0], list(module.lora_offsets))}


def compare(base: Path, merged: Path, adapter: Path) -> dict[str, Any]:
    """Load an adapter on a base, and hold what it adds to each weight against `merged - base`, all read by SGLang."""
    arguments, config, model = serve(base)
    before = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    after = {name: weight.detach().double() for name, weight in serve(merged)[2].named_parameters()}
    wanted = {name: after[name] - before[name] for name in before}
    try:
        manager = manage(arguments, config, model, adapter)
    except Exception as fault:
        return {"refused": f"{type(fault).__name__}: {fault}"[:2000], "trace": traceback.format_exc()[-1500:]}
    scale = manager.loras["one"].scaling
    modules = {name: module for layer in manager.lora_modules for name, module in layer.items()}
    beside = {"embed_tokens": manager.embed_tokens_module, "lm_head": manager.lm_head_module}
    paths = {id(module): name for name, module in model.named_modules()}
    modules |= {paths.get(id(module), name): module for name, module in beside.items() if module is not None}
    found = {
        f"{name}.{each}": delta for name, module in modules.items() for each, delta in change(module, scale).items()
    }
    return {"weights": differences(wanted, found)}


if __name__ == "__main__":
    answer(start, {"compare": compare})
