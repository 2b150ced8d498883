"""Read from and write to the stores of Google (a server of the tests with its JSON API) and Azure (Azurite, by npm)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import write_model, write_peft
from lib.harness.gcs_server import serve_gcs

import loratool
from loratool.errors import InputError
from loratool.files.stores import objects, outgoing, uploads

pytestmark = pytest.mark.slow

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]

Put = Callable[[str, bytes], None]  # (name in the bucket, content)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, g = tmp_path_factory.mktemp("pair"), torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(512, 512, generator=g).bfloat16() for name in NAMES}
    write_model(folder / "model", base, {"model_type": "llama"}, shards=2)
    factors = {name: (torch.randn(2, 512, generator=g), torch.randn(512, 2, generator=g)) for name in NAMES}
    write_peft(folder / "adapter", factors, r=2, lora_alpha=2)
    return folder


@pytest.fixture
def google(pair: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Put]]:
    pytest.importorskip("gcsfs").GCSFileSystem.clear_instance_cache()
    with serve_gcs() as store:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.endpoint)
        store.put_folder("bucket", pair)
        yield "gs://bucket", lambda name, data: store.put("bucket", name, data)


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run Azurite, and yield its connection string. AZURITE_BLOB is the program azurite-blob."""
    program = os.environ.get("AZURITE_BLOB") or shutil.which("azurite-blob")
    if not program:
        pytest.skip("needs `npm install azurite` and AZURITE_BLOB=.../node_modules/.bin/azurite-blob")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    options = ["--blobPort", str(port), "--location", str(folder), "--silent", "--skipApiVersionCheck"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as asked:
            if not asked.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # Azurite's own
    yield (
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};"
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    )
    process.terminate()
    process.wait()


@pytest.fixture
def azure(azurite: str, pair: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Put]]:
    fsspec, adlfs = pytest.importorskip("fsspec"), pytest.importorskip("adlfs")
    adlfs.AzureBlobFileSystem.clear_instance_cache()
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite)
    system = fsspec.filesystem("az")
    if not system.exists("bucket"):
        system.mkdir("bucket")
    for path in pair.rglob("*"):
        if path.is_file():
            system.pipe_file(f"bucket/{path.relative_to(pair).as_posix()}", path.read_bytes())
    yield "az://bucket", lambda name, data: system.pipe_file(f"bucket/{name}", data, overwrite=True)


@pytest.fixture(params=["google", "azure"])
def store(request: pytest.FixtureRequest) -> tuple[str, Put]:
    found: tuple[str, Put] = request.getfixturevalue(request.param)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_merge(store: tuple[str, Put], pair: Path, tmp_path: Path) -> None:
    link, _ = store
    loratool.merge(f"{link}/model", f"{link}/adapter", out=tmp_path / "far")
    loratool.merge(pair / "model", pair / "adapter", out=tmp_path / "near")
    assert contents(tmp_path / "far") == contents(tmp_path / "near")
    assert loratool.verify(f"{link}/model", f"{link}/adapter", merged=tmp_path / "far").ok


def test_a_file_with_what_is_beside_it(store: tuple[str, Put], pair: Path) -> None:
    link, _ = store
    name = "adapter/adapter_model.safetensors"
    assert loratool.inspect(f"{link}/{name}").groups == loratool.inspect(pair / name).groups


@pytest.mark.parametrize("name", ["nothing", "nothing.safetensors", "../none"])
def test_what_is_not_there(name: str, store: tuple[str, Put]) -> None:
    link, _ = store
    place = link.replace("bucket", "none") if name.startswith("..") else f"{link}/{name}"
    with pytest.raises(InputError, match="the store has no such object"):
        loratool.inspect(place)


def test_an_object_that_is_replaced(
    store: tuple[str, Put], pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, put = store
    name = "model/model-00002-of-00002.safetensors"
    data = bytearray((pair / name).read_bytes())
    data[-2:] = b"\1\1"
    fetch, replaced = objects.StoredObject._fetch, list[str]()

    def fetch_when_replaced(own: objects.StoredObject, first: int, end: int) -> bytes:
        if own.name.endswith(name) and not first and not replaced:
            found = fetch(own, first, end)
            replaced.append(name)
            put(name, bytes(data))
            return found
        return fetch(own, first, end)

    monkeypatch.setattr(objects.StoredObject, "_fetch", fetch_when_replaced)
    with pytest.raises(InputError, match=f"{name}: was written to or replaced"):
        loratool.merge(f"{link}/model", pair / "adapter", out=tmp_path / "out")
    put(name, (pair / name).read_bytes())
    assert replaced and not [*tmp_path.iterdir()]


def test_an_output(store: tuple[str, Put], pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    link, _ = store
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(outgoing, "PART", 1 << 18)
    monkeypatch.setattr(uploads, "PART", 1 << 18)
    loratool.merge(pair / "model", pair / "adapter", f"{link}/merged")
    loratool.merge(pair / "model", pair / "adapter", out=tmp_path / "near")
    system = fsspec.filesystem(link[:2])
    system.invalidate_cache()
    found = {name.removeprefix("bucket/merged/"): system.cat_file(name) for name in system.find("bucket/merged")}
    assert found.pop(outgoing.MARKER) and found == contents(tmp_path / "near")
    loratool.merge(f"{link}/model", f"{link}/adapter", f"{link}/merged", force=True, undo=False)
    system.invalidate_cache()
    assert "bucket/merged/loratool.undo" not in system.find("bucket/merged")
