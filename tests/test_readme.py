"""README.md: every command in it runs; the two that set up are run by .ci/run, and here are only read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRATCH = Path("/tmp/loratool-readme")  # as the README writes it
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in SHELL[2:] for line in block.splitlines() if line]


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's folder, moved to where this run may write, so that runs do not meet."""
    return tmp_path_factory.mktemp("readme")


def here(text: str, scratch: Path) -> str:
    return text.replace(str(SCRATCH), str(scratch))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command(command: str, scratch: Path) -> None:
    loratool = f"loratool() {{ '{sys.executable}' -c 'from loratool.cli import main; main()' \"$@\"; }}; "
    result = subprocess.run(["bash", "-c", loratool + here(command, scratch)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout, result.stderr


def test_the_python_example(scratch: Path) -> None:
    (code,) = PYTHON
    result = subprocess.run([sys.executable, "-c", here(code, scratch)], cwd=ROOT, capture_output=True, text=True)
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
    from loratool.cli import VERBS

    assert {command.split()[1] for command in COMMANDS} == set(VERBS)
