"""Serve a base and adapters by SGLang's own classes on a CPU, as far as weights and LoRA go: no kernel runs.

This is a program for an environment of its own, which has SGLang's files and what they import, but no CUDA (`environment.sh` makes it).
It builds the served model of a folder, reads the folder's weights by SGLang's loader, and adapters by SGLang's LoRA manager, into
the memory pool that the kernels read. What is asked of a kernel when a model is built is stubbed; names, checks, stacking and
scales are SGLang's own.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import absent

ABSENT = """xgrammar librosa llguidance outlines_core outlines depyf numba cv2 anthropic soxr av sgl_kernel flashinfer decord torchcodec
IPython interegular openai_harmony deep_gemm cuda datasets torch_memory_saver quack nvtx modelscope hf_transfer tilelang tvm_ffi uvicorn"""


def start() -> None:
    """Import SGLang and stub its kernels."""
    absent.stand_in(ABSENT)
    absent.operators("sgl_kernel")
    import sglang.srt.lora.lora_manager  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401

    logging.disable(logging.INFO)


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
        "attention_backend": "torch_native",
    }
    arguments = ServerArgs(
        model_path=str(folder), device="cpu", enable_lora=True, lora_backend="torch_native", max_lora_rank=64,
        lora_target_modules=["all"], **options,
    )  # fmt: skip
    runtime_context.publish(arguments, role="scheduler")
    ones = dict.fromkeys("tp_size attn_cp_size attn_tp_size moe_dp_size moe_ep_size".split(), 1)
    ranks = runtime_context.derive_spawn_ranks(world_rank=0, ep_join_rank_offset=0, **ones)
    runtime_context.get_parallel().override_permanently(**ranks)
    if not torch.distributed.is_initialized():
        meeting = f"file://{tempfile.mkdtemp()}/meeting"
        distributed.init_distributed_environment(1, 0, distributed_init_method=meeting, local_rank=0, backend="gloo")
        distributed.initialize_model_parallel()
    config = ModelConfig.from_server_args(arguments)
    initialize_dp_attention(arguments)
    model = _initialize_model(config, LoadConfig())
    model.load_weights((name, W) for file in folder.glob("*.safetensors") for name, W in load_file(file).items())
    return arguments, config, model


def manage(arguments: Any, config: Any, model: Any, adapter: Path) -> Any:
    """Return SGLang's manager of adapters, with one adapter in slot 0 of its memory pool."""
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.lora_registry import LoRARef

    one = LoRARef(lora_id="one", lora_name="one", lora_path=str(adapter), pinned=False)
    manager = LoRAManager(
        base_model=model, base_hf_config=config.hf_config, max_loras_per_batch=1, load_config=LoadConfig(), lora_paths=[one],
        dtype=torch.float32, server_args=arguments, lora_backend="torch_native", max_lora_rank=None, target_modules=None,
    )  # fmt: skip
    manager.fetch_new_loras({"one"})
    return manager
