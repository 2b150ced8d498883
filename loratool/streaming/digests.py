"""Hash tensors by pieces, for digests and undo files: those of files on disk, and those that a rewrite reads or writes.

`files.digest` defines the pieces and the digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

from ..files.digest import PIECE, digest_of, pieces_of, tensors_of
from ..files.weights_file import WeightsFile, read_parts
from ..numerics.passes.hashes import sha256_each
from .parallel import Progress, map_in_order, worker_count

Piece = tuple[WeightsFile, str, int, int]  # file, tensor, first byte, length

SMALL = 1 << 18  # bytes of pieces that are hashed in one task, since a task costs as much as so many bytes


def digest_of_files(files: Iterable[WeightsFile], progress: Progress | None = None) -> str:
    """Return the digest of all tensors in files on disk, as `files.digest` defines it."""
    tensors = tensors_of(files)
    pieces: list[Piece] = [
        (file, name, *place) for name, file in tensors.items() for place in pieces_of(file.specs[name])
    ]
    hashes = iter(hash_pieces(pieces, worker_count(), progress))
    specs = ((name, file.specs[name]) for name, file in tensors.items())
    return digest_of((name, spec, islice(hashes, len(pieces_of(spec)))) for name, spec in specs)


def hashes_of_tensors(files: Mapping[str, WeightsFile], names: Iterable[str], workers: int) -> dict[str, list[str]]:
    """Return the sha256 of the pieces of some tensors. files: a tensor -> the file that has it."""
    hashes: dict[str, list[str]] = {name: [] for name in names}
    pieces: list[Piece] = [
        (files[name], name, *piece) for name in hashes for piece in pieces_of(files[name].specs[name])
    ]
    for (_, name, *_), sha256 in zip(pieces, hash_pieces(pieces, workers), strict=True):
        hashes[name].append(sha256)
    return hashes


def hash_pieces(pieces: list[Piece], workers: int, progress: Progress | None = None) -> list[str]:
    """Return the sha256 of each piece, computed by `workers` threads; large pieces by two at a time."""
    groups = list(_grouped(pieces))
    hashes, done, total = list[str](), 0, sum(nbytes for *_, nbytes in pieces)
    with closing(map_in_order(_hash_each, groups, workers)) as results:
        for group, found in zip(groups, results, strict=True):
            hashes += found
            done += sum(nbytes for *_, nbytes in group)
            if progress:
                progress(done, total)
    return hashes


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield groups of two pieces or of more than SMALL bytes, whichever are more."""
    group, nbytes = list[Piece](), 0
    for piece in pieces:
        group.append(piece)
        nbytes += piece[-1]
        if len(group) > 1 and nbytes > SMALL:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


def _hash_each(pieces: list[Piece]) -> list[str]:
    if sum(nbytes for *_, nbytes in pieces) > SMALL:
        return sha256_each([read_parts(*piece) for piece in pieces])
    found, buffer = [], memoryview(bytearray(SMALL))
    for file, name, first, nbytes in pieces:
        file.read_bytes(name, first, buffer[:nbytes])
        found.append(hashlib.sha256(buffer[:nbytes]).hexdigest())
    return found


@dataclass(frozen=True)
class TensorHashes:
    """The hashes of tensors that a rewrite computes on the way.

    Attributes:
        read: the tensors whose stored bytes are hashed, and the file of each.
        written: the tensors of the output that are hashed once they are written.
        of_read, of_written: a tensor's name -> the hashes of its pieces, when the rewrite has ended.
    """

    read: Mapping[str, WeightsFile]
    written: Collection[str]
    of_read: dict[str, list[str]] = field(init=False, default_factory=dict)
    of_written: dict[str, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.of_read.update((name, [""] * len(pieces_of(file.specs[name]))) for name, file in self.read.items())


class WrittenPieces:
    """Hashes tensors of an output in threads, each piece once all of it is written, while it is in the page cache.

    Args:
        tensors: name -> the file that is written.
    """

    def __init__(self, tensors: Mapping[str, WeightsFile], workers: int) -> None:
        self._tensors, self._workers = tensors, workers
        self._left = {name: [size for _, size in pieces_of(file.specs[name])] for name, file in tensors.items()}
        self._hashes = {name: [""] * len(left) for name, left in self._left.items()}
        self._ready: list[tuple[str, int]] = []  # tensors, and numbers of pieces
        self._nbytes = 0  # of these
        self._done = set[tuple[str, int]]()  # those that are hashed
        self._pool = ThreadPoolExecutor(workers)
        self._runs: list[tuple[list[tuple[str, int]], Future[list[str]]]] = []

    def wrote(self, tensor: str, first: int, nbytes: int) -> None:
        """Count bytes of a tensor as written, from byte `first` on; no byte is written twice."""
        left = self._left.get(tensor)
        if left is None:
            return
        for part in range(first // PIECE, -(-(first + nbytes) // PIECE)):
            left[part] -= min(first + nbytes, (part + 1) * PIECE) - max(first, part * PIECE)
            if not left[part]:
                self._ready.append((tensor, part))
                self._nbytes += self._piece(tensor, part)[-1]
        if len(self._ready) > 1 and self._nbytes > SMALL:
            some, self._ready, self._nbytes = self._ready, [], 0
            run = self._pool.submit(_hash_each, [self._piece(*each) for each in some])
            run.add_done_callback(lambda _: self._done.update(some))
            self._runs.append((some, run))

    def is_hashed(self, tensor: str, first: int, end: int) -> bool:
        """Return whether the pieces with the bytes first:end of a tensor are hashed."""
        parts = range(first // PIECE, -(-end // PIECE))
        return tensor not in self._left or all((tensor, part) in self._done for part in parts)

    def _piece(self, tensor: str, part: int) -> Piece:
        file = self._tensors[tensor]
        return file, tensor, *pieces_of(file.specs[tensor])[part]

    def finish(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the hashes of these tensors' pieces, when they are written, also what `wrote` was not told of."""
        found = {name: self._hashes[name] for name in names if name in self._hashes}
        for some, run in self._runs:
            for (tensor, part), sha256 in zip(some, run.result(), strict=True):
                self._hashes[tensor][part] = sha256
        rest = [(name, part) for name, hashes in found.items() for part, sha256 in enumerate(hashes) if not sha256]
        for (name, part), sha256 in zip(
            rest, hash_pieces([self._piece(*each) for each in rest], self._workers), strict=True
        ):
            self._hashes[name][part] = sha256
        return found

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
