"""Hold `apply` to the bytes of the files that `patch` compared: forwards, back, in chains, and of wrong models."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few, weights, write_model
from lib.files.patch_bytes import split_patch
from lib.models.patch_pairs import PAIRS, plain, tree, tuned
from lib.oracles.naive_patch_reader import digest_of
from safetensors.torch import load_file, save_file

import loratool
from loratool.durable import disk
from loratool.errors import InputError, UsageError
from loratool.patches.sources import ModelSource

DEFAULT = ("llama", "side files", "torch", "gguf blocks", "diffusers", "int4", "mixed", "to bf16", "other tensors")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", few(PAIRS, *DEFAULT))
def test_every_byte_comes_back(tmp_path: Path, name: str, fast: bool) -> None:
    write, leads_back = PAIRS[name]
    base, after = write(tmp_path)
    patch, out, back = (tmp_path / each for each in ("p.patch", f"out{after.suffix}", f"back{base.suffix}"))
    report = loratool.patch(base, after, patch, fast=fast)
    loratool.apply(base, patch, out)
    assert tree(out) == tree(after)
    assert fast or report.reversible is leads_back
    if report.reversible:
        loratool.apply(after, patch, back, reverse=True)
        assert tree(back) == tree(base)


@dataclass(frozen=True)
class Chain:
    """Models of a training run, each in its folder, and the patches between neighbours."""

    models: list[Path]
    patches: list[Path]


def write_chain(folder: Path, count: int = 3, rows: int = 64) -> Chain:
    tensors, models = plain(rows), list[Path]()
    for step in range(count + 1):
        models.append(write_model(folder / f"m{step}", tensors, {"model_type": "llama", "step": step}))
        tensors = tuned(tensors, 1e-2)
    patches = [folder / f"p{step}" for step in range(1, count + 1)]
    for before, after, patch in zip(models, models[1:], patches, strict=False):
        loratool.patch(before, after, patch)
    return Chain(models, patches)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return write_chain(tmp_path)


def refusal(out: Path, *args: Any, **options: Any) -> str:
    """Return what `apply` refuses with, of which nothing is written."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError) as raised:
        loratool.apply(*args, out, **options)
    assert sorted(out.parent.iterdir()) == before
    return str(raised.value)


def test_a_chain_in_one_pass(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of the base is read once, whatever the length, and those of one span to see which model it is."""
    read = Counter[tuple[str, int]]()
    whole = ModelSource.read

    def counted(self: ModelSource, tensor: str, first: int, out: memoryview) -> None:
        read[tensor, first] += len(out)
        whole(self, tensor, first, out)

    monkeypatch.setattr(ModelSource, "read", counted)
    loratool.apply(chain.models[0], chain.patches, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(chain.models[3])
    assert read.total() == 2 * sum(x.nbytes for x in plain().values())
    loratool.apply(chain.models[3], chain.patches, tmp_path / "back", reverse=True)
    assert tree(tmp_path / "back") == tree(chain.models[0])


def test_a_part_of_a_chain(chain: Chain, tmp_path: Path) -> None:
    loratool.apply(chain.models[1], chain.patches[1:], tmp_path / "out")
    assert tree(tmp_path / "out") == tree(chain.models[3])
    loratool.apply(chain.models[2], chain.patches[:2], tmp_path / "back", reverse=True)
    assert tree(tmp_path / "back") == tree(chain.models[0])


def test_patches_in_another_order(chain: Chain, tmp_path: Path) -> None:
    one, two, three = chain.patches
    for order, culprit, remedy in (
        ([two, one, three], one, f"give it before {two}"),
        ([one, three, two], three, f"give it after {two}"),
        ([one, three], three, "give the patches between them too"),
        ([one, one], one, "give the patches between them too"),
    ):
        said = refusal(tmp_path / "out", chain.models[0], order)
        assert said.startswith(f"{culprit}: does not begin where") and remedy in said
    loratool.patch(chain.models[2], chain.models[0], tmp_path / "round")
    said = refusal(tmp_path / "out", chain.models[0], [one, two, tmp_path / "round"])
    assert said.startswith(f"{tmp_path / 'round'}: leads back to a model that the chain has been at")


def test_a_step_without_changes_in_a_chain(chain: Chain, tmp_path: Path) -> None:
    loratool.patch(chain.models[1], chain.models[1], tmp_path / "same")
    loratool.apply(chain.models[0], [chain.patches[0], tmp_path / "same", *chain.patches[1:]], tmp_path / "out")
    assert tree(tmp_path / "out") == tree(chain.models[3])


def test_the_target_already_there(chain: Chain, tmp_path: Path) -> None:
    """Whichever model of the chain is given, what comes out is its last."""
    for number, model in enumerate(chain.models[1:]):
        report = loratool.apply(model, chain.patches, tmp_path / f"out{number}")
        assert tree(tmp_path / f"out{number}") == tree(chain.models[3])
        assert report.done
    for number, model in enumerate(chain.models[:3]):
        loratool.apply(model, chain.patches, tmp_path / f"back{number}", reverse=True)
        assert tree(tmp_path / f"back{number}") == tree(chain.models[0])


@pytest.mark.parametrize("name", ["to bf16", "to fp32", "other tensors", "side files", "renamed", "only renamed"])
def test_the_target_of_other_tensors_already_there(tmp_path: Path, name: str) -> None:
    base, after = PAIRS[name][0](tmp_path)
    loratool.patch(base, after, tmp_path / "p")
    loratool.apply(after, tmp_path / "p", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(after)


@pytest.mark.parametrize("name", ["renamed", "only renamed", "renamed among others"])
def test_tensors_of_other_names(tmp_path: Path, name: str) -> None:
    """What has the bytes of a tensor of another name takes none; which names those are, the patch says both ways."""
    base, after = PAIRS[name][0](tmp_path)
    states = [load_file(each / "model.safetensors") for each in (base, after)]
    lone = [{key: x for key, x in a.items() if key not in b} for a, b in (states, states[::-1])]
    report = loratool.patch(base, after, tmp_path / "p")
    assert [*report.renamed] == sorted(report.renamed) and report.renamed == loratool.inspect(tmp_path / "p").renamed
    assert all(torch.equal(lone[0][was], lone[1][key]) for key, was in report.renamed.items())
    assert len({*report.renamed.values()}) == len(report.renamed)
    assert not {*report.renamed} & {row.name for row in report.tensors}
    never = [(x, y) for key, x in lone[1].items() for was, y in lone[0].items() if key not in report.renamed]
    assert not [1 for x, y in never if x.numel() and x.shape == y.shape and torch.equal(x, y)]
    assert {*report.new, *report.renamed} == {*lone[1]} and {*report.removed, *report.renamed.values()} == {*lone[0]}
    bodies = sum(each.patch_nbytes for key, each in report.bodies.items() if key == "bytes")
    assert bodies < 2 * sum(lone[1][key].nbytes for key in report.new) + 1
    given = loratool.apply(base, tmp_path / "p", tmp_path / "out")
    if name != "renamed among others":
        assert given.digests == {str(base): digest_of(base), str(tmp_path / "out"): digest_of(after)}
    back = loratool.apply(after, tmp_path / "p", tmp_path / "again", dry_run=True)
    assert back.done and tree(tmp_path / "out") == tree(after)


def test_other_names_in_a_chain(tmp_path: Path) -> None:
    """A patch that renames between two that train, there and back, folded, and from the middle."""
    first = plain()
    second = {f"base_model.{name}": x for name, x in tuned(first).items()}
    second |= {name: x for name, x in first.items() if "norm" in name}
    states = [first, tuned(first), second, {f"x.{name}": x for name, x in second.items()}]
    states.append(tuned(states[-1]))
    models = [write_model(tmp_path / f"m{i}", state, {"model_type": "llama"}) for i, state in enumerate(states)]
    patches = [tmp_path / f"p{i}" for i in range(1, len(models))]
    for i, patch in enumerate(patches):
        assert loratool.patch(models[i], models[i + 1], patch).reversible is (i != 1)
    for i in range(len(models)):
        loratool.apply(models[i], patches, tmp_path / f"out{i}")
        assert tree(tmp_path / f"out{i}") == tree(models[-1])
    for i in (2, 3, 4):
        loratool.apply(models[i], patches[2:], tmp_path / f"back{i}", reverse=True)
        assert tree(tmp_path / f"back{i}") == tree(models[2])
    for i in (0, 2):
        loratool.patch(models[i], patches[i:], tmp_path / "folded", fold=True, force=True)
        loratool.patch(models[i], models[-1], tmp_path / "whole", force=True)
        assert (tmp_path / "folded").read_bytes() == (tmp_path / "whole").read_bytes()
    said = refusal(tmp_path / "out", models[0], patches[2])
    assert "is of a model whose" in said
    wrong = write_model(tmp_path / "wrong", {name: x + 1 for name, x in states[2].items()}, {"model_type": "llama"})
    assert "is not the model that" in refusal(tmp_path / "out", wrong, patches[2])
    wrong = write_model(tmp_path / "wrong too", {name: x + 1 for name, x in states[3].items()}, {"model_type": "llama"})
    assert "is not the model that" in refusal(tmp_path / "out", wrong, patches[2])


def mixture(chain: Chain, folder: Path, *names: str) -> Path:
    """Return the first model with some tensors of the second."""
    state, other = (load_file(chain.models[i] / "model.safetensors") for i in (0, 1))
    shutil.copytree(chain.models[0], folder)
    save_file({**state, **{name: other[name] for name in names}}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("names", [("model.norm.weight",), ("model.norm.weight", "model.embed_tokens.weight")])
def test_a_mixture_of_base_and_target(chain: Chain, tmp_path: Path, names: tuple[str, ...]) -> None:
    """It is neither of them, though what comes out could be the target."""
    mixed = mixture(chain, tmp_path / "mixed", *names)
    for back in (False, True):
        said = refusal(tmp_path / "out", mixed, chain.patches[0], reverse=back)
        assert said.startswith(f"{mixed}: is not the model that {chain.patches[0]} ") and " differ" in said


@pytest.mark.parametrize("there", ["a", "b"])
def test_a_mixture_of_whole_spans(tmp_path: Path, there: str) -> None:
    """Each span is as the base or the target has it: what comes out is the target, as its digest proves."""
    before = {"a": weights(6, 4), "b": weights(6, 4).bfloat16()}
    after = tuned(before, 1e-2)
    models = [write_model(tmp_path / name, state) for name, state in (("base", before), ("tuned", after))]
    mixed = write_model(tmp_path / "mixed", {**before, there: after[there]})
    loratool.patch(*models, tmp_path / "p")
    report = loratool.apply(mixed, tmp_path / "p", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(models[1])
    assert report.digests[str(mixed)] == digest_of(mixed) and not report.done


def test_another_base(chain: Chain, tmp_path: Path) -> None:
    patch = chain.patches[0]
    said = refusal(tmp_path / "out", chain.models[2], patch)
    assert "differ" in said and "give the model of digest " in said
    assert digest_of(chain.models[0])[:16] in said
    smaller = write_model(tmp_path / "smaller", {"model.norm.weight": weights(48).bfloat16()})
    said = refusal(tmp_path / "out", smaller, patch)
    assert "is of a model whose" in said and "and 9 more differ" in said
    said = refusal(tmp_path / "out", write_model(tmp_path / "fp32", plain(dtype=torch.float32)), patch)
    assert "BF16" in said and "F32" in said


def test_another_base_with_other_side_files(tmp_path: Path) -> None:
    """The weights are what is said to be wrong, not a file beside them."""
    base, after = PAIRS["side files"][0](tmp_path)
    loratool.patch(base, after, tmp_path / "p")
    other = write_model(tmp_path / "other", tuned(plain(), 0.1), {"model_type": "other"})
    assert "is not the model that" in refusal(tmp_path / "out", other, tmp_path / "p")


def test_a_bit_of_the_base(chain: Chain, tmp_path: Path) -> None:
    file = chain.models[0] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "is not the model that" in refusal(tmp_path / "out", chain.models[0], chain.patches)


def test_a_side_file_of_another_base(tmp_path: Path) -> None:
    """A patch has no copy of what both have."""
    base, after = PAIRS["side files"][0](tmp_path)
    loratool.patch(base, after, tmp_path / "p")
    (base / "tokenizer.json").write_text("{}")
    said = refusal(tmp_path / "out", base, tmp_path / "p")
    assert said.startswith(f"{base / 'tokenizer.json'}: is needed as it was when") and "is another file" in said
    (base / "tokenizer.json").unlink()
    assert "is missing" in refusal(tmp_path / "out", base, tmp_path / "p")


def test_one_way(tmp_path: Path) -> None:
    for name in ("to bf16", "other tensors", "one file"):
        base, after = PAIRS[name][0](tmp_path / name)
        loratool.patch(base, after, tmp_path / name / "p", one_way=name == "one file")
        said = refusal(tmp_path / name / f"out{base.suffix}", after, tmp_path / name / "p", reverse=True)
        assert said.startswith(f"{tmp_path / name / 'p'}: has no way back")


def test_a_base_in_other_files(tmp_path: Path) -> None:
    """Shards and the order of tensors make no other base; going back makes the files that the patch was made of."""
    base, after = PAIRS["shards"][0](tmp_path)
    loratool.patch(base, after, tmp_path / "p")
    state = plain()
    other = write_model(tmp_path / "other", dict(reversed(state.items())), {"model_type": "llama"}, shards=4)
    loratool.apply(other, tmp_path / "p", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(after)
    recut = write_model(tmp_path / "recut", tuned(state), {"model_type": "llama"})
    loratool.apply(recut, tmp_path / "p", tmp_path / "back", reverse=True)
    assert tree(tmp_path / "back") == tree(base)


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    """A base that was given as a file has no side files; those of the target are in the patch, and come off."""
    base, after = PAIRS["side files"][0](tmp_path)
    file = base / "model.safetensors"
    loratool.patch(file, after, tmp_path / "p")
    loratool.apply(file, tmp_path / "p", tmp_path / "out")
    assert tree(tmp_path / "out") == {k: v for k, v in tree(after).items() if k != "modeling_x.py"}
    loratool.apply(after, tmp_path / "p", tmp_path / "back.safetensors", reverse=True)
    assert tree(tmp_path / "back.safetensors") == tree(file)
    loratool.patch(base, after / "model.safetensors", tmp_path / "q")
    loratool.apply(base, tmp_path / "q", tmp_path / "out.safetensors")
    assert tree(tmp_path / "out.safetensors") == tree(after / "model.safetensors")
    loratool.apply(after / "model.safetensors", tmp_path / "q", tmp_path / "again", reverse=True)
    assert tree(tmp_path / "again") == {k: v for k, v in tree(base).items() if k != "modeling_x.py"}


def test_outputs(chain: Chain, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = chain.patches[0]
    wrong = [("out.safetensors", "is a file, and the model that is made is a folder"), (chain.models[0], "input")]
    for out, said in [*wrong, ("missing/out", "missing"), ("patched.bin", "is not a suffix of a safetensors file")]:
        ran = run("apply", chain.models[0], first, "-o", out)
        assert ran.exit_code == 2 and said in ran.stderr and ran.stderr.count("error:") == 1
    assert tree(chain.models[0])["model.safetensors"]
    assert run("apply", chain.models[0], first).exit_code == 0
    assert tree(tmp_path / "patched") == tree(chain.models[1])
    ran = run("apply", chain.models[0], *chain.patches, "-o", "patched")
    assert ran.exit_code != 0 and "--force" in ran.stderr and tree(tmp_path / "patched") == tree(chain.models[1])
    assert run("apply", chain.models[0], *chain.patches, "-o", "patched", "--force").exit_code == 0
    assert tree(tmp_path / "patched") == tree(chain.models[3])
    ran = run("apply", chain.models[0], first, "-o", first, "--force")
    assert ran.exit_code == 2 and first.read_bytes()[:8] == b"loratool"
    one = chain.models[0] / "model.safetensors"
    loratool.patch(one, chain.models[1] / "model.safetensors", "one")
    ran = run("apply", one, "one", "-o", "folder")
    assert ran.exit_code == 2 and "name a file that ends in .safetensors" in ran.stderr
    assert run("apply", one, "one").exit_code == 0
    assert tree(tmp_path / "patched.safetensors") == tree(chain.models[1] / "model.safetensors")


def test_a_check_writes_nothing(chain: Chain, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = loratool.apply(chain.models[0], chain.patches, tmp_path / "out", dry_run=True)
    assert report.dry_run and sorted(tmp_path.rglob("*")) == before
    assert "is not the model" in refusal(tmp_path / "out", chain.models[2], chain.patches[0], dry_run=True)


def test_the_report(chain: Chain, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("apply", chain.models[0], *chain.patches, "-o", tmp_path / "out", "--json")
    said = json.loads(ran.stdout)["report"]
    assert said["digests"] == {str(path): digest_of(path) for path in (chain.models[0], tmp_path / "out")}
    assert (said["tensors"], said["reverse"], said["files"]) == (11, False, ["model.safetensors"])


@pytest.mark.parametrize("way", ["apply", "reverse"])
def test_the_same_bytes_by_any_means(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    back = way == "reverse"
    given, wanted = (chain.models[3], chain.models[0]) if back else (chain.models[0], chain.models[3])
    for workers in (1, 2, 8):
        loratool.apply(given, chain.patches, tmp_path / f"out{workers}", reverse=back, workers=workers)
        assert tree(tmp_path / f"out{workers}") == tree(wanted)
    for module in ("rans", "steps"):
        monkeypatch.setattr(f"loratool.numerics.{module}.native", lambda: None)
    loratool.apply(given, chain.patches, tmp_path / "slow", reverse=back)
    assert tree(tmp_path / "slow") == tree(wanted)


@pytest.mark.parametrize("verb", ["patch", "apply"])
def test_a_full_disk(chain: Chain, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Whichever write fails, it is one line, and the next run writes what an undisturbed one does."""
    second = chain.models[1] if verb == "patch" else chain.patches[0]
    wanted = chain.patches[0].read_bytes() if verb == "patch" else tree(chain.models[1])
    out, whole, count = tmp_path / "out", disk.write_some, 0
    for fails_at in (1, 2, 3, 5, 8):
        count = 0

        def write_some(*args: Any, last: int = fails_at) -> int:
            nonlocal count
            count += 1
            if count >= last:
                raise OSError(28, "No space left on device")
            return whole(*args)

        with monkeypatch.context() as context:
            context.setattr(disk, "write_some", write_some)
            ran = run(verb, chain.models[0], second, "-o", out)
        if count < fails_at:
            assert ran.exit_code == 0
            break
        assert ran.exit_code not in (0, 70) and ran.stderr.count("error:") == 1 and not out.exists()
    else:
        assert run(verb, chain.models[0], second, "-o", out, "--resume").exit_code == 0
    assert (out.read_bytes() if verb == "patch" else tree(out)) == wanted
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_is_read_only(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="write"):
        loratool.apply(chain.models[0], chain.patches, tmp_path / "closed" / "out")


def test_the_digest_of_what_was_given_is_computed(chain: Chain, tmp_path: Path) -> None:
    """It is not what a patch says of its base, which a forger decides."""
    base, made = tmp_path / "given", tmp_path / "made"
    models, patches = chain.models, chain.patches
    shutil.copytree(models[0], base)
    forged = split_patch(patches[0].read_bytes())
    forged.index["base"]["digest"] = "0" * 64
    (tmp_path / "forged.patch").write_bytes(forged.joined())
    for patch in (patches[0], tmp_path / "forged.patch"):
        report: Any = loratool.apply(base, patch, made, force=True)
        assert report.digests == {str(base): digest_of(base), str(made): digest_of(models[1])}


def test_code_that_the_way_back_does_not_bring_is_told(chain: Chain, tmp_path: Path) -> None:
    base, after, patch = chain.models[0], chain.models[1], tmp_path / "p"
    (base / "modeling_x.py").write_text("x = 1")
    report: Any = loratool.patch(base, after, patch)
    assert report.reversible and ["modeling_x.py" in each for each in report.warnings] == [True]
    loratool.apply(after, patch, tmp_path / "back", reverse=True)
    assert {*tree(base)} - {*tree(tmp_path / "back")} == {"modeling_x.py"}
    shutil.copy(base / "modeling_x.py", after)
    assert loratool.patch(base, after, patch, force=True).warnings == ()
