"""Every adapter convention on disk: one file each, one row each in `FORMATS`.

A format answers two questions: whether a file's tensor names are its own (`claims`), and what adapter the
file holds (`read`). `open_adapter` asks them in the table's order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..checkpoint import PICKLES
from ..errors import InputError, UsageError
from ..fileio import reading
from ..hub import resolve
from ..tensorfile import TensorFile
from . import kohya, peft


@dataclass(frozen=True)
class Format:
    """`claims(names)` recognizes the tensor names; `read(name, file, alpha)` makes the adapter."""

    claims: Callable[[Iterable[str]], bool]
    read: Callable[[str, TensorFile, float | None], Adapter]


FORMATS = {
    "kohya": Format(kohya.claims, kohya.read),
    "peft": Format(peft.claims, peft.read),
}


def find_adapter_file(path: Path) -> Path:
    """The weights file that an adapter's path means: a file, or the one in a folder."""
    if path.is_dir():
        if (path / peft.WEIGHTS_NAME).is_file():
            return path / peft.WEIGHTS_NAME
        files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
        if len(files) == 1:
            return files[0]
        if files:
            raise InputError(
                f"holds {len(files)} safetensors files", culprit=str(path), remedy=f"name one of them, like {files[0]}"
            )
        pickled = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
        if not pickled:
            raise InputError("holds no adapter: no *.safetensors file", culprit=str(path))
        path = pickled[0]
    if path.suffix in PICKLES:
        raise InputError(
            "torch pickles are not read yet",
            culprit=str(path),
            remedy="save the adapter as safetensors (peft: save_pretrained)",
        )
    return path


def is_adapter(names: Iterable[str]) -> bool:
    names = list(names)
    return any(format.claims(names) for format in FORMATS.values())


def open_adapter(name: str | os.PathLike[str], alpha: float | None = None) -> Adapter:
    """Open an adapter in any known format: a folder, a file, or a name in the local Hugging Face cache.

    `alpha` is for files that have none; it must not contradict one that has it.
    Raises InputError for what no format claims, and for what a format cannot read.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise UsageError(f"--alpha {alpha} is not a finite number")
    path = resolve(name)
    with reading(path):
        weights = find_adapter_file(path)
    file = TensorFile(weights)
    try:
        for format in FORMATS.values():
            if format.claims(file.specs):
                return format.read(os.fspath(name), file, alpha)
        first = next(iter(file.specs), "no tensor at all")
        raise InputError(
            f"is not an adapter in a known format ({', '.join(FORMATS)}): it has {first}", culprit=os.fspath(name)
        )
    except BaseException:
        file.close()
        raise
