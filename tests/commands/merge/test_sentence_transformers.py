"""Hold that a merged sentence-transformers model has all its modules, in both layouts, and gives peft's embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from lib.files.undo_bytes import add_blob, join_undo, split_undo
from safetensors.torch import save_file

import loratool

LAYERS = [f"encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]

TEXTS = {
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": '{"word_embedding_dimension": 8}',
    "2_Dense/config.json": '{"in_features": 8, "out_features": 4}',
    "3_Normalize/config.json": "{}",
}

INNER = {"tokenizer.json": "{}", "sentence_bert_config.json": "{}"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_base(folder: Path, inner: str) -> Path:
    """Write a model whose transformer lies in the folder `inner` of it, or in itself if that is empty."""
    tensors = {f"{layer}.weight": weights(8, 8, seed=i) for i, layer in enumerate(LAYERS)}
    write_model(folder / inner, tensors, {"model_type": "bert", "architectures": ["BertModel"]}, shards=2)
    paths = (inner, "1_Pooling", "2_Dense", "3_Normalize")
    modules = [{"idx": i, "name": str(i), "path": path, "type": "x.y"} for i, path in enumerate(paths)]
    for name, text in {**TEXTS, **{f"{inner}/{name}": text for name, text in INNER.items()}}.items():
        (folder / name.strip("/")).parent.mkdir(exist_ok=True)
        (folder / name.strip("/")).write_text(text)
    (folder / "modules.json").write_text(json.dumps(modules))
    save_file({"linear.weight": weights(4, 8)}, folder / "2_Dense" / "model.safetensors")
    return folder


@pytest.mark.parametrize("card", [True, False])
@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_all_modules_travel_and_come_back(tmp_path: Path, inner: str, card: bool) -> None:
    """And the base's card, in whose place is that of the merge."""
    base = write_base(tmp_path / "base", inner)
    if card:
        (base / "README.md").write_text("of the base")
    adapter = write_peft(tmp_path / "adapter", {layer: factors(8, 8, 2) for layer in LAYERS})
    other = write_peft(tmp_path / "other", {LAYERS[0]: factors(8, 8, 2, seed=5)})
    for _ in range(2):
        report = loratool.merge(base, adapter, tmp_path / "one", force=True)
        loratool.merge(tmp_path / "one", other, tmp_path / "out", force=True)
    assert report.not_copied == ("README.md",) * card and report.warnings == ()
    prefix = f"{inner}/" if inner else ""
    before, one = files_of(base), files_of(tmp_path / "one")
    changed = {name for name in before if before[name] != one[name]}
    shards = {f"{prefix}{path.name}" for path in (base / inner).glob("*.safetensors")}
    assert changed - {"README.md"} == shards | {f"{prefix}model.safetensors.index.json"}
    assert one.keys() - before.keys() - {"README.md"} == {f"{prefix}loratool.undo"} and b"loratool" in one["README.md"]
    assert files_of(tmp_path / "out").keys() - one.keys() == {f"{prefix}loratool.undo.1"}
    assert loratool.verify(base, adapter, tmp_path / "one").status == "proven"
    loratool.unmerge(tmp_path / "out", other, tmp_path / "back")
    assert files_of(tmp_path / "back") == one
    assert loratool.unmerge(tmp_path / "back", adapter, tmp_path / "base again").not_copied == ()
    assert files_of(tmp_path / "base again") == before


def test_an_old_layout_is_a_model_for_each_command(tmp_path: Path) -> None:
    """Tensors have the names of the transformer, and config.json is that of its folder."""
    base = write_base(tmp_path / "base", "0_Transformer")
    adapter = write_peft(tmp_path / "adapter", {layer: factors(8, 8, 2) for layer in LAYERS})
    loratool.merge(base, adapter, tmp_path / "out")
    extracted = loratool.extract(base, tmp_path / "out", tmp_path / "extracted", rank=2)
    assert {module.name.removesuffix(".weight") for module in extracted.modules} == set(LAYERS)
    loratool.convert_model(base, tmp_path / "wide", dtype="fp16")
    config = json.loads((tmp_path / "wide/0_Transformer/config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    assert {t.dtype for t in load_model(tmp_path / "wide/0_Transformer").values()} == {torch.float16}
    (tmp_path / "out/0_Transformer/thesis.tex").write_text("mine")
    with pytest.raises(loratool.UsageError, match=r"holds 0_Transformer/thesis\.tex"):
        loratool.merge(base, adapter, tmp_path / "out", force=True)


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
@pytest.mark.parametrize("prefix", ["0.auto_model.", "0.model."])
def test_an_adapter_of_the_whole_model_fits(tmp_path: Path, inner: str, prefix: str) -> None:
    """As peft names modules if it wraps a SentenceTransformer, of version 5 and of 6."""
    base = write_base(tmp_path / "base", inner)
    pairs = {layer: factors(8, 8, 2) for layer in LAYERS}
    plain = write_peft(tmp_path / "plain", pairs)
    whole = write_peft(tmp_path / "whole", {prefix + layer: pair for layer, pair in pairs.items()})
    merged = [loratool.merge(base, each, tmp_path / f"out {i}", undo=False) for i, each in enumerate((plain, whole))]
    assert [len(report.tensors) for report in merged] == [4, 4]
    alone, other = (load_model(tmp_path / f"out {i}" / inner) for i in (0, 1))
    assert all(torch.equal(alone[name], other[name]) for name in alone)


def write_trained(folder: Path, base: Path, seed: int) -> Path:
    """Write an adapter with all modules beside it, as sentence-transformers saves one, with another dense layer."""
    adapter = write_peft(folder, {layer: factors(8, 8, 2) for layer in LAYERS})
    for name in ("1_Pooling", "2_Dense"):
        shutil.copytree(base / name, adapter / name)
    paths = ("", "1_Pooling", "2_Dense")
    modules = [{"idx": i, "path": path, "type": "x.y"} for i, path in enumerate(paths)]
    (adapter / "modules.json").write_text(json.dumps(modules))
    save_file({"linear.weight": weights(4, 8, seed=seed)}, adapter / "2_Dense" / "model.safetensors")
    return adapter


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_dense_layer_that_was_trained_with_the_adapter_is_taken(tmp_path: Path, inner: str) -> None:
    base = write_base(tmp_path / "base", inner)
    same, trained = (write_trained(tmp_path / f"adapter {seed}", base, seed) for seed in (0, 7))
    report = loratool.merge(base, same, tmp_path / "same")
    assert (report.notes, report.warnings) == ((), ())
    report = loratool.merge(base, trained, tmp_path / "out")
    assert report.warnings == () and report.notes == (f"modules: 2_Dense as beside {trained}, trained with it",)
    dense = "2_Dense/model.safetensors"
    before, same_files, out = (files_of(tmp_path / name) for name in ("base", "same", "out"))
    assert out[dense] == (trained / dense).read_bytes() != before[dense] == same_files[dense]
    loratool.unmerge(tmp_path / "out", trained, tmp_path / "back")
    assert files_of(tmp_path / "back") == before


@pytest.mark.parametrize("name", ["0_Transformer/model.safetensors", "4_Dense/model.safetensors"])
def test_a_forged_undo_file_restores_no_other_weights(tmp_path: Path, name: str) -> None:
    """The transformer's, written over those that were restored, or those of a module that the model does not have."""
    base = write_base(tmp_path / "base", "0_Transformer")
    adapter = write_peft(tmp_path / "adapter", {layer: factors(8, 8, 2) for layer in LAYERS})
    loratool.merge(base, adapter, tmp_path / "out", max_shard_size="5GB")
    undo = tmp_path / "out/0_Transformer/loratool.undo"
    body, index = split_undo(undo.read_bytes())
    body, index["side"][name] = add_blob(body, b"forged")
    undo.write_bytes(join_undo(body, index))
    with pytest.raises(loratool.InputError, match=f"it names '{name}', which is not a file of a model"):
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")


def test_a_dense_layer_that_cannot_be_taken_is_told(tmp_path: Path) -> None:
    """Of several adapters, a part of one, other shapes, and onto a base without modules."""
    base = write_base(tmp_path / "base", "")
    adapter = write_trained(tmp_path / "adapter", base, 7)
    other = write_peft(tmp_path / "other", {LAYERS[0]: factors(8, 8, 2, seed=5)})
    told = "has other weights than the base in 2_Dense"
    dense = "2_Dense/model.safetensors"
    for i, adapters in enumerate(([adapter, other], (adapter, 0.5), {adapter: -1})):
        report = loratool.merge(base, adapters, tmp_path / f"out {i}")
        assert len(report.warnings) == 1 and told in report.warnings[0]
        assert (tmp_path / f"out {i}" / dense).read_bytes() == (base / dense).read_bytes()
    assert loratool.merge(base, adapter, tmp_path / "file.safetensors").warnings == ()
    save_file({"linear.weight": weights(5, 8, seed=7)}, adapter / dense)
    report = loratool.merge(base, adapter, tmp_path / "wider")
    assert len(report.warnings) == 1 and told in report.warnings[0]
    plain = write_model(tmp_path / "plain", load_model(base), {"model_type": "bert"})
    report = loratool.merge(plain, adapter, tmp_path / "alone")
    assert len(report.warnings) == 1 and "that the base does not have (1_Pooling, 2_Dense)" in report.warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_the_embeddings_are_those_of_pefts_merge(tmp_path: Path, inner: str, trained: bool) -> None:
    """Loaded by sentence-transformers, from a folder that loratool merged and from one that peft did."""
    name = "sentence_transformers"
    library: Any = pytest.importorskip(name, reason=f"needs {name}, which is in the extra `oracles`")
    modules: Any = pytest.importorskip(f"{name}.sentence_transformer.modules", reason=f"needs {name} 6")
    import peft
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = BertConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    dense = "2_Dense/model.safetensors"
    layers = [modules.Pooling(16), modules.Dense(16, 8), modules.Normalize()]
    model = library.SentenceTransformer(modules=[modules.Transformer(str(tmp_path / "bert")), *layers], device="cpu")
    base = tmp_path / "base"
    model.save(str(base))
    wrapped = peft.get_peft_model(
        BertModel.from_pretrained(base),
        peft.LoraConfig(
            task_type="FEATURE_EXTRACTION", r=2, target_modules=["query", "value"], init_lora_weights=False
        ),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "peft")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "peft")
    if trained:
        save_file({name: -t for name, t in load_model(base / "2_Dense").items()}, tmp_path / "peft" / dense)
        for name in ("1_Pooling", "2_Dense", "3_Normalize"):
            shutil.copytree(tmp_path / "peft" / name, tmp_path / "adapter" / name)
        shutil.copyfile(base / "modules.json", tmp_path / "adapter" / "modules.json")
    if inner:
        move_inside(base, inner)
    loratool.merge(base, tmp_path / "adapter", tmp_path / "out")
    loads = [library.SentenceTransformer(str(tmp_path / folder), device="cpu") for folder in ("out", "peft", "base")]
    assert [type(module).__name__ for module in loads[0]] == ["Transformer", "Pooling", "Dense", "Normalize"]
    ours, theirs, before = (torch.tensor(each.encode(["a b c", "d e j"])) for each in loads)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, before, atol=1e-2)


def move_inside(base: Path, inner: str) -> None:
    """Lay out a model as sentence-transformers before version 3 did."""
    (base / inner).mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (base / name).rename(base / inner / name)
    (base / "sentence_bert_config.json").rename(base / inner / "sentence_bert_config.json")
    modules = json.loads((base / "modules.json").read_text())
    modules[0]["path"] = inner
    (base / "modules.json").write_text(json.dumps(modules))
