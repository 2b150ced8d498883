"""The fields of an adapter's config that decide rank and scale, in any format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import NeedsFlag
from .patterns import Patterns, Targets


def named_base(value: object) -> str | None:
    """Return the base that a config names; None if the value is not a printable name."""
    return value if isinstance(value, str) and value and value.isprintable() else None


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's `adapter_config.json` that decide rank and scale, or their equivalent in another format."""

    rank: int | None = None  # None if the file does not say
    alpha: float | None = None  # None if the file does not say
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # pattern -> rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # pattern -> alpha
    fan_in_fan_out: bool | None = None
    base_model: str | None = None
    peft: Mapping[str, Any] = field(default_factory=dict)  # all fields of PEFT's config; empty for other formats
    other_fields: Mapping[str, Any] = field(default_factory=dict)  # all fields of another format's config
    rank_is_alpha: bool = False  # a missing alpha means the rank
    base_mutating_inits: Mapping[str, str] = field(default_factory=dict)  # component of a diffusers file -> init
    layers: tuple[int, ...] = ()  # of the base, by their numbers in the model that repeats them; empty if none does

    @property
    def extra(self) -> dict[str, Any]:
        """Return all fields, PEFT's and the other format's."""
        return {**self.other_fields, **self.peft}

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)

    @cached_property
    def parameters(self) -> Mapping[str, Sequence[tuple[int, str]]]:
        """Return `target_parameters` by module ("" for bare names): (index in the list, parameter's name)."""
        by_module: dict[str, list[tuple[int, str]]] = {}
        for number, listed in enumerate(self.peft["target_parameters"]):
            owner, _, parameter = listed.rpartition(".")
            by_module.setdefault(owner, []).append((number, parameter))
        return by_module

    @cached_property
    def targets(self) -> Targets:
        return Targets(self.peft.get("target_modules"))

    def rank_of(self, module: str) -> int | None:
        rank: int | None = self._ranks.value(module, self.rank)
        return rank

    def for_module(self, parameter: str) -> AdapterConfig:
        """Return the config of one bare parameter: patterns are matched with its path, not its module's."""
        alpha = self._alphas.value(parameter, self.alpha)
        return replace(self, rank=self.rank_of(parameter), alpha=alpha, rank_pattern={}, alpha_pattern={})

    def scale_of(self, module: str, rank: int) -> float:
        """Return alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023).

        Raises:
            NeedsFlag: the adapter does not say its alpha.
        """
        alpha: float | None = self._alphas.value(module, self.alpha)
        if alpha is None and self.rank_is_alpha:
            return 1.0
        if alpha is None:
            raise NeedsFlag(
                "the adapter does not say its alpha",
                culprit=module,
                remedy="pass --alpha with the value it was trained with",
                flags="--alpha A",
            )
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def layer_runs(numbers: Iterable[int]) -> str:
    """Return numbers of layers in their order, as runs: 0-2,1-3."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def is_in_listed_module(entry: str, module: str) -> bool:
    """Return whether `module` is, or is inside, a module whose path ends in `entry`, as PEFT decides it.

    `entry` is an item of modules_to_save.
    """
    parts = module.split(".")
    return any(".".join(parts[:stop]).endswith(entry) for stop in range(1, len(parts) + 1))
