"""Hold states of Megatron-Core against the program: its logits with an adapter are those of our merged model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROGRAMS, oracle_folder

import loratool

SCRIPT = Path(__file__).parents[1] / "lib" / "oracles" / "megatron_bridge.py"

# a layer of 4 heads in 2 groups
DENSE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "layernorm_epsilon": 1e-5,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_load_balancing_type": "none",
    "kv_channels": 8,
    "qk_layernorm": True,
}
QWEN3_MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 8,
}


def megatron(*arguments: str, ranks: int = 0) -> str:
    """Run the script with the checkouts of Megatron-LM and Megatron-Bridge, by torchrun if `ranks` is given."""
    for name in ("megatron-lm", "megatron-bridge"):
        if not (PROGRAMS / name / ("src" if "bridge" in name else "megatron")).is_dir():
            pytest.skip(f"needs a checkout of {name} in {PROGRAMS}, or in the folder that LORATOOL_PROGRAMS names")
    packages = oracle_folder("megatron", "omegaconf hydra-core antlr4-python3-runtime==4.9.3 einops triton absl-py")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    path = os.pathsep.join((str(PROGRAMS / "megatron-lm"), packages))
    environment = {**os.environ, "PROGRAMS": str(PROGRAMS), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


CASES: dict[str, dict[str, Any]] = {
    "one rank": {"tp": 1},
    "two ranks": {"tp": 2},
    "layers one by one": {"tp": 2, "metadata": {"singleton_local_shards": True}},
    "non-homogeneous layers": {"tp": 2, "metadata": {"non_homogeneous_layers": True}},
    "a whole model": {"tp": 2, "whole": True},
    "q, k, v, gate and up": {"tp": 1, "peft": "canonical"},
    "q, k, v, gate and up on two ranks": {"tp": 2, "peft": "canonical"},
    "DoRA": {"tp": 1, "peft": "dora"},
    "DoRA on two ranks": {"tp": 2, "peft": "dora", "args": {"target_modules": ["linear_qkv", "linear_fc1"]}},
    "experts": {"tp": 1, "config": MOE},
    "experts on two ranks": {
        "tp": 2,
        "config": MOE,
        "peft": "canonical",
        "args": {"target_modules": ["linear_fc1_up", "linear_fc1_gate"]},
    },
    "the head and the router": {
        "tp": 1,
        "config": MOE,
        "args": {"target_modules": ["output_layer", "router", "linear_qkv"]},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_merged_as_the_program_runs_it(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    job = {"peft": "lora", "vocab": 64, "out": str(tmp_path / "iter_0000001"), **CASES[case]}
    job |= {"config": {**DENSE, **job.get("config", {})}, "args": {"dim": 4, "alpha": 6, **job.get("args", {})}}
    megatron(json.dumps(job), ranks=job["tp"])
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(QWEN3_MOE if "num_moe_experts" in job["config"] else LLAMA)
    )
    loratool.merge(tmp_path / "base", [tmp_path / "iter_0000001"], tmp_path / "merged")
    run = torch.load(tmp_path / "run.pt")
    for folder, logits in (("base", run["before"]), ("merged", run["after"])):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        ours = model(run["tokens"]).logits
        assert (ours - logits).abs().max() < 2e-5, folder
    assert (run["after"] - run["before"]).abs().max() > 0.05
