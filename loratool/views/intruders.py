"""Counts of intruder dimensions: singular directions of a change that are new to its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..numerics.spectrum import SpectrumPoints
from .parts.document import Line, TextSpan, line
from .parts.numbers import plural

# Of algorithm 1 (`numerics.intruders`), and of the authors' code
TOP, THRESHOLD = 10, 0.5  # its k and its epsilon


@dataclass(frozen=True)
class IntruderRule:
    """Which singular vectors of W' are looked at, and which |cosine| with one of W is a match (numerics.intruders)."""

    top: int
    threshold: float

    @classmethod
    def parse(cls, top: int | None, threshold: float | None) -> IntruderRule:
        """Return the rule for a call's arguments. None means the paper's value.

        Raises:
            UsageError: the threshold is no cosine above 0.
        """
        if threshold is not None and not 0 < threshold <= 1:
            raise UsageError(f"--threshold {threshold} is a cosine: above 0, at most 1")
        return cls(TOP if top is None else top, THRESHOLD if threshold is None else threshold)


@dataclass(frozen=True)
class IntruderCount:
    """The intruder dimensions of a weight, of a stack those of all its matrices.

    Attributes:
        examined: leading left singular vectors of W', less than the rule's for a W' of less rank.
        new: of these have no match in W.
        undecided: of these are in float32's doubt.
        first: the place of the first new one by its singular value, from 1; None without any.
        spectrum: the curve of the singular values that were examined, with the energies of all of W'.
    """

    examined: int
    new: int
    undecided: int
    first: int | None
    spectrum: SpectrumPoints | None = None


def what_is_new(top: int, threshold: float) -> str:
    """Return the sentence that defines an intruder dimension."""
    return (
        f"a left singular vector of a changed weight is new if it is among the {top} leading ones and its |cosine| "
        f"with all of the base's is below {threshold:g} (arXiv:2410.21228)"
    )


def intruder_verdict(counts: Sequence[IntruderCount], rule: IntruderRule) -> Iterator[Line]:
    """Yield lines on the meaning of the counts."""
    new, examined = sum(each.new for each in counts), sum(each.examined for each in counts)
    what = f"of {examined:,} leading left singular vectors, {rule.top} of each matrix at most, are intruder dimensions"
    where = f", in {sum(each.new > 0 for each in counts):,} of {plural(len(counts), 'weight')}" if new else ""
    cosine = f"|cosine| below {rule.threshold:g} with all of the base's"
    yield line(TextSpan(f"{new:,}", "attention" if new else "good"), f" {what}{where}: {cosine}")
    if undecided := sum(each.undecided for each in counts):
        yield line(f"{undecided:,} more are undecided, since singular values are too close to each other")
    if new:
        yield line("more and larger intruder dimensions mean more forgetting (arXiv:2410.21228)")
    else:
        yield line("the largest directions are those of the base, as after a full fine-tune (arXiv:2410.21228)")
