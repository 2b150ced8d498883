"""Read patches by the guide `patch-format` alone, number by number, to hold the guide to the format."""

import bz2
import hashlib
import json
import struct
from fractions import Fraction as F
from math import prod

from lib.oracles.naive_patch_bodies import read, read_back

PIECE = 1 << 24
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64}

# bits, bits of the fraction, exponent of the least number, whether the largest exponent holds inf and nan alone
FORMS = {"BF16": (16, 7, -133, True), "F16": (16, 10, -24, True), "F32": (32, 23, -149, True)}
FORMS |= {"F64": (64, 52, -1074, True), "F8_E5M2": (8, 2, -16, True), "F8_E4M3": (8, 3, -9, False)}


def sha(data):
    return hashlib.sha256(data).digest()


def cut(data):
    return [data[at : at + PIECE] for at in range(0, len(data), PIECE)]


def hash_of(pieces):
    return sha(b"".join(map(sha, pieces)))


def digest(tensors):
    """Return the digest of {name: (type, shape, bytes)}, of which no two share their bytes."""
    lines = [
        f"{name}\t{dtype}\t{','.join(map(str, shape))}\t{hash_of(cut(data)).hex()}\n".encode()
        for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda item: item[0].encode())
    ]
    return sha(b"".join(lines)).hex()


def header_of(head):
    """Return {name: (type, shape, first byte)} of a safetensors file that begins with these bytes."""
    size = struct.unpack("<Q", head[:8])[0]
    listed = json.loads(head[8 : 8 + size])
    listed.pop("__metadata__", None)
    return {name: (at["dtype"], at["shape"], 8 + size + at["data_offsets"][0]) for name, at in listed.items()}


def nbytes(dtype, shape):
    return prod(shape) * BITS[dtype] // 8


def tensors_in(data):
    """Return {name: (type, shape, bytes)} of a safetensors file."""
    return {
        name: (dtype, shape, data[at : at + nbytes(dtype, shape)])
        for name, (dtype, shape, at) in header_of(data).items()
    }


def digest_of(path):
    """Return the digest of a model of safetensors files."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return digest({name: each for file in files for name, each in tensors_in(file.read_bytes()).items()})


def numbers(data, width):
    return [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]


def value(x, dtype):
    """Return the number of a bit pattern; None for inf and nan."""
    bits, fraction, least, has_inf = FORMS[dtype]
    size = x % (1 << bits - 1)
    field, f = size >> fraction, size % (1 << fraction)
    if (has_inf and field == (1 << bits - 1 - fraction) - 1) or (size == 127 and not has_inf):
        return None
    found = (f + (1 << fraction if field else 0)) * F(2) ** (least + max(field, 1) - 1)
    return -found if x >> bits - 1 else found


def rounded(x, source, dtype):
    """Return a number in another type, to nearest, ties to even."""
    bits, fraction, least, _ = FORMS[dtype]
    sign, number = x >> FORMS[source][0] - 1, value(x, source)
    assert number is not None, "inf and nan are left to other tests"
    size, e = abs(number), least
    while size >= F(2) ** (e + fraction + 1):
        e += 1
    place = ((e - least) << fraction) + round(size / F(2) ** e)
    return place | sign << bits - 1


class Reader:
    """A patch; it is checked in the guide's order."""

    def __init__(self, data):
        self.data = data
        assert data[:17] == b"loratool patch 1\n"
        at, length, digest, end = struct.unpack("<QQ32s8s", data[-56:])
        assert end == b"lorapatc" and at + length + 56 == len(data)
        text = data[at : at + length]
        assert sha(text) == digest
        self.index = json.loads(text)
        assert self.index["version"] == 1
        self.used = [(at, len(data) - at)]
        self.table = [*struct.iter_unpack("<QQQ32s32s", self.blob(self.index["table"]))]
        self.files = [self.file(each) for each in self.index["target"]["files"]]
        base = self.index["base"]["files"]
        self.base_files = self.files if base is None else [self.file(each) for each in base]
        self.side, self.base_side = ({k: self.text(v) for k, v in self.index[k].items()} for k in ("side", "base_side"))
        at = 17
        self.places = []
        for _, length, back, _, _ in self.table:
            self.places.append(at)
            at += length + (back if self.index["reversible"] else 0)
        self.used.append((17, at - 17))
        done = 0
        for first, length in [(0, 17), *sorted(self.used)]:
            assert first == done
            done += length
        assert done == len(data)

    def blob(self, place):
        at, length, digest = place
        self.used.append((at, length))
        found = self.data[at : at + length]
        assert sha(found).hex() == digest
        return found

    def text(self, entry):
        if entry[1] is None:
            return entry[0], None
        found = bz2.decompress(self.blob(entry[1]))
        assert sha(found).hex() == entry[0] and len(found) == entry[2]
        return entry[0], found

    def file(self, entry):
        frame = bz2.decompress(self.blob(entry["frame"]))
        assert len(frame) == entry["frame_bytes"] and entry["head"], "a torch file or GGUF is left to other tests"
        return entry["name"], frame, header_of(frame[: entry["head"]]), entry["nbytes"]

    def specs(self, files):
        every = {name: (dtype, shape) for _, _, listed, _ in files for name, (dtype, shape, _) in listed.items()}
        return dict(sorted(every.items(), key=lambda item: item[0].encode()))

    def spans(self):
        """Return [(type, base's type, [(tensor, first byte, length)])]."""
        found, waiting = [], {}
        for name, (dtype, shape) in self.specs(self.files).items():
            source = None if name in self.index["new"] else self.index["cast"].get(name, dtype)
            size = nbytes(dtype, shape)
            for at in range(0, size, PIECE):
                piece = (name, at, min(PIECE, size - at))
                if piece[2] == PIECE:
                    found.append((dtype, source, [piece]))
                    continue
                held = waiting.get((dtype, source), [])  # in the order of the groups' first pieces
                if sum(length for _, _, length in held) + piece[2] > PIECE:
                    found.append((dtype, source, waiting.pop((dtype, source))))
                    held = []
                waiting[dtype, source] = [*held, piece]
        return found + [(*kind, pieces) for kind, pieces in waiting.items()]

    def restore(self, given, back=False):
        """Return {file: bytes} of the target, or with `back` of the base, without side files.

        Args:
            given: {name: (type, shape, bytes)} of the other model.
        """
        assert digest(given) == self.index["target" if back else "base"]["digest"]
        made = {}
        spans = self.spans()
        assert len(spans) == len(self.table)
        for (dtype, source, pieces), (body, length, beside, before, after), at in zip(
            spans, self.table, self.places, strict=True
        ):
            key, width = self.index["bodies"][body], BITS[dtype] // 8
            data, back_data = self.data[at : at + length], self.data[at + length : at + length + beside]
            parts = []
            former = [(self.index["renamed"].get(name, name), first, size) for name, first, size in pieces]
            for name, first, size in (pieces if back else former) if source else []:
                ratio = F(BITS[source], BITS[dtype])
                parts.append(given[name][2][int(first * ratio) : int((first + size) * ratio)])
            if back:
                before, after = after, before
            assert before == (hash_of(parts) if source else bytes(32))
            start = numbers(b"".join(parts), BITS[source] // 8) if source else []
            if source and source != dtype:
                start = [rounded(x, source, dtype) for x in start]
            if key == "bytes":
                start = [0] * (sum(size for *_, size in pieces) // width)
            if back and key in ("classes", "planes", "fields"):
                found = read_back(key, start, data, back_data, dtype)
            elif back and key == "codes":
                found = subtracted(start, data, width)
            else:
                found = read(key, start, data, dtype, width)
            whole = b"".join(x.to_bytes(width, "little") for x in found)
            ends = []
            for name, first, size in former if back else pieces:
                made.setdefault(name, {})[first] = whole[:size]
                ends.append(whole[:size])
                whole = whole[size:]
            assert hash_of(ends) == after and not whole
        files = self.base_files if back else self.files
        tensors = {
            name: (dtype, shape, b"".join(made.get(name, {}).values()))
            for name, (dtype, shape) in self.specs(files).items()
        }
        assert digest(tensors) == self.index["base" if back else "target"]["digest"]
        return {name: self.filled(frame, listed, tensors, size) for name, frame, listed, size in files}

    def filled(self, frame, listed, tensors, size):
        data = b""
        for name, (_, _, at) in sorted(listed.items(), key=lambda item: (item[1][2], len(tensors[item[0]][2]))):
            gap = at - len(data)
            data, frame = data + frame[:gap] + tensors[name][2], frame[gap:]
        assert len(data + frame) == size
        return data + frame


def subtracted(target, data, width):
    """Return the base's numbers of a body of codes: the target's less the differences."""
    differences = read("codes", [0] * len(target), data, "", width)
    bits = 4 if data[0] else 8
    found = []
    for t, d in zip(target, differences, strict=True):
        codes = [(t >> at) - (d >> at) & (1 << bits) - 1 for at in range(0, 8 * width, bits)]
        found.append(sum(code << bits * i for i, code in enumerate(codes)))
    return found
