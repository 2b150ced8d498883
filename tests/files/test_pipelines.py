"""Hold folders of several models: a diffusers pipeline's components, a transformer inside sentence-transformers'."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from lib.models.diffusers_folders import SDXL, pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError, UsageError
from loratool.files.checkpoint import (
    classify_checkpoint,
    is_config_alone,
    open_checkpoint,
    read_config,
    require_one_model,
)
from loratool.files.dtypes import TensorSpec
from loratool.files.output.output import OutputEdits
from loratool.files.output.plan import plan_output

UNET_INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pipeline(tmp_path / "base")


def test_tensors_are_named_by_their_component(base: Path) -> None:
    checkpoint, expected = open_checkpoint(base), tensors_of(base)
    assert set(checkpoint) == set(expected) and not checkpoint.config
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in expected.items())
    assert [part.prefix for part in checkpoint.models if part.shards] == [
        "text_encoder/", "text_encoder_2/", "unet/", "vae/"
    ]  # fmt: skip
    assert checkpoint.models[0].config == {} and checkpoint.models[0].prefix == "scheduler/"
    assert checkpoint.metadata == {} and checkpoint.quantized is None and dict(checkpoint.coded) == {}
    with pytest.raises(InputError, match="is a pipeline of several models") as refused:
        require_one_model(checkpoint)
    assert "name one of its components" in (refused.value.remedy or "")
    require_one_model(open_checkpoint(base / "unet"))
    checkpoint.close()


def test_what_lies_in_its_folders_travels(base: Path) -> None:
    (base / "unet" / "optimizer.bin").write_bytes(b"x")
    (base / "notes.bin").write_bytes(b"x")
    travels, left = classify_checkpoint(open_checkpoint(base))
    weights_and_index = {f"{part}/{file}" for part, files in SDXL.items() for file in files} | {UNET_INDEX}
    assert {each.name for each in left} == {"unet/optimizer.bin", "notes.bin"}
    assert set(travels) == files_of(base).keys() - weights_and_index - {each.name for each in left}


def test_a_component_that_is_not_there(base: Path) -> None:
    shutil.rmtree(base / "vae")
    with pytest.raises(InputError, match="names vae, but there is no such folder") as refused:
        open_checkpoint(base)
    assert refused.value.culprit == str(base / "model_index.json")


@pytest.mark.parametrize("name", ["../vae", "a/b", "a\\b", ""])
def test_a_component_elsewhere(base: Path, name: str) -> None:
    edit(base / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(InputError, match="not a folder beside it"):
        open_checkpoint(base)


def test_a_component_without_its_weights(base: Path) -> None:
    """One with a model's config lacks them, and one that has several files is not told by its config."""
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="vae"):
        open_checkpoint(base)
    (base / "vae" / "config.json").write_text("{}")
    checkpoint = open_checkpoint(base)
    assert not [name for name in checkpoint if name.startswith("vae/")]
    for name in "ab":
        save_file({"x": weights(2)}, base / "vae" / f"{name}.safetensors")
    with pytest.raises(InputError, match="holds several checkpoints"):
        open_checkpoint(base)


def test_no_component_has_weights(base: Path) -> None:
    for path in base.rglob("*.safetensors*"):
        path.unlink()
    for path in base.rglob("config.json"):
        path.write_text("{}")
    with pytest.raises(InputError, match="is a pipeline without weights"):
        open_checkpoint(base)


def test_codes_in_a_component(base: Path) -> None:
    """They are found by that component's config, and what cannot be read is a fault of the pipeline's too."""
    config = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    edit(base / "text_encoder_2" / "config.json", quantization_config=config)
    x = {"layer.weight": weights(8, 8).to(torch.float8_e4m3fn), "layer.weight_scale_inv": torch.full((2, 2), 0.5)}
    x |= {"other.weight": weights(8, 8).to(torch.float8_e4m3fn), "other.weight_scale_inv": torch.ones(3, 3)}
    save_file(x, base / "text_encoder_2" / "model.safetensors")
    checkpoint = open_checkpoint(base)
    assert list(checkpoint.weights) == ["text_encoder_2/layer.weight"] and checkpoint.quantized == "fp8"
    assert torch.equal(checkpoint["text_encoder_2/layer.weight"], x["layer.weight"].double() * 0.5)
    assert list(checkpoint.faults) == ["text_encoder_2/other.weight"] == list(checkpoint.coded)
    assert checkpoint.coded["text_encoder_2/other.weight"].fault


def test_an_output_is_the_same_folders(base: Path, tmp_path: Path) -> None:
    """Of what changes nothing keeps but the layout, and of the rest every byte; the record is each component's."""
    changed = "text_encoder/text_model.encoder.layers.0.self_attn.q_proj.weight"
    checkpoint = open_checkpoint(base)
    output = plan_output(checkpoint, tmp_path / "out", False, "mark", [changed])
    assert {file.name for file in output.files} == {f"{part}/{file}" for part, files in SDXL.items() for file in files}
    before = files_of(base)
    for file in output.files:
        kept = before[file.name][: len(file.header)] == file.header
        assert kept is (file.name != "text_encoder/model.safetensors")
    assert b"mark" in next(file.header for file in output.files if file.name == "text_encoder/model.safetensors")
    assert output.extras == {UNET_INDEX: before[UNET_INDEX]}
    with pytest.raises(UsageError, match="a pipeline needs a folder as output"):
        plan_output(checkpoint, tmp_path / "out.safetensors", True, "", [])


def test_merges_of_components_leave_their_records(base: Path, tmp_path: Path) -> None:
    """The pipeline's is the last merge's, which has the former ones in it; all come off."""
    sides = {
        "text_encoder": "text_encoder.encoder.layers.0.self_attn.q_proj",
        "text_encoder_2": "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    }
    at = base
    for component, module in sides.items():
        size = 8 if component == "text_encoder" else 12
        A, B = factors(size, size, 2)
        save_file({f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}, tmp_path / f"{component}.safetensors")
        loratool.merge(at, tmp_path / f"{component}.safetensors", tmp_path / f"out-{component}")
        at = tmp_path / f"out-{component}"
    record = json.loads(open_checkpoint(at).metadata["loratool"])
    assert record["verb"] == record["former"]["verb"] == "merge"
    loratool.unmerge(at, tmp_path / "text_encoder_2.safetensors", tmp_path / "one")
    loratool.unmerge(tmp_path / "one", tmp_path / "text_encoder.safetensors", tmp_path / "none")
    assert files_of(tmp_path / "none") == files_of(base)


def test_new_shards_have_diffusers_names(base: Path, tmp_path: Path) -> None:
    loratool.convert_model(base, tmp_path / "out", max_shard_size="1kB")
    index = json.loads((tmp_path / "out" / UNET_INDEX).read_text())
    first, second, third = (f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))
    # a file has its tensors in the order of their names: 1152 bytes, 256 and 32, and 2304
    assert index["weight_map"] == {
        "conv_in.weight": first,
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": second,
        "up_blocks.0.upsamplers.0.conv.bias": second,
        "up_blocks.0.upsamplers.0.conv.weight": third,
    }
    found, expected = tensors_of(tmp_path / "out"), tensors_of(base)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def sentence_model(folder: Path, inner: str = "0_Transformer") -> Path:
    """Write a model whose transformer lies in a folder of its own, as older versions saved it."""
    tensors = {f"layer.{i}.query.weight": weights(8, 8, seed=i) for i in range(3)}
    write_model(folder / inner, tensors, {"model_type": "bert", "torch_dtype": "float32"}, shards=2)
    rows: list[Any] = [{"path": "1_Pooling"}, {"path": inner}, {"path": 7}, "x"]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "README.md").write_text("of the base")
    return folder


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    base = sentence_model(tmp_path / "base")
    checkpoint = open_checkpoint(base)
    assert checkpoint.outer == checkpoint.root == base and checkpoint.folder == base / "0_Transformer"
    assert set(checkpoint) == set(load_model(base / "0_Transformer")) and checkpoint.model_type == "bert"
    alone = open_checkpoint(base / "0_Transformer")
    assert alone.outer is None and alone.root == base / "0_Transformer" and set(alone) == set(checkpoint)
    assert read_config(base)["model_type"] == "bert" and not is_config_alone(base)
    assert read_config(base / "0_Transformer" / "config.json") == read_config(base)


def test_its_output_lies_in_that_folder_too(tmp_path: Path) -> None:
    base = sentence_model(tmp_path / "base")
    adapter = write_peft(tmp_path / "adapter", {"layer.0.query": factors(8, 8, 2)})
    loratool.merge(base, adapter, tmp_path / "out")
    loratool.merge(tmp_path / "out", (adapter, 0.5), tmp_path / "twice")
    out, before = files_of(tmp_path / "twice"), files_of(base)
    assert out.keys() - before.keys() == {"0_Transformer/loratool.undo", "0_Transformer/loratool.undo.1"}
    assert before.keys() <= out.keys()
    A, B = factors(8, 8, 2)
    found, W = load_model(tmp_path / "twice" / "0_Transformer"), weights(8, 8, seed=0)
    assert torch.allclose(found["layer.0.query.weight"].double(), W.double() + 1.5 * (B.double() @ A.double()))
    loratool.unmerge(tmp_path / "twice", (adapter, 0.5), tmp_path / "once")
    loratool.unmerge(tmp_path / "once", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == before


def test_modules_that_lie_elsewhere(tmp_path: Path) -> None:
    base = sentence_model(tmp_path / "base")
    (base / "modules.json").write_text(json.dumps([{"path": "../other"}]))
    with pytest.raises(InputError, match=r"names '\.\./other', which is not a folder beside it"):
        open_checkpoint(base)
    for text in ("{", '{"a": 1}', "[" * 100_000, '[{"path": "1_Pooling"}]'):
        (base / "modules.json").write_text(text)
        with pytest.raises(InputError, match="holds no"):
            open_checkpoint(base)


def test_the_tokenizer_of_the_adapter_comes_with_it(tmp_path: Path) -> None:
    """In the place of the base's, of which a file that has no other is left behind."""
    base = write_model(tmp_path / "base", {"model.x.weight": weights(6, 4)}, {"model_type": "llama"})
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (base / name).write_text('{"of": "the base"}')
    adapter = write_peft(tmp_path / "adapter", {"model.x": factors(6, 4, 2)})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text('{"of": "the adapter"}')
    report = loratool.merge(base, adapter, tmp_path / "out", tokenizer="adapter")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"of": "the adapter"}'
    assert "added_tokens.json" in report.not_copied and not (tmp_path / "out" / "added_tokens.json").exists()
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(base)


def test_shared_tensors_are_one_storage_in_a_torch_file(tmp_path: Path) -> None:
    """And one tensor of a safetensors file, whose metadata names the other."""
    x = weights(6, 4)
    torch.save({"a.weight": x, "b.weight": x, "c.weight": weights(3)}, tmp_path / "x.bin")
    loratool.convert_model(tmp_path / "x.bin", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a.weight", "c.weight"] and (file.metadata() or {})["b.weight"] == "a.weight"
    assert torch.equal(load_file(tmp_path / "out.safetensors")["a.weight"], x)
    edits = OutputEdits(shared={"b.weight": "a.weight"}, skipped_tensors=["b.weight"])
    output = plan_output(
        open_checkpoint(tmp_path / "x.bin"), tmp_path / "y.bin", True, "", [], edits=edits, container="torch"
    )
    (file,) = output.files
    assert list(output.specs) == ["a.weight", "c.weight"] and file.begin.keys() == {"a.weight", "c.weight"}
    data = bytearray(file.nbytes)
    data[: len(file.header)] = file.header
    assert file.archive is not None
    for place, rest in file.archive.rest(
        [(file.begin["a.weight"], 96, zlib.crc32(bytes(96))), (file.begin["c.weight"], 12, zlib.crc32(bytes(12)))]
    ):
        data[place : place + len(rest)] = rest
    (tmp_path / "y.bin").write_bytes(data)
    state = torch.load(tmp_path / "y.bin", weights_only=True)
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr() and list(state) == [
        "a.weight",
        "b.weight",
        "c.weight",
    ]


def test_what_an_edit_puts_beside_the_weights(tmp_path: Path) -> None:
    """A new tensor stands in the file of the one that it follows, and a JSON file in the place of the base's."""
    tensors = {f"layers.{i}.weight": weights(4, 3, seed=i) for i in range(4)}
    base = write_model(tmp_path / "m", tensors, {"model_type": "llama"}, shards=2)
    (base / "generation_config.json").write_text("{}")
    new = TensorSpec("F32", (2,))
    edits = OutputEdits(
        specs={"layers.1.scale": new, "new": new},
        beside={"layers.1.weight": "layers.1.weight", "layers.1.scale": "layers.1.weight"},
        extras={"generation_config.json": {"top_k": 5}, "absent.json": {}},
    )
    output = plan_output(open_checkpoint(base), tmp_path / "out", False, "mark", [], edits=edits)
    places = {name: file.name for file in output.files for name in file.begin}
    first, second = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
    expected = {f"layers.{i}.weight": (first, second)[i % 2] for i in range(4)}
    assert places == {**expected, "layers.1.scale": second, "new": second}
    assert json.loads(output.extras["generation_config.json"]) == {"top_k": 5}
    assert "absent.json" not in output.extras and "generation_config.json" not in output.side_files
    assert json.loads(output.extras["model.safetensors.index.json"])["weight_map"] == places


def test_a_new_tensor_of_no_component(base: Path, tmp_path: Path) -> None:
    edits = OutputEdits(specs={"lora.weight": TensorSpec("F32", (2,))})
    with pytest.raises(InputError, match="is in no component of the pipeline") as refused:
        plan_output(open_checkpoint(base), tmp_path / "out", False, "", [], edits=edits)
    assert refused.value.culprit == "lora.weight"
