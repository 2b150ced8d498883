"""Paste what a message says to type into bash, and see that it reaches the file, whatever the file is called."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, factors, weights, write_model, write_peft

from loratool.errors import shell_word

Run = Callable[..., Any]

# Names that mean something to a shell, to a terminal, or to neither a text
NAMES = {
    "plain": b"plain",
    "blanks": b"a  b",
    "quotes": b'it\'s "so"',
    "a command": b"$(touch pwned) `touch pwned`; touch pwned",
    "history": b"!!a!b",
    "home": b"~root",
    "a pattern": b"*[a-z]?{a,b}",
    "a backslash": b"a\\x41\\",
    "line breaks": b"a\nerror: b\r",
    "escapes": b"\x1b]0;title\x07\x1b[31mred",
    "letters": "größe 大小".encode(),
    "no UTF-8": b"\xff\xfe5",
    "right to left": "a\u202ebc".encode(),
    "a wide blank": "a\u00a0b".encode(),
}


def pasted(line: str) -> list[bytes]:
    """Return the words that bash reads in a line, of whose commands none is run."""
    script = b"PATH=; loratool() { printf '%s\\0' \"$@\"; }; " + os.fsencode(line)
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert not Path("pwned").exists() and not done.stderr
    return done.stdout.split(b"\0")[:-1]


WORST = ("quotes", "a command", "line breaks", "escapes", "no UTF-8")


@pytest.fixture(params=[pytest.param(each, marks=() if each in WORST else pytest.mark.slow) for each in NAMES])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return os.fsdecode(NAMES[request.param])


def hint(result: Any, code: int) -> str:
    """Return the last line of stderr, which is the hint, after seeing that all of it can be shown."""
    assert result.exit_code == code, result.stderr
    lines = result.stderr.removesuffix("\n").split("\n")
    assert all(line.startswith(("error: ", "hint: ", "  ")) for line in lines)
    assert all(c.isprintable() or "\udc80" <= c <= "\udcff" for line in lines for c in line)
    assert lines[-1].startswith("hint: ")
    return str(lines[-1].removeprefix("hint: "))


def test_a_word_is_read_back(name: str) -> None:
    word = shell_word(name)
    assert pasted(f"loratool {word} {word}") == [os.fsencode(name)] * 2
    assert word.isprintable()
    assert shell_word(Path("x", name)) == shell_word(f"x/{name}")


def test_half_a_character_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON can hold one, so a name from a file can."""
    monkeypatch.chdir(tmp_path)
    assert pasted(f"loratool {shell_word('a' + chr(0xD800))}") == [b"a\xed\xa0\x80"]


def test_a_command_of_a_hint(name: str, run: Run) -> None:
    shutil.copytree(FIXTURES / "llama" / "base", name)
    said = hint(run("merge", name, name, "-o", "out"), 3)
    start = "to extract an adapter from a full fine-tune: "
    assert said.startswith(start)
    assert pasted(said.removeprefix(start)) == [b"extract", os.fsencode(name), os.fsencode(name)]


def test_a_file_that_is_to_be_named(name: str, run: Run) -> None:
    for step in (1, 2):
        write_peft(Path(name, f"run-{step}"), {"a": factors(6, 4, 2)})
    said = hint(run("inspect", name, "--for", "vllm"), 3)
    assert said.startswith("name one, like ")
    assert pasted(f"loratool {said.removeprefix('name one, like ')}") == [os.fsencode(f"{name}/run-1")]


def test_where_a_link_leads(name: str, run: Run) -> None:
    write_model(Path("base"), {"a.weight": weights(6, 4)}, {})
    write_peft(Path("adapter"), {"a": factors(6, 4, 2)})
    Path("real").mkdir()
    Path(name).symlink_to("real")
    said = hint(run("merge", "base", "adapter", "-o", name), 2)
    words = pasted(f"loratool merge base adapter {said.partition(' writes into it')[0]}")
    assert words[-2:] == [b"-o", os.fsencode(name) + b"/merged"]
    assert run(*map(os.fsdecode, words)).exit_code == 0
    assert Path("real/merged/model.safetensors").is_file()


def test_an_option_with_names_from_a_file(name: str, run: Run) -> None:
    """A module of an adapter, which anybody may have written, is left out by the option of the hint."""
    if "\udcff" in name:
        name = "\u2028"  # a name in a file is a text
    write_model(Path("base"), {"a.weight": weights(6, 4)}, {})
    write_peft(Path("adapter"), {"a": factors(6, 4, 2), f"b.{name}": factors(6, 4, 2)}, target_modules=["a"])
    said = hint(run("merge", "base", "adapter", "-o", "out"), 4)
    words = pasted(f"loratool merge base adapter -o out {said.removeprefix('to exclude them: ')}")
    assert run(*map(os.fsdecode, words)).exit_code == 0
