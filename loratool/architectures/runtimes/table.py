"""The runtimes that loratool can write adapters for, with the features that each reads, refuses, ignores or misreads.

The facts are of the versions named. Functions that run without a GPU were run on adapters; the others were read in
source. `transform.for_runtime` follows the rows, and the guide `runtimes` prints them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from . import sglang, vllm
from .image_programs import IMAGE_RUNTIMES
from .runtime import BOTH, FEATURES, LLAMA, ImageRuntime, Runtime, Served


def _reads(outcomes: str) -> dict[str, str]:
    """Return each of FEATURES -> one of OUTCOMES; `outcomes` lists them in order."""
    return dict(zip(FEATURES, outcomes.split(), strict=True))


_GGUF = _reads("ignores yes ignores refuses refuses refuses refuses yes yes yes ignores")

_Q_K_V = ("q_proj", "k_proj", "v_proj")

RUNTIMES: dict[str, Runtime] = {
    each.key: each
    for each in (
        Runtime(
            key="transformers",
            title="transformers' load_adapter and PEFT's PeftModel",
            version="5.24.0, peft 0.21.2",
            checked="run",
            reads=_reads("yes yes yes yes yes yes yes yes yes yes yes"),
            miss="ignores",
            names="whole",
            prefixes="mapped",
            old_names="gemma3|llava",
            served=Served(BOTH, stacks=True, towers=True),
        ),
        Runtime(
            key="vllm",
            title="vLLM",
            version="0.33.0",
            checked="run",
            reads=_reads("yes yes yes refuses refuses refuses refuses class class class class"),
            miss="ignores",
            names="class",
            prefixes="mapped",
            old_names="(?!idefics3$|smolvlm$).*",
            max_ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            default_rank=16,
            rank_flag="--max-lora-rank",
            tower_flag="--enable-tower-connector-lora",
            whole_experts=True,
            classes=vllm.CLASSES,
            without=vllm.WITHOUT,
        ),
        Runtime(
            key="sglang",
            title="SGLang",
            version="0.5.23",
            checked="run",
            reads=_reads("ignores refuses ignores refuses refuses ignores refuses yes yes yes misreads"),
            miss="ignores",
            prefixes="any",
            modules=sglang.MODULES,
            renames=sglang.RENAMES,
            classes=sglang.CLASSES,
            one_rank=True,
            needs=sglang.NEEDS,
            whole_experts=True,
            targets="last names",
        ),
        Runtime(
            key="trtllm",
            title="TensorRT-LLM",
            version="undated",
            checked="read",
            reads=_reads("yes yes ignores misreads refuses refuses refuses ignores ignores yes misreads"),
            miss="refuses",
            prefixes="any",
            modules=r".*\.\d+\.\w+\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj|gate_up_proj|experts\.\d+\.w[123])",
            renames=(
                (r"(\.experts\.\d+)\.gate_proj$", r"\1.w1"),
                (r"(\.experts\.\d+)\.down_proj$", r"\1.w2"),
                (r"(\.experts\.\d+)\.up_proj$", r"\1.w3"),
            ),
            one_rank=True,
            needs=dict.fromkeys(_Q_K_V, _Q_K_V),
        ),
        Runtime(
            key="tgi",
            title="TGI and LoRAX",
            version="undated",
            checked="read",
            reads=_reads("yes misreads ignores ignores ignores ignores ignores ignores yes ignores ignores"),
            miss="ignores",
            modules=rf"{LLAMA}|lm_head",
            renames=((r"^.*?\blayers(?=\.\d)", "model.layers"), (r"^.*\blm_head$", "lm_head")),
            one_rank=True,
            every_layer=True,
        ),
        Runtime(
            key="lmdeploy",
            title="LMDeploy's PyTorch engine",
            version="0.18.0",
            checked="run",
            reads=_reads("ignores refuses ignores refuses refuses refuses refuses refuses refuses refuses misreads"),
            miss="refuses",
            modules=r".*\blayers\.\d+\.\w+\.\w+",
            one_rank=True,
            every_layer=True,
            targets="last names",
            without=frozenset(("Glm4ForCausalLM",)),  # its adapter loader has no name for the fused layer
        ),
        Runtime(
            key="exllamav3",
            title="ExLlamaV3",
            version="1.6.5",
            checked="run",
            reads=_reads("yes misreads ignores misreads ignores ignores ignores ignores yes yes ignores"),
            miss="ignores",
            prefixes="longer",
            one_rank=True,
            half=True,
            served=Served(BOTH, splits=("qkv_proj", "gate_up_proj")),
            limit="on a base in its exl3 format, fused kernels without adapters compute most of what follows the "
            "prompt: merge the adapter into the base before it is quantized",
            limited="exl3",
        ),
        Runtime(
            key="llama.cpp",
            title="llama.cpp",
            version="llama-cpp-python 0.3.36",
            checked="run",
            reads=_GGUF,
            miss="refuses",
        ),
        Runtime(
            key="ollama",
            title="Ollama",
            version="2026-08-21",
            checked="read",
            modelfile=True,
            reads=_GGUF,
            miss="refuses",
        ),
        Runtime(
            key="mlx",
            title="mlx-lm",
            version="0.32.2",
            checked="run",
            reads=_reads("refuses refuses refuses yes refuses refuses refuses yes yes yes refuses"),
            miss="refuses",
        ),
    )
}

PROGRAMS: Mapping[str, Runtime | ImageRuntime] = ChainMap[str, Any]({}, IMAGE_RUNTIMES, RUNTIMES)  # of --for
