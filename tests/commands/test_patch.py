"""Hold `patch` to the same bytes by any means: workers, ranks, compiled passes, resumed runs and other shards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MEASURED, factors, few, slow, write_model, write_peft
from lib.files.patch_bytes import index_of
from lib.harness.torchrun import ended, environment, ranks_of
from lib.models.patch_pairs import PAIRS, folders, moved, plain, tree, tuned
from lib.oracles.naive_patch_reader import digest_of
from safetensors.torch import load_file, save_file

import loratool
from loratool.durable.journal import Journal
from loratool.errors import InputError


def patched(base: Path, after: Path, out: Path, **options: Any) -> bytes:
    loratool.patch(base, after, out, **options)
    return out.read_bytes()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", few(PAIRS, "llama", "mixed", "gguf blocks", "to bf16"))
def test_the_same_bytes_by_any_means(tmp_path: Path, name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base, after = PAIRS[name][0](tmp_path)
    wanted = patched(base, after, tmp_path / "p", fast=fast, workers=1)
    for workers in (2, 8):
        assert patched(base, after, tmp_path / f"p{workers}", fast=fast, workers=workers) == wanted
    monkeypatch.setenv("LORATOOL_NATIVE", "0")
    assert patched(base, after, tmp_path / "slow", fast=fast) == wanted


def test_the_base_in_other_files(tmp_path: Path) -> None:
    """One way, that is: the way back has the base's files."""
    base, after = PAIRS["shards"][0](tmp_path)
    state = dict(reversed(plain().items()))
    other = write_model(tmp_path / "other", state, {"model_type": "llama"}, shards=4)
    first = patched(base, after, tmp_path / "p", one_way=True)
    assert patched(other, after, tmp_path / "q", one_way=True) == first
    index = index_of(patched(other, after, tmp_path / "r"))
    assert [file["name"] for file in index["base"]["files"]] == sorted(
        each.name for each in other.glob("*.safetensors")
    )


def test_what_the_index_says(tmp_path: Path, run: Callable[..., Any]) -> None:
    base, after = PAIRS["other tensors"][0](tmp_path)
    ran = run("patch", base, after, "-o", tmp_path / "p", "--json")
    said, index = json.loads(ran.stdout)["report"], index_of((tmp_path / "p").read_bytes())
    new = ["codes", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "new.weight"]
    assert index["new"] == said["new"] == new and said["removed"] == ["removed.weight"] and index["removed"] == 1
    assert index["base"]["digest"] == digest_of(base) == said["digests"][str(base)]
    assert index["target"]["digest"] == digest_of(after) == said["digests"][str(after)]
    assert said["reversible"] is index["reversible"] is False
    before, behind = (load_file(each / "model.safetensors") for each in (base, after))
    for row in said["tensors"]:
        x, y = before.get(row["name"]), behind[row["name"]]
        is_new = row["name"] in new
        assert row["changed"] == (y.numel() if is_new or x is None else int((x != y).sum()))


def test_nothing_changed(tmp_path: Path) -> None:
    base, after = PAIRS["same"][0](tmp_path)
    report = loratool.patch(base, after, tmp_path / "p")
    assert (report.tensors, report.unchanged, report.reversible) == ((), 11, True)
    assert index_of((tmp_path / "p").read_bytes())["bodies"] == ["same"]


def test_a_tied_name_counts_once(tmp_path: Path) -> None:
    base, after = PAIRS["torch"][0](tmp_path)
    report = loratool.patch(base, after, tmp_path / "p")
    assert "lm_head.weight" in {row.name for row in report.tensors}
    assert "model.embed_tokens.weight" not in {row.name for row in report.tensors}


def test_files_that_stay_behind(tmp_path: Path) -> None:
    """Code that the base has not, and what no command copies."""
    base, after = folders(tmp_path, plain(), tuned(plain()))
    names = ("modeling_x.py", "optimizer.pt", ".gitattributes", "spk_dict.pt")
    for name in names:
        (after / name).write_text("x")
    report = loratool.patch(base, after, tmp_path / "p")
    assert {each.name for each in report.left_behind} == {
        "modeling_x.py",
        "optimizer.pt",
        ".gitattributes",
        "spk_dict.pt",
    }
    loratool.apply(base, tmp_path / "p", tmp_path / "out")
    assert {*tree(tmp_path / "out")} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("name", ["a\tb", "a\nb"])
def test_names_without_a_digest(tmp_path: Path, name: str) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file({name: torch.ones(2)}, path)
    with pytest.raises(InputError, match="so it has no digest"):
        loratool.patch(*paths, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_outputs(tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, after = PAIRS["one file"][0](tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("patch", base, after).exit_code == 0
    first = (tmp_path / "loratool.patch").read_bytes()
    ran = run("patch", base, base)
    assert ran.exit_code != 0 and "--force" in ran.stderr and (tmp_path / "loratool.patch").read_bytes() == first
    assert run("patch", base, base, "--force").exit_code == 0
    assert (tmp_path / "loratool.patch").read_bytes() != first
    for out in (base, "missing/p", "base"):
        weights_before = base.read_bytes()
        ran = run("patch", base, after, "-o", out, "--force")
        assert ran.exit_code == 2 and ran.stderr.count("error:") == 1 and base.read_bytes() == weights_before
    before = sorted(tmp_path.rglob("*"))
    report = loratool.patch(base, after, tmp_path / "new", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before and 0 < report.nbytes < len(first)


def test_what_no_patch_makes(tmp_path: Path) -> None:
    """More beside its tensors than a reader takes."""
    base, after = folders(tmp_path, plain(), tuned(plain()))
    with (after / "tokenizer.json").open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(InputError, match="bytes beside its tensors, more than a patch can hold"):
        loratool.patch(base, after, tmp_path / "p")
    assert not list(tmp_path.glob("p*"))


def die(after: int, work: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Let a run die, as of a full disk, after some spans."""
    left = iter(range(after))

    def progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        work(*args, progress=progress, workers=1, **options)


def write_strange(folder: Path) -> tuple[Path, Path]:
    """Write a pair with a span for each type, whose patch leads back."""
    base, after = PAIRS["mixed"][0](folder)
    before = load_file(base / "model.safetensors")
    save_file(tuned(before, 1e-3), after / "model.safetensors", {"format": "pt"})
    return base, after


@pytest.mark.parametrize("after", [1, 5, slow(11)])
@pytest.mark.parametrize("verb", ["patch", "apply", "reverse"])
def test_a_run_that_died_goes_on(tmp_path: Path, verb: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it had done, and to the same bytes."""
    base, target = write_strange(tmp_path)
    wanted, reused, out = patched(base, target, tmp_path / "p"), set[int](), tmp_path / "out"
    results = Journal.results

    def counted(journal: Journal, item: int) -> Any:
        reused.add(item)
        return results(journal, item)

    monkeypatch.setattr(Journal, "results", counted)
    back = verb == "reverse"
    options: dict[str, Any] = {"reverse": True} if back else {}
    work: Any = loratool.patch if verb == "patch" else loratool.apply
    given = target if back else base, target if verb == "patch" else tmp_path / "p"
    die(after, work, *given, out, **options)
    assert not out.exists() and (tmp_path / "out.loratool-journal").is_dir()
    work(*given, out, resume=True, **options)
    assert len(reused) == after + 1
    if verb == "patch":
        assert out.read_bytes() == wanted
    else:
        assert tree(out) == tree(base if back else target)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["base", "out", "p", "tuned"]


@pytest.mark.parametrize("verb", ["patch", "apply"])
def test_a_run_without_resume_begins_again(tmp_path: Path, verb: str) -> None:
    base, after = PAIRS["mixed"][0](tmp_path)
    wanted = patched(base, after, tmp_path / "p")
    work: Any = loratool.patch if verb == "patch" else loratool.apply
    given = base, after if verb == "patch" else tmp_path / "p"
    die(3, work, *given, tmp_path / "out")
    work(*given, tmp_path / "out")
    assert tree(tmp_path / "out") == ({"": wanted} if verb == "patch" else tree(after))


def test_bytes_that_were_lost_since_are_made_again(tmp_path: Path) -> None:
    base, after = PAIRS["mixed"][0](tmp_path)
    loratool.patch(base, after, tmp_path / "p")
    die(5, loratool.apply, base, tmp_path / "p", tmp_path / "out")
    partial = tmp_path / "out.loratool-partial" / "model.safetensors"
    partial.write_bytes(partial.read_bytes()[:1000] + bytes(partial.stat().st_size - 1000))
    loratool.apply(base, tmp_path / "p", tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == tree(after)


@pytest.mark.parametrize(("verb", "count"), [("patch", 2), slow("patch", 3), slow("apply", 2), slow("apply", 3)])
@pytest.mark.slow
def test_ranks_write_what_one_process_writes(tmp_path: Path, verb: str, count: int) -> None:
    base, after = PAIRS["mixed"][0](tmp_path)
    wanted = patched(base, after, tmp_path / "p")
    second = "tuned" if verb == "patch" else "p"
    [(code, _, err)] = ended(ranks_of(tmp_path, "-m", "loratool", verb, "base", second, "-o", "out", count=count))
    assert code == 0, err
    assert tree(tmp_path / "out") == ({"": wanted} if verb == "patch" else tree(after))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["base", "out", "p", "tuned"]


@pytest.mark.slow
def test_ranks_are_refused_together(tmp_path: Path) -> None:
    base, after = PAIRS["mixed"][0](tmp_path)
    loratool.patch(base, after, tmp_path / "p")
    shutil.copytree(base, tmp_path / "other")
    save_file(tuned(load_file(base / "model.safetensors"), 0.5), tmp_path / "other" / "model.safetensors")
    [(code, _, err)] = ended(ranks_of(tmp_path, "-m", "loratool", "apply", "other", "p", "-o", "out"))
    assert code != 0 and "is not the model that" in err and not (tmp_path / "out").exists()


def peak(folder: Path, *argv: str) -> int:
    """Return the most bytes of memory that a command had."""
    done = subprocess.run([*MEASURED, *argv, "-q"], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stderr.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["large", "small"])
def test_memory(tmp_path: Path, kind: str) -> None:
    """It is that of some spans, whatever the size of a tensor or their count."""
    shapes = {"x": (1 << 15, 1 << 12)} if kind == "large" else {f"layers.{i}.w": (64, 64) for i in range(30_000)}
    state = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    save_file(state, tmp_path / "a.safetensors")
    save_file({name: moved(x, 1e-2) for name, x in state.items()}, tmp_path / "b.safetensors")
    state.clear()
    save_file({"x": torch.ones(3)}, tmp_path / "c.safetensors")
    loratool.patch(tmp_path / "c.safetensors", tmp_path / "c.safetensors", tmp_path / "n")
    least = peak(tmp_path, "patch", "c.safetensors", "c.safetensors", "-o", "o")
    made = peak(tmp_path, "patch", "a.safetensors", "b.safetensors", "-o", "p")
    applied = peak(tmp_path, "apply", "a.safetensors", "p", "-o", "d.safetensors")
    print(kind, *(f"{(each - least) / 2**24:.1f} spans" for each in (made, applied)))
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert made - least < 2 * 16 << 24 and applied - least < 2 * 10 << 24


@pytest.mark.parametrize("name", few(PAIRS, "llama", "mixed", "gguf blocks"))
def test_a_report_says_what_the_file_has(tmp_path: Path, name: str) -> None:
    base, after = PAIRS[name][0](tmp_path)
    said: Any = loratool.patch(base, after, tmp_path / "p")
    found: Any = loratool.inspect(tmp_path / "p")
    assert said.nbytes == found.nbytes == (tmp_path / "p").stat().st_size
    assert said.bodies == found.bodies and said.reversible == found.reversible and said.new == found.new
    rows = sum(row.patch_nbytes for row in said.tensors)
    assert abs(rows - sum(each.patch_nbytes for each in said.bodies.values())) <= len(said.tensors)
    assert all(0 < row.changed <= row.numbers for row in said.tensors)
    assert [found.base_digest, found.digest] == [said.digests[str(each)] for each in (base, after)]


def test_an_adapter_that_needs_an_option(tmp_path: Path, run: Callable[..., Any]) -> None:
    """A patch has no place for it, so that its reader would merge something else."""
    base, after = PAIRS["llama"][0](tmp_path)
    A, B = torch.randn(4, 64), torch.randn(64, 4)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): A, name.format("B"): B}, tmp_path / "a.safetensors")  # without an alpha
    result = run("patch", base, after, "--adapter", tmp_path / "a.safetensors", "-o", tmp_path / "p")
    assert result.exit_code == 3 and "without --adapter" in result.stderr and not (tmp_path / "p").exists()


def test_an_undo_file_is_no_patch_nor_the_reverse(tmp_path: Path, run: Callable[..., Any]) -> None:
    """Each leads back, so each is given where the other belongs; the hint is the command that takes it."""
    base = write_model(tmp_path / "base", {"a.weight": torch.randn(8, 8)}, {"model_type": "llama"})
    adapter, merged = write_peft(tmp_path / "adapter", {"a": factors(8, 8, 2)}), tmp_path / "merged"
    loratool.merge(base, adapter, merged)
    loratool.patch(base, merged, tmp_path / "p")
    undo, before = merged / "loratool.undo", tree(tmp_path)
    for call in (("apply", merged, undo), ("apply", merged, undo, "--reverse"), ("inspect", undo)):
        result = run(*call)
        assert result.exit_code == 3 and f"error: {undo}: is an undo file of loratool, not " in result.stderr
        assert "hint: to restore the base: loratool unmerge MERGED ADAPTER --undo FILE" in result.stderr
    result = run("unmerge", merged, adapter, "--undo", tmp_path / "p", "-o", tmp_path / "out")
    assert result.exit_code == 3 and "p: is a patch of loratool, not an undo file\n" in result.stderr
    assert "hint: to make its model: loratool apply BASE FILE -o OUT" in result.stderr
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_memory_does_not_grow_with_a_chain(tmp_path: Path) -> None:
    x = torch.randn(1 << 14, 1 << 12).mul_(0.02).bfloat16()
    save_file({"x": x}, tmp_path / "0.safetensors")
    for step in range(1, 13):
        x = moved(x, 1e-3)
        save_file({"x": x}, tmp_path / f"{step}.safetensors")
        loratool.patch(tmp_path / f"{step - 1}.safetensors", tmp_path / f"{step}.safetensors", tmp_path / f"{step}.p")
    peaks = []
    for last in (2, 12):
        patches = [f"{n}.p" for n in range(1, last + 1)]
        peaks.append(peak(tmp_path, "apply", "0.safetensors", *patches, "-o", f"out{last}.safetensors"))
    print(*(f"{each / 2**20:.0f} MiB" for each in peaks))
    assert (tmp_path / "out12.safetensors").read_bytes() == (tmp_path / "12.safetensors").read_bytes()
    assert peaks[1] - peaks[0] < 3 << 24
