"""Hold the table of language models in the guide `formats` to what transformers has, and try one of each kind."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from language_families import GUIDE, MARKS, NONE, RIGHT, VERBS, WRONG, is_wrong, made, row
from safetensors.torch import load_file, save_file
from tiny import NOT_BUILT, tables

import loratool

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


def test_every_type_stands_in_one_row() -> None:
    text = GUIDE.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]
    transformers, peft = re.findall(r"(?:transformers|PEFT) (\S+),", text)
    if (version("transformers"), version("peft")) != (transformers, peft):
        pytest.skip(f"the table is of transformers {transformers} and PEFT {peft}, which are not installed")
    found: Counter[tuple[str, str]] = Counter()
    for line in text.splitlines():
        for name, table in re.findall(r"`([^`]+)`(?: \((\w+)\))?", line.split(" | ")[-1]):
            found.update([(table, name)] if table else [each for each in tables() if each[1] == name])
    assert found == Counter(tables()), "python tests/language_families.py --write writes it anew"
    assert WRONG not in text


@pytest.mark.parametrize("family", KINDS, ids="-".join)
def test_each_kind_is_right(family: tuple[str, str]) -> None:
    found = row(*family)
    assert [getattr(found, verb) for verb in VERBS] == [RIGHT] * 4, found
    assert found.compared == "logits"


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
    for verb in VERBS:
        if getattr(found, verb).startswith(NONE):
            pytest.skip(getattr(found, verb))


@pytest.mark.parametrize("model_type", NOT_BUILT)
def test_what_is_not_built_cannot_be(model_type: str, tmp_path: Path) -> None:
    if (package := NOT_BUILT[model_type].partition("package ")[2]) and find_spec(package):
        pytest.skip(f"{package} is installed")
    for family in [each for each in tables() if each[1] == model_type]:
        with pytest.raises((ImportError, AssertionError)):
            made(*family, tmp_path)
