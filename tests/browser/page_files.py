"""Make the page of each command that has one, of the models that fixtures/pictures.py draws."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from conftest import FIXTURES, run_command

sys.path.insert(0, str(FIXTURES))

import pictures
from hostile_files import HOSTILE_PAGES, write_hostile

# page -> the command that writes it, where `base`, `adapter` and `tuned` lie, and `extracted` and `small`
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
    "verify-wrong": "verify base adapter damaged",
    "resize": "resize adapter --rank 4 -o resized",
    "combine": "combine adapter small -o combined",
}


class Made:
    """Pages by their names, each made once, beside the models that they are of."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hostile_folder = folder / "models", folder / "hostile"

    def page(self, name: str) -> Path:
        """Return the page of a row of PAGES."""
        if not self.folder.exists():
            self.folder.mkdir()
            for each in ("base", "adapter", "tuned"):
                pictures.deepen(FIXTURES / "llama" / each, self.folder / each)
            run_in(self.folder, "extract base tuned -o extracted".split())
            run_in(self.folder, "merge base adapter -o damaged".split())
            with open(self.folder / "damaged" / "model.safetensors", "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x40")
            run_in(self.folder, "resize adapter --rank 2 -o small".split())
        return self.make(self.folder, name, PAGES[name].split())

    def hostile(self, name: str) -> Path:
        """Return the page of a row of HOSTILE_PAGES."""
        if not self.hostile_folder.exists():
            write_hostile(self.hostile_folder)
        return self.make(self.hostile_folder, name, HOSTILE_PAGES[name])

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
