"""Hold states of Megatron-Core against the program: its logits with an adapter are those of our merged model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROGRAMS, load_model, oracle_folder, weights, write_model
from lib.models.training_runs import cut, write_dcp
from torch import Tensor

import loratool
from loratool.adapters.formats import open_adapter
from loratool.architectures.heads import Heads
from loratool.architectures.megatron import (
    LAYER_NAMES,
    LinearHeads,
    gate_up_paths,
    group_rows,
    linear_attention_rows,
    plain_path,
)
from loratool.errors import InputError, NeedsFlag

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


@pytest.mark.slow
def test_names_of_each_bridge() -> None:
    modules = ["linear_proj", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj"]
    modules = [f"self_attention.{each}" for each in (*modules, "linear_kv_up_proj", "out_proj")]
    modules += ["mlp.linear_fc2", "mlp.linear_fc1", "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
    modules += ["mlp.router", "mlp.experts.linear_fc1", "mlp.experts.linear_fc2"]
    weight = {m: f"decoder.layers.3.{m}.weight" + "5" * m.startswith("mlp.experts.") for m in modules}
    theirs = json.loads(megatron("registries", json.dumps(list(weight.values()))).splitlines()[-1])
    theirs["gemma3_text"], compared = theirs.pop("gemma3"), set()
    for kind, names in LAYER_NAMES.items():
        for module in modules:
            _, expected = theirs.get(kind, {}).get(weight[module]) or (None, None)
            of_experts = module.startswith("mlp.experts.")
            if expected is None or (of_experts and not names.experts):
                continue
            if of_experts:
                gate, up, down = (f"{names.experts}.5.{each}" for each in names.expert_names)
                ours: Any = down if module.endswith("2") else {"gate": gate, "up": up}
            elif both := gate_up_paths(module, names):
                ours = dict(zip(("gate", "up"), both, strict=True))
            else:
                ours = plain_path(module, names)
            whole = {k: f"model.layers.3.{v}.weight" for k, v in ours.items()} if isinstance(ours, dict) else ours
            assert (f"model.layers.3.{whole}.weight" if isinstance(whole, str) else whole) == expected, (kind, module)
            compared.add(kind)
    assert {*LAYER_NAMES} - compared == {"qwen2_moe"}


@pytest.mark.slow
def test_rows_are_split_as_the_bridge_splits_them() -> None:
    attention = [(8, 2, 4, gated) for gated in (False, True)] + [(6, 6, 2, True), (4, 1, 6, False)]
    linear = [(LinearHeads(4, 3, 8, 5), ranks) for ranks in (1, 2, 4)] + [(LinearHeads(2, 4, 2, 4), 2)]
    names = ("num_attention_heads", "num_query_groups", "kv_channels", "attention_output_gate")
    of_linear = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim")
    jobs = [(dict(zip(names, each, strict=True)), 1) for each in attention]
    jobs += [(dict(zip(of_linear, dataclasses.astuple(heads), strict=True)), ranks) for heads, ranks in linear]
    theirs = json.loads(megatron("rows", json.dumps(jobs)).splitlines()[-1])
    ours = [group_rows(Heads(*each[:3]), each[3]) for each in attention]
    kinds = ("grouped", "separate")
    ours += [{k: v for kind in kinds for k, v in linear_attention_rows(*each, kind).items()} for each in linear]
    numbers = [{k: [row for run in runs for row in range(*run)] for k, runs in parts.items()} for parts in ours]
    assert numbers == theirs


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 4, "num_hidden_layers": 2}
SHAPES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
# the changes of one layer by hand: rows of a Megatron matrix -> of transformers'; groups of 2 queries, a key, a value
QKV = {"q": [*range(8), *range(16, 24)], "k": [*range(8, 12), *range(24, 28)], "v": [*range(12, 16), *range(28, 32)]}
RUN_CONFIG = "peft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  alpha: 3\n  target_modules:\n  - linear_qkv\n"


def base(folder: Path, **config: Any) -> dict[str, Tensor]:
    tensors = {f"model.layers.{i}.{n}.weight": weights(*s, seed=i) for i in range(2) for n, s in SHAPES.items()}
    write_model(folder, tensors, {"model_type": "llama", **HEADS, **config})
    return tensors


def stacked(end: str) -> dict[str, Tensor]:
    """Return factors of two layers, stacked, of qkv, fc1 and fc2; `end` has {} for A or B."""
    sizes = {"self_attention.linear_qkv": (32, 16), "mlp.linear_fc1": (48, 16), "mlp.linear_fc2": (16, 24)}
    out = {}
    for seed, (module, (rows, width)) in enumerate(sizes.items()):
        A, B = ("lora_A.default", "lora_B.default") if end == "swift" else ("adapter.linear_in", "adapter.linear_out")
        out[f"decoder.layers.{module}.{A}.weight"] = weights(2, 2, width, seed=seed)
        out[f"decoder.layers.{module}.{B}.weight"] = weights(2, rows, 2, seed=seed + 9)
    return out


def as_mcore(metadata: Any) -> None:
    """Edit the metadata as Megatron-Core writes it: no paths, and the plans of all ranks."""
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

    metadata.planner_data = None
    index = next(iter(metadata.storage_data))
    metadata.all_local_plans = [SavePlan([WriteItem(index=index, type=WriteItemType.SHARD)], None, None)]


@pytest.mark.parametrize("swift", [False, True], ids=["Megatron-Bridge", "ms-swift"])
def test_stacked_layers_by_hand(tmp_path: Path, swift: bool) -> None:
    factors = stacked("swift" if swift else "bridge")
    optimizer = {("optimizer.state.exp_avg." + name,): tensor for name, tensor in factors.items()}
    state = {**{(name,): tensor for name, tensor in factors.items()}, **optimizer}
    boxes = {path: cut(tensor.shape, {0: [1, 1]}) for path, tensor in state.items()}
    folder = write_dcp(tmp_path / "iter_0000007", state, boxes, edit=as_mcore)
    if swift:
        settings = {"lora_rank": 2, "lora_alpha": 3, "tensor_model_parallel_size": 2}
        (tmp_path / "args.json").write_text(json.dumps(settings))
    else:
        (folder / "run_config.yaml").write_text(RUN_CONFIG + "model:\n  tensor_model_parallel_size: 2\n")
    expected = {name: W.double() for name, W in base(tmp_path / "base").items()}
    # ms-swift saves fc1 of each rank in turn, gate and up of half the size; Megatron-Bridge joins them by half
    gate = [*range(12), *range(24, 36)] if swift else [*range(24)]
    rows = {f"self_attn.{letter}_proj": QKV[letter] for letter in "qkv"}
    rows |= {"mlp.gate_proj": gate, "mlp.up_proj": [row for row in range(48) if row not in gate]}
    rows["mlp.down_proj"] = [*range(16)]
    for path, taken in rows.items():
        module = {"sel": "linear_qkv", "mlp": "linear_fc2" if "down" in path else "linear_fc1"}[path[:3]]
        A, B = (each for name, each in factors.items() if f".{module}." in name)
        for i in range(2):
            expected[f"model.layers.{i}.{path}.weight"] += 1.5 * (B[i].double() @ A[i].double())[taken]
    loratool.merge(tmp_path / "base", [folder], tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert all((merged[name].double() - W).abs().max() < 1e-6 for name, W in expected.items())


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    state = {(name,): tensor for name, tensor in stacked("bridge").items()}
    folder = write_dcp(tmp_path / "state", state, edit=as_mcore)
    with pytest.raises(NeedsFlag, match="linear_qkv: has rows of q, k and v by group"):
        open_adapter(folder, alpha=3)
    with pytest.raises(NeedsFlag, match="alpha"):
        open_adapter(folder, model={"model_type": "llama", **HEADS})
    with pytest.raises(InputError, match="is for gpt2, whose modules in Megatron-Core are not known"):
        open_adapter(folder, alpha=3, model={"model_type": "gpt2", **HEADS})
    with pytest.raises(InputError, match="does not fit the model: it has 32 rows"):
        open_adapter(folder, alpha=3, model={"model_type": "llama", **HEADS, "head_dim": 8})
    swift = write_dcp(tmp_path / "swift", {(n,): t for n, t in stacked("swift").items()}, edit=as_mcore)
    with pytest.raises(InputError, match="depends on the run's number of tensor-parallel ranks"):
        open_adapter(swift, alpha=3, model={"model_type": "llama", **HEADS})
    trained = write_dcp(tmp_path / "more", {**state, ("decoder.final_layernorm.weight",): weights(16)}, edit=as_mcore)
    with pytest.raises(InputError, match=r"final_layernorm\.weight: is not a factor, and may have been trained"):
        open_adapter(trained, alpha=3, model={"model_type": "llama", **HEADS})


def test_experts_of_a_stack(tmp_path: Path) -> None:
    """Hold a shared A, each expert's B, and gate and up under names of their own."""
    stem = "decoder.layers.0.mlp.experts.experts.linear_fc1.adapter"
    A, gate, up = weights(2, 16), weights(4, 8, 2, seed=1), weights(4, 8, 2, seed=2)
    names = ("linear_in.weight", "linear_out.weight_w", "linear_out.weight_v")
    folder = write_dcp(tmp_path / "s", {(f"{stem}.{n}",): t for n, t in zip(names, (A, gate, up), strict=True)})
    adapter = open_adapter(folder, alpha=2, model={"model_type": "qwen3_moe", "num_experts": 4})
    assert len(adapter.updates) == 8
    for expert in range(4):
        for name, B in (("gate", gate), ("up", up)):
            tensors = adapter.updates[f"model.layers.0.mlp.experts.{expert}.{name}_proj"].tensors
            factors = [adapter.file.tensor(tensors[role]) for role in sorted(tensors)]
            assert torch.equal(factors[0], A) and torch.equal(factors[1], B[expert])


def test_an_unpacked_archive_of_nemo_1(tmp_path: Path) -> None:
    base(tmp_path / "base")
    A, B = weights(2, 16), weights(32, 2, seed=1)
    stem = "model.decoder.layers.1.self_attention.adapter_layer.lora_kqv_adapter"
    folder = tmp_path / "nemo"
    folder.mkdir()
    torch.save({f"{stem}.linear_in.weight": A, f"{stem}.linear_out.weight": B}, folder / "model_weights.ckpt")
    lines = ["peft:", "  peft_scheme: lora", "  lora_tuning:", "    adapter_dim: 2", "    alpha: 5"]
    (folder / "model_config.yaml").write_text("\n".join(lines))
    loratool.merge(tmp_path / "base", [folder], tmp_path / "merged")
    merged, before = load_model(tmp_path / "merged"), load_model(tmp_path / "base")
    for letter, rows in QKV.items():
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        change = 2.5 * (B.double() @ A.double())[rows]
        assert (merged[name].double() - before[name].double() - change).abs().max() < 1e-6


def test_other_trainers_are_named(tmp_path: Path) -> None:
    write_model(tmp_path, {"weights_shard": weights(9)})
    (tmp_path / "model.safetensors").rename(tmp_path / "rank_0.safetensors")
    (tmp_path / "metadata.yaml").write_text("shards: [weights]\n")
    with pytest.raises(InputError, match="one rank's part of a Fast-LLM state"):
        open_adapter(tmp_path)
    orbax = tmp_path / "orbax"
    orbax.mkdir()
    (orbax / "manifest.ocdbt").touch()
    with pytest.raises(InputError, match="an Orbax checkpoint of JAX"):
        open_adapter(orbax)
