"""Hold checkpoints: folders, indexes against their shards, names in the hub's local cache."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import factors, load_model, weights, write_model, write_peft
from lib.files import gguf_bytes

from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint, plain_dtype, read_config, split_into_shards
from loratool.files.dtypes import TensorSpec

TENSORS = {f"layers.{i}.weight": weights(4, 3, seed=i) for i in range(5)}
INDEX = "model.safetensors.index.json"
ONE = np.ones((1, 4))


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name, file in changes.items():
        if file is None:
            del index["weight_map"][name.replace("__", ".")]
        else:
            index["weight_map"][name.replace("__", ".")] = file
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_folder_is_a_mapping_of_its_tensors(tmp_path: Path, shards: int) -> None:
    folder = write_model(tmp_path / "m", TENSORS, {"model_type": "llama"}, shards)
    for path in (folder, folder / (INDEX if shards > 1 else "model.safetensors")):
        checkpoint = open_checkpoint(path)
        assert checkpoint.model_type == "llama" and set(checkpoint) == set(TENSORS) and len(checkpoint) == 5
        assert all(torch.equal(checkpoint[name], tensor) for name, tensor in load_model(folder).items())
    with pytest.raises(KeyError):
        checkpoint["absent"]


def test_shards_without_an_index(tmp_path: Path) -> None:
    """The remedy names the index that is missing; two models in one folder have no such remedy."""
    folder = write_model(tmp_path / "m", TENSORS, {"model_type": "llama"}, 2)
    (folder / INDEX).unlink()
    with pytest.raises(InputError, match="holds several checkpoints") as error:
        open_checkpoint(folder)
    assert error.value.remedy == f"copy {INDEX} of the same model into it: these files are shards"
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(folder / f"{number}.safetensors")
    with pytest.raises(InputError, match="holds several checkpoints") as error:
        open_checkpoint(folder)
    assert error.value.remedy == "give the path of one of these files"


BROKEN = {
    "missing shard": ({"layers__0__weight": "gone.safetensors"}, "gone.safetensors, which is missing"),
    "stale name": ({"layers__9__weight": "model-00001-of-00002.safetensors"}, "no shard has it"),
    "wrong shard": ({"layers__0__weight": "model-00002-of-00002.safetensors"}, "it is in model-00001"),
    "unlisted tensor": ({"layers__2__weight": None}, "does not list layers.2.weight"),
    "leaves the folder": ({"layers__0__weight": "../x.safetensors"}, "not a file beside it"),
    "absolute path": ({"layers__0__weight": "/etc/passwd"}, "not a file beside it"),
    "windows path": ({"layers__0__weight": "..\\x.safetensors"}, "not a file beside it"),
    "empty name": ({"layers__0__weight": ""}, "not a file beside it"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_index_that_contradicts_its_shards_is_refused(tmp_path: Path, case: str) -> None:
    """An index may be stale, incomplete, or lead out of the folder."""
    changes, message = BROKEN[case]
    folder = write_model(tmp_path / "m", TENSORS, shards=2)
    edit_index(folder, **changes)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", TENSORS, shards=2)
    write_model(
        tmp_path / "x",
        {"layers.0.weight": weights(4, 3), "layers.1.weight": weights(4, 3), "layers.3.weight": weights(4, 3)},
    )
    (tmp_path / "x" / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="layers.0.weight is in both"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 1}}', '{"weight_map": {"x": "a", "x": "b"}}'],
)
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match=INDEX):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config",
    ['{"text_config":[1]}', '{"quantization_config": "x"}', '{"model_type": 3}', '{"tie_word_embeddings": []}'],
)
def test_odd_configs_and_indexes_do_not_matter(tmp_path: Path, config: str) -> None:
    import loratool

    folder = write_model(tmp_path / "m", TENSORS, shards=2)
    (folder / "config.json").write_text(config)
    index = json.loads((folder / INDEX).read_text()) | {"metadata": [1]}
    (folder / INDEX).write_text(json.dumps(index))
    adapter = write_peft(tmp_path / "a", {"layers.0": factors(4, 3, 2)})
    loratool.inspect(folder)
    loratool.merge(folder, adapter, tmp_path / "out")
    (folder / "config.json").write_text('{"a": "\\ud800"}')
    with pytest.raises(InputError, match="not Unicode text"):
        open_checkpoint(folder)


def test_names_that_no_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x" * 300, "a/" + "x" * 300):
        with pytest.raises(InputError):
            open_checkpoint(name)
    with pytest.raises(InputError, match="a path is empty"):
        open_checkpoint("")
    folder = write_model(tmp_path / "m", TENSORS, shards=2)
    edit_index(folder, layers__0__weight="x" * 300)
    with pytest.raises(InputError, match="too long"):
        open_checkpoint(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b" / "refs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs" / "main").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="hf download"):
        open_checkpoint("a/b")


def test_which_file_a_folder_means(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is an empty folder"):
        open_checkpoint(tmp_path)
    torch.save({"zero": weights(2)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path)) == ["zero"]
    write_model(tmp_path, {"one": weights(2)})
    (tmp_path / "model.safetensors").rename(tmp_path / "own.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["one"]
    write_model(tmp_path / "b", {"two": weights(2)})
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="several checkpoints"):
        open_checkpoint(tmp_path)
    write_model(tmp_path, {"three": weights(2)})
    assert list(open_checkpoint(tmp_path)) == ["three"]
    write_model(tmp_path, TENSORS, shards=2)
    assert set(open_checkpoint(tmp_path)) == set(TENSORS)


def test_a_config_takes_the_memory_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is larger than any is not read."""
    folder = write_model(tmp_path / "m", {"x": weights(2)}, {"model_type": "llama"})
    tracemalloc.start()
    assert read_config(folder) == {"model_type": "llama"} and tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with open(folder / "config.json", "r+b") as file:
        file.truncate(100_000_001)
    with pytest.raises(InputError, match=r"is larger than 100 MB, which is too large for a config or index"):
        open_checkpoint(folder)


def test_several_files_of_a_kind_are_not_told_apart(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({"x": weights(2)}, tmp_path / f"{name}.pt")
    torch.save({"step": 1}, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"holds several torch files \(a\.pt, b\.pt\)"):
        open_checkpoint(tmp_path)
    (tmp_path / "b.pt").unlink()
    assert list(open_checkpoint(tmp_path)) == ["x"]
    (tmp_path / "gguf").mkdir()
    for name in "ab":
        gguf_bytes.write(
            tmp_path / "gguf" / f"{name}.gguf", {"general.architecture": "x"}, {"w": gguf_bytes.floats(ONE)}
        )
    with pytest.raises(InputError, match=r"holds several GGUF models \(a\.gguf, b\.gguf\)"):
        open_checkpoint(tmp_path / "gguf")
    (tmp_path / "gguf" / "b.gguf").unlink()
    assert list(open_checkpoint(tmp_path / "gguf")) == ["w"]


def test_codes_of_a_layer_that_is_turned(tmp_path: Path) -> None:
    """GPT-2's weights are (in, out), and nothing says whether codes in their place are."""
    tensors = {
        "h.0.attn.c_attn.weight": weights(4, 12).to(torch.float8_e4m3fn), "h.0.attn.c_attn.weight_scale": torch.ones(1),
        "h.0.ln_1.weight": weights(4),
    }  # fmt: skip
    config = {"quantization_config": {"quant_method": "fp8"}}
    turned = open_checkpoint(write_model(tmp_path / "gpt2", tensors, {"model_type": "gpt2", **config}))
    assert not turned.weights and "stores (in, out)" in turned.coded["h.0.attn.c_attn.weight"].fault
    others = open_checkpoint(write_model(tmp_path / "other", tensors, {"model_type": "llama", **config}))
    assert list(others.weights) == ["h.0.attn.c_attn.weight"] and not others.faults


def test_the_part_of_a_state_without_weights(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    file = tmp_path / "s" / "mp_rank_00_model_states.pt"
    torch.save({"module": {"x.weight": torch.empty(0)}, "ds_version": "0.19"}, file)
    with pytest.raises(InputError, match="is a part of a DeepSpeed ZeRO state, and the weights are in other files"):
        open_checkpoint(file)


@pytest.mark.parametrize("sizes", [(("w", 3, "F16"), ("v", 9, "F32")), (("w", 3, "F16"), ("v", 2, "BF16"))])
def test_the_type_of_most_numbers(tmp_path: Path, sizes: tuple[tuple[str, int, str], ...]) -> None:
    """Of a GGUF model vectors do not count, as they are float32 whatever its matrices are."""
    arrays = {name: ONE.repeat(count, 0) if dtype != "F32" else ONE[0].repeat(count) for name, count, dtype in sizes}
    tensors = {name: gguf_bytes.floats(arrays[name], dtype) for name, _, dtype in sizes}
    model = gguf_bytes.write(tmp_path / "x.gguf", {"general.architecture": "x"}, tensors)
    assert plain_dtype(open_checkpoint(model)) == "F16"
    folder = write_model(tmp_path / "m", {"i": torch.arange(3)}, {"text_config": {"dtype": "float16"}})
    assert plain_dtype(open_checkpoint(folder)) == "F16"


def test_split_into_shards_is_a_function_of_sizes() -> None:
    specs = {name: TensorSpec("U8", (size,)) for name, size in (("a", 4), ("b", 6), ("c", 11), ("d", 1), ("e", 9))}
    assert split_into_shards(specs, None) == [["a", "b", "c", "d", "e"]]
    assert split_into_shards(specs, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert split_into_shards(specs, 1) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert split_into_shards({}, 10) == [[]]
