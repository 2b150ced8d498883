"""Draw what torch draws on a CPU, so that a seed in an adapter's config means the same without torch.

torch's generator on a CPU is the Mersenne Twister of 32 bits (Matsumoto and Nishimura, 1998), started by Knuth's
recurrence from the low 32 bits of the seed (`ATen/core/MT19937RNGEngine.h`). numpy has the same twister, and keeps the
stream of a bit generator from release to release (NEP 19).
"""

from __future__ import annotations

import numpy as np

from .forms import IntArray

WORDS = 624  # of the twister's state
LARGEST = (2**32 - 1) // 20 - 1  # of more numbers, torch draws another permutation since 2025 (pull request 143682)


def permutation_start(seed: int, total: int, count: int) -> IntArray:
    """Return the first `count` numbers of `torch.randperm(total)`, by a CPU generator of that seed.

    Each number changes places with one of those that are not before it, which is drawn (`randperm_cpu` in
    `ATen/native/TensorFactories.cpp`).

    Args:
        total: LARGEST at most.
    """
    steps = _twister(seed).random_raw(count).astype(np.int64) % np.arange(total, total - count, -1)
    moved: dict[int, int] = {}  # place -> its number, where that is not the place itself
    numbers = []
    for place, other in enumerate((np.arange(count) + steps).tolist()):
        numbers.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return np.array(numbers, np.int64)


def _twister(seed: int) -> np.random.MT19937:
    words = [seed & 0xFFFFFFFF]
    for k in range(1, WORDS):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + k) & 0xFFFFFFFF)
    twister = np.random.MT19937(0)
    twister.state = {"bit_generator": "MT19937", "state": {"key": np.array(words, np.uint32), "pos": WORDS}}
    return twister
