"""Fireworks' arc_v1 and arc_v2: a safetensors file for each of the base's, of compressed differences.

All tensors of the base are in it, and the metadata has adler32 of each after the change, as a decimal number. arc_v1 is
zlib, arc_v2 is Zstandard; arc_v3 is a pickle, and not read. Source: PyPI's fireworks-delta-compression 0.1.0,
`compression.py` and `backends/arc2.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from ...durable.fileio import copy_file, is_beside
from ...durable.partial import partial_folder
from ...errors import InputError
from ...files.containers.file_kinds import container_of
from ...files.containers.safetensors_file import TensorFile
from ...files.folder.weight_changes import ARC3
from .changes import XorChange
from .checksums import new_hasher
from .compression import ZSTD, compressed
from .patch import (
    Checksum,
    ForeignChange,
    ForeignPatch,
    TensorPair,
    WrittenPatch,
    closed_on_error,
    head_of,
    open_tensor_files,
    require_flat,
)
from .writing import TensorBodies, XorStream

LEVEL = 3  # of PyPI's zstd by default

ADLER = "adler32 (decimal)"


def open_fireworks(path: Path) -> ForeignPatch:
    """Open a folder of deltas, or one file if the base is one."""
    folder = path if path.is_dir() else path.parent
    paths = sorted(each for each in folder.glob("*.safetensors") if each.is_file()) if path.is_dir() else [path]
    files = open_tensor_files(paths)
    with closed_on_error(files):
        changes: dict[str, ForeignChange] = {}
        kinds = dict[str, None]()
        for file in files:
            for name in file.specs:
                if name in changes:
                    raise InputError(f"{name} is in several files", culprit=str(folder))
                changes[name] = _change(file, name)
                kinds[_compression(file, name)] = None
    return ForeignPatch("arc_v2", path, None, None, changes, ("xor", *kinds, "adler32"), complete=True, files=[*files])


def is_arc3(path: Path) -> bool:
    """Return whether a file, or the first file of a folder, has a tensor of arc_v3: a pickle or a safetensors file."""
    files = open_tensor_files([next(iter(sorted(path.glob("*.safetensors")))) if path.is_dir() else path])
    with ExitStack() as stack:
        stack.callback(files[0].close)
        heads = (head_of(files[0], name, len(ARC3)) for name in files[0].specs)
        return any(head == ARC3 or container_of(head) == "safetensors" for head in heads)


def refuse_arc3(path: Path) -> ForeignPatch:
    """Raise InputError: what an arc_v3 file has pickled is run by whoever reads it."""
    raise InputError(
        "is a patch of Fireworks in arc_v3, a pickle, which is a program that its reader would run",
        culprit=str(path),
        remedy="have it written as arc_v2, or apply it with fireworks-delta-compression where you trust it",
    )


def _compression(file: TensorFile, name: str) -> str:
    head = head_of(file, name, 4)
    if head == ZSTD:
        return "zstd"
    if len(head) > 1 and head[0] & 15 == 8 and int.from_bytes(head[:2], "big") % 31 == 0:  # RFC 1950, 2.2
        return "zlib"
    raise InputError("is neither zstd nor zlib, so neither arc_v1 nor arc_v2", culprit=f"{file.path}, {name}")


def _change(file: TensorFile, name: str) -> XorChange:
    place = f"{file.path}, {name}"
    require_flat(file, name, place)
    digest = (file.metadata or {}).get(name)
    if digest is None:
        raise InputError("has no checksum", culprit=place)
    return XorChange(name, place, Checksum(ADLER, digest), file, name, allows_zlib=True)


def write_fireworks(
    pairs: Iterable[TensorPair], out: Path, files: Mapping[str, str], beside: Mapping[str, Path] | None = None
) -> WrittenPatch:
    """Write a folder of deltas as arc_v2, which has all tensors, changed or not.

    Args:
        pairs: all tensors of the base.
        files: tensor -> the name of the base's safetensors file that has it.
        beside: name in the folder -> a file of the base that its readers copy: the index, config.json.
    """
    for name in {*files.values(), *(beside or {})}:
        if not is_beside(name):
            raise InputError(f"names {name!r}, which is no file's name", culprit=str(out))
    changed = list[str]()
    with partial_folder(out) as folder, ExitStack() as stack:
        bodies: dict[str, TensorBodies] = {}
        sums: dict[str, dict[str, str]] = {}
        for pair in pairs:
            spec, hasher = pair.require_same("arc_v2"), new_hasher(ADLER)
            file = files[pair.name]
            if not file.endswith(".safetensors"):
                raise InputError(f"is in {file}, and Fireworks reads safetensors alone", culprit=pair.name)
            if file not in bodies:
                bodies[file], sums[file] = TensorBodies(folder), {}
                stack.callback(bodies[file].close)
            stream = XorStream(pair, hasher)
            bodies[file].add(pair.name, compressed(stream, spec.nbytes, LEVEL))
            sums[file][pair.name] = hasher.hexdigest()
            changed += [pair.name] if stream.changed else []
        nbytes = sum(each.save_at(folder / file, sums[file]) for file, each in bodies.items())
        for name, path in (beside or {}).items():
            copy_file(path, folder / name)
    return WrittenPatch(tuple(changed), nbytes)
