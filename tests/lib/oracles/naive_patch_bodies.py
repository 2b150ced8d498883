"""Read the bodies of a patch, number by number, in Python's integers: what the docstrings of `loratool.patches` say."""

from __future__ import annotations

from collections.abc import Sequence

# bits of a number and of its fraction
FLOATS = {"BF16": (16, 7), "F16": (16, 10), "F8_E4M3": (8, 3), "F8_E5M2": (8, 2), "F32": (32, 23), "F64": (64, 52)}
TOTAL = 1 << 12

Table = list[list[int]]


def lanes(n: int) -> int:
    found = 1
    while 2 * found * 4096 <= n and found < 4096:
        found *= 2
    return found


def encode(symbols: Sequence[int], classes: Sequence[int], table: Table) -> bytes:
    """Return a code of rANS."""
    if not symbols:
        return b""
    states, words = [1 << 16] * lanes(len(symbols)), []
    for i in reversed(range(len(symbols))):
        row, symbol = table[classes[i]], symbols[i]
        x, f, start = states[i % len(states)], row[symbol], sum(row[:symbol])
        if x >= f << 20:
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % len(states)] = (x // f << 12) + start + x % f
    return b"".join(x.to_bytes(4, "little") for x in states) + b"".join(x.to_bytes(2, "little") for x in words[::-1])


def decode(code: bytes, n: int, classes: Sequence[int], table: Table) -> list[int]:
    """Return the symbols of a code of rANS; an AssertionError if it is none."""
    if not n:
        assert not code
        return []
    width, symbols = lanes(n), []
    states = [int.from_bytes(code[4 * i : 4 * i + 4], "little") for i in range(width)]
    words = [int.from_bytes(code[i : i + 2], "little") for i in range(4 * width, len(code), 2)][::-1]
    of_place = [[symbol for symbol, f in enumerate(row) for _ in range(f)] for row in table]
    for i in range(n):
        x, row = states[i % width], table[classes[i]]
        symbol = of_place[classes[i]][x % TOTAL]
        x = row[symbol] * (x >> 12) + x % TOTAL - sum(row[:symbol])
        states[i % width] = x if x >= 1 << 16 else x << 16 | words.pop()
        symbols.append(symbol)
    assert not words and set(states) == {1 << 16}
    return symbols


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def bytes(self, size: int) -> bytes:
        found, self.data = self.data[:size], self.data[size:]
        assert len(found) == size
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "little")

    def short(self) -> int:
        low = self.number(1)
        return low if low < 128 else low - 128 + 128 * self.number(1)

    def stream(self, n: int, classes: Sequence[int] | None = None, rows: int = 1) -> list[int]:
        kind = self.number(1) if n else 0
        if kind < 2:
            return [*self.bytes(n)] if kind == 0 else n * [self.number(1)]
        table = []
        for _ in range(rows):
            size, row = self.short(), list[int]()
            while len(row) < size:
                row.append(self.short())
                row += [] if row[-1] else [0] * self.short()
            table.append(row)
        return decode(self.bytes(self.number(4)), n, [0] * n if classes is None else classes, table)

    def planes(self, n: int, width: int, classes: Sequence[int] | None = None, rows: int = 1) -> list[int]:
        found = [0] * n
        for i in range(width):
            found = [x | byte << 8 * i for x, byte in zip(found, self.stream(n, classes, rows), strict=True)]
        return found

    def positions(self) -> list[int]:
        found, at = [], -1
        for gap in self.planes(self.number(4), 3):
            at += gap + 1
            found.append(at)
        return found


def place(x: int, bits: int) -> int:
    """Return the place of a bit pattern in the order of the numbers, from -2**(bits - 1)."""
    size = x % (1 << bits - 1)
    return -1 - size if x >> bits - 1 else size


def number(at: int, bits: int) -> int:
    at = (at + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
    return at if at >= 0 else (1 << bits - 1) + (-1 - at)


def unfolded(z: int) -> int:
    return z // 2 if z % 2 == 0 else -(z + 1) // 2


def read(key: str, base: Sequence[int], data: bytes, dtype: str, width: int) -> list[int]:
    """Return the target's numbers.

    Args:
        width: bytes of a number.
    """
    reader, n = Reader(data), len(base)
    if key == "same":
        found = [*base]
    elif key == "bytes":
        found = reader.planes(n, width)
    elif key == "codes":
        bits = 4 if reader.number(1) else 8
        found = [_add_codes(b, d, bits, 8 * width) for b, d in zip(base, reader.planes(n, width), strict=True)]
    else:
        bits, _ = FLOATS[dtype]
        z = _steps(reader, key, _bounds(reader, key), base, dtype)
        found = [
            number(place(b, bits) + (-unfolded(step) if b >> bits - 1 else unfolded(step)), bits)
            for b, step in zip(base, z, strict=True)
        ]
    assert not reader.data
    return found


def _add_codes(b: int, folded: int, bits: int, width: int) -> int:
    found = 0
    for at in range(0, width, bits):
        code, d = (x >> at & (1 << bits) - 1 for x in (b, folded))
        found |= (code + unfolded(d)) % (1 << bits) << at
    return found


def _bounds(reader: Reader, key: str) -> list[int]:
    return [] if key == "fields" else [reader.number(2) for _ in range(reader.number(1))]


def class_of(x: int, bounds: Sequence[int], dtype: str) -> int:
    bits, fraction = FLOATS[dtype]
    return sum(bound > x % (1 << bits - 1) >> fraction for bound in bounds)


def _steps(reader: Reader, key: str, bounds: Sequence[int], base: Sequence[int], dtype: str) -> list[int]:
    n, width = len(base), FLOATS[dtype][0] // 8
    classes = [class_of(b, bounds, dtype) for b in base]
    if key == "planes":
        return reader.planes(n, width, classes, len(bounds) + 1)
    if key == "classes":
        symbols = reader.stream(n, classes, len(bounds) + 1)
        return _with_large(symbols, 255, 0, reader, width)
    layout = reader.number(1)
    if layout == 0:
        return reader.planes(n, width)
    if layout == 1:
        z, positions = [0] * n, reader.positions()
        for at, step in zip(positions, reader.planes(len(positions), width), strict=True):
            z[at] = step + 1
        return z
    packed = reader.stream((n * layout + 7) // 8)
    fields = [byte >> at & (1 << layout) - 1 for byte in packed for at in range(0, 8, layout)]
    assert not any(fields[n:])
    return _with_large(fields[:n], (1 << layout) - 1, (1 << layout) - 1, reader, width)


def _with_large(symbols: Sequence[int], top: int, added: int, reader: Reader, width: int) -> list[int]:
    large = iter(reader.planes([*symbols].count(top), width))
    return [next(large) + added if symbol == top else symbol for symbol in symbols]


def read_back(key: str, target: Sequence[int], data: bytes, back: bytes, dtype: str) -> list[int]:
    """Return the base's numbers, of a body of steps."""
    bits, _ = FLOATS[dtype]
    reader, listed, n = Reader(data), Reader(back), len(target)
    bounds, differences = _bounds(reader, key), [0] * n
    if key != "fields":
        sorts = listed.number(2)
        edges = [_edge(t, dtype) for t in target]
        chosen = [i for i in range(n) if sorts >> edges[i] & 1]
        for i, d in zip(chosen, listed.stream(len(chosen), [edges[i] for i in chosen], 16), strict=True):
            differences[i] = d
    positions = listed.positions()
    for i, d in zip(positions, listed.stream(len(positions)), strict=True):
        differences[i] = d
    assert not listed.data
    # numbers of the base's classes and signs stand for the base
    signs = [(t >> bits - 1) ^ (d >> 7) for t, d in zip(target, differences, strict=True)]
    classes = [(class_of(t, bounds, dtype) + d) % 16 for t, d in zip(target, differences, strict=True)]
    like = [_of_class(k, bounds, dtype) for k in classes]
    z = _steps(reader, key, bounds, like, dtype)
    assert not reader.data
    return [
        number(place(t, bits) - (-unfolded(step) if sign else unfolded(step)), bits)
        for t, step, sign in zip(target, z, signs, strict=True)
    ]


def _of_class(k: int, bounds: Sequence[int], dtype: str) -> int:
    bits, fraction = FLOATS[dtype]
    fields = range(1 << bits - 1 - fraction)
    return next(field << fraction for field in fields if class_of(field << fraction, bounds, dtype) == k)


def _edge(x: int, dtype: str) -> int:
    _, fraction = FLOATS[dtype]
    kept = min(10, fraction)
    f = x % (1 << fraction) >> (fraction - kept)
    g = (1 << kept) - 1 - f
    return min(7, f.bit_length()) if f <= g else 8 + min(7, g.bit_length())
