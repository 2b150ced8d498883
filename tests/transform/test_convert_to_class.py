"""convert --to peft --base: an adapter of any names becomes one that PEFT loads in full into the class of the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from lib.models.tiny import build, of_class
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool
from loratool import InputError, NeedsFlag, UsageError
from loratool.architectures.experts import expert_part
from loratool.transform import to_class

pytestmark = pytest.mark.filterwarnings("ignore")
Pairs = dict[str, tuple[Tensor, Tensor]]
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"model_type": "llama"},
}


def merged(model: Any, folder: Path) -> dict[str, Tensor]:
    """Return the weights of a copy of `model` with the adapter, of which PEFT has missed nothing and left nothing."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    result = wrapped.load_adapter(folder, "again")
    assert not result.missing_keys and not result.unexpected_keys
    found: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    return found


def check(plain: dict[str, Tensor], found: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """Check that the weights of the class changed by these sums, float64, and no others."""
    for name, W in plain.items():
        D = changes.pop(name, torch.zeros(()))
        assert float((found[name].double() - W.double() - D).norm()) <= 1e-6 * max(1.0, float(D.norm())), name
    assert not changes


@pytest.mark.parametrize(
    ("family", "end", "disk", "module", "architecture"),
    [
        ("llava", "down_proj", "language_model.model", "model.language_model", None),
        ("llava", "down_proj", "language_model.model", "model.language_model", "LlamaForCausalLM"),
        ("llava", "down_proj", "model.language_model", "model.language_model", "LlavaModel"),
        ("llava", "down_proj", "model", "model.language_model", "LlamaForCausalLM"),
    ],
)
def test_names_of_any_class_and_version(
    family: str, end: str, disk: str, module: str, architecture: str | None, tmp_path: Path
) -> None:
    _, model = build("image", family)
    model.save_pretrained(tmp_path / "base")
    other = of_class(architecture or type(model).__name__, model)
    path = next(n for n in model.state_dict() if n.startswith(f"{module}.layers.1") and n.endswith(f"{end}.weight"))
    A, B = factors(*model.state_dict()[path].shape, 3)
    start = write_peft(tmp_path / "a", {path.replace(module, disk, 1).removesuffix(".weight"): (A, B)}, lora_alpha=6)
    report = loratool.convert(start, tmp_path / "b", to="peft", base=tmp_path / "base", architecture=architecture)
    (row,) = report.modules
    assert row.how == "exact" and row.alpha == 6
    assert sorted(load_file(tmp_path / "b" / "adapter_model.safetensors")) == [
        f"base_model.model.{row.name}.lora_{side}.weight" for side in "AB"
    ]
    check(other.state_dict(), merged(other, tmp_path / "b"), {f"{row.name}.weight": 2 * B.double() @ A.double()})


def single_experts(model_type: str, rslora: bool, tmp_path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Write an adapter of single experts, one of them without its up half; return the model and the changes.

    The expert's first matrix has rank 2, the others 3.
    """
    _, model = build("causal", model_type)
    model.save_pretrained(tmp_path / "base")
    disk = load_model(tmp_path / "base")
    names = [n for n in disk if ".experts." in n and not n.endswith("experts.1.up_proj.weight")]
    pairs, ranks, changes = {}, {}, {n: torch.zeros_like(W, dtype=torch.float64) for n, W in model.state_dict().items()}
    for seed, name in enumerate(names):
        owner, _, last = name.removesuffix(".weight").rpartition(".")
        head, _, expert = owner.rpartition(".")
        rank = 2 if last in ("gate_proj", "w1") else 3
        A, B = factors(*disk[name].shape, rank, seed)
        pairs[name.removesuffix(".weight")] = A, B
        if rank == 2:
            ranks[f"^{name.removesuffix('.weight')}"] = rank
        D = B.double() @ A.double() * (8 / rank**0.5 if rslora else 8 / rank)
        into = head.replace("block_sparse_moe", "mlp") + (
            ".down_proj" if last in ("down_proj", "w2") else ".gate_up_proj"
        )
        half = slice(None) if into.endswith("down_proj") else slice(0, len(D)) if rank == 2 else slice(len(D), None)
        changes[into][int(expert), half] = D
    write_peft(tmp_path / "a", pairs, lora_alpha=8, r=3, rank_pattern=ranks, use_rslora=rslora)
    return model, {name: D for name, D in changes.items() if D.any()}


@pytest.mark.parametrize("model_type", ["qwen2_moe", "jamba", "qwen3_moe", "phimoe"])
def test_single_experts_become_a_stack(model_type: str, tmp_path: Path) -> None:
    model, changes = single_experts(model_type, False, tmp_path)
    with pytest.raises(InputError, match="convert it with plain=True first"):
        loratool.convert(tmp_path / "a", tmp_path / "b", to="peft", base=tmp_path / "base")
    loratool.convert(tmp_path / "a", tmp_path / "plain", to="peft", plain=True)
    report = loratool.convert(tmp_path / "plain", tmp_path / "b", to="peft", base=tmp_path / "base")
    assert {(row.how, row.rank, row.alpha) for row in report.modules} == {("fused", 5, 5.0), ("fused", 3, 3.0)}
    check(model.state_dict(), merged(model, tmp_path / "b"), changes)


def same_merge(base: Path, one: Path, other: Path, folder: Path) -> None:
    """Check that two adapters are one change, to the bit."""
    for path, out in ((one, "one"), (other, "other")):
        loratool.merge(base, path, folder / out, undo=False)
    ours, theirs = load_model(folder / "one"), load_model(folder / "other")
    assert all(torch.equal(W, theirs[name]) for name, W in ours.items()) and ours.keys() == theirs.keys()


def test_a_stack_of_equal_ranks_under_rslora(tmp_path: Path) -> None:
    """One expert has no up_proj. The joined rank is 8, whose scale stays that of each part: 2 alpha / sqrt(2 r)."""
    disk = {f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": weights(6, 8, seed=e) for e in range(3) for p in UP_GATE}
    disk |= {f"model.layers.0.mlp.experts.{e}.down_proj.weight": weights(8, 6, seed=e) for e in range(3)}
    base = write_model(tmp_path / "base", disk, {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]})
    names = [name.removesuffix(".weight") for name in disk if not name.endswith("1.up_proj.weight")]
    pairs = {n: factors(*disk[f"{n}.weight"].shape, 4, seed) for seed, n in enumerate(names)}
    start = write_peft(tmp_path / "a", pairs, lora_alpha=8, use_rslora=True)
    report = loratool.convert(start, tmp_path / "b", to="peft", base=base)
    assert {row.name.rpartition(".")[2]: row.rank for row in report.modules} == {"gate_up_proj": 8, "down_proj": 4}
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [
        f"model.layers.0.mlp.experts.{each}" for each in ("down_proj", "gate_up_proj")
    ]
    assert not config["target_modules"] and not config["use_rslora"] and config["r"] in (4, 8)
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    owner = "base_model.model.model.layers.0.mlp.experts"
    assert stored[f"{owner}.base_layer.lora_A.weight"].shape == (24, 8)
    A, B = pairs["model.layers.0.mlp.experts.2.up_proj"]
    assert torch.equal(stored[f"{owner}.base_layer.lora_A.weight"].view(3, 8, 8)[2, 4:], A)
    assert torch.equal(stored[f"{owner}.base_layer.lora_B.weight"].view(12, 8, 3)[6:, 4:, 2], B)
    same_merge(base, start, tmp_path / "b", tmp_path)


def test_square_experts_of_an_adapter_that_an_old_peft_wrote(tmp_path: Path) -> None:
    """PEFT before 0.19 had stacks as (in, out), which this one is not: it had single experts."""
    disk = {"model.layers.0.mlp.experts.down_proj": weights(3, 8, 8)}
    base = write_model(tmp_path / "base", disk, {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]})
    pairs = {f"model.layers.0.mlp.experts.{e}.down_proj": factors(8, 8, 2, e) for e in range(3)}
    start = write_peft(tmp_path / "a", pairs, lora_alpha=2, peft_version="0.17.0")
    loratool.convert(start, tmp_path / "b", to="peft", base=base)
    same_merge(base, start, tmp_path / "b", tmp_path)


UP_GATE = ("up", "gate")
P = "language_model.model.layers.0."
TEXT = {
    f"{P}self_attn.q_proj.weight": weights(8, 8, seed=1),
    f"{P}self_attn.q_proj.bias": weights(8, seed=2),
    f"{P}mlp.up_proj.weight": weights(12, 8, seed=3),
    f"{P}mlp.gate_proj.weight": weights(12, 8, seed=13),
    f"{P}input_layernorm.weight": weights(8, seed=4),
    "language_model.model.embed_tokens.weight": weights(20, 8, seed=5),
    "language_model.lm_head.weight": weights(20, 8, seed=6),
    "vision_tower.proj.weight": weights(8, 8, seed=7),
}


def test_everything_else_of_an_adapter_goes_along(tmp_path: Path) -> None:
    """DoRA, a bias, a norm and a head kept whole, trained rows, and fields of the config that are nobody's."""
    base = write_model(tmp_path / "base", TEXT, LLAVA)
    start = write_peft(
        tmp_path / "a", {f"{P}mlp.up_proj": factors(12, 8, 2)}, lora_alpha=4, use_dora=True, bias="all", mine={"x": 1},
        modules_to_save=["input_layernorm", "lm_head"], trainable_token_indices={"embed_tokens": [3, 1]},
        target_modules=["up_proj"], layers_to_transform=[0], exclude_modules="x", lora_dropout=0.5,
    )  # fmt: skip
    prefix = "base_model.model."
    more = {
        f"{P}mlp.up_proj.lora_magnitude_vector": weights(12).abs() + 1,
        f"{P}self_attn.q_proj.bias": weights(8, seed=9),
        f"{P}input_layernorm.weight": weights(8, seed=10),
        "language_model.lm_head.weight": weights(20, 8, seed=11),
        "language_model.model.embed_tokens.token_adapter.trainable_tokens_delta": weights(2, 8, seed=12),
    }
    file = start / "adapter_model.safetensors"
    save_file({**load_file(file), **{prefix + name: W for name, W in more.items()}}, file)
    loratool.convert(start, tmp_path / "b", to="peft", base=base, architecture="LlamaForCausalLM")
    before, after = load_file(file), load_file(tmp_path / "b" / "adapter_model.safetensors")
    renamed = {
        n.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head"): n for n in before
    }
    assert after.keys() == renamed.keys() and all(torch.equal(after[new], before[old]) for new, old in renamed.items())
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj"] and config["mine"] == {"x": 1}
    assert config["modules_to_save"] == ["lm_head", "model.layers.0.input_layernorm"] and config["lora_dropout"] == 0.5
    assert config["trainable_token_indices"] == {"model.embed_tokens": [3, 1]} and config["use_dora"]
    assert not config.get("layers_to_transform") and not config.get("exclude_modules")
    same_merge(base, start, tmp_path / "b", tmp_path)


@pytest.mark.parametrize(
    ("module", "options", "kind", "message"),
    [
        ("model.layers.7.mlp.up_proj", {}, NeedsFlag, "are not in .*base: model.layers.7.mlp.up_proj"),
        (
            "vision_tower.proj",
            {"architecture": "LlamaForCausalLM"},
            NeedsFlag,
            "are not in LlamaForCausalLM: vision_tower",
        ),
        ("model.layers.0.mlp.up_proj", {"architecture": "GemmaModel"}, UsageError, "has no class of|not a class of"),
        (
            "model.layers.0.mlp.up_proj",
            {"architecture": "LlamaModel", "base": None},
            NeedsFlag,
            "is a class of the model",
        ),
        ("model.layers.0.mlp.up_proj", {"architecture": "LlamaModel", "to": "loralib"}, UsageError, 'to="peft"'),
    ],
)
def test_what_has_no_name_is_refused(
    module: str, options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", TEXT, LLAVA)
    shape = (12, 8) if module.endswith("up_proj") else (8, 8)
    start = write_peft(tmp_path / "a", {module: factors(*shape, 2), f"{P}mlp.gate_proj": factors(12, 8, 2)})
    with pytest.raises(kind, match=message):
        loratool.convert(start, tmp_path / "b.safetensors", **{"to": "peft", "base": base, **options})
    assert not (tmp_path / "b.safetensors").exists()
    if kind is NeedsFlag and "base" not in options:
        loratool.convert(start, tmp_path / "b", **{"to": "peft", "base": base, "exclude": [module], **options})


def test_dense_layers_beside_experts_that_peft_would_take_for_experts(tmp_path: Path) -> None:
    """PEFT moves every down_proj of a deepseek_v3 to the experts; as parameters the dense and shared ones stay."""
    _, model = build("causal", "deepseek_v3")
    model.save_pretrained(tmp_path / "base")
    disk = load_model(tmp_path / "base")
    names = [n for n in disk if n.endswith("_proj.weight") and "mlp" in n]
    pairs = {n.removesuffix(".weight"): factors(*disk[n].shape, 2, seed) for seed, n in enumerate(names)}
    start = write_peft(tmp_path / "a", pairs, lora_alpha=2)
    loratool.convert(start, tmp_path / "b", to="peft", base=tmp_path / "base")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.down_proj.weight" in config["target_parameters"] and not config["target_modules"]
    changes = {n: (B.double() @ A.double()) for n, (A, B) in pairs.items() if ".experts." not in n}
    wanted = {f"{n}.weight": D for n, D in changes.items()}
    for stack, W in model.state_dict().items():
        if stack.endswith(("experts.gate_up_proj", "experts.down_proj")):
            owner, _, last = stack.rpartition(".")
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            each = [[pairs[f"{owner}.{e}.{p}"] for p in parts] for e in range(len(W))]
            wanted[stack] = torch.stack([torch.cat([B.double() @ A.double() for A, B in expert]) for expert in each])
    check(model.state_dict(), merged(model, tmp_path / "b"), wanted)
    same_merge(tmp_path / "base", start, tmp_path / "b", tmp_path)


def test_stacks_and_single_experts_in_one_adapter(tmp_path: Path) -> None:
    """PEFT writes none such, and one version of its layouts is said for the whole file."""
    disk = {f"model.layers.{i}.mlp.experts.down_proj": weights(3, 8, 6, seed=i) for i in range(2)}
    base = write_model(tmp_path / "base", disk, {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]})
    pairs = {f"model.layers.0.mlp.experts.{e}.down_proj": factors(8, 6, 2, e) for e in range(3)}
    pairs["model.layers.1.mlp.experts"] = (weights(6, 6), weights(8, 6))
    parameters = ["model.layers.1.mlp.experts.down_proj"]
    start = write_peft(tmp_path / "a", pairs, r=2, target_modules=["0.down_proj"], target_parameters=parameters)
    with pytest.raises(InputError, match="is a stack of experts, and others are single"):
        loratool.convert(start, tmp_path / "b", to="peft", base=base)


def test_several_modules_whose_rows_are_one_tensor(tmp_path: Path) -> None:
    _, model = build("causal", "hrm_text")
    model.save_pretrained(tmp_path / "base")
    modules = [f"model.H_module.layers.0.{each}_proj" for each in ("self_attn.q", "self_attn.k", "mlp.up")]
    pairs = {m: factors(*model.get_submodule(m).weight.shape, 2, seed) for seed, m in enumerate(modules)}
    start = write_peft(tmp_path / "a", pairs, lora_alpha=2)
    loratool.convert(start, tmp_path / "b", to="peft", base=tmp_path / "base")
    changes = {f"{module}.weight": B.double() @ A.double() for module, (A, B) in pairs.items()}
    check(model.state_dict(), merged(model, tmp_path / "b"), changes)


def test_the_bias_of_a_head_that_peft_saves_twice(tmp_path: Path) -> None:
    _, model = build("masked", "bert")
    model.save_pretrained(tmp_path / "base")
    start = write_peft(tmp_path / "a", {"bert.encoder.layer.0.output.dense": factors(64, 96, 2)}, bias="all")
    file, b = start / "adapter_model.safetensors", weights(320)
    names = [f"base_model.model.cls.predictions.{each}" for each in ("bias", "decoder.bias")]
    save_file({**load_file(file), **{name: b.clone() for name in names}}, file)
    loratool.convert(start, tmp_path / "b", to="peft", base=tmp_path / "base")
    assert load_file(tmp_path / "b" / "adapter_model.safetensors").keys() == load_file(file).keys()


@pytest.mark.parametrize("out", ["base", "base/model.safetensors", "."])
def test_the_base_is_no_output(out: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TEXT, LLAVA)
    start = write_peft(tmp_path / "a", {"model.language_model.layers.0.mlp.up_proj": factors(12, 8, 2)})
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="would overwrite an input"):
        loratool.convert(start, tmp_path / out, to="peft", base=base, force=True)
    assert (base / "model.safetensors").read_bytes() == before


def test_all_that_would_not_load_is_named(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.down_proj" for n in range(2) for e in range(2)]
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 1}
    base = write_model(tmp_path / "base", {f"{name}.weight": weights(8, 6) for name in names}, config)
    start = write_peft(tmp_path / "a", {name: factors(8, 6, 2) for name in names})
    options: dict[str, Any] = {"to": "peft", "base": base}
    with pytest.raises(NeedsFlag, match="2 modules of .*MTP") as refused:
        loratool.convert(start, tmp_path / "b", **options)
    assert (
        refused.value.remedy == f"add --exclude {','.join(names[2:])} to exclude them; a merge applies them to the base"
    )
    report = loratool.convert(start, tmp_path / "b", exclude=names[2:], **options)
    assert [row.name for row in report.modules] == ["model.layers.0.mlp.experts.down_proj"]


def test_single_experts_take_time_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the experts of the base anew for each of them took an hour for those of Qwen3-30B."""
    parts = {f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in range(2) for e in range(16) for p in ("gate", "up")}
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2}
    base = write_model(tmp_path / "base", {f"{part}.weight": weights(6, 4) for part in parts}, config)
    adapter = write_peft(tmp_path / "adapter", {part: factors(6, 4, 1) for part in parts})
    looked_up = []

    def counted(*arguments: Any) -> Any:
        looked_up.append(arguments)
        return expert_part(*arguments)

    monkeypatch.setattr(to_class, "expert_part", counted)
    loratool.convert(adapter, tmp_path / "out", to="peft", base=base)
    assert len(looked_up) <= 3 * len(parts)
