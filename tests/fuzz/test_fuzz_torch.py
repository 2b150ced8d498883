"""Hold the reader of torch files against zips and pickles that lie or would run something, and against torch.load."""

from __future__ import annotations

import io
import itertools
import pickletools
import random
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hostile_pickles as hostile
import pytest
import torch
from damages import damaged_bytes
from fuzzing import Case, Fuzzer, Judge, Ran, Server
from valid_files import factors, torch_bytes

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

CONVERT = ("convert", "x.pt", "-o", "out.safetensors")

# Numbers in the fields of zip headers, and in the arguments of opcodes
NUMBERS = (0, 1, 2, 8, 9, 63, 255, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
# Of a zip's structures: the first bytes, and (offset, bytes) of each field
FIELDS = {
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x01\x02": ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (38, 4), (42, 4)),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\x06\x06": ((4, 8), (24, 8), (32, 8), (40, 8), (48, 8)),
    b"PK\x06\x07": ((4, 4), (8, 8), (16, 4)),
}


@cache
def values() -> tuple[Any, ...]:
    """Return what people save."""
    plain = OrderedDict(factors())
    plain._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    grid = torch.arange(24.0).reshape(4, 6)
    odd = {
        "half": grid.half(), "bf16": grid.bfloat16(), "int8": grid.to(torch.int8), "bool": grid > 3, "none": grid[:0],
        "scalar": torch.tensor(3.0), "rows": grid[1:3], "tied": grid, "same": grid, "f64": grid.double(),
        "parameter": torch.nn.Parameter(grid), "fp8": grid.to(torch.float8_e4m3fn),
    }  # fmt: skip
    turned = {"w": grid.T, "columns": grid[:, 1:3], "wide": grid[:1].expand(3, 6)}
    return plain, odd, {"state_dict": plain, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}, turned


@cache
def saved(which: int, zipped: bool, protocol: int) -> bytes:
    value = values()[which]
    if not zipped and "fp8" in value:  # torch.save writes it, and torch.load does not read it
        value = {name: tensor for name, tensor in value.items() if name != "fp8"}
    return torch_bytes(value, zipped, pickle_protocol=protocol)


def opcodes(data: bytes) -> list[bytes]:
    """Return the opcodes of pickles one behind the other, each with its argument; what is behind them is one more."""
    stream, starts = io.BytesIO(data), [0]
    try:
        while stream.tell() < len(data):
            for _ in pickletools.genops(stream):
                starts.append(stream.tell())
    except (ValueError, UnicodeDecodeError):
        pass
    return [data[a:b] for a, b in itertools.pairwise([*starts, len(data)])]


def damaged_pickle(rng: random.Random, data: bytes) -> bytes:
    """Return a pickle with opcodes taken away, doubled, exchanged or put between, or with other arguments."""
    ops = opcodes(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(ops) - 1)
        match rng.randrange(8):
            case 0:
                del ops[at]
            case 1:
                ops.insert(at, ops[rng.randrange(len(ops))])
            case 2:
                ops[at], ops[at + 1] = ops[at + 1], ops[at]
            case 3:
                ops.insert(at, bytes([rng.choice(b"NKtR0}]()12sbeualdgjqrpQ\x85\x86\x87\x88\x89\x81\x90\x91\x93\x94")]))
            case 4:  # numbers of one to four bytes: sizes, strides, offsets, memo
                if ops[at][:1] in b"KMJhjqr":
                    other = rng.choice((*NUMBERS, -1, -8, -(1 << 31))) & (1 << 32) - 1
                    ops[at] = ops[at][:1] + struct.pack("<I", other)[: len(ops[at]) - 1]
            case 5:
                numbers = [each for each in range(len(ops)) if ops[each][:1] in b"KMJ"] or [at]
                other = rng.choice((*NUMBERS, -1, -8, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), 1 << 2000))
                ops[rng.choice(numbers)] = hostile.pickled(other)
            case 6:
                ops[at] = damaged_bytes(rng, ops[at])
            case 7:
                ops.insert(
                    at, hostile.pickled(rng.choice((None, True, 1.5, "x", b"x", "\ud83d\ude00", (), {}, [], {1: 2})))
                )
    return b"".join(ops)


def rezipped(rng: random.Random, data: bytes, odd: bool) -> bytes:
    """Return a zip with its pickle damaged, and if it is to be odd with entries compressed, doubled, renamed, lost."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    if not odd:
        entries[pickled] = damaged_pickle(rng, entries[pickled])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            info, chosen = zipfile.ZipInfo(name), rng.randrange(12) if odd and rng.random() < 0.3 else None
            if chosen == 0:
                continue
            if chosen == 1:
                info.compress_type = zipfile.ZIP_DEFLATED
            if chosen == 2:
                archive.writestr(name, content[: len(content) // 2])
            if chosen == 3:
                info.filename = rng.choice(
                    (name.upper(), f"../{name}", f"/{name}", name.replace("/", "\\"), f"{name}\0x")
                )
            if chosen == 4:
                info.external_attr = rng.choice((16, 0o120777 << 16, 0o40755 << 16))
            if chosen == 5:
                info.extra = rng.choice(
                    (b"\x01\x00\x08\x00" + bytes(8), b"\xff\xff\xff\xff", b"\x01\x00\x00\x00", b"FB" * 20)
                )
            if chosen == 6:
                info.flag_bits |= rng.choice((1, 8, 64, 2048))
            if chosen == 7:
                content += bytes(rng.choice((1, 64)))
            if chosen == 8:
                content = content[: rng.randrange(len(content) + 1)]
            if chosen == 9:
                info.compress_type = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            archive.writestr(info, content)
    return stream.getvalue()


def with_lies(rng: random.Random, data: bytes) -> bytes:
    """Return a zip with a few fields of its headers overwritten, or cut, or with bytes before or behind it."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        first = rng.choice(list(FIELDS))
        places = [at for at in range(len(made)) if made.startswith(first, at)]
        if places:
            offset, width = rng.choice(FIELDS[first])
            at = rng.choice(places) + offset
            other = rng.choice((*NUMBERS, (1 << 64) - 1, 1 << 40))
            if rng.random() < 0.4:
                other = int.from_bytes(made[at : at + width], "little") + rng.choice((-64, -8, -1, 1, 8, 64))
            made[at : at + width] = (other % (1 << 8 * width)).to_bytes(width, "little")
    if rng.random() < 0.1:
        made = made[: rng.randrange(len(made))]
    if rng.random() < 0.1:
        made = rng.choice((bytearray(b"PK\x03\x04"), bytearray(100))) + made
    if rng.random() < 0.1:
        made += rng.choice((b"\0", b"PK\x05\x06" + bytes(18), bytes(70_000)))
    return bytes(made)


# How a file is damaged -> the function of the generator, given a file in the zip layout and one in the legacy layout
DAMAGES: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    lambda rng, zipped, legacy: rezipped(rng, zipped, odd=False),
    lambda rng, zipped, legacy: rezipped(rng, zipped, odd=False),
    lambda rng, zipped, legacy: rezipped(rng, zipped, odd=True),
    lambda rng, zipped, legacy: with_lies(rng, zipped),
    lambda rng, zipped, legacy: damaged_bytes(rng, zipped),
    lambda rng, zipped, legacy: damaged_bytes(rng, legacy),
    lambda rng, zipped, legacy: damaged_pickle(rng, legacy),
)


def make_damaged(rng: random.Random) -> Case:
    which, protocol = rng.randrange(4), rng.choice((2, 2, 2, 0, 1, 3, 4, 5))
    file = rng.choice(DAMAGES)(rng, saved(which, True, protocol), saved(which, False, protocol))
    return Case({"x.pt": file}, rng.choice((CONVERT, CONVERT, ("inspect", "x.pt"))), ("out.safetensors",))


def make_hostile(rng: random.Random) -> Case:
    container, place, call = (rng.choice(list(t.values())) for t in (hostile.CONTAINERS, hostile.PLACES, hostile.CALLS))
    gadget, args = rng.choice(list(hostile.GADGETS.items()))
    module, _, name = gadget.partition(" ")
    file = container(place(call(module, name, hostile.pickled(args))))
    inspected = {"x.bin": "x.bin", "x/pytorch_model.bin": "x"}
    path = rng.choice(("x.pt", *inspected))
    return Case({path: file}, ("inspect", inspected[path]) if path in inspected else CONVERT, ())


def as_torch_loads(server: Server) -> Judge:
    """Return the judge of what was converted: torch.load reads the same numbers under the same names."""

    def judge(case: Case, ran: Ran, work: Path) -> Iterator[str]:
        if ran.code == 0 and case.argv == CONVERT:
            ours = server.call("fuzz_oracles:safetensors_tensors", str(work / "out.safetensors"))
            theirs = server.call("fuzz_oracles:torch_tensors", str(work / "x.pt"))
            if theirs is None:
                yield "torch.load refuses it, and we do not"
                return
            same = dict(re.findall(r"^shared: (.*) is (.*)$", ran.stdout, re.MULTILINE))
            ours |= {name: ours.get(other, "") for name, other in same.items()}
            if ours not in theirs:
                yield f"torch.load reads {theirs}, and we {ours}"

    return judge


def refused(case: Case, ran: Ran, work: Path) -> Iterator[str]:
    if ran.code != 3:
        yield "a pickle that runs something is taken"


def test_torch_files(fuzz: Fuzzer) -> None:
    fuzz(make_damaged, 10, as_torch_loads(fuzz.server))


def test_hostile_pickles(fuzz: Fuzzer) -> None:
    fuzz(make_hostile, 10, refused)
