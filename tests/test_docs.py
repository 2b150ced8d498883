"""README.md and the guides: every command in them runs, and prints what is pasted there; the two that set up are run by
.ci/run, and here are only read. Every table that the code has too is compared."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from conftest import ROOT, few, run_command, slow
from lib import guide_tables, markdown
from lib.harness.interrupted import interrupted
from lib.messages import is_said, says
from rich.console import Console
from rich.markdown import Markdown

import loratool
from loratool.cli import COMMANDS, GUIDES, cli, schemas
from loratool.commands.guide import PAGES

FOLDER = ROOT / "loratool" / "guides"
TOPICS = sorted(path.stem for path in FOLDER.glob("*.md"))
DOCS = {"README": ROOT / "README.md"} | {name: FOLDER / f"{name}.md" for name in TOPICS}
# pages whose commands the default run runs; -m slow runs all
FIRST_READ = "README tutorial merging prove undo python ci github-actions extract-adapter runtimes formats".split()
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
TEXTS = {name: path.read_text() for name, path in DOCS.items()}
SCRATCH = "/tmp/"  # where the pages write
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
Run = Callable[..., Any]
MAIN = f"exec '{sys.executable}' -c 'from loratool.cli import main; main()' \"$@\"\n"


def blocks(name: str, kind: str) -> list[str]:
    return [text for each, text in BLOCK.findall(TEXTS[name]) if each == kind]


def without_pictures(name: str) -> str:
    return re.sub(r"^!\[.*\]\(.*\)\n\n", "", TEXTS[name], flags=re.MULTILINE)


def commands(name: str) -> list[tuple[str, str, str | None]]:
    """(kind of block, command, what is pasted below it) of a page in order, but for the README's two that set up."""
    found: list[tuple[str, str, str | None]] = []
    for kind, text in BLOCK.findall(TEXTS[name]):
        text = re.sub(r" *\\\n *", " ", text) if kind in ("console", "sh") else text
        if kind == "console":
            for part in text.split("$ ")[1:]:
                command, _, pasted = part.partition("\n")
                found.append((kind, command, pasted))
        elif kind == "sh":
            found += [(kind, line, None) for line in text.splitlines()]
        elif kind == "python":
            found.append((kind, text, None))
        elif kind == "text" and found and found[-1][0] == "python":
            found[-1] = (*found[-1][:2], text)
    return found[2:] if name == "README" else found


def in_scratch(text: str, scratch: Path) -> str:
    return text.replace(SCRATCH, f"{scratch}/")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """What /tmp is for one page, so that pages and runs do not meet; with a `loratool`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "loratool").write_text("#!/bin/sh\n" + MAIN)
    (tmp_path / "bin" / "loratool").chmod(0o755)
    return tmp_path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages use as `demo/...`."""
    folder = tmp_path_factory.mktemp("made") / "demo"
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder.parent)
        loratool.demo("demo")
    return folder


@pytest.fixture
def place(scratch: Path, demo: Path) -> Path:
    """The folder in which a page's commands run, with `demo/`."""
    place = scratch / "place"
    shutil.copytree(demo, place / "demo")
    return place


def in_shell(command: str, scratch: Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{scratch / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-eo", "pipefail", "-c", command], cwd=cwd, env=env, capture_output=True, text=True)


def same(printed: str, pasted: str) -> bool:
    """Line by line, `...` being any lines; numbers may differ by 2 %, as between versions of zlib and LAPACK."""
    rest = printed.splitlines()
    for line, following in zip(pasted.splitlines(), [*pasted.splitlines()[1:], None], strict=True):
        if line == "...":
            while following is not None and rest and not alike(rest[0], following):
                del rest[0]
            rest = rest if following is not None else []
        elif not rest or not alike(rest.pop(0), line):
            return False
    return not rest


def alike(one: str, two: str) -> bool:
    number = r"(\d[\d,]*\.?\d*(?:e[+-]\d+)?)"
    a, b = (re.split(number, " ".join(line.split())) for line in (one, two))
    if a[::2] != b[::2]:
        return False
    pairs = [(float(x.replace(",", "")), float(y.replace(",", ""))) for x, y in zip(a[1::2], b[1::2], strict=True)]
    return all(x == y or abs(x - y) <= 0.02 * max(x, y) for x, y in pairs)


def outcome(kind: str, command: str, scratch: Path, place: Path, names: dict[str, Any]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; what needs no shell runs in this process, which has torch already.

    names: those that the page's blocks of Python have in common.
    """
    if kind == "python":
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(command, names)
        return 0, stdout.getvalue(), ""
    if command.startswith("loratool ") and not re.search(r" \|\|? ", command):
        result = run_command(*shlex.split(command)[1:])
        return result.exit_code, result.stdout, result.stderr
    done = in_shell(command, scratch, place)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", few(DOCS, *FIRST_READ))
def test_every_command_of_a_page(name: str, scratch: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its top, in a folder that has the demo's files, unless the page makes them itself."""
    monkeypatch.chdir(place)
    if any(command.split() == ["loratool", "demo", "demo"] for _, command, _ in commands(name)):
        shutil.rmtree("demo")
    if name == "in-place":
        interrupted(place / "demo" / "base", place / "demo" / "adapter", place / "model-2")
    names: dict[str, Any] = {}
    for kind, command, pasted in commands(name):
        code, stdout, stderr = outcome(kind, in_scratch(command, scratch), scratch, place, names)
        assert code == 0 and stdout, f"{command}: {stderr}"
        text = stdout.replace(f"{scratch}/", SCRATCH)
        assert pasted is None or same(text, pasted), f"{command}\n{text}\nis not\n{pasted}"


def test_what_is_the_same() -> None:
    """The comparison itself: it must not pass all."""
    printed = "a  1.00\nb 2\nc 3\nd 4\n"
    assert same(printed, printed) and same(printed, "a 1.01\n...\nd 4\n") and same(printed, "a 1\n...\n")
    for pasted in ("a 1.00\n", "a 1.1\n...\n", "b 2\n...\n", "...\ne 5\n", "a 1\n...\nc 3\n", printed + "e 5\n"):
        assert not same(printed, pasted)


def test_the_two_commands_that_set_up_are_what_ci_runs() -> None:
    set_up = blocks("README", "sh")[:2]
    assert "loratool merge fixtures/llama/base" in set_up[0] and "pytest" in set_up[1]
    assert all(len(block.splitlines()) == 1 for block in set_up)
    script = (ROOT / ".ci" / "run").read_text()
    assert "block 1" in script and "block 2" in script and os.access(ROOT / ".ci" / "run", os.X_OK)
    if shutil.which("awk"):
        found = subprocess.run(
            ["bash", "-c", script[script.index("block()") : script.index("\nrm")] + "\nblock 2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert found.stdout == set_up[1]


class TestPages:
    """What holds the pages together: links, paths, names, tables."""

    def test_every_verb_is_run_on_some_page(self) -> None:
        lines = [command for name in DOCS for kind, command, _ in commands(name) if kind != "python"]
        assert {line.split()[1] for line in lines if line.startswith("loratool ")} == set(COMMANDS) - {"guide"}

    def test_the_readme_is_short_and_has_every_verb_with_its_guide(self) -> None:
        links = {verb: f"[{name}](loratool/guides/{name}.md)" for verb, name in GUIDES.items()}
        rows = [f"| `{verb}` | {line} | {links.get(verb, '')} |\n" for verb, line in COMMANDS.items()]
        assert "".join(["| command | | guide |\n", "|---|---|---|\n", *rows]) in TEXTS["README"]
        assert len(TEXTS["README"].splitlines()) <= 160
        assert "(loratool/guides/index.md)" in TEXTS["README"], "it leads to every page"

    @pytest.mark.parametrize(
        "path",
        [*DOCS.values(), CONTRIBUTING],
        ids=lambda path: path.stem,
    )
    def test_links_and_paths_lead_to_files(self, path: Path) -> None:
        """Of this repository; `tests/...` and `fixtures/...` in code, and links from where the page is."""
        text = path.read_text()
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        assert [link for link in links if not (path.parent / link).exists()] == []
        prose = BLOCK.sub("", text)
        named = {word for code in re.findall(r"`([^`]+)`", prose) for word in code.split()}
        paths = {word for word in named if re.match(r"(tests|fixtures|loratool|\.ci)/[\w./-]*$", word)}
        assert [each for each in sorted(paths) if not (ROOT / each).exists()] == []

    @pytest.mark.parametrize("name", TOPICS)
    def test_a_guide_opens_with_a_title_and_a_sentence(self, name: str) -> None:
        title, sentence = TEXTS[name].split("\n\n")[:2]
        assert title.startswith("# ") and "\n" not in title and re.search(r"\.(\s|$)", sentence)


class TestGuide:
    def test_without_a_topic_it_lists_them(self, run: Run) -> None:
        text = run("guide").stdout
        assert [line for line in text.splitlines() if not line.startswith("  ")] == list(PAGES)
        lines = [line for line in text.splitlines() if line.startswith("  ")]
        assert [line.split()[0] for line in lines] == [name for names in PAGES.values() for name in names]
        assert sorted(line.split()[0] for line in lines) == TOPICS
        assert all(line.endswith(".") and len(line) <= 112 for line in lines)

    @pytest.mark.parametrize("name", PAGES["How-to"])
    def test_a_how_to_page_is_short_and_begins_with_a_command(self, name: str) -> None:
        title, sentence, first = TEXTS[name].split("\n\n")[:3]
        assert title.startswith("# ") and sentence.endswith(".") and first.startswith("```")
        assert len(without_pictures(name).splitlines()) <= 80

    @pytest.mark.parametrize("name", TOPICS)
    def test_a_pipe_gets_the_text(self, name: str, run: Run) -> None:
        assert run("guide", name).stdout == TEXTS[name]

    def test_where_they_are(self, run: Run) -> None:
        assert run("guide", "--path").stdout == f"{FOLDER}\n"
        assert run("guide", "extract", "--path").stdout == f"{FOLDER / 'extract.md'}\n"

    def test_another_topic_is_a_usage_error_that_names_the_nearest(self, run: Run) -> None:
        result = run("guide", "exract")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == "error: no guide 'exract'\nhint: loratool guide extract\n"
        assert run("guide", "zzz").stderr.endswith("hint: loratool guide\n")

    @pytest.mark.parametrize("verb", sorted(set(COMMANDS) - {"guide"}))
    def test_the_help_of_a_verb_names_a_guide_that_has_it(self, verb: str, run: Run) -> None:
        assert run(verb, "-h").stdout.rstrip().endswith(f"loratool guide {GUIDES[verb]}")
        assert f"loratool {verb} " in TEXTS[GUIDES[verb]]

    def test_the_package_ships_them(self) -> None:
        assert re.search(r'^"loratool\.guides" = \["\*\.md"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    @pytest.mark.slow
    def test_a_wheel_has_what_is_no_module(self, tmp_path: Path) -> None:
        """The guides, and what a page is made of, which the installed package makes of it."""
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tmp_path)
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.c", "*.h", "*.LICENSE")
        shutil.copytree(ROOT / "loratool", tmp_path / "loratool", ignore=ignored)
        others = {path for path in (tmp_path / "loratool").rglob("*") if path.is_file() and path.suffix != ".py"}
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheels", "."], cwd=tmp_path, check=True
        )
        (wheel,) = (tmp_path / "wheels").iterdir()
        shutil.unpack_archive(wheel, installed := tmp_path / "installed", "zip")
        assert {path for path in others if not (installed / path.relative_to(tmp_path)).is_file()} == set()
        call = [sys.executable, "-m", "loratool", "inspect", str(ROOT / "fixtures/llama/base"), "--html", "x.html"]
        done = subprocess.run(
            call, cwd=installed, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True
        )
        assert done.returncode == 0 and (installed / "x.html").stat().st_size > 300_000, done.stderr


# how an entry of `troubleshooting` begins -> a command that meets it, in the folder of `troubled`
ERRORS = {
    "no command ...": "merg demo/base demo/adapter",
    "... is none of ...": "merge demo/base demo/adapter -o x --dtype int8",
    "names no module of": "merge demo/base demo/adapter -o x --target q_prj",
    "names no layer of": "merge demo/base demo/adapter -o x --layers 7",
    "no module of any adapter is selected": "merge demo/base demo/adapter -o x --exclude *",
    "... exclude each other": "resize demo/adapter --rank 4 --energy 0.9 -o x",
    "there is no device": "extract demo/base demo/tuned -o x --device cuda:99",
    "no such file or folder": "merge demo/base demo/adaptr -o x",
    "exists already": "merge demo/base demo/adapter -o merged",
    "holds ...; --force replaces a model's files": "merge demo/base demo/adapter -o notes --force",
    "the output would overwrite an input": "merge demo/base demo/adapter -o demo/base --force",
    "there is no such folder to write into": "merge demo/base demo/adapter -o no/such/x",
    ".txt is not a suffix of a safetensors file": "merge demo/base demo/adapter -o x.txt",
    "is a Git-LFS pointer": "merge demo/base pointer -o x",
    "is an HTML page": "inspect page.safetensors",
    "is a text, not weights": "inspect demo/README.md",
    "is cut off: the header describes": "inspect cut",
    "claims a header of ... bytes in a file of": "inspect shorter",
    "is damaged, cut off or not a file of torch.save": "inspect cut.bin",
    "is not valid JSON": "merge demo/base unreadable -o x",
    "names ..., which is missing": "merge unfinished demo/adapter -o x",
    "is stale: it puts": "merge stale demo/adapter -o x",
    "holds several checkpoints": "merge without-index demo/adapter -o x",
    "holds several adapters": "inspect demo",
    "is an empty folder": "inspect empty",
    "holds no weights": "merge demo/base config-alone -o x",
    "is only a config": "inspect demo/base/config.json",
    "holds nan or inf": "merge demo/base nan -o x",
    "has no adapter_config.json beside it": "merge demo/base without-config -o x",
    "the adapter does not say its alpha": "merge demo/base without-alpha -o x",
    "--alpha ... contradicts the config's": "merge demo/base demo/adapter -o x --alpha 8",
    "the config says rank ..., but A is": "merge demo/base of-another -o x",
    "was initialized on ..., from which its factors": "merge demo/base pissa -o x",
    "is a ... adapter, which adds keys and values": "merge demo/base prefix -o x",
    "is an adapter, but the first argument": "merge demo/adapter demo/base -o x",
    "is a model, not an adapter": "merge demo/base demo/tuned -o x",
    "... of ... modules are not in the base": "merge demo/base demo/gpt2/adapter -o x",
    "A is ... and B is ... in ..., but the base weight is": "merge demo/base misplaced -o x",
    "is an adapter for SDXL": "merge demo/base demo/sdxl/adapter.safetensors -o x",
    "is BF16 in the base, and a merge into another": "merge demo/base demo/style -o x --dtype fp32",
    "... weights become infinite in F16": "merge demo/sdxl/base.safetensors demo/sdxl/adapter.safetensors:1e9 -o x",
    "has no undo file": "unmerge demo/base demo/adapter -o x",
    "was merged with weight ..., not": "unmerge merged demo/adapter:0.5 -o x",
    "is not an adapter of the merge": "unmerge merged demo/style -o x",
    "the merge also used": "unmerge two demo/adapter -o x",
    "was not part of the merge": "unmerge merged demo/adapter demo/style -o x",
    "is not what the merge wrote": "unmerge edited demo/adapter -o x",
    "is cut off or damaged": "unmerge cut-undo demo/adapter -o x",
    "has no quantized weights": ("merge demo/base demo/adapter -o x --like demo/tuned --no-undo"),
    "a merge with --like cannot be undone": "merge demo/base demo/adapter -o x --like demo/fp8",
    "--to of a checkpoint is": "convert demo/base --to gguf -o x.gguf",
    "is an adapter, and needs --to": "convert demo/adapter -o x",
    "is not an adapter of a known image model": "convert demo/adapter --to kohya -o x.safetensors",
    "... modules of ... cannot be carried to": "convert demo/sdxl/adapter.safetensors --to peft -o x",
    "... modules of ... are more than ... files can hold": "convert full --to gguf --base demo/base -o x.gguf",
    "is DoRA, whose change": "convert dora --to peft --plain -o x",
    "has transformers' names": "convert demo/adapter --to gguf -o x.gguf",
    "kohya adapters are single files": "convert demo/sdxl/adapter.safetensors --to kohya -o x",
    "vLLM ... serves ... without adapters": "convert demo/adapter --for vllm --base demo/gpt2/base -o x",
    "resize needs --rank, --energy, --params or --size": "resize demo/adapter -o x",
    "the two models are equal": "extract demo/base demo/base -o x",
    "the delta is ... times the base": "extract demo/base far --rank 2 -o x",
    "no tensor of one side has a name of the other": "extract demo/base demo/gpt2/tuned -o x",
    "has no module in common with": "combine demo/adapter demo/gpt2/adapter -o x",
    "is dora in ..., lora in": "combine dora demo/adapter -o x",
    "pissa subtracts its factors from the base": "init demo/base --method pissa -o x",
    "is ... x ..., so rank ... is too high": "init demo/base --rank 1000 -o x",
    "names no weight of the base that could have an adapter": "init demo/base --target foo -o x",
    "no such file or folder, nor in the Hugging Face cache": "inspect org/none",
}

MAKE_TROUBLE = r"""
mkdir notes empty config-alone pointer
echo mine > notes/notes
cp demo/adapter/adapter_config.json config-alone
printf 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n' > pointer/adapter_model.safetensors
cp demo/adapter/adapter_config.json pointer
printf '<!DOCTYPE html><html>' > page.safetensors
printf 'PK\003\004 and no more than this' > cut.bin
for name in cut shorter unreadable nan without-config without-alpha of-another prefix; do
  cp -r demo/adapter $name
done
head -c 100000 demo/adapter/adapter_model.safetensors > cut/adapter_model.safetensors
head -c 3000 demo/adapter/adapter_model.safetensors > shorter/adapter_model.safetensors
echo '{' > unreadable/adapter_config.json
head -c -4 demo/adapter/adapter_model.safetensors > nan/adapter_model.safetensors
printf '\000\000\300\177' >> nan/adapter_model.safetensors
rm without-config/adapter_config.json
sed -i.old 's/, *"lora_alpha": 16//; s/"r": 8,/"r": 8/; /"lora_alpha"/d' without-alpha/adapter_config.json
sed -i.old 's/"r": 8/"r": 16/' of-another/adapter_config.json
sed -i.old 's/"LORA"/"PREFIX_TUNING"/' prefix/adapter_config.json
for name in unfinished stale without-index; do cp -r demo/base $name; done
rm unfinished/model-00002-of-00002.safetensors without-index/model.safetensors.index.json
sed -i.old 's/"model.norm.weight": "model-00002/"model.norm.weight": "model-00001/' stale/model.safetensors.index.json
for name in edited cut-undo; do cp -r merged $name; done
head -c -1 merged/model-00001-of-00002.safetensors > edited/model-00001-of-00002.safetensors
printf '\001' >> edited/model-00001-of-00002.safetensors
head -c 5000 merged/loratool.undo > cut-undo/loratool.undo
"""


@pytest.fixture(scope="module")
def troubled(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `demo/`, and beside it all that a user's folder can have wrong."""
    folder = tmp_path_factory.mktemp("troubled")
    shutil.copytree(demo, folder / "demo")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        loratool.merge("demo/base", "demo/adapter", "merged")
        loratool.merge("demo/base", ["demo/adapter", "demo/style"], "two")
        loratool.merge("demo/base", {"demo/adapter": 1e6}, "far", undo=False)
        loratool.init("demo/base", "dora", dora=True)
        loratool.init("demo/base", "pissa", method="pissa", residual="residual")
        loratool.extract("demo/base", "demo/tuned", "full", rank=4)
        loratool.convert("demo/style", "misplaced", to="peft", rename=["re:self_attn.q_proj=mlp.up_proj"])
    done = subprocess.run(["bash", "-euc", MAKE_TROUBLE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class TestTroubleshooting:
    """The page quotes how errors begin. Who rewords a message finds the quote here, and changes it on the page."""

    QUOTES = re.findall(r"^- `([^`]+)`: ", TEXTS["troubleshooting"], re.MULTILINE)

    def test_it_has_the_errors_that_most_users_meet(self) -> None:
        assert len(self.QUOTES) == len({*self.QUOTES}) >= 60
        assert len(self.QUOTES) == len(re.findall("^- `", TEXTS["troubleshooting"], re.MULTILINE))

    @pytest.mark.parametrize("quote", QUOTES)
    def test_a_message_of_the_code_begins_so(self, quote: str) -> None:
        if quote not in ERRORS:
            assert is_said(quote), f"loratool/guides/troubleshooting.md: no message begins with {quote!r}"

    @pytest.mark.parametrize("quote", ERRORS)
    def test_a_command_ends_with_it(self, quote: str, troubled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert quote in self.QUOTES
        monkeypatch.chdir(troubled)
        before = sorted(troubled.iterdir())
        result = run_command(*ERRORS[quote].split())
        opening = ".+?".join(map(re.escape, quote.split("...")))
        first = result.stderr.partition("\n")[0]
        assert re.match(f"error: (.*: )?{opening}", first), f"loratool {ERRORS[quote]}: {quote!r} is not in {first!r}"
        assert result.exit_code in range(2, 6) and sorted(troubled.iterdir()) == before

    def test_what_begins_so(self) -> None:
        """The comparison itself: it must not pass all."""
        text = ("is cut off: it has ", " bytes, and should have ", "")
        for quote in ("is cut off: it has", "is cut off: it has ... bytes", "is cut off: it has ... bytes, and should"):
            assert says(text, quote)
        for quote in ("is cut off: it", "is cut off: it has 5 bytes"):
            assert says(text, quote)
        for quote in ("is cut off", "is cut: it has ... bytes", "is cut off: it has ... pages", "cut off: it has ..."):
            assert not says(text, quote)
        assert says(("", " exclude each other"), "... exclude each other")
        assert not says(("", ""), "... exclude each other") and not says(("exists",), "exists already, and so on")
        assert not any(map(is_said, ("exists no more in this place", "is a Git-LFS painter", "the two models differ")))


class TestAnswers:
    """The pages that lead to others: `index`, `glossary`, `switching` and `troubleshooting`."""

    PAGES = ("index", "glossary", "switching", "troubleshooting")

    @pytest.mark.parametrize("name", PAGES)
    def test_their_commands_have_only_options_that_there_are(self, name: str) -> None:
        codes = re.findall(r"`loratool ([a-z]+ [^`|]*)`", BLOCK.sub("", TEXTS[name]))
        assert codes or name == "glossary"
        for verb, *arguments in map(shlex.split, codes):
            command = cli.get_command(click.Context(cli), verb)
            assert command, verb
            command.make_context(verb, list(arguments))

    def test_the_index_leads_to_every_page(self) -> None:
        rows = [line for line in TEXTS["index"].splitlines() if re.match(r"\| [a-z]", line)]
        assert len(rows) >= 40 and all(re.search(r"\]\([\w-]+\.md\) \|$", row) for row in rows)
        assert set(re.findall(r"\]\(([\w-]+)\.md\)", TEXTS["index"])) == {*TOPICS} - {"index"}

    def test_the_glossary_is_in_order_and_names_the_page_of_each_word(self) -> None:
        for section in TEXTS["glossary"].split("\n## ")[1:]:
            entries = re.findall(r"^- \*\*(.+?)\*\*: (.*?)(?=^- |\Z)", section, re.MULTILINE | re.DOTALL)
            assert [word for word, _ in entries] == sorted((word for word, _ in entries), key=str.lower)
            for word, text in entries:
                (page,) = re.findall(r"\]\(([\w-]+)\.md\)", text)
                names = re.split(r", ", word.lower().partition(" of ")[0])
                assert any(name.rstrip("s") in " ".join(TEXTS[page].lower().split()) for name in names), word

    def test_what_is_said_of_peft(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its merge has another rounding, and its weights another meaning; by peft as it is installed."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        monkeypatch.chdir(place)

        def wrapped() -> Any:
            base = AutoModelForCausalLM.from_pretrained("demo/base", dtype=torch.bfloat16)
            return PeftModel.from_pretrained(base, "demo/adapter", "a")

        exact = []
        for model, options in ((wrapped(), {}), (wrapped(), {"safe_merge": True}), (wrapped().to(torch.bfloat16), {})):
            model.merge_and_unload(**options).save_pretrained("theirs")
            rows = loratool.verify("demo/base", "demo/adapter", "theirs").tensors
            assert {row.verdict for row in rows} <= {"exact", "rounding"} and len(rows) == 21
            exact.append(sum(row.verdict == "exact" for row in rows))
        assert exact == [20, 0, 0]
        model, strengths = wrapped(), {}
        model.load_adapter("demo/adapter", "b")
        for kind in ("cat", "linear"):
            model.add_weighted_adapter(["a", "b"], [0.7, 0.3], kind, combination_type=kind)
            model.save_pretrained("sums", selected_adapters=[kind])
            report = loratool.diff(f"sums/{kind}", "demo/adapter")
            strengths[kind] = report.norm_a / report.norm_b
            assert kind == "linear" or 0.001 < report.relative < 0.003
        assert strengths == pytest.approx({"cat": 1, "linear": 1.9165}, rel=1e-3)


class TestInCI:
    def steps(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        (job,) = yaml.safe_load(blocks("github-actions", "yaml")[0])["jobs"].values()
        return job, job["steps"]

    def test_the_job_sets_up_without_a_gpu_and_with_a_cache(self) -> None:
        job, steps = self.steps()
        assert job["runs-on"].startswith("ubuntu") and steps[0]["uses"].startswith("actions/checkout@")
        assert steps[1]["uses"].startswith("actions/setup-python@") and steps[1]["with"]["cache"] == "pip"
        assert "torch --index-url https://download.pytorch.org/whl/cpu" in steps[2]["run"]
        assert (ROOT / steps[1]["with"]["cache-dependency-path"]).is_file()

    def test_the_job_runs_and_its_checks_say_no(self, scratch: Path, place: Path) -> None:
        job, steps = self.steps()
        shutil.rmtree(place / "demo")
        runs = {step["name"]: step["run"] for step in steps if "run" in step and step["name"] != "Install"}
        assert len(runs) == 6
        for name, run in runs.items():
            done = in_shell(run, scratch, place, **job["env"])
            assert done.returncode == 0, f"{name}: {done.stdout} {done.stderr}"
        pages = {path.name for path in place.glob(steps[-1]["with"]["path"])}
        assert steps[-1]["uses"].startswith("actions/upload-artifact@") and steps[-1]["if"] == "always()"
        assert pages == {"merge.html", "verify.html", "diff.html"}
        shard = place / "merged" / "model-00002-of-00002.safetensors"
        with open(shard, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 64]))
        for name in ("The files have the expected hashes", "The result is the base plus the adapter"):
            assert in_shell(runs[name], scratch, place, **job["env"]).returncode == 1

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_its_completions(self, shell: str, scratch: Path) -> None:
        """As it stands in the list, in each shell that is here."""
        line = re.search(rf"^- {shell}, in .*: `([^`]*)`$", TEXTS["ci"], re.MULTILINE)
        assert line and f"_LORATOOL_COMPLETE={shell}_source loratool" in line[1]
        if not shutil.which(shell):
            pytest.skip(f"{shell} is not here")
        setup = {"bash": "", "zsh": "autoload -Uz compinit; compinit -u -D; ", "fish": ""}[shell]
        asked = {"bash": "complete -p loratool", "zsh": "echo $_comps[loratool]", "fish": "complete -C 'loratool unm'"}
        script = setup + line[1] + "; " + asked[shell]
        path = f"{scratch / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run([shell, "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert (
            done.returncode == 0
            and {"bash": "-F _loratool", "zsh": "_loratool", "fish": "unmerge"}[shell] in done.stdout
        )


class TestTables:
    @pytest.mark.parametrize("name", guide_tables.TABLES)
    def test_they_are_what_the_code_says(self, name: str) -> None:
        assert guide_tables.written(name) == TEXTS[name], "python tests/lib/guide_tables.py --write"

    def test_every_mark_is_of_a_table(self) -> None:
        marks = {(name, mark) for name in TOPICS for mark in re.findall(r"guide_tables\.py: (.*) -->", TEXTS[name])}
        assert marks == {(name, mark) for name, tables in guide_tables.TABLES.items() for mark in tables}

    @pytest.mark.parametrize("name", PAGES["Reference"])
    def test_they_fit_a_page_and_a_terminal(self, name: str) -> None:
        """A column that is too narrow for a word of it ends in an ellipsis in a terminal."""
        rows = [line for line in BLOCK.sub("", TEXTS[name]).splitlines() if line.startswith("|")]
        assert [row for row in rows if len(row) > markdown.WIDEST] == []
        terminal = Console(width=80, file=io.StringIO())
        terminal.print(Markdown("\n\n".join(re.findall(r"(?:^\|.*\n)+", TEXTS[name], re.MULTILINE))))
        assert "…" not in terminal.file.getvalue()  # type: ignore[attr-defined]


class TestReference:
    def test_every_exit_code_has_a_section(self) -> None:
        titles = re.findall(r"^## ([\d, and]+): ", TEXTS["exit-codes"], re.MULTILINE)
        codes = [int(code) for title in titles for code in re.findall(r"\d+", title)]
        assert codes == [0, 1, *sorted(code for kind in schemas.ERRORS.values() for code in kind)]

    def test_the_variables_in_examples_are_options(self) -> None:
        text = TEXTS["environment"] + TEXTS["ci"] + TEXTS["json"]
        names = set(re.findall(r"\bLORATOOL_([A-Z]+)_([A-Z_]+)", text)) - {("COMMAND", "OPTION")}
        assert names
        for verb, option in names:
            command = cli.get_command(click.Context(cli), verb.lower())
            assert command and option.lower() in {each.name for each in command.params}

    def test_the_environment_is_what_the_package_reads(self) -> None:
        listed = re.findall(r"^- ((?:`[A-Z_]+`(?:, )?)+):", TEXTS["environment"], re.MULTILINE)
        told = {name for names in listed for name in re.findall(r"`(\w+)`", names)}
        assert {name for name in told if not name.endswith("_")} == variables_read()


def variables_read() -> set[str]:
    """Return the names of environment variables in the functions of the package that use the environment."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "loratool").rglob("*.py")]
    constants = {
        target.id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    reading = [node for node in functions if re.search(r"\bos\.(environ|getenv)\b", ast.unparse(node))]
    words = [
        node.value if isinstance(node, ast.Constant) else constants.get(node.id)
        for function in reading
        for node in ast.walk(function)
        if isinstance(node, ast.Constant | ast.Name)
    ]
    found = {word for word in words if isinstance(word, str) and re.fullmatch(r"_?[A-Z][A-Z_]*[A-Z]", word)}
    return found - {"LORATOOL", "JSON", "OUTPUT_FORMAT", "ON", "YES", "TRUE"}  # a beginning, ends, and values


def parsed_by_torchrun(call: list[str]) -> tuple[Any, list[str]]:
    """Return torchrun's options of its command line, and loratool's arguments, which click has parsed."""
    from torch.distributed.run import get_args_parser

    assert call[0] == "torchrun"
    options = get_args_parser().parse_args(call[1:])
    assert options.module and options.training_script == "loratool"
    verb, *arguments = options.training_script_args
    command = cli.get_command(click.Context(cli), verb)
    assert command
    command.make_context(verb, list(arguments))
    return options, options.training_script_args


class TestManyMachines:
    """The calls of the pages many-machines, slurm and kubernetes, as far as one machine can try them."""

    def calls(self) -> list[list[str]]:
        scripts = [blocks(name, "bash")[0].replace("\\\n", " ") for name in ("many-machines", "slurm")]
        calls = [re.search("torchrun .*", script) for script in scripts]
        pod = list(yaml.safe_load_all(blocks("kubernetes", "yaml")[0]))[-1]["spec"]["template"]["spec"]["containers"][0]
        return [*(shlex.split(call[0]) for call in calls if call), [*pod["command"], *pod["args"]]]

    def test_every_call_is_one_that_restarts_and_goes_on(self) -> None:
        calls = self.calls()
        assert len(calls) == 3
        for call in calls:
            options, merge = parsed_by_torchrun([word.replace("$SLURM_JOB_NUM_NODES", "8") for word in call])
            assert options.rdzv_backend == "c10d"
            assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("8", "4", 3)
            assert options.rdzv_endpoint.endswith(":29500")
            assert merge == ["merge", "/shared/base", "/shared/adapter", "-o", "/shared/merged", "--resume"]

    def test_the_call_on_one_machine(self) -> None:
        alone = blocks("many-machines", "bash")[1]
        assert "--standalone" in alone and parsed_by_torchrun(shlex.split(alone))[1][0] == "merge"

    def test_the_options_in_its_table_are_torchruns(self) -> None:
        from torch.distributed.run import get_args_parser

        text = TEXTS["many-machines"]
        named = set(re.findall(r"--(?:nnodes|nproc-per-node|max-restarts|master-addr|rdzv-\w+)", text))
        assert named == {*(f"--rdzv-{name}" for name in ("backend", "endpoint", "id")), "--nnodes"} | {
            "--nproc-per-node",
            "--max-restarts",
            "--master-addr",
        }
        assert named <= set(get_args_parser()._option_string_actions)

    def test_its_job_finds_its_pods_and_its_files(self) -> None:
        claim, service, job = yaml.safe_load_all(blocks("kubernetes", "yaml")[0])
        pod = job["spec"]["template"]["spec"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert pod["volumes"][0]["name"] == pod["containers"][0]["volumeMounts"][0]["name"]
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/shared"
        assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
        assert job["spec"]["completions"] == job["spec"]["parallelism"] == 8
        name = job["metadata"]["name"]
        assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
        assert pod["subdomain"] == service["metadata"]["name"]
        assert f"{name}-0.{pod['subdomain']}:29500" in pod["containers"][0]["args"]

    @pytest.mark.parametrize("name", ["many-machines", "slurm"])
    def test_bash_reads_its_script(self, name: str) -> None:
        script = blocks(name, "bash")[0]
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0

    @pytest.mark.slow
    def test_its_job_of_slurm_runs_with_stand_ins(self, scratch: Path, tmp_path: Path) -> None:
        """On two nodes that are this machine, with `srun` and `scontrol` that do what Slurm's would here."""
        from lib.harness.torchrun import free_port

        stand_ins = {
            "scontrol": 'echo localhost; echo "$3" >&2\n',
            "srun": 'shift; for node in 0 1; do "$@" & done; wait %1 && wait %2\n',
            "torchrun": f"exec '{sys.executable}' -m torch.distributed.run \"$@\"\n",
        }
        for name, text in stand_ins.items():
            (scratch / "bin" / name).write_text("#!/bin/bash\n" + text)
            (scratch / "bin" / name).chmod(0o755)
        script = blocks("slurm", "bash")[0].replace("--nproc-per-node 4", "--nproc-per-node 1")
        script = script.replace("/shared/base", str(ROOT / "fixtures/llama/base"))
        script = script.replace("/shared/adapter", str(ROOT / "fixtures/llama/adapter"))
        script = script.replace("/shared", str(tmp_path)).replace("29500", str(free_port()))
        slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7"}
        done = in_shell(script, scratch, tmp_path, **slurm, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        alone = run_command("merge", "fixtures/llama/base", "fixtures/llama/adapter", "-o", str(tmp_path / "alone"))
        assert alone.exit_code == 0, alone.stderr
        names = sorted(path.name for path in (tmp_path / "alone").iterdir())
        assert names == sorted(path.name for path in (tmp_path / "merged").iterdir())
        for name in names:
            assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.slow
def test_the_page_on_qwen3(scratch: Path, tmp_path: Path) -> None:
    """Its calls of loratool run on small models under their names in a cache of the hub, and answer as PEFT does."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from lib.models import peft_models as models

    sizes = {**models.EXPERT_SIZES, "head_dim": 8, "vocab_size": 32, "intermediate_size": 24}
    dense = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, tie_word_embeddings=True))
    stacks = [models.GATE_UP, models.DOWN, models.ROUTER]
    cases = {  # output -> names of base and adapter, model, config of the adapter
        "merged": ("Qwen/Qwen3-0.6B", "org/adapter", dense, {"target_modules": ["q_proj", "lm_head"]}),
        "merged-moe": (
            "Qwen/Qwen3-30B-A3B",
            "org/moe-adapter",
            models.qwen3_moe(),
            {"target_modules": ["q_proj"], "target_parameters": stacks},
        ),
    }
    answers, bases = {}, {}
    for out, (base, adapter, model, config) in cases.items():
        folders = []
        for name in (base, adapter):
            place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
            folders.append(place / "snapshots" / ("0123abcd" * 5))
            folders[-1].mkdir(parents=True)
            (place / "refs").mkdir()
            (place / "refs" / "main").write_text(folders[-1].name)
        bases[out] = models.write_base(folders[0], model)
        wrapped = models.wrap(models.load(bases[out], type(model), **models.EAGER), **config)
        wrapped.save_pretrained(folders[1])
        answers[out] = models.answer(wrapped)
    lines = [line for text in blocks("qwen3", "bash") for line in text.splitlines() if line.startswith("loratool ")]
    assert len(lines) == 6
    for line in lines:
        done = in_shell(line, scratch, tmp_path, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
        assert done.returncode == 0, f"{line}: {done.stderr}"
    for out, (*_, model, _) in cases.items():
        merged = models.load(tmp_path / out, type(model), **models.EAGER)
        assert models.agree(models.answer(merged), answers[out]) and not merged.config.tie_word_embeddings
    for path in bases["merged"].iterdir():
        assert (tmp_path / "original" / path.name).read_bytes() == path.read_bytes()


def test_the_picture_of_a_page_is_shown_and_small() -> None:
    """tests/browser holds that it is what fixtures/pictures.py makes."""
    assert all("fixtures/pictures/page.png)" in TEXTS[name] for name in ("README", "merging"))
    assert (ROOT / "fixtures" / "pictures" / "page.png").stat().st_size <= 200_000


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("name", ["merge", slow("diff")])
def test_a_picture_shows_what_a_terminal_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from html import unescape

    monkeypatch.syspath_prepend(ROOT / "fixtures")
    import pictures

    assert f"fixtures/pictures/{name}.svg)" in "".join(TEXTS.values()) and set(pictures.PICTURES) == {"merge", "diff"}
    svg = (ROOT / "fixtures" / "pictures" / f"{name}.svg").read_text()
    texts = re.findall(r"<text [^>]*>(.*?)</text>", svg)[1:]  # the first is the window's title
    drawn = "".join("".join(map(unescape, texts)).split())
    assert alike(drawn, "".join(pictures.show(name).plain.split())) and len(svg) < 50_000
