"""Hold what Python reads of texts that are written in the command line's words."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, ROOT

import loratool
from loratool.commands.arguments import SIMPLE
from loratool.commands.respell import TERMINAL, _by_word, respelled
from loratool.errors import NeedsFlag

BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"

# a text -> what Python reads
TEXTS = {
    "add --force to replace it, or name another with -o": "add force=True to replace it, or name another with out",
    "--alpha 8 contradicts the config's 16: leave --alpha out": "alpha=8 contradicts the config's 16: leave alpha out",
    "--base must be the model under it": "base must be the model under it",
    "use --rank and --rank-method truncate": 'use rank and rank_method="truncate"',
    "--quantized mixed --no-undo, or by --device cpu": 'quantized="mixed", undo=False, or by device="cpu"',
    "name a program, like --for vllm": 'name a program, like runtime="vllm"',
    "add --exclude=score if the rest is": 'add exclude="score" if the rest is',
    "--exclude a.b --exclude 're:^c\\.d$' drops them": 'exclude=["a.b", "re:^c\\\\.d$"] drops them',
    "is --base. 'a --x": "is base. 'a --x",
    "add --rank-pattern 'a.b=4'": 'add rank_pattern={"a.b": 4}',
    "swap them: loratool merge base 'my lora'": 'swap them: loratool.merge("base", "my lora")',
    "loratool merge BASE a b:0.5 -o MERGED; or add": 'loratool.merge(BASE, ["a", ("b", 0.5)], MERGED); or add',
    "loratool verify BASE ADAPTER... MERGED": "loratool.verify(BASE, ADAPTER, MERGED)",
    "loratool inspect FILE --for vllm": 'loratool.inspect_for(FILE, runtime="vllm")',
    "loratool verify --attestation F BASE A M": "loratool.verify_attestation(F, base=BASE, adapters=A, merged=M)",
    "first loratool convert --to peft --base BASE with it": 'first loratool.convert(..., to="peft", base=BASE) with it',
    "`loratool extract BASE MODEL` makes": "`loratool.extract(BASE, MODEL)` makes",
    "run `loratool convert` twice": "run `loratool.convert` twice",
    "to compare them use diff --spectra": "to compare them use diff_spectra",
    "see loratool guide recipes": "see loratool guide recipes",
    "give torchrun --rdzv-backend c10d": "give torchrun --rdzv-backend c10d",
    "models--org--name is in the cache": "models--org--name is in the cache",
    "loratool inspect 'a' b's --base BASE": 'loratool.inspect("a") b\'s base=BASE',
}


def test_what_python_reads() -> None:
    assert {text: respelled(text) for text in TEXTS} == TEXTS


def test_flags_alone_have_values_that_could_be_words_of_a_sentence() -> None:
    error = NeedsFlag("is in doubt", flags="--exclude score --plain", why="if it is of no use")
    assert str(error) == 'is in doubt\nadd exclude="score", plain=True if it is of no use'
    assert error.remedy == "add --exclude score --plain if it is of no use"
    error = NeedsFlag("is in doubt", flags="--architecture flux or --architecture sana with a base")
    assert str(error) == 'is in doubt\nadd architecture="flux" or architecture="sana" with a base'


def texts() -> Iterator[str]:
    """Yield the texts of the code below the command line, with x_1 for each value, but for docstrings and help."""
    for path in sorted((ROOT / "loratool").rglob("*.py")):
        if path.parts[len(ROOT.parts) + 1] == "cli" or path.name in ("call.py", "calls.py"):
            continue
        tree = ast.parse(path.read_text())
        parts = {id(part) for each in ast.walk(tree) if isinstance(each, ast.JoinedStr) for part in each.values}
        docs = {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Expr)}
        for each in ast.walk(tree):
            if isinstance(each, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "x_1" for v in each.values)
            elif isinstance(each, ast.Constant) and isinstance(each.value, str) and id(each) not in parts | docs:
                yield each.value


# options of other programs, and options whose words are values
OTHERS = r"--(outtype|max-lora-rank|enable-tower-connector-lora|revision|rdzv-backend|x_1)\b"


def test_no_text_has_words_of_the_other_side() -> None:
    every = {*texts()}
    in_python = {text: respelled(text) for text in every if re.search(r"--[a-z]|\bloratool [a-z]", text)}
    assert len(in_python) > 400
    assert not [t for t in in_python.values() if re.search(r"(?<![\w-])--?[a-z]", re.sub(OTHERS, "", t))]
    names = "|".join(each.name for arguments in _by_word().values() for each in arguments)
    assert not [text for text in every if re.search(rf"\b({names})=(True|False)\b", text)]
    calls = [call for text in in_python.values() for call in re.findall(r"loratool\.\w+\([^()]*\)", text)]
    assert len(calls) > 30
    for call in calls:
        tree: Any = ast.parse(call.replace("(x_1)", "(x)"), mode="eval").body
        parameters = inspect.signature(getattr(loratool, tree.func.attr)).parameters
        assert {each.arg for each in tree.keywords} <= {*parameters} and len(tree.args) <= len(parameters), call


def test_an_option_is_one_thing_in_all_functions() -> None:
    """A switch, or a name of a value: the text around it does not tell which function is meant."""
    for word, arguments in _by_word().items():
        assert len({(each.name, each.type is SIMPLE[bool]) for each in arguments}) == 1, word
    assert not TERMINAL.keys() & _by_word().keys() - {"strict"}


def test_each_side_reads_its_own_words(tmp_path: Path, run: Callable[..., Any]) -> None:
    loratool.merge(BASE, ADAPTER, tmp_path / "out")
    with pytest.raises(NeedsFlag) as raised:
        loratool.merge(BASE, ADAPTER, tmp_path / "out")
    assert "add force=True to replace it" in str(raised.value) and "--" not in str(raised.value)
    result = run("merge", BASE, ADAPTER, "-o", tmp_path / "out")
    assert "add --force to replace it" in result.stderr and "=True" not in result.stderr
