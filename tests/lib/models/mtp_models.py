"""Write small checkpoints with the names of models that have MTP layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conftest import weights
from torch import Tensor

D = 8  # width


def layer(path: str, experts: int = 0) -> dict[str, Tensor]:
    """The tensors of a decoder's layer, of a mixture if there are experts."""
    names = {"self_attn.q_proj.weight": (D, D), "input_layernorm.weight": (D,)}
    names |= {"mlp.gate.weight": (experts, D)} if experts else {"mlp.down_proj.weight": (D, 12)}
    for e in range(experts):
        names |= {f"mlp.experts.{e}.{part}_proj.weight": (12, D) for part in ("gate", "up")}
        names[f"mlp.experts.{e}.down_proj.weight"] = (D, 12)
    return {f"{path}.{name}": weights(*shape, seed=len(name) + 7) for name, shape in names.items()}


def model(**tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {"model.embed_tokens.weight": (20, D), "lm_head.weight": (20, D), "model.norm.weight": (D,)}
    found = {name: weights(*shape, seed=seed) for seed, (name, shape) in enumerate(own.items(), 3)}
    return found | {name: W for each in tensors.values() for name, W in each.items()}


def predictor(path: str) -> dict[str, Tensor]:
    """An MTP layer as DeepSeek-V3 and GLM-4.5 have it, with copies of embedding and head."""
    own = {"eh_proj": (D, 2 * D), "enorm": (D,), "hnorm": (D,), "shared_head.norm": (D,)}
    words = {"embed_tokens": 3, "shared_head.head": 4}
    copies = {f"{path}.{name}.weight": weights(20, D, seed=seed) for name, seed in words.items()}
    return copies | {f"{path}.{n}.weight": weights(*s, seed=5) for n, s in own.items()} | layer(path, 2)


def config(family: str, architecture: str, **fields: Any) -> dict[str, Any]:
    own = {"num_hidden_layers": 2, "tie_word_embeddings": False}
    return {"model_type": family, "architectures": [architecture], **own, **fields}


DEEPSEEK = config("deepseek_v3", "DeepseekV3ForCausalLM")
QWEN = config("qwen3_next", "Qwen3NextForCausalLM")
MODELS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "deepseek_v3": (
        model(a=layer("model.layers.0"), b=layer("model.layers.1", 2), mtp=predictor("model.layers.2")),
        DEEPSEEK,
    ),
    "glm4_moe": (
        model(a=layer("model.layers.0"), b=layer("model.layers.1", 2), mtp=predictor("model.layers.2")),
        config("glm4_moe", "Glm4MoeForCausalLM"),
    ),
    "qwen3_next": (
        model(
            a=layer("model.layers.0", 2),
            b=layer("model.layers.1", 2),
            gate={f"model.layers.{i}.mlp.shared_expert_gate.weight": weights(1, D, seed=i) for i in range(2)},
            mtp=layer("mtp.layers.0", 2) | {"mtp.fc.weight": weights(D, 2 * D), "mtp.norm.weight": weights(D)},
        ),
        QWEN,
    ),
}


def is_mtp(name: str) -> bool:
    return name.startswith(("mtp.", "model.layers.2."))
