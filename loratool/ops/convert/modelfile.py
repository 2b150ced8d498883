"""Write an adapter for Ollama: a GGUF file in a folder, and the Modelfile that names it."""

from __future__ import annotations

import os
from pathlib import Path

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS
from ...adapters.formats.content import AdapterContent
from ...errors import UsageError
from ...files.fileio import partial_folder, write_file

_MODELFILE = """# FROM the model that the adapter was trained on, by its name in Ollama or as a GGUF file:
# FROM {base}
ADAPTER ./{name}
"""


def output(out: str | os.PathLike[str] | None) -> tuple[Path, bool]:
    """Return the path of the folder, and that it is no file.

    Raises:
        UsageError: it is named as a file.
    """
    path = Path("converted" if out is None else out)
    if path.suffix in (".gguf", ".safetensors"):
        raise UsageError("would be a folder, with a Modelfile beside the adapter", culprit=str(path))
    return path, False


def write(path: Path, content: AdapterContent, to: str, source: Adapter) -> None:
    """Write the folder, whole or not at all.

    Args:
        to: the format of the adapter, a key of FORMATS.
    """
    name, base = f"adapter.{to}", source.config.base_model
    named = base if isinstance(base, str) and base.isprintable() and base else "MODEL"
    with partial_folder(path) as folder:
        FORMATS[to].write(folder / name, True, content, [source.file])
        write_file(folder / "Modelfile", _MODELFILE.format(base=named, name=name).encode())
