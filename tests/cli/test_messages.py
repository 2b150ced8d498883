"""Errors, hints and warnings: one shape, wrapped on a terminal, whole in a pipe, and no line that a name can forge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lib.harness.terminal import open_terminal

from loratool.cli.messages import print_error, warn
from loratool.errors import InputError

Run = Callable[..., Any]
LONG = "holds a word " + "and another " * 12 + "and the last"


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(InputError(LONG, culprit="style", remedy="loratool merge base style " + "--exclude x " * 20 + "-o out"))
    what, hint = capsys.readouterr().err.splitlines()
    assert what == f"error: style: {LONG}" and hint.startswith("hint: loratool merge") and hint.endswith("-o out")


@pytest.mark.parametrize("columns", [60, 80])
def test_a_terminal_wraps_at_words(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = open_terminal(monkeypatch, columns)
    print_error(InputError(LONG, culprit="style", remedy="loratool inspect style --base base"))
    *lines, hint = terminal.look().splitlines()
    assert max(map(len, lines)) <= columns and len(lines) > 1
    assert all(line.startswith("  ") and line[2] != " " for line in lines[1:])
    assert " ".join(map(str.strip, lines)) == f"error: style: {LONG}"
    assert hint == "hint: loratool inspect style --base base"


def test_a_terminal_shows_six_lines_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a remedy too, of which one had 3,733 characters."""
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = open_terminal(monkeypatch, 60)
    print_error(InputError("none of these " * 60, remedy="--exclude " + "q_proj," * 3 + " and more" * 100))
    lines = terminal.look().splitlines()
    assert len(lines) == 6 and [line.split(":")[0] for line in lines if line[0] != " "] == ["error", "hint"]
    assert lines[2].endswith(" ...") and lines[5].endswith(" ...")


def test_a_message_can_have_a_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of which a terminal shows what has room."""
    monkeypatch.setenv("NO_COLOR", "1")
    names = [f"  self_attn.{i}_proj  layers 0-31" for i in range(8)]
    error = InputError("\n".join(["187 of 224 modules are not in base", *names]), remedy="its base is another")
    print_error(error)
    whole = ["error: 187 of 224 modules are not in base", *names, "hint: its base is another"]
    assert capsys.readouterr().err.splitlines() == whole
    terminal = open_terminal(monkeypatch, 80)
    print_error(error)
    assert terminal.look().splitlines() == [*whole[:4], f"{whole[4]} ...", whole[-1]]


def test_a_name_forges_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(InputError("is odd\nhint: rm", culprit="x\nhint: rm -r", remedy="look\x1b[2J\r"))
    assert capsys.readouterr().err == "error: x\\nhint: rm -r: is odd\n  hint: rm\nhint: look\\x1b[2J\\r\n"


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_the_word_has_the_colour(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], coloured: bool) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    terminal = open_terminal(monkeypatch, 80)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    print_error(InputError("is odd", culprit="x", remedy="look"))
    warn(["a: b"])
    wanted = "\x1b[31merror: \x1b[0mx: is odd\n\x1b[2mhint: \x1b[0mlook\n\x1b[33mwarning: \x1b[0ma: b\n"
    assert terminal.look() == (wanted if coloured else "error: x: is odd\nhint: look\nwarning: a: b\n")


def test_colours_can_be_forced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    warn([LONG])
    assert capsys.readouterr().err == f"\x1b[33mwarning: \x1b[0m{LONG}\n"


def test_an_option_without_its_value(run: Run) -> None:
    result = run("resize", "adapter", "--rank")
    assert result.exit_code == 2
    assert result.stderr == "error: resize: option '--rank' requires an argument\nhint: loratool resize -h\n"
