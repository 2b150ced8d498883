"""Open the base of an earlier merge from the merged model, for a merge that replaces its adapters.

The small files of the base are in the undo file or in the merged model. They are put in a temporary folder, so that
the base is read as from its own folder; its weights are computed where they are read (`streaming.restored`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ...adapters.adapter import Adapter
from ...binding.modules.module_weights import spell_weight
from ...durable import disk
from ...durable.fileio import copy_file, sampled, write_file
from ...durable.in_place import ModelInPlace
from ...errors import InputError, MachineError, NeedsFlag, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.containers.safetensors_file import TensorFile
from ...files.folder.side_files import CARD, is_of_whole, undo_path
from ...files.output.output import Output
from ...files.weights_file import paths_of
from ...streaming.restored import RestoredBase, RestoredTensors, restored_files, restored_tensors
from ...undo.reader import UndoFile
from ...views.parts.writing import command_line
from ..adapter_requests import AdapterRequest, parse_adapters
from ..arguments import parse_words
from ..inputs import refuse_adapter
from ..merged_models import find_undo, match_adapters, require_names, require_written
from .call import Merge

WITHOUT_UNDO = "merge the new adapter into the base, if you have it"


@dataclass(frozen=True)
class FormerMerge:
    """The merge whose adapters are replaced.

    Attributes:
        name: of the merged model, as the call has it.
        adapters: in the order of its undo file.
    """

    name: str
    base: RestoredBase
    adapters: tuple[Adapter, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def paths(self) -> list[Path]:
        """Return the paths of the undo file and of the adapters, which no output may replace."""
        return [self.base.undo.path, *paths_of(adapter.file for adapter in self.adapters)]

    @property
    def described(self) -> dict[str, str]:
        """Return what the journal's call has of the undo file."""
        undo = self.base.undo
        return {"undo": f"{undo.path.name} ({sampled(undo.file)[:16]})"}

    def carry_undo(self, output: Output) -> Output:
        """Return an output that gets the undo files of earlier merges, as from the base."""
        place, earlier = output.undo, self.base.earlier
        if place is None:
            return output
        return replace(output, carried={place.with_name(f"{place.name}.{i}"): o for i, o in enumerate(earlier, 1)})

    def digests(self, of_merge: Mapping[str, str]) -> dict[str, str]:
        """Return the digests of a swap from those of the merge into the base, which has the merged model's name."""
        return {name: self.base.merged_digest() if name == self.name else each for name, each in of_merge.items()}


def open_former(call: Merge, opened: ExitStack, at: ModelInPlace | None = None) -> FormerMerge:
    """Open the base of the merge whose adapters are replaced, and these; `opened` closes their files.

    Args:
        at: the merged model while it is changed in place.

    Raises:
        UsageError: the call has options that a swap cannot have.
        InputError: there is no undo file, the adapters are not those of the merge, the model was edited since, or the
            base is of a kind that only `unmerge` restores.
    """
    assert call.replace is not None
    if call.attest is not None:
        raise UsageError("--replace and --attest exclude each other", remedy="unmerge, then merge with --attest")
    requests = parse_adapters(call.replace, parse_words(call.drop))
    merged = open_checkpoint(at.model if at else call.base)
    opened.callback(merged.close)
    refuse_adapter(merged, call.base, "the first argument must be a merged model", requests)
    beside = undo_path(at.path, is_file=True) if at and merged.given_as_file else None  # it stays at its place
    chain = find_undo(merged, beside, WITHOUT_UNDO)
    undo = UndoFile(chain[0])
    opened.callback(undo.close)
    adapters = _match(undo, requests, call.alpha, opened, merged)
    _require_plain(merged, undo, call)
    require_names(merged, undo, [shard["name"] for shard in undo.index["shards"]])
    require_written(merged, undo)
    tensors = restored_tensors(merged, undo, adapters)
    try:
        folder = Path(opened.enter_context(disk.temporary_folder()))
        checkpoint = _open_base(tensors, folder, chain)
    except OSError as error:
        raise MachineError(
            f"the small files of its base cannot be put into a temporary folder: {error.strerror or error}",
            culprit=str(merged.path.absolute()),
            remedy="name another folder for them in TMPDIR",
        ) from error
    return FormerMerge(os.fspath(call.base), RestoredBase(checkpoint, tensors, tuple(chain[1:])), tuple(adapters))


def _match(
    undo: UndoFile, requests: Sequence[AdapterRequest], alpha: float | None, opened: ExitStack, merged: Checkpoint
) -> list[Adapter]:
    """Return the adapters of the merge; only those that do not store their alpha get `alpha`."""
    try:
        return match_adapters(undo, requests, None, opened, merged)
    except NeedsFlag as error:
        if alpha is None or not error.asks_for("--alpha"):
            raise
        return match_adapters(undo, requests, alpha, opened, merged)


def _require_plain(merged: Checkpoint, undo: UndoFile, call: Merge) -> None:
    """Raise InputError unless the weights that the merge changed are plain numbers in safetensors files."""
    remedy = f"unmerge, then merge: {command_line('unmerge', call.base, _words(call))}"
    if undo.layers:
        message = "repeats layers of its base (layer_replication), which --replace does not read"
        raise InputError(message, culprit=os.fspath(call.base), remedy=remedy)
    kinds = {layout.container if layout else "torch" for layout in undo.layouts} - {"safetensors"}
    if kinds or not all(isinstance(shard, TensorFile) for shard in merged.shards):
        kind = kinds.pop() if kinds else "torch"
        raise InputError(
            f"has {kind} files, which --replace does not read", culprit=os.fspath(call.base), remedy=remedy
        )
    for name, entry in undo.index["tensors"].items():
        if "coded" in entry or "recoded" in entry:
            kind = (entry.get("coded") or entry["recoded"])["codec"]
            message = f"is quantized in the base ({kind}), and --replace restores plain numbers only"
            raise InputError(message, culprit=name, remedy=remedy)


def _words(call: Merge) -> list[str]:
    """Return the adapters to replace as words of the command line."""
    words = []
    for each in parse_adapters(call.replace or ()):
        weight = spell_weight(each.weight, tuple(each.module_weights.items()))
        words.append(each.path if weight == "1" else f"{each.path}:{weight}")
    return words


def _open_base(tensors: RestoredTensors, folder: Path, chain: Collection[Path]) -> Checkpoint:
    """Open the base. `folder` gets its small files, and nothing of its weights."""
    merged, undo = tensors.merged, tensors.undo
    inner = f"{merged.folder.name}/" if merged.outer else ""

    def placed(name: str) -> str:
        return name if is_of_whole(name) else inner + name

    texts = {placed(name): data for name, data in undo.side.items()}
    own = {CARD, *map(placed, undo.index["new_side"])}
    own |= {inner + part.prefix + name for part in merged.models for name in part.weight_files}
    own |= {os.path.relpath(path, merged.root) for path in chain}
    if merged.has_side_files:
        _link_files(merged.root, folder, "", {*texts, *own})
    files = {inner + name: file for name, file in restored_files(tensors, merged.folder).items()}
    for name, data in {**texts, **dict.fromkeys(files, b"")}.items():
        disk.make_folder((folder / name).parent)
        write_file(folder / name, data)
    by_path: Mapping[Path, TensorFile] = {folder / name: file for name, file in files.items()}
    base = open_checkpoint(folder / next(iter(files)) if undo.index["file"] else folder, by_path.__getitem__)
    for path in by_path:
        disk.unlink(path)  # it only had the name of a weights file
    return base if base.outer else replace(base, path=merged.path)


def _link_files(origin: Path, folder: Path, prefix: str, besides: Collection[str]) -> None:
    """Link the files and folders of one folder in another.

    Args:
        prefix: the path of `origin` in the first folder, with a slash.
        besides: paths that are left out.
    """
    for entry in sorted(origin.iterdir()):
        name = prefix + entry.name
        if name in besides:
            continue
        if entry.is_dir() and any(other.startswith(f"{name}/") for other in besides):
            disk.make_folder(folder / name)
            _link_files(entry, folder, f"{name}/", besides)
            continue
        try:
            disk.symlink(entry.absolute(), folder / name)
        except OSError:  # on Windows only some users may
            _copy(entry, folder / name)


def _copy(origin: Path, new: Path) -> None:
    """Copy a file, or a folder with all that is in it."""
    if not origin.is_dir():
        copy_file(origin, new)
        return
    disk.make_folder(new)
    for entry in sorted(origin.iterdir()):
        _copy(entry, new / entry.name)
