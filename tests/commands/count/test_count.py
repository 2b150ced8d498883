"""Hold count to the LoRA paper's own tables, to peft and transformers, and to any checkpoint by its shapes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXTURES, ROOT, SHARED, needs_shared, weights, write_model, write_peft
from lib.models.configs import DEBERTA, GROUPED, REAL, SMALL, small
from lib.models.tiny import build, tables
from safetensors.torch import load_file, save_file

import loratool
from loratool.architectures.config_tensors import CONFIG_FAMILIES
from loratool.architectures.peft import BARE_ROUTERS, UNCOUNTED_MIXTURES
from loratool.binding.modules.selection import Selection
from loratool.commands.count.formulas import FORMULAS
from loratool.commands.count.outline import find_blocks, find_matrices, find_targets, parameters_of
from loratool.errors import InputError, UsageError
from loratool.files.dtypes import TensorSpec
from loratool.views.count import CountReport, MethodCount, count_document
from loratool.views.parts.document import text_of

ROBERTA = {**REAL["roberta-base"], "architectures": ["RobertaModel"]}
PAPER: dict[str, dict[str, Any]] = {
    "RoBERTa base": ROBERTA,
    "RoBERTa large": {
        **ROBERTA,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
    "DeBERTa XXL": REAL["deberta-v2-xxlarge"],
    "GPT-2 medium": REAL["gpt2-medium"],
    "GPT-2 large": {**REAL["gpt2-medium"], "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "GPT-3": {
        **REAL["gpt2-medium"],
        "n_embd": 12288,
        "n_head": 96,
        "n_layer": 96,
        "n_positions": 2048,
        "torch_dtype": "float16",
    },
}
QV = ("q_proj", "v_proj")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")

# Tables 2, 3, 4 and 15: model, method, rank (or bottleneck, or l_p + l_i), target, parameters, the paper's label.
GOLDEN = [
    ("RoBERTa base", "full", 8, QV, 124_645_632, "125M"),  # printed as 125.0M
    ("RoBERTa base", "bitfit", 8, QV, 102_912, "0.1M"),
    ("RoBERTa base", "adapterdrop-shared", 192, QV, 295_872, "0.3M"),
    ("RoBERTa base", "adapterdrop", 48, QV, 894_528, "0.9M"),
    ("RoBERTa base", "lora", 8, QV, 294_912, "0.3M"),
    ("RoBERTa large", "full", 8, QV, 355_359_744, "355M"),  # printed as 355.0M
    ("RoBERTa large", "lora", 8, QV, 786_432, "0.8M"),
    ("RoBERTa large", "adapter-pfeiffer", 16, QV, 811_392, "0.8M"),
    ("RoBERTa large", "adapter-houlsby", 8, QV, 835_968, "0.8M"),
    ("DeBERTa XXL", "lora", 16, QV, 4_718_592, "4.7M"),
    ("GPT-2 medium", "adapter-lin", 6, QV, 368_784, "0.37M"),
    ("GPT-2 medium", "adapter-lin", 224, QV, 11_089_152, "11.09M"),
    ("GPT-2 medium", "top-layers", 4, QV, 25_192_448, "25.19M"),
    ("GPT-2 large", "full", 4, QV, 774_030_080, "774.03M"),
    ("GPT-2 large", "adapter-lin", 8, QV, 875_808, "0.88M"),
    ("GPT-2 large", "adapter-lin", 248, QV, 23_002_848, "23.00M"),
    ("GPT-3", "prefix-embedding", 32 + 8, QV, 491_520, "0.4M"),  # this one and 18.8M, 301.9M are cut, not rounded
    ("GPT-3", "prefix-embedding", 64 + 8, QV, 884_736, "0.9M"),
    ("GPT-3", "prefix-embedding", 128 + 8, QV, 1_671_168, "1.7M"),
    ("GPT-3", "prefix-embedding", 256 + 8, QV, 3_244_032, "3.2M"),
    ("GPT-3", "prefix-embedding", 512 + 8, QV, 6_389_760, "6.4M"),
    ("GPT-3", "adapter-houlsby", 1, QV, 7_078_080, "7.1M"),
    ("GPT-3", "adapter-houlsby", 4, QV, 21_234_432, "21.2M"),
    ("GPT-3", "adapter-houlsby", 8, QV, 40_109_568, "40.1M"),
    ("GPT-3", "adapter-houlsby", 16, QV, 77_859_840, "77.9M"),
    ("GPT-3", "adapter-houlsby", 64, QV, 304_361_472, "304.4M"),
    ("GPT-3", "lora", 1, QV, 4_718_592, "4.7M"),
    ("GPT-3", "lora", 2, ("v_proj",), 4_718_592, "4.7M"),
    ("GPT-3", "lora", 2, QV, 9_437_184, "9.4M"),
    ("GPT-3", "lora", 4, QV, 18_874_368, "18.8M"),
    ("GPT-3", "lora", 8, QV, 37_748_736, "37.7M"),
    ("GPT-3", "lora", 4, QKVO, 37_748_736, "37.7M"),
    ("GPT-3", "lora", 64, QV, 301_989_888, "301.9M"),
]
CUT = ("0.4M", "18.8M", "301.9M")

# Rows whose label is another number than the recipe gives: the guide parameter-counts lists them with ours.
MISLABELLED = [
    ("RoBERTa large", "adapter-pfeiffer", 64, QV, 3_171_840, "3.0M"),
    ("RoBERTa large", "adapter-houlsby", 64, QV, 6_343_680, "6.0M"),
    ("DeBERTa XXL", "full", 8, QV, 1_564_549_632, "1500.0M"),
    ("DeBERTa XXL", "lora", 8, QV, 2_359_296, "4.7M"),
    ("GPT-2 medium", "full", 4, QV, 354_823_168, "354.92M"),
    ("GPT-2 medium", "lora", 4, QV, 393_216, "0.35M"),
    ("GPT-2 medium", "adapter-houlsby", 112, QV, 11_064_576, "11.09M"),
    ("GPT-2 large", "lora", 4, QV, 737_280, "0.77M"),
    ("GPT-3", "full", 8, QV, 174_604_259_328, "175,255.8M"),
    ("GPT-3", "bitfit", 8, QV, 12_988_416, "14.2M"),
    ("GPT-3", "prefix-layer", 8 + 8, QV, 18_874_368, "20.2M"),
    ("GPT-3", "lora", 2, QKVO, 18_874_368, "37.7M"),
    ("GPT-3", "lora", 128, QV, 603_979_776, "603.8M"),
]


def config_file(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def method(path: Path, name: str, **options: Any) -> MethodCount:
    (found,) = [each for each in loratool.count(path, **options).methods if each.method == name]
    return found


def trained(path: Path, name: str, **options: Any) -> int:
    return method(path, name, **options).parameters


def printed(n: int, label: str) -> str:
    """Return n in millions with the label's digits, cut where the paper cuts."""
    digits = len(label.removesuffix("M").partition(".")[2])
    scaled = n / 1e6
    return f"{int(scaled * 10**digits) / 10**digits if label in CUT else scaled:.{digits}f}M"


@pytest.mark.parametrize(("model", "name", "rank", "target", "parameters", "label"), GOLDEN)
def test_the_papers_tables(
    tmp_path: Path, model: str, name: str, rank: int, target: tuple[str, ...], parameters: int, label: str
) -> None:
    found = method(config_file(tmp_path, PAPER[model]), name, rank=rank, target=target)
    assert found.parameters == parameters
    assert printed(parameters, label) == label


@pytest.mark.parametrize(("model", "name", "rank", "target", "parameters", "label"), MISLABELLED)
def test_what_the_paper_mislabels_is_in_the_guide(
    tmp_path: Path, model: str, name: str, rank: int, target: tuple[str, ...], parameters: int, label: str
) -> None:
    assert trained(config_file(tmp_path, PAPER[model]), name, rank=rank, target=target) == parameters
    assert label.replace(",", "") not in (printed(parameters, label), f"{parameters / 1e6:.1f}M")
    guide = (ROOT / "loratool" / "guides" / "parameter-counts.md").read_text()
    (line,) = [line for line in guide.splitlines() if f"| {label} |" in line and f"{parameters:,}" in line]
    assert model in line


def test_gpt3s_checkpoint_shrinks_ten_thousand_times(tmp_path: Path) -> None:
    """Section 4.2: 350 GB to 35 MB with r = 4 on query and value, both in fp16 (35 MB are MiB)."""
    report = loratool.count(config_file(tmp_path, PAPER["GPT-3"]), rank=4)
    (lora,) = [each for each in report.methods if each.method == "lora"]
    assert report.dtype == "F16" and f"{report.nbytes / 1e9:.0f}" == "349" and lora.nbytes == 36 * 2**20
    assert 9_000 < report.nbytes / lora.nbytes < 10_000 and lora.share == lora.parameters / report.parameters


@pytest.mark.parametrize("name", ["roberta-base", "gpt2-medium", "Qwen3-0.6B"])
def test_full_top_layers_and_biases_are_the_live_models(tmp_path: Path, name: str) -> None:
    config = {key: value for key, value in REAL[name].items() if key not in ("model_type", "n_ctx")}
    made = transformers.AutoConfig.for_model(REAL[name]["model_type"], **config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(made)
    model.tie_weights()
    body = model.base_model
    stack = body.encoder.layer if hasattr(body, "encoder") else body.h if hasattr(body, "h") else body.layers
    path = config_file(tmp_path, REAL[name])
    assert trained(path, "full") == sum(p.numel() for p in model.parameters())
    assert trained(path, "top-layers") == sum(p.numel() for layer in stack[-2:] for p in layer.parameters())
    assert trained(path, "bitfit") == sum(p.numel() for n, p in body.named_parameters() if n.endswith(".bias"))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["all-linear"]),
        ("llama", ["embed_tokens", "mlp.down_proj"]),
        ("gpt2", ["c_attn"]),
        ("gpt2", ["mlp.c_fc", "attn.c_proj"]),
        ("gpt2", ["lm_head"]),  # tied
    ],
)
def test_lora_is_pefts(name: str, target: list[str]) -> None:
    """A matrix that is named itself gets one pair of factors, as peft makes."""
    from peft import LoraConfig, get_peft_model

    base = FIXTURES / name / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    live = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear" if target == ["all-linear"] else target))
    assert trained(base, "lora", rank=4, target=target) == live.get_nb_trainable_parameters()[0]


def test_a_prefix_of_the_embedding_is_pefts_prompt() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "gpt2" / "base")
    live = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9))
    found = method(FIXTURES / "gpt2" / "base", "prefix-embedding", rank=9)
    assert found.parameters == live.get_nb_trainable_parameters()[0]
    assert (found.positions, found.adds) == (9, "9 positions of the context of 128")


@pytest.mark.parametrize("model_type", CONFIG_FAMILIES)
def test_a_saved_model_counts_as_its_config(tmp_path: Path, model_type: str) -> None:
    """transformers writes the file: its names on disk, Mixtral's experts one by one, must lead to the same numbers."""
    config = {**small(model_type), "architectures": [CONFIG_FAMILIES[model_type].lm]}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(model_type, **fields)
    getattr(transformers, CONFIG_FAMILIES[model_type].lm)(made).save_pretrained(tmp_path / "model")
    for target in (QV, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
        file = loratool.count(tmp_path / "model", rank=2, target=target)
        alone = loratool.count(config_file(tmp_path / "alone", config), rank=2, target=target)
        assert (file.source, alone.source) == ("checkpoint", "config")
        assert file.methods == alone.methods
        assert (file.parameters, file.layers, file.width, file.matrices, file.tied) == (
            alone.parameters,
            alone.layers,
            alone.width,
            alone.matrices,
            alone.tied,
        )


MIXTURES = sorted(BARE_ROUTERS - UNCOUNTED_MIXTURES)
QUICK_MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"}
ALL, STACKS, SINGLE = ("all-linear",), ("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w2", "w3")


def lora_config(**fields: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, **fields)


def trained_by_peft(model: Any, config: Any) -> int:
    """The parameters that PEFT trains; 0 where it refuses."""
    from peft import get_peft_model

    try:
        return int(get_peft_model(deepcopy(model), config).get_nb_trainable_parameters()[0])
    except ValueError:
        return 0


def told(report: CountReport, who: str) -> int | None:
    """The count that a note has of PEFT or init."""
    found = [re.search(rf"{who}.* trains ([\d,]+)\b", note) for note in report.notes]
    return next((int(each[1].replace(",", "")) for each in found if each), None)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in QUICK_MIXTURES else pytest.mark.slow) for k in MIXTURES]
)
def test_a_mixture_of_experts_counts_as_init_and_peft_make_it(kind: str, tmp_path: Path) -> None:
    """Of the same targets PEFT trains the count or what a note says, and the count with the config of init."""
    table = next((table for table, each in tables() if each == kind), None)
    if table is None:
        pytest.skip("no class of language models has this type alone")
    _, model = build(table, kind)
    model.save_pretrained(tmp_path / "model")
    for at, target in enumerate(((), ("q_proj", "v_proj"), ALL, STACKS, ("experts",), SINGLE, NUMBERED)):
        where, options = tmp_path / f"{at}", {"target": target} if target else {}
        try:
            made = loratool.init(tmp_path / "model", where, rank=2, target=target or QV)
        except InputError as error:
            assert "names no weight" in str(error)  # roles, which names of this model are not
            continue
        report = loratool.count(tmp_path / "model", rank=2, **options)
        count = next(each.parameters for each in report.methods if each.method == "lora")
        assert (told(report, "init reads --target as names only") or count) == made.parameters, target
        written = json.loads((where / "adapter_config.json").read_text())
        fields = {key: written.get(key) for key in ("target_modules", "target_parameters")}
        assert trained_by_peft(model, lora_config(**fields)) == made.parameters, target
        given = "all-linear" if target == ALL else list(target or QV)
        theirs = trained_by_peft(model, lora_config(target_modules=given))
        assert told(report, "PEFT") == (theirs if theirs not in (0, count) else None), target


def test_experts_count_alike_from_a_config_and_a_checkpoint(tmp_path: Path) -> None:
    """Mixtral's files have the experts one by one, and its class stacks them."""
    config = {**small("mixtral"), "architectures": ["MixtralForCausalLM"]}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).save_pretrained(tmp_path / "model")
    alone = config_file(tmp_path / "alone", config)
    expected = {ALL: 896, STACKS: 6656, ("experts",): 6656, NUMBERED: 6656, ("gate",): 160, ("w2",): 2560, SINGLE: 6656}
    for target, count in expected.items():
        reports = [loratool.count(path, rank=2, target=target) for path in (tmp_path / "model", alone)]
        assert [each.methods[-1].parameters for each in reports] == [count, count]
        assert reports[0].notes == reports[1].notes and reports[0].methods == reports[1].methods
    ((note,), (other,), (one,)) = (loratool.count(alone, rank=2, target=t).notes for t in (ALL, NUMBERED, ["w1"]))
    assert note.startswith(
        "given all-linear, PEFT trains 11,808: experts and routers too, gate_up_proj of the experts with twice the "
        "rank. "
    )
    assert other.startswith(
        "given w1,w2,w3 as target_modules, PEFT trains 10,752: gate_up_proj of the experts with twice"
    )
    whole = "PEFT and init train gate_up_proj of the experts as one parameter, not gate_proj alone"
    assert one == f"{whole}: use --target gate_up_proj"
    for path in (tmp_path / "model", alone):
        with pytest.raises(UsageError, match="a single parameter of the class: select both or neither"):
            loratool.count(path, target=["experts.3.w1"])
        assert trained(path, "lora", rank=2, target=["experts"], exclude=["w1", "w3"]) == 2560
        assert trained(path, "lora", rank=2, target=[*ALL, "mlp.gate"]) == 896 + 160


def test_experts_that_make_no_stack_get_no_factors(tmp_path: Path) -> None:
    """As one is missing, or of another shape; init refuses them too."""
    config = {**small("mixtral"), "architectures": ["MixtralForCausalLM"]}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    for changed in ({key: x for key, x in tensors.items() if key != name}, {**tensors, name: weights(40, 32)}):
        save_file(changed, file, {"format": "pt"})
        report = loratool.count(tmp_path, rank=2, target=STACKS)
        assert report.methods[-1].parameters == 2048 + 2 * 1280
        first = "model.layers.1.block_sparse_moe.experts.0.w1, ..."
        assert report.notes[0].endswith(
            f" matrices of experts get no factors, as the class has no stack for them: {first}"
        )


def test_a_gate_with_one_output_has_to_be_named(tmp_path: Path) -> None:
    """Qwen2-MoE's shared_expert_gate: no rank above 1 fits it, and all-linear means all others."""
    _, model = build("causal", "qwen2_moe")
    model.save_pretrained(tmp_path)
    report = loratool.count(tmp_path, target=ALL)
    assert not any("gate" in name for name in report.targets if "gate_proj" not in name)
    with pytest.raises(UsageError, match="shared_expert_gate: is 1 x 64"):
        loratool.count(tmp_path, rank=2, target=["shared_expert_gate"])
    assert trained(tmp_path, "lora", rank=1, target=["shared_expert_gate"]) == 2 * (1 + 64)


def test_a_fused_projection_counts_as_its_slices(tmp_path: Path) -> None:
    """Phi-3 is Llama with query, key and value in one matrix, and gate and up in another; keys share heads."""
    fused = config_file(tmp_path / "phi3", {"model_type": "phi3", **GROUPED})
    apart = config_file(tmp_path / "llama", {"model_type": "llama", **GROUPED})
    for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert trained(fused, "lora", rank=3, target=[role]) == trained(apart, "lora", rank=3, target=[role])
    assert loratool.count(fused, target=["v_proj"]).targets == ("model.layers.{0..1}.self_attn.qkv_proj[v_proj]",)
    whole = 3 * 2 * (32 + 64)
    assert trained(fused, "lora", rank=3, target=["qkv_proj"]) == whole
    assert trained(fused, "lora", rank=3, target=["qkv_proj"], exclude=["k_proj"]) == trained(fused, "lora", rank=3)
    assert trained(fused, "lora", rank=3, target=["v_proj", "qkv_proj"]) == whole


def test_targets_go_by_role_in_every_family(tmp_path: Path) -> None:
    roberta = config_file(tmp_path / "a", {**small("roberta"), "num_hidden_layers": 1})
    assert loratool.count(roberta, target=["q_proj"]).targets == ("encoder.layer.0.attention.self.query",)
    assert loratool.count(roberta, target=["o_proj"]).targets == ("encoder.layer.0.attention.output.dense",)
    assert loratool.count(roberta, target=["down_proj"]).targets == ("encoder.layer.0.output.dense",)
    mixtral = config_file(tmp_path / "b", {**small("mixtral"), "num_local_experts": 3})
    report = loratool.count(mixtral, target=["up_proj"], rank=1)
    assert report.matrices == 6 and report.targets == ("model.layers.{0..1}.mlp.experts.gate_up_proj[up_proj]",)
    assert trained(mixtral, "lora", target=["up_proj"], rank=1) == 2 * 3 * (32 + 48)


def test_layers_hold_for_what_goes_into_blocks() -> None:
    base = FIXTURES / "gpt2" / "base"
    for name in ("lora", "adapter-houlsby", "adapter-lin", "adapterdrop", "prefix-layer"):
        assert trained(base, name, layers="1-2") * 3 == trained(base, name) * 2
    for name in ("full", "top-layers", "prefix-embedding", "adapterdrop-shared"):
        assert trained(base, name, layers="1-2") == trained(base, name)
    norm = 48  # ln_f is in no layer
    assert trained(base, "bitfit", layers="1-2") * 3 == (trained(base, "bitfit") - norm) * 2
    assert method(base, "adapterdrop", layers="1-2").depth == 2


@pytest.mark.parametrize("budget", [1, 100, 5_000, 60_000, 10**6])
def test_the_inverse_is_the_largest_that_fits(budget: int) -> None:
    base = FIXTURES / "gpt2" / "base"
    report = loratool.count(base, params=budget)
    assert report.rank is None and report.params == budget
    for found in report.methods:
        assert found.fits is (found.parameters <= budget)
        if found.size is None or found.method == "top-layers":
            continue
        one, two = (trained(base, found.method, rank=n) for n in (1, 2))  # each count is a line in its size
        assert found.parameters == one + (found.size - 1) * (two - one)
        limit = {"lora": 48, "prefix-embedding": 127, "prefix-layer": 127}.get(found.method)
        assert (found.size == limit or found.parameters + two - one > budget) if found.fits else found.size == 1


@pytest.mark.parametrize(("blocks", "fits"), [(1, False), (28_272, True), (60_000, True), (10**6, True)])
def test_the_inverse_of_top_layers_is_their_number(blocks: int, fits: bool) -> None:
    found = {m.method: m for m in loratool.count(FIXTURES / "gpt2" / "base", params=blocks).methods}["top-layers"]
    assert (found.size, found.fits) == (min(3, max(1, blocks // 28_272)), fits)


def test_a_model_without_biases_says_so() -> None:
    found = method(FIXTURES / "llama" / "base", "bitfit")
    assert (found.parameters, found.size, found.adds) == (0, None, "the model has no biases")
    assert method(FIXTURES / "llama" / "base", "bitfit", params=10).fits is None


SHAPES: dict[str, dict[str, Any]] = {
    "falcon": {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_neox": SMALL,
    "gpt_bigcode": {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": True},
    "bloom": {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 100},
    "mamba": {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 100},
    "qwen3_moe": {**GROUPED, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 16},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4},
}
SLICES = {"falcon": 32 + 16, "gpt_bigcode": 32 + 8, "qwen3_moe": 64 + 32}  # outputs of query and value where not 2 d


@pytest.mark.parametrize("model_type", SHAPES)
def test_any_family_by_its_shapes(model_type: str) -> None:
    """Two blocks of width 32 in all of them; query and value wherever there is attention."""
    made = transformers.AutoConfig.for_model(model_type, **{"bos_token_id": 0, "eos_token_id": 0, **SHAPES[model_type]})
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(made)
    specs = parameters_of({n: TensorSpec("F32", tuple(p.shape)) for n, p in model.named_parameters()})
    blocks = find_blocks(specs)
    assert [block.width for block in blocks] == [32, 32]
    targets = find_targets(find_matrices(specs, blocks), Selection(QV))
    if model_type == "mamba":
        assert not targets
    elif model_type == "t5":
        assert len(targets) == 6  # the decoder's cross-attention too
    else:
        assert sum(t.cost for t in targets) == 2 * (2 * 32 + SLICES.get(model_type, 2 * 32))


def test_the_top_layers_are_the_last_by_number(tmp_path: Path) -> None:
    """Blocks of different sizes, in a file whose order is by name: 10 stands before 2. The head is in none."""
    inner = {number: 40 + number for number in range(11)}
    tensors = {"lm_head.weight": weights(9, 32), "embed.weight": weights(9, 32)}
    for number, i in inner.items():
        tensors |= {f"layers.{number}.{name}.weight": weights(32, 32) for name in ("q_proj", "v_proj", "o_proj")}
        tensors[f"layers.{number}.up_proj.weight"] = weights(i, 32)
        tensors[f"layers.{number}.norm.weight"] = weights(32)
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {number: 3 * 32 * 32 + i * 32 + 32 for number, i in inner.items()}
    assert trained(tmp_path, "top-layers") == sizes[9] + sizes[10]
    assert method(tmp_path, "top-layers", params=sum(sizes.values()) - sizes[0]).size == 10


def test_buffers_and_second_copies_do_not_count(tmp_path: Path) -> None:
    """gpt2 as it lies on the hub stores its causal masks as `attn.bias`, and some files store the tied head too."""
    base = load_file(FIXTURES / "gpt2" / "base" / "model.safetensors")
    config = json.loads((FIXTURES / "gpt2" / "base" / "config.json").read_text())
    more = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 128, 128) for i in range(3)}
    more["lm_head.weight"] = base["transformer.wte.weight"].clone()
    more["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    write_model(tmp_path / "model", {**base, **more}, config)
    assert loratool.count(tmp_path / "model").methods == loratool.count(FIXTURES / "gpt2" / "base").methods


def test_a_masked_models_head_is_its_embedding(tmp_path: Path) -> None:
    """RoBERTa's decoder is tied with its bias; older files store both twice, and no `lm_head` is a matrix."""
    config = {**small("roberta"), "architectures": ["RobertaForMaskedLM"]}
    alone = loratool.count(config_file(tmp_path / "alone", config))
    made = transformers.AutoConfig.for_model("roberta", **{k: v for k, v in config.items() if k != "model_type"})
    state = {name: value.clone() for name, value in transformers.RobertaForMaskedLM(made).state_dict().items()}
    assert {"lm_head.decoder.weight", "lm_head.decoder.bias", "lm_head.bias"} < set(state)
    (tmp_path / "torch").mkdir()
    torch.save(state, tmp_path / "torch" / "pytorch_model.bin")
    config_file(tmp_path / "torch", config)
    report = loratool.count(tmp_path / "torch")
    assert report.source == "checkpoint" and report.tied and report.methods == alone.methods
    with pytest.raises(InputError, match="selects no matrix"):
        loratool.count(tmp_path / "torch", target=["lm_head"])


def test_a_task_head_is_named_and_not_counted(tmp_path: Path) -> None:
    path = config_file(tmp_path, {**ROBERTA, "architectures": ["RobertaForSequenceClassification"]})
    report = loratool.count(path)
    assert report.parameters == 124_645_632
    assert report.notes == (
        "config.json names RobertaForSequenceClassification: modules that RobertaModel does not have are not counted",
    )


def test_bytes_are_of_the_models_dtype(tmp_path: Path) -> None:
    mixed = {"h.0.a.weight": weights(64, 32, dtype=torch.bfloat16), "h.0.norm.weight": weights(32)}
    save_file(mixed, tmp_path / "m.safetensors")
    report = loratool.count(tmp_path / "m.safetensors", target=["a"])
    assert report.dtype == "BF16" and report.nbytes == 2 * (64 * 32 + 32)
    assert report.notes == ("dtypes are mixed (BF16, F32): bytes are those of BF16",) and report.layers == 0
    assert {m.method for m in report.methods if m.parameters} == {"full", "lora"}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 0}, UsageError, "rank: 0 is not a whole number from 1"),
        ({"params": -5}, UsageError, "params: -5 is not a count like 20M"),
        ({"rank": 8, "params": 100}, UsageError, "exclude each other"),
        ({"rank": 33}, UsageError, r"self_attn.v_proj: is 32 x 64, .* at most 32, but --rank is 33"),
        ({"target": ["nothing"]}, InputError, r"(?s)--target nothing selects no matrix\n.*q_proj"),
        ({"layers": "7"}, InputError, "after --exclude and --layers"),
        ({"exclude": ["q_proj", "v_proj"]}, InputError, "after --exclude"),
        ({"layers": "1-"}, UsageError, "is not a list like"),
        ({"target": ["re:("]}, UsageError, "not a regular expression"),
    ],
)
def test_one_clear_line(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        loratool.count(FIXTURES / "llama" / "base", **{"target": QV, **options})


def test_a_pattern_that_names_nothing_is_noted() -> None:
    report = loratool.count(FIXTURES / "llama" / "base", target=["q_proj", "c_attn"])
    assert report.notes == ("--target c_attn matches nothing",) and report.matrices == 3


def test_inputs_that_are_no_model(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", {"layers.0.q": (weights(2, 4), weights(4, 2))})
    with pytest.raises(InputError, match="is an adapter"):
        loratool.count(tmp_path / "adapter")
    save_file({"ids": torch.arange(3)}, tmp_path / "ids.safetensors")
    with pytest.raises(InputError, match="no floating-point weights"):
        loratool.count(tmp_path / "ids.safetensors")
    (tmp_path / "text.json").write_text("[1]")
    with pytest.raises(InputError, match="not an object"):
        loratool.count(tmp_path / "text.json")
    with pytest.raises(InputError, match="names no model_type"):
        loratool.count(tmp_path / "adapter" / "adapter_config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is an empty folder"):
        loratool.count(tmp_path / "empty")


def test_quantized_models(tmp_path: Path) -> None:
    """Codes have other shapes than their matrices: a known family is counted by its config, another is refused."""
    codes = {"model.layers.0.self_attn.q_proj.qweight": torch.zeros(4, 32, dtype=torch.int32)}
    config = {"model_type": "llama", **GROUPED, "quantization_config": {"quant_method": "gptq"}}
    write_model(tmp_path / "known", codes, config)
    report = loratool.count(tmp_path / "known")
    plain = loratool.count(config_file(tmp_path / "plain", {"model_type": "llama", **GROUPED}))
    assert report.methods == plain.methods and report.notes == (
        "quantized (gptq): the parameters are those before quantization",
    )
    write_model(tmp_path / "unknown", codes, {"model_type": "falcon"})
    with pytest.raises(InputError, match="is quantized"):
        loratool.count(tmp_path / "unknown")


def test_a_prefix_leaves_something_of_the_context(tmp_path: Path) -> None:
    path = config_file(tmp_path, {"model_type": "llama", **GROUPED, "max_position_embeddings": 10})
    assert method(path, "prefix-embedding", params=10**6).size == 9
    assert loratool.count(path, rank=10).notes == ("a prefix of 10 fills the context of 10",)
    assert loratool.count(path, rank=9).notes == ()


def test_the_command(run: Callable[..., Any], tmp_path: Path) -> None:
    path = config_file(tmp_path, PAPER["GPT-3"])
    result = run("count", path, "--params", "37.8M")
    assert result.exit_code == 0 and "GPT-3" not in result.stdout
    lora = next(line.split() for line in result.stdout.splitlines() if line.startswith("LoRA  "))
    assert lora[:8] == ["LoRA", "rank", "8", "37.7M", "0.0216%", "75.5", "MB", "yes"]
    value = json.loads(run("count", path, "--rank", 4, "--target", "q_proj,k_proj,v_proj,o_proj", "--json").stdout)
    assert value["ok"] and value["report"]["methods"][-1]["parameters"] == 37_748_736
    assert [m["method"] for m in value["report"]["methods"]] == list(FORMULAS)
    assert run("count", path, "--rank", 0).exit_code == 2
    assert run("count", path, "--rank", 4, "--params", "1M").exit_code == 2
    assert run("count", path, "--target", "x").exit_code == 3
    result = run("count", config_file(tmp_path / "falcon", {"model_type": "falcon"}))
    assert result.exit_code == 3 and "name the checkpoint" in result.stderr


@pytest.mark.parametrize(
    ("targets", "lines"),
    [
        (("model.layers.{0..1,3}.q_proj", "model.layers.{0..1,3}.k_proj"), ["q_proj, k_proj in layers 0-1,3"]),
        (("h.0.attn.c_attn[v_proj]", "lm_head"), ["v_proj in layer 0", "lm_head"]),
        (("layers.{0..1}.experts.{0..7}.w1",), ["*.experts.*.w1 in layers 0-1"]),
    ],
)
def test_the_targets_are_told_as_options_take_them(tmp_path: Path, targets: tuple[str, ...], lines: list[str]) -> None:
    report = replace(loratool.count(config_file(tmp_path, DEBERTA)), targets=targets)
    shown = map(text_of, count_document(report, verbose=False).lists)
    assert [each.removeprefix("LoRA on: ") for each in shown if each.startswith("LoRA on")] == lines


def test_no_torch_and_no_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; from loratool.cli import _run; assert _run(sys.argv[1:]) == 0; "
        "sys.exit(bool({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    for path in (FIXTURES / "gpt2" / "base", config_file(tmp_path, DEBERTA)):
        assert subprocess.run([sys.executable, "-c", code, "count", path], capture_output=True).returncode == 0


@needs_shared
@pytest.mark.parametrize("name", ["llama-2-7b", "mixtral-8x22b", "phi-3-mini"])
def test_real_key_lists(name: str) -> None:
    """A real index's shapes, proved against its total_size, sum to what config.json alone gives."""
    folder = SHARED / "index" / name
    shapes = json.loads((folder / "shapes.json").read_text())
    total = sum(torch.Size(entry["shape"]).numel() for key, entry in shapes.items() if "inv_freq" not in key)
    assert loratool.count(folder / "config.json").parameters == total
