"""Hold memory and time against files that are small on the disk and large once read, each at what the formats allow."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable

import hostile_pickles as hostile
import pytest
from fuzzing import Case, Fuzzer
from valid_files import everything

MB = 10**6


def entries(count: int) -> bytes:
    """Return a zip64 archive that lists one entry under many names."""
    local = b"PK\x03\x04" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"x"
    fixed = b"PK\x01\x02" + struct.pack("<HHHHHHIII", 20, 20, 0, 0, 0, 0, 0, 0, 0)
    names = (b"%d" % number for number in range(count))
    listed = b"".join(fixed + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name for name in names)
    end64 = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(listed), len(local))
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(local) + len(listed), 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, (1 << 32) - 1, (1 << 32) - 1, 0)
    return local + listed + end64 + locator + end


def inflating(name: str) -> bytes:
    """Return what torch.save writes, with 500 MB of zeros as one entry, compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for each, data in {"data.pkl": b"\x80\x02}.", "byteorder": b"little", "version": b"3\n"}.items():
            info = zipfile.ZipInfo(f"archive/{each}")
            archive.writestr(info, bytes(500 * MB) if each == name else data, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def opcodes(body: bytes) -> bytes:
    return hostile.as_zip(b"\x80\x02" + body + b".")


def numbers(form: bytes, count: int) -> bytes:
    return b",".join(form % number for number in range(count))


# Those of pickles and zips
TORCH: dict[str, Callable[[], bytes]] = {
    "lists": lambda: opcodes(b"]" * 31 * MB),
    "dicts": lambda: opcodes(b"}" * 31 * MB),
    "marks": lambda: opcodes(b"(" * 31 * MB),
    "nothing": lambda: opcodes(b"N" * 31 * MB),
    "tuples": lambda: opcodes(b")" + b"\x85" * 31 * MB),
    "memo": lambda: opcodes(b"]" + b"\x94" * 31 * MB),
    "lists in the memo": lambda: opcodes(b"]\x94" * 15 * MB),
    "keys": lambda: opcodes(b"}(" + b"".join(b"J%sN" % struct.pack("<I", each) for each in range(5 * MB)) + b"u"),
    "a number": lambda: opcodes(b"L" + b"9" * 31 * MB + b"L\n"),
    "legacy": lambda: hostile.as_legacy(b"\x80\x02(" + b"]" * 2 * MB + b"l.") + b"\x80\x02(" + b"]" * 9 * MB + b"l.",
    "entries": lambda: entries(600_000),
    "compressed pickle": lambda: inflating("data.pkl"),
    "compressed byte order": lambda: inflating("byteorder"),
}
# Those of JSON, in the place of a value
JSON: dict[str, Callable[[], bytes]] = {
    "lists": lambda: b"[" + b"[]," * 20 * MB + b"0]",
    "dicts": lambda: b"[" + b"{}," * 20 * MB + b"0]",
    "dicts of one": lambda: b"[" + b'{"a":0},' * 10 * MB + b"0]",
    "numbers": lambda: b"[" + b"999," * 20 * MB + b"0]",
    "texts": lambda: b"[" + numbers(b'"%d"', 8 * MB) + b"]",
    "names": lambda: b"{" + numbers(b'"%d":0', 6 * MB) + b"}",
    "metadata": lambda: b"{" + numbers(b'"%d":"x"', 5 * MB) + b"}",
    "text": lambda: b'"' + b"x" * 95 * MB + b'"',
    "wide text": lambda: b'"' + b"x" * 95 * MB + "\U0001f600".encode() + b'"',
    "blanks": lambda: b"0" + b" " * 95 * MB,
    "depth": lambda: b"[" * 95 * MB,
    "digits": lambda: b"9" * 95 * MB,
    # as many as are still read
    "many lists": lambda: b"[" + b"[]," * 1_220_000 + b"0]",
    "many dicts of one": lambda: b"[" + b'{"a":0},' * 700_000 + b"0]",
    "many names": lambda: b"{" + numbers(b'"%d":0', 1_090_000) + b"}",
    "much text": lambda: b'"' + b"x" * 89 * MB + b'"',
    "much wide text": lambda: b'"' + b"x" * 22 * MB + "\U0001f600".encode() + b'"',
}
pytestmark = [pytest.mark.fuzz, pytest.mark.slow]


@pytest.mark.parametrize("name", TORCH)
def test_bombs_of_torch(fuzz: Fuzzer, name: str) -> None:
    fuzz.run(Case({"x.pt": TORCH[name]()}, ("inspect", "x.pt")), lambda case, ran, work: ["read"] * (ran.code != 3))
    fuzz.end()


@pytest.mark.parametrize("name", JSON)
def test_bombs_of_json(fuzz: Fuzzer, name: str) -> None:
    value = JSON[name]()
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":' + value + b"}"
    file = struct.pack("<Q", len(header)) + header + bytes(4)
    fuzz.run(Case({"x.safetensors": file}, ("inspect", "x.safetensors")))
    for path in ("base/config.json", "adapter/adapter_config.json", "base/generation_config.json"):
        valid = everything()[path]
        files = {**everything(), path: valid[:-1] + b', "more": ' + value + b"}"}
        fuzz.run(Case(files, ("merge", "base", "adapter", "-o", "out"), ("out",)))
    fuzz.end()
