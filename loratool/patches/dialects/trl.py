"""TRL's sparse patch: one safetensors file of positions and bf16 numbers, without any check.

A tensor's positions and numbers are called as the tensor is, with `.idx` and `.val` after it. Positions are int32, or
differences to the one before less 1, of 16 or 32 bits. The first version has `.indices` and `.values`.
A bucket has full anchors beside them. Source: `delta_engine.py`, `delta_codec.py` and `weight_diff.py` of TRL's branch
delta-weight-sync-v3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ...durable.partial import partial_file
from ...errors import InputError, UsageError, brief
from ...files.containers.safetensors_file import TensorFile
from ...files.dtypes import TensorSpec
from .changes import SparseChange
from .patch import ForeignChange, ForeignPatch, TensorPair, WrittenPatch, closed_on_error, open_tensor_files
from .streams import Block
from .writing import SparseSpool, TensorBodies

FORMAT = "sparse_weight_patch"
ENTRY = r"step_(?P<number>\d+)\.safetensors"  # in the folders anchors and deltas
FOLDERS = ("anchors", "deltas")
ENCODINGS = ("gap_delta", "raw")
WIDTHS = {"raw": ("I32",), "gap_delta": ("U16", "U32")}


def open_trl(path: Path) -> ForeignPatch:
    """Open a patch's file, or a folder that has one."""
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(paths) > 1:
        raise InputError("has several patches", culprit=str(path), remedy="name them in their order")
    files = open_tensor_files(paths)
    (file,) = files
    with closed_on_error(files):
        metadata = file.metadata or {}
        if metadata.get("version", "1") != "1":
            raise InputError(f"is of version {brief(metadata['version'])}, not of 1", culprit=str(file.path))
        changes: dict[str, ForeignChange] = {}
        for name in sorted({key.rpartition(".")[0] for key in file.specs}):
            changes[name] = _change(file, name, metadata)
        version, base = (_number(metadata, field, file.path) for field in ("model_version", "prev_model_version"))
    encoding = metadata.get("encoding", "raw")
    return ForeignPatch("trl", file.path, version, base, changes, ("sparse", encoding, "no checksum"), files=[*files])


def _number(metadata: Mapping[str, str], field: str, path: Path) -> int | None:
    text = metadata.get(field, "-1")
    if not re.fullmatch(r"-1|\d{1,18}", text):
        raise InputError(f"has the {field} {brief(text)}, which is no number", culprit=str(path))
    return None if text == "-1" else int(text)


def _change(file: TensorFile, name: str, metadata: Mapping[str, str]) -> SparseChange:
    place = f"{file.path}, {name}"
    is_first = f"{name}.indices" in file.specs
    keys = (f"{name}.indices", f"{name}.values") if is_first else (f"{name}.idx", f"{name}.val")
    places, values = (file.specs.get(key) for key in keys)
    encoding = "raw" if is_first else metadata.get("encoding")
    if encoding == "nvcomp_cascaded":
        remedy = "have the trainer write raw or gap_delta"
        raise InputError("has positions by nvCOMP, which only a GPU reads", culprit=place, remedy=remedy)
    if encoding not in WIDTHS:
        raise InputError(f"has the encoding {brief(encoding)}, which is none of raw, gap_delta", culprit=place)
    if places is None or values is None:
        raise InputError("has positions or numbers alone", culprit=place)
    has_types = values.dtype == "BF16" and places.dtype in WIDTHS[encoding]
    if not has_types or len(places.shape) != 1 or places.shape != values.shape:
        raise InputError(f"has {places} as positions ({encoding}) of {values} as numbers", culprit=place)
    stated = TensorSpec(values.dtype, ())
    return SparseChange(name, place, None, file, stated, *keys, gaps=encoding == "gap_delta", has_shape=False)


def write_trl(
    pairs: Iterable[TensorPair], out: Path, step: int | None = None, encoding: str = "gap_delta"
) -> WrittenPatch:
    """Write one file; what did not change is left out.

    Args:
        step: the version; by default the number in the name of `out`.
    """
    if encoding not in ENCODINGS:
        raise UsageError(f"{brief(encoding)} is none of {', '.join(ENCODINGS)}", culprit="--encoding")
    named = re.fullmatch(ENTRY, out.name)
    version = int(named["number"]) if step is None and named else step
    if version is None or version < 0:
        raise UsageError("TRL numbers its versions", culprit="--step", remedy="add --step N")
    changed, total, numbers, count = list[str](), 0, 0, 0
    with partial_file(out) as target:
        bodies = TensorBodies(out.parent)
        try:
            for pair in pairs:
                count += 1
                spec = pair.require_same("TRL")
                total += spec.size
                if added := _add(bodies, pair, spec, out.parent, encoding):
                    changed.append(pair.name)
                    numbers += added
            metadata = {
                "format": FORMAT,
                "version": "1",
                "sparse": "True",
                "model_version": str(version),
                "num_changed_params": str(count),
                "total_changed_elements": str(numbers),
                "total_elements": str(total),
                "sparsity": str(1.0 - numbers / max(total, 1)),
                "encoding": encoding,
            }
            nbytes = bodies.save(target, metadata)
        finally:
            bodies.close()
    return WrittenPatch(tuple(changed), nbytes)


def _add(bodies: TensorBodies, pair: TensorPair, spec: TensorSpec, folder: Path, encoding: str) -> int:
    """Add the change of a tensor, and return how many numbers changed."""
    gaps = _Gaps()
    width = 2 if spec.dtype == "BF16" else 1  # what changed of another type is refused, wherever it is
    with SparseSpool(folder) as spool:
        raw = encoding == "raw"
        spool.fill(pair, width, lambda block: _checked(block, spec, pair.name, None if raw else gaps))
        if not spool.count:
            return 0
        if raw or gaps.most > 0xFFFF:
            bodies.add(f"{pair.name}.idx", spool.positions.parts(), "I32" if raw else "U32", spool.count)
        else:
            narrow = (np.frombuffer(part, "<u4").astype("<u2").tobytes() for part in spool.positions.parts())
            bodies.add(f"{pair.name}.idx", narrow, "U16", spool.count)
        bodies.add(f"{pair.name}.val", spool.values.parts(), spec.dtype, spool.count)
        return spool.count


class _Gaps:
    """The differences of positions, less 1: the last position, and the largest difference."""

    def __init__(self) -> None:
        self.last, self.most = -1, 0


def _checked(block: Block, spec: TensorSpec, name: str, gaps: _Gaps | None) -> bytes:
    """Return the stored positions of a block; raise InputError for what the dialect cannot say."""
    positions, values = block
    if not positions.size:
        return b""
    if spec.dtype != "BF16":
        raise InputError(f"is of {spec.dtype}, and TRL casts everything to bf16", culprit=name)
    if spec.size >= 1 << 31:
        raise InputError(f"has {spec.size} numbers, and TRL counts them in 31 bits", culprit=name)
    if ((values.reshape(-1).view("<u2") & 0x7FFF) > 0x7F80).any():
        raise InputError("has a NaN, by which vLLM marks what stays", culprit=name)
    if gaps is None:
        return positions.astype("<i4").tobytes()
    found = np.diff(positions, prepend=gaps.last) - 1
    gaps.last, gaps.most = int(positions[-1]), max(gaps.most, int(found.max()))
    return found.astype("<u4").tobytes()
