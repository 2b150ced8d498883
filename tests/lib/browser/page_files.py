"""Make the page of each command that has one, of the models that fixtures/pictures.py draws."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import FIXTURES, run_command

sys.path.insert(0, str(FIXTURES))

import pictures

from lib.browser.hostile_files import HOSTILE_PAGES, write_hostile

BEFORE = [
    "extract base tuned -o extracted",
    "resize adapter --rank 2 -o small",
    "merge base adapter -o damaged",  # its last weights then are
]
# page -> the command that writes it, where `base`, `adapter` and `tuned` lie, and what BEFORE makes
PAGES = {
    "inspect": "inspect adapter --base base",
    "inspect-spectra": "inspect adapter --spectra",
    "inspect-model": "inspect base",
    "inspect-model-spectra": "inspect base --spectra",
    "inspect-parts": f"inspect {FIXTURES}/sdxl/adapter.safetensors",
    "inspect-for": "inspect adapter --for vllm",
    "merge": "merge base adapter -o merged",
    "extract": "extract base tuned -o again",
    "diff": "diff extracted adapter --base base",
    "diff-several": "diff extracted adapter small",
    "diff-models": "diff base tuned",
    "diff-spectra": "diff base tuned --spectra",
    "diff-headers": f"diff base {FIXTURES}/llama/fp8 --headers",
    "verify-wrong": "verify base adapter damaged",
    "resize": "resize adapter --rank 4 -o resized",
    "combine": "combine adapter small -o combined",
}


class Made:
    """Pages by their names, each made once, beside the models that they are of."""

    def __init__(self, folder: Path) -> None:
        self.deep, self.shallow, self.strange = (folder / name for name in ("deep", "shallow", "strange"))

    def page(self, name: str) -> Path:
        """Return the page of a row of PAGES, of models of 24 layers."""
        return self.of_models(self.deep, pictures.deepen, name)

    def small_page(self, name: str) -> Path:
        """Return the same of models of 3 layers."""
        return self.of_models(self.shallow, shutil.copytree, name)

    def hostile(self, name: str) -> Path:
        """Return the page of a row of HOSTILE_PAGES."""
        if not self.strange.exists():
            write_hostile(self.strange)
        return self.make(self.strange, name, HOSTILE_PAGES[name])

    def of_models(self, folder: Path, copy: Callable[[Path, Path], object], name: str) -> Path:
        if not folder.exists():
            folder.mkdir()
            for each in ("base", "adapter", "tuned"):
                copy(FIXTURES / "llama" / each, folder / each)
            for command in BEFORE:
                run_in(folder, command.split())
            for file in (folder / "damaged").glob("*.safetensors"):
                with open(file, "r+b") as damaged:
                    damaged.seek(-1, os.SEEK_END)
                    damaged.write(b"\x40")
        return self.make(folder, name, PAGES[name].split())

    @staticmethod
    def make(folder: Path, name: str, arguments: list[str]) -> Path:
        path = folder / f"{name}.html"
        if not path.exists():
            run_in(folder, [*arguments, "--html", path.name])
        return path


def run_in(folder: Path, arguments: list[str]) -> None:
    """Run a command line in a folder, as paths are short on a page then; a check may say no."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = run_command(*arguments)
    finally:
        os.chdir(before)
    assert done.exit_code in (0, 1), done.stderr
