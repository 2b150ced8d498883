"""Hold convert of checkpoints: torch, safetensors and transformers read the result, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXTURES, bits, load_model, weights, write_model, write_peft
from conftest import factors as lora
from lib.models.diffusers_folders import pipeline
from lib.models.tied_models import CLASSES, DISTIL, SEQ2SEQ, T5
from lib.oracles.reference import round_reference, to_longdouble
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from safetensors.torch import load_model as load_into
from torch import Tensor

import loratool
from loratool import InputError, MachineError, NeedsFlag, UsageError
from loratool.files.dtypes import DTYPE_NAMES, DTYPES

pytestmark = [pytest.mark.filterwarnings("ignore")]

DECODER = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
DECODER |= {"num_attention_heads": 2, "max_position_embeddings": 40}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 40}
# name -> (class, config's fields, the names that transformers leaves out of its own safetensors file)
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": False}, set()),
    "llama tied": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}, {"lm_head.weight"}),
    "gpt2": ("GPT2LMHeadModel", GPT2, {"lm_head.weight"}),
    "gpt2 without a head": ("GPT2Model", GPT2, set()),
    "bert": ("BertForMaskedLM", CLASSES["BertForMaskedLM"][0], {
        "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
    }),
    "roberta": ("RobertaForMaskedLM", CLASSES["RobertaForMaskedLM"][0], {
        "lm_head.decoder.weight", "lm_head.decoder.bias",
    }),
    "distilbert": ("DistilBertForMaskedLM", DISTIL, {"vocab_projector.weight"}),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ, {
        "lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
    }),
    "bart without a head": ("BartModel", SEQ2SEQ, {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}),
    "t5": ("T5ForConditionalGeneration", T5, {
        "lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
    }),
    "t5's encoder": ("T5EncoderModel", T5, {"encoder.embed_tokens.weight"}),
    "whisper": ("WhisperForConditionalGeneration", CLASSES["WhisperForConditionalGeneration"][0], {"proj_out.weight"}),
}  # fmt: skip


def save_torch(folder: Path, state: Any, config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_torch(path: Path) -> dict[str, Tensor]:
    return torch.load(path / "pytorch_model.bin" if path.is_dir() else path, weights_only=True, mmap=True)


def tied(state: Mapping[str, Tensor]) -> set[frozenset[str]]:
    """Return the sets of names that share a storage."""
    places: dict[int, set[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            places.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return {frozenset(names) for names in places.values() if len(names) > 1}


def require_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    """Check for the same names, types, shapes and bits."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (two[name].dtype, two[name].shape), name
        assert torch.equal(bits(tensor.detach().reshape(-1)), bits(two[name].detach().reshape(-1))), name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_and_transformers_loads_both(tmp_path: Path, name: str) -> None:
    kind, fields, lacks = MODELS[name]
    model = make_model(kind, fields)
    state = model.state_dict()
    base = save_torch(tmp_path / "bin", state)
    model.config.save_pretrained(base)
    there = loratool.convert_model(base, tmp_path / "safe")
    again = loratool.convert_model(tmp_path / "safe", tmp_path / "again", to="torch")
    assert not there.warnings and not there.cast
    assert again.warnings == ("a torch file has no metadata; not copied: loratool",)
    names = load_model(tmp_path / "safe").keys()
    assert state.keys() - names == lacks == set(there.shared) == set(again.shared)
    model.save_pretrained(tmp_path / "theirs")
    assert names == load_model(tmp_path / "theirs").keys()
    back = load_torch(tmp_path / "again")
    require_equal(state, back)
    assert tied(back) == tied(state)
    for folder in ("safe", "again"):
        loaded, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        require_equal(state, loaded.state_dict())


def make_model(kind: str, fields: Mapping[str, Any]) -> Any:
    family = kind.partition("For")[0].partition("LMHead")[0].removesuffix("Model").replace("T5Encoder", "T5")
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.config.architectures = [kind]
    return model


def odd_state() -> dict[str, Tensor]:
    """Return a state dict of each type, and of each odd shape, name and value."""
    numbers = torch.arange(15, dtype=torch.float32).reshape(3, 5)
    state = {f"of {dtype}": numbers.to(getattr(torch, name)) for dtype, name in DTYPE_NAMES.items()}
    view = torch.arange(24, dtype=torch.int16).reshape(4, 6)
    odd = torch.tensor([0x7F800000, 0x7FC01234, -0x800000, -1, 1, -0x80000000], dtype=torch.int32).view(torch.float32)
    return state | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
        "empty.strided": torch.zeros(4, 0, 2, dtype=torch.int64).transpose(0, 1),
        "": torch.ones(2),
        "naïve/名 前\n": torch.ones(3, dtype=torch.int64),
        "rows": view[1:3],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "not finite": odd,
        "one": torch.tensor([-0.0]),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_all_types_shapes_names_and_bits_there_and_back(tmp_path: Path, legacy: bool) -> None:
    state = odd_state()
    if legacy:  # which torch cannot read back with its newer types
        state = {name: x for name, x in state.items() if "Untyped" not in str(type(x.storage()))}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    report = loratool.convert_model(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert (report.source_format, report.to, report.copied) == ("torch", "safetensors", len(state))
    require_equal(load_file(tmp_path / "x.safetensors"), state)
    loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "y.ckpt")
    require_equal(torch.load(tmp_path / "y.ckpt", weights_only=True), state)
    loratool.convert_model(tmp_path / "y.ckpt", tmp_path / "z.safetensors")
    theirs = load_file(tmp_path / "z.safetensors")
    require_equal(theirs, state)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_depend_on_no_block_and_no_worker(tmp_path: Path, monkeypatch: Any, workers: int) -> None:
    """The sums that the zip has of them are those that zipfile finds."""
    state = {f"{i}.weight": weights(300, 100 + i, seed=i) for i in range(5)} | {"n": torch.arange(70_000)}
    torch.save(state, tmp_path / "x.bin")
    for to, dtype in (("torch", "keep"), ("torch", "bf16"), ("safetensors", "bf16")):
        loratool.convert_model(tmp_path / "x.bin", tmp_path / "whole", to=to, dtype=dtype, workers=1, force=True)
        with monkeypatch.context() as patched:
            patched.setattr("loratool.streaming.rewrite.COPY_ITEM", 70_001)
            patched.setattr("loratool.streaming.rewrite.ROWS_ITEM", 8_000)
            patched.setattr("loratool.streaming.rewrite.CAST_BLOCK", 1_234)
            patched.setattr("loratool.durable.fileio.CHECKED_CHUNK", 999)
            patched.setattr("loratool.streaming.workers.WORTH_A_FORK", 1)
            loratool.convert_model(
                tmp_path / "x.bin", tmp_path / "parts", to=to, dtype=dtype, workers=workers, force=True
            )
        (name,) = (file.name for file in (tmp_path / "whole").iterdir())
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
        if to == "torch":
            with zipfile.ZipFile(tmp_path / "parts" / name) as file:
                assert file.testzip() is None


def test_a_conversion_of_nothing_keeps_every_byte(tmp_path: Path) -> None:
    """A model of the fixtures, sharded, in torch's container and back."""
    base = FIXTURES / "llama" / "base"
    loratool.convert_model(base, tmp_path / "bin", to="torch")
    loratool.convert_model(tmp_path / "bin", tmp_path / "back")
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    one, two = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, tmp_path / "back"))
    assert one["weight_map"] == two["weight_map"]
    assert one["metadata"]["total_size"] == two["metadata"]["total_size"]
    assert {f.name for f in tmp_path.joinpath("bin").iterdir()} == {
        "config.json", "generation_config.json", "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
    }  # fmt: skip


class TestCast:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("to", ["fp32", "bf16", "fp16"])
    def test_each_number_is_rounded_once_and_what_became_zero_is_counted(
        self, tmp_path: Path, dtype: torch.dtype, to: str
    ) -> None:
        new = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[to]
        exponents = torch.linspace(-180 if dtype == torch.float64 else -149, 10, 4000, dtype=torch.float64)
        x = (torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * exponents.exp2()).to(
            dtype
        )
        x[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
        save_file({"w": x.reshape(40, 100), "n": torch.arange(3)}, tmp_path / "x.safetensors")
        report = loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "y.safetensors", dtype=to)
        found = load_file(tmp_path / "y.safetensors")
        wanted = round_reference(to_longdouble(x), new)
        assert torch.equal(found["w"].flatten(), wanted) and found["n"].tolist() == [0, 1, 2]
        flushed = int(((wanted == 0) & (x != 0)).sum())
        names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        rows = [] if new == dtype else [("w", (40, 100), names[dtype], names[new], flushed)]
        assert [tuple(vars(row).values()) for row in report.cast] == rows
        assert report.copied == 2 - len(rows)

    def test_inf_and_nan_stay(self, tmp_path: Path) -> None:
        x = torch.tensor([float("inf"), -float("inf"), float("nan"), -float("nan"), 1.0, 1e-9])
        for dtype in (torch.float64, torch.float32):
            save_file({"w": x.to(dtype)}, tmp_path / "x.safetensors")
            report = loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "y.bin", dtype="fp16", force=True)
            assert [row.flushed for row in report.cast] == [1]
            y = load_torch(tmp_path / "y.bin")["w"]
            assert y.isnan().tolist() == x.isnan().tolist() and y[:2].tolist() == x[:2].tolist()

    def test_what_would_become_infinite_stops_it(self, tmp_path: Path, run: Any) -> None:
        large = weights(10, 10)
        large[3, 4], large[5, 5] = 7e4, float("inf")
        base = write_model(tmp_path / "base", {"a": weights(3), "w": large})
        result = run("convert", base, "-o", tmp_path / "out", "--dtype", "fp16")
        assert result.exit_code == 4
        assert result.stderr == "error: w: 1 weights become infinite in F16\nhint: add --dtype fp32, which holds them\n"
        save_file({"w": torch.tensor([1e300], dtype=torch.float64)}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="leave out dtype: F64 holds them"):
            loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "y.safetensors", dtype="fp32")
        assert sorted(os.listdir(tmp_path)) == ["base", "x.safetensors"]

    def test_the_config_follows(self, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base", {"w": weights(3)}, {"dtype": "float32", "model_type": "llama"})
        loratool.convert_model(base, tmp_path / "out", dtype="torch.bfloat16")
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
            "dtype": "bfloat16", "model_type": "llama",
        }  # fmt: skip

    def test_eight_bits_stay_and_that_is_said(self, tmp_path: Path, run: Any) -> None:
        state = {"w": torch.ones(3).to(torch.float8_e4m3fn), "b": torch.ones(2), "q": torch.ones(2, dtype=torch.uint8)}
        save_file(state, tmp_path / "x.safetensors")
        result = run("convert", tmp_path / "x.safetensors", "-o", tmp_path / "y.safetensors", "--dtype", "bf16")
        assert result.exit_code == 0
        assert "warning: --dtype keeps floats of 8 bits: 1 tensors are not changed, first w" in result.stderr
        assert load_file(tmp_path / "y.safetensors")["w"].dtype == torch.float8_e4m3fn

    def test_a_quantized_model_keeps_its_types(self, tmp_path: Path) -> None:
        state = {"q.qweight": torch.ones(2, 2, dtype=torch.int32), "q.scales": torch.ones(2).half()}
        base = write_model(tmp_path / "base", state, {"quantization_config": {"quant_method": "gptq"}})
        with pytest.raises(InputError, match=r"q.weight: is quantized \(.*GPTQ\), which cannot be read"):
            loratool.convert_model(base, tmp_path / "out", dtype="bf16")
        loratool.convert_model(base, tmp_path / "out", to="torch")
        require_equal(load_torch(tmp_path / "out"), state)


LAYERS = {f"layers.{i}.weight": weights(20, 30, seed=i) for i in range(6)}  # 2,400 bytes each


class TestShards:
    @pytest.mark.parametrize("to", ["safetensors", "torch"])
    def test_cut_and_joined(self, tmp_path: Path, to: str) -> None:
        base = write_model(tmp_path / "base", LAYERS, {"model_type": "x"})
        stem, end = ("model", "safetensors") if to == "safetensors" else ("pytorch_model", "bin")
        report = loratool.convert_model(base, tmp_path / "cut", to=to, max_shard_size=5000)
        names = [f"{stem}-0000{i}-of-00003.{end}" for i in (1, 2, 3)]
        assert list(report.files) == names
        index = json.loads((tmp_path / "cut" / f"{stem}.{end}.index.json").read_text())
        assert index["metadata"]["total_size"] == 14_400
        load = load_file if to == "safetensors" else load_torch
        found = {name: load(tmp_path / "cut" / name) for name in names}
        assert index["weight_map"] == {name: file for file, state in found.items() for name in state}
        loratool.convert_model(tmp_path / "cut", tmp_path / "whole", to=to, max_shard_size=10**6)
        assert sorted(os.listdir(tmp_path / "whole")) == ["config.json", f"{stem}.{end}"]
        loratool.convert_model(tmp_path / "cut", tmp_path / f"single.{end}")
        for path in (tmp_path / "whole" / f"{stem}.{end}", tmp_path / f"single.{end}"):
            require_equal(load(path), LAYERS)

    def test_transformers_loads_shards_of_torch_with_a_tied_head(self, tmp_path: Path) -> None:
        model = make_model("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True})
        base = save_torch(tmp_path / "base", model.state_dict())
        model.config.save_pretrained(base)
        report = loratool.convert_model(base, tmp_path / "out", to="torch", max_shard_size=4000)
        assert len(report.files) > 2
        index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())["weight_map"]
        assert index["lm_head.weight"] == index["model.embed_tokens.weight"]
        assert index.keys() == model.state_dict().keys()
        loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        require_equal(loaded.state_dict(), model.state_dict())
        loratool.convert_model(tmp_path / "out", tmp_path / "safe", max_shard_size=4000)
        assert "lm_head.weight" not in load_model(tmp_path / "safe")
        loratool.convert_model(tmp_path / "safe", tmp_path / "one.bin")
        assert tied(load_torch(tmp_path / "one.bin")) == tied(model.state_dict())


class TestShared:
    def state(self) -> dict[str, Tensor]:
        head = weights(5, 3)
        return {"lm_head.weight": head, "model.embed_tokens.weight": head, "b": weights(5), "c.bias": head[0]}

    def test_without_a_config_one_name_is_kept_as_the_official_library_does(self, tmp_path: Path) -> None:
        torch.save(self.state(), tmp_path / "x.bin")
        report = loratool.convert_model(tmp_path / "x.bin", tmp_path / "x.safetensors")
        assert report.shared == {"lm_head.weight": "model.embed_tokens.weight"}
        with safe_open(tmp_path / "x.safetensors", "pt") as file:
            assert file.metadata()["lm_head.weight"] == "model.embed_tokens.weight"
        assert load_file(tmp_path / "x.safetensors").keys() == {"model.embed_tokens.weight", "b", "c.bias"}
        loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "y.bin")
        require_equal(load_torch(tmp_path / "y.bin"), self.state())
        assert tied(load_torch(tmp_path / "y.bin")) == {frozenset({"lm_head.weight", "model.embed_tokens.weight"})}

    def test_what_the_official_library_saved_comes_back(self, tmp_path: Path) -> None:
        model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
        model[1].weight = model[0].weight
        save_model(model, tmp_path / "x.safetensors")
        loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "x.bin")
        require_equal(load_torch(tmp_path / "x.bin"), model.state_dict())
        assert tied(load_torch(tmp_path / "x.bin")) == tied(model.state_dict())
        model.load_state_dict(load_torch(tmp_path / "x.bin"), strict=True)
        loratool.convert_model(tmp_path / "x.bin", tmp_path / "y.safetensors")
        assert load_into(model, tmp_path / "y.safetensors", strict=True) == (set(), [])

    def test_where_the_config_ties_nothing_both_are_written(self, tmp_path: Path) -> None:
        """A loader would make up the head that it does not find. The way back knows that they were one."""
        base = save_torch(tmp_path / "a", self.state(), {"model_type": "llama", "tie_word_embeddings": False})
        report = loratool.convert_model(base, tmp_path / "b")
        assert report.shared == {} and len(report.warnings) == 1 and "both are written" in report.warnings[0]
        require_equal(load_model(tmp_path / "b"), self.state())
        loratool.convert_model(tmp_path / "b", tmp_path / "c", to="torch")
        assert tied(load_torch(tmp_path / "c")) == {frozenset({"lm_head.weight", "model.embed_tokens.weight"})}
        parted = load_file(tmp_path / "b" / "model.safetensors")
        parted["lm_head.weight"] = parted["lm_head.weight"] + 1
        with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
            save_file(parted, tmp_path / "d.safetensors", metadata=file.metadata())
        loratool.convert_model(tmp_path / "d.safetensors", tmp_path / "d.bin")
        assert not tied(load_torch(tmp_path / "d.bin"))
        require_equal(load_torch(tmp_path / "d.bin"), parted)

    def test_other_metadata_is_not_taken_for_it_and_what_stays_behind_is_named(self, tmp_path: Path) -> None:
        metadata = {"format": "pt", "title": "a w", "x": "x", "y": "z"}
        save_file({"x": weights(2), "pt": weights(3), "z": weights(1)}, tmp_path / "x.safetensors", metadata=metadata)
        report = loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "x.bin")
        assert report.shared == {"y": "z"}
        assert report.warnings == ("a torch file has no metadata; not copied: title, x",)
        assert load_torch(tmp_path / "x.bin").keys() == {"x", "y", "z", "pt"}

    def test_types_and_views_of_a_storage(self, tmp_path: Path) -> None:
        """A tensor of another shape shares the storage in torch's file; in safetensors both are written."""
        x = weights(4, 6)
        torch.save({"x": x, "flat": x.flatten()}, tmp_path / "x.bin")
        loratool.convert_model(tmp_path / "x.bin", tmp_path / "y.bin", dtype="bf16")
        found = load_torch(tmp_path / "y.bin")
        assert tied(found) == {frozenset({"x", "flat"})} and found["flat"].shape == (24,)
        loratool.convert_model(tmp_path / "x.bin", tmp_path / "y.safetensors")
        require_equal(load_file(tmp_path / "y.safetensors"), {"x": x, "flat": x.flatten()})


def test_a_training_checkpoint_gives_its_weights_and_names_the_rest(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": weights(3)}, "epoch": 3, "optimizer": {}}, tmp_path / "x.ckpt")
    report = loratool.convert_model(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == {"w"}
    assert report.warnings == ("x.ckpt also holds epoch, optimizer, which is not read",)


def test_provenance_and_metadata(tmp_path: Path) -> None:
    save_file({"w": weights(3)}, tmp_path / "x.safetensors", metadata={"modelspec.hash_sha256": "x", "title": "y"})
    loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "y.safetensors", dtype="bf16")
    loratool.convert_model(tmp_path / "y.safetensors", tmp_path / "z", to="torch", max_shard_size=1)
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop("loratool")) == {"verb": "convert", "to": "safetensors", "dtype": "BF16"}
    assert metadata == {"title": "y"}


def test_what_was_merged_is_still_undone(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"q.weight": weights(8, 6), "k.weight": weights(8, 8, seed=1)})
    adapter = write_peft(tmp_path / "a", {"q": lora(8, 6, 2)})
    loratool.merge(base, adapter, tmp_path / "merged")
    report = loratool.convert_model(tmp_path / "merged", tmp_path / "bin", to="torch", max_shard_size=300)
    assert report.not_copied == ("README.md", "loratool.undo")
    assert loratool.verify(base, adapter, tmp_path / "bin").status == "proven"
    loratool.unmerge(tmp_path / "bin", adapter, tmp_path / "again", undo=tmp_path / "merged" / "loratool.undo")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


class TestPipelines:
    def test_each_component_has_its_own_files(self, tmp_path: Path) -> None:
        base = pipeline(tmp_path / "base")
        there = loratool.convert_model(base, tmp_path / "bin", to="torch")
        assert set(there.files) == {
            "unet/diffusion_pytorch_model-00001-of-00002.bin", "unet/diffusion_pytorch_model-00002-of-00002.bin",
            "text_encoder/pytorch_model.bin", "text_encoder_2/pytorch_model.bin", "vae/diffusion_pytorch_model.bin",
        }  # fmt: skip
        assert (tmp_path / "bin" / "unet" / "diffusion_pytorch_model.bin.index.json").is_file()
        vae = torch.load(tmp_path / "bin" / "vae" / "diffusion_pytorch_model.bin", weights_only=True)
        require_equal(vae, load_file(base / "vae" / "diffusion_pytorch_model.safetensors"))
        loratool.convert_model(tmp_path / "bin", tmp_path / "back")
        files = {f.relative_to(base) for f in base.rglob("*.safetensors")}
        assert files == {f.relative_to(tmp_path / "back") for f in (tmp_path / "back").rglob("*.safetensors")}
        for file in files:
            require_equal(load_file(base / file), load_file(tmp_path / "back" / file))
        with pytest.raises(UsageError, match="a pipeline needs a folder as output"):
            loratool.convert_model(base, tmp_path / "x.bin")


class TestRefusals:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return write_model(tmp_path / "model", {"a.weight": weights(4, 4)}, {"model_type": "llama"})

    def test_a_truncated_file(self, tmp_path: Path, run: Any) -> None:
        torch.save({"w": weights(100, 100)}, tmp_path / "x.bin")
        data = (tmp_path / "x.bin").read_bytes()
        (tmp_path / "x.bin").write_bytes(data[:20_000])
        result = run("convert", tmp_path / "x.bin", "-o", tmp_path / "out")
        assert result.exit_code == 3 and "is damaged, cut off" in result.stderr
        assert os.listdir(tmp_path) == ["x.bin"]

    def test_a_pickle_that_wants_to_run_something(self, tmp_path: Path, run: Any) -> None:
        class Run:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"w": weights(3), "x": Run()}, tmp_path / "x.bin")
        result = run("convert", tmp_path / "x.bin", "-o", tmp_path / "out")
        assert result.exit_code == 3 and "wants to run posix.mkdir" in result.stderr
        assert os.listdir(tmp_path) == ["x.bin"]
        (tmp_path / "x.bin").write_bytes(pickle.dumps({"w": Run()}, protocol=2))
        assert run("convert", tmp_path / "x.bin", "-o", tmp_path / "out").exit_code == 3
        assert os.listdir(tmp_path) == ["x.bin"]

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        loratool.convert_model(FIXTURES / "llama" / "base", tmp_path / "bin", to="torch")
        (tmp_path / "bin" / "pytorch_model-00002-of-00002.bin").unlink()
        with pytest.raises(InputError, match="pytorch_model-00002-of-00002.bin, which is missing"):
            loratool.convert_model(tmp_path / "bin", tmp_path / "out")

    def test_a_type_without_a_name_on_the_other_side(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(3, dtype=torch.complex128)}, tmp_path / "x.bin")
        with pytest.raises(InputError, match="w: x.bin stores it as complex128"):
            loratool.convert_model(tmp_path / "x.bin", tmp_path / "out.safetensors")
        header = b'{"odd":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
        with pytest.raises(InputError, match="odd: is F4, which torch has no type for"):
            loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "out.bin")
        loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
        assert (tmp_path / "y.safetensors").read_bytes()[-2:] == b"12" and "F4" in DTYPES

    def test_an_output_that_exists(self, tmp_path: Path, model: Path) -> None:
        """--force replaces a model's files of either container, and nothing else."""
        loratool.convert_model(model, tmp_path / "out", to="torch")
        with pytest.raises(NeedsFlag, match="force=True"):
            loratool.convert_model(model, tmp_path / "out")
        loratool.convert_model(model, tmp_path / "out", force=True)
        assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
        torch.save({}, tmp_path / "out" / "optimizer.bin")
        with pytest.raises(UsageError, match="holds optimizer.bin"):
            loratool.convert_model(model, tmp_path / "out", force=True)
        with pytest.raises(UsageError, match="would overwrite an input"):
            loratool.convert_model(model, model, to="torch", force=True)

    def test_a_full_disk(self, tmp_path: Path, model: Path, monkeypatch: Any) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(MachineError, match="are needed and 10 B are free"):
            loratool.convert_model(model, tmp_path / "out", to="torch")
        report = loratool.convert_model(model, tmp_path / "out", to="torch", dry_run=True)
        assert report.warnings[-1].endswith("are needed and 10 B are free")
        monkeypatch.undo()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr("loratool.streaming.rewrite.write_at", no_space)  # the last: the list of a zip's entries
            loratool.convert_model(model, tmp_path / "out", to="torch")
        assert sorted(os.listdir(tmp_path)) == ["model", "out.loratool-journal", "out.loratool-partial"]
        loratool.convert_model(model, tmp_path / "out", to="torch", resume=True)
        assert sorted(os.listdir(tmp_path)) == ["model", "out"]

    @pytest.mark.parametrize("out", ["out", "out.bin", "out.safetensors"])
    def test_stopped_in_the_middle(self, tmp_path: Path, model: Path, out: str) -> None:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loratool.convert_model(model, tmp_path / out, progress=stop)
        assert os.listdir(tmp_path) == ["model"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("-o", "x.safetensors", "--max-shard-size", "1KB"), "--max-shard-size needs a folder as output"),
            (("-o", "x.bin", "--to", "safetensors"), ".bin is not a suffix of a safetensors file"),
            (("-o", "x.safetensors", "--to", "torch"), ".safetensors is not a suffix of a torch file"),
            (("-o", "x.gguf"), "--to of a checkpoint is safetensors or torch, not 'gguf'"),
            (("--plain",), "is a checkpoint, but --plain is for adapters"),
            (("--layout", "split"), "is a checkpoint, but --layout is for adapters"),
            (("--for", "vllm"), "is a checkpoint, but --for is for adapters"),
            (("--rename", "a=b"), "is a checkpoint, but --rename is for adapters"),
            (("--enable-lora", "1,0"), "is a checkpoint, but --enable-lora is for adapters"),
            (("--alpha", "0.0"), "is a checkpoint, but --alpha is for adapters"),
            (("--dtype", "fp8"), "dtype: 'fp8' is none of keep, fp32"),
            (("--to", "gguf"), "convert_hf_to_gguf.py writes GGUF"),
        ],
    )
    def test_usage(self, model: Path, run: Any, monkeypatch: Any, arguments: tuple[str, ...], message: str) -> None:
        monkeypatch.chdir(model.parent)
        result = run("convert", model, *arguments)
        assert result.exit_code == 2 and message in result.stderr
        assert os.listdir() == ["model"]

    def test_an_adapter_s_formats_are_not_a_checkpoint_s(self, model: Path, run: Any) -> None:
        result = run("convert", model, "--to", "kohya")
        assert result.exit_code == 3
        assert "is not an adapter in a known format" in result.stderr
        assert result.stderr.endswith("convert it as a checkpoint, with --to safetensors or torch\n")
        adapter = FIXTURES / "llama" / "adapter"
        for options, message in (
            ((), "is an adapter, and needs --to, one of peft, kohya, diffusers"),
            (("--to", "torch"), "is an adapter, and 'torch' is none of peft, kohya, diffusers"),
            (("--to", "peft", "--max-shard-size", "1GB"), "--max-shard-size is for checkpoints"),
        ):
            result = run("convert", adapter, *options)
            assert result.exit_code == 2 and message in result.stderr
        with pytest.raises(UsageError, match="to of a checkpoint is safetensors or torch, not 'gguf'"):
            loratool.convert_model(model, to="gguf")


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


class TestCommandLine:
    def test_text(self, tmp_path: Path, run: Any) -> None:
        x = torch.tensor([1e-9, 1.0])
        save_file({"w": x, "n": torch.arange(3)}, tmp_path / "x.safetensors")
        result = run("convert", tmp_path / "x.safetensors", "-o", tmp_path / "y.bin", "--dtype", "fp16")
        lines = result.stdout.splitlines()
        assert lines == [
            f"{tmp_path / 'x.safetensors'} -> {tmp_path / 'y.bin'}",
            "1 tensor F32 -> F16, 1 number became 0",
            "1 tensor copied byte for byte",
            "",
            "tensor  shape  became 0",
            "w           2         1",
            "",
            f"wrote {tmp_path / 'y.bin'}  {(tmp_path / 'y.bin').stat().st_size / 1000:.2f} kB, torch, 1 file",
        ]

    def test_json_and_a_dry_run(self, tmp_path: Path, run: Any) -> None:
        base = save_torch(tmp_path / "base", {"w": weights(3), "v": weights(2)})
        options = ("convert", base, "--dtype", "bf16", "-o", tmp_path / "out")
        dry = json.loads(run(*options, "--dry-run", "--json").stdout)
        assert dry["verb"] == "convert" and dry["ok"] and dry["report"]["dry_run"]
        assert [row["flushed"] for row in dry["report"]["cast"]] == [None, None]
        assert not (tmp_path / "out").exists()
        assert "2 tensors F32 -> BF16\n" in run(*options, "--dry-run").stdout
        wet = json.loads(run(*options, "--json").stdout)["report"]
        assert [row["flushed"] for row in wet["cast"]] == [0, 0]
        assert {**wet, "cast": None, "dry_run": True} == {**dry["report"], "cast": None}
        assert wet["nbytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size

    @pytest.mark.parametrize(("given", "to", "name"), [
        ("x.bin", None, "converted.safetensors"), ("x.bin", "torch", "converted.bin"),
        ("folder", None, "converted"), ("folder", "torch", "converted"),
    ])  # fmt: skip
    def test_the_default_name(self, tmp_path: Path, monkeypatch: Any, given: str, to: str | None, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        save_torch(Path("folder"), {"w": weights(3)})
        shutil.copy("folder/pytorch_model.bin", "x.bin")
        assert loratool.convert_model(given, to=to).out == name and Path(name).exists()
