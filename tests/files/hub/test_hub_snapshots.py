"""Find models in a cache as huggingface_hub leaves it, without a network, and as huggingface_hub finds them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_model

from loratool.errors import InputError
from loratool.files.checkpoint import open_checkpoint
from loratool.files.hub.cache import resolve
from loratool.files.hub.snapshots import cache_folder, is_offline

TENSORS = {"a": torch.ones(2, 3), "b": torch.zeros(4)}

VARIABLES = """
    HF_HOME XDG_CACHE_HOME HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE
""".split()

ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"HF_HOME": "/a"},
    {"HF_HOME": "~/a$HOME"},
    {"XDG_CACHE_HOME": "/b"},
    {"XDG_CACHE_HOME": "~/b"},
    {"XDG_CACHE_HOME": "/b", "HF_HOME": "/a"},
    {"HF_HUB_CACHE": "/c", "HF_HOME": "/a"},
    {"HF_HUB_CACHE": "~/c${HOME}/d"},
    {"HUGGINGFACE_HUB_CACHE": "/d", "HF_HOME": "/a"},
    {"HUGGINGFACE_HUB_CACHE": "~/d"},
    {"HUGGINGFACE_HUB_CACHE": "/d", "HF_HUB_CACHE": "/c"},
    {"HF_HOME": ""},
    {"HF_HUB_OFFLINE": "1"},
    {"HF_HUB_OFFLINE": "0"},
    {"HF_HUB_OFFLINE": "yes"},
    {"HF_HUB_OFFLINE": "y"},
    {"TRANSFORMERS_OFFLINE": "On"},
    {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
    {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "true"},
]

THEIRS = """
import importlib, json, os, sys
from huggingface_hub import constants
for env in json.loads(sys.argv[1]):
    for key in json.loads(sys.argv[2]):
        os.environ.pop(key, None)
    os.environ.update(env)
    importlib.reload(constants)
    print(json.dumps([constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE]))
"""


def test_the_environment_means_what_it_means_to_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, which is in the extra `hub`")
    command = [sys.executable, "-c", THEIRS, json.dumps(ENVIRONMENTS), json.dumps(VARIABLES)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for env, theirs in zip(ENVIRONMENTS, said, strict=True):
        for key in VARIABLES:
            monkeypatch.delenv(key, raising=False)
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        assert [str(cache_folder()), is_offline()] == json.loads(theirs), env


COMMITS = ("0123abcd" * 5, "0123abce" + "0" * 32, "fedcba98" * 5)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with org/tiny, whose main branch is the first commit, and gpt2 of one commit."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for repository in ("org--tiny", "gpt2"):
        own = tmp_path / "cache" / f"models--{repository}"
        blob = write_model(own / "blobs", TENSORS).joinpath("model.safetensors").rename(own / "blobs" / "abc")
        for commit in COMMITS:
            for folder in ("", "sub"):
                place = own / "snapshots" / commit / folder
                place.mkdir(parents=True)
                (place / "model.safetensors").symlink_to(blob)
        for revision, commit in zip(("main", "v1", "refs/pr/1", "cut"), (*COMMITS, "f" * 40), strict=True):
            (own / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
            (own / "refs" / revision).write_text(commit)
    return tmp_path / "cache"


def test_a_path_that_is_there_wins_over_a_name(cache: Path, tmp_path: Path) -> None:
    """So does what a killed run has set aside, and a link to nothing is no name of a model."""
    assert resolve("gpt2").name == COMMITS[0]
    (tmp_path / "gpt2.loratool-former").mkdir()
    assert resolve("gpt2").name == COMMITS[0]
    (tmp_path / "gpt2.loratool-former" / "model.safetensors").touch()
    assert resolve("gpt2") == Path("gpt2.loratool-former")
    (tmp_path / "gpt2.loratool-former").rename(tmp_path / "gpt2")
    assert resolve("gpt2") == Path("gpt2")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    (tmp_path / "gpt2").rmdir()
    (tmp_path / "gpt2").symlink_to("gone")
    with pytest.raises(InputError, match="is a link to gone, which is not there"):
        resolve("gpt2")


FOUND = {
    "org/tiny": COMMITS[0],
    "org/tiny@main": COMMITS[0],
    "org/tiny@v1": COMMITS[1],
    "org/tiny@refs/pr/1": COMMITS[2],
    f"org/tiny@{COMMITS[2]}": COMMITS[2],
    "gpt2": COMMITS[0],
    "gpt2@v1": COMMITS[1],
}


@pytest.mark.parametrize("name", FOUND)
def test_revisions_are_found_as_huggingface_hub_finds_them(cache: Path, name: str) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, which is in the extra `hub`")
    repository, _, revision = name.partition("@")
    theirs = hub.snapshot_download(repository, revision=revision or None, cache_dir=cache, local_files_only=True)
    assert (str(resolve(name)), Path(theirs).name) == (theirs, FOUND[name])
    file = hub.try_to_load_from_cache(repository, "sub/model.safetensors", cache, revision or None)
    with_path = f"{name}/sub/model.safetensors" if "/" in name else f"hf://{name}"
    assert str(resolve(with_path)) in (file, theirs)
    assert set(open_checkpoint(name)) == set(TENSORS)


def test_short_hashes(cache: Path) -> None:
    for commit in COMMITS:
        assert resolve(f"org/tiny@{commit[:8]}").name == commit
    with pytest.raises(InputError, match=r"(?s)2 commits begin with 0123abc\ngive more of the hash"):
        resolve("org/tiny@0123abc")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "nor in the Hugging Face cache, and HF_HUB_OFFLINE is set\nunset.*: hf download org/absent$"),
        ("org/tiny@v2", "nor in the Hugging Face cache.*hf download org/tiny --revision v2$"),
        ("org/tiny@cut", "nor in the Hugging Face cache.*"),
        ("org/tiny/absent", "is incomplete in the Hugging Face cache: it has no such folder or file"),
        ("hf://absent", "nor in the Hugging Face cache.*hf download absent"),
        ("org/absent@v1$(ls)", r"hf download org/absent --revision 'v1\$\(ls\)'$"),
        ("absent", "no such file or folder\nfor the hub's model of this name: hf://absent"),
        ("cache/absent", "no such file or folder\nfor the hub's model of this name: hf://cache/absent"),
        ("absent.safetensors", "no such file or folder$"),
        ("absent/model.safetensors", "no such file or folder$"),
        ("./org/tiny", "no such file or folder$"),
        ("org/../tiny", "no such file or folder$"),
    ],
)
def test_what_is_not_in_the_cache(cache: Path, name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(name)
    assert re.search(message, str(caught.value), re.DOTALL)


def test_an_incomplete_snapshot_says_what_is_missing(cache: Path) -> None:
    """Shards by the index; a link to nothing; a component of a pipeline; no weights at all."""
    own = cache / "models--org--tiny" / "snapshots" / COMMITS[0]
    (own / "model.safetensors").unlink()
    with pytest.raises(InputError, match="incomplete in the Hugging Face cache: it holds no weights"):
        resolve("org/tiny")
    (own / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(InputError, match="incomplete in the Hugging Face cache: model.safetensors is missing"):
        resolve("org/tiny")
    files = [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {file: file for file in files}}))
    (own / files[1]).write_bytes(b"")
    with pytest.raises(InputError, match=rf"cache: {files[0]}, {files[2]}, {files[3]} and 1 more are missing"):
        resolve("org/tiny")
    (own / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    (own / "unet").mkdir()
    (own / "unet" / "diffusion_pytorch_model.safetensors").symlink_to("gone")
    with pytest.raises(InputError, match=r"cache: unet/diffusion_pytorch_model.safetensors is missing"):
        resolve("org/tiny")
    (own / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (own / "unet" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"cache: it holds no weights"):
        resolve("org/tiny")


@pytest.mark.parametrize(
    "listed", ["{}", "[", '{"format_version": 1, "files": {"x": {"size": "y"}}}', '{"format_version": 9}']
)
def test_a_list_of_files_in_another_form_is_not_used(cache: Path, listed: str) -> None:
    trees = cache / "models--org--tiny" / "trees"
    trees.mkdir()
    (trees / f"{COMMITS[0]}.json").write_text(listed)
    assert resolve("org/tiny").name == COMMITS[0]


def test_the_list_of_files_tells_what_is_missing(cache: Path) -> None:
    trees = cache / "models--org--tiny" / "trees"
    trees.mkdir()
    weights = {"size": (cache / "models--org--tiny" / "blobs" / "abc").stat().st_size}
    for files, missing in (
        ({"model.safetensors": weights}, ""),
        ({"model.safetensors": {**weights, "lfs_size": 5}}, "model.safetensors is missing"),
        ({"model.safetensors": weights, "tokenizer.json": {"size": 2}}, "tokenizer.json is missing"),
        ({"model.safetensors": weights, "notes.bin": {"size": 2}}, ""),
    ):
        (trees / f"{COMMITS[0]}.json").write_text(json.dumps({"format_version": 1, "files": files}))
        if missing:
            with pytest.raises(InputError, match=missing):
                resolve("org/tiny")
        else:
            assert resolve("org/tiny").name == COMMITS[0]


def test_a_lone_file_of_another_name_is_named(cache: Path) -> None:
    own = cache / "models--org--tiny" / "snapshots" / COMMITS[0]
    (own / "model.safetensors").rename(own / "style.safetensors")
    with pytest.raises(InputError, match=r"(?s)it may not be the only one.*org/tiny/style.safetensors"):
        resolve("org/tiny")
    assert set(open_checkpoint("org/tiny/style.safetensors")) == set(TENSORS)


def test_a_ref_does_not_lead_out_of_the_cache(cache: Path) -> None:
    for text in ("../../../..", "/etc", ""):
        (cache / "models--org--tiny" / "refs" / "main").write_text(text)
        with pytest.raises(InputError, match="nor in the Hugging Face cache"):
            resolve("org/tiny")
