"""Numbers as text: one notation for each kind of quantity, for all reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ...durable.fileio import size

nbytes = size

DEGREE = "\N{DEGREE SIGN}"  # ` deg` where a table is drawn in ASCII

KEPT_ENOUGH = 0.95  # the share of a change that is left, below which a command warns

Formatter = Callable[[float], str]


def measure(x: float) -> str:
    """Return a measure with 3 significant digits: 0.0288, 13.7, 2.5e-8."""
    if not math.isfinite(x):
        return str(x)
    rounded = float(f"{x:.2e}")
    if rounded == 0:
        return "0"
    size = abs(rounded)
    if not 0.001 <= size < 1e6:
        mantissa, _, exponent = f"{x:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, 2 - math.floor(math.log10(size)))
    return f"{rounded if decimals else x:,.{decimals}f}"


def share(x: float) -> str:
    """Return a share in percent with 3 digits. Below 0.01% return the plain number: 6.56%, 7.5e-6."""
    if x == 0 or not math.isfinite(x):
        return "0%" if x == 0 else str(x)
    return f"{measure(100 * x)}%" if abs(x) >= 1e-4 else measure(x)


def kept_share(x: float) -> str:
    """Return a kept share in percent with 1 decimal. More than 100%, from rounding, is 100%."""
    return "100%" if x >= 0.9995 else f"{100 * x:.1f}%"


def correlation(x: float) -> str:
    return f"{x + 0.0:.2f}".replace("-0.00", "0.00")


def degrees(x: float) -> str:
    """Return an angle, given in radians, in degrees."""
    return f"{math.degrees(x):.0f}{DEGREE}"


def rank(x: float) -> str:
    """Return a rank, or an effective rank with 1 decimal."""
    return str(x) if isinstance(x, int) else f"{x:.1f}"


def scaling(x: float) -> str:
    """Return a scale, alpha / rank, with 3 digits, and all before the point: 2, 0.707, 22.6, 1024."""
    return f"{x:.3g}" if abs(x) < 999.5 else f"{x:.0f}"


def all_digits(x: float) -> str:
    """Return a count of modules or tensors with all its digits."""
    return f"{round(x):,}"


def quantity(x: float) -> str:
    """Return a count of parameters as --params takes it: 582K, 20.0M, 6.74B. Below 10,000 it has all its digits."""
    if x < 10_000:
        return all_digits(x)
    for unit, step in (("K", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if float(f"{x:.2e}") < 1000 * step or unit == "T":
            return measure(x / step) + unit
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Return a duration: 9 s, 4 min, 1 h 12 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def spread(values: Iterable[float | None], write: Formatter) -> str:
    """Return the range of values, with the unit once. One number if both ends look alike; `-` without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = write(min(known)), write(max(known))
    if low == high:
        return low
    if high.endswith("%"):
        return f"{low[:-1] if low.endswith('%') else '<0.01'}..{high}"
    if high.endswith(DEGREE):
        return f"{low.removesuffix(DEGREE)}..{high}"
    number, _, unit = high.partition(" ")
    return f"{low.removesuffix(' ' + unit) if unit else low}..{high}" if unit else f"{low}..{number}"


def number_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as --layers takes them: 0-16,18-31."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def dimensions(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def plural(count: int, word: str, words: str | None = None) -> str:
    """Return a count with its noun: 1 tensor, 3,191 tensors."""
    return f"{count:,} {word if count == 1 else words or word + 's'}"
