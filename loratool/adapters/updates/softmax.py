"""Compute softmax weights that no library's rounding shows in: each is the float64 number nearest to its real value.

A weight is the inverse of a sum of powers of e. By the theorem of Lindemann and Weierstrass it is irrational unless all
logits are equal, so it is never a tie, and more digits always decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext

EXACT_DIGITS = 2000  # of a difference of two float64 numbers
DIGITS = 40  # tried first


def softmax(logits: Sequence[float]) -> list[float]:
    """Return the weights of finite logits, each the nearest float64 number."""
    with localcontext() as context:
        context.prec = EXACT_DIGITS
        largest = Decimal(max(logits))
        differences = [Decimal(logit) - largest for logit in logits]
        context.prec = DIGITS
        while True:
            powers = [difference.exp() for difference in differences]
            total = sum(powers, Decimal(0))
            # one rounding for each power, each sum and the quotient, of half a digit each
            slack = (2 * len(powers) + 2) * Decimal(10) ** (1 - context.prec)
            ends = [[float(power / total * (1 + side * slack)) for power in powers] for side in (-1, 1)]
            if ends[0] == ends[1]:
                return ends[0]
            context.prec *= 2
