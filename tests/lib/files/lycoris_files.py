"""Write small adapter files of every kind that LyCORIS and PEFT make, without either: seeded tensors by their names.

Names and shapes are those of lycoris-lora 4.1.3 (`lycoris/modules/{locon,loha,lokr,full,norms,ia3,glora,diag_oft,boft,
tlora}.py`: `weight_list` and `custom_state_dict`) and of peft 0.21.2 (`peft/tuners/{loha,lokr,ia3,adalora,vera,oft,
boft}/layer.py`, `xlora/model.py`), as `save_weights` and `save_pretrained` write them. W is (out, in[, *kernel]), r the
rank, k the kernel's positions. What the tensors mean is in `dense_oracle.py`.

LyCORIS, one file, each tensor `<prefix><module>.<role>`:

| kind | roles |
|---|---|
| LoRA | `lora_up.weight` (out, r[, 1, 1]), `lora_down.weight` (r, in[, *kernel]), `alpha` () |
| with `lora_mid.weight` (r, r, *kernel) | `lora_up.weight` (out, r, 1, 1), `lora_down.weight` (r, in, 1, 1) |
| LoHa | `hada_w1_a`, `hada_w2_a` (out, r), `hada_w1_b`, `hada_w2_b` (r, in k) |
| with `hada_t1`, `hada_t2` (r, r, *kernel) | `hada_w1_a`, `hada_w2_a` (r, out), `hada_w1_b`, `hada_w2_b` (r, in) |
| LoKr, out = a b, in = c d | `lokr_w1` (a, c), or `lokr_w1_a` (a, r) and `lokr_w1_b` (r, c); |
| | `lokr_w2` (b, d[, *kernel]), or `lokr_w2_a` (b, r) and `lokr_w2_b` (r, d k) |
| with `lokr_t2` (r, r, *kernel) | `lokr_w2_a` (r, b), `lokr_w2_b` (r, d) |
| full | `diff` (W's shape), `diff_b` (out,) |
| norm | `w_norm`, `b_norm` (n,) |
| IA3 | `weight` (out,) or (in,), of a convolution (1, n, 1, 1); `on_input` () |
| GLoRA | `a1.weight` (in, r), `a2.weight` (r, in), `b1.weight` (out, r), `b2.weight` (r, in) |
| diag-oft | `oft_blocks` (n, b, b), `rescale` (out, 1) |
| boft | `oft_blocks` (m, n, b, b), `rescale` (out, 1) |
| T-LoRA | `q_layer.weight` (r, in), `p_layer.weight` (out, r), `lambda_layer` (1, r) |

`dora_scale` beside LoRA, LoHa or LoKr is (out, 1[, 1, 1]) or (1, in[, 1, 1]). rs-LoRA is told by alpha alone, which is
saved as alpha r / sqrt(r). Full, norm and IA3 have no alpha; that of diag-oft and boft is a constraint and no scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Roles = dict[str, Tensor]

# A layer of the base -> its weight's shape. Kernels are oblong, so that no two axes can be taken for each other.
SHAPES: dict[str, tuple[int, ...]] = {
    "linear": (25, 6),
    "even": (12, 6),
    "wide": (5, 8),
    "conv": (10, 6, 3, 2),
    "conv1d": (10, 6, 3),
    "norm": (25,),
}
# how a file spells a module: (prefix, whether the path's dots become underscores)
CONTAINERS = {
    "kohya": ("lora_unet_", True),
    "lycoris": ("lycoris_", True),
    "dotted": ("transformer.", False),
    "bare": ("", False),
}
KOHYAS_OFT = ("oft_unet_", True)  # of sd-scripts' OFT alone
# what LyCORIS's trainer for kohya leaves in a file's header
METADATA = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_dim": "3",
    "ss_network_alpha": "4.0",
    "ss_network_args": json.dumps({"algo": "loha", "conv_dim": "3", "preset": "full"}),
}


class Numbers:
    """Random tensors of one type, the same ones for the same seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * size).to(self.dtype)

    def magnitudes(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) + 0.5).to(self.dtype)

    def number(self, value: float) -> Tensor:
        return torch.tensor(value).to(self.dtype)


def lora(n: Numbers, out: int, *inp: int, rank: int = 3, alpha: float = 4.0) -> Roles:
    ones = (1,) * (len(inp) - 1)
    up, down = n(out, rank, *ones, size=0.2), n(rank, *inp)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": n.number(alpha)}


def rs_lora(n: Numbers, out: int, *inp: int) -> Roles:
    return lora(n, out, *inp, alpha=4 * 3 / math.sqrt(3))


def lora_mid(n: Numbers, out: int, inp: int, *kernel: int) -> Roles:
    pair = lora(n, out, inp, 1, 1)
    return {**pair, "lora_mid.weight": n(3, 3, *kernel, size=0.5)}


def loha(n: Numbers, out: int, inp: int, *kernel: int) -> Roles:
    found: Roles = {"alpha": n.number(4.0)}
    for i in "12":
        found[f"hada_w{i}_a"] = n(out, 3, size=0.3)
        found[f"hada_w{i}_b"] = n(3, inp * math.prod(kernel))
    return found


def loha_tucker(n: Numbers, out: int, inp: int, *kernel: int) -> Roles:
    found: Roles = {"alpha": n.number(4.0)}
    for i in "12":
        found[f"hada_t{i}"] = n(3, 3, *kernel, size=0.5)
        found[f"hada_w{i}_a"] = n(3, out, size=0.3)
        found[f"hada_w{i}_b"] = n(3, inp)
    return found


def lokr(
    n: Numbers, out: int, inp: int, *kernel: int, one: bool = False, two: bool = False, tucker: bool = False
) -> Roles:
    """Make LoKr; `one`, `two`: whether that matrix is a product of two; `tucker`: and the second has a core."""
    a, c, rank = 5 if out == 25 else 2, 2, 2
    b, d = out // a, inp // c
    found: Roles = {"alpha": n.number(3.3)}
    if one:
        found |= {"lokr_w1_a": n(a, rank), "lokr_w1_b": n(rank, c)}
    else:
        found["lokr_w1"] = n(a, c)
    if tucker:
        found |= {"lokr_t2": n(rank, rank, *kernel), "lokr_w2_a": n(rank, b, size=0.2), "lokr_w2_b": n(rank, d)}
    elif two:
        found |= {"lokr_w2_a": n(b, rank, size=0.2), "lokr_w2_b": n(rank, d * math.prod(kernel))}
    else:
        found["lokr_w2"] = n(b, d, *kernel, size=0.2)
    return found


def lokr_one(n: Numbers, *shape: int) -> Roles:
    return lokr(n, *shape, one=True)


def lokr_two(n: Numbers, *shape: int) -> Roles:
    return lokr(n, *shape, two=True)


def lokr_both(n: Numbers, *shape: int) -> Roles:
    return lokr(n, *shape, one=True, two=True)


def lokr_tucker(n: Numbers, *shape: int) -> Roles:
    return lokr(n, *shape, tucker=True)


def full(n: Numbers, *shape: int) -> Roles:
    return {"diff": n(*shape, size=0.05), "diff_b": n(shape[0], size=0.05)}


def diff_alone(n: Numbers, *shape: int) -> Roles:
    return {"diff": n(*shape, size=0.05)}


def norm(n: Numbers, *shape: int) -> Roles:
    return {"w_norm": n(*shape, size=0.05), "b_norm": n(*shape, size=0.05)}


def ia3(n: Numbers, *shape: int, on_input: bool) -> Roles:
    size = shape[int(on_input)]
    axes = (1, size, *(1 for _ in shape[2:])) if len(shape) > 2 else (size,)
    side = torch.tensor(int(on_input))  # a saved type is the type of every tensor of a file
    return {"weight": n(*axes, size=0.3), "on_input": side if n.dtype == torch.float32 else side.to(n.dtype)}


def ia3_in(n: Numbers, *shape: int) -> Roles:
    return ia3(n, *shape, on_input=True)


def ia3_out(n: Numbers, *shape: int) -> Roles:
    return ia3(n, *shape, on_input=False)


def dora(made: Callable[..., Roles], inputs: bool = False) -> Callable[..., Roles]:
    """Return a maker that adds magnitudes of W's rows, or of its inputs."""

    def make(n: Numbers, *shape: int) -> Roles:
        axes = [1] * len(shape)
        axes[int(inputs)] = shape[int(inputs)]
        return {**made(n, *shape), "dora_scale": n.magnitudes(*axes)}

    return make


def glora_added(n: Numbers, out: int, *inp: int) -> Roles:
    """Make the part of GLoRA that is added, which is LoRA by other names."""
    ones = (1,) * (len(inp) - 1)
    return {"b1.weight": n(out, 3, *ones, size=0.2), "b2.weight": n(3, *inp), "alpha": n.number(4.0)}


def glora(n: Numbers, out: int, *inp: int) -> Roles:
    ones = (1,) * (len(inp) - 1)
    return {
        **glora_added(n, out, *inp),
        "a1.weight": n(inp[0], 3, *ones, size=0.2),
        "a2.weight": n(3, inp[0], *ones, size=0.2),
    }


def diag_oft(n: Numbers, out: int, *inp: int, alpha: float = 0.0) -> Roles:
    rescale = n.magnitudes(out, *(1 for _ in inp))
    return {"oft_blocks": n(out // 5, 5, 5, size=0.1), "rescale": rescale, "alpha": n.number(alpha)}


def diag_oft_bound(n: Numbers, out: int, *inp: int) -> Roles:
    return diag_oft(n, out, *inp, alpha=0.01)


def kohya_oft(n: Numbers, out: int, *inp: int) -> Roles:
    return {"oft_blocks": n(out // 5, 5, 5, size=0.1), "alpha": n.number(0.03)}


def boft(n: Numbers, out: int, *inp: int) -> Roles:
    """Make BOFT with blocks of half of the outputs, and two factors."""
    rescale = n.magnitudes(out, *(1 for _ in inp))
    return {"oft_blocks": n(2, 2, out // 2, out // 2, size=0.1), "rescale": rescale, "alpha": n.number(0.0)}


def tlora(n: Numbers, out: int, *inp: int) -> Roles:
    return {
        "q_layer.weight": n(3, *inp),
        "p_layer.weight": n(out, 3),
        "lambda_layer": n(1, 3),
        "alpha": n.number(3.0),
    }


# kind -> (layer of the base, what makes its tensors)
KINDS: dict[str, tuple[str, Callable[..., Roles]]] = {
    "lora": ("linear", lora),
    "lora conv": ("conv", lora),
    "rs-lora": ("linear", rs_lora),
    "lora_mid": ("conv", lora_mid),
    "loha": ("linear", loha),
    "loha conv": ("conv", loha),
    "loha tucker": ("conv", loha_tucker),
    "lokr full": ("linear", lokr),
    "lokr w1": ("linear", lokr_one),
    "lokr w2": ("linear", lokr_two),
    "lokr both": ("linear", lokr_both),
    "lokr conv full": ("conv", lokr),
    "lokr conv w2": ("conv", lokr_two),
    "lokr tucker": ("conv", lokr_tucker),
    "lokr conv1d full": ("conv1d", lokr),
    "full": ("linear", full),
    "full conv": ("conv", full),
    "diff": ("linear", diff_alone),
    "norm": ("norm", norm),
    "ia3 in": ("linear", ia3_in),
    "ia3 out": ("linear", ia3_out),
    "ia3 conv in": ("conv", ia3_in),
    "ia3 conv out": ("conv", ia3_out),
    "dora": ("linear", dora(lora)),
    "dora in": ("linear", dora(lora, inputs=True)),
    "dora conv": ("conv", dora(lora)),
    "dora conv in": ("conv", dora(lora, inputs=True)),
    "dora lora_mid": ("conv", dora(lora_mid)),
    "dora lora_mid in": ("conv", dora(lora_mid, inputs=True)),
    "dora loha": ("linear", dora(loha)),
    "dora loha in": ("linear", dora(loha, inputs=True)),
    "dora loha tucker": ("conv", dora(loha_tucker)),
    "dora loha tucker in": ("conv", dora(loha_tucker, inputs=True)),
    "dora lokr": ("linear", dora(lokr_both)),
    "dora lokr in": ("linear", dora(lokr_two, inputs=True)),
    "dora lokr conv": ("conv", dora(lokr_two)),
    "dora lokr tucker in": ("conv", dora(lokr_tucker, inputs=True)),
    "glora added": ("linear", glora_added),
    "glora added conv": ("conv", glora_added),
    "glora": ("linear", glora),
    "glora conv": ("conv", glora),
    "diag-oft": ("linear", diag_oft),
    "diag-oft bound": ("linear", diag_oft_bound),
    "diag-oft conv": ("conv", diag_oft),
    "boft": ("even", boft),
}
# those that need what is not in the file
REFUSED: dict[str, tuple[str, Callable[..., Roles]]] = {
    "t-lora": ("linear", tlora),
}


@dataclass(frozen=True)
class Base:
    """A model of one layer, blocks.0.<layer>, with a bias."""

    layer: str
    dtype: torch.dtype
    weight: Tensor
    bias: Tensor

    @property
    def path(self) -> str:
        return f"blocks.0.{self.layer}"

    def write(self, file: Path) -> Path:
        save_file({f"{self.path}.weight": self.weight, f"{self.path}.bias": self.bias}, file)
        return file


def base_of(layer: str, dtype: torch.dtype, seed: int = 100) -> Base:
    n, shape = Numbers(dtype, seed), SHAPES[layer]
    return Base(layer, dtype, n(*shape, size=0.3), n(shape[0], size=0.3))


def roles_of(kind: str, dtype: torch.dtype, seed: int = 0) -> Roles:
    """Return the tensors of a kind of LyCORIS by their roles."""
    layer, make = {**KINDS, **REFUSED}[kind]
    return make(Numbers(dtype, seed), *SHAPES[layer])


def module_name(path: str, container: str) -> str:
    prefix, flat = CONTAINERS.get(container, KOHYAS_OFT)
    return prefix + (path.replace(".", "_") if flat else path)


def write_lycoris(file: Path, modules: Mapping[str, Roles], container: str = "kohya") -> Path:
    """Write modules, path -> roles, into one file."""
    tensors = {
        f"{module_name(path, container)}.{role}": tensor.contiguous()
        for path, roles in modules.items()
        for role, tensor in roles.items()
    }
    save_file(tensors, file, metadata=METADATA if container == "kohya" else None)
    return file


@dataclass(frozen=True)
class Peft:
    """An adapter of PEFT for one layer: its tensors by role, those that all modules share, and its config."""

    layer: str
    roles: Roles
    config: Mapping[str, Any]
    shared: Roles = field(default_factory=dict)  # name below base_model. -> tensor

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = f"blocks.0.{self.layer}"
        tensors = {f"base_model.model.{path}.{role}": tensor for role, tensor in self.roles.items()}
        tensors |= {f"base_model.{name}": tensor for name, tensor in self.shared.items()}
        save_file(
            {name: x.contiguous() for name, x in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        fields = {"target_modules": [path], "peft_version": "0.21.2", **self.config}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        return folder


def _without_alpha(roles: Roles) -> Roles:
    return {role: tensor for role, tensor in roles.items() if role != "alpha"}


def loha_peft1d(n: Numbers, out: int, inp: int, kernel: int) -> Roles:
    """Make LoHa's tensors as PEFT has them for a convolution of one axis, whose cores have two."""
    return loha_tucker(n, out, inp, kernel, 1)


def lokr_peft1d(n: Numbers, out: int, inp: int, kernel: int) -> Roles:
    return lokr_tucker(n, out, inp, kernel, 1)


def _product(kind: str, layer: str, made: Callable[..., Roles], rank: int, **config: Any) -> Callable[[Numbers], Peft]:
    """Return a maker of PEFT's LoHa or LoKr, whose roles are LyCORIS's and whose alpha is in the config."""

    def make(n: Numbers) -> Peft:
        fields = {"peft_type": kind, "r": rank, "alpha": 4, "rank_pattern": {}, "alpha_pattern": {}, **config}
        return Peft(layer, _without_alpha(made(n, *SHAPES[layer])), fields)

    return make


def _peft_ia3(layer: str, feedforward: bool) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        out, inp, *kernel = SHAPES[layer]
        shape = (1, inp if feedforward else out, *(1 for _ in kernel)) if kernel or feedforward else (out, 1)
        path = f"blocks.0.{layer}"
        config = {"peft_type": "IA3", "feedforward_modules": [path] if feedforward else [], "fan_in_fan_out": False}
        return Peft(layer, {"ia3_l": n.magnitudes(*shape)}, config)

    return make


def _adalora(layer: str, pruned: bool) -> Callable[[Numbers], Peft]:
    """Return a maker of AdaLoRA; if `pruned`, `rank_pattern` tells which two of four ranks are left in the file."""

    def make(n: Numbers) -> Peft:
        out, inp, *kernel = SHAPES[layer]
        rank = 2 if pruned else 4
        roles = {"lora_A": n(rank, inp * math.prod(kernel)), "lora_E": n(rank, 1), "lora_B": n(out, rank, size=0.2)}
        pattern = {f"blocks.0.{layer}.lora_E": [True, False, False, True]} if pruned else None
        config = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "r": 8, "lora_alpha": 3, "total_step": 10}
        return Peft(layer, roles, {**config, "rank_pattern": pattern, "fan_in_fan_out": False})

    return make


def _vera(n: Numbers) -> Peft:
    """VeRA with projections wider and taller than the layer, as a larger layer of the model needs them."""
    out, inp = SHAPES["linear"]
    roles = {"vera_lambda_b": n(out, size=0.2), "vera_lambda_d": n(3)}
    shared = {"vera_A": n(3, inp + 2), "vera_B": n(out + 3, 3)}
    return Peft("linear", roles, {"peft_type": "VERA", "r": 3, "save_projection": True}, shared)


def _miss(rank: int, **config: Any) -> Callable[[Numbers], Peft]:
    """Return a maker of MiSS; 6 inputs are two blocks of `rank` 3, and a remainder of other ranks."""

    def make(n: Numbers) -> Peft:
        width = config["mini_r"] if config.get("init_weights") == "mini" else SHAPES["even"][0]
        return Peft("even", {"miss_block": n(rank, width)}, {"peft_type": "MISS", "r": rank, **config})

    return make


def _bone(n: Numbers) -> Peft:
    return Peft("even", {"bone_block": n(3, SHAPES["even"][0])}, {"peft_type": "BONE", "r": 3, "init_weights": True})


def _gralora(k: int, rank: int, hybrid: int = 0) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        out, inp = SHAPES["even"]
        roles = {"gralora_A": n(k, inp // k, rank), "gralora_B": n(k, rank, out // k, size=0.2)}
        if hybrid:
            roles |= {"gralora_A_general.weight": n(hybrid, inp), "gralora_B_general.weight": n(out, hybrid, size=0.2)}
        config = {"peft_type": "GRALORA", "r": rank, "hybrid_r": hybrid, "gralora_k": k, "alpha": 5}
        return Peft("even", roles, config)

    return make


def _c3a(n: Numbers) -> Peft:
    out, inp = SHAPES["even"]
    return Peft("even", {"c3a_kernel": n(out // 3, inp // 3, 3)}, {"peft_type": "C3A", "block_size": 3})


def _pvera(n: Numbers) -> Peft:
    """PVeRA with projections wider and taller than the layer; the second halves have no part in a merge."""
    out, inp = SHAPES["linear"]
    roles = {"pvera_lambda_b": n(out, size=0.2), "pvera_lambda_d": n(6)}
    shared = {"pvera_A": n(6, inp + 2), "pvera_B": n(out + 3, 3)}
    return Peft("linear", roles, {"peft_type": "PVERA", "r": 3, "save_projection": True}, shared)


def _randlora(out: int, inp: int, layer: str, copies: bool = False) -> Callable[[Numbers], Peft]:
    """Return a maker of RandLoRA with larger matrices than the layer needs; `copies`: below the module as well."""

    def make(n: Numbers) -> Peft:
        low, high = sorted((out, inp))
        bases = -(-low // 4)
        roles = {"randlora_lambda": n(4, bases), "randlora_gamma": n(bases, low)}
        shared = {"randlora_A": n(4, 1, low + 1), "randlora_B": n(high + 2, -(-(low + 1) // 4), 4, size=0.2)}
        config = {
            "peft_type": "RANDLORA",
            "r": 4,
            "randlora_alpha": 3,
            "save_projection": True,
            "fan_in_fan_out": False,
        }
        return Peft(
            layer, {**roles, **({name: x.clone() for name, x in shared.items()} if copies else {})}, config, shared
        )

    return make


def _shira(places: torch.dtype = torch.int32, twice: int = 0) -> Callable[[Numbers], Peft]:
    """Return a maker of SHiRA; the first `twice` places are there again, and half of them a third time."""

    def make(n: Numbers) -> Peft:
        out, inp = SHAPES["linear"]
        flat = torch.randperm(out * inp, generator=n.generator)[: 2 * (out + inp) - twice - twice // 2]
        flat = torch.cat([flat, flat[:twice], flat[: twice // 2]])
        indices = torch.stack([flat // inp, flat % inp]).to(places)
        return Peft("linear", {"shira_weight": n(len(flat)), "shira_indices": indices}, {"peft_type": "SHIRA", "r": 2})

    return make


def _supertuning(rank: int | None) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        out, inp = SHAPES["linear"]
        flat = torch.randperm(out * inp, generator=n.generator)[:40].to(torch.int32)
        roles = {"supertuning_values": n(40), "supertuning_indices": flat}
        if rank:
            roles |= {"supertuning_lora_A.weight": n(rank, inp), "supertuning_lora_B.weight": n(out, rank, size=0.2)}
        sparsity = 1 - 40.5 / (out * inp)
        return Peft(
            "linear",
            roles,
            {"peft_type": "SUPERTUNING", "r": rank, "lora_alpha": 5 if rank else None, "sparsity": sparsity},
        )

    return make


def _beft(n: Numbers) -> Peft:
    return Peft("linear", {"beft_bias": n(1, SHAPES["linear"][0])}, {"peft_type": "BEFT"})


def _unilora(n: Numbers) -> Peft:
    (out, inp), rank, length = SHAPES["linear"], 3, 20
    roles: Roles = {}
    for side, shape in (("A", (rank, inp)), ("B", (out, rank))):
        roles[f"unilora_indices_{side}"] = torch.randint(length, shape, generator=n.generator)
        roles[f"unilora_scales_{side}"] = n.magnitudes(*shape)
    config = {"peft_type": "UNILORA", "r": rank, "theta_d_length": length, "save_indices": True}
    return Peft("linear", roles, config, {"unilora_theta_d": n(length)})


def _unilora_alone(n: Numbers) -> Peft:
    made = _unilora(n)
    return Peft(made.layer, {}, {**made.config, "save_indices": False}, made.shared)


def _tinylora(n: Numbers) -> Peft:
    (out, inp), rank, u = SHAPES["linear"], 2, 5
    roles = {"tinylora_A": n(rank, inp), "tinylora_B": n(out, rank), "tinylora_P": n(u, rank, rank)}
    config = {"peft_type": "TINYLORA", "r": rank, "u": u, "weight_tying": 1.0, "save_projection": True}
    return Peft("linear", roles, config, {"tinylora_v.0": n(u)})


def _tinylora_alone(n: Numbers) -> Peft:
    made = _tinylora(n)
    roles = {role: x for role, x in made.roles.items() if role != "tinylora_P"}
    return Peft(made.layer, roles, {**made.config, "save_projection": False}, made.shared)


def _vblora(n: Numbers) -> Peft:
    """VB-LoRA with vectors of 1 number, because the layer's sizes have no other divisor."""
    (out, inp), rank, count, k = SHAPES["linear"], 2, 7, 3
    roles: Roles = {}
    for side, cells in (("A", (rank, inp)), ("B", (out, rank))):
        drawn = torch.rand((*cells, count), generator=n.generator).argsort(-1)[..., :k]
        weights = torch.rand((*cells, k), generator=n.generator).add(0.2)
        roles[f"vblora_logits_{side}_topk_indices"] = drawn.to(torch.uint8)
        roles[f"vblora_logits_{side}_topk_weights"] = (weights / weights.sum(-1, True))[..., :-1].to(n.dtype)
    config = {"peft_type": "VBLORA", "r": rank, "num_vectors": count, "vector_length": 1, "topk": k}
    return Peft("linear", roles, {**config, "save_only_topk_weights": True}, {"vblora_vector_bank": n(count, 1)})


def _vblora_logits(n: Numbers) -> Peft:
    (out, inp), rank, count = SHAPES["linear"], 2, 7
    roles = {"vblora_logits_A": n(rank, inp, count), "vblora_logits_B": n(out, rank, count)}
    config = {"peft_type": "VBLORA", "r": rank, "num_vectors": count, "vector_length": 1, "topk": 2}
    return Peft("linear", roles, config, {"vblora_vector_bank": n(count, 1)})


def _delora(n: Numbers) -> Peft:
    (out, inp), rank = SHAPES["linear"], 3
    roles = {
        "delora_A": n(rank, inp),
        "delora_B": n(out, rank),
        "delora_lambda": n.magnitudes(1) * 8,
        "delora_w_norm": n(inp).abs(),
    }
    return Peft("linear", roles, {"peft_type": "DELORA", "r": rank, "delora_lambda": 15})


def _oft(layer: str, blocks: int, b: int, **config: Any) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        roles = {"oft_R.weight": n(blocks, b * (b - 1) // 2, size=0.2)}
        return Peft(layer, roles, {"peft_type": "OFT", "r": 0, "oft_block_size": b, **config})

    return make


def _old_oft(scaled: bool, **config: Any) -> Callable[[Numbers], Peft]:
    """Return a maker of PEFT 0.15's OFT, or without scales of 0.13's, whose last block is cut."""

    def make(n: Numbers) -> Peft:
        roles: Roles = {"oft_r": n(2, 3, 3, size=0.3)} if scaled else {"oft_r": n(4, 7, 7, size=0.2)}
        if scaled:
            roles["oft_s"] = n.magnitudes(SHAPES["linear"][0], 1)
        return Peft("linear", roles, {"peft_type": "OFT", "r": 2 if scaled else 4, "peft_version": None, **config})

    return make


def _boft(layer: str, factors: int, blocks: int, b: int) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        roles = {"boft_R": n(factors, blocks, b, b, size=0.2), "boft_s": n.magnitudes(SHAPES[layer][0], 1)}
        return Peft(layer, roles, {"peft_type": "BOFT", "boft_block_size": b, "boft_block_num": 0})

    return make


def _bat(kind: str) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        role = f"{kind.lower()}_block"
        return Peft("even", {role: n(4, 3, 3, size=0.2)}, {"peft_type": kind, "r": 3, "init_weights": "bat"})

    return make


def _road(variant: str, count: int) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        roles = {"road_theta": n(count), "road_alpha": n.magnitudes(count)}
        return Peft("even", roles, {"peft_type": "ROAD", "variant": variant, "group_size": 4})

    return make


def _hra(layer: str, apply_gs: bool) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        inputs = math.prod(SHAPES[layer][1:])
        return Peft(layer, {"hra_u": n(inputs, 2)}, {"peft_type": "HRA", "r": 2, "apply_GS": apply_gs})

    return make


def _hira(layer: str) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        out, *inp = SHAPES[layer]
        ones = (1,) * (len(inp) - 1)
        roles = {"hira_A": n(3, *inp, size=0.3), "hira_B": n(out, 3, *ones, size=0.3)}
        return Peft(layer, roles, {"peft_type": "HIRA", "r": 3})

    return make


def _glora_of_peft(paths: str, weighed: str = "none") -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        out, inp = SHAPES["linear"]
        roles: Roles = {}
        for path in "AB":
            if paths == "lora":
                roles |= {f"glora_{path}.Xd": n(out, 3, size=0.3), f"glora_{path}.Xu": n(3, inp, size=0.3)}
            else:
                roles[f"glora_{path}.X"] = n(out, 1, size=0.3) if paths == "vector" else n(1, size=0.3)
        for path in "DE":
            roles[f"glora_{path}.X"] = n(1, size=0.3) if paths == "constant" else n(out, size=0.3)
        if weighed == "lora":
            roles |= {"glora_C.Xd": n(inp, 3, size=0.3), "glora_C.Xu": n(3, 1, size=0.3)}
        elif weighed == "vector":
            roles["glora_C.X"] = n(inp, 1, size=0.3)
        else:
            roles["glora_C.zeros"] = torch.zeros(inp, 1, dtype=n.dtype)
        return Peft("linear", roles, {"peft_type": "GLORA", "r": 3, "config_A_B": paths, "config_C": weighed})

    return make


def _deft(**config: Any) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        out, inp = SHAPES["linear"]
        roles = {"deft_P": n(out, 2, size=0.3), **({} if config.get("para") else {"deft_R": n(2, inp, size=0.3)})}
        return Peft("linear", roles, {"peft_type": "DEFT", "r": 2, "decomposition_method": "relu", **config})

    return make


def _peanut(depth: int) -> Callable[[Numbers], Peft]:
    def make(n: Numbers) -> Peft:
        out, _ = SHAPES["linear"]
        roles = {"peanut_A.weight": n(3, out, size=0.3), "peanut_B.weight": n(out, 3, size=0.3)}
        for side in ("encoders", "decoders"):
            roles |= {f"peanut_{side}.{i}.weight": n(3, 3) for i in range(depth)}
        config = {"peft_type": "PEANUT", "r": 3, "depth": depth, "act_fn": "relu", "scaling": 0.7}
        return Peft("linear", roles, config)

    return make


def _fourierft(layer: str, count: int) -> Callable[[Numbers], Peft]:
    """Return a maker of FourierFT; its frequencies are drawn by a seed."""

    def make(n: Numbers) -> Peft:
        config = {"peft_type": "FOURIERFT", "n_frequency": count, "scaling": 30.0, "random_loc_seed": 777}
        return Peft(layer, {"fourierft_spectrum": n(count)}, {**config, "fan_in_fan_out": False})

    return make


def _waveft(layer: str, count: int, wavelet: str | None) -> Callable[[Numbers], Peft]:
    """Return a maker of WaveFT; without a wavelet the numbers are those of the weight."""

    def make(n: Numbers) -> Peft:
        own = {"wavelet_family": wavelet or "db1", "use_idwt": wavelet is not None, "fan_in_fan_out": False}
        config = {"peft_type": "WAVEFT", "n_frequency": count, "scaling": 0.3, "random_loc_seed": -5}
        return Peft(layer, {"waveft_spectrum": n(count)}, {**config, **own})

    return make


# kind -> what makes the adapter
PEFT_KINDS: dict[str, Callable[[Numbers], Peft]] = {
    "loha": _product("LOHA", "linear", loha, 3),
    "loha conv": _product("LOHA", "conv", loha, 3),
    "loha tucker": _product("LOHA", "conv", loha_tucker, 3, use_effective_conv2d=True),
    "loha conv1d tucker": _product("LOHA", "conv1d", loha_peft1d, 3, use_effective_conv2d=True),
    "loha alpha_pattern": _product("LOHA", "linear", loha, 8, rank_pattern={"linear": 3}, alpha_pattern={"linear": 5}),
    "lokr full": _product("LOKR", "linear", lokr, 3),
    "lokr w2": _product("LOKR", "linear", lokr_two, 2),
    "lokr both": _product("LOKR", "linear", lokr_both, 2, decompose_both=True),
    "lokr conv full": _product("LOKR", "conv", lokr, 3),
    "lokr conv w2": _product("LOKR", "conv", lokr_two, 2),
    "lokr tucker": _product("LOKR", "conv", lokr_tucker, 2, use_effective_conv2d=True),
    "lokr conv1d tucker": _product("LOKR", "conv1d", lokr_peft1d, 2, use_effective_conv2d=True),
    "lokr conv1d full": _product("LOKR", "conv1d", lokr, 3),
    "ia3": _peft_ia3("linear", False),
    "ia3 feedforward": _peft_ia3("linear", True),
    "ia3 conv": _peft_ia3("conv", False),
    "ia3 conv feedforward": _peft_ia3("conv", True),
    "adalora": _adalora("linear", False),
    "adalora pruned": _adalora("linear", True),
    "adalora conv": _adalora("conv", False),
    "vera": _vera,
    "miss": _miss(3),
    "miss remainder": _miss(4, init_weights=False),
    "miss mini": _miss(4, init_weights="mini", mini_r=3),
    "bone": _bone,
    "gralora": _gralora(2, 4),
    "gralora hybrid": _gralora(3, 3, 2),
    "c3a": _c3a,
    "pvera": _pvera,
    "randlora": _randlora(*SHAPES["linear"], "linear"),
    "shira": _shira(),
    "shira twice": _shira(torch.float32, twice=6),
    "supertuning": _supertuning(None),
    "supertuning lora": _supertuning(3),
    "randlora wide": _randlora(*SHAPES["wide"], "wide", copies=True),
    "unilora": _unilora,
    "tinylora": _tinylora,
    "vblora": _vblora,
    "vblora logits": _vblora_logits,
    "delora": _delora,
    "beft": _beft,
    "oft": _oft("linear", 2, 3),
    "oft cayley": _oft("linear", 2, 3, use_cayley_neumann=False),
    "oft shared": _oft("linear", 1, 3, block_share=True),
    "oft coft": _oft("linear", 2, 3, coft=True, eps=0.2, use_cayley_neumann=False),
    "oft three terms": _oft("linear", 2, 3, num_cayley_neumann_terms=3),
    "oft 0.17": _oft("linear", 2, 3, peft_version=None),
    "oft conv": _oft("conv", 12, 3),
    "oft 0.15": _old_oft(True, coft=True, eps=0.3),
    "oft 0.13": _old_oft(False, coft=True, eps=0.02),
    "boft": _boft("linear", 1, 3, 2),
    "boft factors": _boft("wide", 3, 4, 2),
    "miss bat": _bat("MISS"),
    "bone bat": _bat("BONE"),
    "road": _road("road_1", 6),
    "road 2": _road("road_2", 12),
    "road 4": _road("road_4", 24),
    "hra": _hra("linear", False),
    "hra conv GS": _hra("conv", True),
    "hira": _hira("linear"),
    "hira conv": _hira("conv"),
    "glora": _glora_of_peft("lora"),
    "glora vector": _glora_of_peft("vector"),
    "glora constant": _glora_of_peft("constant"),
    "glora weighed": _glora_of_peft("lora", "lora"),
    "glora weighed vector": _glora_of_peft("vector", "vector"),
    "deft": _deft(alpha=3),
    "deft para": _deft(para=True),
    "deft qr": _deft(alpha=3, decomposition_method="qr"),
    "peanut": _peanut(0),
    "peanut deep": _peanut(2),
    "fourierft": _fourierft("linear", 20),
    "fourierft even": _fourierft("wide", 40),
    "waveft": _waveft("linear", 30, "db1"),
    "waveft longer": _waveft("even", 9, "db2"),
    "waveft plain": _waveft("linear", 50, None),
}


def _without_places(n: Numbers) -> Peft:
    made = _supertuning(None)(n)
    roles = {role: x for role, x in made.roles.items() if role != "supertuning_indices"}
    return Peft(made.layer, roles, {**made.config, "save_precomputed_indices": False})


def _alone(make: Callable[[Numbers], Peft]) -> Callable[[Numbers], Peft]:
    """Return a maker of the adapter without its projections."""

    def alone(n: Numbers) -> Peft:
        made = make(n)
        return Peft(made.layer, made.roles, {**made.config, "save_projection": False})

    return alone


def _xlora(n: Numbers) -> Peft:
    shared = {"internal_xlora_classifier.layers.0.weight": n(4, 6)}
    return Peft("linear", {}, {"peft_type": "XLORA", "hidden_size": 6, "adapters": {"0": "one", "1": "two"}}, shared)


# those that need what is not in the file, or no fraction
PEFT_REFUSED: dict[str, Callable[[Numbers], Peft]] = {
    "lokr conv1d w1": _product("LOKR", "conv1d", lokr_one, 2, decompose_both=True),
    "vera without projections": _alone(_vera),
    "supertuning without places": _without_places,
    "pvera without projections": _alone(_pvera),
    "randlora without projections": _alone(_randlora(*SHAPES["linear"], "linear")),
    "unilora without indices": _unilora_alone,
    "tinylora without projections": _tinylora_alone,
    "xlora": _xlora,
}


def peft_of(kind: str, dtype: torch.dtype, seed: int = 0) -> Peft:
    """Return an adapter of a kind of PEFT."""
    return {**PEFT_KINDS, **PEFT_REFUSED}[kind](Numbers(dtype, seed))
