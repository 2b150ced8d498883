"""Write a signature's file as OpenSSF model-signing does (tests/commands/inspect/test_inspect_files.py holds it
against that program), with any digests: nothing that only reads it has the key."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_envelope(statement: Mapping[str, Any]) -> dict[str, Any]:
    """A statement in a sigstore bundle."""
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    envelope = {
        "payload": payload,
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": "", "keyid": ""}],
    }
    material = {"publicKey": {"hint": "0" * 64}, "tlogEntries": []}
    media_type = "application/vnd.dev.sigstore.bundle.v0.3+json"
    return {"mediaType": media_type, "verificationMaterial": material, "dsseEnvelope": envelope}


def signed(name: str, digests: Mapping[str, str], **serialization: str) -> dict[str, Any]:
    """The statement of a signature about the files of a model."""
    whole = hashlib.sha256(b"".join(map(bytes.fromhex, digests.values()))).hexdigest()
    resources = [{"name": file, "algorithm": "sha256", "digest": digest} for file, digest in digests.items()]
    how = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, **serialization}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": whole}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"serialization": how, "resources": resources},
    }


def write_signature(folder: Path, *others: str) -> Path:
    """Sign all files of a folder, and some that are not there."""
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    digests = {each.relative_to(folder).as_posix(): sha256_of(each) for each in files}
    place = folder / "model.sig"
    place.write_text(json.dumps(in_envelope(signed(folder.name, digests | dict.fromkeys(others, "0" * 64)))))
    return place
