"""Change models in place: the same bytes as an output of its own, the way back, and what is refused before a change."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, factors, load_model, weights, write_model, write_peft
from lib.harness.interrupted import interrupted
from lib.models.gguf_models import llama_weights, write_llama
from safetensors.torch import load_file, save_file

import loratool
from loratool.durable.in_place import ModelInPlace
from loratool.errors import InputError, MachineError, NeedsFlag

Run = Callable[..., Any]
LLAMA, GPT2 = FIXTURES / "llama", FIXTURES / "gpt2"
LAYER = "model.layers.0.self_attn"


def files(model: Path) -> dict[str, bytes]:
    """The content of all files of a model."""
    if model.is_file():
        return {"": model.read_bytes()}
    return {str(each.relative_to(model)): each.read_bytes() for each in model.rglob("*") if each.is_file()}


def tensors(model: Path) -> dict[str, bytes]:
    """The bytes of all tensors, read by the safetensors library."""
    shards = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    return {n: t.contiguous().view(torch.uint8).numpy().tobytes() for s in shards for n, t in load_file(s).items()}


def copied(base: Path, model: Path) -> Path:
    return Path(shutil.copytree(base, model) if base.is_dir() else shutil.copy(base, model))


@pytest.mark.parametrize("by", ["shard", "window"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_tensors_are_those_of_a_merge_and_the_base_comes_back(
    name: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.streaming.in_place.WINDOW", 3000)
    base, adapter, model = FIXTURES / name / "base", FIXTURES / name / "adapter", tmp_path / "model"
    report = loratool.merge(base, adapter, tmp_path / "fresh")
    copied(base, model)
    changed = loratool.merge(model, adapter, in_place=True, by=by)
    assert tensors(model) == tensors(tmp_path / "fresh")
    assert (changed.kept, changed.changed, changed.undo_bytes) == (report.kept, report.changed, report.undo_bytes)
    assert (model / "loratool.undo").read_bytes() == (tmp_path / "fresh" / "loratool.undo").read_bytes()
    assert changed.digests[str(model)] == report.digests[str(tmp_path / "fresh")]
    assert loratool.verify(base, adapter, model).status == "proven"
    loratool.unmerge(model, adapter, tmp_path / "back")
    assert files(tmp_path / "back") == files(base)
    loratool.unmerge(model, adapter, in_place=True, by=by)
    assert files(model) == files(base)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["back", "fresh", "model"]


@pytest.mark.parametrize("by", ["shard", "window"])
def test_a_gguf_model(by: str, tmp_path: Path) -> None:
    base, model = tmp_path / "base.gguf", tmp_path / "model.gguf"
    write_llama(base, llama_weights(), dtype="BF16")
    width = llama_weights()[f"{LAYER}.q_proj.weight"].shape
    adapter = write_peft(tmp_path / "adapter", {f"{LAYER}.q_proj": factors(*width, 2)})
    fresh = loratool.merge(base, adapter, tmp_path / "fresh.gguf")
    copied(base, model)
    changed = loratool.merge(model, adapter, in_place=True, by=by)
    assert changed.digests[str(model)] == fresh.digests[fresh.out]
    loratool.unmerge(model, adapter, in_place=True, by=by)
    assert files(model) == files(base) and not model.with_suffix(".undo").exists()


def test_two_merges_come_off_one_after_the_other(tmp_path: Path) -> None:
    model, once = copied(LLAMA / "base", tmp_path / "model"), tmp_path / "once"
    loratool.merge(model, LLAMA / "adapter", in_place=True)
    copied(model, once)
    loratool.merge(model, (LLAMA / "adapter", -0.5), in_place=True)
    assert (model / "loratool.undo.1").read_bytes() == (once / "loratool.undo").read_bytes()
    loratool.unmerge(model, (LLAMA / "adapter", -0.5), in_place=True)
    assert files(model) == files(once)
    loratool.unmerge(model, LLAMA / "adapter", in_place=True)
    assert files(model) == files(LLAMA / "base")


@pytest.mark.parametrize("by", ["shard", "window"])
@pytest.mark.parametrize("begun", ["in place", "with an output"])
def test_a_swap_is_the_merge_of_the_new_adapter(
    begun: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratool.streaming.in_place.WINDOW", 3000)
    base, old, model = LLAMA / "base", LLAMA / "adapter", tmp_path / "model"
    pairs = {
        f"{LAYER}.{name}": factors(*load_model(base)[f"{LAYER}.{name}.weight"].shape, 2)
        for name in ("q_proj", "o_proj")
    }
    new = write_peft(tmp_path / "new", pairs)
    fresh = loratool.merge(base, new, tmp_path / "fresh")
    if begun == "in place":
        copied(base, model)
        loratool.merge(model, old, in_place=True)
    else:
        loratool.merge(base, old, model)
    report = loratool.merge(model, new, replace=old, in_place=True, by=by)
    assert report.replaced == (str(old),) and report.digests[str(model)] == fresh.digests[fresh.out]
    here, there = files(model), files(tmp_path / "fresh")
    assert {name for name in here if here[name] != there.get(name)} <= {"README.md"} and here.keys() == there.keys()
    loratool.unmerge(model, new, in_place=True)
    assert files(model) == files(base)


@pytest.mark.parametrize("verb", ["unmerge", "swap", "swap with an output"])
def test_a_users_edit_that_is_replaced_is_named(verb: str, tmp_path: Path, run: Run) -> None:
    """And one of a file that stays is not."""
    base, adapter, model = LLAMA / "base", LLAMA / "adapter", tmp_path / "model"
    assert run("merge", base, adapter, "-o", model).exit_code == 0
    config = model / "config.json"
    config.write_text(config.read_text().replace("{", '{"edited": true, ', 1))
    (model / "README.md").write_text("mine")
    out = [] if verb != "swap with an output" else ["-o", tmp_path / "out"]
    swap = ["merge", model, f"{adapter}:0.5", "--replace", adapter]
    argv = ["unmerge", model, adapter, "--in-place"] if verb == "unmerge" else [*swap, *(out or ["--in-place"])]
    for flags in (["--dry-run"], []):
        result = run(*argv, *flags)
        assert result.exit_code == 0, result.stderr
        assert "config.json" in result.stdout and "replaced by the base's" in result.stdout
        assert ("README.md" in result.stdout) is (verb != "unmerge")
    made = tmp_path / "out" if out else model
    assert (made / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert ((made / "README.md").read_text() == "mine") is (verb == "unmerge")


def test_a_dry_run_changes_nothing(tmp_path: Path, run: Run) -> None:
    model = copied(LLAMA / "base", tmp_path / "model")
    result = run("merge", model, LLAMA / "adapter", "--in-place", "--dry-run")
    assert result.exit_code == 0 and files(model) == files(LLAMA / "base")
    left = interrupted(LLAMA / "base", LLAMA / "adapter", tmp_path / "left")
    before = files(tmp_path / "left.loratool-in-place")
    assert run("recover", left, "--dry-run").exit_code == 0
    assert files(tmp_path / "left.loratool-in-place") == before
    assert run("merge", left, LLAMA / "adapter", "--in-place", "--dry-run").exit_code == 3


def test_who_comes_meanwhile_is_told(tmp_path: Path, run: Run) -> None:
    left, adapter = interrupted(LLAMA / "base", LLAMA / "adapter", tmp_path / "left"), LLAMA / "adapter"
    for argv in (
        ["inspect", left],
        ["merge", left, adapter, "-o", tmp_path / "out"],
        ["merge", left, f"{adapter}:0.5", "--in-place"],
        ["unmerge", left, adapter, "--in-place"],
    ):
        result = run(*argv)
        assert result.exit_code == 3 and f"loratool recover {left}" in result.stderr, result.stderr
    result = run("merge", LLAMA / "base", adapter, "-o", left)
    assert result.exit_code == 2 and f"loratool recover {left}" in result.stderr, result.stderr
    assert not left.exists()
    assert run("recover", left, "--back").exit_code == 0 and files(left) == files(LLAMA / "base")
    result = run("recover", left)
    assert result.exit_code == 3 and "no change in place" in result.stderr


def test_another_model_of_the_name_stays(tmp_path: Path, run: Run) -> None:
    left = interrupted(LLAMA / "base", LLAMA / "adapter", tmp_path / "left")
    copied(GPT2 / "base", left)
    result = run("recover", left)
    assert result.exit_code == 3 and "is in the way" in result.stderr and files(left) == files(GPT2 / "base")
    shutil.rmtree(left)
    assert run("recover", left).exit_code == 0
    loratool.unmerge(left, LLAMA / "adapter", in_place=True)
    assert files(left) == files(LLAMA / "base")


def test_another_adapter_at_the_same_path_is_refused(tmp_path: Path, run: Run) -> None:
    adapter = copied(LLAMA / "adapter", tmp_path / "adapter")
    left = interrupted(LLAMA / "base", adapter, tmp_path / "left")
    weights_file = adapter / "adapter_model.safetensors"
    save_file({name: A * 2 for name, A in load_file(weights_file).items()}, weights_file)
    for flags in ([], ["--back"]):
        result = run("recover", left, *flags)
        assert result.exit_code == 3 and "has changed since" in result.stderr and not left.exists()
    shutil.copy(LLAMA / "adapter" / "adapter_model.safetensors", weights_file)
    assert run("recover", left, "--back").exit_code == 0 and files(left) == files(LLAMA / "base")


def test_what_was_damaged_meanwhile_is_refused(tmp_path: Path, run: Run) -> None:
    """The files of the change, cut, with another byte, or gone: never a mixture under the model's name."""
    left = interrupted(LLAMA / "base", LLAMA / "adapter", tmp_path / "left")
    folder, sound = tmp_path / "left.loratool-in-place", tmp_path / "sound"
    copied(folder, sound)
    for name in ("log.loratool-journal/0", "log.loratool-journal/head.json", "facts.json"):
        data = (sound / name).read_bytes()
        places = range(0, len(data), max(1, len(data) // 4))
        flipped = [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in places]
        for damaged in (None, *(data[:at] for at in places), *flipped):
            shutil.rmtree(folder)
            copied(sound, folder)
            (folder / name).write_bytes(damaged) if damaged is not None else (folder / name).unlink()
            for flags in ((), ("--back",)):
                result = run("recover", left, *flags)
                assert result.exit_code == 3 and "damaged" in result.stderr, result.stderr
                assert not left.exists() and (folder / "left").exists()


@pytest.mark.parametrize("lost", range(1, 5))
def test_moves_that_the_journal_lost(lost: int, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = copied(LLAMA / "base", tmp_path / "model"), LLAMA / "adapter"
    loratool.merge(model, adapter, in_place=True)
    before, ends = files(model), list[int]()
    place = tmp_path / "model.loratool-in-place" / "log.loratool-journal" / "0"
    add = ModelInPlace._add

    def note(self: ModelInPlace, entry: list[Any]) -> None:
        ends.append(place.stat().st_size)
        if entry[:2] == ["move", 3]:
            raise KeyboardInterrupt
        add(self, entry)

    monkeypatch.setattr(ModelInPlace, "_add", note)
    with pytest.raises(KeyboardInterrupt):
        loratool.merge(model, (adapter, 0.5), in_place=True)
    monkeypatch.setattr(ModelInPlace, "_add", add)
    sound = place.read_bytes()
    place.write_bytes(sound[: ends[-1 - lost]])
    for flags in ((), ("--back",)):
        result = run("recover", model, *flags)
        assert result.exit_code == 3 and "damaged" in result.stderr and not model.exists(), result.stderr
    place.write_bytes(sound)
    assert run("recover", model, "--back").exit_code == 0 and files(model) == before


def test_an_overflow_in_the_middle_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.streaming.in_place.WINDOW", 100)
    W = {f"{LAYER}.{name}.weight": weights(8, 6, seed=1).half() for name in ("k_proj", "q_proj")}
    base = write_model(tmp_path / "base", W, {"model_type": "llama"})
    pairs = {f"{LAYER}.k_proj": factors(8, 6, 2), f"{LAYER}.q_proj": tuple(1e4 * x for x in factors(8, 6, 2))}
    adapter, model = write_peft(tmp_path / "adapter", pairs), copied(base, tmp_path / "model")
    for by in ("window", "shard"):
        with pytest.raises((InputError, NeedsFlag), match="infinite"):
            loratool.merge(model, adapter, in_place=True, by=by)
        assert files(model) == files(base) and not (tmp_path / "model.loratool-in-place").exists()


def _linked(model: Path) -> None:
    shard = next(model.glob("*.safetensors"))
    shard.rename(model.with_name("elsewhere"))
    shard.symlink_to(model.with_name("elsewhere"))


def _with_another_name(model: Path) -> None:
    os.link(next(model.glob("*.safetensors")), model.with_name("another"))


def _being_written(model: Path) -> None:
    model.with_name("model.loratool-journal").mkdir()


def _coded(model: Path) -> None:
    shutil.rmtree(model)
    shutil.copytree(LLAMA / "fp8", model)


def _of_torch(model: Path) -> None:
    shards = list(model.glob("*.safetensors"))
    torch.save({n: t for s in shards for n, t in load_file(s).items()}, model / "pytorch_model.bin")
    for each in (*shards, *model.glob("*.index.json")):
        each.unlink()


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], int, str]] = {
    "a link": (_linked, (), 3, "is a link"),
    "two names": (_with_another_name, ("--by", "window"), 3, "has another name"),
    "a journal": (_being_written, (), 3, "is of a run that writes this model"),
    "codes": (_coded, (), 3, "-o"),
    "a torch file": (_of_torch, (), 3, "torch file"),
    "other types": (lambda model: None, ("--dtype", "fp32"), 3, "which no change in place can store"),
    "no undo": (lambda model: None, ("--no-undo",), 2, "the way back"),
    "an output": (lambda model: None, ("-o", "out"), 2, "exclude each other"),
    "a recipe": (lambda model: None, ("--save-recipe", "recipe.json"), 2, "exclude each other"),
    "to go on": (lambda model: None, ("--resume",), 2, "exclude each other"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_a_byte_changes(name: str, tmp_path: Path, run: Run) -> None:
    prepare, flags, code, said = REFUSED[name]
    model = copied(LLAMA / "base", tmp_path / "model")
    prepare(model)
    before = files(tmp_path)
    result = run("merge", model, LLAMA / "adapter", "--in-place", *flags)
    assert result.exit_code == code and said in result.stderr, result.stderr
    assert files(tmp_path) == before


def test_other_inputs_that_are_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copied(LLAMA / "base", tmp_path / "model")
    inside = copied(LLAMA / "adapter", model / "adapter")
    result = run("merge", model, inside, "--in-place")
    assert result.exit_code == 3 and "is inside the model" in result.stderr
    shutil.rmtree(inside)
    (tmp_path / "link").symlink_to(model)
    result = run("merge", tmp_path / "link", LLAMA / "adapter", "--in-place")
    assert result.exit_code == 3 and "is a link" in result.stderr
    result = run("merge", "org/model", LLAMA / "adapter", "--in-place")
    assert result.exit_code == 3 and "download it first" in result.stderr
    monkeypatch.chdir(model)
    result = run("merge", model, LLAMA / "adapter", "--in-place")
    assert result.exit_code == 2 and "working folder" in result.stderr
    result = run("merge", model, LLAMA / "adapter", "-o", tmp_path / "out", "--by", "shard")
    assert result.exit_code == 2 and "--in-place" in result.stderr
    assert files(model) == files(LLAMA / "base")


def test_a_path_that_leads_through_the_model(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = copied(LLAMA / "base", tmp_path / "model"), LLAMA / "adapter"
    monkeypatch.chdir(tmp_path)
    assert run("merge", "model/../model", adapter, "--in-place").exit_code == 0
    assert run("unmerge", model, adapter, "--in-place").exit_code == 0
    assert files(model) == files(LLAMA / "base")
    (model / "inner").mkdir()
    for folder, name in ((model, "."), (model / "inner", ".."), (tmp_path, "")):
        monkeypatch.chdir(folder)
        assert run("merge", name, adapter, "--in-place").exit_code == 2
    assert run("recover", ".").exit_code == 3


def test_inputs_inside_the_model(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = copied(LLAMA / "base", tmp_path / "model")
    copied(LLAMA / "adapter", model / "inside"), copied(LLAMA / "adapter", tmp_path / "adapter")
    loratool.merge("model", "adapter", in_place=True)
    loratool.patch("model", LLAMA / "base", "model/p.patch")
    before = files(model)
    for argv in (
        ("merge", "model", "model/../adapter"),
        ("unmerge", "model", "model/inside"),
        ("unmerge", "model", "adapter", "--undo", "model/loratool.undo"),
        ("apply", "model", "model/p.patch"),
    ):
        result = run(*argv, "--in-place")
        assert result.exit_code == 3 and "is inside the model" in result.stderr, result.stderr
        assert files(model) == before


@pytest.mark.skipif(sys.platform != "linux", reason="leases are of Linux")
@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_file_that_a_program_has_open(how: str, tmp_path: Path, run: Run) -> None:
    model = copied(LLAMA / "base", tmp_path / "model")
    shard = next(model.glob("*.safetensors"))
    before = shard.read_bytes()
    with open(shard, "rb") as file:
        held: Any = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if how == "mapped" else file
        if how == "mapped":
            file.close()
        result = run("merge", model, LLAMA / "adapter", "--in-place", "--by", "window")
        assert result.exit_code == 3 and "is open in another program" in result.stderr, result.stderr
        assert files(model) == files(LLAMA / "base") and not (tmp_path / "model.loratool-in-place").exists()
        assert run("merge", model, LLAMA / "adapter", "--in-place", "--by", "shard").exit_code == 0
        held.seek(0)
        assert held.read() == before != shard.read_bytes(), "the former file is what the program has"
        held.close()


def test_a_system_that_cannot_tell(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.commands.in_place.open_elsewhere", lambda path: None)
    model = copied(LLAMA / "base", tmp_path / "model")
    argv = ("merge", model, LLAMA / "adapter", "--in-place", "--by", "window")
    result = run(*argv)
    assert result.exit_code == 4 and "--allow open-files" in result.stderr and files(model) == files(LLAMA / "base")
    assert run(*argv, "--allow", "open-files").exit_code == 0


def test_the_way_follows_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways, begin = list[str](), ModelInPlace.begin

    def note(self: ModelInPlace, head: Any) -> None:
        ways.append(head["way"]["by"])
        begin(self, head)

    monkeypatch.setattr(ModelInPlace, "begin", note)
    monkeypatch.setattr("loratool.commands.in_place.WINDOW", 1)
    largest = max(shard.stat().st_size for shard in (LLAMA / "base").glob("*.safetensors"))
    room = sum(shard.stat().st_size for shard in (LLAMA / "base").glob("*.safetensors")) // 16
    for free, way in ((10**12, "shard"), (largest + room, "shard"), (largest + room - 1, "window")):
        monkeypatch.setattr("loratool.commands.in_place.free_bytes", lambda folder, free=free: free)
        loratool.merge(copied(LLAMA / "base", tmp_path / str(free)), LLAMA / "adapter", in_place=True)
        assert ways[-1] == way
    monkeypatch.setattr("loratool.commands.in_place.free_bytes", lambda folder: 0)
    with pytest.raises(MachineError, match="are free"):
        loratool.merge(copied(LLAMA / "base", tmp_path / "none"), LLAMA / "adapter", in_place=True)


def test_a_small_model_needs_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.commands.in_place.free_bytes", lambda folder: 1 << 20)
    loratool.merge(copied(LLAMA / "base", tmp_path / "m"), LLAMA / "adapter", in_place=True, by="window")


def test_an_edited_model_is_not_unmerged(tmp_path: Path) -> None:
    model = copied(LLAMA / "base", tmp_path / "model")
    loratool.merge(model, LLAMA / "adapter", in_place=True)
    name = f"{LAYER}.q_proj.weight"
    shard = next(s for s in model.glob("*.safetensors") if name in load_file(s))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    before = files(model)
    with pytest.raises(InputError, match="edited since"):
        loratool.unmerge(model, LLAMA / "adapter", in_place=True)
    assert files(model) == before


def test_two_calls_at_once(tmp_path: Path) -> None:
    """One changes the model, the other is told; nothing is lost."""
    model = copied(LLAMA / "base", tmp_path / "model")
    argv = [sys.executable, "-m", "loratool", "merge", str(model), str(LLAMA / "adapter"), "--in-place"]
    calls = [subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(2)]
    ended = sorted((call.communicate()[1], call.returncode) for call in calls)
    codes = sorted(code for _, code in ended)
    assert codes in ([0, 3], [0, 5], [0, 0]), ended
    for _ in range(2 if codes == [0, 0] else 1):  # both, if one began when the other had ended
        loratool.unmerge(model, LLAMA / "adapter", in_place=True)
    assert files(model) == files(LLAMA / "base")
