"""Write the tensors of an adapter as one safetensors file with metadata."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ...durable import disk
from ...durable.fileio import require_free_space, write_at, write_file
from ...durable.partial import partial_file
from ...files.containers.safetensors_file import build_header, data_order, tensor_bytes
from ...files.dtypes import TensorSpec
from ...files.folder.side_files import CARD
from ...files.weights_file import WeightsFile, require_unchanged
from .content import AdapterContent

if TYPE_CHECKING:
    from ...numerics.arrays import Numbers


def file_size(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> int:
    """Return how many bytes `write_single_file` writes."""
    return len(build_header(specs, data_order(specs), metadata)[0]) + sum(spec.nbytes for spec in specs.values())


def write_card(folder: Path, content: AdapterContent) -> None:
    """Write the model card of an adapter's folder, if the content has one."""
    if content.card:
        write_file(folder / CARD, content.card())


def write_single_file(
    path: Path,
    specs: Mapping[str, TensorSpec],
    load: Callable[[str], Numbers],
    metadata: Mapping[str, str],
    inputs: Collection[WeightsFile],
) -> None:
    """Write the tensors as one safetensors file, completely or not at all; arguments and errors as in `fill_file`."""
    with partial_file(path) as file:
        fill_file(file, specs, load, metadata, inputs)


def fill_file(
    file: BinaryIO,
    specs: Mapping[str, TensorSpec],
    load: Callable[[str], Numbers],
    metadata: Mapping[str, str],
    inputs: Collection[WeightsFile],
) -> None:
    """Write the tensors into a safetensors file that `partial_file` opened.

    Args:
        specs: name -> type and shape.
        load: name -> numbers of that type and shape; called in the order of the data.
        inputs: the files that the tensors are made of.

    Raises:
        InputError: one of `inputs` changed during the write.
    """
    header, begin = build_header(specs, names := data_order(specs), metadata)
    nbytes = len(header) + sum(spec.nbytes for spec in specs.values())
    require_free_space(Path(file.name).absolute().parent, nbytes)
    disk.truncate(file, nbytes)
    write_at(file, memoryview(header), 0)
    for name in names:
        write_at(file, tensor_bytes(load(name), specs[name]), begin[name])
    require_unchanged(inputs)
