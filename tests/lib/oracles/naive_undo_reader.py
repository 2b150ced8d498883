"""Read undo files by the guide `undo-format` alone, in fractions and loops, to hold the guide to the format."""

import hashlib
import json
import struct
from bisect import bisect_left, bisect_right
from fractions import Fraction as F
from itertools import pairwise
from math import copysign, isfinite, isnan, lcm, prod
from typing import NamedTuple

FORMS = {"BF16": (16, 8, -133), "F16": (16, 11, -24), "F32": (32, 24, -149), "F64": (64, 53, -1074)}
FORMS |= {"F8_E4M3": (8, 4, -9), "F8_E5M2": (8, 3, -16)}


def swap(p, bits):  # a place for a code, or a code for a place
    return p if 0 <= p < 1 << (bits - 1) else (1 << (bits - 1)) - 1 - p


def number(p, bits, digits, least):
    e, m = divmod(p if p >= 0 else -1 - p, 1 << (digits - 1))
    return (1 if p >= 0 else -1) * (m + (1 << (digits - 1) if e else 0)) * F(2) ** (max(e, 1) - 1 + least)


def nearest(x, bits, digits, least):
    e = max(least, abs(x.numerator).bit_length() - x.denominator.bit_length() - digits) if x else least
    e += abs(x) >= F(2) ** (e + digits)
    size = ((e - least) << (digits - 1)) + round(abs(x) / F(2) ** e)
    return size if x >= 0 else -1 - size


class Coded(NamedTuple):  # what the reader is told of a weight that is stored as codes
    levels: dict  # of each code its number, before scale and zero point
    numbers: list  # of each row and column, {code: number}, of those that a number may have
    width: int  # codes of a row, padding included
    lower: bool  # of two numbers equally near the lower one counts, not the even code
    scales: bool = False  # the padding has the scales


class Bits:  # of bytes, the lowest bit of each first
    def __init__(self, data):
        self.left, self.bits = 8 * len(data), int.from_bytes(data, "little")

    def take(self, count):
        found, self.bits, self.left = self.bits & ((1 << count) - 1), self.bits >> count, self.left - count
        assert self.left >= 0
        return found

    def fill(self):
        assert self.take(self.left % 8) == 0


def differences(bits, count):
    found = []
    for start in range(0, count, 4096):
        width = bits.take(8)
        found += [bits.take(width) for _ in range(min(4096, count - start))]
        bits.fill()
    return [d >> 1 ^ -(d & 1) for d in found]


def integers(bits, count):
    width = bits.take(8)
    if width == 255:
        some, found, at = bits.take(32), [0] * count, -1
        for gap, d in zip(differences(bits, some), differences(bits, some), strict=True):
            at += gap + 1
            found[at] = d
        return found
    assert 1 <= width <= 9
    short, full = [bits.take(width) for _ in range(count)], (1 << width) - 1
    bits.fill()
    others = iter(differences(bits, short.count(full)))
    return [next(others) if d == full else d >> 1 ^ -(d & 1) for d in short]


def nearest_code(x, numbers, coded):
    """Return the code whose number is nearest to a fraction; numbers: {code: number} at a place."""
    x, finite = F(float(x)), [c for c in numbers if isfinite(coded.levels[c])]
    rising = sorted({numbers[c] for c in finite})
    if len(rising) == 1:  # the scale is 0
        ends = sorted(finite, key=coded.levels.get)
        if rising[0] == 0 and copysign(1, numbers[ends[-1]]) < 0:  # it is -0
            ends.reverse()
        return ends[0] if x < rising[0] else ends[-1] if x > rising[0] else nearest_code(0, coded.levels, coded)
    k = bisect_left(rising, x)
    near = rising[max(0, k - 1) : k + 1]

    def rank(c):
        return abs(numbers[c] - x), numbers[c] if coded.lower else c & 1, copysign(1, -coded.levels[c]), c

    return min((c for c in finite if numbers[c] in near), key=rank)


def beside(bits, guess, coded, columns, padding=None):
    """Return the codes of some rows, padding included, by what they are beside a guess. padding: if it is known."""

    def rank(c):
        x = coded.levels[c]
        return isnan(x), 0 if isnan(x) else x, copysign(1, x), -c

    rising = sorted(coded.levels, key=rank)
    place, zero = {c: k for k, c in enumerate(rising)}, nearest_code(0, coded.levels, coded)
    others, zeros = (iter(integers(bits, sum((g == zero) is of for g in guess))) for of in (False, True))
    own = [rising[place[g] + next(zeros if g == zero else others)] for g in guess]
    more = coded.width - columns
    padding = integers(bits, len(guess) // columns * more) if padding is None else padding
    assert bits.left == 0
    return [
        code
        for row in range(len(guess) // columns)
        for code in own[row * columns : (row + 1) * columns] + padding[row * more : (row + 1) * more]
    ]


def word_sum(data):
    return sum(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)) % (1 << 64)


def joined(codes, size):
    return b"".join((c % (1 << 8 * size)).to_bytes(size, "little") for c in codes)


def restore(data, merged, adapters, coded=None, sizes=None):
    """Return {tensor: codes of W} from those of W' and, of each adapter, {module or tensor: its numbers}.

    Of a weight that is stored as codes these stand under its name, and the bytes of its companions under theirs.
    `coded` has what is told of such weights by their names; W' of one that became codes is those, padding included.
    `sizes` has the bytes of each of the base's tensors, if they are in a GGUF file.
    """
    at, length, digest, end = struct.unpack("<QQ32s8s", data[-56:])
    assert (data[:16], end, at + length) == (b"loratool undo 4\n", b"loraundo", len(data) - 56)
    assert hashlib.sha256(data[at:-56]).digest() == digest
    index, found = json.loads(data[at:-56]), {}
    table, sizes = read_table(data, index["table"]), sizes or read_sizes(data, index["shards"])
    layers = index.get("layers", {"copies": {}})
    copies = {name: merged[name] for name in layers["copies"]}
    merged = {in_base(name, layers): numbers for name, numbers in merged.items() if name not in copies}
    for name, entry in index["tensors"].items():
        (kind, shape), placements, row = entry["spec"], entry["placements"], entry["row"]
        name, shape = (entry["recoded"][key] for key in ("weight", "shape")) if "recoded" in entry else (name, shape)
        told = coded[name] if "recoded" in entry or "coded" in entry else None
        form, columns, W = FORMS.get(kind), len(merged[name]) // shape[0], []
        width = columns if "recoded" in entry else None
        if told:
            columns = shape[1]
        if "coded" in entry:
            copies = kept(data, sizes, entry, table)
            found |= copies
            row += len(copies)
        for start, stop in spans(entry, len(merged[name]) // (width or columns), columns, told):
            updates = [(p, adapters[p[0]][p[2] or p[1]]) for p in placements if p[6] <= start < p[7]]
            at, length, total = table[row]
            row += 1
            record, each = data[at : at + length], width or columns
            wrote = merged[name][start * each : stop * each]
            assert word_sum(joined(wrote, 1 if width else form[0] // 8)) == total
            if width:
                guess = [c for k, c in enumerate(wrote) if k % width < columns]
                padding = [c for k, c in enumerate(wrote) if k % width >= columns] if told.scales else None
                own = beside(Bits(record), guess, told, columns, padding)
            else:
                places = [swap(code, form[0]) for code in wrote]
                own = read(record, places, form, updates, start, columns, told)
            W += own
        found[name] = W
    told = {name for name, each in (coded or {}).items() if each.scales}  # their bytes are blocks of codes and scales
    known = [{name: each[name] for name in each.keys() - told} for each in (found, merged)]
    check_hashes(blob(data, index["hashes"]), index["tensors"], sizes, *known, layers["copies"], copies)
    payload = data[16 : index["table"][0]]
    pieces = (payload[at : at + (1 << 24)] for at in range(0, len(payload), 1 << 24))
    assert blob(data, index["payload"]) == b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    return found


def in_base(name, layers):
    """Return the base's name of a tensor of a merged model that repeats layers, and is not a copy."""
    if "path" not in layers or not name.startswith(layers["path"]):
        return name
    number, rest = name[len(layers["path"]) :].split(".", 1)
    return f"{layers['path']}{layers['numbers'].index(int(number))}.{rest}"


def nbytes(spec):
    return prod(spec[1]) * FORMS[spec[0]][0] // 8


def check_hashes(hashes, entries, base, found, merged, specs, copies):
    """Compare the hashes of all pieces with those of the bytes that are known: not of codes that share bytes."""
    changed = {name: base[name] if "recoded" in entry else nbytes(entry["spec"]) for name, entry in entries.items()}
    others = {name: nbytes(spec) for name, spec in specs.items()}
    copied = {name: numbers for name, numbers in merged.items() if name not in entries}
    for sizes, contents in ((base, copied | found), (changed, merged), (others, copies)):
        for name in sorted(sizes):
            count, content = -(-sizes[name] // 2**24), contents.get(name)
            if content and sizes[name] % len(content) == 0:
                content = content if isinstance(content, bytes) else joined(content, sizes[name] // len(content))
                pieces = [content[at : at + 2**24] for at in range(0, len(content), 2**24)]
                assert b"".join(hashlib.sha256(piece).digest() for piece in pieces) == hashes[: 32 * count]
            hashes = hashes[32 * count :]
    assert not hashes


def blob(data, place):
    at, length, digest = place
    assert hashlib.sha256(data[at : at + length]).hexdigest() == digest
    return data[at : at + length]


def read_table(data, place):
    """Return of each stretch of the payload its first byte, length and sum."""
    found, start = [], 16
    for size, total in struct.iter_unpack("<QQ", blob(data, place)):
        found.append((start, size, total))
        start += size
    return found


def spans(entry, rows, columns, coded):
    """Return the rows start:stop of each record; of a tensor that was replaced no rows were cut off here."""
    covered = [(p[6], p[7]) for p in entry["placements"]]
    if entry.get("replaced") and coded:
        return []
    edges = sorted({edge for each in covered for edge in each} | ({0, rows} if coded or not covered else set()))
    unit = lcm(8, entry.get("sharing", 1)) if coded else 1
    height = max(unit, (1 << 22) // columns // unit * unit)
    return [
        (start, min(start + height, last))
        for first, last in pairwise(edges)
        if coded or not covered or any(a <= first and last <= b for a, b in covered)
        for start in range(first, last, height)
    ]


def read_sizes(data, shards):
    """Return {stored tensor of the base: its bytes}, of safetensors files."""
    specs = {name: spec for shard in shards for name, spec in json.loads(blob(data, shard["header"])).items()}
    specs.pop("__metadata__", None)
    return {name: spec["data_offsets"][1] - spec["data_offsets"][0] for name, spec in specs.items()}


def kept(data, sizes, entry, table):
    """Return {stored tensor: bytes} of those that an undo file has as they were."""
    names = entry["coded"]["tensors"][0 if entry.get("replaced") else 1 :]
    found = {}
    for name, (at, length, total) in zip(names, table[entry["row"] :], strict=False):
        assert (length, total) == (sizes[name], 0)
        found[name] = data[at : at + length]
    return found


def read(record, merged, form, updates, start, columns, coded=None):
    """Return the codes of a record's rows of W from the places of W'; updates: (placement, the adapter's numbers)."""
    bits, inf = form[0], ((1 << (form[0] - form[1])) - 1) << (form[1] - 1)
    inf = 127 if form == FORMS["F8_E4M3"] else inf  # which has no inf: all codes but that of nan are finite
    norms = [
        F(n) if n >= 0 else -F(n) / 2**1000
        for _, u in updates
        if "m" in u
        for (n,) in struct.iter_unpack("<d", record[: len(merged) // columns * 8])
    ]
    stream = iter([byte >> bit & 1 for byte in record[8 * len(norms) :] for bit in range(8)])
    X, runs, every = [], [], range(1 << bits)
    for k in range(len(merged)):
        (i, j), a, D = divmod(k, columns), F(1), F(0)
        for (_, _, _, w, transposed, _, first, _, skip, _), u in updates:
            w, row = F(w), start + i - first + skip
            if "rows" in u:
                a, D = (1 - w, D + w * u["rows"][row][j]) if row in u["rows"] else (a, D)
                continue
            if "m" in u:
                a, w = 1 - w + w * u["m"][row] / norms[i], w * u["m"][row] / norms[i]
            left, right = (j, row) if transposed else (row, j)
            D += w * u["scale"] * sum(b * line[right] for b, line in zip(u["B"][left], u["A"], strict=True))
        X.append((a, D) if -inf <= merged[k] < inf else (1, 0))
    if coded:
        guess = []
        for k, (p, (a, D)) in enumerate(zip(merged, X, strict=True)):
            x = (number(p, *form) - D) / a if a and -inf <= p < inf else 0
            guess.append(nearest_code(x, coded.numbers[start + k // columns][k % columns], coded))
        rest, count = record[8 * len(norms) :], len(merged) // columns * (coded.width - columns) * coded.scales
        return beside(Bits(rest[count:]), guess, coded, columns, list(rest[:count]) if coded.scales else None)
    if bits == 64 or not updates:
        additive, W = updates and not any("rows" in u or "m" in u for _, u in updates), []
        apart = differences(Bits(record[8 * len(norms) :]), len(merged))
        for p, (_, D), d in zip(merged, X, apart, strict=True):
            W.append((nearest(number(p, *form) - D, *form) if additive and D else p) + d)
        return [swap((p + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1)), bits) for p in W]
    for p, (a, D) in zip(merged, X, strict=True):
        s = 1 if a > 0 else -1
        if (a, D) == (1, 0):
            runs.append(range(p, p + 1))
        elif a == 0 or nearest(D, *form) == p:
            runs.append(every)
        else:
            f = lambda q: s * nearest(a * number(q, *form) + D, *form)  # noqa: B023, E731
            ends = (each(range(-inf, inf), s * p, key=f) - inf for each in (bisect_left, bisect_right))
            runs.append(range(*ends))
    runs = [range(1) if run == every and next(stream) else run for run in runs]
    index = [0] * len(runs)
    for bit in range(bits):
        for k, run in enumerate(runs):
            index[k] += next(stream) << bit if len(run) > 1 << bit else 0
    assert not any(stream)
    return [k if run == every else swap(run[k], bits) for run, k in zip(runs, index, strict=True)]
