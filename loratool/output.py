"""An output checkpoint: where it goes and how it is laid out, decided completely before its first byte.

By default the layout is the input's: its files, their tensors, and where nothing in them must change, their
very header bytes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .checkpoint import SINGLE_NAMES, Checkpoint, split_into_shards
from .errors import InputError, NeedsFlag, UsageError
from .fileio import former_path, partial_file, partial_folder, partial_path, require_free_space, write_at, write_file
from .sidefiles import edited_config, encode_json, foreign_file, survey_checkpoint, undo_files, undo_path
from .tensorfile import TORCH_FLOATS, TensorFile, TensorSpec, WeightsFile, build_header, data_order, edit_metadata

# Hashes of the tensor data that image tools write into the metadata: wrong once a tensor changes.
STALE_METADATA = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to be: `header` with its length prefix, and each tensor's first byte in file order."""

    name: str
    header: bytes
    begin: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class Output:
    """A checkpoint to be.

    `extras` are small files by name with their content; `travels` are side files by name with their origin.
    `undo` is where an undo file will be, and `carried` where the earlier ones go: target -> origin.
    """

    path: Path
    is_file: bool
    specs: Mapping[str, TensorSpec]
    files: tuple[OutputFile, ...]
    extras: Mapping[str, bytes]
    travels: Mapping[str, Path]
    not_copied: tuple[str, ...]
    provenance: str = ""
    undo: Path | None = None
    carried: Mapping[Path, Path] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the weight files."""
        return sum(file.nbytes for file in self.files)

    def require_space(self) -> None:
        """Raises MachineError where the disk is too small for all that will be written."""
        beside = sum(origin.stat().st_size for origin in (*self.travels.values(), *self.carried.values()))
        beside += sum(len(data) for data in self.extras.values())
        require_free_space(self.path.absolute().parent, self.nbytes + beside)


@dataclass(frozen=True)
class Edits:
    """What an output has otherwise than its base: tensors reshaped or new, fields of config.json, side files."""

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


def output_path(out: str | os.PathLike[str] | None, base: Checkpoint, verb: str) -> tuple[Path, bool]:
    """The output's path and whether it is a single file: by its suffix, else as the base was given."""
    if out is None:
        return Path(f"{verb}.safetensors" if base.given_as_file else verb), base.given_as_file
    return check_name(out)


def check_name(out: str | os.PathLike[str]) -> tuple[Path, bool]:
    """A given output's path and whether it is a single file. Raises UsageError for what is never written."""
    path = Path(out)
    if path.name in ("", ".."):
        raise UsageError(f"{os.fspath(out)!r} names no file or folder of its own", remedy="name the output with -o")
    if path.suffix in (".gguf", ".bin", ".pt", ".pth", ".ckpt"):
        raise UsageError(
            f"{path.suffix} files are not written", culprit=str(path), remedy="name a folder or a .safetensors file"
        )
    return path, path.suffix == ".safetensors"


def check_path(path: Path, is_file: bool, inputs: list[Path], force: bool) -> None:
    """Refuse an output that is or holds an input, that exists without --force, or that --force must not replace."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(
            "there is no such folder to write into",
            culprit=str(parent),
            remedy="make it first, or name another output with -o",
        )
    for place in (path, partial_path(path), former_path(path)):
        if any(_holds(place, source) for source in inputs):
            raise UsageError(
                "the output would overwrite an input", culprit=str(path), remedy="name another output with -o"
            )
    if not os.path.lexists(path):
        return
    if path.is_symlink() or path.is_dir() is is_file:
        raise UsageError("exists and is of another kind than the output", culprit=str(path))
    if not is_file:
        if os.path.ismount(path):
            raise UsageError(
                "is a mount point, which no rename can replace", culprit=str(path), remedy="name a folder in it"
            )
        if not any(path.iterdir()):
            return
        foreign = foreign_file(path)
        if foreign:
            raise UsageError(
                f"holds {foreign}; --force replaces a model's files and nothing else",
                culprit=str(path),
                remedy="name another output with -o",
            )
    if not force:
        raise NeedsFlag(
            "exists already", culprit=str(path), remedy="add --force to replace it, or name another with -o"
        )


def _holds(place: Path, source: Path) -> bool:
    """Whether `source`, by name or through links, is `place` or lies in it."""
    places = {Path(os.path.abspath(place)), Path(os.path.realpath(place))}
    sources = {Path(os.path.abspath(source)), Path(os.path.realpath(source))}
    return any(there == here or here in there.parents for here in places for there in sources)


@dataclass(frozen=True)
class _Cut:
    """What one output file holds; `kept` is the shard whose layout it keeps, None where it is laid out anew."""

    name: str
    members: list[str]
    kept: WeightsFile | None


def plan_output(
    base: Checkpoint,
    path: Path,
    is_file: bool,
    provenance: str,
    changed: Collection[str],
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    edits: Edits | None = None,
    undo: bool = False,
) -> Output:
    """Lay out `base` anew at `path`, with other values in the tensors `changed`.

    `dtype` (a safetensors name) is taken by every float tensor of 16 bits or more. undo: with an undo file, and those
    of earlier merges under their next numbers. Raises UsageError for shards or a pipeline in a single file.
    """
    if is_file and (max_shard_bytes is not None or base.parts):
        what = "a pipeline" if base.parts else "--max-shard-size"
        raise UsageError(f"{what} needs a folder as output", remedy="name a folder with -o")
    edits = edits or Edits()
    specs = {name: _with_dtype(spec, dtype) for name, spec in {**base.specs, **edits.specs}.items()}
    files: tuple[OutputFile, ...] = ()
    extras: dict[str, bytes] = {}
    travels, not_copied = _side_files(base, is_file, edits)
    for part in base.models:
        own = {name: spec for name, spec in specs.items() if name.startswith(part.prefix)}
        planned, index = _plan_files(part, is_file, provenance, own, changed, max_shard_bytes)
        files, extras = (*files, *planned), {**extras, **index}
        config = edited_config(part.config, edits.config, TORCH_FLOATS[dtype] if dtype else None)
        if config != part.config and f"{part.prefix}config.json" in travels:
            extras[f"{part.prefix}config.json"] = encode_json(config)
            del travels[f"{part.prefix}config.json"]
    lost = specs.keys() - {name for file in files for name in file.begin}
    if lost:
        raise InputError("is in no component of the pipeline, so there is no file for it", culprit=min(lost))
    place = undo_path(path, is_file) if undo else None
    carried = (
        undo_files(undo_path(base.path if base.given_as_file else base.folder, base.given_as_file)) if undo else []
    )
    return Output(
        path,
        is_file,
        specs,
        files,
        extras,
        travels,
        tuple(name for name in not_copied if base.folder / name not in carried),
        provenance,
        place,
        {place.with_name(f"{place.name}.{i}"): origin for i, origin in enumerate(carried, 1)} if place else {},
    )


def _plan_files(
    base: Checkpoint,
    is_file: bool,
    provenance: str,
    specs: Mapping[str, TensorSpec],
    changed: Collection[str],
    max_shard_bytes: int | None,
) -> tuple[tuple[OutputFile, ...], dict[str, bytes]]:
    """The files with the tensors `specs`, and their index. A pipeline's component that stays keeps its very bytes."""
    if base.prefix and not base.shards:
        return (), {}
    anew = max_shard_bytes is not None or (is_file and len(base.shards) > 1)
    cuts = _cut_anew(base, specs, max_shard_bytes) if anew else _cut_as_base(base)
    if not anew:
        cuts[-1].members.extend(name for name in specs if name not in base.specs)
    indexed = not is_file and (len(cuts) > 1 or (base.index is not None and not anew))
    stays = base.prefix and not anew and specs == base.specs and not any(name in changed for name in specs)
    stays = stays and all(isinstance(shard, TensorFile) for shard in base.shards)
    own_provenance = {} if indexed or stays else {"loratool": provenance}
    files = tuple(_output_file(base, cut, specs, changed, own_provenance) for cut in cuts)
    if not indexed:
        return files, {}
    name, former = base.index or ("", {})
    name = name if name.endswith(".json") and ".safetensors." in name else f"{_stem(base)}.safetensors.index.json"
    content = (base.folder / name).read_bytes() if stays else _index(base, former, provenance, cuts, specs)
    return files, {base.prefix + name: content}


def _side_files(base: Checkpoint, is_file: bool, edits: Edits) -> tuple[dict[str, Path], list[str]]:
    """What travels by name, and what does not: beside a lone file without a config nothing is its own."""
    if is_file or (base.given_as_file and not base.config):
        return {}, []
    names, not_copied = survey_checkpoint(base)
    return {**{name: base.folder / name for name in names}, **edits.files}, not_copied


def _with_dtype(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    return TensorSpec(dtype, spec.shape) if dtype and spec.dtype in TORCH_FLOATS else spec


def _stem(base: Checkpoint) -> str:
    """The first part of loaders' file names: `model`, or diffusers' `diffusion_pytorch_model`."""
    return next((n.partition(".")[0] for n in SINGLE_NAMES if base.shards[0].path.name.startswith(n[:9])), "model")


def _shard_name(base: Checkpoint, shard: WeightsFile) -> str:
    """A shard's name in an output; torch's become those that loaders look for."""
    if isinstance(shard, TensorFile):
        return shard.path.name
    return (
        re.sub("^pytorch_model", "model", shard.path.stem) + ".safetensors"
        if base.index
        else f"{_stem(base)}.safetensors"
    )


def _cut_as_base(base: Checkpoint) -> list[_Cut]:
    if base.given_as_file:
        return [_Cut(SINGLE_NAMES[0], list(base.shards[0].specs), base.shards[0])]
    return [_Cut(_shard_name(base, shard), list(shard.specs), shard) for shard in base.shards]


def _cut_anew(base: Checkpoint, specs: Mapping[str, TensorSpec], max_bytes: int | None) -> list[_Cut]:
    """Shards cut in the base's order, with transformers' names."""
    groups = split_into_shards(specs, max_bytes)
    if len(groups) == 1:
        return [_Cut(f"{_stem(base)}.safetensors", groups[0], None)]
    names = [f"{_stem(base)}-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [_Cut(name, group, None) for name, group in zip(names, groups, strict=True)]


def _output_file(
    base: Checkpoint,
    cut: _Cut,
    specs: Mapping[str, TensorSpec],
    changed: Collection[str],
    provenance: Mapping[str, str],
) -> OutputFile:
    members = {name: specs[name] for name in cut.members}
    same = isinstance(cut.kept, TensorFile) and cut.kept.specs == members
    stale = (*STALE_METADATA, "loratool") if not same or any(name in changed for name in members) else ()
    if same and isinstance(cut.kept, TensorFile):
        header = edit_metadata(cut.kept.header, stale, provenance)
        shift = len(header) - cut.kept.data_start
        begin = {name: cut.kept.begin[name] + shift for name in members}
    else:
        former = (cut.kept or base.shards[0]).metadata or {"format": "pt"}
        metadata = {**{key: value for key, value in former.items() if key not in stale}, **provenance}
        own = {name.removeprefix(base.prefix): spec for name, spec in members.items()}
        header, placed = build_header(own, data_order(own), metadata)
        begin = {base.prefix + name: start for name, start in placed.items()}
    return OutputFile(
        base.prefix + cut.name, header, begin, len(header) + sum(spec.nbytes for spec in members.values())
    )


def _index(
    base: Checkpoint,
    former: Mapping[str, object],
    provenance: str,
    cuts: list[_Cut],
    specs: Mapping[str, TensorSpec],
) -> bytes:
    """The index JSON: the former one's fields and order, with the output's map, size and provenance."""
    metadata = former.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "loratool": provenance}
    metadata["total_size"] = sum(spec.nbytes for spec in specs.values())
    holder = {name.removeprefix(base.prefix): cut.name for cut in cuts for name in cut.members}
    order = former.get("weight_map", {})
    assert isinstance(order, dict)
    rest = sorted(name for name in holder if name not in order)
    return encode_json({**former, "metadata": metadata, "weight_map": {name: holder[name] for name in (*order, *rest)}})


@contextmanager
def open_output(output: Output) -> Iterator[dict[str, BinaryIO]]:
    """The output's weight files by name, sized and with their headers, to be filled by offset in any order.

    Where the output has an undo file, that is there under its own name, empty.

    When the block ends well all is synced, the side files and the index follow, and the output gets its name;
    when it does not, nothing stays. An error of the machine names the output.
    """
    with named(output.path), ExitStack() as stack:
        targets: dict[str, BinaryIO] = {}
        if output.is_file:
            stack.push(_without_undo(output))
            targets[output.files[0].name] = stack.enter_context(partial_file(output.path))
            if output.undo:  # entered last, so it has its name before the weights have theirs
                targets[output.undo.name] = stack.enter_context(partial_file(output.undo))
            for place, origin in output.carried.items():
                _copy_into(stack.enter_context(partial_file(place)), origin)
        else:
            folder = stack.enter_context(partial_folder(output.path))
            for file in output.files:
                (folder / file.name).parent.mkdir(exist_ok=True)
                targets[file.name] = stack.enter_context(open(folder / file.name, "w+b", buffering=0))
            if output.undo:
                targets[output.undo.name] = stack.enter_context(open(folder / output.undo.name, "w+b", buffering=0))
            for place, origin in output.carried.items():
                shutil.copyfile(origin, folder / place.name)
        for file in output.files:
            targets[file.name].truncate(file.nbytes)
            write_at(targets[file.name], memoryview(file.header), 0)
        yield targets
        if not output.is_file:
            for target in targets.values():
                os.fsync(target.fileno())
                target.close()  # Windows renames no folder with open files
            _write_side_files(output, folder)


def _without_undo(output: Output) -> Callable[[Any, Any, Any], None]:
    """What removes an undo file whose weights did not come."""

    def leave(kind: Any, *_: Any) -> None:
        if kind is not None and output.undo:
            output.undo.unlink(missing_ok=True)

    return leave


def _copy_into(target: BinaryIO, origin: Path) -> None:
    with open(origin, "rb") as source:
        shutil.copyfileobj(source, target)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An error of the machine that names no file names this output."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _write_side_files(output: Output, folder: Path) -> None:
    for name, origin in output.travels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, folder / name)
    for name, data in output.extras.items():
        write_file(folder / name, data)
