"""Hold the formulas of `dense_oracle.py` against lycoris-lora, ComfyUI's formula and peft, in float64.

What is compared is the forward pass. LyCORIS's own merge (`get_merged_weight`) multiplies LoHa and LoKr by alpha / r
twice, which a test here shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lib.files.lycoris_files import KINDS, PEFT_KINDS, SHAPES, Base, base_of, peft_of, roles_of, write_lycoris
from lib.oracles.dense_oracle import lycoris_updates, merged_reals, peft_updates
from torch import Tensor, nn

pytestmark = pytest.mark.slow

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
TOLERANCE = 1e-10  # of a norm that is rounded to 36 bits, where they have 53
# what LyCORIS writes and cannot load again from a file alone
NOT_LOADED = {
    "lokr w1": "makes factors of w1 only where it makes those of w2",
    "lokr tucker": "takes w2_a's columns for the rank, which are its outputs",
    **{kind: "hands on_input to a method that has no place for it" for kind in KINDS if kind.startswith("ia3")},
    **{kind: "makes every dora_scale one of outputs" for kind in KINDS if kind.startswith("dora") and " in" in kind},
    **{kind: "knows it by a1, which is not there" for kind in KINDS if kind.startswith("glora")},
}


def layer_of(base: Base) -> nn.Module:
    """Return the base's layer in torch, in float64."""
    shape = base.weight.shape
    layer: nn.Module
    if base.layer in ("linear", "even", "wide"):
        layer = nn.Linear(shape[1], shape[0])
    elif base.layer == "conv":
        layer = nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]))
    elif base.layer == "conv1d":
        layer = nn.Conv1d(shape[1], shape[0], shape[2])
    else:
        layer = nn.LayerNorm(shape[0])
    layer.double().requires_grad_(False)
    layer.load_state_dict({"weight": base.weight.double(), "bias": base.bias.double()})
    return layer


def model_of(base: Base) -> nn.Module:
    """Return a model whose only layer is the base's, by its path."""
    model, block = nn.Module(), nn.Module()
    model.blocks = nn.ModuleList([block])
    block.add_module(base.layer, layer_of(base))
    return model


def inputs_of(base: Base) -> Tensor:
    shape = {
        "linear": (4, 6),
        "even": (4, 6),
        "wide": (4, 8),
        "conv": (2, 6, 5, 5),
        "conv1d": (2, 6, 5),
        "norm": (4, 25),
    }[base.layer]
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def forward(base: Base, weight: Tensor, bias: Tensor) -> Tensor:
    x = inputs_of(base)
    if base.layer == "norm":
        return F.layer_norm(x, (len(weight),), weight, bias)
    operator = {"linear": F.linear, "even": F.linear, "wide": F.linear, "conv": F.conv2d, "conv1d": F.conv1d}[
        base.layer
    ]
    return operator(x, weight, bias)


def check(found: Tensor, base: Base, updates: Mapping[str, Any], tolerance: float = TOLERANCE) -> None:
    wanted = forward(base, *merged_reals(base, updates))
    assert (wanted - forward(base, base.weight.double(), base.bias.double())).abs().max() > 0.01  # it does something
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def weights_of(kind: str) -> tuple[float, ...]:
    """Return the weights with which LyCORIS's multiplier means what ours do: DoRA's D is not multiplied by it."""
    return (1.0,) if kind.startswith("dora") else (1.0, 0.7, -2.0)


def built(roles: Mapping[str, Tensor], base: Base) -> Any:
    """Build LyCORIS's module for a layer as its trainer does, from options, and set its tensors."""
    from lycoris.modules.full import FullModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

    layer = layer_of(base)
    if "w_norm" in roles:
        module = NormModule("x", layer)
    elif "diff" in roles:
        module = FullModule("x", layer)
        roles = {{"diff": "weight", "diff_b": "bias"}[role]: tensor for role, tensor in roles.items()}
    elif "on_input" in roles:
        module = IA3Module("x", layer, train_on_input=bool(roles["on_input"]))
        roles = {"weight": roles["weight"]}
    else:
        m = roles.get("dora_scale")
        options: dict[str, Any] = {"alpha": float(roles.get("alpha", 0))}
        if m is not None:
            options |= {"weight_decompose": True, "wd_on_out": m.shape[0] != 1}
        if "hada_w1_a" in roles:
            module = LohaModule("x", layer, 1.0, len(roles["hada_w1_b"]), use_tucker="hada_t1" in roles, **options)
        elif "b1.weight" in roles:
            module = GLoRAModule("x", layer, 1.0, len(roles["b2.weight"]), **options)  # a2 is zero
        elif "lora_up.weight" in roles:
            tucker = "lora_mid.weight" in roles
            module = LoConModule("x", layer, 1.0, len(roles["lora_down.weight"]), use_tucker=tucker, **options)
        else:
            rank = next((len(roles[f"lokr_{w}_b"]) for w in ("w1", "w2") if f"lokr_{w}_b" in roles), None)
            options |= {"full_matrix": rank is None, "decompose_both": "lokr_w1_a" in roles}
            module = LokrModule("x", layer, 1.0, rank or 7, use_tucker="lokr_t2" in roles, **options)
            if "lokr_w1_a" in roles and "lokr_w2" in roles:  # no option gives factors to the first alone
                module.lokr_w2, module.use_w2 = nn.Parameter(torch.empty(roles["lokr_w2"].shape)), True
                del module.lokr_w2_a, module.lokr_w2_b
        roles = {role: tensor for role, tensor in roles.items() if role != "alpha"}
    module.double()
    for role, tensor in roles.items():
        module.get_parameter(role).data.copy_(tensor)  # shapes that broadcast would be a mistake here
        assert module.get_parameter(role).shape == tensor.shape, role
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_trains_the_same(kind: str, dtype: torch.dtype) -> None:
    """The module that a trainer makes of options, with the tensors of the file."""
    pytest.importorskip("lycoris")
    base, roles = base_of(KINDS[kind][0], dtype), roles_of(kind, dtype)
    module = built(roles, base)
    for weight in weights_of(kind):
        module.multiplier = weight
        check(module(inputs_of(base)), base, lycoris_updates(roles, SHAPES[base.layer], weight))


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_loads_the_file(tmp_path: Path, kind: str) -> None:
    wrapper = pytest.importorskip("lycoris.wrapper")
    base, roles = base_of(KINDS[kind][0], FP32), roles_of(kind, FP16)
    file = write_lycoris(tmp_path / "a.safetensors", {base.path: roles}, "lycoris")
    if kind in NOT_LOADED:
        with pytest.raises((AttributeError, TypeError, RuntimeError)):
            wrapper.create_lycoris_from_weights(1.0, str(file), model_of(base))
        return
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(file), model_of(base))
    (module,) = network.loras
    check(module.double()(inputs_of(base)), base, lycoris_updates(roles, SHAPES[base.layer]))


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_writes_these_names(kind: str) -> None:
    """Its own state dict has the file's names and shapes, and an alpha that is read as the same scale."""
    pytest.importorskip("lycoris")
    base, roles = base_of(KINDS[kind][0], FP32), roles_of(kind, FP32)
    module = built(roles, base)
    theirs = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("dtype_tensor")}
    ours = {role: tuple(tensor.shape) for role, tensor in roles.items()}
    if kind.startswith("glora"):
        theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith("a")} | {
            "alpha": theirs["alpha"]
        }
    if kind == "diff":
        theirs.pop("diff_b")  # it writes one wherever the layer has a bias
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == ours
    if "alpha" in ours and not (kind.startswith("lokr") and "full" in kind):
        assert float(theirs["alpha"]) == pytest.approx(float(roles["alpha"]), rel=1e-7)


def test_rank_stabilized_alphas() -> None:
    """LyCORIS trains with alpha / sqrt(r), and saves the alpha that alpha / r makes the same of."""
    locon = pytest.importorskip("lycoris.modules.locon")
    layer = layer_of(base_of("linear", FP32))
    module = locon.LoConModule("x", layer, lora_dim=3, alpha=4, rs_lora=True)
    assert module.scale == pytest.approx(4 / math.sqrt(3))
    assert float(module.state_dict()["alpha"]) / 3 == pytest.approx(module.scale)
    assert float(roles_of("rs-lora", FP32)["alpha"]) == pytest.approx(float(module.state_dict()["alpha"]))


@pytest.mark.parametrize("kind", ["loha", "lokr w2", "lokr both", "loha tucker", "lokr conv w2"])
def test_lycoris_own_merge_scales_twice(kind: str) -> None:
    """So that no one holds ours against it."""
    pytest.importorskip("lycoris")
    base, roles = base_of(KINDS[kind][0], FP32), roles_of(kind, FP32)
    merged, _ = built(roles, base).get_merged_weight(1.0, base.weight.shape)
    scaled = dict(roles, alpha=roles["alpha"].double() ** 2 / len(roles[next(n for n in roles if n.endswith("_b"))]))
    twice, _ = merged_reals(base, lycoris_updates(scaled, SHAPES[base.layer]))
    once, _ = merged_reals(base, lycoris_updates(roles, SHAPES[base.layer]))
    torch.testing.assert_close(merged, twice, rtol=TOLERANCE, atol=TOLERANCE)
    assert (merged - once).abs().max() > 0.05


def comfy_weight(W: Tensor, roles: Mapping[str, Tensor], strength: float) -> Tensor:
    """Return what ComfyUI makes of a weight, by the formulas of `comfy/weight_adapter/{lora,loha,lokr,base}.py`.

    They are `calculate_weight` of each class and `weight_decompose`, here in float64. `contiguous` is not theirs:
    without it `torch.kron` raises for LoKr with a core, ComfyUI logs that and leaves the weight as it is.
    """
    x = {role: tensor.double() for role, tensor in roles.items()}
    rank, core = None, "i j k l, j r, i p -> p r k l"
    if "lora_up.weight" in x:
        up, down = x["lora_up.weight"], x["lora_down.weight"]
        rank = down.shape[0]
        if (mid := x.get("lora_mid.weight")) is not None:
            shape = (down.shape[1], down.shape[0], mid.shape[2], mid.shape[3])
            down = (down.transpose(0, 1).flatten(1) @ mid.transpose(0, 1).flatten(1)).reshape(shape).transpose(0, 1)
        change = up.flatten(1) @ down.flatten(1)
    elif "hada_w1_a" in x:
        rank = x["hada_w1_b"].shape[0]
        pairs = [(x.get(f"hada_t{i}"), x[f"hada_w{i}_a"], x[f"hada_w{i}_b"]) for i in "12"]
        one, two = (a @ b if t is None else torch.einsum(core, t, b, a) for t, a, b in pairs)
        change = one * two
    else:
        one, two = x.get("lokr_w1"), x.get("lokr_w2")
        if one is None:
            rank, one = x["lokr_w1_b"].shape[0], x["lokr_w1_a"] @ x["lokr_w1_b"]
        if two is None:
            a, b, t = x["lokr_w2_a"], x["lokr_w2_b"], x.get("lokr_t2")
            rank, two = b.shape[0], a @ b if t is None else torch.einsum(core, t, b, a).contiguous()
        change = torch.kron(one[:, :, None, None] if two.dim() == 4 else one, two)
    D = change.reshape(W.shape) * (float(roles["alpha"]) / rank if rank else 1)
    if "dora_scale" not in x:
        return W + strength * D
    V = W + D
    n = V.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1 for _ in W.shape[2:]))
    return W + strength * (V * x["dora_scale"] / n - W)


# ComfyUI has no IA3, wants GLoRA's a1, and divides DoRA of outputs by the norm of W instead of W + D
# (torch.kron has a `lokr_w2` of three axes beside others than LyCORIS means)
COMFY_KINDS = [
    kind
    for kind, (layer, _) in KINDS.items()
    if (kind.split()[0] in ("lora", "rs-lora", "lora_mid", "loha", "lokr") and layer != "conv1d")
    or (kind.startswith("dora") and " in" in kind)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", COMFY_KINDS)
def test_comfyui_has_the_same_formula(kind: str, dtype: torch.dtype) -> None:
    base, roles = base_of(KINDS[kind][0], dtype), roles_of(kind, dtype)
    for weight in (1.0, 0.7, -2.0):
        wanted, _ = merged_reals(base, lycoris_updates(roles, SHAPES[base.layer], weight))
        found = comfy_weight(base.weight.double(), roles, weight)
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


# kind -> inputs and outputs of the layer of the same model for which its projections are as large as they are
LARGER = {"vera": (8, 28), "pvera": (8, 28), "randlora": (7, 27), "randlora wide": (10, 6)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in PEFT_KINDS if kind != "bone"])  # peft has it no more
def test_peft_loads_the_folder_and_makes_the_same(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Loaded by peft from the files, in its forward pass, and merged by it in float64."""
    peft = pytest.importorskip("peft")
    if kind == "vblora" and dtype != torch.float32:
        pytest.skip("peft 0.21 makes logits in float32 of the stored weights, and mixes the types")
    adapter = peft_of(kind, dtype)
    base, updates = base_of(adapter.layer, dtype), peft_updates(adapter, SHAPES[adapter.layer])
    folder, model = adapter.write(tmp_path), model_of(base)
    if larger := LARGER.get(kind):
        model.add_module("wide", nn.Linear(*larger))
        fields = {**adapter.config, "target_modules": [base.path, "wide"]}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
    loaded = peft.PeftModel.from_pretrained(model, folder).double().eval()
    layer = loaded.base_model.model.get_submodule(base.path)
    # peft rounds LoHa's alpha / r to float32, and transforms in it C3A's and FourierFT's numbers, and VB-LoRA's stored
    # weights into logits
    tolerance = {"loha": 1e-6, "c3a": 1e-6, "vblora": 1e-5, "fourierft": 1e-6}.get(kind.split()[0], TOLERANCE)
    check(layer(inputs_of(base)), base, updates, tolerance)
    layer.merge()
    check(layer(inputs_of(base)), base, updates, tolerance)


TRANSPOSED = "ia3", "ia3 feedforward", "adalora", "vera", "gralora hybrid", "pvera", "randlora"


@pytest.mark.parametrize(
    "kind", [*TRANSPOSED, "unilora", "tinylora", "vblora logits", "waveft", "waveft longer", "waveft plain"]
)
def test_peft_has_the_same_of_layers_that_store_them_transposed(tmp_path: Path, kind: str) -> None:
    """GPT-2's, whose weight is (in, out)."""
    peft = pytest.importorskip("peft")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    made = peft_of(kind, FP32)
    base = base_of(made.layer, FP32)
    adapter = replace(made, config={**made.config, "fan_in_fan_out": True})
    model, layer = nn.Module(), conv1d(*SHAPES[made.layer])
    layer.load_state_dict({"weight": base.weight.T, "bias": base.bias})
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].add_module(made.layer, layer)
    folder = adapter.write(tmp_path)
    if larger := LARGER.get(kind):
        model.add_module("wide", nn.Linear(*larger))
        fields = {**adapter.config, "target_modules": [base.path, "wide"]}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
    loaded = peft.PeftModel.from_pretrained(model, folder).double().eval()
    module = loaded.base_model.model.get_submodule(base.path)
    updates = peft_updates(made, SHAPES[made.layer])
    check(module(inputs_of(base)), base, updates)
    module.merge()
    check(module(inputs_of(base)), base, updates)


def test_peft_scrambles_lokr_of_one_dimension(tmp_path: Path) -> None:
    """Its Kronecker product with a `lokr_w2` of three axes puts `lokr_w1` beside the kernel; LyCORIS's does not."""
    peft = pytest.importorskip("peft")
    adapter, base = peft_of("lokr conv1d full", FP32), base_of("conv1d", FP32)
    loaded = peft.PeftModel.from_pretrained(model_of(base), adapter.write(tmp_path)).double()
    found = loaded.base_model.model.get_submodule(base.path).get_delta_weight("default")
    one, two = adapter.roles["lokr_w1"].double(), adapter.roles["lokr_w2"].double()
    torch.testing.assert_close(found, 4 / 3 * torch.kron(one[None], two).reshape(10, 6, 3))
    assert (found - 4 / 3 * torch.kron(one, two.flatten(1)).reshape(10, 6, 3)).abs().max() > 0.01
