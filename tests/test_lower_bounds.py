"""Run merge, inspect and extract with every dependency at its declared lower bound: they write the pinned bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import FIXTURES, ROOT, bits, load_model, run_command
from test_same_everywhere import differing, digest_elsewhere, write_fixture

BIN = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the interpreter of an environment with the oldest wheels that pyproject.toml and this Python allow.

    uv finds them: pip always takes the newest. torch brings some GB of CUDA's libraries, and needs them to be imported.
    """
    folder = tmp_path_factory.mktemp("oldest")
    venv.create(folder / "uv", with_pip=True)
    venv.create(folder / "env")
    tool, python = (folder / name / BIN / "python" for name in ("uv", "env"))
    subprocess.run([tool, "-m", "pip", "install", "--quiet", "uv"], check=True)
    install = ["pip", "install", "--quiet", "--no-build", "--no-cache", "--resolution", "lowest-direct"]
    declared = ["--extra", "html", "-r", ROOT / "pyproject.toml"]
    subprocess.run([tool, "-m", "uv", *install, "--python", python, *declared], check=True)
    yield python
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_oldest_that_is_declared_writes_the_pinned_bytes(name: str, oldest: Path, tmp_path: Path) -> None:
    def run(*argv: str | Path) -> str:
        """Run the command line of this checkout in that environment."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [oldest, "-m", "loratool", *argv]
        paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        done = subprocess.run(command, env={**environment, **paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (facts := tmp_path / "loratool.dist-info").mkdir()  # the version that a page names is the one installed here
    (facts / "METADATA").write_text(f"Name: loratool\nVersion: {version('loratool')}\n")
    folder = FIXTURES / name
    assert "modules are in" in run("inspect", folder / "adapter", "--base", folder / "base")
    run("merge", folder / "base", folder / "adapter", "-o", tmp_path / "merged")
    tensors = load_model(tmp_path / "merged").items()
    found = {key: hashlib.sha256(bits(value.flatten()).numpy()).hexdigest() for key, value in tensors}
    assert found == json.loads((folder / "merged.sha256.json").read_text())
    run("unmerge", tmp_path / "merged", folder / "adapter", "-o", tmp_path / "back")
    for path in (folder / "base").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    run("extract", folder / "base", folder / "tuned", "--rank", "4", "-o", tmp_path / "extracted")
    assert "modules are in" in run("inspect", tmp_path / "extracted", "--base", folder / "base")
    look = ("inspect", folder / "base", "--html", page := tmp_path / "x.html")
    run(*look)
    oldest_page = page.read_bytes()
    assert run_command(*look).exit_code == 0 and page.read_bytes() == oldest_page


@pytest.mark.slow
def test_the_oldest_that_is_declared_merges_every_kind_to_the_same_bytes(oldest: Path, tmp_path: Path) -> None:
    write_fixture(tmp_path)
    assert differing(digest_elsewhere(tmp_path, {}, python=oldest)) == {}
