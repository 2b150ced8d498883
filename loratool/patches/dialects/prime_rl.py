"""prime-rl's sparse update: a folder with a manifest and one safetensors file of positions and numbers.

The manifest's checksum of a tensor is of positions and numbers, so it proves the patch and nothing of the base. Source:
`sparse_update.py` of prime-rl's branch feat/sparse-filesystem-weight-sync.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...durable.fileio import (
    is_beside,
    length_of,
    open_for_reading,
    open_scratch,
    read_into,
    require_free_space,
    write_at,
    write_file,
)
from ...durable.partial import partial_folder
from ...errors import InputError, UsageError, brief
from ...files.containers.safetensors_file import MAX_HEADER, TensorFile, read_tensor_layout
from ...files.dtypes import DTYPE_NAMES, FLOAT8, TORCH_DTYPES, TensorSpec
from ...files.folder.model_folder import read_json_file
from ...files.weights_file import PlacedTensors, WeightsFile
from .changes import INTEGERS, PatchSum, SparseChange
from .compression import HEAD, PIECE, ZSTD, decompressed, frame_size
from .patch import Checksum, ForeignChange, ForeignPatch, TensorPair, WrittenPatch
from .writing import SparseSpool, TensorBodies

MANIFEST = "sparse_update_manifest.json"
PATCH = "sparse_update_patch.safetensors"
FORMAT, VERSION = "prime-rl-sparse-update", 1
ENTRY = r"step_(?P<number>\d+)"
ALGORITHM = "torch.hash_tensor"
TYPES = frozenset("BOOL U8 I8 I16 I32 I64 F16 BF16 F32 F64".split())  # that its checksum and its reader take on a CPU


def open_prime_rl(path: Path) -> ForeignPatch:
    """Open the folder of one step, or a file in it."""
    folder = path if path.is_dir() else path.parent
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise InputError(f"has no {MANIFEST}, which names its tensors", culprit=str(folder))
    content = read_json_file(manifest)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        what = f"{brief(content.get('format'))}, version {brief(content.get('version'))}"
        raise InputError(f"is of {what}, not of {FORMAT}, version {VERSION}", culprit=str(manifest))
    step, base = (_whole(content.get(field), field, manifest) for field in ("step", "base_step"))
    rows = content.get("tensors")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("has no list of tensors", culprit=str(manifest))
    name = content.get("patch_file")
    if name is None and not rows:
        return ForeignPatch("prime-rl", folder, step, base, {}, ("sparse",))
    if not isinstance(name, str) or not is_beside(name):
        raise InputError(f"names the file {brief(name)}, which is not one beside it", culprit=str(manifest))
    file, scratch = _open_tensors(folder / name, sum(_row_bytes(row) for row in rows))
    try:
        changes: dict[str, ForeignChange] = {}
        for row in rows:
            change = _change(row, file, manifest)
            if change.name in changes:
                raise InputError(f"lists {change.name} twice", culprit=str(manifest))
            changes[change.name] = change
    except BaseException:
        file.close()
        raise
    how = ("sparse", *(["zstd"] if scratch else []), "a checksum of the patch alone")
    files: list[WeightsFile] = [] if scratch else [file]
    return ForeignPatch("prime-rl", folder, step, base, changes, how, files=files, scratch=scratch)


def _whole(value: Any, field: str, manifest: Path) -> int:
    if type(value) is not int or not -1 <= value < 1 << 62:
        raise InputError(f"has the {field} {brief(value)}, which is no whole number", culprit=str(manifest))
    return value


def _row_bytes(row: Mapping[str, Any]) -> int:
    """Return the most bytes of a row's positions and numbers."""
    count = row.get("changed_numel")
    return 16 * count if type(count) is int and 0 <= count < 1 << 62 else 0


def _open_tensors(path: Path, most: int) -> tuple[WeightsFile, BinaryIO | None]:
    """Open the file of positions and numbers; one that is compressed as a whole is decompressed into a scratch file.

    Args:
        most: the most bytes of its tensors.
    """
    with closing(open_for_reading(path)) as source:
        head = source.read(HEAD)
        if head[:4] != ZSTD:
            return TensorFile(path), None
        nbytes = frame_size(head, str(path))
        if nbytes is None or not 8 <= nbytes <= most + MAX_HEADER + 8:
            what = "declares no size" if nbytes is None else f"declares {nbytes} bytes"
            raise InputError(f"{what}, and its manifest's tensors have {most} at most", culprit=str(path))
        folder = Path(tempfile.gettempdir())
        require_free_space(folder, nbytes)
        scratch = open_scratch(folder)
        try:
            parts = _parts_of(source, length_of(path))
            done = 0
            for piece in decompressed(parts, nbytes, str(path)):
                write_at(scratch, memoryview(piece), done)
                done += len(piece)
            return _placed(scratch, nbytes, path), scratch
        except BaseException:
            scratch.close()
            raise


def _parts_of(file: BinaryIO, nbytes: int) -> Iterable[memoryview]:
    buffer = memoryview(bytearray(min(PIECE, nbytes)))
    for done in range(0, nbytes, PIECE):
        part = buffer[: nbytes - done]
        read_into(file, part, done)
        yield part


def _placed(scratch: BinaryIO, nbytes: int, path: Path) -> PlacedTensors:
    start = memoryview(bytearray(8))
    read_into(scratch, start, 0)
    (length,) = struct.unpack("<Q", start)
    if length > min(MAX_HEADER, nbytes - 8):
        raise InputError(f"claims a header of {length} bytes in {nbytes} decompressed ones", culprit=str(path))
    header = memoryview(bytearray(length))
    read_into(scratch, header, 8)
    specs, begin, _, _ = read_tensor_layout(bytes(header), path, nbytes)
    return PlacedTensors(path, scratch, specs, begin)


def _change(row: Mapping[str, Any], file: WeightsFile, manifest: Path) -> SparseChange:
    name = row.get("name")
    if not isinstance(name, str):
        raise InputError("has a tensor without a name", culprit=str(manifest))
    place = f"{manifest}, {name}"
    shape, dtype = row.get("shape"), TORCH_DTYPES.get(str(row.get("dtype")))
    if dtype is None or not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in shape):
        raise InputError("is of no known type and shape", culprit=place)
    places, values = (file.specs.get(str(row.get(each))) for each in ("indices", "values"))
    if places is None or values is None:
        raise InputError(f"has no positions or no numbers in {file.path.name}", culprit=place)
    if places.dtype not in ("I32", "I64") or values.dtype != dtype or places.shape != values.shape:
        raise InputError(f"has {places} as positions of {values} as numbers of {dtype}", culprit=place)
    if len(places.shape) != 1 or row.get("changed_numel") != places.size:
        raise InputError(f"has {places} instead of {brief(row.get('changed_numel'))} positions", culprit=place)
    digest = row.get("checksum")
    check = None
    if digest is not None and dtype not in FLOAT8 and dtype in {*TYPES, *INTEGERS}:
        check = Checksum(ALGORITHM, str(digest), of_result=False)
    stated = TensorSpec(dtype, tuple(shape))
    keys = str(row["indices"]), str(row["values"])
    return SparseChange(name, place, check, file, stated, *keys, sum_patch=PatchSum if check else None)


def write_prime_rl(
    pairs: Iterable[TensorPair], out: Path, step: int | None = None, base_step: int | None = None
) -> WrittenPatch:
    """Write the folder of one step; what did not change is left out."""
    if step is None:
        raise UsageError("prime-rl numbers its steps", culprit="--step", remedy="add --step N")
    before = step - 1 if base_step is None else base_step
    if not -1 <= before < step:
        raise UsageError(f"the step {step} does not follow {before}", culprit="--step")
    rows, total, count, nbytes = list[dict[str, Any]](), 0, 0, 0
    with partial_folder(out) as folder:
        bodies = TensorBodies(folder)
        try:
            for count, pair in enumerate(pairs, 1):
                spec = pair.require_same("prime-rl")
                if spec.dtype not in TYPES:
                    why = f"is of {spec.dtype}, of which prime-rl has no checksum"
                    raise InputError(why, culprit=pair.name)
                total += spec.size
                row = _add(bodies, pair, spec, folder, count - 1)
                rows += [row] if row else []
            if rows:
                nbytes = bodies.save_at(folder / PATCH, {"format": "pt"})
        finally:
            bodies.close()
        changed = sum(row["changed_numel"] for row in rows)
        stats = {
            "total_tensors": count,
            "patched_tensors": len(rows),
            "total_numel": total,
            "changed_numel": changed,
            "sparsity": 1.0 - changed / total if total else 1.0,
            "patch_bytes": nbytes,
        }
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "base_step": before,
            "compute_dtype": None,
            "compressed": False,
            "patch_file": PATCH if rows else None,
            "tensors": rows,
            "stats": stats,
        }
        write_file(folder / MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
    return WrittenPatch(tuple(row["name"] for row in rows), nbytes)


def _add(bodies: TensorBodies, pair: TensorPair, spec: TensorSpec, folder: Path, number: int) -> dict[str, Any] | None:
    """Add the change of a tensor, and return its row of the manifest; None if nothing changed."""
    dtype, form = ("I32", "<i4") if spec.size < 1 << 31 else ("I64", "<i8")
    total, keys = PatchSum(spec.dtype), {each: f"tensor_{number}.{each}" for each in ("indices", "values")}
    with SparseSpool(folder) as spool:

        def encode(block: tuple[Any, Any]) -> bytes:
            total.add(*block)
            return np.asarray(block[0]).astype(form).tobytes()

        spool.fill(pair, spec.nbytes // max(1, spec.size), encode)
        if not spool.count:
            return None
        bodies.add(keys["indices"], spool.positions.parts(), dtype, spool.count)
        bodies.add(keys["values"], spool.values.parts(), spec.dtype, spool.count)
    kind = {"name": pair.name, "shape": [*spec.shape], "dtype": DTYPE_NAMES[spec.dtype], "numel": spec.size}
    return {**kind, **keys, "changed_numel": spool.count, "checksum": int(str(total))}
