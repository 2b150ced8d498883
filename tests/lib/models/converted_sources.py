"""Write small adapters of every kind of update, each with a float64 base, for tests of what `convert` makes of them.

A language model's have PEFT's names, on Llama or on a Qwen2-MoE whose files have single experts; an image model's have
kohya's. Names and shapes of a kind are those of `lycoris_files.py` and of PEFT's layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import load_model, write_model
from safetensors.torch import save_file
from torch import Tensor

from lib.files import lycoris_files as files
from lib.files.lycoris_files import Numbers, Roles
from lib.models.image_layouts import MODELS, base_of, maker_names, write_single
from loratool.architectures.families import FAMILIES
from loratool.architectures.families.lookup import Located, names_of, parts_of

Shapes = Mapping[str, tuple[int, ...]]  # module -> its weight's
RANK = 4
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
BIASED = {**LLAMA, "attention_bias": True}
PHI = {**LLAMA, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
MOE = {
    **LLAMA,
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 3,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 6,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
ATTENTION = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
MLP = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
EXPERT = {"gate_proj": (6, 16), "up_proj": (6, 16), "down_proj": (16, 6)}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EMBEDDING, NORM, EXPERTS = "model.embed_tokens", "model.norm", "model.layers.0.mlp.experts"


@dataclass(frozen=True)
class Source:
    """An adapter and its base."""

    adapter: Path
    base: Path
    touched: Callable[[str], list[str]]  # module of the adapter -> tensors of the base that it changes, none fused
    others: tuple[Path, ...] = ()  # the base in other layouts: with more fused, or less
    family: str | None = None  # a key of FAMILIES; None of a language model


def layers_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the linear layers in a language model's files."""
    found: dict[str, tuple[int, ...]] = {}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.self_attn.{name}": shape for name, shape in ATTENTION.items()}
        owners = {"": MLP}
        if config["model_type"] == "qwen2_moe":
            owners = {f"{owner}.": EXPERT for owner in ("experts.0", "experts.1", "experts.2", "shared_expert")}
            found |= {f"model.layers.{i}.mlp.gate": (3, 16), f"model.layers.{i}.mlp.shared_expert_gate": (1, 16)}
        found |= {
            f"model.layers.{i}.mlp.{o}{name}": shape for o, each in owners.items() for name, shape in each.items()
        }
    return found


def write_language_base(folder: Path, config: Mapping[str, Any], fusing: Collection[str]) -> Path:
    """Write a base with some of FUSED fused: the same numbers in each layout."""
    layers = layers_of(config)
    biased = ("q_proj", "k_proj", "v_proj") if config["model_type"] == "qwen2_moe" else ()
    biased = tuple(ATTENTION) if config.get("attention_bias") else biased
    shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": shape for module, shape in layers.items()}
    shapes |= {f"{module}.bias": shape[:1] for module, shape in layers.items() if module.endswith(biased or "-")}
    shapes |= {f"{EMBEDDING}.weight": (32, 16), "lm_head.weight": (32, 16), f"{NORM}.weight": (16,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{at}_layernorm.weight": (16,) for at in ("input", "post_attention")}
    made = {name: Numbers(torch.float64, i)(*shape, size=0.3) for i, (name, shape) in enumerate(shapes.items())}
    return write_model(folder, fuse(made, fusing), config)


def fuse(tensors: Mapping[str, Tensor], fusing: Collection[str]) -> Roles:
    """Return the tensors of a model with some of FUSED fused."""
    found = dict(tensors)
    for name in tensors:
        for whole in fusing:
            parts = FUSED[whole]
            owner, mark, end = name.partition(f".{parts[0]}.")
            if mark and owner.endswith((".self_attn", ".mlp")):  # of experts nothing is fused
                found[f"{owner}.{whole}.{end}"] = torch.cat([found.pop(f"{owner}.{part}.{end}") for part in parts])
    return found


def split(tensors: Mapping[str, Tensor]) -> Roles:
    """Return the tensors of a model with what is fused in its layers apart."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        owner, last, end = name.rsplit(".", 2) if name.count(".") > 1 else ("", "", "")
        if parts := FUSED.get(last):
            rows = tensor.split([{**ATTENTION, **MLP}[part][0] for part in parts])
            found |= {f"{owner}.{part}.{end}": each for part, each in zip(parts, rows, strict=True)}
            del found[name]
    return found


def lora(n: Numbers, out: int, inp: int, rank: int = RANK) -> Roles:
    return {"lora_A.weight": n(rank, inp), "lora_B.weight": n(out, rank, size=0.1)}


def dora(n: Numbers, out: int, inp: int) -> Roles:
    return {**lora(n, out, inp), "lora_magnitude_vector": n.magnitudes(out)}


def adalora(n: Numbers, out: int, inp: int) -> Roles:
    return {"lora_A": n(RANK, inp), "lora_E": n(RANK, 1), "lora_B": n(out, RANK, size=0.1)}


def bias(n: Numbers, out: int, inp: int) -> Roles:
    return {**lora(n, out, inp), "lora_B.bias": n(out, size=0.1)}


def vera(n: Numbers, out: int, inp: int) -> Roles:
    return {"vera_lambda_b": n(out, size=0.2), "vera_lambda_d": n(RANK)}


def pvera(n: Numbers, out: int, inp: int) -> Roles:
    return {"pvera_lambda_b": n(out, size=0.2), "pvera_lambda_d": n(2 * RANK)}


def randlora(n: Numbers, out: int, inp: int) -> Roles:
    low = min(out, inp)
    return {"randlora_lambda": n(RANK, low // RANK), "randlora_gamma": n(low // RANK, low)}


def gralora(n: Numbers, out: int, inp: int) -> Roles:
    return {"gralora_A": n(2, inp // 2, RANK), "gralora_B": n(2, RANK, out // 2, size=0.2)}


def c3a(n: Numbers, out: int, inp: int) -> Roles:
    return {"c3a_kernel": n(out // 4, inp // 4, 4)}


def miss(n: Numbers, out: int, inp: int) -> Roles:
    return {"miss_block": n(RANK, out)}


def bone(n: Numbers, out: int, inp: int) -> Roles:
    return {"bone_block": n(RANK, out)}


def places(n: Numbers, out: int, inp: int, count: int) -> Tensor:
    """Return so many places of a weight, flat, each once."""
    return torch.randperm(out * inp, generator=n.generator)[:count]


def shira(n: Numbers, out: int, inp: int) -> Roles:
    flat = places(n, out, inp, out + inp)
    return {"shira_weight": n(out + inp), "shira_indices": torch.stack([flat // inp, flat % inp]).to(torch.int32)}


def supertuning(n: Numbers, out: int, inp: int) -> Roles:
    return {"supertuning_values": n(20), "supertuning_indices": places(n, out, inp, 20).to(torch.int32)}


def unilora(n: Numbers, out: int, inp: int) -> Roles:
    roles: Roles = {}
    for side, shape in (("A", (RANK, inp)), ("B", (out, RANK))):
        roles[f"unilora_indices_{side}"] = torch.randint(20, shape, generator=n.generator)
        roles[f"unilora_scales_{side}"] = n.magnitudes(*shape)
    return roles


def tinylora(n: Numbers, out: int, inp: int) -> Roles:
    return {"tinylora_A": n(RANK, inp), "tinylora_B": n(out, RANK), "tinylora_P": n(5, RANK, RANK)}


def vblora(n: Numbers, out: int, inp: int) -> Roles:
    return {"vblora_logits_A": n(RANK, inp // 4, 7), "vblora_logits_B": n(out // 4, RANK, 7)}


def delora(n: Numbers, out: int, inp: int) -> Roles:
    norms = n(inp).abs()
    return {**lora_of("delora", n, out, inp), "delora_lambda": n.magnitudes(1) * 8, "delora_w_norm": norms}


def lora_of(kind: str, n: Numbers, out: int, inp: int) -> Roles:
    return {f"{kind}_A": n(RANK, inp), f"{kind}_B": n(out, RANK)}


def fourierft(n: Numbers, out: int, inp: int) -> Roles:
    return {"fourierft_spectrum": n(20)}


def waveft(n: Numbers, out: int, inp: int) -> Roles:
    return {"waveft_spectrum": n(20)}


def beft(n: Numbers, out: int, inp: int) -> Roles:
    return {"beft_bias": n(1, out)}


def ia3(n: Numbers, out: int, inp: int) -> Roles:
    return {"ia3_l": n.magnitudes(out, 1)}


def oft(n: Numbers, out: int, inp: int) -> Roles:
    return {"oft_R.weight": n(inp // 4, 6, size=0.2)}


def boft(n: Numbers, out: int, inp: int) -> Roles:
    return {"boft_R": n(1, inp // 4, 4, 4, size=0.2), "boft_s": n.magnitudes(out, 1)}


def bat(n: Numbers, out: int, inp: int) -> Roles:
    return {"miss_block": n(out // RANK, RANK, RANK, size=0.1)}


def road(n: Numbers, out: int, inp: int) -> Roles:
    return {"road_theta": n(out, size=0.2), "road_alpha": n.magnitudes(out)}


def hra(n: Numbers, out: int, inp: int) -> Roles:
    return {"hra_u": n(inp, RANK)}


def hira(n: Numbers, out: int, inp: int) -> Roles:
    return lora_of("hira", n, out, inp)


def glora(n: Numbers, out: int, inp: int) -> Roles:
    return {"glora_A.X": n(out, 1, size=0.2), "glora_B.Xd": n(out, 2, size=0.1), "glora_B.Xu": n(2, inp)}


def deft(n: Numbers, out: int, inp: int) -> Roles:
    return {"deft_P": n(out, RANK, size=0.2), "deft_R": n(RANK, inp, size=0.2)}


def peanut(n: Numbers, out: int, inp: int) -> Roles:
    return {"peanut_A.weight": n(RANK, out, size=0.2), "peanut_B.weight": n(out, RANK, size=0.2)}


def diag_oft(n: Numbers, out: int, *inp: int) -> Roles:
    return {"oft_blocks": n(out // 4, 4, 4, size=0.1), "rescale": n.magnitudes(out, *(1 for _ in inp))}


def onetrainers_oft(n: Numbers, out: int, *inp: int) -> Roles:
    return {"oft_R.weight": n(math.prod(inp) // 4, 6, size=0.2)}


def without_alpha(make: Callable[..., Roles]) -> Callable[..., Roles]:
    """Return a maker of roles as PEFT has them, whose alpha is in the config."""
    return lambda n, *shape: {role: tensor for role, tensor in make(n, *shape).items() if role != "alpha"}


@dataclass(frozen=True)
class Language:
    """What an adapter of a language model has."""

    config: Mapping[str, Any]
    make: Callable[..., Roles] = lora
    ends: tuple[str, ...] = tuple(ATTENTION)  # of its modules' names
    dtype: torch.dtype = torch.float32
    fields: Mapping[str, Any] | None = None  # of its config
    beside: Callable[[Numbers], Roles] | None = None  # other tensors, by their whole names

    def write(self, folder: Path) -> Source:
        layouts = [(), *((whole,) for whole in FUSED), tuple(FUSED)]
        bases = [
            write_language_base(folder.with_name(f"{folder.name} {i}"), self.config, x) for i, x in enumerate(layouts)
        ]
        base = bases.pop(-1 if self.config is PHI else 0)
        layers = {name.removesuffix(".weight"): tuple(t.shape) for name, t in load_model(base).items() if t.dim() > 1}
        modules = {name: shape for name, shape in layers.items() if name.endswith(self.ends)}
        tensors: Roles = self.beside(Numbers(self.dtype, 99)) if self.beside else {}
        ranks: Mapping[str, int] = (self.fields or {}).get("rank_pattern", {})
        for i, (module, shape) in enumerate(modules.items()):
            own = {"rank": ranks[last]} if (last := module.rpartition(".")[2]) in ranks and self.make is lora else {}
            for role, tensor in self.make(Numbers(self.dtype, i), *shape, **own).items():
                tensors[f"{module}.{role}"] = tensor
        folder.mkdir(parents=True)
        named = {f"base_model.{'model.' if key.startswith('model.') else ''}{key}": t for key, t in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": sorted(modules)}
        said["peft_version"] = "0.21.2"  # in which experts are stacked
        (folder / "adapter_config.json").write_text(json.dumps({**said, **(self.fields or {})}))
        return Source(folder, base, touched_weights, others=tuple(bases))


def touched_weights(module: str) -> list[str]:
    """Return the tensors that a module of an adapter is of, as files have them one by one."""
    owner, _, last = module.rpartition(".")
    owners = [f"{owner}.{e}" for e in range(MOE["num_experts"])] if owner.endswith(".experts") else [owner]
    return [f"{each}.{name}.weight" for each in owners for name in FUSED.get(last, (last,))]


def embedding(n: Numbers) -> Roles:
    """Return an embedding's factors, and the weight under them that was trained as well."""
    factors = {"lora_embedding_A": n(RANK, 32), "lora_embedding_B": n(16, RANK, size=0.1)}
    return {f"{EMBEDDING}.{role}": t for role, t in {**factors, "base_layer.weight": n(32, 16)}.items()}


def stack(n: Numbers) -> Roles:
    """Return the factors of a layer's experts as PEFT stacks them."""
    return {
        f"{EXPERTS}.base_layer.lora_A.weight": n(3 * RANK, 16),
        f"{EXPERTS}.base_layer.lora_B.weight": n(12, 3 * RANK, size=0.1),
        f"{EXPERTS}.lora_A.weight": n(3 * RANK, 6),
        f"{EXPERTS}.lora_B.weight": n(16, 3 * RANK, size=0.1),
    }


DRAWN = {"n_frequency": 20, "random_loc_seed": 777}
ALL, SINGLES = (*ATTENTION, *MLP), ("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj")
LANGUAGE: dict[str, Language] = {
    "lora": Language(LLAMA, ends=ALL),
    "lora bf16": Language(LLAMA, dtype=torch.bfloat16),
    "lora rslora": Language(LLAMA, fields={"use_rslora": True}),
    "lora patterns": Language(LLAMA, fields={"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}}),
    "lora experts": Language(MOE, ends=(*SINGLES, "experts.2.gate_proj", "experts.2.down_proj", "self_attn.q_proj")),
    "lora embedding": Language(LLAMA, beside=embedding),
    "lora fused": Language(PHI, ends=("o_proj", *FUSED)),
    "loha": Language(LLAMA, without_alpha(files.loha), fields={"peft_type": "LOHA", "r": 3, "alpha": 4}),
    "lokr": Language(LLAMA, without_alpha(files.lokr_two), fields={"peft_type": "LOKR", "r": 2, "alpha": 3}),
    "adalora": Language(LLAMA, adalora, fields={"peft_type": "ADALORA", "init_r": RANK, "total_step": 9}),
    "vera": Language(LLAMA, vera, ("o_proj",), fields={"peft_type": "VERA", "save_projection": True},
                     beside=lambda n: {"vera_A": n(RANK, 16), "vera_B": n(16, RANK)}),
    "pvera": Language(LLAMA, pvera, ("o_proj",), fields={"peft_type": "PVERA", "save_projection": True},
                      beside=lambda n: {"pvera_A": n(2 * RANK, 16), "pvera_B": n(16, RANK)}),
    "randlora": Language(LLAMA, randlora, ("o_proj",), fields={"peft_type": "RANDLORA", "randlora_alpha": 3},
                         beside=lambda n: {"randlora_A": n(RANK, 1, 16), "randlora_B": n(16, 4, RANK, size=0.2)}),
    "gralora": Language(LLAMA, gralora, fields={"peft_type": "GRALORA", "gralora_k": 2, "hybrid_r": 0, "alpha": 5}),
    "c3a": Language(LLAMA, c3a, fields={"peft_type": "C3A", "block_size": 4}),
    "miss": Language(LLAMA, miss, fields={"peft_type": "MISS"}),
    "bone": Language(LLAMA, bone, fields={"peft_type": "BONE", "init_weights": True}),
    "shira": Language(LLAMA, shira, fields={"peft_type": "SHIRA", "r": 1}),
    "supertuning": Language(LLAMA, supertuning, fields={"peft_type": "SUPERTUNING", "r": None, "lora_alpha": None}),
    "unilora": Language(LLAMA, unilora, beside=lambda n: {"unilora_theta_d": n(20)},
                        fields={"peft_type": "UNILORA", "theta_d_length": 20, "save_indices": True}),
    "tinylora": Language(LLAMA, tinylora, beside=lambda n: {"tinylora_v.0": n(5)},
                         fields={"peft_type": "TINYLORA", "u": 5, "weight_tying": 1.0, "save_projection": True}),
    "vblora": Language(LLAMA, vblora, beside=lambda n: {"vblora_vector_bank": n(7, 4)},
                       fields={"peft_type": "VBLORA", "num_vectors": 7, "vector_length": 4, "topk": 2}),
    "delora": Language(LLAMA, delora, fields={"peft_type": "DELORA", "delora_lambda": 15}),
    "fourierft": Language(LLAMA, fourierft, fields={"peft_type": "FOURIERFT", "scaling": 150.0, **DRAWN}),
    "waveft": Language(LLAMA, waveft, fields={"peft_type": "WAVEFT", "scaling": 0.5, "wavelet_family": "db2",
                                              "use_idwt": True, **DRAWN}),
    "beft": Language(BIASED, beft, fields={"peft_type": "BEFT"}),
    "ia3": Language(LLAMA, ia3, fields={"peft_type": "IA3", "feedforward_modules": []}),
    "oft": Language(LLAMA, oft, fields={"peft_type": "OFT", "oft_block_size": 4}),
    "boft": Language(LLAMA, boft, fields={"peft_type": "BOFT"}),
    "bat": Language(LLAMA, bat, fields={"peft_type": "MISS", "init_weights": "bat"}),
    "road": Language(LLAMA, road, fields={"peft_type": "ROAD", "variant": "road_2", "group_size": 4}),
    "hra": Language(LLAMA, hra, fields={"peft_type": "HRA"}),
    "hira": Language(LLAMA, hira, fields={"peft_type": "HIRA"}),
    "deft": Language(LLAMA, deft, fields={"peft_type": "DEFT"}),
    "peanut": Language(LLAMA, peanut, fields={"peft_type": "PEANUT"}),
    "glora": Language(LLAMA, glora, fields={"peft_type": "GLORA"}),
    "dora": Language(LLAMA, dora, ("q_proj", "o_proj"), fields={"use_dora": True}),
    "experts": Language(MOE, ends=("self_attn.q_proj",), beside=stack,
                        fields={"target_parameters": [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"]}),
    "bias": Language(BIASED, bias, fields={"lora_bias": True}),
    "replaced": Language(LLAMA, beside=lambda n: {f"{NORM}.weight": n(16)}, fields={"modules_to_save": ["norm"]}),
    "rows": Language(LLAMA, beside=lambda n: {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": n(2, 16)},
                     fields={"trainable_token_indices": {"embed_tokens": [3, 30]}}),
}  # fmt: skip


# kind -> what makes a linear layer's tensors, and a convolution's
IMAGE: dict[str, tuple[Callable[..., Roles], Callable[..., Roles]]] = {
    "lora": (files.lora, files.lora),
    "tucker": (files.lora, files.lora_mid),
    "loha": (files.loha, files.loha_tucker),
    "lokr": (files.lokr_both, files.lokr_two),
    "dora": (files.dora(files.lora), files.dora(files.lora)),
    "dora in": (files.dora(files.lora, inputs=True), files.dora(files.lora_mid, inputs=True)),
    "diff": (files.diff_alone, files.diff_alone),
    "ia3": (files.ia3_out, files.ia3_in),
    "oft": (onetrainers_oft, onetrainers_oft),
    "oft_blocks": (diag_oft, diag_oft),
    "lycoris_glora": (files.glora, files.glora),
}
# kinds, the first words of a source, whose change depends on the weight
NEED_WEIGHTS = {"dora", "ia3", "oft", "boft", "bat", "road", "hra", "hira", "glora", "oft_blocks", "lycoris_glora"}
NEED_WEIGHTS |= {"deft", "peanut"}


def write_image(folder: Path, model: str, kind: str, dtype: torch.dtype = torch.float32) -> Source:
    """Write an adapter of every layer of a denoiser of `image_layouts`, and its maker's single file."""
    layers = [layer for layer in MODELS[model][0] if layer.component == "unet" and len(layer.shape) > 1]
    tensors, names = {}, {}
    for i, layer in enumerate(layers):
        module = f"lora_unet_{layer.maker.replace('.', '_')}"
        names[module] = [maker_names(layer)["weight"]]
        make = IMAGE[kind][len(layer.shape) > 2]
        tensors |= {f"{module}.{role}": t.contiguous() for role, t in make(Numbers(dtype, i), *layer.shape).items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter.safetensors")
    bases = {layer.maker: base_of(layer, torch.float64, i) for i, layer in enumerate(MODELS[model][0])}
    base = write_single(folder / "base.safetensors", model, bases)
    return Source(folder / "adapter.safetensors", base, lambda module: names[module], family=model)


def write_family(folder: Path, key: str) -> Source:
    """Write LoRA of modules from all over a family's table, and a base of these modules under the maker's names."""
    family, n = FAMILIES[key], Numbers(torch.float32)
    columns = next((size for width in family.widths if width.ends == ("",) for size in width.columns), 12)
    maker = [each for each in names_of(family, 2).values() if each.maker == (each.path,)]
    names = {f"lora_unet_{each.path.replace('.', '_')}": f"model.diffusion_model.{each.path}.weight" for each in maker}
    shapes = [(rows_of(each, columns), columns) for each in maker]
    weights = {name: n(*shape, size=0.3).double() for name, shape in zip(names.values(), shapes, strict=True)}
    # what tells the base from those of other families
    weights |= {f"model.diffusion_model.{mark}x.weight": n(2).double() for mark in family.marks[:1]}
    tensors = {}
    for module, shape in [*zip(names, shapes, strict=True)][:: max(1, len(maker) // 6)]:
        tensors |= {f"{module}.{role}": tensor for role, tensor in files.lora(n, *shape).items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter.safetensors")
    save_file(weights, folder / "base.safetensors")
    return Source(
        folder / "adapter.safetensors", folder / "base.safetensors", lambda module: [names[module]], family=key
    )


def rows_of(located: Located, columns: int) -> int:
    """Return rows that a module of the family can have, of more than one kind where the table has several."""
    told = next((ratio for end, ratio in located.family.ratios.items() if located.path.endswith(end)), 0)
    ratios = [told] if told else [*(each for each, _ in located.rows if each), 6, 7]
    return next(ratio * columns for ratio in ratios if parts_of(located, columns, ratio * columns))
