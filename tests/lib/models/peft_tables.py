"""Every kind of PEFT's adapters but plain LoRA, as rows of a table: its config and the layers that it is for.

PEFT makes and saves each, and its own merge is the oracle. A new kind is a new row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

peft = pytest.importorskip("peft", minversion="0.21")

LINEAR = ("wide", "square")
BANK = {"r": 4, "num_vectors": 24, "vector_length": 16, "topk": 3}
SAVED = {"save_only_topk_weights": True}


class Net(nn.Module):
    """A layer of each sort that PEFT has adapters for."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.wide, self.square, self.hf = nn.Linear(32, 48), nn.Linear(32, 32), Conv1D(16, 32)
        self.conv1, self.conv2, self.point = nn.Conv1d(8, 12, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 1)
        self.conv3, self.embed_tokens, self.norm = nn.Conv3d(4, 6, (2, 3, 2)), nn.Embedding(24, 32), nn.LayerNorm(32)


@dataclass(frozen=True)
class Row:
    """A variant of a kind."""

    config: str  # class of peft's config
    fields: Mapping[str, Any]  # of the config
    layers: tuple[str, ...] = LINEAR  # of Net
    close: float = 1e-12  # how close peft's merge is to the definition, relative to the largest change


ROWS = {
    "lora, velora": Row("LoraConfig", {"r": 3, "lora_alpha": 5, "velora_config": peft.VeloraConfig(num_groups=4)}),
    "lora, monteclora": Row("LoraConfig", {"r": 3, "lora_alpha": 5, "monteclora_config": peft.MontecloraConfig()}),
    "lora, bd": Row(
        "LoraConfig",
        {
            "r": 4,
            "use_bdlora": peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["wide"], target_modules_bd_b=["square"], nblocks=2
            ),
        },
    ),
    "adalora": Row("AdaLoraConfig", {"init_r": 6, "target_r": 3, "lora_alpha": 5, "total_step": 9}),
    "adalora, convolution": Row("AdaLoraConfig", {"init_r": 2, "total_step": 9}, ("hf", "conv2", "point")),
    "loha": Row("LoHaConfig", {"r": 3, "alpha": 6, "rank_pattern": {"square": 2}}),
    "loha, convolutions": Row("LoHaConfig", {"r": 3, "alpha": 6}, ("conv1", "conv2", "point")),
    "loha, cores": Row("LoHaConfig", {"r": 3, "alpha": 6, "use_effective_conv2d": True}, ("conv1", "conv2", "point")),
    "lokr": Row("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr, two complete sides": Row("LoKrConfig", {"r": 40, "alpha": 5, "decompose_factor": 4}),
    "lokr, four factors": Row("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True}),
    "lokr, convolutions": Row("LoKrConfig", {"r": 1, "alpha": 5}, ("conv1", "conv2", "point")),
    "lokr, complete convolutions": Row("LoKrConfig", {"r": 8, "alpha": 5}, ("conv1", "conv2", "point")),
    "lokr, cores": Row("LoKrConfig", {"r": 2, "use_effective_conv2d": True}, ("conv1", "conv2", "point")),
    "ia3": Row("IA3Config", {"feedforward_modules": ["hf"]}, ("wide", "hf")),
    "ia3, convolutions": Row("IA3Config", {"feedforward_modules": ["conv2"]}, ("conv2", "point", "conv3")),
    "vera": Row("VeraConfig", {"r": 6, "projection_prng_key": 3}, ("wide", "hf")),
    "pvera": Row("PveraConfig", {"r": 6, "projection_prng_key": 3}, ("wide", "hf")),
    "randlora": Row("RandLoraConfig", {"r": 5, "randlora_alpha": 7}, ("wide", "hf")),
    "randlora, sparse": Row("RandLoraConfig", {"r": 5, "sparse": True}),
    "randlora, very sparse": Row("RandLoraConfig", {"r": 5, "very_sparse": True}),
    "shira": Row("ShiraConfig", {"r": 2, "random_seed": 3}),
    "shira, square alone": Row("ShiraConfig", {"r": 2, "random_seed": 3}, ("square",)),
    "supertuning": Row("SupertuningConfig", {"sparsity": 0.9}),
    "supertuning, lora": Row("SupertuningConfig", {"sparsity": 0.9, "r": 3, "lora_alpha": 5}),
    "miss": Row("MissConfig", {"r": 4}),
    "miss, rest of a block": Row("MissConfig", {"r": 5}),
    "miss, mini": Row("MissConfig", {"r": 4, "mini_r": 4, "init_weights": "mini"}),
    "miss, square alone": Row("MissConfig", {"r": 4}, ("square",)),
    "gralora": Row("GraloraConfig", {"r": 4, "alpha": 7, "gralora_k": 2}, ("wide", "hf")),
    "gralora, hybrid": Row("GraloraConfig", {"r": 6, "alpha": 7, "gralora_k": 2, "hybrid_r": 2}, ("wide", "hf")),
    "c3a": Row("C3AConfig", {"block_size": 8}, close=1e-6),  # peft divides in float32
    "c3a, square alone": Row("C3AConfig", {"block_size": 16}, ("square",), close=1e-6),
    "unilora": Row("UniLoraConfig", {"r": 4, "theta_d_length": 64, "save_indices": True}),
    "unilora, conv1d": Row("UniLoraConfig", {"r": 4, "theta_d_length": 64, "save_indices": True}, ("wide", "hf")),
    "unilora, more numbers than places": Row("UniLoraConfig", {"r": 1, "theta_d_length": 150, "save_indices": True}),
    "unilora, biases": Row("UniLoraConfig", {"r": 2, "theta_d_length": 9, "save_indices": True, "bias": "all"}),
    "tinylora": Row("TinyLoraConfig", {"r": 2, "u": 8, "weight_tying": 1.0}),
    "tinylora, groups": Row("TinyLoraConfig", {"r": 2, "u": 8}, ("wide", "hf", "embed_tokens")),
    "tinylora, long vector": Row("TinyLoraConfig", {"r": 5, "u": 64, "weight_tying": 1.0, "init_weights": "uniform"}),
    "tinylora, rank of the smaller side": Row("TinyLoraConfig", {"r": 40, "u": 3, "weight_tying": 1.0}),
    "vblora": Row("VBLoRAConfig", {**BANK, **SAVED}),
    "vblora, two vectors": Row("VBLoRAConfig", {**BANK, **SAVED, "num_vectors": 300, "topk": 2}),
    "vblora, one vector": Row("VBLoRAConfig", {**BANK, **SAVED, "topk": 1}),
    "vblora, conv1d": Row("VBLoRAConfig", {**BANK, **SAVED}, ("wide", "hf")),
    "vblora with logits": Row("VBLoRAConfig", BANK),
    "vblora with logits, every vector": Row("VBLoRAConfig", {**BANK, "num_vectors": 5, "topk": 5}),
    "vblora with logits, one vector": Row("VBLoRAConfig", {**BANK, "topk": 1}),
    "delora": Row("DeloraConfig", {"r": 4, "delora_lambda": 15}),
    "delora, patterns": Row("DeloraConfig", {"r": 4, "rank_pattern": {"wide": 7}, "lambda_pattern": {"square": 3}}),
    "delora, square alone": Row("DeloraConfig", {"r": 4}, ("square",)),
    "oft": Row("OFTConfig", {"oft_block_size": 8}),
    "oft, cayley": Row("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft, shared": Row("OFTConfig", {"oft_block_size": 4, "block_share": True}),
    "oft, bound": Row("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.2}, close=1e-6),  # eps in float32
    "oft, two terms": Row("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 2}),
    "oft, seven terms": Row("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 7}),
    "oft, layers": Row("OFTConfig", {"oft_block_size": 4}, ("conv2", "point", "embed_tokens", "square")),
    "oft, cayley of layers": Row(
        "OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}, ("conv2", "embed_tokens")
    ),
    "boft": Row("BOFTConfig", {"boft_block_size": 8}),
    "boft, convolutions": Row("BOFTConfig", {"boft_block_size": 4}, ("conv2", "point")),
    "miss, bat": Row("MissConfig", {"r": 4, "init_weights": "bat"}),
    "road": Row("RoadConfig", {"group_size": 8}),
    "road, two": Row("RoadConfig", {"variant": "road_2", "group_size": 4}),
    "road, four": Row("RoadConfig", {"variant": "road_4", "group_size": 16}),
    # W U has 36 bits
    "hra": Row("HRAConfig", {"r": 4}, close=1e-9),
    "hra, orthogonal": Row("HRAConfig", {"r": 4, "apply_GS": True}, ("wide", "conv2"), close=1e-9),
    "hira": Row("HiraConfig", {"r": 4}, ("wide", "hf", "conv1", "conv2", "embed_tokens")),
    "glora": Row("GloraConfig", {"r": 4, "config_C": "none"}),
    "glora, vectors": Row("GloraConfig", {"config_A_B": "vector", "config_C": "none", "config_D_E": "vector"}),
    "glora, constants": Row("GloraConfig", {"config_A_B": "constant", "config_C": "none"}),
    "glora, bias by the weight": Row("GloraConfig", {"r": 4}, close=1e-9),  # W C has 36 bits
    "glora, bias by the weight and a vector": Row(
        "GloraConfig", {"config_A_B": "constant", "config_C": "vector", "config_D_E": "vector"}, close=1e-9
    ),
    "glora, bias by the weight alone": Row("GloraConfig", {"r": 4, "config_D_E": "none"}, close=1e-9),
    # peft computes these in float32
    "deft": Row("DeftConfig", {"r": 4}, close=1e-5),
    "deft, alpha": Row("DeftConfig", {"r": 4, "alpha": 7}, close=1e-5),
    "deft, para": Row("DeftConfig", {"r": 4, "para": True}, close=1e-5),
    "deft, qr": Row("DeftConfig", {"r": 4, "alpha": 7, "decomposition_method": "qr"}, close=1e-5),
    "deft, qr para": Row("DeftConfig", {"r": 4, "decomposition_method": "qr", "para": True}, close=1e-5),
    "deft, conv1d": Row("DeftConfig", {"r": 4, "alpha": 7}, ("hf",), close=1e-5),
    "deft, qr of conv1d": Row("DeftConfig", {"r": 4, "decomposition_method": "qr"}, ("hf",), close=1e-5),
    "peanut": Row("PeanutConfig", {"r": 4, "scaling": 0.7}, close=1e-9),
    "peanut, deep": Row("PeanutConfig", {"r": 4, "depth": 2}, close=1e-9),
    # peft computes FourierFT in float32
    "fourierft": Row("FourierFTConfig", {"n_frequency": 40}, ("wide", "square"), close=1e-5),
    "waveft": Row("WaveFTConfig", {"n_frequency": 40}),
    "waveft, longer": Row("WaveFTConfig", {"n_frequency": 40, "wavelet_family": "db3"}),
    "waveft, places": Row("WaveFTConfig", {"n_frequency": 40, "use_idwt": False}),
    "beft": Row("BeftConfig", {}),
    "tokens": Row("TrainableTokensConfig", {"token_indices": [5, 0, 23]}, ("embed_tokens",)),
    "norms": Row("LNTuningConfig", {}, ("norm",)),
}


def write(folder: Path, variant: str, **fields: Any) -> dict[str, Tensor]:
    """Write a base and an adapter of it, both in float64; return what peft merges of the files."""
    torch.manual_seed(3)
    row, model = ROWS[variant], Net().double()
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "base.safetensors")
    config = getattr(peft, row.config)(target_modules=[*row.layers], **{**row.fields, **fields})
    live = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    live.save_pretrained(folder / "adapter")
    if not config.to_dict().get(
        "save_only_topk_weights"
    ):  # peft 0.21 cannot load weights of the top vectors in float64
        live = loaded(folder / "base.safetensors", folder / "adapter")
    merged: dict[str, Tensor] = live.merge_and_unload().state_dict()
    return merged


def loaded(base: Path, adapter: Path) -> Any:
    """Return peft's model of a base and an adapter in float64, with all numbers as the files have them."""
    model = Net().double()
    model.load_state_dict(load_file(base))
    config = peft.PeftConfig.from_pretrained(adapter)
    live = peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()
    saved = load_file(adapter / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(live, dict(saved))
    state = peft.get_peft_model_state_dict(live)
    assert all(torch.equal(state[name].double(), x.double()) for name, x in saved.items() if name in state)
    return live
