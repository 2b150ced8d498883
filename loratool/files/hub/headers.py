"""Open a model of the hub by its headers alone, for commands that read no numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...durable import disk
from .cache import find_here, import_download


@contextmanager
def headers_alone(name: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    """Return a folder or file with the headers and configs of a hub model, which lasts until the block ends.

    The name itself is returned for a path, for a model that is in the cache, and for one whose weights are of other
    formats than safetensors, which would have to be downloaded.

    Raises:
        InputError, MachineError: as `cache.resolve`.
    """
    absent = find_here(name)
    if isinstance(absent, Path):
        yield name
        return
    with disk.temporary_folder() as folder:
        yield import_download(absent).download_headers(absent, Path(folder)) or name
