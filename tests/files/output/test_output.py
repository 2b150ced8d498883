"""Hold outputs: shards and headers as the base has them, provenance, places, dtypes, and undo files beside weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, bits, load_model, weights, write_model
from lib.models.sharded_model import digest, write_adapter_of_two, write_sharded_model
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import NeedsFlag, UsageError
from loratool.files.output import output

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_sharded_model(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter_of_two(tmp_path / "adapter")


def test_the_bases_shards_and_headers_are_kept(tmp_path: Path, model: Path, adapter: Path) -> None:
    """Shards that the adapter does not touch keep their hash, the others their header."""
    loratool.merge(model, adapter, tmp_path / "out")
    touched = {
        name
        for name in os.listdir(model)
        if name.endswith("safetensors") and {"a.weight", "b.weight"} & set(load_file(model / name))
    }
    assert len(touched) == 2
    for file in model.glob("*.safetensors"):
        out = tmp_path / "out" / file.name
        assert (digest(out) == digest(file)) is (file.name not in touched)
        n = int.from_bytes(file.read_bytes()[:8], "little")
        assert out.read_bytes()[: 8 + n] == file.read_bytes()[: 8 + n]
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (model, tmp_path / "out"))
    assert (
        after["weight_map"] == before["weight_map"]
        and after["metadata"]["total_size"] == before["metadata"]["total_size"]
    )


def test_provenance_names_inputs_and_nothing_of_this_machine(tmp_path: Path, model: Path, adapter: Path) -> None:
    loratool.merge(model, (adapter, 0.5), tmp_path / "out")
    text = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["loratool"]
    value = json.loads(text)
    assert value["verb"] == "merge" and value["arithmetic"] == 2 and value["left_out"] == []
    (entry,) = value["adapters"]
    assert entry["sha256"] == digest(adapter / "adapter_model.safetensors") and entry["weight"] == 0.5
    assert str(tmp_path) not in text
    loratool.merge(tmp_path / "out", adapter, tmp_path / "again")
    stacked = json.loads(
        json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["metadata"]["loratool"]
    )
    assert stacked["former"] == value


def test_a_single_file_keeps_its_metadata_and_drops_stale_hashes(tmp_path: Path, adapter: Path) -> None:
    """Metadata goes along, but a hash of the old data must not survive."""
    metadata = {
        "format": "pt",
        "ss_tag": "x",
        "modelspec.title": "t",
        "sshs_model_hash": "0",
        "modelspec.hash_sha256": "0x1",
    }
    base = tmp_path / "one.safetensors"
    save_file({"a.weight": weights(6, 4), "b.weight": weights(6, 4)}, base, metadata=metadata)
    loratool.merge(base, adapter, tmp_path / "m.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        found = file.metadata()
    assert {k: v for k, v in found.items() if k != "loratool"} == {
        "format": "pt",
        "ss_tag": "x",
        "modelspec.title": "t",
    }


@pytest.mark.parametrize(
    ("base", "out", "expected"),
    [
        ("folder", None, "merged/model-00001-of-00004.safetensors"),
        ("file", None, "merged.safetensors"),
        ("file", "x", "x/model.safetensors"),
        ("folder", "x.safetensors", "x.safetensors"),
        ("single", "x", "x/model.safetensors"),
        ("single", "x.safetensors", "x.safetensors"),
    ],
)
def test_where_the_output_goes(
    tmp_path: Path,
    model: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    out: str | None,
    expected: str,
) -> None:
    one = write_model(tmp_path / "single", load_model(model), {"model_type": "llama"})
    source = {"folder": model, "single": one, "file": one / "model.safetensors"}[base]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    report = loratool.merge(source, adapter, out)
    assert report.out == expected.partition("/")[0] and Path(expected).is_file()
    merged, before = load_model(Path(report.out)), load_model(source)
    assert {k for k in before if not torch.equal(bits(merged[k].flatten()), bits(before[k].flatten()))} == {
        "a.weight",
        "b.weight",
    }
    assert (Path(report.out) / "config.json").is_file() is not expected.endswith(report.out)


def test_an_output_equal_to_an_input_is_refused(tmp_path: Path, model: Path, adapter: Path) -> None:
    """Links included: a base in the cache of the hub is links, and must never be overwritten through one."""
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "model.safetensors").symlink_to(
        write_model(tmp_path / "one", load_model(model)) / "model.safetensors"
    )
    for base, out in (
        (tmp_path / "links", tmp_path / "one"),  # a base of links into the output
        (tmp_path / "one" / "model.safetensors", tmp_path / "one"),  # a file in the output folder
    ):
        with pytest.raises(UsageError, match="would overwrite an input"):
            loratool.merge(base, adapter, out, force=True)
    for name in ("y.safetensors.loratool-partial", "y.safetensors.loratool-former"):
        shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / name)
        with pytest.raises(UsageError, match="would overwrite an input"):
            loratool.merge(tmp_path / name, adapter, tmp_path / "y.safetensors")
    shard = model / "model-00001-of-00004.safetensors"
    for out in (model, adapter, tmp_path / "link", shard, tmp_path / "base" / ".." / "base"):
        before = {p: digest(p) for p in [*model.iterdir(), *adapter.iterdir()]}
        with pytest.raises(UsageError):
            loratool.merge(model, adapter, out, force=True)
        assert {p: digest(p) for p in [*model.iterdir(), *adapter.iterdir()]} == before


def test_what_exists_is_replaced_only_with_force_and_only_if_it_is_ours(
    tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    loratool.merge(model, adapter, out)  # an empty folder counts as absent
    with pytest.raises(NeedsFlag, match="force=True"):
        loratool.merge(model, adapter, out)
    (out / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    loratool.merge(model, adapter, out, force=True)
    assert not (out / "model-00009-of-00009.safetensors").exists()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis.tex"):
        loratool.merge(model, adapter, out, force=True)
    assert (out / "thesis.tex").read_text() == "mine"
    (out / "thesis.tex").unlink()
    for name in ("LICENSES/thesis.txt", "chat_template_src/a.txt", "empty/", "train.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text("mine")
        with pytest.raises(UsageError, match=f"holds {name}"):
            loratool.merge(model, adapter, out, force=True)
        shutil.rmtree(out / name.partition("/")[0]) if "/" in name else (out / name).unlink()
    (model / "modeling_own.py").write_text("code of the base")
    loratool.merge(model, adapter, out, force=True)
    loratool.merge(model, adapter, out, force=True)  # over a copy of the base's
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text("mine")
    with pytest.raises(UsageError, match=r"holds train.py"):
        loratool.merge(model, adapter, tmp_path / "scripts", force=True)
    file = tmp_path / "x.safetensors"
    loratool.merge(model, adapter, file)
    with pytest.raises(NeedsFlag, match="force=True"):
        loratool.merge(model, adapter, file)
    loratool.merge(model, adapter, file, force=True)
    with pytest.raises(UsageError, match="is a folder, which a file would replace"):
        loratool.merge(model, adapter, write_model(tmp_path / "d.safetensors", {}), force=True)
    with monkeypatch.context() as patched, pytest.raises(UsageError, match="is a mount point"):
        patched.setattr(os.path, "ismount", lambda p: p == tmp_path / "mounted")
        (tmp_path / "mounted").mkdir()
        loratool.merge(model, adapter, tmp_path / "mounted")
    with pytest.raises(UsageError, match="no such folder"):
        loratool.merge(model, adapter, tmp_path / "absent" / "out")
    with pytest.raises(UsageError, match="not a suffix of"):
        loratool.merge(model, adapter, tmp_path / "x.gguf")


def test_stacked_merges_grow_by_a_constant(tmp_path: Path, adapter: Path) -> None:
    source = tmp_path / "0.safetensors"
    save_file({"a.weight": weights(6, 4), "b.weight": weights(6, 4)}, source)
    sizes = []
    for i in range(1, 8):
        loratool.merge(source, (adapter, 0.01), tmp_path / f"{i}.safetensors")
        source = tmp_path / f"{i}.safetensors"
        sizes.append(source.stat().st_size)
    assert sizes[-1] - sizes[-2] < 1.2 * (sizes[2] - sizes[1])


def test_new_shards_do_not_carry_the_former_provenance(tmp_path: Path, adapter: Path) -> None:
    base = write_model(tmp_path / "base", {"a.weight": weights(6, 4), "b.weight": weights(6, 4)})
    loratool.merge(base, adapter, tmp_path / "one")
    loratool.merge(tmp_path / "one", (adapter, 0.5), tmp_path / "many", max_shard_size=1)
    from safetensors import safe_open

    for file in (tmp_path / "many").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("out", ["", ".", "..", "./"])
def test_an_output_needs_a_name(model: Path, adapter: Path, out: str) -> None:
    with pytest.raises(UsageError, match="names no file or folder|out: '' is not a path"):
        loratool.merge(model, adapter, out)


class TestDtype:
    @pytest.mark.parametrize(
        ("option", "dtype"), [("fp32", torch.float32), ("float16", torch.float16), ("bf16", torch.bfloat16)]
    )
    def test_every_float_tensor_takes_it_and_no_other(
        self, tmp_path: Path, model: Path, adapter: Path, option: str, dtype: torch.dtype
    ) -> None:
        report = loratool.merge(model, adapter, tmp_path / "out", undo=False, dtype=option)
        before, after = load_model(model), load_model(tmp_path / "out")
        for name, tensor in before.items():
            assert after[name].dtype == (dtype if tensor.is_floating_point() else tensor.dtype)
            if name not in ("a.weight", "b.weight"):
                assert torch.equal(after[name], tensor.to(after[name].dtype))
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
            "model_type": "llama",
            "dtype": str(dtype).removeprefix("torch."),
        }
        assert report.tensors[0].dtype == {"fp32": "F32", "float16": "F16", "bf16": "BF16"}[option]

    def test_an_untouched_tensor_that_overflows_is_refused(self, tmp_path: Path, adapter: Path) -> None:
        base = write_model(
            tmp_path / "base", {"a.weight": weights(6, 4), "b.weight": weights(6, 4), "big": torch.tensor([1e6])}
        )
        with pytest.raises(NeedsFlag, match="big: 1 weights become infinite in F16"):
            loratool.merge(base, adapter, tmp_path / "out", undo=False, dtype="fp16")


class TestResharding:
    @pytest.mark.parametrize("limit", [1, 60, 100, 10**6])
    def test_any_size_holds_the_same_tensors(self, tmp_path: Path, model: Path, adapter: Path, limit: int) -> None:
        loratool.merge(model, adapter, tmp_path / "kept")
        loratool.merge(model, adapter, tmp_path / "out", max_shard_size=limit)
        kept, out = load_model(tmp_path / "kept"), load_model(tmp_path / "out")
        assert kept.keys() == out.keys() and all(torch.equal(kept[k], out[k]) for k in kept)
        files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
        for file in files:
            content = load_file(tmp_path / "out" / file)
            assert sum(t.nbytes for t in content.values()) <= limit or sum(t.numel() > 0 for t in content.values()) == 1
        if limit == 10**6:
            assert files == ["model.safetensors"] and not (tmp_path / "out" / "model.safetensors.index.json").exists()
        else:
            assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        from loratool.files.checkpoint import open_checkpoint

        assert set(open_checkpoint(tmp_path / "out")) == set(kept)

    def test_new_files_are_as_the_official_library_writes_them(self, tmp_path: Path, adapter: Path) -> None:
        base = write_model(
            tmp_path / "base", {"a.weight": weights(6, 4), "b.weight": weights(6, 4), "c": torch.arange(3)}, shards=3
        )
        loratool.merge(base, adapter, tmp_path / "out", max_shard_size=150)
        for file in (tmp_path / "out").glob("*.safetensors"):
            save_file(load_file(file), tmp_path / "official.safetensors", metadata={"format": "pt"})
            assert (tmp_path / "official.safetensors").read_bytes() == file.read_bytes()

    def test_transformers_loads_them(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        loratool.merge(BASE, ADAPTER, tmp_path / "out", max_shard_size=50_000)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        merged = load_model(tmp_path / "out")
        assert all(torch.equal(merged[k], v) for k, v in model.state_dict().items())

    def test_shards_need_a_folder(self, tmp_path: Path, model: Path, adapter: Path) -> None:
        with pytest.raises(UsageError, match="needs a folder"):
            loratool.merge(model, adapter, tmp_path / "x.safetensors", max_shard_size=100)


class TestUndoBesideAFile:
    """`x.undo` belongs to `x.safetensors`: it comes, stays and goes with it."""

    def test_it_stays_where_a_new_merge_fails(self, tmp_path: Path, model: Path, adapter: Path) -> None:
        out = tmp_path / "x.safetensors"
        loratool.merge(model, adapter, out)
        before = digest(out), digest(tmp_path / "x.undo")
        with pytest.raises(loratool.LoratoolError, match="infinite"):
            loratool.merge(model, (adapter, 1e42), out, force=True)
        assert (digest(out), digest(tmp_path / "x.undo")) == before

    def test_a_strangers_file_is_never_replaced(self, tmp_path: Path, model: Path, adapter: Path) -> None:
        (tmp_path / "x.undo").write_text("mine")
        with pytest.raises(UsageError, match=r"x.undo: is in the way of an undo file"):
            loratool.merge(model, adapter, tmp_path / "x.safetensors", force=True)
        loratool.merge(model, adapter, tmp_path / "x.safetensors", undo=False)
        assert (tmp_path / "x.undo").read_text() == "mine"

    @pytest.mark.parametrize("undo", [True, False])
    def test_those_of_a_model_that_is_replaced_go(self, tmp_path: Path, model: Path, adapter: Path, undo: bool) -> None:
        """Else the next merge would carry them on, and unmerge give back a model with a wrong one beside it."""
        first, second = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
        loratool.merge(model, adapter, first)
        loratool.merge(first, (adapter, 0.5), second)
        assert (tmp_path / "y.undo.1").exists()
        second.unlink()
        with pytest.raises(NeedsFlag, match=r"y.undo: exists already"):
            loratool.merge(model, adapter, second, undo=undo)
        loratool.merge(model, adapter, second, undo=undo, force=True)
        assert (tmp_path / "y.undo").exists() is undo and not (tmp_path / "y.undo.1").exists()

    def test_an_input_is_not_replaced(self, tmp_path: Path, model: Path, adapter: Path) -> None:
        merged, other = tmp_path / "x.safetensors", tmp_path / "y.undo"
        save_file({f"{n}.weight": weights(6, 4) for n in "ab"}, tmp_path / "base.safetensors")
        loratool.merge(tmp_path / "base.safetensors", adapter, merged)
        (tmp_path / "x.undo").rename(other)
        with pytest.raises(UsageError, match=r"y.undo: the output would replace this input"):
            loratool.unmerge(merged, adapter, other.with_suffix(".safetensors"), undo=other, force=True)
        assert other.exists()

    @pytest.mark.parametrize("failing", [1, 2, 3])  # of the journal's head, the undo file and the weights
    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
    def test_the_former_pair_stays_whichever_rename_fails(
        self,
        tmp_path: Path,
        model: Path,
        adapter: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: BaseException,
        failing: int,
    ) -> None:
        out = tmp_path / "x.safetensors"
        loratool.merge(model, adapter, out)
        before, calls, replace = (digest(out), digest(tmp_path / "x.undo")), iter(range(1, 100)), os.replace

        def fail(*arguments: Any) -> None:
            if next(calls) == failing:
                raise error
            replace(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", fail)
            with pytest.raises(type(error)):
                loratool.merge(model, (adapter, 0.5), out, force=True)
        assert (digest(out), digest(tmp_path / "x.undo")) == before
        stays = [f"{out.name}.loratool-{part}" for part in ("journal", "partial")]
        stays = stays if failing > 1 and isinstance(error, OSError) else []
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", out.name, *stays, "x.undo"]
        (tmp_path / "x.undo.loratool-former").write_text("of a run that was killed")
        loratool.merge(model, (adapter, 0.5), out, force=True, undo=failing == 1)
        left = [out.name, "x.undo"] if failing == 1 else [out.name]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", *left]

    def test_a_torch_file_of_the_same_name_has_none(self, tmp_path: Path, model: Path, adapter: Path) -> None:
        loratool.merge(model, adapter, tmp_path / "x.safetensors")
        before = digest(tmp_path / "x.undo")
        for force in (False, True):
            loratool.convert_model(tmp_path / "x.safetensors", tmp_path / "x.bin", to="torch", force=force)
            assert digest(tmp_path / "x.undo") == before
        loratool.merge(tmp_path / "x.bin", adapter, tmp_path / "y.safetensors")
        assert not (tmp_path / "y.undo.1").exists()  # as a base, too

    @pytest.mark.parametrize(
        "use",
        [
            lambda base, adapter, out: loratool.resize(adapter, out, rank=1, force=True),
            lambda base, adapter, out: loratool.combine([adapter], out, force=True),
            lambda base, adapter, out: loratool.convert(adapter, out, to="peft", force=True),
            lambda base, adapter, out: loratool.init(base, out, rank=1, force=True),
            lambda base, adapter, out: loratool.extract(base, base, out, force=True),
        ],
        ids=["resize", "combine", "convert", "init", "extract"],
    )
    def test_no_adapter_takes_a_models_place(
        self, tmp_path: Path, model: Path, adapter: Path, use: Callable[[Path, Path, Path], object]
    ) -> None:
        out = tmp_path / "x.safetensors"
        loratool.merge(model, adapter, out)
        before = digest(out), digest(tmp_path / "x.undo")
        with pytest.raises(UsageError, match=r"is a merged model, and its undo file x.undo"):
            use(model, adapter, out)
        assert (digest(out), digest(tmp_path / "x.undo")) == before

    @pytest.mark.skipif(os.name == "nt", reason="needs links")
    def test_what_only_looks_like_one_is_let_be(self, tmp_path: Path, model: Path, adapter: Path) -> None:
        loratool.merge(model, adapter, tmp_path / "x.safetensors")
        (tmp_path / "y.undo").symlink_to("x.undo")
        loratool.merge(model, adapter, tmp_path / "y.safetensors", undo=False)
        assert (tmp_path / "y.undo").is_symlink()
        (tmp_path / "x.undo.1").write_text("mine")
        loratool.merge(tmp_path / "x.safetensors", adapter, tmp_path / "z.safetensors")
        assert not (tmp_path / "z.undo.2").exists()
        shutil.copy(tmp_path / "x.undo", tmp_path / "w.undo.1")
        with pytest.raises(NeedsFlag, match=r"w.undo.1: exists already"):
            loratool.merge(model, adapter, tmp_path / "w.safetensors")

    @pytest.mark.skipif(not hasattr(os, "pwrite"), reason="needs pwrite")
    def test_a_system_that_writes_less_than_it_is_given(
        self, tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk with a little room left writes a part of what it is given."""
        loratool.merge(model, adapter, tmp_path / "x.safetensors")
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: len(data) // 3 + 1], at))
        loratool.merge(model, adapter, tmp_path / "y.safetensors")
        assert digest(tmp_path / "x.undo") == digest(tmp_path / "y.undo")

    def test_a_disk_that_is_full_when_a_side_file_is_copied(
        self, tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The system names the file that it reads first, which is on another disk."""
        (model / "tokenizer.json").write_text("{}")

        def full(source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

        monkeypatch.setattr(output, "copy_file", full)
        with pytest.raises(OSError, match="No space left") as error:
            loratool.merge(model, adapter, tmp_path / "out")
        assert error.value.filename == str(tmp_path / "out")
        stays = ["out.loratool-journal", "out.loratool-partial"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", *stays]

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux for the name of an open file")
    def test_a_disk_that_is_full_when_the_undo_file_comes(
        self, tmp_path: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pwrite = os.pwrite

        def full(fd: int, data: Any, at: int) -> int:
            room = 100 - at if ".undo" in os.readlink(f"/proc/self/fd/{fd}") else len(data)
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(fd, data[:room], at)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            loratool.merge(model, adapter, tmp_path / "x.safetensors")
        stays = ["x.safetensors.loratool-journal", "x.safetensors.loratool-partial"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", *stays]


@pytest.mark.parametrize("name", ["q.txt", "q.safetensors.gz", "q.SAFETENSORS", "q.json"])
def test_a_file_that_is_not_written_is_no_name(tmp_path: Path, model: Path, adapter: Path, name: str) -> None:
    """But for a folder that is there, and one whose name has a dot."""
    with pytest.raises(
        UsageError, match=r"is not a suffix of a safetensors file\nname a folder or a .safetensors file"
    ):
        loratool.merge(model, adapter, tmp_path / name, dry_run=True)
    assert loratool.merge(model, adapter, tmp_path / "llama-3.1", dry_run=True).out == str(tmp_path / "llama-3.1")
