"""Choose the files of repositories as they are published, and hold the choice against reading a clone of each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from loratool.adapters.formats.find import find_adapter_file
from loratool.errors import InputError
from loratool.files.checkpoint import find_weights
from loratool.files.hub.choice import needed_files
from loratool.files.hub.names import HubName

INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
PIPELINE = json.dumps(
    {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
)
CONTENTS = {"model.safetensors.index.json": INDEX, "model_index.json": PIPELINE}

# What a repository has, in words; those with a star are needed for its name alone
REPOSITORIES = {
    "a model with copies for other software": """
        config.json* generation_config.json* tokenizer.json* tokenizer_config.json* model.safetensors* LICENSE*
        README.md* model.fp16.safetensors pytorch_model.bin flax_model.msgpack tf_model.h5 rust_model.ot .gitattributes
        onnx/model.onnx original/consolidated.00.pth openvino/openvino_model.bin
    """,
    "shards by the index, and a copy for vLLM": """
        config.json* model.safetensors.index.json* model-00001-of-00002.safetensors* model-00002-of-00002.safetensors*
        consolidated.safetensors model-00003-of-00003.safetensors tokenizer.model* optimizer.pt
    """,
    "torch's weights alone": "config.json* pytorch_model.bin* training_args.bin optimizer.pt vocab.txt* tf_model.h5",
    "PEFT's adapter in a run's folder": """
        adapter_config.json* adapter_model.safetensors* README.md* tokenizer.json* optimizer.pt training_args.bin
        checkpoint-500/adapter_config.json checkpoint-500/adapter_model.safetensors checkpoint-500/optimizer.pt
    """,
    "PEFT's adapter in both containers": "adapter_config.json* adapter_model.bin adapter_model.safetensors*",
    "MLX's adapter with earlier checkpoints": """
        adapter_config.json* adapters.safetensors* 0000100_adapters.safetensors
    """,
    "an image adapter of its own name": "my_style.safetensors* README.md* images/a.png .gitattributes",
    "one GGUF model": "model-Q4_K_M.gguf* README.md* config.json*",
    "a split GGUF model": "m-00001-of-00002.gguf* m-00002-of-00002.gguf*",
    "a pipeline": """
        model_index.json* unet/config.json* unet/diffusion_pytorch_model.safetensors* unet/diffusion_pytorch_model.bin
        unet/diffusion_pytorch_model.fp16.safetensors scheduler/scheduler_config.json* safety_checker/model.safetensors
        v1-5-pruned.safetensors README.md*
    """,
    "a pipeline in half precision alone": """
        model_index.json* unet/config.json* unet/diffusion_pytorch_model.fp16.safetensors*
        scheduler/scheduler_config.json*
    """,
    "names with signs of patterns": "config.json* model.safetensors* chat_template[1].jinja* x/[a].safetensors",
}


def listing(text: str) -> tuple[dict[str, str], set[str]]:
    """Return a repository's files and their contents, and those that are needed."""
    names = [name for name in text.split() if name != "|"]
    files = {name.rstrip("*"): CONTENTS.get(name.rstrip("*"), "{}") for name in names}
    return files, {name.rstrip("*") for name in names if name.endswith("*")}


def write(folder: Path, files: dict[str, str], chosen: set[str] | None = None) -> Path:
    for name, content in files.items():
        if chosen is None or name in chosen:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    return folder


def needed(path: str, there: dict[str, str], snapshot: Path, config_alone: bool = False) -> set[str]:
    sizes = {name: len(content) for name, content in there.items()}
    return set(needed_files(HubName("org/name", None, path, False), sizes, snapshot, config_alone).files)


@pytest.mark.parametrize("prefix", ["", "sub/folder/"])
@pytest.mark.parametrize("what", REPOSITORIES)
def test_what_is_needed_is_what_a_clone_would_be_read_from(tmp_path: Path, what: str, prefix: str) -> None:
    plain, starred = listing(REPOSITORIES[what])
    files = {prefix + name: content for name, content in plain.items()}
    path = prefix.rstrip("/")
    snapshot, wanted = tmp_path / "snapshot", {prefix + name for name in starred}
    for _ in range(3):  # an index tells of more when it is there
        found = needed(path, files, snapshot)
        assert found <= wanted
        write(snapshot, files, found)
    assert found == wanted
    clone = write(tmp_path / "clone", files)
    find = find_adapter_file if "adapter" in what else find_weights
    if "pipeline" not in what:
        assert find(snapshot / path).relative_to(snapshot) == find(clone / path).relative_to(clone)


def test_a_file_alone_is_needed_with_the_config_beside_it(tmp_path: Path) -> None:
    files = dict.fromkeys("config.json a.safetensors b.safetensors tokenizer.json x/c.safetensors x/NOTICE".split(), "")
    assert needed("a.safetensors", files, tmp_path) == {"a.safetensors", "config.json", "tokenizer.json"}
    assert needed("x/c.safetensors", files, tmp_path) == {"x/c.safetensors"}
    assert needed("config.json", files, tmp_path) == {"config.json"}


def test_a_config_is_enough_for_names(tmp_path: Path) -> None:
    files = dict.fromkeys("config.json model.safetensors".split(), "")
    assert needed("", files, tmp_path, config_alone=True) == {"config.json"}
    assert needed("", {"m.gguf": ""}, tmp_path, config_alone=True) == {"m.gguf"}


@pytest.mark.parametrize(
    ("names", "path", "message"),
    [
        ("a.safetensors b.safetensors", "", "several files of weights.*org/name/a.safetensors, org/name/b.safetensors"),
        ("x/a.gguf x/b.gguf", "x", "several files of weights.*org/name/x/a.gguf"),
        ("x/adapter_model.safetensors y/z/a.gguf w/README.md", "", "no weights.*of them: org/name/x, org/name/y/z$"),
        ("README.md model.onnx", "", "no weights in a supported format$"),
        ("config.json", "sub", "no such folder or file"),
        ("subs/config.json", "sub", "no such folder or file"),
    ],
)
def test_what_cannot_be_chosen_is_named(tmp_path: Path, names: str, path: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        needed(path, dict.fromkeys(names.split(), ""), tmp_path)
    assert re.search(message, str(caught.value), re.DOTALL)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "../../secret", "b": "/etc/passwd", "c": "ok.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    files = {"model.safetensors.index.json": index, "ok.safetensors": ""}
    assert needed("", files, tmp_path) == {"model.safetensors.index.json", "ok.safetensors"}
