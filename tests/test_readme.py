"""README.md: every command in it runs, and prints what is pasted there; the two that set up are run by .ci/run, and
here are only read."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from conftest import run_command

from loratool import schemas
from loratool.cli import VERBS, cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRATCH = Path("/tmp/loratool-readme")  # as the README writes it
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL, PYTHON, SCRIPT, YAML = (
    [text for kind, text in BLOCKS if kind == each] for each in ("sh", "python", "bash", "yaml")
)
MAIN = f"exec '{sys.executable}' -c 'from loratool.cli import main; main()' \"$@\"\n"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's folder, moved to where this run may write, so that runs do not meet; with its script, and a
    `loratool`."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "merge.sh").write_text(SCRIPT[0].replace(str(SCRATCH), str(folder)))
    (folder / "bin").mkdir()
    (folder / "bin" / "loratool").write_text("#!/bin/sh\n" + MAIN)
    (folder / "bin" / "loratool").chmod(0o755)
    return folder


def in_shell(command: str, scratch: Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{scratch / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **environment}
    return subprocess.run(["bash", "-eo", "pipefail", "-c", command], cwd=cwd, env=env, capture_output=True, text=True)


def commands() -> Iterator[tuple[str, str | None]]:
    """Those of both kinds of blocks, in order, and what is pasted below."""
    seen = 0
    for kind, text in BLOCKS:
        if kind == "console":
            for part in text.split("$ ")[1:]:
                command, _, pasted = part.partition("\n")
                yield command, pasted
        elif kind == "sh":
            seen += 1
            yield from ((line, None) for line in text.splitlines() if line and seen > 2)


COMMANDS = list(commands())


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


def test_every_command_in_order(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command, pasted in COMMANDS:
        line = command.replace(str(SCRATCH), str(scratch))
        if line.startswith("loratool "):
            result = run_command(*shlex.split(line)[1:])
            code, stdout, stderr = result.exit_code, result.stdout, result.stderr
        else:
            done = in_shell(line, scratch, ROOT)
            code, stdout, stderr = done.returncode, done.stdout, done.stderr
        assert code == 0 and stdout, f"{command}: {stderr}"
        text = stdout.replace(str(scratch), str(SCRATCH))
        assert pasted is None or same(text, pasted), f"{command}\n{text}\nis not\n{pasted}"


def test_what_is_the_same() -> None:
    """The comparison itself: it must not pass all."""
    printed = "a  1.00\nb 2\nc 3\nd 4\n"
    assert same(printed, printed) and same(printed, "a 1.01\n...\nd 4\n") and same(printed, "a 1\n...\n")
    for pasted in ("a 1.00\n", "a 1.1\n...\n", "b 2\n...\n", "...\ne 5\n", "a 1\n...\nc 3\n", printed + "e 5\n"):
        assert not same(printed, pasted)


def test_the_python_example(scratch: Path) -> None:
    (code,) = (text.replace(str(SCRATCH), str(scratch)) for text in PYTHON)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert re.fullmatch(r"\d+\.\d% of the change is left after rounding\n", result.stdout), result.stderr


def test_the_two_commands_that_set_up_are_what_ci_runs() -> None:
    assert "loratool merge fixtures/llama/base" in SHELL[0] and "pytest" in SHELL[1]
    assert all(len(block.splitlines()) == 1 for block in SHELL[:2])
    script = (ROOT / ".ci" / "run").read_text()
    assert "block 1" in script and "block 2" in script and os.access(ROOT / ".ci" / "run", os.X_OK)
    if shutil.which("awk"):
        found = subprocess.run(
            ["bash", "-c", script[script.index("block()") : script.index("\nrm")] + "\nblock 2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert found.stdout == SHELL[1]


def test_the_readme_names_every_verb_and_no_other() -> None:
    assert {command.split()[1] for command, _ in COMMANDS if command.startswith("loratool ")} == set(VERBS)


class TestInCI:
    def steps(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        (job,) = yaml.safe_load(YAML[0])["jobs"].values()
        return job, job["steps"]

    def test_the_job_sets_up_without_a_gpu_and_with_a_cache(self) -> None:
        job, steps = self.steps()
        assert job["runs-on"].startswith("ubuntu") and steps[0]["uses"].startswith("actions/checkout@")
        assert steps[1]["uses"].startswith("actions/setup-python@") and steps[1]["with"]["cache"] == "pip"
        assert "torch --index-url https://download.pytorch.org/whl/cpu" in steps[2]["run"]
        assert (ROOT / steps[1]["with"]["cache-dependency-path"]).is_file()

    def test_the_job_runs_and_its_checks_say_no(self, scratch: Path, tmp_path: Path) -> None:
        job, steps = self.steps()
        (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
        runs = {step["name"]: step["run"] for step in steps if "run" in step and step["name"] != "Install"}
        assert len(runs) == 5
        for name, run in runs.items():
            done = in_shell(run, scratch, tmp_path, **job["env"])
            assert done.returncode == 0, f"{name}: {done.stdout} {done.stderr}"
        shard = tmp_path / "merged" / "model-00002-of-00002.safetensors"
        with open(shard, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 64]))
        for name in ("The bytes are those that were released", "It is the base with the adapter, and no other"):
            assert in_shell(runs[name], scratch, tmp_path, **job["env"]).returncode == 1

    def test_its_variables_are_options(self) -> None:
        names = set(re.findall(r"LORATOOL_([A-Z]+)_([A-Z_]+)", README)) - {("VERB", "OPTION"), ("COMPLETE", "")}
        assert names
        for verb, option in names:
            command = cli.get_command(click.Context(cli), verb.lower())
            assert command and option.lower() in {each.name for each in command.params}

    def test_its_exit_codes_are_the_schemas(self) -> None:
        table = README[README.index("| exit code |") :].split("\n\n")[0]
        codes = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(",")}
        assert codes == {0, 1, *(code for kind in schemas.ERRORS.values() for code in kind)}

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_its_completions(self, shell: str, scratch: Path) -> None:
        """As it stands in the table, in each shell that is here."""
        line = re.search(rf"^\| {shell} \| .* \| `(.*)` \|$", README, re.MULTILINE)
        assert line and f"_LORATOOL_COMPLETE={shell}_source loratool" in line[1]
        if not shutil.which(shell):
            pytest.skip(f"{shell} is not here")
        setup = {"bash": "", "zsh": "autoload -Uz compinit; compinit -u -D; ", "fish": ""}[shell]
        asked = {"bash": "complete -p loratool", "zsh": "echo $_comps[loratool]", "fish": "complete -C 'loratool unm'"}
        script = setup + line[1].replace("\\|", "|") + "; " + asked[shell]
        path = f"{scratch / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run([shell, "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert (
            done.returncode == 0
            and {"bash": "-F _loratool", "zsh": "_loratool", "fish": "unmerge"}[shell] in done.stdout
        )


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("name", ["merge", "diff"])
def test_a_picture_shows_what_a_terminal_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from html import unescape

    monkeypatch.syspath_prepend(ROOT / "fixtures")
    import pictures

    assert f"](fixtures/pictures/{name}.svg)" in README and set(pictures.PICTURES) == {"merge", "diff"}
    svg = (ROOT / "fixtures" / "pictures" / f"{name}.svg").read_text()
    texts = re.findall(r"<text [^>]*>(.*?)</text>", svg)[1:]  # the first is the window's title
    drawn = "".join("".join(map(unescape, texts)).split())
    assert alike(drawn, "".join(pictures.show(name).plain.split())) and len(svg) < 50_000
