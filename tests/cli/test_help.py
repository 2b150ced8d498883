"""The examples in the help texts: each verb has two or more, and they do what they say on the fixtures."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import FIXTURES
from lib.harness.interrupted import interrupted
from lib.harness.stage import set_stage
from lib.models.gguf_models import llama_weights, write_llama

from loratool.cli import COMMANDS, cli
from loratool.cli.help import TITLES, USUAL

Run = Callable[..., Any]

# verb -> the commands that leave what its examples begin with
BEFORE = {
    "run": ["merge base/ adapter/ -o made/ --save-recipe recipe.yaml"],
    "apply": [
        "patch base/ tuned/ -o tuned.patch",
        "patch base/ tuned/ -o step-1.patch",
        "merge tuned/ adapter/ -o next/ --no-undo",
        "patch tuned/ next/ -o step-2.patch",
    ],
    "combine": ["convert kohya.safetensors --to diffusers -o b.safetensors"],
    "convert": [
        "convert style.safetensors --to diffusers -o flux.safetensors",
        "convert base/ --to torch -o pytorch_model.bin",
        "init base/ --method gaussian --dora -o dora/",
        "convert adapter/ --to peft --layout fused -o phi/",
        "init base/ --method pissa --residual left/ -o start/",
    ],
    "diff": ["merge base/ adapter/ -o merged/", "merge base/ adapter/ -o rebuilt/"],
    "patch": [
        "patch base/ tuned/ -o step-1.patch",
        "merge tuned/ adapter/ -o next/ --no-undo",
        "patch tuned/ next/ -o step-2.patch",
    ],
    "unmerge": ["merge base/ adapter/ -o merged/", "merge base/ style/:0.7 task/:-0.2 -o mixed/ --no-undo"],
    "verify": [
        "merge base/ adapter/ -o merged/ --attest merged.intoto.json",
        "merge base/ style/:0.7 task/:-0.2 -o mixed/",
    ],
}

# short name in an example -> what it is on the stage
ALIASES = {
    "a.safetensors": "kohya.safetensors",
    "ink.safetensors": "style.safetensors",
    "xl.safetensors": "sdxl.safetensors",
    "lora": "adapter",
    "b": "base",
}


def examples(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in map(str.strip, text.splitlines()) if line.startswith("loratool ")]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    set_stage(tmp_path)
    for alias, name in ALIASES.items():
        (tmp_path / alias).symlink_to(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_examples_of_each_verb(verb: str, stage: Path, run: Run) -> None:
    for line in BEFORE.get(verb, []):
        assert run(*line.split()).exit_code == 0
    if verb == "recover":
        for name in ("model-1", "model-2"):
            interrupted(stage / "base", stage / "adapter", stage / name)
    if verb == "convert":
        write_llama(stage / "model.gguf", llama_weights())
        (stage / "original").mkdir()
        (stage / "original" / "tokenizer.json").write_text("{}")
        shutil.copytree(stage / "start", stage / "pissa")
        (stage / "model-nf4").mkdir()
        shutil.copy(FIXTURES / "coded" / "bnb_nf4.safetensors", stage / "model-nf4" / "model.safetensors")
    found = examples(run(verb, "--help").stdout)
    assert sum(argv[0] == verb for argv in found) >= 2
    for argv in found:
        result = run(*argv)
        assert result.exit_code == 0 and result.stdout, f"{' '.join(argv)}: {result.stderr}"
        if "-o" in argv:
            assert (stage / argv[argv.index("-o") + 1]).exists()


def test_those_of_all_verbs(stage: Path, run: Run) -> None:
    found = examples(run("-h").stdout)
    assert len(found) >= 3
    for argv in found:
        assert run(*argv).exit_code == 0


COMMAND_OPTIONS = [
    pytest.param(verb, option, id=f"{verb} {option.opts[-1]}")
    for verb in COMMANDS
    for option in (cli.get_command(click.Context(cli), verb) or cli).params
    if isinstance(option, click.Option)
]


@pytest.mark.parametrize(("verb", "option"), COMMAND_OPTIONS)
def test_every_option_names_its_title(verb: str, option: click.Option) -> None:
    assert getattr(option, "title", None) in TITLES


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_help_is_examples_then_few_titles(verb: str, run: Run) -> None:
    """The same titles in the same order on every command, five at most."""
    text = run(verb, "--help").stdout
    titles = [line.removesuffix(":") for line in text.splitlines() if line.removesuffix(":") in TITLES]
    assert 1 <= len(titles) <= 5 and titles == [each for each in TITLES if each in titles]
    assert text.index(f"\n    loratool {verb}") < text.index(f"\n{titles[0]}:")


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_is_a_word_for_it(verb: str, run: Run) -> None:
    assert run("help", verb).stdout == run(verb, "--help").stdout != ""


def test_help_alone_is_that_of_all(run: Run) -> None:
    assert run("help").stdout == run("--help").stdout
    assert run("help", "mrege").stderr == "error: no command 'mrege'\nhint: loratool merge -h\n"


def test_the_first_contact_is_what_people_come_for(run: Run) -> None:
    result = run()
    lines = result.stdout.splitlines()
    assert (result.exit_code, result.stderr) == (2, "") and len(lines) == 12 and max(map(len, lines)) <= 80
    named = [line.split("  loratool ")[1].split()[0] for line in lines if "  loratool " in line[:45]]
    assert named == ["inspect", "inspect", "merge", "unmerge", "verify", "convert", "extract"]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_says_what_it_does(verb: str, run: Run) -> None:
    """And no line is wider than a terminal."""
    text = run(verb, "--help").stdout
    assert all(len(line) <= 80 for line in text.splitlines())
    options = text[: text.rindex("\n  -h ")]
    for block in options.split("\n  -")[1:]:
        words = block.replace("\n", " ").split()
        assert len([word for word in words if word[0] not in "-[<|"]) >= 3, block


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_short_help_fits_a_screen(verb: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the first examples of the long one, and options of it, each in the same place and with less text."""
    monkeypatch.setenv("COLUMNS", "80")
    short, long = (run(verb, word).stdout for word in ("-h", "--help"))
    lines = short.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert 2 <= len(examples(short)) <= 3 and examples(short) == examples(long)[: len(examples(short))]
    options = {line.split("  ")[1] for line in lines if line.startswith("  -")}
    assert options == {word for word in options if f"\n  {word}" in long} and "--help" in options
    assert {*USUAL[verb].split()} == {part for each in options for part in each.split() if part[:2] == "--"} - {
        "--help"
    }


@pytest.mark.parametrize("settings", [{}, {"FORCE_COLOR": "1"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}])
def test_the_help_is_coloured_on_request(settings: dict[str, str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    shown = [run("merge", word).stdout for word in ("-h", "--help")]
    assert [("\x1b[" in text) for text in shown] == [settings.keys() == {"FORCE_COLOR"}] * 2
    monkeypatch.setenv("NO_COLOR", "1")
    assert [click.unstyle(text) for text in shown] == [run("merge", word).stdout for word in ("-h", "--help")]


def test_the_letters_are_those_of_other_programs(tmp_path: Path, run: Run) -> None:
    """-V, -f, -n and -r, as long options mean them."""
    assert run("-V").stdout == run("--version").stdout != ""
    model, out = str(FIXTURES / "llama" / "base"), str(tmp_path / "start")
    plan = run("init", model, "-r", "2", "-n", "-o", out, "--json").stdout
    assert plan == run("init", model, "--rank", "2", "--dry-run", "-o", out, "--json").stdout and not any(
        tmp_path.iterdir()
    )
    assert run("init", model, "-r2", "-o", out).exit_code == 0
    assert [run("init", model, "-r2", "-o", out, *flag).exit_code for flag in ([], ["-f"])] == [4, 0]
