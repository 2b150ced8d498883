"""Hold .github/SECURITY.md against the code: each limit that it names is the code's, and what exceeds it is refused."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, factors, run_command, write_peft

PAGE = (ROOT / ".github" / "SECURITY.md").read_text()
LIMITS = re.findall(r"^\| (.+?) \| ([\d,]+) \| `([\w.]+)\.(\w+)` \|$", PAGE, re.MULTILINE)
TOLD = {what: int(number.replace(",", "")) for what, number, *_ in LIMITS}


def test_every_row_is_read() -> None:
    rows = PAGE.partition("## Limits")[2].partition("\n## ")[0].count("\n| ")
    assert len(LIMITS) == rows - 1 == len(TOLD)


@pytest.mark.parametrize(("what", "number", "module", "name"), LIMITS, ids=[row[0] for row in LIMITS])
def test_a_limit_is_the_codes(what: str, number: str, module: str, name: str) -> None:
    assert getattr(import_module(f"loratool.{module}"), name) == TOLD[what]


def sparse(path: Path, nbytes: int, start: bytes = b"") -> None:
    """Make a file that takes no room on the disk."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(start)
    os.truncate(path, nbytes)


def huge_header(folder: Path) -> list[str]:
    length = TOLD["header of a safetensors file, bytes"] + 1
    sparse(folder / "model.safetensors", 2 * length, struct.pack("<Q", length))
    return ["inspect", "model.safetensors"]


def huge_config(folder: Path) -> list[str]:
    write_peft(folder / "adapter", {"a": factors(6, 4, 2)})
    sparse(folder / "adapter" / "adapter_config.json", TOLD["JSON file, bytes"] + 1, b"{")
    return ["inspect", "adapter"]


def huge_recipe(folder: Path) -> list[str]:
    sparse(folder / "recipe.json", TOLD["recipe, bytes"] + 1, b"{")
    return ["run", "recipe.json"]


def recipe_of_many(folder: Path) -> list[str]:
    (folder / "many.json").write_text(json.dumps({"steps": [{}] * (TOLD["values of a recipe"] + 1)}))
    return ["run", "many.json"]


def long_expression(folder: Path) -> list[str]:
    length = TOLD["regular expression of a config, characters"] + 1
    write_peft(folder / "adapter", {"a": factors(6, 4, 2)}, target_modules="a|" * (length // 2) + "a")
    return ["inspect", "adapter"]


def gguf_of(tensors: int, fields: int) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        sparse(folder / "m.gguf", 1 << 24, struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields))
        return ["inspect", "m.gguf"]

    return make


def imatrix_of_many(folder: Path) -> list[str]:
    write_peft(folder / "adapter", {"model.layers.0.self_attn.q_proj": factors(6, 4, 2)})
    entries = TOLD["entries of an imatrix in the older form"] + 1
    sparse(folder / "imatrix.dat", 1 << 24, struct.pack("<ii", entries, 1))
    return ["resize", "adapter", "--rank", "1", "--imatrix", "imatrix.dat"]


def deep_config(folder: Path) -> list[str]:
    write_peft(folder / "adapter", {"a": factors(6, 4, 2)})
    (folder / "adapter" / "adapter_config.json").write_text('{"a":' * 200_000)
    return ["inspect", "adapter"]


@pytest.mark.parametrize(
    "make",
    [
        huge_header,
        huge_config,
        huge_recipe,
        recipe_of_many,
        long_expression,
        gguf_of(TOLD["tensors of a GGUF file"] + 1, 0),
        imatrix_of_many,
        gguf_of(0, TOLD["fields of a GGUF file"] + 1),
        deep_config,
    ],
)
def test_what_exceeds_it_is_refused(
    make: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result: Any = run_command(*make(tmp_path))
    assert result.exit_code in (2, 3), result.stderr
    assert result.stderr.startswith("error: ") and not result.stdout


# What runs code, or makes objects of bytes -> the modules that have it, and for what
RUNS_CODE = {
    r"^\s*(?:import pickle$|from pickle import)": {"streaming/forked.py"},  # between a process and its own forks
    r"^[^#\n]*\btorch\.load\(|\bpickle\.Unpickler\(|\bmarshal\.|\bshelve\.": set(),
    r"\byaml\.(?:load|unsafe_load|full_load)\(": set(),
    r"(?<![\w.])eval\(": {"commands/arguments.py"},  # of the annotations of our own functions
    r"(?<![\w.])exec\(|\bos\.(?:system|popen|exec\w*|spawn\w*)\(|\bsubprocess\.": set(),
}


@pytest.mark.parametrize("pattern", RUNS_CODE)
def test_nothing_that_is_read_is_run(pattern: str) -> None:
    package = ROOT / "loratool"
    texts = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    assert {name for name, text in texts.items() if re.search(pattern, text, re.MULTILINE)} == RUNS_CODE[pattern]
