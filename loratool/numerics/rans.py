"""Code bytes by how often each is found in its class: interleaved rANS, in integers, the same bytes on any machine.

A range variant of asymmetric numeral systems (Duda, arXiv:1311.2540; interleaved: Giesen, arXiv:1402.3392). Symbols are
bytes; each may have a class, which the decoder knows. A table has a row of 256 frequencies for each class that sum to
2**12, or are all 0 if no symbol is of the class. With frequency f and start s, the sum of the frequencies of smaller
symbols, a state x takes up a symbol as

    if x >= f * 2**20:  write the low 16 bits of x as a word;  x = x >> 16
    x = (x // f) * 2**12 + s + x % f

and gives it back as the symbol with s <= x % 2**12 < s + f, by

    x = f * (x >> 12) + x % 2**12 - s
    if x < 2**16:  x = x << 16 | the next word

There are `lanes(n)` states for n symbols, and lane j has the symbols j, j + lanes, ... The decoder takes the symbols
from the first to the last, the encoder from the last to the first; so the words are in the decoder's order. States are
2**16 at the encoder's start and less than 2**32. The code is the states at its end, 4 bytes each, then the words, 2
bytes each, all little-endian. A decoder knows n, and finds damage: unused words, or states that do not end at 2**16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

from .passes.native import native

Bytes = npt.NDArray[np.uint8]
Table = npt.NDArray[np.uint32]  # (classes, 256)
Counts = npt.NDArray[np.int64]  # (classes, 256)

BITS = 12
TOTAL = 1 << BITS
SYMBOLS = 256
MOST_CLASSES = 16
MOST_SYMBOLS = 1 << 24
MOST_LANES = 4096

_LEAST = np.uint32(1 << 16)  # state
_FRACTION = 16  # bits of `_costs` behind the point
_FEW = 16  # lanes for which Python's integers are faster than numpy's rows
_BULK = 1 << 16  # symbols whose table entries are looked up at a time


def lanes(n: int) -> int:
    """Return the number of states for n symbols: the power of two at or below n / 4096, from 1 to 4096.

    So the states take 0.05 to 0.1 % of n bytes, and a row of lanes is long enough for numpy where n is large.
    """
    return min(MOST_LANES, 1 << max(0, (n >> 12).bit_length() - 1))


def count(symbols: Bytes, classes: Bytes | None, rows: int) -> Counts:
    """Return how often each symbol is found in each class, (rows, 256)."""
    module = native()
    if module is not None:
        counts = np.empty((rows, SYMBOLS), np.uint32)
        module.count_symbols(_address(symbols), _address(classes), symbols.size, _address(counts), rows)
        return counts.astype(np.int64)
    total = np.zeros(rows * SYMBOLS, np.int64)
    for part in _parts(symbols.size):
        total += np.bincount(_index(symbols[part], None if classes is None else classes[part]), minlength=total.size)
    return total.reshape(rows, SYMBOLS)


def frequencies(counts: Counts) -> Table:
    """Return a table for counts: their shares rounded down, at least 1 if found; the largest of a row has the rest."""
    sums = counts.sum(1, keepdims=True)
    table = np.where(counts > 0, np.maximum(1, (counts << BITS) // np.maximum(1, sums)), 0)
    for k in np.flatnonzero(sums[:, 0]):
        while rest := TOTAL - int(table[k].sum()):
            largest = int(table[k].argmax())
            table[k, largest] += max(rest, -(int(table[k, largest]) // 2))
    return table.astype(np.uint32)


def cost(counts: Counts, table: Table) -> int:
    """Return the bits that symbols take by a table, to a millionth a symbol, without states."""
    return int((counts * _costs()[table]).sum()) >> _FRACTION


def mark(symbols: Bytes, classes: Bytes | None, marks: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Change marked symbols to 255, in place, and return the positions of all that are 255.

    Args:
        marks: (classes, 256), that of 255 set.
    """
    module = native()
    if module is not None:
        flat, at = marks.astype(np.uint8), np.empty(symbols.size + 1, np.uint32)
        found = module.mark_symbols(_address(symbols), _address(classes), symbols.size, _address(flat), _address(at))
        return at[:found].copy()
    each = []
    for part in _parts(symbols.size):
        chosen = marks.reshape(-1)[_index(symbols[part], None if classes is None else classes[part])]
        symbols[part][chosen] = SYMBOLS - 1
        each.append(np.flatnonzero(chosen).astype(np.uint32) + np.uint32(part.start))
    return np.concatenate([np.empty(0, np.uint32), *each])


def encode_symbols(symbols: Bytes, classes: Bytes | None, table: Table) -> bytes:
    """Return the code of symbols by a table that has a frequency for each of them.

    Args:
        symbols: (n,), n at most MOST_SYMBOLS.
        classes: (n,), rows of the table; None if it has one.
    """
    assert symbols.size <= MOST_SYMBOLS
    states, module = np.full(lanes(symbols.size), _LEAST, np.uint32), native()
    if not symbols.size:
        return b""
    if module is not None:
        words = np.empty(symbols.size, np.uint16)
        used = module.encode_symbols(
            *(_address(symbols), _address(classes), symbols.size, states.size),
            *(_address(table), len(table), _address(states), _address(words)),
        )
        words = words[words.size - used :]
    else:
        words = (_encode if states.size > _FEW else _encode_singly)(symbols, classes, table, states)
    return states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def decode_symbols(code: bytes | memoryview, n: int, classes: Bytes | None, table: Table) -> Bytes:
    """Return the n symbols of a code.

    Raises:
        ValueError: this is no code of n symbols of these classes by this table.
    """
    check_table(table)
    if n > MOST_SYMBOLS:
        raise ValueError(f"{n} symbols in one code")
    size = 4 * lanes(n) if n else 0
    if not size <= len(code) <= size + 2 * n or len(code) % 2:
        raise ValueError("a code of another length")
    if not n:
        return np.empty(0, np.uint8)
    unused = np.asarray(table.sum(1) == 0)
    if unused.any() and (classes is None or unused[classes].any()):
        raise ValueError("a class without frequencies")
    states = np.frombuffer(code, "<u4", lanes(n)).astype(np.uint32)
    if (states < _LEAST).any():
        raise ValueError("a state that is too small")
    symbols, module = np.empty(n, np.uint8), native()
    words, entries = np.frombuffer(code, "<u2", offset=size), _entries(table)
    if module is not None:
        used = module.decode_symbols(
            *(_address(classes), n, states.size, _address(entries), _address(states)),
            *(_address(words), words.size, _address(symbols)),
        )
    else:
        used = (_decode if states.size > _FEW else _decode_singly)(classes, entries, states, words, symbols)
    if used != words.size or (states != _LEAST).any():
        raise ValueError("words that do not fit")
    return symbols


def check_table(table: Table) -> None:
    """Raise a ValueError unless each row of frequencies sums to 2**12 or 0."""
    sums = table.sum(1, dtype=np.int64)
    if (
        table.ndim != 2
        or table.shape[1] != SYMBOLS
        or len(table) > MOST_CLASSES
        or ((sums != 0) & (sums != TOTAL)).any()
    ):
        raise ValueError(f"frequencies that do not sum to {TOTAL}")


def _encode(symbols: Bytes, classes: Bytes | None, table: Table, states: Table) -> npt.NDArray[np.uint16]:
    """Code into the states, and return the words."""
    width, words = states.size, list[npt.NDArray[np.uint16]]()
    frequency, start = table.reshape(-1), (np.cumsum(table, 1, dtype=np.uint32) - table).reshape(-1)
    bulk = max(1, _BULK // width) * width
    for first in range((symbols.size - 1) // bulk * bulk, -1, -bulk):
        part = slice(first, first + bulk)
        index = _index(symbols[part], None if classes is None else classes[part])
        f, s = frequency[index], start[index]
        most, others = (f << (32 - BITS)) - np.uint32(1), TOTAL - f  # of 2**12 the largest state, modulo 2**32
        for row in range((f.size - 1) // width * width, -1, -width):
            part = slice(row, row + width)
            x = states[: f.size - row]
            full = (x > most[part]).nonzero()[0]
            if full.size:
                wide = x[full]
                words.append(wide.astype(np.uint16))
                x[full] = wide >> 16
            times = x // f[part]
            times *= others[part]
            times += s[part]
            x += times
    return np.concatenate([np.empty(0, np.uint16), *words[::-1]])


def _decode(classes: Bytes | None, entries: Table, states: Table, words: npt.NDArray[np.uint16], symbols: Bytes) -> int:
    """Decode from the states, and return how many words were used, -1 if there are too few."""
    width, at, low = states.size, 0, np.uint32(TOTAL - 1)
    for first in range(0, symbols.size, width):
        out = symbols[first : first + width]
        x = states[: out.size]
        index = x & low
        if classes is not None:
            index |= classes[first : first + width].astype(np.uint32) << BITS
        entry = entries[index]
        out[:] = entry  # the lowest byte
        x >>= BITS
        x *= (entry >> 20) + 1
        x += (entry >> 8) & low
        short = (x < _LEAST).nonzero()[0]
        if short.size:
            if at + short.size > words.size:
                return -1
            x[short] = (x[short] << 16) | words[at : at + short.size]
            at += short.size
    return at


def _encode_singly(symbols: Bytes, classes: Bytes | None, table: Table, states: Table) -> npt.NDArray[np.uint16]:
    index = _index(symbols, classes).tolist()
    frequency, start = table.reshape(-1).tolist(), (np.cumsum(table, 1, dtype=np.uint32) - table).reshape(-1).tolist()
    all_x, words, width = states.tolist(), list[int](), states.size
    for i in range(len(index) - 1, -1, -1):
        f, x = frequency[index[i]], all_x[i % width]
        if x >> (32 - BITS) >= f:
            words.append(x & 0xFFFF)
            x >>= 16
        all_x[i % width] = x + x // f * (TOTAL - f) + start[index[i]]
    states[:] = all_x
    return np.array(words[::-1], np.uint16)


def _decode_singly(
    classes: Bytes | None, entries: Table, states: Table, words: npt.NDArray[np.uint16], symbols: Bytes
) -> int:
    table, starts = entries.tolist(), None if classes is None else (classes.astype(np.intp) << BITS).tolist()
    all_x, rest, width, out = states.tolist(), words.tolist()[::-1], states.size, list[int]()
    for i in range(symbols.size):
        x = all_x[i % width]
        entry = table[(x & (TOTAL - 1)) + (starts[i] if starts else 0)]
        out.append(entry & 0xFF)
        x = ((entry >> 20) + 1) * (x >> BITS) + (entry >> 8 & (TOTAL - 1))
        if x >> 16 == 0:
            if not rest:
                return -1
            x = x << 16 | rest.pop()
        all_x[i % width] = x
    states[:], symbols[:] = all_x, out
    return words.size - len(rest)


def _entries(table: Table) -> Table:
    """Return what a decoder needs at each place of a class, (classes * 2**12,).

    The frequency less 1 (12 bits), the place in the part of the symbol (12), the symbol (8).
    """
    entries = np.zeros((len(table), TOTAL), np.uint32)
    places = np.arange(TOTAL, dtype=np.uint32)
    for row, frequency in zip(entries, table, strict=True):
        if frequency.any():
            each = np.repeat(np.arange(SYMBOLS), frequency)
            starts = np.cumsum(frequency, dtype=np.uint32) - frequency
            row[:] = (frequency[each] - 1) << 20 | (places - starts[each]) << 8 | each.astype(np.uint32)
    return entries.reshape(-1)


@cache
def _costs() -> Counts:
    """Return log2(2**12 / f) of each frequency f times 2**16, by integers alone; that of 0 is 0."""
    f = np.arange(1, TOTAL + 1, dtype=np.uint64)
    whole = np.array([int(each).bit_length() - 1 for each in f], np.uint64)
    x, log = f << (np.uint64(31) - whole), whole.copy()  # 1 <= x / 2**31 < 2: each squaring yields a bit
    for _ in range(_FRACTION):
        x = (x * x) >> np.uint64(31)
        is_two = x >> np.uint64(32)
        x >>= is_two
        log = log << np.uint64(1) | is_two
    return np.concatenate([np.zeros(1, np.int64), (BITS << _FRACTION) - log.astype(np.int64)])


def _index(symbols: Bytes, classes: Bytes | None) -> npt.NDArray[np.uint16]:
    index = symbols.astype(np.uint16)
    if classes is not None:
        index |= classes.astype(np.uint16) << 8
    return index


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, start + _BULK) for start in range(0, n, _BULK))


def _address(x: npt.NDArray[np.generic] | None) -> int:
    assert x is None or x.flags.c_contiguous
    return 0 if x is None else int(x.ctypes.data)
