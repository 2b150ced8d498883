"""Read undo files by the guide `undo-format` alone, in fractions and loops, to hold the guide to the format."""

import hashlib
import json
import struct
from bisect import bisect_left, bisect_right
from fractions import Fraction as F
from itertools import islice

FORMS = {"BF16": (16, 8, -133), "F16": (16, 11, -24), "F32": (32, 24, -149), "F64": (64, 53, -1074)}


def number(p, bits, digits, least):
    e, m = divmod(p if p >= 0 else -1 - p, 1 << (digits - 1))
    return (1 if p >= 0 else -1) * (m + (1 << (digits - 1) if e else 0)) * F(2) ** (max(e, 1) - 1 + least)


def nearest(x, bits, digits, least):
    e = max(least, abs(x.numerator).bit_length() - x.denominator.bit_length() - digits) if x else least
    e += abs(x) >= F(2) ** (e + digits)
    size = ((e - least) << (digits - 1)) + round(abs(x) / F(2) ** e)
    return size if x >= 0 else -1 - size


def restore(data, merged, adapters):
    """Return {tensor: codes of W} from those of W' and, of each adapter, {module or tensor: its numbers}."""
    at, length, digest, end = struct.unpack("<QQ32s8s", data[-56:])
    assert (data[:16], end, at + length) == (b"loratool undo 2\n", b"loraundo", len(data) - 56)
    assert hashlib.sha256(data[at:-56]).digest() == digest
    found = {}
    for name, entry in json.loads(data[at:-56])["tensors"].items():
        (kind, shape), W = entry["spec"], []
        bits, columns = FORMS[kind][0], len(merged[name]) // shape[0]
        swap = lambda p: p if 0 <= p < 1 << (bits - 1) else (1 << (bits - 1)) - 1 - p  # noqa: B023, E731
        for start, stop, at, length, digest, _ in sorted(entry["records"]):
            updates = [(p, adapters[p[0]][p[2] or p[1]]) for p in entry["placements"] if p[6] <= start < p[7]]
            places = [swap(code) for code in merged[name][start * columns : stop * columns]]
            rows = [swap(p) for p in read(data[at : at + length], places, FORMS[kind], updates, start, columns)]
            assert hashlib.sha256(b"".join(c.to_bytes(bits // 8, "little") for c in rows)).hexdigest() == digest, name
            W += rows
        found[name] = W
    return found


def read(record, merged, form, updates, start, columns):
    """Return the places of W in a record's rows from those of W'; updates: (placement, the adapter's numbers)."""
    (bits, digits, _), norms, X = form, (), []
    if any("m" in u for _, u in updates):
        norms = struct.unpack_from(f"<{len(merged) // columns}d", record)
    stream = (byte >> bit & 1 for byte in record[8 * len(norms) :] for bit in range(8))
    take = lambda count: sum(bit << k for k, bit in enumerate(islice(stream, count)))  # noqa: E731
    inf, known = ((1 << (bits - digits)) - 1) << (digits - 1), list(merged)
    for k in range(len(merged)):  # a and D of each weight
        (i, j), a, D = divmod(k, columns), F(1), F(0)
        for (_, _, _, w, transposed, _, first, _, skip, _), u in updates:
            w, row = F(w), start + i - first + skip
            if "rows" in u:
                a, D = (1 - w, D + w * u["rows"][row][j]) if row in u["rows"] else (a, D)
                continue
            if "m" in u:
                a, w = 1 - w + w * u["m"][row] / F(norms[i]), w * u["m"][row] / F(norms[i])
            left, right = (j, row) if transposed else (row, j)
            D += w * u["scale"] * sum(b * line[right] for b, line in zip(u["B"][left], u["A"], strict=True))
        X.append((a, D))
    changed = [k for k, p in enumerate(merged) if -inf <= p < inf and X[k] != (1, 0)]
    if bits == 64 or not updates:
        if updates and not any("rows" in u or "m" in u for _, u in updates):
            for k in changed:
                known[k] = nearest(number(merged[k], *form) - X[k][1], *form)
        half, width = 1 << (bits - 1), 0
        for k in range(len(known)):
            width = width if k % 4096 else take(8)
            folded = take(width)
            known[k] = (known[k] + ((folded >> 1) ^ -(folded & 1)) + half) % (2 * half) - half
    else:
        counts, places = {}, {}
        for k in changed:
            (a, D), s = X[k], 1 if X[k][0] > 0 else -1
            counts[k] = 1 << bits
            if a and nearest(D, *form) != merged[k]:
                f = lambda p: s * nearest(a * number(p, *form) + D, *form)  # noqa: B023, E731
                known[k] = bisect_left(range(-inf, inf), s * merged[k], key=f) - inf
                counts[k] = bisect_right(range(-inf, inf), s * merged[k], key=f) - inf - known[k]
        for k in [k for k in changed if counts[k] == 1 << bits]:
            known[k], counts[k] = (0, 1) if take(1) else (None, 1 << bits)
        for bit in range(bits):
            for k in [k for k in changed if counts[k] > 1 << bit]:
                places[k] = places.get(k, 0) + (take(1) << bit)
        for k, place in places.items():
            known[k] = known[k] + place if known[k] is not None else place
            if counts[k] == 1 << bits and place >> (bits - 1):
                known[k] = (1 << (bits - 1)) - 1 - place
    assert not any(stream)
    return known
