"""Open what people have in the place of weights: each is named, with a remedy, and none of it is run or half read.

The first bytes of other frameworks' files are those that onnx 1.23.2, h5py 3.16.0 and flax 0.12.8 wrote, or those of
the format's definition; archives, pickles and arrays are made here by Python, torch and NumPy.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import factors, weights, write_model, write_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.files.gguf_bytes import floats, gguf
from safetensors.torch import save_file

from loratool import InputError
from loratool.adapters.formats import holds_adapter, open_adapter
from loratool.files.checkpoint import open_checkpoint, read_config
from loratool.files.containers import file_kinds

Run = Callable[..., Any]

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n"


def _zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def _written(write: Callable[[io.BytesIO], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _tar(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model_weights.ckpt"))


# (the file's name, its bytes, what is said of it, a word of the remedy)
FILES = [
    ("model.safetensors", POINTER, "a Git-LFS pointer", "git lfs pull"),
    ("model.safetensors", b"# xet version 0\nfilesize = 3\nhash = 'ab'\n", "a pointer of git-xet", "git xet checkout"),
    ("model.safetensors", b"/annex/objects/SHA256E-s104--ab.bin\n", "a pointer of git-annex", "git annex get"),
    ("model.safetensors", b"<!DOCTYPE html>\n<html>", "an HTML page", "/resolve/"),
    ("pytorch_model.bin", b"\xef\xbb\xbf\r\n <html lang='en'>", "an HTML page", "hf download"),
    ("model.safetensors", b'<?xml version="1.0"?><Error><Code>NoSuchKey', "an XML text", "hf download"),
    ("a.safetensors", b'{"error":"Invalid username or password."}', "answer.*'Invalid username or", "hf download"),
    ("a.safetensors", b'{"weights": [1, 2]}', "is JSON", "hf download"),
    ("a.safetensors", b"Entry not found", "is a text, not weights, and begins 'Entry not found'", "hf download"),
    ("a.safetensors", "Zugriff verweigert: für alle".encode()[:30], "is a text", "hf download"),
    ("a.safetensors", b"", "is empty", "hf download"),
    ("a.safetensors", bytes(4096), "is a file that begins with zeros", "hf download"),
    ("model.onnx", b"\x08\x0e\x12\x07pytorch:7\n\x10\n\x01x\x12\x01y", "an ONNX model", "PyTorch"),
    ("a.safetensors", b'\x08\n:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01', "an ONNX model", "PyTorch"),
    ("saved_model.pb", b"\x08\x01\x12\xb8\x1a\n", "a TensorFlow SavedModel", "PyTorch"),
    ("graph.pb", b"\n\x10\n\x05input\x12", "a TensorFlow graph", "PyTorch"),
    ("tf_model.h5", b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0", "an HDF5 file", "PyTorch"),
    ("model.tflite", b"\x1c\0\0\0TFL3\x14\0 \0", "a TensorFlow Lite model", "PyTorch"),
    ("model.ckpt.data-00000-of-00001", b"\x9a\x99\x19?" * 9, "a TensorFlow checkpoint", "PyTorch"),
    ("flax_model.msgpack", b"\x81\xa6params\x81\xa1a\xc7\x15\x01\x93\x91\x02\xa7float32", "a Flax file", "PyTorch"),
    ("model.db", b"SQLite format 3\0\x10\0\x01\x01", "an SQLite database", "export the model"),
    ("step.wdelta", b"wdelta\0\x01\0\0\0", "a change of a model's weights, of deltatensors", "apply it"),
    ("model.safetensors.znn", b"ZN\0\x05\x04", "compressed by ZipNN", "decompress it"),
    ("a.bin", b"tjgg\x01\0\0\0", "a GGML file", "GGUF"),
    ("ggml-adapter-model.bin", b"algg\x01\0\0\0\x10\0\0\0", "a GGLA adapter", "converted from"),
    ("a.npy", _written(lambda f: np.save(f, np.ones(3))), "a NumPy array", "safetensors.numpy"),
    ("model.keras", _zip("config.json", "model.weights.h5"), "a Keras model", "PyTorch"),
    ("a.pt", _zip("folder/model.safetensors"), "a zip archive", "unpack"),
    ("model.nemo", _written(_tar), "a tar archive", "unpack"),
    ("a.safetensors.gz", gzip.compress(b"x", mtime=0), "a gzip archive", "unpack"),
    ("a.safetensors", b"\x28\xb5\x2f\xfd\x04\x00", "a Zstandard archive", "unpack"),
    ("a.safetensors", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image", "hf download"),
    ("loratool.undo", b"loratool undo 2\n\xd0\x11", "an undo file of loratool", "loratool unmerge"),
    ("a.safetensors", b"\xe9\x01\x07\x80" * 9, "is not a weights file: neither safetensors nor GGUF", ""),
    ("a.safetensors", b"%PDF-1.7\n", "a PDF document", "hf download"),
]


@pytest.mark.parametrize(("name", "data", "what", "remedy"), FILES, ids=lambda each: str(each)[:24])
def test_a_file_that_is_no_weights_says_what_it_is(
    tmp_path: Path, run: Run, name: str, data: bytes, what: str, remedy: str
) -> None:
    (tmp_path / name).write_bytes(data)
    for opened in (open_checkpoint, open_adapter, holds_adapter):
        with pytest.raises(InputError, match=what) as caught:
            opened(tmp_path / name)
        assert caught.value.culprit == str(tmp_path / name) and remedy in str(caught.value.remedy)
    assert run("inspect", tmp_path / name).exit_code == 3


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [{"w": torch.ones(2)}, OrderedDict(a=np.ones(2)), [1, 2]], ids=["dict", "od", "list"])
def test_a_plain_pickle_is_named_and_not_run(tmp_path: Path, protocol: int, value: Any) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(InputError, match="is a pickle of Python objects, which is a program and is not run"):
        open_checkpoint(tmp_path / "a.bin")


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@pytest.mark.parametrize("protocol", range(6))
def test_torch_files_of_every_protocol_are_what_torch_loads(tmp_path: Path, protocol: int, zipped: bool) -> None:
    path, state = tmp_path / "a.bin", {"w": torch.arange(3.0), "h": torch.ones(2, 2).half()}
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    if protocol == 0:
        with pytest.raises(AssertionError):
            torch.load(path, weights_only=False)
        with pytest.raises(InputError, match="in pickle protocol 0"):
            open_checkpoint(path)
        return
    loaded = torch.load(path, weights_only=False)
    with closing(open_checkpoint(path)) as model:
        assert {name: model[name].tolist() for name in model} == {name: W.tolist() for name, W in loaded.items()}


@pytest.mark.parametrize("count", [123, 379])
def test_a_gguf_file_whose_count_of_tensors_looks_like_a_brace(tmp_path: Path, count: int) -> None:
    """The byte in which a safetensors header has its brace is 123 where a GGUF file has as many tensors."""
    (tmp_path / "a.gguf").write_bytes(gguf({}, {f"t{i}": floats(np.ones(8, "f")) for i in range(count)}))
    with closing(open_checkpoint(tmp_path / "a.gguf")) as model:
        assert len(model) == count


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.onnx", "config.json"], "holds no weights but model.onnx, an ONNX model"),
        (["config.json", "tf_model.h5"], "holds no weights but tf_model.h5, an HDF5 file"),
        (["flax_model.msgpack"], "holds no weights but flax_model.msgpack, a Flax file"),
        (["saved_model.pb", "variables/variables.index"], "holds no weights but saved_model.pb, a TensorFlow Saved"),
        (["model.ckpt.index", "model.ckpt.data-00000-of-00001", "checkpoint"], "a TensorFlow checkpoint"),
        (["openvino_model.bin", "openvino_model.xml"], "openvino_model.bin.* OpenVINO's weights"),
        (["readme.txt"], "holds no weights: no"),
        ([], "is an empty folder"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"{}")
    (tmp_path / "a").mkdir(exist_ok=True)
    for opened in (open_checkpoint, open_adapter, holds_adapter):
        with pytest.raises(InputError, match=said):
            opened(tmp_path / "a")


def test_the_folder_inside_that_has_weights_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "models--org--name" / "snapshots" / "0123abc", {"w": weights(4, 4)})
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "models--org--name")
    assert caught.value.remedy == f"name the folder {model}"


def test_a_shard_and_a_config_that_are_pointers_are_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a", {"v": weights(4, 4), "w": weights(4, 4)}, {"model_type": "llama"}, shards=2)
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(POINTER)
    with pytest.raises(InputError, match="Git-LFS pointer") as caught:
        open_checkpoint(model)
    assert caught.value.culprit == str(shard)
    (model / "config.json").write_bytes(POINTER)
    with pytest.raises(InputError, match="Git-LFS pointer"):
        read_config(model)


@pytest.mark.parametrize(("there", "said"), [(0, "3 files, of which 3 are missing"), (2, "which is missing")])
def test_what_is_missing_of_shards_is_counted(tmp_path: Path, there: int, said: str) -> None:
    model = write_model(tmp_path / "a", {f"w{i}": weights(4, 4) for i in range(3)}, {"model_type": "llama"}, shards=3)
    for shard in sorted(model.glob("*.safetensors"))[there:]:
        shard.unlink()
    with pytest.raises(InputError, match=said):
        open_checkpoint(model)


def test_a_file_that_is_cut_off_is_fetched_anew(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a", {"w": weights(4, 4)}) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    with pytest.raises(InputError, match="is cut off.*\n.*fetch it again"):
        open_checkpoint(model)


def test_a_config_in_the_place_of_an_adapter(tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", {"q": (weights(2, 4), weights(4, 2))}) / "adapter_config.json"
    for opened in (open_checkpoint, open_adapter):
        with pytest.raises(InputError) as caught:
            opened(adapter)
        assert "name its folder" in str(caught.value.remedy)


def test_a_config_in_utf_16_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a", {"w": weights(4, 4)}, {"model_type": "llama"})
    (model / "config.json").write_text('{"model_type": "llama"}', encoding="utf-16")
    with pytest.raises(InputError, match="is a text in UTF-16") as caught:
        open_checkpoint(model)
    assert caught.value.remedy == "save it as UTF-8"


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""], ids=["bom", "plain"])
def test_a_byte_order_mark_before_json_counts_for_nothing(tmp_path: Path, mark: bytes) -> None:
    model = write_model(tmp_path / "a", {"v": weights(4, 4), "w": weights(4, 4)}, {"model_type": "llama"}, shards=2)
    adapter = write_peft(tmp_path / "b", {"v": (weights(2, 4), weights(4, 2))})
    for path in (*model.glob("*.json"), *adapter.glob("*.json")):
        path.write_bytes(mark + path.read_bytes())
    with closing(open_checkpoint(model)) as opened:
        assert (opened.model_type, len(opened)) == ("llama", 2)
    assert open_adapter(adapter).config.rank == 2


@settings(max_examples=100)
@given(
    start=st.sampled_from([data for _, data, _, _ in FILES] + [b"PK\x03\x04", b"\x80\x02", b"GGUF", b"(", b"c", b"{"]),
    cut=st.integers(0, 40),
    rest=st.binary(max_size=40),
)
def test_any_beginning_is_an_error_of_the_input(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, cut: int, rest: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.bin"
    path.write_bytes(start[:cut] + rest)
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert caught.value.culprit


@pytest.mark.parametrize(
    "name", ["style_lora_down.weight", "weights", "lora_unet_mid_block.lora_down.weight", "a.lora"]
)
@pytest.mark.parametrize("torch_file", [False, True], ids=["safetensors", "torch"])
def test_a_folder_whose_weights_have_any_name(tmp_path: Path, name: str, torch_file: bool) -> None:
    A, B = factors(4, 4, 2)
    tensors = {"lora_unet_down.lora_down.weight": A, "lora_unet_down.lora_up.weight": B}
    folder = tmp_path / "style.safetensors"
    folder.mkdir()
    torch.save(tensors, folder / name) if torch_file else save_file(tensors, folder / name)
    (folder / "readme.md").write_text("a style")
    torch.save({"a": torch.ones(1)}, folder / "optimizer.pt")
    assert list(open_adapter(folder).updates) == ["lora_unet_down"] and holds_adapter(folder)
    with closing(open_checkpoint(folder)) as model:
        assert len(model) == 2


def test_two_files_of_any_name_are_not_chosen_from(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"w": weights(4, 4)}, tmp_path / name)
    for opened in (open_checkpoint, open_adapter):
        with pytest.raises(InputError, match="(several|2) files of weights"):
            opened(tmp_path)


def test_a_file_that_may_not_be_read_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": weights(4, 4)}, tmp_path / "one")
    (tmp_path / "secret").write_text("x")

    def first_bytes(path: Path) -> bytes:
        if path.name == "secret":
            raise InputError("Permission denied", culprit=str(path))
        return path.read_bytes()[:512]

    monkeypatch.setattr(file_kinds, "first_bytes", first_bytes)
    with closing(open_checkpoint(tmp_path)) as model:
        assert list(model) == ["w"]


def test_folders_that_are_named_like_weights_are_folders(tmp_path: Path) -> None:
    """Lightning's DeepSpeed checkpoints are folders that end in .ckpt."""
    model = write_model(tmp_path / "a.safetensors", {"w": weights(4, 4)})
    (model / "model.safetensors").rename(model / "other.safetensors")
    for name in ("last.ckpt", "cache.safetensors", "old.gguf"):
        (model / name).mkdir()
    with closing(open_checkpoint(model)) as opened:
        assert list(opened) == ["w"]
    adapter = write_peft(tmp_path / "b.bin", {"v": (weights(2, 4), weights(4, 2))})
    (adapter / "last.ckpt").mkdir()
    assert list(open_adapter(adapter).updates) == ["v"]
    (model / "other.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        open_checkpoint(model)
