"""Write an adapter for Ollama: a GGUF file in a folder, and the Modelfile that names it."""

from __future__ import annotations

from pathlib import Path

from ...adapters.adapter import Adapter
from ...adapters.formats import FORMATS
from ...adapters.formats.content import AdapterContent
from ...adapters.formats.single_file import write_card
from ...durable.fileio import write_file
from ...durable.partial import partial_folder
from ...files.folder.side_files import MODELFILE

_TEXT = """# FROM the model that the adapter was trained on, by its name in Ollama or as a GGUF file:
# FROM {base}
ADAPTER ./{name}
"""


def write(path: Path, content: AdapterContent, to: str, source: Adapter) -> None:
    """Write the folder, whole or not at all.

    Args:
        to: the format of the adapter, a key of FORMATS.
    """
    name, base = f"adapter.{to}", source.config.base_model
    named = base if isinstance(base, str) and base.isprintable() and base else "MODEL"
    with partial_folder(path) as folder:
        FORMATS[to].write(folder / name, True, content, [source.file])
        write_file(folder / MODELFILE, _TEXT.format(base=named, name=name).encode())
        write_card(folder, content)
