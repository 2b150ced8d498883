"""Hold merges of adapters whose model repeats layers of the base (PEFT's `layer_replication`).

PEFT's own merge is wrong there, since copies share their tensors. So the oracle is the unmerged model's answer, and a
deeper model that is made here, to which a plain merge adds the same factors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_model
from lib.models.gguf_models import llama_weights, write_llama
from lib.models.peft_models import FAMILIES, agree, answer, kinds, llama, load, peft, transformers, wrap
from lib.models.peft_models import write_base as write_random
from lib.models.tiny import shrink
from safetensors.torch import load_file, save_file

import loratool
from loratool.architectures import repeated_layers
from loratool.errors import InputError, LoratoolError, NeedsFlag

pytestmark = [pytest.mark.filterwarnings("ignore")]  # peft's and transformers', of what these tests do on purpose

RANGES = [[0, 2], [1, 3]]  # layers 0, 1, 1, 2
NUMBERS = [0, 1, 1, 2]
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = kinds(FAMILIES["llama"])


def write_pair(folder: Path, model: Any, ranges: Any = RANGES, base: Any = None, **config: Any) -> tuple[Path, Path]:
    """Write a base, and an adapter for the model that repeats its layers."""
    folder.mkdir(exist_ok=True)
    where = write_random(folder / "base", model, **(base or {}))
    wrap(load(where, type(model)), layer_replication=ranges, **config).save_pretrained(folder / "adapter")
    return where, folder / "adapter"


def edit_config(folder: Path, **fields: Any) -> None:
    path = next(folder / name for name in ("adapter_config.json", "config.json") if (folder / name).exists())
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def peft_answers(base: Path, adapter: Path, cls: Any) -> torch.Tensor:
    return answer(peft.PeftModel.from_pretrained(load(base, cls), adapter).double().eval())


def same_files(folder: Path, other: Path) -> bool:
    """Return whether two folders have the same files, but for the card."""
    names = [{file.name for file in each.iterdir()} - {"README.md"} for each in (folder, other)]
    return names[0] == names[1] and all((folder / n).read_bytes() == (other / n).read_bytes() for n in names[0])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of three layers in several shards, in bf16, and an adapter for four layers."""
    folder = tmp_path_factory.mktemp("pair")
    base, adapter = write_pair(folder, llama(num_hidden_layers=3), base={"max_shard_size": "20KB"}, **LINEAR)
    for shard in base.glob("*.safetensors"):
        save_file({n: t.bfloat16() for n, t in load_file(shard).items()}, shard, {"format": "pt"})
    edit_config(base, dtype="bfloat16")
    return base, adapter


def deeper(folder: Path, base: Path, numbers: Sequence[int] = NUMBERS, path: str = "model.layers.") -> Path:
    """Write the model that repeats layers of a base, each with tensors of its own."""
    tensors = load_model(base)
    layers = {n: t for n, t in tensors.items() if n.startswith(path)}
    made = {n: t for n, t in tensors.items() if n not in layers}
    for new, number in enumerate(numbers):
        start = f"{path}{number}."
        made |= {f"{path}{new}.{n[len(start) :]}": t.clone() for n, t in layers.items() if n.startswith(start)}
    folder.mkdir()
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(base / "config.json", folder)
    edit_config(folder, num_hidden_layers=len(numbers))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_answers_as_peft_before_its_merge(tmp_path: Path, kind: str) -> None:
    base, adapter = write_pair(tmp_path, llama(num_hidden_layers=3), base={"max_shard_size": "40KB"}, **KINDS[kind])
    wanted = peft_answers(base, adapter, transformers.LlamaForCausalLM)
    loratool.merge(base, adapter, tmp_path / "out")
    merged, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info.values())
    assert agree(answer(merged.eval()), wanted)
    assert loratool.verify(base, adapter, tmp_path / "out").status == "proven"
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert same_files(tmp_path / "back", base)


def test_peft_merges_wrongly(pair: tuple[Path, Path]) -> None:
    """huggingface/peft#1707: the reason for these tests' oracle."""
    base, adapter = pair
    model = peft.PeftModel.from_pretrained(load(base, transformers.LlamaForCausalLM), adapter)
    wanted = answer(model.double().eval())
    assert not agree(answer(model.merge_and_unload()), wanted)


def bert() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    config = transformers.BertConfig(**sizes, num_hidden_layers=3, max_position_embeddings=16)
    return transformers.BertForMaskedLM(config)


def test_a_bert(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, bert(), target_modules=["query", "output.dense"], task_type=None)
    loratool.merge(base, adapter, tmp_path / "out")
    wanted = peft_answers(base, adapter, transformers.BertForMaskedLM)
    assert agree(answer(load(tmp_path / "out", transformers.BertForMaskedLM)), wanted)


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(32).reshape(2, 16), use_cache=False)[0]


def test_a_backbone_in_a_task_model(tmp_path: Path) -> None:
    """PEFT finds the layers of the bare class alone; the base is of the class with the head, whose names differ."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32, "num_hidden_layers": 3}
    base = write_random(tmp_path / "base", transformers.FalconForCausalLM(transformers.FalconConfig(**sizes)))
    config = {"target_modules": ["query_key_value"], "layer_replication": RANGES, "task_type": None}
    wrapped = wrap(load(base, transformers.FalconModel), **config)
    wrapped.save_pretrained(tmp_path / "adapter")
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert agree(hidden(load(tmp_path / "out", transformers.FalconModel)), hidden(wrapped))


@pytest.mark.parametrize("options", [{}, {"dtype": "fp32", "undo": False}, {"max_shard_size": "10KB"}])
def test_as_a_plain_merge_into_the_deeper_model(pair: tuple[Path, Path], tmp_path: Path, options: Any) -> None:
    base, adapter = pair
    loratool.merge(base, adapter, tmp_path / "out", **options)
    plain = shutil.copytree(adapter, tmp_path / "plain")
    edit_config(plain, layer_replication=None)
    loratool.merge(deeper(tmp_path / "deeper", base), plain, tmp_path / "wanted", **options)
    found, wanted = load_model(tmp_path / "out"), load_model(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in found)
    config = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "wanted")]
    assert config[0] == config[1] and config[0]["num_hidden_layers"] == 4


def test_the_undo_file_has_each_layer_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A copy without an update restores its layer, so nothing is stored of it."""
    base, adapter = pair
    loratool.merge(base, adapter, tmp_path / "all")
    report = loratool.merge(base, adapter, tmp_path / "some", layers="1")
    assert report.changed == 3
    sizes = [(tmp_path / folder / "loratool.undo").stat().st_size for folder in ("all", "some")]
    restored = [loratool.unmerge(tmp_path / f, adapter, tmp_path / f"{f}-back").restored for f in ("all", "some")]
    assert restored == [9, 0] and sizes[1] < sizes[0]
    assert same_files(tmp_path / "all-back", base) and same_files(tmp_path / "some-back", base)


@pytest.mark.parametrize("ranges", [[[2, 3], [0, 2]], [[0, 3], [0, 3], [0, 3]], [[1, 3], [0, 1], [0, 3]], [[0, 3]]])
def test_any_order_comes_back(pair: tuple[Path, Path], tmp_path: Path, ranges: Any) -> None:
    base, _ = pair
    numbers = [number for start, stop in ranges for number in range(start, stop)]
    wrapped = wrap(load(base, transformers.LlamaForCausalLM), layer_replication=ranges, **LINEAR)
    wrapped.save_pretrained(tmp_path / "adapter")
    report = loratool.merge(base, tmp_path / "adapter", tmp_path / "out", digest=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == len(numbers)
    assert report.digests[str(base)] == loratool.inspect(base, digest=True).digest
    assert report.digests[str(tmp_path / "out")] == loratool.inspect(tmp_path / "out", digest=True).digest
    loratool.verify(base, tmp_path / "adapter", tmp_path / "out")
    back = loratool.unmerge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back")
    assert same_files(tmp_path / "back", base)
    for path in (tmp_path / "out", tmp_path / "adapter"):
        assert back.digests[str(path)] == report.digests[str(path)]
    assert back.digests[str(tmp_path / "back")] == report.digests[str(base)]


def test_a_layer_that_is_left_out_cannot_come_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    wrapped = wrap(load(base, transformers.LlamaForCausalLM), layer_replication=[[0, 1], [2, 3], [0, 1]], **LINEAR)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NeedsFlag, match="has layer 1, which the output does not have") as error:
        loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert error.value.flags == "--no-undo"
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out", undo=False)
    assert loratool.verify(base, tmp_path / "adapter", tmp_path / "out").status == "proven"
    wanted = peft_answers(base, tmp_path / "adapter", transformers.LlamaForCausalLM)
    found = load(tmp_path / "out", transformers.LlamaForCausalLM)
    assert len(found.model.layers) == 3 and (answer(found) - wanted).abs().max() < 0.05 * wanted.abs().max()  # bf16


def test_single_files_and_torch_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    (tmp_path / "one").mkdir()
    one = tmp_path / "one/model.safetensors"
    save_file(load_model(base), one, {"format": "pt"})
    shutil.copy(base / "config.json", one.parent)
    report = loratool.merge(one, adapter, tmp_path / "out.safetensors")
    assert any("single file has no config" in note for note in report.warnings)
    loratool.merge(base, adapter, tmp_path / "out")
    assert all(
        torch.equal(t, load_model(tmp_path / "out")[n]) for n, t in load_file(tmp_path / "out.safetensors").items()
    )
    loratool.unmerge(tmp_path / "out.safetensors", adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == one.read_bytes()
    (tmp_path / "torch").mkdir()
    torch.save(load_model(base), tmp_path / "torch/pytorch_model.bin")
    shutil.copy(base / "config.json", tmp_path / "torch")
    loratool.merge(tmp_path / "torch", adapter, tmp_path / "of-torch")
    found, wanted = load_model(tmp_path / "of-torch"), load_model(tmp_path / "out")
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in found)
    loratool.unmerge(tmp_path / "of-torch", adapter, tmp_path / "of-torch-back")
    back, was = load_model(tmp_path / "of-torch-back"), load_model(base)
    assert back.keys() == was.keys() and all(torch.equal(back[n], was[n]) for n in was)


def test_tied_and_merged_again(tmp_path: Path) -> None:
    """A second adapter is of the deeper model; each undo file takes back its own merge."""
    base, adapter = write_pair(tmp_path, llama(num_hidden_layers=3, tie_word_embeddings=True), **LINEAR)
    loratool.merge(base, adapter, tmp_path / "out")
    wrap(load(tmp_path / "out", transformers.LlamaForCausalLM), seed=5, **LINEAR).save_pretrained(tmp_path / "second")
    loratool.merge(tmp_path / "out", tmp_path / "second", tmp_path / "both")
    loratool.unmerge(tmp_path / "both", tmp_path / "second", tmp_path / "first")
    loratool.unmerge(tmp_path / "first", adapter, tmp_path / "back")
    assert same_files(tmp_path / "back", base)
    twice = shutil.copytree(adapter, tmp_path / "twice")
    wrapped = wrap(load(tmp_path / "out", transformers.LlamaForCausalLM), layer_replication=[[0, 4], [2, 4]], **LINEAR)
    wrapped.save_pretrained(twice)
    loratool.merge(tmp_path / "out", twice, tmp_path / "deepest")
    loratool.unmerge(tmp_path / "deepest", twice, tmp_path / "again")
    assert same_files(tmp_path / "again", tmp_path / "out")


def test_two_adapters_of_the_same_deeper_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    wrapped = wrap(load(base, transformers.LlamaForCausalLM), seed=7, layer_replication=RANGES, **LINEAR)
    wrapped.save_pretrained(tmp_path / "other")
    loratool.merge(base, [(adapter, 0.5), (tmp_path / "other", 2)], tmp_path / "out")
    loratool.unmerge(tmp_path / "out", [(adapter, 0.5), (tmp_path / "other", 2)], tmp_path / "back")
    assert same_files(tmp_path / "back", base)
    edit_config(tmp_path / "other", layer_replication=None)
    with pytest.raises(InputError, match="repeats layers of the base .* is for other layers"):
        loratool.merge(base, [adapter, tmp_path / "other"], tmp_path / "two")


@pytest.mark.parametrize("place", ["kept", "copy", "lacking", "extra"])
def test_an_edited_merge_is_not_unmerged(pair: tuple[Path, Path], tmp_path: Path, place: str) -> None:
    base, adapter = pair
    loratool.merge(base, adapter, tmp_path / "out", max_shard_size="1GB")
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    if place == "extra":
        tensors["model.layers.4.mlp.up_proj.weight"] = torch.ones(2, 2)
    elif place == "lacking":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    else:
        tensors[f"model.layers.{1 if place == 'kept' else 2}.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="edited since"):
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert loratool.verify(base, adapter, tmp_path / "out").status == "wrong"


def test_what_it_says(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    found = loratool.inspect(adapter, base=base)
    assert not found.problems and any("4 layers, its base's 0-1,1-2 (layer_replication)" in n for n in found.notes)
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert any("4 layers, the base's 0-1,1-2 (layer_replication)" in note for note in report.notes)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        **json.loads((base / "config.json").read_text()),
        "num_hidden_layers": 4,
    }


ELSEWHERE: dict[str, Callable[[Path, Path, Path], Any]] = {
    "merge in place": lambda base, adapter, folder: loratool.merge(base, adapter, in_place=True),
    "unmerge in place": lambda base, adapter, folder: (
        loratool.merge(base, adapter, folder / "deep"),
        loratool.unmerge(folder / "deep", adapter, in_place=True),
    ),
    "unmerge without an undo file": lambda base, adapter, folder: (
        loratool.merge(base, adapter, folder / "deep"),
        loratool.unmerge(folder / "deep", adapter, folder / "back", approximate=True),
    ),
    "replace it": lambda base, adapter, folder: (
        loratool.merge(base, adapter, folder / "deep"),
        loratool.merge(folder / "deep", adapter, folder / "swapped", replace=[adapter]),
    ),
    "resize": lambda base, adapter, folder: loratool.resize(adapter, folder / "out", rank=1),
    "combine": lambda base, adapter, folder: loratool.combine([adapter, adapter], folder / "out"),
    "convert": lambda base, adapter, folder: loratool.convert(adapter, folder / "out", to="mlx"),
    "diff": lambda base, adapter, folder: loratool.diff(adapter, adapter),
    "a runtime": lambda base, adapter, folder: loratool.inspect_for(adapter, runtime="vllm"),
    "spectra": lambda base, adapter, folder: loratool.spectra(adapter),
    "tensor by tensor": lambda base, adapter, folder: dict(loratool.iter_merged(base, adapter)),
    "live": lambda base, adapter, folder: loratool.live.merge(load(base, transformers.LlamaForCausalLM), adapter),
    "open": lambda base, adapter, folder: loratool.open_adapter(adapter),
}


@pytest.mark.parametrize("way", ELSEWHERE)
def test_elsewhere_it_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path, way: str) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base")
    with pytest.raises(InputError, match="layer_replication") as error:
        ELSEWHERE[way](base, pair[1], tmp_path)
    assert error.value.remedy
    assert same_files(base, pair[0])


BASES: dict[str, tuple[dict[str, Any], str]] = {
    "another count": ({"num_hidden_layers": 4}, "num_hidden_layers to 4, and the files have 3"),
    "another type": ({"model_type": "diffllama"}, "'diffllama' may depend on their number"),
    "no type": ({"model_type": ["llama"]}, "may depend on their number"),
    "a rule by numbers": ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window, with which"),
    "other experts": ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, "mlp_only_layers, with which"),
    "no list": ({"model_type": "gemma2"}, "no layer_types, so that"),
    "a short list": ({"layer_types": ["full_attention"] * 2}, "no layer_types of 3 layers"),
    "no config": ({}, "without a config.json"),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
}


@pytest.mark.parametrize("kind", BASES)
def test_bases_whose_layers_cannot_be_repeated(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    base, (fields, message) = shutil.copytree(pair[0], tmp_path / "base"), BASES[kind]
    edit_config(base, **fields)
    if kind == "no config":
        (base / "config.json").unlink()
    with pytest.raises(InputError, match="layer_replication") as error:
        loratool.merge(base, pair[1], tmp_path / "out")
    assert message in str(error.value) and error.value.remedy
    assert not (tmp_path / "out").exists()
    assert any("layer_replication" in problem for problem in loratool.inspect(pair[1], base=base).problems)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[0, 4]], "repeats layer 3 of the base .* has 3"),
        ([[0, 0]], r"no layer in \[0, 0\]"),
        ([[-1, 2]], r"no layer in \[-1, 2\]"),
        ([[0, 10**30]], "more than 10,000 layers"),
        ([[0, 1]] * 10_001, "more than 10,000 layers"),
        ([[0, 1.0]], "not to ranges of layers"),
        ([[0, True]], "not to ranges of layers"),
        ([0, 2], "not to ranges of layers"),
        ("0-2", "not to ranges of layers"),
        ({"0": [0, 1]}, "not to ranges of layers"),
        ([[0, 2]], "6 of 12 modules are not in the base"),  # the adapter has modules of more layers
    ],
)
def test_ranges_that_are_none(pair: tuple[Path, Path], tmp_path: Path, ranges: Any, message: str) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    edit_config(adapter, layer_replication=ranges)
    with pytest.raises(LoratoolError, match=message):
        loratool.merge(pair[0], adapter, tmp_path / "out", undo=False)


def test_another_kind_of_adapter_has_no_such_field(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    edit_config(adapter, peft_type="VERA")
    with pytest.raises(InputError, match="layer_replication, which a VERA adapter has not"):
        loratool.merge(pair[0], adapter, tmp_path / "out")


def test_a_gguf_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base.gguf", llama_weights())
    with pytest.raises(InputError, match=r"is a GGUF model, .* \(layer_replication\)") as error:
        loratool.merge(base, pair[1], tmp_path / "out.gguf")
    assert error.value.remedy == "merge into the base in transformers' format, and convert the result"


def classes_of(model_type: str) -> Iterator[tuple[Any, Any]]:
    """Yield the classes of a type, and a small config."""
    from transformers.models.auto import modeling_auto as auto

    config = transformers.AutoConfig.for_model(model_type)
    shrink(config)
    for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_MASKED_LM_MAPPING, auto.MODEL_MAPPING):
        if type(config) in table:
            yield table[type(config)], config


def layers_of(model: Any) -> Any:
    """Return the layers that PEFT's `replicate_layers` finds."""
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    encoder = getattr(model, "encoder", None)
    return getattr(model, "layers", None) or getattr(encoder, "layer", None) or getattr(model, "h", None)


@pytest.mark.parametrize("model_type", sorted(repeated_layers.TYPES))
def test_every_type_answers_as_peft(tmp_path: Path, model_type: str) -> None:
    """Each layer is also copied to a number of another parity, before itself, and behind the last."""
    ranges = [[1, 2], [0, 1], [0, 2], [1, 2]]
    for cls, config in classes_of(model_type):
        config._experts_implementation = "eager"
        torch.manual_seed(0)
        model = cls(config)
        if layers_of(model) is not None:
            break
    base = write_random(tmp_path / "base", model)
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    loaded = cls.from_pretrained(base, **options)
    wrapped = wrap(loaded, layer_replication=ranges, target_modules="all-linear", task_type=None)
    wrapped.save_pretrained(tmp_path / "adapter")
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    for field in repeated_layers.LISTS:  # which PEFT leaves as they were, so that its model fails
        if value := getattr(loaded.config, field, None):
            setattr(loaded.config, field, [value[number] for number in (1, 0, 0, 1, 1)])
    found, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, **options)
    assert not any(info.values())
    assert agree(hidden(found.eval()), hidden(wrapped.eval()))
