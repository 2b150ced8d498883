"""Check where an output may be written: what it may replace, and what it must not.

An output is renamed to its path, so anything at that path would be gone. A link there would be replaced, not its
target, and a mount point there would make the rename fail. Links and mounts above the path are followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ...durable.fileio import read_file
from ...durable.in_place import in_place_folder
from ...durable.partial import former_path, journal_head, journal_path, partial_path, scratch_path, set_aside
from ...errors import InputError, NeedsFlag, UsageError, shell_word
from ..checkpoint import Checkpoint
from ..folder.model_folder import component_names, is_pipeline
from ..folder.sentence_transformers import transformer_folder
from ..folder.side_files import CARD, CODE, INITIAL, MODELFILE, is_copy, is_undo_file, matches, side_row, undo_path
from ..folder.weight_changes import find_change
from ..stores.outgoing import MARKER
from .model_card import is_unedited
from .output import CONTAINERS, Output
from .undo_places import formers_of, identity, numbered_undo_files

# The weights and undo files in the output folders that loratool writes
FOREIGN_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index*.json",
    "*.gguf",
    "*pytorch_model*.bin",
    "*pytorch_model.bin.index.json",
    "loratool.undo*",
    MARKER,
    f"{INITIAL}/adapter_model.safetensors",
    f"{INITIAL}/adapter_config.json",
)


def find_foreign_file(folder: Path, origins: Collection[Path], contents: Mapping[str, bytes]) -> str | None:
    """Return the name of a file in an output folder that loratool does not write, and that --force must not remove.

    A text file of any name may be a copy or the user's own. It may be removed if its bytes are elsewhere too.

    Args:
        origins: folders with inputs: their files stay.
        contents: name of a side file that will be written again -> its content.
    """
    manifest = _manifest_of_change(folder)
    inner = component_names(folder) if is_pipeline(folder) else [transformer_folder(folder)]
    prefixes = tuple(f"{name}/" for name in inner if name)
    names, weights = [], False
    for name in _names_in(folder):
        inner_name = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
        if name != manifest and not _is_by_name(inner_name) and not _is_kept(folder, name, origins, contents):
            return name
        names.append(name)
        weights = weights or matches(inner_name, FOREIGN_WEIGHTS)
    return names[0] if names and not weights else None  # configs or scripts without weights are not an output of ours


def is_weights_of_ours(name: str) -> bool:
    """Return whether a name in an output folder is one that loratool gives to weights and undo files."""
    return matches(name, FOREIGN_WEIGHTS)


def _manifest_of_change(folder: Path) -> str | None:
    """Return the name of the JSON file that describes the weight update in a folder, if it has one."""
    with suppress(InputError):
        return getattr(find_change(folder), "manifest", None)
    return None


def _is_by_name(name: str) -> bool:
    """Return whether a file's name alone identifies it as one that loratool writes; a script's name does not."""
    row = side_row(name)
    return matches(name, (*FOREIGN_WEIGHTS, MODELFILE, "adapter_config.json")) or bool(
        row and row.always and row.kind != CODE
    )


def _is_kept(folder: Path, name: str, origins: Collection[Path], contents: Mapping[str, bytes]) -> bool:
    """Return whether a file's bytes are elsewhere under the same name, or are those of an unedited model card."""
    if not (folder / name).is_file() or (folder / name).is_symlink():
        return False
    if name == CARD and is_unedited(read_file(folder / name)):
        return True
    if name in contents:
        return read_file(folder / name) == contents[name]
    places = (place / name for place in origins if (place / name).is_file())
    return any(is_copy(folder / name, place) for place in places)


def _names_in(folder: Path) -> Iterator[str]:
    """Yield files, links and, with a slash, empty folders. Lazily, because a home directory has millions."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or not entry.is_dir():
            yield entry.name
        elif not any(entry.iterdir()):
            yield f"{entry.name}/"
        else:
            entries = (inner for inner in entry.rglob("*") if inner.is_symlink() or not inner.is_dir())
            yield from (inner.relative_to(folder).as_posix() for inner in entries)


# Suffixes of files that no container writes, and that are unlikely for a folder
OTHER_FILES = (".txt", ".json", ".yaml", ".gz", ".zip", ".tar", ".safetensor", ".npz", ".onnx")

# Suffixes of the single files that containers write
WEIGHTS = {suffix for suffixes in CONTAINERS.values() for suffix in suffixes}

# stat.S_IFMT type of a path -> its name
KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

FILE, FOLDER = KINDS[stat.S_IFREG], KINDS[stat.S_IFDIR]

OTHER = "name another output with -o"


def output_path(out: str | os.PathLike[str] | None, base: Checkpoint, command: str) -> tuple[Path, bool]:
    """Return the output's path and whether it is a single file.

    Without `out` the path is the command's name; it is a file if the base was given as a file.

    Raises:
        UsageError: the suffix is not that of the base's container.
    """
    if out is None:
        ending = CONTAINERS[base.container][0]
        return Path(f"{command}{ending}" if base.given_as_file else command), base.given_as_file
    return check_output_name(out, base.container)


def check_output_name(out: str | os.PathLike[str], container: str = "safetensors") -> tuple[Path, bool]:
    """Return the path of an output that the user named, and whether its suffix makes it a single file.

    Raises:
        UsageError: the suffix is not one of `container`, a key of CONTAINERS.
    """
    path, suffixes = Path(out), CONTAINERS[container]
    if os.fspath(out) == "-":
        message = "an output is written in any order and renamed when it is complete, and a stream cannot be"
        raise UsageError(message, culprit="-", remedy="name a file or a folder with -o")
    _require_name(os.fspath(out), "name the output with -o")
    if path.suffix in suffixes and os.path.basename(out) != path.name:
        raise UsageError(
            f"is a folder's name by its end, and a file's by {path.suffix}",
            culprit=os.fspath(out),
            remedy=f"name the file {shell_word(path)}, or a folder without {path.suffix}",
        )
    suffix = path.suffix.lower()
    if path.suffix not in suffixes and (suffix in WEIGHTS or (suffix in OTHER_FILES and not os.path.isdir(path))):
        raise UsageError(
            f"{path.suffix} is not a suffix of a {container} file",
            culprit=str(path),
            remedy=f"name a folder or a {suffixes[0]} file",
        )
    return path, path.suffix in suffixes


def check_place(path: Path, is_file: bool, inside: str = "merged", remedy: str = OTHER, option: str = "-o ") -> None:
    """Raise UsageError for a path that cannot become a file or folder, even with --force.

    The parent folder is missing or not writable, the name is too long, the path leads through itself, or
    something of another kind is at the path or where the output is built.

    Args:
        inside: a name to suggest for the output in a folder, if the path is a link to one or is mounted.
        option: the word before a path on the command line.
    """
    _require_name(os.fspath(path), remedy)
    parent = path.absolute().parent
    if os.path.exists(parent) and not os.path.isdir(parent):
        raise UsageError("is not a folder to write into", culprit=str(parent), remedy=remedy)
    if not os.path.exists(parent):
        message = "there is no such folder to write into"
        raise UsageError(message, culprit=str(parent), remedy=f"make it first, or {remedy}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError("nothing can be written into this folder", culprit=str(parent), remedy=remedy)
    _require_short(path, remedy)
    # out/../out is gone as soon as out is set aside
    through = [each for each in path.parents if each.name not in ("", "..")] if ".." in path.parts else []
    if path.exists() and any(each.samefile(path) for each in through):
        raise UsageError("leads through the folder that it names", culprit=str(path), remedy="name it without ..")
    kind, wanted = _kind(path), FILE if is_file else FOLDER
    leads_on = not is_file and path.is_dir()
    into = f"{option}{shell_word(path / inside)} writes into it, or {remedy}" if leads_on else remedy
    if kind not in (None, wanted):
        raise UsageError(f"is {kind}, which {wanted} would replace", culprit=str(path), remedy=into)
    if kind and os.path.ismount(path):
        raise UsageError("is a mount point, which no rename can replace", culprit=str(path), remedy=into)
    for place in (partial_path(path),) if is_file else _beside(path):
        _require_free(place, wanted)
        if is_file and os.path.lexists(place) and place.lstat().st_nlink > 1:  # which no run has left
            message = "is in the way: it is another name of a file, which would be emptied"
            raise UsageError(message, culprit=str(place), remedy="move it away")
    _require_free(journal_path(path), FOLDER)
    if os.path.isdir(in_place_folder(path)):  # False too for a name that is too long
        remedy = f"end that with loratool recover {shell_word(path)}, or {remedy}"
        raise UsageError("is the name of a model in the middle of a change in place", culprit=str(path), remedy=remedy)


def check_output_path(
    path: Path,
    is_file: bool,
    inputs: list[Path],
    force: bool,
    is_model: bool = False,
    contents: Mapping[str, bytes] | None = None,
    dry_run: bool = False,
) -> bool:
    """Check an output path before anything is written; return whether a dry run found an output to replace.

    Args:
        inputs: files that the output must not replace.
        force: whether an existing output may be replaced. A folder with files that are not a model's never is.
        is_model: whether the output is a model, not an adapter. Only a model may replace a merged model that has an
            undo file (see `check_undo_files`).
        contents: name of a side file that will be written -> its content, as far as known.
        dry_run: return True where the output exists instead of raising NeedsFlag.

    Raises:
        UsageError: the path cannot be the output.
        NeedsFlag: it can with --force.
    """
    if _find_reached((path, *_beside(path), journal_path(path)), inputs):
        raise UsageError("the output would overwrite an input", culprit=str(path), remedy=OTHER)
    check_place(path, is_file, "merged" if is_model else "adapter")
    if not is_file and not force and not dry_run and (former := set_aside(path)):
        raise NeedsFlag(
            f"exists already, as {former.name}: a run was killed while it replaced it",
            culprit=str(path),
            flags="--force",
            why="to replace it, or name another with -o",
        )
    if not os.path.lexists(path):
        return dry_run and not force and not is_file and set_aside(path) is not None
    if not is_file:
        if not any(path.iterdir()):
            return False
        origins = {place for source in inputs for place in (source.parent, source.parent.parent)}
        foreign = find_foreign_file(path, origins, contents or {})
        if foreign:
            what = f"holds {foreign}; --force replaces a model's files and nothing else"
            raise UsageError(what, culprit=str(path), remedy=OTHER)
    first = undo_path(path, True)
    if is_file and not is_model and (is_undo_file(first) or formers_of(first)):
        why = f"is a merged model, and its undo file {first.name} would be left beside an adapter"
        raise UsageError(why, culprit=str(path), remedy=OTHER)
    if not force and not dry_run:
        raise NeedsFlag(
            "exists already", culprit=str(path), flags="--force", why="to replace it, or name another with -o"
        )
    return not force


def check_undo_files(output: Output, inputs: Collection[Path], force: bool) -> None:
    """Check that an output's undo files replace neither an input nor a foreign file, nor any file without --force.

    Raises:
        UsageError: they would replace an input or a file that is not an undo file.
        NeedsFlag: there are undo files beside the output, and `force` is False. Undo files that a run renamed before
            it died are allowed when it is resumed.
    """
    if not output.has_undo_beside:
        return
    mine, first = output.undo_places, undo_path(output.path, True)
    existing = dict.fromkeys((*numbered_undo_files(first), *formers_of(first).values()))
    read = (*inputs, *output.carried.values())
    for place in mine:
        _require_short(place, OTHER)
        if _kind(place) and not is_undo_file(place):
            raise UsageError("is in the way of an undo file, and is not one", culprit=str(place), remedy="move it away")
    for place in dict.fromkeys((*mine, *existing)):
        if reached := _find_reached((place, partial_path(place), former_path(place)), read):
            raise UsageError("the output would replace this input", culprit=str(reached), remedy=OTHER)
        _require_free(partial_path(place), FILE)
        _require_free(former_path(place), FILE)
    goes_on = output.resume and journal_head(output.path).exists() and not os.path.lexists(output.path)
    for place in (*mine, *existing):
        if not (force or goes_on) and os.path.lexists(place):
            raise NeedsFlag("exists already", culprit=str(place), flags="--force", why="to replace it")


def require_outside(page: Path, output: Path, option: str = "--html") -> None:
    """Raise UsageError for a page at the path of an output or in its folder, which will be replaced."""
    if _find_reached((output, *_beside(output), journal_path(output)), [page]):
        message = f"is in the output {output}, which is replaced as a unit"
        raise UsageError(message, culprit=str(page), remedy=f"name a file elsewhere with {option}")


def check_scratch(path: Path, inputs: Collection[Path]) -> None:
    """Raise UsageError if an input, or anything that is not a folder, is at the path of an output's scratch folder."""
    place = scratch_path(path)
    if _find_reached((place,), inputs):
        raise UsageError("holds an input, and would be emptied", culprit=str(place), remedy=OTHER)
    _require_free(place, FOLDER)


def _beside(path: Path) -> tuple[Path, ...]:
    """Return the paths where an output is built, and where the former one is set aside."""
    return partial_path(path), former_path(path)


def _kind(path: Path) -> str | None:
    """Return the kind of a path without following links, a name in KINDS; None if nothing is there."""
    if not os.path.lexists(path):
        return None
    return KINDS.get(stat.S_IFMT(path.lstat().st_mode), "of an unknown kind")


def _require_free(place: Path, wanted: str) -> None:
    """Raise UsageError if something of another kind is at `place`. One of its kind is from a killed run."""
    kind = _kind(place)
    if kind not in (None, wanted):
        raise UsageError(f"is in the way: it is {kind}", culprit=str(place), remedy="move it away")


def _require_name(path: str, remedy: str) -> None:
    """Raise UsageError for a path without a last name: nothing could be renamed to it."""
    if Path(path).name in ("", ".."):
        raise UsageError(f"{path!r} names no file or folder of its own", remedy=remedy)


def _require_short(path: Path, remedy: str) -> None:
    """Raise UsageError for a name that is too long for the file system with the suffixes of partial outputs."""
    for place in (partial_path(path), former_path(path)):
        try:
            os.lstat(place)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                added = f"{place.name.removeprefix(path.name)}, which is added while it is written"
                message = f"has a name of {len(os.fsencode(path.name))} bytes, too long with {added}"
                raise UsageError(message, culprit=str(path), remedy=f"shorten it, or {remedy}") from error


def _find_reached(places: Iterable[Path], sources: Iterable[Path]) -> Path | None:
    """Return the first of the places that a source is or is in, also through links, hard links or another case."""
    ways = {step for source in sources for step in _steps_to(source)}
    names, identities = {_own_name(step) for step in ways}, {identity(step) for step in ways} - {None}
    return next((place for place in places if _own_name(place) in names or identity(place) in identities), None)


def _steps_to(path: Path) -> Iterable[Path]:
    """Yield a file and the folders and links above it, both as named and as resolved."""
    for start in (path.absolute(), Path(os.path.realpath(path))):
        yield start
        yield from (
            step for step, below in zip(start.parents, (start, *start.parents), strict=False) if below.name != ".."
        )


def _own_name(path: Path) -> Path:
    """Return a path with its parent resolved, but not itself."""
    return Path(os.path.realpath(path.parent), path.name)
