"""Read undo files by the guide `undo-format` alone, in fractions and loops, to hold the guide to the format."""

import hashlib
import json
import struct
from bisect import bisect_left, bisect_right
from fractions import Fraction as F

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


def restore(data, merged, adapters):
    """Return {tensor: codes of W} from those of W' and, of each adapter, {module or tensor: its numbers}."""
    at, length, digest, end = struct.unpack("<QQ32s8s", data[-56:])
    assert (data[:16], end, at + length) == (b"loratool undo 2\n", b"loraundo", len(data) - 56)
    assert hashlib.sha256(data[at:-56]).digest() == digest
    found = {}
    for name, entry in json.loads(data[at:-56])["tensors"].items():
        (kind, shape), placements, found[name] = entry["spec"], entry["placements"], []
        columns = len(merged[name]) // shape[0]
        for start, stop, at, length, digest, _ in sorted(entry["records"]):
            updates = [(p, adapters[p[0]][p[2] or p[1]]) for p in placements if p[6] <= start < p[7]]
            places = [swap(code, FORMS[kind][0]) for code in merged[name][start * columns : stop * columns]]
            W = read(data[at : at + length], places, FORMS[kind], updates, start, columns)
            assert hashlib.sha256(b"".join(c.to_bytes(FORMS[kind][0] // 8, "little") for c in W)).hexdigest() == digest
            found[name] += W
    return found


def read(record, merged, form, updates, start, columns):
    """Return the codes of a record's rows of W from the places of W'; updates: (placement, the adapter's numbers)."""
    bits, inf = form[0], ((1 << (form[0] - form[1])) - 1) << (form[1] - 1)
    inf = 127 if form == FORMS["F8_E4M3"] else inf  # which has no inf: all codes but that of nan are finite
    norms = [
        n for _, u in updates if "m" in u for (n,) in struct.iter_unpack("<d", record[: len(merged) // columns * 8])
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
                a, w = 1 - w + w * u["m"][row] / F(norms[i]), w * u["m"][row] / F(norms[i])
            left, right = (j, row) if transposed else (row, j)
            D += w * u["scale"] * sum(b * line[right] for b, line in zip(u["B"][left], u["A"], strict=True))
        X.append((a, D) if -inf <= merged[k] < inf else (1, 0))
    if bits == 64 or not updates:
        additive, W, width = updates and not any("rows" in u or "m" in u for _, u in updates), [], 0
        for k, (p, (_, D)) in enumerate(zip(merged, X, strict=True)):
            width = sum(next(stream) << bit for bit in range(8)) if k % 4096 == 0 else width
            p = nearest(number(p, *form) - D, *form) if additive and D else p
            d = sum(next(stream) << bit for bit in range(width))
            W.append(p + ((d >> 1) ^ -(d & 1)))
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
