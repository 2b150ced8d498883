"""Hold model cards to huggingface_hub, to their command lines, and to what undo restores."""

from __future__ import annotations

import bz2
import hashlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FIXTURES, factors, load_model, run_command, weights, write_model, write_peft
from huggingface_hub import ModelCard as HubCard
from lib.files.undo_bytes import forge, split_undo
from markdown_it import MarkdownIt

import loratool
from loratool.files.output.model_card import ModelCard, name_on_hub, read_licence, shown_name

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
HASH = "3d0526423b52d4ba08642a5d369b8c94c0156ac2c5af858505b18880020fdcd5"

MERGED = f"""---
library_name: "transformers"
license: "apache-2.0"
tags:
- "lora"
- "loratool"
- "merge"
---

# `base` with `adapter`

- base: `base`, licence `apache-2.0`
- `adapter`: weight 0.5, scale 2, 21 modules of peft, sha256 `{HASH}`
- 3 tensors changed, 27 are the base's; rounding leaves KEPT% of the delta
- excluded: `model.layers.0.mlp.down_proj`, `model.layers.0.mlp.gate_proj`, `model.layers.0.mlp.up_proj` and 15 more
- digest of the base `READ`, of this model `WRITTEN`: `loratool inspect --digest .`

```sh
loratool merge base adapter:0.5 --target q_proj -o merged
loratool verify base adapter:0.5 merged --target q_proj
```

"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def licensed(folder: Path, fields: str = "license: apache-2.0") -> Path:
    """Copy the base and give it a card."""
    shutil.copytree(BASE, folder)
    (folder / "README.md").write_text(f"---\n{fields}\nlanguage: en\n---\n# The base\n")
    return folder


def test_the_card_of_a_merge(tmp_path: Path) -> None:
    loratool.merge(licensed(tmp_path / "base"), (ADAPTER, 0.5), tmp_path / "any", target=["q_proj"], workers=1)
    before, after, A_and_B = load_model(BASE), load_model(tmp_path / "any"), load_model(ADAPTER)
    moved = asked = 0.0
    for name in before:
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if name.endswith("q_proj.weight"):
            A, B = (A_and_B[f"{path}.lora_{side}.weight"].double() for side in "AB")
            D = 0.5 * 2 * B @ A
            moved, asked = (
                moved + float(((after[name].double() - before[name].double()) * D).sum()),
                asked + float((D * D).sum()),
            )
    card = MERGED.replace("KEPT", f"{100 * moved / asked:.1f}")
    for name, folder in (("READ", BASE), ("WRITTEN", tmp_path / "any")):
        card = card.replace(name, loratool.inspect(folder, digest=True).digest or "")
    card += f"<!-- loratool {hashlib.sha256(card.encode()).hexdigest()[:16]} -->\n"
    assert (tmp_path / "any" / "README.md").read_text() == card
    loratool.merge(tmp_path / "base", (ADAPTER, 0.5), tmp_path / "other", target=["q_proj"], workers=3)
    assert files(tmp_path / "other") == files(tmp_path / "any")


@pytest.mark.parametrize("card", [True, False])
def test_undo_brings_the_bases_card_back(tmp_path: Path, card: bool) -> None:
    base, out = licensed(tmp_path / "base"), tmp_path / "out"
    report = loratool.merge(base, ADAPTER, out, card=card)
    assert "README.md" in report.not_copied and (out / "README.md").exists() == card
    loratool.unmerge(out, ADAPTER, tmp_path / "again")
    assert files(tmp_path / "again") == files(base)
    loratool.merge(out, ADAPTER, tmp_path / "twice")
    loratool.unmerge(tmp_path / "twice", ADAPTER, tmp_path / "once")
    assert files(tmp_path / "once") == files(out)
    loratool.unmerge(out, ADAPTER, tmp_path / "near", approximate=True)
    assert not (tmp_path / "near" / "README.md").exists()


def test_force_replaces_a_card_that_nobody_has_edited(tmp_path: Path) -> None:
    loratool.merge(BASE, ADAPTER, tmp_path / "out")
    loratool.merge(BASE, (ADAPTER, 0.5), tmp_path / "out", force=True)
    loratool.resize(ADAPTER, tmp_path / "resized", rank=2)
    loratool.resize(ADAPTER, tmp_path / "resized", rank=3, force=True)
    card = tmp_path / "out" / "README.md"
    for text in (card.read_text().replace("# ", "# My "), "mine", card.read_text() + "and mine\n"):
        card.write_text(text)
        with pytest.raises(loratool.UsageError, match="holds README.md"):
            loratool.merge(BASE, ADAPTER, tmp_path / "out", force=True)


def test_undo_removes_a_card_that_the_base_had_none_of(tmp_path: Path) -> None:
    loratool.merge(BASE, ADAPTER, tmp_path / "out")
    loratool.unmerge(tmp_path / "out", ADAPTER, tmp_path / "again")
    assert files(tmp_path / "again") == files(BASE)


@pytest.mark.parametrize("has_card", [True, False])
def test_undo_tells_what_of_the_merged_folder_it_replaces(tmp_path: Path, has_card: bool) -> None:
    base = licensed(tmp_path / "base") if has_card else shutil.copytree(BASE, tmp_path / "base")
    loratool.merge(base, ADAPTER, tmp_path / "out")
    for name in ("README.md", "config.json"):
        with open(tmp_path / "out" / name, "a") as file:
            file.write("\n")
    report = loratool.unmerge(tmp_path / "out", ADAPTER, tmp_path / "again")
    assert files(tmp_path / "again") == files(base)
    why = {row.name: row.reason for row in report.left_behind}
    replaced, none = "replaced by the base's", "the base has none"
    assert why == {"README.md": replaced if has_card else none, "config.json": replaced}


def test_a_large_card_is_small_in_the_undo_file(tmp_path: Path) -> None:
    base = licensed(tmp_path / "base")
    small = loratool.merge(base, ADAPTER, tmp_path / "small", dry_run=True).undo_bytes
    with open(base / "README.md", "a") as file:
        file.writelines(f"| task {i} | {i * 7919 % 1000 / 10} | {i * 104729 % 997 / 10} |\n" for i in range(80_000))
    report = loratool.merge(base, ADAPTER, tmp_path / "out")
    assert (base / "README.md").stat().st_size > 2_000_000
    assert small is not None and report.undo_bytes is not None and report.undo_bytes - small < 500_000
    loratool.unmerge(tmp_path / "out", ADAPTER, tmp_path / "again")
    assert files(tmp_path / "again") == files(base)


def test_a_card_beyond_the_limit_stays_behind(tmp_path: Path) -> None:
    base = licensed(tmp_path / "base")
    (base / "README.md").write_bytes(b"x" * 10_000_001)
    report = loratool.merge(base, ADAPTER, tmp_path / "out")
    assert "README.md" in report.not_copied
    assert (tmp_path / "out" / "README.md").stat().st_size < 10_000


@pytest.mark.parametrize("nbytes", [0, 5, 1 << 60, -1, "7"])
def test_a_packed_card_of_another_size_is_refused(tmp_path: Path, nbytes: object) -> None:
    """The size is a bound of memory, so it is checked before it is believed."""
    loratool.merge(licensed(tmp_path / "base"), ADAPTER, tmp_path / "out")
    path = tmp_path / "out" / "loratool.undo"
    body, index = split_undo(path.read_bytes())
    assert index["card_bytes"] == (tmp_path / "base" / "README.md").stat().st_size
    at, length, _ = index["card"]
    assert bz2.decompress(body[at : at + length]) == (tmp_path / "base" / "README.md").read_bytes()
    forge(path, lambda index: index.update(card_bytes=nbytes))
    with pytest.raises(loratool.InputError, match="its model card"):
        loratool.unmerge(tmp_path / "out", ADAPTER, tmp_path / "again")


def test_a_python_without_bz2_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bz2", None)
    with pytest.raises(loratool.MachineError, match="no module bz2"):
        loratool.merge(licensed(tmp_path / "base"), ADAPTER, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loratool.merge(BASE, ADAPTER, tmp_path / "out")
    loratool.merge(tmp_path / "base", ADAPTER, tmp_path / "other", undo=False)


COMMANDS: dict[str, tuple[str, list[str]]] = {
    "merge": ("merged", [str(BASE), f"{ADAPTER}:0.5", "--target", "q_proj", "--dtype", "fp32", "--no-undo"]),
    "extract": ("adapter", [str(BASE), "TUNED", "--rank", "2", "--exclude", "mlp", "--no-bias", "--seed", "7"]),
    "init": ("adapter", [str(BASE), "--method", "gaussian", "--rank-pattern", "q_proj=2", "--rslora", "--alpha", "3"]),
    "resize": ("resized", [str(ADAPTER), "--rank-rule", "sv_fro=0.9", "--max-rank", "5"]),
    "combine": (
        "combined",
        [f"{ADAPTER}:0.7,q_proj=0.25", str(ADAPTER), "--method", "ties", "--rank", "4", "--rank-method", "truncate"],
    ),
    "convert": ("converted", [str(ADAPTER), "--to", "mlx", "--base", str(BASE)]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_makes_the_same_bytes(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's own command, run where the inputs have its names, makes the same folder with the same card."""
    monkeypatch.chdir(tmp_path)
    loratool.merge(BASE, ADAPTER, "TUNED")
    name, words = COMMANDS[command]
    assert run_command(command, *words, "-o", "out").exit_code == 0
    shutil.copytree(BASE, "base")
    shutil.copytree(ADAPTER, "adapter")
    card = (tmp_path / "out" / "README.md").read_text()
    first, second = card.partition("```sh\n")[2].splitlines()[:2]
    if name == "adapter":
        shutil.rmtree("adapter")
    assert run_command(*shlex.split(first)[1:]).exit_code == 0, first
    made, again = (files(tmp_path / folder) for folder in ("out", name))
    if name == "adapter":  # its config has the base's path
        del made["adapter_config.json"], again["adapter_config.json"]
    assert again == made
    assert run_command(*shlex.split(second)[1:]).exit_code == 0, second
    parsed = HubCard(card)
    assert parsed.data.library_name == {"merge": "transformers", "convert": "mlx"}.get(command, "peft")
    assert run_command(command, *words, "-o", "bare", "--no-card").exit_code == 0
    made = files(tmp_path / "out")
    assert files(tmp_path / "bare") == {each: made[each] for each in made if each != "README.md"}


def test_files_get_no_card(tmp_path: Path) -> None:
    loratool.merge(BASE, ADAPTER, tmp_path / "merged.safetensors")
    loratool.resize(ADAPTER, tmp_path / "resized.safetensors", rank=2)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".undo"}


def in_cache(cache: Path, name: str, source: Path, card: str) -> str:
    """Put a folder into the hub's cache; return its commit."""
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "snapshots" / commit / "README.md").write_text(card)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return commit


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    other = "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE\n---\n"
    in_cache(tmp_path / "hub", "org/model-1B", BASE, other)
    commit = in_cache(tmp_path / "hub", "me/style", ADAPTER, other)
    loratool.merge("org/model-1B", "me/style", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    data = HubCard(text).data
    assert data.base_model == ["org/model-1B", "me/style"] and data.base_model_relation == "merge"
    assert (data.license, data.license_name, data.license_link) == ("other", "some-licence", "LICENSE")
    assert data.tags == ["lora", "loratool", "merge"] and data.library_name == "transformers"
    assert "loratool merge org/model-1B me/style -o merged\n" in text and str(tmp_path) not in text
    path = tmp_path / "hub" / "models--me--style" / "snapshots" / commit
    loratool.merge("org/model-1B", path, tmp_path / "by-path")
    assert (tmp_path / "by-path" / "README.md").read_text() == text
    (path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    loratool.merge("org/model-1B", "me/style", tmp_path / "mixed")
    text = (tmp_path / "mixed" / "README.md").read_text()
    assert HubCard(text).data.license is None and "licence `cc-by-nc-4.0`" in text and "licence `other`" in text
    loratool.extract("org/model-1B", tmp_path / "out", tmp_path / "adapter", rank=2)
    data = HubCard.load(tmp_path / "adapter" / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("org/model-1B", "adapter")


def test_the_base_that_a_config_names(tmp_path: Path) -> None:
    for name, expected in (("org/model", "org/model"), ("/data/base", None), ("./org/model", None), ("base", None)):
        adapter = tmp_path / "adapter"
        write_peft(adapter, {"x": factors(8, 8, 2)}, base_model_name_or_path=name)
        loratool.resize(adapter, tmp_path / "out", rank=1, force=True)
        data = HubCard.load(tmp_path / "out" / "README.md").data
        assert data.base_model == expected
        assert data.to_dict().get("base_model_relation") == (expected and "adapter")


HOSTILE = [
    "a`b",
    "``",
    "x\n---\ny",
    "<b onclick=x>",
    "a|b",
    "-x",
    "'; rm -rf ~ #",
    "$(x)`y`",
    "ü 漢",
    "\x1b[31m",
    "[a](b)",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_nothing_else(tmp_path: Path, name: str) -> None:
    base = write_model(tmp_path / "base", {"x.weight": weights(8, 8)}, {"model_type": "llama"})
    adapter = write_peft(tmp_path / name, {"x": factors(8, 8, 2)})
    loratool.merge(base, adapter, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    card = HubCard(text)
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["lora", "loratool", "merge"]}
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card.text)
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {"text", "code_inline"}
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert sum(child.type == "code_inline" and child.content == shown for child in inline) == 2
    (fence,) = [token for token in tokens if token.type == "fence"]
    lines = fence.content.splitlines()
    assert len(lines) == 2
    echoed = subprocess.run(["bash", "-c", lines[0].replace("loratool", "printf '%s\\0'", 1)], capture_output=True)
    assert echoed.stdout.decode().split("\0") == ["merge", "base", "./-x" if name == "-x" else name, "-o", "merged", ""]


def test_a_tokenizers_folder_is_told_from_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    for given, word in {"./base": "./base", str(tmp_path / "base"): "./base", "base": "base"}.items():
        loratool.merge(BASE, ADAPTER, tmp_path / "out", tokenizer=given, force=True)
        assert f"--tokenizer {word} -o merged" in (tmp_path / "out" / "README.md").read_text()


LICENCES = {
    "license: mit": {"license": "mit"},
    "license: 'apache-2.0'": {"license": "apache-2.0"},
    'license: "other"\nlicense_name: llama 3\nlicense_link: https://x.org/a?b=c': {
        "license": "other",
        "license_name": "llama 3",
        "license_link": "https://x.org/a?b=c",
    },
    "license:\n- mit\n- other": {},
    "license: [mit]": {},
    "license: mit\r": {"license": "mit"},
    "license: null": {},
    "license: True": {},
    "license: 5": {},
    "license: 0bsd": {"license": "0bsd"},
    "license_name: x": {},
    "license: a b": {},
    "license: <b>": {},
    "  license: mit": {},
    "license: mit\nlicense_link: javascript:alert(`1`)": {"license": "mit"},
}


@pytest.mark.parametrize("fields", LICENCES)
def test_licences_that_are_read(tmp_path: Path, fields: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{fields}\n---\nlicense: gpl\n", newline="")
    assert read_licence(tmp_path) == LICENCES[fields]


@pytest.mark.parametrize("text", ["", "license: mit\n", "---\nlicense: mit\n", "\n---\nlicense: mit\n---\n", "\udcff"])
def test_cards_without_metadata(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_licence(tmp_path) == {}


def test_scalars_are_yaml(tmp_path: Path) -> None:
    """Whatever a value is, a reader of YAML reads it back."""
    value = "".join(map(chr, [*range(9, 11), 13, *range(32, 127), 0xA0, 0x2028, 0x1F600])) + "\\n: - #"
    text = ModelCard("x", [], [], {"base_model": (value,), "license": value}).encode().decode()
    assert HubCard(text).data.to_dict() == {"base_model": [value], "license": value}


GIVEN = {
    "org/model": ("org/model", "org/model"),
    "org/model@main": ("org/model", "org/model@main"),
    "org/model/sub": ("org/model", "org/model/sub"),
    "hf://org/model": ("org/model", "org/model"),
    "https://huggingface.co/org/model/blob/main/x.safetensors": ("org/model", "org/model@main/x.safetensors"),
    "gpt2": ("gpt2", "gpt2"),
    "/somewhere/else": ("", "else"),
    "../other/": ("", "other"),
}


@pytest.mark.parametrize("given", GIVEN)
def test_how_inputs_are_called(given: str) -> None:
    assert (name_on_hub(given), shown_name(given)) == GIVEN[given]
