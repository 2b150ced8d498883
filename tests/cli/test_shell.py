"""The command line among other programs: completion in shells, the environment, colours, pipes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.core import ParameterSource
from conftest import FIXTURES
from lib.harness.terminal import run_in_terminal

from loratool.adapters.formats import written_formats
from loratool.architectures.runtimes.table import PROGRAMS
from loratool.binding.merge.choices import TIED
from loratool.cli import COMMANDS, SETTINGS, cli
from loratool.commands import choices, namings
from loratool.commands.combine.methods import table as combining
from loratool.commands.init import methods as inits
from loratool.files.output.output import CONTAINERS

Run = Callable[..., Any]
BASE, ADAPTER = FIXTURES / "llama" / "base", FIXTURES / "llama" / "adapter"
MAIN = "from loratool.cli import main; main()"
CLICK = {verb: cli.get_command(click.Context(cli), verb) for verb in COMMANDS}
OPTIONS = [
    (verb, option)
    for verb, command in CLICK.items()
    if command
    for option in command.params
    if isinstance(option, click.Option)
]


def complete(run: Run, monkeypatch: pytest.MonkeyPatch, typed: str, shell: str = "bash") -> list[str]:
    """What comes for the last word of `typed`, by the protocol of click's scripts."""
    words = typed.split(" ")
    monkeypatch.setenv("_LORATOOL_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
    result = run()
    assert result.exit_code == 0 and result.stderr == ""
    return list(result.stdout.splitlines())


class TestCompletion:
    @pytest.mark.parametrize(
        ("typed", "wanted"),
        [
            ("loratool ", list(COMMANDS)),
            ("loratool in", ["inspect", "init"]),
            ("loratool --v", ["--version"]),
            ("loratool merge base/ adapter/ --ti", ["--tied"]),
            ("loratool merge base/ adapter/ --tied ", list(TIED)),
            ("loratool merge base/ adapter/ --dtype ", ["keep", "fp32", "bf16", "fp16"]),
            ("loratool merge base/ adapter/ --device c", ["cpu", "cuda"]),
            ("loratool merge base/ adapter/ --target q_proj,a", ["q_proj,all-linear", "q_proj,attention"]),
            (
                "loratool convert a.safetensors --to ",
                list(dict.fromkeys([*written_formats(), *CONTAINERS, *namings.MODEL_NAMINGS])),
            ),
            ("loratool convert a.safetensors --layout ", list(choices.QKV_LAYOUTS)),
            ("loratool convert a.safetensors --for ", list(PROGRAMS)),
            ("loratool init base/ --method ", list(choices.INIT_CHOICES)),
            ("loratool combine a/ b/ --method dare", ["dare-linear", "dare-ties"]),
            ("loratool extract base/ tuned/ --embed s", ["skip"]),
            ("loratool verify base/ adapter/ merged/ --allow ", ["inconclusive"]),
            ("loratool guide image", ["image-models"]),
        ],
    )
    def test_verbs_options_and_words(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, typed: str, wanted: list[str]
    ) -> None:
        assert complete(run, monkeypatch, typed) == [f"plain,{word}" for word in wanted]

    @pytest.mark.parametrize("verb", COMMANDS)
    def test_every_option_of_every_verb(self, run: Run, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
        found = complete(run, monkeypatch, f"loratool {verb} --")
        assert set(found) >= {f"plain,{option.opts[-1]}" for owner, option in OPTIONS if owner == verb}

    @pytest.mark.parametrize("verb", sorted(set(COMMANDS) - {"guide", "env"}))
    def test_inputs_and_outputs_are_files(self, run: Run, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
        """The shell's own completion takes over where a path is wanted."""
        assert complete(run, monkeypatch, f"loratool {verb} mod") == ["file,mod"]
        if any(owner == verb and option.name == "out" for owner, option in OPTIONS):
            assert complete(run, monkeypatch, f"loratool {verb} -o mer") == ["file,mer"]

    def test_zsh_and_fish_show_what_a_verb_does(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        assert complete(run, monkeypatch, "loratool x", "zsh") == [""]
        assert complete(run, monkeypatch, "loratool unm", "zsh") == ["plain", "unmerge", COMMANDS["unmerge"]]
        assert complete(run, monkeypatch, "loratool unm", "fish") == [f"plain,unmerge\t{COMMANDS['unmerge']}"]

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_the_script_of_each_shell(self, run: Run, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
        monkeypatch.setenv("_LORATOOL_COMPLETE", f"{shell}_source")
        result = run()
        assert result.exit_code == 0 and f"_LORATOOL_COMPLETE={shell}_complete" in result.stdout
        if shutil.which(shell):
            assert subprocess.run([shell, "-n"], input=result.stdout, text=True).returncode == 0

    @pytest.fixture
    def command(self, tmp_path: Path) -> Path:
        command = tmp_path / "loratool"
        command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{MAIN}' \"$@\"\n")
        command.chmod(0o755)
        return command

    @pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
    def test_fish_really_completes(self, command: Path, tmp_path: Path) -> None:
        script = f"""
            set -x PATH '{tmp_path}' $PATH
            _LORATOOL_COMPLETE=fish_source loratool | source
            complete -C 'loratool unm'; complete -C 'loratool merge base/ adapter/ --tied sh'
        """
        result = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True)
        told = COMMANDS["unmerge"].partition(",")[0]  # where the script that click makes ends it
        assert result.stdout.splitlines() == [f"unmerge\t{told}", "share"], result.stderr

    @pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
    def test_zsh_really_completes(self, command: Path, tmp_path: Path) -> None:
        """In a terminal, as it completes nowhere else: TAB, and then the line that it made is run."""
        load = (
            'PS1=; autoload -U compinit; compinit -D -u; eval "$(_LORATOOL_COMPLETE=zsh_source loratool)"; echo rea""dy'
        )
        typed = [("", f"{load}\n"), ("ready", "loratool unm\t"), ("unmerge", "\n"), ("-h", "exit 0\n")]
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        shown = run_in_terminal([str(shutil.which("zsh")), "-f", "-i"], typed, PATH=path, TERM="xterm")
        assert "unmerge: no MERGED given" in shown

    @pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
    def test_bash_really_completes(self, command: Path, tmp_path: Path) -> None:
        script = f"""
            PATH='{tmp_path}':$PATH
            eval "$(_LORATOOL_COMPLETE=bash_source loratool)"
            COMP_WORDS=(loratool merge base/ adapter/ --tied sh); COMP_CWORD=5
            _loratool_completion loratool sh --tied
            echo "${{COMPREPLY[@]}}"
            complete -p loratool
        """
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert result.stdout.split("\n")[0] == "share" and "-F _loratool_completion loratool" in result.stdout

    def test_it_needs_no_torch(self) -> None:
        """Nor does the help of any verb: a TAB must not wait for a second of imports."""
        code = (
            "import os, sys; from loratool.cli import COMMANDS, _run\n"
            "assert all(_run([verb, '-h']) == 0 for verb in COMMANDS)\n"
            "os.environ.update(_LORATOOL_COMPLETE='bash_complete', COMP_WORDS='loratool init -', COMP_CWORD='2')\n"
            "assert _run([]) == 0\n"
            "sys.exit(bool({'torch', 'numpy', 'safetensors', 'rich'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

    def test_the_words_are_rows_of_the_tables(self) -> None:
        assert list(choices.INIT_CHOICES) == list(inits.INITS) and list(choices.COMBINE_METHODS) == list(
            combining.METHODS
        )


# An option's value by its name or its type, where it is no switch and no choice
SAMPLES = {
    "html": "x.html",
    "PATH": "x",
    "INTEGER": "3",
    "INTEGER RANGE": "3",
    "FLOAT": "0.5",
    "FLOAT RANGE": "0.5",
    "TEXT": "fp16",
    "COUNT": "4M",
    "SIZE": "5MB",
    "NAME=VALUE": "sv_fro=0.9",
    "KEY=VALUE": "modelspec.title=Ink",
    "PATTERN=RANK": "down_proj=16",
    "SLICES": "1,0,1",
    "ADAPTER[:WEIGHT]": "a:0.5",
}


class TestEnvironment:
    @pytest.mark.parametrize(
        ("verb", "option"),
        [(verb, option) for verb, option in OPTIONS if option.name != "json_schema"],
        ids=lambda x: x if isinstance(x, str) else x.name,
    )
    def test_every_option(self, monkeypatch: pytest.MonkeyPatch, verb: str, option: click.Option) -> None:
        """The same value as on the command line."""
        assert option.name
        kind = option.type
        text = (
            "1"
            if option.is_flag
            else kind.choices[-1]
            if isinstance(kind, click.Choice)
            else SAMPLES.get(option.name) or SAMPLES[kind.name.upper()]
        )
        given = [option.opts[-1]] if option.is_flag else [option.opts[-1], text]
        command = CLICK[verb]
        assert command
        arguments = ["a" for each in command.params if isinstance(each, click.Argument) and each.required]
        if verb == "convert" and option.name != "to":
            arguments += ["--to", "peft"]
        # with the group's settings: click keeps the help option of a command's first context for all later ones
        top = click.Context(cli, info_name="loratool", auto_envvar_prefix="LORATOOL", **SETTINGS)
        wanted = command.make_context(verb, [*arguments, *given], parent=top).params[option.name]
        spelled = option.opts[-1].removeprefix("--").replace("-", "_")
        monkeypatch.setenv(f"LORATOOL_{verb}_{spelled}".upper(), text)
        found = command.make_context(verb, arguments, parent=top)
        assert found.get_parameter_source(option.name) is ParameterSource.ENVIRONMENT
        assert found.params[option.name] == wanted

    def test_several_patterns_stand_apart(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("LORATOOL_MERGE_EXCLUDE", "mlp,o_proj q_proj")
        out = run("merge", BASE, ADAPTER, "-o", tmp_path / "out", "--dry-run", "-v").stdout
        assert set(re.findall(r"excluded: .*\.(\w+)$", out, re.MULTILINE)) == {
            "down_proj", "gate_proj", "up_proj", "o_proj", "q_proj",
        }  # fmt: skip

    def test_the_command_line_goes_before_it(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("LORATOOL_MERGE_OUT", str(tmp_path / "env"))
        assert run("merge", BASE, ADAPTER, "-o", tmp_path / "given").exit_code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["given"]

    def test_what_is_no_value(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORATOOL_MERGE_TIED", "perhaps")
        result = run("merge", BASE, ADAPTER)
        assert result.exit_code == 2 and "'perhaps' is not one of 'untie', 'share', 'refuse'" in result.stderr


def in_a_terminal(arguments: list[object], **environment: str) -> str:
    """All that a command writes to a terminal 100 columns wide."""
    shown: dict[str, str | None] = {"NO_COLOR": None, "COLUMNS": "100", "TERM": "xterm-256color", **environment}
    return run_in_terminal([sys.executable, "-c", MAIN, *map(str, arguments)], **shown)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
class TestColours:
    COLOUR = re.compile(r"\x1b\[(?:3[0-9]|4[0-9]|9[0-7])[;m]")

    @pytest.mark.parametrize(("environment", "colours"), [({}, True), ({"NO_COLOR": "1"}, False)])
    def test_a_terminal_has_them_unless_it_says_no(self, environment: dict[str, str], colours: bool) -> None:
        text = in_a_terminal(["inspect", ADAPTER], **environment)
        assert bool(self.COLOUR.search(text)) is colours and "no problem found" in text

    def test_a_dumb_terminal_gets_text(self) -> None:
        assert "\x1b[1m" in in_a_terminal(["inspect", BASE])
        assert "\x1b" not in in_a_terminal(["inspect", BASE], TERM="dumb")

    def test_a_link_is_a_name_in_a_terminal(self) -> None:
        text = in_a_terminal(["guide", "formats"])
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert "The guide families lists" in plain and "see Sharded states" in " ".join(plain.split())
        assert ".md#" not in plain and "<!--" not in plain

    def test_a_terminal_gets_a_guide_laid_out(self) -> None:
        text = in_a_terminal(["guide", "which-method"], COLUMNS="200")
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert "\x1b[1m" in text and "loratool diff demo/adapter" in plain and "(combine-two.md)" not in plain
        assert "\nPicture: of two adapters' gains, " in plain and "combining.svg" not in plain
        assert "```" not in plain and max(map(len, plain.splitlines())) <= 120

    def test_a_file_has_none_and_whole_lines(self) -> None:
        """Whatever the environment says of widths; colours alone can be forced, as CI systems do."""
        argv = [sys.executable, "-c", MAIN, "inspect", BASE]
        plain, forced = (
            subprocess.run(argv, env={**os.environ, "COLUMNS": "30", **more}, capture_output=True, text=True).stdout
            for more in ({}, {"FORCE_COLOR": "1"})
        )
        assert "\x1b" not in plain and re.sub(r"\x1b\[[0-9;]*m", "", forced) == plain
        assert max(map(len, plain.splitlines())) > 60
