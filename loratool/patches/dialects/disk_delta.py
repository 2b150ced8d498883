"""The disk delta of slime, miles, SGLang, stitch and vime.

A folder `weight_v000007` with safetensors files of compressed differences under the tensors' names, and an index whose
metadata names encoding, compression, checksum and both versions. The checksum of each tensor's bytes after the change
is in the metadata of its file. Sources: slime's `slime/utils/disk_delta.py`, and the receiver that it adds to SGLang,
`sglang/srt/weight_sync/local_checkpoint.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ...durable.fileio import has_bytes, write_file
from ...durable.partial import partial_folder
from ...errors import InputError, UsageError, brief
from ...files.containers.safetensors_file import TensorFile
from ...files.folder.model_folder import INDEX_NAMES, read_json_file
from .changes import OverwriteChange, XorChange
from .checksums import new_hasher, require_algorithm
from .compression import compressed
from .patch import (
    Checksum,
    ForeignChange,
    ForeignPatch,
    PatchSteps,
    TensorPair,
    WrittenPatch,
    closed_on_error,
    open_tensor_files,
    require_flat,
)
from .streams import Pieces
from .writing import SparseSpool, TensorBodies, XorStream

INDEX = INDEX_NAMES[0]
ENTRY = r"weight_v(?P<number>\d{6,})"  # of a version's folder
ENCODINGS = ("xor", "overwrite")
CHECKSUMS = ("xxh3-128", "blake3", "adler32")
FIELDS = ("version", "base_version", "delta_encoding", "compression_format", "checksum_format")


def open_disk_delta(path: Path) -> ForeignPatch:
    """Open the folder of one version, or a file in it."""
    folder = path if path.is_dir() else path.parent
    index = folder / INDEX
    if not index.is_file():
        remedy = "copy it from where the trainer published the folder"
        raise InputError(f"has no {INDEX}, which names its encoding", culprit=str(folder), remedy=remedy)
    content = read_json_file(index)
    metadata = content.get("metadata")
    if not isinstance(metadata, Mapping) or (missing := [each for each in FIELDS if each not in metadata]):
        named = missing[0] if isinstance(metadata, Mapping) else "metadata"
        raise InputError(f"has no {named}", culprit=str(index))
    encoding = metadata["delta_encoding"]
    if encoding not in ENCODINGS:
        raise InputError(f"has the encoding {brief(encoding)}, which is none of xor, overwrite", culprit=str(index))
    if metadata["compression_format"] != "zstd":
        raise InputError(f"is compressed by {brief(metadata['compression_format'])}, not zstd", culprit=str(index))
    algorithm = require_algorithm(metadata["checksum_format"], CHECKSUMS, str(index))
    version, base = (_version(metadata[field], index) for field in FIELDS[:2])
    files = open_tensor_files(each for each in sorted(folder.glob("*.safetensors")) if each.is_file())
    with closed_on_error(files):
        changes: dict[str, ForeignChange] = {}
        for file in files:
            for name in file.specs:
                change = _change(file, name, encoding, algorithm)
                if name in changes:
                    _require_copy(changes[name], change)
                changes.setdefault(name, change)
        _check_map(index, content.get("weight_map"), changes)
    how = (encoding, "zstd", algorithm)
    return ForeignPatch("disk-delta", folder, version, base, changes, how, files=[*files])


def _version(value: Any, index: Path) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,18}", value):
        raise InputError(f"has the version {brief(value)}, which is no number in a text", culprit=str(index))
    return int(value)


def _change(file: TensorFile, name: str, encoding: str, algorithm: str) -> XorChange | OverwriteChange:
    place = f"{file.path}, {name}"
    require_flat(file, name, place)
    digest = (file.metadata or {}).get(name)
    if digest is None:
        raise InputError(f"has no checksum, which its index says it has ({algorithm})", culprit=place)
    check = Checksum(algorithm, digest)
    if encoding == "xor":
        return XorChange(name, place, check, file, name)
    return OverwriteChange(name, place, check, file, name)


def _require_copy(one: ForeignChange, two: ForeignChange) -> None:
    """Raise InputError unless two changes of a tensor, as two pipeline stages write them, have the same bytes."""
    assert isinstance(one, XorChange | OverwriteChange) and isinstance(two, XorChange | OverwriteChange)
    begin, nbytes = one.file.begin[one.key], one.nbytes

    def read(first: int, buffer: memoryview) -> None:
        two.file.read_bytes(two.key, first, buffer)

    if one.check != two.check or nbytes != two.nbytes or not has_bytes(one.file.file, begin, nbytes, read):
        raise InputError(f"is also in {one.file.path.name}, with another change", culprit=two.place)


def _check_map(index: Path, weight_map: Any, changes: Mapping[str, ForeignChange]) -> None:
    if not isinstance(weight_map, Mapping):
        raise InputError("has no weight_map from names to files", culprit=str(index))
    if absent := next((name for name in weight_map if name not in changes), None):
        remedy = "fetch the rest of the folder"
        raise InputError(f"lists {absent}, which is in no file beside it", culprit=str(index), remedy=remedy)
    if unlisted := next((name for name in changes if name not in weight_map), None):
        raise InputError(f"does not list {unlisted}, so a file beside it is of another version", culprit=str(index))


def write_disk_delta(
    pairs: Iterable[TensorPair],
    out: Path,
    step: int | None = None,
    base_step: int | None = None,
    encoding: str = "xor",
    checksum: str = "xxh3-128",
) -> WrittenPatch:
    """Write the folder of one version; what did not change is left out.

    Args:
        step: the version; by default the number in the name of `out`.
    """
    for value, known, option in ((encoding, ENCODINGS, "--encoding"), (checksum, CHECKSUMS, "--checksum")):
        if value not in known:
            raise UsageError(f"{brief(value)} is none of {', '.join(known)}", culprit=option)
    named = re.fullmatch(ENTRY, out.name)
    if step is None and named:
        step = int(named["number"])
    steps = PatchSteps.following(step, base_step, "a disk delta")
    if named and int(named["number"]) != steps.step:
        raise UsageError(f"the version {steps.step} is not the number in {out.name}", culprit="--step")
    with partial_folder(out) as folder:
        bodies, checksums = TensorBodies(folder), dict[str, str]()
        try:
            for pair in pairs:
                if digest := _add(bodies, pair, folder, encoding, checksum):
                    checksums[pair.name] = digest
            file, nbytes = "model-00000-of-00001.safetensors", 0
            if checksums:
                nbytes = bodies.save_at(folder / file, checksums)
        finally:
            bodies.close()
        versions = {"version": f"{steps.step:06d}", "base_version": f"{steps.base_step:06d}"}
        metadata = {**versions, "delta_encoding": encoding, "compression_format": "zstd", "checksum_format": checksum}
        index = {"metadata": metadata, "weight_map": dict.fromkeys(checksums, file)}
        write_file(folder / INDEX, json.dumps(index).encode())
    return WrittenPatch(tuple(checksums), nbytes)


def _add(bodies: TensorBodies, pair: TensorPair, folder: Path, encoding: str, checksum: str) -> str | None:
    """Add the change of a tensor, and return the checksum of the target's; None if nothing changed."""
    spec, hasher = pair.require_same("a disk delta"), new_hasher(checksum)
    if encoding == "xor":
        stream = XorStream(pair, hasher)
        bodies.add(pair.name, compressed(stream, spec.nbytes))
        if not stream.changed:
            bodies.forget(pair.name)
            return None
        return hasher.hexdigest()
    if spec.nbytes >= 1 << 32:
        why = f"has {spec.nbytes} bytes, and overwrite counts them in 32 bits"
        raise InputError(why, culprit=pair.name, remedy="add --encoding xor")
    with SparseSpool(folder) as spool:
        spool.fill(pair, 1, lambda block: block[0].astype("<u4").tobytes(), hasher)
        if not spool.count:
            return None
        parts: Pieces = chain([spool.count.to_bytes(4, "little")], spool.positions.parts(), spool.values.parts())
        bodies.add(pair.name, compressed(parts, 4 + 5 * spool.count))
    return hasher.hexdigest()
