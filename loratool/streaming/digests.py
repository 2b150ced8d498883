"""Hash the tensors of files for their digest, two pieces at a time on each thread."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from itertools import islice

from ..files.digest import digest_of, pieces_of, tensors_of
from ..files.weights_file import WeightsFile, read_parts
from ..numerics.passes.hashes import sha256_each
from .parallel import Progress, map_in_order, worker_count

Piece = tuple[WeightsFile, str, int, int]  # file, tensor, first byte, length


def digest_of_files(files: Iterable[WeightsFile], progress: Progress | None = None) -> str:
    """Return the digest of all tensors in files on disk, as `files.digest` defines it."""
    tensors = tensors_of(files)
    pieces: list[Piece] = [
        (file, name, *place) for name, file in tensors.items() for place in pieces_of(file.specs[name])
    ]
    pairs = [pieces[k : k + 2] for k in range(0, len(pieces), 2)]
    hashes, done, total = list[str](), 0, sum(nbytes for *_, nbytes in pieces)
    with closing(map_in_order(_hash_pieces, pairs, worker_count())) as results:
        for pair, found in zip(pairs, results, strict=True):
            hashes += found
            done += sum(nbytes for *_, nbytes in pair)
            if progress:
                progress(done, total)
    left = iter(hashes)
    specs = ((name, file.specs[name]) for name, file in tensors.items())
    return digest_of((name, spec, islice(left, len(pieces_of(spec)))) for name, spec in specs)


def _hash_pieces(pieces: list[Piece]) -> list[str]:
    return sha256_each([read_parts(*piece) for piece in pieces])
