"""The names of tensors in a model that repeats layers of another one under new numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class RepeatedLayers:
    """The layers of a view, each of which is a layer of the stored model."""

    path: str  # of the layers, with a dot at the end
    numbers: tuple[int, ...]  # of the stored layers, by the numbers in the view

    @cached_property
    def copies(self) -> Mapping[int, Sequence[int]]:
        """Return the numbers in the view of each stored layer that is there."""
        copies: dict[int, list[int]] = {}
        for new, number in enumerate(self.numbers):
            copies.setdefault(number, []).append(new)
        return copies

    def number_of(self, name: str) -> int | None:
        """Return the number of the layer that a tensor is in; None if it is in none."""
        number = name.removeprefix(self.path).partition(".")[0]
        return int(number) if name.startswith(self.path) and _NUMBER.fullmatch(number) else None

    def renumbered(self, name: str, number: int) -> str:
        """Return the name of a layer's tensor in another layer."""
        rest = name.removeprefix(self.path).partition(".")[2]
        return f"{self.path}{number}.{rest}"

    def stored_name(self, name: str) -> str:
        """Return the stored name of a tensor of the view."""
        number = self.number_of(name)
        if number is None or number >= len(self.numbers):
            return name
        return self.renumbered(name, self.numbers[number])

    def names_of(self, name: str) -> list[str]:
        """Return the names in the view of a stored tensor."""
        number = self.number_of(name)
        return [name] if number is None else [self.renumbered(name, new) for new in self.copies.get(number, ())]

    def least_changed(self, changed: Collection[str]) -> RepeatedLayers:
        """Return the stored layers as layers of the view: of the copies of each, that with the fewest changed tensors.

        Args:
            changed: of the view, which has every stored layer.
        """
        counts = dict.fromkeys(range(len(self.numbers)), 0)
        for number in map(self.number_of, changed):
            if number in counts:
                counts[number] += 1
        return RepeatedLayers(
            self.path, tuple(min(self.copies[number], key=counts.__getitem__) for number in range(len(self.copies)))
        )
