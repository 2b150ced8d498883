"""Exchange patches with the programs whose dialects they are: each reads what we write, and we what they write.

Fireworks' package: `pip install --no-deps --target ../oracles/fireworks fireworks-delta-compression zstd`. The others
are files of checkouts, in folders of LORATOOL_ORACLES. So in a clone of prime-rl:

    git archive origin/feat/sparse-filesystem-weight-sync src/prime_rl/utils/sparse_update.py |
        tar x -C ../oracles/prime-rl

Also `slime` (slime/utils/disk_delta.py, and docker/patch/latest, which has SGLang's receiver), `SkyRL`
(skyrl/backends/skyrl_train/weight_sync), `trl` (trl/experimental/async_grpo of the branch delta-weight-sync-v3), and
`trl-first` (weight_diff.py in the same folder, of the commit a3a382585).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from conftest import FIXTURES, few, load_model, oracle_folder, write_model
from dialect_models import applied, models, pairs, without_nan
from lib.oracles.naive_dialects import Model, as_tensor, raw, same
from safetensors.torch import load_file, save_file

from loratool.patches.dialects.table import write_foreign_patch as write

pytestmark = pytest.mark.slow

PLAIN = "bfloat16 float16 float32 float64 int8 uint8 int64 int32"


def folder_of(name: str, files: str) -> Path:
    return Path(oracle_folder(name, f"(no package, but the files {files})"))


def module_of(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def package_of(folder: Path, name: str, module: str, stubs: dict[str, ModuleType] | None = None) -> ModuleType:
    """Import a module of a package without running the package's own `__init__`, which imports a trainer."""
    before = dict(sys.modules)
    sys.modules.update(stubs or {})
    try:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            package = ModuleType(".".join(parts[:i]))
            package.__path__ = [str(folder.joinpath(*parts[:i]))]
            sys.modules[package.__name__] = package
        return importlib.import_module(f"{name}.{module}")
    finally:
        for each in set(sys.modules) - set(before):
            if each in (stubs or {}):
                del sys.modules[each]
        sys.modules.update({key: before[key] for key in stubs or {} if key in before})


def real_models() -> tuple[Model, Model]:
    return load_model(FIXTURES / "llama" / "base"), load_model(FIXTURES / "llama" / "tuned")


def in_shards(folder: Path, model: Model) -> Path:
    return write_model(folder, dict(sorted(model.items())), {"model_type": "llama"}, shards=2)


# SGLang and slime


def sglang(tmp_path: Path) -> Any:
    folder = folder_of("slime", "slime/utils/disk_delta.py docker/patch/latest")
    lines = (folder / "docker/patch/latest/sglang-pull_weights.patch").read_text().splitlines()
    start = lines.index("+++ b/python/sglang/srt/weight_sync/local_checkpoint.py")
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("diff ")), len(lines))
    source = tmp_path / "local_checkpoint.py"
    source.write_text("\n".join(line[1:] for line in lines[start + 2 : end]))
    return module_of(source, "sglang_local_checkpoint")


def pulled(receiver: Any, tmp_path: Path, base: Model, versions: Path, step: int) -> Model:
    local, seed = tmp_path / "local", in_shards(tmp_path / "base", base)
    receiver.pull(str(local), str(seed), str(versions), step)
    return load_model(local)


@pytest.mark.parametrize("checksum", ["xxh3-128", "blake3", "adler32"])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_sglang_reads_our_chain(encoding: str, checksum: str, tmp_path: Path) -> None:
    receiver = sglang(tmp_path)
    (base, target), (third, _) = real_models(), models("bfloat16")
    third = {name: like_of(x) for name, x in target.items()}
    both = {"encoding": encoding, "checksum": checksum}
    for step, sides in enumerate(((base, target), (target, third), (third, base)), 1):
        write("disk-delta", pairs(*sides), tmp_path / "v" / f"weight_v{step:06d}", **both)
    assert same(pulled(receiver, tmp_path / "2", base, tmp_path / "v", 2), third)
    assert same(pulled(receiver, tmp_path / "3", base, tmp_path / "v", 3), base)


def like_of(x: torch.Tensor) -> torch.Tensor:
    return as_tensor(bytes(byte ^ 3 for byte in raw(x))).view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_sglang_refuses_our_patch_of_another_base(encoding: str, tmp_path: Path) -> None:
    receiver = sglang(tmp_path)
    base, target = real_models()
    write("disk-delta", pairs(base, target), tmp_path / "v" / "weight_v000001", encoding=encoding)
    other = {name: like_of(x) for name, x in base.items()}
    with pytest.raises(RuntimeError, match="checksum mismatch"):
        pulled(receiver, tmp_path, other, tmp_path / "v", 1)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_we_read_what_slime_encodes(encoding: str, tmp_path: Path) -> None:
    """The publisher needs a GPU, so its files are written here around its encoder, checksum and zstandard."""
    slime = module_of(folder_of("slime", "slime/utils/disk_delta.py") / "slime/utils/disk_delta.py", "slime_disk_delta")
    base, target = real_models()
    frames, sums = {}, {}
    for name in target:
        old, new = (np.frombuffer(raw(each[name]), np.uint8) for each in (base, target))
        diff = new ^ old if encoding == "xor" else slime.overwrite_encode(new, new != old)
        if (new != old).any():
            frames[name] = as_tensor(zstandard.ZstdCompressor(level=1).compress(diff.tobytes()))
            sums[name] = slime.checksum("xxh3-128", new)
    folder = tmp_path / "weight_v000001"
    folder.mkdir()
    save_file(frames, folder / "model-00000-of-00001.safetensors", sums)
    fields = {"version": "000001", "base_version": "000000", "delta_encoding": encoding}
    index = {"metadata": {**fields, "compression_format": "zstd", "checksum_format": "xxh3-128"}}
    index["weight_map"] = dict.fromkeys(frames, "model-00000-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(applied(folder, base, size=1 << 16), target)


# SkyRL


def skyrl() -> Any:
    folder = folder_of("SkyRL", "skyrl/backends/skyrl_train/weight_sync")
    return package_of(folder, "skyrl.backends.skyrl_train.weight_sync", "delta_checkpoint")


def test_skyrl_reads_our_chain(tmp_path: Path) -> None:
    base, target = real_models()
    seed = in_shards(tmp_path / "base", base)
    for step, sides in enumerate(((base, target), (target, base), (base, target)), 1):
        write("skyrl", pairs(*sides), tmp_path / "v" / f"delta-{step:08d}")
    store = skyrl().LocalCheckpointStore(str(seed), str(tmp_path / "local"))
    for step in (1, 2, 3):
        store.fetch(step, sync_dir=str(tmp_path / "v"))
        assert same(load_model(tmp_path / "local" / "weights"), target if step % 2 else base)


def test_we_read_what_skyrl_publishes(tmp_path: Path) -> None:
    program = skyrl()
    base, target = real_models()
    seed = in_shards(tmp_path / "base", base)
    publisher = program.DeltaCheckpointPublisher(str(seed), str(tmp_path / "v"), str(tmp_path / "staging"))
    chunk = SimpleNamespace(names=[*target], tensors=[*target.values()])
    publisher.publish(publisher.create_delta_files([chunk]))
    assert same(applied(tmp_path / "v" / "delta-00000001", base, size=1 << 16), target)


# prime-rl


def prime_rl() -> Any:
    folder = folder_of("prime-rl", "src/prime_rl/utils/sparse_update.py")
    return module_of(folder / "src/prime_rl/utils/sparse_update.py", "prime_rl_sparse_update")


def prime_models() -> list[tuple[Model, Model]]:
    """Without nan and with one zero alone: it compares values."""
    made = models(PLAIN, seed=3)
    return [real_models(), tuple({n: torch.where(x == x, x, 1) for n, x in m.items()} for m in made)]  # type: ignore[list-item]


@pytest.mark.parametrize("which", [0, 1])
def test_prime_rl_reads_ours(which: int, tmp_path: Path) -> None:
    base, target = prime_models()[which]
    write("prime-rl", pairs(base, target), tmp_path / "step_5", step=5, base_step=2)
    state = {name: x.clone() for name, x in base.items()}
    prime_rl().apply_sparse_update(state, tmp_path / "step_5", expected_base_step=2)
    assert same(state, target)


@pytest.mark.parametrize("which", [0, 1])
def test_we_read_what_prime_rl_writes(which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, target = prime_models()[which]
    program = prime_rl()
    monkeypatch.setitem(sys.modules, "pyzstd", SimpleNamespace(compress=zstandard.ZstdCompressor().compress))
    for name, options in (("plain", {}), ("compressed", {"compress": True})):
        state = {n: x.clone() for n, x in base.items()}
        at = tmp_path / name
        program.save_sparse_update(state, target, at, step=1, base_step=0, compute_dtype=None, **options)
        assert same(applied(at, base, size=1 << 16), target)


# TRL


class Anything(ModuleType):
    """A module of which any name can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = {"__class_getitem__": classmethod(lambda cls, _: cls), "_registry": {}}
        return type(name, (), made | {"register_engine": staticmethod(lambda *_: None)})


def trl() -> Any:
    folder = folder_of("trl", "trl/experimental/async_grpo of the branch delta-weight-sync-v3")
    names = "vllm vllm.logger vllm.distributed vllm.distributed.weight_transfer vllm.distributed.weight_transfer.base "
    names += "vllm.distributed.weight_transfer.factory huggingface_hub"
    stubs: dict[str, ModuleType] = {name: Anything(name) for name in names.split()}
    return package_of(folder, "trl.experimental.async_grpo", "delta_engine", stubs)


@contextmanager
def official(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        yield file


@pytest.mark.parametrize("encoding", ["raw", "gap_delta"])
def test_trl_reads_ours(encoding: str, tmp_path: Path) -> None:
    base, target = (bf16(model) for model in real_models())
    at = tmp_path / "step_000001.safetensors"
    write("trl", pairs(base, target), at, encoding=encoding)
    state = {name: x.clone() for name, x in base.items()}
    with official(at) as file:
        for name, places, values in trl().iter_sparse_patches(file):
            state[name].reshape(-1)[places.long()] = values
    assert same(state, target)


def bf16(model: Model) -> Model:
    return without_nan(({n: x.bfloat16() for n, x in model.items()}, {}))[0]


@pytest.mark.parametrize("encoding", ["raw", "gap_delta"])
def test_we_read_what_trl_writes(encoding: str, tmp_path: Path) -> None:
    base, target = (bf16(model) for model in real_models())
    items = ((n, x, x.view(torch.int16) != base[n].view(torch.int16)) for n, x in target.items())
    tensors, meta = trl().encode_patch(iter(items), model_version=1, encoding=encoding)
    at = tmp_path / "step_000001.safetensors"
    save_file({name: x.contiguous() for name, x in tensors.items()}, at, meta.to_metadata_dict())
    assert same(applied(at, base, ["unverified"], 1 << 16), target)


def test_we_read_what_trl_wrote_first(tmp_path: Path) -> None:
    path = folder_of("trl-first", "trl/experimental/async_grpo/weight_diff.py of the commit a3a382585")
    program = module_of(path / "trl/experimental/async_grpo/weight_diff.py", "trl_weight_diff")
    base, target = (bf16(model) for model in real_models())
    tensors, metadata = program.encode_sparse_patch(base, target, model_version=4, prev_model_version=3, anchor_step=0)
    save_file(tensors, tmp_path / "d.safetensors", metadata)
    assert same(applied(tmp_path / "d.safetensors", base, ["unverified"], 1 << 16), target)


# Fireworks


def fireworks() -> Any:
    sys.path.insert(0, oracle_folder("fireworks", "fireworks-delta-compression zstd"))
    try:
        return importlib.import_module("fireworks_delta_compression.compression")
    finally:
        sys.path.pop(0)


FIREWORKS: list[Callable[[], tuple[Model, Model]]] = [real_models, lambda: models(PLAIN + " float8_e4m3fn")]


@pytest.mark.parametrize("which", few([0, 1], 0, 1))
def test_fireworks_reads_ours(which: int, tmp_path: Path) -> None:
    base, target = FIREWORKS[which]()
    program = fireworks()
    seed = in_shards(tmp_path / "base", base)
    files = {name: path.name for path in seed.glob("*.safetensors") for name in load_file(path)}
    beside = {"config.json": seed / "config.json"}
    write("arc_v2", pairs(base, target), tmp_path / "f", files=files, beside=beside)
    assert (tmp_path / "f" / "config.json").read_bytes() == (seed / "config.json").read_bytes()
    for file in set(files.values()):
        delta, part = str(tmp_path / "f" / file), str(seed / file)
        program.delta_decompress_inplace(base_path=part, diff_path=delta, compression_format="arc_v2")
    assert same(load_model(seed), target)
    again = in_shards(tmp_path / "again", base)
    for file in set(files.values()):
        program.decompress_delta_into_source(str(tmp_path / "f" / file), str(again / file), "arc_v2")
    assert same(load_model(again), target)


@pytest.mark.parametrize("form", ["arc_v1", "arc_v2", "xor_one_to_one_zlib", "xor_one_to_one_zstd"])
@pytest.mark.parametrize("which", few([0, 1], 0, 1))
def test_we_read_what_fireworks_writes(which: int, form: str, tmp_path: Path) -> None:
    base, target = FIREWORKS[which]()
    one, two = in_shards(tmp_path / "one", base), in_shards(tmp_path / "two", target)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor:
        fireworks().delta_compress_dirs(str(one), str(two), str(tmp_path / "f"), form, executor=executor)
    assert same(applied(tmp_path / "f", base, size=1 << 16), target)


def test_arc_v3_of_fireworks_is_refused(tmp_path: Path) -> None:
    from loratool.errors import InputError
    from loratool.patches.dialects.table import open_foreign_patch

    base, target = real_models()
    fireworks().delta_compress_dicts_to_file(
        src=base, dst=target, diff_file=str(tmp_path / "d.safetensors"), compression_format="arc_v3"
    )
    with pytest.raises(InputError, match="a pickle"):
        open_foreign_patch(tmp_path / "d.safetensors")
