"""The delta of SkyRL: a folder `delta-00000007` with a manifest and safetensors files of compressed differences.

Source: SkyRL's `skyrl/backends/skyrl_train/weight_sync/delta_checkpoint.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...durable.fileio import is_beside, write_file
from ...durable.partial import partial_folder
from ...errors import InputError, UsageError, brief
from ...files.containers.safetensors_file import TensorFile
from ...files.dtypes import DTYPE_NAMES, TORCH_DTYPES, TensorSpec
from ...files.folder.model_folder import read_json_file
from .changes import XorChange
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
from .writing import TensorBodies, XorStream

MANIFEST = "manifest.json"
ENTRY = r"delta-(?P<number>\d{8,})"
CHECKSUM = "xxh3-128"
# The types of its publisher; it knows no others
TYPES = frozenset("BOOL U8 I8 I16 I32 I64 F16 BF16 F32 F64 U16 U32 U64 F8_E4M3 F8_E5M2".split())


def open_skyrl(path: Path) -> ForeignPatch:
    """Open the folder of one version, or a file in it."""
    folder = path if path.is_dir() else path.parent
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise InputError(f"has no {MANIFEST}, which names its tensors", culprit=str(folder))
    content = read_json_file(manifest)
    version, base = (_whole(content.get(field), field, manifest) for field in ("version", "base_version"))
    rows = content.get("tensors")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("has no list of tensors", culprit=str(manifest))
    names = dict.fromkeys(_file_name(row.get("payload_file"), manifest) for row in rows)
    listed = content.get("payload_files", [])
    if not isinstance(listed, list):
        raise InputError("has no list of payload_files", culprit=str(manifest))
    names |= dict.fromkeys(_file_name(each, manifest) for each in listed)
    files = open_tensor_files(folder / name for name in names)
    with closed_on_error(files):
        by_name = dict(zip(names, files, strict=True))
        changes: dict[str, ForeignChange] = {}
        for row in rows:
            change = _change(row, by_name[row["payload_file"]], manifest)
            if change.name in changes:
                raise InputError(f"lists {change.name} twice", culprit=str(manifest))
            changes[change.name] = change
    algorithms = tuple(dict.fromkeys(change.check.algorithm for change in changes.values() if change.check))
    return ForeignPatch("skyrl", folder, version, base, changes, ("xor", "zstd", *algorithms), files=[*files])


def _whole(value: Any, field: str, manifest: Path) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise InputError(f"has the {field} {brief(value)}, which is no whole number", culprit=str(manifest))
    return value


def _file_name(value: Any, manifest: Path) -> str:
    if not isinstance(value, str) or not is_beside(value):
        raise InputError(f"names the file {brief(value)}, which is not one beside it", culprit=str(manifest))
    return value


def _change(row: Mapping[str, Any], file: TensorFile, manifest: Path) -> XorChange:
    name, key = row.get("name"), row.get("payload_key")
    if not isinstance(name, str) or not isinstance(key, str):
        raise InputError("has a tensor without a name or a payload_key", culprit=str(manifest))
    place = f"{manifest}, {name}"
    shape, dtype = row.get("shape"), TORCH_DTYPES.get(str(row.get("dtype")))
    if dtype is None or not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in shape):
        raise InputError("is of no known type and shape", culprit=place)
    spec = TensorSpec(dtype, tuple(shape))
    if row.get("uncompressed_num_bytes") != spec.nbytes:
        raise InputError(f"is {spec} with {brief(row.get('uncompressed_num_bytes'))} bytes", culprit=place)
    if require_flat(file, key, place) != row.get("compressed_num_bytes"):
        raise InputError(f"has not {brief(row.get('compressed_num_bytes'))} bytes in {file.path.name}", culprit=place)
    digest, algorithm = row.get("checksum"), row.get("checksum_algorithm", CHECKSUM)
    if "checksum" not in row:  # as it was first
        digest, algorithm = row.get("sha256"), "sha256"
    if not isinstance(digest, str):
        raise InputError("has no checksum", culprit=place)
    algorithm = require_algorithm(algorithm, ("xxh3-128", "sha256"), place)
    return XorChange(name, place, Checksum(algorithm, digest), file, key, spec)


def write_skyrl(
    pairs: Iterable[TensorPair], out: Path, step: int | None = None, base_step: int | None = None
) -> WrittenPatch:
    """Write the folder of one version; what did not change is left out.

    Args:
        step: the version; by default the number in the name of `out`.
    """
    named = re.fullmatch(ENTRY, out.name)
    if step is None and named:
        step = int(named["number"])
    steps = PatchSteps.following(step, base_step, "SkyRL")
    if named and int(named["number"]) != steps.step:
        raise UsageError(f"the version {steps.step} is not the number in {out.name}", culprit="--step")
    file, rows = "delta-rank00000-file000000.safetensors", list[dict[str, Any]]()
    nbytes = 0
    with partial_folder(out) as folder:
        bodies = TensorBodies(folder)
        try:
            for pair in pairs:
                spec, hasher = pair.require_same("SkyRL"), new_hasher(CHECKSUM)
                if spec.dtype not in TYPES:
                    raise InputError(f"is of {spec.dtype}, a type that SkyRL does not know", culprit=pair.name)
                stream = XorStream(pair, hasher)
                size = bodies.add(pair.name, compressed(stream, spec.nbytes))
                if not stream.changed:
                    bodies.forget(pair.name)
                    continue
                sizes = {"uncompressed_num_bytes": spec.nbytes, "compressed_num_bytes": size}
                where = {"payload_file": file, "payload_key": pair.name}
                check = {"checksum": hasher.hexdigest(), "checksum_algorithm": CHECKSUM}
                kind = {"name": pair.name, "dtype": DTYPE_NAMES[spec.dtype], "shape": [*spec.shape]}
                rows.append({**kind, **sizes, **where, **check})
            if rows:
                nbytes = bodies.save_at(folder / file, None)
        finally:
            bodies.close()
        manifest = {
            "version": steps.step,
            "base_version": steps.base_step,
            "tensors": rows,
            "total_uncompressed_num_bytes": sum(row["uncompressed_num_bytes"] for row in rows),
            "total_compressed_num_bytes": sum(row["compressed_num_bytes"] for row in rows),
            "payload_files": [file] if rows else [],
        }
        write_file(folder / MANIFEST, json.dumps(manifest).encode())
    return WrittenPatch(tuple(row["name"] for row in rows), nbytes)
