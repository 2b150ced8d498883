"""Hold the table of language models in the guide `families` to what transformers has, and try one of each kind."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, few, slow
from lib import markdown
from lib.models.language_families import (
    GUIDE,
    MARK,
    NONE,
    RIGHT,
    VERBS,
    WRONG,
    Row,
    check_extract,
    is_wrong,
    laid_out,
    load,
    made,
    outcome,
    row,
)
from lib.models.tied_models import SEQ2SEQ, T5
from lib.models.tiny import NOT_BUILT, tables
from safetensors.torch import load_file, save_file

import loratool
from loratool.binding.weights.candidates import SHARED
from loratool.errors import InputError, NeedsFlag

transformers = pytest.importorskip("transformers", minversion="5.0")
peft = pytest.importorskip("peft", minversion="0.19")
pytestmark = pytest.mark.filterwarnings("ignore")

# (table of classes, model type): one of each way in which the file's names are not the model's, or PEFT makes of them
# something else
KINDS = [
    ("image", "llava"),  # other prefixes
    ("causal", "exaone"),  # other names
    ("causal", "granitemoe"),  # experts stacked on both sides, under other names
    ("causal", "deepseek_v3"),  # experts one by one, and PEFT takes dense layers for them
    ("causal", "jamba"),  # experts one by one, of which PEFT makes no stack
    ("causal", "gpt_oss"),  # experts as (in, out)
    ("masked", "nomic_bert"),  # fused on disk
    ("masked", "camembert"),  # a tied head inside a head
    ("causal", "falcon_mamba"),  # layers that PEFT refuses
    ("causal", "git"),  # a name that is the end of others
]


Said = tuple[tuple[str, ...], frozenset[str]]  # the cells of a row, and the texts below the table


def read_table(text: str) -> dict[str, Said]:
    """Return name -> what a table of `laid_out` says."""
    said: dict[str, tuple[str, ...]] = {}
    below: dict[str, set[str]] = {}
    for line in text.replace("\n  ", " ").splitlines():
        if line.startswith("| `"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            assert name not in said
            said[name] = tuple(cells)
        elif found := re.match(r"- ((?:`[^`]+`(?: \(\w+\))?(?:, )?)+): (.*)", line):
            for name in re.findall(r"`[^`]+`(?: \(\w+\))?", found[1]):
                below.setdefault(name, set()).add(found[2])
    assert below.keys() <= said.keys()
    return {name: (cells, frozenset(below.get(name, ()))) for name, cells in said.items()}


def stated() -> list[tuple[tuple[str, str], Said]]:
    """Return of each class in the guide's table what it says of it."""
    text = markdown.between(GUIDE.read_text(), MARK)
    versions = re.findall(r"(?:transformers|PEFT) (\S+),", text)
    if [version("transformers"), version("peft")] != versions:
        pytest.skip(f"the table is of transformers and PEFT {versions}, which are not installed")
    found = []
    for name, said in read_table(text).items():
        ((model_type, table),) = re.findall(r"`([^`]+)`(?: \((\w+)\))?", name)
        classes = [(table, model_type)] if table else [each for each in tables() if each[1] == model_type]
        found += [(each, said) for each in classes]
    return found


def said_of(found: Row) -> Said:
    """Return what the guide has to say of a class."""
    name = f"`{found.type}`"
    return read_table(laid_out({name: outcome(found)}))[name]


def test_every_type_stands_in_one_row() -> None:
    found = stated()
    assert Counter(family for family, _ in found) == Counter(tables()), "language_families.py --write writes it anew"
    assert not any(cell.startswith(WRONG) for _, (cells, _) in found for cell in cells)


@pytest.mark.parametrize("family", few(KINDS, KINDS[0], ("causal", "gpt_oss"), ("masked", "nomic_bert")), ids="-".join)
def test_each_kind_is_right(family: tuple[str, str]) -> None:
    found = row(*family)
    assert [getattr(found, verb) for verb in VERBS] == [RIGHT] * 4, found
    assert found.compared == "logits"
    assert said_of(found) == dict(stated())[family]


@pytest.mark.parametrize("change", ["a tensor is gone", "a tensor is scaled"])
def test_what_is_wrong_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = loratool.extract

    def changed(base: Path, tuned: Path, out: Path, **options: Any) -> Any:
        report, file = extract(base, tuned, out, **options), out / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "down_proj.lora_B" in name)
        scaled = {name: tensors.pop(name) * 1.001}
        save_file(tensors | (scaled if change == "a tensor is scaled" else {}), file, {"format": "pt"})
        return report

    monkeypatch.setattr(loratool, "extract", changed)
    assert row("causal", "llama").extract.startswith(WRONG)


@pytest.mark.slow
@pytest.mark.parametrize("family", tables(), ids="-".join)
def test_every_type_is_right_or_refused(family: tuple[str, str]) -> None:
    found = row(*family)
    assert not is_wrong(found), found
    assert said_of(found) == dict(stated())[family]
    for verb in VERBS:
        if getattr(found, verb).startswith(NONE):
            pytest.skip(getattr(found, verb))


@pytest.mark.parametrize("embed", ["lora", "full"])
@pytest.mark.parametrize(
    "family",
    [("seq2seq", "t5"), slow(("causal", "opt")), ("causal", "zamba"), slow(("masked", "mobilebert"))],
    ids="-".join,
)
def test_matrices_of_several_modules(family: tuple[str, str], embed: str, tmp_path: Path) -> None:
    """An encoder-decoder's embedding, positions after an offset, layers with one tensor, a head that is not called."""
    kind, model = made(*family, tmp_path)
    assert check_extract(kind, model, tmp_path, every=True, embed=embed)[2] == "logits"


@pytest.mark.parametrize(
    ("name", "sides"),
    [("T5EncoderModel", {"encoder"}), ("T5Model", {"encoder", "decoder"}), ("BartModel", {"encoder", "decoder"})],
)
def test_bare_encoder_decoders(name: str, sides: set[str], tmp_path: Path) -> None:
    """Both have one embedding where there is no head too."""
    kind = getattr(transformers, name)
    fields = T5 if name.startswith("T5") else SEQ2SEQ
    torch.manual_seed(0)
    model = kind(getattr(transformers, name.partition("E")[0].removesuffix("Model") + "Config")(**fields)).eval()
    model.save_pretrained(tmp_path / "base")
    check_extract(kind, model, tmp_path, every=True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.split(".")[2] for key in tensors if "lora_embedding_A" in key and "embed_tokens" in key} == sides


def test_one_of_the_layers_with_one_tensor(tmp_path: Path) -> None:
    """PEFT changes the one layer, a merge would change both."""
    kind, _ = made("causal", "zamba", tmp_path)
    config = peft.LoraConfig(target_modules=["layers.1.shared_transf.self_attn.q_proj"])
    peft.get_peft_model(load(kind, tmp_path / "base"), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(
        InputError, match=r"is one tensor that several layers share.*: model\.layers\.1\..* and model\.layers\.3\."
    ) as caught:
        loratool.merge(tmp_path / "base", tmp_path / "peft", tmp_path / "out")
    assert caught.value.culprit == "model.layers.1.shared_transf.self_attn.q_proj.weight"
    assert not (tmp_path / "out").exists()
    report = loratool.init(tmp_path / "base", tmp_path / "start", rank=1)
    assert SHARED in report.left_out.values()
    assert not any("shared_transf" in key for key in load_file(tmp_path / "start" / "adapter_model.safetensors"))


@pytest.mark.parametrize(("family", "target"), [("opt", "embed_positions"), ("t5", "shared")])
def test_embeddings_that_init_does_not_start(family: str, target: str, tmp_path: Path) -> None:
    made("seq2seq" if family == "t5" else "causal", family, tmp_path)
    with pytest.raises(InputError, match="names no weight of the base that could have an adapter") as caught:
        loratool.init(tmp_path / "base", tmp_path / "start", target=(target,))
    assert caught.value.culprit == f"--target {target}"


@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_what_is_not_built_cannot_be(model_type: str, tmp_path: Path) -> None:
    if (package := NOT_BUILT[model_type].partition("package ")[2]) and find_spec(package):
        pytest.skip(f"{package} is installed")
    for family in [each for each in tables() if each[1] == model_type]:
        with pytest.raises((ImportError, AssertionError)):
            made(*family, tmp_path)


def test_layers_with_one_tensor_can_be_left_out(tmp_path: Path) -> None:
    """PEFT's all-linear adapter of a zamba changes each of them otherwise; the flag that is named suffices."""
    kind, _ = made("causal", "zamba", tmp_path)
    peft.get_peft_model(load(kind, tmp_path / "base"), peft.LoraConfig(target_modules="all-linear")).save_pretrained(
        tmp_path / "peft"
    )
    with pytest.raises(NeedsFlag, match="is one tensor that several layers share") as caught:
        loratool.merge(tmp_path / "base", tmp_path / "peft", tmp_path / "out")
    words = shlex.split(caught.value.remedy or "")[1:]
    assert words[::2] == ["--exclude"] * (len(words) // 2)
    report = loratool.merge(tmp_path / "base", tmp_path / "peft", tmp_path / "out", exclude=words[1::2])
    assert report.tensors and not any("shared_transf" in row.name for row in report.tensors)


def test_the_readme_counts_the_classes_of_the_table() -> None:
    """The number that the README claims is the table's own."""
    (claimed,) = re.findall(r"(\d+) classes of transformers", (ROOT / "README.md").read_text())
    assert f"{claimed} classes:" in markdown.between(GUIDE.read_text(), MARK)
