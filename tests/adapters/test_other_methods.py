"""Hold the files of the LoRA paper's rivals: each is recognized, and inspect says of it what is true."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, load_model, weights, write_peft
from safetensors.torch import save_file
from torch import Tensor, nn

import loratool
from loratool.adapters.formats import open_adapter
from loratool.adapters.formats.other_methods import OTHER_METHODS, OUTCOMES, READ
from loratool.errors import InputError, LoratoolError, UsageError
from loratool.views.inspect_model import MethodReport

BASE = FIXTURES / "llama" / "base"
# peft_type -> the class of its config and the arguments
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 5, "num_layers": 3}),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 8}),
    "MULTITASK_PROMPT_TUNING": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 5, "num_tasks": 2}),
    "ADAPTION_PROMPT": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
    "CPT": ("CPTConfig", {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}),
    "CARTRIDGE": ("CartridgeConfig", {"num_virtual_tokens": 4}),
}
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
# what no weight could hold, though its tensors are of layers
ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "LILY": ("LilyConfig", {**TARGETS, "r": 4, "num_B": 2, "stride_A": 1}),
    "POLY": ("PolyConfig", {**TARGETS, "r": 4}),
    "SHADOW": ("ShadowConfig", {}),
    "ALORA": ("LoraConfig", {**TARGETS, "alora_invocation_tokens": [1, 2]}),
    "QALORA": ("LoraConfig", {**TARGETS, "use_qalora": True}),
}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "IA3": ("IA3Config", {**TARGETS, "feedforward_modules": ["down_proj"]}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [7, 2, 5]}),
    "ADALORA": ("AdaLoraConfig", {**TARGETS, "total_step": 10}),
    "VERA": ("VeraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "LOHA": ("LoHaConfig", {**TARGETS, "r": 4}),
    "LOKR": ("LoKrConfig", {**TARGETS, "r": 4}),
    "MISS": ("MissConfig", {**TARGETS, "r": 4, "init_weights": "mini", "mini_r": 8}),
    "BONE": ("BoneConfig", {**TARGETS, "r": 4}),
    "GRALORA": ("GraloraConfig", {**TARGETS, "r": 4, "gralora_k": 2, "hybrid_r": 2, "alpha": 6}),
    "C3A": ("C3AConfig", {**TARGETS, "block_size": 8}),
    "PVERA": ("PveraConfig", {"r": 4, "target_modules": ["q_proj"], "save_projection": True}),
    "RANDLORA": ("RandLoraConfig", {**TARGETS, "r": 4, "save_projection": True}),
    "SHIRA": ("ShiraConfig", {**TARGETS, "r": 4}),
    "SUPERTUNING": ("SupertuningConfig", {**TARGETS, "r": 4, "sparsity": 0.9}),
    "UNILORA": ("UniLoraConfig", {**TARGETS, "r": 4, "theta_d_length": 64, "save_indices": True}),
    "TINYLORA": ("TinyLoraConfig", {**TARGETS, "r": 2, "u": 8, "weight_tying": 1.0}),
    "VBLORA": (
        "VBLoRAConfig",
        {**TARGETS, "r": 4, "num_vectors": 24, "vector_length": 4, "topk": 3, "save_only_topk_weights": True},
    ),
    "FOURIERFT": ("FourierFTConfig", {**TARGETS, "n_frequency": 50}),
    "WAVEFT": ("WaveFTConfig", {**TARGETS, "n_frequency": 90, "wavelet_family": "sym4"}),
    "DELORA": ("DeloraConfig", {**TARGETS, "r": 4}),
    "HRA": ("HRAConfig", {**TARGETS, "r": 4}),
    "HIRA": ("HiraConfig", {**TARGETS, "r": 4}),
    "GLORA": ("GloraConfig", {**TARGETS, "r": 4}),
    "DEFT": ("DeftConfig", {**TARGETS, "r": 4}),
    "PEANUT": ("PeanutConfig", {**TARGETS, "r": 4, "depth": 1}),
    "ROAD": ("RoadConfig", {**TARGETS, "group_size": 8}),
    "KASA": ("LoraConfig", {**TARGETS, "r": 4, "kasa_config": {"beta": 1e-4}}),
    "OSF": ("OSFConfig", {**TARGETS, "effective_rank": 8}),
    "FROD": ("FrodConfig", TARGETS),
    "PSOFT": ("PsoftConfig", {**TARGETS, "r": 6}),
    "ADAMSS": ("AdamssConfig", {**TARGETS, "r": 8, "num_subspaces": 3}),
    "OFT": ("OFTConfig", {**TARGETS, "oft_block_size": 8}),
    "BOFT": ("BOFTConfig", {**TARGETS, "boft_block_size": 8}),
}


def report_of(path: Path) -> MethodReport:
    report = loratool.inspect(path)
    assert isinstance(report, MethodReport)
    return report


def saved_by_peft(kind: str, folder: Path) -> Any:
    """Return the live model, its adapter trained to something and saved."""
    import peft
    from transformers import AutoModelForCausalLM

    name, fields = {**PROMPTS, **ROUTED, **LAYERS}[kind]
    if kind == "ADAMSS":
        pytest.importorskip("sklearn", reason="peft clusters with scikit-learn")
    if not hasattr(peft, name):
        pytest.skip(f"peft {peft.__version__} has no {name}")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    live = peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **fields))
    g = torch.Generator().manual_seed(0)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    live.save_pretrained(folder)
    return live


def counted(folder: Path) -> tuple[int, int, int]:
    tensors = load_model(folder).values()
    return len(tensors), sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("kind", PROMPTS)
def test_what_peft_leaves_of_prompts(tmp_path: Path, kind: str) -> None:
    saved_by_peft(kind, tmp_path / "a")
    report = report_of(tmp_path / "a")
    assert (report.method, report.outcome, report.base_model) == (kind, "neither", str(BASE)) and not report.notes
    assert (report.tensors, report.parameters, report.nbytes) == counted(tmp_path / "a")
    with pytest.raises(InputError, match=OTHER_METHODS[kind].reason):
        loratool.merge(BASE, tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("kind", ROUTED)
def test_what_peft_cannot_merge_either(tmp_path: Path, kind: str) -> None:
    live = saved_by_peft(kind, tmp_path / "a")
    if kind != "QALORA":  # peft only has it on GPTQ's layers: on others it is plain LoRA
        with pytest.raises((NotImplementedError, AttributeError, RuntimeError, ValueError, TypeError)):
            live.merge_and_unload()
    assert_refused(tmp_path / "a", kind)


def assert_refused(folder: Path, kind: str) -> None:
    method, report = OTHER_METHODS[kind], report_of(folder)
    assert (report.method, report.outcome) == (kind, "neither") and "not supported" not in report.verdict
    with pytest.raises(InputError) as error:
        loratool.merge(BASE, folder, folder.parent / "out")
    assert method.reason in str(error.value) and error.value.remedy == method.remedy


def test_routers_of_peft(tmp_path: Path) -> None:
    """Each of the adapters that they choose from lies beside them, and is merged by itself."""
    import peft
    from transformers import AutoModelForCausalLM

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, use_cache=False)

    config = peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS)
    for name in "01":
        peft.get_peft_model(model(), config).save_pretrained(tmp_path / name)
    each = {name: str(tmp_path / name) for name in "01"}
    routed = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, xlora_depth=2, adapters=each)
    peft.get_peft_model(model(), routed).save_pretrained(tmp_path / "xlora")
    assert_refused(tmp_path / "xlora", "XLORA")
    chosen = peft.create_arrow_model(model(), list(each.values()), peft.ArrowConfig(top_k=2))
    chosen.save_pretrained(tmp_path / "arrow")
    assert_refused(tmp_path / "arrow/arrow_router", "ARROW")
    for beside in (tmp_path / "0", tmp_path / "arrow/task_1"):  # peft saves no factors of the former beside X-LoRA
        assert loratool.merge(BASE, beside, tmp_path / "merged", force=True).changed == 6


def test_every_method_that_peft_can_merge_is_tried_below() -> None:
    extracted = {kind for kind, method in OTHER_METHODS.items() if method.outcome == "extracted"}
    assert {*LAYERS, "LORAS", "BEFT"} == extracted | {*READ} - {"LORA"}


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind in READ])
def test_what_is_merged_is_what_peft_merges(tmp_path: Path, kind: str) -> None:
    live = saved_by_peft(kind, tmp_path / "a")
    live.merge_and_unload().save_pretrained(tmp_path / "tuned")
    loratool.merge(BASE, tmp_path / "a", tmp_path / "out", dtype="fp32", undo=False)
    merged, tuned, base = (load_model(p) for p in (tmp_path / "out", tmp_path / "tuned", BASE))
    change, error = (math.hypot(*(float((a[n] - tuned[n]).norm()) for n in tuned)) for a in (base, merged))
    assert change > 0.01 and error < 1e-5 * change


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in READ])
def test_what_can_be_extracted_is_extracted_as_it_is_said(tmp_path: Path, kind: str) -> None:
    """merge_and_unload, save, extract: our merge of that is peft's merged model."""
    live = saved_by_peft(kind, tmp_path / "a")
    report = report_of(tmp_path / "a")
    assert (report.method, report.outcome) == (kind, "extracted") and "merge_and_unload" in report.verdict
    assert (report.tensors, report.parameters, report.nbytes) == counted(tmp_path / "a")
    live.merge_and_unload().save_pretrained(tmp_path / "tuned")
    loratool.extract(BASE, tmp_path / "tuned", tmp_path / "extracted", rank=64)
    loratool.merge(BASE, tmp_path / "extracted", tmp_path / "out", dtype="fp32", undo=False)
    merged, tuned, base = (load_model(p) for p in (tmp_path / "out", tmp_path / "tuned", BASE))
    change, error = (math.hypot(*(float((a[n] - tuned[n]).norm()) for n in tuned)) for a in (base, merged))
    assert change > 0.01 and error < 1e-3 * change


class Bottleneck(nn.Module):
    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(d, r), nn.ReLU())
        self.adapter_up = nn.Linear(r, d)


def bottlenecks(*places: str, d: int = 8, r: int = 2) -> dict[str, Tensor]:
    return {f"{place}.{name}": t for place in places for name, t in Bottleneck(d, r).state_dict().items()}


def adapterhub(folder: Path, tensors: dict[str, Tensor], safe: bool = False, **config: Any) -> Path:
    """Write a folder as adapters 1.3.0 saves it: the head's weights are in a file of their own."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"config": config, "model_name": "org/m", "name": "sst-2"}))
    head = {"heads.sst-2.1.weight": weights(2, 8)}
    if safe:
        save_file(tensors, folder / "adapter.safetensors")
        save_file(head, folder / "model_head.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_adapter.bin")
        torch.save(head, folder / "pytorch_model_head.bin")
    return folder


BERT = [f"bert.encoder.layer.{i}.{side}output.adapters.sst-2" for i in range(3) for side in ("attention.", "")]
GPT2 = [f"transformer.h.{i}.output_adapters.adapters.sst-2" for i in range(3)]
T5 = [f"{side}.block.{i}.layer.{j}.adapters.1" for side in ("encoder", "decoder") for i in range(2) for j in (0, 1)]
FORK = [f"base_model.model.model.layers.{i}.mlp.{side}_proj" for i in range(2) for side in ("gate", "up", "down")]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("places", "note"),
    [
        (BERT, "2 bottlenecks in each of 3 layers, as Houlsby's have"),
        (T5, "2 bottlenecks in each of 4 layers, as Houlsby's have"),
        (GPT2, "1 bottleneck in each of 3 layers, as Lin's and Pfeiffer's have"),
        (
            GPT2[2:],
            "1 bottleneck in each of 1 layers, as Lin's and Pfeiffer's have; none in layers 0 to 1, as in AdapterDrop",
        ),
        (
            ["x.999999999.adapters.a"],
            "1 bottleneck in each of 1 layers, as Lin's and Pfeiffer's have; none in layers 0 to 999999998, as in "
            "AdapterDrop",
        ),
        (FORK, "3 bottlenecks in each of 2 layers"),
        (BERT[1:], None),
    ],
)
def test_bottleneck_adapters(tmp_path: Path, places: list[str], note: str | None, safe: bool) -> None:
    tensors = bottlenecks(*places)
    report = report_of(adapterhub(tmp_path / "a", tensors, safe))
    assert (report.method, report.outcome, report.base_model) == ("BOTTLENECK", "neither", "org/m")
    # the paper's 2 d r + r + d for each
    assert (report.tensors, report.parameters) == (len(tensors), len(places) * (2 * 8 * 2 + 2 + 8))
    assert report.notes == ((note,) if note else ())
    with pytest.raises(InputError, match="Houlsby, Lin, Pfeiffer, Rücklé.*, which adds layers") as caught:
        loratool.merge(BASE, tmp_path / "a", tmp_path / "out")
    assert str(tmp_path / "a") in str(caught.value)


def test_lins_own_files(tmp_path: Path) -> None:
    """zlinao/VGLM: `MixAdapter` holds one `Adapter` a task."""
    tensors = {
        f"transformer.h.{i}.adapter_block.mixadapter.0.{name}": weights(*shape)
        for i in range(2)
        for name, shape in (("ln.weight", [8]), ("project_down.weight", [2, 8]), ("project_up.weight", [8, 2]))
    }
    save_file(tensors, tmp_path / "x.safetensors")
    report = report_of(tmp_path / "x.safetensors")
    assert (report.method, report.parameters) == ("BOTTLENECK", 2 * (8 + 16 + 16))
    assert report.notes == ("1 bottleneck in each of 2 layers, as Lin's and Pfeiffer's have",)


def test_one_adapter_for_all_layers_counts_once(tmp_path: Path) -> None:
    """AdapterDrop's shared adapter, and a prefix: torch saves one storage under several names."""
    shared = bottlenecks("x")
    tensors = {name.replace("x.", f"{place}.", 1): t for place in GPT2 for name, t in shared.items()}
    report = report_of(adapterhub(tmp_path / "a", tensors))
    assert (report.tensors, report.parameters) == (4, 2 * 8 * 2 + 2 + 8)
    assert report.notes[1] == "8 more names refer to these tensors"


def test_adapterhubs_other_methods(tmp_path: Path) -> None:
    prefix = {"p.prefix_tuning.prefix_tunings.sst-2.self_prefix.control_trans": weights(32)}
    cases: dict[str, dict[str, Tensor]] = {
        "PREFIX_TUNING": prefix,
        "PROMPT_TUNING": {"prompt_tuning.prompt_tunings.sst-2.prompt_embedding.weight": weights(5, 8)},
        "REFT": {"encoder.layer.0.reft_layer.refts.sst-2.units.0.learned_source.weight": weights(1, 8)},
        "LORAS": {f"transformer.h.0.attn.c_attn.loras.sst-2.lora_{x}": weights(8, 8) for x in "AB"},
        "BOTTLENECK": {**bottlenecks(*GPT2), **prefix},
    }
    for kind, tensors in cases.items():
        report = report_of(adapterhub(tmp_path / kind, tensors, architecture="union"))
        assert (report.method, report.tensors) == (kind, len(tensors))
    assert "it also holds tensors of prefix tuning" in report.notes
    names = {"heads.x.weight": weights(2)}  # no mark, so the config says it
    for architecture, kind in ((None, "BOTTLENECK"), ("reft", "REFT"), ("lora", "LORAS"), (["new"], "['NEW']")):
        folder = adapterhub(tmp_path / str(architecture), names, architecture=architecture)
        assert report_of(folder).method == kind


@pytest.mark.parametrize(
    ("kind", "mark"), [(kind, mark) for kind, method in OTHER_METHODS.items() for mark in method.marks]
)
def test_the_refusal_and_the_verdict_give_one_reason(tmp_path: Path, kind: str, mark: str) -> None:
    for key in (f"base_model.model.x.{mark}y", f"{mark}y", f"base_model.model.{mark}y"):
        folder = write_peft(tmp_path / "a", {"x": (weights(2, 4), weights(6, 2))})
        save_file({key: weights(2, 2)}, folder / "adapter_model.safetensors")
        report, method = report_of(folder), OTHER_METHODS[kind]
        assert report.method == kind and report.verdict.startswith(
            f"{OUTCOMES[method.outcome]}: {method.title}, which "
        )
        with pytest.raises(InputError) as caught:
            open_adapter(folder)
        assert f"is a tensor of {method.title}, which {method.reason}" in caught.value.message
        assert caught.value.culprit == key and caught.value.remedy == method.remedy


def test_a_method_of_peft_that_the_table_lacks(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", {"x": (weights(2, 4), weights(6, 2))}, peft_type="OF_TOMORROW")
    report = report_of(folder)
    assert (report.method, report.title, report.outcome) == ("OF_TOMORROW", "OF_TOMORROW", "neither")
    with pytest.raises(InputError, match="is an OF_TOMORROW adapter, which is not supported"):
        open_adapter(folder)


# Adapters that no format of ours reads, by their files: method, tensors. Source: JamesQFreeman/Sam_LoRA's `lora.py`;
# the last is of nobody.
OTHERS_LORA: dict[str, tuple[str, list[str]]] = {
    "state/sam.safetensors": ("SAM", [f"image_encoder.blocks.0.attn.qkv.linear_{r}_q_0.weight" for r in "ab"]),
    "new.safetensors": ("UNKNOWN_LORA", ["blocks.0.attn.lora_first", "blocks.0.attn.lora_second"]),
}


@pytest.mark.parametrize("file", OTHERS_LORA)
def test_lora_in_a_form_of_others_is_no_model(tmp_path: Path, run: Callable[..., Any], file: str) -> None:
    kind, names = OTHERS_LORA[file]
    path = tmp_path / "a" / file
    path.parent.mkdir(parents=True)
    save_file({name: weights(2, 2, seed=i) for i, name in enumerate(names)}, path)
    for given in (path.parent, path):
        report = report_of(given)
        assert report.method == kind
        result = run("inspect", given, "--strict")
        assert result.exit_code == 1 and report.title in result.stdout.splitlines()[-1]
        assert run("inspect", given).exit_code == 0
        merge = run("merge", BASE, given, "-o", tmp_path / "out")
        assert merge.exit_code == 3 and not (tmp_path / "out").exists()
        assert kind == "UNKNOWN_LORA" or report.title in merge.stderr


class TestBiasesAlone:
    """BitFit (Ben Zaken et al., 2022)."""

    GPT2 = FIXTURES / "gpt2" / "base"

    @pytest.fixture
    def biases(self) -> dict[str, Tensor]:
        return {name: t * 1.1 + 0.3 for name, t in load_model(self.GPT2).items() if name.endswith(".bias")}

    @pytest.mark.parametrize("file", ["x.safetensors", "x.bin", "f/model.safetensors", "f/adapter_model.safetensors"])
    def test_are_recognized_and_refused_with_the_way(
        self, tmp_path: Path, biases: dict[str, Tensor], file: str
    ) -> None:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        (torch.save if file.endswith("bin") else save_file)(biases, path)
        for given in {path, tmp_path / file.split("/")[0]}:
            report = report_of(given)
            assert (report.method, report.outcome, report.tensors) == ("BIASES", "merged", len(biases))
            assert report.parameters == sum(t.numel() for t in biases.values())
            with pytest.raises(InputError, match="holds only biases .BitFit., which need a config") as caught:
                loratool.merge(self.GPT2, given, tmp_path / "out")
            assert caught.value.remedy and caught.value.remedy in report.verdict

    def test_whole_ones_are_merged_as_it_is_said(self, tmp_path: Path, biases: dict[str, Tensor]) -> None:
        (tmp_path / "a").mkdir()
        save_file(biases, tmp_path / "a" / "adapter_model.safetensors")
        (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        loratool.merge(self.GPT2, tmp_path / "a", tmp_path / "out")
        merged, expected = load_model(tmp_path / "out"), {**load_model(self.GPT2), **biases}
        assert all(torch.equal(merged[name], W) for name, W in expected.items())

    def test_changes_are_extracted_as_it_is_said(self, tmp_path: Path, biases: dict[str, Tensor]) -> None:
        shutil.copytree(self.GPT2, tmp_path / "tuned")
        expected = {n: W + biases[n] if n in biases else W for n, W in load_model(self.GPT2).items()}
        save_file(expected, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
        loratool.extract(self.GPT2, tmp_path / "tuned", tmp_path / "a")
        loratool.merge(self.GPT2, tmp_path / "a", tmp_path / "out")
        assert all(torch.equal(load_model(tmp_path / "out")[name], W) for name, W in expected.items())

    def test_one_weight_makes_it_a_checkpoint(self, tmp_path: Path, biases: dict[str, Tensor]) -> None:
        save_file({**biases, "x.weight": weights(2)}, tmp_path / "x.safetensors")
        assert loratool.inspect(tmp_path / "x.safetensors").kind == "checkpoint"
        save_file({}, tmp_path / "none.safetensors")
        assert loratool.inspect(tmp_path / "none.safetensors").kind == "checkpoint"


class TestTheCommand:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return adapterhub(tmp_path / "a", bottlenecks(*BERT))

    def test_says_it_in_a_line(self, run: Callable[..., Any], folder: Path) -> None:
        result = run("inspect", folder)
        _, counts, *_, note, _, verdict = result.stdout.splitlines()
        assert result.exit_code == 0 and counts == "24 tensors, 252 parameters, F32, 1.01 kB"
        assert note.startswith("note: 2 ")
        assert verdict == (
            "can be neither merged nor extracted: a bottleneck adapter (Houlsby, Lin, Pfeiffer, Rücklé), which adds "
            "layers, and no weight could hold them"
        )

    @pytest.mark.parametrize("strict", [False, True])
    def test_says_it_in_json(self, run: Callable[..., Any], folder: Path, strict: bool) -> None:
        result = run("inspect", folder, "--json", *(["--strict"] if strict else []))
        value = json.loads(result.stdout)
        assert result.exit_code == value["exit_code"] == int(strict) and value["ok"] is not strict
        assert value.get("status") == ("other method" if strict else None)
        found = tuple(value["report"][key] for key in ("kind", "method", "outcome", "tensors", "parameters", "nbytes"))
        assert found == ("method", "BOTTLENECK", "neither", 24, 252, 1008)

    def test_has_no_use_for_a_base_or_an_alpha(self, folder: Path) -> None:
        for options in ({"base": BASE}, {"alpha": 8.0}):
            with pytest.raises(UsageError, match="holds a bottleneck adapter .*; (base|alpha) is for adapters"):
                loratool.inspect(folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[1]", "{", '{"config": []}', '{"peft_type": 5}', '{"peft_type": ["IA3"]}', "{}"])
def test_odd_configs_are_one_line(tmp_path: Path, text: str) -> None:
    adapterhub(tmp_path / "a", {"x.weight": weights(2)})
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    try:
        assert isinstance(loratool.inspect(tmp_path / "a"), MethodReport)
    except LoratoolError as error:
        assert error.exit_code == 3 and "\n" not in error.message
