"""The digest of a model or an adapter: one sha256 of its tensors, however they are divided among files.

It is the sha256 of a line for each tensor, `name TAB dtype TAB shape TAB hash NEWLINE`, sorted by the UTF-8 bytes of
the names. The dtype is spelled as in safetensors, or as in ggml for blocks of codes; the shape is `2,3`, and empty for
a scalar. The hash is the sha256 of the hashes, of 32 bytes each, of the stored bytes in pieces of 2^24. An empty tensor
has no piece. Codes count as they are stored. Names that share their bytes in a file count once, under the first name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from typing import Protocol, TypeVar

from ..errors import InputError
from .dtypes import TensorSpec

PIECE = 1 << 24  # bytes


class HasSpecs(Protocol):
    """A file whose tensors are known."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def storage(self, name: str) -> Hashable: ...


F = TypeVar("F", bound=HasSpecs)


def tensors_of(files: Iterable[F]) -> dict[str, F]:
    """Return the tensors that count in a digest, and the file of each, sorted by name.

    Raises:
        InputError: a name has a tab or a line break, which would be another tensor's line, or is no Unicode.
    """
    found: dict[str, F] = {}
    for file in files:
        seen = set[object]()
        for name in sorted(file.specs, key=_key):
            spec = file.specs[name]
            place = (file.storage(name), spec) if spec.nbytes else name
            if place not in seen:
                seen.add(place)
                found[name] = file
    return {name: found[name] for name in sorted(found, key=_key)}


def has_digest(names: Iterable[str]) -> bool:
    """Return whether tensors of these names have a digest."""
    try:
        for name in names:
            _key(name)
    except InputError:
        return False
    return True


def _key(name: str) -> bytes:
    try:
        key = name.encode()
    except UnicodeEncodeError:
        raise InputError("has a name that is no Unicode, so it has no digest", culprit=repr(name)) from None
    if b"\t" in key or b"\n" in key:
        raise InputError("has a tab or a line break in its name, so it has no digest", culprit=name)
    return key


def pieces_of(spec: TensorSpec) -> list[tuple[int, int]]:
    """Return the first byte and the length of each piece of a tensor."""
    return [(first, min(PIECE, spec.nbytes - first)) for first in range(0, spec.nbytes, PIECE)]


def digest_of(tensors: Iterable[tuple[str, TensorSpec, Iterable[str]]]) -> str:
    """Return the digest of tensors, in hexadecimal.

    Args:
        tensors: sorted by name, each with the hashes of its pieces, in hexadecimal.
    """
    whole = hashlib.sha256()
    for name, spec, hashes in tensors:
        data, shape = bytes.fromhex("".join(hashes)), ",".join(map(str, spec.shape))
        whole.update(f"{name}\t{spec.dtype}\t{shape}\t{hashlib.sha256(data).hexdigest()}\n".encode())
    return whole.hexdigest()
