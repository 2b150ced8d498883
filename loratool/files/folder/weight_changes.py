"""Reject weight updates that trainers send to servers, where a model is needed; the error names the format.

Most of these files are valid checkpoints of compressed bytes, or of positions and values, under the names of the
model's tensors. Only their marks distinguish them from a model, so each dialect is a row with its program's mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...errors import InputError, brief
from ..containers.file_kinds import container_of, first_bytes
from ..containers.safetensors_file import TensorFile
from ..dtypes import FLOATS, TensorSpec
from ..weights_file import WeightsFile
from .model_folder import INDEX_NAMES, read_json_file

APPLY = "apply it to the model it was made from: loratool apply BASE IT -o OUT; and name the result"

ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of a Zstandard frame
ARC3 = b"ARC3_ENVELOPE\0"
DIGEST = re.compile(r"[0-9a-f]{8}|[0-9a-f]{32}|[0-9a-f]{64}")  # adler32, xxh3-128, blake3
DECIMAL = re.compile(r"0|[1-9][0-9]{0,9}")  # adler32

# The last parts of the names of a sparse change: positions and values
PAIRS = ({"idx", "val"}, {"indices", "values"})
POSITIONS = ("idx", "indices")
ROLES = set[str]().union(*PAIRS)


def _are_compressed(file: WeightsFile) -> bool:
    """Return whether all tensors are runs of bytes, the way compressed tensors are stored."""
    return bool(file.specs) and all(each.dtype == "U8" and len(each.shape) == 1 for each in file.specs.values())


def _any_begins(file: WeightsFile, mark: bytes) -> bool:
    """Return whether all tensors are runs of bytes, and a tensor begins with a mark."""
    if not _are_compressed(file):
        return False
    begin = memoryview(bytearray(len(mark)))
    for name, spec in file.specs.items():
        if spec.size >= len(mark):
            file.read_bytes(name, 0, begin)
            if begin == mark:
                return True
    return False


def _have_checksums(file: WeightsFile, form: re.Pattern[str]) -> bool:
    """Return whether all tensors are runs of bytes, and the metadata has a checksum for each."""
    metadata = file.metadata or {}
    return _are_compressed(file) and all(form.fullmatch(metadata.get(name, "")) for name in file.specs)


def _are_pairs(file: WeightsFile) -> bool:
    """Return whether all tensors are flat lists: positions and values for each name."""
    roles: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in file.specs.items():
        path, _, role = name.rpartition(".")
        if not path or role not in ROLES or len(spec.shape) != 1 or (role in POSITIONS and spec.dtype in FLOATS):
            return False
        roles.setdefault(path, {})[role] = spec
    return all(pair.keys() in PAIRS and _have_one_length(pair) for pair in roles.values())


def _have_one_length(pair: Mapping[str, TensorSpec]) -> bool:
    """Return whether a pair has as many positions as values; positions called idx may be compressed."""
    return "idx" in pair or pair["indices"].size == pair["values"].size


def _is_sparse_patch(file: WeightsFile) -> bool:
    return (bool(file.specs) or (file.metadata or {}).get("format") == "sparse_weight_patch") and _are_pairs(file)


def _is_numbered(file: WeightsFile) -> bool:
    return bool(file.specs) and _are_pairs(file) and all(re.match(r"tensor_\d+\.", name) for name in file.specs)


def _metadata(content: Mapping[str, Any]) -> Mapping[str, Any]:
    value = content.get("metadata")
    return value if isinstance(value, Mapping) else {}


def _has_payloads(content: Mapping[str, Any]) -> bool:
    tensors = content.get("tensors")
    if not isinstance(tensors, list) or not {"base_version", "payload_files"} <= content.keys():
        return False
    return all(isinstance(each, Mapping) and "payload_key" in each for each in tensors)


@dataclass(frozen=True)
class Dialect:
    """A format of weight updates.

    Attributes:
        key: the key of its row in `patches.dialects.table`, or its programs' name.
        name: its programs' name for it, and the programs.
        is_file: returns whether a safetensors file is in this format.
        manifest: the name of the JSON file in a folder of this format; None if it is the index.
        is_described: returns whether an index or a manifest describes this format.
    """

    key: str
    name: str
    is_file: Callable[[WeightsFile], bool]
    manifest: str | None = None
    is_described: Callable[[Mapping[str, Any]], bool] = lambda _: False


# The first row that matches a file is its dialect
DIALECTS = (
    # PyPI fireworks-delta-compression: compression.py, backends/arc2.py, backends/arc3.py
    Dialect(
        "fireworks",
        "of Fireworks, arc_v1 to arc_v3",
        lambda file: _have_checksums(file, DECIMAL) or _any_begins(file, ARC3),
    ),
    # slime: slime/utils/disk_delta.py; also miles, SGLang, stitch, vime
    Dialect(
        "disk-delta",
        "a disk delta, as slime, miles and SGLang use",
        lambda file: _have_checksums(file, DIGEST),
        is_described=lambda content: bool(_metadata(content).get("delta_encoding")),
    ),
    # SkyRL: skyrl/backends/skyrl_train/weight_sync/delta_checkpoint.py
    Dialect("skyrl", "a delta of SkyRL", lambda file: _any_begins(file, ZSTD), "manifest.json", _has_payloads),
    # prime-rl: the branch feat/sparse-filesystem-weight-sync
    Dialect(
        "prime-rl",
        "a sparse update of prime-rl",
        _is_numbered,
        "sparse_update_manifest.json",
        lambda content: content.get("format") == "prime-rl-sparse-update",
    ),
    # TRL: the branch delta-weight-sync-v3
    Dialect("trl", "a sparse patch of TRL", _is_sparse_patch),
)


def find_change(path: Path) -> Dialect | None:
    """Return the dialect of a file, or of a folder by its manifest, index or first file; None if it has none."""
    if path.is_dir():
        manifests = [each.manifest for each in DIALECTS if each.manifest]
        described = [path / name for name in (*manifests, *INDEX_NAMES) if (path / name).is_file()]
        files = [each for each in sorted(path.glob("*.safetensors")) if each.is_file()][:1]
        return next(filter(None, map(find_change, (*described, *files))), None)
    if path.suffix == ".json":
        content = read_json_file(path) if path.is_file() else {}
        return next((each for each in DIALECTS if each.is_described(content)), None)
    if not path.is_file() or container_of(first_bytes(path)) != "safetensors":
        return None
    with closing(TensorFile(path)) as file:
        return next((each for each in DIALECTS if each.is_file(file)), None)


def refuse_change(file: WeightsFile) -> None:
    """Raise InputError for a file of compressed or sparse updates."""
    for dialect in DIALECTS:
        if dialect.is_file(file):
            _refuse(file.path, dialect, {})


def refuse_described_change(path: Path, content: Mapping[str, Any]) -> None:
    """Raise InputError for an index or a manifest of a weight update.

    Args:
        path: the path that the error names.
    """
    for dialect in DIALECTS:
        if dialect.is_described(content):
            _refuse(path, dialect, {**_metadata(content), **content})


def refuse_change_folder(folder: Path) -> None:
    """Raise InputError for a folder with the manifest of a weight update. The caller checks an index."""
    for dialect in DIALECTS:
        if dialect.manifest and (folder / dialect.manifest).is_file():
            content: Mapping[str, Any] = {}
            with suppress(InputError):  # a file of this name that is not JSON is not of the dialect
                content = read_json_file(folder / dialect.manifest)
            refuse_described_change(folder, content)


def _refuse(path: Path, dialect: Dialect, content: Mapping[str, Any]) -> NoReturn:
    word = "step" if "base_step" in content else "version"
    before, after = content.get(f"base_{word}"), content.get(word)
    steps = f", from {word} {brief(before)} to {brief(after)}" if before is not None else ""
    what = f"is not a model, but a change of a model's weights{steps} ({dialect.name})"
    raise InputError(what, culprit=str(path), remedy=APPLY)
