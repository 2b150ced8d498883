"""Hold PEFT adapters on layers beyond linear ones: convolutions, attention in one piece, stacks of experts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, write_peft
from lib.models.peft_models import (
    DOWN,
    EAGER,
    EXPERT_SIZES,
    GATE_UP,
    ROUTER,
    agree,
    answer,
    gpt_oss,
    load,
    mixtral,
    peft,
    qwen3_moe,
    randomize,
    transformers,
    wrap,
    write_base,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loratool
from loratool.errors import InputError, NeedsFlag

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Layers(nn.Module):
    """One of each; an input for each of them, and the list of their outputs."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (3, 2)), nn.Conv3d(2, 4, (2, 3, 2))
        self.strided, self.point = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1)
        self.hf, self.embed, self.linear = Conv1D(6, 4), nn.Embedding(10, 4), nn.Linear(4, 5)

    def forward(self, seed: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        line, image, cube, row = (
            torch.randn(shape, generator=g, dtype=torch.float64)
            for shape in ((1, 4, 9), (1, 4, 8, 9), (1, 2, 5, 5, 5), (3, 4))
        )
        found = [self.conv1(line), *(conv(image) for conv in (self.conv2, self.strided, self.point)), self.conv3(cube)]
        return found + [self.hf(row), self.linear(row), self.embed(torch.arange(10))]


NAMES = [name for name, _ in Layers().named_children()]


def write_layers(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    save_file(randomize(model).state_dict(), folder / "model.safetensors")
    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def read_layers(folder: Path) -> nn.Module:
    model = Layers().double()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": NAMES},
        {"target_modules": NAMES, "use_rslora": True, "rank_pattern": {"conv2": 1}, "alpha_pattern": {"point": 7}},
        {"target_modules": NAMES, "use_dora": True},
        {"target_modules": [n for n in NAMES if n != "embed"], "lora_bias": True},
        {"target_modules": NAMES, "bias": "all"},
        {"target_modules": ["conv1"], "modules_to_save": ["conv2", "hf", "linear", "embed"]},
    ],
    ids=["lora", "patterns", "dora", "lora_bias", "bias=all", "saved"],
)
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_every_kind_of_layer(tmp_path: Path, config: dict[str, Any], weight: float) -> None:
    """Conv1D, embeddings, convolutions and DoRA each store factors in another order, and no model type helps here."""
    base = write_layers(tmp_path / "base", Layers())
    wrapped = wrap(read_layers(base), task_type=None, **config)
    wrapped.save_pretrained(tmp_path / "a")
    loratool.merge(base, (tmp_path / "a", weight), tmp_path / "out")
    with torch.no_grad():
        untouched, wanted, found = read_layers(base)(3), wrapped(3), read_layers(tmp_path / "out")(3)
    assert sum(not agree(*pair) for pair in zip(untouched, wanted, strict=True)) >= 5
    for before, full, got in zip(untouched, wanted, found, strict=True):
        assert agree(got, before + weight * (full - before))


def test_a_square_matrix_beside_both_layouts_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    """Shapes cannot tell (in, out) from (out, in) here; every option that the refusal names must end it."""

    class Square(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.square = nn.Linear(4, 4)

    base = write_layers(tmp_path / "base", Square())
    wrap(Square().double(), task_type=None, target_modules=["hf", "linear", "square"]).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="is square, and nothing tells") as caught:
        loratool.merge(base, tmp_path / "a", tmp_path / "out")
    if "fan_in_fan_out" in str(caught.value.remedy):
        edit(tmp_path / "a" / "adapter_config.json", fan_in_fan_out=False)
        loratool.merge(base, tmp_path / "a", tmp_path / "out")
    (base / "config.json").write_text('{"model_type": "llama"}')
    loratool.merge(base, tmp_path / "a", tmp_path / "out", target=["square", "linear"], force=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)


@pytest.mark.parametrize("rslora", [False, True])
def test_attention_in_one_piece(tmp_path: Path, rslora: bool) -> None:
    """The formula is the oracle: peft up to 0.21 adds the change of out_proj twice (its PR 3774)."""
    base = write_layers(tmp_path / "base", Attention())
    wrapped = wrap(Attention().double(), task_type=None, target_modules=["attn"], use_rslora=rslora)
    wrapped.save_pretrained(tmp_path / "a")
    saved, W = load_model(tmp_path / "a"), load_model(base)
    scale = 3 / 2**0.5 if rslora else 1.5
    report = loratool.merge(base, tmp_path / "a", tmp_path / "out")
    found = load_model(tmp_path / "out")
    path = "base_model.model.attn.{}lora_{}.weight"
    for name, inner in (("attn.in_proj_weight", ""), ("attn.out_proj.weight", "base_layer.out_proj.")):
        A, B = saved[path.format(inner, "A")], saved[path.format(inner, "B")]
        torch.testing.assert_close(found[name], W[name] + scale * B @ A, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(found[k], W[k]) for k in W if k.endswith("bias"))
    assert any("out_proj twice" in warning for warning in report.warnings)


def test_the_input_projection_answers_as_peft(tmp_path: Path) -> None:
    """peft's forward pass is right, and the oracle, as long as out_proj has no update."""
    base = write_layers(tmp_path / "base", Attention())
    plain = Attention().double().eval()
    plain.load_state_dict(load_model(base))
    wrapped = wrap(plain, task_type=None, target_modules=["attn"])
    for name, parameter in wrapped.named_parameters():
        if "out_proj.lora_B" in name:
            parameter.data.zero_()
    wrapped.save_pretrained(tmp_path / "a")
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = wrapped.base_model.model.attn(x, x, x)[0]
        loratool.merge(base, tmp_path / "a", tmp_path / "out")
        merged = Attention().double().eval()
        merged.load_state_dict(load_model(tmp_path / "out"))
        assert agree(merged.attn(x, x, x)[0], wanted)


@pytest.mark.parametrize(("rank", "groups"), [(2, 2), (4, 2), (4, 4)])
def test_a_grouped_convolution_is_refused(tmp_path: Path, rank: int, groups: int) -> None:
    """peft itself cannot merge it."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups))
    base = write_layers(tmp_path / "base", model)
    wrap(model, task_type=None, target_modules=["0"], r=rank).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="grouped convolution"):
        loratool.merge(base, tmp_path / "a", tmp_path / "out")


Q = {"target_modules": ["q_proj"]}


def write_moe(folder: Path, model: Any, **config: Any) -> tuple[Any, Path, Path, Tensor]:
    """Return (class, base, adapter, the answer of peft's forward pass)."""
    cls, base = type(model), write_base(folder / "base", model)
    wrapped = wrap(load(base, cls, **EAGER), **{**Q, **config})
    wrapped.save_pretrained(folder / "a")
    return cls, base, folder / "a", answer(wrapped)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
@pytest.mark.parametrize(
    "config",
    [
        {"target_parameters": [GATE_UP, DOWN]},
        {"target_parameters": [DOWN, GATE_UP]},
        {"target_parameters": [GATE_UP]},
        {"target_parameters": [DOWN], "use_rslora": True},
        {
            "target_parameters": [DOWN, GATE_UP],
            "rank_pattern": {"experts.down_proj": 1, "q_proj": 3},
            "alpha_pattern": {r"0\..*experts.gate_up_proj": 7},
        },
    ],
    ids=["both", "both, reversed", "gate_up", "down, rslora", "patterns"],
)
def test_stacks_of_experts(tmp_path: Path, make: Callable[..., Any], config: dict[str, Any]) -> None:
    """PEFT's stacked factors have the expert slowest in A and fastest in B, and name their parameter by nesting alone.

    The files: one matrix an expert (mixtral, qwen3_moe), and a stack stored as (expert, in, out) (gpt_oss).
    """
    cls, base, adapter, wanted = write_moe(tmp_path, make(), **config)
    loratool.merge(base, adapter, tmp_path / "out")
    assert agree(answer(load(tmp_path / "out", cls, **EAGER)), wanted)
    assert load_model(tmp_path / "out").keys() == load_model(base).keys()


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (mixtral, {"target_parameters": [ROUTER]}),
        (mixtral, {"target_parameters": [ROUTER, GATE_UP, DOWN], "alpha_pattern": {"gate.weight": 9}}),
        (qwen3_moe, {"target_parameters": [ROUTER, DOWN], "rank_pattern": {"gate.weight": 1}}),
        (gpt_oss, {"target_parameters": ["router.weight", DOWN]}),
    ],
)
def test_a_router_is_a_parameter_too(tmp_path: Path, make: Callable[..., Any], config: dict[str, Any]) -> None:
    cls, base, adapter, wanted = write_moe(tmp_path, make(), **config)
    loratool.merge(base, adapter, tmp_path / "out")
    assert agree(answer(load(tmp_path / "out", cls, **EAGER)), wanted)


def test_all_linear_names_parameters_without_their_owners(tmp_path: Path) -> None:
    """`gate.weight` beside a bare `down_proj`, which is for the module that has such a parameter."""
    sizes = {**EXPERT_SIZES, "num_key_value_heads": 2, "vocab_size": 32, "intermediate_size": 12}
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, num_experts=4, num_experts_per_tok=2))
    cls, base, adapter, wanted = write_moe(tmp_path, model, target_modules="all-linear")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    if set(fields.get("target_parameters") or ()) != {"gate.weight", "gate_up_proj", "down_proj"}:
        pytest.skip("this peft writes other names")
    loratool.merge(base, adapter, tmp_path / "out")
    assert agree(answer(load(tmp_path / "out", cls, **EAGER)), wanted)


def test_gate_and_up_of_gpt_oss_alternate(tmp_path: Path) -> None:
    """Its stack is no gate above an up: the factors of one of them are refused by name.

    The factors of both in one keep the order of the stack.
    """
    cls, base, adapter, wanted = write_moe(tmp_path, gpt_oss(), target_parameters=[GATE_UP])
    loratool.merge(base, adapter, tmp_path / "out")
    assert agree(answer(load(tmp_path / "out", cls, **EAGER)), wanted)
    module = "model.layers.0.mlp.experts.1.gate_proj"
    with pytest.raises(InputError, match=rf"(?s)not in the base:.*{re.escape(module)}"):
        loratool.merge(base, write_peft(tmp_path / "b", {module: factors(24, 16, 2)}), tmp_path / "no")
    # the same names on a family that stores gate above up
    model, one = mixtral(), "model.layers.0.block_sparse_moe.experts.1.w1"
    plain = write_base(tmp_path / "plain", model)
    report = loratool.merge(plain, write_peft(tmp_path / "c", {one: factors(24, 16, 2)}), tmp_path / "yes")
    assert [row.name for row in report.tensors] == [f"{one}.weight"]


@pytest.mark.parametrize("weight", [0.5, -1.0])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_a_weight_of_experts(tmp_path: Path, make: Callable[..., Any], weight: float) -> None:
    """A weight w gives w times the delta, never w squared."""
    _, base, adapter, _ = write_moe(tmp_path, make(), target_parameters=[GATE_UP, DOWN])
    loratool.merge(base, adapter, tmp_path / "full")
    loratool.merge(base, (adapter, weight), tmp_path / "part")
    W, full = load_model(base), load_model(tmp_path / "full")
    for name, found in load_model(tmp_path / "part").items():
        torch.testing.assert_close(found, W[name] + weight * (full[name] - W[name]), rtol=1e-12, atol=1e-12)


class TestSquareExperts:
    """Stacks whose shapes do not tell (in, out) from (out, in), which PEFT 0.19 exchanged."""

    @pytest.mark.parametrize(("make", "target"), [(mixtral, DOWN), (qwen3_moe, DOWN), (gpt_oss, DOWN)])
    def test_the_family_decides(self, tmp_path: Path, make: Callable[..., Any], target: str) -> None:
        cls, base, adapter, wanted = write_moe(tmp_path, make(16), target_parameters=[target])
        loratool.merge(base, adapter, tmp_path / "out")
        assert agree(answer(load(tmp_path / "out", cls, **EAGER)), wanted)

    def stack(self, tmp_path: Path, model_type: str, **config: Any) -> tuple[Path, Path, Tensor]:
        """Write a stack of three square matrices and an adapter of rank 2; return D of each as PEFT <= 0.18 took it."""
        g = torch.Generator().manual_seed(0)
        W, A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, 8, 8), (6, 8), (8, 6)))
        (tmp_path / "base").mkdir()
        (tmp_path / "a").mkdir()
        name = "model.layers.0.mlp.experts.down_proj"
        save_file({name: W}, tmp_path / "base" / "model.safetensors")
        (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": model_type}))
        key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
        save_file({key.format("A"): A, key.format("B"): B}, tmp_path / "a" / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": [DOWN], "target_modules": []}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**fields, **config}))
        change = torch.einsum("o r e, e r i -> e o i", B.reshape(8, 2, 3), A.reshape(3, 2, 8))
        return tmp_path / "base", tmp_path / "a", change

    @pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "unheard_of"])
    @pytest.mark.parametrize("version", ["0.17.0", "0.18.1"])
    def test_old_peft_took_all_as_in_out(self, tmp_path: Path, model_type: str, version: str) -> None:
        base, adapter, change = self.stack(tmp_path, model_type, peft_version=version)
        loratool.merge(base, adapter, tmp_path / "out")
        ((name, found),) = load_model(tmp_path / "out").items()
        torch.testing.assert_close(found, load_model(base)[name] + change.mT, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        ("model_type", "transposed"), [("mixtral", False), ("gpt_oss", True), ("llama4_text", False)]
    )
    def test_new_peft_knows(self, tmp_path: Path, model_type: str, transposed: bool) -> None:
        """(llama4's class stores (in, out), but does not tell peft so.)"""
        base, adapter, change = self.stack(tmp_path, model_type, peft_version="0.21.2")
        loratool.merge(base, adapter, tmp_path / "out")
        ((name, found),) = load_model(tmp_path / "out").items()
        wanted = load_model(base)[name] + (change.mT if transposed else change)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(("version", "transposed"), [("0.18.1", True), ("0.21.2", False)])
    def test_onto_single_experts(self, tmp_path: Path, version: str, transposed: bool) -> None:
        """Published models have a matrix for each expert, (out, in), which is what a stack has of it."""
        base, adapter, change = self.stack(tmp_path, "qwen3_moe", peft_version=version)
        stack = load_model(base)["model.layers.0.mlp.experts.down_proj"]
        single = {f"model.layers.0.mlp.experts.{e}.down_proj.weight": stack[e].contiguous() for e in range(3)}
        save_file(single, base / "model.safetensors")
        loratool.merge(base, adapter, tmp_path / "out")
        found, wanted = load_model(tmp_path / "out"), stack + (change.mT if transposed else change)
        for e, name in enumerate(single):
            torch.testing.assert_close(found[name], wanted[e], rtol=1e-12, atol=1e-12)

    def test_else_it_is_refused(self, tmp_path: Path) -> None:
        base, adapter, _ = self.stack(tmp_path, "unheard_of", peft_version="0.21.2")
        with pytest.raises(InputError, match="its experts are square, and nothing tells"):
            loratool.merge(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()


SPELLINGS = {
    "mixtral": (mixtral, 3, "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
    "qwen3_moe": (qwen3_moe, 4, "mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
}


class TestOneAdapterAnExpert:
    """Adapters of transformers 4 have factors an expert; peft turns them into a stack's when it loads them."""

    def write(self, folder: Path, family: str, **config: Any) -> None:
        _, experts, path, names = SPELLINGS[family]
        g = torch.Generator().manual_seed(4)
        width = {"mixtral": 24, "qwen3_moe": 12}[family]
        tensors = {}
        for layer in range(2):
            for module, (out, inner) in {
                **{f"{path.format(e)}{names[0]}": (width, 16) for e in range(experts)},
                **{f"{path.format(e)}{names[1]}": (width, 16) for e in range(experts)},
                **{f"{path.format(e)}{names[2]}": (16, width) for e in range(experts)},
                "self_attn.v_proj": (8, 16),
            }.items():
                for role, shape in (("A", (2, inner)), ("B", (out, 2))):
                    key = f"base_model.model.model.layers.{layer}.{module}.lora_{role}.weight"
                    tensors[key] = torch.randn(shape, generator=g, dtype=torch.float64) * 0.3
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "inference_mode": True}
        fields |= {"target_modules": ["v_proj", *names]} | config
        (folder / "adapter_config.json").write_text(json.dumps(fields))

    @pytest.mark.parametrize("stacked", [False, True], ids=["a matrix an expert", "a stack"])
    @pytest.mark.parametrize("family", SPELLINGS)
    def test_answers_as_peft(self, tmp_path: Path, family: str, stacked: bool) -> None:
        """The factors of each expert find their rows, also in a stack: that is the file with the model's own names."""
        model = SPELLINGS[family][0]()
        cls, base = type(model), write_base(tmp_path / "base", model)
        self.write(tmp_path / "a", family)
        wanted = answer(peft.PeftModel.from_pretrained(load(base, cls, **EAGER), tmp_path / "a").eval())
        if stacked:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, base / "model.safetensors")
        assert not agree(answer(load(base, cls, **EAGER)), wanted)
        loratool.merge(base, tmp_path / "a", tmp_path / "out")
        assert load_model(tmp_path / "out").keys() == load_model(base).keys()
        assert agree(answer(load(tmp_path / "out", cls, **EAGER)), wanted)

    def test_rslora_keeps_each_expert_s_own_scale(self, tmp_path: Path) -> None:
        """The formula is the oracle: peft doubles alpha when it joins gate and up, which is sqrt(2) too much here."""
        base = write_base(tmp_path / "base", mixtral())
        self.write(tmp_path / "a", "mixtral", use_rslora=True)
        loratool.merge(base, tmp_path / "a", tmp_path / "out")
        W, found, saved = load_model(base), load_model(tmp_path / "out"), load_model(tmp_path / "a")
        for name in [n for n in W if ".experts." in n]:
            A, B = (saved[f"base_model.model.{name.removesuffix('weight')}lora_{role}.weight"] for role in "AB")
            torch.testing.assert_close(found[name], W[name] + 3 / 2**0.5 * B @ A, rtol=1e-12, atol=1e-12)

    def test_stacked_factors_on_a_stack(self, tmp_path: Path) -> None:
        """Today's adapter on a file with the model's own names."""
        model = mixtral()
        cls, base, adapter, wanted = write_moe(tmp_path, model, target_parameters=[GATE_UP, DOWN])
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, base / "model.safetensors")
        loratool.merge(base, adapter, tmp_path / "out")
        assert agree(answer(load(tmp_path / "out", cls, **EAGER)), wanted)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([DOWN], "the config targets 1 parameters here|the file has 2"),
        ([GATE_UP, DOWN, ROUTER, "mlp.experts.other"], "the config targets 3 parameters here"),
    ],
)
def test_other_parameters_than_the_config_s_are_refused(tmp_path: Path, targets: list[str], message: str) -> None:
    """The order of target_parameters is all that says which nested key is which parameter's."""
    _, base, adapter, _ = write_moe(tmp_path, mixtral(), target_parameters=[GATE_UP, DOWN])
    edit(adapter / "adapter_config.json", target_parameters=targets)
    with pytest.raises(InputError, match=message):
        loratool.merge(base, adapter, tmp_path / "out")


def test_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    """The factors of an expert that the base lacks are not dropped in silence."""
    cls, _, adapter, _ = write_moe(tmp_path, mixtral(), target_parameters=[GATE_UP, DOWN])
    config = {"vocab_size": 32, "num_local_experts": 2, "intermediate_size": 24}
    small = write_base(tmp_path / "small", cls(transformers.MixtralConfig(**EXPERT_SIZES, **config)))
    with pytest.raises((InputError, NeedsFlag), match="experts"):
        loratool.merge(small, adapter, tmp_path / "out")


def test_an_expert_s_part_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    """One of an expert's three matrices is missing, and its factors are not dropped in silence."""
    _, base, adapter, _ = write_moe(tmp_path, mixtral(), target_parameters=[GATE_UP, DOWN])
    tensors = load_model(base)
    del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((InputError, NeedsFlag), match="experts"):
        loratool.merge(base, adapter, tmp_path / "out")
