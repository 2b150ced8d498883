"""Read and write in-toto statements (https://in-toto.io/Statement/v1), and find the files that they name.

A statement can be in the envelope of a signature (DSSE, or a sigstore bundle around it). No signature is verified here:
that needs keys or an identity, which other tools have. A statement is a stranger's text. So its size, its number of
files, its digests and its names are checked before any file is opened, and no name leads out of the model's folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable.fileio import file_length, open_for_reading, sha256_file, size
from ..errors import InputError, LoratoolError, brief
from ..files.containers.safetensors_file import parse_json
from ..files.hub.names import pinned_name

TYPE = "https://in-toto.io/Statement/v1"

PROVENANCE = "https://slsa.dev/provenance/v1"

MODEL_SIGNING = "https://model_signing/signature/v1.0"

BUILD_TYPE = "urn:loratool:recipe:v1"  # externalParameters are a recipe of one step

BUILDER = "urn:loratool"

MODEL_DIGEST = "loratoolModel"  # the name of `files.digest` in a set of digests

PAYLOAD_TYPE = "application/vnd.in-toto+json"

CONFIG_DIGEST = "loratoolConfig"  # the sha256 of an adapter's config, which has its alpha

LARGEST = 1 << 23  # bytes of a statement's file

MOST_FILES = 10_000  # that a statement names

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Statement:
    """A statement whose form is checked.

    Attributes:
        subjects: what it is about: name -> sha256. In provenance these are files, by names relative to their folder.
    """

    path: Path
    subjects: Mapping[str, str]
    predicate_type: str
    predicate: Mapping[str, Any]

    def refuse(self, what: str, remedy: str | None = None) -> InputError:
        """Return the error for a content that is not believed."""
        return InputError(what, culprit=str(self.path), remedy=remedy)


def read_statement(path: Path) -> Statement:
    """Read a statement, plain or in an envelope.

    Raises:
        InputError: it is none, is too large, or its subjects have no sha256, or one name twice.
    """
    value = parse_json(_read(path), path, finite=True)
    envelope = value.get("dsseEnvelope", value)
    if isinstance(envelope, dict) and "payload" in envelope:
        value = parse_json(_payload(envelope, path), path, finite=True)
    kind, predicate, subjects = (value.get(key) for key in ("predicateType", "predicate", "subject"))
    if value.get("_type") != TYPE or not isinstance(kind, str) or not isinstance(predicate, dict):
        raise InputError("is not an in-toto statement", culprit=str(path))
    return Statement(path, _digests(subjects, "subject", path), kind, predicate)


def _read(path: Path) -> bytes:
    with open_for_reading(path) as file:
        nbytes = file_length(file)
        data = file.read(LARGEST + 1) if nbytes <= LARGEST else b""
    if nbytes > LARGEST or len(data) > LARGEST:
        raise InputError(f"is {size(nbytes)}; a statement has at most {size(LARGEST)}", culprit=str(path))
    return data


def _payload(envelope: Mapping[str, Any], path: Path) -> bytes:
    payload = envelope["payload"]
    try:
        if envelope.get("payloadType") == PAYLOAD_TYPE and isinstance(payload, str):
            return base64.b64decode(payload, validate=True)
    except ValueError:
        pass
    raise InputError("is an envelope without an in-toto statement", culprit=str(path))


def _digests(listed: Any, what: str, path: Path) -> dict[str, str]:
    """Return the sha256 of each name in a list of in-toto's resource descriptors."""
    if not isinstance(listed, list) or not listed:
        raise InputError(f"names no {what}", culprit=str(path))
    if len(listed) > MOST_FILES:
        raise InputError(f"names {len(listed):,} files; at most {MOST_FILES:,} are read", culprit=str(path))
    found: dict[str, str] = {}
    for each in listed:
        name = each.get("name") if isinstance(each, dict) else None
        if not isinstance(name, str) or not name:
            raise InputError(f"has a {what} without a name", culprit=str(path))
        if name in found:
            raise InputError(f"names {brief(name)} twice", culprit=str(path))
        found[name] = sha256_in(each.get("digest"), brief(name), path)
    return found


def sha256_in(digests: Any, name: str, path: Path) -> str:
    """Return the sha256 in a set of digests. Raise InputError if there is none, or it is no sha256."""
    digest = digests.get("sha256") if isinstance(digests, dict) else None
    if digest is None:
        others = f", but {brief(', '.join(digests))}" if isinstance(digests, dict) and digests else ""
        raise InputError(f"has no sha256 of {name}{others}", culprit=str(path))
    return require_sha256(digest, name, path)


def require_sha256(digest: Any, name: str, path: Path) -> str:
    """Return a digest. Raise InputError if it is not the 64 lowercase digits of a sha256."""
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise InputError(f"has {brief(digest)} as the sha256 of {name}", culprit=str(path))
    return digest


def signed_files(statement: Statement) -> dict[str, str]:
    """Return the files that a signature of OpenSSF model-signing is about: name -> sha256. A single file is `.`.

    Raises:
        InputError: it is of another kind, hashes otherwise than whole files by sha256, or contradicts itself.
    """
    if statement.predicate_type != MODEL_SIGNING:
        raise statement.refuse(f"is {brief(statement.predicate_type)}, not a signature of model-signing")
    serialization, listed = (statement.predicate.get(key) for key in ("serialization", "resources"))
    method = serialization.get("method") if isinstance(serialization, dict) else None
    if method != "files":
        raise statement.refuse(f"hashes by {brief(method)}, and only whole files are compared")
    resources = listed if isinstance(listed, list) else []
    described = [
        {"name": each.get("name"), "digest": {str(each.get("algorithm")): each.get("digest")}}
        for each in resources
        if isinstance(each, dict)
    ]
    files = _digests(described, "file", statement.path)
    whole = hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()
    if [*statement.subjects.values()] != [whole]:
        raise statement.refuse("contradicts itself: its digest is not that of the files that it names")
    return files


def place_of(statement: Statement, name: str, folder: Path) -> Path:
    """Return the path of a file that a statement names, inside `folder`. It may not exist.

    Raises:
        InputError: the name is absolute, leads out of the folder by itself or through a link, or is not one name.
    """
    parts = name.split("/")
    unsafe = not name.isprintable() or "\\" in name or (os.name == "nt" and ":" in name)
    if unsafe or os.path.isabs(name) or any(part in ("", ".", "..") for part in parts):
        raise statement.refuse(f"names {brief(name)}, which is no file in a folder")
    place = folder.joinpath(*parts)
    try:
        real, inside = Path(os.path.realpath(place)), Path(os.path.realpath(folder))
    except (OSError, ValueError) as error:
        raise statement.refuse(f"names {brief(name)}, which is no file in a folder") from error
    if pinned_name(folder):  # of the hub's cache, whose files are links into the folder of all commits
        inside = next(each for each in inside.parents if each.name.startswith("models--"))
    if not real.is_relative_to(inside):
        raise statement.refuse(f"names {brief(name)}, which is a link out of {folder}")
    return place


def hash_of(place: Path) -> str | None:
    """Return the sha256 of a file. None if there is no file."""
    try:
        return sha256_file(place) if place.is_file() else None
    except OSError:  # a name that no file system has
        return None


def encode_statement(subjects: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
    """Return a statement of provenance. The same values give the same bytes."""
    listed = [{"name": name, "digest": {"sha256": subjects[name]}} for name in sorted(subjects)]
    value = {"_type": TYPE, "subject": listed, "predicateType": PROVENANCE, "predicate": predicate}
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def is_statement(path: Path) -> bool:
    """Return whether a file is a statement, which `--force` may replace."""
    try:
        return bool(read_statement(path))
    except LoratoolError:
        return False
