"""Write models of two layers, one with experts, and adapters on them, as servers look them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import factors, weights, write_model, write_peft
from torch import Tensor

LAYER = "model.layers.{}."

ATTENTION = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}

MLP = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hidden_size": 8, "num_hidden_layers": 2}

Changes = dict[str, Tensor]


def llama(folder: Path, kind: str = "llama", cls: str = "LlamaForCausalLM", **config: Any) -> Path:
    names = {f"{LAYER.format(i)}self_attn.{n}.weight": s for i in (0, 1) for n, s in ATTENTION.items()}
    names |= {f"{LAYER.format(i)}mlp.{n}.weight": s for i in (0, 1) for n, s in MLP.items()}
    names |= {"model.embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8)}
    told = {"model_type": kind, "architectures": [cls], **HEADS, **config}
    return write_model(folder, {n: weights(*s) for n, s in names.items()}, told)


def mixtral(folder: Path, experts: int = 3) -> Path:
    names = {f"{LAYER.format(0)}self_attn.{n}.weight": s for n, s in ATTENTION.items()}
    names[f"{LAYER.format(0)}block_sparse_moe.gate.weight"] = (experts, 8)
    for e in range(experts):
        for w, shape in (("w1", (12, 8)), ("w3", (12, 8)), ("w2", (8, 12))):
            names[f"{LAYER.format(0)}block_sparse_moe.experts.{e}.{w}.weight"] = shape
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **HEADS, "num_hidden_layers": 1}
    return write_model(folder, {n: weights(*s) for n, s in names.items()}, config)


def both(*layers: int) -> dict[str, tuple[Tensor, Tensor]]:
    return {f"{LAYER.format(i)}self_attn.{n}": factors(*ATTENTION[n], 2, seed=i) for i in layers for n in ATTENTION}


def stacked(folder: Path, experts: int = 3, rank: int = 2) -> tuple[Path, Changes]:
    """Return an adapter of PEFT's stacks, and the change of each expert by the names of the files."""
    owner, inner = f"{LAYER.format(0)}mlp.experts", Changes()
    A3, B3 = weights(experts, rank, 8, seed=1), weights(24, rank, experts, seed=2)
    A2, B2 = weights(experts, rank, 12, seed=3), weights(8, rank, experts, seed=4)
    pairs = {
        f"{owner}.base_layer": (A3.reshape(-1, 8), B3.reshape(24, -1)),
        owner: (A2.reshape(-1, 12), B2.reshape(8, -1)),
    }
    names = [f"{owner}.gate_up_proj", f"{owner}.down_proj"]
    start = write_peft(
        folder, pairs, r=rank, lora_alpha=rank, target_modules=[], target_parameters=names, peft_version="0.21.2"
    )
    for e in range(experts):
        both = B3[:, :, e].double() @ A3[e].double()
        at = f"{LAYER.format(0)}block_sparse_moe.experts.{e}"
        inner |= {f"{at}.w1": both[:12], f"{at}.w3": both[12:], f"{at}.w2": B2[:, :, e].double() @ A2[e].double()}
    return start, inner
