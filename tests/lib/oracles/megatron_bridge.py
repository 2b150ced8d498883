"""Run Megatron-Core with an adapter of Megatron-Bridge on CPU: save its state, its base for transformers, its logits.

A process of a torchrun job, with the checkouts and their packages in its path; see `tests/adapters/test_megatron.py`.
The kernels of Transformer Engine are absent, so the model is Megatron-Core's own (`get_gpt_layer_local_spec`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file


class _AnyClass(type(torch.nn.Module)):  # type: ignore[misc]
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **options: None


class _Absent(types.ModuleType):
    """A module with any class, for packages that only annotations and other machines need."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name) if name == "ops" else _AnyClass(name, (torch.nn.Module,), {})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in ("transformer_engine", "modelopt") or name.startswith("megatron.training"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def prepare(bridge: Path) -> None:
    """Make parts of Megatron-Bridge importable without the packages that its `__init__` imports."""
    if not hasattr(typing, "override"):
        typing.override = lambda function: function  # type: ignore[attr-defined]
    for name in ("", ".models", ".models.conversion"):
        module = types.ModuleType("megatron.bridge" + name)
        module.__path__ = [str(bridge / name[1:].replace(".", "/"))]
        sys.modules["megatron.bridge" + name] = module
    for name in ("models.gpt", "transformer.moe.router"):
        importlib.import_module(f"megatron.core.{name}")
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    sys.meta_path.insert(0, _Stubs())
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *args: None
    importlib.import_module("megatron.bridge.peft.utils").HAVE_TE = False  # type: ignore[attr-defined]


def registries(bridge: Path) -> dict[str, dict[str, Any]]:
    """Return model type -> weight in Megatron-Core -> its names in transformers, by each bridge's registry."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(bridge.glob("models/*/*_bridge.py")):
        package = f"megatron.bridge.models.{path.parent.name}"
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(path.parent)]
        try:
            module = importlib.import_module(f"{package}.{path.stem}")
        except (ImportError, AttributeError):
            continue
        for each in vars(module).values():
            if not isinstance(each, type) or each.__module__ != module.__name__ or not hasattr(each, "MODEL_TYPE"):
                continue
            with contextlib.suppress(AttributeError, NotImplementedError, ValueError):
                registry = each.mapping_registry(each.__new__(each))
                kind = each.MODEL_TYPE or "mistral" * (each.__name__ == "MistralBridge")
                found.setdefault(kind, {})
                for name in json.loads(sys.argv[2]):
                    mapping = registry.megatron_to_hf_lookup(name)
                    found[kind][name] = mapping and [type(mapping).__name__, mapping.hf_param]
    return found


def rows(fields: dict[str, Any], ranks: int) -> dict[str, list[int]]:
    """Return the rows of a fused matrix in the parts that Megatron-Bridge splits it into for an adapter's export."""
    from megatron.bridge.models.conversion import param_mapping

    provider = types.SimpleNamespace(**fields)
    if "num_attention_heads" in fields:
        count = (1 + fields["attention_output_gate"]) * provider.num_attention_heads + 2 * provider.num_query_groups
        numbers = torch.arange(count * provider.kv_channels)[:, None]
        parts = param_mapping.split_qkv_weights(provider, numbers, feature_dim=1)
        return {name: part[:, 0].tolist() for name, part in zip("qkv", parts, strict=True)}
    keys = provider.linear_key_head_dim * provider.linear_num_key_heads
    values = (2 * provider.linear_value_head_dim + 2) * provider.linear_num_value_heads
    numbers = torch.arange(2 * keys + values)[:, None]
    grouped = param_mapping.split_gdn_linear_weights(provider, numbers, tp_size=ranks, feature_dim=1)
    separate = param_mapping._split_gdn_grouped_to_separate(provider, *grouped, feature_dim=1)
    named = zip(("qkvz", "ba", "qkv", "z", "b", "a"), (*grouped, *separate), strict=True)
    return {name: part[:, 0].tolist() for name, part in named}


def write_weights(model: Any, path: Path) -> None:
    """Write a rank's weights, without its adapter's."""
    own = {n.replace("to_wrap.", ""): p.detach() for n, p in model.named_parameters() if ".adapter." not in n}
    torch.save(own, path)


def for_transformers(ranks: list[dict[str, torch.Tensor]], config: Any) -> dict[str, torch.Tensor]:
    """Return the weights under transformers' names; q, k and v are split by Megatron-Bridge."""
    from megatron.bridge.models.conversion.param_mapping import split_qkv_weights

    plain = {"embedding.word_embeddings": "model.embed_tokens", "output_layer": "lm_head"}
    inner = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "mlp.router": "mlp.gate",
    }
    out = {}
    for name in ranks[0]:
        parts, path = [rank[name] for rank in ranks], name.removesuffix(".weight")
        if path in plain:
            out[plain[path] + ".weight"] = torch.cat(parts)
            continue
        if path == "decoder.final_layernorm":
            out["model.norm.weight"] = parts[0]
            continue
        number, module = path.removeprefix("decoder.layers.").split(".", 1)
        root = f"model.layers.{number}."
        if module in inner:
            out[f"{root}{inner[module]}.weight"] = parts[0]
        elif module.endswith("linear_qkv"):
            for letter, W in zip("qkv", split_qkv_weights(config, torch.cat(parts)), strict=True):
                out[f"{root}self_attn.{letter}_proj.weight"] = W
        elif module.endswith("linear_proj"):
            out[f"{root}self_attn.o_proj.weight"] = torch.cat(parts, 1)
        else:
            owner, last = module.replace("local_experts.", "").rsplit(".", 1)
            if last == "linear_fc2":
                out[f"{root}{owner}.down_proj.weight"] = torch.cat(parts, 1)
            else:
                for i, half in enumerate(("gate", "up")):
                    out[f"{root}{owner}.{half}_proj.weight"] = torch.cat([part.chunk(2)[i] for part in parts])
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def run(job: dict[str, Any]) -> None:
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    dist.init_process_group("gloo")
    rank, tp, out = dist.get_rank(), job["tp"], job["out"]
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    torch.manual_seed(0)
    config = TransformerConfig(
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        **job["config"],
    )
    experts = config.num_moe_experts
    spec = get_gpt_layer_local_spec(
        num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm", qk_layernorm=bool(experts)
    )
    model: Any = GPTModel(
        config,
        spec,
        vocab_size=job["vocab"],
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        rotary_base=10000,
        parallel_output=False,
    ).eval()
    tokens = (torch.arange(16) * 7 % job["vocab"])[None]
    mask = torch.triu(torch.ones(16, 16, dtype=torch.bool), 1)[None, None]
    positions = torch.arange(16)[None]
    with torch.no_grad():
        before = model(tokens, positions, mask)
    peft = {"lora": LoRA, "canonical": CanonicalLoRA, "dora": DoRA}[job["peft"]](**job["args"])
    model = peft(model, training=False)
    generator = torch.Generator().manual_seed(5 + rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".linear_out." in name:
                parameter.normal_(0, 0.3, generator=generator)
            elif name.endswith("weight_magnitude"):
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
        after = model.eval()(tokens, positions, mask)
    peft.set_params_to_save(model)
    state = model.sharded_state_dict(metadata=job.get("metadata"))
    whole = job.get("whole")
    kept = {n: each for n, each in state.items() if (whole or peft.adapter_key_filter(n)) and "_extra_state" not in n}
    Path(out).mkdir(exist_ok=True)
    write_weights(model, Path(out).with_name(f"rank{rank}.pt"))
    dist_checkpointing.save({"model": kept, "checkpoint_version": 3.0, "iteration": 1}, out)
    if rank == 0:
        ranks = [torch.load(Path(out).with_name(f"rank{each}.pt")) for each in range(tp)]
        hf = Path(out).with_name("base")
        hf.mkdir()
        save_file(for_transformers(ranks, config), hf / "model.safetensors", metadata={"format": "pt"})
        fields = {
            **job["config"],
            "tensor_model_parallel_size": tp,
            "attention_output_gate": config.attention_output_gate,
            "kv_channels": config.kv_channels,
        }
        method = {**job["args"], "_target_": f"{type(peft).__module__}.{type(peft).__name__}"}
        Path(out, "run_config.yaml").write_text(yaml.safe_dump({"peft": method, "model": fields}))
        torch.save({"tokens": tokens, "before": before, "after": after}, Path(out).with_name("run.pt"))


def main() -> None:
    programs = Path(os.environ["PROGRAMS"])
    bridge = programs / "megatron-bridge" / "src" / "megatron" / "bridge"
    prepare(bridge)
    if sys.argv[1] == "registries":
        print(json.dumps(registries(bridge)))
    elif sys.argv[1] == "rows":
        print(json.dumps([rows(*each) for each in json.loads(sys.argv[2])]))
    else:
        run(json.loads(sys.argv[1]))


if __name__ == "__main__":  # saving starts processes that import this module
    main()
