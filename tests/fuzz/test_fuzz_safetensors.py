"""Hold the reader of safetensors against headers that lie, and against the official reader's word on each."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damages import VALUES, as_object, damaged_bytes
from fuzzing import Case, Fuzzer, Ran
from safetensors import SafetensorError, safe_open
from valid_files import COMMANDS, everything

pytestmark = pytest.mark.fuzz

FILES = ("base/model.safetensors", "adapter/adapter_model.safetensors", "tuned/model.safetensors")
DTYPES = (
    "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F4 F6_E2M3 F6_E3M2 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64 C64 "
    "f32 F128 FLOAT I4 U4 F8_E4M3FNUZ F8_E5M2FNUZ Q4_0 F32\\u0000"
).split()
NAMES = ("__metadata__", "", "a", "A", "\\ud800", "\\u0000", "\\u001b[31m", "x" * 5000, "../x", "é", "e\u0301")
SHAPES = (
    "[]", "[0]", "[0,9223372036854775807]", "[9223372036854775807,9223372036854775807,0]", "[64]", "[2,32]", "[-8,-8]",
    "[1,1,64]", f"[{','.join(['1'] * 3000)}]", "[4294967296,4294967296]", "[8,8,1]",
)  # fmt: skip
METADATA = (*VALUES, '{"a":null}', '{"a":"b","a":"c"}', '{"format":"pt"}', '{"loratool":"{"}', '{"loratool":"[]"}')
LENGTHS = (0, 1, 2, 8, 1 << 20, 100_000_000, 100_000_001, 1 << 32, 1 << 63, (1 << 64) - 1)

# What we refuse and the official reader takes, by our message
STRICTER = (
    "stands twice",  # the official reader takes the last of two
    "not Unicode text",
    "neither safetensors nor GGUF",  # README.md: the header must begin with a brace; the official reader skips blanks
)

Entry = list[Any]  # name, and its fields or a JSON text


def any_field(rng: random.Random, entries: list[Entry], at: int) -> None:
    entries[at][1][rng.choice(("dtype", "shape", "data_offsets", "more"))] = rng.choice(VALUES)


def dtype(rng: random.Random, entries: list[Entry], at: int) -> None:
    entries[at][1]["dtype"] = f'"{rng.choice(DTYPES)}"'


def shape(rng: random.Random, entries: list[Entry], at: int) -> None:
    entries[at][1]["shape"] = rng.choice(SHAPES)


def one_number(rng: random.Random, entries: list[Entry], at: int) -> None:
    field = rng.choice(("shape", "data_offsets"))
    texts = entries[at][1][field].strip("[]").split(",")
    texts[rng.randrange(len(texts))] = rng.choice(VALUES[:30])
    entries[at][1][field] = f"[{','.join(texts)}]"


def hole_or_overlap(rng: random.Random, entries: list[Entry], at: int) -> None:
    begin, end = json.loads(entries[at][1]["data_offsets"])
    shift = rng.choice((-4, -1, 1, 4, 1 << 40))
    entries[at][1]["data_offsets"] = f"[{begin + shift},{end + shift * rng.randrange(2)}]"


def twice(rng: random.Random, entries: list[Entry], at: int) -> None:
    entries.insert(rng.randrange(len(entries) + 1), [entries[at][0], dict(entries[at][1])])


def name(rng: random.Random, entries: list[Entry], at: int) -> None:
    entries[at][0] = rng.choice(NAMES)


def whole_entry(rng: random.Random, entries: list[Entry], at: int) -> None:
    entries[at][1] = rng.choice(VALUES)


def metadata(rng: random.Random, entries: list[Entry], at: int) -> None:
    entries.insert(rng.randrange(2), ["__metadata__", rng.choice(METADATA)])


def no_field(rng: random.Random, entries: list[Entry], at: int) -> None:
    del entries[at][1][rng.choice(("dtype", "shape", "data_offsets"))]


def no_bytes(rng: random.Random, entries: list[Entry], at: int) -> None:
    place = rng.choice((0, 256, 1, json.loads(entries[at][1]["data_offsets"])[0]))
    entries.append(["empty", {"dtype": '"F32"', "shape": "[0,4]", "data_offsets": f"[{place},{place}]"}])


DAMAGES: tuple[Callable[[random.Random, list[Entry], int], None], ...] = (
    any_field, dtype, shape, one_number, hole_or_overlap, twice, name, whole_entry, metadata, no_field, no_bytes,
)  # fmt: skip


def damaged(rng: random.Random, valid: bytes) -> bytes:
    """Return a safetensors file with damages of its header's structure or bytes, its length or its data."""
    (length,) = struct.unpack("<Q", valid[:8])
    header, data = valid[8 : 8 + length].rstrip(), valid[8 + length :]
    if rng.random() < 0.7:
        whole = json.loads(header)
        whole.pop("__metadata__")
        entries: list[Entry] = [[n, {k: json.dumps(v) for k, v in entry.items()}] for n, entry in whole.items()]
        for damage in rng.choices(DAMAGES, k=rng.choice((1, 1, 1, 2, 3))):
            whole_ones = [at for at, (_, entry) in enumerate(entries) if len(entry) == 3 and type(entry) is dict]
            damage(rng, entries, rng.choice(whole_ones))
        if rng.random() < 0.1:
            rng.shuffle(entries)
        header = as_object([(n, e if isinstance(e, str) else as_object(e.items())) for n, e in entries]).encode()
    else:
        header = damaged_bytes(rng, header)
    length = len(header)
    if rng.random() < 0.1:
        length = rng.choice((*LENGTHS, length - 1, length + 1, length + 8))
    if rng.random() < 0.1:
        data = rng.choice((data[:-1], data + b"\0", b"", data[: len(data) // 2], data * 2))
    made = struct.pack("<Q", length) + header + data
    return made if rng.random() < 0.97 else made[: rng.randrange(len(made))]


def agree(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    """Tell where the official reader and ours differ on whether a header is right."""
    try:
        with safe_open(work / "x.safetensors", "np") as file:
            list(file.keys())
        theirs = ""
    except (SafetensorError, OSError) as error:
        theirs = str(error)
    if theirs and ran.code != 3:
        yield f"the official reader refuses it ({theirs}), and we do not"
    if not theirs and ran.code == 3 and not any(reason in ran.stderr for reason in STRICTER):
        yield "the official reader takes it, and we do not"


def test_safetensors_headers(fuzz: Fuzzer) -> None:
    def make(rng: random.Random) -> Case:
        file = damaged(rng, everything()["base/model.safetensors"])
        return Case({"x.safetensors": file}, ("inspect", "x.safetensors"))

    fuzz(make, 10, agree)


def test_safetensors_in_commands(fuzz: Fuzzer) -> None:
    def make(rng: random.Random) -> Case:
        files, target = everything(), rng.choice(FILES)
        files[target] = damaged(rng, files[target])
        folder = target.partition("/")[0]
        argv, outputs = rng.choice([(argv, out) for argv, out in COMMANDS.items() if folder in argv])
        return Case(files, argv, outputs)

    fuzz(make, 8)
