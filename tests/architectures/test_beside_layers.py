"""Hold what stands beside a model's layers to the modules of transformers' classes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from lib.models.tiny import NOT_BUILT, build, tables

from loratool.architectures.beside_layers import EMBEDDINGS, GATES, GROUPS, MTP, ROUTERS, Layers
from loratool.architectures.roles import weight_role

CONFIG = {"num_hidden_layers": 61}
# module of the class, shape -> its group
MODULES = {
    ("model.layers.0.self_attn.q_proj", (8, 8)): "",
    ("model.layers.0.mlp.gate_proj", (8, 8)): "",
    ("model.layers.60.mlp.shared_experts.down_proj", (8, 8)): "",
    ("model.layers.60.mlp.gate", (4, 8)): ROUTERS,
    ("model.layers.0.mlp.router", (4, 8)): ROUTERS,  # gpt_oss, phimoe
    ("model.layers.0.mlp.router.gate", (4, 8)): ROUTERS,  # afmoe
    ("model.layers.0.self_attention.experts.router.layer", (4, 8)): ROUTERS,  # jetmoe
    ("model.layers.60.mlp.gate.wg", (4, 8)): ROUTERS,  # hunyuan_v1_moe
    ("model.layers.60.mlp.gate.router_mlp.fc1", (8, 8)): ROUTERS,  # zaya
    ("model.layers.0.mlp.router_gate", (4, 8)): ROUTERS,  # doge
    ("model.language_model.layers.0.altup.modality_router", (4, 8)): ROUTERS,  # gemma3n
    ("blocks.0.mlp.gate", (8, 8)): "",  # of an MLP without experts: Krea 2
    ("model.layers.0.per_layer_input_gate", (4, 8)): "",  # gemma4
    ("model.layers.0.self_attn.output_gate", (8, 8)): "",  # minimax
    ("model.layers.0.mlp.shared_expert_gate", (1, 8)): GATES,  # qwen2_moe, qwen3_next, qwen3_5_moe
    ("model.embed_tokens", (10, 8)): "",
    ("transformer.wpe", (10, 8)): "",
    ("vision_model.embeddings.position_embedding", (10, 8)): "",  # of an encoder of images alone
    ("model.language_model.embed_tokens_per_layer", (10, 8)): EMBEDDINGS,  # gemma3n, gemma4
    ("model.visual.pos_embed", (10, 8)): EMBEDDINGS,  # qwen3_vl, qwen3_5
    ("model.vision_tower.embeddings.position_embedding", (10, 8)): EMBEDDINGS,  # gemma3
    ("model.layers.61.self_attn.q_proj", (8, 8)): MTP,  # deepseek_v3
    ("model.layers.61.eh_proj", (8, 16)): MTP,
    ("model.layers.61.mlp.gate", (4, 8)): MTP,
    ("model.layers.61.embed_tokens", (10, 8)): MTP,
    ("model.layers.61.shared_head.head", (10, 8)): MTP,
    ("model.layers.61.enorm", (8,)): MTP,
    ("model.language_model.layers.61.mlp.up_proj", (8, 8)): MTP,  # glm4v_moe
    ("mtp.layers.0.mlp.gate", (4, 8)): MTP,  # qwen3_next
    ("mtp.fc", (8, 16)): MTP,
    ("model.mtp.layers.0.self_attn.o_proj", (8, 8)): MTP,  # longcat_flash, mimo_v2_flash
    ("model.mtp_layers.0.mlp.up_proj", (8, 8)): MTP,  # hy_v4
    ("model.mtp_linear_proj.0", (8, 16)): MTP,  # ernie4_5_moe
    ("mtp_dspark.layers.0.attention.wq_a", (8, 8)): MTP,  # mistral_large4
    ("model.visual.blocks.61.mlp.linear_fc1", (8, 8)): "",  # a tower may have more layers
    ("model.vision_tower.encoder.layers.61.mlp.fc1", (8, 8)): "",
}
STACKED = ("model.layers.60.mlp.experts.0.up_proj.weight",)


@pytest.mark.parametrize("nested", ["", "text_config"])
@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_groups(module: str, shape: tuple[int, ...], nested: str) -> None:
    config: dict[str, Any] = {nested: CONFIG, "num_hidden_layers": 0} if nested else CONFIG
    layers = Layers.find([f"{module}.weight", *STACKED], config)
    group = layers.group(module, weight_role(module, len(shape), True), shape)
    assert group == MODULES[module, shape] and group in ("", *GROUPS)


def test_without_a_config_no_layer_has_too_high_a_number() -> None:
    assert not Layers.find([], {}).is_mtp("model.layers.61.self_attn.q_proj")


# Linear layers of transformers that choose among experts, by their own class or that of a module above them
CHOOSES = re.compile(r"Router|TopKGating|(?<!Forget)Gate$")
# ... whose names say so but whose class's does not
BY_NAME = {"doge", "gemma3n", "gemma3n_text"}
# The one embedding that no table lists, since other models have layers of its name
UNLISTED = "transformer.w"


@pytest.mark.slow
@pytest.mark.parametrize("family", tables(), ids="-".join)
def test_against_the_classes(family: tuple[str, str]) -> None:
    """The router's and gate's group has the modules that are one, and no other linear layer; MTP layers have none."""
    from torch.nn import Embedding, Linear

    if family[1] in NOT_BUILT:
        pytest.skip(NOT_BUILT[family[1]])
    _, model = build(*family)
    modules = dict(model.named_modules())
    layers = Layers.find([name for name, _ in model.named_parameters()], model.config.to_dict())
    for path, module in modules.items():
        W = dict(module.named_parameters(recurse=False)).get("weight")
        if W is None or W.dim() != 2:
            continue
        role = weight_role(path, 2, True)
        group = layers.group(path, role, W.shape)
        assert group != MTP
        if isinstance(module, Embedding):
            assert role == "embedding" or path == UNLISTED, path
            continue
        above = [type(modules[each]).__name__ for n in range(3) if (each := path.rsplit(".", n)[0]) in modules]
        chooses = any(map(CHOOSES.search, above))
        if family[1] not in BY_NAME:
            assert (group == ROUTERS) is chooses, path
        if isinstance(module, Linear):
            assert (group == GATES) is (W.shape[0] == 1), path
