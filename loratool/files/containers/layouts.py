"""Read a file's layout from the header that an undo file or a patch has, whatever the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..dtypes import TensorSpec
from .gguf_file import GGUF, MAGIC, read_gguf_layout
from .safetensors_file import read_tensor_layout, with_length


@dataclass(frozen=True)
class FileLayout:
    """The facts of a file's header.

    Attributes:
        container: a key of `output.CONTAINERS`.
        head: all bytes before the first tensor.
        begin: each tensor's first byte.
        nbytes: of the file.
        metadata: that codecs read.
    """

    container: str
    head: bytes
    specs: Mapping[str, TensorSpec]
    begin: Mapping[str, int]
    nbytes: int
    metadata: Mapping[str, str]


def read_layout(header: bytes, path: Path) -> FileLayout:
    """Read `WeightsFile.header`.

    Args:
        path: the file that an error names.

    Raises:
        InputError: it breaks the format.
    """
    if header.startswith(MAGIC):
        return FileLayout(GGUF, header, *read_gguf_layout(header, path), {})
    return FileLayout("safetensors", with_length(header), *read_tensor_layout(header, path))
